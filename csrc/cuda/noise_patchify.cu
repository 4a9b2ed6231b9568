// Bound by bytes with given noise (image and noise read once, tokens and clean tokens written
// once), by arithmetic with Philox. Threads follow the image: those that share threadIdx.y walk one
// image row, each takes kPixels neighbouring pixels of kC channels. Eight pixels are two groups of
// Philox, one 16-byte access of noise or tokens in half precision, and, for three channels
// interleaved, three.
#include "../math/flow.h"
#include "../math/normal.h"
#include "../noise_patchify.h"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxSide = 0x7fffffff;

template <typename E>
__device__ __forceinline__ float value_of(E element) {
  return to_float(element);
}
template <>
__device__ __forceinline__ float value_of(uint8_t element) {
  return math::pixel(float(element));
}

// kPixels neighbours of kC channels, all loads before their first use. kIsPacked: as packs.
template <int kC, int kPixels, bool kIsPacked, typename E>
__device__ __forceinline__ void load_elements(const E* source, int64_t stride_c, int64_t stride_w,
                                              float (&out)[kC][kPixels]) {
  Pack<E, kPixels> packs[kC];
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    if constexpr (kIsPacked) {
      packs[j] = *reinterpret_cast<const Pack<E, kPixels>*>(source + j * stride_c);
    } else {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) packs[j].values[i] = source[j * stride_c + i * stride_w];
    }
  }
#pragma unroll
  for (int j = 0; j < kC; ++j) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) out[j][i] = value_of(packs[j].values[i]);
  }
}

template <int kC, int kPixels, typename E>
__device__ __forceinline__ void load_pixels_of(const void* base, int64_t offset, int64_t stride_c,
                                               int64_t stride_w, bool is_packed,
                                               float (&out)[kC][kPixels]) {
  const E* source = static_cast<const E*>(base) + offset;
  if (is_packed)
    load_elements<kC, kPixels, true>(source, stride_c, stride_w, out);
  else
    load_elements<kC, kPixels, false>(source, stride_c, stride_w, out);
}

// The branches are the same for all threads.
template <int kC, int kPixels>
__device__ __forceinline__ void load_pixels(const void* base, bool is_uint8, DType dtype,
                                            int64_t offset, int64_t stride_c, int64_t stride_w,
                                            bool is_packed, float (&out)[kC][kPixels]) {
  if (is_uint8)
    load_pixels_of<kC, kPixels, uint8_t>(base, offset, stride_c, stride_w, is_packed, out);
  else if (dtype == DType::kFloat32)
    load_pixels_of<kC, kPixels, float>(base, offset, stride_c, stride_w, is_packed, out);
  else if (dtype == DType::kBFloat16)
    load_pixels_of<kC, kPixels, __nv_bfloat16>(base, offset, stride_c, stride_w, is_packed, out);
  else
    load_pixels_of<kC, kPixels, __half>(base, offset, stride_c, stride_w, is_packed, out);
}

// Noise of the elements `first` + j * channel_size + i. More than one pixel are whole groups of
// four.
template <int kC, int kPixels>
__device__ __forceinline__ void draw_pixels(const math::PhiloxStream& stream, int64_t first,
                                            int64_t channel_size, float (&out)[kC][kPixels]) {
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    const int64_t element = first + j * channel_size;
#pragma unroll
    for (int i = 0; i < kPixels; i += 4) {
      const math::NormalGroup normal = math::philox_normal(stream, uint32_t((element + i) / 4));
      const float values[4] = {normal.low.first, normal.low.second, normal.high.first,
                               normal.high.second};
      if constexpr (kPixels == 1) {
        const int lane = int(element % 4);
        out[j][0] = lane == 0   ? values[0]
                    : lane == 1 ? values[1]
                    : lane == 2 ? values[2]
                                : values[3];
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) out[j][i + k] = values[k];
      }
    }
  }
}

// Channels c to c + kC - 1 of one run of pixels, which starts at (row, col) of its patch.
template <typename T, int kC, int kPixels>
__device__ __forceinline__ void store_pixels(const float (&values)[kC][kPixels], T* token,
                                             bool channel_last, int64_t C, int P, int64_t c,
                                             int row, int col) {
  if (!channel_last) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      store<kPixels, true>(values[j], token + ((c + j) * P + row) * P + col, kPixels);
    }
  } else if constexpr (kC == 1) {
    T* target = token + (int64_t(row) * P + col) * C + c;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) from_float(values[0][i], &target[i * C]);
  } else {
    T* target = token + (int64_t(row) * P + col) * kC;
#pragma unroll
    for (int part = 0; part < kC; ++part) {
      float neighbours[kPixels];
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const int index = part * kPixels + k;
        neighbours[k] = values[index % kC][index / kC];
      }
      store<kPixels, true>(neighbours, target + part * kPixels, kPixels);
    }
  }
}

// kC is 3 where there are three channels, else 1.
template <typename T, int kPixels, int kC>
__global__ void __launch_bounds__(kThreads)
    noise_patchify_kernel(const NoisePatchifyParams p, int64_t first_image, unsigned num_rows,
                          bool image_is_packed, bool noise_is_packed) {
  const unsigned row_index = blockIdx.x * blockDim.y + threadIdx.y;
  if (row_index >= num_rows) return;
  const unsigned H = unsigned(p.H), W = unsigned(p.W), P = unsigned(p.P);
  const int64_t b = first_image + row_index / H;
  const unsigned h = row_index % H;
  const int row = int(h % P);
  const int64_t token_size = p.C * P * P;
  const int64_t first_token = (b * (H / P) + h / P) * (W / P);
  const float t = load_one(p.t, p.t_dtype, b * p.t_stride, 0.0f);
  const float noise_scale = float(p.noise_scale);
  math::PhiloxStream stream{};
  if (p.noise == nullptr) {
    const int64_t sample = static_cast<const int64_t*>(p.sample_index)[b * p.sample_index_stride];
    stream = math::philox_stream(p.seed, p.step, sample, 0);
  }

  for (unsigned w = threadIdx.x * kPixels; w < W; w += blockDim.x * kPixels) {
    const int col = int(w % P);
    const int64_t token_offset = (first_token + w / P) * token_size;
#pragma unroll 1
    for (int64_t c = 0; c < p.C; c += kC) {
      float x[kC][kPixels], x_t[kC][kPixels];
      load_pixels(
          p.image, p.image_is_uint8, p.image_dtype,
          b * p.image_stride_b + c * p.image_stride_c + h * p.image_stride_h + w * p.image_stride_w,
          p.image_stride_c, p.image_stride_w, image_is_packed, x);
      if (p.noise == nullptr) {
        draw_pixels(stream, (c * H + h) * W + w, int64_t(H) * W, x_t);
      } else {
        load_pixels(p.noise, false, p.noise_dtype,
                    b * p.noise_stride_b + c * p.noise_stride_c + h * p.noise_stride_h +
                        w * p.noise_stride_w,
                    p.noise_stride_c, p.noise_stride_w, noise_is_packed, x_t);
      }
#pragma unroll
      for (int j = 0; j < kC; ++j) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          x_t[j][i] = math::interpolate(x[j][i], x_t[j][i] * noise_scale, t);
        }
      }
      store_pixels(x_t, static_cast<T*>(p.tokens) + token_offset, p.channel_last, p.C, int(P), c,
                   row, col);
      if (p.clean != nullptr) {
        store_pixels(x, static_cast<float*>(p.clean) + token_offset, p.clean_channel_last, p.C,
                     int(P), c, row, col);
      }
    }
  }
}

// Whether kPixels neighbours of an element of `size` bytes may be read as one pack.
bool is_packed(const void* base, int64_t size, int pixels, int64_t stride_b, int64_t stride_c,
               int64_t stride_h, int64_t stride_w) {
  const int64_t alignment = size * pixels < 16 ? size * pixels : 16;
  return stride_w == 1 && reinterpret_cast<uintptr_t>(base) % alignment == 0 &&
         stride_b * size % alignment == 0 && stride_c * size % alignment == 0 &&
         stride_h * size % alignment == 0;
}

template <typename T, int kPixels, int kC>
Status launch_all(const NoisePatchifyParams& p, cudaStream_t stream) {
  const int64_t image_size = p.image_is_uint8 ? 1 : element_size(p.image_dtype);
  const bool image_is_packed = is_packed(p.image, image_size, kPixels, p.image_stride_b,
                                         p.image_stride_c, p.image_stride_h, p.image_stride_w);
  const bool noise_is_packed =
      is_packed(p.noise, element_size(p.noise_dtype), kPixels, p.noise_stride_b, p.noise_stride_c,
                p.noise_stride_h, p.noise_stride_w);
  unsigned threads = 1;  // that walk one row: a power of two, so that rows fill the block
  while (threads < kThreads && threads * int64_t(kPixels) < p.W) threads *= 2;
  const unsigned rows_per_block = kThreads / threads;
  // one launch unless there are more than 2^31 rows
  const int64_t images_per_launch = kMaxSide / p.H;
  for (int64_t first = 0; first < p.B; first += images_per_launch) {
    const int64_t left = p.B - first;
    const int64_t rows = (left < images_per_launch ? left : images_per_launch) * p.H;
    const Status status =
        launch(noise_patchify_kernel<T, kPixels, kC>, unsigned(ceil_div(rows, rows_per_block)),
               dim3(threads, rows_per_block), stream, p, first, unsigned(rows), image_is_packed,
               noise_is_packed);
    if (status != nullptr) return status;
  }
  return nullptr;
}

template <typename T, int kPixels>
Status launch_pixels(const NoisePatchifyParams& p, cudaStream_t stream) {
  return p.C == 3 ? launch_all<T, kPixels, 3>(p, stream) : launch_all<T, kPixels, 1>(p, stream);
}

template <typename T>
Status launch_any(const NoisePatchifyParams& p, cudaStream_t stream) {
  // runs of pixels stay in their patch, and as W is a multiple of P, in their groups of Philox
  const bool is_aligned = reinterpret_cast<uintptr_t>(p.tokens) % 16 == 0 &&
                          reinterpret_cast<uintptr_t>(p.clean) % 16 == 0;
  if (p.P % 8 == 0 && is_aligned) return launch_pixels<T, 8>(p, stream);
  if (p.P % 4 == 0 && is_aligned) return launch_pixels<T, 4>(p, stream);
  return launch_pixels<T, 1>(p, stream);
}

}  // namespace

Status noise_patchify(const NoisePatchifyParams& p, void* stream) {
  if (p.B == 0 || p.C == 0 || p.H == 0 || p.W == 0) return nullptr;  // no blocks would be an error
  if (p.H > kMaxSide || p.W > kMaxSide) return "image height and width must be below 2^31";
  const bool is_double = (!p.image_is_uint8 && p.image_dtype == DType::kFloat64) ||
                         (p.noise != nullptr && p.noise_dtype == DType::kFloat64);
  if (is_double) return "image and noise must be uint8, fp32, bf16 or fp16";
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.out_dtype) {
    case DType::kFloat32:
      return launch_any<float>(p, cuda_stream);
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(p, cuda_stream);
    case DType::kFloat16:
      return launch_any<__half>(p, cuda_stream);
    default:
      return "tokens must be fp32, bf16 or fp16";
  }
}

}  // namespace pixelgen::cuda
