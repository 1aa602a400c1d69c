// Runs the CUDA row kernel on a CPU, every thread a fibre, under a schedule drawn from a seed:
//
//     g++ -std=c++17 -O2 -fPIC -shared -DHERO_EMULATED csrc/cuda/emulator.cpp -o emulator.so
//
// For tests alone (tests/hero_kernels/test_cuda_emulator.py); what it can and cannot see is in
// platform_emulated.h.

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "row_kernel.h"

namespace {

constexpr size_t STACK_BYTES = 32 << 10;
constexpr char POISON = '\xff';  // bytes of a NaN in every type
constexpr size_t GUARD_BYTES = 256;  // around shared memory; nothing may be written there

struct Fibre;

// Threads that wait for the same event.
struct Queue {
    std::vector<Fibre*> fibres;
};

// A barrier of `count` threads.
struct Meeting {
    int arrived = 0;
    Queue waiting;
};

struct Block;

struct Warp {
    Meeting meeting;
    uint32_t values[2][32];  // of two shuffles in turn: some lanes may be one ahead
    uint32_t shuffles[32] = {};
};

struct Fibre {
    Block* block;
    int index;
    std::unique_ptr<char[]> stack;
    jmp_buf where;
    bool started = false, finished = false;
};

struct Cluster;

struct Block {
    Cluster* cluster;
    int index;
    std::vector<char> memory;
    char* shared;
    std::vector<Warp> warps;
    Meeting threads;
    std::vector<Fibre> fibres;
};

struct Cluster {
    std::vector<Block> blocks;
    Meeting meeting;
};

struct Copy {
    char* to;
    const char* from;
    uint32_t bytes;
    hero::Barrier* barrier;
};

// A word on its way to another block.
struct Message {
    uint32_t* to;
    uint32_t value;
    hero::Barrier* barrier;
};

using Body = void (*)(const RowsProblem&, const hero::Plan&);

struct Machine {
    std::mt19937 random;
    int fault = hero::NO_FAULT;
    int block_count = 0;
    bool misaligned = false;
    const RowsProblem* problem;
    const hero::Plan* plan;
    Body body;
    std::vector<Fibre*> runnable;
    std::vector<Copy> copies;
    std::vector<Message> messages;
    std::vector<std::pair<hero::Barrier*, Queue>> barrier_queues;
    Fibre* current = nullptr;
    Warp* slow = nullptr;  // held back: some mistakes show only where others are far ahead
    jmp_buf scheduler;
    ucontext_t scheduler_context;

    uint32_t draw(size_t below) {
        return static_cast<uint32_t>(random() % below);
    }
};

Machine* machine;  // of the run in progress; there is one at a time

void wake(Queue& queue) {
    for (Fibre* fibre : queue.fibres) machine->runnable.push_back(fibre);
    queue.fibres.clear();
}

// Back to the scheduler. `_setjmp` leaves signal masks alone: swapcontext would be a system call.
void leave() {
    if (!_setjmp(machine->current->where)) _longjmp(machine->scheduler, 1);
}

void block_on(Queue& queue) {
    queue.fibres.push_back(machine->current);
    leave();
}

void meet(Meeting& meeting, int count) {
    if (++meeting.arrived == count) {
        meeting.arrived = 0;
        wake(meeting.waiting);
        hero::preempt();
    } else {
        block_on(meeting.waiting);
    }
}

Queue& queue_of(hero::Barrier* barrier) {
    for (auto& [key, queue] : machine->barrier_queues)
        if (key == barrier) return queue;
    machine->barrier_queues.emplace_back(barrier, Queue());
    return machine->barrier_queues.back().second;
}

void end_phase_if_complete(hero::Barrier* barrier) {
    if (barrier->pending != 0 || barrier->bytes != 0) return;
    barrier->pending = barrier->expected;
    ++barrier->phase;
    wake(queue_of(barrier));
}

// One pending copy lands, or a part of it.
void land() {
    const size_t index = machine->draw(machine->copies.size());
    Copy& copy = machine->copies[index];
    const uint32_t pieces = copy.bytes / 16;
    const uint32_t bytes = 16 * (1 + machine->draw(pieces));
    memcpy(copy.to, copy.from, bytes);
    hero::Barrier* barrier = copy.barrier;
    copy.to += bytes, copy.from += bytes, copy.bytes -= bytes;
    barrier->bytes -= static_cast<int32_t>(bytes);
    if (copy.bytes == 0) {
        copy = machine->copies.back();
        machine->copies.pop_back();
    }
    end_phase_if_complete(barrier);
}

// One message arrives.
void receive() {
    const size_t index = machine->draw(machine->messages.size());
    const Message message = machine->messages[index];
    machine->messages[index] = machine->messages.back();
    machine->messages.pop_back();
    *message.to = message.value;
    message.barrier->bytes -= 4;
    end_phase_if_complete(message.barrier);
}

void enter() {
    Fibre* fibre = machine->current;
    machine->body(*machine->problem, *machine->plan);
    fibre->finished = true;
    _longjmp(machine->scheduler, 1);
}

void resume(Fibre* fibre) {
    machine->current = fibre;
    if (_setjmp(machine->scheduler)) return;
    if (fibre->started) _longjmp(fibre->where, 1);
    fibre->started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibre->stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    swapcontext(&machine->scheduler_context, &context);
}

bool is_guard_intact(const Block& block, const hero::Plan& plan) {
    const auto is_poison = [](char byte) { return byte == POISON; };
    const char* shared = block.shared;
    const char* begin = block.memory.data();
    return std::all_of(begin, shared, is_poison) &&
           std::all_of(shared + plan.shared_bytes, begin + block.memory.size(), is_poison);
}

// Runs all fibres to their end; false for a deadlock.
bool run(size_t unfinished) {
    while (unfinished) {
        auto& runnable = machine->runnable;
        const bool may_land = !machine->copies.empty();
        if (may_land && (runnable.empty() || machine->draw(16) == 0)) {
            land();
            continue;
        }
        if (!machine->messages.empty() && (runnable.empty() || machine->draw(16) == 0)) {
            receive();
            continue;
        }
        if (runnable.empty()) return false;
        const size_t index = machine->draw(runnable.size());
        Fibre* fibre = runnable[index];
        Warp* warp = &fibre->block->warps[static_cast<size_t>(fibre->index) / 32];
        if (machine->draw(4096) == 0) machine->slow = warp;
        if (warp == machine->slow && machine->draw(64)) continue;
        runnable[index] = runnable.back();
        runnable.pop_back();
        resume(fibre);
        if (fibre->finished) --unfinished;
    }
    return machine->copies.empty() && machine->messages.empty();
}

Body body_of(const RowsProblem& problem) {
    const bool delta = problem.delta;
    switch (problem.divergence) {
        case HERO_FORWARD_KL:
            return delta ? hero::divergence_rows<HERO_FORWARD_KL, true>
                         : hero::divergence_rows<HERO_FORWARD_KL, false>;
        case HERO_REVERSE_KL:
            return delta ? hero::divergence_rows<HERO_REVERSE_KL, true>
                         : hero::divergence_rows<HERO_REVERSE_KL, false>;
        default:
            return delta ? hero::divergence_rows<HERO_JSD, true>
                         : hero::divergence_rows<HERO_JSD, false>;
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

int planted_fault() {
    return machine->fault;
}
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
    *barrier = {arrivals, arrivals, 0, 0};
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

int hero_emulated_abi_version() {
    return HERO_ABI_VERSION;
}

// The layout for a GPU with these limits.
void hero_emulated_plan(const RowsProblem* problem, const hero::Limits* limits, hero::Plan* plan) {
    *plan = hero::choose_plan(*problem, *limits);
}

// Runs the kernel with `clusters` clusters of `cluster_size` blocks of `warps` warps. `stages`: tiles
// held at once, 0 for the whole slice. Returns 0, 1 (deadlock), 2 (a slice of too many tiles), 3 (a
// misaligned address) or 4 (a store outside of the shared memory).
int hero_emulated_divergence_rows(const RowsProblem* problem, int clusters, int cluster_size,
                                  int warps, int stages, int fault, uint32_t seed) {
    const hero::Plan plan = hero::lay_out(*problem, cluster_size, warps, stages);
    if (plan.stages > hero::MAX_STAGES) return 2;
    Machine now;
    machine = &now;
    now.random.seed(seed);
    now.fault = fault;
    now.block_count = clusters * cluster_size;
    now.problem = problem;
    now.plan = &plan;
    now.body = body_of(*problem);
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
