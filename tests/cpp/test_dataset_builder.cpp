#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "fastllm/dataset_builder.hpp"
#include "fastllm/error.hpp"
#include "test.hpp"

using namespace fastllm;

namespace {

// One id per byte, plus 10; so that outputs can be written down by hand.
class ByteEncoder : public Encoder {
  public:
    class Thread : public EncoderThread {
        void encode(const std::vector<std::string_view>& texts, IdBuffer& ids,
                    std::vector<size_t>& ends) override {
            for (const std::string_view text : texts) {
                for (const char c : text) ids.push_back(uint8_t(c) + 10u);
                ends.push_back(ids.size());
            }
        }
    };
    std::unique_ptr<EncoderThread> thread() const override { return std::make_unique<Thread>(); }
    uint32_t vocab_size() const override { return 300; }
};

struct Folder {
    Folder() {
        char name[] = "/tmp/fastllm-test-XXXXXX";
        path = ::mkdtemp(name);
    }
    ~Folder() {
        for (const char* file :
             {"in", "out.bin", "out.idx", "out.idx.lengths", "out.idx.documents"})
            ::unlink((path + "/" + file).c_str());
        ::rmdir(path.c_str());
    }
    std::string path;
};

std::string slurp(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream out;
    out << file.rdbuf();
    return out.str();
}

struct Built {
    std::string bin, idx;
    BuildCounts counts;
    std::vector<std::string> bad;
};

Built build(const std::string& input, BuildOptions options, bool stream = false) {
    const Folder folder;
    std::ofstream(folder.path + "/in", std::ios::binary) << input;
    options.keys = {"text"};
    std::vector<std::unique_ptr<IndexedDatasetWriter>> writers;
    writers.push_back(std::make_unique<IndexedDatasetWriter>(
        folder.path + "/out.bin", folder.path + "/out.idx", options.type));
    Built built;
    BuildObserver observer;
    observer.bad_line = [&](const BadLine& bad) {
        built.bad.push_back(std::to_string(bad.line) + " " + bad.raw);
    };
    DatasetBuilder builder(options, std::make_shared<ByteEncoder>(), std::move(writers), observer);
    if (stream) {
        builder.begin_stream("in");
        for (size_t at = 0; at < input.size(); at += 7)
            builder.feed(input.data() + at, std::min<size_t>(7, input.size() - at));
        builder.end_stream();
    } else {
        builder.add_file(folder.path + "/in");
    }
    builder.finish();
    built.counts = builder.counts();
    built.bin = slurp(folder.path + "/out.bin");
    built.idx = slurp(folder.path + "/out.idx");
    return built;
}

template <class T>
std::vector<T> numbers(const std::string& bytes, size_t at, size_t count) {
    std::vector<T> values(count);
    std::memcpy(values.data(), bytes.data() + at, count * sizeof(T));
    return values;
}

}  // namespace

TEST(writes_the_format) {
    BuildOptions options;
    options.append_eod = true;
    options.eod_id = 2;
    const Built built =
        build("{\"text\": \"ab\"}\n{\"text\": \"\"}\n\n{\"text\": [\"c\", \"\", \"d\"]}", options);
    CHECK_EQ(numbers<uint16_t>(built.bin, 0, built.bin.size() / 2),
             (std::vector<uint16_t>{'a' + 10, 'b' + 10, 2, 'c' + 10, 'd' + 10, 2}));
    CHECK_EQ(built.idx.size(), size_t(34 + 3 * 12 + 4 * 8));
    CHECK_EQ(built.idx.substr(0, 9), std::string("MMIDIDX\0\0", 9));
    CHECK_EQ(numbers<uint64_t>(built.idx, 9, 1)[0], uint64_t(1));
    CHECK_EQ(int(built.idx[17]), 8);
    CHECK_EQ(numbers<uint64_t>(built.idx, 18, 2), (std::vector<uint64_t>{3, 4}));
    CHECK_EQ(numbers<int32_t>(built.idx, 34, 3), (std::vector<int32_t>{3, 1, 2}));
    CHECK_EQ(numbers<int64_t>(built.idx, 46, 3), (std::vector<int64_t>{0, 6, 8}));
    CHECK_EQ(numbers<int64_t>(built.idx, 70, 4), (std::vector<int64_t>{0, 1, 1, 3}));
    CHECK_EQ(built.counts.documents, uint64_t(3));
    CHECK_EQ(built.counts.blank_lines, uint64_t(1));
    CHECK_EQ(built.counts.tokens, uint64_t(6));
}

TEST(any_number_of_workers_and_any_block_size_give_the_same_bytes) {
    std::string input;
    for (int i = 0; i < 500; ++i)
        input += "{\"text\": \"" + std::string(size_t(i % 37), char('a' + i % 26)) + "\"}\n";
    BuildOptions options;
    const Built one = build(input, options);
    for (const unsigned workers : {1u, 2u, 5u}) {
        for (const size_t block : {size_t(1), size_t(100), size_t(1) << 20}) {
            for (const bool stream : {false, true}) {
                options.workers = workers;
                options.block_bytes = block;
                const Built other = build(input, options, stream);
                CHECK(other.bin == one.bin && other.idx == one.idx);
            }
        }
    }
}

TEST(bos_and_empty_documents) {
    BuildOptions options;
    options.add_bos = true;
    options.bos_id = 1;
    options.eod_id = 2;
    options.empty = EmptyDocument::eod;
    CHECK_EQ(numbers<uint16_t>(build("{\"text\": \"\"}\n{\"text\": \"a\"}\n", options).bin, 0, 3),
             (std::vector<uint16_t>{2, 1, 'a' + 10}));
    options.empty = EmptyDocument::skip;
    CHECK_EQ(
        numbers<uint64_t>(build("{\"text\": \"\"}\n{\"text\": \"a\"}\n", options).idx, 26, 1)[0],
        2u);
}

TEST(stops_at_the_first_bad_line_whatever_the_blocks) {
    const std::string input = "{\"text\": \"a\"}\n{\"text\": \"b\"}\nbad\n{\"text\": 1}\n";
    for (const size_t block : {size_t(1), size_t(1000)}) {
        BuildOptions options;
        options.block_bytes = block;
        options.workers = 3;
        CHECK_THROWS(build(input, options), ":3: column 1: not JSON");
    }
}

TEST(skips_and_reports_bad_lines) {
    BuildOptions options;
    options.stop_on_error = false;
    options.block_bytes = 1;
    const Built built = build("{\"text\": \"a\"}\nbad\n{\"x\": 1}\n{\"text\": \"b\"}\n", options);
    CHECK_EQ(built.bad, (std::vector<std::string>{"2 bad", "3 {\"x\": 1}"}));
    CHECK_EQ(built.bin.size(), size_t(4));
    CHECK_EQ(built.counts.bad_lines, uint64_t(2));
}

TEST(byte_order_mark_is_no_text) {
    CHECK_EQ(build("\xEF\xBB\xBF{\"text\": \"a\"}\n", BuildOptions()).bin.size(), size_t(2));
    CHECK_EQ(build("\xEF\xBB\xBF{\"text\": \"a\"}\n", BuildOptions(), true).bin.size(), size_t(2));
}

TEST(a_missing_file_is_an_input_error) {
    const Folder folder;
    CHECK_THROWS(MappedFile(folder.path + "/none"), "No such file");
    CHECK_THROWS(MappedFile{folder.path}, "not a regular file");
}

TEST_MAIN()
