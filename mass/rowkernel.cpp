// The LoRA updates of rows of one token, of all layers that share their input, in one pass over the adapters; and the
// layout of adapters that this pass wants.
//
// Row i has adapter t = adapter[i]; for each layer of the stack
//     y[i] = (x[i] A[t]^T) B[t],   x [rows, in],  A[t] [rank, in],  B[t] [rank, out],  y [rows, out].
// Sums are fp32 whatever the tensors are, and are rounded once. B is scaled already. What bounds it is memory,
// so it is read front to back: A[t] and B[t] lie behind one another, and one layer is read after the other. Two rows of a
// matrix at a time were a quarter to two thirds slower, and asking for memory ahead (__builtin_prefetch) by a quarter.

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

// sums that one reading of a row of A goes into side by side: each waits for its own last addition only
constexpr int LANES = 64;

template <class real>
float dot(const float *x, const real *a, int64_t width) {
    float lane[LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
#pragma omp simd
        for (int j = 0; j < LANES; j++) lane[j] += x[k + j] * wide(a[k + j]);
    for (; k < width; k++) lane[k % LANES] += x[k] * wide(a[k]);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

}  // namespace

// As mass/rowkernel.py lays them out.
struct Layer {
    int64_t rank, out, stride;  // stride: from one adapter to the next, in numbers
    const void *a, *b;
    void *y;
};

struct Stack {
    int64_t rows, in, layers, threads;
    const int64_t *adapter;
    const Layer *layer;
};

template <class real>
static void updates(const Stack &s, const real *x) {
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
    {
        std::vector<float> row(s.in), low, sum;
        for (int64_t l = 0; l < s.layers; l++) {
            const Layer &layer = s.layer[l];
            low.resize(layer.rank);
            sum.resize(layer.out);
#pragma omp for nowait
            for (int64_t i = 0; i < s.rows; i++) {
                const int64_t from = s.adapter[i] * layer.stride;
                for (int64_t k = 0; k < s.in; k++) row[k] = wide(x[i * s.in + k]);
                const real *a = static_cast<const real *>(layer.a) + from;
                for (int64_t r = 0; r < layer.rank; r++, a += s.in) low[r] = dot(row.data(), a, s.in);
                std::fill(sum.begin(), sum.end(), 0.0f);
                const real *b = static_cast<const real *>(layer.b) + from;
                float *to = sum.data();
                for (int64_t r = 0; r < layer.rank; r++, b += layer.out) {
                    const float weight = low[r];
#pragma omp simd
                    for (int64_t o = 0; o < layer.out; o++) to[o] += weight * wide(b[o]);
                }
                real *y = static_cast<real *>(layer.y) + i * layer.out;
#pragma omp simd
                for (int64_t o = 0; o < layer.out; o++) narrow(to[o], y[o]);
            }
        }
    }
}

// A [count, rank, in] and scale * B [count, out, rank], transposed: each adapter's A with its B behind it.
template <class real>
static void pack(int64_t count, int64_t rank, int64_t in, int64_t out, float scale, const float *a, const float *b, real *to) {
    for (int64_t t = 0; t < count; t++, b += out * rank) {
        for (int64_t k = 0; k < rank * in; k++) narrow(*a++, *to++);
        for (int64_t r = 0; r < rank; r++)
            for (int64_t o = 0; o < out; o++) narrow(scale * b[o * rank + r], *to++);
    }
}

extern "C" void updates_fp32(const Stack *stack, const float *x) { updates(*stack, x); }
extern "C" void updates_bf16(const Stack *stack, const bf16 *x) { updates(*stack, x); }

extern "C" void pack_fp32(int64_t count, int64_t rank, int64_t in, int64_t out, float scale, const float *a, const float *b,
                          float *to) {
    pack(count, rank, in, out, scale, a, b, to);
}
extern "C" void pack_bf16(int64_t count, int64_t rank, int64_t in, int64_t out, float scale, const float *a, const float *b,
                          bf16 *to) {
    pack(count, rank, in, out, scale, a, b, to);
}
