// 3 x 3, stride 1, by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, 2016): 36 products for 16 outputs.
// A tile is a run of bands, each 4 output rows of one image. Z holds, per row, the 16 pixels of a
// 4 x 4 output patch as 16 lines of one float a patch.

constexpr int64_t kFrequencies = 36;

struct Bands {
  int64_t across, down;  // patches of an image
  INLINE explicit Bands(const Conv& v) : across(ceil_div(v.out_w, 4)), down(ceil_div(v.out_h, 4)) {}
};

// Floats of a line of patches: those of all bands of a tile side by side, and of one band more.
INLINE int64_t line_floats(const Conv& v) {
  return round_up((v.tile_pixels + 1) * ceil_div(v.out_w, 4), kLanes) + 2 * kLanes;
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
  // Tiles a thread, but for those that would leave most lanes empty: their splits are shared.
  const int64_t each = ceil_div(bands, threads);
  if (each * b.across >= 2 * kPixels) at_once = least(at_once, each);
  v.n_tiles = ceil_div(bands, at_once);
  v.tile_pixels = ceil_div(bands, v.n_tiles);  // bands of a tile
  v.n_tiles = ceil_div(bands, v.tile_pixels);
  v.whole_tiles = bands / v.tile_pixels;
  const int64_t patches = v.tile_pixels * b.across;
  // An image's last vector may reach as far into the next one's place, which is written after it.
  v.z_stride = odd_lines(round_up(patches, kLanes) + (v.batch > 1 ? kLanes : 0));
  v.z_floats = most(1, h.n_rows) * 16 * v.z_stride + kPixels;
  v.scratch_floats = kFrequencies * (frequency_floats(h.width, v.z_stride) +
                                     frequency_floats(most_rows, v.z_stride)) +
                     kMaxColumns * h.width + (24 + 4) * line_floats(v) + 4 * kPixels;
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

// Input rows r = 0 to 3 of `bands` bands of one image, of one channel, as lines of patches:
// lines[(6 r + q) * floats + i] is column q of the patch i. Rows 4 and 5 of a band are rows 0 and 1 of
// the next, so these have a band more. `row` holds zeros where the padding is, and keeps them.
INLINE void patch_lines(const Conv& v, float* lines, float* row, const float* plane, int64_t top,
                        int64_t bands) {
  const int64_t across = ceil_div(v.out_w, 4), floats = line_floats(v);
  const int64_t step = v.channels_last ? v.head->channels : 1, pitch = v.width * step;
  const int64_t n = most(0, least(v.width, 4 * across - v.pad_w));
  for (int64_t r = 0; r < 4; r++) {
    const int64_t count = bands + (r < 2);
    float* line = lines + 6 * r * floats;
    for (int64_t b = 0; b < count; b++) {
      const int64_t y = top + 4 * b + r;
      float* to = row + 4 * across * b + v.pad_w;
      if (y < 0 || y >= v.height) {
        for (int64_t i = 0; i < n; i++) to[i] = 0;
      } else if (step == 1) {
        copy(to, plane + y * pitch, n);
      } else {
        for (int64_t i = 0; i < n; i++) to[i] = plane[y * pitch + i * step];
      }
    }
    for (int64_t i = 0; i < count * across; i += kLanes) {
      const V a = load(row + 4 * i), b = load(row + 4 * i + kLanes);
      const V c = load(row + 4 * i + 2 * kLanes), d = load(row + 4 * i + 3 * kLanes);
      const V even0 = even_lanes(a, b), even1 = even_lanes(c, d);
      const V odd0 = odd_lanes(a, b), odd1 = odd_lanes(c, d);
      store(line + i, even_lanes(even0, even1));
      store(line + floats + i, even_lanes(odd0, odd1));
      store(line + 2 * floats + i, odd_lanes(even0, even1));
      store(line + 3 * floats + i, odd_lanes(odd0, odd1));
    }
    // Columns 4 and 5 are columns 0 and 1 of the next patch, or past the row's last one.
    for (int64_t q = 0; q < 2; q++) {
      float* to = line + (4 + q) * floats;
      for (int64_t i = 0; i < count * across; i += kLanes) {
        store(to + i, load(line + q * floats + i + 1));
      }
      const int64_t x = 4 * across + q - v.pad_w;
      for (int64_t b = 0; b < count; b++) {
        const int64_t y = top + 4 * b + r;
        const bool inside = x >= 0 && x < v.width && y >= 0 && y < v.height;
        to[(b + 1) * across - 1] = inside ? plane[y * pitch + x * step] : 0.0f;
      }
    }
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
  float* column = product + kFrequencies * product_step;
  float* lines = column + kMaxColumns * h.width;
  const int64_t floats = line_floats(v), plane = v.height * v.width;
  float* row = lines + 24 * floats;
  for (int64_t i = 0; i < 4 * floats; i += kLanes) store(row + i, V{});
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t band = band0; band < band1;) {
      const int64_t image = band / b.down, down = band % b.down;
      const int64_t bands = least(b.down - down, band1 - band), n = bands * b.across;
      const int64_t channel = image * h.channels + split * h.width + c;
      const float* x = v.x + (v.channels_last ? image * (h.channels * (plane - 1)) + channel
                                              : channel * plane);
      const int64_t top = 4 * down - v.pad_h;
      if (!v.channels_last && c + kAhead < channels) {
        fetch(x + kAhead * plane + most(0, top) * v.width,
              least(v.height - most(0, top), 4 * bands + 2) * v.width);
      }
      patch_lines(v, lines, row, x, top, bands);
      float* to = input + c * stride + (band - band0) * b.across;
      for (int64_t t = 0; t < n; t += kLanes) {
        V half[36];
        UNROLL for (int q = 0; q < 6; q++) {
          V d[6], out[6];
          UNROLL for (int u = 0; u < 6; u++) {
            d[u] = load(lines + (6 * (u & 3) + q) * floats + (u >> 2) * b.across + t);
          }
          input_six(d, 1, out);
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
      band += bands;
    }
  }
  const int64_t block = most(1, v.depth), rest = patches % kLanes;
  const int64_t whole = rest <= kMaxColumns ? patches - rest : patches;  // patches in vectors
  int64_t dx[LEGO_VECTORS];
  UNROLL for (int64_t u = 0; u < LEGO_VECTORS; u++) dx[u] = u * kLanes;
  const int64_t no_tap = 0;
  for (int64_t f = 0; f < kFrequencies; f++) {
    for (int64_t c0 = 0; c0 == 0 || c0 < channels; c0 += block) {
      const int64_t n = least(block, channels - c0);
      const float* x = input + f * input_step + c0 * stride;
      for (int64_t i = whole; i < patches; i++) {
        for (int64_t k = 0; k < n; k++) column[(i - whole) * n + k] = x[k * stride + i];
      }
      for (int64_t p = first_panel; p < last_panel; p++) {
        const int64_t mr = panels.height(p);
        const float* a = filters + (f * v.split_rows[split] + panels.first(p)) * channels + c0 * mr;
        float* z = product + f * product_step + (panels.first(p) - panels.first(first_panel)) * stride;
        for (int64_t i = 0; i < whole; i += kPixels) {
          const int64_t nv = least(LEGO_VECTORS, ceil_div(whole - i, kLanes));
          kPanelTile[nv - 1][1][mr - 1](a, n, 1, &no_tap, x + i, stride, dx, z + i, stride, c0 > 0);
        }
        if (whole < patches) {
          kPanelColumns[patches - whole - 1](a, mr, n, column, n, z + whole, stride, c0 > 0);
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
