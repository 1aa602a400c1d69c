// The machine that emulator.cpp pretends to be: blocks of fibres, what is on its way between them,
// and the scheduler. Included once.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "plan.h"
#include "platform_emulated.h"

namespace {

constexpr size_t STACK_BYTES = 32 << 10;
constexpr char POISON = '\xff';      // bytes of a NaN in every type
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

}  // namespace
