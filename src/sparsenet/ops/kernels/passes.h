/* The passes for one type of feature: STORE in memory, ACC in sums, SUFFIX in the names of functions. */
#define SLACK(halo) (64 + 2 * (halo)) /* pixels after the last line that may be read */
/* What is multiplied: VALUEs, of which a WORD holds PAIR that follow one another in the reduction. */
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

/* What is not multiplied goes block by block of columns: `lanes` values of memory are a vector, zeros after them. With
 * masks a block is up to WIDTH of them, else WIDTH, 4, 2 or 1, a constant where these functions are inlined. */
#if MASKS && (defined(HALF) || BYTES == 64)
#define BLOCK_BYTES 64
#define MASKED 1
#define BLOCKS(width, f, ...) \
  for (int64_t block_ = 0; block_ < (width); block_ += WIDTH) f(least(WIDTH, (width)-block_), block_, __VA_ARGS__);
#else
#define BLOCK_BYTES BYTES
#define MASKED 0
#define BLOCKS(width, f, ...)                                           \
  for (int64_t block_ = 0; block_ < (width);) {                         \
    int64_t rest_ = (width)-block_;                                     \
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

/* The values as bf16, in the lower halves. */
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
  _mm256_mask_storeu_epi16(to, (1u << lanes) - 1, _mm512_cvtepi32_epi16((__m512i)NAME(rounded)(values)));
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

/* Words of which each holds one of `even` and one of `odd`. */
INLINE void NAME(write_words)(WORD *to, BLOCK even, BLOCK odd, int64_t lanes) {
#if PAIR == 2 && MASKED
  _mm512_mask_storeu_epi32(to, (1u << lanes) - 1, (__m512i)(NAME(rounded)(even) | NAME(rounded)(odd) << 16));
#elif PAIR == 2
  NAME(Bits) words = NAME(rounded)(even) | NAME(rounded)(odd) << 16;
  memcpy(to, &words, lanes * sizeof(WORD));
#else
  NAME(write_sum)(to, even, lanes);
#endif
}

/* Those of `values` where `by` is above zero (or no number), else zero. */
INLINE BLOCK NAME(where_positive)(BLOCK values, BLOCK by) {
  __typeof__(by <= 0) none = by <= 0;
  return (BLOCK)((__typeof__(none))values & ~none);
}

/* scale * (x - mean) * rstd + shift = s * x + t for every column of a reader. */
static void NAME(fold)(const Pass *pass, ACC *s, ACC *t) {
  const ACC *scale = pass->scale, *shift = pass->shift, *mean = pass->mean, *rstd = pass->rstd;
  for (int64_t link = 0, column = 0; link < pass->links; link++)
    for (int64_t c = 0; c < pass->widths[link]; c++, column++) {
      int64_t place = pass->statistic[link] + c;
      s[column] = scale[column] * rstd[place];
      t[column] = shift[column] - s[column] * mean[place];
    }
}

INLINE int64_t NAME(start)(const Pass *pass, int64_t link, int64_t pixel) {
  return pass->first[link] * (pass->images * pass->height * pass->width) + pixel * pass->widths[link];
}

INLINE BLOCK NAME(rectified)(BLOCK slope, BLOCK offset, const STORE *x, int64_t lanes) {
  BLOCK value = slope * NAME(read)(x, lanes) + offset;
  return NAME(where_positive)(value, value);
}

/* relu(s * x + t) of a block of columns, for `count` pixels at strides of x_stride and stride; to features' values, or
 * with `stored` 0 to those that are multiplied. */
INLINE void NAME(rectify)(int64_t lanes, int64_t c, const int stored, const STORE *x, int64_t x_stride, const ACC *s,
                          const ACC *t, int64_t count, void *to, int64_t stride) {
  const BLOCK slope = NAME(read_sum)(s + c, lanes), offset = NAME(read_sum)(t + c, lanes);
  for (int64_t p = 0; p < count; p++) {
    BLOCK value = NAME(rectified)(slope, offset, x + p * x_stride + c, lanes);
    if (stored) NAME(write)((STORE *)to + p * stride + c, value, lanes);
    else NAME(write_value)((VALUE *)to + p * stride + c, value, lanes);
  }
}

/* The same for words along the pixels, at strides of x_stride values and `stride` words. */
INLINE void NAME(rectify_words)(int64_t lanes, int64_t c, const STORE *x, int64_t x_stride, const ACC *s, const ACC *t,
                                int64_t count, WORD *to, int64_t stride) {
  const BLOCK slope = NAME(read_sum)(s + c, lanes), offset = NAME(read_sum)(t + c, lanes);
  to += c;
  for (int64_t p = 0; p < count; p += PAIR, to += stride) {
    const STORE *from = x + p * x_stride + c;
    BLOCK even = NAME(rectified)(slope, offset, from, lanes), odd = {0};
    if (PAIR == 2 && p + 1 < count) odd = NAME(rectified)(slope, offset, from + x_stride, lanes);
    NAME(write_words)(to, even, odd, lanes);
  }
}

/* Lines of pixels as a convolution reads them: `halo` zero pixels, then for each line its pixels and `halo` zero ones, so
 * that neighbours share them. A pixel has `stride` values, zeros where there is no channel. */
typedef struct {
  int64_t halo, across, stride;
} NAME(Lines);
#define LINES NAME(Lines)

INLINE LINES NAME(lines)(const Pass *pass, int64_t channels, int64_t deep) {
  int64_t halo = pass->kernel / 2;
  return (LINES){halo, pass->width + halo, padded(channels, deep)};
}

INLINE size_t NAME(lines_size)(const LINES *lines, int64_t count) {
  return ((count * lines->across + lines->halo + SLACK(lines->halo)) * lines->stride) * sizeof(VALUE);
}

/* Begins a line: its zeros. Null where the line lies outside the image, and is all zeros then. */
INLINE VALUE *NAME(begin_line)(const Pass *pass, const LINES *lines, VALUE *values, int64_t line, int64_t y) {
  if (!line) memset(values, 0, lines->halo * lines->stride * sizeof(VALUE));
  VALUE *to = values + (lines->halo + line * lines->across) * lines->stride;
  int inside = y >= 0 && y < pass->height;
  int64_t end = inside ? pass->width * lines->stride : 0;
  memset(to + end, 0, (lines->across * lines->stride - end) * sizeof(VALUE));
  return inside ? to : NULL;
}

/* A block of zeros for each of `count` pixels. */
INLINE void NAME(clear)(int64_t lanes, int64_t c, VALUE *to, int64_t stride, int64_t count) {
  const BLOCK zeros = {0};
  for (int64_t p = 0; p < count; p++) NAME(write_value)(to + p * stride + c, zeros, lanes);
}

/* Zeros after the channels of a line's pixels. */
static void NAME(fill_up)(const Pass *pass, const LINES *lines, VALUE *to, int64_t channels) {
  BLOCKS(lines->stride - channels, NAME(clear), to + channels, lines->stride, pass->width)
}

/* relu(s * x + t) of `count` lines from image row `top`. */
static void NAME(gather)(const Pass *pass, const LINES *lines, const ACC *s, const ACC *t, int64_t image, int64_t top,
                         int64_t count, VALUE *values) {
  const STORE *block = pass->block;
  for (int64_t line = 0; line < count; line++) {
    VALUE *to = NAME(begin_line)(pass, lines, values, line, top + line);
    if (!to) continue;
    int64_t pixel = (image * pass->height + top + line) * pass->width;
    for (int64_t link = 0, column = 0; link < pass->links; column += pass->widths[link++]) {
      int64_t width = pass->widths[link];
      BLOCKS(width, NAME(rectify), 0, block + NAME(start)(pass, link, pixel), width, s + column, t + column, pass->width,
             to + column, lines->stride)
    }
    NAME(fill_up)(pass, lines, to, pass->in);
  }
}

/* relu(s * x + t) of `count` image rows from `top` as words along the pixels: (count, line / PAIR, stride). */
static void NAME(gather_words)(const Pass *pass, const ACC *s, const ACC *t, int64_t image, int64_t top, int64_t count,
                               WORD *to, int64_t line, int64_t stride) {
  const STORE *block = pass->block;
  for (int64_t row = 0; row < count; row++, to += line / PAIR * stride) {
    int64_t pixel = (image * pass->height + top + row) * pass->width, end = ratio(pass->width, PAIR);
    memset(to + end * stride, 0, (line / PAIR - end) * stride * sizeof(WORD));
    for (int64_t link = 0, column = 0; link < pass->links; column += pass->widths[link++]) {
      int64_t width = pass->widths[link];
      BLOCKS(width, NAME(rectify_words), block + NAME(start)(pass, link, pixel), width, s + column, t + column,
             pass->width, to + column, stride)
    }
  }
}

/* Weights as a product reads them: those of the forward convolution, or backwards, where channels made and gathered
 * change places and the taps are turned round. */
typedef struct {
  const Pass *pass;
  int backwards;
  void *packed;
} NAME(Packing);
#define PACKING NAME(Packing)
INLINE int64_t NAME(columns_of)(const PACKING *p) { return p->backwards ? p->pass->in : p->pass->out; }
INLINE int64_t NAME(reduced_of)(const PACKING *p) { return p->backwards ? p->pass->out : p->pass->in; }

/* Weights of one tap, `reduced` by `columns`, zero outside. */
INLINE VALUE NAME(weight_at)(const PACKING *p, int64_t tap, int64_t reduced, int64_t column) {
  if (column >= NAME(columns_of)(p) || reduced >= NAME(reduced_of)(p)) return 0;
  const ACC *weight = p->pass->weight;
  int64_t taps = p->pass->kernel * p->pass->kernel;
  if (p->backwards) return TO_VALUE(weight[(reduced * p->pass->in + column) * taps + taps - 1 - tap]);
  return TO_VALUE(weight[(column * p->pass->in + reduced) * taps + tap]);
}

#if PAIR == 2 && MATRIX
#include "tiles.h"
#else
#include "vectors.h"
#endif

/* Sums over pixels of each channel, of one thread or of all: how many, mean, and squares of the distance from it. */
typedef struct {
  double count, *mean, *squares;
} __attribute__((aligned(64))) NAME(Moments); /* threads do not share a cache line */
#define MOMENTS NAME(Moments)

/* What `count` more values weigh in the mean, and the square of the distance between both means in the squares. */
typedef struct {
  double mean, squares;
} NAME(Shares);

INLINE NAME(Shares) NAME(shares_of)(const MOMENTS *of, double count) {
  double share = count / (of->count + count);
  return (NAME(Shares)){share, of->count * share};
}

INLINE void NAME(add_moments)(MOMENTS *to, int64_t c, NAME(Shares) shares, double mean, double squares) {
  double distance = mean - to->mean[c];
  to->mean[c] += distance * shares.mean;
  to->squares[c] += squares + distance * distance * shares.squares;
}

/* A block of columns of x, `count` pixels: the first one is the pivot from which distances are taken. */
INLINE void NAME(measure_block)(int64_t lanes, int64_t c, const STORE *x, int64_t width, int64_t count, MOMENTS *to,
                                NAME(Shares) shares) {
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
    NAME(add_moments)(to, c + lane, shares, each[0][lane] + mean, each[2][lane] - mean * each[1][lane]);
  }
}

static void NAME(measure_row)(const STORE *x, int64_t width, int64_t count, MOMENTS *to) {
  const NAME(Shares) shares = NAME(shares_of)(to, count);
  BLOCKS(width, NAME(measure_block), x, width, count, to, shares)
  to->count += count;
}

/* Mean and variance (biased) of all threads' values, and the mean and deviation that readers use. */
static void NAME(settle)(const Pass *pass, const MOMENTS *parts, int64_t threads) {
  MOMENTS all = {0, pass->found + pass->place, pass->found + pass->statistics + pass->place};
  ACC *mean = (ACC *)pass->mean + pass->place, *rstd = (ACC *)pass->rstd + pass->place;
  memset(all.mean, 0, pass->out * sizeof(double));
  memset(all.squares, 0, pass->out * sizeof(double));
  for (int64_t i = 0; i < threads; i++) {
    if (!parts[i].count) continue;
    const NAME(Shares) shares = NAME(shares_of)(&all, parts[i].count);
    for (int64_t c = 0; c < pass->out; c++) NAME(add_moments)(&all, c, shares, parts[i].mean[c], parts[i].squares[c]);
    all.count += parts[i].count;
  }
  for (int64_t c = 0; c < pass->out; c++) {
    double variance = all.squares[c] < 0 ? 0 : all.squares[c] / all.count; /* rounding may leave less than nothing */
    all.squares[c] = variance;
    mean[c] = all.mean[c];
    rstd[c] = 1 / sqrt(variance + pass->eps);
  }
}

/* Room for the moments of all threads, at zero. */
static MOMENTS *NAME(take_moments)(char **next, size_t *total, int64_t threads, int64_t width) {
  MOMENTS *parts = take(next, total, threads * sizeof(MOMENTS));
  double *memory = take(next, total, 2 * threads * width * sizeof(double));
  if (!*next) return NULL;
  memset(memory, 0, 2 * threads * width * sizeof(double));
  for (int64_t i = 0; i < threads; i++)
    parts[i] = (MOMENTS){0, memory + 2 * i * width, memory + (2 * i + 1) * width};
  return parts;
}

/* A block of columns of sums for `count` pixels as features. */
INLINE void NAME(save)(int64_t lanes, int64_t c, const ACC *sums, int64_t stride, int64_t count, STORE *to,
                       int64_t width) {
  for (int64_t p = 0; p < count; p++)
    NAME(write)(to + p * width + c, NAME(read_sum)(sums + p * stride + c, lanes), lanes);
}

/* What `make`, `activate` and `measure` work with. */
typedef struct {
  const Pass *pass;
  ACC *s, *t;
  VALUE *packed;
  MOMENTS *moments;
  int64_t rows;
  LINES lines;
  char *memory; /* of the first thread */
  size_t each;
} NAME(Making);

static void NAME(make_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Making) *work = context;
  const Pass *pass = work->pass;
  const LINES *lines = &work->lines;
  int64_t bands = ratio(pass->height, work->rows), wide = padded(pass->out, WIDE), at_once = ROWS_AT_ONCE(pass->width);
  char *memory = work->memory + thread * work->each;
  VALUE *input = (VALUE *)memory;
  ACC *sums = (ACC *)(memory + padded(NAME(lines_size)(lines, work->rows + 2 * lines->halo), 64));
  NAME(begin_products)(pass);
  for (int64_t task = from; task < to; task++) {
    int64_t image = task / bands, top = task % bands * work->rows, count = least(work->rows, pass->height - top);
    NAME(gather)(pass, lines, work->s, work->t, image, top - lines->halo, count + 2 * lines->halo, input);
    for (int64_t row = 0; row < count; row += at_once) {
      int64_t now = least(at_once, count - row);
      NAME(convolve)(pass, lines, input + row * lines->across * lines->stride, now, work->packed, pass->out, sums);
      STORE *made = (STORE *)pass->made + (image * pass->height + top + row) * pass->width * pass->out;
      BLOCKS(pass->out, NAME(save), sums, wide, now * pass->width, made, pass->out)
      if (pass->found)
        for (int64_t i = 0; i < now; i++)
          NAME(measure_row)(made + i * pass->width * pass->out, pass->out, pass->width, &work->moments[thread]);
    }
  }
  NAME(end_products)();
}

/* made (pixels, out): the convolution of relu(scale * normalised + shift), and its mean and variance. */
int NAME(make)(const Pass *pass) {
  NAME(Making) work = {.pass = pass, .lines = NAME(lines)(pass, pass->in, DEEP)};
  int64_t threads = omp_get_max_threads(), halo = work.lines.halo;
  PACKING packing = {pass, 0, NULL};
  work.rows = band_rows(pass, work.lines.across * work.lines.stride * sizeof(VALUE), 2 * halo);
  work.each = padded(NAME(lines_size)(&work.lines, work.rows + 2 * halo), 64) +
              padded(ROWS_AT_ONCE(pass->width) * pass->width * padded(pass->out, WIDE) * sizeof(ACC), 64);
  char *memory = NULL;
  for (size_t total = 0;; total = 0) { /* counts, then takes */
    work.s = take(&memory, &total, pass->in * sizeof(ACC));
    work.t = take(&memory, &total, pass->in * sizeof(ACC));
    work.packed = packing.packed = take(&memory, &total, NAME(packed_size)(&packing));
    work.moments = NAME(take_moments)(&memory, &total, threads, pass->found ? pass->out : 0);
    work.memory = take(&memory, &total, threads * work.each);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  NAME(fold)(pass, work.s, work.t);
  share_work(NAME(pack), &packing, NAME(packs)(&packing));
  share_work(NAME(make_part), &work, pass->images * ratio(pass->height, work.rows));
  if (pass->found) NAME(settle)(pass, work.moments, threads);
  return 0;
}

static void NAME(activate_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Making) *work = context;
  const Pass *pass = work->pass;
  const STORE *block = pass->block;
  for (int64_t row = from; row < to; row++)
    for (int64_t link = 0, column = 0; link < pass->links; column += pass->widths[link++]) {
      int64_t width = pass->widths[link];
      BLOCKS(width, NAME(rectify), 1, block + NAME(start)(pass, link, row * pass->width), width, work->s + column,
             work->t + column, pass->width, (STORE *)pass->made + row * pass->width * pass->in + column, pass->in)
    }
}

/* made (pixels, in): relu(scale * normalised + shift). */
int NAME(activate)(const Pass *pass) {
  ACC *s = (ACC *)scratch(2 * pass->in * sizeof(ACC));
  if (!s) return 1;
  NAME(Making) work = {.pass = pass, .s = s, .t = s + pass->in};
  NAME(fold)(pass, work.s, work.t);
  share_work(NAME(activate_part), &work, pass->images * pass->height);
  return 0;
}

INLINE void NAME(add_block)(double *to, BLOCK values, int64_t lanes) {
  ACC each[BLOCK_BYTES / sizeof(ACC)]; /* an index into a vector would keep it in memory all along */
  memcpy(each, &values, sizeof(values));
  for (int64_t lane = 0; lane < lanes; lane++) to[lane] += each[lane];
}

/* The constants of a reader's columns and a thread's sums over pixels, in the order of the fields. */
typedef struct {
  ACC *s, *t;
  const ACC *scale;
  ACC *mean;
  double *d_shift, *d_scaled; /* sums of g and of g * (x - mean) */
} NAME(Columns);
#define COLUMNS NAME(Columns)

/* A row of gradients d with respect to a block of a feature's activations goes to its sum. */
INLINE void NAME(share)(int64_t lanes, int64_t c, const STORE *x, STORE *sum, int64_t width, const ACC *d,
                        int64_t d_stride, int64_t count, const int add, int64_t column, const COLUMNS *columns) {
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
  NAME(add_block)(columns->d_shift + place, d_shift, lanes);
  NAME(add_block)(columns->d_scaled + place, d_scaled, lanes);
}

/* Gradients d (count, d_stride) with respect to the activations of pixels go to the sums of the features read. */
static void NAME(share_out)(const Pass *pass, int64_t pixel, int64_t count, const ACC *d, int64_t d_stride,
                            const COLUMNS *columns) {
  for (int64_t link = 0, column = 0; link < pass->links; column += pass->widths[link++]) {
    int64_t width = pass->widths[link], start = NAME(start)(pass, link, pixel);
    const STORE *x = (const STORE *)pass->block + start;
    STORE *sum = (STORE *)pass->sums + start;
    if (pass->begun[link]) {
      BLOCKS(width, NAME(share), x, sum, width, d + column, d_stride, count, 1, column, columns)
    } else {
      BLOCKS(width, NAME(share), x, sum, width, d + column, d_stride, count, 0, column, columns)
    }
  }
}

/* Room for the constants, and for zeroed sums of each thread. Threads share what they do not change. */
static COLUMNS *NAME(take_columns)(char **next, size_t *total, const Pass *pass, int64_t threads) {
  COLUMNS *columns = take(next, total, threads * sizeof(COLUMNS));
  ACC *s = take(next, total, 3 * pass->in * sizeof(ACC));
  double *sums = take(next, total, threads * 2 * pass->in * sizeof(double));
  if (!*next) return NULL;
  ACC *t = s + pass->in, *means = t + pass->in;
  const ACC *mean = pass->mean;
  NAME(fold)(pass, s, t);
  for (int64_t link = 0, column = 0; link < pass->links; column += pass->widths[link++])
    memcpy(means + column, mean + pass->statistic[link], pass->widths[link] * sizeof(ACC));
  memset(sums, 0, threads * 2 * pass->in * sizeof(double));
  for (int64_t i = 0; i < threads; i++)
    columns[i] = (COLUMNS){s, t, pass->scale, means, sums + 2 * i * pass->in, sums + (2 * i + 1) * pass->in};
  return columns;
}

/* Adds the threads' sums: gradients of scale and shift, and what the correction of each feature needs of them. */
static void NAME(close)(const Pass *pass, const COLUMNS *columns, int64_t threads) {
  const ACC *rstd = pass->rstd;
  ACC *d_scale = pass->d_scale, *d_shift = pass->d_shift, *totals = pass->totals;
  for (int64_t link = 0, column = 0; link < pass->links; link++)
    for (int64_t c = 0; c < pass->widths[link]; c++, column++) {
      double shift = 0, scaled = 0;
      for (int64_t i = 0; i < threads; i++) {
        shift += columns[i].d_shift[column];
        scaled += columns[i].d_scaled[column];
      }
      int64_t place = pass->statistic[link] + c;
      d_shift[column] = shift;
      d_scale[column] = scaled * rstd[place];
      totals[place] += columns->scale[column] * d_shift[column];
      totals[pass->statistics + place] += columns->scale[column] * d_scale[column];
    }
}

/* What `collect`, `back` and `correct` work with. */
typedef struct {
  const Pass *pass;
  COLUMNS *columns;
  VALUE *packed;
  ACC *weights; /* each thread's gradient of the weight */
  ACC *slopes;
  int64_t rows, threads, came; /* threads that there may be, and that there were */
  LINES lines; /* of d */
  char *memory;
  size_t each, offsets[5];
} NAME(Sending);

/* A block of values as sums. */
INLINE void NAME(widen)(int64_t lanes, int64_t c, const STORE *from, ACC *to) {
  NAME(write_sum)(to + c, NAME(read)(from + c, lanes), lanes);
}

static void NAME(collect_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Sending) *work = context;
  const Pass *pass = work->pass;
  int64_t count = pass->width * pass->in;
  ACC *line = (ACC *)(work->memory + thread * work->each);
  for (int64_t row = from; row < to; row++) {
    BLOCKS(count, NAME(widen), (const STORE *)pass->d + row * count, line)
    NAME(share_out)(pass, row * pass->width, pass->width, line, pass->in, work->columns + thread);
  }
}

/* For a reader without a convolution: gradients d (pixels, in) with respect to its activations to the sums. */
int NAME(collect)(const Pass *pass) {
  NAME(Sending) work = {.pass = pass, .threads = omp_get_max_threads()};
  work.each = padded(pass->width * pass->in * sizeof(ACC), 64);
  char *memory = NULL;
  for (size_t total = 0;; total = 0) {
    work.columns = NAME(take_columns)(&memory, &total, pass, work.threads);
    work.memory = take(&memory, &total, work.threads * work.each);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  share_work(NAME(collect_part), &work, pass->images * pass->height);
  NAME(close)(pass, work.columns, work.threads);
  return 0;
}

/* The correction of a feature: d is slopes[0] * h + slopes[1] * x + slopes[2], (3, out). */
static void NAME(find_slopes)(const Pass *pass, ACC *slopes) {
  const ACC *mean = (const ACC *)pass->mean + pass->place, *rstd = (const ACC *)pass->rstd + pass->place;
  const ACC *h = (const ACC *)pass->totals + pass->place, *hz = h + pass->statistics;
  double share = pass->training / ((double)pass->images * pass->height * pass->width);
  for (int64_t c = 0; c < pass->out; c++) {
    ACC of_x = -rstd[c] * rstd[c] * hz[c] * share;
    slopes[c] = rstd[c];
    slopes[pass->out + c] = of_x;
    slopes[2 * pass->out + c] = -rstd[c] * h[c] * share - of_x * mean[c];
  }
}

/* A block of columns of d, corrected where x is given, as values that are multiplied or, with `stored`, as features. */
INLINE void NAME(load)(int64_t lanes, int64_t c, const int stored, const STORE *d, const STORE *x, const ACC *slopes,
                       int64_t width, int64_t count, void *to, int64_t stride) {
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

/* d of `count` lines from image row `top`. */
static void NAME(load_lines)(const Pass *pass, const LINES *lines, const ACC *slopes, int64_t image, int64_t top,
                             int64_t count, VALUE *values) {
  memset(values + (lines->halo + count * lines->across) * lines->stride, 0, SLACK(lines->halo) * lines->stride * sizeof(VALUE));
  for (int64_t line = 0; line < count; line++) {
    VALUE *to = NAME(begin_line)(pass, lines, values, line, top + line);
    if (!to) continue;
    int64_t first = (image * pass->height + top + line) * pass->width * pass->out;
    const STORE *d = (const STORE *)pass->d + first, *x = pass->x ? (const STORE *)pass->x + first : NULL;
    BLOCKS(pass->out, NAME(load), 0, d, x, slopes, pass->out, pass->width, to, lines->stride)
    NAME(fill_up)(pass, lines, to, pass->out);
  }
}

static void NAME(back_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Sending) *work = context;
  const Pass *pass = work->pass;
  const LINES *lines = &work->lines;
  const COLUMNS *columns = work->columns + thread;
  int64_t bands = ratio(pass->height, work->rows), around = 2 * lines->halo, at_once = ROWS_AT_ONCE(pass->width);
  char *memory = work->memory + thread * work->each;
  WORD *input = (WORD *)(memory + work->offsets[0]);
  VALUE *d = (VALUE *)(memory + work->offsets[1]);
  char *shifted = memory + work->offsets[2];
  ACC *result = (ACC *)(memory + work->offsets[3]), *weights = work->weights + thread * WEIGHTS(pass);
  memset(weights, 0, WEIGHTS(pass) * sizeof(ACC));
  for (int64_t task = from; task < to; task++) {
    int64_t image = task / bands, top = task % bands * work->rows, count = least(work->rows, pass->height - top);
    NAME(gather_words)(pass, columns->s, columns->t, image, top, count, input, INPUT_LINE(pass->width),
                       INPUT_STRIDE(pass->in));
    NAME(load_lines)(pass, lines, work->slopes, image, top - lines->halo, count + around, d);
    NAME(weigh)(pass, lines, input, d, count, shifted, weights);
    NAME(begin_products)(pass);
    for (int64_t row = 0; row < count; row += at_once) {
      int64_t now = least(at_once, count - row);
      NAME(convolve)(pass, lines, d + row * lines->across * lines->stride, now, work->packed, pass->in, result);
      NAME(share_out)(pass, (image * pass->height + top + row) * pass->width, now * pass->width, result,
                      padded(pass->in, WIDE), columns);
    }
    NAME(end_products)();
  }
}

/* Adds the threads' gradients of the weight, for some of the channels made. */
static void NAME(add_weights)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Sending) *work = context;
  const Pass *pass = work->pass;
  int64_t taps = pass->kernel * pass->kernel;
  ACC *d_weight = pass->d_weight;
  for (int64_t o = from; o < to; o++)
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t i = 0; i < pass->in; i++) {
        ACC sum = 0;
        for (int64_t each = 0; each < work->came; each++)
          sum += work->weights[each * WEIGHTS(pass) + WEIGHT_AT(pass, tap, o, i)];
        d_weight[(o * pass->in + i) * taps + tap] = sum;
      }
}

/* From d (pixels, out), the gradient with respect to what `make` wrote: gradients of weight, scale and shift; the
 * gradient of what the reader gathered goes to the sums.
 *
 * A band owns rows of the input, and of d those around them, too: d is the narrower one. */
int NAME(back)(const Pass *pass) {
  NAME(Sending) work = {.pass = pass, .threads = omp_get_max_threads(), .lines = NAME(lines)(pass, pass->out, DEEP)};
  int64_t around = 2 * work.lines.halo, line = INPUT_LINE(pass->width) / PAIR * INPUT_STRIDE(pass->in);
  PACKING packing = {pass, 1, NULL};
  work.rows = band_rows(pass, line * sizeof(WORD) + NAME(shifted_size)(pass, 1), 0);
  size_t sizes[] = {work.rows * line * sizeof(WORD) + INPUT_SLACK(pass), NAME(lines_size)(&work.lines, work.rows + around),
                    NAME(shifted_size)(pass, work.rows + around),
                    ROWS_AT_ONCE(pass->width) * pass->width * padded(pass->in, WIDE) * sizeof(ACC)};
  for (int i = 0; i < 4; i++) work.offsets[i + 1] = work.offsets[i] + padded(sizes[i], 64);
  work.each = work.offsets[4];
  char *memory = NULL;
  for (size_t total = 0;; total = 0) {
    work.columns = NAME(take_columns)(&memory, &total, pass, work.threads);
    work.packed = packing.packed = take(&memory, &total, NAME(packed_size)(&packing));
    work.weights = take(&memory, &total, work.threads * WEIGHTS(pass) * sizeof(ACC));
    work.slopes = take(&memory, &total, 3 * pass->out * sizeof(ACC));
    work.memory = take(&memory, &total, work.threads * work.each);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  if (pass->x) NAME(find_slopes)(pass, work.slopes);
  share_work(NAME(pack), &packing, NAME(packs)(&packing));
  work.came = share_work(NAME(back_part), &work, pass->images * ratio(pass->height, work.rows));
  share_work(NAME(add_weights), &work, pass->out);
  NAME(close)(pass, work.columns, work.threads);
  return 0;
}

static void NAME(measure_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Making) *work = context;
  const Pass *pass = work->pass;
  for (int64_t row = from; row < to; row++)
    NAME(measure_row)((const STORE *)pass->x + row * pass->width * pass->out, pass->out, pass->width,
                      &work->moments[thread]);
}

/* Mean and variance of x (pixels, out). */
int NAME(measure)(const Pass *pass) {
  NAME(Making) work = {.pass = pass};
  int64_t threads = omp_get_max_threads();
  char *memory = NULL;
  for (size_t total = 0;; total = 0) {
    work.moments = NAME(take_moments)(&memory, &total, threads, pass->out);
    if (memory) break;
    if (!(memory = scratch(total))) return 1;
  }
  share_work(NAME(measure_part), &work, pass->images * pass->height);
  NAME(settle)(pass, work.moments, threads);
  return 0;
}

static void NAME(correct_part)(const void *context, int64_t from, int64_t to, int thread) {
  const NAME(Sending) *work = context;
  const Pass *pass = work->pass;
  for (int64_t row = from; row < to; row++) {
    int64_t first = row * pass->width * pass->out;
    BLOCKS(pass->out, NAME(load), 1, (const STORE *)pass->d + first, (const STORE *)pass->x + first, work->slopes,
           pass->out, pass->width, (STORE *)pass->made + first, pass->out)
  }
}

/* made (pixels, out): the corrected sum d of feature x. */
int NAME(correct)(const Pass *pass) {
  NAME(Sending) work = {.pass = pass, .slopes = (ACC *)scratch(3 * pass->out * sizeof(ACC))};
  if (!work.slopes) return 1;
  NAME(find_slopes)(pass, work.slopes);
  share_work(NAME(correct_part), &work, pass->images * pass->height);
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
#undef COLUMNS
#undef SLACK
#undef LANES
#undef DEEP
#undef WIDE
#undef ROWS_AT_ONCE
#undef INPUT_LINE
#undef INPUT_STRIDE
#undef INPUT_SLACK
#undef WEIGHTS
#undef WEIGHT_AT
