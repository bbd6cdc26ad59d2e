// The row operations for x86-64 processors with AVX2 and FMA (2013 and later).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>

#include "kernels.h"

#if KD_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define KD_LANES 8
namespace kd {
namespace {
#include "vec.h"
#include "rows.h"
}  // namespace

const Kernels avx2_kernels = {"avx2", block_stats, divergence_kernels, std::size(divergence_kernels)};
}  // namespace kd

#pragma GCC pop_options
#endif
