// What the CPU ops share: rows of any dtype as rows of fp32 (or fp64), per-thread scratch, dispatch
// on dtypes.
//
// Every .cpp file of csrc/ops is compiled once per instruction set, into a namespace of its
// own (PIXELGEN_ISA). Nothing here may have external linkage or pull in inline functions of the
// standard library.
#pragma once

#include <cstdint>

#include "../math/half.h"
#include "op.h"

#ifndef PIXELGEN_ISA
#error "PIXELGEN_ISA names the namespace of this instruction set; CMakeLists.txt sets it"
#endif

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

using math::BFloat16;
using math::Float16;

template <typename To, typename From>
struct IsSame {
  static constexpr bool value = false;
};
template <typename T>
struct IsSame<T, T> {
  static constexpr bool value = true;
};

// The row as Real: itself where it is, else converted into `buffer`.
template <typename Real, typename T>
inline const Real* as_real(const T* row, Real* buffer, int64_t n) {
  if constexpr (IsSame<Real, T>::value) {
    return row;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = math::to_real<Real>(row[i]);
    return buffer;
  }
}

template <typename Real, typename T>
inline void load_row(const T* row, Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = math::to_real<Real>(row[i]);
}

template <typename Real, typename T>
inline void store_row(const Real* values, T* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) math::from_real(values[i], &row[i]);
}

// Where to compute a row of T: in place where T is Real, else in `buffer`; `finish_row` then
// converts.
template <typename Real, typename T>
inline Real* real_target(T* row, Real* buffer) {
  if constexpr (IsSame<Real, T>::value)
    return row;
  else
    return buffer;
}

template <typename Real, typename T>
inline void finish_row(const Real* values, T* row, int64_t n) {
  if constexpr (!IsSame<Real, T>::value) store_row(values, row, n);
}

// Elements [offset, offset + n) of a buffer whose dtype is known at run time; `otherwise` n times
// when it is null.
template <typename Real>
inline void load_row(const void* base, DType dtype, int64_t offset, Real otherwise, Real* out,
                     int64_t n) {
  if (base == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = otherwise;
    return;
  }
  switch (dtype) {
    case DType::kFloat32:
      return load_row(static_cast<const float*>(base) + offset, out, n);
    case DType::kBFloat16:
      return load_row(static_cast<const BFloat16*>(base) + offset, out, n);
    case DType::kFloat16:
      return load_row(static_cast<const Float16*>(base) + offset, out, n);
    case DType::kFloat64:
      return load_row(static_cast<const double*>(base) + offset, out, n);
  }
}

template <typename Real>
inline void store_row(const Real* values, void* base, DType dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return store_row(values, static_cast<float*>(base) + offset, n);
    case DType::kBFloat16:
      return store_row(values, static_cast<BFloat16*>(base) + offset, n);
    case DType::kFloat16:
      return store_row(values, static_cast<Float16*>(base) + offset, n);
    case DType::kFloat64:
      return store_row(values, static_cast<double*>(base) + offset, n);
  }
}

// The same of a tensor.
template <typename Real, typename Source>
PIXELGEN_MEMBER void load_row(const Source& from, int64_t offset, Real otherwise, Real* out,
                              int64_t n) {
  load_row(from.data, from.dtype, offset, otherwise, out, n);
}
template <typename Real, typename Target>
PIXELGEN_MEMBER void store_row(const Real* values, const Target& to, int64_t offset, int64_t n) {
  store_row(values, to.data, to.dtype, offset, n);
}

// Sum of term(c) over 0 <= c < n. Many partial sums: one vector register of them would wait for its
// own last addition (four cycles) in every step.
template <typename Real, typename Term>
inline Real sum_columns(int64_t n, Term term) {
  constexpr int kLanes = 256 / sizeof(Real);  // four registers of 64 bytes
  Real sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += term(c + lane);
  }
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t rest = c; rest < n; ++rest) sum += term(rest);
#pragma omp simd reduction(+ : sum)
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// kCount rows of scratch, on the stack of the thread that declares it: nothing to allocate, nothing
// to fail. Rows are one cache line further apart than their width, so that power-of-two widths do
// not compete for the same cache sets.
template <typename Real, int kCount>
class Scratch {
 public:
  explicit Scratch(int64_t width) : stride_((width + kLine - 1) / kLine * kLine + kLine) {}
  Real* row(int index) { return storage_ + index * stride_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(Real);
  int64_t stride_;
  alignas(64) Real storage_[kCount * (kMaxWidth + kLine)];
};

// Calls fn(T{}) with the element type of `dtype`.
template <typename Fn>
inline void with_element_type(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kBFloat16:
      return fn(BFloat16{});
    case DType::kFloat16:
      return fn(Float16{});
    case DType::kFloat64:
      return fn(double{});
  }
}

// The dtype of statistics and accumulation.
template <typename T>
struct Stats {
  using type = float;
};
template <>
struct Stats<double> {
  using type = double;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
