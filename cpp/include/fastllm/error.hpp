// Errors that a user can cause. Everything else that is thrown is a bug in this library.
#pragma once

#include <stdexcept>
#include <string>

namespace fastllm {

// Bad input: the message names the file (and line) and what was expected there.
class InputError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace fastllm
