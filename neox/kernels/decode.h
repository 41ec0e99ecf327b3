// A pass as a list of operations, carried out by a team of threads without a return to Python. Its rows
// are positions: one each of some rows of the cache, of different lengths, or many that follow each
// other in one. What a position comes to does not depend on what else is in the pass.
#pragma once

#include <cmath>

#include "product.h"

namespace neox {

enum Kind : int64_t { LAYER_NORM = 0, RMS_NORM = 1, MULTIPLY = 2, ATTEND = 3, GATE = 4, ADD = 5 };

// One operation, as neox/kernels/library.py describes it. Buffers are [rows][width], float32.
struct Operation {
    int64_t kind;
    int64_t function;     // MULTIPLY, GATE: a Function
    float* in;
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

// What a pass is for: positions of rows of the cache.
struct Positions {
    int64_t count;
    const int64_t *cache_row, *position;
};

inline void norm(const Operation& op, int64_t row) {
    const int64_t H = op.width;
    const float* x = op.in + row * H;
    float* y = op.out + row * H;
    auto part = [&](const float* from, int64_t k) { return load_part(from + k, H - k); };
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
        store_part(y + k, value, H - k);
    }
}

// Turns pairs of the first rotary_dim elements (neox/model/positions.py) and copies the rest; `to` may
// be `from`.
inline void rotate(const Operation& op, int64_t position, const float* from, float* to) {
    const int64_t half = op.rotary_dim / 2;
    const float *cos = op.cos + position * op.rotary_dim, *sin = op.sin + position * op.rotary_dim;
    for (int64_t i = 0; i < half; i++) {
        const int64_t first = op.interleaved ? 2 * i : i, second = op.interleaved ? 2 * i + 1 : i + half;
        const float a = from[first], b = from[second];
        to[first] = a * cos[i] - b * sin[i];
        to[second] = b * cos[i] + a * sin[i];
    }
    std::memmove(to + op.rotary_dim, from + op.rotary_dim, (op.head_dim - op.rotary_dim) * sizeof(float));
}

// Key and value head `kv` of the pass's position `index` go into the cache; its queries are rotated where they are.
inline void append(const Operation& op, const Positions& pass, int64_t index, int64_t kv) {
    const int64_t D = op.head_dim, position = pass.position[index], per_key = op.heads / op.kv_heads;
    float* in = op.in + index * op.width;
    const int64_t at = ((pass.cache_row[index] * op.kv_heads + kv) * op.max_length + position) * D;
    rotate(op, position, in + op.k_offset + kv * op.kv_stride, op.keys + at);
    std::memcpy(op.values + at, in + op.v_offset + kv * op.kv_stride, D * sizeof(float));
    for (int64_t head = kv * per_key; head < (kv + 1) * per_key; head++) {
        float* q = in + head * op.q_stride;
        rotate(op, position, q, q);
    }
}

// Queries of one head at positions that follow each other.
struct Queries {
    const float* q[4];
    float* out[4];
    int64_t first;  // the position of the first one
};

// A query that is alone waits for memory: so many positions that it comes to are on their way.
constexpr int64_t AHEAD = 16;

inline void fetch(const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i += BLOCK) __builtin_prefetch(from + i);
}

// scores[i][t - begin] = q[i] K[t] / sqrt(D) of what query i sees of [begin, end), LANES of t at a time;
// -infinity for the rest. Returns each query's largest score.
template <int Q>
inline void scores_of(const Operation& op, const Queries& queries, const float* keys, int64_t begin, int64_t end,
                      float* const* scores, float* most) {
    const int64_t D = op.head_dim;
    const float scale = 1.0f / std::sqrt(float(D));
    floats highest[Q];
    for (int i = 0; i < Q; i++) highest[i] = broadcast(-INFINITY);
    for (int64_t t = begin; t < end; t += LANES) {
        if (Q == 1) fetch(keys + (t + AHEAD) * D, LANES * D);
        floats sums[Q][LANES];
        for (int j = 0; j < LANES; j += 4) {
            floats sum[Q][4] = {};
            const float* key[4];
            for (int c = 0; c < 4; c++) key[c] = keys + (t + j + c < end ? t + j + c : end - 1) * D;
            for (int64_t d = 0; d < D; d += LANES) {
                floats part[4];
                for (int c = 0; c < 4; c++) part[c] = load_part(key[c] + d, D - d);
                for (int i = 0; i < Q; i++) {
                    const floats value = load_part(queries.q[i] + d, D - d);
                    for (int c = 0; c < 4; c++) sum[i][c] = multiply_add(value, part[c], sum[i][c]);
                }
            }
            for (int i = 0; i < Q; i++)
                for (int c = 0; c < 4; c++) sums[i][j + c] = sum[i][c];
        }
        ints position;
        for (int lane = 0; lane < LANES; lane++) position[lane] = int32_t(t + lane);
        for (int i = 0; i < Q; i++) {
            const int32_t own = queries.first + i, oldest = op.window >= 0 && own > op.window ? own - op.window : 0;
            const ints sees = (position <= own) & (position >= oldest);
            const floats score = sees ? totals(sums[i]) * scale : broadcast(-INFINITY);
            store(scores[i] + (t - begin), score);
            highest[i] = larger(score, highest[i]);
        }
    }
    for (int i = 0; i < Q; i++) most[i] = largest(highest[i]);
}

// out[i] [d, d + V * LANES) = the values' sum with weights scores[i], times inverse[i].
template <int Q, int V>
inline void weigh(const Operation& op, const Queries& queries, const float* values, int64_t count, float* const* scores,
                  const float* inverse, int64_t d) {
    const int64_t D = op.head_dim;
    floats sum[Q][V] = {};
    for (int64_t t = 0; t < count; t++) {
        const float* value = values + t * D + d;
        floats part[V];
        for (int v = 0; v < V; v++) part[v] = load_part(value + v * LANES, D - d - v * LANES);
        if (Q == 1) fetch(value + AHEAD * D, V * LANES);
        for (int i = 0; i < Q; i++)
            for (int v = 0; v < V; v++) sum[i][v] = multiply_add(broadcast(scores[i][t]), part[v], sum[i][v]);
    }
    for (int i = 0; i < Q; i++)
        for (int v = 0; v < V; v++)
            store_part(queries.out[i] + d + v * LANES, sum[i][v] * inverse[i], D - d - v * LANES);
}

// softmax(q K^T / sqrt(D)) V of Q queries. What a query comes to does not depend on the others: what it
// does not see has a weight of 0, and scores fall on the same lanes, by their positions.
template <int Q>
inline void attend(const Operation& op, const Queries& queries, const float* keys, const float* values,
                   std::vector<float>& workspace) {
    const int64_t D = op.head_dim, end = queries.first + Q;
    const int64_t oldest = op.window >= 0 && queries.first > op.window ? queries.first - op.window : 0;
    const int64_t begin = oldest / LANES * LANES, count = end - begin, room = count + LANES;
    if (int64_t(workspace.size()) < Q * room) workspace.resize(2 * Q * room);
    float *scores[Q], most[Q], inverse[Q];
    for (int i = 0; i < Q; i++) scores[i] = workspace.data() + i * room;
    scores_of<Q>(op, queries, keys, begin, end, scores, most);
    for (int i = 0; i < Q; i++) {
        floats sum{};
        for (int64_t t = 0; t < count; t += LANES) {
            const floats p = exponential(load<floats>(scores[i] + t) - most[i]);
            store(scores[i] + t, p);
            sum += p;
        }
        inverse[i] = 1.0f / total(sum);
    }
    values += begin * D;
    int64_t d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) weigh<Q, 4>(op, queries, values, count, scores, inverse, d);
    for (; d < D; d += LANES) weigh<Q, 1>(op, queries, values, count, scores, inverse, d);
}

// This thread's part of attention: blocks of up to four rows of the pass that are neighbours in a row
// of the cache, as those of a prompt are, and one head each.
inline void attend_all(const Operation& op, const Positions& pass, std::vector<float>& workspace, int thread, int threads) {
    const int64_t D = op.head_dim, per_key = op.heads / op.kv_heads;
    int64_t task = 0;
    for (int64_t index = 0, size; index < pass.count; index += size) {
        size = 1;
        while (size < 4 && index + size < pass.count && pass.cache_row[index + size] == pass.cache_row[index] &&
               pass.position[index + size] == pass.position[index] + size)
            size++;
        if (size == 3) size = 2;
        for (int64_t head = 0; head < op.heads; head++) {
            if (task++ % threads != thread) continue;
            Queries queries{{}, {}, pass.position[index]};
            for (int64_t i = 0; i < size; i++) {
                queries.q[i] = op.in + (index + i) * op.width + head * op.q_stride;
                queries.out[i] = op.out + ((index + i) * op.heads + head) * D;
            }
            const int64_t at = (pass.cache_row[index] * op.kv_heads + head / per_key) * op.max_length * D;
            if (size == 4)
                attend<4>(op, queries, op.keys + at, op.values + at, workspace);
            else if (size == 2)
                attend<2>(op, queries, op.keys + at, op.values + at, workspace);
            else
                attend<1>(op, queries, op.keys + at, op.values + at, workspace);
        }
    }
}

// GATE: up * function(gate), of a row [up | gate]; ADD: in + second.
inline void elementwise(const Operation& op, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += LANES) {
        const int64_t n = last - i;
        floats value;
        if (op.kind == ADD) {
            value = load_part(op.in + i, n) + load_part(op.second + i, n);
        } else {  // a part lies within a row: see `carry_out`
            const float* up = op.in + i / op.width * 2 * op.width + i % op.width;
            value = load_part(up, n) * apply(Function(op.function), load_part(up + op.width, n));
        }
        store_part(op.out + i, value, n);
    }
}

template <class Barrier>
inline void multiply(const Matrix& w, const float* x, int64_t M, const Output& to, Activations& quantized, int thread,
                     int threads, Barrier barrier) {
    if (w.bits == 32) {
        float* panels = quantized.panels.data();
        for_tiles(M, 0, [&](int64_t row, auto size) {
            fill_panel<decltype(size)::value>(x + row * w.width, w.width, panels + row * w.width, thread, threads);
        });
        barrier();
        return multiply_floats(w, panels, M, to, thread, threads);
    }
    with_format(w.bits, [&](auto bits) {
        const Share groups(M * w.K / Format<bits>::group, 1, thread, threads);
        for (int64_t i = groups.first; i < groups.last; i++) quantize_group<bits>(x, w.width, w.K, i, quantized);
        barrier();
        multiply_packed<bits>(w, quantized, M, to, thread, threads);
    });
}

// This thread's part of an operation.
template <class Barrier>
inline void carry_out(const Operation& op, const Positions& pass, Activations& quantized, std::vector<float>& workspace,
                      int thread, int threads, Barrier barrier) {
    switch (op.kind) {
        case LAYER_NORM:
        case RMS_NORM:
            for (int64_t row = thread; row < pass.count; row += threads) norm(op, row);
            break;
        case MULTIPLY: {
            const Output to{op.out, op.matrix.bias, op.matrix.N, Function(op.function)};
            multiply(op.matrix, op.in, pass.count, to, quantized, thread, threads, barrier);
            break;
        }
        case ATTEND:
            for (int64_t i = thread; i < pass.count * op.kv_heads; i += threads)
                append(op, pass, i / op.kv_heads, i % op.kv_heads);
            barrier();
            attend_all(op, pass, workspace, thread, threads);
            break;
        default:
            for (int64_t row = 0; row < pass.count; row++) {
                const Share part(op.width, LANES, thread, threads);
                elementwise(op, row * op.width + part.first, row * op.width + part.last);
            }
    }
}

}  // namespace neox
