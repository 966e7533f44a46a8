/* The engine's passes and convolutions for CPUs, without any layer's input concatenated in memory.
 *
 * A feature is rows of pixels: element (pixel, channel) of feature j lies at pixel * width_j + channel of its part of
 * the block. A reader's input is gathered, normalised and rectified for a band of image rows at a time, into scratch
 * memory that stays in the core's own cache, and multiplied there. All three convolutions (forward, gradient of the
 * input, gradient of the weight) are one product of a tile of rows and a few vectors of columns, `multiply`, at
 * different strides. Sums over pixels are added in a fixed order for a given number of threads.
 *
 * This file includes itself once for each type of feature: fp64, fp32, bf16. bf16 is multiplied two values at a time
 * where the CPU has an instruction for it (a WORD is then a pair of values), else as fp32.
 */
#ifndef STORE

#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define BYTES 32 /* of a vector */
#if defined(__AVX512VL__) || defined(__aarch64__)
#define TILE 8 /* rows of a product that, with 3 columns of vectors, fit 32 registers */
#else
#define TILE 4
#endif
#define FEWEST 8
#define CACHE (384 * 1024) /* scratch memory of a band of rows, in bytes: part of a core's second-level cache */

/* One reader of a stage. Lists have an entry for each feature that it reads: its first column in the block, its width
 * and the place of its first channel among the statistics. */
typedef struct {
  int64_t images, height, width, in, out, kernel, links;
  const int64_t *first, *widths, *statistic;
} Reader;

typedef struct {
  char *memory;
  size_t size;
} Arena;
static _Thread_local Arena arena;
static pthread_key_t owner; /* frees a thread's arena when the thread ends */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void make_owner(void) { pthread_key_create(&owner, free); }

/* Scratch memory of this thread, kept from call to call; uninitialised. */
static void *scratch(size_t size) {
  if (arena.size < size) {
    free(arena.memory);
    arena.memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    if (!arena.memory) abort();
    arena.size = size;
    pthread_once(&once, make_owner);
    pthread_setspecific(owner, arena.memory);
  }
  return arena.memory;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/* Rows of a band: as many as keep `bytes` a row, and the rows around it, in the cache, but at least FEWEST, because the
 * rows around a band are gathered twice; enough bands for all threads. */
static int64_t band_rows(const Reader *reader, int64_t bytes) {
  int64_t rows = CACHE / bytes - (reader->kernel - 1);
  int64_t threads = omp_get_max_threads(), bands = (threads + reader->images - 1) / reader->images;
  rows = least(most(FEWEST, rows), (reader->height + bands - 1) / bands);
  int64_t count = (reader->height + rows - 1) / rows;
  return (reader->height + count - 1) / count;
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

typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(function) JOIN(function, SUFFIX)

#define SUFFIX fp64
#define STORE double
#define ACC double
#include "native.c"
#undef SUFFIX
#undef STORE
#undef ACC

#define SUFFIX fp32
#define STORE float
#define ACC float
#include "native.c"
#undef SUFFIX
#undef STORE
#undef ACC

#define SUFFIX bf16
#define STORE uint16_t
#define ACC float
#define HALF 1
#include "native.c"

#else /* the body, once for each type */

#ifdef HALF
#define LOAD from_bf16
#define SAVE to_bf16
#else
#define LOAD
#define SAVE
#endif

#if defined(HALF) && defined(__AVX512BF16__)
#define PAIR 2
typedef uint16_t NAME(Value); /* what is multiplied */
typedef uint32_t NAME(Word);  /* one or two values along the reduction */
typedef __m256i NAME(Vector);
#define TO_VALUE to_bf16
#define DOT(sum, word, vector) \
  ((NAME(Sum))_mm256_dpbf16_ps((__m256)(sum), (__m256bh)_mm256_set1_epi32((int)(word)), (__m256bh)(vector)))
#else
#define PAIR 1
typedef ACC NAME(Value);
typedef ACC NAME(Word);
typedef ACC NAME(Vector) __attribute__((vector_size(BYTES)));
#define TO_VALUE
#define DOT(sum, word, vector) ((sum) + (word) * (vector))
#endif
typedef ACC NAME(Sum) __attribute__((vector_size(BYTES)));
typedef ACC NAME(Unaligned) __attribute__((vector_size(BYTES), aligned(sizeof(ACC))));
#define VALUE NAME(Value)
#define WORD NAME(Word)
#define VECTOR NAME(Vector)
#define SUM NAME(Sum)
#define LANES ((int64_t)(BYTES / sizeof(ACC)))
#define MOST 3 /* vectors of columns in one product */

/* What is not multiplied goes block by block of columns: `lanes` values of memory are a vector, zeros after them. With
 * masks a block is up to 16 of them, else LANES, 4, 2 or 1, a constant where these functions are inlined. */
#if PAIR == 2
typedef ACC NAME(Block) __attribute__((vector_size(64)));
#define BLOCK NAME(Block)
#define MASK ((__mmask16)((1u << lanes) - 1))
INLINE BLOCK NAME(read)(const STORE *from, int64_t lanes) {
  return (BLOCK)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(MASK, from)), 16);
}
INLINE void NAME(write)(STORE *to, BLOCK values, int64_t lanes) {
  _mm256_mask_storeu_epi16(to, MASK, (__m256i)_mm512_cvtneps_pbh((__m512)values));
}
INLINE BLOCK NAME(read_sum)(const ACC *from, int64_t lanes) { return (BLOCK)_mm512_maskz_loadu_ps(MASK, from); }
#define BLOCKS(width, f, ...) \
  for (int64_t block_ = 0; block_ < (width); block_ += 16) f(least(16, (width)-block_), block_, __VA_ARGS__);
#else
#define BLOCK SUM
INLINE BLOCK NAME(read)(const STORE *from, int64_t lanes) {
#ifdef HALF
  Halves halves = {0};
  memcpy(&halves, from, lanes * sizeof(STORE));
  return (BLOCK)(__builtin_convertvector(halves, Words) << 16);
#else
  BLOCK values = {0};
  memcpy(&values, from, lanes * sizeof(STORE));
  return values;
#endif
}
INLINE void NAME(write)(STORE *to, BLOCK values, int64_t lanes) {
#ifdef HALF
  Words bits = (Words)values, nan = (Words)(values != values);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
  memcpy(to, &halves, lanes * sizeof(STORE));
#else
  memcpy(to, &values, lanes * sizeof(STORE));
#endif
}
INLINE BLOCK NAME(read_sum)(const ACC *from, int64_t lanes) {
  BLOCK values = {0};
  memcpy(&values, from, lanes * sizeof(ACC));
  return values;
}
#define BLOCKS(width, f, ...)                                           \
  for (int64_t block_ = 0; block_ < (width);) {                         \
    int64_t rest_ = (width)-block_;                                     \
    if (rest_ >= LANES) f(LANES, block_, __VA_ARGS__), block_ += LANES; \
    else if (rest_ >= 4) f(4, block_, __VA_ARGS__), block_ += 4;        \
    else if (rest_ >= 2) f(2, block_, __VA_ARGS__), block_ += 2;        \
    else f(1, block_, __VA_ARGS__), block_ += 1;                        \
  }
#endif

INLINE void NAME(write_value)(VALUE *to, BLOCK values, int64_t lanes) {
#if PAIR == 2
  NAME(write)(to, values, lanes);
#else
  memcpy(to, &values, lanes * sizeof(VALUE));
#endif
}

/* Those of `values` where `by` is above zero (or no number), else zero. */
INLINE BLOCK NAME(where_positive)(BLOCK values, BLOCK by) {
  __typeof__(by <= 0) none = by <= 0;
  return (BLOCK)((__typeof__(none))values & ~none);
}

/* A block of columns of sums for `count` pixels as features. */
INLINE void NAME(save)(int64_t lanes, int64_t c, const ACC *sums, int64_t stride, int64_t count, STORE *to,
                       int64_t width) {
  for (int64_t p = 0; p < count; p++)
    NAME(write)(to + p * width + c, NAME(read_sum)(sums + p * stride + c, lanes), lanes);
}

/* relu(s * x + t) of a block of columns, for `count` pixels at strides of x_stride and stride; to features' values, or
 * with `stored` 0 to those that are multiplied. */
INLINE void NAME(rectify)(int64_t lanes, int64_t c, const int stored, const STORE *x, int64_t x_stride, const ACC *s,
                          const ACC *t, int64_t count, void *to, int64_t stride) {
  const BLOCK slope = NAME(read_sum)(s + c, lanes), offset = NAME(read_sum)(t + c, lanes);
  for (int64_t p = 0; p < count; p++) {
    BLOCK value = slope * NAME(read)(x + p * x_stride + c, lanes) + offset;
    value = NAME(where_positive)(value, value);
    if (stored) NAME(write)((STORE *)to + p * stride + c, value, lanes);
    else NAME(write_value)((VALUE *)to + p * stride + c, value, lanes);
  }
}

/* out[row][column] (+)= sum over segments s and steps l of a[s][row * a_row + l * a_step] * b[.., column]; the rows of b
 * follow one another at b_step vectors. `rows` and `vectors` are constants where this is inlined. */
INLINE void NAME(multiply)(const int rows, const int vectors, const WORD *const *a, int64_t segments, int64_t a_row,
                           int64_t a_step, const VECTOR *b, int64_t b_step, int64_t length, ACC *out, int64_t out_row,
                           int add) {
  SUM sum[TILE][MOST];
#pragma GCC unroll 8
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++)
      sum[row][v] = add ? *(const NAME(Unaligned) *)(out + row * out_row + v * LANES) : (SUM){0};
  for (int64_t s = 0; s < segments; s++) {
    const WORD *word = a[s];
    for (int64_t l = 0; l < length; l++, word += a_step, b += b_step) {
      VECTOR column[MOST];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) column[v] = b[v];
#pragma GCC unroll 8
      for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[row][v] = DOT(sum[row][v], word[row * a_row], column[v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) *(NAME(Unaligned) *)(out + row * out_row + v * LANES) = sum[row][v];
}

static void NAME(product)(int rows, int vectors, const WORD *const *a, int64_t segments, int64_t a_row, int64_t a_step,
                          const VECTOR *b, int64_t b_step, int64_t length, ACC *out, int64_t out_row, int add) {
#define CASE(r, v)                                                                                     \
  case (r)*4 + (v):                                                                                    \
    NAME(multiply)(r, v, a, segments, a_row, a_step, b, b_step, length, out, out_row, add); \
    break;
#define CASES(r) CASE(r, 1) CASE(r, 2) CASE(r, 3)
  switch (rows * 4 + vectors) {
    CASES(1) CASES(2) CASES(3) CASES(4)
#if TILE > 4
    CASES(5) CASES(6) CASES(7) CASES(8)
#endif
  }
#undef CASE
#undef CASES
}

/* scale * (x - mean) * rstd + shift = s * x + t for every column of a reader. */
static void NAME(fold)(const Reader *reader, const ACC *scale, const ACC *shift, const ACC *mean, const ACC *rstd,
                       ACC *s, ACC *t) {
  for (int64_t link = 0, column = 0; link < reader->links; link++)
    for (int64_t c = 0; c < reader->widths[link]; c++, column++) {
      int64_t place = reader->statistic[link] + c;
      s[column] = scale[column] * rstd[place];
      t[column] = shift[column] - s[column] * mean[place];
    }
}

INLINE int64_t NAME(start)(const Reader *reader, int64_t link, int64_t pixel) {
  return reader->first[link] * (reader->images * reader->height * reader->width) + pixel * reader->widths[link];
}

/* relu(s * x + t) of `rows` image rows from `top` (rows outside are zero), padded by `halo` zero pixels at both sides:
 * out (rows, width + 2 * halo, in), the strides `row_stride` and `stride` in values. */
static void NAME(gather)(const Reader *reader, const STORE *block, const ACC *s, const ACC *t, int64_t image,
                         int64_t top, int64_t rows, int64_t halo, VALUE *out, int64_t row_stride, int64_t stride) {
  for (int64_t row = 0; row < rows; row++) {
    VALUE *line = out + row * row_stride;
    int inside = top + row >= 0 && top + row < reader->height;
    int64_t end = (halo + reader->width) * stride;
    memset(line, 0, sizeof(VALUE) * (inside ? halo * stride : row_stride));
    if (!inside) continue;
    memset(line + end, 0, sizeof(VALUE) * (row_stride - end));
    int64_t pixel = (image * reader->height + top + row) * reader->width;
    for (int64_t link = 0, column = 0; link < reader->links; column += reader->widths[link++]) {
      int64_t width = reader->widths[link];
      BLOCKS(width, NAME(rectify), 0, block + NAME(start)(reader, link, pixel), width, s + column, t + column,
             reader->width, line + halo * stride + column, stride)
    }
    if (stride > reader->in)
      for (int64_t p = 0; p < reader->width; p++) line[(halo + p) * stride + reader->in] = 0;
  }
}

/* A block of columns of features for `count` pixels as values that are multiplied. */
INLINE void NAME(load)(int64_t lanes, int64_t c, const STORE *from, int64_t width, int64_t count, VALUE *to,
                       int64_t stride) {
  for (int64_t p = 0; p < count; p++)
    NAME(write_value)(to + p * stride + c, NAME(read)(from + p * width + c, lanes), lanes);
}

/* Weights (out, in, kernel, kernel) as the vectors of a product: chunks of up to MOST vectors of columns; in each, taps
 * and then words of the reduction. Backwards, columns and reduction change places and the taps are turned round. */
static VECTOR *NAME(pack)(const Reader *reader, const ACC *weight, int backwards) {
  int64_t taps = reader->kernel * reader->kernel;
  int64_t columns = backwards ? reader->in : reader->out, reduced = backwards ? reader->out : reader->in;
  int64_t words = (reduced + PAIR - 1) / PAIR, vectors = (columns + LANES - 1) / LANES;
  VECTOR *packed = aligned_alloc(64, padded(vectors * taps * words * BYTES, 64));
  if (!packed) abort();
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t chunk = 0; chunk < (vectors + MOST - 1) / MOST; chunk++)
    for (int64_t tap = 0; tap < taps; tap++) {
      int64_t first = chunk * MOST * LANES, inside = least(MOST, vectors - chunk * MOST) * LANES;
      int64_t from = backwards ? taps - 1 - tap : tap;
      VALUE *to = (VALUE *)(packed + chunk * MOST * taps * words) + tap * words * inside * PAIR;
      for (int64_t word = 0; word < words; word++)
        for (int64_t column = first; column < first + inside; column++)
          for (int64_t r = word * PAIR; r < (word + 1) * PAIR; r++) {
            int64_t o = backwards ? r : column, i = backwards ? column : r;
            *to++ = column < columns && r < reduced ? TO_VALUE(weight[(o * reader->in + i) * taps + from]) : 0;
          }
    }
  return packed;
}

/* A row of `width` pixels of a convolution: out (width, vectors * LANES) from lines of words, those of tap row d at
 * input + d * row_stride. */
static void NAME(convolve_row)(const Reader *reader, const WORD *input, int64_t row_stride, int64_t words,
                               const VECTOR *packed, int64_t vectors, ACC *out) {
  int64_t kernel = reader->kernel, taps = kernel * kernel;
  for (int64_t v = 0; v < vectors; v += MOST)
    for (int64_t p = 0; p < reader->width; p += TILE) {
      int64_t inside = least(MOST, vectors - v), rows = least(TILE, reader->width - p);
      const WORD *lines[kernel * kernel];
      for (int64_t tap = 0; tap < taps; tap++)
        lines[tap] = input + tap / kernel * row_stride + (p + tap % kernel) * words;
      NAME(product)(rows, inside, lines, taps, words, 1, packed + v * taps * words, inside, words,
                    out + (p * vectors + v) * LANES, vectors * LANES, 0);
    }
}

/* made (pixels, out): the convolution of relu(scale * normalised + shift). */
void NAME(make)(const Reader *reader, const STORE *block, const ACC *scale, const ACC *shift, const ACC *mean,
                const ACC *rstd, const ACC *weight, STORE *made) {
  int64_t halo = reader->kernel / 2, words = (reader->in + PAIR - 1) / PAIR, vectors = (reader->out + LANES - 1) / LANES;
  int64_t line = (reader->width + 2 * halo) * words, rows = band_rows(reader, line * sizeof(WORD));
  int64_t bands = (reader->height + rows - 1) / rows;
  VECTOR *packed = NAME(pack)(reader, weight, 0);
  ACC *s = malloc(2 * reader->in * sizeof(ACC)), *t = s + reader->in;
  if (!s) abort();
  NAME(fold)(reader, scale, shift, mean, rstd, s, t);
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < reader->images * bands; task++) {
    int64_t image = task / bands, top = task % bands * rows, count = least(rows, reader->height - top);
    int64_t lines = rows + 2 * halo;
    char *memory = scratch(padded(lines * line * sizeof(WORD), 64) + reader->width * vectors * BYTES);
    WORD *input = (WORD *)memory;
    ACC *sums = (ACC *)(memory + padded(lines * line * sizeof(WORD), 64));
    NAME(gather)(reader, block, s, t, image, top - halo, count + 2 * halo, halo, (VALUE *)input, line * PAIR, words * PAIR);
    for (int64_t row = 0; row < count; row++) {
      NAME(convolve_row)(reader, input + row * line, line, words, packed, vectors, sums);
      STORE *to = made + ((image * reader->height + top + row) * reader->width) * reader->out;
      BLOCKS(reader->out, NAME(save), sums, vectors * LANES, reader->width, to, reader->out)
    }
  }
  free(s);
  free(packed);
}

/* out (pixels, in): relu(scale * normalised + shift). */
void NAME(activate)(const Reader *reader, const STORE *block, const ACC *scale, const ACC *shift, const ACC *mean,
                    const ACC *rstd, STORE *out) {
  ACC *s = malloc(2 * reader->in * sizeof(ACC)), *t = s + reader->in;
  if (!s) abort();
  NAME(fold)(reader, scale, shift, mean, rstd, s, t);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < reader->images * reader->height; row++)
    for (int64_t link = 0, column = 0; link < reader->links; column += reader->widths[link++]) {
      int64_t width = reader->widths[link];
      BLOCKS(width, NAME(rectify), 1, block + NAME(start)(reader, link, row * reader->width), width, s + column,
             t + column, reader->width, out + row * reader->width * reader->in + column, reader->in)
    }
  free(s);
}

/* The constants of a reader's columns and this thread's sums over pixels, in the order of the fields. */
typedef struct {
  ACC *s, *t, *scale, *mean;
  double *d_shift, *d_scaled; /* sums of g and of g * (x - mean) */
} NAME(Columns);
#define COLUMNS NAME(Columns)

/* A row of gradients d with respect to a block of a feature's activations goes to its sum. */
INLINE void NAME(share)(int64_t lanes, int64_t c, const STORE *x, STORE *sum, int64_t width, const ACC *d,
                        int64_t d_stride, int64_t count, int add, int64_t column, const COLUMNS *columns) {
  const int64_t place = column + c;
  const BLOCK s = NAME(read_sum)(columns->s + place, lanes), t = NAME(read_sum)(columns->t + place, lanes);
  const BLOCK scale = NAME(read_sum)(columns->scale + place, lanes), mean = NAME(read_sum)(columns->mean + place, lanes);
  BLOCK d_shift = {0}, d_scaled = {0};
  for (int64_t p = 0; p < count; p++) {
    BLOCK value = NAME(read)(x + p * width + c, lanes);
    BLOCK g = NAME(where_positive)(NAME(read_sum)(d + p * d_stride + c, lanes), s * value + t);
    d_shift += g;
    d_scaled += g * (value - mean);
    BLOCK before = add ? NAME(read)(sum + p * width + c, lanes) : (BLOCK){0};
    NAME(write)(sum + p * width + c, before + scale * g, lanes);
  }
  for (int lane = 0; lane < lanes; lane++) {
    columns->d_shift[place + lane] += d_shift[lane];
    columns->d_scaled[place + lane] += d_scaled[lane];
  }
}

/* A row of gradients d (width, d_stride) with respect to the activations goes to the sums of the features read. */
static void NAME(share_out)(const Reader *reader, const STORE *block, STORE *sums, const uint8_t *begun, int64_t pixel,
                            const ACC *d, int64_t d_stride, const COLUMNS *columns) {
  for (int64_t link = 0, column = 0; link < reader->links; column += reader->widths[link++]) {
    int64_t width = reader->widths[link], start = NAME(start)(reader, link, pixel);
    BLOCKS(width, NAME(share), block + start, sums + start, width, d + column, d_stride, reader->width, begun[link],
           column, columns)
  }
}

/* Constants and zeroed sums of each thread. Threads share what they do not change. */
static COLUMNS *NAME(open)(const Reader *reader, const ACC *scale, const ACC *shift, const ACC *mean, const ACC *rstd,
                           int threads) {
  COLUMNS *columns = calloc(threads, sizeof(COLUMNS));
  ACC *constants = malloc(3 * reader->in * sizeof(ACC));
  double *sums = calloc(threads * 2 * reader->in, sizeof(double));
  if (!columns || !constants || !sums) abort();
  ACC *s = constants, *t = s + reader->in, *means = t + reader->in;
  NAME(fold)(reader, scale, shift, mean, rstd, s, t);
  for (int64_t link = 0, column = 0; link < reader->links; column += reader->widths[link++])
    memcpy(means + column, mean + reader->statistic[link], reader->widths[link] * sizeof(ACC));
  for (int64_t i = 0; i < threads; i++)
    columns[i] = (COLUMNS){s, t, (ACC *)scale, means, sums + 2 * i * reader->in, sums + (2 * i + 1) * reader->in};
  return columns;
}

/* Adds the threads' sums: gradients of scale and shift, and what the correction of each feature needs of them. */
static void NAME(close)(const Reader *reader, COLUMNS *columns, int threads, const ACC *rstd, ACC *d_scale,
                        ACC *d_shift, ACC *totals, int64_t statistics) {
  for (int64_t link = 0, column = 0; link < reader->links; link++)
    for (int64_t c = 0; c < reader->widths[link]; c++, column++) {
      double shift = 0, scaled = 0;
      for (int i = 0; i < threads; i++) {
        shift += columns[i].d_shift[column];
        scaled += columns[i].d_scaled[column];
      }
      int64_t place = reader->statistic[link] + c;
      d_shift[column] = shift;
      d_scale[column] = scaled * rstd[place];
      totals[place] += columns->scale[column] * d_shift[column];
      totals[statistics + place] += columns->scale[column] * d_scale[column];
    }
  free(columns->s);
  free(columns->d_shift);
  free(columns);
}

/* For a reader without a convolution: gradients d (pixels, in) with respect to its activations to the sums. */
void NAME(collect)(const Reader *reader, const STORE *block, const ACC *scale, const ACC *shift, const ACC *mean,
                   const ACC *rstd, const STORE *d, STORE *sums, const uint8_t *begun, ACC *d_scale, ACC *d_shift,
                   ACC *totals, int64_t statistics) {
  int threads = omp_get_max_threads();
  COLUMNS *columns = NAME(open)(reader, scale, shift, mean, rstd, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < reader->images * reader->height; row++) {
    int64_t pixel = row * reader->width, count = reader->width * reader->in;
    ACC *line = scratch(count * sizeof(ACC));
    for (int64_t i = 0; i < count; i++) line[i] = LOAD(d[pixel * reader->in + i]);
    NAME(share_out)(reader, block, sums, begun, pixel, line, reader->in, columns + omp_get_thread_num());
  }
  NAME(close)(reader, columns, threads, rstd, d_scale, d_shift, totals, statistics);
}

/* Neighbouring pixels side by side: to (rows, length, stride) words from values (rows, line), pixel 2i + from. */
static void NAME(interleave)(const VALUE *values, int64_t rows, int64_t line, int64_t stride, int64_t from,
                             int64_t length, WORD *to) {
#if PAIR == 2
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < length; i++, to += stride) {
      const VALUE *restrict left = values + row * line + (2 * i + from) * stride, *restrict right = left + stride;
      WORD *restrict both = to;
      for (int64_t c = 0; c < stride; c++) both[c] = (uint32_t)left[c] | (uint32_t)right[c] << 16;
    }
#endif
}

/* A band's part of the weight's gradient, added to d_weight (taps, in padded to TILE, vectors * LANES). Input and d are
 * padded lines of values; even and odd have room for the input's pairs, columns for d as vectors. */
static void NAME(weigh)(const Reader *reader, const VALUE *input, int64_t line, int64_t stride, const VALUE *d,
                        int64_t d_line, int64_t d_stride, int64_t rows, WORD *even, WORD *odd, WORD *columns,
                        ACC *d_weight) {
  int64_t kernel = reader->kernel, halo = kernel / 2, vectors = (reader->out + LANES - 1) / LANES;
  int64_t length = (reader->width + PAIR - 1) / PAIR, wide = vectors * LANES;
  int64_t pairs = length + halo; /* of a line of the input */
  const WORD *phases[2] = {even, odd};
  if (PAIR == 2) {
    NAME(interleave)(input, rows + 2 * halo, line, stride, 0, pairs, even);
    if (halo) NAME(interleave)(input, rows + 2 * halo, line, stride, 1, pairs - 1, odd);
  } else {
    phases[0] = (const WORD *)input;
  }
  memset(columns, 0, rows * length * wide * sizeof(WORD));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < reader->width; i++) {
      const VALUE *from = d + (row + halo) * d_line + (i + halo) * d_stride;
      VALUE *to = (VALUE *)(columns + (row * length + i / PAIR) * wide) + i % PAIR;
      for (int64_t c = 0; c < reader->out; c++) to[c * PAIR] = from[c];
    }
  const WORD *lines[rows];
  for (int64_t tap = 0; tap < kernel * kernel; tap++) {
    int64_t down = tap / kernel, across = tap % kernel;
    int64_t count = PAIR == 1 ? line / stride : across % 2 ? pairs - 1 : pairs;
    int64_t shift = PAIR == 1 ? across : across / 2;
    for (int64_t c = 0; c < reader->in; c += TILE)
      for (int64_t v = 0; v < vectors; v += MOST) {
        for (int64_t row = 0; row < rows; row++)
          lines[row] = phases[PAIR == 1 ? 0 : across % 2] + ((row + down) * count + shift) * stride + c;
        NAME(product)(least(TILE, reader->in - c), least(MOST, vectors - v), lines, rows, 1, stride,
                      (const VECTOR *)columns + v, vectors, length, d_weight + (tap * reader->in + c) * wide + v * LANES,
                      wide, 1);
      }
  }
}

/* From d_made (pixels, out), the gradient with respect to what `make` wrote: gradients of weight, scale and shift; the
 * gradient of what the reader gathered goes to the sums. */
void NAME(back)(const Reader *reader, const STORE *block, const ACC *scale, const ACC *shift, const ACC *mean,
                const ACC *rstd, const ACC *weight, const STORE *d_made, STORE *sums, const uint8_t *begun,
                ACC *d_scale, ACC *d_shift, ACC *d_weight, ACC *totals, int64_t statistics) {
  int64_t kernel = reader->kernel, halo = kernel / 2, taps = kernel * kernel, width = reader->width;
  int64_t words = (reader->in + PAIR - 1) / PAIR, stride = words * PAIR;
  int64_t d_words = (reader->out + PAIR - 1) / PAIR, d_stride = d_words * PAIR;
  int64_t vectors = (reader->in + LANES - 1) / LANES, wide = (reader->out + LANES - 1) / LANES * LANES;
  int64_t across = padded(width, PAIR) + 2 * halo, line = across * stride, d_line = across * d_stride;
  int64_t length = (width + PAIR - 1) / PAIR;
  int64_t rows = band_rows(reader, line * sizeof(VALUE) * (PAIR == 2 ? 3 : 1)), lines = rows + 2 * halo;
  int64_t bands = (reader->height + rows - 1) / rows;
  size_t sizes[] = {lines * line * sizeof(VALUE), lines * d_line * sizeof(VALUE),
                    PAIR == 2 ? lines * (length + halo) * stride * sizeof(WORD) : 0,
                    PAIR == 2 ? lines * (length + halo) * stride * sizeof(WORD) : 0, rows * length * wide * sizeof(WORD),
                    width * vectors * BYTES};
  size_t offsets[7] = {0};
  for (int i = 0; i < 6; i++) offsets[i + 1] = offsets[i] + padded(sizes[i], 64);
  int threads = omp_get_max_threads();
  int64_t weights = taps * reader->in * wide;
  ACC *partial = calloc(threads * weights, sizeof(ACC));
  if (!partial) abort();
  VECTOR *packed = NAME(pack)(reader, weight, 1);
  COLUMNS *columns = NAME(open)(reader, scale, shift, mean, rstd, threads);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num();
    char *memory = scratch(offsets[6]);
    VALUE *input = (VALUE *)memory, *d = (VALUE *)(memory + offsets[1]);
    WORD *even = (WORD *)(memory + offsets[2]), *odd = (WORD *)(memory + offsets[3]);
    WORD *vector = (WORD *)(memory + offsets[4]);
    ACC *result = (ACC *)(memory + offsets[5]);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < reader->images * bands; task++) {
      int64_t image = task / bands, top = task % bands * rows, count = least(rows, reader->height - top);
      NAME(gather)(reader, block, columns->s, columns->t, image, top - halo, count + 2 * halo, halo, input, line, stride);
      for (int64_t row = 0; row < count + 2 * halo; row++) {
        int64_t y = top + row - halo;
        VALUE *to = d + row * d_line;
        memset(to, 0, d_line * sizeof(VALUE));
        if (y < 0 || y >= reader->height) continue;
        const STORE *from = d_made + (image * reader->height + y) * width * reader->out;
        BLOCKS(reader->out, NAME(load), from, reader->out, width, to + halo * d_stride, d_stride)
      }
      NAME(weigh)(reader, input, line, stride, d, d_line, d_stride, count, even, odd, vector, partial + me * weights);
      for (int64_t row = 0; row < count; row++) {
        NAME(convolve_row)(reader, (const WORD *)(d + row * d_line), across * d_words, d_words, packed, vectors, result);
        NAME(share_out)(reader, block, sums, begun, (image * reader->height + top + row) * width, result,
                        vectors * LANES, columns + me);
      }
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < reader->out; o++)
    for (int64_t i = 0; i < reader->in; i++)
      for (int64_t tap = 0; tap < taps; tap++) {
        ACC sum = 0;
        for (int thread = 0; thread < threads; thread++)
          sum += partial[thread * weights + (tap * reader->in + i) * wide + o];
        d_weight[(o * reader->in + i) * taps + tap] = sum;
      }
  NAME(close)(reader, columns, threads, rstd, d_scale, d_shift, totals, statistics);
  free(packed);
  free(partial);
}

/* Mean and variance (biased) of x (pixels, width), in two passes. */
void NAME(measure)(const STORE *x, int64_t pixels, int64_t width, double *mean, double *var) {
  int threads = omp_get_max_threads();
  double *partial = malloc(threads * width * sizeof(double)); /* there may be fewer threads than asked for */
  if (!partial) abort();
  for (int pass = 0; pass < 2; pass++) {
    memset(partial, 0, threads * width * sizeof(double));
#pragma omp parallel num_threads(threads)
    {
      int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      int64_t from = pixels * me / team, to = pixels * (me + 1) / team;
      double *sum = partial + me * width;
      ACC *part = scratch(2 * width * sizeof(ACC)), *centre = part + width;
      for (int64_t c = 0; c < width; c++) sum[c] = 0, centre[c] = pass ? mean[c] : 0;
      for (int64_t first = from; first < to; first += 64) {
        memset(part, 0, width * sizeof(ACC));
        for (int64_t p = first; p < least(first + 64, to); p++)
          if (pass) {
            for (int64_t c = 0; c < width; c++) {
              ACC centred = LOAD(x[p * width + c]) - centre[c];
              part[c] += centred * centred;
            }
          } else {
            for (int64_t c = 0; c < width; c++) part[c] += LOAD(x[p * width + c]);
          }
        for (int64_t c = 0; c < width; c++) sum[c] += part[c];
      }
    }
    double *result = pass ? var : mean;
    for (int64_t c = 0; c < width; c++) {
      result[c] = 0;
      for (int thread = 0; thread < threads; thread++) result[c] += partial[thread * width + c];
      result[c] /= pixels;
    }
  }
  free(partial);
}

/* d (pixels, width) = rstd * (h - total_h / pixels - z * total_hz / pixels), z = (x - mean) * rstd. */
void NAME(correct)(const STORE *h, const STORE *x, int64_t pixels, int64_t width, const ACC *mean, const ACC *rstd,
                   const ACC *total_h, const ACC *total_hz, STORE *d) {
#pragma omp parallel
  {
    ACC *slope = scratch(2 * width * sizeof(ACC)), *offset = slope + width;
    for (int64_t c = 0; c < width; c++) {
      slope[c] = -rstd[c] * rstd[c] * total_hz[c] / pixels;
      offset[c] = -rstd[c] * total_h[c] / pixels - slope[c] * mean[c];
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pixels; p++) {
      const STORE *restrict sum = h + p * width, *restrict value = x + p * width;
      STORE *restrict to = d + p * width;
      for (int64_t c = 0; c < width; c++) to[c] = SAVE(rstd[c] * LOAD(sum[c]) + slope[c] * LOAD(value[c]) + offset[c]);
    }
  }
}

#undef LOAD
#undef SAVE
#undef PAIR
#undef TO_VALUE
#undef DOT
#undef VALUE
#undef WORD
#undef VECTOR
#undef SUM
#undef LANES
#undef MOST
#undef COLUMNS
#undef BLOCK
#undef BLOCKS
#undef MASK
#endif
