// Vectors of 32-bit sums (I) and of 16-bit values (H) for quantised layers. A vector I holds LEGO_LANES
// pixels of a quad; H holds 2 * LEGO_LANES pixels of a row of Z, in the order in which `narrow` packs two
// vectors I. That order differs between instruction sets, but `zip` and `unzip` undo it.
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// Calls f(0), ..., f(N - 1) with constants. Other than a loop, it never leaves an array of vectors in memory.
template <int N>
struct Number {
  constexpr operator int() const { return N; }
};
template <int N, class F>
INLINE void repeat(F f) {
  if constexpr (N > 0) {
    repeat<N - 1>(f);
    f(Number<N - 1>{});
  }
}
#define INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t kLanes = LEGO_LANES;
constexpr int64_t kGranule = 2 * LEGO_LANES;  // pixels of H

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
INLINE int64_t round_to_odd_lines(int64_t bytes) { return (ceil_div(bytes, 64) | 1) * 64; }

#if LEGO_LANES == 16
typedef __m512i I;
typedef __m512i H;
INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
INLINE I splat(int32_t a) { return _mm512_set1_epi32(a); }
INLINE H splat16(int16_t a) { return _mm512_set1_epi16(a); }
INLINE I repeat16(const void* p) {  // 16 bytes, repeated
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I shift_right(I a, I n) { return _mm512_srav_epi32(a, n); }
INLINE H narrow(I a, I b) { return _mm512_packs_epi32(a, b); }
INLINE H multiply_high(H a, H b) { return _mm512_mulhrs_epi16(a, b); }
INLINE H add_saturated(H a, H b) { return _mm512_adds_epi16(a, b); }
INLINE H subtract16(H a, H b) { return _mm512_sub_epi16(a, b); }
INLINE H shift_right16(H a, int64_t n) { return _mm512_sra_epi16(a, _mm_cvtsi64_si128(n)); }
INLINE H clamp16(H a, H low, H high) { return _mm512_min_epi16(_mm512_max_epi16(a, low), high); }
// Four channels of kGranule pixels, each in 0 to 255, to quads.
INLINE void zip(const H* y, I& a, I& b) {
  const H y01 = _mm512_or_si512(y[0], _mm512_slli_epi16(y[1], 8));
  const H y23 = _mm512_or_si512(y[2], _mm512_slli_epi16(y[3], 8));
  a = _mm512_unpacklo_epi16(y01, y23);
  b = _mm512_unpackhi_epi16(y01, y23);
}
// Quads to four channels, each shifted left by 7.
INLINE void unzip(I a, I b, H* y) {
  const I words = splat(0xffff), even = splat(0x00ff00ff);
  const H y01 = _mm512_packus_epi32(_mm512_and_si512(a, words), _mm512_and_si512(b, words));
  const H y23 = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
  y[0] = _mm512_slli_epi16(_mm512_and_si512(y01, even), 7);
  y[1] = _mm512_slli_epi16(_mm512_srli_epi16(y01, 8), 7);
  y[2] = _mm512_slli_epi16(_mm512_and_si512(y23, even), 7);
  y[3] = _mm512_slli_epi16(_mm512_srli_epi16(y23, 8), 7);
}
// The bytes of a quad vector to 16 bits each, shifted left by 7, and back (clamped to 0 to 255).
INLINE void widen_bytes(I a, H& low, H& high) {
  const I zero = _mm512_setzero_si512();
  low = _mm512_slli_epi16(_mm512_unpacklo_epi8(a, zero), 7);
  high = _mm512_slli_epi16(_mm512_unpackhi_epi8(a, zero), 7);
}
INLINE I narrow_bytes(H low, H high) { return _mm512_packus_epi16(low, high); }
INLINE I max_bytes(I a, I b) { return _mm512_max_epu8(a, b); }
INLINE I even_pixels(I a, I b) {
  const I at = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_epi32(a, at, b);
}
// Four vectors of quads (taps) to vectors whose 32 bits are four taps of one channel: part u holds the
// pixels 4 l + u, l = 0, 1, ..., with the 4 channels of a pixel side by side.
INLINE void transpose_taps(I* x) {
  const I a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
  const I c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
  x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
}
INLINE I low_words(I x) { return _mm512_and_si512(x, splat(0x00ff00ff)); }  // of unsigned channels 0 and 2
INLINE I high_words(I x) { return _mm512_srli_epi16(x, 8); }
INLINE I low_signed(I x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
INLINE I high_signed(I x) { return _mm512_srai_epi16(x, 8); }
INLINE I dot_pairs(I sum, I x, I w) { return _mm512_add_epi32(sum, _mm512_madd_epi16(x, w)); }

#elif LEGO_LANES == 8
typedef __m256i I;
typedef __m256i H;
INLINE I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
INLINE I splat(int32_t a) { return _mm256_set1_epi32(a); }
INLINE H splat16(int16_t a) { return _mm256_set1_epi16(a); }
INLINE I repeat16(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
INLINE I shift_right(I a, I n) { return _mm256_srav_epi32(a, n); }
INLINE H narrow(I a, I b) { return _mm256_packs_epi32(a, b); }
INLINE H multiply_high(H a, H b) { return _mm256_mulhrs_epi16(a, b); }
INLINE H add_saturated(H a, H b) { return _mm256_adds_epi16(a, b); }
INLINE H subtract16(H a, H b) { return _mm256_sub_epi16(a, b); }
INLINE H shift_right16(H a, int64_t n) { return _mm256_sra_epi16(a, _mm_cvtsi64_si128(n)); }
INLINE H clamp16(H a, H low, H high) { return _mm256_min_epi16(_mm256_max_epi16(a, low), high); }
INLINE void zip(const H* y, I& a, I& b) {
  const H y01 = _mm256_or_si256(y[0], _mm256_slli_epi16(y[1], 8));
  const H y23 = _mm256_or_si256(y[2], _mm256_slli_epi16(y[3], 8));
  a = _mm256_unpacklo_epi16(y01, y23);
  b = _mm256_unpackhi_epi16(y01, y23);
}
INLINE void unzip(I a, I b, H* y) {
  const I words = splat(0xffff), even = splat(0x00ff00ff);
  const H y01 = _mm256_packus_epi32(_mm256_and_si256(a, words), _mm256_and_si256(b, words));
  const H y23 = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  y[0] = _mm256_slli_epi16(_mm256_and_si256(y01, even), 7);
  y[1] = _mm256_slli_epi16(_mm256_srli_epi16(y01, 8), 7);
  y[2] = _mm256_slli_epi16(_mm256_and_si256(y23, even), 7);
  y[3] = _mm256_slli_epi16(_mm256_srli_epi16(y23, 8), 7);
}
INLINE void widen_bytes(I a, H& low, H& high) {
  const I zero = _mm256_setzero_si256();
  low = _mm256_slli_epi16(_mm256_unpacklo_epi8(a, zero), 7);
  high = _mm256_slli_epi16(_mm256_unpackhi_epi8(a, zero), 7);
}
INLINE I narrow_bytes(H low, H high) { return _mm256_packus_epi16(low, high); }
INLINE I max_bytes(I a, I b) { return _mm256_max_epu8(a, b); }
INLINE I even_pixels(I a, I b) {
  const __m256 even = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
  return _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xd8);
}
INLINE void transpose_taps(I* x) {
  const I a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpackhi_epi8(x[0], x[1]);
  const I c = _mm256_unpacklo_epi8(x[2], x[3]), d = _mm256_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm256_unpacklo_epi16(a, c), x[1] = _mm256_unpackhi_epi16(a, c);
  x[2] = _mm256_unpacklo_epi16(b, d), x[3] = _mm256_unpackhi_epi16(b, d);
}
INLINE I low_words(I x) { return _mm256_and_si256(x, splat(0x00ff00ff)); }
INLINE I high_words(I x) { return _mm256_srli_epi16(x, 8); }
INLINE I low_signed(I x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
INLINE I high_signed(I x) { return _mm256_srai_epi16(x, 8); }
INLINE I dot_pairs(I sum, I x, I w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }

#else
typedef int32_t I __attribute__((vector_size(16), may_alias));
typedef int16_t H __attribute__((vector_size(16), may_alias));
typedef uint8_t B __attribute__((vector_size(16), may_alias));
typedef int32_t Iu __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t H4 __attribute__((vector_size(8)));
INLINE I load(const void* p) { return *static_cast<const Iu*>(p); }
INLINE void store(void* p, I v) { *static_cast<Iu*>(p) = v; }
INLINE I splat(int32_t a) { return a - I{}; }
INLINE H splat16(int16_t a) { return a - H{}; }
INLINE I repeat16(const void* p) { return load(p); }
INLINE I add(I a, I b) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a + (U)b);
}
INLINE I shift_right(I a, I n) { return a >> n; }
INLINE I clamp32(I a, int32_t low, int32_t high) {
  a = a > splat(low) ? a : splat(low);
  return a < splat(high) ? a : splat(high);
}
INLINE H narrow(I a, I b) {
  H h{};
  a = clamp32(a, -32768, 32767), b = clamp32(b, -32768, 32767);
  UNROLL for (int u = 0; u < 4; u++) h[u] = static_cast<int16_t>(a[u]), h[4 + u] = static_cast<int16_t>(b[u]);
  return h;
}
INLINE I low_half(H a) { return I{a[0], a[1], a[2], a[3]}; }
INLINE I high_half(H a) { return I{a[4], a[5], a[6], a[7]}; }
INLINE H multiply_high(H a, H b) {
  const I half = splat(1 << 14);
  return narrow((low_half(a) * low_half(b) + half) >> 15, (high_half(a) * high_half(b) + half) >> 15);
}
INLINE H add_saturated(H a, H b) {
  return narrow(low_half(a) + low_half(b), high_half(a) + high_half(b));
}
INLINE H subtract16(H a, H b) { return a - b; }
INLINE H shift_right16(H a, int64_t n) { return a >> static_cast<int16_t>(n); }
INLINE H clamp16(H a, H low, H high) {
  a = a > low ? a : low;
  return a < high ? a : high;
}
INLINE void zip(const H* y, I& a, I& b) {
  UNROLL for (int u = 0; u < 4; u++) {
    a[u] = static_cast<int32_t>(static_cast<uint32_t>(y[0][u] | y[1][u] << 8) | static_cast<uint32_t>(y[2][u]) << 16 |
                                static_cast<uint32_t>(y[3][u]) << 24);
    b[u] = static_cast<int32_t>(static_cast<uint32_t>(y[0][4 + u] | y[1][4 + u] << 8) |
                                static_cast<uint32_t>(y[2][4 + u]) << 16 | static_cast<uint32_t>(y[3][4 + u]) << 24);
  }
}
INLINE void unzip(I a, I b, H* y) {
  UNROLL for (int c = 0; c < 4; c++) {
    const I mask = splat(255);
    y[c] = narrow(((a >> 8 * c) & mask) << 7, ((b >> 8 * c) & mask) << 7);
  }
}
INLINE void widen_bytes(I a, H& low, H& high) {
  const B bytes = (B)a;
  UNROLL for (int u = 0; u < 8; u++) {
    low[u] = static_cast<int16_t>(bytes[u] << 7), high[u] = static_cast<int16_t>(bytes[8 + u] << 7);
  }
}
INLINE I narrow_bytes(H low, H high) {
  B bytes{};
  const H l = clamp16(low, splat16(0), splat16(255)), h = clamp16(high, splat16(0), splat16(255));
  UNROLL for (int u = 0; u < 8; u++) {
    bytes[u] = static_cast<uint8_t>(l[u]), bytes[8 + u] = static_cast<uint8_t>(h[u]);
  }
  return (I)bytes;
}
INLINE I max_bytes(I a, I b) { return (I)((B)a > (B)b ? (B)a : (B)b); }
INLINE I even_pixels(I a, I b) { return I{a[0], a[2], b[0], b[2]}; }
INLINE void transpose_taps(I* x) {  // a 4 x 4 block of bytes per pixel
  I y[4];
  UNROLL for (int p = 0; p < 4; p++) {
    UNROLL for (int c = 0; c < 4; c++) {
      uint32_t taps = 0;
      UNROLL for (int t = 0; t < 4; t++) taps |= (static_cast<uint32_t>(x[t][p]) >> 8 * c & 255) << 8 * t;
      y[p][c] = static_cast<int32_t>(taps);
    }
  }
  UNROLL for (int p = 0; p < 4; p++) x[p] = y[p];
}
#endif

// sum + the products of the four unsigned bytes of x and the four signed bytes of w.
INLINE I dot(I sum, I x, I w) {
#if LEGO_LANES == 4
  UNROLL for (int c = 0; c < 4; c++) {
    typedef uint32_t U __attribute__((vector_size(16)));
    sum = add(sum, (x >> 8 * c & splat(255)) * ((I)((U)w << (24 - 8 * c)) >> 24));
  }
  return sum;
#elif LEGO_VNNI == 512
  return _mm512_dpbusd_epi32(sum, x, w);
#elif LEGO_VNNI == 256
  return _mm256_dpbusd_avx_epi32(sum, x, w);
#else
  return dot_pairs(dot_pairs(sum, low_words(x), low_signed(w)), high_words(x), high_signed(w));
#endif
}
