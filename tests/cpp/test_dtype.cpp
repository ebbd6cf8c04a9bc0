#include <cmath>
#include <limits>

#include "fastllm/dtype.hpp"
#include "test.hpp"

namespace {

using fastllm::bfloat16;
using fastllm::float16;
using fastllm::from_float;
using fastllm::to_float;

// The value of a 16-bit pattern from the formats' definition, in double.
double value_of(unsigned bits, int exponent_bits) {
    const int fraction_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(bits >> fraction_bits & ((1u << exponent_bits) - 1));
    const double fraction = bits & ((1u << fraction_bits) - 1);
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
        return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
    return sign * std::ldexp(1.0 + std::ldexp(fraction, -fraction_bits), exponent - bias);
}

template <class T>
void check_every_pattern(int exponent_bits) {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const float value = to_float(T{static_cast<std::uint16_t>(bits)});
        const double expected = value_of(bits, exponent_bits);
        if (std::isnan(expected)) {
            CHECK(std::isnan(value));
            CHECK(std::isnan(to_float(from_float<T>(value))));
        } else {
            CHECK_EQ(static_cast<double>(value), expected);
            CHECK_EQ(from_float<T>(value).bits, bits);
        }
    }
}

// Between neighbours a < b: just under the middle rounds to a, just over to b, the middle to the
// even one.
template <class T>
void check_rounding(unsigned infinity) {
    for (unsigned bits = 0; bits + 1 < infinity; ++bits) {
        const float a = to_float(T{static_cast<std::uint16_t>(bits)});
        const float b = to_float(T{static_cast<std::uint16_t>(bits + 1)});
        const float middle = static_cast<float>((static_cast<double>(a) + b) / 2);
        if (middle == a || middle == b) continue;  // bfloat16 denormals: float has none between
        CHECK_EQ(from_float<T>(middle).bits, bits % 2 == 0 ? bits : bits + 1);
        CHECK_EQ(from_float<T>(std::nextafter(middle, a)).bits, bits);
        CHECK_EQ(from_float<T>(std::nextafter(middle, b)).bits, bits + 1);
        CHECK_EQ(from_float<T>(-std::nextafter(middle, b)).bits, bits + 1 + 0x8000);
    }
}

}  // namespace

TEST(bfloat16_patterns) { check_every_pattern<bfloat16>(8); }
TEST(float16_patterns) { check_every_pattern<float16>(5); }
TEST(bfloat16_rounding) { check_rounding<bfloat16>(0x7f80); }
TEST(float16_rounding) { check_rounding<float16>(0x7c00); }

TEST(overflow) {
    CHECK_EQ(from_float<float16>(65519.996f).bits, 0x7bff);
    CHECK_EQ(from_float<float16>(65520.0f).bits, 0x7c00);
    CHECK_EQ(from_float<float16>(-1e30f).bits, 0xfc00);
    CHECK_EQ(from_float<bfloat16>(std::numeric_limits<float>::max()).bits, 0x7f80);
}

TEST(nan_whose_payload_is_in_the_dropped_bits) {
    const float nan = fastllm::detail::float_of(0x7f800001u);
    CHECK(std::isnan(to_float(from_float<bfloat16>(nan))));
    CHECK(std::isnan(to_float(from_float<float16>(nan))));
}

TEST_MAIN()
