#include "q8_linear.h"

#include <algorithm>
#include <cstring>

#include <ggml.h>

#include "half.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define LLAVA_EDGE_AVX2
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace llava_edge {

namespace {

constexpr int64_t BLOCK = 32, BLOCK_BYTES = 34;  // of Q8_0: a half and 32 signed bytes
constexpr int64_t ROWS   = 16;                   // of weights, side by side
constexpr int64_t TOKENS = 6;                    // side by side: twelve sums in registers
constexpr int64_t PANEL  = 1024;                 // inputs at a time: so much of 16 rows stays in the first cache
constexpr int64_t GROUPS = 64;                   // of tokens at a time: so much of a panel stays in the second

// A group of tokens: [in / 4, TOKENS, 4] unsigned values of 7 bits, then [in / BLOCK, TOKENS, 2] floats: the value of one
// step, and of zero.
constexpr int64_t group_values(int64_t in) {
    return in * TOKENS;
}

constexpr int64_t SCALE_BYTES = TOKENS * 2 * static_cast<int64_t>(sizeof(float));

constexpr int64_t group_bytes(int64_t in) {
    return group_values(in) + in / BLOCK * SCALE_BYTES;
}

constexpr int64_t groups_of(int64_t tokens) {
    return (tokens + TOKENS - 1) / TOKENS;
}

#ifdef LLAVA_EDGE_AVX2

template <typename F> TARGET_AVX2 float reduced(__m256 v, F both) {
    __m128 m = both(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m        = both(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(both(m, _mm_movehdup_ps(m)));
}

// e^x for x of at most 87; below -87 that of -87.
TARGET_AVX2 __m256 exponential(__m256 x) {
    x               = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
    const __m256 n  = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r0 = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts
    const __m256 r  = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r0);
    __m256       p  = _mm256_set1_ps(1.0f / 720);  // Taylor's series: |r| is at most ln 2 / 2
    for (const float factor : { 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f }) {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(factor));
    }
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

// x / (1 + e^(-k x)): the two approximations of GELU differ in k.
TARGET_AVX2 __m256 activated(__m256 x, Activation activation) {
    __m256 k = _mm256_set1_ps(1.702f);
    if (activation == Activation::Gelu) {  // by the hyperbolic tangent: sqrt(8 / pi) (1 + 0.044715 x^2)
        k = _mm256_mul_ps(_mm256_set1_ps(1.59576912f), _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), _mm256_set1_ps(1.0f)));
    }
    const __m256 to_e = _mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), k), x), _mm256_set1_ps(87.0f));
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exponential(to_e)));
}

// A row becomes the values of one token of a group. Each block's range is its own, from its least value to its largest.
TARGET_AVX2 void quantize_row(const float * x, int64_t in, Activation activation, uint8_t * values, uint8_t * scales) {
    constexpr float MOST = 127.0f;
    for (int64_t block = 0; block < in / BLOCK; block++, x += BLOCK, scales += SCALE_BYTES) {
        __m256 v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            if (activation != Activation::None) {
                v[i] = activated(v[i], activation);
            }
        }
        const float least = reduced(_mm256_min_ps(_mm256_min_ps(v[0], v[1]), _mm256_min_ps(v[2], v[3])),
                                    [](__m128 a, __m128 b) TARGET_AVX2 { return _mm_min_ps(a, b); });
        const float most  = reduced(_mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3])),
                                    [](__m128 a, __m128 b) TARGET_AVX2 { return _mm_max_ps(a, b); });
        const float range = most - least;
        const float sum     = reduced(_mm256_add_ps(_mm256_add_ps(v[0], v[1]), _mm256_add_ps(v[2], v[3])),
                                      [](__m128 a, __m128 b) TARGET_AVX2 { return _mm_add_ps(a, b); });
        const float step[2] = { range / MOST, least + 0.0f * sum };  // not a number if one of them is none, or infinite
        std::memcpy(scales, step, sizeof step);
        const __m256 zero = _mm256_set1_ps(least), inverse = _mm256_set1_ps(range > 0 ? MOST / range : 0.0f);
        __m256i      q[4];
        for (int i = 0; i < 4; i++) {
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(v[i], zero), inverse));
        }
        const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i order  = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        int32_t       fours[BLOCK / 4];
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(fours), _mm256_permutevar8x32_epi32(packed, order));
        for (const int32_t & four : fours) {
            std::memcpy(values, &four, sizeof four);
            values += TOKENS * sizeof four;
        }
    }
}

TARGET_AVX2 inline __m256i eight_of(const uint8_t * from) {
    int32_t value;
    std::memcpy(&value, from, sizeof value);
    return _mm256_set1_epi32(value);
}

TARGET_AVX2 inline __m256i eight_from(const int8_t * from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}

// Add the products of some blocks to 16 outputs of six tokens: to[n][0..15]. A pair of products is at most 2 * 127 * 128,
// which 16 bits hold.
TARGET_AVX2 void tile(const int8_t * w, const float * w_scales, const uint8_t * a, const uint8_t * a_scales, int64_t blocks,
                      float * const * to) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256        sums[TOKENS][2];
#pragma GCC unroll 6
    for (int n = 0; n < TOKENS; n++) {
        sums[n][0] = _mm256_loadu_ps(to[n]);
        sums[n][1] = _mm256_loadu_ps(to[n] + 8);
    }
    for (int64_t block = 0; block < blocks; block++, w_scales += 2 * ROWS) {
        __m256i whole[TOKENS][2];
#pragma GCC unroll 6
        for (int n = 0; n < TOKENS; n++) {
            whole[n][0] = whole[n][1] = _mm256_setzero_si256();
        }
#pragma GCC unroll 2
        for (int k = 0; k < BLOCK / 4; k++, w += 4 * ROWS, a += 4 * TOKENS) {
#pragma GCC unroll 6
            for (int n = 0; n < TOKENS; n++) {
                const __m256i four = eight_of(a + 4 * n);
                whole[n][0] = _mm256_add_epi32(whole[n][0], _mm256_madd_epi16(_mm256_maddubs_epi16(four, eight_from(w)), ones));
                whole[n][1] = _mm256_add_epi32(whole[n][1], _mm256_madd_epi16(_mm256_maddubs_epi16(four, eight_from(w + 32)), ones));
                // Compilers else fetch the values of all six first, and the sums no longer fit the registers.
                asm volatile("" : "+x"(whole[n][0]), "+x"(whole[n][1])::"memory");
            }
        }
        const __m256 scale0 = _mm256_loadu_ps(w_scales), scale1 = _mm256_loadu_ps(w_scales + 8);
        const __m256 total0 = _mm256_loadu_ps(w_scales + ROWS), total1 = _mm256_loadu_ps(w_scales + ROWS + 8);
#pragma GCC unroll 6
        for (int n = 0; n < TOKENS; n++, a_scales += 2 * sizeof(float)) {
            const __m256 step = _mm256_castsi256_ps(eight_of(a_scales)), zero = _mm256_castsi256_ps(eight_of(a_scales + sizeof(float)));
            sums[n][0] = _mm256_fmadd_ps(zero, total0, sums[n][0]);
            sums[n][1] = _mm256_fmadd_ps(zero, total1, sums[n][1]);
            sums[n][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[n][0]), _mm256_mul_ps(scale0, step), sums[n][0]);
            sums[n][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[n][1]), _mm256_mul_ps(scale1, step), sums[n][1]);
        }
    }
#pragma GCC unroll 6
    for (int n = 0; n < TOKENS; n++) {
        _mm256_storeu_ps(to[n], sums[n][0]);
        _mm256_storeu_ps(to[n] + 8, sums[n][1]);
    }
}

#else

void quantize_row(const float *, int64_t, Activation, uint8_t *, uint8_t *) {}
void tile(const int8_t *, const float *, const uint8_t *, const uint8_t *, int64_t, float * const *) {}

#endif

template <Activation activation> void quantize_op(ggml_tensor * to, int number, int count, void *) {
    const ggml_tensor * x  = to->src[0];
    const int64_t       in = x->ne[0];
    for (int64_t group = number; group < to->ne[1]; group += count) {
        auto * const values = static_cast<uint8_t *>(to->data) + size_t(group) * to->nb[1];
        uint8_t *    scales = values + group_values(in);
        for (int64_t n = 0; n < TOKENS; n++) {
            const int64_t row = std::min(group * TOKENS + n, x->ne[1] - 1);  // the last one again where a group has places left
            quantize_row(reinterpret_cast<const float *>(static_cast<const char *>(x->data) + size_t(row) * x->nb[1]), in, activation,
                         values + 4 * n, scales + 2 * n * static_cast<int64_t>(sizeof(float)));
        }
    }
}

void multiply_op(ggml_tensor * to, int number, int count, void * layer) {
    const ggml_tensor * bias = to->src[1];
    static_cast<const Q8Linear *>(layer)->compute(static_cast<const uint8_t *>(to->src[0]->data), to->ne[1],
                                                  bias != nullptr ? static_cast<const float *>(bias->data) : nullptr,
                                                  static_cast<float *>(to->data), number, count);
}

}  // namespace

bool Q8Linear::fits(int64_t in, int64_t out) {
#ifdef LLAVA_EDGE_AVX2
    return in % BLOCK == 0 && out % ROWS == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    (void) in;
    (void) out;
    return false;
#endif
}

Q8Linear::Q8Linear(const uint8_t * rows, int64_t in, int64_t out) : in_(in), out_(out) {
    values_.resize(static_cast<size_t>(in * out));
    scales_.resize(static_cast<size_t>(in / BLOCK * out * 2));
    for (int64_t row = 0; row < out; row++) {
        for (int64_t block = 0; block < in / BLOCK; block++, rows += BLOCK_BYTES) {
            uint16_t half;
            std::memcpy(&half, rows, sizeof half);
            const int64_t at    = row / ROWS * (in / BLOCK) + block;
            int           total = 0;
            for (int64_t k = 0; k < BLOCK; k++) {
                const auto value = static_cast<int8_t>(rows[2 + k]);
                values_[static_cast<size_t>((at * BLOCK / 4 + k / 4) * ROWS * 4 + row % ROWS * 4 + k % 4)] = value;
                total += value;
            }
            const float scale = half_to_float(half);
            float *     to    = &scales_[static_cast<size_t>(at * ROWS * 2 + row % ROWS)];
            to[0]             = scale;
            to[ROWS]          = scale * static_cast<float>(total);
        }
    }
}

ggml_tensor * Q8Linear::multiply(ggml_context * context, ggml_tensor * x, ggml_tensor * bias, Activation activation) const {
    const ggml_custom_op_t quantize = activation == Activation::None   ? quantize_op<Activation::None>
                                      : activation == Activation::Gelu ? quantize_op<Activation::Gelu>
                                                                       : quantize_op<Activation::QuickGelu>;
    ggml_tensor * groups = ggml_custom_4d(context, GGML_TYPE_I8, group_bytes(in_), groups_of(x->ne[1]), 1, 1, &x, 1, quantize,
                                          GGML_N_TASKS_MAX, nullptr);
    ggml_tensor * args[] = { groups, bias };
    return ggml_custom_4d(context, GGML_TYPE_F32, out_, x->ne[1], 1, 1, args, bias != nullptr ? 2 : 1, multiply_op,
                          GGML_N_TASKS_MAX, const_cast<Q8Linear *>(this));
}

void Q8Linear::compute(const uint8_t * groups, int64_t tokens, const float * bias, float * to, int number, int count) const {
    const int64_t tiles = out_ / ROWS, first = tiles * number / count, end = tiles * (number + 1) / count;
    for (int64_t token = 0; token < tokens; token++) {
        float * row = to + token * out_;
        if (bias != nullptr) {
            std::copy(bias + first * ROWS, bias + end * ROWS, row + first * ROWS);
        } else {
            std::fill(row + first * ROWS, row + end * ROWS, 0.0f);
        }
    }
    float         spare[ROWS] = {};  // of the places that the last group has left
    const int64_t all         = groups_of(tokens);
    for (int64_t some = 0; some < all; some += GROUPS) {
        for (int64_t from = 0; from < in_; from += PANEL) {
            const int64_t blocks = std::min(PANEL, in_ - from) / BLOCK;
            for (int64_t strip = first; strip < end; strip++) {
                const int8_t * values = values_.data() + (strip * in_ + from) * ROWS;
                const float *  scales = scales_.data() + (strip * in_ + from) / BLOCK * ROWS * 2;
                for (int64_t group = some; group < std::min(all, some + GROUPS); group++) {
                    const uint8_t * a = groups + group * group_bytes(in_);
                    float *         into[TOKENS];
                    for (int64_t n = 0; n < TOKENS; n++) {
                        const int64_t token = group * TOKENS + n;
                        into[n]             = token < tokens ? to + token * out_ + strip * ROWS : spare;
                    }
                    tile(values, scales, a + group_values(from), a + group_values(in_) + from / BLOCK * SCALE_BYTES,
                         blocks, into);
                }
            }
        }
    }
}

}  // namespace llava_edge
