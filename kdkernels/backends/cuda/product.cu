// Logits of a plain head in 16 bits, straight out of their products: as offsets_product_kernel in backends/triton/offsets.py, which
// says what codes, largest and sums are, without a target that is mixed.
//
// - A tile is KD_BLOCK_N tokens by KD_BLOCK_V columns. Blocks are in clusters of two, that take tiles one above the other: each
//   copies its own tokens, and half of the head's rows for both.
// - One thread of the first warpgroup copies; each of the other two multiplies half of the tile's tokens by all its columns, and
//   stores them. Nothing but the ring of copies ties these two together, so that one multiplies while the other stores.
// - A block does many tiles one after the other, and the copies of the next begin while this one is stored.
constexpr int BLOCK_N = KD_BLOCK_N, BLOCK_V = KD_BLOCK_V, BLOCK_D = KD_BLOCK_D, STAGES = KD_STAGES, CLUSTER = 2, GROUP = 8;
constexpr int HIDDEN_BYTES = BLOCK_N * BLOCK_D * 2, HALF_BYTES = BLOCK_V / CLUSTER * BLOCK_D * 2;
constexpr int STAGE = HIDDEN_BYTES + CLUSTER * HALF_BYTES;
// Each of the eight warps that multiply has 16 rows, which it stores by boxes of 64 columns; two boxes take turns.
constexpr int WARPS = 8, BOXES = 2, BOX_ROWS = KD_BOX_ROWS, BOX_COLUMNS = KD_BOX_COLUMNS, BOX = BOX_ROWS * BOX_COLUMNS * 2;
constexpr int FULL = STAGES * STAGE + WARPS * BOXES * BOX, EMPTY = FULL + 8 * STAGES;
static_assert(EMPTY + 8 * STAGES == KD_SHARED && BLOCK_N == WARPS * BOX_ROWS && BLOCK_V == 256 && BLOCK_D == 64);
static_assert(BOX_ROWS == 16 && BOX_COLUMNS == 64);
constexpr float LOG2_E = 1.44269504f, BANNED = -65520.0f;  // from there down float16 numbers are -inf

struct Arguments {
  float *largest, *sums;  // [tokens, tiles]
  const float* t;         // or null; at another value than 1 nothing is done
  float factor;           // of the products: positive
  int tokens, vocab, width;
};

struct Tile {
  int block, tile;
};

// Of stages, which are filled and emptied one after the other.
struct Ring {
  unsigned base;
  int stage = 0, phase = 0;

  __device__ __forceinline__ unsigned memory() const { return base + stage * STAGE; }
  __device__ __forceinline__ unsigned full() const { return base + FULL + 8 * stage; }
  __device__ __forceinline__ unsigned empty() const { return base + EMPTY + 8 * stage; }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// GROUP pairs of token blocks go through the vocabulary side by side, as in vocabulary.place.
__device__ __forceinline__ Tile place(int at, int pairs, int tiles, int rank) {
  const int first = at / (GROUP * tiles) * GROUP, inside = at - first * tiles;
  const int size = pairs - first < GROUP ? pairs - first : GROUP;
  return {(first + inside % size) * CLUSTER + rank, inside / size};
}

__device__ __forceinline__ float largest_of_quad(float v) {
  v = fmaxf(v, of_partner(v, 1));
  return fmaxf(v, of_partner(v, 2));
}
__device__ __forceinline__ float least_of_quad(float v) {
  v = fminf(v, of_partner(v, 1));
  return fminf(v, of_partner(v, 2));
}
__device__ __forceinline__ float sum_of_quad(float v) {
  v += of_partner(v, 1);
  return v + of_partner(v, 2);
}

// By one thread.
__device__ __forceinline__ void copy_tile(Ring& ring, const Map* hidden, const Map* weight, Tile to, int rank, int steps) {
  for (int k = 0; k < steps; k++, ring.next()) {
    await(ring.empty(), ring.phase ^ 1);
    expect(ring.full(), STAGE);
    load(ring.memory(), hidden, k * BLOCK_D, to.block * BLOCK_N, ring.full());
    load_for_both(ring.memory() + HIDDEN_BYTES + rank * HALF_BYTES, weight, k * BLOCK_D,
                  to.tile * BLOCK_V + rank * (BLOCK_V / CLUSTER), ring.full());
  }
}

// By a warpgroup: ``half`` of the tile's tokens.
__device__ __forceinline__ void multiply_tile(float (&d)[128], Ring& ring, int half, int lane, int steps) {
  unsigned before = 0;
  for (int k = 0; k < steps; k++, ring.next()) {
    await(ring.full(), ring.phase);
    const u64 a = descriptor(ring.memory() + half * (HIDDEN_BYTES / 2)), b = descriptor(ring.memory() + HIDDEN_BYTES);
    before_products();
#pragma unroll
    for (int j = 0; j < BLOCK_D / 16; j++) multiply(d, a + 2 * j, b + 2 * j, k || j);
    commit();
    multiplied<1>();  // the step before: its stage is free for both blocks' copies
    if (k && lane < CLUSTER) arrive_in(before, lane);
    before = ring.empty();
  }
  multiplied<0>();
  if (lane < CLUSTER) arrive_in(before, lane);
}

// By a warp: its 16 rows of the tile, of which a thread has parts of two, from ``row`` on, through its two boxes.
//
// code = v - (largest - 1), and the difference is rounded once: what is subtracted is what the row kernel adds. Where the largest
// is -inf all codes are too; of +inf and NaN some code is NaN, and so are the sums.
__device__ __forceinline__ void store_tile(float (&d)[128], unsigned boxes, const Map* codes, const Arguments& args, int row,
                                           int tile, int tiles, int lane) {
  const float nothing = __int_as_float(0xff800000);  // -inf
  float least[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float v = d[2 * h];  // columns past the vocabulary are 0: with them too much may seem banned, which costs time alone
#pragma unroll
    for (int j = 0; j < 32; j++) v = fminf(v, fminf(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]));
    least[h] = least_of_quad(v);
  }
  if (const int left = args.vocab - tile * BLOCK_V; left < BLOCK_V) {
#pragma unroll
    for (int j = 0; j < 128; j++)
      if (j / 4 * 8 + lane % 4 * 2 + j % 2 >= left) d[j] = nothing;
  }
  float largest[2], below[2], sign[2], sum[2] = {};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float v = d[2 * h];
#pragma unroll
    for (int j = 0; j < 32; j++) v = fmaxf(v, fmaxf(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]));
    largest[h] = largest_of_quad(v) * args.factor;
    below[h] = 1.0f - (largest[h] == nothing ? 0.0f : largest[h]);
    sign[h] = fmaf(least[h], args.factor, below[h]) <= BANNED ? -1.0f : 1.0f;
  }
  // Where this lane's 16 bytes of a 16 x 16 block lie: row lane % 16, columns 8 (lane / 16) on, swizzled over eight places.
  const unsigned row_place = lane % 16 * 128, swizzle = lane % 8, column_half = lane / 16;
#pragma unroll
  for (int c = 0; c < BLOCK_V / BOX_COLUMNS; c++) {
    const unsigned box = boxes + c % BOXES * BOX;
    if (lane == 0) stores_read<BOXES - 1>();
    __syncwarp();
#pragma unroll
    for (int q = 0; q < BOX_COLUMNS / 16; q++) {
      unsigned packed[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {  // two columns of the eight that are e / 2, of the row that is e % 2
        const int j = (c * 8 + q * 2 + e / 2) * 4 + e % 2 * 2, h = e % 2;
        packed[e] = halves(fmaf(d[j], args.factor, below[h]), fmaf(d[j + 1], args.factor, below[h]));
        float low, high;
        floats(packed[e], low, high);
        sum[h] += power_of_2(fmaf(low, LOG2_E, -LOG2_E));
        sum[h] += power_of_2(fmaf(high, LOG2_E, -LOG2_E));
      }
      write_blocks(box + row_place + ((2 * q + column_half ^ swizzle) << 4), packed);
    }
    show_to_copies();
    __syncwarp();
    if (lane == 0) store(codes, box, tile * BLOCK_V + c * BOX_COLUMNS, row);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float all = sign[h] * sum_of_quad(sum[h]);
    const int own = row + lane / 4 + 8 * h;
    if (lane % 4 == 0 && own < args.tokens) {
      const long long part = (long long)own * tiles + tile;
      args.largest[part] = largest[h];
      args.sums[part] = all;
    }
  }
}

extern "C" __global__ void __launch_bounds__(KD_THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    product(const __grid_constant__ Map hidden, const __grid_constant__ Map weight, const __grid_constant__ Map codes,
            const __grid_constant__ Arguments args) {
  const unsigned base = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % CLUSTER;
  const int pairs = (args.tokens + CLUSTER * BLOCK_N - 1) / (CLUSTER * BLOCK_N), tiles = (args.vocab + BLOCK_V - 1) / BLOCK_V;
  const int steps = (args.width + BLOCK_D - 1) / BLOCK_D, count = !args.t || *args.t == 1.0f ? pairs * tiles : 0;
  const int first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) set_up(base + FULL + 8 * s, 1), set_up(base + EMPTY + 8 * s, WARPS * CLUSTER);
    show_barriers();
  }
  cluster_together();
  Ring ring{base};
  if (warp < 4) {
    fewer_registers<40>();
    if (threadIdx.x == 0)
      for (int at = first; at < count; at += clusters)
        copy_tile(ring, &hidden, &weight, place(at, pairs, tiles, rank), rank, steps);
    __syncwarp();
  } else {
    more_registers<232>();
    const int own = warp - 4;
    for (int at = first; at < count; at += clusters) {
      const Tile to = place(at, pairs, tiles, rank);
      float d[128];
      multiply_tile(d, ring, own / 4, lane, steps);
      const unsigned boxes = base + STAGES * STAGE + own * BOXES * BOX;
      store_tile(d, boxes, &codes, args, to.block * BLOCK_N + own * BOX_ROWS, to.tile, tiles, lane);
    }
    if (lane == 0) stores_read<0>();
    __syncwarp();
  }
  cluster_together();  // nobody leaves while the other block sends to it
}
