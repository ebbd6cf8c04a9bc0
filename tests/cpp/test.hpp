// A test runner in one header, so that building the tests needs nothing but a compiler.
//
//     TEST(adds_numbers) { CHECK_EQ(1 + 1, 2); CHECK_THROWS(parse("{"), "expected"); }
//     TEST_MAIN()
//
// A failed check prints file, line and both values, and the process exits 1. With an argument, only
// the tests whose names contain it run.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace testing {

struct Case {
    const char* name;
    void (*body)();
};

inline std::vector<Case>& cases() {
    static std::vector<Case> list;
    return list;
}

inline int& failures() {
    static int count = 0;
    return count;
}

struct Register {
    Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

template <class T>
std::string show(const T& value) {
    std::ostringstream out;
    out << value;
    return out.str();
}

template <class T>
std::string show(const std::vector<T>& values) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
    out << ']';
    return out.str();
}

inline void fail(const char* file, int line, const std::string& what) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    ++failures();
}

inline int run(int argc, char** argv) {
    int ran = 0;
    for (const Case& test : cases()) {
        if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
        ++ran;
        try {
            test.body();
        } catch (const std::exception& error) {
            fail(test.name, 0, std::string("unexpected exception: ") + error.what());
        }
    }
    std::printf("%d tests, %d failed checks\n", ran, failures());
    return failures() == 0 && ran > 0 ? 0 : 1;
}

}  // namespace testing

#define TEST(name)                                                        \
    static void test_##name();                                            \
    static const testing::Register registered_##name{#name, test_##name}; \
    static void test_##name()

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) testing::fail(__FILE__, __LINE__, "CHECK(" #condition ")"); \
    } while (0)

#define CHECK_EQ(actual, expected)                                                  \
    do {                                                                            \
        const auto actual_ = (actual);                                              \
        const auto expected_ = (expected);                                          \
        if (!(actual_ == expected_))                                                \
            testing::fail(__FILE__, __LINE__,                                       \
                          #actual " is " + testing::show(actual_) + ", expected " + \
                              testing::show(expected_));                            \
    } while (0)

#define CHECK_THROWS(expression, text)                                            \
    do {                                                                          \
        std::string message_ = "(nothing)";                                       \
        try {                                                                     \
            (void)(expression);                                                   \
        } catch (const std::exception& error_) {                                  \
            message_ = error_.what();                                             \
        }                                                                         \
        if (message_.find(text) == std::string::npos)                             \
            testing::fail(__FILE__, __LINE__,                                     \
                          #expression " threw \"" + message_ + "\", not …" text); \
    } while (0)

#define TEST_MAIN() \
    int main(int argc, char** argv) { return testing::run(argc, argv); }
