#include "fastllm/softmax.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "softmax_kernel.hpp"

namespace fastllm::cpu {
namespace {

// Causal rows grow with their number, so threads take short pieces in turn: thread k has the pieces
// k, k + threads, ... A kernel fetches the row behind the one it is at, which behind a piece is
// another thread's: of many rows, a piece has 32.
template <class Kernel, class Args>
void run(const Kernel& kernel, const Args& args, std::int64_t rows, bool stream) {
    const std::int64_t piece =
        std::max(rows_per_thread(args.cols), std::min<std::int64_t>(32, rows / 256));
    const std::int64_t pieces = (rows + piece - 1) / piece;
    interleaved(pieces, [&](std::int64_t i) {
        kernel(args, i * piece, (i + 1) * piece < rows ? (i + 1) * piece : rows, stream);
    });
}

bool streams(DType dtype, std::int64_t rows, std::int64_t cols) {
    return should_stream(rows * cols * static_cast<std::int64_t>(size_in_bytes(dtype)));
}

}  // namespace

void softmax_fwd(const SoftmaxFwd& args) {
    const std::int64_t rows = args.batch * args.heads * args.queries;
    run(FASTLLM_KERNELS(softmax).fwd, args, rows, streams(args.dtype, rows, args.cols));
}

void softmax_bwd(const SoftmaxBwd& args) {
    run(FASTLLM_KERNELS(softmax).bwd, args, args.rows, streams(args.dtype, args.rows, args.cols));
}

}  // namespace fastllm::cpu
