// What turns a text into token ids. An Encoder is shared and immutable; each thread has its own
// EncoderThread, which holds caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace fastllm {

// A growing array of token ids. Unlike std::vector it does not clear memory that is about to be
// written.
class IdBuffer {
  public:
    size_t size() const { return size_; }
    const uint32_t* data() const { return ids_.get(); }
    uint32_t operator[](size_t i) const { return ids_[i]; }
    void clear() { size_ = 0; }

    // Room for `count` more ids; write them there and call advance_to().
    uint32_t* grow(size_t count) {
        if (size_ + count > capacity_) {
            const size_t capacity = (size_ + count) * 2;
            std::unique_ptr<uint32_t[]> larger(new uint32_t[capacity]);
            if (size_) std::memcpy(larger.get(), ids_.get(), size_ * sizeof(uint32_t));
            ids_ = std::move(larger);
            capacity_ = capacity;
        }
        return ids_.get() + size_;
    }
    void advance_to(const uint32_t* end) { size_ = size_t(end - ids_.get()); }
    void push_back(uint32_t id) {
        *grow(1) = id;
        ++size_;
    }

  private:
    std::unique_ptr<uint32_t[]> ids_;
    size_t size_ = 0;
    size_t capacity_ = 0;
};

class EncoderThread {
  public:
    virtual ~EncoderThread() = default;
    // Encodes texts[0…n) (valid UTF-8) one after another: appends the ids, and to `ends` the size
    // of `ids` after each text.
    virtual void encode(const std::vector<std::string_view>& texts, IdBuffer& ids,
                        std::vector<size_t>& ends) = 0;
};

class Encoder {
  public:
    virtual ~Encoder() = default;
    virtual std::unique_ptr<EncoderThread> thread() const = 0;
    virtual uint32_t vocab_size() const = 0;
};

}  // namespace fastllm
