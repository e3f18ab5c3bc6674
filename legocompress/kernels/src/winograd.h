// 3 x 3, stride 1, by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, 2016): 36 products for 16 outputs.
// A tile is a run of bands, each 4 output rows of one image. Z holds, per row, the 16 pixels of a
// 4 x 4 output patch as 16 lines of one float a patch.

constexpr int64_t kFrequencies = 36;

struct Bands {
  int64_t across, down;  // patches of an image
  INLINE explicit Bands(const Conv& v) : across(ceil_div(v.out_w, 4)), down(ceil_div(v.out_h, 4)) {}
};

// Floats of a padded input row, of its four column phases, and of all rows of a band.
INLINE int64_t phase_floats(const Conv& v) {
  return round_up(ceil_div(v.out_w, 4) + 2, kLanes) + kLanes;
}

// From one frequency to the next: an odd number of lines, or all 36 would fall into one cache set.
INLINE int64_t frequency_floats(int64_t rows, int64_t stride) { return odd_lines(rows * stride); }

void plan_winograd(Conv& v, int threads) {
  const Header& h = *v.head;
  const Bands b(v);
  const int64_t bands = v.batch * b.down;
  int64_t most_rows = 0;
  for (int64_t i = 0; i < h.n_split; i++) most_rows = most(most_rows, v.split_rows[i]);
  int64_t at_once = most(1, v.patches / b.across);
  if (threads > 1) at_once = least(at_once, ceil_div(bands, threads));
  v.n_tiles = ceil_div(bands, at_once);
  v.tile_pixels = ceil_div(bands, v.n_tiles);  // bands of a tile
  v.n_tiles = ceil_div(bands, v.tile_pixels);
  // A band's last vector may reach into the next band's place, which is written after it.
  const int64_t patches = (v.tile_pixels - 1) * b.across + round_up(b.across, kLanes);
  v.z_stride = odd_lines(round_up(patches, kPixels));
  v.z_floats = most(1, h.n_rows) * 16 * v.z_stride + kPixels;
  const int64_t rows = 6 * 4 * phase_floats(v) + 4 * phase_floats(v) + 64;
  v.scratch_floats = kFrequencies * (frequency_floats(h.width, v.z_stride) +
                                     frequency_floats(most_rows, v.z_stride)) +
                     rows + 4 * kPixels;
}

// B^T d of one row or column of six.
INLINE void input_six(const V* d, int64_t step, V* out) {
  const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step],
          d5 = d[5 * step];
  const V a = d4 - 4.0f * d2, b = d3 - 4.0f * d1, c = d4 - d2, e = d3 - d1;
  out[0] = 4.0f * d0 + (d4 - 5.0f * d2);
  out[1] = a + b;
  out[2] = a - b;
  out[3] = 2.0f * e + c;
  out[4] = c - 2.0f * e;
  out[5] = 4.0f * d1 + (d5 - 5.0f * d3);
}

// A^T m of one row or column of six.
INLINE void output_four(const V* m, int64_t step, V* out) {
  const V m0 = m[0], m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step],
          m5 = m[5 * step];
  const V a = m1 + m2, b = m1 - m2, c = m3 + m4, e = m3 - m4;
  out[0] = m0 + a + c;
  out[1] = 2.0f * e + b;
  out[2] = 4.0f * c + a;
  out[3] = 8.0f * e + b + m5;
}

// One input row, zero-padded, as four column phases: to[p * floats + i] is column 4 i + p - pad.
INLINE void split_phases(const Conv& v, float* to, float* row, int64_t image, int64_t channel,
                         int64_t y) {
  const int64_t floats = phase_floats(v), c_in = v.head->channels;
  if (y < 0 || y >= v.height) {
    for (int64_t i = 0; i < 4 * floats; i += kLanes) store(to + i, V{});
    return;
  }
  const int64_t n = least(v.width, 4 * floats - v.pad_w);
  if (v.channels_last) {
    const float* from = v.x + (image * v.height + y) * v.width * c_in + channel;
    for (int64_t i = 0; i < n; i++) row[v.pad_w + i] = from[i * c_in];
  } else {
    copy(row + v.pad_w, v.x + ((image * c_in + channel) * v.height + y) * v.width, n);
  }
  for (int64_t i = 0; i < floats; i += kLanes) {
    const V a = load(row + 4 * i), b = load(row + 4 * i + kLanes);
    const V c = load(row + 4 * i + 2 * kLanes), d = load(row + 4 * i + 3 * kLanes);
    const V even0 = even_lanes(a, b), even1 = even_lanes(c, d);
    const V odd0 = odd_lanes(a, b), odd1 = odd_lanes(c, d);
    store(to + i, even_lanes(even0, even1));
    store(to + floats + i, even_lanes(odd0, odd1));
    store(to + 2 * floats + i, odd_lanes(even0, even1));
    store(to + 3 * floats + i, odd_lanes(odd0, odd1));
  }
}

void transform_winograd(const Conv& v, int64_t tile, int64_t split, int64_t first_panel,
                        int64_t last_panel, float* z_tile, float* scratch) {
  const Header& h = *v.head;
  const Bands b(v);
  const int64_t channels = most(0, least(h.width, h.channels - split * h.width));
  const int64_t band0 = tile * v.tile_pixels;
  const int64_t band1 = least(band0 + v.tile_pixels, v.batch * b.down);
  const int64_t patches = (band1 - band0) * b.across, stride = v.z_stride;
  const Panels panels(v.split_rows[split]);
  const float* filters = v.filters;
  int64_t z_row = 0;
  for (int64_t i = 0; i < split; i++) {
    filters += v.split_rows[i] * most(0, least(h.width, h.channels - i * h.width)) * kFrequencies;
    z_row += v.split_rows[i];
  }
  const int64_t input_step = frequency_floats(h.width, stride);
  const int64_t product_step = frequency_floats(v.split_rows[split], stride);
  float* input = scratch;                              // (36, channels, stride)
  float* product = input + kFrequencies * input_step;  // (36, rows, stride)
  const int64_t rows = panels.first(last_panel) - panels.first(first_panel);
  float* phases = product + kFrequencies * product_step;
  const int64_t floats = phase_floats(v);
  float* row = phases + 6 * 4 * floats;
  for (int64_t i = 0; i < 4 * floats + kLanes; i += kLanes) store(row + i, V{});
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t band = band0; band < band1; band++) {
      const int64_t image = band / b.down, down = band % b.down;
      const int64_t channel = split * h.width + c;
      // Rows 4 and 5 of the band above are rows 0 and 1 of this one.
      int64_t r = 0;
      if (band > band0 && down > 0) {
        for (int64_t i = 0; i < 2 * 4 * floats; i += kLanes) {
          store(phases + i, load(phases + 4 * 4 * floats + i));
        }
        r = 2;
      }
      for (; r < 6; r++) {
        split_phases(v, phases + r * 4 * floats, row, image, channel, 4 * down - v.pad_h + r);
      }
      float* to = input + c * stride + (band - band0) * b.across;
      for (int64_t t = 0; t < b.across; t += kLanes) {
        V half[36];
        UNROLL for (int q = 0; q < 6; q++) {
          V column[6], out[6];
          const float* p = phases + (q & 3) * floats + (q >> 2) + t;
          UNROLL for (int u = 0; u < 6; u++) column[u] = load(p + u * 4 * floats);
          input_six(column, 1, out);
          UNROLL for (int u = 0; u < 6; u++) half[u * 6 + q] = out[u];
        }
        UNROLL for (int u = 0; u < 6; u++) {
          V out[6];
          input_six(half + u * 6, 1, out);
          UNROLL for (int q = 0; q < 6; q++) {
            store(to + (u * 6 + q) * input_step + t, out[q]);
          }
        }
      }
    }
  }
  const int64_t block = most(1, v.depth);
  int64_t dx[LEGO_VECTORS];
  UNROLL for (int64_t u = 0; u < LEGO_VECTORS; u++) dx[u] = u * kLanes;
  const int64_t no_tap = 0;
  for (int64_t f = 0; f < kFrequencies; f++) {
    for (int64_t c0 = 0; c0 == 0 || c0 < channels; c0 += block) {
      const int64_t n = least(block, channels - c0);
      const float* x = input + f * input_step + c0 * stride;
      for (int64_t p = first_panel; p < last_panel; p++) {
        const int64_t mr = panels.height(p);
        const float* a = filters + (f * v.split_rows[split] + panels.first(p)) * channels + c0 * mr;
        float* z = product + f * product_step + (panels.first(p) - panels.first(first_panel)) * stride;
        for (int64_t i = 0; i < patches; i += kPixels) {
          const int64_t nv = least(LEGO_VECTORS, ceil_div(patches - i, kLanes));
          kPanelTile[nv - 1][1][mr - 1](a, n, 1, &no_tap, x + i, stride, dx, z + i, stride, c0 > 0);
        }
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const float* from = product + r * stride;
    float* to = z_tile + (z_row + panels.first(first_panel) + r) * 16 * stride;
    for (int64_t t = 0; t < patches; t += kLanes) {
      V half[24];
      UNROLL for (int q = 0; q < 6; q++) {
        V column[6], out[4];
        UNROLL for (int u = 0; u < 6; u++) column[u] = load(from + (u * 6 + q) * product_step + t);
        output_four(column, 1, out);
        UNROLL for (int u = 0; u < 4; u++) half[u * 6 + q] = out[u];
      }
      UNROLL for (int u = 0; u < 4; u++) {
        V out[4];
        output_four(half + u * 6, 1, out);
        UNROLL for (int q = 0; q < 4; q++) store(to + (u * 4 + q) * stride + t, out[q]);
      }
    }
  }
}

template <int SUM, int A>
void merge_bands(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
                 float* line) {
  const Header& h = *v.head;
  const Bands b(v);
  const int64_t band0 = tile * v.tile_pixels;
  const int64_t band1 = least(band0 + v.tile_pixels, v.batch * b.down);
  const int64_t patches = (band1 - band0) * b.across, stride = v.z_stride;
  for (int64_t j = first; j < last; j++) {
    const V bias = splat(v.bias ? v.bias[j] : 0.0f);
    const int64_t n_sum = SUM ? SUM : h.n_sum;
    for (int64_t u = 0; u < 4; u++) {
      // One output row of every band, its patches side by side again.
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
      for (int64_t band = band0; band < band1; band++) {
        const int64_t y = 4 * (band % b.down) + u;
        if (y >= v.out_h) continue;
        const float* from = line + (band - band0) * b.across * 4;
        const int64_t image = band / b.down;
        const int64_t at = v.channels_last
                               ? ((image * v.out_h + y) * v.out_w) * h.n_out + j
                               : ((image * h.n_out + j) * v.out_h + y) * v.out_w;
        const int64_t step = v.channels_last ? h.n_out : 1;
        // The last vector overlaps the one before, whose sums may stand where the residual was.
        const bool overlaps = v.residual && step == 1 && v.out_w >= kLanes && v.out_w % kLanes;
        const V last_residual = overlaps ? load(v.residual + at + v.out_w - kLanes) : V{};
        for (int64_t i = 0; i < v.out_w; i += kLanes) {
          const bool last = step == 1 && v.out_w - i < kLanes && v.out_w >= kLanes;
          if (last) i = v.out_w - kLanes;
          const int64_t n = least(kLanes, v.out_w - i);
          V s = load(from + i);
          if (n == kLanes && step == 1) {
            if (v.residual) s += last ? last_residual : load(v.residual + at + i);
            store(v.y + at + i, activated<A>(s));
          } else {
            if (v.residual) {
              V r = V{};
              for (int64_t w = 0; w < n; w++) r[w] = v.residual[at + (i + w) * step];
              s += r;
            }
            s = activated<A>(s);
            for (int64_t w = 0; w < n; w++) v.y[at + (i + w) * step] = s[w];
          }
        }
      }
    }
  }
}

template <int A>
void merge_bands_any(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
                     float* line) {
  switch (v.head->n_sum) {
    case 1: return merge_bands<1, A>(v, tile, first, last, z, line);
    case 2: return merge_bands<2, A>(v, tile, first, last, z, line);
    case 4: return merge_bands<4, A>(v, tile, first, last, z, line);
    default: return merge_bands<0, A>(v, tile, first, last, z, line);
  }
}

void merge_winograd(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
                    float* line) {
  switch (v.activation) {
    case kRelu: return merge_bands_any<kRelu>(v, tile, first, last, z, line);
    case kRelu6: return merge_bands_any<kRelu6>(v, tile, first, last, z, line);
    case kSilu: return merge_bands_any<kSilu>(v, tile, first, last, z, line);
    default: return merge_bands_any<kNone>(v, tile, first, last, z, line);
  }
}
