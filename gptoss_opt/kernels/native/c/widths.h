/* Products in vectors of WIDTH floats, once for each target. TOKENS_AT_A_TIME x ROWS sums, and what is multiplied, fit
 * into its registers. */
#pragma once
#include "decode.h"
#include "linear.h"
#include "low_rank.h"

#define WIDTH 4
#define NAMED(name) name##_4
#define TARGET
#if X86 /* 16 registers */
#define TOKENS_AT_A_TIME 2
#define CASES CASES_2
#else
#define TOKENS_AT_A_TIME 4
#define CASES CASES_4
#endif
#include "linear_tiles.h"
#include "packed_tiles.h"
#include "low_rank_tiles.h"
#undef WIDTH
#undef NAMED
#undef TARGET
#undef TOKENS_AT_A_TIME
#undef CASES

#if X86
#define WIDTH 8
#define NAMED(name) name##_8
#define TARGET AVX2_TARGET
#define TOKENS_AT_A_TIME 3
#define CASES CASES_3
#include "linear_tiles.h"
#include "packed_tiles.h"
#include "low_rank_tiles.h"
#undef WIDTH
#undef NAMED
#undef TARGET
#undef TOKENS_AT_A_TIME
#undef CASES

#define WIDTH 16
#define NAMED(name) name##_16
#define TARGET AVX512_TARGET
#define TOKENS_AT_A_TIME 6
#define CASES CASES_6
#include "linear_tiles.h"
#include "packed_tiles.h"
#include "low_rank_tiles.h"
#endif
