// What instructions compute, as function objects on C++ types.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <type_traits>

#include "ptx_values.hpp"

namespace emulator::ptx {

template <class T>
inline constexpr bool kFloat = std::is_floating_point_v<T>;

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a + b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    }
};
struct Subtract {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a - b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) - static_cast<std::uint64_t>(b));
    }
};
struct Multiply {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a * b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    }
};
struct MultiplyHigh {
    template <class T>
    T operator()(T a, T b) const {
        using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
        return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
    }
};
struct Divide {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a / b;
        else {
            if (b == 0) return static_cast<T>(-1);
            if constexpr (std::is_signed_v<T>) {
                if (b == -1) return Subtract{}(T{0}, a);
            }
            return static_cast<T>(a / b);
        }
    }
};
struct Remainder {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return a;
        if constexpr (std::is_signed_v<T>) {
            if (b == -1) return 0;
        }
        return static_cast<T>(a % b);
    }
};
struct Minimum {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return std::fmin(a, b);
        else
            return std::min(a, b);
    }
};
struct Maximum {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return std::fmax(a, b);
        else
            return std::max(a, b);
    }
};
template <class Op>  // .NaN: a NaN operand makes the result NaN
struct PropagateNan {
    template <class T>
    T operator()(T a, T b) const {
        return a != a ? a : b != b ? b : Op{}(a, b);
    }
};
struct And {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a & b);
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a | b);
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a ^ b);
    }
};
struct Not {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(~a);
    }
};
struct NotPredicate {
    std::uint8_t operator()(std::uint8_t a) const { return a == 0; }
};
struct Negate {
    template <class T>
    T operator()(T a) const {
        if constexpr (kFloat<T>)
            return -a;
        else
            return Subtract{}(T{0}, a);
    }
};
struct Absolute {
    template <class T>
    T operator()(T a) const {
        if constexpr (kFloat<T>)
            return std::fabs(a);
        else
            return a < 0 ? Subtract{}(T{0}, a) : a;
    }
};
struct Identity {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
struct FusedMultiplyAdd {
    template <class T>
    T operator()(T a, T b, T c) const {
        return std::fma(a, b, c);
    }
};
// .rm, which expf uses. Volatile: the compiler knows nothing of the rounding mode.
struct FusedMultiplyAddDown {
    template <class T>
    T operator()(T a, T b, T c) const {
        volatile T x = a;
        std::fesetround(FE_DOWNWARD);
        volatile T result = std::fma(x, b, c);
        std::fesetround(FE_TONEAREST);
        return result;
    }
};
struct MultiplyAddLow {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(Multiply{}(a, b), c);
    }
};
struct MultiplyAddHigh {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(MultiplyHigh{}(a, b), c);
    }
};

#define FLOAT_FUNCTION(Name, expression) \
    struct Name {                        \
        template <class T>               \
        T operator()(T x) const {        \
            return expression;           \
        }                                \
    };
FLOAT_FUNCTION(Reciprocal, T{1} / x)
FLOAT_FUNCTION(SquareRoot, std::sqrt(x))
FLOAT_FUNCTION(ReciprocalRoot, T{1} / std::sqrt(x))
FLOAT_FUNCTION(PowerOfTwo, std::exp2(x))
FLOAT_FUNCTION(LogarithmTwo, std::log2(x))
FLOAT_FUNCTION(Sine, std::sin(x))
FLOAT_FUNCTION(Cosine, std::cos(x))
FLOAT_FUNCTION(HyperbolicTangent, std::tanh(x))
#undef FLOAT_FUNCTION

inline bool is_float(const Type& type) { return type.kind == 'f' || type.kind == 'h'; }

}  // namespace emulator::ptx
