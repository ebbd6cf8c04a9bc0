// The element types that the operators take, and their conversion to and from float.
//
// bfloat16 and float16 are storage types: arithmetic is done in float. Both conversions to 16 bits
// round to nearest, ties to even (IEEE 754-2019, 4.3.1), keep denormals and turn every NaN into a
// quiet NaN; float16 overflows to infinity from 65520 on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Always inlined: these functions are used in files that are compiled for AVX2 or AVX-512. An
// out-of-line copy from such a file could be the one that the linker keeps for the whole program.
#if defined(__GNUC__)
#define FASTLLM_INLINE inline __attribute__((always_inline))
#else
#define FASTLLM_INLINE inline
#endif

namespace fastllm {

enum class DType : std::uint8_t { kFloat32, kBFloat16, kFloat16 };

struct bfloat16 {
    std::uint16_t bits;
};

struct float16 {
    std::uint16_t bits;
};

FASTLLM_INLINE constexpr std::size_t size_in_bytes(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

FASTLLM_INLINE constexpr const char* name_of(DType dtype) {
    return dtype == DType::kFloat32    ? "float32"
           : dtype == DType::kBFloat16 ? "bfloat16"
                                       : "float16";
}

namespace detail {

FASTLLM_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

FASTLLM_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace detail

FASTLLM_INLINE float to_float(float value) { return value; }

FASTLLM_INLINE float to_float(bfloat16 value) {
    return detail::float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

FASTLLM_INLINE float to_float(float16 value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = (value.bits >> 10) & 0x1fu;
    const std::uint32_t fraction = value.bits & 0x3ffu;
    if (exponent == 0) {
        // A denormal is fraction * 2^-24, which float represents exactly.
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return detail::float_of(sign | detail::bits_of(magnitude));
    }
    if (exponent == 0x1f) {
        const std::uint32_t quiet = fraction != 0 ? 0x00400000u : 0u;
        return detail::float_of(sign | 0x7f800000u | quiet | (fraction << 13));
    }
    return detail::float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

template <class T>
T from_float(float value);

template <>
FASTLLM_INLINE float from_float<float>(float value) {
    return value;
}

template <>
FASTLLM_INLINE bfloat16 from_float<bfloat16>(float value) {
    const std::uint32_t bits = detail::bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
FASTLLM_INLINE float16 from_float<float16>(float value) {
    const std::uint32_t bits = detail::bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
    }
    if (magnitude >= 0x477ff000u) {  // 65520, halfway to 2^16
        return {static_cast<std::uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {  // below 2^-14: a denormal
        // The unit in the last place of [0.5, 1) is 2^-24, so this addition rounds as needed.
        const std::uint32_t shifted = detail::bits_of(detail::float_of(magnitude) + 0.5f);
        return {static_cast<std::uint16_t>(sign | (shifted - 0x3f000000u))};
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

}  // namespace fastllm
