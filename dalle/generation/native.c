// Attention of one image token a picture, in one pass: store its key and value, score, softmax, mix.
//
// What dalle/generation/decoder.py does with a dozen tensor operations, for few pictures at once, where starting an
// operation costs more than doing it. Compiled by dalle/generation/native.py when it is asked for.
//
// Shapes: H heads, R pictures, P captions, T text slots with BOS, L slots of the image cache, W of them seen, D head
// width. qkv (R, 3, H, D); keys and values of captions (H, P, T, D); memory (2, H, R, L, D); out (R, H, D); scores has
// room for T + W numbers.

#include <math.h>
#include <stdint.h>

typedef uint16_t bfloat16;

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

#define MAX_D 256

#define DEFINE_ATTEND(T)                                                                                              \
    static inline float dot_##T(const float *q, const T *key, int64_t d) {                                            \
        float sum = 0;                                                                                                \
        for (int64_t i = 0; i < d; i++) sum += q[i] * read_##T(key[i]);                                               \
        return sum;                                                                                                   \
    }                                                                                                                 \
                                                                                                                      \
    static inline void mix_##T(float *sum, float share, const T *value, int64_t d) {                                  \
        for (int64_t i = 0; i < d; i++) sum[i] += share * read_##T(value[i]);                                         \
    }                                                                                                                 \
                                                                                                                      \
    void attend_##T(const T *qkv, const T *keys, const T *values, T *memory, const int64_t *caption_of,               \
                    const int64_t *seen, T *out, float *scores, int64_t n_heads, int64_t n_pictures,                  \
                    int64_t n_captions, int64_t n_text, int64_t n_slots, int64_t n_seen, int64_t d, int64_t slot) {   \
        const float scale = 1 / sqrtf((float)d);                                                                      \
        for (int64_t h = 0; h < n_heads; h++) {                                                                       \
            for (int64_t r = 0; r < n_pictures; r++) {                                                                \
                const T *own = qkv + (r * 3 * n_heads + h) * d;                                                       \
                T *image_keys = memory + (h * n_pictures + r) * n_slots * d;                                          \
                T *image_values = image_keys + n_heads * n_pictures * n_slots * d;                                    \
                const int64_t text = (h * n_captions + caption_of[r]) * n_text * d;                                   \
                float q[MAX_D], sum[MAX_D], total = 0, largest;                                                       \
                for (int64_t i = 0; i < d; i++) {                                                                     \
                    q[i] = scale * read_##T(own[i]);                                                                  \
                    sum[i] = 0;                                                                                       \
                    image_keys[slot * d + i] = own[n_heads * d + i];                                                  \
                    image_values[slot * d + i] = own[2 * n_heads * d + i];                                            \
                }                                                                                                     \
                for (int64_t t = 0; t < n_text; t++) scores[t] = dot_##T(q, keys + text + t * d, d);                  \
                for (int64_t w = 0; w < n_seen; w++)                                                                  \
                    scores[n_text + w] = dot_##T(q, image_keys + seen[w] * d, d);                                     \
                largest = scores[0];                                                                                  \
                for (int64_t i = 1; i < n_text + n_seen; i++) largest = scores[i] > largest ? scores[i] : largest;    \
                for (int64_t i = 0; i < n_text + n_seen; i++) {                                                       \
                    scores[i] = expf(scores[i] - largest);                                                            \
                    total += scores[i];                                                                               \
                }                                                                                                     \
                for (int64_t t = 0; t < n_text; t++) mix_##T(sum, scores[t], values + text + t * d, d);               \
                for (int64_t w = 0; w < n_seen; w++)                                                                  \
                    mix_##T(sum, scores[n_text + w], image_values + seen[w] * d, d);                                  \
                for (int64_t i = 0; i < d; i++)                                                                       \
                    out[(r * n_heads + h) * d + i] = write_##T(sum[i] / total);                                       \
            }                                                                                                         \
        }                                                                                                             \
    }

DEFINE_ATTEND(float)
DEFINE_ATTEND(bfloat16)
