// What product.cu asks of compute capability 9.0 (kdkernels/backends/cuda/hopper.cuh), done by hopper.cpp on a CPU: every thread is
// a fiber, and copies and products happen at a moment of a seeded generator's choosing between their issue and what waits for them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "qualifiers.h"

typedef unsigned long long u64;
struct alignas(64) Map {  // what cuTensorMapEncodeTiled of hopper.cpp makes, in the place of a CUtensorMap
  char* data;
  u64 columns, rows, stride;  // stride in bytes; entries of 16 bits
  unsigned box_columns, box_rows, is_bfloat16;
  u64 room[9];
};
static_assert(sizeof(Map) == 128);

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;

// Runs a grid of clusters of two, all at the same time; returns what went wrong first, or nothing.
const char* run(unsigned grid, unsigned threads, unsigned shared, unsigned seed, bool is_bfloat16,
                const std::function<void()>& kernel);

unsigned shared_memory();
void set_up(unsigned barrier, int arrivals);
void expect(unsigned barrier, int bytes);
void arrive_in(unsigned barrier, int block);
void await(unsigned barrier, int parity);
void cluster_together();
void load(unsigned to, const Map* map, int column, int row, unsigned barrier);
void load_for_both(unsigned to, const Map* map, int column, int row, unsigned barrier);
void store(const Map* map, unsigned from, int column, int row);
void wait_for_stores(int pending);
void show_to_copies();
void multiply(float (&d)[128], u64 a, u64 b, int add);
void commit();
void wait_for_products(int pending);
void __syncwarp();
float of_partner(float v, int mask);
void write_blocks(unsigned place, const unsigned (&v)[4]);

template <int PENDING>
void stores_read() {
  wait_for_stores(PENDING);
}
template <int PENDING>
void multiplied() {
  wait_for_products(PENDING);
}
template <int>
void fewer_registers() {}
template <int>
void more_registers() {}
inline void show_barriers() {}
inline void before_products() {}
inline u64 descriptor(unsigned place) { return (u64)(place >> 4 & 0x3fff) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }
inline float power_of_2(float v) { return exp2f(v); }
inline unsigned halves(float low, float high) {
  const _Float16 v[2] = {(_Float16)low, (_Float16)high};
  unsigned r;
  memcpy(&r, v, sizeof r);
  return r;
}
inline void floats(unsigned pair, float& low, float& high) {
  _Float16 v[2];
  memcpy(v, &pair, sizeof v);
  low = v[0], high = v[1];
}
inline float __int_as_float(unsigned v) {
  float r;
  memcpy(&r, &v, sizeof r);
  return r;
}
