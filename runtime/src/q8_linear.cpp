#include "q8_linear.h"

#include <algorithm>
#include <cmath>
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
constexpr int64_t ROWS  = 8;                     // of weights, side by side
constexpr int64_t TOKENS = 4;                    // at a time

// A row of the input: its values as signed bytes, then a float for each block.
constexpr int64_t row_bytes(int64_t in) {
    return in + in / BLOCK * static_cast<int64_t>(sizeof(float));
}

#ifdef LLAVA_EDGE_AVX2

TARGET_AVX2 void quantize_row(const float * x, int64_t in, uint8_t * to) {
    uint8_t * scales = to + in;
    for (int64_t block = 0; block < in / BLOCK; block++, x += BLOCK, to += BLOCK, scales += sizeof(float)) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        __m256       v[4], most = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
        }
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
        m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
        m        = _mm_max_ss(m, _mm_movehdup_ps(m));
        const float largest = _mm_cvtss_f32(m), scale = largest / 127.0f;
        std::memcpy(scales, &scale, sizeof scale);
        const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
        __m256i      q[4];
        for (int i = 0; i < 4; i++) {
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i order  = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_permutevar8x32_epi32(packed, order));
    }
}

inline int32_t four_bytes(const uint8_t * from) {
    int32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline float one_float(const uint8_t * from) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Eight outputs of N tokens. The products of bytes are sums of an unsigned and a signed one: |w| * (a with w's sign).
template <int N>
TARGET_AVX2 void tile(const uint8_t * w, const float * w_scales, const uint8_t * rows, int64_t in, __m256 bias, float * to, int64_t out) {
    const int64_t stride = row_bytes(in);
    const __m256i ones   = _mm256_set1_epi16(1);
    __m256        sums[N];
    for (int n = 0; n < N; n++) {
        sums[n] = bias;
    }
    for (int64_t block = 0; block < in / BLOCK; block++) {
        __m256i whole[N];
        for (int n = 0; n < N; n++) {
            whole[n] = _mm256_setzero_si256();
        }
        const uint8_t * a = rows + block * BLOCK;
        for (int k = 0; k < BLOCK / 4; k++, w += 4 * ROWS) {
            const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w));
            const __m256i size    = _mm256_abs_epi8(weights);
            for (int n = 0; n < N; n++) {
                const __m256i values = _mm256_set1_epi32(four_bytes(a + n * stride + 4 * k));
                const __m256i pairs  = _mm256_maddubs_epi16(size, _mm256_sign_epi8(values, weights));
                whole[n]             = _mm256_add_epi32(whole[n], _mm256_madd_epi16(pairs, ones));
            }
        }
        const __m256 scale = _mm256_loadu_ps(w_scales + block * ROWS);
        for (int n = 0; n < N; n++) {
            const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(one_float(rows + n * stride + in + block * int64_t(sizeof(float)))));
            sums[n]           = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[n]), both, sums[n]);
        }
    }
    for (int n = 0; n < N; n++) {
        _mm256_storeu_ps(to + n * out, sums[n]);
    }
}

TARGET_AVX2 void tile_of(int64_t tokens, const uint8_t * w, const float * scales, const uint8_t * rows, int64_t in, const float * bias,
                         float * to, int64_t out) {
    const __m256 b = bias != nullptr ? _mm256_loadu_ps(bias) : _mm256_setzero_ps();
    switch (tokens) {
        case 1:
            return tile<1>(w, scales, rows, in, b, to, out);
        case 2:
            return tile<2>(w, scales, rows, in, b, to, out);
        case 3:
            return tile<3>(w, scales, rows, in, b, to, out);
        default:
            return tile<4>(w, scales, rows, in, b, to, out);
    }
}

#else

void quantize_row(const float *, int64_t, uint8_t *) {}
void tile_of(int64_t, const uint8_t *, const float *, const uint8_t *, int64_t, const float *, float *, int64_t) {}

#endif

void quantize_op(ggml_tensor * to, int number, int count, void *) {
    const ggml_tensor * x = to->src[0];
    for (int64_t row = number; row < to->ne[1]; row += count) {
        quantize_row(reinterpret_cast<const float *>(static_cast<const char *>(x->data) + size_t(row) * x->nb[1]), x->ne[0],
                     static_cast<uint8_t *>(to->data) + size_t(row) * to->nb[1]);
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
    scales_.resize(static_cast<size_t>(in / BLOCK * out));
    for (int64_t row = 0; row < out; row++) {
        for (int64_t block = 0; block < in / BLOCK; block++, rows += BLOCK_BYTES) {
            uint16_t scale;
            std::memcpy(&scale, rows, sizeof scale);
            const int64_t at                                                       = row / ROWS * (in / BLOCK) + block;
            scales_[static_cast<size_t>(at * ROWS + row % ROWS)]                   = half_to_float(scale);
            for (int64_t k = 0; k < BLOCK; k++) {
                // -128, which no writer makes, has no absolute value in a byte
                const auto value = std::max<int8_t>(static_cast<int8_t>(rows[2 + k]), -127);
                values_[static_cast<size_t>((at * BLOCK / 4 + k / 4) * ROWS * 4 + row % ROWS * 4 + k % 4)] = static_cast<uint8_t>(value);
            }
        }
    }
}

ggml_tensor * Q8Linear::quantize(ggml_context * context, ggml_tensor * x) {
    return ggml_custom_4d(context, GGML_TYPE_I8, row_bytes(x->ne[0]), x->ne[1], 1, 1, &x, 1, quantize_op, GGML_N_TASKS_MAX, nullptr);
}

ggml_tensor * Q8Linear::multiply(ggml_context * context, ggml_tensor * quantized, ggml_tensor * bias) const {
    ggml_tensor * args[] = { quantized, bias };
    return ggml_custom_4d(context, GGML_TYPE_F32, out_, quantized->ne[1], 1, 1, args, bias != nullptr ? 2 : 1, multiply_op,
                          GGML_N_TASKS_MAX, const_cast<Q8Linear *>(this));
}

void Q8Linear::compute(const uint8_t * rows, int64_t tokens, const float * bias, float * to, int number, int count) const {
    const int64_t tiles = out_ / ROWS;
    for (int64_t tile = tiles * number / count; tile < tiles * (number + 1) / count; tile++) {
        const uint8_t * values = values_.data() + static_cast<size_t>(tile * ROWS * in_);
        const float *   scales = scales_.data() + static_cast<size_t>(tile * ROWS * (in_ / BLOCK));
        const float *   shift  = bias != nullptr ? bias + tile * ROWS : nullptr;
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            tile_of(std::min(TOKENS, tokens - token), values, scales, rows + token * row_bytes(in_), in_, shift,
                    to + token * out_ + tile * ROWS, out_);
        }
    }
}

}  // namespace llava_edge
