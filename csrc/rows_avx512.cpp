// The row operations for x86-64 processors with AVX-512.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>

#include "kernels.h"

#if KD_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define KD_LANES 16
namespace kd {
namespace {
#include "vec.h"
#include "rows.h"
}  // namespace

const Kernels avx512_kernels = {"avx512", block_stats, divergence_kernels, std::size(divergence_kernels)};
}  // namespace kd

#pragma GCC pop_options
#endif
