// What CUDA C++ has and C++ has not, of kernels that run on a CPU.
#pragma once
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
