// A guard for one thread's work on rows of probabilities.
#pragma once

#ifdef HERO_X86
#include <xmmintrin.h>
#endif

namespace {

// Results below 1e-38 become 0 while it lives: tails of peaked distributions are full of them, they
// count for nothing, and most processors are slow at them.
class FlushSubnormals {
 public:
#ifdef HERO_X86
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
    ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
    const unsigned saved_;
#else
    FlushSubnormals() {}  // elsewhere they cost nothing
    ~FlushSubnormals() {}
#endif
};

}  // namespace
