// One call of the row kernel as a program, for a machine that is emulated: reads a RowsProblem and
// the memory behind it, whose pointers count from the start of the struct, and writes it back.

#include <stdio.h>

#include <vector>

#include "rows.h"

extern "C" int hero_divergence_rows(const RowsProblem*, int instruction_set);

int main() {
    std::vector<char> memory;
    char part[1 << 16];
    while (size_t size = fread(part, 1, sizeof part, stdin))
        memory.insert(memory.end(), part, part + size);
    char* start = memory.data();
    RowsProblem* problem = reinterpret_cast<RowsProblem*>(start);
    char** pointers = reinterpret_cast<char**>(start);
    for (int i = 0; i < POINTERS; ++i)
        if (pointers[i]) pointers[i] += reinterpret_cast<intptr_t>(start);
    const int status = hero_divergence_rows(problem, 0);
    fwrite(start, 1, memory.size(), stdout);
    return status;
}
