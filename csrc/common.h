// What every op's header needs: dtype tags, and the status that its functions return.
#pragma once

#include <cstdint>

namespace pixelgen {

// Run-time dtype of a buffer. The order is that of FLOAT_DTYPES in pixelgen_kernels/native.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// nullptr when all went well, else a text that lives for ever.
using Status = const char*;

// Widest row that the kernels take; it bounds their scratch.
constexpr int64_t kMaxWidth = 8192;

}  // namespace pixelgen
