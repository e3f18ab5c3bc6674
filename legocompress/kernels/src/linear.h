// Linear layers: the weights as they are, each read from memory once for all inputs.

constexpr int64_t kDotRows = 4;          // of weights, side by side: more streams of memory than one
constexpr int64_t kDotInputs = LEGO_VECTORS;
constexpr int64_t kLinearDepth = 4096;   // of rows that stay in the second cache for all inputs

// y[n][r] (+)= w[r] . x[n] for R rows of weights and N inputs, over `depth` channels.
template <int R, int N>
void dots(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth, float* y,
          int64_t y_stride, bool add) {
  V s[N][R];
  UNROLL for (int n = 0; n < N; n++) {
    UNROLL for (int r = 0; r < R; r++) s[n][r] = V{};
  }
  int64_t i = 0;
  for (; i + kLanes <= depth; i += kLanes) {
    V a[R];
    UNROLL for (int r = 0; r < R; r++) a[r] = load(w + r * w_stride + i);
    UNROLL for (int n = 0; n < N; n++) {
      const V b = load(x + n * x_stride + i);
      UNROLL for (int r = 0; r < R; r++) s[n][r] += a[r] * b;
    }
  }
  UNROLL for (int n = 0; n < N; n++) {
    UNROLL for (int r = 0; r < R; r++) {
      float sum = add ? y[n * y_stride + r] : 0.0f;
      for (int64_t k = i; k < depth; k++) sum += w[r * w_stride + k] * x[n * x_stride + k];
      UNROLL for (int u = 0; u < kLanes; u++) sum += s[n][r][u];
      y[n * y_stride + r] = sum;
    }
  }
}

typedef void (*Dots)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
#define LEGO_DOTS(R) {dots<R, 1>, dots<R, 2>, dots<R, LEGO_VECTORS - 1>, dots<R, LEGO_VECTORS>}
// By rows - 1, then inputs - 1; where LEGO_VECTORS is 2 the last two are not used.
const Dots kDots[kDotRows][4] = {LEGO_DOTS(1), LEGO_DOTS(2), LEGO_DOTS(3), LEGO_DOTS(4)};

template <int A>
void finish(const Linear& l, int64_t first, int64_t last) {
  for (int64_t n = 0; n < l.batch; n++) {
    float* y = l.y + n * l.n_out;
    for (int64_t j = first; j < last; j += kLanes) {
      const int64_t count = least(kLanes, last - j);
      V v = V{};
      for (int64_t u = 0; u < count; u++) v[u] = y[j + u] + (l.bias ? l.bias[j + u] : 0.0f);
      v = activated<A>(v);
      for (int64_t u = 0; u < count; u++) y[j + u] = v[u];
    }
  }
}

// Outputs [first, last) of every input.
void linear(const Linear& l, int64_t first, int64_t last) {
  // Few inputs need a row once, and long streams are read faster.
  const int64_t most_depth = l.batch <= kDotInputs ? l.channels : kLinearDepth;
  for (int64_t k = 0; k < l.channels; k += most_depth) {
    const int64_t depth = least(most_depth, l.channels - k);
    for (int64_t j = first; j < last; j += kDotRows) {
      const int64_t rows = least(kDotRows, last - j);
      for (int64_t n = 0; n < l.batch; n += kDotInputs) {
        const int64_t inputs = least(kDotInputs, l.batch - n);
        kDots[rows - 1][inputs - 1](l.weight + j * l.channels + k, l.channels,
                                    l.x + n * l.channels + k, l.channels, depth,
                                    l.y + n * l.n_out + j, l.n_out, k > 0);
      }
    }
  }
  switch (l.activation) {
    case kRelu: return finish<kRelu>(l, first, last);
    case kRelu6: return finish<kRelu6>(l, first, last);
    case kSilu: return finish<kSilu>(l, first, last);
    default: return finish<kNone>(l, first, last);
  }
}
