// Devices, for bindings.cpp.
#pragma once

#include "../common.h"

namespace pixelgen::cuda {

// Makes `device` current for a scope. Streams of Torch belong to a device; launches need that
// device to be current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int previous_ = -1;
  Status status_ = nullptr;
};

}  // namespace pixelgen::cuda
