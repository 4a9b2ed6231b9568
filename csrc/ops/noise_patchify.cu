// Bound by bytes with given noise (image and noise read once, tokens and clean tokens written
// once), by arithmetic with Philox. Threads follow the image: those that share threadIdx.y walk one
// image row, each takes kPixels neighbouring pixels of kC channels. Eight pixels are two groups of
// Philox, one 16-byte access of noise or tokens in half precision, and, for three channels
// interleaved, three.
// The same bits as on the CPU:
// flags: -fmad=false
#include "../common/vec.cuh"
#include "../math/flow.h"
#include "../math/normal.h"
#include "noise_patchify.h"

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
__device__ __forceinline__ void load_pixels_of(const View<4>& from, int64_t offset, bool is_packed,
                                               float (&out)[kC][kPixels]) {
  const E* source = from.as<E>() + offset;
  if (is_packed)
    load_elements<kC, kPixels, true>(source, from.stride[1], from.stride[3], out);
  else
    load_elements<kC, kPixels, false>(source, from.stride[1], from.stride[3], out);
}

// The branches are the same for all threads.
template <int kC, int kPixels>
__device__ __forceinline__ void load_pixels(const View<4>& from, bool may_be_uint8, int64_t offset,
                                            bool is_packed, float (&out)[kC][kPixels]) {
  if (may_be_uint8 && from.dtype == DType::kUInt8)
    load_pixels_of<kC, kPixels, uint8_t>(from, offset, is_packed, out);
  else if (from.dtype == DType::kFloat32)
    load_pixels_of<kC, kPixels, float>(from, offset, is_packed, out);
  else if (from.dtype == DType::kBFloat16)
    load_pixels_of<kC, kPixels, __nv_bfloat16>(from, offset, is_packed, out);
  else
    load_pixels_of<kC, kPixels, __half>(from, offset, is_packed, out);
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
                                             ChannelOrder order, int64_t C, int P, int64_t c,
                                             int row, int col) {
  if (order == ChannelOrder::kFirst) {
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
    noise_patchify_kernel(const NoisePatchifyFwd a, int64_t first_image, unsigned num_rows,
                          bool image_is_packed, bool noise_is_packed) {
  const unsigned row_index = blockIdx.x * blockDim.y + threadIdx.y;
  if (row_index >= num_rows) return;
  const int64_t& C = a.image.size[1];  // a copy would take registers out of the loops
  const unsigned H = unsigned(a.image.size[2]), W = unsigned(a.image.size[3]);
  const unsigned P = unsigned(a.patch_size);
  const int64_t b = first_image + row_index / H;
  const unsigned h = row_index % H;
  const int row = int(h % P);
  const int64_t token_size = C * P * P;
  const int64_t first_token = (b * (H / P) + h / P) * (W / P);
  const float t = load_one(a.t.data, a.t.dtype, a.t.offset(b), 0.0f);
  const float noise_scale = float(a.noise_scale);
  math::PhiloxStream stream{};
  if (a.noise.data == nullptr) {
    const int64_t sample = a.sample_index.as<int64_t>()[a.sample_index.offset(b)];
    stream = math::philox_stream(a.seed, a.step, sample, 0);
  }

  for (unsigned w = threadIdx.x * kPixels; w < W; w += blockDim.x * kPixels) {
    const int col = int(w % P);
    const int64_t token_offset = (first_token + w / P) * token_size;
#pragma unroll 1
    for (int64_t c = 0; c < C; c += kC) {
      float x[kC][kPixels], x_t[kC][kPixels];
      load_pixels(a.image, true, a.image.offset(b, c, h, w), image_is_packed, x);
      if (a.noise.data == nullptr)
        draw_pixels(stream, (c * H + h) * W + w, int64_t(H) * W, x_t);
      else
        load_pixels(a.noise, false, a.noise.offset(b, c, h, w), noise_is_packed, x_t);
#pragma unroll
      for (int j = 0; j < kC; ++j) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          x_t[j][i] = math::interpolate(x[j][i], x_t[j][i] * noise_scale, t);
        }
      }
      store_pixels(x_t, a.tokens.as<T>() + token_offset, a.channel_order, C, int(P), c, row, col);
      if (a.clean.data != nullptr) {
        store_pixels(x, a.clean.as<float>() + token_offset, a.clean_channel_order, C, int(P), c,
                     row, col);
      }
    }
  }
}

template <typename T, int kPixels, int kC>
Status launch_all(const NoisePatchifyFwd& a, const Place& place) {
  const int64_t B = a.image.size[0], H = a.image.size[2], W = a.image.size[3];
  const bool image_is_packed = packs_are_aligned(a.image, kPixels);
  const bool noise_is_packed = packs_are_aligned(a.noise, kPixels);
  unsigned threads = 1;  // that walk one row: a power of two, so that rows fill the block
  while (threads < kThreads && threads * int64_t(kPixels) < W) threads *= 2;
  const unsigned rows_per_block = kThreads / threads;
  // one launch unless there are more than 2^31 rows
  const int64_t images_per_launch = kMaxSide / H;
  for (int64_t first = 0; first < B; first += images_per_launch) {
    const int64_t left = B - first;
    const int64_t rows = (left < images_per_launch ? left : images_per_launch) * H;
    const Status status =
        launch(noise_patchify_kernel<T, kPixels, kC>, unsigned(ceil_div(rows, rows_per_block)),
               dim3(threads, rows_per_block), place, a, first, unsigned(rows), image_is_packed,
               noise_is_packed);
    if (status != nullptr) return status;
  }
  return nullptr;
}

template <typename T, int kPixels>
Status launch_pixels(const NoisePatchifyFwd& a, const Place& place) {
  return a.image.size[1] == 3 ? launch_all<T, kPixels, 3>(a, place)
                              : launch_all<T, kPixels, 1>(a, place);
}

template <typename T>
Status launch_any(const NoisePatchifyFwd& a, const Place& place) {
  // runs of pixels stay in their patch, and as W is a multiple of P, in their groups of Philox
  const bool is_aligned = reinterpret_cast<uintptr_t>(a.tokens.data) % 16 == 0 &&
                          reinterpret_cast<uintptr_t>(a.clean.data) % 16 == 0;
  if (a.patch_size % 8 == 0 && is_aligned) return launch_pixels<T, 8>(a, place);
  if (a.patch_size % 4 == 0 && is_aligned) return launch_pixels<T, 4>(a, place);
  return launch_pixels<T, 1>(a, place);
}

}  // namespace

Status noise_patchify_fwd(const NoisePatchifyFwd& a, const Place& place) {
  if (a.problem() != nullptr) return a.problem();
  if (a.image.size[2] > kMaxSide || a.image.size[3] > kMaxSide)
    return "image height and width must be below 2^31";
  if (a.is_double()) return "takes no float64 but for t";
  if (a.tokens.numel == 0) return nullptr;
  return with_element_type(a.tokens.dtype, "tokens must be float32, bfloat16 or float16",
                           [&](auto element) { return launch_any<decltype(element)>(a, place); });
}

PIXELGEN_OPS(noise_patchify, PIXELGEN_OP(noise_patchify_fwd))

}  // namespace pixelgen::cuda
