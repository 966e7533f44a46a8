/* The unit has eight tiles of up to 16 rows by 64 bytes: bf16 in pairs, sums in fp32.
 *
 * multiply(c, a, b) computes c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1] for all
 * k. Tiles are numbered by constants: 0 to 3 are sums, two by two; 4 and 5 are a's, 6 and 7 are
 * b's.
 */
typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) Shapes;

#if MATRIX == 1
/* These are written out, since GCC's own functions do not say that they read memory. The compiler
 * keeps nothing in tiles. */
#define TILES_BEGIN(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#define TILES_END() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define TILE_LOAD(tile, from, stride)                  \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile  \
                   :                                   \
                   : "r"(from), "r"((int64_t)(stride)) \
                   : "memory")
#define TILE_STORE(tile, to, stride)                      \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" \
                   :                                      \
                   : "r"(to), "r"((int64_t)(stride))      \
                   : "memory")
#define TILE_MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

#include <sys/syscall.h>
#include <unistd.h>
/* Asks the operating system for the unit, for all threads of the process. The result is 0 where it
 * is not granted. */
int matrix_unit(void) {
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

#else
typedef struct {
  uint8_t bytes[16][64];
} Tile;
static _Thread_local Shapes shapes_now;
static _Thread_local Tile tiles_now[8];
#define TILES_BEGIN(shapes) tiles_begin(shapes)
#define TILES_END() memset(&shapes_now, 0, sizeof(Shapes))
#define TILE_ZERO(tile) memset(&tiles_now[tile], 0, sizeof(Tile))
#define TILE_LOAD(tile, from, stride) tile_load(tile, (const char *)(from), stride)
#define TILE_STORE(tile, to, stride) tile_store(tile, (char *)(to), stride)
#define TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)

static void tiles_begin(const Shapes *shapes) {
  shapes_now = *shapes;
  memset(tiles_now, 0, sizeof(tiles_now));
}
static void tile_load(int tile, const char *from, int64_t stride) {
  memset(&tiles_now[tile], 0, sizeof(Tile));
  for (int row = 0; row < shapes_now.rows[tile]; row++)
    memcpy(tiles_now[tile].bytes[row], from + row * stride, shapes_now.bytes[tile]);
}
static void tile_store(int tile, char *to, int64_t stride) {
  for (int row = 0; row < shapes_now.rows[tile]; row++)
    memcpy(to + row * stride, tiles_now[tile].bytes[row], shapes_now.bytes[tile]);
}
static void tile_multiply(int c, int a, int b) {
  const Shapes *s = &shapes_now;
  int fit = s->bytes[a] / 4 == s->rows[b] && s->rows[c] == s->rows[a] && s->bytes[c] == s->bytes[b];
  if (!fit || s->rows[a] > 16 || s->rows[b] > 16 || s->bytes[a] > 64 || s->bytes[b] > 64)
    __builtin_trap(); /* The unit would fault, too. */
  for (int m = 0; m < shapes_now.rows[c]; m++) {
    float sums[16];
    uint16_t left[32], right[32];
    memcpy(sums, tiles_now[c].bytes[m], 64);
    memcpy(left, tiles_now[a].bytes[m], 64);
    for (int k = 0; k < shapes_now.rows[b]; k++) {
      memcpy(right, tiles_now[b].bytes[k], 64);
      for (int n = 0; n < shapes_now.bytes[c] / 4; n++)
        sums[n] += from_bf16(left[2 * k]) * from_bf16(right[2 * n]) +
                   from_bf16(left[2 * k + 1]) * from_bf16(right[2 * n + 1]);
    }
    memcpy(tiles_now[c].bytes[m], sums, 64);
  }
}
int matrix_unit(void) { return 1; }
#endif

/* Gives the shapes for sums of `upper` rows and of `lower` rows below them. */
static Shapes tile_shapes(int64_t upper, int64_t lower) {
  Shapes shapes = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = tile >= 6                             ? 16
                        : tile == 0 || tile == 1 || tile == 4 ? upper
                                                              : max(lower, 1);
  }
  return shapes;
}

/* Says where the operands of a product lie, all in bytes. The product is the sum over segments s
 * and steps l of a[row][offsets[s] + l * a_step] * b, whose steps follow one another. */
typedef struct {
  int64_t a_stride, a_step, segments, length;
  const int64_t *offsets;
  int64_t b_stride, b_step,
      b_tile; /* Between rows, between steps, and between the two tiles of columns. */
  int64_t c_stride;
} Operands;

/* Computes c (+)= a b for one or two tiles of rows (a0, c0 and a1, c1) by one or two of columns.
 * Both numbers are constants where this is inlined. */
INLINE void tile_block(const int rows, const int columns, const Operands *o, const char *a0,
                       const char *a1, const char *b, float *c0, float *c1, int add) {
  if (add) {
    TILE_LOAD(0, c0, o->c_stride);
    if (columns > 1) TILE_LOAD(1, c0 + 16, o->c_stride);
    if (rows > 1) TILE_LOAD(2, c1, o->c_stride);
    if (rows > 1 && columns > 1) TILE_LOAD(3, c1 + 16, o->c_stride);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t s = 0; s < o->segments; s++) {
    int64_t at = o->offsets[s];
    for (int64_t l = 0; l < o->length; l++, at += o->a_step, b += o->b_step) {
      TILE_LOAD(4, a0 + at, o->a_stride);
      TILE_LOAD(6, b, o->b_stride);
      TILE_MULTIPLY(0, 4, 6);
      if (columns > 1) {
        TILE_LOAD(7, b + o->b_tile, o->b_stride);
        TILE_MULTIPLY(1, 4, 7);
      }
      if (rows > 1) {
        TILE_LOAD(5, a1 + at, o->a_stride);
        TILE_MULTIPLY(2, 5, 6);
        if (columns > 1) TILE_MULTIPLY(3, 5, 7);
      }
    }
  }
  TILE_STORE(0, c0, o->c_stride);
  if (columns > 1) TILE_STORE(1, c0 + 16, o->c_stride);
  if (rows > 1) TILE_STORE(2, c1, o->c_stride);
  if (rows > 1 && columns > 1) TILE_STORE(3, c1 + 16, o->c_stride);
}

static void tile_product(int rows, int columns, const Operands *o, const char *a0, const char *a1,
                         const char *b, float *c0, float *c1, int add) {
  if (rows > 1 && columns > 1) tile_block(2, 2, o, a0, a1, b, c0, c1, add);
  else if (rows > 1) tile_block(2, 1, o, a0, a1, b, c0, c1, add);
  else if (columns > 1) tile_block(1, 2, o, a0, a1, b, c0, c1, add);
  else tile_block(1, 1, o, a0, a1, b, c0, c1, add);
}
