// What rows.cu asks of the machine (kdkernels/backends/cuda/machine.cuh), done by cluster_machine.cpp on a CPU: every thread of a
// cluster is a fiber, and copies and sends arrive some time after they were started.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "qualifiers.h"

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace machine {

struct Launch {
  unsigned grid, cluster, threads, slices;  // slices: bytes that a block is given
};

// Runs clusters one after the other, each by random turns; returns what went wrong first, or nothing. checked: whether the accesses of
// the threads, which a compiler for ThreadSanitizer announces, are held to the barriers that order them.
const char* run(const Launch& launch, const std::function<void()>& kernel, unsigned seed, bool checked);

unsigned address(const void* place);
unsigned in_block(unsigned place, int block);
void* shared_by_block();
void* slices();
void set_up(unsigned barrier, int arrivals);
void arrive(unsigned barrier, int bytes);
void await(unsigned barrier, int parity, bool sent);
void copy(unsigned to, const void* from, int bytes, unsigned barrier);
void send(unsigned to, float4 values, unsigned barrier);
void warp_together();
void together();
void cluster_together();
void before_copies();
float of_lane(float v, int lane);

struct Place {
  unsigned x;
};
extern Place thread, block, grid;

}  // namespace machine

static machine::Place &threadIdx = machine::thread, &blockIdx = machine::block, &gridDim = machine::grid;
inline void __syncwarp() { machine::warp_together(); }

namespace kd {

using machine::address, machine::before_copies, machine::cluster_together, machine::in_block, machine::of_lane, machine::send,
    machine::together, std::max, std::min;
typedef unsigned long long barrier;

inline void set_up(barrier* b, int arrivals) { machine::set_up(address(b), arrivals); }
inline void arrive(barrier* b) { machine::arrive(address(b), 0); }
inline void expect(barrier* b, int bytes) { machine::arrive(address(b), bytes); }
inline void await(barrier* b, int parity) { machine::await(address(b), parity, false); }
inline void await_sent(barrier* b, int parity) { machine::await(address(b), parity, true); }
inline void copy(float* to, const float* from, int bytes, barrier* b) { machine::copy(address(to), from, bytes, address(b)); }
inline void barriers_are_set_up() {}
inline float* slices() { return static_cast<float*>(machine::slices()); }
template <class T>
T& shared_by_block() {
  return *static_cast<T*>(machine::shared_by_block());
}

inline void store(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
  const unsigned values[4] = {a, b, c, d};
  std::memcpy(to, values, sizeof values);
}

// To bfloat16, to the nearest and even.
inline unsigned rounded(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline unsigned rounded(float low, float high) { return rounded(low) | rounded(high) << 16; }

}  // namespace kd
