// What register.cpp and the row operations agree on. One set of row operations per instruction set is compiled from the same
// source (rows.h); register.cpp picks one when it runs.
#pragma once

#include <cstdint>

// Called, a function of vectors passes them through memory; the compiler tires of inlining where a formula has many.
#define KD_INLINE [[gnu::always_inline]] inline

namespace kd {

enum class Dtype { f32, bf16, f16 };

// One model's logits and what its head does to them: logit = softcap * tanh(scale * (logits + bias) / softcap).
struct Side {
  const void* logits;  // [rows, vocabulary], rows `stride` elements apart
  int64_t stride;
  Dtype dtype;
  const float* bias;  // [vocabulary] or null
  float scale;
  float softcap;  // 0: none
};

// Columns of results [rows, stats_columns], [rows, sums_columns] and [rows, row_columns]: those of kdkernels/backends/columns.py.
#include "generated/columns.inc"
#include "generated/polynomials.inc"

// By whose exponentials the moments are weighed.
enum class Weigh { nothing, target, student };

struct Problem {
  Side x, z;
  int64_t vocabulary;
  const int64_t* labels;  // [rows] or null; outside [0, vocabulary): the label lies in another block
  const float* weight;    // [rows] or null; gradient of the sum of weight * loss. Rows of weight 0 are not computed
  float t;                // 0: the target is the student, 1: the teacher
  float temperature;
  float kd_scale, ce_scale;
  float share, rest;  // the divergence's parameter, and 1 less it
  bool ce;       // the cross-entropy on the labels is wanted
  bool metrics;
  Weigh weigh;   // of stats
  void* dx;  // [rows, vocabulary] like x, or null; may be x itself
  int64_t dx_stride;
  float* stats;  // [rows, stats_columns]
  float* sums;   // [rows, sums_columns]
  float* rows;   // [rows, row_columns]
};

using RowRange = void (*)(const Problem&, int64_t begin, int64_t end);

struct DivergenceKernels {
  const char* name;
  RowRange row_loss, reduce, grad;
};

struct Kernels {
  const char* name;  // of the instruction set
  RowRange stats;
  const DivergenceKernels* divergences;
  int count;
};

extern const Kernels plain_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define KD_X86 1
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace kd
