/* Products by broadcasting words of one operand to vectors of the other one.
 *
 * All three convolutions (forward, gradient of the input, gradient of the weight) are one product
 * of a few rows and a few vectors of columns, `multiply`, at different strides.
 */
#if PAIR == 2
typedef __m256i NAME(Vector);
typedef float NAME(Sum) __attribute__((vector_size(32)));
#define DOT(sum, word, vector)                                                          \
  ((NAME(Sum))_mm256_dpbf16_ps((__m256)(sum), (__m256bh)_mm256_set1_epi32((int)(word)), \
                               (__m256bh)(vector)))
#else
typedef ACC NAME(Vector) __attribute__((vector_size(BYTES)));
typedef ACC NAME(Sum) __attribute__((vector_size(BYTES)));
#define DOT(sum, word, vector) ((sum) + (word) * (vector))
#endif
typedef NAME(Sum) NAME(Unaligned) __attribute__((aligned(sizeof(ACC))));
#define VECTOR NAME(Vector)
#define SUM NAME(Sum)
#define LANES ((int64_t)(sizeof(NAME(Sum)) / sizeof(ACC)))

#define DEPTH_MULTIPLE PAIR   /* The reduction is padded to a multiple of this, */
#define COLUMN_MULTIPLE LANES /* and columns of sums to one of this. */
#define ROWS_AT_ONCE(width) 1 /* As many rows of an image are convolved at a time. */
#define INPUT_LINE(width) \
  round_up(width, PAIR) /* A row of the input's words has as many positions. */
#define INPUT_STRIDE(in) (in)
#define INPUT_SLACK(args) 0
#define WEIGHTS(args)                                      \
  ((args)->kernel * (args)->kernel * (args)->in_channels * \
   round_up((args)->out_channels, COLUMN_MULTIPLE))
#define WEIGHT_AT(args, tap, o, i) \
  (((tap) * (args)->in_channels + (i)) * round_up((args)->out_channels, COLUMN_MULTIPLE) + (o))

/* Computes out[row][column] (+)= the sum over segments s and steps l of a[s][row * a_row + l *
 * a_step] * b[.., column]. The rows of b follow one another at b_step vectors. `rows` and `vectors`
 * are constants where this is inlined. */
INLINE void NAME(multiply)(const int rows, const int vectors, const WORD *const *a,
                           int64_t segments, int64_t a_row, int64_t a_step, const VECTOR *b,
                           int64_t b_step, int64_t length, ACC *out, int64_t out_row, int add) {
  SUM sum[PRODUCT_ROWS][PRODUCT_VECTORS];
  UNROLL
  for (int row = 0; row < rows; row++) UNROLL
  for (int v = 0; v < vectors; v++)
    sum[row][v] = add ? *(const NAME(Unaligned) *)(out + row * out_row + v * LANES) : (SUM){0};
  for (int64_t s = 0; s < segments; s++) {
    const WORD *word = a[s];
    for (int64_t l = 0; l < length; l++, word += a_step, b += b_step) {
      VECTOR column[PRODUCT_VECTORS];
      UNROLL
      for (int v = 0; v < vectors; v++) column[v] = b[v];
      UNROLL
      for (int row = 0; row < rows; row++) UNROLL
      for (int v = 0; v < vectors; v++)
        sum[row][v] = DOT(sum[row][v], word[row * a_row], column[v]);
    }
  }
  UNROLL
  for (int row = 0; row < rows; row++) UNROLL
  for (int v = 0; v < vectors; v++)
    *(NAME(Unaligned) *)(out + row * out_row + v * LANES) = sum[row][v];
}

static void NAME(product)(int rows, int vectors, const WORD *const *a, int64_t segments,
                          int64_t a_row, int64_t a_step, const VECTOR *b, int64_t b_step,
                          int64_t length, ACC *out, int64_t out_row, int add) {
#define CASE(r, v)                                                                          \
  case (r) * 4 + (v):                                                                       \
    NAME(multiply)(r, v, a, segments, a_row, a_step, b, b_step, length, out, out_row, add); \
    break;
#define CASES(r) CASE(r, 1) CASE(r, 2) CASE(r, 3)
  switch (rows * 4 + vectors) {
    CASES(1)
    CASES(2)
    CASES(3)
    CASES(4)
#if PRODUCT_ROWS > 4
    CASES(5)
    CASES(6)
    CASES(7)
    CASES(8)
#endif
  }
#undef CASE
#undef CASES
}

INLINE void NAME(begin_products)(const Arguments *args) {}
INLINE void NAME(end_products)(void) {}

/* Packed weights are chunks of up to PRODUCT_VECTORS vectors of columns; in each there are taps and
 * then words of the reduction. */
static size_t NAME(packed_size)(const PACKING *packing) {
  int64_t taps = packing->args->kernel * packing->args->kernel;
  return divide_up(NAME(columns_of)(packing), LANES) * taps *
         divide_up(NAME(reduced_of)(packing), PAIR) * sizeof(VECTOR);
}
static int64_t NAME(pack_tasks)(const PACKING *packing) {
  return divide_up(NAME(columns_of)(packing), LANES * PRODUCT_VECTORS) * packing->args->kernel *
         packing->args->kernel;
}
static void NAME(pack)(const void *context, int64_t from, int64_t to, int thread) {
  const PACKING *packing = context;
  int64_t taps = packing->args->kernel * packing->args->kernel,
          words = divide_up(NAME(reduced_of)(packing), PAIR);
  for (int64_t task = from; task < to; task++) {
    int64_t tap = task % taps, first = task / taps * PRODUCT_VECTORS * LANES;
    int64_t inside =
        min(PRODUCT_VECTORS * LANES, round_up(NAME(columns_of)(packing), LANES) - first);
    VALUE *values =
        (VALUE *)((VECTOR *)packing->packed + task / taps * PRODUCT_VECTORS * taps * words) +
        tap * words * inside * PAIR;
    for (int64_t word = 0; word < words; word++)
      for (int64_t column = first; column < first + inside; column++)
        for (int64_t r = word * PAIR; r < (word + 1) * PAIR; r++)
          *values++ = NAME(weight_at)(packing, tap, r, column);
  }
}

/* Convolves `rows` rows to `columns` channels: out (rows * width, columns padded to LANES) from
 * lines, the first of which is that of the first tap row. */
static void NAME(convolve_rows)(const Arguments *args, const LINES *lines, const VALUE *values,
                                int64_t rows, const VALUE *packed, int64_t columns, ACC *out) {
  int64_t kernel = args->kernel, taps = kernel * kernel, words = lines->stride / PAIR;
  int64_t vectors = divide_up(columns, LANES);
  const WORD *input = (const WORD *)values;
  for (int64_t row = 0; row < rows;
       row++, input += lines->across * words, out += args->width * vectors * LANES)
    for (int64_t v = 0; v < vectors; v += PRODUCT_VECTORS)
      for (int64_t p = 0; p < args->width; p += PRODUCT_ROWS) {
        int64_t inside = min(PRODUCT_VECTORS, vectors - v);
        const WORD *at[kernel * kernel];
        for (int64_t tap = 0; tap < taps; tap++)
          at[tap] = input + (tap / kernel * lines->across + p + tap % kernel) * words;
        NAME(product)(min(PRODUCT_ROWS, args->width - p), inside, at, taps, words, 1,
                      (const VECTOR *)packed + v * taps * words, inside, words,
                      out + (p * vectors + v) * LANES, vectors * LANES, 0);
      }
}

/* d lies as vectors along the pixels, once for each tap column: (kernel, lines, words, columns). */
static size_t NAME(shifted_size)(const Arguments *args, int64_t lines) {
  return args->kernel * lines * divide_up(args->width, PAIR) * round_up(args->out_channels, LANES) *
         sizeof(WORD);
}

/* Writes a block of columns of `count` words, from pixels at strides of `stride` and words at
 * strides of `wide`. */
INLINE void NAME(shift_block)(int64_t lanes, int64_t c, const VALUE *from, int64_t stride,
                              int64_t count, WORD *to, int64_t wide) {
  for (int64_t i = 0; i < count; i++, from += PAIR * stride, to += wide)
    NAME(write_words)(to + c, NAME(read_value)(from + c, lanes),
                      NAME(read_value)(from + (PAIR - 1) * stride + c, lanes), lanes);
}

static void NAME(shift)(const Arguments *args, const LINES *lines, const VALUE *d, int64_t count,
                        WORD *to) {
  int64_t wide = round_up(args->out_channels, LANES), length = divide_up(args->width, PAIR);
  for (int64_t across = 0; across < args->kernel; across++)
    for (int64_t line = 0; line < count; line++, to += length * wide) {
      const VALUE *from = d + (line * lines->across + 2 * lines->halo - across) * lines->stride;
      BLOCKS(args->out_channels, NAME(shift_block), from, lines->stride, length, to, wide)
      BLOCKS((wide - args->out_channels) * PAIR, NAME(clear), (VALUE *)(to + args->out_channels),
             wide * PAIR, length)
    }
}

/* Adds a band's part of the weight's gradient to weights, from `count` rows of the input and the
 * lines of d that a convolution reaches from there. */
static void NAME(weight_gradient)(const Arguments *args, const LINES *lines, WORD *input,
                                  const VALUE *d, int64_t count, void *shifted, ACC *weights) {
  int64_t kernel = args->kernel, around = 2 * lines->halo,
          vectors = divide_up(args->out_channels, LANES);
  int64_t length = divide_up(args->width, PAIR);
  NAME(shift)(args, lines, d, count + around, shifted);
  for (int64_t tap = 0; tap < kernel * kernel; tap++) {
    int64_t first = tap % kernel * (count + around) + around - tap / kernel;
    for (int64_t c = 0; c < args->in_channels; c += PRODUCT_ROWS)
      for (int64_t v = 0; v < vectors; v += PRODUCT_VECTORS) {
        const WORD *at = input + c;
        NAME(product)(
            min(PRODUCT_ROWS, args->in_channels - c), min(PRODUCT_VECTORS, vectors - v), &at, 1, 1,
            args->in_channels, (const VECTOR *)shifted + first * length * vectors + v, vectors,
            count * length, weights + (tap * args->in_channels + c) * vectors * LANES + v * LANES,
            vectors * LANES, 1);
      }
  }
}

#undef DOT
#undef VECTOR
#undef SUM
