// Which rows and columns a block works on, and the warp that copies them into shared memory.
#pragma once

#include "row_sums.h"

namespace hero {

// Where a thread is in the ring of stages, and the parity of the stage's current lap.
struct Position {
    int stage = 0;
    uint32_t parity = 0;

    HERO_DEVICE void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Which rows and columns a block works on. A cluster takes every `clusters`-th row.
struct Work {
    int rank;  // of the block within its cluster
    int first_row, row_step;
    int slice_begin, slice_end;  // columns
    int sweeps;                  // over each row

    HERO_DEVICE Work(const RowsProblem& problem, const Plan& plan)
        : rank(block_index() % plan.cluster_size),
          first_row(block_index() / plan.cluster_size),
          row_step(block_count() / plan.cluster_size) {
        const int columns = static_cast<int>(problem.columns);
        const int64_t begin = static_cast<int64_t>(rank) * plan.slice_columns;
        slice_begin = begin < columns ? static_cast<int>(begin) : columns;
        slice_end =
            columns - slice_begin < plan.slice_columns ? columns : slice_begin + plan.slice_columns;
        sweeps = problem.divergence == JSD && problem.grad ? 3 : 2;
    }
};

HERO_DEVICE const char* row_of(const void* tensor, int32_t dtype, int64_t stride, int row) {
    return static_cast<const char*>(tensor) + row * stride * (dtype == FLOAT32 ? 4 : 2);
}
HERO_DEVICE const char* teacher_row(const RowsProblem& problem, int row) {
    return row_of(problem.teacher, problem.teacher_dtype, problem.teacher_stride, row);
}
HERO_DEVICE const char* student_row(const RowsProblem& problem, int row) {
    return row_of(problem.student, problem.student_dtype, problem.student_stride, row);
}

// How many bytes a row lies behind a border of 16; its tiles lie as far behind one in their stages.
HERO_DEVICE int lead_of(const char* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) & 15);
}

// Part of a row that is copied: pieces of 16 bytes, and up to 15 bytes before and after them where
// a piece would reach out of the row.
struct Span {
    const char *begin, *end;  // columns of the tile
    const char *pieces_begin, *pieces_end;

    HERO_DEVICE Span(const char* row, int64_t row_bytes, int64_t from, int64_t to)
        : begin(row + from), end(row + to) {
        const int64_t lead = lead_of(begin), tail = lead_of(end);
        pieces_begin = begin - (begin - lead >= row ? lead : lead - 16);
        pieces_end = to + (16 - tail) % 16 <= row_bytes ? end + (16 - tail) % 16 : end - tail;
        if (to <= from || pieces_end <= pieces_begin) pieces_begin = pieces_end = begin;
    }
    HERO_DEVICE uint32_t bytes() const {
        return static_cast<uint32_t>(pieces_end - pieces_begin);
    }
    HERO_DEVICE bool has_rest() const {
        return begin < pieces_begin || pieces_end < end;
    }
    // What lies outside of the pieces, by ordinary stores of the warp: fewer than 16 elements each.
    template <class T>
    HERO_DEVICE void copy_rest(char* tile) const {
        const int lane = thread_index() % 32;
        const char* before = begin + lane * sizeof(T);
        const char* after = pieces_end + lane * sizeof(T);
        if (before < pieces_begin)
            *reinterpret_cast<T*>(tile + (before - begin)) = *reinterpret_cast<const T*>(before);
        if (after < end)
            *reinterpret_cast<T*>(tile + (after - begin)) = *reinterpret_cast<const T*>(after);
    }
    HERO_DEVICE void copy_rest(char* tile, int size) const {
        if (size == 4)
            copy_rest<uint32_t>(tile);
        else
            copy_rest<uint16_t>(tile);
    }
};

// The warp that copies: brings the tiles of a slice into the stages, as the stages become free.
HERO_DEVICE void copy_rows(const RowsProblem& problem, const Plan& plan, const Work& work,
                           Exchange& exchange) {
    char* const memory = shared_memory();
    const int tile = plan.warps * GROUP;
    const int teacher_size = problem.teacher_dtype == FLOAT32 ? 4 : 2;
    const int student_size = problem.student_dtype == FLOAT32 ? 4 : 2;
    const int vocab_size = static_cast<int>(problem.vocab_size);
    const int loads = plan.resident ? 1 : work.sweeps;
    Position at;
    for (int row = work.first_row; row < problem.rows; row += work.row_step) {
        const char* teacher = teacher_row(problem, row);
        const char* student = student_row(problem, row);
        for (int step = 0; step < loads * plan.tiles; ++step) {
            // Padding is not read: it may hold anything.
            const int64_t first = work.slice_begin + static_cast<int64_t>(step % plan.tiles) * tile;
            const int64_t limit = work.slice_end < vocab_size ? work.slice_end : vocab_size;
            const int64_t from = first < limit ? first : limit;
            const int64_t to = from + tile < limit ? from + tile : limit;
            const Span of_teacher(teacher, problem.columns * teacher_size, from * teacher_size,
                                  to * teacher_size);
            const Span of_student(student, problem.columns * student_size, from * student_size,
                                  to * student_size);
            Barrier* full = &exchange.full[at.stage];
            char* teacher_stage = memory + EXCHANGE_BYTES + at.stage * plan.teacher_stage;
            char* student_stage = memory + plan.student_offset + at.stage * plan.student_stage;
            char* teacher_tile = teacher_stage + lead_of(of_teacher.begin);
            char* student_tile = student_stage + lead_of(of_student.begin);
            wait(&exchange.empty[at.stage], at.parity ^ 1);
            if (of_teacher.has_rest() || of_student.has_rest()) {
                of_teacher.copy_rest(teacher_tile, teacher_size);
                of_student.copy_rest(student_tile, student_size);
                fence_copies();
            }
            sync_warp();
            expect_copies(full, of_teacher.bytes() + of_student.bytes());
            copy_async(teacher_tile + (of_teacher.pieces_begin - of_teacher.begin),
                       of_teacher.pieces_begin, of_teacher.bytes(), full);
            copy_async(student_tile + (of_student.pieces_begin - of_student.begin),
                       of_student.pieces_begin, of_student.bytes(), full);
            finish_copies(full);
            at.advance(plan.stages);
        }
    }
}

}  // namespace hero
