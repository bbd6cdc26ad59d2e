// The row operation of rows.cu by one thread of a CPU, in the kernel's order: each thread's statistics, merges of lanes, warps and
// blocks, sums, gradient. (Continues math.cuh and a divergence's functor, under the same macros, with <algorithm> and <vector> before
// them; namespace kd closes below.)

constexpr int CLUSTER = KD_CLUSTER, WARPS = KD_WARPS, THREADS = WARPS * 32, CHUNK = KD_CHUNK, WIDE = 8;
constexpr bool ONE_SWEEP = KD_WEIGH != 0;

struct Arguments {
  const float *x, *z;
  float* dx;
  int64_t x_stride, z_stride, dx_stride;
  float* columns;
  const int64_t* labels;
  const float *weight, *t;
  Head x_head, z_head;
  Terms terms;
  int rows, vocab, slice;
};

inline Sums merged(Sums to, const Sums& from, float) { return {to.value + from.value, to.slope + from.slope}; }
inline Statistics merged(Statistics to, const Statistics& from, float temperature) {
  merge(to, from, temperature);
  return to;
}

// Of the parts that lanes hold, as a butterfly of shuffles does it; all lanes end with the same.
template <class Part>
Part of_lanes(std::vector<Part> parts, Part nothing, float temperature) {
  parts.resize(32, nothing);
  for (int mask = 16; mask; mask /= 2) {
    const std::vector<Part> before = parts;
    for (int lane = 0; lane < 32; lane++) parts[lane] = merged(before[lane], before[lane ^ mask], temperature);
  }
  return parts[0];
}

template <class Part>
Part of_threads(const std::vector<Part>& threads, Part nothing, float temperature) {
  std::vector<Part> warps;
  for (int warp = 0; warp < WARPS; warp++)
    warps.push_back(of_lanes(std::vector<Part>(&threads[warp * 32], &threads[warp * 32] + 32), nothing, temperature));
  return of_lanes(warps, nothing, temperature);
}

// A block's slice of both models; its room reaches to a multiple of WIDE.
struct Slice {
  int begin, count;
  std::vector<float> x, y;
};

inline std::vector<Statistics> statistics(Slice& slice, float t, const Arguments& of) {
  std::vector<Statistics> threads(THREADS, no_statistics());
  for (int chunk = 0; chunk * CHUNK < slice.count; chunk++) {
    const int end = std::min(chunk * CHUNK + CHUNK, slice.count), filled = (end + WIDE - 1) / WIDE * WIDE;
    for (int thread = 0; thread < THREADS; thread++)
      for (int at = chunk * CHUNK + thread * 4; at < filled; at += THREADS * 4) {
        float *u = &slice.x[at], *v = &slice.y[at];
        for (int k = 0; k < 4; k++) {
          const bool outside = at + k >= end;
          const int column = outside ? slice.begin : slice.begin + at + k;
          u[k] = after_head<KD_X_BIAS, KD_X_SOFTCAP>(u[k], of.x_head, of.terms.temperature, column);
          v[k] = after_head<KD_Z_BIAS, KD_Z_SOFTCAP>(v[k], of.z_head, of.terms.temperature, column);
          if (t != 1.f) v[k] = mixed(u[k], v[k], t);
          if (outside) u[k] = v[k] = -infinity();
        }
        add<4>(threads[thread], u, v, of.terms.temperature);
      }
  }
  return threads;
}

inline std::vector<Sums> sums(Slice& slice, const Row& row, const Arguments& of) {
  std::vector<Sums> threads(THREADS, Sums{0.f, 0.f});
  for (int thread = 0; thread < THREADS; thread++)
    for (int at = thread * 4; at < static_cast<int>(slice.x.size()); at += THREADS * 4)
      for (int k = 0; k < 4; k++) {
        const Sums entry = value_and_slope<KD_PAIR>(slice.x[at + k], slice.y[at + k], row, of.terms);
        threads[thread].value += entry.value;
        threads[thread].slope += slice.y[at + k] = entry.slope;
      }
  return threads;
}

inline void row(int64_t r, const Arguments& of) {
  const float weight = of.weight[r], temperature = of.terms.temperature, factor = weight * of.x_head.scale;
  float *columns = of.columns + r * 6, *dx = KD_GRAD ? of.dx + r * of.dx_stride : nullptr;
  std::fill(columns, columns + 6, 0.f);
  if (weight == 0.f) {
    if (KD_GRAD) std::fill(dx, dx + of.vocab, 0.f);
    return;
  }
  const int64_t label = KD_CE ? of.labels[r] : -1;
  std::vector<Slice> slices;
  std::vector<Statistics> found;
  for (int block = 0; block < CLUSTER; block++) {
    const int begin = block * of.slice, count = std::max(0, std::min(of.slice, of.vocab - begin));
    const int filled = (count + WIDE - 1) / WIDE * WIDE;
    const float *x = of.x + r * of.x_stride + begin, *z = of.z + r * of.z_stride + begin;
    slices.push_back({begin, count, std::vector<float>(x, x + filled), std::vector<float>(z, z + filled)});
    Slice& slice = slices.back();
    found.push_back(of_threads(statistics(slice, *of.t, of), no_statistics(), temperature));
    if (label >= begin && label < begin + count) found.back().label_logit = at_one(slice.x[label - begin], temperature);
  }
  const Statistics all = of_lanes(found, no_statistics(), temperature);
  const Row finished_row = finished(all, temperature);
  Sums total;
  if constexpr (ONE_SWEEP) {
    total = sums_of_one_sweep(all, finished_row, of.terms);
  } else {
    std::vector<Sums> parts;
    for (Slice& slice : slices) parts.push_back(of_threads(sums(slice, finished_row, of), Sums{0.f, 0.f}, 0.f));
    total = shown(of_lanes(parts, Sums{0.f, 0.f}, 0.f));
  }
  columns[0] = total.value;
  if (KD_CE) columns[1] = cross_entropy(finished_row);
  if (!KD_GRAD) return;
  for (const Slice& slice : slices)
    for (int at = 0; at < slice.count; at++) {
      const float u = slice.x[at], v = slice.y[at];
      const float slope = ONE_SWEEP ? value_and_slope<KD_PAIR>(u, v, finished_row, of.terms).slope : v;
      dx[slice.begin + at] = gradient(u, slope, finished_row, total.slope, KD_CE && slice.begin + at == label, factor, of.x_head, of.terms);
    }
}

}  // namespace kd

extern "C" void row_loss(const kd::Arguments* of) {
  for (int64_t r = 0; r < of->rows; r++) kd::row(r, *of);
}
