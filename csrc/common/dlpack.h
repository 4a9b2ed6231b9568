// The part of DLPack 1.x (dmlc/dlpack, include/dlpack/dlpack.h) that bindings.cpp uses: the table
// of functions by which a framework shows its tensors, `torch.Tensor.__dlpack_c_exchange_api__`.
// The layout is fixed by DLPack's major version; tests/ops/test_seam.py compares it with Torch's
// header.
#pragma once

#include <cstdint>

namespace pixelgen::dlpack {

constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;            // device types
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;  // dtype codes

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;  // of an older major version, or null
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** out);
  int (*view_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace pixelgen::dlpack
