/* Products by tiles of a matrix unit (matrix.h): 16 rows by 16 columns of sums over 32 values.
 *
 * In a convolution a tile's rows are neighbouring pixels of a line; a tap is an offset. In the gradient of a weight they
 * are channels of d, the sum runs over pixels of one or several rows of the image, and a tap is one of several copies of
 * d: an operand that begins where a cache line does is loaded five times as fast as another one.
 */
#define DEEP 32 /* the reduction is padded to a multiple of this */
#define WIDE 16 /* and columns of sums to one of this */
#define ROWS_AT_ONCE(width) ((width) > 16 ? 1 : 2) /* rows of an image that are convolved at a time */

/* Rows of the image in 32 pixels of the gradient of a weight. */
INLINE int64_t rows_in_32(int64_t width) { return padded(width, 2) > 16 ? 1 : 32 / padded(width, 2); }
/* Positions of a row of the input's words. */
INLINE int64_t input_line(int64_t width) { return rows_in_32(width) > 1 ? padded(width, 2) : padded(width, 32); }
#define INPUT_LINE(width) input_line(width)
#define INPUT_STRIDE(in) padded(in, 16)
#define INPUT_SLACK(pass) (16 * INPUT_STRIDE((pass)->in) * sizeof(WORD))
#define WEIGHTS(pass) ((pass)->kernel * (pass)->kernel * (pass)->out * padded((pass)->in, 16))
#define WEIGHT_AT(pass, tap, o, i) (((tap) * (pass)->out + (o)) * padded((pass)->in, 16) + (i))

/* Pixels of a line in a tile: as many in all of its tiles, of which the last two may overlap. */
INLINE int64_t pixels_of_tile(int64_t width) { return ratio(width, ratio(width, 16)); }

static void NAME(begin_products)(const Pass *pass) {
  Shapes shapes = tile_shapes(pixels_of_tile(pass->width), pixels_of_tile(pass->width));
  TILES_BEGIN(&shapes);
}
static void NAME(end_products)(void) { TILES_END(); }

/* Packed: pairs of tiles of columns; in each, taps, 32 values of the reduction, and the tiles. */
static size_t NAME(packed_size)(const PACKING *packing) {
  int64_t taps = packing->pass->kernel * packing->pass->kernel;
  return ratio(NAME(columns_of)(packing), 16) * taps * ratio(NAME(reduced_of)(packing), 32) * 1024;
}
static int64_t NAME(packs)(const PACKING *packing) {
  return ratio(NAME(columns_of)(packing), 32) * packing->pass->kernel * packing->pass->kernel;
}
static void NAME(pack)(const void *context, int64_t from, int64_t to, int thread) {
  const PACKING *packing = context;
  int64_t taps = packing->pass->kernel * packing->pass->kernel, chunks = ratio(NAME(reduced_of)(packing), 32);
  for (int64_t task = from; task < to; task++) {
    int64_t tap = task % taps, first = task / taps * 32;
    int64_t inside = least(2, ratio(NAME(columns_of)(packing) - first, 16));
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

/* `rows` rows of a convolution to `columns` channels: out (rows * width, columns padded to 16) from lines, the first of
 * which is that of the first tap row. */
static void NAME(convolve)(const Pass *pass, const LINES *lines, const VALUE *values, int64_t rows, const VALUE *packed,
                           int64_t columns, ACC *out) {
  int64_t kernel = pass->kernel, taps = kernel * kernel, chunks = lines->stride / 32, wide = padded(columns, 16);
  int64_t pixel = lines->stride * sizeof(VALUE), offsets[kernel * kernel];
  for (int64_t tap = 0; tap < taps; tap++) offsets[tap] = (tap / kernel * lines->across + tap % kernel) * pixel;
  Operands o = {.a_stride = pixel, .a_step = 64, .segments = taps, .length = chunks, .offsets = offsets,
                .b_stride = 64, .b_tile = 1024, .c_stride = wide * sizeof(ACC)};
  int64_t many = pixels_of_tile(pass->width), of_row = ratio(pass->width, 16), tiles = rows * of_row;
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    const char *a[2] = {0};
    ACC *c[2] = {0};
    for (int64_t i = 0; i < least(2, tiles - tile); i++) {
      int64_t row = (tile + i) / of_row, x = least((tile + i) % of_row * many, pass->width - many);
      a[i] = (const char *)values + (row * lines->across + x) * pixel;
      c[i] = out + (row * pass->width + x) * wide;
    }
    for (int64_t column = 0; column < wide; column += 32) {
      int64_t inside = least(2, (wide - column) / 16);
      o.b_step = inside * 1024;
      tile_product(a[1] ? 2 : 1, inside, &o, a[0], a[1], (const char *)(packed + column / 16 * taps * chunks * 512),
                   c[0] + column, a[1] ? c[1] + column : NULL, 0);
    }
  }
}

/* Of d, channels by pixels: all lines of a band one after the other; and after that the tiles. */
INLINE int64_t NAME(turned_length)(const Pass *pass, int64_t lines) {
  return padded(lines * (pass->width + pass->kernel / 2) + 32 + pass->kernel, 32);
}
static size_t NAME(shifted_size)(const Pass *pass, int64_t lines) {
  int64_t tiles = pass->kernel * lines * ratio(pass->width, 32);
  return (NAME(turned_length)(pass, lines) + tiles * 32 + 32) * pass->out * sizeof(VALUE);
}

/* to (channels, length) from values (length, stride); channels in pairs. */
static void NAME(turn)(const VALUE *values, int64_t stride, int64_t channels, int64_t length, VALUE *to) {
#if MASKS
  const __m512i pixels = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(stride * sizeof(VALUE)));
  const __m512i evens = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                         22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  for (int64_t p = 0; p < length; p += 32)
    for (int64_t c = 0; c < channels; c += 2) {
      const VALUE *from = values + p * stride + c;
      __m512i first = _mm512_i32gather_epi32(pixels, from, 1), second = _mm512_i32gather_epi32(pixels, from + 16 * stride, 1);
      _mm512_storeu_si512(to + c * length + p, _mm512_permutex2var_epi16(first, evens, second));
      if (c + 1 < channels)
        _mm512_storeu_si512(to + (c + 1) * length + p, _mm512_permutex2var_epi16(first, odds, second));
    }
#else
  for (int64_t c = 0; c < channels; c++)
    for (int64_t p = 0; p < length; p++) to[c * length + p] = values[p * stride + c];
#endif
}

/* `count` values of `from` and zeros after them: 32 in all. */
INLINE void NAME(copy_line)(VALUE *to, const VALUE *from, int64_t count) {
#if MASKS
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, from));
#else
  memset(to, 0, 32 * sizeof(VALUE));
  memcpy(to, from, count * sizeof(VALUE));
#endif
}

/* Tiles (kernel, lines, tiles of a line, out, 32): d of each line, and of those below it that fit into a tile, once for
 * each tap column. */
static void NAME(shift)(const Pass *pass, const LINES *lines, const VALUE *turned, int64_t length, int64_t count,
                        VALUE *to) {
  int64_t together = rows_in_32(pass->width), line = together > 1 ? input_line(pass->width) : 32;
  for (int64_t across = 0; across < pass->kernel; across++)
    for (int64_t y = 0; y < count; y++)
      for (int64_t x = 0; x < (together > 1 ? 1 : pass->width); x += 32)
        for (int64_t c = 0; c < pass->out; c++, to += 32)
          for (int64_t row = 0; row < together; row++) { /* later copies go over the zeros of those before */
            const VALUE *from = turned + c * length + (y + row) * lines->across + x + 2 * lines->halo - across;
            NAME(copy_line)(to + row * line, from, y + row < count ? line : 0);
          }
}

/* A band's part of the weight's gradient, added to weights: `count` rows of the input, with the lines of d that a
 * convolution reaches from there. */
static void NAME(weigh)(const Pass *pass, const LINES *lines, WORD *input, const VALUE *d, int64_t count, void *shifted,
                        ACC *weights) {
  int64_t kernel = pass->kernel, taps = kernel * kernel, around = 2 * lines->halo, all = count + around;
  int64_t together = rows_in_32(pass->width), line = input_line(pass->width), stride = INPUT_STRIDE(pass->in);
  int64_t length = NAME(turned_length)(pass, all), of_line = ratio(pass->width, 32), out = pass->out;
  VALUE *turned = shifted, *tiles = turned + length * out;
  NAME(turn)(d, lines->stride, out, length, turned);
  NAME(shift)(pass, lines, turned, length, all, tiles);
  memset(input + count * line / 2 * stride, 0, INPUT_SLACK(pass));
  const int64_t none = 0;
  Operands o = {.a_stride = 64, .a_step = together * out * 64, .segments = 1, .offsets = &none,
                .length = together > 1 ? ratio(count, together) : count * of_line, .b_stride = stride * sizeof(WORD),
                .b_tile = 64, .b_step = (together > 1 ? together * line : 32) / 2 * stride * sizeof(WORD),
                .c_stride = stride * sizeof(ACC)};
  for (int64_t m = 0; m < out; m += 32) {
    Shapes shapes = tile_shapes(least(16, out - m), least(16, out - m - 16));
    TILES_BEGIN(&shapes);
    for (int64_t n = 0; n < stride; n += 32)
      for (int64_t tap = 0; tap < taps; tap++) {
        const VALUE *a = tiles + ((tap % kernel * all + around - tap / kernel) * of_line * out + m) * 32;
        ACC *c = weights + (tap * out + m) * stride + n;
        tile_product(out - m > 16 ? 2 : 1, least(2, (stride - n) / 16), &o, (const char *)a, (const char *)(a + 16 * 32),
                     (const char *)(input + n), c, c + 16 * stride, 1);
      }
  }
  TILES_END();
}
