#include "fastllm/file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "fastllm/error.hpp"

namespace fastllm {
namespace {

constexpr size_t kBufferBytes = size_t(1) << 18;
constexpr uint64_t kWriteBackBytes = uint64_t(8) << 20;

[[noreturn]] void fail(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw InputError(path + ": " + std::strerror(errno));
    struct stat info;
    if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        ::close(fd);
        throw InputError(path + ": not a regular file");
    }
    size_ = size_t(info.st_size);
    if (size_ > 0) {
        void* const map = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
        const int error = errno;
        ::close(fd);
        if (map == MAP_FAILED)
            throw InputError(path + ": cannot be mapped: " + std::strerror(error));
        ::madvise(map, size_, MADV_SEQUENTIAL);
        data_ = static_cast<const char*>(map);
    } else {
        ::close(fd);
    }
}

MappedFile::~MappedFile() {
    if (data_) ::munmap(const_cast<char*>(data_), size_);
}

void MappedFile::done_before(size_t offset) {
    constexpr size_t kStep = size_t(1) << 22;  // a multiple of any page size
    const size_t until = offset / kStep * kStep;
    if (until <= released_) return;
    ::madvise(const_cast<char*>(data_) + released_, until - released_, MADV_DONTNEED);
    released_ = until;
}

FileWriter::FileWriter(const std::string& path, int64_t keep) : path_(path) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | (keep < 0 ? O_CREAT | O_TRUNC : 0), 0666);
    if (fd_ < 0) fail(path);
    if (keep >= 0) {
        if (::ftruncate(fd_, keep) != 0 || ::lseek(fd_, 0, SEEK_END) != keep) fail(path);
        size_ = on_file_ = started_ = uint64_t(keep);
    }
    buffer_.reserve(kBufferBytes);
}

FileWriter::~FileWriter() {
    if (fd_ >= 0) ::close(fd_);
}

void FileWriter::write(const void* data, size_t size) {
    const auto* const bytes = static_cast<const char*>(data);
    size_ += size;
    if (buffer_.size() + size > kBufferBytes) flush();
    if (size >= kBufferBytes)
        write_now(bytes, size);
    else
        buffer_.insert(buffer_.end(), bytes, bytes + size);
}

void FileWriter::write_now(const char* data, size_t size) {
    while (size > 0) {
        const ssize_t written = ::write(fd_, data, size);
        if (written < 0) {
            if (errno == EINTR) continue;
            fail(path_);
        }
        data += written;
        size -= size_t(written);
        on_file_ += uint64_t(written);
    }
#if defined(SYNC_FILE_RANGE_WRITE)
    // Or the disk would stand idle until sync(), which then waits for all of it. Only a hint: what
    // fails here is found by sync().
    if (on_file_ - started_ >= kWriteBackBytes) {
        ::sync_file_range(fd_, off64_t(started_), off64_t(on_file_ - started_),
                          SYNC_FILE_RANGE_WRITE);
        started_ = on_file_;
    }
#endif
}

void FileWriter::flush() {
    write_now(buffer_.data(), buffer_.size());
    buffer_.clear();
}

void FileWriter::sync() {
    flush();
    if (::fsync(fd_) != 0) fail(path_);
}

void FileWriter::close() {
    sync();
    close_temporary();
}

void FileWriter::close_temporary() {
    flush();
    const int fd = fd_;
    fd_ = -1;
    if (::close(fd) != 0) fail(path_);
}

}  // namespace fastllm
