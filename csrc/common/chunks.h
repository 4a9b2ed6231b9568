// A mean per sample: the sample's elements are added up in chunks and the chunks' sums in a second
// pass, so the bits depend on the length of a chunk alone.
#pragma once

#include "strided.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// Numbers that take less time than waking a thread.
constexpr int64_t kAlone = 32768;

struct Chunks {
  int64_t samples, size, length;  // elements of a sample, of a chunk
  int64_t width;                  // numbers of an element
};

// Calls fn(b, begin, end) with the elements of every chunk, which is one work item.
template <typename Fn>
inline void for_chunks(const Chunks& chunks, const Place& place, Fn fn) {
  const int64_t size = chunks.size, count = ceil_div(size, chunks.length);
  const bool is_alone = chunks.samples * size * chunks.width <= kAlone;
#pragma omp parallel for schedule(static) num_threads(is_alone ? 1 : place.num_threads)
  for (int64_t item = 0; item < chunks.samples * count; ++item) {
    const int64_t b = item / count, begin = item % count * chunks.length;
    fn(b, begin, min_of(begin + chunks.length, size));
  }
}

struct One {
  double operator()(int64_t) const { return 1; }
};

// means (samples,) = the sums of sum_of(b, begin, end), divided by the size, times factor_of(b).
template <typename Real, typename SumOf, typename FactorOf = One>
inline Status chunk_means(const Dense& means, const Chunks& chunks, const Place& place,
                          SumOf sum_of, FactorOf factor_of = {}) {
  const int64_t count = ceil_div(chunks.size, chunks.length);
  if (chunks.samples * count == 0) return nullptr;
  Real* partials = place.scratch<Real>(chunks.samples * count);
  if (partials == nullptr) return kNoMemory;
  for_chunks(chunks, place, [&](int64_t b, int64_t begin, int64_t end) {
    partials[b * count + begin / chunks.length] = Real(sum_of(b, begin, end));
  });
  for (int64_t b = 0; b < chunks.samples; ++b) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < count; ++chunk) sum += partials[b * count + chunk];
    means.as<Real>()[b] = Real(sum / double(chunks.size) * factor_of(b));
  }
  return nullptr;
}

// Calls fn(Real{}) with the dtype of the sums unless the arguments are wrong.
template <typename Arguments, typename Fn>
inline Status checked(const Arguments& a, Fn fn) {
  const Status status = a.check();
  if (status != nullptr) return status;
  return a.stats() == DType::kFloat64 ? fn(double{}) : fn(float{});
}

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
