// The row operations: log-sum-exps, sums and gradient of a divergence over the vocabulary, row by row.
//
// - A row is loaded once into a float buffer of its own (L2 or L3 sized), with the head's bias, scale and softcap applied, and the
//   target mixed in; the later sweeps never see a dtype, a bias or a tail.
// - The divergence is a template argument of one sweep only (reduce).
// - Buffers are padded to whole vectors with -inf, the value that contributes nothing anywhere.
// - Sums run in float inside a block of 256 entries and in double across blocks.
//
// Included once per instruction set after vec.h, inside its namespace.

constexpr int64_t block = 256;

inline int64_t padded(int64_t n) { return (n + KD_LANES - 1) / KD_LANES * KD_LANES; }

// Row buffers in one aligned allocation: student (later q), target (later the slope), and a third where metrics ask for the teacher
// or the gradient asks for the student's logits again (then q is kept there).
class Buffers {
 public:
  explicit Buffers(const Problem& p) {
    const bool third = p.metrics || p.x.softcap != 0.f || (p.ce && p.temperature != 1.f);
    const int64_t length = padded(p.vocabulary);
    memory_ = static_cast<float*>(std::aligned_alloc(64, ((third ? 3 : 2) * length * 4 + 63) / 64 * 64));
    if (!memory_) throw std::bad_alloc();
    x = memory_;
    y = x + length;
    q = third ? y + length : x;
    z = p.metrics ? q : nullptr;
  }
  ~Buffers() { std::free(memory_); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  float *x, *y, *q, *z;

 private:
  float* memory_;
};

template <class T>
void load_span(const T* from, int64_t n, float* to) {
  const int64_t whole = n / KD_LANES * KD_LANES;
  for (int64_t v = 0; v < whole; v += KD_LANES) store(to + v, load(from + v));
  if (whole < n) {
    T tail[KD_LANES] = {};
    std::memcpy(tail, from + whole, (n - whole) * sizeof(T));
    store(to + whole, load(tail));
    for (int64_t v = n; v < padded(n); ++v) to[v] = -infinity;
  }
}

template <class T>
void store_span(const float* from, int64_t n, T* to) {
  const int64_t whole = n / KD_LANES * KD_LANES;
  for (int64_t v = 0; v < whole; v += KD_LANES) store(to + v, load(from + v));
  if (whole < n) {
    T tail[KD_LANES];
    store(tail, load(from + whole));
    std::memcpy(to + whole, tail, (n - whole) * sizeof(T));
  }
}

// Entries [v0, v0 + n) of a row as floats, head applied, over the temperature, padded.
void load_logits(const Side& side, float inverse_temperature, int64_t row, int64_t v0, int64_t n, float* to) {
  const int64_t offset = row * side.stride + v0;
  switch (side.dtype) {
    case Dtype::f32: load_span(static_cast<const float*>(side.logits) + offset, n, to); break;
    case Dtype::bf16: load_span(static_cast<const uint16_t*>(side.logits) + offset, n, to); break;
    case Dtype::f16: load_span(static_cast<const _Float16*>(side.logits) + offset, n, to); break;
  }
  if (side.bias)
    for (int64_t v = 0; v < n; ++v) to[v] += side.bias[v0 + v];
  if (side.scale != 1.f)
    for (int64_t v = 0; v < n; ++v) to[v] *= side.scale;
  if (side.softcap != 0.f) {
    const float inverse = 1.f / side.softcap;
    for (int64_t v = 0; v < n; v += KD_LANES) store(to + v, side.softcap * tanh(load(to + v) * inverse));
    for (int64_t v = n; v < padded(n); ++v) to[v] = -infinity;
  }
  if (inverse_temperature != 1.f)
    for (int64_t v = 0; v < n; ++v) to[v] *= inverse_temperature;
}

// y = (1 - t) x + t z, written from the nearer end so that t = 0, t = 1 and x = z are exact. An entry banned (-inf)
// in a model whose share is positive is banned in the target. NaN and +inf of the teacher come through even at t = 0.
void mix(const Problem& p, const float* x, const float* z, int64_t n, float* y) {
  const bool from_x = p.t < 0.5f;
  const float share = from_x ? p.t : p.t - 1.f;
  for (int64_t v = 0; v < n; v += KD_LANES) {
    const F xv = load(x + v), zv = load(z + v);
    const F base = from_x ? xv : zv;
    const I banned = (xv == -infinity) | (zv == -infinity);
    F yv = where(banned, share == 0.f ? base : xv + zv, base + share * (zv - xv));
    yv = where(zv < infinity, yv, splat(__builtin_nanf("")));
    store(y + v, yv);
  }
}

// log sum exp(factor * v) over the blocks seen so far, as the largest entry m and the log of the sum s of exp(entry - m).
struct LogSumExp {
  float m = -infinity;
  double s = 0;

  static float block_max(const float* values, int64_t n) {
    F m = splat(-infinity);
    for (int64_t v = 0; v < n; v += KD_LANES) m = maximum(load(values + v), m);
    return largest(m);
  }
  void add(const float* values, int64_t n, float factor) {
    const float seen = block_max(values, n) * factor;
    if (seen > m) {
      s *= std::exp(static_cast<double>(m) - seen);
      m = seen;
    }
    const float shift = m == -infinity ? 0.f : m;  // all banned so far: exp(-inf - 0) = 0, and NaN stays NaN
    F total{};
    for (int64_t v = 0; v < n; v += KD_LANES) total += exp<true>(load(values + v) * factor - shift);
    s += sum(total);
  }
  float log_sum() const { return static_cast<float>(std::log(s)); }
};

struct Top {
  float m = -infinity;
  int64_t index = 0;

  void add(const float* values, int64_t n, int64_t v0) {
    const float seen = LogSumExp::block_max(values, n);
    if (!(seen > m)) return;
    m = seen;
    for (int64_t v = 0; v < n; ++v)
      if (values[v] == seen) {
        index = v0 + v;
        return;
      }
  }
};

// The sums behind a divergence whose value is linear in them. Both sides' largest entries may grow from block to block; what was
// summed before is then counted from the new ones.
struct Moments {
  float u_m = -infinity, v_m = -infinity;
  double mass = 0, moment = 0;

  void add(const float* weighing, const float* other, int64_t n, float u_seen, float v_seen) {
    if (mass != 0) {
      const double u_shift = static_cast<double>(u_m) - u_seen, v_shift = static_cast<double>(v_m) - v_seen;
      const double factor = std::exp(u_shift);
      moment = factor * (moment + mass * (u_shift - v_shift));
      mass *= factor;
    }
    u_m = u_seen;
    v_m = v_seen;
    F masses{}, moments{};
    for (int64_t i = 0; i < n; i += KD_LANES) {
      const F w = load(weighing + i), o = load(other + i);
      const F u = w - u_m, v = o - v_m;
      const I banned = (w == -infinity) | (o == -infinity);
      const F e = exp<true>(u);
      masses += where(banned, F{}, e);
      moments += where(banned, F{}, e * (u - v));
    }
    mass += sum(masses);
    moment += sum(moments);
  }
};

// First sweep: fills the buffers (everything over the temperature) and, if asked, the row's statistics.
template <bool with_stats>
void load_row(const Problem& p, int64_t row, const Buffers& b, float* stats) {
  const bool own_x = p.ce && p.temperature != 1.f;
  const float inverse_temperature = 1.f / p.temperature;
  LogSumExp x_T, y_T, x, z_T;
  Top top_x, top_z;
  Moments moments;
  for (int64_t v0 = 0; v0 < p.vocabulary; v0 += block) {
    const int64_t n = std::min(block, p.vocabulary - v0);
    float* z = b.z ? b.z + v0 : b.y + v0;
    load_logits(p.x, inverse_temperature, row, v0, n, b.x + v0);
    load_logits(p.z, inverse_temperature, row, v0, n, z);
    if (with_stats && p.metrics) {
      top_x.add(b.x + v0, n, v0);
      top_z.add(z, n, v0);
      z_T.add(z, n, 1.f);
    }
    if (p.t != 1.f)
      mix(p, b.x + v0, z, n, b.y + v0);
    else if (b.z)
      std::memcpy(b.y + v0, z, padded(n) * sizeof(float));
    if (with_stats) {
      x_T.add(b.x + v0, n, 1.f);
      y_T.add(b.y + v0, n, 1.f);
      if (own_x) x.add(b.x + v0, n, p.temperature);
      if (p.weigh == Weigh::target) moments.add(b.y + v0, b.x + v0, n, y_T.m, x_T.m);
      if (p.weigh == Weigh::student) moments.add(b.x + v0, b.y + v0, n, x_T.m, y_T.m);
    }
  }
  if (!with_stats) return;
  const LogSumExp& x_1 = own_x ? x : x_T;
  stats[max_x_T] = x_T.m;
  stats[log_sum_x_T] = x_T.log_sum();
  stats[max_y_T] = y_T.m;
  stats[log_sum_y_T] = y_T.log_sum();
  stats[max_x] = x_1.m;
  stats[log_sum_x] = x_1.log_sum();
  stats[max_z_T] = z_T.m;
  stats[log_sum_z_T] = z_T.log_sum();
  stats[argmax_x] = static_cast<float>(top_x.index);
  stats[argmax_z] = static_cast<float>(top_z.index);
  const int64_t label = p.labels ? p.labels[row] : -1;
  stats[label_logit] = label >= 0 && label < p.vocabulary ? b.x[label] * p.temperature : 0.f;
  stats[mass] = static_cast<float>(moments.mass);
  stats[moment] = static_cast<float>(moments.moment);
}

// 0 * log 0 = 0
inline F entropy_term(F probability, F log_probability) {
  return where(log_probability == -infinity, F{}, probability * log_probability);
}

// Second sweep: sums of value and slope, with the c (q - p) and c q in them that sum to nothing over a row (divergences.py). For a
// gradient, the slope replaces the target in b.y, and q is written to b.q.
template <class Divergence, bool metrics, bool grad>
void reduce_row(const Problem& p, const Buffers& b, const float* stats, float* sums) {
  double value_sum = 0, slope_sum = 0, entropy_y = 0, entropy_x = 0, shared = 0;
  const float log_ratio = stats[log_sum_x_T] - stats[log_sum_y_T];
  for (int64_t v0 = 0; v0 < p.vocabulary; v0 += block) {
    const int64_t end = std::min(v0 + block, p.vocabulary);
    F values{}, slopes{}, terms_y{}, terms_x{}, least{};
    for (int64_t v = v0; v < end; v += KD_LANES) {
      const F above_x = load(b.x + v) - stats[max_x_T], above_y = load(b.y + v) - stats[max_y_T];
      const F lq = above_x - stats[log_sum_x_T], lp = above_y - stats[log_sum_y_T];
      F value, slope;
      const float c = Divergence::apply(lp, lq, (above_x - above_y) - log_ratio, p.share, p.rest, p.temperature, value, slope);
      const F q = exp(lq), target = exp(lp);
      const I banned = (lp == -infinity) | (lq == -infinity);
      slope = where(banned, c * q, slope);
      values += where(banned, c * (q - target), value);
      slopes += slope;
      if constexpr (metrics) {
        terms_y += entropy_term(target, lp);
        terms_x += entropy_term(q, lq);
        least += minimum(q, exp<true>((load(b.z + v) - stats[max_z_T]) - stats[log_sum_z_T]));
      }
      if constexpr (grad) {
        store(b.y + v, slope);
        store(b.q + v, q);
      }
    }
    value_sum += sum(values);
    slope_sum += sum(slopes);
    if constexpr (metrics) {
      entropy_y -= sum(terms_y);
      entropy_x -= sum(terms_x);
      shared += sum(least);
    }
  }
  sums[sum_value] = static_cast<float>(value_sum);
  // A slope that compares (total variation) can hide a NaN that the value shows.
  sums[sum_slope] = static_cast<float>(value_sum == value_sum ? slope_sum : value_sum);
  sums[sum_target_entropy] = static_cast<float>(entropy_y);
  sums[sum_student_entropy] = static_cast<float>(entropy_x);
  sums[sum_overlap] = static_cast<float>(shared);
}

// Third sweep: dx = kd (slope - q sum slope) / T + ce (softmax(x) - e_label), times the row's weight, through the head's chain
// rule.
void grad_row(const Problem& p, int64_t row, const Buffers& b, const float* stats, float slope_sum) {
  const float weight = (p.weight ? p.weight[row] : 1.f) * p.x.scale;
  const float kd = p.kd_scale / p.temperature * weight, ce = p.ce_scale * weight;
  const bool own_x = ce != 0.f && p.temperature != 1.f;
  // A divergence of factor 0 is left out, whatever it came to: 0 * NaN is not 0.
  const float q_factor = (own_x ? 0.f : ce) - (p.kd_scale != 0.f ? kd * slope_sum : 0.f);
  const int64_t label = p.labels && ce != 0.f ? p.labels[row] : -1;
  const float over_cap = p.x.softcap == 0.f ? 0.f : p.temperature / p.x.softcap;
  alignas(64) float dx[block];
  for (int64_t v0 = 0; v0 < p.vocabulary; v0 += block) {
    const int64_t n = std::min(block, p.vocabulary - v0);
    const float *x = b.x + v0, *slope = b.y + v0, *q = b.q + v0;
    if (p.kd_scale != 0.f)
      for (int64_t v = 0; v < n; v += KD_LANES) store(dx + v, kd * load(slope + v) + q_factor * load(q + v));
    else if (q_factor != 0.f)
      for (int64_t v = 0; v < n; v += KD_LANES) store(dx + v, q_factor * load(q + v));
    else
      std::fill(dx, dx + padded(n), 0.f);
    if (own_x)
      for (int64_t v = 0; v < n; v += KD_LANES)
        store(dx + v, load(dx + v) + ce * exp<true>((load(x + v) * p.temperature - stats[max_x]) - stats[log_sum_x]));
    if (label >= v0 && label < v0 + n) dx[label - v0] -= ce;
    if (over_cap != 0.f)
      for (int64_t v = 0; v < n; v += KD_LANES) {
        const F tanh_x = load(x + v) * over_cap;
        store(dx + v, load(dx + v) * (1.f - tanh_x * tanh_x));
      }
    const int64_t offset = row * p.dx_stride + v0;
    switch (p.x.dtype) {
      case Dtype::f32: store_span(dx, n, static_cast<float*>(p.dx) + offset); break;
      case Dtype::bf16: store_span(dx, n, static_cast<uint16_t*>(p.dx) + offset); break;
      case Dtype::f16: store_span(dx, n, static_cast<_Float16*>(p.dx) + offset); break;
    }
  }
}

void zero_row(const Problem& p, int64_t row) {
  const int64_t size = p.x.dtype == Dtype::f32 ? 4 : 2;
  std::memset(static_cast<char*>(p.dx) + row * p.dx_stride * size, 0, p.vocabulary * size);
}

inline bool dropped(const Problem& p, int64_t row) { return p.weight && p.weight[row] == 0.f; }

template <class Divergence>
void reduce(const Problem& p, const Buffers& b, const float* stats, float* sums) {
  const auto run = p.metrics ? (p.dx ? reduce_row<Divergence, true, true> : reduce_row<Divergence, true, false>)
                             : (p.dx ? reduce_row<Divergence, false, true> : reduce_row<Divergence, false, false>);
  run(p, b, stats, sums);
}

template <class Divergence>
void row_loss(const Problem& p, int64_t begin, int64_t end) {
  const Buffers b(p);
  for (int64_t row = begin; row < end; ++row) {
    float* out = p.rows + row * row_columns;
    std::fill(out, out + row_columns, 0.f);
    if (dropped(p, row)) {
      if (p.dx) zero_row(p, row);
      continue;
    }
    float stats[stats_columns], sums[sums_columns];
    load_row<true>(p, row, b, stats);
    reduce<Divergence>(p, b, stats, sums);
    out[row_kd] = sums[sum_value];
    if (p.ce) out[row_ce] = stats[log_sum_x] - (stats[label_logit] - stats[max_x]);
    if (p.metrics) {
      out[row_target_entropy] = sums[sum_target_entropy];
      out[row_student_entropy] = sums[sum_student_entropy];
      out[row_agreement] = stats[argmax_x] == stats[argmax_z] ? 1.f : 0.f;
      out[row_overlap] = sums[sum_overlap];
    }
    if (p.dx) grad_row(p, row, b, stats, sums[sum_slope]);
  }
}

// The three sweeps by themselves, over a block of the vocabulary, for strategies that stream it.
void block_stats(const Problem& p, int64_t begin, int64_t end) {
  const Buffers b(p);
  for (int64_t row = begin; row < end; ++row) load_row<true>(p, row, b, p.stats + row * stats_columns);
}

template <class Divergence>
void block_reduce(const Problem& p, int64_t begin, int64_t end) {
  const Buffers b(p);
  for (int64_t row = begin; row < end; ++row) {
    load_row<false>(p, row, b, nullptr);
    reduce<Divergence>(p, b, p.stats + row * stats_columns, p.sums + row * sums_columns);
  }
}

template <class Divergence>
void block_grad(const Problem& p, int64_t begin, int64_t end) {
  const Buffers b(p);
  float unused[sums_columns];
  for (int64_t row = begin; row < end; ++row) {
    if (dropped(p, row)) {
      zero_row(p, row);
      continue;
    }
    const float* stats = p.stats + row * stats_columns;
    load_row<false>(p, row, b, nullptr);
    reduce_row<Divergence, false, true>(p, b, stats, unused);
    grad_row(p, row, b, stats, p.sums[row * sums_columns + sum_slope]);
  }
}

namespace divergence {
#include "generated/divergences.inc"
}

#define KD_DIVERGENCE(name) \
  {#name, row_loss<divergence::name>, block_reduce<divergence::name>, block_grad<divergence::name>},
const DivergenceKernels divergence_kernels[] = {
#include "generated/names.inc"
};
#undef KD_DIVERGENCE
