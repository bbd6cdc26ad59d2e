// What the cluster row kernel (rows.cu) does to logits in registers: heads, target, statistics, sums, gradient, as
// backends/triton/device.py has them. The pair function of a divergence, generated from divergences.py, stands in this namespace too.
// Plain C++ where no GPU compiler reads it, so that the arithmetic can be held to the oracle on a CPU.
//
// Macros that a compilation sets: KD_FLAT (the temperature alone makes any two distributions close), KD_WEIGH (whose exponentials the
// moments are weighed by: 0 nobody's, 1 the target's, 2 the student's), KD_METRICS (entropies, overlap and agreement; KD_WEIGH is 0
// then), KD_CE (cross-entropy), KD_TEMPERED (a temperature other than 1), KD_X_BIAS, KD_Z_BIAS, KD_X_SOFTCAP, KD_Z_SOFTCAP, each 0
// or 1; and the polynomials of backends/polynomials.py.
#ifdef __CUDACC__
#define KD_INLINE __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define KD_INLINE inline
#endif

namespace kd {

#ifdef __CUDACC__
KD_INLINE float float_of(int bits) { return __int_as_float(bits); }
KD_INLINE int bits_of(float v) { return __float_as_int(v); }
KD_INLINE float divided(float v, float by) { return __fdividef(v, by); }
KD_INLINE float log_of_sum(float v) { return ::logf(v); }
KD_INLINE float maximum(float v, float w) { return ::fmaxf(v, w); }
KD_INLINE float abs(float v) { return ::fabsf(v); }  // free where it is an instruction's operand
// The hardware's power of two; numbers below 2^-126 are taken for 0.
KD_INLINE float exp(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v * 1.4426950408889634f));
  return result;
}
#else
KD_INLINE float float_of(int bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
KD_INLINE int bits_of(float v) {
  int bits;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}
KD_INLINE float divided(float v, float by) { return v / by; }
KD_INLINE float log_of_sum(float v) { return std::log(v); }
KD_INLINE float maximum(float v, float w) { return std::fmax(v, w); }
KD_INLINE float abs(float v) { return std::fabs(v); }
KD_INLINE float exp(float v) { return std::exp2(v * 1.4426950408889634f); }
#endif

KD_INLINE float infinity() { return float_of(0x7F800000); }
// NaN where either is.
KD_INLINE float minimum(float v, float w) { return v < w || v != v ? v : w; }
KD_INLINE float where(bool condition, float yes, float no) { return condition ? yes : no; }
KD_INLINE bool banned(float v) { return v == -infinity(); }
// Of the difference of two logits: whether neither is banned. (False for NaN too, which the row's sums show.)
KD_INLINE bool counts(float d) { return abs(d) < infinity(); }

// Of positive normal numbers; NaN stays NaN. v = 2^k m with m in [2/3, 4/3), as backends/triton/functions.py has it.
KD_INLINE float log(float v) {
  const int bits = bits_of(v), power = (bits - 0x3F2AAAAB) & ~0x7FFFFF;  // k << 23
  const float f = float_of(bits - power) - 1.f;
  const float r = KD_LOG(f) * (f * f) + f;
  return v * 0.f + (static_cast<float>(power) * 8.262958293901244e-08f + r);  // 2^-23 log 2
}

// Odd polynomial near 0, where 1 - e^-2v would lose digits.
KD_INLINE float tanh(float v) {
  const float e = exp(-2.f * abs(v)), far = divided(1.f - e, 1.f + e), square = v * v;
  return square < 0.4f ? v + v * square * KD_TANH(square) : v < 0.f ? -far : far;
}

KD_INLINE bool near([[maybe_unused]] float d) {
#if KD_FLAT
  return abs(d) < 0.25f;
#else
  return false;
#endif
}

// e^d - 1 - d where d is near 0.
KD_INLINE float excess(float d) { return d * d * KD_EXCESS(d); }

// g - log(1 + g) where g is near 0.
KD_INLINE float deficit(float g) { return g * g * KD_DEFICIT(g); }

struct Head {
  const float* bias;
  float scale, softcap;
};

struct Terms {
  float share, rest, temperature, kd, ce;               // kd over the temperature
  float value_0, value_1, slope_0, slope_1, balance;    // Divergence.linear and balance, where one sweep is enough
};

// Logits over T from what the product left.
template <bool BIAS, bool SOFTCAP>
KD_INLINE float after_head(float v, const Head& head, float temperature, int column) {
  if constexpr (BIAS) v += head.bias[column];
  v *= head.scale;
  if constexpr (SOFTCAP) v = head.softcap * tanh(divided(v, head.softcap));
#if KD_TEMPERED
  v = divided(v, temperature);
#endif
  return v;
}

// The student's logits at temperature 1.
KD_INLINE float at_one(float x, [[maybe_unused]] float temperature) {
#if KD_TEMPERED
  return x * temperature;
#else
  return x;
#endif
}

// y = (1 - t) x + t z from the nearer end; banned where a model with a share bans. NaN and +inf of the teacher make it NaN or +inf at
// every t, and +inf makes the row's sums NaN.
KD_INLINE float mixed(float x, float z, float t) {
  const float share = t < 0.5f ? t : t - 1.f, base = t < 0.5f ? x : z, other = t < 0.5f ? z : x;
  if (!(banned(x) || banned(z))) return base + share * (z - x);
  // A model without a share neither bans nor hides: 0 times its entry, from 0 up.
  if (share == 0.f) return base + 0.f * (other > 0.f || other != other ? other : 0.f);
  return base + other;
}

// Of a part of a row: largest entries, sums of exponentials counted from them, and moments counted from both models' largest.
struct Statistics {
  float x_max, x_sum, y_max, y_sum, one_sum, mass, moment, label_logit;
#if KD_METRICS
  float z_max, z_sum, x_at, z_at;  // at: the column of the largest entry, the first of equals; below 2^24, so exact
#endif
};

KD_INLINE Statistics no_statistics() {
  return {-infinity(), 0.f, -infinity(), 0.f, 0.f, 0.f, 0.f, 0.f,
#if KD_METRICS
          -infinity(), 0.f, 0.f, 0.f
#endif
  };
}

KD_INLINE float counted_from(float largest) { return banned(largest) ? 0.f : largest; }

// The same counted from larger entries.
KD_INLINE void raise(Statistics& of, float x_max, float y_max, [[maybe_unused]] float temperature) {
  const float x_down = of.x_max - counted_from(x_max), y_down = of.y_max - counted_from(y_max);
  of.x_sum *= exp(x_down);
  of.y_sum *= exp(y_down);
#if KD_CE && KD_TEMPERED
  of.one_sum *= exp(at_one(of.x_max, temperature) - at_one(counted_from(x_max), temperature));
#endif
#if KD_WEIGH
  const float own = KD_WEIGH == 1 ? y_down : x_down, other = KD_WEIGH == 1 ? x_down : y_down;
  const bool empty = of.mass == 0.f;  // the shifts may be infinite then
  const float factor = empty ? 0.f : exp(own);
  of.mass *= factor;
  of.moment = empty ? 0.f : factor * of.moment + of.mass * (own - other);
#endif
  of.x_max = x_max;
  of.y_max = y_max;
}

// COUNT entries more.
template <int COUNT>
KD_INLINE void add(Statistics& to, const float* x, const float* y, [[maybe_unused]] float temperature) {
  float x_max = to.x_max, y_max = to.y_max;
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    x_max = maximum(x_max, x[k]);
    y_max = maximum(y_max, y[k]);
  }
  if (x_max != to.x_max || y_max != to.y_max) raise(to, x_max, y_max, temperature);
  const float x_from = counted_from(x_max), y_from = counted_from(y_max);
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    const float u = x[k] - x_from, v = y[k] - y_from, e_u = exp(u), e_v = exp(v);
    to.x_sum += e_u;
    to.y_sum += e_v;
#if KD_CE && KD_TEMPERED
    to.one_sum += exp(at_one(x[k], temperature) - at_one(x_from, temperature));
#endif
#if KD_WEIGH
    const float e = KD_WEIGH == 1 ? e_v : e_u, far = KD_WEIGH == 1 ? v - u : u - v;
    if (counts(far)) {
      to.mass += e;
      to.moment += e * far;
    }
#endif
  }
}

#if KD_METRICS
// ``at`` where COUNT entries more, the first of them of that column, are larger than the largest.
template <int COUNT>
KD_INLINE void add_top(float& at, float largest, const float* v, int column) {
  float seen = largest;
#pragma unroll
  for (int k = 0; k < COUNT; k++) seen = maximum(seen, v[k]);
  if (seen > largest)
#pragma unroll
    for (int k = COUNT - 1; k >= 0; k--)
      if (v[k] == seen) at = static_cast<float>(column + k);
}

// What ``add`` leaves out of COUNT entries more; before it, which moves on to their largest. TARGET: whether z is the target.
template <bool TARGET, int COUNT>
KD_INLINE void add_teacher(Statistics& to, const float* x, const float* z, int column) {
  add_top<COUNT>(to.x_at, to.x_max, x, column);
  add_top<COUNT>(to.z_at, TARGET ? to.y_max : to.z_max, z, column);
  if constexpr (!TARGET) {
    float z_max = to.z_max;
#pragma unroll
    for (int k = 0; k < COUNT; k++) z_max = maximum(z_max, z[k]);
    if (z_max != to.z_max) to.z_sum *= exp(to.z_max - counted_from(z_max));
    to.z_max = z_max;
#pragma unroll
    for (int k = 0; k < COUNT; k++) to.z_sum += exp(z[k] - counted_from(z_max));
  }
}

KD_INLINE float first_of_tops(float v_max, float v_at, float w_max, float w_at) {
  return v_max > w_max || (v_max == w_max && v_at < w_at) ? v_at : w_at;
}
#endif

// Of a whole row.
struct Row {
  float x_max, x_log, y_max, y_log, one_max, one_log, label_logit;
#if KD_METRICS
  float z_max, z_log;
  bool agree;
#endif
};

KD_INLINE Row finished(const Statistics& of, float temperature) {
  Row row{of.x_max, log_of_sum(of.x_sum), of.y_max, log_of_sum(of.y_sum), 0.f, 0.f, of.label_logit};
  row.one_max = at_one(of.x_max, temperature);
  row.one_log = KD_CE && KD_TEMPERED ? log_of_sum(of.one_sum) : row.x_log;
#if KD_METRICS
  row.z_max = of.z_max;
  row.z_log = log_of_sum(of.z_sum);
  row.agree = of.x_at == of.z_at;
#endif
  return row;
}

KD_INLINE float cross_entropy(const Row& row) { return row.one_log - (row.label_logit - row.one_max); }

struct Sums {
  float value, slope;
#if KD_METRICS
  float target_entropy, student_entropy, overlap;
#endif
};

// A slope that compares (total variation) can hide a NaN that the value shows.
KD_INLINE Sums shown(Sums sums) {
  if (sums.value != sums.value) sums.slope = sums.value;
  return sums;
}

KD_INLINE Sums sums_of_one_sweep(const Statistics& of, const Row& row, const Terms& terms) {
  const float own = KD_WEIGH == 1 ? row.y_log : row.x_log, other = KD_WEIGH == 1 ? row.x_log : row.y_log;
  const float scale = exp(-own), mass = of.mass * scale, moment = of.moment * scale + mass * (other - own);
  // A moment past the largest number takes no part where its factor is 0: 0 times infinity would be NaN.
  const float risen = terms.slope_1 == 0.f ? 0.f : terms.slope_1 * moment;
  return shown({terms.value_0 * mass + terms.value_1 * moment, terms.slope_0 * mass + risen + terms.balance});
}

// Value and slope of an entry, with the c (q - p) and c q in them that sum to nothing over a row (divergences.py).
template <class Pair>
KD_INLINE Sums value_and_slope(float x, float y, const Row& row, const Terms& terms) {
  const float above_x = x - row.x_max, above_y = y - row.y_max, lp = above_y - row.y_log, lq = above_x - row.x_log;
  const float d = (above_x - above_y) - (row.x_log - row.y_log), q = exp(lq);
  Sums of;
  const float c = Pair::template apply<float>(lp, lq, d, terms.share, terms.rest, terms.temperature, of.value, of.slope);
  const bool is_banned = banned(lp) || banned(lq);
  return {is_banned ? c * (q - exp(lp)) : of.value, is_banned ? c * q : of.slope};
}

#if KD_METRICS
// 0 log 0 = 0
KD_INLINE float entropy_term(float log_probability) { return banned(log_probability) ? 0.f : -exp(log_probability) * log_probability; }

// The metrics of an entry more. z: the teacher's, which the target y is at t = 1.
KD_INLINE void measure(Sums& to, float x, float y, float z, const Row& row) {
  const float lq = (x - row.x_max) - row.x_log;
  to.target_entropy += entropy_term((y - row.y_max) - row.y_log);
  to.student_entropy += entropy_term(lq);
  to.overlap += minimum(exp(lq), exp((z - row.z_max) - row.z_log));
}
#endif

// dx of an entry: kd (slope - q sum slope) + ce (softmax(x) - e_label), through the head's chain rule. kd, ce: the terms' times weight
// and scale.
KD_INLINE float gradient(float x, float slope, const Row& row, float slope_sum, [[maybe_unused]] bool is_label, float kd,
                         [[maybe_unused]] float ce, [[maybe_unused]] const Head& head, [[maybe_unused]] const Terms& terms) {
  const float q = exp((x - row.x_max) - row.x_log);
  float dx = kd * (slope - q * slope_sum);
#if KD_CE
  const float at = KD_TEMPERED ? exp((at_one(x, terms.temperature) - row.one_max) - row.one_log) : q;
  dx += ce * (at - (is_label ? 1.f : 0.f));
#endif
#if KD_X_SOFTCAP
  const float over_cap = divided(at_one(x, terms.temperature), head.softcap);
  dx *= 1.f - over_cap * over_cap;
#endif
  return dx;
}
