// How the ops that end in a norm with shift and scale share out their rows, forward
// (norm_fwd.cuh) and backward (norm_bwd.cuh).
//
// A row belongs to the threads that share threadIdx.y, which hold kPerThread of its elements each
// in registers: every input is read once and every output written once. A block takes a chunk of
// rows of one image; while it works on a row, the next one is on its way.
//
// A row of more elements than a block holds is cut into sections, one per block: each block reads
// the whole row for its sums and writes its own section. No model is so wide: only the kernels for
// single elements can do it.
#pragma once

#include "../math/norm.h"
#include "norm.h"
#include "vec.cuh"

namespace pixelgen::cuda {

constexpr int kPerThread = 8;
constexpr int kMaxThreads = 512;  // of a block: 128 registers a thread

// --- N neighbours of a row

// Elements of rows that allow no packs: dtype known at run time, one element at a time.
struct AnyDtype {};

// N neighbours that are on their way. Nothing waits for them before `values` does, so a thread has
// many under way at a time. T is their dtype; their address is a multiple of a pack's.
template <typename T, int N>
struct Fetched {
  Pack<T, N> pack;

  template <typename Source>
  __device__ __forceinline__ void fetch(const Source& from, int64_t offset) {
    pack = *reinterpret_cast<const Pack<T, N>*>(from.template as<T>() + offset);
  }
  __device__ __forceinline__ void values(DType, float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(pack.values[i]);
  }
};

// The same for a dtype that is known at run time; the branches are the same for all threads. fp64
// is converted on arrival.
template <int N>
struct Fetched<AnyDtype, N> {
  union {
    Pack<float, N> singles;
    Pack<__nv_bfloat16, N> bfloats;
    Pack<__half, N> halves;
  };

  template <typename Source>
  __device__ __forceinline__ void fetch(const Source& from, int64_t offset) {
    const int size = element_size(from.dtype);
    const void* source = from.template as<const char>() + offset * size;
    if (size == 2)
      halves = *static_cast<const Pack<__half, N>*>(source);  // or bf16: the same bytes
    else if (size == 4)
      singles = *static_cast<const Pack<float, N>*>(source);
    else
      load<N, true>(static_cast<const double*>(source), N, singles.values);
  }
  __device__ __forceinline__ void values(DType dtype, float (&out)[N]) const {
    switch (dtype) {
      case DType::kBFloat16:
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(bfloats.values[i]);
        return;
      case DType::kFloat16:
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(halves.values[i]);
        return;
      default:
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = singles.values[i];
        return;
    }
  }
};

// N values to a tensor of T, or of a dtype known at run time.
template <typename T, int N>
__device__ __forceinline__ void store_values(const float (&in)[N], const Dense& to,
                                             int64_t offset) {
  if constexpr (sizeof(T) == 1)
    store_as<N, true>(in, to.data, to.dtype, offset, N);
  else
    store<N, true>(in, to.as<T>() + offset, N);
}

// What a value of T becomes when it is stored.
template <typename T>
__device__ __forceinline__ float rounded(float value, DType dtype) {
  if constexpr (sizeof(T) == 1) {
    if (dtype == DType::kBFloat16) return rounded<__nv_bfloat16>(value, dtype);
    return dtype == DType::kFloat16 ? rounded<__half>(value, dtype) : value;
  } else {
    T stored;
    from_float(value, &stored);
    return to_float(stored);
  }
}

// --- shift, scale, weight and bias

// Those of N neighbouring columns, on their way.
template <int N>
struct FetchedModulation {
  Fetched<AnyDtype, N> weight, bias, shift, scale;

  __device__ __forceinline__ void fetch_affine(const NormRows& p, int c) {
    if (p.weight.data != nullptr) weight.fetch(p.weight, c);
    if (p.bias.data != nullptr) bias.fetch(p.bias, c);
  }
  __device__ __forceinline__ void fetch_scale(const NormRows& p, int64_t image, int64_t row,
                                              int c) {
    if (p.scale.data != nullptr) scale.fetch(p.scale, p.scale.row(image, row) + c);
  }
  __device__ __forceinline__ void fetch_shift(const NormRows& p, int64_t image, int64_t row,
                                              int c) {
    if (p.shift.data != nullptr) shift.fetch(p.shift, p.shift.row(image, row) + c);
  }
};

// What was fetched of `from`, or `otherwise` where nothing was.
template <typename T, int N, typename Source>
__device__ __forceinline__ void values_or(const Fetched<T, N>& fetched, const Source& from,
                                          float otherwise, float (&out)[N], bool is_in = true) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = otherwise;
  if (is_in && from.data != nullptr) fetched.values(from.dtype, out);
}

// --- the rows of a block

// How the work is cut up; the same for forward and backward.
struct Tiling {
  int64_t rows_per_chunk, chunks_per_image;
  int sections;
};

template <int N>
struct BlockRows {
  int64_t image, first, last;  // rows of the image
  int64_t chunk;               // of all images
  int section;

  __device__ BlockRows(const NormRows& p, const Tiling& tiling) {
    section = N == 1 ? int(blockIdx.x % tiling.sections) : 0;
    chunk = N == 1 ? blockIdx.x / tiling.sections : blockIdx.x;
    image = chunk / tiling.chunks_per_image;
    first = chunk % tiling.chunks_per_image * tiling.rows_per_chunk;
    last = min(first + tiling.rows_per_chunk, p.rows_per_image());
  }
};

// First column of a thread's pack.
template <int N>
__device__ __forceinline__ int column(int section, int pack) {
  return ((section * (kPerThread / N) + pack) * int(blockDim.x) + int(threadIdx.x)) * N;
}

// Sums over a row, for the threads that share threadIdx.y; every thread of the block must call it.
// A warp never holds two rows.
class RowSums {
 public:
  __device__ explicit RowSums(float* storage) : storage_(storage) {}

  __device__ __forceinline__ void add(float& a, float& b) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (blockDim.x == kWarpSize) return;  // the same for all threads
    const int warps = int(blockDim.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    float* row = storage_ + 2 * warps * threadIdx.y;
    // two storages in turn: when one is written again, all have read it
    storage_ += is_second_ ? -kSize : kSize;
    is_second_ = !is_second_;
    if (lane == 0) {
      row[2 * (threadIdx.x / kWarpSize)] = a;
      row[2 * (threadIdx.x / kWarpSize) + 1] = b;
    }
    __syncthreads();
    a = warp_sum(lane < warps ? row[2 * lane] : 0.0f);
    b = warp_sum(lane < warps ? row[2 * lane + 1] : 0.0f);
  }
  static constexpr int kSize = 2 * kMaxThreads / kWarpSize;  // floats of one storage

 private:
  float* storage_;
  bool is_second_ = false;
};

// --- launchers

// Blocks of `threads` threads at most: a row of them per row of x, more where rows are narrow.
inline dim3 block_shape(int64_t C, int sections, int threads, int64_t rows_per_chunk) {
  const int64_t per_section = ceil_div(C, int64_t(sections) * kPerThread);
  const int x = int(ceil_div(per_section, kWarpSize) * kWarpSize);
  const int64_t y = threads / x < 1 ? 1 : threads / x;
  return dim3(unsigned(x), unsigned(y < rows_per_chunk ? y : rows_per_chunk));
}

inline Tiling make_tiling(const NormRows& p, int64_t rows_per_chunk, int max_threads) {
  return {rows_per_chunk, ceil_div(p.rows_per_image(), rows_per_chunk),
          int(ceil_div(p.width(), max_threads * kPerThread))};
}

template <typename Kernel, typename Norm, typename Op>
Status launch_rows(Kernel kernel, const Norm& p, const Op& op, const Tiling& tiling, int threads,
                   const Place& place) {
  const int64_t blocks = p.num_images() * tiling.chunks_per_image * tiling.sections;
  if (blocks > kMaxBlocks) return "more chunks of rows than a grid holds";
  return launch(kernel, unsigned(blocks),
                block_shape(p.width(), tiling.sections, threads, tiling.rows_per_chunk), place, p,
                op, tiling);
}

// Whether rows may be accessed in packs of `pack` elements.
inline bool is_packed(const View<3>& x, int pack) {
  return packs_are_aligned(x.data, x.dtype, pack, x.stride[0], x.stride[1]);
}
inline bool is_packed(const Dense& x, int pack, int64_t width) {
  return packs_are_aligned(x.data, x.dtype, pack, width, 0);
}

// The same of what forward and backward both read, by one block.
inline bool norm_is_packed(const NormRows& p, int pack, int max_threads) {
  return p.width() % pack == 0 && p.width() <= max_threads * kPerThread && is_packed(p.x, pack) &&
         is_packed(p.shift, pack) && is_packed(p.scale, pack) &&
         packs_are_aligned(p.weight.data, p.weight.dtype, pack, 0, 0) &&
         packs_are_aligned(p.bias.data, p.bias.dtype, pack, 0, 0);
}

template <typename T_, int N_>
struct PackOf {
  using T = T_;
  static constexpr int N = N_;
};

// Calls fn(PackOf<...>{}): packs of 16 bytes of x's dtype where is_aligned(N), else single
// elements.
template <typename IsAligned, typename Fn>
Status with_packs(DType x_dtype, IsAligned is_aligned, Fn fn) {
  return with_element_type(x_dtype, "x must be fp32, bf16 or fp16", [&](auto element) {
    using T = decltype(element);
    constexpr int kPack = 16 / sizeof(T);
    return is_aligned(kPack) ? fn(PackOf<T, kPack>{}) : fn(PackOf<AnyDtype, 1>{});
  });
}

}  // namespace pixelgen::cuda
