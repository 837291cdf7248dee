/* Loops for which torch has no single operation. Plain C, no torch headers; kernels.py says what each function does.
 *
 * Threads are torch's: OpenMP's functions are undefined symbols here, which resolve to the runtime that torch has
 * loaded (a second runtime would compete with it for the cores). Numbers are read once, computed in fp32 and rounded
 * once, unless torch rounds more often and the bits have to be equal.
 *
 * bf16 in an argument list: 1 where the tensors are bf16, 0 where they are fp32. threads: how many to use.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__clang__) || !defined(__GNUC__) || (defined(__x86_64__) && __GNUC__ < 12)
#error "needs GCC, on x86-64 version 12 or newer (x86-64-v4 in target_clones)"
#elif __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "made for little-endian machines"
#elif defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#define LANES 16          /* fp32 numbers in a vector */
#define STRIP (2 * LANES) /* keys, dimensions or columns that are summed at once */
#define PART 4096         /* elements in a thread's turn */

/* CRC-32 of this file when it was compiled. kernels.py uses the library only if the file beside it has that CRC. */
uint32_t edgezo_source(void) { return EDGEZO_SOURCE; }

/* ------------------------------------------------------------------------------------------ numbers */

/* bf16 to fp32, which is exact. */
INLINE float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* fp32 to the nearest bf16, ties to even, as torch rounds. */
INLINE uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* Element i of x. */
INLINE float get(const void *x, int64_t i, int bf16) {
    return bf16 ? wide(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

/* Element i of x becomes value. */
INLINE void put(void *x, int64_t i, float value, int bf16) {
    if (bf16)
        ((uint16_t *)x)[i] = narrow(value);
    else
        ((float *)x)[i] = value;
}

/* Where element i of x lies. */
INLINE const void *from(const void *x, int64_t i, int bf16) { return (const char *)x + i * (bf16 ? 2 : 4); }

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

INLINE vec load(const float *x) { return *(const vec *)x; }

INLINE vec get_vec(const void *x, int64_t i, int bf16) {
    if (bf16)
        return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)x + i), words) << 16);
    return load((const float *)x + i);
}

INLINE void put_vec(void *x, int64_t i, vec value, int bf16) {
    if (!bf16) {
        *(vec *)((float *)x + i) = value;
        return;
    }
    words bits = (words)value, nan = (words)((bits & 0x7fffffff) > 0x7f800000);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(halves *)((uint16_t *)x + i) = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), halves);
}

/* The sum of a vector's numbers. */
INLINE float total(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += x[lane];
    return sum;
}

/* e^x to within 2 ulp (Cephes' polynomial), in steps that a compiler can turn into vectors. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* its low bits are those of the rounded sum */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits; /* not by a conversion of n, which C does not define for NaN */
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* ------------------------------------------------------------------------------------------ norms */

/* One row of edgezo_rms_norm. */
INLINE void rms_row(const void *x, const void *weight, void *y, int64_t d, float eps, float offset, int bf16,
                    int bf16_weight) {
    float part[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float v = get(x, i + lane, bf16);
            part[lane] += v * v;
        }
    for (; i < d; i++)
        sum += get(x, i, bf16) * get(x, i, bf16);
    for (int lane = 0; lane < LANES; lane++)
        sum += part[lane];
    float scale = 1.0f / sqrtf(sum / (float)d + eps);
    for (i = 0; i < d; i++)
        put(y, i, get(x, i, bf16) * scale * (get(weight, i, bf16_weight) + offset), bf16);
}

typedef void Rms(const void *x, const void *weight, void *y, int64_t d, float eps, float offset);

CLONES void rms_bf16(const void *x, const void *w, void *y, int64_t d, float eps, float offset) {
    rms_row(x, w, y, d, eps, offset, 1, 1);
}

CLONES void rms_mixed(const void *x, const void *w, void *y, int64_t d, float eps, float offset) {
    rms_row(x, w, y, d, eps, offset, 1, 0);
}

CLONES void rms_fp32(const void *x, const void *w, void *y, int64_t d, float eps, float offset) {
    rms_row(x, w, y, d, eps, offset, 0, 0);
}

/* y (n, d) = x/sqrt(mean(x^2) + eps) * (weight + offset). weight_stride: 0 for one weight vector, d for one a row. */
void edgezo_rms_norm(const void *x, const void *weight, void *y, int64_t n, int64_t d, int64_t weight_stride, float eps,
                     float offset, int bf16, int bf16_weight, int threads) {
    Rms *norm = bf16_weight ? rms_bf16 : bf16 ? rms_mixed : rms_fp32;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++)
        norm(from(x, row * d, bf16), from(weight, row * weight_stride, bf16_weight), (void *)from(y, row * d, bf16), d,
             eps, offset);
}

/* ------------------------------------------------------------------------------------------ gates */

/* up *= act(gate), act(x) = x sigmoid(x); with tanh: GELU's tanh form, x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)). */
INLINE void gate_part(const void *gate, void *up, int64_t n, int tanh, int bf16) {
    for (int64_t i = 0; i < n; i++) {
        float x = get(gate, i, bf16);
        float inner = tanh ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
        put(up, i, x / (1.0f + exponential(-inner)) * get(up, i, bf16), bf16);
    }
}

CLONES void gate_silu_bf16(const void *gate, void *up, int64_t n) { gate_part(gate, up, n, 0, 1); }
CLONES void gate_silu_fp32(const void *gate, void *up, int64_t n) { gate_part(gate, up, n, 0, 0); }
CLONES void gate_gelu_bf16(const void *gate, void *up, int64_t n) { gate_part(gate, up, n, 1, 1); }
CLONES void gate_gelu_fp32(const void *gate, void *up, int64_t n) { gate_part(gate, up, n, 1, 0); }

void edgezo_gate(const void *gate, void *up, int64_t n, int tanh, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += PART) {
        int64_t size = n - at < PART ? n - at : PART;
        const void *g = from(gate, at, bf16);
        void *u = (void *)from(up, at, bf16);
        if (tanh)
            (bf16 ? gate_gelu_bf16 : gate_gelu_fp32)(g, u, size);
        else
            (bf16 ? gate_silu_bf16 : gate_silu_fp32)(g, u, size);
    }
}

/* ------------------------------------------------------------------------------------------ thin products */

#define FEW 8  /* rows of basis that are multiplied at once */
#define PAIR 2 /* rows of x that share a load of basis */

/* Up to PAIR rows of x (PAIR, d) times up to FEW rows of basis (FEW, d). */
INLINE void few_columns(const void *x, const float *basis, float *out, int64_t rows, int64_t d, int64_t count, int64_t r,
                        int bf16) {
    vec sum[PAIR][FEW] = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        vec part[PAIR];
        for (int row = 0; row < PAIR; row++)
            part[row] = get_vec(x, (row < rows ? row : 0) * d + i, bf16);
        for (int j = 0; j < FEW; j++) {
            vec column = load(basis + (j < count ? j : 0) * d + i);
            for (int row = 0; row < PAIR; row++)
                sum[row][j] += part[row] * column;
        }
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t j = 0; j < count; j++) {
            float rest = 0;
            for (int64_t k = i; k < d; k++)
                rest += get(x, row * d + k, bf16) * basis[j * d + k];
            out[row * r + j] = total(sum[row][j]) + rest;
        }
}

INLINE void few_rows(const void *x, const float *basis, float *out, int64_t rows, int64_t d, int64_t r, int bf16) {
    for (int64_t row = 0; row < rows; row += PAIR)
        for (int64_t j = 0; j < r; j += FEW)
            few_columns(from(x, row * d, bf16), basis + j * d, out + row * r + j, rows - row < PAIR ? rows - row : PAIR, d,
                        r - j < FEW ? r - j : FEW, r, bf16);
}

CLONES void few_bf16(const void *x, const float *basis, float *out, int64_t rows, int64_t d, int64_t r) {
    few_rows(x, basis, out, rows, d, r, 1);
}

CLONES void few_fp32(const void *x, const float *basis, float *out, int64_t rows, int64_t d, int64_t r) {
    few_rows(x, basis, out, rows, d, r, 0);
}

#define ROWS 16 /* rows in a thread's turn */

/* out (n, r) = x (n, d) @ basis (r, d)^T */
void edgezo_thin_product(const void *x, const float *basis, float *out, int64_t n, int64_t d, int64_t r, int bf16,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += ROWS)
        (bf16 ? few_bf16 : few_fp32)(from(x, at * d, bf16), basis, out + at * r, n - at < ROWS ? n - at : ROWS, d, r);
}

#define CACHED 64 /* rows of x that stay in the cache while their columns are summed */

/* out (r, m) += left (n, r)^T @ x (n, m), in the columns from first to last; r is a multiple of FEW. */
INLINE void sum_rows(const void *x, const float *left, float *out, int64_t n, int64_t m, int64_t r, int64_t first,
                     int64_t last, int bf16) {
    for (int64_t begin = 0; begin < n; begin += CACHED)
        for (int64_t c = 0; c < r; c += FEW) {
            int64_t end = begin + CACHED < n ? begin + CACHED : n, i = first;
            for (; i + STRIP <= last; i += STRIP) {
                vec sum[FEW][2];
                for (int j = 0; j < FEW; j++) {
                    sum[j][0] = load(out + (c + j) * m + i);
                    sum[j][1] = load(out + (c + j) * m + i + LANES);
                }
                for (int64_t t = begin; t < end; t++) {
                    vec one = get_vec(x, t * m + i, bf16), two = get_vec(x, t * m + i + LANES, bf16);
                    for (int j = 0; j < FEW; j++) {
                        sum[j][0] += left[t * r + c + j] * one;
                        sum[j][1] += left[t * r + c + j] * two;
                    }
                }
                for (int j = 0; j < FEW; j++) {
                    put_vec(out, (c + j) * m + i, sum[j][0], 0);
                    put_vec(out, (c + j) * m + i + LANES, sum[j][1], 0);
                }
            }
            for (; i < last; i++)
                for (int j = 0; j < FEW; j++)
                    for (int64_t t = begin; t < end; t++)
                        out[(c + j) * m + i] += left[t * r + c + j] * get(x, t * m + i, bf16);
        }
}

CLONES void sum_bf16(const void *x, const float *left, float *out, int64_t n, int64_t m, int64_t r, int64_t first,
                     int64_t last) {
    sum_rows(x, left, out, n, m, r, first, last, 1);
}

CLONES void sum_fp32(const void *x, const float *left, float *out, int64_t n, int64_t m, int64_t r, int64_t first,
                     int64_t last) {
    sum_rows(x, left, out, n, m, r, first, last, 0);
}

/* out (r, m) += left (n, r)^T @ x (n, m); r is a multiple of FEW. Rows are added in their order, whatever the threads. */
void edgezo_thin_sum(const void *x, const float *left, float *out, int64_t n, int64_t m, int64_t r, int bf16,
                     int threads) {
    int64_t each = (m + threads - 1) / threads, width = each > 0 ? (each + STRIP - 1) / STRIP * STRIP : STRIP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < m; first += width)
        (bf16 ? sum_bf16 : sum_fp32)(x, left, out, n, m, r, first, first + width < m ? first + width : m);
}

INLINE float dot(const void *x, const void *y, int64_t d, int bf16) {
    vec sum = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES)
        sum += get_vec(x, i, bf16) * get_vec(y, i, bf16);
    for (; i < d; i++)
        rest += get(x, i, bf16) * get(y, i, bf16);
    return total(sum) + rest;
}

CLONES float dot_bf16(const void *x, const void *y, int64_t d) { return dot(x, y, d, 1); }
CLONES float dot_fp32(const void *x, const void *y, int64_t d) { return dot(x, y, d, 0); }

/* out (n,) = x (n, d) . cols[example] */
void edgezo_dots_by_example(const void *x, const void *cols, const int64_t *example, float *out, int64_t n, int64_t d,
                            int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; t++)
        out[t] = (bf16 ? dot_bf16 : dot_fp32)(from(x, t * d, bf16), from(cols, example[t] * d, bf16), d);
}

typedef struct {
    void *y;                /* (n, m) */
    const float *left;      /* (n, k) */
    const float *right;     /* (k, m) */
    const float *weight;    /* (n,), or NULL */
    const void *rows;       /* (b, m) in the dtype of y */
    const int64_t *example; /* (n,) */
    int64_t n, m, k;
} Thin;

#define ABREAST 4 /* rows of y that share a load of right */

INLINE void thin_rows(const Thin *a, int64_t first, int64_t count, int bf16) {
    int64_t m = a->m, k = a->k, i = 0, row[ABREAST];
    for (int j = 0; j < ABREAST; j++)
        row[j] = first + (j < count ? j : 0);
    for (; i + STRIP <= m; i += STRIP) {
        vec sum[ABREAST][2];
        for (int j = 0; j < ABREAST; j++)
            for (int part = 0; part < 2; part++) {
                int64_t at = i + part * LANES;
                sum[j][part] = get_vec(a->y, row[j] * m + at, bf16);
                if (a->weight)
                    sum[j][part] += a->weight[row[j]] * get_vec(a->rows, a->example[row[j]] * m + at, bf16);
            }
        for (int64_t c = 0; c < k; c++) {
            vec one = load(a->right + c * m + i), two = load(a->right + c * m + i + LANES);
            for (int j = 0; j < ABREAST; j++) {
                sum[j][0] += a->left[row[j] * k + c] * one;
                sum[j][1] += a->left[row[j] * k + c] * two;
            }
        }
        for (int j = 0; j < count; j++)
            for (int part = 0; part < 2; part++)
                put_vec(a->y, row[j] * m + i + part * LANES, sum[j][part], bf16);
    }
    for (; i < m; i++)
        for (int j = 0; j < count; j++) {
            float sum = get(a->y, row[j] * m + i, bf16);
            if (a->weight)
                sum += a->weight[row[j]] * get(a->rows, a->example[row[j]] * m + i, bf16);
            for (int64_t c = 0; c < k; c++)
                sum += a->left[row[j] * k + c] * a->right[c * m + i];
            put(a->y, row[j] * m + i, sum, bf16);
        }
}

CLONES void thin_bf16(const Thin *a, int64_t first, int64_t count) { thin_rows(a, first, count, 1); }
CLONES void thin_fp32(const Thin *a, int64_t first, int64_t count) { thin_rows(a, first, count, 0); }

/* y += left @ right + weight * rows[example], rounded once */
void edgezo_add_thin(const Thin *a, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < a->n; at += ABREAST)
        (bf16 ? thin_bf16 : thin_fp32)(a, at, a->n - at < ABREAST ? a->n - at : ABREAST);
}

/* ------------------------------------------------------------------------------------------ attention */

INLINE int64_t strips(int64_t n) { return (n + STRIP - 1) / STRIP * STRIP; }

#define QUERIES 4

typedef struct {
    const void *q, *k, *v;
    void *out;
    int64_t q_stride, k_stride, v_stride, out_stride; /* elements from one token to the next */
    int64_t heads, kv_heads, dim;
    float scale;
    int causal;
    int64_t window; /* tokens that a token sees, itself included; 0 for all */
    int bf16;
} Attention;

/* Queries [at, at + count) of one head: scores are computed along vectors of keys, sums along vectors of dimensions. */
INLINE void attend(const Attention *a, int64_t start, int64_t length, int64_t padded, int64_t head, int64_t at, int count,
                   const float *keys, const float *values, float *scores, float *query, int bf16) {
    int64_t dim = a->dim, wide_dim = strips(dim), low[QUERIES], high[QUERIES], first = length, last = 0;
    float whole[QUERIES];
    for (int j = 0; j < QUERIES; j++) {
        int64_t token = at + (j < count ? j : 0);
        int64_t base = (start + token) * a->q_stride + head * dim;
        for (int64_t d = 0; d < dim; d++)
            query[j * dim + d] = get(a->q, base + d, bf16) * a->scale;
        low[j] = a->window && token >= a->window ? token - a->window + 1 : 0;
        high[j] = a->causal ? token + 1 : a->window && token + a->window < length ? token + a->window : length;
        first = low[j] < first ? low[j] : first;
        last = high[j] > last ? high[j] : last;
    }
    first -= first % STRIP;
    for (int64_t t = first; t < last; t += STRIP) {
        vec sum[QUERIES][2] = {{{0}}};
        for (int64_t d = 0; d < dim; d++) {
            vec left = load(keys + d * padded + t), right = load(keys + d * padded + t + LANES);
            for (int j = 0; j < QUERIES; j++) {
                sum[j][0] += query[j * dim + d] * left;
                sum[j][1] += query[j * dim + d] * right;
            }
        }
        for (int j = 0; j < QUERIES; j++)
            for (int part = 0; part < 2; part++)
                *(vec *)(scores + j * padded + t + part * LANES) = sum[j][part];
    }
    last = strips(last);
    for (int j = 0; j < QUERIES; j++) {
        float *score = scores + j * padded, mosts[LANES], sums[LANES] = {0}, most = -INFINITY, sum = 0;
        for (int64_t t = first; t < last; t++)
            score[t] = t < low[j] || t >= high[j] ? -INFINITY : score[t];
        for (int lane = 0; lane < LANES; lane++)
            mosts[lane] = -INFINITY;
        for (int64_t t = first; t < last; t += LANES)
            for (int lane = 0; lane < LANES; lane++)
                mosts[lane] = score[t + lane] > mosts[lane] ? score[t + lane] : mosts[lane];
        for (int lane = 0; lane < LANES; lane++)
            most = mosts[lane] > most ? mosts[lane] : most;
        for (int64_t t = first; t < last; t += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float e = exponential(score[t + lane] - most);
                score[t + lane] = score[t + lane] == -INFINITY ? 0.0f : e;
                sums[lane] += score[t + lane];
            }
        for (int lane = 0; lane < LANES; lane++)
            sum += sums[lane];
        whole[j] = 1.0f / sum;
    }
    last = last < length ? last : length;
    for (int64_t d = 0; d < dim; d += STRIP) {
        vec sum[QUERIES][2] = {{{0}}};
        for (int64_t t = first; t < last; t++) {
            vec left = load(values + t * wide_dim + d), right = load(values + t * wide_dim + d + LANES);
            for (int j = 0; j < QUERIES; j++) {
                float weight = scores[j * padded + t];
                sum[j][0] += weight * left;
                sum[j][1] += weight * right;
            }
        }
        for (int j = 0; j < count; j++) {
            int64_t base = (start + at + j) * a->out_stride + head * dim + d;
            for (int part = 0; part < 2; part++) {
                vec mean = sum[j][part] * whole[j];
                int64_t rest = dim - d - part * LANES;
                if (rest >= LANES)
                    put_vec(a->out, base + part * LANES, mean, bf16);
                else
                    for (int64_t i = 0; i < rest; i++)
                        put(a->out, base + part * LANES + i, mean[i], bf16);
            }
        }
    }
}

/* All heads of one row that share the keys and values of head kv, which are widened to fp32 and laid out anew. */
INLINE void attend_row(const Attention *a, int64_t start, int64_t length, int64_t kv, float *scratch, int bf16) {
    int64_t dim = a->dim, wide_dim = strips(dim), padded = strips(length), group = a->heads / a->kv_heads;
    float *keys = scratch, *values = keys + dim * padded, *scores = values + wide_dim * padded;
    float *query = scores + QUERIES * padded;
    for (int64_t t = 0; t < length; t++) {
        for (int64_t d = 0; d < dim; d++)
            keys[d * padded + t] = get(a->k, (start + t) * a->k_stride + kv * dim + d, bf16);
        for (int64_t d = 0; d < dim; d++)
            values[t * wide_dim + d] = get(a->v, (start + t) * a->v_stride + kv * dim + d, bf16);
        for (int64_t d = dim; d < wide_dim; d++)
            values[t * wide_dim + d] = 0.0f;
    }
    for (int64_t d = 0; d < dim; d++)
        for (int64_t t = length; t < padded; t++)
            keys[d * padded + t] = 0.0f;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
        for (int64_t at = 0; at < length; at += QUERIES) {
            int count = length - at < QUERIES ? (int)(length - at) : QUERIES;
            attend(a, start, length, padded, head, at, count, keys, values, scores, query, bf16);
        }
}

CLONES void attend_row_bf16(const Attention *a, int64_t start, int64_t length, int64_t kv, float *scratch) {
    attend_row(a, start, length, kv, scratch, 1);
}

CLONES void attend_row_fp32(const Attention *a, int64_t start, int64_t length, int64_t kv, float *scratch) {
    attend_row(a, start, length, kv, scratch, 0);
}

int omp_get_thread_num(void);

/* starts (rows + 1,): where the tokens of each row begin. scratch: scratch_stride floats for each thread. */
void edgezo_attention(const Attention *a, const int64_t *starts, int64_t rows, float *scratch, int64_t scratch_stride,
                      int threads) {
    int64_t tasks = rows * a->kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t row = task / a->kv_heads, start = starts[row], length = starts[row + 1] - start;
        float *buffer = scratch + omp_get_thread_num() * scratch_stride;
        (a->bf16 ? attend_row_bf16 : attend_row_fp32)(a, start, length, task % a->kv_heads, buffer);
    }
}

/* ------------------------------------------------------------------------------------------ rotary positions */

/* x (heads, dim) of one token, in place: (x1, x2) cos + (-x2, x1) sin, halves x1, x2 of a head; cos, sin (dim,). */
INLINE void rotate(void *x, const void *cos, const void *sin, int64_t heads, int64_t dim, int bf16) {
    for (int64_t head = 0; head < heads; head++)
        for (int64_t i = 0; i < dim / 2; i++) {
            int64_t one = head * dim + i, two = one + dim / 2;
            float a = get(x, one, bf16), b = get(x, two, bf16);
            put(x, one, a * get(cos, i, bf16) - b * get(sin, i, bf16), bf16);
            put(x, two, b * get(cos, i + dim / 2, bf16) + a * get(sin, i + dim / 2, bf16), bf16);
        }
}

CLONES void rotate_bf16(uint16_t *restrict x, const uint16_t *restrict cos, const uint16_t *restrict sin, int64_t heads,
                        int64_t dim) {
    rotate(x, cos, sin, heads, dim, 1);
}

CLONES void rotate_fp32(float *restrict x, const float *restrict cos, const float *restrict sin, int64_t heads,
                        int64_t dim) {
    rotate(x, cos, sin, heads, dim, 0);
}

/* x: n tokens, which are stride elements apart; cos, sin (n, dim). */
void edgezo_rotate(void *x, const void *cos, const void *sin, int64_t n, int64_t stride, int64_t heads, int64_t dim,
                   int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; t++) {
        void *token = (void *)from(x, t * stride, bf16);
        if (bf16)
            rotate_bf16(token, from(cos, t * dim, 1), from(sin, t * dim, 1), heads, dim);
        else
            rotate_fp32(token, from(cos, t * dim, 0), from(sin, t * dim, 0), heads, dim);
    }
}

/* ------------------------------------------------------------------------------------------ codes */

/* Where torch rounds a product before it adds, so do these: product and sum stand in separate loops, because a compiler
 * would fuse them into one operation, which rounds once, if they stood in one. */

/* One row of int8 codes: out = code * scale. */
INLINE void int8_row(const int8_t *codes, float scale, void *out, int64_t cols, int bf16) {
    for (int64_t i = 0; i < cols; i++)
        put(out, i, (float)codes[i] * scale, bf16);
}

CLONES void int8_row_bf16(const int8_t *codes, float s, void *out, int64_t n) { int8_row(codes, s, out, n, 1); }
CLONES void int8_row_fp32(const int8_t *codes, float s, void *out, int64_t n) { int8_row(codes, s, out, n, 0); }

void edgezo_expand_int8(const int8_t *codes, const float *scale, void *out, int64_t rows, int64_t cols, int bf16,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        (bf16 ? int8_row_bf16 : int8_row_fp32)(codes + row * cols, scale[row], (void *)from(out, row * cols, bf16), cols);
}

/* One group of int4 codes, in the low or the high nibbles: out = code * scale - shift, rounded twice. */
INLINE void int4_group(const uint8_t *packed, int nibble, float scale, float shift, void *out, int64_t n, int bf16) {
    for (int64_t i = 0; i < n; i++)
        put(out, i, (float)((packed[i] >> nibble) & 15) * scale, bf16);
    for (int64_t i = 0; i < n; i++)
        put(out, i, get(out, i, bf16) - shift, bf16);
}

CLONES void int4_row_bf16(const uint8_t *packed, int nibble, const float *scale, const float *shift, void *out,
                          int64_t groups, int64_t size) {
    for (int64_t g = 0; g < groups; g++)
        int4_group(packed + g * size, nibble, scale[g], shift[g], (uint16_t *)out + g * size, size, 1);
}

CLONES void int4_row_fp32(const uint8_t *packed, int nibble, const float *scale, const float *shift, void *out,
                          int64_t groups, int64_t size) {
    for (int64_t g = 0; g < groups; g++)
        int4_group(packed + g * size, nibble, scale[g], shift[g], (float *)out + g * size, size, 0);
}

void edgezo_expand_int4(const uint8_t *packed, int nibble, const float *scale, const float *shift, void *out,
                        int64_t rows, int64_t groups, int64_t size, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * groups * size;
        (bf16 ? int4_row_bf16 : int4_row_fp32)(packed + at, nibble, scale + row * groups, shift + row * groups,
                                               (void *)from(out, at, bf16), groups, size);
    }
}

/* ------------------------------------------------------------------------------------------ planes */

/* Distance of neighbouring bf16 numbers at high. */
INLINE float spacing(float high) {
    uint32_t bits;
    float binade;
    memcpy(&bits, &high, 4);
    bits &= 0x7f800000;
    memcpy(&binade, &bits, 4);
    binade *= 0x1p-7f;
    return binade < 0x1p-133f ? 0x1p-133f : binade;
}

/* A weight is high + low * ulp(high)/256, which fp32 holds exactly. */
CLONES void read_plane_part(const uint16_t *high, const int8_t *low, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float h = wide(high[i]);
        out[i] = h + (float)low[i] * spacing(h) * (1.0f / 256);
    }
}

void edgezo_read_plane(const uint16_t *high, const int8_t *low, float *out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += PART)
        read_plane_part(high + at, low + at, out + at, n - at < PART ? n - at : PART);
}

/* value as a bf16 number high, its ulp, and what remains in 256ths of the ulp (returned; layouts.Dense). */
INLINE float split(float value, uint16_t *high, float *ulp) {
    *high = narrow(value);
    float h = wide(*high);
    *ulp = spacing(h);
    float code = rintf((value - h) * 256.0f / *ulp);
    return code < -127.0f ? -127.0f : code > 127.0f ? 127.0f : code;
}

CLONES void write_plane_part(const float *values, uint16_t *high, int8_t *low, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float ulp;
        low[i] = (int8_t)split(values[i], high + i, &ulp);
    }
}

void edgezo_write_plane(const float *values, uint16_t *high, int8_t *low, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += PART)
        write_plane_part(values + at, high + at, low + at, n - at < PART ? n - at : PART);
}

/* Round values to what reading them back would give after writing them. */
CLONES void snap_plane_part(float *values, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float ulp;
        uint16_t high;
        float code = split(values[i], &high, &ulp);
        values[i] = wide(high) + code * ulp * (1.0f / 256);
    }
}

void edgezo_snap_plane(float *values, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += PART)
        snap_plane_part(values + at, n - at < PART ? n - at : PART);
}

/* ------------------------------------------------------------------------------------------ noise */

/* Philox4x64-10 (Salmon et al., SC 2011), counting as numpy does: the words of block b are those of counter b + 1. */
INLINE void philox(uint64_t block, const uint64_t counter[3], const uint64_t key[2], uint64_t out[4]) {
    uint64_t c0 = block + 1, c1 = counter[0], c2 = counter[1], c3 = counter[2], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93u * c0;
        unsigned __int128 second = (unsigned __int128)0xCA5A826395121157u * c2;
        c0 = (uint64_t)(second >> 64) ^ c1 ^ k0;
        c2 = (uint64_t)(first >> 64) ^ c3 ^ k1;
        c1 = (uint64_t)second;
        c3 = (uint64_t)first;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Rows [first, first + rows) of a matrix of signs, (rows, width) int8. table (256,): the eight signs of each byte. */
void edgezo_signs(const uint64_t key[2], const uint64_t counter[3], const uint64_t *table, int8_t *out, int64_t first,
                  int64_t rows, int64_t width, int threads) {
    int64_t blocks = (width + 255) / 256;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            uint64_t words[4], made[32];
            int8_t *place = out + row * width + block * 256;
            int64_t rest = width - block * 256;
            philox((uint64_t)((first + row) * blocks + block), counter, key, words);
            uint64_t *to = rest < 256 ? made : (uint64_t *)place;
            for (int word = 0; word < 4; word++)
                for (int byte = 0; byte < 8; byte++) {
                    uint64_t eight = table[(words[word] >> (8 * byte)) & 255];
                    memcpy((char *)to + 64 * word + 8 * byte, &eight, 8);
                }
            if (rest < 256)
                memcpy(place, made, (size_t)rest);
        }
}

/* Rows [first, first + rows) of a matrix of table[k], (rows, width) fp32, k of 16 bits; table (65536,). */
void edgezo_levels(const uint64_t key[2], const uint64_t counter[3], const float *table, float *out, int64_t first,
                   int64_t rows, int64_t width, int threads) {
    int64_t blocks = (16 * width + 255) / 256;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            uint64_t words[4];
            float *place = out + row * width + block * 16;
            int count = width - block * 16 < 16 ? (int)(width - block * 16) : 16;
            philox((uint64_t)((first + row) * blocks + block), counter, key, words);
            for (int i = 0; i < count; i++)
                place[i] = table[(words[i / 4] >> (16 * (i % 4))) & 65535];
        }
}

/* ------------------------------------------------------------------------------------------ checksums */

/* Take one more byte into a CRC register (zlib's polynomial, reflected). */
INLINE uint32_t crc_byte(uint32_t crc, uint8_t byte) {
    crc ^= byte;
    for (int bit = 0; bit < 8; bit++)
        crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1)));
    return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Whether this CPU has the carry-less products that crc_fold takes. */
int edgezo_crc32_is_fast(void) { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }

#define FOLD static __attribute__((target("pclmul,sse4.1")))

/* x times the two factors of k, each half by its own, plus what comes next. */
FOLD inline __m128i fold(__m128i x, __m128i k, __m128i next) {
    __m128i halves = _mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11));
    return _mm_xor_si128(halves, next);
}

FOLD inline __m128i block(const uint8_t *data) { return _mm_loadu_si128((const __m128i *)data); }

/* A CRC register after n more bytes, n a multiple of 16 and at least 16. Gopal et al., Fast CRC Computation for Generic
 * Polynomials Using PCLMULQDQ Instruction (Intel 2009), with the constants of zlib's polynomial. */
FOLD uint32_t crc_fold(uint32_t crc, const uint8_t *data, int64_t n) {
    const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0), barrett = _mm_set_epi64x(0x1f7011641, 0x1db710641);
    const uint8_t *end = data + n;
    __m128i x = _mm_xor_si128(block(data), _mm_cvtsi32_si128((int)crc));
    data += 16;
    if (end - data >= 112) {
        __m128i x1 = block(data), x2 = block(data + 16), x3 = block(data + 32);
        for (data += 48; end - data >= 64; data += 64) {
            x = fold(x, by_64, block(data));
            x1 = fold(x1, by_64, block(data + 16));
            x2 = fold(x2, by_64, block(data + 32));
            x3 = fold(x3, by_64, block(data + 48));
        }
        x = fold(fold(fold(x, by_16, x1), by_16, x2), by_16, x3);
    }
    for (; data < end; data += 16)
        x = fold(x, by_16, block(data));
    x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by_16, 0x10)); /* 128 bits to 96 */
    __m128i product = _mm_clmulepi64_si128(_mm_and_si128(x, low), _mm_cvtsi64_si128(0x163cd6124), 0x00);
    x = _mm_xor_si128(_mm_srli_si128(x, 4), product); /* to 64 */
    product = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(x, low), barrett, 0x10), low);
    x = _mm_xor_si128(x, _mm_clmulepi64_si128(product, barrett, 0x00)); /* to 32 */
    return (uint32_t)_mm_extract_epi32(x, 1);
}
#else
int edgezo_crc32_is_fast(void) { return 0; }
#endif

/* out (rows,): zlib's crc32 of each of the rows of data, which have n bytes each, beginning with the CRC start. */
void edgezo_crc32(const uint8_t *data, int64_t rows, int64_t n, uint32_t start, uint32_t *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *at = data + row * n, *end = at + n;
        uint32_t crc = ~start;
#if defined(__x86_64__)
        if (n >= 16) {
            crc = crc_fold(crc, at, n & ~(int64_t)15);
            at += n & ~(int64_t)15;
        }
#endif
        while (at < end)
            crc = crc_byte(crc, *at++);
        out[row] = ~crc;
    }
}
