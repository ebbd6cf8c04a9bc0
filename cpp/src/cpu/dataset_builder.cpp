#include "fastllm/dataset_builder.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>

#include "block_encoder.hpp"
#include "fastllm/error.hpp"

namespace fastllm {
namespace {

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
constexpr size_t kInFlightBytes = size_t(24) << 20;
constexpr auto kTick = std::chrono::milliseconds(100);

void add(BuildCounts& total, const BuildCounts& more) {
    total.lines += more.lines;
    total.blank_lines += more.blank_lines;
    total.bad_lines += more.bad_lines;
    total.documents += more.documents;
    total.empty_documents += more.empty_documents;
    total.text_bytes += more.text_bytes;
    total.tokens += more.tokens;
    total.input_bytes += more.input_bytes;
}

}  // namespace

struct DatasetBuilder::Block {
    std::string_view text;
    std::string owned;  // holds `text` when it comes from a stream
    MappedFile* file = nullptr;
    size_t end_offset = 0;  // in `file`
    BlockResult result;
    std::exception_ptr error;
    bool done = false;
};

DatasetBuilder::DatasetBuilder(BuildOptions options, std::shared_ptr<const Encoder> encoder,
                               std::vector<std::unique_ptr<IndexedDatasetWriter>> writers,
                               BuildObserver observer)
    : options_(std::move(options)),
      encoder_(std::move(encoder)),
      writers_(std::move(writers)),
      observer_(std::move(observer)) {
    if (writers_.size() != options_.keys.size()) throw std::invalid_argument("one writer per key");
    if (options_.type == TokenType::uint16 && encoder_->vocab_size() > 65536)
        throw std::invalid_argument("uint16 cannot hold the ids of this vocabulary");
    for (unsigned i = 0; i < std::max(1u, options_.workers); ++i)
        threads_.emplace_back(&DatasetBuilder::run_worker, this);
}

DatasetBuilder::~DatasetBuilder() { stop(); }

void DatasetBuilder::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        queue_.clear();
    }
    work_ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    in_flight_.clear();
}

void DatasetBuilder::run_worker() {
    std::unique_ptr<EncoderThread> encoder;
    std::unique_ptr<BlockEncoder> lines;
    while (true) {
        Block* block = nullptr;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            work_ready_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
            if (stopping_) return;
            block = queue_.front();
            queue_.pop_front();
        }
        try {
            if (!encoder) {
                encoder = encoder_->thread();
                lines = std::make_unique<BlockEncoder>(options_, *encoder);
            }
            lines->encode(block->text, block->result);
        } catch (...) {
            block->error = std::current_exception();
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            block->done = true;
        }
        block_done_.notify_all();
    }
}

std::unique_ptr<DatasetBuilder::Block> DatasetBuilder::new_block() {
    if (free_blocks_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(free_blocks_.back());
    free_blocks_.pop_back();
    block->file = nullptr;
    block->error = nullptr;
    block->done = false;
    return block;
}

void DatasetBuilder::submit(std::unique_ptr<Block> block) {
    // Enough that no worker waits for the writer, few enough that memory stays small; fewer still
    // where lines are so long that blocks are far larger than usual.
    const size_t blocks = 2 * threads_.size() + 1;
    const size_t bytes = std::max(kInFlightBytes, blocks * options_.block_bytes);
    while (in_flight_.size() >= blocks ||
           (!in_flight_.empty() && in_flight_bytes_ + block->text.size() > bytes))
        write_front();
    in_flight_bytes_ += block->text.size();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        queue_.push_back(block.get());
    }
    in_flight_.push_back(std::move(block));
    work_ready_.notify_one();
}

void DatasetBuilder::write_front() {
    Block& block = *in_flight_.front();
    while (true) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (block_done_.wait_for(lock, kTick, [&] { return block.done; })) break;
        lock.unlock();
        if (observer_.waiting) observer_.waiting();
    }
    if (block.error) std::rethrow_exception(block.error);
    const BlockResult& result = block.result;
    if (options_.stop_on_error && !result.bad.empty()) {
        const BadLine& bad = result.bad.front();
        throw InputError(source_ + ":" + std::to_string(line_ + bad.line) + ": " + bad.message);
    }
    for (size_t k = 0; k < writers_.size(); ++k) {
        const BlockOutput& out = result.outputs[k];
        writers_[k]->append(out.tokens.data(), out.tokens.size(), out.lengths,
                            out.sequences_per_document);
    }
    if (observer_.bad_line) {
        for (const BadLine& bad : result.bad)
            observer_.bad_line({source_, line_ + bad.line, bad.message, bad.raw});
    }
    line_ += result.counts.lines;
    add(counts_, result.counts);
    if (block.file) block.file->done_before(block.end_offset);
    in_flight_bytes_ -= block.text.size();
    free_blocks_.push_back(std::move(in_flight_.front()));
    in_flight_.pop_front();
    if (observer_.written) observer_.written(counts_);
}

void DatasetBuilder::drain() {
    while (!in_flight_.empty()) write_front();
}

// After a failure no worker may go on reading memory that the caller is about to free.
template <class Body>
void DatasetBuilder::guarded(const Body& body) {
    if (threads_.empty()) throw std::logic_error("the builder has finished or failed");
    try {
        body();
    } catch (...) {
        stop();
        throw;
    }
}

void DatasetBuilder::add_file(const std::string& path, uint64_t begin, uint64_t end,
                              uint64_t first_line) {
    guarded([&] {
        MappedFile file(path);
        source_ = path;
        line_ = first_line;
        const std::string_view all(file.data(), file.size());
        size_t at = size_t(std::min<uint64_t>(begin, all.size()));
        if (at > 0 &&
            all[at - 1] != '\n') {  // the line that `begin` cuts belongs to what is before it
            const size_t newline = all.find('\n', at);
            at = newline == std::string_view::npos ? all.size() : newline + 1;
        }
        if (at == 0 && all.substr(0, 3) == kByteOrderMark) at = 3;
        const auto limit = size_t(std::min<uint64_t>(end, all.size()));
        try {
            while (at < limit) {
                // Lines that start before `limit`: the last byte that a block must reach is limit
                // - 1.
                const size_t target = std::min(limit, at + options_.block_bytes) - 1;
                const size_t newline = all.find('\n', target);
                const size_t next = newline == std::string_view::npos ? all.size() : newline + 1;
                std::unique_ptr<Block> block = new_block();
                block->text = all.substr(at, next - at);
                block->file = &file;
                block->end_offset = next;
                submit(std::move(block));
                at = next;
            }
            drain();
        } catch (...) {
            stop();  // before `file` is unmapped
            throw;
        }
    });
}

void DatasetBuilder::begin_stream(const std::string& name, uint64_t first_line) {
    guarded([&] {
        drain();
        source_ = name;
        line_ = first_line;
        partial_.clear();
    });
}

void DatasetBuilder::feed(const char* data, size_t size) {
    guarded([&] {
        partial_.append(data, size);
        if (partial_.size() >= options_.block_bytes) cut_partial(false);
    });
}

void DatasetBuilder::end_stream() {
    guarded([&] {
        cut_partial(true);
        drain();
    });
}

void DatasetBuilder::cut_partial(bool all) {
    const size_t newline = partial_.rfind('\n');
    const size_t size = all ? partial_.size() : newline == std::string::npos ? 0 : newline + 1;
    if (size == 0) return;
    std::unique_ptr<Block> block = new_block();
    if (size == partial_.size()) {
        block->owned.swap(partial_);  // no copy of what may be a huge line
        partial_.clear();
    } else {
        block->owned.assign(partial_, 0, size);
        partial_.erase(0, size);
    }
    block->text = block->owned;
    if (line_ == 0 && in_flight_.empty() && block->text.substr(0, 3) == kByteOrderMark)
        block->text.remove_prefix(3);
    submit(std::move(block));
}

std::vector<DatasetPosition> DatasetBuilder::sync() {
    std::vector<DatasetPosition> positions;
    guarded([&] {
        drain();
        for (const auto& writer : writers_) {
            writer->sync();
            positions.push_back(writer->position());
        }
    });
    return positions;
}

std::vector<DatasetPosition> DatasetBuilder::finish() {
    std::vector<DatasetPosition> positions;
    guarded([&] {
        drain();
        for (const auto& writer : writers_) {
            writer->finish();
            positions.push_back(writer->position());
        }
    });
    stop();
    return positions;
}

}  // namespace fastllm
