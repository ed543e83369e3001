// The x86 intrinsics without GCC 12's false warnings; for .cpp files only, include it last.
#pragma once

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// _mm512_undefined_epi32() and its kin count as uninitialised variables (GCC bug 105593). The
// warning is issued where they are inlined, so it is off for the rest of the file.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#endif
