// Compute capability 9.0 through PTX: barriers, copies of tiles by tensor maps, products of warpgroups. Shared memory goes by its
// 32-bit addresses. A CPU does the same in tests/support/hopper.h.
typedef unsigned long long u64;
struct alignas(64) Map {
  u64 opaque[16];  // CUtensorMap
};

__device__ __forceinline__ unsigned shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return (unsigned)__cvta_generic_to_shared(memory);
}

// Barriers. Arrivals and waits order what the block's threads do, and no more: from the other block come copies, and word that
// products have read their tiles, which the barrier's completion and the wait for the products order themselves. Semantics of the
// whole cluster would wait for all memory, and drop the first-level cache, at every step.
__device__ __forceinline__ void set_up(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and has the phase wait for as many bytes of copies.
__device__ __forceinline__ void expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the same place in a block of the cluster.
__device__ __forceinline__ void arrive_in(unsigned barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
__device__ __forceinline__ void await(unsigned barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void cluster_together() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Copies of a map's box from, or to, where its tensor has ``row`` and ``column``. What lies outside is read as 0, and not stored.
__device__ __forceinline__ void load(unsigned to, const Map* map, int column, int row, unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}
// Into both blocks of the cluster, at the same places, each of whose barriers gets the bytes.
__device__ __forceinline__ void load_for_both(unsigned to, const Map* map, int column, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((short)3)
      : "memory");
}
__device__ __forceinline__ void store(const Map* map, unsigned from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;" ::"l"(map),
      "r"(from), "r"(column), "r"(row)
      : "memory");
}
// Waits until this thread's stores, but for the last ones, have read shared memory.
template <int PENDING>
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Products. Of a tile in shared memory, rows of 128 bytes, swizzled over those: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(unsigned place) {
  return (u64)(place >> 4 & 0x3fff) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
#define KD_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KD_16(i) KD_4(i), KD_4(i + 4), KD_4(i + 8), KD_4(i + 12)
// d = a bᵀ of 64 x 256 x 16, added to d or not. A thread has of row lane / 4 + 8 (i / 2 % 2) of its warp's 16 the column
// 8 (i / 4) + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void multiply(float (&d)[128], u64 a, u64 b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." KD_TYPE "." KD_TYPE
      " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
      "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"
      "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,"
      "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, 0, 0;\n}"
      : KD_16(0), KD_16(16), KD_16(32), KD_16(48), KD_16(64), KD_16(80), KD_16(96), KD_16(112)
      : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until what this warp multiplied before the last ``PENDING`` commits is there.
template <int PENDING>
__device__ __forceinline__ void multiplied() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers.
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
__device__ __forceinline__ float of_partner(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
__device__ __forceinline__ float power_of_2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ unsigned halves(float low, float high) {
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ void floats(unsigned pair, float& low, float& high) {
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}" : "=f"(low), "=f"(high) : "r"(pair));
}
// Four 8 x 8 blocks of a warp: lanes 8 i to 8 i + 7 name the rows of block i, whose entries lie as in a product.
__device__ __forceinline__ void write_blocks(unsigned place, const unsigned (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3])
               : "memory");
}
