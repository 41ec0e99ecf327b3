// As many lanes at a time as the machine's registers have, in GCC's vector extensions: the compiler
// finds the instructions. -ffp-contract=off keeps it from fusing multiplications into additions where
// the order of what is rounded matters; where it does not, `multiply_add` fuses them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace neox {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t narrow __attribute__((vector_size(LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));  // 4 for each lane

template <class T>
inline T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
inline void store(void* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

// The first n values, LANES at most, and zeros.
inline floats load_part(const float* from, int64_t n) {
    if (n >= LANES) return load<floats>(from);
    floats value{};
    std::memcpy(&value, from, n * sizeof(float));
    return value;
}

inline void store_part(float* to, floats value, int64_t n) {
    if (n >= LANES)
        store(to, value);
    else
        std::memcpy(to, &value, n * sizeof(float));
}

// Without an instruction: x - 0 is x, of every x, and x + 0 is not.
inline floats broadcast(float value) { return value - floats{}; }
inline ints broadcast(int32_t value) { return ints{} + value; }
inline floats to_floats(ints value) { return __builtin_convertvector(value, floats); }
inline ints to_ints(floats value) { return __builtin_convertvector(value, ints); }

inline floats from_bfloat16(const uint16_t* from) {
    return (floats)(__builtin_convertvector(load<shorts>(from), ints) << 16);
}

inline floats larger(floats a, floats b) { return a > b ? a : b; }

// To the nearest integer, halves to the even one; |x| < 2^22.
inline floats nearest(floats x) {
    const floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: its last bit is worth 1
    return (x + magic) - magic;
}

inline floats multiply_add(floats a, floats b, floats sum) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__) && defined(__AVX2__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

// Of all lanes: the upper half is added to the lower one until one lane is left.
inline float total(floats value) {
    float lanes[LANES];
    store(lanes, value);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// The total of each of LANES vectors, bit for bit, in a lane.
inline floats totals(const floats* v) {
#if defined(__AVX512F__)
    const ints lower[4] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                           {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
                           {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29},
                           {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}};
    floats sums[LANES];
    std::memcpy(sums, v, sizeof sums);
    for (int step = 0, half = LANES / 2; step < 4; step++, half /= 2)
        for (int i = 0; i < half; i++)  // halves of pieces are added, of two vectors at a time
            sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], lower[step]) +
                      __builtin_shuffle(sums[2 * i], sums[2 * i + 1], lower[step] + (8 >> step));
    return sums[0];
#else
    floats result{};
    for (int lane = 0; lane < LANES; lane++) result[lane] = total(v[lane]);
    return result;
#endif
}

inline int32_t total(ints value) {
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

inline float largest(floats value) {
    float most = value[0];
    for (int lane = 1; lane < LANES; lane++) most = value[lane] > most ? value[lane] : most;
    return most;
}

// Within 2 units in the last place. Of less than -87 it is 0, of more than 88.72 infinite; of NaN, NaN.
inline floats exponential(floats x) {
    const floats clamped = x < -87.0f ? broadcast(-87.0f) : x > 88.72f ? broadcast(88.72f) : x;
    const floats n = nearest(clamped * 1.44269504f);
    // ln 2 in two parts, the first of few bits so that n times it is exact (Cody and Waite).
    const floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    floats p = broadcast(1.9875691500e-4f);  // Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, as n = 128 does not fit one.
    const ints whole = to_ints(n), half = whole >> 1;
    const floats result = p * (floats)((half + 127) << 23) * (floats)((whole - half + 127) << 23);
    return x < -87.0f ? floats{} : x > 88.72f ? broadcast(__builtin_inff()) : x == x ? result : x;
}

inline floats sigmoid(floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
inline floats error_function(floats x) {
    const floats magnitude = x < 0.0f ? -x : x;
    const floats t = 1.0f / (1.0f + 0.3275911f * magnitude);
    floats p = broadcast(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const floats result = 1.0f - p * t * exponential(-magnitude * magnitude);
    return x < 0.0f ? -result : result;
}

// A function that is applied to what a product gives; the numbers are neox/kernels/library.py's.
enum Function : int32_t { NONE = 0, GELU_TANH = 1, GELU_ERF = 2, SILU = 3, RELU = 4 };

inline floats apply(Function function, floats x) {
    switch (function) {
        case GELU_TANH: {  // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
            const floats u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
            return x * sigmoid(2.0f * u);
        }
        case GELU_ERF: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
        case SILU: return x * sigmoid(x);
        case RELU: return x < 0.0f ? floats{} : x;
        default: return x;
    }
}

}  // namespace neox
