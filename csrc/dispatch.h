// The functions of the module, as this build and this processor have them.
#pragma once

#include <vector>

#include "common/op.h"

namespace pixelgen {

const char* cpu_isa();              // "baseline", "x86-64-v3" or "x86-64-v4"
std::vector<const Op*> cpu_ops();   // in that instruction set
std::vector<const Op*> cuda_ops();  // none where the module was built without CUDA

}  // namespace pixelgen
