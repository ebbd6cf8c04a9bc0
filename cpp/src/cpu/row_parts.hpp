// Sums over rows, column by column, in two stages: how many parts, and which threads do what.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.hpp"
#include "fastllm/dtype.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {

// A part costs cols float additions once more, so it gets 16 rows or more; 64 parts keep that many
// threads busy. Nothing here depends on the number of threads, so neither does the result.
inline std::int64_t parts_of_rows(std::int64_t rows) {
    return std::clamp<std::int64_t>(rows / 16, 1, 64);
}

inline bool stream_rows(DType dtype, std::int64_t rows, std::int64_t cols) {
    return should_stream(rows * cols * static_cast<std::int64_t>(size_in_bytes(dtype)));
}

// Calls part_kernel(part) for each of args.parts, then reduce_kernel(begin, end) on whole cache
// lines of columns.
template <class Args, class PartKernel, class ReduceKernel>
void run_parts(const Args& args, const PartKernel& part_kernel, const ReduceKernel& reduce_kernel) {
    const std::int64_t rows_per_part = (args.rows + args.parts - 1) / args.parts;
    const std::int64_t grain = std::max<std::int64_t>(
        1, rows_per_thread(args.cols) / std::max<std::int64_t>(1, rows_per_part));
    parallel_ranges(args.parts, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) part_kernel(part);
    });
    constexpr std::int64_t kLine = 64;
    parallel_ranges((args.cols + kLine - 1) / kLine,
                    std::max<std::int64_t>(1, kElementsPerThread / (kLine * args.parts)),
                    [&](std::int64_t begin, std::int64_t end) {
                        reduce_kernel(begin * kLine, std::min(end * kLine, args.cols));
                    });
}

}  // namespace fastllm::cpu
