// Collects the tables of csrc/ops, those of the CPU in the widest instruction set that was compiled
// and that this processor runs.
#include "dispatch.h"

#include "op_files.h"  // made by CMake: PIXELGEN_CPU_FILES(X) is X(swiglu) X(...), CUDA likewise

namespace pixelgen {

#define PIXELGEN_DECLARE(stem) extern const Op stem##_ops[];
#define PIXELGEN_TABLE(stem) stem##_ops,
#define PIXELGEN_TABLES(FILES) \
  FILES(PIXELGEN_DECLARE)      \
  static const Op* const tables[] = {FILES(PIXELGEN_TABLE) nullptr};

namespace cpu::baseline {
PIXELGEN_TABLES(PIXELGEN_CPU_FILES)
}
#ifdef PIXELGEN_X86_LEVELS
namespace cpu::x86_64_v3 {
PIXELGEN_TABLES(PIXELGEN_CPU_FILES)
}
namespace cpu::x86_64_v4 {
PIXELGEN_TABLES(PIXELGEN_CPU_FILES)
}
#endif
#ifdef PIXELGEN_HAS_CUDA
namespace cuda {
PIXELGEN_TABLES(PIXELGEN_CUDA_FILES)
}
#endif

namespace {

struct Isa {
  const char* name;
  const Op* const* tables;
};

Isa detect() {
#ifdef PIXELGEN_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return {"x86-64-v4", cpu::x86_64_v4::tables};
  if (v3) return {"x86-64-v3", cpu::x86_64_v3::tables};
#endif
  return {"baseline", cpu::baseline::tables};
}

std::vector<const Op*> all(const Op* const* tables) {
  std::vector<const Op*> ops;
  for (; *tables != nullptr; ++tables)
    for (const Op* op = *tables; op->name != nullptr; ++op) ops.push_back(op);
  return ops;
}

}  // namespace

const char* cpu_isa() { return detect().name; }
std::vector<const Op*> cpu_ops() { return all(detect().tables); }
std::vector<const Op*> cuda_ops() {
#ifdef PIXELGEN_HAS_CUDA
  return all(cuda::tables);
#else
  return {};
#endif
}

}  // namespace pixelgen
