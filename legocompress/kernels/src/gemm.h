// The inner loops: multiply a panel of 1 to 6 Lego filters with a register tile of pixels.

// How many floats ahead filters are prefetched. A network reads each filter from memory once; prefetched
// early enough, that costs no time.
constexpr int64_t kFilterPrefetch = 512;

// z[r][v] (+)= sum over channels and taps of a[channel][tap][r] * x[channel * stride + tap_at + dx].
// MR filters, NV vectors of pixels; TAPS is 1, 9, or 0 for any number (n_taps).
template <int MR, int NV, int TAPS>
void multiply_panel(const float* a, int64_t channels, int64_t n_taps, const int64_t* tap_at,
                    const float* x, int64_t stride, const int64_t* dx, float* z, int64_t z_stride,
                    bool add) {
  V s[MR][NV];
  int64_t d[NV];
  UNROLL for (int v = 0; v < NV; v++) d[v] = dx[v];
  if (add) {
    UNROLL for (int r = 0; r < MR; r++) {
      UNROLL for (int v = 0; v < NV; v++) s[r][v] = load(z + r * z_stride + v * kLanes);
    }
  } else {
    UNROLL for (int r = 0; r < MR; r++) {
      UNROLL for (int v = 0; v < NV; v++) s[r][v] = V{};
    }
  }
  if (TAPS == 1) {
    const float* p = x + tap_at[0];
#pragma GCC unroll 2
    for (int64_t c = 0; c < channels; c++) {
      __builtin_prefetch(a + kFilterPrefetch);
      V xv[NV];
      UNROLL for (int v = 0; v < NV; v++) xv[v] = load(p + d[v]);
      UNROLL for (int r = 0; r < MR; r++) {
        const V b = splat(a[r]);
        UNROLL for (int v = 0; v < NV; v++) s[r][v] += b * xv[v];
      }
      a += MR;
      p += stride;
    }
  } else {
    const int64_t taps = TAPS ? TAPS : n_taps;
    for (int64_t c = 0; c < channels; c++) {
#pragma GCC unroll 3
      for (int64_t t = 0; t < taps; t++) {
        const float* p = x + tap_at[t];
        __builtin_prefetch(a + kFilterPrefetch);
        V xv[NV];
        UNROLL for (int v = 0; v < NV; v++) xv[v] = load(p + d[v]);
        UNROLL for (int r = 0; r < MR; r++) {
          const V b = splat(a[r]);
          UNROLL for (int v = 0; v < NV; v++) s[r][v] += b * xv[v];
        }
        a += MR;
      }
      x += stride;
    }
  }
  UNROLL for (int r = 0; r < MR; r++) {
    UNROLL for (int v = 0; v < NV; v++) store(z + r * z_stride + v * kLanes, s[r][v]);
  }
}

typedef void (*MultiplyPanel)(const float*, int64_t, int64_t, const int64_t*, const float*, int64_t,
                              const int64_t*, float*, int64_t, bool);

#define LEGO_ROW(NV, TAPS)                                                                \
  {multiply_panel<1, NV, TAPS>, multiply_panel<2, NV, TAPS>, multiply_panel<3, NV, TAPS>, \
   multiply_panel<4, NV, TAPS>, multiply_panel<5, NV, TAPS>, multiply_panel<6, NV, TAPS>}
#define LEGO_NV(NV) {LEGO_ROW(NV, 0), LEGO_ROW(NV, 1), LEGO_ROW(NV, 9)}
// Indexed by vectors - 1, then taps (any, 1, 9), then filters - 1.
const MultiplyPanel kMultiplyPanel[LEGO_VECTORS][3][kPanel] = {
    LEGO_NV(1),
    LEGO_NV(2),
#if LEGO_VECTORS > 2
    LEGO_NV(3),
    LEGO_NV(4),
#endif
};

// Multiplies a panel with the last few pixels of a run, each one column: a vector holds the filters of the
// panel, not pixels. column[n * column_stride + k] is the input of pixel n.
template <int NC>
void multiply_columns(const float* a, int64_t mr, int64_t depth, const float* column,
                      int64_t column_stride, float* z, int64_t z_stride, bool add) {
  constexpr int U = NC == 1 ? 4 : 2;
  V8 s[NC][U];
  UNROLL for (int n = 0; n < NC; n++) {
    UNROLL for (int u = 0; u < U; u++) s[n][u] = V8{};
  }
  int64_t k = 0;
  for (; k + U <= depth; k += U) {
    __builtin_prefetch(a + k * mr + kFilterPrefetch);
    UNROLL for (int u = 0; u < U; u++) {
      const V8 av = load8(a + (k + u) * mr);
      UNROLL for (int n = 0; n < NC; n++) s[n][u] += av * column[n * column_stride + k + u];
    }
  }
  for (; k < depth; k++) {
    const V8 av = load8(a + k * mr);
    UNROLL for (int n = 0; n < NC; n++) s[n][0] += av * column[n * column_stride + k];
  }
  for (int n = 0; n < NC; n++) {
    V8 total = s[n][0];
    for (int u = 1; u < U; u++) total += s[n][u];
    for (int64_t r = 0; r < mr; r++) {
      float* to = z + r * z_stride + n;
      *to = add ? *to + total[r] : total[r];
    }
  }
}

typedef void (*MultiplyColumns)(const float*, int64_t, int64_t, const float*, int64_t, float*,
                                int64_t, bool);
// With more pixels than this, one vector of pixels is faster.
constexpr int64_t kMaxColumns = kLanes >= 8 ? 4 : 1;
const MultiplyColumns kMultiplyColumns[4] = {multiply_columns<1>, multiply_columns<2>,
                                             multiply_columns<3>, multiply_columns<4>};

// The panels of a split, as even as possible: the first `n_tall` have one filter more than the others.
struct Panels {
  int64_t count, n_tall, small;
  INLINE explicit Panels(int64_t rows) {
    count = ceil_div(rows, kPanel);
    small = count ? rows / count : 0;
    n_tall = count ? rows % count : 0;
  }
  INLINE int64_t height(int64_t p) const { return small + (p < n_tall); }
  INLINE int64_t first(int64_t p) const { return p * small + min(p, n_tall); }
};
