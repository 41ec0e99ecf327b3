// Weights side by side as they are multiplied, and numbers as small integers with scales.
//
// A weight [N, K] is packed in blocks of 16 rows n, and each row in groups of consecutive k that
// share a scale. neox/model/packed.py does the same in torch, bit for bit.
//   codes   8 bits: [N/16][K/4][16 n][4 k]   uint8, the value plus 128
//           4 bits: [N/16][K/8][16 n][4 k]   uint8, the value plus 8: the low half is of k, the
//                                            high half of k + 4
//   scales          [N/16][K/group][16 n]    bfloat16
// N and K are padded, with zeros, to whole blocks and groups. Activations are quantized to 8 bits as
// they come, with a scale (float32) for each row and group. A weight that stays as it is, 32 bits, is
// [N/16][K][16 n], float32.
#pragma once

#include <type_traits>
#include <vector>

#include "vector.h"

namespace neox {

constexpr int BLOCK = 16;             // rows of a weight side by side
constexpr int PARTS = BLOCK / LANES;  // vectors of a block's rows
constexpr int STEP = 4;               // values of k side by side in a lane

template <int BITS>
struct Format {
    static constexpr int group = BITS == 8 ? 64 : 32;
    static constexpr int zero = BITS == 8 ? 128 : 8;  // the code of the value 0
    static int64_t block_bytes(int64_t K) { return K * BLOCK * BITS / 8; }
};

// Calls f with the number of bits, 8 or 4, as a constant.
template <class F>
inline void with_format(int64_t bits, F f) {
    if (bits == 8)
        f(std::integral_constant<int, 8>());
    else
        f(std::integral_constant<int, 4>());
}

constexpr float NOTHING = 1e-30f;  // magnitudes below it count as 0: their steps have no inverse

// What a product makes of its activations before it begins.
struct Activations {
    std::vector<int8_t> values;  // [M][K]
    std::vector<float> scales;   // [M][K / group]
    std::vector<int32_t> sums;   // [M][K / group], of the values
    std::vector<float> panels;   // for weights of 32 bits: product.h

    void reserve(int64_t M, int64_t K, int group) {
        if (int64_t(values.size()) < M * K) values.resize(M * K);
        if (int64_t(scales.size()) < M * K / group) {
            scales.resize(M * K / group);
            sums.resize(M * K / group);
        }
    }
};

// The largest magnitude of n values, a multiple of LANES; NaN where there is one.
inline float largest_magnitude(const float* x, int n) {
    ints most{};
    for (int k = 0; k < n; k += LANES) {
        const ints magnitude = load<ints>(x + k) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = most[lane] > bits ? most[lane] : bits;
    return load<float>(&bits);
}

inline void quantize_activations(const float* x, int n, int8_t* values, float& scale, int32_t& sum) {
    const float most = largest_magnitude(x, n);
    scale = most / 127.0f;
    sum = 0;
    if (most < NOTHING || !(most - most == 0.0f)) {  // a scale of infinity or NaN makes products NaN
        std::memset(values, 0, n);
        return;
    }
    const floats inverse = broadcast(127.0f / most);
    ints all{};
    for (int k = 0; k < n; k += LANES) {
        const ints q = to_ints(nearest(load<floats>(x + k) * inverse));
        all += q;
        store(values + k, __builtin_convertvector(q, narrow));
    }
    sum = total(all);
}

// Group `index` of all rows' groups, of x [M][width]; beyond the width are zeros.
template <int BITS>
inline void quantize_group(const float* x, int64_t width, int64_t K, int64_t index, Activations& to) {
    constexpr int group = Format<BITS>::group;
    const int64_t groups = K / group, row = index / groups, start = index % groups * group;
    const float* from = x + row * width + start;
    float padded[group];
    if (start + group > width) {
        const int64_t rest = width > start ? width - start : 0;
        std::memcpy(padded, from, rest * sizeof(float));
        std::memset(padded + rest, 0, (group - rest) * sizeof(float));
        from = padded;
    }
    quantize_activations(from, group, &to.values[row * K + start], to.scales[index], to.sums[index]);
}

// Numbers in bfloat16, in the upper half of each lane: away from 0, or to the nearest with
// halves to the even one.
inline ints to_bfloat16_up(floats value) { return ((ints)value + 0xffff) & ~0xffff; }
inline ints to_bfloat16(floats value) {
    const ints bits = (ints)value;
    return (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
}

inline floats magnitude(floats x) { return x < 0.0f ? -x : x; }

// The scales (in upper halves) of a group of some rows, w[k] being their elements at k; 8 bits: large
// enough for the largest magnitude to be at most 127 steps.
inline ints scales_of_8(const floats* w) {
    floats most{};
    for (int k = 0; k < Format<8>::group; k++) most = larger(magnitude(w[k]), most);
    return most < NOTHING ? ints{} : to_bfloat16_up(most / 127.0f);
}

template <int BITS>
inline floats in_steps(floats w, floats inverse) {
    const floats q = nearest(w * inverse);
    if (BITS == 8) return q;
    return q < -8.0f ? broadcast(-8.0f) : q > 7.0f ? broadcast(7.0f) : q;
}

// 4 bits: of eight scales, each then made the best (least squares) for the codes that it gives, the
// one of least squared error. A scale may be negative, so that the largest value is -8 steps.
inline ints scales_of_4(const floats* w) {
    floats peak{};
    for (int k = 0; k < Format<4>::group; k++) peak = magnitude(w[k]) > magnitude(peak) ? w[k] : peak;
    floats best = broadcast(-1.0f);
    ints scales{};
    for (int i = 0; i < 8; i++) {
        const floats inverse = broadcast(-8.75f + 0.25f * i) / peak;
        floats products{}, squares{};
        for (int k = 0; k < Format<4>::group; k++) {
            const floats q = in_steps<4>(w[k], inverse);
            products += w[k] * q;
            squares += q * q;
        }
        // The error of the best scale for these codes is the sum of w^2, less products^2 / squares.
        const floats gain = products * products / squares;
        const ints better = (gain > best) & (magnitude(peak) > NOTHING);
        best = better ? gain : best;
        scales = better ? to_bfloat16(products / squares) : scales;
    }
    return scales;
}

// A block of rows of `width` floats, of which `count` exist; all else is zeros.
template <int BITS>
inline void pack_block(const float* rows, int64_t count, int64_t width, int64_t K, uint8_t* codes, uint16_t* scales) {
    constexpr int group = Format<BITS>::group, per_step = STEP * 8 / BITS;
    float elements[group][BLOCK] = {};
    floats w[group];
    ints q[group];
    for (int64_t start = 0; start < K; start += group, scales += BLOCK, codes += group * BLOCK * BITS / 8) {
        const int64_t there = width - start < group ? width - start : group;
        if (there < group) std::memset(elements, 0, sizeof elements);
        for (int64_t row = 0; row < count; row++)
            for (int64_t k = 0; k < there; k++) elements[k][row] = rows[row * width + start + k];
        for (int part = 0; part < PARTS; part++) {
            for (int k = 0; k < group; k++) w[k] = load<floats>(elements[k] + part * LANES);
            const ints upper = BITS == 8 ? scales_of_8(w) : scales_of_4(w);
            store(scales + part * LANES, __builtin_convertvector(upper >> 16, shorts));
            const floats inverse = upper == 0 ? floats{} : 1.0f / (floats)upper;
            for (int k = 0; k < group; k++) q[k] = to_ints(in_steps<BITS>(w[k], inverse)) + Format<BITS>::zero;
            // Four k in a lane, the first in the lowest byte; at 4 bits, four more above them.
            for (int k = 0; k < group; k += per_step) {
                ints four = q[k] | q[k + 1] << 8 | q[k + 2] << 16 | q[k + 3] << 24;
                if (BITS == 4) four |= (q[k + 4] | q[k + 5] << 8 | q[k + 6] << 16 | q[k + 7] << 24) << 4;
                store(codes + (k / per_step * BLOCK + part * LANES) * STEP, four);
            }
        }
    }
}

}  // namespace neox
