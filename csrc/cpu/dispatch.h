// The instruction set that the CPU ops run with on this processor.
#pragma once

namespace pixelgen::cpu {
const char* isa();  // "baseline", "x86-64-v3" or "x86-64-v4"
}  // namespace pixelgen::cpu
