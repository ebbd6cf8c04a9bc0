// Files: a read-only mapping, and a writer that checks every call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastllm {

// A file mapped into memory, read only. Bytes past the end must not be read.
class MappedFile {
  public:
    // Throws InputError if the file cannot be opened or is not a regular file.
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const char* data() const { return data_; }
    size_t size() const { return size_; }
    const std::string& path() const { return path_; }

    // Tells the kernel that the bytes before `offset` are not needed again, so that reading a large
    // file does not fill the process's memory with it.
    void done_before(size_t offset);

  private:
    std::string path_;
    const char* data_ = nullptr;
    size_t size_ = 0;
    size_t released_ = 0;
};

// A buffered file to write. Any failure throws std::system_error that names the path.
class FileWriter {
  public:
    // Creates the file, or with `keep` ≥ 0 opens an existing one and cuts it to `keep` bytes.
    explicit FileWriter(const std::string& path, int64_t keep = -1);
    ~FileWriter();
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;

    void write(const void* data, size_t size);
    void flush();
    void sync();             // flush, and wait until it is on disk
    void close();            // flush, sync and close
    void close_temporary();  // flush and close a file that need not survive a crash
    uint64_t size() const { return size_; }
    const std::string& path() const { return path_; }

  private:
    void write_now(const char* data, size_t size);

    std::string path_;
    int fd_ = -1;
    uint64_t size_ = 0;
    uint64_t on_file_ = 0;  // without what is in `buffer_`
    uint64_t started_ = 0;  // what is before it is on its way to the disk
    std::vector<char> buffer_;
};

}  // namespace fastllm
