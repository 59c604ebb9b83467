// The LoRA updates of rows of one token, of all layers that share their input, in one pass over the adapters.
//
// Row b has adapter t = adapter[b]; for each layer l of the stack
//     y_l[b] = (x[b] A_l[t]^T) B_l[t],   x [rows, in],  A [T, sum of ranks, in],  B_l [T, rank_l, out_l],  y_l [rows, out_l].
// Sums are fp32 whatever the tensors are, and are rounded once. B is scaled already. Memory is read in one stream from
// front to back: two rows of A or B at a time were a quarter to two thirds slower.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }

inline float wide(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void narrow(float value, float &out) { out = value; }

// to the nearest, ties to even, as PyTorch rounds
inline void narrow(float value, bf16 &out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    out.bits = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

}  // namespace

// As mass/rowkernel.py lays it out.
struct Stack {
    int64_t rows, in, ranks, layers, threads;
    const int64_t *adapter, *rank, *out;
    const void *a;
    const void *const *b;
    void *const *y;
};

template <class real>
static void updates(const Stack &s, const real *x) {
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
    {
        std::vector<float> row(s.in), low(s.ranks), sum(*std::max_element(s.out, s.out + s.layers));
#pragma omp for
        for (int64_t i = 0; i < s.rows; i++) {
            for (int64_t k = 0; k < s.in; k++) row[k] = wide(x[i * s.in + k]);
            const real *a = static_cast<const real *>(s.a) + s.adapter[i] * s.ranks * s.in;
            for (int64_t r = 0; r < s.ranks; r++, a += s.in) {
                const float *from = row.data();
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t k = 0; k < s.in; k++) dot += from[k] * wide(a[k]);
                low[r] = dot;
            }
            const float *own = low.data();
            for (int64_t l = 0; l < s.layers; own += s.rank[l], l++) {
                const int64_t out = s.out[l];
                const real *b = static_cast<const real *>(s.b[l]) + s.adapter[i] * s.rank[l] * out;
                real *y = static_cast<real *>(s.y[l]) + i * out;
                std::fill_n(sum.begin(), out, 0.0f);
                float *to = sum.data();
                for (int64_t r = 0; r < s.rank[l]; r++, b += out) {
                    const float weight = own[r];
#pragma omp simd
                    for (int64_t o = 0; o < out; o++) to[o] += weight * wide(b[o]);
                }
#pragma omp simd
                for (int64_t o = 0; o < out; o++) narrow(to[o], y[o]);
            }
        }
    }
}

extern "C" void updates_fp32(const Stack *stack, const float *x) { updates(*stack, x); }
extern "C" void updates_bf16(const Stack *stack, const bf16 *x) { updates(*stack, x); }
