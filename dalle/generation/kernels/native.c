// One layer of the decoder for one image token of a few pictures, and the image head, each in one pass over the weights;
// and for many pictures, the attention to image tokens alone, where they lie.
//
// What dalle/generation/decoder.py does with tensor operations. For few pictures a step is as long as its weights take to
// read, and starting thirty operations a layer would take as long again; for many, the products of every picture with a
// small window of its own are thousands of tiny ones. Compiled by native.py.
// All sums are float; weights and caches are float or bfloat16 (T); what enters a product, see input_bfloat16.
//
// Shapes: H heads, R pictures, P captions, S text slots with BOS, L slots of the image cache, W of them seen, D head
// width, C = H D. Weights are as PyTorch keeps them: (outputs, inputs).

#include <math.h>
#include <omp.h>
#include <stdint.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t bfloat16;

struct layer {  // pointers to T, but for the scratch
    const void *norm_gain, *norm_bias, *qkv, *qkv_bias, *out, *out_bias;
    const void *mlp_gain, *mlp_bias, *expand, *expand_bias, *contract, *contract_bias;
};

struct stream {
    const void *keys, *values;  // of captions, T (H, P, S, D)
    void *memory;               // image keys, then values, T (2, H, R, L, D)
    const int64_t *caption_of;  // (R,)
    const int64_t *seen;        // the slots to read, (W,)
    float *x;                   // the residual stream, (R, C), in and out
    float *scratch;             // see SCRATCH in native.py
    int64_t n_heads, d_head, n_pictures, n_captions, n_text, n_slots, n_seen, slot, n_threads;
};

struct window {
    const void *queries;   // scaled, T (H, R, D)
    const void *qkv;       // of which keys and values are stored, T (R, 3 C)
    void *memory;          // as in struct stream
    const int64_t *seen;   // the slots to read, (W,)
    void *text;            // scores of the caption, T (H, R, S); out: its shares of attention
    void *mixed;           // out: what the image tokens give, T (H, R, D)
    int64_t n_heads, d_head, n_pictures, n_text, n_slots, n_seen, slot, n_threads;
    float *scratch;        // n_threads (S + L)
};

static inline float read_bfloat16(bfloat16 x) {
    union { uint32_t bits; float value; } v = {(uint32_t)x << 16};
    return v.value;
}

static inline bfloat16 write_bfloat16(float x) {  // to the nearest, ties to even
    union { float value; uint32_t bits; } v = {x};
    return (bfloat16)((v.bits + 0x7fff + ((v.bits >> 16) & 1)) >> 16);
}

static inline float read_float(float x) { return x; }
static inline float write_float(float x) { return x; }

static const float EPSILON = 1e-5f;  // LAYER_NORM_EPS of transformer.py

// x sigmoid(1.702 x), as in MLPResblock
static inline float gelu(float x) { return x / (1 + expf(-1.702f * x)); }

static inline float dot_float(const float *restrict x, const float *restrict w, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * w[i];
    return sum;
}

static inline float dot_bfloat16(const float *restrict x, const bfloat16 *restrict w, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * read_bfloat16(w[i]);
    return sum;
}

enum { MAX_PICTURES = 8 };  // whose layers are computed here; as in native.py

// What enters a product with weights of a type: with AVX512-BF16, bfloat16 meets bfloat16, as in PyTorch's own products.
typedef float input_float;
static inline float write_input_float(float x) { return x; }
static inline void dots_float(const float *restrict x, int64_t n_pictures, const float *restrict w, int64_t n,
                              float *restrict sums) {  // of one output's weights (n,) with each picture's inputs (R, n)
    for (int64_t r = 0; r < n_pictures; r++) sums[r] = dot_float(x + r * n, w, n);
}

#ifdef __AVX512BF16__
typedef bfloat16 input_bfloat16;
static inline bfloat16 write_input_bfloat16(float x) { return write_bfloat16(x); }
static inline __attribute__((always_inline)) void few_dots(const bfloat16 *restrict x, const int n_pictures,
                                                           const bfloat16 *restrict w, int64_t n, float *restrict sums) {
    __m512 sum[MAX_PICTURES];
#pragma GCC unroll 8
    for (int r = 0; r < n_pictures; r++) sum[r] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512bh weights = (__m512bh)_mm512_loadu_si512(w + i);
        _mm_prefetch((const char *)(w + i + 1024), _MM_HINT_T0);  // of the outputs that follow
#pragma GCC unroll 8
        for (int r = 0; r < n_pictures; r++)
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_loadu_si512(x + r * n + i), weights);
    }
    if (i < n) {
        const __mmask32 rest = ((__mmask32)1 << (n - i)) - 1;
        const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(rest, w + i);
#pragma GCC unroll 8
        for (int r = 0; r < n_pictures; r++)
            sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_maskz_loadu_epi16(rest, x + r * n + i), weights);
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_pictures; r++) sums[r] = _mm512_reduce_add_ps(sum[r]);
}
static void dots_bfloat16(const bfloat16 *restrict x, int64_t n_pictures, const bfloat16 *restrict w, int64_t n,
                          float *restrict sums) {
    switch (n_pictures) {  // a constant number of sums stays in registers
        case 1: few_dots(x, 1, w, n, sums); break;
        case 2: few_dots(x, 2, w, n, sums); break;
        case 3: few_dots(x, 3, w, n, sums); break;
        case 4: few_dots(x, 4, w, n, sums); break;
        case 5: few_dots(x, 5, w, n, sums); break;
        case 6: few_dots(x, 6, w, n, sums); break;
        case 7: few_dots(x, 7, w, n, sums); break;
        case 8: few_dots(x, 8, w, n, sums); break;
    }
}
#else
typedef float input_bfloat16;
static inline float write_input_bfloat16(float x) { return x; }
static inline void dots_bfloat16(const float *restrict x, int64_t n_pictures, const bfloat16 *restrict w, int64_t n,
                                 float *restrict sums) {
    for (int64_t r = 0; r < n_pictures; r++) sums[r] = dot_bfloat16(x + r * n, w, n);
}
#endif

#define DEFINE(T)                                                                                                     \
    static void norm_##T(const float *restrict x, const T *restrict gain, const T *restrict bias,                     \
                         input_##T *restrict y, int64_t n) {                                                          \
        float mean = 0, variance = 0;                                                                                 \
        for (int64_t i = 0; i < n; i++) mean += x[i];                                                                 \
        mean /= n;                                                                                                    \
        for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);                                    \
        const float scale = 1 / sqrtf(variance / n + EPSILON);                                                        \
        for (int64_t i = 0; i < n; i++)                                                                               \
            y[i] = write_input_##T((x[i] - mean) * scale * read_##T(gain[i]) + read_##T(bias[i]));                    \
    }                                                                                                                 \
                                                                                                                      \
    /* One picture and one head: store key and value, score, softmax, mix. */                                         \
    static inline __attribute__((always_inline)) void attend_##T(const struct stream *s, int64_t h, int64_t r,        \
                                                                 const float *qkv, input_##T *mixed,                  \
                                                                 float *restrict scores, const int64_t d) {           \
        const int64_t c = s->n_heads * d, n = s->n_text + s->n_seen;                                                  \
        const float *own = qkv + r * 3 * c + h * d, scale = 1 / sqrtf((float)d);                                      \
        T *image_keys = (T *)s->memory + (h * s->n_pictures + r) * s->n_slots * d;                                    \
        T *image_values = image_keys + c * s->n_pictures * s->n_slots;                                                \
        const int64_t text = (h * s->n_captions + s->caption_of[r]) * s->n_text * d;                                  \
        const T *keys = (const T *)s->keys + text, *values = (const T *)s->values + text;                             \
        float total = 0, largest, sum[d];                                                                             \
        for (int64_t i = 0; i < d; i++) {                                                                             \
            image_keys[s->slot * d + i] = write_##T(own[c + i]);                                                      \
            image_values[s->slot * d + i] = write_##T(own[2 * c + i]);                                                \
            sum[i] = 0;                                                                                               \
        }                                                                                                             \
        for (int64_t t = 0; t < s->n_text; t++) scores[t] = scale * dot_##T(own, keys + t * d, d);                    \
        for (int64_t w = 0; w < s->n_seen; w++)                                                                       \
            scores[s->n_text + w] = scale * dot_##T(own, image_keys + s->seen[w] * d, d);                             \
        largest = scores[0];                                                                                          \
        for (int64_t i = 1; i < n; i++) largest = scores[i] > largest ? scores[i] : largest;                          \
        for (int64_t i = 0; i < n; i++) {                                                                             \
            scores[i] = expf(scores[i] - largest);                                                                    \
            total += scores[i];                                                                                       \
        }                                                                                                             \
        for (int64_t t = 0; t < s->n_text; t++)                                                                       \
            for (int64_t i = 0; i < d; i++) sum[i] += scores[t] * read_##T(values[t * d + i]);                        \
        for (int64_t w = 0; w < s->n_seen; w++) {                                                                     \
            const T *value = image_values + s->seen[w] * d;                                                           \
            for (int64_t i = 0; i < d; i++) sum[i] += scores[s->n_text + w] * read_##T(value[i]);                     \
        }                                                                                                             \
        for (int64_t i = 0; i < d; i++) mixed[r * c + h * d + i] = write_input_##T(sum[i] / total);                   \
    }                                                                                                                 \
                                                                                                                      \
    void layer_##T(const struct layer *l, const struct stream *s) {                                                   \
        const int64_t c = s->n_heads * s->d_head, n = s->n_pictures;                                                  \
        float *qkv = s->scratch, *per_thread = qkv + 8 * c * n;                                                       \
        input_##T *mixed = (input_##T *)(qkv + 3 * c * n), *inner = (input_##T *)(qkv + 4 * c * n);                   \
        const int64_t n_per_thread = c * n + s->n_text + s->n_slots;                                                  \
        _Pragma("omp parallel num_threads(s->n_threads)") {                                                           \
            float *own = per_thread + omp_get_thread_num() * n_per_thread, *scores = own + c * n, sums[MAX_PICTURES]; \
            input_##T *normed = (input_##T *)own;                                                                     \
            for (int64_t r = 0; r < n; r++) /* by every thread for itself: cheaper than waiting */                    \
                norm_##T(s->x + r * c, l->norm_gain, l->norm_bias, normed + r * c, c);                                \
            _Pragma("omp for schedule(static)") for (int64_t o = 0; o < 3 * c; o++) {                                 \
                dots_##T(normed, n, (const T *)l->qkv + o * c, c, sums);                                              \
                for (int64_t r = 0; r < n; r++) qkv[r * 3 * c + o] = sums[r] + read_##T(((const T *)l->qkv_bias)[o]); \
            }                                                                                                         \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < s->n_heads * n; i++)                          \
                if (s->d_head == 64) /* a constant: its sums stay in registers */                                     \
                    attend_##T(s, i / n, i % n, qkv, mixed, scores, 64);                                              \
                else                                                                                                  \
                    attend_##T(s, i / n, i % n, qkv, mixed, scores, s->d_head);                                       \
            _Pragma("omp for schedule(static)") for (int64_t o = 0; o < c; o++) {                                     \
                dots_##T(mixed, n, (const T *)l->out + o * c, c, sums);                                               \
                for (int64_t r = 0; r < n; r++) s->x[r * c + o] += sums[r] + read_##T(((const T *)l->out_bias)[o]);   \
            }                                                                                                         \
            for (int64_t r = 0; r < n; r++)                                                                           \
                norm_##T(s->x + r * c, l->mlp_gain, l->mlp_bias, normed + r * c, c);                                  \
            _Pragma("omp for schedule(static)") for (int64_t o = 0; o < 4 * c; o++) {                                 \
                dots_##T(normed, n, (const T *)l->expand + o * c, c, sums);                                           \
                for (int64_t r = 0; r < n; r++)                                                                       \
                    inner[r * 4 * c + o] = write_input_##T(gelu(sums[r] + read_##T(((const T *)l->expand_bias)[o]))); \
            }                                                                                                         \
            _Pragma("omp for schedule(static)") for (int64_t o = 0; o < c; o++) {                                     \
                dots_##T(inner, n, (const T *)l->contract + o * 4 * c, 4 * c, sums);                                  \
                for (int64_t r = 0; r < n; r++)                                                                       \
                    s->x[r * c + o] += sums[r] + read_##T(((const T *)l->contract_bias)[o]);                          \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    /* One picture and one head: store key and value, score the image tokens, one softmax with the caption, mix. */   \
    static inline __attribute__((always_inline)) void attend_window_##T(const struct window *w, int64_t h, int64_t r, \
                                                                        float *restrict scores, const int64_t d) {    \
        const int64_t c = w->n_heads * d, n = w->n_text + w->n_seen, at = h * w->n_pictures + r;                      \
        const T *query = (const T *)w->queries + at * d, *key = (const T *)w->qkv + r * 3 * c + c + h * d;            \
        T *keys = (T *)w->memory + at * w->n_slots * d, *values = keys + c * w->n_pictures * w->n_slots;              \
        T *restrict text = (T *)w->text + at * w->n_text, *mixed = (T *)w->mixed + at * d;                            \
        float largest = -INFINITY, total = 0, own[d], sum[d];                                                         \
        for (int64_t i = 0; i < d; i++) {                                                                             \
            keys[w->slot * d + i] = key[i];                                                                           \
            values[w->slot * d + i] = key[c + i];                                                                     \
            own[i] = read_##T(query[i]);                                                                              \
            sum[i] = 0;                                                                                               \
        }                                                                                                             \
        for (int64_t k = 0; k < w->n_seen; k++) { /* values are on their way while keys are read */                   \
            for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(values + w->seen[k] * d + i);          \
            scores[w->n_text + k] = dot_##T(own, keys + w->seen[k] * d, d);                                           \
        }                                                                                                             \
        for (int64_t t = 0; t < w->n_text; t++) scores[t] = read_##T(text[t]);                                        \
        for (int64_t i = 0; i < n; i++) largest = scores[i] > largest ? scores[i] : largest;                          \
        for (int64_t i = 0; i < n; i++) {                                                                             \
            scores[i] = expf(scores[i] - largest);                                                                    \
            total += scores[i];                                                                                       \
        }                                                                                                             \
        for (int64_t t = 0; t < w->n_text; t++) text[t] = write_##T(scores[t] / total);                               \
        for (int64_t k = 0; k < w->n_seen; k++) {                                                                     \
            const T *restrict value = values + w->seen[k] * d, *next = keys + (w->n_slots + w->seen[k]) * d;          \
            for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(next + i); /* of the next picture */   \
            for (int64_t i = 0; i < d; i++) sum[i] += scores[w->n_text + k] * read_##T(value[i]);                     \
        }                                                                                                             \
        for (int64_t i = 0; i < d; i++) mixed[i] = write_##T(sum[i] / total);                                         \
    }                                                                                                                 \
                                                                                                                      \
    void windows_##T(const struct window *w) {                                                                        \
        _Pragma("omp parallel num_threads(w->n_threads)") {                                                           \
            float *scores = w->scratch + omp_get_thread_num() * (w->n_text + w->n_slots);                             \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < w->n_heads * w->n_pictures; i++)              \
                if (w->d_head == 64) /* a constant: its sums stay in registers */                                     \
                    attend_window_##T(w, i / w->n_pictures, i % w->n_pictures, scores, 64);                           \
                else                                                                                                  \
                    attend_window_##T(w, i / w->n_pictures, i % w->n_pictures, scores, w->d_head);                    \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    /* Logits (R, K) of what the head reads, x (R, C). */                                                             \
    void head_##T(const T *head, const float *x, float *logits, int64_t n, int64_t c, int64_t n_codes,                \
                  int64_t n_threads) {                                                                                \
        input_##T inputs[n * c];                                                                                      \
        for (int64_t i = 0; i < n * c; i++) inputs[i] = write_input_##T(x[i]);                                        \
        _Pragma("omp parallel for schedule(static) num_threads(n_threads)") for (int64_t o = 0; o < n_codes; o++) {   \
            float sums[MAX_PICTURES];                                                                                 \
            dots_##T(inputs, n, head + o * c, c, sums);                                                               \
            for (int64_t r = 0; r < n; r++) logits[r * n_codes + o] = sums[r];                                        \
        }                                                                                                             \
    }

DEFINE(float)
DEFINE(bfloat16)
