#include "fastllm/matmul.hpp"

#include <algorithm>
#include <cstddef>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "dispatch.hpp"
#include "fastllm/huge_pages.hpp"
#include "matmul_kernel.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {
namespace {

// Below this many multiplications a second thread does not pay.
constexpr std::int64_t kProductsPerThread = std::int64_t{1} << 20;

// Kept from call to call: fresh memory costs page faults.
struct Buffers {
    HugePageVector<float> a, b;
    void grow(const Matmul& part) {
        const std::int64_t depth = std::min(part.k, kDepth);
        resize(a, depth * (std::min(part.m, kRowsAtOnce) + kTileLimit));
        resize(b, depth * (std::min(part.n, kColsAtOnce) + kTileLimit));
    }

  private:
    static void resize(HugePageVector<float>& buffer, std::int64_t count) {
        if (buffer.size() < static_cast<std::size_t>(count)) {
            buffer = {};
            buffer.resize(static_cast<std::size_t>(count));
        }
    }
};

struct Range {
    std::int64_t begin, end;
};

// Of `count` in pieces of `step`, the share of thread i of n.
Range share(std::int64_t count, std::int64_t step, std::int64_t i, std::int64_t n) {
    const std::int64_t pieces = (count + step - 1) / step;
    return {std::min(count, pieces * i / n * step), std::min(count, pieces * (i + 1) / n * step)};
}

// Threads over the rows of c, the others over its columns: a thread packs its rows of a and its
// columns of b, and the division with the fewest of both is the best.
std::int64_t threads_over_rows(const Matmul& args, std::int64_t threads) {
    std::int64_t best = 1;
    const auto packed = [&](std::int64_t over_rows) {
        return args.m / over_rows + args.n / (threads / over_rows);
    };
    for (std::int64_t over_rows = 2; over_rows <= threads; ++over_rows) {
        if (threads % over_rows == 0 && packed(over_rows) < packed(best)) best = over_rows;
    }
    return best;
}

bool is_intel() {
#if defined(__x86_64__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0) return false;
    return ebx == signature_INTEL_ebx && ecx == signature_INTEL_ecx && edx == signature_INTEL_edx;
#else
    return false;
#endif
}

}  // namespace

void matmul(const Matmul& args) {
    if (args.m <= 0 || args.n <= 0) return;
    const MatmulKernels& kernels = FASTLLM_KERNELS(matmul);
    if (args.k <= 0) {
        if (args.accumulate) return;
        for (std::int64_t r = 0; r < args.m; ++r) {
            std::fill_n(args.c + r * args.c_row, args.n, 0.0f);
        }
        return;
    }
    std::int64_t threads = 1;
#if defined(_OPENMP)
    if (!omp_in_parallel()) threads = omp_get_max_threads();
#endif
    const std::int64_t products = args.m * args.n * args.k;
    threads = std::max<std::int64_t>(1, std::min(threads, products / kProductsPerThread));
    const std::int64_t over_rows = threads_over_rows(args, threads);
    const std::int64_t over_cols = threads / over_rows;
    interleaved(threads, [&](std::int64_t thread) {
        const Range rows = share(args.m, kernels.rows, thread / over_cols, over_rows);
        const Range cols = share(args.n, kernels.cols, thread % over_cols, over_cols);
        if (rows.begin == rows.end || cols.begin == cols.end) return;
        Matmul part = args;
        part.m = rows.end - rows.begin;
        part.n = cols.end - cols.begin;
        part.a += rows.begin * args.a_row;
        part.b += cols.begin * args.b_col;
        part.c += rows.begin * args.c_row + cols.begin;
        thread_local Buffers buffers;
        buffers.grow(part);
        kernels.part(part, buffers.a.data(), buffers.b.data());
    });
}

bool matmul_pays() {
    static const bool intel = is_intel();
    return !intel && current_isa() == Isa::kAvx512;
}

}  // namespace fastllm::cpu
