// The merge, from rows of Z to output channels:
//   Y[j] = activation(bias[j] + sum over t of coefficients[j][t] * Z[rows[j][t]] + residual[j])

INLINE void prefetch_for_write(const float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(to + i, 1);
}

// Computes `count` pixels of one output channel. SUM is the number of terms, or 0 for any number (n_sum).
template <int SUM, int A>
INLINE void merge_pixels(const float* z, int64_t z_stride, const int32_t* rows,
                         const float* coefficients, int64_t n_sum, float bias,
                         const float* residual, float* y, int64_t count) {
  constexpr int kTerms = SUM ? SUM : 1;
  const float* from[kTerms];
  V gain[kTerms];
  if (SUM) {
    UNROLL for (int t = 0; t < SUM; t++) {
      from[t] = z + rows[t] * z_stride;
      gain[t] = splat(coefficients[t]);
    }
  }
  const V b = splat(bias);
  int64_t i = 0;
  // The last vector overlaps the one before it. The output may overwrite the residual, so the residual of
  // the last vector is read first.
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
    UNROLL for (int u = 0; u < kStrip; u++) store(y + i + u * kLanes, activate<A>(s[u]));
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
    const int64_t n = min(kLanes, count - i);
    if (n == kLanes) {
      if (residual) s += last ? last_residual : load(residual + i);
      store(y + i, activate<A>(s));
    } else {
      if (residual) {
        V r = V{};
        for (int64_t u = 0; u < n; u++) r[u] = residual[i + u];
        s += r;
      }
      s = activate<A>(s);
      for (int64_t u = 0; u < n; u++) y[i + u] = s[u];
    }
  }
}

template <int SUM, int A>
void merge_planes(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z) {
  const Header& h = *v.header;
  const int64_t plane = v.out_h * v.out_w;
  for_each_run(v, tile, [&](const Run& run) {
    for (int64_t j = first; j < last; j++) {
      const int64_t at = (run.image * h.n_out + j) * plane + run.first;
      if (j + kPrefetchChannels < last) {
        prefetch_for_write(v.y + at + kPrefetchChannels * plane, run.count);
      }
      merge_pixels<SUM, A>(z + run.offset, v.z_stride, v.rows + j * h.n_sum,
                           v.coefficients + j * h.n_sum, h.n_sum, v.bias ? v.bias[j] : 0.0f,
                           v.residual ? v.residual + at : nullptr, v.y + at, run.count);
    }
  });
}

INLINE B splat_block(float a) { return a - B{}; }

// Activates a row of a block, by a vector of the machine's width if that is not the width of a block.
template <int A>
INLINE B activate_block(B s) {
#if LEGO_LANES == 16
  V wide = V{};
  UNROLL for (int u = 0; u < 8; u++) wide[u] = s[u];
  wide = activate<A>(wide);
  UNROLL for (int u = 0; u < 8; u++) s[u] = wide[u];
  return s;
#else
  return activate<A>(s);
#endif
}

// merge_planes for channels last: sums blocks of channels x pixels, and transposes them before it stores.
template <int A>
void merge_channels_last(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z_tile) {
  const Header& h = *v.header;
  const int64_t plane = v.out_h * v.out_w, n = h.n_out;
  for_each_run(v, tile, [&](const Run& run) {
    const float* z = z_tile + run.offset;
    for (int64_t i = 0; i < run.count; i += kBlock) {
      const int64_t pixels = min(kBlock, run.count - i);
      const int64_t at = (run.image * plane + run.first + i) * n;
      for (int64_t j = first; j < last; j += kBlock) {
        const int64_t channels = min(kBlock, last - j);
        B s[kBlock];
        UNROLL for (int64_t u = 0; u < kBlock; u++) {
          s[u] = B{};
          if (u < channels) {
            s[u] = splat_block(v.bias ? v.bias[j + u] : 0.0f);
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
            store_block(y, activate_block<A>(s[u]));
          } else {
            for (int64_t w = 0; w < channels; w++) {
              if (residual) s[u][w] += residual[w];
            }
            s[u] = activate_block<A>(s[u]);
            for (int64_t w = 0; w < channels; w++) y[w] = s[u][w];
          }
        }
      }
    }
  });
}

template <int A>
void merge_by_layout(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z) {
  if (v.channels_last) return merge_channels_last<A>(v, tile, first, last, z);
  switch (v.header->n_sum) {
    case 1: return merge_planes<1, A>(v, tile, first, last, z);
    case 2: return merge_planes<2, A>(v, tile, first, last, z);
    case 4: return merge_planes<4, A>(v, tile, first, last, z);
    default: return merge_planes<0, A>(v, tile, first, last, z);
  }
}

void merge_direct(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z) {
  switch (v.activation) {
    case kRelu: return merge_by_layout<kRelu>(v, tile, first, last, z);
    case kRelu6: return merge_by_layout<kRelu6>(v, tile, first, last, z);
    case kSilu: return merge_by_layout<kSilu>(v, tile, first, last, z);
    default: return merge_by_layout<kNone>(v, tile, first, last, z);
  }
}
