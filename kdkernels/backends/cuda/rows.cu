// The row operation with one read of the logits: a cluster of thread blocks takes a row, each of its blocks a slice of both models'
// logits in shared memory, where all sweeps run. (Continues math.cuh and a divergence's functor; namespace kd closes below.)
//
// Clusters are persistent: each takes every so many-th row. A warp of its own, the producer, copies a chunk of the next row to where
// the gradient pass has just left one of this row, so that memory is read while the others compute. What a block found of its slice it
// sends to all blocks of the cluster, and each merges all of it in the same order.
//
// Two sets of places, by turns, are enough for what is sent: a block sends its part of row r + 2 only when it has all parts of row
// r + 1, and each block sent its own only when all its warps were past row r (together). So the places of row r have been read, and
// its barrier has completed: bytes that come before their block has announced them count for row r + 2. All warps of a block also
// meet between a sweep and the next, so that a thread reads the logits and slopes that others wrote.
// (tests/backends/test_cuda_cluster.py holds every access to shared memory to what orders it.)
//
// With metrics the teacher's logits stay where they came to, for the sums are over them too, and the target of t < 1 is mixed anew in
// each of both sweeps: a few instructions, where a third slice would leave room for two blocks on a multiprocessor instead of three.
//
// Macros besides math.cuh's: KD_PAIR (the functor), KD_CLUSTER (blocks of a cluster), KD_WARPS (that compute), KD_CHUNK (logits of a
// model that are copied together), KD_SLICE (of a block, at most), KD_BLOCKS (that a multiprocessor holds), KD_SCALED (a head's scale is
// not 1), KD_GRAD, KD_OUT (of dx: 0 float32, 1 bfloat16, 2 float16); KD_ROW_COLUMNS of the result, and the place of each, KD_ROW_KD and so
// on.

constexpr int CLUSTER = KD_CLUSTER, WARPS = KD_WARPS, THREADS = WARPS * 32, CHUNK = KD_CHUNK, SLICE = KD_SLICE;
constexpr int CHUNKS = (SLICE + CHUNK - 1) / CHUNK;
constexpr int WIDE = 8;  // entries of dx that a thread stores together
constexpr bool ONE_SWEEP = KD_WEIGH != 0, METRICS = KD_METRICS;
static_assert(!(ONE_SWEEP && METRICS), "metrics are made in the sums' sweep");
static_assert((WARPS & (WARPS - 1)) == 0 && (CLUSTER & (CLUSTER - 1)) == 0, "parts are merged in pairs");
typedef long long int64;

// Float4s that hold a Statistics or Sums, as blocks send it.
template <class T>
constexpr int PARTS = (sizeof(T) + sizeof(float4) - 1) / sizeof(float4);

// To that block of the cluster, which counts the bytes by ``sent``. place, sent: as in this block.
template <class T>
__device__ __forceinline__ void send(const T& of, float4 (&place)[PARTS<T>], barrier* sent, int block) {
  const unsigned to = in_block(address(place), block), by = in_block(address(sent), block);
  float4 parts[PARTS<T>] = {};
  memcpy(parts, &of, sizeof(T));
#pragma unroll
  for (int k = 0; k < PARTS<T>; k++) send(to + k * sizeof(float4), parts[k], by);
}

template <class T>
__device__ __forceinline__ T received(const float4 (&place)[PARTS<T>]) {
  float4 parts[PARTS<T>];
#pragma unroll
  for (int k = 0; k < PARTS<T>; k++) parts[k] = place[k];
  T found;
  memcpy(&found, parts, sizeof(T));
  return found;
}

// Lane l of a warp holds part l % LANES, and gets what all parts make.
template <int LANES>
__device__ __forceinline__ float sum_of_parts(float v) {
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) v += of_lane(v, threadIdx.x % 32 ^ mask);
  return v;
}

// Once all lanes have the largest entries they count from these, and only add up: the first lane's sums, in every lane the same, since
// two lanes may differ in the last bit where a compiler fuses the product in ``raise`` with the first addition.
template <int LANES>
__device__ __forceinline__ void merge_parts(Statistics& of, float temperature) {
  const int lane = threadIdx.x % 32;
  const auto summed = [](float v) { return of_lane(sum_of_parts<LANES>(v), 0); };
  float x_max = of.x_max, y_max = of.y_max;
#if KD_METRICS
  float z_max = of.z_max;
#endif
  // Unrolled but for metrics, whose five values take more registers than three blocks leave on compute capability 10.0.
  constexpr int ROUNDS = METRICS ? 1 : 5;
#pragma unroll ROUNDS
  for (int mask = LANES / 2; mask; mask /= 2) {
    const int other = lane ^ mask;
    const float x_other = of_lane(x_max, other), y_other = of_lane(y_max, other);
#if KD_METRICS
    const float z_other = of_lane(z_max, other);
    of.x_at = first_of_tops(x_max, of.x_at, x_other, of_lane(of.x_at, other));
    of.z_at = first_of_tops(z_max, of.z_at, z_other, of_lane(of.z_at, other));
    z_max = maximum(z_max, z_other);
#endif
    x_max = maximum(x_max, x_other);
    y_max = maximum(y_max, y_other);
  }
  raise(of, x_max, y_max, temperature);
  of.x_sum = summed(of.x_sum);
  of.y_sum = summed(of.y_sum);
#if KD_CE && KD_TEMPERED
  of.one_sum = summed(of.one_sum);
#endif
#if KD_WEIGH
  of.mass = summed(of.mass);
  of.moment = summed(of.moment);
#endif
#if KD_CE
  of.label_logit = summed(of.label_logit);
#endif
#if KD_METRICS
  of.z_sum = summed(of.z_sum * exp(of.z_max - counted_from(z_max)));
  of.z_max = z_max;
#endif
}

template <int LANES>
__device__ __forceinline__ void merge_parts(Sums& of) {
  of.value = sum_of_parts<LANES>(of.value);
  of.slope = sum_of_parts<LANES>(of.slope);
#if KD_METRICS
  of.target_entropy = sum_of_parts<LANES>(of.target_entropy);
  of.student_entropy = sum_of_parts<LANES>(of.student_entropy);
  of.overlap = sum_of_parts<LANES>(of.overlap);
#endif
}

#if KD_OUT == 0
typedef float Out;
__device__ __forceinline__ void store(Out* to, const float (&dx)[WIDE]) {
  store(to, bits_of(dx[0]), bits_of(dx[1]), bits_of(dx[2]), bits_of(dx[3]));
  store(to + 4, bits_of(dx[4]), bits_of(dx[5]), bits_of(dx[6]), bits_of(dx[7]));
}
#else
typedef unsigned short Out;
__device__ __forceinline__ void store(Out* to, const float (&dx)[WIDE]) {
  store(to, rounded(dx[0], dx[1]), rounded(dx[2], dx[3]), rounded(dx[4], dx[5]), rounded(dx[6], dx[7]));
}
#endif

struct Arguments {
  const float *x, *z;  // [rows, vocab]; room behind each row to a multiple of 8, rows 16 bytes aligned
  Out* dx;             // likewise, may be x
  int64 x_stride, z_stride, dx_stride;
  float* columns;       // [rows, ROW_COLUMNS]
  const int64* labels;  // [rows], with KD_CE
  const float *weight, *t;
  Head x_head, z_head;
  Terms terms;
  int rows, vocab, slice;  // slice: a multiple of 64
};

// What the blocks of a cluster tell each other, by turns in one of two sets.
struct Shared {
  barrier full[CHUNKS], empty[CHUNKS], statistics_sent[2], sums_sent[2];
  float4 statistics[2][CLUSTER][PARTS<Statistics>], sums[2][CLUSTER][PARTS<Sums>];
  Statistics of_warps[WARPS];
  Sums sums_of_warps[WARPS];
};

// Writes over raw logits what the sweeps after the first need, unless they are that already.
template <bool AT_ONE>
constexpr bool DRESSED = (!AT_ONE && !METRICS) || KD_X_BIAS || KD_Z_BIAS || KD_X_SOFTCAP || KD_Z_SOFTCAP || KD_TEMPERED || KD_SCALED;

// Four entries more, at x and y. LAST: of which there may be fewer than ``left``; the others are as if banned.
template <bool AT_ONE, bool LAST>
__device__ __forceinline__ void add_entries(Statistics& found, float* x, float* y, int column, int left, float t,
                                            const Arguments& of) {
  const float temperature = of.terms.temperature;
  const float4 a = *reinterpret_cast<float4*>(x), b = *reinterpret_cast<float4*>(y);
  float u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
  if constexpr (DRESSED<AT_ONE>) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int own = LAST ? min(column + k, of.vocab - 1) : column + k;
      u[k] = after_head<KD_X_BIAS, KD_X_SOFTCAP>(u[k], of.x_head, temperature, own);
      v[k] = after_head<KD_Z_BIAS, KD_Z_SOFTCAP>(v[k], of.z_head, temperature, own);
      if constexpr (!AT_ONE && !METRICS) v[k] = mixed(u[k], v[k], t);
    }
  }
  if constexpr (LAST)
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (k >= left) u[k] = v[k] = -infinity();
  if constexpr (DRESSED<AT_ONE> || LAST) {
    *reinterpret_cast<float4*>(x) = {u[0], u[1], u[2], u[3]};
    *reinterpret_cast<float4*>(y) = {v[0], v[1], v[2], v[3]};
  }
#if KD_METRICS
  add_teacher<AT_ONE, 4>(found, u, v, column);
  if constexpr (!AT_ONE)
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = mixed(u[k], v[k], t);
#endif
  add<4>(found, u, v, temperature);
}

template <bool AT_ONE>
__device__ __forceinline__ Statistics statistics(float* x, float* y, int begin, int count, float t, int parity, Shared& shared,
                                                 const Arguments& of) {
  Statistics found = no_statistics();
  for (int chunk = 0; chunk * CHUNK < count; chunk++) {
    await(shared.full + chunk, parity);
    const int end = min(chunk * CHUNK + CHUNK, count), filled = (end + WIDE - 1) / WIDE * WIDE;
    int at = chunk * CHUNK + threadIdx.x * 4;
    for (; at + 4 <= end; at += THREADS * 4) add_entries<AT_ONE, false>(found, x + at, y + at, begin + at, 4, t, of);
    if (at < filled) add_entries<AT_ONE, true>(found, x + at, y + at, begin + at, end - at, t, of);
  }
#if KD_METRICS
  if (AT_ONE) found.z_max = found.y_max, found.z_sum = found.y_sum;
#endif
  return found;
}

// The slopes over y's place. y: the target's logits, or with metrics the teacher's.
template <bool AT_ONE>
__device__ __forceinline__ Sums sums(const float* x, float* y, int count, float t, const Row& row, const Arguments& of) {
  Sums found{};
  const int filled = (count + WIDE - 1) / WIDE * WIDE;
  for (int at = threadIdx.x * 4; at < filled; at += THREADS * 4) {
    const float4 a = *reinterpret_cast<const float4*>(x + at), b = *reinterpret_cast<float4*>(y + at);
    const float u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
    float slopes[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float target = AT_ONE || !METRICS ? v[k] : mixed(u[k], v[k], t);
      const Sums entry = value_and_slope<KD_PAIR>(u[k], target, row, of.terms);
      found.value += entry.value;
      found.slope += slopes[k] = entry.slope;
#if KD_METRICS
      measure(found, u[k], target, v[k], row);
#endif
    }
    *reinterpret_cast<float4*>(y + at) = {slopes[0], slopes[1], slopes[2], slopes[3]};
  }
  return found;
}

// dx of WIDE entries. LAST: of which there may be fewer than ``left``; the others' is 0. label: its place, counted from the first.
template <bool LAST>
__device__ __forceinline__ void write_gradient(const float* x, const float* y, Out* dx, int left, int64 label, const Row& row,
                                               float slope_sum, float kd, float ce, const Arguments& of) {
  float made[WIDE];
#pragma unroll
  for (int half = 0; half < WIDE; half += 4) {
    const float4 a = *reinterpret_cast<const float4*>(x + half), b = *reinterpret_cast<const float4*>(y + half);
    const float u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float slope = ONE_SWEEP ? value_and_slope<KD_PAIR>(u[k], v[k], row, of.terms).slope : v[k];
      const bool is_label = KD_CE && half + k == label;
      const float one = gradient(u[k], slope, row, slope_sum, is_label, kd, ce, of.x_head, of.terms);
      made[half + k] = LAST && half + k >= left ? 0.f : one;
    }
  }
  store(dx, made);
}

// y: the target's logits, or slopes where there were sums. A chunk is the producer's again when all warps have read it.
__device__ __forceinline__ void gradients(const float* x, const float* y, int begin, int count, int64 label, const Row& row,
                                          float slope_sum, float weight, Out* dx, Shared& shared, const Arguments& of) {
  const float factor = weight * of.x_head.scale;
  [[maybe_unused]] const float kd = of.terms.kd * factor, ce = of.terms.ce * factor;
  for (int chunk = 0; chunk * CHUNK < count; chunk++) {
#if KD_GRAD
    const int end = min(chunk * CHUNK + CHUNK, count);
    int at = chunk * CHUNK + threadIdx.x * WIDE;
    for (; at + WIDE <= end; at += THREADS * WIDE)
      write_gradient<false>(x + at, y + at, dx + at, WIDE, label - begin - at, row, slope_sum, kd, ce, of);
    if (at < end) write_gradient<true>(x + at, y + at, dx + at, end - at, label - begin - at, row, slope_sum, kd, ce, of);
#endif
    before_copies();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared.empty + chunk);
  }
}

template <bool AT_ONE>
__device__ __forceinline__ void compute(float* x, float* y, int begin, int count, float t, Shared& shared, const Arguments& of) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, rank = blockIdx.x % CLUSTER;
  int turn = 0;
  for (int64 r = blockIdx.x / CLUSTER; r < of.rows; r += gridDim.x / CLUSTER) {
    const float weight = of.weight[r], temperature = of.terms.temperature;
    Out* dx = KD_GRAD ? of.dx + r * of.dx_stride + begin : nullptr;
    float* columns = of.columns + r * KD_ROW_COLUMNS;
    if (rank == 0 && thread < KD_ROW_COLUMNS) columns[thread] = 0.f;
    if (weight == 0.f) {  // not computed
      const float zeros[WIDE] = {};
      if (KD_GRAD)
        for (int at = thread * WIDE; at < count; at += THREADS * WIDE) store(dx + at, zeros);
      continue;
    }
    const int parity = turn & 1, used = turn >> 1 & 1;
    turn++;
    const int64 label = KD_CE ? of.labels[r] : -1;
    if (thread == 0) {
      expect(shared.statistics_sent + parity, sizeof shared.statistics[parity]);
      if (!ONE_SWEEP) expect(shared.sums_sent + parity, sizeof shared.sums[parity]);
    }

    Statistics found = statistics<AT_ONE>(x, y, begin, count, t, parity, shared, of);
    merge_parts<32>(found, temperature);
    if (lane == 0) shared.of_warps[warp] = found;
    together();
    if (warp == 0) {
      found = shared.of_warps[lane % WARPS];
      merge_parts<WARPS>(found, temperature);
      if (KD_CE && label >= begin && label < begin + count) {
        // what the first sweep wrote over the logits, or the logits as they came
        found.label_logit = at_one(x[label - begin], temperature);
      }
      __syncwarp();  // of_warps is read: with what is sent the other warps may come to write it for the next row
      if (lane < CLUSTER) send(found, shared.statistics[parity][rank], shared.statistics_sent + parity, lane);
    }
    await_sent(shared.statistics_sent + parity, used);
    found = received<Statistics>(shared.statistics[parity][lane % CLUSTER]);
    merge_parts<CLUSTER>(found, temperature);
    const Row row = finished(found, temperature);

    Sums total;
    if constexpr (ONE_SWEEP) {
      total = sums_of_one_sweep(found, row, of.terms);
    } else {
      total = sums<AT_ONE>(x, y, count, t, row, of);
      merge_parts<32>(total);
      if (lane == 0) shared.sums_of_warps[warp] = total;
      together();
      if (warp == 0) {
        total = shared.sums_of_warps[lane % WARPS];
        merge_parts<WARPS>(total);
        if (lane < CLUSTER) send(total, shared.sums[parity][rank], shared.sums_sent + parity, lane);
      }
      await_sent(shared.sums_sent + parity, used);
      total = received<Sums>(shared.sums[parity][lane % CLUSTER]);
      merge_parts<CLUSTER>(total);
      total = shown(total);
    }
    if (rank == 0 && thread == 0) {
      columns[KD_ROW_KD] = total.value;
      if (KD_CE) columns[KD_ROW_CE] = cross_entropy(row);
#if KD_METRICS
      columns[KD_ROW_TARGET_ENTROPY] = total.target_entropy;
      columns[KD_ROW_STUDENT_ENTROPY] = total.student_entropy;
      columns[KD_ROW_AGREEMENT] = row.agree ? 1.f : 0.f;
      columns[KD_ROW_OVERLAP] = total.overlap;
#endif
    }
    gradients(x, y, begin, count, label, row, total.slope, weight, dx, shared, of);
  }
}

__device__ __forceinline__ void produce(float* x, float* z, int begin, int count, Shared& shared, const Arguments& of) {
  int turn = 0;
  for (int64 r = blockIdx.x / CLUSTER; r < of.rows; r += gridDim.x / CLUSTER) {
    if (of.weight[r] == 0.f) continue;
    const float *from_x = of.x + r * of.x_stride + begin, *from_z = of.z + r * of.z_stride + begin;
    for (int chunk = 0; chunk * CHUNK < count; chunk++) {
      if (turn) await(shared.empty + chunk, (turn - 1) & 1);
      const int at = chunk * CHUNK, bytes = (min(CHUNK, count - at) * 4 + 15) / 16 * 16;
      expect(shared.full + chunk, 2 * bytes);
      copy(x + at, from_x + at, bytes, shared.full + chunk);
      copy(z + at, from_z + at, bytes, shared.full + chunk);
    }
    turn++;
  }
}

}  // namespace kd

extern "C" __global__ void __cluster_dims__(KD_CLUSTER, 1, 1) __launch_bounds__(KD_WARPS * 32 + 32, KD_BLOCKS)
    row_loss(const __grid_constant__ kd::Arguments of) {
  using namespace kd;
  Shared& shared = shared_by_block<Shared>();
  float *x = slices(), *z = x + SLICE;
  const int begin = static_cast<int>(blockIdx.x % CLUSTER) * of.slice, count = max(0, min(of.slice, of.vocab - begin));
  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      set_up(shared.full + chunk, 1);
      set_up(shared.empty + chunk, WARPS);
    }
    for (int turn = 0; turn < 2; turn++) {
      set_up(shared.statistics_sent + turn, 1);
      set_up(shared.sums_sent + turn, 1);
    }
    barriers_are_set_up();
  }
  cluster_together();
  if (threadIdx.x >= THREADS) {
    if (threadIdx.x == THREADS) produce(x, z, begin, count, shared, of);
  } else {
    const float t = *of.t;
    if (t == 1.f)
      compute<true>(x, z, begin, count, t, shared, of);
    else
      compute<false>(x, z, begin, count, t, shared, of);
  }
  __syncwarp();
  cluster_together();  // no block ends while another may send to it
}
