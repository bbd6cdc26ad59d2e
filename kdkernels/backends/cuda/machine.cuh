// What rows.cu asks of the machine: the shared memory of a cluster's blocks, barriers, copies and sends that those count, shuffles, wide
// stores. (Between a divergence's functor and rows.cu, in namespace kd; tests/support/cluster_machine.h does the same on a CPU.)
//
// Macros: KD_WARPS, KD_OUT, as in rows.cu.

typedef unsigned long long barrier;

__device__ __forceinline__ unsigned address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned in_block(unsigned place, int block) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(block));
  return there;
}

__device__ __forceinline__ void set_up(barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(b)), "r"(arrivals));
}

__device__ __forceinline__ void arrive(barrier* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(b)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes.
__device__ __forceinline__ void expect(barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}

// For threads of this block, and its copies.
__device__ __forceinline__ void await(barrier* b, int parity) {
  asm volatile("{\n.reg .pred done;\nWAIT: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::
                   "r"(address(b)), "r"(parity) : "memory");
}

// For what the cluster's blocks send; this one throws the first-level cache away.
__device__ __forceinline__ void await_sent(barrier* b, int parity) {
  asm volatile("{\n.reg .pred done;\nWAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::
                   "r"(address(b)), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy(float* to, const float* from, int bytes, barrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)), "l"(from),
               "r"(bytes), "r"(address(b)) : "memory");
}

__device__ __forceinline__ void send(unsigned to, float4 v, unsigned b) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(bits_of(v.x)), "r"(bits_of(v.y)), "r"(bits_of(v.z)), "r"(bits_of(v.w)), "r"(b) : "memory");
}

// Of the warps that compute.
__device__ __forceinline__ void together() { asm volatile("bar.sync 1, %0;" ::"n"(KD_WARPS * 32) : "memory"); }

__device__ __forceinline__ void cluster_together() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What that lane of the warp brings; all lanes call it.
__device__ __forceinline__ float of_lane(float v, int lane) { return __shfl_sync(~0u, v, lane); }

// What this thread did to shared memory comes before copies to it that are started after this.
__device__ __forceinline__ void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers that this thread has set up are there for the cluster's copies and sends, once the cluster was together.
__device__ __forceinline__ void barriers_are_set_up() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Of the block: what a launch gives it, and one T.
__device__ __forceinline__ float* slices() {
  extern __shared__ __align__(128) float of_launch[];
  return of_launch;
}

template <class T>
__device__ __forceinline__ T& shared_by_block() {
  __shared__ T one;
  return one;
}

// In one access: left to itself the compiler takes a vector of dx apart.
__device__ __forceinline__ void store(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

#if KD_OUT
__device__ __forceinline__ unsigned rounded(float low, float high) {
  unsigned pair;
#if KD_OUT == 1
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}
#endif
