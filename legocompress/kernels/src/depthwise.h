// Depthwise convs of NCHW maps: every output channel reads one input channel, so there are no Lego filters
// to share. They run one band of output rows at a time, whose padded input stays in the first cache.

// The floats at p, p + step, p + 2 step, ...
INLINE V load_strided(const float* p, int64_t step) {
  if (step == 1) return load(p);
  if (step == 2) return even_lanes(load(p), load(p + kLanes));
  V a;
  UNROLL for (int u = 0; u < kLanes; u++) a[u] = p[u * step];
  return a;
}

INLINE V activate_as(Activation a, V v) {
  switch (a) {
    case kRelu: return activate<kRelu>(v);
    case kRelu6: return activate<kRelu6>(v);
    case kSilu: return activate<kSilu>(v);
    default: return v;
  }
}

constexpr int64_t kBandFloats = 4 * 1024;  // floats of padded input in a band
constexpr int kRowsAtOnce = 4;             // output rows that are computed together and share what they read

struct Band {
  int64_t rows;   // of output
  int64_t pitch;  // floats of a padded input row
  INLINE explicit Band(const Depthwise& d) {
    pitch = (d.out_w - 1) * d.stride_w + (d.kernel_w - 1) * d.dilation_w + 1;
    const int64_t room = max(kRowsAtOnce, (kBandFloats / pitch - input_rows(d, 1)) / d.stride_h + 1);
    const int64_t even = ceil_div(d.out_h, ceil_div(d.out_h, room));
    rows = min(d.out_h, round_up(even, kRowsAtOnce));
  }
  INLINE int64_t input_rows(const Depthwise& d, int64_t out_rows) const {
    return (out_rows - 1) * d.stride_h + (d.kernel_h - 1) * d.dilation_h + 1;
  }
};

int64_t count_depthwise_floats(const Depthwise& d) {
  const Band b(d);
  // The second term is what the last vectors read past the end.
  return b.input_rows(d, b.rows) * b.pitch + (kLanes + 1) * (d.stride_w + 1);
}

// Stores `count` floats of an output row; the plane ends after `room` floats. A whole vector may write past
// its row, since the next row is written after it.
INLINE void store_row(float* y, V v, int64_t count, int64_t room) {
  if (room >= kLanes) return store(y, v);
  float lanes[kLanes];
  store(lanes, v);
  copy(y, lanes, count);
}

// Computes ROWS output rows of a K x K kernel with stride S, or one row of any kernel if K is 0.
template <int K, int S, int ROWS>
INLINE void compute_depthwise_rows(const Depthwise& d, const Band& b, const float* weight,
                                   float bias, const float* in, float* y, int64_t room) {
  V tap_weights[9];  // the weights of a 3 x 3 kernel, which fit into registers
  if constexpr (K == 3) {
    UNROLL for (int t = 0; t < 9; t++) tap_weights[t] = splat(weight[t]);
  }
  for (int64_t i0 = 0; i0 < d.out_w; i0 += kLanes) {
    // The last vector of a row overlaps the one before it.
    const int64_t i = d.out_w - i0 < kLanes && d.out_w >= kLanes ? d.out_w - kLanes : i0;
    V s[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) s[r] = splat(bias);
    if constexpr (K > 0) {
      UNROLL for (int h = 0; h < (ROWS - 1) * S + K; h++) {
        UNROLL for (int w = 0; w < K; w++) {
          const float* p = in + h * b.pitch + i * S + w;
          // At stride 2 the odd columns are in the same vectors as the even columns before them.
          const V v = S == 1 ? load(p) : w % 2 ? odd_lanes(load(p - 1), load(p - 1 + kLanes))
                                               : even_lanes(load(p), load(p + kLanes));
          UNROLL for (int r = 0; r < ROWS; r++) {
            const int tap = (h - r * S) * K + w;
            if (h < r * S || h >= r * S + K) continue;
            s[r] += (K == 3 ? tap_weights[tap] : splat(weight[tap])) * v;
          }
        }
      }
    } else {
      for (int64_t h = 0; h < d.kernel_h; h++) {
        const float* p = in + h * d.dilation_h * b.pitch + i * d.stride_w;
        for (int64_t w = 0; w < d.kernel_w; w++) {
          s[0] += weight[h * d.kernel_w + w] * load_strided(p + w * d.dilation_w, d.stride_w);
        }
      }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      const int64_t at = r * d.out_w + i;
      store_row(y + at, activate_as(d.activation, s[r]), min(kLanes, d.out_w - i), room - at);
    }
  }
}

// Computes output planes [first, last), counted over all images.
template <int K, int S>
void compute_depthwise_planes(const Depthwise& d, int64_t first, int64_t last, float* scratch) {
  constexpr int kRows = K ? kRowsAtOnce : 1;
  const Band b(d);
  const Span span(-d.pad_w, 1, b.pitch, d.width);
  for (int64_t plane = first; plane < last; plane++) {
    const int64_t channel = plane % d.n_out, image = plane / d.n_out;
    const int64_t from = image * d.channels + channel / (d.n_out / d.channels);
    const float* x = d.x + from * d.height * d.width;
    const float* weight = d.weight + channel * d.kernel_h * d.kernel_w;
    const float bias = d.bias ? d.bias[channel] : 0.0f;
    for (int64_t done = 0; done < d.out_h; done += b.rows) {
      // The last band, and the last rows of a band, overlap the ones before them.
      const int64_t row0 = min(done, d.out_h - b.rows);
      for (int64_t r = 0; r < b.input_rows(d, b.rows); r++) {
        const int64_t y = row0 * d.stride_h - d.pad_h + r;
        float* to = scratch + r * b.pitch;
        if (y >= 0 && y < d.height) {
          copy_row(to, x + y * d.width, span);
        } else {
          for (int64_t i = 0; i < b.pitch; i++) to[i] = 0;
        }
      }
      for (int64_t r0 = 0; r0 < b.rows; r0 += kRows) {
        const int64_t r = min(r0, b.rows - kRows), row = row0 + r;
        compute_depthwise_rows<K, S, kRows>(d, b, weight, bias, scratch + r * d.stride_h * b.pitch,
                                            d.y + (plane * d.out_h + row) * d.out_w,
                                            (d.out_h - row) * d.out_w);
      }
    }
  }
}

void depthwise(const Depthwise& d, int64_t first, int64_t last, float* scratch) {
  const int64_t k = d.kernel_h, s = d.stride_h;
  const bool plain = d.dilation_h == 1 && d.dilation_w == 1 && d.kernel_w == k && d.stride_w == s;
  if (plain && d.out_h >= kRowsAtOnce) {
    if (k == 3 && s == 1) return compute_depthwise_planes<3, 1>(d, first, last, scratch);
    if (k == 3 && s == 2) return compute_depthwise_planes<3, 2>(d, first, last, scratch);
    if (k == 5 && s == 1) return compute_depthwise_planes<5, 1>(d, first, last, scratch);
    if (k == 5 && s == 2) return compute_depthwise_planes<5, 2>(d, first, last, scratch);
    if (k == 7 && s == 1) return compute_depthwise_planes<7, 1>(d, first, last, scratch);
  }
  compute_depthwise_planes<0, 0>(d, first, last, scratch);
}
