// The CUDA device that launches go to.
#pragma once

namespace fastllm::cuda {

// Makes `device` current in this thread, and the previous one again when it goes out of scope.
// Throws std::runtime_error when there is no such device.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = -1;  // -1: nothing to restore
};

}  // namespace fastllm::cuda
