// Linear layers, on weights in their ordinary layout. Each weight is read from memory once for all inputs.

constexpr int64_t kDotRows = 4;          // rows of weights that are read at once: several streams of memory
constexpr int64_t kDotInputs = LEGO_VECTORS;
constexpr int64_t kLinearDepth = 4096;   // floats of a row that stay in the second cache for all inputs

// y[n][r] (+)= sum over `depth` channels of w[r] * x[n], for R rows of weights and N inputs.
template <int R, int N>
void compute_dots(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth,
                  float* y, int64_t y_stride, bool add) {
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

typedef void (*ComputeDots)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                            bool);
#define LEGO_DOTS(R)                                        \
  {compute_dots<R, 1>, compute_dots<R, 2>,                  \
   compute_dots<R, LEGO_VECTORS - 1>, compute_dots<R, LEGO_VECTORS>}
// Indexed by rows - 1, then inputs - 1; if LEGO_VECTORS is 2, the last two are not used.
const ComputeDots kComputeDots[kDotRows][4] = {LEGO_DOTS(1), LEGO_DOTS(2), LEGO_DOTS(3), LEGO_DOTS(4)};

template <int A>
void add_bias_and_activate(const Linear& l, int64_t first, int64_t last) {
  for (int64_t n = 0; n < l.batch; n++) {
    float* y = l.y + n * l.n_out;
    for (int64_t j = first; j < last; j += kLanes) {
      const int64_t count = min(kLanes, last - j);
      V v = V{};
      for (int64_t u = 0; u < count; u++) v[u] = y[j + u] + (l.bias ? l.bias[j + u] : 0.0f);
      v = activate<A>(v);
      for (int64_t u = 0; u < count; u++) y[j + u] = v[u];
    }
  }
}

// Outputs [first, last) of every input.
void linear(const Linear& l, int64_t first, int64_t last) {
  // A few inputs are computed together and read a row once, and long streams of memory are faster.
  const int64_t max_depth = l.batch <= kDotInputs ? l.channels : kLinearDepth;
  for (int64_t k = 0; k < l.channels; k += max_depth) {
    const int64_t depth = min(max_depth, l.channels - k);
    for (int64_t j = first; j < last; j += kDotRows) {
      const int64_t rows = min(kDotRows, last - j);
      for (int64_t n = 0; n < l.batch; n += kDotInputs) {
        const int64_t inputs = min(kDotInputs, l.batch - n);
        kComputeDots[rows - 1][inputs - 1](l.weight + j * l.channels + k, l.channels,
                                           l.x + n * l.channels + k, l.channels, depth,
                                           l.y + n * l.n_out + j, l.n_out, k > 0);
      }
    }
  }
  switch (l.activation) {
    case kRelu: return add_bias_and_activate<kRelu>(l, first, last);
    case kRelu6: return add_bias_and_activate<kRelu6>(l, first, last);
    case kSilu: return add_bias_and_activate<kSilu>(l, first, last);
    default: return add_bias_and_activate<kNone>(l, first, last);
  }
}
