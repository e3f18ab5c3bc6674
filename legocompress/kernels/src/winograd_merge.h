// The merge in Winograd's form: rows of Z, in lines of patches, to output channels.

// Writes one output row: `sums` are its pixels side by side, `at` is the place of its first pixel in y.
template <int A>
INLINE void write_row(const Conv& v, const float* sums, int64_t at) {
  const int64_t step = v.channels_last ? v.header->n_out : 1;  // from one pixel to the next
  // The last vector overlaps the one before it. The output may overwrite the residual, so the residual
  // of the last vector is read first.
  const bool overlaps = v.residual && step == 1 && v.out_w >= kLanes && v.out_w % kLanes;
  const V last_residual = overlaps ? load(v.residual + at + v.out_w - kLanes) : V{};
  for (int64_t i = 0; i < v.out_w; i += kLanes) {
    const bool last = step == 1 && v.out_w - i < kLanes && v.out_w >= kLanes;
    if (last) i = v.out_w - kLanes;
    const int64_t n = min(kLanes, v.out_w - i);
    V s = load(sums + i);
    if (n == kLanes && step == 1) {
      if (v.residual) s += last ? last_residual : load(v.residual + at + i);
      store(v.y + at + i, activate<A>(s));
    } else {
      if (v.residual) {
        V r = V{};
        for (int64_t w = 0; w < n; w++) r[w] = v.residual[at + (i + w) * step];
        s += r;
      }
      s = activate<A>(s);
      for (int64_t w = 0; w < n; w++) v.y[at + (i + w) * step] = s[w];
    }
  }
}

// Sums row u of the patches of a tile, for output channel j; `line` receives the pixels side by side.
template <int SUM>
INLINE void sum_patch_rows(const Conv& v, int64_t j, int64_t u, int64_t patches, const float* z,
                           float* line) {
  const Header& h = *v.header;
  const int64_t stride = v.z_stride, n_sum = SUM ? SUM : h.n_sum;
  const V bias = splat(v.bias ? v.bias[j] : 0.0f);
  for (int64_t t = 0; t < patches; t += kLanes) {
    V s[4];
    UNROLL for (int q = 0; q < 4; q++) s[q] = bias;
#pragma GCC unroll 4
    for (int64_t k = 0; k < n_sum; k++) {
      const float* p = z + (v.rows[j * h.n_sum + k] * 16 + u * 4) * stride + t;
      const V gain = splat(v.coefficients[j * h.n_sum + k]);
      UNROLL for (int q = 0; q < 4; q++) s[q] += gain * load(p + q * stride);
    }
    const V a = zip_low(s[0], s[2]), c = zip_high(s[0], s[2]);
    const V d = zip_low(s[1], s[3]), e = zip_high(s[1], s[3]);
    store(line + 4 * t, zip_low(a, d));
    store(line + 4 * t + kLanes, zip_high(a, d));
    store(line + 4 * t + 2 * kLanes, zip_low(c, e));
    store(line + 4 * t + 3 * kLanes, zip_high(c, e));
  }
}

template <int SUM, int A>
void merge_bands(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
                 float* line) {
  const Header& h = *v.header;
  const Bands b(v);
  const TileBands bands(v, b, tile);
  for (int64_t j = first; j < last; j++) {
    for (int64_t u = 0; u < 4; u++) {  // one output row of every band
      sum_patch_rows<SUM>(v, j, u, bands.patches, z, line);
      for (int64_t band = bands.first; band < bands.last; band++) {
        const int64_t y = 4 * (band % b.down) + u;
        if (y >= v.out_h) continue;
        const int64_t image = band / b.down;
        const int64_t at = v.channels_last
                               ? ((image * v.out_h + y) * v.out_w) * h.n_out + j
                               : ((image * h.n_out + j) * v.out_h + y) * v.out_w;
        write_row<A>(v, line + (band - bands.first) * b.across * 4, at);
      }
    }
  }
}

template <int A>
void merge_bands_by_terms(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
                          float* line) {
  switch (v.header->n_sum) {
    case 1: return merge_bands<1, A>(v, tile, first, last, z, line);
    case 2: return merge_bands<2, A>(v, tile, first, last, z, line);
    case 4: return merge_bands<4, A>(v, tile, first, last, z, line);
    default: return merge_bands<0, A>(v, tile, first, last, z, line);
  }
}

void merge_winograd(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
                    float* line) {
  switch (v.activation) {
    case kRelu: return merge_bands_by_terms<kRelu>(v, tile, first, last, z, line);
    case kRelu6: return merge_bands_by_terms<kRelu6>(v, tile, first, last, z, line);
    case kSilu: return merge_bands_by_terms<kSilu>(v, tile, first, last, z, line);
    default: return merge_bands_by_terms<kNone>(v, tile, first, last, z, line);
  }
}
