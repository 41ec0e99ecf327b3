// A decoding pass as a list of operations, carried out by a team of threads without a return to
// Python: one position each of some rows, which have caches of different lengths. What a row comes to
// does not depend on the others.
#pragma once

#include <cmath>

#include "product.h"

namespace neox {

enum Kind : int64_t { LAYER_NORM = 0, RMS_NORM = 1, MULTIPLY = 2, ATTEND = 3, GATE = 4, ADD = 5 };

// One operation, as neox/kernels/library.py describes it. Buffers are [rows][width], float32.
struct Operation {
    int64_t kind;
    int64_t function;     // MULTIPLY, GATE: a Function
    const float* in;
    const float* second;  // ADD: the other summand
    float* out;
    int64_t width;        // of a row of `in`; GATE, ADD and norms: of `out` too
    // Norms: weight and bias [width] (null where there is none), and epsilon. RMS_NORM adds it to the
    // root.
    const float* weight;
    const float* bias;
    double epsilon;
    Matrix matrix;        // MULTIPLY
    // ATTEND. `in` holds the rows' queries, keys and values; head h begins at its offset + h * stride.
    int64_t heads, kv_heads, head_dim;
    int64_t q_stride, k_offset, v_offset, kv_stride;
    int64_t window;       // a query sees this many positions before its own; -1: all
    int64_t rotary_dim, interleaved;  // 0: none
    const float *cos, *sin;           // [positions][rotary_dim]
    float *keys, *values;             // [cache rows][kv_heads][max_length][head_dim]
    int64_t max_length;
};

// Which rows of the cache the pass is for, and how many positions each has.
struct Rows {
    int64_t count;
    const int64_t *row, *length;
};

inline void norm(const Operation& op, int64_t row) {
    const int64_t H = op.width;
    const float* x = op.in + row * H;
    float* y = op.out + row * H;
    auto part = [&](const float* from, int64_t k) {
        return k + LANES <= H ? load<floats>(from + k) : load_part(from + k, H - k);
    };
    float mean = 0.0f, scale;
    if (op.kind == LAYER_NORM) {
        floats sum{};
        for (int64_t k = 0; k < H; k += LANES) sum += part(x, k);
        mean = total(sum) / H;
    }
    floats squares{};
    for (int64_t k = 0; k < H; k += LANES) {
        floats d = part(x, k) - mean;
        if (k + LANES > H)
            for (int64_t lane = H - k; lane < LANES; lane++) d[lane] = 0.0f;
        squares += d * d;
    }
    const float variance = total(squares) / H, epsilon = float(op.epsilon);
    scale = op.kind == LAYER_NORM ? 1.0f / std::sqrt(variance + epsilon) : 1.0f / (std::sqrt(variance) + epsilon);
    for (int64_t k = 0; k < H; k += LANES) {
        floats value = (part(x, k) - mean) * scale * part(op.weight, k);
        if (op.bias) value += part(op.bias, k);
        if (k + LANES <= H)
            store(y + k, value);
        else
            std::memcpy(y + k, &value, (H - k) * sizeof(float));
    }
}

// Turns pairs of the first rotary_dim elements (neox/model/positions.py) and copies the rest.
inline void rotate(const Operation& op, int64_t position, const float* from, float* to) {
    const int64_t half = op.rotary_dim / 2;
    const float *cos = op.cos + position * op.rotary_dim, *sin = op.sin + position * op.rotary_dim;
    for (int64_t i = 0; i < half; i++) {
        const int64_t first = op.interleaved ? 2 * i : i, second = op.interleaved ? 2 * i + 1 : i + half;
        const float a = from[first], b = from[second];
        to[first] = a * cos[i] - b * sin[i];
        to[second] = b * cos[i] + a * sin[i];
    }
    std::memcpy(to + op.rotary_dim, from + op.rotary_dim, (op.head_dim - op.rotary_dim) * sizeof(float));
}

// softmax(q K^T / sqrt(D)) V over positions [start, length]: `scores` has room for them.
inline void attend_head(const Operation& op, const float* q, const float* keys, const float* values, int64_t start,
                        int64_t length, float* scores, float* out) {
    const int64_t D = op.head_dim, count = length + 1 - start;
    const float scale = 1.0f / std::sqrt(float(D));
    keys += start * D;
    values += start * D;
    for (int64_t t = 0; t < count; t++) {
        const float* key = keys + t * D;
        floats sum{};
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) sum += load<floats>(q + d) * load<floats>(key + d);
        if (d < D) sum += load_part(q + d, D - d) * load_part(key + d, D - d);
        scores[t] = total(sum) * scale;
    }
    float most = scores[0];
    for (int64_t t = 1; t < count; t++) most = scores[t] > most ? scores[t] : most;
    for (int64_t t = count; t % LANES; t++) scores[t] = -INFINITY;
    floats sum{};
    for (int64_t t = 0; t < count; t += LANES) {
        const floats p = exponential(load<floats>(scores + t) - most);
        store(scores + t, p);
        sum += p;
    }
    const float inverse = 1.0f / total(sum);
    for (int64_t d = 0; d < D; d += 4 * LANES) {  // four vectors at a time, while the values pass by
        floats parts[4] = {};
        const int64_t whole = (D - d) / LANES < 4 ? (D - d) / LANES : 4, rest = whole < 4 ? (D - d) % LANES : 0;
        for (int64_t t = 0; t < count; t++) {
            const float* value = values + t * D + d;
            for (int64_t i = 0; i < whole; i++) parts[i] += scores[t] * load<floats>(value + i * LANES);
            if (rest) parts[whole] += scores[t] * load_part(value + whole * LANES, rest);
        }
        for (int64_t i = 0; i < whole; i++) store(out + d + i * LANES, parts[i] * inverse);
        if (rest) {
            const floats value = parts[whole] * inverse;
            std::memcpy(out + d + whole * LANES, &value, rest * sizeof(float));
        }
    }
}

// Key and value head `kv` of a row: stored in the cache; and its queries' contexts.
inline void attend(const Operation& op, const Rows& rows, int64_t index, int64_t kv, std::vector<float>& workspace) {
    const int64_t D = op.head_dim, position = rows.length[index], per_key = op.heads / op.kv_heads;
    const float* in = op.in + index * op.width;
    const int64_t at = (rows.row[index] * op.kv_heads + kv) * op.max_length;
    float *keys = op.keys + at * D, *values = op.values + at * D;
    rotate(op, position, in + op.k_offset + kv * op.kv_stride, keys + position * D);
    std::memcpy(values + position * D, in + op.v_offset + kv * op.kv_stride, D * sizeof(float));
    if (int64_t(workspace.size()) < D + position + 1 + LANES) workspace.resize(D + 2 * position + 1 + LANES);
    float *q = workspace.data(), *scores = q + D;
    const int64_t start = op.window >= 0 && position > op.window ? position - op.window : 0;
    for (int64_t head = kv * per_key; head < (kv + 1) * per_key; head++) {
        rotate(op, position, in + head * op.q_stride, q);
        float* out = op.out + (index * op.heads + head) * D;
        attend_head(op, q, keys, values, start, position, scores, out);
    }
}

// GATE: up * function(gate), of a row [up | gate]; ADD: in + second.
inline void elementwise(const Operation& op, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += LANES) {
        const int64_t n = last - i < LANES ? last - i : LANES;
        floats value;
        if (op.kind == ADD) {
            value = load_part(op.in + i, n) + load_part(op.second + i, n);
        } else {  // a part lies within a row: see `carry_out`
            const float* up = op.in + i / op.width * 2 * op.width + i % op.width;
            value = load_part(up, n) * apply(Function(op.function), load_part(up + op.width, n));
        }
        std::memcpy(op.out + i, &value, n * sizeof(float));
    }
}

template <class Barrier>
inline void multiply(const Matrix& w, const float* x, int64_t M, const Output& to, Activations& quantized, int thread,
                     int threads, Barrier barrier) {
    if (w.bits == 32) return multiply_dense(w, x, M, to, thread, threads);
    const Share groups(M * w.K / (w.bits == 8 ? Format<8>::group : Format<4>::group), 1, thread, threads);
    for (int64_t i = groups.first; i < groups.last; i++) {
        if (w.bits == 8)
            quantize_group<8>(x, w.width, w.K, i, quantized);
        else
            quantize_group<4>(x, w.width, w.K, i, quantized);
    }
    barrier();
    if (w.bits == 8)
        multiply_packed<8>(w, quantized, M, to, thread, threads);
    else
        multiply_packed<4>(w, quantized, M, to, thread, threads);
}

// This thread's part of an operation.
template <class Barrier>
inline void carry_out(const Operation& op, const Rows& rows, Activations& quantized, std::vector<float>& workspace,
                      int thread, int threads, Barrier barrier) {
    switch (op.kind) {
        case LAYER_NORM:
        case RMS_NORM:
            for (int64_t row = thread; row < rows.count; row += threads) norm(op, row);
            break;
        case MULTIPLY: {
            const Output to{op.out, op.matrix.bias, op.matrix.N, Function(op.function)};
            multiply(op.matrix, op.in, rows.count, to, quantized, thread, threads, barrier);
            break;
        }
        case ATTEND:
            for (int64_t i = thread; i < rows.count * op.kv_heads; i += threads)
                attend(op, rows, i / op.kv_heads, i % op.kv_heads, workspace);
            break;
        default:
            for (int64_t row = 0; row < rows.count; row++) {
                const Share part(op.width, LANES, thread, threads);
                elementwise(op, row * op.width + part.first, row * op.width + part.last);
            }
    }
}

}  // namespace neox
