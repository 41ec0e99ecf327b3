// Products of activations with a packed weight (quantize.h).
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "quantize.h"

namespace neox {

// A weight [N, width] as neox/kernels/library.py describes it.
struct Matrix {
    int64_t bits;  // 8, 4 or 32
    const void* codes;
    const uint16_t* scales;  // null at 32 bits
    const float* bias;       // [N] or null
    int64_t N, width, K;     // K: the width in whole groups
};

// A part of n things in multiples of `unit`: what one of several threads does.
struct Share {
    int64_t first, last;
    Share(int64_t n, int unit, int thread, int threads) {
        const int64_t units = (n + unit - 1) / unit;
        first = units * thread / threads * unit;
        last = units * (thread + 1) / threads * unit;
        if (last > n) last = n;
    }
};

struct Output {
    float* y;  // [M][N]
    const float* bias;
    int64_t N;
    Function function;

    // n < N: the first of 16 columns, of which some may be beyond the last.
    void put(int64_t row, int64_t n, floats value) const {
        float* to = y + row * N + n;
        if (n + LANES <= N) {
            if (bias) value += load<floats>(bias + n);
            store(to, apply(function, value));
        } else {
            if (bias) value += load_part(bias + n, N - n);
            value = apply(function, value);
            std::memcpy(to, &value, (N - n) * sizeof(float));
        }
    }
};

// Each lane's sum plus the products of its 4 codes (unsigned) with x's 4 bytes (signed).
// HALF: the codes are below 16.
template <bool HALF>
inline ints dot(ints sum, bytes codes, int32_t x) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    // vpmaddubsw saturates at 16 bits. Two products of at most 15 * 127 fit; two of 127 * 127 do once
    // the code is the value's magnitude and x has its sign. `sum` then lacks 128 in every code.
    const __m256i ones = _mm256_set1_epi16(1), four = _mm256_set1_epi32(x);
    __m256i part[2], sums[2];
    std::memcpy(part, &codes, sizeof codes);
    std::memcpy(sums, &sum, sizeof sum);
    for (int i = 0; i < 2; i++) {
        __m256i pairs;
        if (HALF) {
            pairs = _mm256_maddubs_epi16(part[i], four);
        } else {
            const __m256i value = _mm256_xor_si256(part[i], _mm256_set1_epi8(-128));
            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(four, value));
        }
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
    }
    std::memcpy(&sum, sums, sizeof sum);
    return sum;
#else
    int8_t four[STEP];
    std::memcpy(four, &x, sizeof four);
    for (int lane = 0; lane < LANES; lane++) {
        int32_t products = 0;
        for (int k = 0; k < STEP; k++) products += int32_t(codes[lane * STEP + k]) * four[k];
        sum[lane] += products;
    }
    return sum;
#endif
}

// What `dot` begins with so that a group comes to the sum of its values' products; `sum` is that of
// the activations.
template <int BITS>
inline int32_t correction(int32_t sum) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    if (BITS == 8) return 0;
#endif
    return -Format<BITS>::zero * sum;
}

// ROWS rows of activations times BLOCKS blocks of 16 columns.
template <int BITS, int ROWS, int BLOCKS>
inline void packed_tile(const Matrix& w, int64_t block, const Activations& x, int64_t row, const Output& to) {
    constexpr int group = Format<BITS>::group;
    constexpr int per_load = STEP * 8 / BITS;  // values of k in 64 bytes of a block
    const int64_t K = w.K, groups = K / group, stride = Format<BITS>::block_bytes(K);
    const uint8_t* codes = (const uint8_t*)w.codes + block * stride;
    const uint16_t* scales = w.scales + block * groups * LANES;
    const int8_t* values = x.values.data() + row * K;
    floats total[ROWS][BLOCKS] = {};
    for (int64_t g = 0; g < groups; g++) {
        ints sum[ROWS][BLOCKS];
        for (int r = 0; r < ROWS; r++)
            for (int b = 0; b < BLOCKS; b++)
                sum[r][b] = broadcast(correction<BITS>(x.sums[(row + r) * groups + g]));
        for (int k = 0; k < group; k += per_load, codes += 64) {
            bytes part[BLOCKS];
            for (int b = 0; b < BLOCKS; b++) {
                __builtin_prefetch(codes + b * stride + 2048);
                part[b] = load<bytes>(codes + b * stride);
            }
            for (int r = 0; r < ROWS; r++) {
                const int8_t* at = values + r * K + g * group + k;
                const int32_t four = load<int32_t>(at);
                if (BITS == 8) {
                    for (int b = 0; b < BLOCKS; b++) sum[r][b] = dot<false>(sum[r][b], part[b], four);
                } else {
                    const int32_t next = load<int32_t>(at + STEP);
                    for (int b = 0; b < BLOCKS; b++) {
                        sum[r][b] = dot<true>(sum[r][b], part[b] & 15, four);
                        sum[r][b] = dot<true>(sum[r][b], (bytes)((ints)part[b] >> 4) & 15, next);
                    }
                }
            }
        }
        for (int b = 0; b < BLOCKS; b++) {
            const floats of_weight = from_bfloat16(scales + (b * groups + g) * LANES);
            for (int r = 0; r < ROWS; r++) {
                const floats of_x = broadcast(x.scales[(row + r) * groups + g]);
                total[r][b] += (to_floats(sum[r][b]) * of_x) * of_weight;
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BLOCKS; b++) to.put(row + r, (block + b) * LANES, total[r][b]);
}

template <int BITS, int BLOCKS>
inline void packed_rows(const Matrix& w, int64_t block, const Activations& x, int64_t M, const Output& to) {
    int64_t row = 0;
    for (; row + 8 <= M; row += 8) packed_tile<BITS, 8, BLOCKS>(w, block, x, row, to);
    for (; row + 2 <= M; row += 2) packed_tile<BITS, 2, BLOCKS>(w, block, x, row, to);
    for (; row < M; row++) packed_tile<BITS, 1, BLOCKS>(w, block, x, row, to);
}

// This thread's columns of the product of quantized activations.
template <int BITS>
inline void multiply_packed(const Matrix& w, const Activations& x, int64_t M, const Output& to, int thread,
                            int threads) {
    Share blocks((w.N + LANES - 1) / LANES, 2, thread, threads);
    int64_t block = blocks.first;
    for (; block + 2 <= blocks.last; block += 2) packed_rows<BITS, 2>(w, block, x, M, to);
    for (; block < blocks.last; block++) packed_rows<BITS, 1>(w, block, x, M, to);
}

inline floats multiply_add(floats a, floats b, floats sum) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
    return sum + a * b;
#endif
}

// Rows of float32 are taken in panels of 16, 8, 4, 2 or 1, as many as their sums have registers; a
// panel of R rows is [K][R].
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8;
#else
constexpr int MOST_ROWS = 4;
#endif

// Calls f(std::integral_constant<int, R>, row) for each panel of M rows.
template <int R = MOST_ROWS, class F>
inline void for_panels(int64_t M, int64_t row, F f) {
    for (; row + R <= M; row += R) f(std::integral_constant<int, R>(), row);
    if constexpr (R > 1) for_panels<R / 2>(M, row, f);
}

template <int R>
inline void fill_panel(const float* x, int64_t K, float* panel, int thread, int threads) {
    const Share part(K, 64, thread, threads);
    for (int64_t k = part.first; k < part.last; k++)
        for (int r = 0; r < R; r++) panel[k * R + r] = x[r * K + k];
}

// A panel of R rows times BLOCKS blocks of 16 columns. Partial sums of PART products keep the error
// of long rows small.
template <int R, int BLOCKS>
inline void float_tile(const Matrix& w, int64_t block, const float* panel, int64_t row, const Output& to) {
    constexpr int64_t PART = 256;
    const int64_t K = w.width, stride = K * LANES;
    const float* weight = (const float*)w.codes + block * stride;
    floats total[R][BLOCKS] = {};
    for (int64_t first = 0; first < K; first += PART) {
        const int64_t last = first + PART < K ? first + PART : K;
        floats sum[R][BLOCKS] = {};
        for (int64_t k = first; k < last; k++) {
            floats part[BLOCKS];
            for (int b = 0; b < BLOCKS; b++) part[b] = load<floats>(weight + b * stride + k * LANES);
            for (int r = 0; r < R; r++) {
                const floats value = broadcast(panel[k * R + r]);
                for (int b = 0; b < BLOCKS; b++) sum[r][b] = multiply_add(value, part[b], sum[r][b]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < BLOCKS; b++) total[r][b] += sum[r][b];
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < BLOCKS; b++) to.put(row + r, (block + b) * LANES, total[r][b]);
}

// This thread's columns of the product of M rows in panels.
inline void multiply_floats(const Matrix& w, const float* panels, int64_t M, const Output& to, int thread, int threads) {
    constexpr int together = 4;
    const Share blocks((w.N + LANES - 1) / LANES, together, thread, threads);
    for (int64_t block = blocks.first; block < blocks.last; block += together)
        for_panels(M, 0, [&](auto size, int64_t row) {
            constexpr int R = decltype(size)::value, side = MOST_ROWS == 8 ? 4 : 1;
            const int64_t last = block + together < blocks.last ? block + together : blocks.last;
            int64_t b = block;
            for (; b + side <= last; b += side) float_tile<R, side>(w, b, panels + row * w.width, row, to);
            for (; b < last; b++) float_tile<R, 1>(w, b, panels + row * w.width, row, to);
        });
}

}  // namespace neox
