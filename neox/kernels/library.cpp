// What neox/kernels/library.py calls. Pointers are to contiguous float32 unless said otherwise.
#include <omp.h>

#include "decode.h"

using namespace neox;

namespace {

void reserve(Activations& to, const Matrix& w, int64_t M) {
    if (w.bits != 32)
        with_format(w.bits, [&](auto bits) { to.reserve(M, w.K, Format<bits>::group); });
    else if (to.panels.size() < size_t(M * w.width))
        to.panels.resize(M * w.width);
}

void wait() {
#pragma omp barrier
}

Activations& activations() {
    static thread_local Activations own;  // the calling thread's, for its team
    return own;
}

}  // namespace

extern "C" {

// For the caller to see that it means the same.
int64_t neox_size() { return sizeof(Operation); }

// y [M][N] = x [M][width] W^T + bias.
void neox_multiply(const Matrix* w, const float* x, float* y, int64_t M, int64_t threads) {
    constexpr int64_t most = 256;  // rows at a time: what is made of them stays in the caches, and small
    Activations& quantized = activations();
    reserve(quantized, *w, M < most ? M : most);
    for (int64_t row = 0; row < M; row += most) {
        const int64_t rows = M - row < most ? M - row : most;
        const Output to{y + row * w->N, w->bias, w->N, NONE};
#pragma omp parallel num_threads(threads)
        multiply(*w, x + row * w->width, rows, to, quantized, omp_get_thread_num(), omp_get_num_threads(), wait);
    }
}

// Packs w [N][width] into codes and scales of `bits` bits.
void neox_pack(int64_t bits, const float* w, int64_t N, int64_t width, int64_t K, uint8_t* codes, uint16_t* scales,
               int64_t threads) {
    with_format(bits, [&](auto constant) {
        constexpr int BITS = decltype(constant)::value;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t block = 0; block < (N + BLOCK - 1) / BLOCK; block++) {
            const int64_t count = N - block * BLOCK < BLOCK ? N - block * BLOCK : BLOCK;
            pack_block<BITS>(w + block * BLOCK * width, count, width, K, codes + block * Format<BITS>::block_bytes(K),
                             scales + block * (K / Format<BITS>::group) * BLOCK);
        }
    });
}

// Carries out `count` operations one after the other for some positions of rows of a cache.
void neox_decode(const Operation* operations, int64_t count, const int64_t* cache_row, const int64_t* position,
                 int64_t positions, int64_t threads) {
    const Positions pass{positions, cache_row, position};
    Activations& quantized = activations();
    for (int64_t i = 0; i < count; i++)
        if (operations[i].kind == MULTIPLY) reserve(quantized, operations[i].matrix, positions);
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> workspace;
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t i = 0; i < count; i++) {
            carry_out(operations[i], pass, quantized, workspace, thread, team, wait);
            wait();
        }
    }
}

}
