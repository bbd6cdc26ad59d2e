// KD_LANES floats as one value, with the functions that divergence functors and row loops call. Written on the compiler's vector
// extension, so the same source becomes AVX-512, AVX2, SSE2 or NEON. exp and log are correct to about one unit in the last
// place, flush subnormal results to 0, and keep NaN and inf. Polynomials: minimax fits; those that GPUs take too are macros, from
// backends/polynomials.py.
//
// Included once per instruction set, inside its namespace and after its target pragma: no include guard, no includes.

typedef float F __attribute__((vector_size(4 * KD_LANES)));
typedef int32_t I __attribute__((vector_size(4 * KD_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * KD_LANES)));  // where bits of a NaN or a negative number may overflow an I
typedef uint16_t H __attribute__((vector_size(2 * KD_LANES)));

inline F splat(float v) { return v - F{}; }
inline I as_int(F v) { return (I)v; }
inline F as_float(I v) { return (F)v; }

inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }

inline F where(I condition, F yes, F no) { return condition ? yes : no; }
inline F maximum(F a, F b) { return a > b ? a : b; }
// NaN where either is.
inline F minimum(F a, F b) { return (a < b) | (a != a) ? a : b; }
inline F abs(F v) { return as_float(as_int(v) & 0x7fffffff); }

inline float sum(F v) {
  float s = 0;
  for (int i = 0; i < KD_LANES; ++i) s += v[i];
  return s;
}
inline float largest(F v) {
  float m = v[0];
  for (int i = 1; i < KD_LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

constexpr float infinity = __builtin_inff();
// ln 2 in two parts, so that n times the first is exact even without fused multiply-add.
constexpr float ln2_hi = 0.693145751953125f, ln2_lo = 1.42860682e-6f;

// 2^n * e^r with n = round(v / ln 2): adding 1.5 * 2^23 rounds, and 127 more leaves n + 127, the exponent field of 2^n, in the low
// bits. At -88 that field is 0, and so is the result: what is banned (-inf) has probability 0 exactly. e^r = 1 + r + r^2 Q(r). 
template <bool nonpositive = false>
KD_INLINE F exp(F v) {
  const F clamped = splat(-88.f) > v ? splat(-88.f) : v;  // in this order NaN stays NaN
  const F shifted = clamped * 1.44269504f + 12583039.f;
  const F n = shifted - 12583039.f;
  const F r = (clamped - n * ln2_hi) - n * ln2_lo;
  F q = r * 0.00138145395f + 0.00836874545f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const F e = (r * r * q + r + 1.f) * as_float(as_int(shifted) << 23);
  return nonpositive ? e : where(v > 88.37f, splat(infinity), e);
}

// v = 2^e * m with m in [sqrt(1/2), sqrt(2)); log m = f - f^2/2 + f^3 P(f) with f = m - 1.
KD_INLINE F log(F v) {
  const I shifted = (I)((U)v - 0x3f3504f3);
  const F e = __builtin_convertvector(shifted >> 23, F);
  const F f = as_float((shifted & 0x7fffff) + 0x3f3504f3) - 1.f;
  F p = f * -0.0763449296f + 0.12761575f;
  p = p * f - 0.131601825f;
  p = p * f + 0.142017588f;
  p = p * f - 0.166233569f;
  p = p * f + 0.200012267f;
  p = p * f - 0.250008196f;
  p = p * f + 0.333333313f;
  const F square = f * f;
  F l = e * ln2_hi + (f + (square * f * p - square * 0.5f + e * ln2_lo));
  l = where(v < 1.17549435e-38f, splat(-infinity), l);
  l = where(v < 0.f, splat(__builtin_nanf("")), l);
  return where(v < infinity, l, v);
}

// What pair functions take where p is close to q.
inline I near(F d) { return abs(d) < 0.25f; }

// e^d - 1 - d
KD_INLINE F excess(F d) { return d * d * KD_EXCESS(d); }

// g - log(1 + g)
KD_INLINE F deficit(F g) { return g * g * KD_DEFICIT(g); }

// Odd polynomial near 0, where 1 - e^-2v would lose digits.
inline F tanh(F v) {
  const F e = exp<true>(-2.f * abs(v));
  const F far = (1.f - e) / (1.f + e);
  const F square = v * v;
  return where(square < 0.4f, v + v * square * KD_TANH(square), where(v < 0.f, -far, far));
}

// bfloat16 is the upper half of a float; rounding to nearest even, NaN stays NaN.
inline F load(const uint16_t* p) {
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return as_float(__builtin_convertvector(h, I) << 16);
}
inline void store(uint16_t* p, F v) {
  const U bits = (U)v;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U kept = v == v ? rounded : (bits >> 16) | 0x40;
  const H h = __builtin_convertvector(kept & 0xffff, H);
  __builtin_memcpy(p, &h, sizeof h);
}

inline F load(const _Float16* p) {
  F v;
  for (int i = 0; i < KD_LANES; ++i) v[i] = (float)p[i];
  return v;
}
inline void store(_Float16* p, F v) {
  for (int i = 0; i < KD_LANES; ++i) p[i] = (_Float16)v[i];
}
