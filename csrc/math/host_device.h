// Functions of math/ are compiled for the CPU once per instruction set and for CUDA. Internal
// linkage, or the linker would keep one copy of each and might pick the one that this processor
// cannot run.
#pragma once

#ifdef __CUDACC__
#define PIXELGEN_INLINE static __host__ __device__ __forceinline__
#else
#define PIXELGEN_INLINE static inline __attribute__((always_inline))
#endif
