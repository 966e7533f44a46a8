/* Products by tiles of a matrix unit (matrix.h): a tile has 16 rows by 16 columns of sums over 32
 * values.
 *
 * In a convolution a tile's rows are neighbouring pixels of a line, and a tap is an offset. In the
 * gradient of a weight they are channels of d, the sum runs over pixels of one or several rows of
 * the image, and a tap is one of several copies of d, because an operand that begins where a cache
 * line does is loaded five times as fast as another one.
 */
#define DEPTH_MULTIPLE 32  /* The reduction is padded to a multiple of this, */
#define COLUMN_MULTIPLE 16 /* and columns of sums to one of this. */
#define ROWS_AT_ONCE(width) \
  ((width) > 16 ? 1 : 2) /* As many rows of an image are convolved at a time. */

/* As many rows of the image are in 32 pixels of the gradient of a weight. */
INLINE int64_t rows_in_32(int64_t width) {
  return round_up(width, 2) > 16 ? 1 : 32 / round_up(width, 2);
}
/* A row of the input's words has as many positions. */
INLINE int64_t input_line(int64_t width) {
  return rows_in_32(width) > 1 ? round_up(width, 2) : round_up(width, 32);
}
#define INPUT_LINE(width) input_line(width)
#define INPUT_STRIDE(in) round_up(in, 16)
#define INPUT_SLACK(args) (16 * INPUT_STRIDE((args)->in_channels) * sizeof(WORD))
#define WEIGHTS(args) \
  ((args)->kernel * (args)->kernel * (args)->out_channels * round_up((args)->in_channels, 16))
#define WEIGHT_AT(args, tap, o, i) \
  (((tap) * (args)->out_channels + (o)) * round_up((args)->in_channels, 16) + (i))

/* A tile has as many pixels of a line, the same number in all tiles, of which the last two may
 * overlap. */
INLINE int64_t pixels_of_tile(int64_t width) { return divide_up(width, divide_up(width, 16)); }

static void NAME(begin_products)(const Arguments *args) {
  Shapes shapes = tile_shapes(pixels_of_tile(args->width), pixels_of_tile(args->width));
  TILES_BEGIN(&shapes);
}
static void NAME(end_products)(void) { TILES_END(); }

/* Packed weights are pairs of tiles of columns; in each there are taps, 32 values of the reduction,
 * and the tiles. */
static size_t NAME(packed_size)(const PACKING *packing) {
  int64_t taps = packing->args->kernel * packing->args->kernel;
  return divide_up(NAME(columns_of)(packing), 16) * taps *
         divide_up(NAME(reduced_of)(packing), 32) * 1024;
}
static int64_t NAME(pack_tasks)(const PACKING *packing) {
  return divide_up(NAME(columns_of)(packing), 32) * packing->args->kernel * packing->args->kernel;
}
static void NAME(pack)(const void *context, int64_t from, int64_t to, int thread) {
  const PACKING *packing = context;
  int64_t taps = packing->args->kernel * packing->args->kernel,
          chunks = divide_up(NAME(reduced_of)(packing), 32);
  for (int64_t task = from; task < to; task++) {
    int64_t tap = task % taps, first = task / taps * 32;
    int64_t inside = min(2, divide_up(NAME(columns_of)(packing) - first, 16));
    VALUE *values = (VALUE *)packing->packed + (first / 16 * taps + tap * inside) * chunks * 512;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int64_t tile = 0; tile < inside; tile++)
        for (int64_t r = chunk * 32; r < (chunk + 1) * 32; r += 2)
          for (int64_t column = first + tile * 16; column < first + tile * 16 + 16; column++) {
            *values++ = NAME(weight_at)(packing, tap, r, column);
            *values++ = NAME(weight_at)(packing, tap, r + 1, column);
          }
  }
}

/* Convolves `rows` rows to `columns` channels: out (rows * width, columns padded to 16) from lines,
 * the first of which is that of the first tap row. */
static void NAME(convolve_rows)(const Arguments *args, const LINES *lines, const VALUE *values,
                                int64_t rows, const VALUE *packed, int64_t columns, ACC *out) {
  int64_t kernel = args->kernel, taps = kernel * kernel, chunks = lines->stride / 32,
          wide = round_up(columns, 16);
  int64_t pixel = lines->stride * sizeof(VALUE), offsets[kernel * kernel];
  for (int64_t tap = 0; tap < taps; tap++)
    offsets[tap] = (tap / kernel * lines->across + tap % kernel) * pixel;
  Operands o = {.a_stride = pixel,
                .a_step = 64,
                .segments = taps,
                .length = chunks,
                .offsets = offsets,
                .b_stride = 64,
                .b_tile = 1024,
                .c_stride = wide * sizeof(ACC)};
  int64_t many = pixels_of_tile(args->width), of_row = divide_up(args->width, 16),
          tiles = rows * of_row;
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    const char *a[2] = {0};
    ACC *c[2] = {0};
    for (int64_t i = 0; i < min(2, tiles - tile); i++) {
      int64_t row = (tile + i) / of_row, x = min((tile + i) % of_row * many, args->width - many);
      a[i] = (const char *)values + (row * lines->across + x) * pixel;
      c[i] = out + (row * args->width + x) * wide;
    }
    for (int64_t column = 0; column < wide; column += 32) {
      int64_t inside = min(2, (wide - column) / 16);
      o.b_step = inside * 1024;
      tile_product(a[1] ? 2 : 1, inside, &o, a[0], a[1],
                   (const char *)(packed + column / 16 * taps * chunks * 512), c[0] + column,
                   a[1] ? c[1] + column : NULL, 0);
    }
  }
}

/* This is the length of d, channels by pixels, with all lines of a band one after the other. The
 * tiles follow it. */
INLINE int64_t NAME(transposed_length)(const Arguments *args, int64_t lines) {
  return round_up(lines * (args->width + args->kernel / 2) + 32 + args->kernel, 32);
}
static size_t NAME(shifted_size)(const Arguments *args, int64_t lines) {
  int64_t tiles = args->kernel * lines * divide_up(args->width, 32);
  return (NAME(transposed_length)(args, lines) + tiles * 32 + 32) * args->out_channels *
         sizeof(VALUE);
}

/* Writes `to` (channels, length) from values (length, stride), two channels at a time. */
static void NAME(transpose)(const VALUE *values, int64_t stride, int64_t channels, int64_t length,
                            VALUE *to) {
#if MASKS
  const __m512i pixels =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(stride * sizeof(VALUE)));
  const __m512i evens =
      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                       24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  for (int64_t p = 0; p < length; p += 32)
    for (int64_t c = 0; c < channels; c += 2) {
      const VALUE *from = values + p * stride + c;
      __m512i first = _mm512_i32gather_epi32(pixels, from, 1),
              second = _mm512_i32gather_epi32(pixels, from + 16 * stride, 1);
      _mm512_storeu_si512(to + c * length + p, _mm512_permutex2var_epi16(first, evens, second));
      if (c + 1 < channels)
        _mm512_storeu_si512(to + (c + 1) * length + p,
                            _mm512_permutex2var_epi16(first, odds, second));
    }
#else
  for (int64_t c = 0; c < channels; c++)
    for (int64_t p = 0; p < length; p++) to[c * length + p] = values[p * stride + c];
#endif
}

/* Copies `count` values and writes zeros after them, 32 in all. */
INLINE void NAME(copy_line)(VALUE *to, const VALUE *from, int64_t count) {
#if MASKS
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, from));
#else
  memset(to, 0, 32 * sizeof(VALUE));
  memcpy(to, from, count * sizeof(VALUE));
#endif
}

/* Writes tiles (kernel, lines, tiles of a line, out_channels, 32): d of each line, and of those
 * below it that fit into a tile, once for each tap column. */
static void NAME(shift)(const Arguments *args, const LINES *lines, const VALUE *turned,
                        int64_t length, int64_t count, VALUE *to) {
  int64_t together = rows_in_32(args->width), line = together > 1 ? input_line(args->width) : 32;
  for (int64_t across = 0; across < args->kernel; across++)
    for (int64_t y = 0; y < count; y++)
      for (int64_t x = 0; x < (together > 1 ? 1 : args->width); x += 32)
        for (int64_t c = 0; c < args->out_channels; c++, to += 32)
          for (int64_t row = 0; row < together;
               row++) { /* Later copies overwrite the zeros of earlier ones. */
            const VALUE *from =
                turned + c * length + (y + row) * lines->across + x + 2 * lines->halo - across;
            NAME(copy_line)(to + row * line, from, y + row < count ? line : 0);
          }
}

/* Adds a band's part of the weight's gradient to weights, from `count` rows of the input and the
 * lines of d that a convolution reaches from there. */
static void NAME(weight_gradient)(const Arguments *args, const LINES *lines, WORD *input,
                                  const VALUE *d, int64_t count, void *shifted, ACC *weights) {
  int64_t kernel = args->kernel, taps = kernel * kernel, around = 2 * lines->halo,
          all = count + around;
  int64_t together = rows_in_32(args->width), line = input_line(args->width),
          stride = INPUT_STRIDE(args->in_channels);
  int64_t length = NAME(transposed_length)(args, all), of_line = divide_up(args->width, 32),
          out = args->out_channels;
  VALUE *turned = shifted, *tiles = turned + length * out;
  NAME(transpose)(d, lines->stride, out, length, turned);
  NAME(shift)(args, lines, turned, length, all, tiles);
  memset(input + count * line / 2 * stride, 0, INPUT_SLACK(args));
  const int64_t none = 0;
  Operands o = {.a_stride = 64,
                .a_step = together * out * 64,
                .segments = 1,
                .offsets = &none,
                .length = together > 1 ? divide_up(count, together) : count * of_line,
                .b_stride = stride * sizeof(WORD),
                .b_tile = 64,
                .b_step = (together > 1 ? together * line : 32) / 2 * stride * sizeof(WORD),
                .c_stride = stride * sizeof(ACC)};
  for (int64_t m = 0; m < out; m += 32) {
    Shapes shapes = tile_shapes(min(16, out - m), min(16, out - m - 16));
    TILES_BEGIN(&shapes);
    for (int64_t n = 0; n < stride; n += 32)
      for (int64_t tap = 0; tap < taps; tap++) {
        const VALUE *a =
            tiles + ((tap % kernel * all + around - tap / kernel) * of_line * out + m) * 32;
        ACC *c = weights + (tap * out + m) * stride + n;
        tile_product(out - m > 16 ? 2 : 1, min(2, (stride - n) / 16), &o, (const char *)a,
                     (const char *)(a + 16 * 32), (const char *)(input + n), c, c + 16 * stride, 1);
      }
  }
  TILES_END();
}
