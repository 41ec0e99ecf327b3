// Products of activations with a packed weight (quantize.h).
#pragma once

#include <algorithm>

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

    // Columns [n, n + LANES) of a row, of which some may be beyond the last.
    void put(int64_t row, int64_t n, floats value) const {
        if (n >= N) return;
        if (bias) value += load_part(bias + n, N - n);
        store_part(y + row * N + n, apply(function, value), N - n);
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
    __m256i pairs;
    if (HALF) {
        pairs = _mm256_maddubs_epi16((__m256i)codes, four);
    } else {
        const __m256i value = _mm256_xor_si256((__m256i)codes, _mm256_set1_epi8(-128));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(four, value));
    }
    return sum + (ints)_mm256_madd_epi16(pairs, ones);
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

// What fits the registers: AVX-512 has 32, the others 16.
constexpr bool MANY = LANES == 16;

// What a tile brings into the caches at every k, of blocks that lie `stride` bytes apart. Where tiles of
// rows come one after the other, only the first would wait for memory, and then the others not use it:
// so each brings blocks [first, last) of the next weights, which lie so many bytes ahead.
struct FetchNext {
    int64_t ahead, first, last;
    void operator()(const void* from, int64_t stride) const {
        for (int64_t b = first; b < last; b++) __builtin_prefetch((const char*)from + b * stride + ahead);
    }
};

// One tile of few bits, which is fast: what it will come to itself.
template <int BLOCKS>
struct FetchOwn {
    void operator()(const void* from, int64_t stride) const {
        for (int b = 0; b < BLOCKS; b++) __builtin_prefetch((const char*)from + b * stride + 2048);
    }
};

// One tile of 32 bits is best left to the machine's own foresight.
struct FetchNothing {
    void operator()(const void*, int64_t) const {}
};

// ROWS rows of activations times BLOCKS blocks of columns.
template <int BITS, int ROWS, int BLOCKS, class Fetch>
inline void packed_tile(const Matrix& w, int64_t block, const Activations& x, int64_t row, Fetch fetch, const Output& to) {
    constexpr int group = Format<BITS>::group, V = BLOCKS * PARTS;
    constexpr int per_load = STEP * 8 / BITS;  // values of k in a lane
    const int64_t K = w.K, groups = K / group, stride = Format<BITS>::block_bytes(K);
    const uint8_t* codes = (const uint8_t*)w.codes + block * stride;
    const uint16_t* scales = w.scales + block * groups * BLOCK;
    const int8_t* values = x.values.data() + row * K;
    floats total[ROWS][V] = {};
    for (int64_t g = 0; g < groups; g++) {
        ints sum[ROWS][V];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) sum[r][v] = broadcast(correction<BITS>(x.sums[(row + r) * groups + g]));
        for (int k = 0; k < group; k += per_load, codes += BLOCK * STEP) {
            bytes part[V];
            for (int v = 0; v < V; v++) part[v] = load<bytes>(codes + v / PARTS * stride + v % PARTS * LANES * STEP);
            fetch(codes, stride);
            for (int r = 0; r < ROWS; r++) {
                const int8_t* at = values + r * K + g * group + k;
                const int32_t four = load<int32_t>(at);
                if (BITS == 8) {
                    for (int v = 0; v < V; v++) sum[r][v] = dot<false>(sum[r][v], part[v], four);
                } else {
                    const int32_t next = load<int32_t>(at + STEP);
                    for (int v = 0; v < V; v++) {
                        sum[r][v] = dot<true>(sum[r][v], part[v] & 15, four);
                        sum[r][v] = dot<true>(sum[r][v], (bytes)((ints)part[v] >> 4) & 15, next);
                    }
                }
            }
        }
        for (int v = 0; v < V; v++) {
            const floats of_weight = from_bfloat16(scales + (v / PARTS * groups + g) * BLOCK + v % PARTS * LANES);
            for (int r = 0; r < ROWS; r++) {
                const floats of_x = broadcast(x.scales[(row + r) * groups + g]);
                total[r][v] += (to_floats(sum[r][v]) * of_x) * of_weight;
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < V; v++) to.put(row + r, block * BLOCK + v * LANES, total[r][v]);
}

constexpr int MOST_ROWS = MANY ? 8 : 4;  // of a tile

// Calls f(row, std::integral_constant<int, R>) for each tile of M rows; R is 8, 4, 2 or 1.
template <int R = MOST_ROWS, class F>
inline void for_tiles(int64_t M, int64_t row, F f) {
    for (; row + R <= M; row += R) f(row, std::integral_constant<int, R>());
    if constexpr (R > 1) for_tiles<R / 2>(M, row, f);
}

template <int BITS, int BLOCKS>
inline void packed_rows(const Matrix& w, int64_t block, const Activations& x, int64_t M, const Output& to) {
    const int64_t next = BLOCKS * Format<BITS>::block_bytes(w.K);
    for_tiles(M, 0, [&](int64_t row, auto size) {
        constexpr int R = decltype(size)::value;
        if (M <= MOST_ROWS)
            packed_tile<BITS, R, BLOCKS>(w, block, x, row, FetchOwn<BLOCKS>(), to);
        else
            packed_tile<BITS, R, BLOCKS>(w, block, x, row, FetchNext{next, row * BLOCKS / M, (row + R) * BLOCKS / M}, to);
    });
}

// This thread's columns of the product of quantized activations.
template <int BITS>
inline void multiply_packed(const Matrix& w, const Activations& x, int64_t M, const Output& to, int thread,
                            int threads) {
    constexpr int side = MANY ? 2 : 1;
    const Share blocks((w.N + BLOCK - 1) / BLOCK, side, thread, threads);
    int64_t block = blocks.first;
    for (; block + side <= blocks.last; block += side) packed_rows<BITS, side>(w, block, x, M, to);
    for (; block < blocks.last; block++) packed_rows<BITS, 1>(w, block, x, M, to);
}

// Rows of float32 are taken in panels, one for a tile: of R rows it is [K][R].
template <int R>
inline void fill_panel(const float* x, int64_t K, float* panel, int thread, int threads) {
    const Share part(K, 64, thread, threads);
    for (int64_t k = part.first; k < part.last; k++)
        for (int r = 0; r < R; r++) panel[k * R + r] = x[r * K + k];
}

constexpr int SIDE = 4;             // blocks that meet a panel while it is in the cache
constexpr int WIDTH = SIDE * PARTS;  // their vectors

// Adds to `totals` [R][WIDTH] the products of `depth` of k of a panel of R rows with BLOCKS blocks of
// columns.
template <int R, int BLOCKS, class Fetch>
inline void float_tile(const float* weight, int64_t K, const float* panel, int64_t depth, Fetch fetch, floats* totals) {
    constexpr int V = BLOCKS * PARTS;
    floats sum[R][V] = {};
    for (int64_t k = 0; k < depth; k++) {
        floats part[V];
        for (int v = 0; v < V; v++)
            part[v] = load<floats>(weight + (v / PARTS * K + k) * BLOCK + v % PARTS * LANES);
        fetch(weight + k * BLOCK, K * BLOCK * sizeof(float));
        for (int r = 0; r < R; r++) {
            const floats value = broadcast(panel[k * R + r]);
            for (int v = 0; v < V; v++) sum[r][v] = multiply_add(value, part[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) totals[r * WIDTH + v] += sum[r][v];
}

// This thread's columns of the product of M rows in panels.
inline void multiply_floats(const Matrix& w, const float* panels, int64_t M, const Output& to, int thread, int threads) {
    // Of K at a time: the 64 KB of weights that all panels meet stay in the L2 cache, and sums of so
    // few products keep the error of long rows small.
    constexpr int64_t deep = 256;
    static thread_local std::vector<floats> totals;
    if (int64_t(totals.size()) < M * WIDTH) totals.resize(M * WIDTH);
    const int64_t K = w.width;
    const Share blocks((w.N + BLOCK - 1) / BLOCK, SIDE, thread, threads);
    for (int64_t block = blocks.first; block < blocks.last; block += SIDE) {
        const int64_t count = blocks.last - block < SIDE ? blocks.last - block : SIDE;
        const float* blocks_k = (const float*)w.codes + block * K * BLOCK;
        std::memset((void*)totals.data(), 0, M * WIDTH * sizeof(floats));
        for (int64_t k = 0; k < K; k += deep, blocks_k += deep * BLOCK) {
            const int64_t depth = K - k < deep ? K - k : deep;
            const bool last = k + deep >= K;
            const int64_t ahead = (last ? SIDE * K - k : deep) * BLOCK * sizeof(float);
            for_tiles(M, 0, [&](int64_t row, auto size) {
                constexpr int R = decltype(size)::value, together = MANY ? 4 : R == 1 ? 2 : 1;
                const float* panel = panels + row * K + k * R;
                floats* to_panel = totals.data() + row * WIDTH;
                auto tile = [&](int64_t b, auto blocks, auto fetch) {
                    float_tile<R, decltype(blocks)::value>(blocks_k + b * K * BLOCK, K, panel, depth, fetch, to_panel + b * PARTS);
                };
                const int64_t first = row * SIDE / M, end = (row + R) * SIDE / M;
                int64_t b = 0;
                for (; b + together <= count; b += together) {
                    const std::integral_constant<int, together> blocks;
                    if (M <= MOST_ROWS)
                        tile(b, blocks, FetchNothing());
                    else
                        tile(b, blocks, FetchNext{ahead, std::max<int64_t>(first - b, 0), std::min<int64_t>(end - b, together)});
                }
                for (; b < count; b++) tile(b, std::integral_constant<int, 1>(), FetchNothing());
            });
        }
        for (int64_t row = 0; row < M; row++)
            for (int64_t v = 0; v < count * PARTS; v++)
                to.put(row, block * BLOCK + v * LANES, totals[row * WIDTH + v]);
    }
}

}  // namespace neox
