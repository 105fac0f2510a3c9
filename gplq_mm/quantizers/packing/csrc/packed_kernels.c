// Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
// The passes of torch_passes.py in one sweep each, for float32 on a CPU. Compiled at run time by
// cpu_kernels.py with contraction off: every result equals torch's to the last bit.
//
// A tensor lies in memory as (G, A, C, I); its scale has G * C entries. G > 1 only where I is 1.

#include <math.h>
#include <stdint.h>

#define BLOCK 4096
#define ROWS 64
typedef struct {
    const float *scale, *zero_point;
    int64_t groups, outer, channels, inner;
    float qmin, qmax, offset;  // offset: added to a code so that it fits its signed bits
    float slack, upper;        // slack: widens the range of the gradient; upper: that of levels
    const float *levels, *thresholds;  // of a logarithmic code
    int num_levels;                    // 0 for uniform codes
    int narrow, threads;               // narrow: code and field share a byte
} Grid;

typedef struct { float qmin, qmax, offset, slack; } Range;

static inline float centred_code(float ratio, float z, Range r) {
    float code = rintf(ratio) + z;  // a NaN passes both comparisons
    code = code < r.qmin ? r.qmin : code;
    code = code > r.qmax ? r.qmax : code;
    return code - z;
}

static inline float field_of(float ratio, float z, Range r) {
    float field = rintf((ratio - rintf(ratio)) * 15.0f);
    field = field < -7.0f ? -7.0f : field;
    field = field > 7.0f ? 7.0f : field;
    return (ratio > r.qmin - z - r.slack) & (ratio < r.qmax - z + r.slack) ? field + 8.0f : 0.0f;
}

#define PACK_ONE(x, s, z, value, store)                                                          \
    {                                                                                            \
        const float ratio = (x) / (s);                                                           \
        const float centred = centred_code(ratio, z, r) + (ratio - ratio); /* inf: NaN */        \
        const float field = field_of(ratio, z, r), code = centred + (z) + r.offset;              \
        value = centred * (s);                                                                   \
        store                                                                                    \
    }
#define STORE_BYTE codes[i] = (int8_t)(int32_t)(code * 16.0f + field);
#define STORE_BOTH codes[i] = (int8_t)(int32_t)code; fields[i] = (int8_t)(int32_t)field;

// One block of n elements; step 1 if each has its own scale, 0 if all share one.
static void pack_block(int64_t n, const float *restrict x, const float *restrict scale,
                       const float *restrict zero, int step, Range r, float *restrict values,
                       int8_t *restrict codes, int8_t *restrict fields) {
    const float s = *scale, z = *zero;
    if (!step && !fields)
        for (int64_t i = 0; i < n; i++) PACK_ONE(x[i], s, z, values[i], STORE_BYTE)
    else if (!step)
        for (int64_t i = 0; i < n; i++) PACK_ONE(x[i], s, z, values[i], STORE_BOTH)
    else if (!fields)
        for (int64_t i = 0; i < n; i++) PACK_ONE(x[i], scale[i], zero[i], values[i], STORE_BYTE)
    else
        for (int64_t i = 0; i < n; i++) PACK_ONE(x[i], scale[i], zero[i], values[i], STORE_BOTH)
}

// Run `body` for each block of elements of one channel (inner > 1) or across channels (inner = 1).
#define FOR_BLOCKS(g, body)                                                                      \
    if ((g)->inner == 1) {                                                                       \
        _Pragma("omp parallel for num_threads((g)->threads)")                                    \
        for (int64_t a = 0; a < (g)->groups * (g)->outer; a++) {                                 \
            const int64_t begin = a * (g)->channels, end = begin + (g)->channels, step = 1;      \
            const int64_t first = a / (g)->outer * (g)->channels;                                \
            body                                                                                 \
        }                                                                                        \
    } else {                                                                                     \
        const int64_t pieces = ((g)->inner + BLOCK - 1) / BLOCK;                                 \
        const int64_t blocks = (g)->outer * (g)->channels * pieces;                              \
        _Pragma("omp parallel for num_threads((g)->threads)")                                    \
        for (int64_t b = 0; b < blocks; b++) {                                                   \
            const int64_t run = b / pieces, first = run % (g)->channels, step = 0;               \
            const int64_t begin = run * (g)->inner + (b % pieces) * BLOCK;                       \
            const int64_t rest = (run + 1) * (g)->inner - begin;                                 \
            const int64_t end = begin + (rest < BLOCK ? rest : BLOCK);                           \
            body                                                                                 \
        }                                                                                        \
    }

// `statement` for every element i of a block, with its scale s and zero point z.
#define FOR_ELEMENTS(g, statement)                                                               \
    if (step) {                                                                                  \
        for (int64_t i = begin; i < end; i++) {                                                  \
            const int64_t c = first + i - begin;                                                 \
            const float s = (g)->scale[c], z = (g)->zero_point[c];                               \
            statement                                                                            \
        }                                                                                        \
    } else {                                                                                     \
        const float s = (g)->scale[first], z = (g)->zero_point[first];                           \
        for (int64_t i = begin; i < end; i++) { statement }                                      \
    }

void gplq_pack(const Grid *g, const float *x, float *values, int8_t *codes, int8_t *fields) {
    const Range r = {g->qmin, g->qmax, g->offset, g->slack};
    FOR_BLOCKS(g, pack_block(end - begin, x + begin, g->scale + first, g->zero_point + first, step, r,
                             values + begin, codes + begin, fields ? fields + begin : 0);)
}

// Levels of n ratios x / s: the largest level whose threshold lies below.
static void levels_of(const Grid *g, int64_t n, const float *restrict x,
                      const float *restrict scale, int step, float *restrict ratio,
                      float *restrict level) {
    const float s = *scale;
    if (step)
        for (int64_t i = 0; i < n; i++) ratio[i] = x[i] / scale[i];
    else
        for (int64_t i = 0; i < n; i++) ratio[i] = x[i] / s;
    for (int64_t i = 0; i < n; i++) level[i] = 0.0f;
    for (int j = 1; j < g->num_levels; j++) {
        const float from = g->thresholds[j], value = g->levels[j];
        for (int64_t i = 0; i < n; i++) level[i] = ratio[i] > from ? value : level[i];
    }
    for (int64_t i = 0; i < n; i++) level[i] += ratio[i] - ratio[i];  // NaN stays NaN
}

// Levels times scale, of any number of elements; step as in pack_block.
static void quantize_levels(const Grid *g, int64_t n, const float *restrict x,
                            const float *restrict scale, int step, float *restrict values) {
    float ratio[BLOCK];
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t m = n - from < BLOCK ? n - from : BLOCK;
        const float *restrict s = step ? scale + from : scale;
        float *restrict y = values + from;
        levels_of(g, m, x + from, s, step, ratio, y);
        for (int64_t i = 0; i < m; i++) y[i] *= s[step ? i : 0];
    }
}

void gplq_quantize(const Grid *g, const float *restrict x, float *restrict values) {
    if (g->num_levels) {
        FOR_BLOCKS(g, quantize_levels(g, end - begin, x + begin, g->scale + first, step,
                                      values + begin);)
        return;
    }
    const Range r = {g->qmin, g->qmax, g->offset, g->slack};
    FOR_BLOCKS(g, FOR_ELEMENTS(g, values[i] = centred_code(x[i] / s, z, r) * s;))
}

void gplq_unpack(const Grid *g, const int8_t *restrict codes, float *restrict values) {
    const float offset = g->offset;
    if (g->narrow) {
        FOR_BLOCKS(g, FOR_ELEMENTS(g, values[i] = ((float)(codes[i] >> 4) - (offset + z)) * s;))
    } else {
        FOR_BLOCKS(g, FOR_ELEMENTS(g, values[i] = ((float)codes[i] - (offset + z)) * s;))
    }
}

static inline float share(float grad, float field, float centred, float *grad_x) {
    const int inside = field != 0.0f;
    *grad_x = inside ? grad : 0.0f;
    return grad * (inside ? (8.0f - field) * (1.0f / 15.0f) : centred);
}

// grad becomes the input's gradient; sums gets the scale's in parts, (outer, channels, pieces) or,
// where inner is 1, (groups, blocks of ROWS rows, channels).
void gplq_backward(const Grid *g, const int8_t *restrict codes, const int8_t *restrict fields,
                   float *restrict grad, double *restrict sums) {
    const float offset = g->offset;
    const int narrow = g->narrow;
    if (g->inner == 1) {
        const int64_t C = g->channels, blocks = (g->outer + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(g->threads)
        for (int64_t b = 0; b < g->groups * blocks; b++) {
            const int64_t group = b / blocks, start = group * g->outer + b % blocks * ROWS;
            const int64_t stop = (group + 1) * g->outer;
            const int64_t last = start + ROWS < stop ? start + ROWS : stop;
            for (int64_t from = 0; from < C; from += BLOCK) {
                const int64_t n = C - from < BLOCK ? C - from : BLOCK;
                const float *restrict zero = g->zero_point + group * C + from;
                float total[BLOCK];
                for (int64_t c = 0; c < n; c++) total[c] = 0;
                for (int64_t a = start; a < last; a++) {
                    float *restrict d = grad + a * C + from;
                    const int8_t *restrict q = codes + a * C + from;
                    const int8_t *restrict f = fields ? fields + a * C + from : q;
                    if (narrow)
                        for (int64_t c = 0; c < n; c++)
                            total[c] += share(d[c], q[c] & 15, (q[c] >> 4) - (offset + zero[c]), d + c);
                    else
                        for (int64_t c = 0; c < n; c++)
                            total[c] += share(d[c], f[c], q[c] - (offset + zero[c]), d + c);
                }
                for (int64_t c = 0; c < n; c++) sums[b * C + from + c] = total[c];
            }
        }
        return;
    }
    const int64_t pieces = (g->inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(g->threads)
    for (int64_t b = 0; b < g->outer * g->channels * pieces; b++) {
        const int64_t run = b / pieces, begin = run * g->inner + (b % pieces) * BLOCK;
        const int64_t rest = (run + 1) * g->inner - begin, n = rest < BLOCK ? rest : BLOCK;
        const float shift = offset + g->zero_point[run % g->channels];
        float sum = 0;
        if (narrow) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < begin + n; i++)
                sum += share(grad[i], codes[i] & 15, (codes[i] >> 4) - shift, grad + i);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < begin + n; i++)
                sum += share(grad[i], fields[i], codes[i] - shift, grad + i);
        }
        sums[b] = sum;
    }
}

static inline float row_backward(int64_t n, const float *restrict x, float *restrict d, float s,
                                 float z, Range r, float *inner_sum) {
    const float low = r.qmin - z - r.slack, high = r.qmax - z + r.slack;
    float sum = 0, inner = 0;
#pragma omp simd reduction(+ : sum, inner)
    for (int64_t i = 0; i < n; i++) {
        const float ratio = x[i] / s, code = centred_code(ratio, z, r);
        const int inside = (ratio > low) & (ratio < high);
        sum += d[i] * (code - (inside ? ratio : 0.0f));
        d[i] = inside ? d[i] : 0.0f;
        inner += d[i] * x[i];
    }
    *inner_sum += inner;
    return sum;
}

static inline float levels_backward(const Grid *g, int64_t n, const float *restrict x,
                                    float *restrict d, float s, float *inner_sum) {
    float ratio[BLOCK], level[BLOCK], sum = 0, inner = 0;
    levels_of(g, n, x, &s, 0, ratio, level);
#pragma omp simd reduction(+ : sum, inner)
    for (int64_t i = 0; i < n; i++) {
        const int inside = ratio[i] < g->upper;
        sum += d[i] * (level[i] - (inside ? ratio[i] : 0.0f));
        d[i] = inside ? d[i] : 0.0f;
        inner += d[i] * x[i];
    }
    *inner_sum += inner;
    return sum;
}

// LSQ and softmax backward of probabilities p, (A, C, I) with rows of `width`: grad of the
// quantized probabilities becomes that of the logits; sums gets the scale's for each row.
void gplq_softmax_backward(const Grid *g, const float *p, float *grad, int64_t width,
                           double *sums) {
    const int64_t rows = g->inner / width;
    const Range r = {g->qmin, g->qmax, g->offset, g->slack};
#pragma omp parallel for num_threads(g->threads)
    for (int64_t row = 0; row < g->outer * g->channels * rows; row++) {
        const int64_t c = (row / rows) % g->channels;
        const float s = g->scale[c], z = g->zero_point[c];
        const float *restrict x = p + row * width;
        float *restrict d = grad + row * width;
        double total = 0;
        float inner = 0;
        if (g->num_levels)
            for (int64_t i = 0; i < width; i += BLOCK)
                total += levels_backward(g, width - i < BLOCK ? width - i : BLOCK, x + i, d + i, s, &inner);
        else
            total = row_backward(width, x, d, s, z, r, &inner);
        for (int64_t i = 0; i < width; i++) d[i] = x[i] * (d[i] - inner);
        sums[row] = total;
    }
}
