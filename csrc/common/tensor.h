// What an op's C++ sees of the tensors that Python passes: memory, shape, strides and dtype. A
// field's type says what is allowed there; whatever else comes is an error of that argument.
#pragma once

#include <cstdint>

#include "../math/host_device.h"

// For functions inside of a struct: see math/host_device.h.
#ifdef __CUDACC__
#define PIXELGEN_MEMBER __host__ __device__ __forceinline__
#else
#define PIXELGEN_MEMBER inline __attribute__((always_inline))
#endif

namespace pixelgen {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kUInt8, kInt64, kOther };

// nullptr when all went well, else a text that lives for ever.
using Status = const char*;

// Widest row that the kernels take; it bounds their scratch.
constexpr int64_t kMaxWidth = 8192;

// Of those below kInt64, as digits: a GPU would hold a table in local memory.
PIXELGEN_INLINE int element_size(DType dtype) { return (0x18224 >> (4 * int(dtype))) & 15; }
PIXELGEN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Strides are in elements. `data` is null where Python passed None, and there alone.
template <int kRank>
struct View {
  void* data;
  int64_t size[kRank], stride[kRank];
  DType dtype;

  template <typename T>
  PIXELGEN_MEMBER T* as() const {
    return static_cast<T*>(data);
  }
  // Whether these are the sizes, or there is no tensor.
  template <typename... Sizes>
  PIXELGEN_MEMBER bool fits(Sizes... sizes) const {
    static_assert(sizeof...(Sizes) == kRank, "a size per dimension");
    const int64_t expected[] = {int64_t(sizes)...};
    for (int i = 0; i < kRank; ++i)
      if (data != nullptr && size[i] != expected[i]) return false;
    return true;
  }
  // Of the element at these indices, those of the last dimensions 0.
  template <typename... Indices>
  PIXELGEN_MEMBER int64_t offset(Indices... indices) const {
    static_assert(sizeof...(Indices) <= kRank, "at most an index per dimension");
    int64_t sum = 0;
    int i = 0;
    ((sum += int64_t(indices) * stride[i++]), ...);  // no loop: it would change how others compile
    return sum;
  }
};

enum class Need { kRequired, kOptional };

// A floating tensor of kRank dimensions with any strides.
template <int kRank, Need kNeed = Need::kRequired>
struct Tensor : View<kRank> {};
template <int kRank>
using Optional = Tensor<kRank, Need::kOptional>;

// The same, or uint8.
template <int kRank>
struct Pixels : View<kRank> {};

// int64, or None.
struct Indices : View<1> {};

// (..., C) of any rank as (outer, inner, C), the last dimension contiguous: a matrix is one outer
// group, and of more than three dimensions all but the last two have to be evenly spaced.
template <Need kNeed = Need::kRequired>
struct Rows : View<3> {};

// (B, C), the same for all rows of a sample, or (B, T, C), or None; the last dimension contiguous.
template <Need kNeed = Need::kRequired>
struct PerSample : View<3> {
  bool per_row;

  PIXELGEN_MEMBER int64_t row(int64_t sample, int64_t row) const {  // with stride 0 unless per_row
    return sample * stride[0] + row * stride[1];
  }
};

// A dense floating tensor of any shape; `data` is null where it has no elements.
struct Dense {
  void* data;
  int64_t numel;
  DType dtype;

  template <typename T>
  PIXELGEN_MEMBER T* as() const {
    return static_cast<T*>(data);
  }
  PIXELGEN_MEMBER bool holds(int64_t count, DType expected) const {
    return numel == count && dtype == expected;
  }
  // Or nothing is asked for.
  PIXELGEN_MEMBER bool holds_or_empty(int64_t count, DType expected) const {
    return numel == 0 || holds(count, expected);
  }
};

}  // namespace pixelgen
