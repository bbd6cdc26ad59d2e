// A libcuda.so.1 without a GPU: it runs nothing, remembers what it was asked to do, and refuses what a driver or the hardware would.
//
// - Limits are those of the CUDA driver API's reference (cuTensorMapEncodeTiled, cuLaunchKernelEx) and of the programming guide's
//   table of compute capabilities; those that differ from device to device come from stub_device.
// - A refusal returns the driver's own error code; cuGetErrorString then says which limit, and what was asked for.
// - Registers are read from the compiled kernel, which is an ELF file.
// - stub_*: what benchmarks/launch.py reads back.
#include "cuda.h"
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct launch {
  char kernel[64];
  uint32_t grid[3], threads, shared;
};

struct tensor_map {
  uint64_t address, dims[5], strides[4];  // the first dimension is the innermost one, whose elements lie side by side
  uint32_t rank, element_size, box[5];
  uint32_t launches;  // how many there were before: it is made for the next one
};

struct function {
  char name[64];
  int registers, dynamic_shared, large_clusters;
};

static int capability = 90, shared_per_block = 232448, shared_per_processor = 233472;
static struct launch *launches;
static struct tensor_map *maps;
static size_t launch_count, map_count;
static char problem[512] = "nothing was wrong";
static char context;
static __thread CUcontext current;  // of this thread; none at first

static CUresult refused(CUresult code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(problem, sizeof problem, format, arguments);
  va_end(arguments);
  return code;
}

void stub_device(int capability_, int shared_per_block_, int shared_per_processor_) {
  capability = capability_;
  shared_per_block = shared_per_block_;
  shared_per_processor = shared_per_processor_;
}

void stub_forget(void) { launch_count = map_count = 0; }

const struct launch *stub_launches(size_t *count) { return *count = launch_count, launches; }

const struct tensor_map *stub_tensor_maps(size_t *count) { return *count = map_count, maps; }

CUresult cuGetErrorString(CUresult error, const char **text) { return *text = error ? problem : "no error", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) {
  switch (error) {
    case CUDA_SUCCESS: *name = "CUDA_SUCCESS"; break;
    case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case CUDA_ERROR_INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case CUDA_ERROR_INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
    case CUDA_ERROR_NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
    case CUDA_ERROR_NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    case CUDA_ERROR_INVALID_CLUSTER_SIZE: *name = "CUDA_ERROR_INVALID_CLUSTER_SIZE"; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *found) { return *found = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext given) { return current = given, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) { return *made = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 132 / config->gridDimX, CUDA_SUCCESS;  // of one block on each multiprocessor; the grid is one cluster
}
// Memory of the CPU stands for the device's.
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_per_block; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_per_processor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    default: *value = 1; break;  // clocks and the width of the bus, which no launch depends on
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (!current) return refused(CUDA_ERROR_INVALID_CONTEXT, "the thread has no context");
  if (memcmp(image, ELFMAG, SELFMAG)) return refused(CUDA_ERROR_INVALID_IMAGE, "the compiled kernel is not an ELF file");
  return *module = (CUmodule)image, CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  const char *image = (const char *)module;
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  char wanted[80];
  snprintf(wanted, sizeof wanted, ".text.%s", name);
  for (int at = 0; at < head->e_shnum; at++)
    if (!strcmp(names + sections[at].sh_name, wanted)) {
      struct function *made = calloc(1, sizeof *made);
      snprintf(made->name, sizeof made->name, "%s", name);
      made->registers = sections[at].sh_info >> 24;
      made->dynamic_shared = 48 * 1024;
      return *found = (CUfunction)made, CUDA_SUCCESS;
    }
  return refused(CUDA_ERROR_NOT_FOUND, "the compiled kernel has no function %s", name);
}

// Registers are given out to a warp by 256, and each of the four schedulers has its quarter of them.
static int most_threads(const struct function *function) {
  int of_warp = (function->registers * 32 + 255) / 256 * 256;
  int warps = of_warp ? 65536 / 4 / of_warp * 4 : 32;
  return warps < 32 ? warps * 32 : 1024;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function_) {
  const struct function *function = (const struct function *)function_;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = most_threads(function); break;
    default: *value = 0; break;  // Triton's kernels have no static shared memory, and make static counts what they spill
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function_, CUfunction_attribute attribute, int value) {
  struct function *function = (struct function *)function_;
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) function->large_clusters = value;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value < 0 || value > shared_per_block)
      return refused(CUDA_ERROR_INVALID_VALUE, "%d bytes of shared memory allowed, at most %d", value, shared_per_block);
    function->dynamic_shared = value;
  }
  return CUDA_SUCCESS;
}

static int element_size(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *dims,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  const unsigned size = element_size(type);
  const CUresult invalid = CUDA_ERROR_INVALID_VALUE;
  if (capability < 90) return refused(CUDA_ERROR_NOT_SUPPORTED, "a tensor map on sm_%d; sm_90 is the first with them", capability);
  if ((uintptr_t)map % 64) return refused(invalid, "tensor map at %p, not a multiple of 64", (void *)map);
  if (rank < 1 || rank > 5) return refused(invalid, "tensor map of rank %u, which is 1 to 5", rank);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refused(invalid, "an interleaved tensor map, which has other limits");
  if (!address || (uintptr_t)address % 16) return refused(invalid, "tensor map: global address %p, not a multiple of 16", address);
  for (unsigned k = 0; k < rank; k++) {
    if (dims[k] < 1 || dims[k] > 1ull << 32)
      return refused(invalid, "tensor map: dim[%u] is %llu, which is 1 to 2^32", k, (unsigned long long)dims[k]);
    if (box[k] < 1 || box[k] > 256) return refused(invalid, "tensor map: box[%u] is %u, which is 1 to 256", k, box[k]);
    if (steps[k] < 1 || steps[k] > 8) return refused(invalid, "tensor map: element stride[%u] is %u, which is 1 to 8", k, steps[k]);
  }
  for (unsigned k = 0; k + 1 < rank; k++) {
    const unsigned long long stride = strides[k], below = k ? strides[k - 1] * dims[k] : dims[0] * size;
    if (stride % 16 || stride >= 1ull << 40)
      return refused(invalid, "tensor map: stride[%u] is %llu bytes, a multiple of 16 below 2^40", k, stride);
    if (stride < below) return refused(invalid, "tensor map: stride[%u] is %llu bytes, less than the %llu within", k, stride, below);
  }
  const unsigned inner = box[0] * size;
  const unsigned spans[] = {0, 32, 64, 128};
  const unsigned span = swizzle <= CU_TENSOR_MAP_SWIZZLE_128B ? spans[swizzle] : 128;
  if (inner % 16) return refused(invalid, "tensor map: the box is %u bytes wide, not a multiple of 16", inner);
  if (span && inner > span) return refused(invalid, "tensor map: the box is %u bytes wide, swizzled over %u", inner, span);

  maps = realloc(maps, (map_count + 1) * sizeof *maps);
  struct tensor_map *made = &maps[map_count++];
  *made = (struct tensor_map){.address = (uintptr_t)address, .rank = rank, .element_size = size, .launches = launch_count};
  for (unsigned k = 0; k < rank; k++) {
    made->dims[k] = dims[k];
    made->box[k] = box[k];
    if (k + 1 < rank) made->strides[k] = strides[k];
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function_, void **parameters, void **extra) {
  const struct function *function = (const struct function *)function_;
  const CUresult invalid = CUDA_ERROR_INVALID_VALUE;
  const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned long long threads = 1ull * config->blockDimX * config->blockDimY * config->blockDimZ;
  const unsigned shared = config->sharedMemBytes;
  for (int k = 0; k < 3; k++) {
    const unsigned most = k ? 65535 : 0x7fffffff;
    if (grid[k] < 1 || grid[k] > most) return refused(invalid, "grid %c is %u, which is 1 to %u", 'x' + k, grid[k], most);
  }
  if (threads < 1 || threads > 1024 || config->blockDimZ > 64)
    return refused(invalid, "a block of %llu threads, which are 1 to 1024", threads);
  if (threads > most_threads(function))
    return refused(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%llu threads of %d registers, which leave room for %d", threads,
                   function->registers, most_threads(function));
  if (shared > shared_per_block) return refused(invalid, "%u bytes of shared memory, at most %d", shared, shared_per_block);
  if (shared > function->dynamic_shared)
    return refused(invalid, "%u bytes of shared memory where %d were allowed before", shared, function->dynamic_shared);
  for (unsigned k = 0; k < config->numAttrs; k++) {
    if (config->attrs[k].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    const unsigned x = config->attrs[k].value.clusterDim.x, y = config->attrs[k].value.clusterDim.y,
                   z = config->attrs[k].value.clusterDim.z, most = function->large_clusters ? 16 : 8;
    if (capability < 90) return refused(CUDA_ERROR_NOT_SUPPORTED, "a cluster on sm_%d; sm_90 is the first with them", capability);
    if (!x || !y || !z || x * y * z > most || grid[0] % x || grid[1] % y || grid[2] % z)
      return refused(CUDA_ERROR_INVALID_CLUSTER_SIZE, "clusters of %u x %u x %u in a grid of %u x %u x %u, at most %u blocks", x, y, z,
                     grid[0], grid[1], grid[2], most);
  }

  launches = realloc(launches, (launch_count + 1) * sizeof *launches);
  struct launch *made = &launches[launch_count++];
  *made = (struct launch){.grid = {grid[0], grid[1], grid[2]}, .threads = threads, .shared = shared};
  memcpy(made->kernel, function->name, sizeof made->kernel);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void **parameters, void **extra) {
  const CUlaunchConfig config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, NULL, 0};
  if (!current) return refused(CUDA_ERROR_INVALID_CONTEXT, "the thread has no context");
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
