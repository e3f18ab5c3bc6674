// Vectors of LEGO_LANES floats, by the vector extensions of GCC and Clang. This file is included once per
// instruction set, each time in another namespace, so that the linker cannot share code between them.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
// Without it GCC keeps arrays of accumulators in memory, which is three times slower.
#define UNROLL _Pragma("GCC unroll 16")

typedef float V __attribute__((vector_size(4 * LEGO_LANES)));
typedef float Vu __attribute__((vector_size(4 * LEGO_LANES), aligned(4), may_alias));
typedef int32_t Vi __attribute__((vector_size(4 * LEGO_LANES)));
constexpr int64_t kLanes = LEGO_LANES;
constexpr int64_t kPixels = LEGO_LANES * LEGO_VECTORS;

// Eight lanes on every CPU, for the filters of one panel.
typedef float V4u __attribute__((vector_size(16), aligned(4), may_alias));
typedef float V8 __attribute__((vector_size(32)));
typedef float V8u __attribute__((vector_size(32), aligned(4), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }
INLINE V8 load8(const float* p) { return *reinterpret_cast<const V8u*>(p); }
INLINE V4u load4(const float* p) { return *reinterpret_cast<const V4u*>(p); }
INLINE void store4(float* p, V4u v) { *reinterpret_cast<V4u*>(p) = v; }
INLINE V splat(float a) { return a - V{}; }
INLINE V vmax(V a, V b) { return a > b ? a : b; }
INLINE V vmin(V a, V b) { return a < b ? a : b; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Rounds up to an odd number of 64-byte cache lines: rows that far apart do not fall into one cache set.
INLINE int64_t round_to_odd_lines(int64_t floats) {
  const int64_t lines = ceil_div(floats, 16);
  return (lines | 1) * 16;
}

// exp(x) for x <= 0, to 2 units in the last place (the polynomial of Cephes' expf).
INLINE V exp_of_negative(V x) {
  x = vmax(x, splat(-87.0f));
  const V n = x * 1.44269504088896341f - 0.5f;
  const Vi i = __builtin_convertvector(n, Vi);  // truncation; n <= 0, so this rounds to nearest
  const V f = __builtin_convertvector(i, V);
  const V r = x - f * 0.693359375f + f * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (V)((i + 127) << 23);
}
// x * sigmoid(x), by the exp of a negative number, so that nothing overflows.
INLINE V silu(V x) {
  const V e = exp_of_negative(x < V{} ? x : -x);
  return x * (x < V{} ? e : splat(1.0f)) / (1.0f + e);
}
template <int A>
INLINE V activate(V v) {
  if (A == kRelu) return v < V{} ? V{} : v;  // in this form NaN stays NaN, as in PyTorch
  if (A == kRelu6) {
    v = v < V{} ? V{} : v;
    return v > splat(6.0f) ? splat(6.0f) : v;
  }
  if (A == kSilu) return silu(v);
  return v;
}

// The even or the odd lanes of a, then those of b.
#if LEGO_LANES == 4
INLINE V even_lanes(V a, V b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
INLINE V odd_lanes(V a, V b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
#elif LEGO_LANES == 8
INLINE V odd_lanes(V a, V b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
INLINE V even_lanes(V a, V b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
#else
INLINE V even_lanes(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
INLINE V odd_lanes(V a, V b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#endif

// The lower or the upper halves of a and b, interleaved: a0 b0 a1 b1 ...
#if LEGO_LANES == 4
INLINE V zip_low(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
INLINE V zip_high(V a, V b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#elif LEGO_LANES == 8
INLINE V zip_low(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
INLINE V zip_high(V a, V b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
INLINE V zip_low(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE V zip_high(V a, V b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

// Blocks of kBlock x kBlock floats, for conversion between contiguous and channels last.
#if LEGO_LANES == 4
constexpr int64_t kBlock = 4;
typedef V B;
typedef Vu Bu;
INLINE void transpose(B* r) {
  const B a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
  const B b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const B c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const B d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
#else
constexpr int64_t kBlock = 8;
typedef V8 B;
typedef V8u Bu;
INLINE void transpose(B* r) {
  B s[8], t[8];
  UNROLL for (int i = 0; i < 4; i++) {
    s[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  UNROLL for (int h = 0; h < 8; h += 4) {
    UNROLL for (int i = 0; i < 2; i++) {
      t[h + 2 * i] = __builtin_shufflevector(s[h + i], s[h + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      t[h + 2 * i + 1] =
          __builtin_shufflevector(s[h + i], s[h + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[i] = __builtin_shufflevector(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#endif
INLINE B load_block(const float* p) { return *reinterpret_cast<const Bu*>(p); }
INLINE void store_block(float* p, B v) { *reinterpret_cast<Bu*>(p) = v; }
