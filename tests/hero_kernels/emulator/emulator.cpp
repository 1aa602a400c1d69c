// Runs the CUDA row kernel on a CPU, every thread a fibre, under a schedule drawn from a seed:
//
//     g++ -std=c++17 -O2 -fPIC -shared -I csrc/cuda -I csrc/cpu emulator.cpp -o emulator.so
//
// For test_cuda_emulator.py; what it can and cannot see is in platform_emulated.h.

#include "emulator_machine.h"
#include "row_kernel.h"

namespace {

template <bool delta>
Body body_of(const RowsProblem& problem, bool leaves) {
    switch (problem.divergence) {
        case hero::FORWARD_KL:
            return hero::divergence_rows<hero::FORWARD_KL, delta, false>;
        case hero::REVERSE_KL:
            return hero::divergence_rows<hero::REVERSE_KL, delta, false>;
        default:
            return leaves ? hero::divergence_rows<hero::JSD, delta, true>
                          : hero::divergence_rows<hero::JSD, delta, false>;
    }
}

void start(Cluster& cluster, int first_block, const hero::Plan& plan) {
    cluster.blocks.resize(static_cast<size_t>(plan.cluster_size));
    for (int rank = 0; rank < plan.cluster_size; ++rank) {
        Block& block = cluster.blocks[static_cast<size_t>(rank)];
        block.cluster = &cluster;
        block.index = first_block + rank;
        block.memory.assign(static_cast<size_t>(plan.shared_bytes) + 2 * GUARD_BYTES, POISON);
        char* memory = block.memory.data() + GUARD_BYTES;
        block.shared = memory - reinterpret_cast<uintptr_t>(memory) % 128;
        block.warps.resize(static_cast<size_t>(plan.warps) + 1);
        block.fibres.resize(32 * block.warps.size());
        for (size_t i = 0; i < block.fibres.size(); ++i) {
            Fibre& fibre = block.fibres[i];
            fibre.block = &block;
            fibre.index = static_cast<int>(i);
            fibre.stack.reset(new char[STACK_BYTES]);
            machine->runnable.push_back(&fibre);
        }
    }
}

}  // namespace

namespace hero {

int thread_index() {
    return machine->current->index;
}
int block_index() {
    return machine->current->block->index;
}
int block_count() {
    return machine->block_count;
}
char* shared_memory() {
    return machine->current->block->shared;
}

void require(bool aligned) {
    if (!aligned) machine->misaligned = true;
}

void preempt() {
    if (machine->draw(32)) return;
    machine->runnable.push_back(machine->current);
    leave();
}

void sync_warp() {
    meet(machine->current->block->warps[static_cast<size_t>(thread_index()) / 32].meeting, 32);
}
void sync_threads(int count) {
    meet(machine->current->block->threads, count);
}
void sync_cluster() {
    Cluster& cluster = *machine->current->block->cluster;
    meet(cluster.meeting,
         static_cast<int>(cluster.blocks.size() * cluster.blocks[0].fibres.size()));
}

uint32_t shuffle_xor(uint32_t value, int mask) {
    const int lane = thread_index() % 32;
    Warp& warp = machine->current->block->warps[static_cast<size_t>(thread_index()) / 32];
    uint32_t* values = warp.values[warp.shuffles[lane]++ % 2];
    values[lane] = value;
    sync_warp();
    return values[lane ^ mask];
}

void init_barrier(Barrier* barrier, int arrivals) {
    *barrier = {static_cast<int8_t>(arrivals), static_cast<int8_t>(arrivals), 0, 0};
    preempt();
}

void arrive(Barrier* barrier) {
    preempt();
    --barrier->pending;
    end_phase_if_complete(barrier);
}

void wait(Barrier* barrier, uint32_t parity) {
    preempt();
    while ((barrier->phase & 1) == parity) block_on(queue_of(barrier));
}

void send_to(uint32_t* pointer, int rank, uint32_t value, Barrier* barrier) {
    Block& block = *machine->current->block;
    char* there = block.cluster->blocks[static_cast<size_t>(rank)].shared;
    const auto elsewhere = [&](void* here) {
        return there + (static_cast<char*>(here) - block.shared);
    };
    machine->messages.push_back({reinterpret_cast<uint32_t*>(elsewhere(pointer)), value,
                                 reinterpret_cast<Barrier*>(elsewhere(barrier))});
    preempt();
}

void expect_sent(Barrier* barrier, uint32_t bytes) {
    barrier->bytes += static_cast<int32_t>(bytes);
    arrive(barrier);
}

void expect_copies(Barrier* barrier, uint32_t bytes) {
    if (thread_index() % 32) return;
    barrier->bytes += static_cast<int32_t>(bytes);
    arrive(barrier);
}

void copy_async(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
    if (thread_index() % 32 || bytes == 0) return;
    const auto at = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
    require((at | from | bytes) % 16 == 0);
    memset(shared, POISON, bytes);
    machine->copies.push_back(
        {static_cast<char*>(shared), static_cast<const char*>(global), bytes, barrier});
    preempt();
}

}  // namespace hero

extern "C" {

// The layout for a GPU with these limits.
void hero_emulated_plan(const RowsProblem* problem, const hero::Limits* limits, hero::Plan* plan) {
    *plan = hero::choose_plan(*problem, *limits);
}

// Runs the kernel with `clusters` clusters of `cluster_size` blocks of `warps` warps. `stages`:
// tiles held at once, 0 for the whole slice. Returns 0, 1 (deadlock), 2 (a slice of too many
// tiles), 3 (a misaligned address) or 4 (a store outside of the shared memory).
int hero_emulated_divergence_rows(const RowsProblem* problem, int clusters, int cluster_size,
                                  int warps, int stages, uint32_t seed) {
    const hero::Plan plan = hero::lay_out(*problem, cluster_size, warps, stages);
    if (plan.stages > hero::MAX_STAGES) return 2;
    Machine now;
    machine = &now;
    now.random.seed(seed);
    now.block_count = clusters * cluster_size;
    now.problem = problem;
    now.plan = &plan;
    const bool leaves = hero::leaves(*problem, plan);
    now.body = problem->delta ? body_of<true>(*problem, leaves) : body_of<false>(*problem, leaves);
    std::vector<Cluster> all(static_cast<size_t>(clusters));
    size_t threads = 0;
    for (int i = 0; i < clusters; ++i) {
        start(all[static_cast<size_t>(i)], i * cluster_size, plan);
        threads += static_cast<size_t>(32 * (warps + 1) * cluster_size);
    }
    const bool ended = run(threads);
    machine = nullptr;
    for (const Cluster& cluster : all)
        for (const Block& block : cluster.blocks)
            if (!is_guard_intact(block, plan)) return 4;
    if (now.misaligned) return 3;
    return ended ? 0 : 1;
}
}
