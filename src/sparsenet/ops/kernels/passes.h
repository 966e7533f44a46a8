/* This file has the passes for one type of feature: STORE in memory, ACC in sums, SUFFIX in the
 * names of functions. */
#define SLACK(halo) (64 + 2 * (halo)) /* As many pixels after the last line may be read. */
/* The operands of products are VALUEs, and a WORD holds PAIR of them that follow one another in the
 * reduction. */
#if defined(HALF) && (MATRIX || defined(PAIRS))
#define PAIR 2
typedef uint16_t NAME(Value);
typedef uint32_t NAME(Word);
#define TO_VALUE to_bf16
#else
#define PAIR 1
typedef ACC NAME(Value);
typedef ACC NAME(Word);
#define TO_VALUE
#endif
#define VALUE NAME(Value)
#define WORD NAME(Word)

/* All other work goes block by block of columns: `lanes` values of memory become a vector with
 * zeros after them. With masks a block has up to WIDTH lanes, else WIDTH, 4, 2 or 1, a constant
 * where these functions are inlined. */
#if MASKS && (defined(HALF) || BYTES == 64)
#define BLOCK_BYTES 64
#define MASKED 1
#define BLOCKS(width, f, ...)                                 \
  for (int64_t block_ = 0; block_ < (width); block_ += WIDTH) \
    f(min(WIDTH, (width) - block_), block_, __VA_ARGS__);
#else
#define BLOCK_BYTES BYTES
#define MASKED 0
#define BLOCKS(width, f, ...)                                           \
  for (int64_t block_ = 0; block_ < (width);) {                         \
    int64_t rest_ = (width) - block_;                                   \
    if (rest_ >= WIDTH) f(WIDTH, block_, __VA_ARGS__), block_ += WIDTH; \
    else if (rest_ >= 4) f(4, block_, __VA_ARGS__), block_ += 4;        \
    else if (rest_ >= 2) f(2, block_, __VA_ARGS__), block_ += 2;        \
    else f(1, block_, __VA_ARGS__), block_ += 1;                        \
  }
#endif
#define WIDTH ((int64_t)(BLOCK_BYTES / sizeof(ACC)))
typedef ACC NAME(Block) __attribute__((vector_size(BLOCK_BYTES)));
#define BLOCK NAME(Block)
#ifdef HALF
typedef uint16_t NAME(Halves) __attribute__((vector_size(BLOCK_BYTES / 2)));
typedef uint32_t NAME(Bits) __attribute__((vector_size(BLOCK_BYTES)));

/* Gives the values as bf16, in the lower halves. */
INLINE NAME(Bits) NAME(rounded)(BLOCK values) {
#if MASKED && defined(__AVX512BF16__)
  return (NAME(Bits))_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
  NAME(Bits) bits = (NAME(Bits))values, nan = (NAME(Bits))(values != values);
  return (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & ~nan) | (nan & 0x7fc0);
#endif
}
#endif

INLINE BLOCK NAME(read_sum)(const ACC *from, int64_t lanes) {
#if MASKED
  if (sizeof(ACC) == 8) return (BLOCK)_mm512_maskz_loadu_pd((1u << lanes) - 1, from);
  return (BLOCK)_mm512_maskz_loadu_ps((1u << lanes) - 1, from);
#else
  BLOCK values = {0};
  memcpy(&values, from, lanes * sizeof(ACC));
  return values;
#endif
}

INLINE BLOCK NAME(read)(const STORE *from, int64_t lanes) {
#if MASKED && defined(HALF)
  __mmask16 mask = (1u << lanes) - 1;
  return (BLOCK)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
#elif defined(HALF)
  NAME(Halves) halves = {0};
  memcpy(&halves, from, lanes * sizeof(STORE));
  return (BLOCK)(__builtin_convertvector(halves, NAME(Bits)) << 16);
#else
  return NAME(read_sum)(from, lanes);
#endif
}

INLINE void NAME(write_sum)(ACC *to, BLOCK values, int64_t lanes) {
#if MASKED
  if (sizeof(ACC) == 8) _mm512_mask_storeu_pd(to, (1u << lanes) - 1, (__m512d)values);
  else _mm512_mask_storeu_ps(to, (1u << lanes) - 1, (__m512)values);
#else
  memcpy(to, &values, lanes * sizeof(ACC));
#endif
}

INLINE void NAME(write)(STORE *to, BLOCK values, int64_t lanes) {
#if MASKED && defined(HALF) && defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(to, (1u << lanes) - 1, (__m256i)_mm512_cvtneps_pbh((__m512)values));
#elif MASKED && defined(HALF)
  _mm256_mask_storeu_epi16(to, (1u << lanes) - 1,
                           _mm512_cvtepi32_epi16((__m512i)NAME(rounded)(values)));
#elif defined(HALF)
  NAME(Halves) halves = __builtin_convertvector(NAME(rounded)(values), NAME(Halves));
  memcpy(to, &halves, lanes * sizeof(STORE));
#else
  NAME(write_sum)(to, values, lanes);
#endif
}

INLINE void NAME(write_value)(VALUE *to, BLOCK values, int64_t lanes) {
#if PAIR == 2
  NAME(write)(to, values, lanes);
#else
  NAME(write_sum)(to, values, lanes);
#endif
}

INLINE BLOCK NAME(read_value)(const VALUE *from, int64_t lanes) {
#if PAIR == 2
  return NAME(read)(from, lanes);
#else
  return NAME(read_sum)(from, lanes);
#endif
}

/* Writes words of which each holds one value of `even` and one of `odd`. */
INLINE void NAME(write_words)(WORD *to, BLOCK even, BLOCK odd, int64_t lanes) {
#if PAIR == 2 && MASKED
  _mm512_mask_storeu_epi32(to, (1u << lanes) - 1,
                           (__m512i)(NAME(rounded)(even) | NAME(rounded)(odd) << 16));
#elif PAIR == 2
  NAME(Bits) words = NAME(rounded)(even) | NAME(rounded)(odd) << 16;
  memcpy(to, &words, lanes * sizeof(WORD));
#else
  NAME(write_sum)(to, even, lanes);
#endif
}

/* Keeps the values where `by` is above zero (or no number) and gives zero elsewhere. */
INLINE BLOCK NAME(where_positive)(BLOCK values, BLOCK by) {
  __typeof__(by <= 0) none = by <= 0;
  return (BLOCK)((__typeof__(none))values & ~none);
}

/* Finds s and t with scale * (x - mean) * rstd + shift = s * x + t for every column of a reader. */
static void NAME(fold_affine)(const Arguments *args, ACC *s, ACC *t) {
  const ACC *scale = args->scale, *shift = args->shift, *mean = args->mean, *rstd = args->rstd;
  for (int64_t source = 0, column = 0; source < args->sources; source++)
    for (int64_t c = 0; c < args->widths[source]; c++, column++) {
      int64_t place = args->channels[source] + c;
      s[column] = scale[column] * rstd[place];
      t[column] = shift[column] - s[column] * mean[place];
    }
}

INLINE int64_t NAME(position)(const Arguments *args, int64_t source, int64_t pixel) {
  return args->columns[source] * (args->images * args->height * args->width) +
         pixel * args->widths[source];
}

INLINE BLOCK NAME(rectified)(BLOCK slope, BLOCK offset, const STORE *x, int64_t lanes) {
  BLOCK value = slope * NAME(read)(x, lanes) + offset;
  return NAME(where_positive)(value, value);
}

/* Writes relu(s * x + t) of a block of columns, for `count` pixels at strides of x_stride and
 * stride: as features with `stored` 1, as operands of products with 0. */
INLINE void NAME(rectify)(int64_t lanes, int64_t c, const int stored, const STORE *x,
                          int64_t x_stride, const ACC *s, const ACC *t, int64_t count, void *to,
                          int64_t stride) {
  const BLOCK slope = NAME(read_sum)(s + c, lanes), offset = NAME(read_sum)(t + c, lanes);
  for (int64_t p = 0; p < count; p++) {
    BLOCK value = NAME(rectified)(slope, offset, x + p * x_stride + c, lanes);
    if (stored) NAME(write)((STORE *)to + p * stride + c, value, lanes);
    else NAME(write_value)((VALUE *)to + p * stride + c, value, lanes);
  }
}

/* Does the same for words along the pixels, at strides of x_stride values and `stride` words. */
INLINE void NAME(rectify_words)(int64_t lanes, int64_t c, const STORE *x, int64_t x_stride,
                                const ACC *s, const ACC *t, int64_t count, WORD *to,
                                int64_t stride) {
  const BLOCK slope = NAME(read_sum)(s + c, lanes), offset = NAME(read_sum)(t + c, lanes);
  to += c;
  for (int64_t p = 0; p < count; p += PAIR, to += stride) {
    const STORE *from = x + p * x_stride + c;
    BLOCK even = NAME(rectified)(slope, offset, from, lanes), odd = {0};
    if (PAIR == 2 && p + 1 < count) odd = NAME(rectified)(slope, offset, from + x_stride, lanes);
    NAME(write_words)(to, even, odd, lanes);
  }
}

/* A convolution reads lines of pixels: `halo` zero pixels, then for each line its pixels and `halo`
 * zero ones, so that neighbours share them. A pixel has `stride` values, zeros where there is no
 * channel. */
typedef struct {
  int64_t halo, across, stride;
} NAME(Lines);
#define LINES NAME(Lines)

INLINE LINES NAME(lines)(const Arguments *args, int64_t channels, int64_t deep) {
  int64_t halo = args->kernel / 2;
  return (LINES){halo, args->width + halo, round_up(channels, deep)};
}

INLINE size_t NAME(lines_size)(const LINES *lines, int64_t count) {
  return ((count * lines->across + lines->halo + SLACK(lines->halo)) * lines->stride) *
         sizeof(VALUE);
}

/* Writes the zeros of a line. The result is null where the line lies outside the image and is all
 * zeros. */
INLINE VALUE *NAME(begin_line)(const Arguments *args, const LINES *lines, VALUE *values,
                               int64_t line, int64_t y) {
  if (!line) memset(values, 0, lines->halo * lines->stride * sizeof(VALUE));
  VALUE *to = values + (lines->halo + line * lines->across) * lines->stride;
  int inside = y >= 0 && y < args->height;
  int64_t end = inside ? args->width * lines->stride : 0;
  memset(to + end, 0, (lines->across * lines->stride - end) * sizeof(VALUE));
  return inside ? to : NULL;
}

/* Writes a block of zeros for each of `count` pixels. */
INLINE void NAME(clear)(int64_t lanes, int64_t c, VALUE *to, int64_t stride, int64_t count) {
  const BLOCK zeros = {0};
  for (int64_t p = 0; p < count; p++) NAME(write_value)(to + p * stride + c, zeros, lanes);
}

/* Writes zeros after the channels of a line's pixels. */
static void NAME(fill_up)(const Arguments *args, const LINES *lines, VALUE *to, int64_t channels) {
  BLOCKS(lines->stride - channels, NAME(clear), to + channels, lines->stride, args->width)
}

/* Writes relu(s * x + t) of `count` lines from image row `top`. */
static void NAME(gather)(const Arguments *args, const LINES *lines, const ACC *s, const ACC *t,
                         int64_t image, int64_t top, int64_t count, VALUE *values) {
  const STORE *block = args->features;
  for (int64_t line = 0; line < count; line++) {
    VALUE *to = NAME(begin_line)(args, lines, values, line, top + line);
    if (!to) continue;
    int64_t pixel = (image * args->height + top + line) * args->width;
    for (int64_t source = 0, column = 0; source < args->sources; column += args->widths[source++]) {
      int64_t width = args->widths[source];
      BLOCKS(width, NAME(rectify), 0, block + NAME(position)(args, source, pixel), width,
             s + column, t + column, args->width, to + column, lines->stride)
    }
    NAME(fill_up)(args, lines, to, args->in_channels);
  }
}

/* Writes relu(s * x + t) of `count` image rows from `top` as words along the pixels: (count, line /
 * PAIR, stride). */
static void NAME(gather_words)(const Arguments *args, const ACC *s, const ACC *t, int64_t image,
                               int64_t top, int64_t count, WORD *to, int64_t line, int64_t stride) {
  const STORE *block = args->features;
  for (int64_t row = 0; row < count; row++, to += line / PAIR * stride) {
    int64_t pixel = (image * args->height + top + row) * args->width,
            end = divide_up(args->width, PAIR);
    memset(to + end * stride, 0, (line / PAIR - end) * stride * sizeof(WORD));
    for (int64_t source = 0, column = 0; source < args->sources; column += args->widths[source++]) {
      int64_t width = args->widths[source];
      BLOCKS(width, NAME(rectify_words), block + NAME(position)(args, source, pixel), width,
             s + column, t + column, args->width, to + column, stride)
    }
  }
}

/* Weights are packed as a product reads them: for the forward convolution, or backwards, where the
 * channels that are output and those that are gathered change places and the taps are turned round.
 */
typedef struct {
  const Arguments *args;
  int backwards;
  void *packed;
} NAME(Packing);
#define PACKING NAME(Packing)
INLINE int64_t NAME(columns_of)(const PACKING *p) {
  return p->backwards ? p->args->in_channels : p->args->out_channels;
}
INLINE int64_t NAME(reduced_of)(const PACKING *p) {
  return p->backwards ? p->args->out_channels : p->args->in_channels;
}

/* Gives a weight of one tap, `reduced` by `columns`, or zero outside. */
INLINE VALUE NAME(weight_at)(const PACKING *p, int64_t tap, int64_t reduced, int64_t column) {
  if (column >= NAME(columns_of)(p) || reduced >= NAME(reduced_of)(p)) return 0;
  const ACC *weight = p->args->weight;
  int64_t taps = p->args->kernel * p->args->kernel;
  if (p->backwards)
    return TO_VALUE(weight[(reduced * p->args->in_channels + column) * taps + taps - 1 - tap]);
  return TO_VALUE(weight[(column * p->args->in_channels + reduced) * taps + tap]);
}

#if PAIR == 2 && MATRIX
#include "tiles.h"
#else
#include "vectors.h"
#endif

/* These are sums over pixels of each channel, of one thread or of all: their number, their mean,
 * and the squares of the distances from it. */
typedef struct {
  double count, *mean, *squares;
} __attribute__((aligned(64))) NAME(Moments); /* Threads do not share a cache line. */
#define MOMENTS NAME(Moments)

/* How much `count` more values weigh in the mean, and the square of the distance between both means
 * in the squares. */
typedef struct {
  double mean, squares;
} NAME(Shares);

INLINE NAME(Shares) NAME(shares_of)(const MOMENTS *of, double count) {
  double share = count / (of->count + count);
  return (NAME(Shares)){share, of->count * share};
}

INLINE void NAME(add_moments)(MOMENTS *to, int64_t c, NAME(Shares) shares, double mean,
                              double squares) {
  double distance = mean - to->mean[c];
  to->mean[c] += distance * shares.mean;
  to->squares[c] += squares + distance * distance * shares.squares;
}

/* Adds a block of columns of x, `count` pixels. The first pixel is the pivot from which distances
 * are taken. */
INLINE void NAME(measure_block)(int64_t lanes, int64_t c, const STORE *x, int64_t width,
                                int64_t count, MOMENTS *to, NAME(Shares) shares) {
  const BLOCK pivot = NAME(read)(x + c, lanes);
  BLOCK sum = {0}, squares = {0};
  for (int64_t p = 0; p < count; p++) {
    BLOCK distance = NAME(read)(x + p * width + c, lanes) - pivot;
    sum += distance;
    squares += distance * distance;
  }
  ACC each[3][BLOCK_BYTES / sizeof(ACC)];
  memcpy(each[0], &pivot, sizeof(pivot));
  memcpy(each[1], &sum, sizeof(sum));
  memcpy(each[2], &squares, sizeof(squares));
  for (int64_t lane = 0; lane < lanes; lane++) {
    double mean = (double)each[1][lane] / count;
    NAME(add_moments)(to, c + lane, shares, each[0][lane] + mean,
                      each[2][lane] - mean * each[1][lane]);
  }
}

static void NAME(measure_row)(const STORE *x, int64_t width, int64_t count, MOMENTS *to) {
  const NAME(Shares) shares = NAME(shares_of)(to, count);
  BLOCKS(width, NAME(measure_block), x, width, count, to, shares)
  to->count += count;
}

/* Joins all threads' values to mean and biased variance, and finds the mean and deviation that
 * readers use. */
static void NAME(finish_statistics)(const Arguments *args, const MOMENTS *parts, int64_t threads) {
  MOMENTS all = {0, args->moments + args->first_channel,
                 args->moments + args->all_channels + args->first_channel};
  ACC *mean = (ACC *)args->mean + args->first_channel,
      *rstd = (ACC *)args->rstd + args->first_channel;
  memset(all.mean, 0, args->out_channels * sizeof(double));
  memset(all.squares, 0, args->out_channels * sizeof(double));
  for (int64_t i = 0; i < threads; i++) {
    if (!parts[i].count) continue;
    const NAME(Shares) shares = NAME(shares_of)(&all, parts[i].count);
    for (int64_t c = 0; c < args->out_channels; c++)
      NAME(add_moments)(&all, c, shares, parts[i].mean[c], parts[i].squares[c]);
    all.count += parts[i].count;
  }
  for (int64_t c = 0; c < args->out_channels; c++) {
    double variance = all.squares[c] < 0
                          ? 0
                          : all.squares[c] / all.count; /* Rounding may leave less than nothing. */
    all.squares[c] = variance;
    mean[c] = all.mean[c];
    rstd[c] = 1 / sqrt(variance + args->eps);
  }
}

/* Takes memory for the moments of all threads, at zero. */
static MOMENTS *NAME(take_moments)(char **next, size_t *total, int64_t threads, int64_t width) {
  MOMENTS *parts = take(next, total, threads * sizeof(MOMENTS));
  double *memory = take(next, total, 2 * threads * width * sizeof(double));
  if (!*next) return NULL;
  memset(memory, 0, 2 * threads * width * sizeof(double));
  for (int64_t i = 0; i < threads; i++)
    parts[i] = (MOMENTS){0, memory + 2 * i * width, memory + (2 * i + 1) * width};
  return parts;
}

/* Writes a block of columns of sums as features, for `count` pixels. */
INLINE void NAME(store_block)(int64_t lanes, int64_t c, const ACC *sums, int64_t stride,
                              int64_t count, STORE *to, int64_t width) {
  for (int64_t p = 0; p < count; p++)
    NAME(write)(to + p * width + c, NAME(read_sum)(sums + p * stride + c, lanes), lanes);
}

/* `convolve`, `write_activation` and `measure` work with these. */
typedef struct {
  const Arguments *args;
  ACC *s, *t;
  VALUE *packed;
  MOMENTS *moments;
  int64_t rows;
  LINES lines;
  char *memory; /* That of the first thread. */
  size_t each;
} NAME(ForwardWork);

static void NAME(convolve_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(ForwardWork) *work = context;
  const Arguments *args = work->args;
  const LINES *lines = &work->lines;
  int64_t bands = divide_up(args->height, work->rows),
          wide = round_up(args->out_channels, COLUMN_MULTIPLE), at_once = ROWS_AT_ONCE(args->width);
  char *memory = work->memory + thread * work->each;
  VALUE *input = (VALUE *)memory;
  ACC *sums = (ACC *)(memory + round_up(NAME(lines_size)(lines, work->rows + 2 * lines->halo), 64));
  NAME(begin_products)(args);
  for (int64_t task = from; task < to; task++) {
    int64_t image = task / bands, top = task % bands * work->rows,
            count = min(work->rows, args->height - top);
    NAME(gather)(args, lines, work->s, work->t, image, top - lines->halo, count + 2 * lines->halo,
                 input);
    for (int64_t row = 0; row < count; row += at_once) {
      int64_t now = min(at_once, count - row);
      NAME(convolve_rows)(args, lines, input + row * lines->across * lines->stride, now,
                          work->packed, args->out_channels, sums);
      STORE *output = (STORE *)args->output +
                    (image * args->height + top + row) * args->width * args->out_channels;
      BLOCKS(args->out_channels, NAME(store_block), sums, wide, now * args->width, output,
             args->out_channels)
      if (args->moments)
        for (int64_t i = 0; i < now; i++)
          NAME(measure_row)(output + i * args->width * args->out_channels, args->out_channels,
                            args->width, &work->moments[thread]);
    }
  }
  NAME(end_products)();
}

/* Writes output (pixels, out_channels), the convolution of relu(scale * normalised + shift), and
 * with `moments` its mean and variance. */
int NAME(convolve)(const Arguments *args) {
  NAME(ForwardWork) work = {.args = args};
  work.lines = NAME(lines)(args, args->in_channels, DEPTH_MULTIPLE);
  int64_t threads = omp_get_max_threads(), halo = work.lines.halo;
  PACKING packing = {args, 0, NULL};
  work.rows = band_rows(args, work.lines.across * work.lines.stride * sizeof(VALUE), 2 * halo);
  work.each = round_up(NAME(lines_size)(&work.lines, work.rows + 2 * halo), 64) +
              round_up(ROWS_AT_ONCE(args->width) * args->width *
                           round_up(args->out_channels, COLUMN_MULTIPLE) * sizeof(ACC),
                       64);
  char *memory = NULL;
  for (size_t total = 0;; total = 0) { /* The first round counts, the second one takes. */
    work.s = take(&memory, &total, args->in_channels * sizeof(ACC));
    work.t = take(&memory, &total, args->in_channels * sizeof(ACC));
    work.packed = packing.packed = take(&memory, &total, NAME(packed_size)(&packing));
    work.moments =
        NAME(take_moments)(&memory, &total, threads, args->moments ? args->out_channels : 0);
    work.memory = take(&memory, &total, threads * work.each);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  NAME(fold_affine)(args, work.s, work.t);
  share_work(NAME(pack), &packing, NAME(pack_tasks)(&packing));
  share_work(NAME(convolve_part), &work, args->images * divide_up(args->height, work.rows));
  if (args->moments) NAME(finish_statistics)(args, work.moments, threads);
  return 0;
}

static void NAME(write_activation_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(ForwardWork) *work = context;
  const Arguments *args = work->args;
  const STORE *block = args->features;
  for (int64_t row = from; row < to; row++)
    for (int64_t source = 0, column = 0; source < args->sources; column += args->widths[source++]) {
      int64_t width = args->widths[source];
      BLOCKS(width, NAME(rectify), 1, block + NAME(position)(args, source, row * args->width),
             width, work->s + column, work->t + column, args->width,
             (STORE *)args->output + row * args->width * args->in_channels + column,
             args->in_channels)
    }
}

/* Writes output (pixels, in_channels): relu(scale * normalised + shift). */
int NAME(write_activation)(const Arguments *args) {
  ACC *s = (ACC *)scratch(2 * args->in_channels * sizeof(ACC));
  if (!s) return 1;
  NAME(ForwardWork) work = {.args = args, .s = s, .t = s + args->in_channels};
  NAME(fold_affine)(args, work.s, work.t);
  share_work(NAME(write_activation_part), &work, args->images * args->height);
  return 0;
}

INLINE void NAME(add_block)(double *to, BLOCK values, int64_t lanes) {
  ACC each[BLOCK_BYTES /
           sizeof(ACC)]; /* An index into a vector would keep it in memory all along. */
  memcpy(each, &values, sizeof(values));
  for (int64_t lane = 0; lane < lanes; lane++) to[lane] += each[lane];
}

/* These are the constants of a reader's columns and a thread's sums over pixels. */
typedef struct {
  ACC *s, *t;
  const ACC *scale;
  ACC *mean;
  double *d_shift, *d_scaled; /* The sums of g and of g * (x - mean). */
} NAME(ReaderSums);
#define READER_SUMS NAME(ReaderSums)

/* Adds a row of gradients d with respect to a block of a feature's activations to the feature's
 * gradient sum. */
INLINE void NAME(add_gradient_block)(int64_t lanes, int64_t c, const STORE *x, STORE *sum,
                                     int64_t width, const ACC *d, int64_t d_stride, int64_t count,
                                     const int add, int64_t column, const READER_SUMS *columns) {
  const int64_t place = column + c;
  const BLOCK s = NAME(read_sum)(columns->s + place, lanes),
              t = NAME(read_sum)(columns->t + place, lanes);
  const BLOCK scale = NAME(read_sum)(columns->scale + place, lanes),
              mean = NAME(read_sum)(columns->mean + place, lanes);
  BLOCK d_shift = {0}, d_scaled = {0};
  for (int64_t p = 0; p < count; p++) {
    BLOCK value = NAME(read)(x + p * width + c, lanes);
    BLOCK g = NAME(where_positive)(NAME(read_sum)(d + p * d_stride + c, lanes), s * value + t);
    d_shift += g;
    d_scaled += g * (value - mean);
    BLOCK before = add ? NAME(read)(sum + p * width + c, lanes) : (BLOCK){0};
    NAME(write)(sum + p * width + c, before + scale * g, lanes);
  }
  NAME(add_block)(columns->d_shift + place, d_shift, lanes);
  NAME(add_block)(columns->d_scaled + place, d_scaled, lanes);
}

/* Adds gradients d (count, d_stride) with respect to the activations of pixels to the gradient sums
 * of the features that are read. */
static void NAME(add_gradients)(const Arguments *args, int64_t pixel, int64_t count, const ACC *d,
                                int64_t d_stride, const READER_SUMS *columns) {
  for (int64_t source = 0, column = 0; source < args->sources; column += args->widths[source++]) {
    int64_t width = args->widths[source], start = NAME(position)(args, source, pixel);
    const STORE *x = (const STORE *)args->features + start;
    STORE *sum = (STORE *)args->gradient_sums + start;
    if (args->adds[source]) {
      BLOCKS(width, NAME(add_gradient_block), x, sum, width, d + column, d_stride, count, 1, column,
             columns)
    } else {
      BLOCKS(width, NAME(add_gradient_block), x, sum, width, d + column, d_stride, count, 0, column,
             columns)
    }
  }
}

/* Takes memory for the constants, and for zeroed sums of each thread. Threads share what they do
 * not change. */
static READER_SUMS *NAME(take_reader_sums)(char **next, size_t *total, const Arguments *args,
                                           int64_t threads) {
  READER_SUMS *columns = take(next, total, threads * sizeof(READER_SUMS));
  ACC *s = take(next, total, 3 * args->in_channels * sizeof(ACC));
  double *sums = take(next, total, threads * 2 * args->in_channels * sizeof(double));
  if (!*next) return NULL;
  ACC *t = s + args->in_channels, *means = t + args->in_channels;
  const ACC *mean = args->mean;
  NAME(fold_affine)(args, s, t);
  for (int64_t source = 0, column = 0; source < args->sources; column += args->widths[source++])
    memcpy(means + column, mean + args->channels[source], args->widths[source] * sizeof(ACC));
  memset(sums, 0, threads * 2 * args->in_channels * sizeof(double));
  for (int64_t i = 0; i < threads; i++)
    columns[i] = (READER_SUMS){s,
                               t,
                               args->scale,
                               means,
                               sums + 2 * i * args->in_channels,
                               sums + (2 * i + 1) * args->in_channels};
  return columns;
}

/* Adds up the threads' sums: gradients of scale and shift, and the totals that the correction of
 * each feature needs. */
static void NAME(finish_gradients)(const Arguments *args, const READER_SUMS *columns,
                                   int64_t threads) {
  const ACC *rstd = args->rstd;
  ACC *d_scale = args->d_scale, *d_shift = args->d_shift, *totals = args->gradient_totals;
  for (int64_t source = 0, column = 0; source < args->sources; source++)
    for (int64_t c = 0; c < args->widths[source]; c++, column++) {
      double shift = 0, scaled = 0;
      for (int64_t i = 0; i < threads; i++) {
        shift += columns[i].d_shift[column];
        scaled += columns[i].d_scaled[column];
      }
      int64_t place = args->channels[source] + c;
      d_shift[column] = shift;
      d_scale[column] = scaled * rstd[place];
      totals[place] += columns->scale[column] * d_shift[column];
      totals[args->all_channels + place] += columns->scale[column] * d_scale[column];
    }
}

/* The backward passes work with these. */
typedef struct {
  const Arguments *args;
  READER_SUMS *columns;
  VALUE *packed;
  ACC *weights; /* Each thread's gradient of the weight. */
  ACC *slopes;
  int64_t rows, threads,
      threads_used; /* `threads` is how many there may be, `threads_used` how many there were. */
  LINES lines;      /* Those of d_output. */
  char *memory;
  size_t each, offsets[5];
} NAME(BackwardWork);

/* Writes a block of features as sums. */
INLINE void NAME(widen)(int64_t lanes, int64_t c, const STORE *from, ACC *to) {
  NAME(write_sum)(to + c, NAME(read)(from + c, lanes), lanes);
}

static void NAME(backward_activation_part)(const void *context, int64_t from, int64_t to,
                                           int thread) {
  const NAME(BackwardWork) *work = context;
  const Arguments *args = work->args;
  int64_t count = args->width * args->in_channels;
  ACC *line = (ACC *)(work->memory + thread * work->each);
  for (int64_t row = from; row < to; row++) {
    BLOCKS(count, NAME(widen), (const STORE *)args->d_output + row * count, line)
    NAME(add_gradients)(args, row * args->width, args->width, line, args->in_channels,
                        work->columns + thread);
  }
}

/* Adds the gradients d_output (pixels, in_channels) with respect to a reader's activations to the
 * gradient sums. This is for the reader without a convolution. */
int NAME(backward_activation)(const Arguments *args) {
  NAME(BackwardWork) work = {.args = args, .threads = omp_get_max_threads()};
  work.each = round_up(args->width * args->in_channels * sizeof(ACC), 64);
  char *memory = NULL;
  for (size_t total = 0;; total = 0) {
    work.columns = NAME(take_reader_sums)(&memory, &total, args, work.threads);
    work.memory = take(&memory, &total, work.threads * work.each);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  share_work(NAME(backward_activation_part), &work, args->images * args->height);
  NAME(finish_gradients)(args, work.columns, work.threads);
  return 0;
}

/* A feature's gradient is slopes[0] * h + slopes[1] * x + slopes[2], (3, out_channels), with h its
 * gradient sum. Without the batch's statistics only the first is not 0. */
static void NAME(find_slopes)(const Arguments *args, ACC *slopes) {
  const ACC *mean = (const ACC *)args->mean + args->first_channel,
            *rstd = (const ACC *)args->rstd + args->first_channel;
  const ACC *h = (const ACC *)args->gradient_totals + args->first_channel,
            *hz = h + args->all_channels;
  double share = 1 / ((double)args->images * args->height * args->width);
  for (int64_t c = 0; c < args->out_channels; c++) {
    ACC of_x = args->training ? -rstd[c] * rstd[c] * hz[c] * share : 0;
    slopes[c] = rstd[c];
    slopes[args->out_channels + c] = of_x;
    slopes[2 * args->out_channels + c] =
        args->training ? -rstd[c] * h[c] * share - of_x * mean[c] : 0;
  }
}

/* What slopes[1] is for: x, but where it is 0 something as finite as the gradient sum itself. */
static const STORE *NAME(corrected_by)(const Arguments *args) {
  return (const STORE *)(args->training ? args->x : args->d_output);
}

/* Reads a block of columns of d, corrects it where x is given, and writes it as features with
 * `stored` 1, as operands of products with 0. */
INLINE void NAME(load_gradient)(int64_t lanes, int64_t c, const int stored, const STORE *d,
                                const STORE *x, const ACC *slopes, int64_t width, int64_t count,
                                void *to, int64_t stride) {
  BLOCK of_d = {0}, of_x = {0}, offset = {0};
  if (x) {
    of_d = NAME(read_sum)(slopes + c, lanes), of_x = NAME(read_sum)(slopes + width + c, lanes);
    offset = NAME(read_sum)(slopes + 2 * width + c, lanes);
  }
  for (int64_t p = 0; p < count; p++) {
    BLOCK value = NAME(read)(d + p * width + c, lanes);
    if (x) value = of_d * value + of_x * NAME(read)(x + p * width + c, lanes) + offset;
    if (stored) NAME(write)((STORE *)to + p * stride + c, value, lanes);
    else NAME(write_value)((VALUE *)to + p * stride + c, value, lanes);
  }
}

/* Reads d_output of `count` lines from image row `top`. */
static void NAME(load_gradient_lines)(const Arguments *args, const LINES *lines, const ACC *slopes,
                                      int64_t image, int64_t top, int64_t count, VALUE *values) {
  memset(values + (lines->halo + count * lines->across) * lines->stride, 0,
         SLACK(lines->halo) * lines->stride * sizeof(VALUE));
  for (int64_t line = 0; line < count; line++) {
    VALUE *to = NAME(begin_line)(args, lines, values, line, top + line);
    if (!to) continue;
    int64_t first = (image * args->height + top + line) * args->width * args->out_channels;
    const STORE *d = (const STORE *)args->d_output + first,
                *x = args->x ? NAME(corrected_by)(args) + first : NULL;
    BLOCKS(args->out_channels, NAME(load_gradient), 0, d, x, slopes, args->out_channels,
           args->width, to, lines->stride)
    NAME(fill_up)(args, lines, to, args->out_channels);
  }
}

static void NAME(backward_convolution_part)(const void *context, int64_t from, int64_t to,
                                            int thread) {
  const NAME(BackwardWork) *work = context;
  const Arguments *args = work->args;
  const LINES *lines = &work->lines;
  const READER_SUMS *columns = work->columns + thread;
  int64_t bands = divide_up(args->height, work->rows), around = 2 * lines->halo,
          at_once = ROWS_AT_ONCE(args->width);
  char *memory = work->memory + thread * work->each;
  WORD *input = (WORD *)(memory + work->offsets[0]);
  VALUE *d = (VALUE *)(memory + work->offsets[1]);
  char *shifted = memory + work->offsets[2];
  ACC *result = (ACC *)(memory + work->offsets[3]),
      *weights = work->weights + thread * WEIGHTS(args);
  memset(weights, 0, WEIGHTS(args) * sizeof(ACC));
  for (int64_t task = from; task < to; task++) {
    int64_t image = task / bands, top = task % bands * work->rows,
            count = min(work->rows, args->height - top);
    NAME(gather_words)(args, columns->s, columns->t, image, top, count, input,
                       INPUT_LINE(args->width), INPUT_STRIDE(args->in_channels));
    NAME(load_gradient_lines)(args, lines, work->slopes, image, top - lines->halo, count + around,
                              d);
    NAME(weight_gradient)(args, lines, input, d, count, shifted, weights);
    NAME(begin_products)(args);
    for (int64_t row = 0; row < count; row += at_once) {
      int64_t now = min(at_once, count - row);
      NAME(convolve_rows)(args, lines, d + row * lines->across * lines->stride, now, work->packed,
                          args->in_channels, result);
      NAME(add_gradients)(args, (image * args->height + top + row) * args->width, now * args->width,
                          result, round_up(args->in_channels, COLUMN_MULTIPLE), columns);
    }
    NAME(end_products)();
  }
}

/* Adds up the threads' gradients of the weight, for some of the channels that are output. */
static void NAME(add_weights)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(BackwardWork) *work = context;
  const Arguments *args = work->args;
  int64_t taps = args->kernel * args->kernel;
  ACC *d_weight = args->d_weight;
  for (int64_t o = from; o < to; o++)
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t i = 0; i < args->in_channels; i++) {
        ACC sum = 0;
        for (int64_t each = 0; each < work->threads_used; each++)
          sum += work->weights[each * WEIGHTS(args) + WEIGHT_AT(args, tap, o, i)];
        d_weight[(o * args->in_channels + i) * taps + tap] = sum;
      }
}

/* Computes the gradients of weight, scale and shift from d_output (pixels, out_channels), the
 * gradient of what `convolve` wrote, and adds that of what the reader gathered to the gradient
 * sums.
 *
 * A band has its own rows of the input and reads the rows around them of d_output, which is the
 * narrower one. */
int NAME(backward_convolution)(const Arguments *args) {
  NAME(BackwardWork) work = {.args = args, .threads = omp_get_max_threads()};
  work.lines = NAME(lines)(args, args->out_channels, DEPTH_MULTIPLE);
  int64_t around = 2 * work.lines.halo,
          line = INPUT_LINE(args->width) / PAIR * INPUT_STRIDE(args->in_channels);
  PACKING packing = {args, 1, NULL};
  work.rows = band_rows(args, line * sizeof(WORD) + NAME(shifted_size)(args, 1), 0);
  size_t sizes[] = {work.rows * line * sizeof(WORD) + INPUT_SLACK(args),
                    NAME(lines_size)(&work.lines, work.rows + around),
                    NAME(shifted_size)(args, work.rows + around),
                    ROWS_AT_ONCE(args->width) * args->width *
                        round_up(args->in_channels, COLUMN_MULTIPLE) * sizeof(ACC)};
  for (int i = 0; i < 4; i++) work.offsets[i + 1] = work.offsets[i] + round_up(sizes[i], 64);
  work.each = work.offsets[4];
  char *memory = NULL;
  for (size_t total = 0;; total = 0) {
    work.columns = NAME(take_reader_sums)(&memory, &total, args, work.threads);
    work.packed = packing.packed = take(&memory, &total, NAME(packed_size)(&packing));
    work.weights = take(&memory, &total, work.threads * WEIGHTS(args) * sizeof(ACC));
    work.slopes = take(&memory, &total, 3 * args->out_channels * sizeof(ACC));
    work.memory = take(&memory, &total, work.threads * work.each);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  if (args->x) NAME(find_slopes)(args, work.slopes);
  share_work(NAME(pack), &packing, NAME(pack_tasks)(&packing));
  work.threads_used = share_work(NAME(backward_convolution_part), &work,
                                 args->images * divide_up(args->height, work.rows));
  share_work(NAME(add_weights), &work, args->out_channels);
  NAME(finish_gradients)(args, work.columns, work.threads);
  return 0;
}

static void NAME(measure_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(ForwardWork) *work = context;
  const Arguments *args = work->args;
  for (int64_t row = from; row < to; row++)
    NAME(measure_row)((const STORE *)args->x + row * args->width * args->out_channels,
                      args->out_channels, args->width, &work->moments[thread]);
}

/* Finds mean and variance of x (pixels, out_channels). */
int NAME(measure)(const Arguments *args) {
  NAME(ForwardWork) work = {.args = args};
  int64_t threads = omp_get_max_threads();
  char *memory = NULL;
  for (size_t total = 0;; total = 0) {
    work.moments = NAME(take_moments)(&memory, &total, threads, args->out_channels);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  share_work(NAME(measure_part), &work, args->images * args->height);
  NAME(finish_statistics)(args, work.moments, threads);
  return 0;
}

static void NAME(feature_gradient_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(BackwardWork) *work = context;
  const Arguments *args = work->args;
  for (int64_t row = from; row < to; row++) {
    int64_t first = row * args->width * args->out_channels;
    BLOCKS(args->out_channels, NAME(load_gradient), 1, (const STORE *)args->d_output + first,
           NAME(corrected_by)(args) + first, work->slopes, args->out_channels, args->width,
           (STORE *)args->output + first, args->out_channels)
  }
}

/* Writes output (pixels, out_channels): the corrected gradient sum d_output of feature x. */
int NAME(feature_gradient)(const Arguments *args) {
  NAME(BackwardWork) work = {.args = args};
  work.slopes = (ACC *)scratch(3 * args->out_channels * sizeof(ACC));
  if (!work.slopes) return 1;
  NAME(find_slopes)(args, work.slopes);
  share_work(NAME(feature_gradient_part), &work, args->images * args->height);
  return 0;
}

#undef PAIR
#undef TO_VALUE
#undef VALUE
#undef WORD
#undef BLOCK
#undef BLOCKS
#undef BLOCK_BYTES
#undef MASKED
#undef WIDTH
#undef LINES
#undef PACKING
#undef MOMENTS
#undef READER_SUMS
#undef SLACK
#undef LANES
#undef DEPTH_MULTIPLE
#undef COLUMN_MULTIPLE
#undef ROWS_AT_ONCE
#undef INPUT_LINE
#undef INPUT_STRIDE
#undef INPUT_SLACK
#undef WEIGHTS
#undef WEIGHT_AT
