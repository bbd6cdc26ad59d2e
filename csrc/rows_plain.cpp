// The row operations in the base instruction set of the architecture: SSE2, NEON, or whatever the compiler lowers four lanes to.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>

#include "kernels.h"

#define KD_LANES 4
namespace kd {
namespace {
#include "vec.h"
#include "rows.h"
}  // namespace

const Kernels plain_kernels = {"plain", block_stats, divergence_kernels, std::size(divergence_kernels)};
}  // namespace kd
