// Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
// Products of integer codes on a CPU: quantization, product, rescaling and bias in one call.
// Compiled at run time by kernels.py with contraction off: each result equals that of the
// simulation (backends/exact.py) to the last bit.
//
// Codes are raw: code - qmin, so that they are unsigned. A product takes a left matrix, row after
// row, and a right one of centred codes (code - zero point) in panels of 16 columns. Both hold
// groups of 4 bytes along the sum: 4 codes of 8 bits (narrow) or 2 of 16 bits (wide).
//   left:  [row][group][4 bytes]         right: [panel][group][column 0..15][4 bytes]
//
// Narrow AVX2 products: vpmaddubsw adds two products of unsigned and signed bytes to 16 bits, and
// `flush` groups are added up in 16 bits before they are widened; the caller bounds `flush` by
// 32767 / (2 * largest left code * largest right code): nothing saturates or wraps.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define TILE 6       // rows of a tile
#define PANEL 16     // columns of a panel
#define BLOCK 131072 // bytes of left rows that stay in the cache
#define LANES 16     // most floats in torch's vectors
#define ROWS_OF_LOGITS 24 // rows of logits computed together

typedef struct {
    const float *scale, *zero;       // one, or one for each channel
    int64_t step;                     // 0: one scale and zero point
    float qmin, qmax;
    const float *levels, *thresholds; // of a logarithmic code
    int64_t num_levels;               // 0 for uniform codes
    const struct Tree *tree;          // see tree_of, or NULL
} Grid;

typedef struct {
    int64_t rows, columns, groups, wide, flush;
    const int8_t *right;
    const int32_t *sums;       // per column, subtracted from the sum times the row's zero point
    const int32_t *row_zero;   // per row, with row_scale
    const float *row_scale;    // NULL: row_zero and row_scale are 1
    const float *factor;       // per column
    const float *bias;         // per column, or NULL; only without row_scale
    float *out;
    int64_t row_step, column_step; // of `out`
} Product;

typedef struct {
    int64_t batch, channels, height, width;    // of the input
    int64_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x;
    int64_t top, left, padded_height, padded_width, out_height, out_width;
} Window;

typedef struct {
    const float *x;
    int64_t outer, inner, row, column;  // strides of x
    // one scale and zero point, or one for each batch and vector along the sum
    const float *scale, *zero;
    int64_t scale_batch, scale_step, zero_batch, zero_step;
    int64_t extent;  // 0: scales are given; else they follow the vector's own range, see Extent
    float share, qmin, qmax;
    const float *levels, *thresholds;  // of a logarithmic code
    int64_t num_levels;
} Side;

typedef struct {
    int64_t outer, inner, depth;  // outer * inner products
    Side lhs, rhs;
} Operands;

// Changes logits: x[(batch % period) * outer + head * inner + row * row + column / width *
// column_outer + column % width * column].
typedef struct {
    const float *x;
    int64_t period, outer, inner, row, column_outer, column, width;
    int64_t multiplies;  // else it is added
} Term;

enum Extent { GIVEN, ASYMMETRIC, SYMMETRIC, FROM_ZERO };
#define SMALLEST_SCALE 1e-9f

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Code of one value; a NaN sets `bad`.
#define CODE(ratio, z)                                                                           \
    float code = rintf(ratio) + (z);                                                             \
    bad |= code != code;                                                                         \
    code = code < qmin ? qmin : code;                                                            \
    code = code > qmax ? qmax : code;

#define QUANTIZE_RUN(name, type)                                                                 \
    static int name(const float *restrict x, int64_t n, const float *restrict scale,             \
                    const float *restrict zero, int64_t step, float qmin, float qmax,            \
                    const float *offset, int64_t offset_step, type *restrict out) {              \
        const float o = *offset;                                                        \
        int bad = 0;                                                                             \
        if (!step) {                                                                             \
            const float s = *scale, z = *zero;                                                   \
            for (int64_t i = 0; i < n; i++) {                                                    \
                CODE(x[i] / s, z)                                                                \
                out[i] = (type)(int32_t)(code - o);                                              \
            }                                                                                    \
        } else if (!offset_step) {                                                               \
            for (int64_t i = 0; i < n; i++) {                                                    \
                CODE(x[i] / scale[i], zero[i])                                                   \
                out[i] = (type)(int32_t)(code - o);                                              \
            }                                                                                    \
        } else {                                                                                 \
            for (int64_t i = 0; i < n; i++) {                                                    \
                CODE(x[i] / scale[i], zero[i])                                                   \
                out[i] = (type)(int32_t)(code - offset[i]);                                      \
            }                                                                                    \
        }                                                                                        \
        return bad;                                                                              \
    }
QUANTIZE_RUN(quantize_unsigned, uint8_t)
QUANTIZE_RUN(quantize_signed, int8_t)
QUANTIZE_RUN(quantize_wide, int16_t)

typedef float Eight __attribute__((vector_size(32)));
typedef float EightAnywhere __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t EightInts __attribute__((vector_size(32)));
#ifdef __AVX2__
#define LEAST(a, b) (Eight) _mm256_min_ps((__m256)(a), (__m256)(b))  // b if one is NaN
#define MOST(a, b) (Eight) _mm256_max_ps((__m256)(a), (__m256)(b))
#else
#define CHOOSE(mask, a, b) (Eight)(((mask) & (EightInts)(a)) | (~(mask) & (EightInts)(b)))
#define LEAST(a, b) CHOOSE((a) < (b), a, b)
#define MOST(a, b) CHOOSE((a) > (b), a, b)
#endif

typedef int16_t EightShorts __attribute__((vector_size(16)));
typedef int16_t EightShortsAnywhere __attribute__((vector_size(16), aligned(2), may_alias));
#define LEVELS 16 // most levels of the tree: 4 bits
#define WIDTH 32  // elements whose levels are found together

// Tables of quantize_levels; without a tree (other processors, more levels) it compares with all.
typedef struct Tree {
    int rounds;              // of a binary search, 0 without
    float limits[4][8];      // thresholds of each round
    int32_t levels[LEVELS];
} Tree;

static Tree tree_of(const float *levels, const float *thresholds, int64_t n) {
    Tree t = {0};
#ifdef __AVX2__
    if (!n || n > LEVELS) return t;
    t.rounds = 4;
    for (int i = 0; i < LEVELS; i++) t.levels[i] = (int32_t)levels[i < n ? i : n - 1];
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < 1 << r; i++) {
            const int64_t j = (2 * i + 1) * (LEVELS >> (r + 1));
            t.limits[r][i] = j < n ? thresholds[j] : INFINITY;
        }
#endif
    return t;
}

// Softmax as torch computes it.
typedef struct {
    Eight (*exponential)(Eight);  // torch's own
    int64_t lanes;                // floats in torch's vectors, at most LANES
    int64_t count;
    const Term *terms;            // of the logits
} Softmax;

// Levels of 8 * count ratios.
static inline __attribute__((always_inline)) void find_levels(const int count, const Eight *ratio,
                                                              const Grid *g, EightInts *level) {
#ifdef __AVX2__
    if (g->tree && g->tree->rounds) {
        const Tree *t = g->tree;
        const __m256i low = _mm256_loadu_si256((const __m256i *)t->levels);
        const __m256i high = _mm256_loadu_si256((const __m256i *)(t->levels + 8));
        _Pragma("GCC unroll 4") for (int i = 0; i < count; i++) {
            __m256i index = _mm256_setzero_si256();
            for (int r = 0; r < 4; r++) {
                const __m256 limit =
                    _mm256_permutevar8x32_ps(_mm256_loadu_ps(t->limits[r]), index);
                const __m256 above = _mm256_cmp_ps((__m256)ratio[i], limit, _CMP_GT_OQ);
                index = _mm256_sub_epi32(_mm256_add_epi32(index, index), (__m256i)above);
            }
            const __m256 is_high = (__m256)_mm256_slli_epi32(index, 28);
            level[i] = (EightInts)_mm256_blendv_ps(
                (__m256)_mm256_permutevar8x32_epi32(low, index),
                (__m256)_mm256_permutevar8x32_epi32(high, index), is_high);
        }
        return;
    }
#endif
    for (int64_t j = 1; j < g->num_levels; j++) {  // a level is the sum of the steps below it
        const float threshold = g->thresholds[j];
        const int32_t step = (int32_t)g->levels[j] - (int32_t)g->levels[j - 1];
        for (int i = 0; i < count; i++) level[i] += (ratio[i] > threshold) & step;
    }
}

// Levels of 8 * count values, at most WIDTH; lanes of values that are not finite are set in `bad`.
static inline __attribute__((always_inline)) void levels_of(const int count, const float *x,
                                                            float scale, const Grid *g,
                                                            EightInts *bad, int16_t *out) {
    Eight ratio[WIDTH / 8];
    EightInts level[WIDTH / 8];
    _Pragma("GCC unroll 4") for (int i = 0; i < count; i++) {
        ratio[i] = *(const EightAnywhere *)(x + 8 * i) / scale;
        *bad |= ~(ratio[i] - ratio[i] == 0.0f);
        level[i] = (EightInts){0};
    }
    find_levels(count, ratio, g, level);
    _Pragma("GCC unroll 4") for (int i = 0; i < count; i++)
        *(EightShortsAnywhere *)(out + 8 * i) = __builtin_convertvector(level[i], EightShorts);
}

static int quantize_levels(const float *x, int64_t n, float scale, const Grid *g, int16_t *out) {
    EightInts bad = {0};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) levels_of(WIDTH / 8, x + i, scale, g, &bad, out + i);
    for (; i + 8 <= n; i += 8) levels_of(1, x + i, scale, g, &bad, out + i);
    if (i < n) {
        float values[8] = {0};
        int16_t levels[8];
        memcpy(values, x + i, (n - i) * sizeof(float));
        levels_of(1, values, scale, g, &bad, levels);
        memcpy(out + i, levels, (n - i) * sizeof(int16_t));
    }
    int any = 0;
    for (int j = 0; j < 8; j++) any |= bad[j];
    return any != 0;
}

// Raw codes of one row of the left matrix, zeros after them up to a whole group.
static int quantize_row(const Grid *g, const float *x, int64_t n, int64_t wide, int64_t groups,
                        uint8_t *out) {
    int bad;
    if (g->num_levels)
        bad = quantize_levels(x, n, *g->scale, g, (int16_t *)out);
    else if (wide)
        bad = quantize_wide(x, n, g->scale, g->zero, g->step, g->qmin, g->qmax, &g->qmin, 0,
                            (int16_t *)out);
    else
        bad = quantize_unsigned(x, n, g->scale, g->zero, g->step, g->qmin, g->qmax, &g->qmin, 0,
                                out);
    const int64_t used = n * (wide ? 2 : 1);
    memset(out + used, 0, groups * 4 - used);
    return bad;
}

#ifdef __AVX2__
// As intrinsics, the compiler reads all rows first and has no registers left for the sums.
#define ADD_TO(sum, add, x) __asm__ volatile("v" add " %1, %0, %0" : "+x"(sum) : "x"(x));
#define TILE_BODY(R, step)                                                                       \
    for (int64_t g = from; g < to; g++) {                                                        \
        const __m256i b0 = _mm256_loadu_si256((const __m256i *)(b + g * 64));                    \
        const __m256i b1 = _mm256_loadu_si256((const __m256i *)(b + g * 64 + 32));               \
        _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {                                    \
            int32_t four;                                                                        \
            memcpy(&four, a + r * lda + g * 4, 4);                                               \
            const __m256i v = _mm256_set1_epi32(four);                                           \
            step                                                                                 \
        }                                                                                        \
    }

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VNNI "vpdpbusd"
#elif defined(__AVXVNNI__)
#define VNNI "%{vex%} vpdpbusd"
#endif

static inline __attribute__((always_inline)) void tile_narrow(
    const int R, const uint8_t *a, int64_t lda, const int8_t *b, int64_t groups, int64_t flush,
    __m256i *acc) {
#ifdef VNNI  // four products are added to 32 bits at once, without saturation
#define DOT(sum, left, right)                                                                    \
    __asm__ volatile(VNNI " %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
    const int64_t from = 0, to = groups;
    __m256i s[TILE][2];
    (void)flush;
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) s[r][0] = s[r][1] = _mm256_setzero_si256();
    TILE_BODY(R, DOT(s[r][0], v, b0) DOT(s[r][1], v, b1))
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
        acc[2 * r] = s[r][0];
        acc[2 * r + 1] = s[r][1];
    }
#else
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t from = 0; from < groups; from += flush) {
        const int64_t to = least(from + flush, groups);
        __m256i s[TILE][2];
        _Pragma("GCC unroll 6") for (int r = 0; r < R; r++)
            s[r][0] = s[r][1] = _mm256_setzero_si256();
        TILE_BODY(R, ADD_TO(s[r][0], "paddw", _mm256_maddubs_epi16(v, b0))
                         ADD_TO(s[r][1], "paddw", _mm256_maddubs_epi16(v, b1)))
        if (from == 0) {
            _Pragma("GCC unroll 12") for (int i = 0; i < 2 * R; i++)
                acc[i] = _mm256_madd_epi16(s[i / 2][i % 2], ones);
        } else {
            _Pragma("GCC unroll 12") for (int i = 0; i < 2 * R; i++)
                acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(s[i / 2][i % 2], ones));
        }
    }
#endif
}

static inline __attribute__((always_inline)) void tile_wide(
    const int R, const uint8_t *a, int64_t lda, const int8_t *b, int64_t groups, __m256i *acc) {
    const int64_t from = 0, to = groups;
    __m256i s[TILE][2];
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) s[r][0] = s[r][1] = _mm256_setzero_si256();
    TILE_BODY(R, ADD_TO(s[r][0], "paddd", _mm256_madd_epi16(v, b0))
                     ADD_TO(s[r][1], "paddd", _mm256_madd_epi16(v, b1)))
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
        acc[2 * r] = s[r][0];
        acc[2 * r + 1] = s[r][1];
    }
}
#define ROWS_OF_TILE(R)                                                                          \
    case R:                                                                                      \
        if (p->wide) tile_wide(R, a, lda, b, p->groups, sums);                                   \
        else tile_narrow(R, a, lda, b, p->groups, p->flush, sums);                               \
        break;
#endif

// Sums of up to TILE rows of `a` with a panel, `acc[row][column]`.
static void tile(const Product *p, int rows, const uint8_t *a, const int8_t *b, int32_t *acc) {
    const int64_t lda = p->groups * 4;
#ifdef __AVX2__
    __m256i *sums = (__m256i *)acc;
    switch (rows) {
        ROWS_OF_TILE(1) ROWS_OF_TILE(2) ROWS_OF_TILE(3)
        ROWS_OF_TILE(4) ROWS_OF_TILE(5) ROWS_OF_TILE(6)
    }
#else
    for (int r = 0; r < rows; r++) {
        for (int n = 0; n < PANEL; n++) acc[r * PANEL + n] = 0;
        for (int64_t g = 0; g < p->groups; g++)
            for (int n = 0; n < PANEL; n++) {
                int32_t sum = 0;
                if (p->wide) {
                    int16_t left[2], right[2];
                    memcpy(left, a + r * lda + g * 4, 4);
                    memcpy(right, b + g * 64 + n * 4, 4);
                    sum = left[0] * right[0] + left[1] * right[1];
                } else
                    for (int j = 0; j < 4; j++)
                        sum += a[r * lda + g * 4 + j] * b[g * 64 + n * 4 + j];
                acc[r * PANEL + n] += sum;
            }
    }
#endif
}

// Rescaled sums of a tile, rows of `y` `step` apart; two roundings, as torch's product and sum.
static inline __attribute__((always_inline)) void rescale_some(
    const Product *p, int64_t row, int rows, int64_t first, const int64_t n,
    const int32_t *restrict acc, float *restrict y, int64_t step) {
    const int32_t *restrict sums = p->sums + first;
    const float *restrict factor = p->factor + first, *restrict bias = p->bias + first;
    if (p->row_scale) {
        const float *restrict row_scale = p->row_scale + row;
        const int32_t *restrict row_zero = p->row_zero + row;
        for (int r = 0; r < rows; r++, acc += PANEL, y += step) {
            const int32_t zero = row_zero[r];
            const float scale = row_scale[r];
            __asm__ volatile("");  // columns, not rows, are vectorized
            for (int64_t i = 0; i < n; i++)
                y[i] = (float)(acc[i] - zero * sums[i]) * (scale * factor[i]);
        }
    } else if (p->bias) {
        for (int r = 0; r < rows; r++, acc += PANEL, y += step) {
            __asm__ volatile("");
            for (int64_t i = 0; i < n; i++) y[i] = (float)(acc[i] - sums[i]) * factor[i] + bias[i];
        }
    } else {
        for (int r = 0; r < rows; r++, acc += PANEL, y += step) {
            __asm__ volatile("");
            for (int64_t i = 0; i < n; i++) y[i] = (float)(acc[i] - sums[i]) * factor[i];
        }
    }
}

static void rescale(const Product *p, int64_t row, int rows, int64_t first, int64_t n,
                    const int32_t *acc, float *y, int64_t step) {
    if (n == PANEL) rescale_some(p, row, rows, first, PANEL, acc, y, step);
    else rescale_some(p, row, rows, first, n, acc, y, step);
}

// Rows [0, rows) of `a`, which are rows [first, first + rows) of the product, times some panels.
static void multiply(const Product *p, const uint8_t *a, int64_t first, int64_t rows,
                     int64_t from_panel, int64_t to_panel) {
    int32_t acc[TILE * PANEL] __attribute__((aligned(64)));
    float y[TILE * PANEL];
    for (int64_t panel = from_panel; panel < to_panel; panel++) {
        const int8_t *b = p->right + panel * p->groups * 64;
        const int64_t column = panel * PANEL, n = least(p->columns - column, PANEL);
        for (int64_t m = 0; m < rows; m += TILE) {
            const int count = (int)least(rows - m, TILE);
            const int64_t row = first + m;
            float *out = p->out + row * p->row_step + column * p->column_step;
            tile(p, count, a + m * p->groups * 4, b, acc);
            if (p->column_step == 1) {
                rescale(p, row, count, column, n, acc, out, p->row_step);
                continue;
            }
            rescale(p, row, count, column, n, acc, y, PANEL);
            for (int64_t i = 0; i < n; i++)
                for (int r = 0; r < count; r++)
                    out[i * p->column_step + r * p->row_step] = y[r * PANEL + i];
        }
    }
}

static int64_t panels_of(const Product *p) { return (p->columns + PANEL - 1) / PANEL; }

// Rows of the left matrix that stay in the cache together, a multiple of TILE: few if the right
// matrix stays there too, so that rows of the output do.
static int64_t rows_of_block(const Product *p) {
    const int64_t most = panels_of(p) * p->groups * 64 <= BLOCK ? 96 : BLOCK / TILE;
    const int64_t rows = least(BLOCK / (p->groups * 4), most) / TILE * TILE;
    return rows < TILE ? TILE : rows;
}

// Centred codes `codes[column][depth]` in panels, and their sums times `zero[depth]`.
void gplq_integer_arrange(const float *codes, const float *zero, int64_t columns, int64_t depth,
                          int64_t wide, int8_t *right, int32_t *sums) {
    const int64_t per = wide ? 2 : 4, groups = (depth + per - 1) / per;
    memset(right, 0, (columns + PANEL - 1) / PANEL * groups * 64);
    for (int64_t n = 0; n < columns; n++) {
        int8_t *b = right + n / PANEL * groups * 64 + n % PANEL * 4;
        int64_t sum = 0;
        for (int64_t k = 0; k < depth; k++) {
            const int32_t code = (int32_t)codes[n * depth + k];
            int8_t *to = b + k / per * 64;
            if (wide) ((int16_t *)to)[k % 2] = (int16_t)code;
            else to[k % 4] = (int8_t)code;
            sum += (int64_t)zero[k] * code;
        }
        sums[n] = (int32_t)sum;
    }
}

// x: (rows, depth), dense. Returns 1 if a value was NaN: the output is then undefined.
int gplq_integer_linear(const Grid *g, const Product *p, const float *x, int64_t depth,
                        uint8_t *left, int64_t threads) {
    const int64_t lda = p->groups * 4, panels = panels_of(p);
    const int64_t share = (p->rows + threads - 1) / threads;
    const int64_t block = least(rows_of_block(p), share / TILE * TILE + TILE);
    const int64_t blocks = (p->rows + block - 1) / block;
    const int64_t parts = blocks >= threads ? 1 : least(threads, panels);
    int bad = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : bad)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p->rows; m++)
            bad |= quantize_row(g, x + m * depth, depth, p->wide, p->groups, left + m * lda);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < blocks * parts; t++) {
            const int64_t m = t / parts * block, part = t % parts;
            multiply(p, left + m * lda, m, least(block, p->rows - m), part * panels / parts,
                     (part + 1) * panels / parts);
        }
    }
    return bad;
}

// One row of pixels, (channels, width) with a stride of `plane`, as raw codes [width][channels].
static int quantize_pixels(const Grid *g, const float *x, int64_t plane, int64_t channels,
                           int64_t width, int64_t wide, uint8_t *scratch, uint8_t *out) {
    int bad = 0;
    for (int64_t from = 0; from < channels; from += PANEL) {
        const int64_t count = least(channels - from, PANEL);
        for (int64_t c = 0; c < count; c++) {
            const float *scale = g->scale + (from + c) * g->step;
            const float *zero = g->zero + (from + c) * g->step, *line = x + (from + c) * plane;
            if (wide)
                bad |= quantize_wide(line, width, scale, zero, 0, g->qmin, g->qmax, &g->qmin, 0,
                                     (int16_t *)scratch + c * width);
            else
                bad |= quantize_unsigned(line, width, scale, zero, 0, g->qmin, g->qmax,
                                         &g->qmin, 0, scratch + c * width);
        }
        for (int64_t i = 0; i < width; i++)
            for (int64_t c = 0; c < count; c++) {
                const int64_t to = i * channels + from + c;
                if (wide) ((int16_t *)out)[to] = ((int16_t *)scratch)[c * width + i];
                else out[to] = scratch[c * width + i];
            }
    }
    return bad;
}

// x: (batch, channels, height, width), dense; map: raw codes [batch][padded height][padded width]
// [channels], a whole pixel of zeros at its end given as `pixel`. Returns 1 for NaN.
int gplq_integer_conv(const Grid *g, const Window *w, const Product *p, const float *x,
                      const uint8_t *pixel, uint8_t *map, int64_t threads) {
    const int64_t size = p->wide ? 2 : 1, bytes = w->channels * size;
    const int64_t line = w->padded_width * bytes, lda = p->groups * 4, panels = panels_of(p);
    const int64_t outputs = w->out_height * w->out_width, block = least(rows_of_block(p), 96);
    const int64_t blocks = (outputs + block - 1) / block;
    const int64_t depth = w->kernel_y * w->kernel_x * bytes;
    int bad = 0, failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : bad, failed)
    {
        uint8_t *rows = malloc(block * lda), *scratch = malloc(PANEL * w->width * size);
        failed |= !rows || !scratch;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < w->batch * w->padded_height; t++) {
            const int64_t image = t / w->padded_height, y = t % w->padded_height - w->top;
            uint8_t *out = map + t * line;
            const int inside = y >= 0 && y < w->height;
            for (int64_t i = 0; i < w->padded_width; i++)
                if (!inside || i < w->left || i >= w->left + w->width)
                    memcpy(out + i * bytes, pixel, bytes);
            if (inside && scratch)
                bad |= quantize_pixels(
                    g, x + image * w->channels * w->height * w->width + y * w->width,
                    w->height * w->width, w->channels, w->width, p->wide, scratch,
                    out + w->left * bytes);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < w->batch * blocks; t++) {
            const int64_t image = t / blocks, first = t % blocks * block;
            const int64_t count = least(block, outputs - first);
            if (!rows) continue;
            for (int64_t m = 0; m < count; m++) {
                const int64_t oy = (first + m) / w->out_width, ox = (first + m) % w->out_width;
                const uint8_t *from = map + (image * w->padded_height + oy * w->stride_y) * line +
                                      ox * w->stride_x * bytes;
                uint8_t *to = rows + m * lda;
                for (int64_t ky = 0; ky < w->kernel_y; ky++, from += w->dilation_y * line)
                    if (w->dilation_x == 1) {
                        memcpy(to, from, w->kernel_x * bytes);
                        to += w->kernel_x * bytes;
                    } else {
                        for (int64_t kx = 0; kx < w->kernel_x; kx++, to += bytes)
                            memcpy(to, from + kx * w->dilation_x * bytes, bytes);
                    }
                memset(to, 0, lda - depth);
            }
            Product of_image = *p;
            of_image.out = p->out + image * p->columns * outputs;
            multiply(&of_image, rows, first, count, 0, panels);
        }
        free(rows);
        free(scratch);
    }
    return failed ? 2 : bad;
}

static const float *of_batch(const Side *s, int64_t inner, int64_t batch) {
    return s->x + batch / inner * s->outer + batch % inner * s->inner;
}

// Scale and zero point of a vector from its smallest and largest value, 0 included; as in
// quantizers/row_range.py.
static inline void follow_range(const Side *s, float low, float high, float *scale, float *zero) {
    float extent = high - low, middle = (high + low) * 0.5f;
    if (s->extent == FROM_ZERO) extent = high;
    if (s->extent == SYMMETRIC) extent = high > -low ? high : -low;
    extent = s->share * extent;
    extent = extent < SMALLEST_SCALE ? SMALLEST_SCALE : extent;
    *scale = extent;
    *zero = 0.0f;
    if (s->extent == ASYMMETRIC) {
        float code = rintf((s->qmin + s->qmax) * 0.5f - middle / extent);
        code = code < s->qmin ? s->qmin : code;
        *zero = code > s->qmax ? s->qmax : code;
    }
}

static float largest_of(Eight x) {
    float most = x[0];
    for (int j = 1; j < 8; j++) most = x[j] > most ? x[j] : most;
    return most;
}

// Smallest and largest of n dense values and 0; a NaN is found by the quantization.
static void range_of(const float *restrict x, int64_t n, float *low, float *high) {
    Eight least8 = {0}, most8 = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const Eight v = *(const EightAnywhere *)(x + i);
        least8 = LEAST(v, least8);
        most8 = MOST(v, most8);
    }
    float l = 0.0f, h = 0.0f;
    for (int j = 0; j < 8; j++) {
        l = least8[j] < l ? least8[j] : l;
        h = most8[j] > h ? most8[j] : h;
    }
    for (; i < n; i++) {
        l = x[i] < l ? x[i] : l;
        h = x[i] > h ? x[i] : h;
    }
    *low = l, *high = h;
}

// Scales and zero points of all columns of the right matrix of one batch.
static void scales_of_columns(const Operands *o, const float *x, int64_t batch, int64_t columns,
                              float *scale, float *zero) {
    const Side *s = &o->rhs;
    if (s->extent == GIVEN) {
        const float *scales = s->scale + batch * s->scale_batch;
        const float *zeros = s->zero + batch * s->zero_batch;
        for (int64_t n = 0; n < columns; n++) {
            scale[n] = scales[n * s->scale_step];
            zero[n] = zeros[n * s->zero_step];
        }
    } else if (s->row == 1) {
        for (int64_t n = 0; n < columns; n++) {
            float low, high;
            range_of(x + n * s->column, o->depth, &low, &high);
            follow_range(s, low, high, scale + n, zero + n);
        }
    } else {
        float *restrict low = scale, *restrict high = zero;
        int64_t n = 0;
        for (; n + 8 <= columns; n += 8) {
            Eight least8 = {0}, most8 = {0};
            for (int64_t k = 0; k < o->depth; k++) {
                const Eight v = *(const EightAnywhere *)(x + k * s->row + n);
                least8 = LEAST(v, least8);
                most8 = MOST(v, most8);
            }
            *(EightAnywhere *)(low + n) = least8;
            *(EightAnywhere *)(high + n) = most8;
        }
        for (; n < columns; n++) {
            low[n] = high[n] = 0.0f;
            for (int64_t k = 0; k < o->depth; k++) {
                const float v = x[k * s->row + n];
                low[n] = v < low[n] ? v : low[n];
                high[n] = v > high[n] ? v : high[n];
            }
        }
        for (int64_t n = 0; n < columns; n++)
            follow_range(s, low[n], high[n], scale + n, zero + n);
    }
}

// Centred codes of the right matrix of one batch in panels, and their sums.
#define ARRANGE_RIGHT(name, quantize, type, per, join)                                           \
    static int name(const Operands *o, const Product *p, const float *x, const float *scale,     \
                    const float *zero, type *scratch, int8_t *right, int32_t *restrict sums) {   \
        const Side *s = &o->rhs;                                                                 \
        const int64_t columns = p->columns, panel = p->groups * 64, depth = o->depth;            \
        int bad = 0;                                                                             \
        if (s->row == 1) { /* each column is dense */                                            \
            for (int64_t k = depth; k < p->groups * per; k++) scratch[k] = 0;                    \
            for (int64_t n = 0; n < columns; n++) {                                              \
                bad |= quantize(x + n * s->column, depth, scale + n, zero + n, 0, s->qmin,       \
                                s->qmax, zero + n, 0, scratch);                                  \
                int32_t sum = 0;                                                                 \
                for (int64_t k = 0; k < depth; k++) sum += scratch[k];                           \
                sums[n] = sum;                                                                   \
                int8_t *to = right + n / PANEL * panel + n % PANEL * 4;                          \
                for (int64_t g = 0; g < p->groups; g++)                                          \
                    memcpy(to + g * 64, scratch + g * per, 4);                                   \
            }                                                                                    \
            return bad;                                                                          \
        }                                                                                        \
        const int64_t step = s->extent != GIVEN || s->scale_step || s->zero_step;                \
        memset(sums, 0, columns * sizeof(int32_t));                                              \
        for (int64_t g = 0; g < p->groups; g++) { /* each row is dense */                        \
            for (int64_t j = 0; j < per; j++) {                                                  \
                type *restrict line = scratch + j * columns;                                     \
                const int64_t k = g * per + j;                                                   \
                if (k < depth)                                                                   \
                    bad |= quantize(x + k * s->row, columns, scale, zero, step, s->qmin, s->qmax,\
                                    zero, step, line);                                           \
                else                                                                             \
                    memset(line, 0, columns * sizeof(type));                                     \
                for (int64_t n = 0; n < columns; n++) sums[n] += line[n];                        \
            }                                                                                    \
            for (int64_t n = 0; n < columns; n += PANEL) {                                       \
                uint32_t *restrict to = (uint32_t *)(right + n / PANEL * panel + g * 64);        \
                const type *restrict line = scratch + n;                                         \
                const int64_t count = least(columns - n, PANEL);                                 \
                for (int64_t i = 0; i < count; i++) to[i] = join;                                \
            }                                                                                    \
        }                                                                                        \
        return bad;                                                                              \
    }
#define BYTE(j) ((uint32_t)(uint8_t)line[(j) * columns + i] << (8 * (j)))
#define HALF(j) ((uint32_t)(uint16_t)line[(j) * columns + i] << (16 * (j)))
ARRANGE_RIGHT(arrange_narrow, quantize_signed, int8_t, 4, BYTE(0) | BYTE(1) | BYTE(2) | BYTE(3))
ARRANGE_RIGHT(arrange_wide, quantize_wide, int16_t, 2, HALF(0) | HALF(1))

// Memory of one thread for the operands of a product; NULL where there is none.
typedef struct {
    uint8_t *left;                   // codes of a block of rows
    int8_t *right, *scratch;
    int32_t *sums, *row_zero;        // per column, per row of the block
    float *factor, *zero, *row_scale;
} Buffers;

static int allocate(Buffers *b, const Operands *o, const Product *p, int64_t block) {
    const int64_t line = o->depth > p->columns * 4 ? o->depth : p->columns * 4;
    b->left = malloc(block * p->groups * 4 + 1);
    b->right = calloc(panels_of(p) * p->groups * 64 + 1, 1);
    b->scratch = malloc(line * 2 + 8);
    b->sums = malloc(p->columns * sizeof(int32_t) + 1);
    b->row_zero = malloc(block * sizeof(int32_t) + 1);
    b->factor = malloc(p->columns * sizeof(float) + 1);
    b->zero = malloc(p->columns * sizeof(float) + 1);
    b->row_scale = malloc(block * sizeof(float) + 1);
    return b->left && b->right && b->scratch && b->sums && b->row_zero && b->factor && b->zero &&
           b->row_scale;
}

static void release(Buffers *b) {
    free(b->left), free(b->right), free(b->scratch), free(b->sums);
    free(b->row_zero), free(b->factor), free(b->zero), free(b->row_scale);
}

// Codes of the right matrix of one batch, and the product that multiplies a block of rows by them
// into `out`. Returns 1 for NaN.
static int take_right(const Operands *o, const Product *p, Buffers *b, int64_t batch, float *out,
                      Product *own) {
    const float *y = of_batch(&o->rhs, o->inner, batch);
    scales_of_columns(o, y, batch, p->columns, b->factor, b->zero);
    *own = *p;
    own->right = b->right, own->sums = b->sums, own->factor = b->factor, own->bias = 0;
    own->row_zero = b->row_zero, own->row_scale = b->row_scale, own->out = out;
    return p->wide ? arrange_wide(o, p, y, b->factor, b->zero, (int16_t *)b->scratch, b->right,
                                  b->sums)
                   : arrange_narrow(o, p, y, b->factor, b->zero, b->scratch, b->right, b->sums);
}

// Codes of a row of the left matrix of one batch, as row `r` of the block. `largest` is the
// row's largest value if all are positive, else negative. Returns 1 for NaN.
static int take_left(const Operands *o, const Product *p, Buffers *b, const Tree *tree,
                     int64_t batch, int64_t row, const float *values, int64_t r, float largest) {
    const Side *l = &o->lhs;
    float scale, zero;
    if (l->extent != GIVEN && largest >= 0) {
        follow_range(l, 0, largest, &scale, &zero);
    } else if (l->extent == GIVEN) {
        scale = l->scale[batch * l->scale_batch + row * l->scale_step];
        zero = l->zero[batch * l->zero_batch + row * l->zero_step];
    } else {
        float low, high;
        range_of(values, o->depth, &low, &high);
        follow_range(l, low, high, &scale, &zero);
    }
    const Grid g = {&scale, &zero, 0, l->qmin, l->qmax, l->levels, l->thresholds, l->num_levels,
                    tree};
    b->row_scale[r] = scale;
    b->row_zero[r] = l->num_levels ? 0 : (int32_t)(zero - l->qmin);
    return quantize_row(&g, values, o->depth, p->wide, p->groups, b->left + r * p->groups * 4);
}

// p->out: (outer * inner, rows, columns), dense. Returns 1 for NaN.
int gplq_integer_matmul(const Operands *o, const Product *p, int64_t threads) {
    const int64_t block = least(rows_of_block(p), p->rows);
    const Tree tree = tree_of(o->lhs.levels, o->lhs.thresholds, o->lhs.num_levels);
    int bad = 0, failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : bad, failed)
    {
        Buffers b;
        const int has_memory = allocate(&b, o, p, block);
        failed |= !has_memory;
#pragma omp for schedule(static)
        for (int64_t batch = 0; batch < o->outer * o->inner; batch++) {
            if (!has_memory) continue;
            const float *x = of_batch(&o->lhs, o->inner, batch);
            float *out = p->out + batch * p->rows * p->columns;
            Product own;
            bad |= take_right(o, p, &b, batch, out, &own);
            for (int64_t m = 0; m < p->rows; m += block, own.out += block * p->row_step) {
                const int64_t count = least(block, p->rows - m);
                for (int64_t r = 0; r < count; r++)
                    bad |= take_left(o, p, &b, &tree, batch, m + r, x + (m + r) * o->lhs.row, r,
                                     -1);
                multiply(&own, b.left, 0, count, 0, panels_of(p));
            }
        }
        release(&b);
    }
    return failed ? 2 : bad;
}

// Exponentials of a row minus its maximum, and the reciprocal of their sum: as torch's softmax,
// which works in vectors of `lanes` floats. The row has room for a multiple of 8. `largest` is
// the largest exponential.
static float exponentials(const Softmax *s, float *x, int64_t n, float *largest) {
    Eight most8 = {0};
    most8 -= INFINITY;
    for (int64_t i = n; i % 8; i++) x[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += 8) most8 = MOST(*(Eight *)(x + i), most8);
    const float most = largest_of(most8);
    for (int64_t i = 0; i < n; i += 8) {
        Eight *at = (Eight *)(x + i);
        *at = s->exponential(*at - most);
    }
    Eight largest8 = {0};
    for (int64_t i = 0; i < n; i += 8) largest8 = MOST(*(Eight *)(x + i), largest8);
    *largest = largest_of(largest8);
    if (n < s->lanes) {
        float sum = x[0];
        for (int64_t i = 1; i < n; i++) sum += x[i];
        return 1.0f / sum;
    }
    Eight sums8[LANES / 8] = {*(Eight *)x, *(Eight *)(x + 8 % s->lanes)};
    const int64_t whole = n / s->lanes * s->lanes;
    if (s->lanes == 8)
        for (int64_t i = 8; i < whole; i += 8) sums8[0] += *(Eight *)(x + i);
    else
        for (int64_t i = LANES; i < whole; i += LANES)
            for (int j = 0; j < LANES / 8; j++) sums8[j] += *(Eight *)(x + i + 8 * j);
    float sums[LANES];
    memcpy(sums, sums8, sizeof sums);
    for (int64_t i = whole; i < n; i++) sums[i - whole] += x[i];
    for (int64_t half = s->lanes / 2; half; half /= 2)
        for (int64_t j = 0; j < half; j++) sums[j] += sums[j + half];
    return 1.0f / sums[0];
}

// In place; returns the largest probability.
static float softmax_row(const Softmax *s, float *x, int64_t n) {
    float largest;
    const float factor = exponentials(s, x, n, &largest);
    for (int64_t i = 0; i < n; i += 8) *(Eight *)(x + i) *= factor;
    return largest * factor;
}

// x: (rows, step), n values each and room for a multiple of 8; in place.
void gplq_integer_softmax(const Softmax *s, float *x, int64_t rows, int64_t n, int64_t step) {
    for (int64_t r = 0; r < rows; r++) softmax_row(s, x + r * step, n);
}

// Logits of one row, changed by the terms in their order.
static void adjust_row(const Softmax *s, int64_t outer, int64_t inner, int64_t row, float *x,
                       int64_t n) {
    for (const Term *t = s->terms; t < s->terms + s->count; t++) {
        const float *y = t->x + outer % t->period * t->outer + inner * t->inner + row * t->row;
        for (float *part = x; part < x + n; part += t->width, y += t->column_outer) {
            const float first = *y;
            if (t->multiplies)
                for (int64_t i = 0; i < t->width; i++) part[i] *= y[i * t->column];
            else if (t->column == 1)
                for (int64_t i = 0; i < t->width; i++) part[i] += y[i];
            else if (t->column == 0)
                for (int64_t i = 0; i < t->width; i++) part[i] += first;
            else
                for (int64_t i = 0; i < t->width; i++) part[i] += y[i * t->column];
        }
    }
}

// softmax(terms(q factor k)) v: `qk` of q and k gives logits, `pv` takes its left operand from here.
// The scale of q's codes is multiplied by `scale_factor`.
// output->out: (outer, rows, inner, columns), dense. Returns 1 for NaN.
int gplq_integer_attention(const Operands *qk, const Product *logits, const Operands *pv,
                           const Product *output, const Softmax *s, float factor,
                           float scale_factor, int64_t threads) {
    const int64_t rows = logits->rows, n = logits->columns, step = (n + 7) / 8 * 8;
    const int64_t block = least(ROWS_OF_LOGITS, rows), inner = qk->inner;
    const Tree of_q = tree_of(qk->lhs.levels, qk->lhs.thresholds, qk->lhs.num_levels);
    const Tree of_p = tree_of(pv->lhs.levels, pv->lhs.thresholds, pv->lhs.num_levels);
    int bad = 0, failed = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : bad, failed)
    {
        Buffers first, second;
        float *x = aligned_alloc(64, (block * step * sizeof(float) + 63) / 64 * 64);
        float *scaled = malloc(qk->depth * sizeof(float) + 1);
        const int has_first = allocate(&first, qk, logits, block);
        const int has_memory = allocate(&second, pv, output, block) && has_first && x && scaled;
        failed |= !has_memory;
#pragma omp for schedule(static)
        for (int64_t batch = 0; batch < qk->outer * inner; batch++) {
            if (!has_memory) continue;
            const int64_t outer = batch / inner, head = batch % inner;
            const float *q = of_batch(&qk->lhs, inner, batch);
            float *out = output->out + outer * rows * output->row_step + head * output->columns;
            Product to_logits, to_output;
            bad |= take_right(qk, logits, &first, batch, x, &to_logits);
            bad |= take_right(pv, output, &second, batch, out, &to_output);
            to_logits.row_step = step;
            for (int64_t m = 0; m < rows; m += block, to_output.out += block * output->row_step) {
                const int64_t count = least(block, rows - m);
                for (int64_t r = 0; r < count; r++) {
                    const float *values = q + (m + r) * qk->lhs.row;
                    for (int64_t i = 0; i < qk->depth; i++) scaled[i] = values[i] * factor;
                    bad |= take_left(qk, logits, &first, &of_q, batch, m + r, scaled, r, -1);
                    first.row_scale[r] *= scale_factor;
                }
                multiply(&to_logits, first.left, 0, count, 0, panels_of(logits));
                for (int64_t r = 0; r < count; r++) {
                    adjust_row(s, outer, head, m + r, x + r * step, n);
                    const float largest = softmax_row(s, x + r * step, n);
                    bad |= take_left(pv, output, &second, &of_p, batch, m + r, x + r * step, r,
                                     largest);
                }
                multiply(&to_output, second.left, 0, count, 0, panels_of(output));
            }
        }
        release(&first), release(&second), free(x), free(scaled);
    }
    return failed ? 2 : bad;
}
