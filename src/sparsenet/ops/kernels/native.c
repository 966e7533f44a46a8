/* The engine's passes and convolutions for CPUs, without any layer's input concatenated in memory.
 *
 * A feature is rows of pixels: element (pixel, channel) of feature j lies at pixel * width_j +
 * channel of its part of the block. A reader's input is gathered, normalised and rectified for a
 * band of image rows at a time, into scratch memory that stays in the core's own cache, and
 * multiplied there. Sums over pixels are added in a fixed order for a given number of threads.
 *
 * passes.h is included once for each type of feature: fp64, fp32, bf16. What multiplies is
 * one of two files with the same functions: vectors.h (broadcast and multiply-add) or, for bf16,
 * tiles.h (a matrix unit). Defined from outside:
 *
 *   BYTES     of a vector: 32, or 64 where that is faster
 *   PAIRS     bf16 is multiplied two values at a time by the vectors' own instruction, else as fp32
 *   MATRIX    bf16 is multiplied by tiles: 1 in Intel's AMX, 2 in plain C that means the same
 *   POISON    scratch memory is filled with values that are no numbers, for tests
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define INLINE static inline __attribute__((always_inline))
#if !defined(BYTES) || !defined(__AVX512F__)
#undef BYTES
#define BYTES 32
#endif
#ifndef __AVX512BF16__
#undef PAIRS
#endif
#if !defined(MATRIX) && (defined(__AMX_BF16__) || \
                         defined(__AMXBF16__)) /* GCC says it one way, older Clang another. */
#define MATRIX 1
#elif !defined(MATRIX)
#define MATRIX 0
#endif
#if defined(__AVX512VL__) && defined(__AVX512BW__)
#define MASKS 1 /* There are loads and stores of part of a vector. */
#else
#define MASKS 0
#endif
#if defined(__AVX512VL__) || defined(__aarch64__)
/* With PRODUCT_VECTORS vectors of columns they fit 32 registers. */
#define PRODUCT_ROWS 8
#else
#define PRODUCT_ROWS 4
#endif
#define PRODUCT_VECTORS 3 /* One product has at most as many vectors of columns. */
#define LEAST_BAND_ROWS 8
/* A band's scratch memory in bytes: part of a core's second-level cache. */
#define CACHE (384 * 1024)

/* What one pass of a reader, or one pass over a feature, is given. What a pass does not use is
 * null. Parameters and statistics are at the precision of sums. The order is that of native.py. */
typedef struct {
  int64_t images, height, width; /* Those of the stage. */
  int64_t in_channels, out_channels; /* The reader gathers the first and makes the second. */
  int64_t kernel;
  int64_t sources;       /* So many features are gathered. */
  int64_t all_channels;  /* The channels of all features of the stage. */
  int64_t first_channel; /* The first one of the feature that is made or corrected. */
  int64_t training;      /* Whether statistics depend on the feature. */
  double eps;            /* It is added to variances. */
  /* For each source: its first column in the block, its channels, the first one among all channels,
   * and whether its gradient sum has been begun, so that this reader adds to it. */
  const int64_t *columns, *widths, *channels;
  const uint8_t *adds;
  const void *features; /* The block of all features. */
  const void *scale, *shift, *mean, *rstd, *weight;
  void *output;         /* (pixels, channels) */
  double *moments;      /* Mean and biased variance of features that are made, (2, all_channels). */
  const void *d_output; /* The gradient of an output, an activation or a feature. */
  const void *x; /* A feature; where it is given, d_output is its sum, yet to be corrected. */
  void *gradient_sums, *d_scale, *d_shift, *d_weight, *gradient_totals;
} Arguments;

/* Each thread keeps scratch memory from call to call. It is uninitialised, and null where there is
 * none to be had. */
typedef struct {
  char *memory;
  size_t size;
} Arena;
static _Thread_local Arena arena;
static pthread_key_t owner; /* It frees a thread's arena when the thread ends. */
static pthread_once_t owner_once = PTHREAD_ONCE_INIT;
static void make_owner(void) { pthread_key_create(&owner, free); }

static char *scratch(size_t size) {
  if (arena.size < size) {
    free(arena.memory);
    arena.size = 0;
    arena.memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    pthread_once(&owner_once, make_owner);
    pthread_setspecific(owner, arena.memory);
    if (!arena.memory) return NULL;
    arena.size = size;
  }
#ifdef POISON
  memset(arena.memory, 0xff, arena.size);
#endif
  return arena.memory;
}

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
} /* The quotient is rounded up. */
INLINE int64_t round_up(int64_t count, int64_t multiple) {
  return divide_up(count, multiple) * multiple;
}

/* Takes `size` bytes of scratch memory that begins at *next; with *next null only counts them. */
INLINE void *take(char **next, size_t *total, size_t size) {
  char *taken = *next ? *next + *total : NULL;
  *total += round_up(size, 64);
  return taken;
}

/* The threads are those that PyTorch computes with. GCC and Clang lower their pragmas to calls of
 * different libraries, so the one entry that both have is called by its name. */
extern void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void), omp_get_num_threads(void), omp_get_max_threads(void);

typedef void Body(const void *context, int64_t from, int64_t to, int thread);
typedef struct {
  Body *body;
  const void *context;
  int64_t count, size;
} Team;

static void run_thread(void *data) {
  Team *team = data;
  int64_t me = omp_get_thread_num(),
          size = omp_get_num_threads(); /* There may be fewer than asked for. */
  if (me == 0) team->size = size;
  team->body(team->context, team->count * me / size, team->count * (me + 1) / size, me);
}

/* Calls body(context, from, to, thread) for parts of `count` tasks on all threads. The result is
 * how many threads there were. */
static int64_t share_work(Body *body, const void *context, int64_t count) {
  Team team = {body, context, count, 0};
  GOMP_parallel(run_thread, &team, omp_get_max_threads(), 0);
  return team.size;
}

/* Gives the rows of a band: as many as keep `bytes` a row, and `around` rows more, in the cache,
 * but at least LEAST_BAND_ROWS, because the rows around a band are read twice; fewer only where
 * there would not be a band for each thread. */
static int64_t band_rows(const Arguments *args, int64_t bytes, int64_t around) {
  int64_t rows = CACHE / bytes - around;
  int64_t bands = divide_up(omp_get_max_threads(), args->images);
  rows = min(max(LEAST_BAND_ROWS, rows), divide_up(args->height, bands));
  return divide_up(args->height, divide_up(args->height, rows));
}

INLINE float from_bf16(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7fc0 : rounded;
}

#if MATRIX
#include "matrix.h"
#else
int matrix_unit(void) { return 1; } /* None is needed. */
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(function) JOIN(function, SUFFIX)

#define SUFFIX fp64
#define STORE double
#define ACC double
#include "passes.h"
#undef SUFFIX
#undef STORE
#undef ACC

#define SUFFIX fp32
#define STORE float
#define ACC float
#include "passes.h"
#undef SUFFIX
#undef STORE
#undef ACC

#define SUFFIX bf16
#define STORE uint16_t
#define ACC float
#define HALF 1
#include "passes.h"
