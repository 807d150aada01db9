// The passes over one activation on a CPU: each reads it once, in the order of memory, with every core it is given.
//
// Letters: N batch, C channels, S elements of a channel in one image, M = N * S.
// Layouts: "planes" is (N, C, S) in memory, "rows" is (N * S, C), a channels-last activation. Both are a sequence of
// blocks (a plane, a row), which chunks of consecutive blocks divide among threads.
//
// Elements are float64, float32, bfloat16 or float16, and computed with in float64 or float32. Sums are float64. How
// an activation is divided into chunks does not depend on the number of threads, and so neither do the sums.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace {

constexpr int64_t MOST_CHUNKS = 32;         // of a reduction: each costs 2 C numbers, and their addition
constexpr int64_t SMALLEST_CHUNK = 1 << 14;  // elements, below which another thread costs more than it brings

struct bfloat16 {
    uint16_t bits;
};

INLINE double load(double v) { return v; }
INLINE float load(float v) { return v; }
INLINE float load(bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE void store(double v, double& out) { out = v; }
INLINE void store(float v, float& out) { out = v; }
INLINE void store(float v, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    out.bits = static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}

#ifdef __FLT16_MAX__
INLINE float load(_Float16 v) { return static_cast<float>(v); }
INLINE void store(float v, _Float16& out) { out = static_cast<_Float16>(v); }
#endif

template <class T>
using Compute = decltype(load(T{}));

// Order of the codes in native.py.
enum DType { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 };

// Calls body with a value of the element type; returns whether there is such a type.
template <class Body>
INLINE bool with_type(int dtype, Body body) {
    switch (dtype) {
        case FLOAT64: body(double{}); return true;
        case FLOAT32: body(float{}); return true;
        case BFLOAT16: body(bfloat16{}); return true;
#ifdef __FLT16_MAX__
        case FLOAT16: body(_Float16{}); return true;
#endif
        default: return false;
    }
}

}  // namespace

extern "C" {

// How an activation lies in memory. Mirrored by native.py, as are the three structures below.
struct Layout {
    int64_t N, C, S;
    int32_t dtype, rows, threads;
};

// y = (x - mean) / sqrt(var + eps) * weight + bias, then max(0, y) with relu. weight and bias (C) may be null.
struct Affine {
    const double *mean, *var;
    const void *weight, *bias;
    double eps;
    int32_t parameter_dtype, relu;
};

}  // extern "C"

namespace {

// The affine map per channel, as the passes use it: ((x - high) - low) * scale + bias. The mean in two parts keeps
// the digits that a difference of large numbers needs.
template <class R>
struct Coefficients {
    std::vector<R> high, low, scale, bias;

    explicit Coefficients(const Affine& map, int64_t C) : high(C), low(C), scale(C), bias(C) {
        for (int64_t c = 0; c < C; ++c) {
            high[c] = static_cast<R>(map.mean[c]);
            low[c] = static_cast<R>(map.mean[c] - high[c]);
            const double weight = parameter(map.weight, map.parameter_dtype, c, 1.0);
            scale[c] = static_cast<R>(weight / std::sqrt(map.var[c] + map.eps));
            bias[c] = static_cast<R>(parameter(map.bias, map.parameter_dtype, c, 0.0));
        }
    }

    static double parameter(const void* values, int dtype, int64_t c, double otherwise) {
        double found = otherwise;
        if (values != nullptr)
            with_type(dtype, [&](auto type) { found = load(static_cast<const decltype(type)*>(values)[c]); });
        return found;
    }
};

struct Chunks {
    int64_t blocks, per_block, size, count;

    Chunks(const Layout& at, int64_t most) {
        blocks = at.rows ? at.N * at.S : at.N * at.C;
        per_block = at.rows ? at.C : at.S;
        const int64_t smallest = std::max<int64_t>(1, SMALLEST_CHUNK / std::max<int64_t>(1, per_block));
        size = std::max(smallest, (blocks - 1) / most + 1);
        count = (blocks + size - 1) / size;
    }

    template <class Body>
    void for_each(int threads, Body body) const {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
        for (int64_t chunk = 0; chunk < count; ++chunk)
            body(chunk, chunk * size, std::min(blocks, (chunk + 1) * size));
    }
};

// Planes may have been cut out of a wider tensor along the channels: their step is the number of elements from one image
// to the next. Where a block of such a tensor starts:
INLINE int64_t start_of(const Layout& at, int64_t step, int64_t block) {
    return at.rows ? block * at.C : block / at.C * step + block % at.C * at.S;
}

// The four passes over the blocks [first, last) of a chunk. Reductions add to total and dot (C).

// Sum of terms(c, i, i) over `count` consecutive rows, added to total and dot (C): few at a time, to save memory traffic.
template <int64_t count, class Terms>
INLINE void add_rows(int64_t C, int64_t first, double* total, double* dot, const Terms& terms) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        double s1 = 0, s2 = 0;
        for (int64_t row = 0; row < count; ++row) {
            const int64_t i = (first + row) * C + c;
            terms(c, i, i, s1, s2);
        }
        total[c] += s1;
        dot[c] += s2;
    }
}

// Adds terms(c, i, j, s1, s2), which adds to s1 and s2, of every element of the blocks: i of x, j of a
// tensor with that step.
template <class Terms>
INLINE void add_blocks(const Layout& at, int64_t step, int64_t first, int64_t last, double* total, double* dot,
                       const Terms& terms) {
    constexpr int64_t AT_ONCE = 4;
    const int64_t C = at.C, S = at.S;
    if (at.rows) {
        for (; first + AT_ONCE <= last; first += AT_ONCE) add_rows<AT_ONCE>(C, first, total, dot, terms);
        for (; first < last; ++first) add_rows<1>(C, first, total, dot, terms);
        return;
    }
    for (int64_t block = first; block < last; ++block) {
        const int64_t c = block % C, start = start_of(at, step, block);
        double s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
        for (int64_t s = 0; s < S; ++s) terms(c, block * S + s, start + s, s1, s2);
        total[c] += s1;
        dot[c] += s2;
    }
}

template <class T>
FOR_EACH_CPU void sum_input(const T* x, const double* pivot, const Layout& at, int64_t first, int64_t last,
                            double* total, double* dot) {
    add_blocks(at, 0, first, last, total, dot, [=](int64_t c, int64_t i, int64_t, double& s1, double& s2) ALWAYS_INLINE {
        const double d = static_cast<double>(load(x[i])) - pivot[c];
        s1 += d;
        s2 += d * d;
    });
}

// dy before the activation: 0 where the ReLU cut off y, which is computed again. With a mask, since compilers make of
// a choice a branch, and then no vectors.
template <bool relu, class R>
INLINE R before_relu(R dy, R deviation, R scale, R bias) {
    if (!relu) return dy;
    using Bits = std::conditional_t<sizeof(R) == 8, uint64_t, uint32_t>;
    const Bits mask = -static_cast<Bits>(!(deviation * scale + bias <= 0));
    Bits bits;
    std::memcpy(&bits, &dy, sizeof bits);
    bits &= mask;
    std::memcpy(&dy, &bits, sizeof bits);
    return dy;
}

template <bool relu, class T>
FOR_EACH_CPU void sum_gradient(const T* dy, int64_t step, const T* x, const Coefficients<Compute<T>>& k,
                               const Layout& at, int64_t first, int64_t last, double* total, double* dot) {
    using R = Compute<T>;
    const R *high = k.high.data(), *low = k.low.data(), *scale = k.scale.data(), *bias = k.bias.data();
    const auto terms = [=](int64_t c, int64_t i, int64_t j, double& s1, double& s2) ALWAYS_INLINE {
        const R deviation = (load(x[i]) - high[c]) - low[c];
        const double g = before_relu<relu>(load(dy[j]), deviation, scale[c], bias[c]);
        s1 += g;
        s2 += g * deviation;
    };
    add_blocks(at, step, first, last, total, dot, terms);
}

template <bool relu, bool add, class T>
FOR_EACH_CPU void normalize(const T* x, const T* residual, T* y, const Coefficients<Compute<T>>& k, const Layout& at,
                            int64_t first, int64_t last) {
    using R = Compute<T>;
    const R *high = k.high.data(), *low = k.low.data(), *scale = k.scale.data(), *bias = k.bias.data();
    const int64_t length = at.rows ? at.C : at.S;
    const auto one = [](R v, R h, R l, R a, R b, const T& added) ALWAYS_INLINE {
        R y = ((v - h) - l) * a + b;
        if (add) y += load(added);
        return relu && y < 0 ? R{0} : y;  // a NaN stays
    };
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * length;
        const T *from = x + start, *added = add ? residual + start : from;
        T* to = y + start;
        if (at.rows) {
#pragma omp simd
            for (int64_t c = 0; c < length; ++c)
                store(one(load(from[c]), high[c], low[c], scale[c], bias[c], added[c]), to[c]);
        } else {
            const int64_t c = block % at.C;
            const R h = high[c], l = low[c], a = scale[c], b = bias[c];
#pragma omp simd
            for (int64_t s = 0; s < length; ++s) store(one(load(from[s]), h, l, a, b, added[s]), to[s]);
        }
    }
}

// dx = scale * dy + slope * (x - mean) + offset.
template <bool relu, class T>
FOR_EACH_CPU void input_gradient(const T* dy, int64_t step, const T* x, T* dx, const Coefficients<Compute<T>>& k,
                                 const Compute<T>* slope, const Compute<T>* offset, const Layout& at, int64_t first,
                                 int64_t last) {
    using R = Compute<T>;
    const R *high = k.high.data(), *low = k.low.data(), *scale = k.scale.data(), *bias = k.bias.data();
    const int64_t length = at.rows ? at.C : at.S;
    const auto one = [](R g, R v, R h, R l, R a, R b, R m, R o) ALWAYS_INLINE {
        const R deviation = (v - h) - l;
        return before_relu<relu>(g, deviation, a, b) * a + (deviation * m + o);
    };
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * length;
        const T *g = dy + start_of(at, step, block), *v = x + start;
        T* to = dx + start;
        if (at.rows) {
#pragma omp simd
            for (int64_t c = 0; c < length; ++c)
                store(one(load(g[c]), load(v[c]), high[c], low[c], scale[c], bias[c], slope[c], offset[c]), to[c]);
        } else {
            const int64_t c = block % at.C;
            const R h = high[c], l = low[c], a = scale[c], b = bias[c], m = slope[c], o = offset[c];
#pragma omp simd
            for (int64_t s = 0; s < length; ++s) store(one(load(g[s]), load(v[s]), h, l, a, b, m, o), to[s]);
        }
    }
}


// A reduction over all chunks: body sums one into its own total and dot (C); these are then added in order.
template <class Body>
void reduce(const Layout& at, double* total, double* dot, Body body) {
    const Chunks chunks(at, MOST_CHUNKS);
    std::vector<double> sums(std::max<int64_t>(1, chunks.count) * 2 * at.C);
    chunks.for_each(at.threads, [&](int64_t chunk, int64_t first, int64_t last) {
        double* own = sums.data() + chunk * 2 * at.C;
        body(first, last, own, own + at.C);
    });
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
        for (int64_t i = 0; i < 2 * at.C; ++i) sums[i] += sums[chunk * 2 * at.C + i];
    std::copy_n(sums.data(), at.C, total);
    std::copy_n(sums.data() + at.C, at.C, dot);
}

// Sum z and sum z^2 (C) of z = x - pivot, for a pivot (C) near the mean: an element of each channel.
template <class T>
void sums_about_pivot(const T* x, const Layout& at, double* pivot, double* total, double* dot) {
    const int64_t stride = at.rows ? 1 : at.S;
    for (int64_t c = 0; c < at.C; ++c) pivot[c] = at.N * at.S > 0 ? load(x[c * stride]) : 0;
    reduce(at, total, dot, [&](int64_t first, int64_t last, double* s1, double* s2) {
        sum_input(x, pivot, at, first, last, s1, s2);
    });
}

// Calls body with the flag as a constant, so that it is decided outside of the loops.
template <class Body>
void with_flag(bool flag, Body body) {
    flag ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace

// Each returns 0, or 1 where it does not know the element type.
extern "C" {

// Writes mean and biased variance (C).
int syncbn_moments(const Layout* at, const void* x, double* mean, double* var) {
    std::vector<double> pivot(at->C);
    const double M = std::max<double>(1, at->N * at->S);
    return !with_type(at->dtype, [&](auto type) {
        sums_about_pivot(static_cast<const decltype(type)*>(x), *at, pivot.data(), mean, var);
        for (int64_t c = 0; c < at->C; ++c) {
            const double deviation = mean[c] / M;
            var[c] = std::max(0.0, var[c] / M - deviation * deviation);
            mean[c] = pivot[c] + deviation;
        }
    });
}

// Writes sum x (C), sum x^2 (C).
int syncbn_input_sums(const Layout* at, const void* x, double* sums) {
    std::vector<double> pivot(at->C);
    const double M = at->N * at->S;
    return !with_type(at->dtype, [&](auto type) {
        double *total = sums, *dot = sums + at->C;
        sums_about_pivot(static_cast<const decltype(type)*>(x), *at, pivot.data(), total, dot);
        for (int64_t c = 0; c < at->C; ++c) {
            const double about_pivot = total[c], p = pivot[c];
            total[c] += M * p;
            dot[c] += p * (about_pivot + total[c]);  // sum z^2 + 2 p sum z + M p^2
        }
    });
}

// Writes y = the map of x, with residual (like x, or null) added before the ReLU.
int syncbn_normalize(const Layout* at, const Affine* map, const void* x, const void* residual, void* y) {
    return !with_type(at->dtype, [&](auto type) {
        using T = decltype(type);
        const Coefficients<Compute<T>> k(*map, at->C);
        with_flag(map->relu, [&](auto relu) {
            with_flag(residual != nullptr, [&](auto add) {
                Chunks(*at, INT64_MAX).for_each(at->threads, [&](int64_t, int64_t first, int64_t last) {
                    normalize<relu.value, add.value>(static_cast<const T*>(x), static_cast<const T*>(residual),
                                                     static_cast<T*>(y), k, *at, first, last);
                });
            });
        });
    });
}

// Writes sum dy (C), sum dy * (x - mean) (C), of dy before the ReLU; and from these, each (C) or null, dweight and dbias.
// step is that of dy.
int syncbn_gradient(const Layout* at, const Affine* map, const void* dy, int64_t step, const void* x, double* sums,
                    void* dweight, void* dbias) {
    const double *total = sums, *dot = sums + at->C;
    const bool known = with_type(at->dtype, [&](auto type) {
        using T = decltype(type);
        const Coefficients<Compute<T>> k(*map, at->C);
        with_flag(map->relu, [&](auto relu) {
            reduce(*at, sums, sums + at->C, [&](int64_t first, int64_t last, double* s1, double* s2) {
                sum_gradient<relu.value>(static_cast<const T*>(dy), step, static_cast<const T*>(x), k, *at, first,
                                         last, s1, s2);
            });
        });
    });
    return !known || !with_type(map->parameter_dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t c = 0; c < at->C; ++c) {
            const Compute<T> weight = dot[c] / std::sqrt(map->var[c] + map->eps), bias = total[c];
            if (dweight != nullptr) store(weight, static_cast<T*>(dweight)[c]);
            if (dbias != nullptr) store(bias, static_cast<T*>(dbias)[c]);
        }
    });
}

// Writes dx = scale * (dy - sum dy / M - (x - mean) / (var + eps) * sum dy (x - mean) / M), given the sums and M over
// all ranks. step is that of dy.
int syncbn_input_gradient(const Layout* at, const Affine* map, const void* dy, int64_t step, const void* x,
                          const double* sums, double M, void* dx) {
    return !with_type(at->dtype, [&](auto type) {
        using T = decltype(type);
        using R = Compute<T>;
        const Coefficients<R> k(*map, at->C);
        std::vector<R> slope(at->C), offset(at->C);
        for (int64_t c = 0; c < at->C; ++c) {
            const double weight = k.parameter(map->weight, map->parameter_dtype, c, 1.0);
            const double variance = map->var[c] + map->eps, scale = weight / std::sqrt(variance);
            slope[c] = static_cast<R>(-scale / variance * sums[at->C + c] / M);
            offset[c] = static_cast<R>(-scale * sums[c] / M);
        }
        with_flag(map->relu, [&](auto relu) {
            Chunks(*at, INT64_MAX).for_each(at->threads, [&](int64_t, int64_t first, int64_t last) {
                input_gradient<relu.value>(static_cast<const T*>(dy), step, static_cast<const T*>(x),
                                           static_cast<T*>(dx), k, slope.data(), offset.data(), *at, first, last);
            });
        });
    });
}

// One step of the moving averages (C) of the mean and of the unbiased variance; averages over all steps so far where
// momentum is NaN. An M of 0 changes nothing. steps may be null.
int syncbn_update_running(int64_t C, int32_t dtype, const double* mean, const double* var, double M, double momentum,
                          void* running_mean, void* running_var, int64_t* steps) {
    if (M == 0) return 0;
    if (steps != nullptr) ++*steps;
    const double factor = std::isnan(momentum) ? 1.0 / *steps : momentum, unbiased = M / std::max(1.0, M - 1);
    return !with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto update = [&](void* running, const double* values, double times) {
            T* average = static_cast<T*>(running);
            for (int64_t c = 0; c < C; ++c) {
                const double before = load(average[c]);
                store(static_cast<Compute<T>>(before + factor * (values[c] * times - before)), average[c]);
            }
        };
        update(running_mean, mean, 1.0);
        update(running_var, var, unbiased);
    });
}

}  // extern "C"
