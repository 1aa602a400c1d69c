// What the row kernel asks of the machine, in PTX. From sm_90 on bulk copies and clusters; on sm_80
// a "cluster" is one block and copies are cp.async.
//
//   thread_index, block_index, block_count, shared_memory   where a thread is
//   sync_warp, sync_threads, sync_cluster                   barriers
//   shuffle_xor                                             exchange within a warp
//   Barrier, init_barrier, fence_barriers                   mbarriers: arrivals and bytes ...
//   arrive, wait, wait_cluster                              ... waited for by a phase's parity
//   expect_copies, copy_async, finish_copies                copies into shared memory
//   fence_copies                                            orders stores before such copies
//   send_to, expect_sent                                    stores to another block's memory
//   load_shared                                             loads what another thread has written
//   exp2_approx, divide, highest, lowest                    fp32; a NaN gives a NaN
//   bfloat16x2, float16x2, float_from_half                  conversions of storage
//
// A test puts an emulated machine in this file's place (tests/hero_kernels/emulator/).
#ifndef HERO_PTX_H
#define HERO_PTX_H

#include <stdint.h>

#define HERO_DEVICE __device__ __forceinline__
#define HERO_UNROLL _Pragma("unroll")

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HERO_BULK_COPIES 1
#else
#define HERO_BULK_COPIES 0
#endif

namespace hero {

using Barrier = uint64_t;

// Arrivals that complete a phase of a barrier which copies report to.
constexpr int COPY_ARRIVALS = HERO_BULK_COPIES ? 1 : 33;

HERO_DEVICE int thread_index() {
    return static_cast<int>(threadIdx.x);
}
HERO_DEVICE int block_index() {
    return static_cast<int>(blockIdx.x);
}
HERO_DEVICE int block_count() {
    return static_cast<int>(gridDim.x);
}
HERO_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char dynamic_shared_memory[];
    return dynamic_shared_memory;
}
HERO_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same place in the shared memory of block `rank` of the cluster.
HERO_DEVICE uint32_t cluster_address(const void* pointer, int rank) {
#if HERO_BULK_COPIES
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(pointer)), "r"(rank));
    return address;
#else
    return shared_address(pointer);
#endif
}

HERO_DEVICE void sync_warp() {
    __syncwarp();
}

HERO_DEVICE bool all_of_warp(bool yes) {
    return __all_sync(0xffffffffu, yes);
}

// Barrier of the first `count` threads of the block, a multiple of 32.
HERO_DEVICE void sync_threads(int count) {
    asm volatile("barrier.sync 1, %0;" ::"r"(count) : "memory");
}

// Barrier of all threads of the cluster.
HERO_DEVICE void sync_cluster() {
#if HERO_BULK_COPIES
    asm volatile(
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
#else
    __syncthreads();
#endif
}

HERO_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
HERO_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

HERO_DEVICE void init_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

// Makes initialised barriers visible to copies and to the cluster; sync_cluster comes after it.
HERO_DEVICE void fence_barriers() {
#if HERO_BULK_COPIES
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

HERO_DEVICE void arrive(Barrier* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                     shared_address(barrier))
                 : "memory");
}

#define HERO_WAIT(instruction)                                                        \
    for (uint32_t done = 0; !done;)                                                   \
    asm volatile("{ .reg .pred p; " instruction " p, [%1], %2; selp.u32 %0, 1, 0, p; }" \
                 : "=r"(done)                                                         \
                 : "r"(shared_address(barrier)), "r"(parity)                          \
                 : "memory")

// Waits for the end of the phase of this parity; barriers begin in phase 0.
HERO_DEVICE void wait(Barrier* barrier, uint32_t parity) {
#if HERO_BULK_COPIES
    HERO_WAIT("mbarrier.try_wait.parity.shared::cta.b64");
#else
    HERO_WAIT("mbarrier.test_wait.parity.shared.b64");
#endif
}

// `wait` for what other blocks send.
HERO_DEVICE void wait_cluster(Barrier* barrier, uint32_t parity) {
#if HERO_BULK_COPIES
    HERO_WAIT("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64");
#else
    wait(barrier, parity);
#endif
}

// One arrival, after which `bytes` more make the phase.
HERO_DEVICE void arrive_expecting(Barrier* barrier, uint32_t bytes) {
#if HERO_BULK_COPIES
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
#else
    arrive(barrier);
#endif
}

// Stores a word to block `rank`, where it reports its 4 bytes to `barrier`. No fence is needed:
// what a thread sees at the barrier's end of phase it may read.
HERO_DEVICE void send_to(uint32_t* pointer, int rank, uint32_t value, Barrier* barrier) {
#if HERO_BULK_COPIES
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            cluster_address(pointer, rank)),
        "r"(value), "r"(cluster_address(barrier, rank))
        : "memory");
#else
    *pointer = value;
#endif
}

// The one arrival at a barrier that is sent to: `bytes` from the whole cluster make its phase.
HERO_DEVICE void expect_sent(Barrier* barrier, uint32_t bytes) {
    arrive_expecting(barrier, bytes);
}

// A warp copies as a whole, in three steps: expect_copies with the bytes to come, any number of
// copy_async, finish_copies. The barrier's phase then ends when all bytes have landed.
HERO_DEVICE void expect_copies(Barrier* barrier, uint32_t bytes) {
    if (HERO_BULK_COPIES && threadIdx.x % 32 == 0) arrive_expecting(barrier, bytes);
}

// Both addresses and `bytes` are multiples of 16.
HERO_DEVICE void copy_async(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
#if HERO_BULK_COPIES
    if (threadIdx.x % 32 == 0 && bytes)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
            "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
            : "memory");
#else
    for (uint32_t i = threadIdx.x % 32 * 16; i < bytes; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared) + i),
                     "l"(__cvta_generic_to_global(static_cast<const char*>(global) + i))
                     : "memory");
#endif
}

HERO_DEVICE void finish_copies(Barrier* barrier) {
#if !HERO_BULK_COPIES
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
    if (threadIdx.x % 32 == 0) arrive(barrier);
#endif
}

// This thread's loads and stores of shared memory come before copies issued after the next barrier.
HERO_DEVICE void fence_copies() {
#if HERO_BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <class T>
HERO_DEVICE T load_shared(const T* pointer) {
    return *pointer;
}

HERO_DEVICE float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
// For divisors far from the ends of the range.
HERO_DEVICE float divide(float a, float b) {
    return __fdividef(a, b);
}
HERO_DEVICE float highest(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
HERO_DEVICE float lowest(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
HERO_DEVICE float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
HERO_DEVICE uint32_t as_bits(float value) {
    return __float_as_uint(value);
}

// Two numbers in one word, the first in the lower half; rounded to nearest.
HERO_DEVICE uint32_t bfloat16x2(float first, float second) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}
HERO_DEVICE uint32_t float16x2(float first, float second) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}
HERO_DEVICE float float_from_half(uint32_t half) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(static_cast<uint16_t>(half)));
    return result;
}

}  // namespace hero

#endif  // HERO_PTX_H
