// What the row kernel asks of the machine, so that one text runs on GPUs and, thread by thread, on
// a CPU:
//
//   platform_cuda.h      nvcc: sm_90 and newer with clusters and bulk copies, sm_80 without
//   platform_emulated.h  g++: every thread a fibre, under a random schedule (emulator.cpp)
//
// Both define, in namespace hero:
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
// HERO_SYNC(fault, statement) is a synchronisation, HERO_CHOICE(fault, right, wrong) a choice that
// the kernel's correctness rests on: the emulator can plant the fault, and its test must notice.
#pragma once

namespace hero {

enum Fault {
    NO_FAULT = 0,
    NO_START_BARRIER,  // a cluster's blocks do not wait for each other's barriers
    NO_FULL_WAIT,      // a tile is read before its copy has landed
    NO_EMPTY_WAIT,     // a stage is overwritten while it is read
    EARLY_RELEASE,     // a stage is given back before the last sweep
    NO_BLOCK_BARRIER,  // a block's sum is formed before all warps have given theirs
    NO_CLUSTER_WAIT,   // the cluster's sum is formed before all blocks have sent theirs
    ONE_BUFFER,        // two reductions use the same memory
    NUM_FAULTS,
};

}  // namespace hero

#ifdef HERO_EMULATED
#include "platform_emulated.h"
#else
#include "platform_cuda.h"
#endif
