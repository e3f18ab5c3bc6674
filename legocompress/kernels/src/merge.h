// Rows of Z to output channels: Y[j] = activation(sum of coefficient * Z[row] + bias + residual).

INLINE void fetch_to_write(const float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(to + i, 1);
}

// `count` pixels of one output channel. SUM terms, or n_sum where SUM is 0.
template <int SUM, int A>
INLINE void merge_pixels(const float* z, int64_t z_stride, const int32_t* rows,
                         const float* coefficients, int64_t n_sum, float bias,
                         const float* residual, float* y, int64_t count) {
  constexpr int kKept = SUM ? SUM : 1;
  const float* from[kKept];
  V gain[kKept];
  if (SUM) {
    UNROLL for (int t = 0; t < SUM; t++) {
      from[t] = z + rows[t] * z_stride;
      gain[t] = splat(coefficients[t]);
    }
  }
  const V b = splat(bias);
  int64_t i = 0;
  // The last vector overlaps the one before, whose sums may stand where the residual was.
  const bool overlaps = residual && count >= kLanes && count % kLanes;
  const V last_residual = overlaps ? load(residual + count - kLanes) : V{};
  constexpr int kStrip = 4;
  for (; i + kStrip * kLanes <= count; i += kStrip * kLanes) {
    V s[kStrip];
    UNROLL for (int u = 0; u < kStrip; u++) s[u] = b;
    if (SUM) {
      UNROLL for (int t = 0; t < SUM; t++) {
        UNROLL for (int u = 0; u < kStrip; u++) s[u] += gain[t] * load(from[t] + i + u * kLanes);
      }
    } else {
      for (int64_t t = 0; t < n_sum; t++) {
        const float* p = z + rows[t] * z_stride + i;
        const V g = splat(coefficients[t]);
        UNROLL for (int u = 0; u < kStrip; u++) s[u] += g * load(p + u * kLanes);
      }
    }
    if (residual) {
      UNROLL for (int u = 0; u < kStrip; u++) s[u] += load(residual + i + u * kLanes);
    }
    UNROLL for (int u = 0; u < kStrip; u++) store(y + i + u * kLanes, activated<A>(s[u]));
  }
  const auto sum_at = [&](int64_t at) INLINE_LAMBDA {
    V s = b;
    if (SUM) {
      UNROLL for (int t = 0; t < SUM; t++) s += gain[t] * load(from[t] + at);
    } else {
      for (int64_t t = 0; t < n_sum; t++) {
        s += coefficients[t] * load(z + rows[t] * z_stride + at);
      }
    }
    return s;
  };
  for (; i < count; i += kLanes) {
    const bool last = count - i < kLanes && count >= kLanes;
    if (last) i = count - kLanes;
    V s = sum_at(i);
    const int64_t n = least(kLanes, count - i);
    if (n == kLanes) {
      if (residual) s += last ? last_residual : load(residual + i);
      store(y + i, activated<A>(s));
    } else {
      if (residual) {
        V r = V{};
        for (int64_t u = 0; u < n; u++) r[u] = residual[i + u];
        s += r;
      }
      s = activated<A>(s);
      for (int64_t u = 0; u < n; u++) y[i + u] = s[u];
    }
  }
}

template <int SUM, int A>
void merge_planes(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z) {
  const Header& h = *v.head;
  const int64_t plane = v.out_h * v.out_w;
  each_run(v, tile, [&](const Run& run) {
    for (int64_t j = first; j < last; j++) {
      const int64_t at = (run.image * h.n_out + j) * plane + run.first;
      if (j + kAhead < last) fetch_to_write(v.y + at + kAhead * plane, run.count);
      merge_pixels<SUM, A>(z + run.offset, v.z_stride, v.rows + j * h.n_sum,
                           v.coefficients + j * h.n_sum, h.n_sum, v.bias ? v.bias[j] : 0.0f,
                           v.residual ? v.residual + at : nullptr, v.y + at, run.count);
    }
  });
}

INLINE B block_splat(float a) { return a - B{}; }

// The activation of a block's row, by way of a vector of the machine's width where they differ.
template <int A>
INLINE B activated_block(B s) {
#if LEGO_LANES == 16
  V wide = V{};
  UNROLL for (int u = 0; u < 8; u++) wide[u] = s[u];
  wide = activated<A>(wide);
  UNROLL for (int u = 0; u < 8; u++) s[u] = wide[u];
  return s;
#else
  return activated<A>(s);
#endif
}

// The same for channels last: blocks of channels by pixels, transposed on the way out.
template <int A>
void merge_last(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z_tile) {
  const Header& h = *v.head;
  const int64_t plane = v.out_h * v.out_w, n = h.n_out;
  each_run(v, tile, [&](const Run& run) {
    const float* z = z_tile + run.offset;
    for (int64_t i = 0; i < run.count; i += kBlock) {
      const int64_t pixels = least(kBlock, run.count - i);
      const int64_t at = (run.image * plane + run.first + i) * n;
      for (int64_t j = first; j < last; j += kBlock) {
        const int64_t channels = least(kBlock, last - j);
        B s[kBlock];
        UNROLL for (int64_t u = 0; u < kBlock; u++) {
          s[u] = B{};
          if (u < channels) {
            s[u] = block_splat(v.bias ? v.bias[j + u] : 0.0f);
            const int64_t sum = (j + u) * h.n_sum;
            for (int64_t t = 0; t < h.n_sum; t++) {
              s[u] += v.coefficients[sum + t] * load_block(z + v.rows[sum + t] * v.z_stride + i);
            }
          }
        }
        transpose(s);
        UNROLL for (int64_t u = 0; u < kBlock; u++) {
          if (u >= pixels) break;
          float* y = v.y + at + u * n + j;
          const float* residual = v.residual ? v.residual + at + u * n + j : nullptr;
          if (channels == kBlock) {
            if (residual) s[u] += load_block(residual);
            store_block(y, activated_block<A>(s[u]));
          } else {
            for (int64_t w = 0; w < channels; w++) {
              if (residual) s[u][w] += residual[w];
            }
            s[u] = activated_block<A>(s[u]);
            for (int64_t w = 0; w < channels; w++) y[w] = s[u][w];
          }
        }
      }
    }
  });
}

template <int A>
void merge_any(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z) {
  if (v.channels_last) return merge_last<A>(v, tile, first, last, z);
  switch (v.head->n_sum) {
    case 1: return merge_planes<1, A>(v, tile, first, last, z);
    case 2: return merge_planes<2, A>(v, tile, first, last, z);
    case 4: return merge_planes<4, A>(v, tile, first, last, z);
    default: return merge_planes<0, A>(v, tile, first, last, z);
  }
}

void merge_direct(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z) {
  switch (v.activation) {
    case kRelu: return merge_any<kRelu>(v, tile, first, last, z);
    case kRelu6: return merge_any<kRelu6>(v, tile, first, last, z);
    case kSilu: return merge_any<kSilu>(v, tile, first, last, z);
    default: return merge_any<kNone>(v, tile, first, last, z);
  }
}
