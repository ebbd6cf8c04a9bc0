// From lines of JSON to Megatron datasets, with many threads and constant memory.
//
// The calling thread cuts the input into blocks of whole lines, hands them to workers, and writes
// their results in the order of the input. So the output does not depend on the number of workers.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fastllm/encoder.hpp"
#include "fastllm/indexed_dataset.hpp"

namespace fastllm {

// What to write for a text without tokens.
enum class EmptyDocument {
    boundary,  // a document without sequences (what Megatron's preprocess_data.py does)
    skip,      // nothing
    eod,       // a document that holds only the end-of-document id
};

// What a line is.
enum class LineFormat {
    json,  // an object; the texts are the values of the keys
    text,  // the text itself
};

struct BuildOptions {
    std::vector<std::string> keys;  // one dataset each
    LineFormat format = LineFormat::json;
    bool append_eod = false;
    bool add_bos = false;
    uint32_t eod_id = 0;
    uint32_t bos_id = 0;
    EmptyDocument empty = EmptyDocument::boundary;
    TokenType type = TokenType::uint16;
    bool stop_on_error = true;
    unsigned workers = 1;
    size_t block_bytes = size_t(1) << 20;
};

struct BuildCounts {
    uint64_t lines = 0;
    uint64_t blank_lines = 0;
    uint64_t bad_lines = 0;
    uint64_t documents = 0;        // lines that became documents
    uint64_t empty_documents = 0;  // texts without tokens, over all keys
    uint64_t text_bytes = 0;       // UTF-8, over all keys
    uint64_t tokens = 0;           // over all keys, EOD and BOS included
    uint64_t input_bytes = 0;
};

struct BadLine {
    std::string source;
    uint64_t line;  // from 1
    std::string message;
    std::string raw;
};

// Called on the thread that adds input.
struct BuildObserver {
    std::function<void(const BadLine&)> bad_line;     // not when stopping at errors
    std::function<void(const BuildCounts&)> written;  // after each block; may throw to stop
    std::function<void()> waiting;                    // now and then while waiting; may throw
};

class DatasetBuilder {
  public:
    // One writer per key, in the same order.
    DatasetBuilder(BuildOptions options, std::shared_ptr<const Encoder> encoder,
                   std::vector<std::unique_ptr<IndexedDatasetWriter>> writers,
                   BuildObserver observer);
    ~DatasetBuilder();
    DatasetBuilder(const DatasetBuilder&) = delete;
    DatasetBuilder& operator=(const DatasetBuilder&) = delete;

    // Adds the lines that start in [begin, end) of a file; `first_line` counts the lines before
    // `begin`. Throws InputError("FILE:LINE: …") at a bad line when stop_on_error.
    void add_file(const std::string& path, uint64_t begin = 0, uint64_t end = ~0ull,
                  uint64_t first_line = 0);

    // The same for bytes that come in pieces.
    void begin_stream(const std::string& name, uint64_t first_line = 0);
    void feed(const char* data, size_t size);
    void end_stream();

    // Waits for all input and makes what is written so far durable; returns each dataset's
    // position.
    std::vector<DatasetPosition> sync();
    // Writes the index files; returns each dataset's end. Nothing can be added afterwards.
    std::vector<DatasetPosition> finish();
    // Abandons what is unfinished and joins the workers. Nothing can be added afterwards.
    void stop();

    const BuildCounts& counts() const { return counts_; }
    uint64_t lines_in_source() const {
        return line_;
    }  // of the current file or stream, written so far

  private:
    struct Block;
    void run_worker();
    void submit(std::unique_ptr<Block> block);
    void write_front();
    void drain();
    template <class Body>
    void guarded(const Body& body);
    void cut_partial(bool all);
    std::unique_ptr<Block> new_block();

    BuildOptions options_;
    std::shared_ptr<const Encoder> encoder_;
    std::vector<std::unique_ptr<IndexedDatasetWriter>> writers_;
    BuildObserver observer_;
    BuildCounts counts_;
    std::string source_;
    uint64_t line_ = 0;
    std::string partial_;  // the end of a stream that is not yet a whole block

    std::deque<std::unique_ptr<Block>> in_flight_;  // in input order
    size_t in_flight_bytes_ = 0;
    std::vector<std::unique_ptr<Block>> free_blocks_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable work_ready_, block_done_;
    std::deque<Block*> queue_;
    bool stopping_ = false;
};

}  // namespace fastllm
