// Static division of a range over OpenMP threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastllm::cpu {

// Calls body(begin, end) once per thread on consecutive pieces of [0, count). Runs in the calling
// thread when one piece would have fewer than `grain` items: waking a thread costs some
// microseconds.
template <class Body>
void parallel_ranges(std::int64_t count, [[maybe_unused]] std::int64_t grain, const Body& body) {
    if (count <= 0) return;
#if defined(_OPENMP)
    const std::int64_t useful = grain > 0 ? count / grain : count;
    std::int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    if (threads > useful) threads = useful;
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            const std::int64_t n = omp_get_num_threads();
            const std::int64_t i = omp_get_thread_num();
            const std::int64_t begin = count / n * i + (count % n < i ? count % n : i);
            const std::int64_t end = begin + count / n + (i < count % n ? 1 : 0);
            if (begin < end) body(begin, end);
        }
        return;
    }
#endif
    body(0, count);
}

// Calls body(i) for each of [0, count), thread k with k, k + threads, ...: for work that grows with
// i.
template <class Body>
void interleaved(std::int64_t count, const Body& body) {
#if defined(_OPENMP)
    const std::int64_t most = omp_in_parallel() ? 1 : omp_get_max_threads();
    const std::int64_t threads = most < count ? most : count;
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            const std::int64_t step = omp_get_num_threads();
            for (std::int64_t i = omp_get_thread_num(); i < count; i += step) body(i);
        }
        return;
    }
#endif
    for (std::int64_t i = 0; i < count; ++i) body(i);
}

// Elements of work (a few memory accesses each) below which a second thread does not pay.
inline constexpr std::int64_t kElementsPerThread = 16384;

inline std::int64_t rows_per_thread(std::int64_t cols) {
    return cols >= kElementsPerThread ? 1 : (kElementsPerThread + cols - 1) / cols;
}

}  // namespace fastllm::cpu
