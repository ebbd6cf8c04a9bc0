// Columns of strings as lines of JSON, without an object per string: how Parquet reaches the
// builder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastllm {

// A column as Arrow lays it out: row i is data[ends[i] … ends[i + 1]), or null where its bit in
// `validity` (least significant first) is 0. Offsets are 32 or 64 bits wide.
struct StringColumn {
    const uint8_t* validity = nullptr;  // null: every row has a value
    size_t validity_bytes = 0;
    const void* offsets = nullptr;
    size_t offsets_bytes = 0;
    const char* data = nullptr;
    size_t data_bytes = 0;
    size_t first = 0;  // the row of the buffers that is row 0
    bool wide = false;
};

// One line `{"KEY": "text", …}` per row, byte for byte Python's json.dumps(…, ensure_ascii=False)
// for text that is UTF-8; bytes that are not stay as they are. The lines are measured first, then
// written in place: rows may be huge.
class JsonLines {
  public:
    // Throws InputError if a column's buffers do not hold `rows` rows.
    JsonLines(const std::vector<std::string>& keys, std::vector<StringColumn> columns, size_t rows);

    size_t size() const { return size_; }
    void write(char* out) const;  // size() bytes

  private:
    template <class Out>
    void put(Out& out) const;

    std::vector<std::string> before_;  // what stands before each column's text
    std::vector<StringColumn> columns_;
    size_t rows_;
    size_t size_ = 0;
};

}  // namespace fastllm
