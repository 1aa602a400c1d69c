// What csrc/cuda/ptx.h offers, on a CPU and in its place: each thread of each block is a fibre, and
// a scheduler (emulator.cpp) runs them in random order, switching at every call below.
//
// What is not promised is made to fail: memory that a copy is to fill holds NaN until it lands, at
// a random later time and in random pieces; what is sent to another block arrives late and in any
// order. A schedule in which no thread can go on ends the run as a deadlock. Not modelled: the
// memory order of plain stores, and fences.
#pragma once

#define HERO_PTX_H  // the real one stays out

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "storage.h"

#define HERO_DEVICE inline
#define HERO_UNROLL

namespace hero {

using ::as_bits;
using ::as_float;

struct Barrier {
    int8_t expected, pending;  // arrivals
    uint16_t phase;
    int32_t bytes;  // announced by expect_copies and not yet landed
};
static_assert(sizeof(Barrier) == 8, "as large as the real one");

constexpr int COPY_ARRIVALS = 1;

int thread_index();
int block_index();
int block_count();
char* shared_memory();
void preempt();              // a random other thread may run first
void require(bool aligned);  // of an address, as a GPU would

void sync_warp();
void sync_threads(int count);
void sync_cluster();
uint32_t shuffle_xor(uint32_t value, int mask);
inline float shuffle_xor(float value, int mask) {
    return as_float(shuffle_xor(as_bits(value), mask));
}
inline bool all_of_warp(bool yes) {
    uint32_t all = yes;
    for (int mask = 16; mask; mask /= 2) all &= shuffle_xor(all, mask);
    return all;
}

void init_barrier(Barrier* barrier, int arrivals);
inline void fence_barriers() {}
void arrive(Barrier* barrier);
void wait(Barrier* barrier, uint32_t parity);
inline void wait_cluster(Barrier* barrier, uint32_t parity) {
    wait(barrier, parity);
}
void send_to(uint32_t* pointer, int rank, uint32_t value, Barrier* barrier);
void expect_sent(Barrier* barrier, uint32_t bytes);
void expect_copies(Barrier* barrier, uint32_t bytes);
void copy_async(void* shared, const void* global, uint32_t bytes, Barrier* barrier);
inline void finish_copies(Barrier*) {}
inline void fence_copies() {}

template <class T>
T load_shared(const T* pointer) {
    require(reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0);
    preempt();
    return *pointer;
}

inline float exp2_approx(float x) {
    return exp2f(x);
}
inline float divide(float a, float b) {
    return a / b;
}
inline float highest(float a, float b) {
    return a != a || a > b ? a : b;
}
inline float lowest(float a, float b) {
    return a != a || a < b ? a : b;
}
inline uint32_t bfloat16x2(float first, float second) {
    return bfloat16_from_float(first) | static_cast<uint32_t>(bfloat16_from_float(second)) << 16;
}
inline uint32_t float16x2(float first, float second) {
    return float16_from_float(first) | static_cast<uint32_t>(float16_from_float(second)) << 16;
}
inline float float_from_half(uint32_t half) {
    return float_from_float16(static_cast<uint16_t>(half));
}

}  // namespace hero
