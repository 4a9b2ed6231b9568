// What the ops of a pixel path share: d channels of a pixel, its packed modulation, gradients of
// weights summed over pixels.
#pragma once

#include <cstring>

#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kMaxPixelWidth = 64;

inline int64_t num_pixels(const View<3>& rows) { return rows.size[0] * rows.size[1]; }

// Where a pixel begins in (R, Q, ...). Without a division where the pixels are evenly spaced.
inline int64_t at(const View<3>& rows, int64_t pixel) {
  const int64_t inner = rows.size[1];
  if (rows.stride[0] == inner * rows.stride[1]) return pixel * rows.stride[1];
  return rows.offset(pixel / inner, pixel % inner);
}

template <typename Real>
constexpr DType dtype_of() {
  return IsSame<Real, float>::value ? DType::kFloat32 : DType::kFloat64;
}

// Channels of a pixel as Real. kD: d where it is known at compile time, else 0; then a pixel is a
// register or two, and no loop. GCC 12 stores 16 numbers of bf16 in two halves, and reading them as
// one AVX-512 register then waits for both.
template <int kD, typename Real>
PIXELGEN_MEMBER void load_channels(const View<3>& from, int64_t offset, Real* out, int64_t d) {
  if constexpr (kD > 0) {
    if (from.dtype == dtype_of<Real>()) {
      std::memcpy(out, from.as<Real>() + offset, kD * sizeof(Real));
      return;
    }
  }
  if constexpr (kD == 16 && IsSame<Real, float>::value) {
    if (from.dtype == DType::kBFloat16) {
      typedef uint16_t Halves __attribute__((vector_size(32)));
      typedef uint32_t Words __attribute__((vector_size(64)));
      Halves halves;
      std::memcpy(&halves, from.as<BFloat16>() + offset, sizeof(halves));
      const Words words = __builtin_convertvector(halves, Words) << 16;
      std::memcpy(out, &words, sizeof(words));
      return;
    }
  }
  load_row(from, offset, Real(0), out, d);
}

// Fetches `count` channels of a pixel that is read later, in the meantime of something else.
PIXELGEN_INLINE void prefetch_channels(const View<3>& from, int64_t offset, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t size = element_size(from.dtype);
  const char* data = static_cast<const char*>(from.data) + offset * size;
  for (int64_t byte = 0; byte < count * size; byte += kLine) __builtin_prefetch(data + byte);
}

template <int kD, typename Real>
PIXELGEN_MEMBER void store_channels(const Real* values, const Dense& to, int64_t offset,
                                    int64_t d) {
  if constexpr (kD > 0) {
    if (to.dtype == dtype_of<Real>()) {
      std::memcpy(to.as<Real>() + offset, values, kD * sizeof(Real));
      return;
    }
  }
  store_row(values, to, offset, d);
}

// Calls fn(worker, first, last) with a share of `items` for each of `workers` threads.
template <typename Fn>
inline void share(int64_t items, int workers, Fn fn) {
#pragma omp parallel for schedule(static) num_threads(workers)
  for (int worker = 0; worker < workers; ++worker)
    fn(worker, items * worker / workers, items * (worker + 1) / workers);
}

// Threads that have something to do.
inline int workers_for(int64_t items, const Place& place) {
  return int(min_of(items, place.num_threads));
}

// Where the gradient of a modulation goes. In the place of the modulation the kinds that an op does
// not read belong to another op, which has written them or still reads them; else they are zeros.
template <int kD>
struct GradModulation {
  const Dense& to;
  int64_t kinds, d;
  bool is_in_place;

  template <typename Real>
  PIXELGEN_MEMBER void store(int64_t pixel, int64_t kind, const Real* values) const {
    store_channels<kD>(values, to, (pixel * kinds + kind) * d, d);
  }
  template <int kCount, typename Real>
  PIXELGEN_MEMBER void store_zeros(int64_t pixel, int64_t first, Real) const {
    alignas(64) static constexpr Real zeros[kCount * kMaxPixelWidth] = {};
    if (!is_in_place)
      store_channels<kCount * kD>(zeros, to, (pixel * kinds + first) * d, kCount * d);
  }
};

// 1 / sqrt(mean(x^2) + eps)
template <typename Real>
inline Real rms_rstd(const Real* x, int64_t d, double eps) {
  Real squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < d; ++c) squares += x[c] * x[c];
  const Real square = squares / Real(d) + Real(eps);
  if constexpr (IsSame<Real, float>::value) return 1.0f / __builtin_sqrtf(square);
  return Real(1) / Real(__builtin_sqrt(square));
}

template <typename Real, typename Term>
inline Real sum_channels(int64_t d, Term term) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += term(c);
  return sum;
}

// What is known at compile time of the width d; 0: nothing.
template <int kD>
struct PixelWidth {
  static constexpr int value = kD;
};

// Calls fn(Real{}, PixelWidth<kD>{}).
template <typename Fn>
inline void with_width(DType of_x, int64_t d, Fn fn) {
  const auto widths = [&](auto real) {
    d == 8    ? fn(real, PixelWidth<8>{})
    : d == 16 ? fn(real, PixelWidth<16>{})
              : fn(real, PixelWidth<0>{});
  };
  of_x == DType::kFloat64 ? widths(double{}) : widths(float{});
}

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
