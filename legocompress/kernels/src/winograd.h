// Winograd's F(4 x 4, r x r) for r = 2, 3 or 4 (Lavin and Gray, 2016), in (r + 3)^2 products for 16
// outputs. A conv of stride 2 is one of stride 1 over the 4 phases of each channel, of half the kernel.
// A tile is a run of bands, each 4 output rows of one image. Z holds, per row, the 16 pixels of a
// 4 x 4 output patch as 16 lines of one float a patch.

struct Bands {
  int64_t across, down;  // patches of an image
  INLINE explicit Bands(const Conv& v) : across(ceil_div(v.out_w, 4)), down(ceil_div(v.out_h, 4)) {}
};

struct Patch {
  int64_t stride, side;   // of the conv; r + 3
  int64_t period, span;   // input pixels from one patch to the next; of one patch
  int64_t phases, products;
  INLINE explicit Patch(const Conv& v)
      : stride(v.head->winograd_stride), side(winograd_side(*v.head)), period(4 * stride),
        span(side * stride), phases(stride * stride), products(side * side) {}
};

// Floats of a line of patches: those of all bands of a tile side by side, and of one band more.
INLINE int64_t line_floats(const Conv& v) {
  return round_up((v.tile_pixels + 1) * ceil_div(v.out_w, 4), kLanes) + 2 * kLanes;
}

// From one frequency to the next: an odd number of lines, or all would fall into one cache set.
INLINE int64_t frequency_floats(int64_t rows, int64_t stride) { return odd_lines(rows * stride); }

void plan_winograd(Conv& v, int threads) {
  const Header& h = *v.head;
  const Bands b(v);
  const Patch p(v);
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
  const int64_t depth = h.width * p.phases;
  v.scratch_floats = p.products * (frequency_floats(depth, v.z_stride) +
                                   frequency_floats(most_rows, v.z_stride)) +
                     kMaxColumns * depth + p.period * (p.span + 1) * line_floats(v) + 4 * kPixels;
}

// x (x^2 - 1) (x^2 - 4): what the points 0, 1, -1, 2 and -2 have in common.
INLINE V quintic(const V* d) { return 4.0f * d[0] + (d[4] - 5.0f * d[2]); }

// B^T d of one row or column: the polynomials through all points but one, and through all.
INLINE void input_finite(const V* d, V* out) {
  const V a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = d[3] - d[1];
  out[0] = quintic(d);
  out[1] = a + b;
  out[2] = a - b;
  out[3] = 2.0f * e + c;
  out[4] = c - 2.0f * e;
}
template <int SIDE>
INLINE void transform_input(const V* d, V* out) {
  if constexpr (SIDE == 5) {  // 0, 1, -1, 2
    const V a = d[3] - d[1], b = d[3] - d[2];
    out[0] = 2.0f * (d[0] - d[2]) + a;
    out[1] = b - 2.0f * d[1];
    out[2] = b + 2.0f * (d[1] - d[2]);
    out[3] = a;
    out[4] = d[4] - d[2] - 2.0f * a;
  } else if constexpr (SIDE == 6) {  // 0, 1, -1, 2, -2
    input_finite(d, out);
    out[5] = quintic(d + 1);
  } else {  // 0, 1, -1, 2, -2, 1/2: those of six, times 2 x - 1
    V one[5], next[5];
    input_finite(d, one);
    input_finite(d + 1, next);
    UNROLL for (int i = 0; i < 5; i++) out[i] = 2.0f * next[i] - one[i];
    out[5] = next[0];
    out[6] = 2.0f * quintic(d + 2) - next[0];
  }
}

// A^T m of one row or column: the values at 4 pixels.
template <int SIDE>
INLINE void transform_output(const V* m, V* out) {
  const V a = m[1] + m[2], b = m[1] - m[2];
  if constexpr (SIDE == 5) {
    out[0] = m[0] + a + m[3];
    out[1] = 2.0f * m[3] + b;
    out[2] = 4.0f * m[3] + a;
    out[3] = 8.0f * m[3] + b + m[4];
    return;
  } else {
    const V c = m[3] + m[4], e = m[3] - m[4];
    out[0] = m[0] + a + c;
    out[1] = 2.0f * e + b;
    out[2] = 4.0f * c + a;
    out[3] = 8.0f * e + b + m[SIDE - 1];
    if constexpr (SIDE == 7) {
      UNROLL for (int i = 0; i < 4; i++) out[i] += m[5] * (1.0f / (1 << i));
    }
  }
}

// Every fourth lane of a, b, c, d from the first on to `to`, from the second on to to + step, ...
INLINE void every_fourth(V a, V b, V c, V d, float* to, int64_t step) {
  const V even0 = even_lanes(a, b), even1 = even_lanes(c, d);
  const V odd0 = odd_lanes(a, b), odd1 = odd_lanes(c, d);
  store(to, even_lanes(even0, even1));
  store(to + step, even_lanes(odd0, odd1));
  store(to + 2 * step, odd_lanes(even0, even1));
  store(to + 3 * step, odd_lanes(odd0, odd1));
}

// Input rows of `bands` bands of one image, of one channel, as lines of patches:
// lines[(span r + q) * floats + i] is column q of the patch i in row r, both counted from the patch's
// first pixel. Rows from the period on are the first rows of the next band, so these have a band
// more. `row` holds zeros where the padding is, and keeps them.
INLINE void patch_lines(const Conv& v, const Patch& p, float* lines, float* row, const float* plane,
                        int64_t top, int64_t bands) {
  const int64_t across = ceil_div(v.out_w, 4), floats = line_floats(v);
  const int64_t step = v.channels_last ? v.head->channels : 1, pitch = v.width * step;
  const int64_t n = most(0, least(v.width, p.period * across - v.pad_w));
  for (int64_t r = 0; r < p.period; r++) {
    const int64_t count = bands + (r < p.span - p.period);
    float* line = lines + p.span * r * floats;
    for (int64_t b = 0; b < count; b++) {
      const int64_t y = top + p.period * b + r;
      float* to = row + p.period * across * b + v.pad_w;
      if (y < 0 || y >= v.height) {
        for (int64_t i = 0; i < n; i++) to[i] = 0;
      } else if (step == 1) {
        copy(to, plane + y * pitch, n);
      } else {
        for (int64_t i = 0; i < n; i++) to[i] = plane[y * pitch + i * step];
      }
    }
    for (int64_t i = 0; i < count * across; i += kLanes) {
      const float* from = row + p.period * i;
      V x[8];
      UNROLL for (int u = 0; u < 4; u++) x[u] = load(from + u * kLanes);
      if (p.stride == 1) {
        every_fourth(x[0], x[1], x[2], x[3], line + i, floats);
        continue;
      }
      UNROLL for (int u = 4; u < 8; u++) x[u] = load(from + u * kLanes);
      V even[4], odd[4];
      UNROLL for (int u = 0; u < 4; u++) {
        even[u] = even_lanes(x[2 * u], x[2 * u + 1]);
        odd[u] = odd_lanes(x[2 * u], x[2 * u + 1]);
      }
      every_fourth(even[0], even[1], even[2], even[3], line + i, 2 * floats);
      every_fourth(odd[0], odd[1], odd[2], odd[3], line + floats + i, 2 * floats);
    }
    // Columns from the period on are those of the next patch, or past the row's last one.
    for (int64_t q = 0; q < p.span - p.period; q++) {
      float* to = line + (p.period + q) * floats;
      for (int64_t i = 0; i < count * across; i += kLanes) {
        store(to + i, load(line + q * floats + i + 1));
      }
      const int64_t x = p.period * across + q - v.pad_w;
      for (int64_t b = 0; b < count; b++) {
        const int64_t y = top + p.period * b + r;
        const bool inside = x >= 0 && x < v.width && y >= 0 && y < v.height;
        to[(b + 1) * across - 1] = inside ? plane[y * pitch + x * step] : 0.0f;
      }
    }
  }
}

template <int SIDE>
void transform_patches(const Conv& v, int64_t tile, int64_t split, int64_t first_panel,
                       int64_t last_panel, float* z_tile, float* scratch) {
  const Header& h = *v.head;
  const Bands b(v);
  const Patch p(v);
  const int64_t channels = most(0, least(h.width, h.channels - split * h.width));
  const int64_t band0 = tile * v.tile_pixels;
  const int64_t band1 = least(band0 + v.tile_pixels, v.batch * b.down);
  const int64_t patches = (band1 - band0) * b.across, stride = v.z_stride;
  const Panels panels(v.split_rows[split]);
  const float* filters = v.filters;
  int64_t z_row = 0;
  for (int64_t i = 0; i < split; i++) {
    filters += v.split_rows[i] * most(0, least(h.width, h.channels - i * h.width)) * p.phases *
               p.products;
    z_row += v.split_rows[i];
  }
  const int64_t most_depth = h.width * p.phases, depth = channels * p.phases;
  const int64_t input_step = frequency_floats(most_depth, stride);
  const int64_t product_step = frequency_floats(v.split_rows[split], stride);
  float* input = scratch;                            // (products, depth, stride)
  float* product = input + p.products * input_step;  // (products, rows, stride)
  const int64_t rows = panels.first(last_panel) - panels.first(first_panel);
  float* column = product + p.products * product_step;
  float* lines = column + kMaxColumns * most_depth;
  const int64_t floats = line_floats(v), plane = v.height * v.width;
  float* row = lines + p.period * p.span * floats;
  for (int64_t i = 0; i < p.period * floats; i += kLanes) store(row + i, V{});
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t band = band0; band < band1;) {
      const int64_t image = band / b.down, down = band % b.down;
      const int64_t bands = least(b.down - down, band1 - band), n = bands * b.across;
      const int64_t channel = image * h.channels + split * h.width + c;
      const float* x = v.x + (v.channels_last ? image * (h.channels * (plane - 1)) + channel
                                              : channel * plane);
      const int64_t top = p.period * down - v.pad_h;
      if (!v.channels_last && c + kAhead < channels) {
        fetch(x + kAhead * plane + most(0, top) * v.width,
              least(v.height - most(0, top), p.period * (bands - 1) + p.span) * v.width);
      }
      patch_lines(v, p, lines, row, x, top, bands);
      for (int64_t phase = 0; phase < p.phases; phase++) {
        int64_t at[SIDE];  // of a patch's first column in its row u
        UNROLL for (int u = 0; u < SIDE; u++) {
          const int64_t r = u * p.stride + phase / p.stride;
          at[u] = (r % p.period * p.span + phase % p.stride) * floats + r / p.period * b.across;
        }
        float* to = input + (c * p.phases + phase) * stride + (band - band0) * b.across;
        for (int64_t t = 0; t < n; t += kLanes) {
          V half[SIDE * SIDE];
          UNROLL for (int q = 0; q < SIDE; q++) {
            V d[SIDE], out[SIDE];
            UNROLL for (int u = 0; u < SIDE; u++) {
              d[u] = load(lines + at[u] + q * p.stride * floats + t);
            }
            transform_input<SIDE>(d, out);
            UNROLL for (int u = 0; u < SIDE; u++) half[u * SIDE + q] = out[u];
          }
          UNROLL for (int u = 0; u < SIDE; u++) {
            V out[SIDE];
            transform_input<SIDE>(half + u * SIDE, out);
            UNROLL for (int q = 0; q < SIDE; q++) {
              store(to + (u * SIDE + q) * input_step + t, out[q]);
            }
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
  for (int64_t f = 0; f < p.products; f++) {
    for (int64_t c0 = 0; c0 == 0 || c0 < depth; c0 += block) {
      const int64_t n = least(block, depth - c0);
      const float* x = input + f * input_step + c0 * stride;
      for (int64_t i = whole; i < patches; i++) {
        for (int64_t k = 0; k < n; k++) column[(i - whole) * n + k] = x[k * stride + i];
      }
      for (int64_t panel = first_panel; panel < last_panel; panel++) {
        const int64_t mr = panels.height(panel), first = panels.first(panel);
        const float* a = filters + (f * v.split_rows[split] + first) * depth + c0 * mr;
        float* z = product + f * product_step + (first - panels.first(first_panel)) * stride;
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
      V half[4 * SIDE];
      UNROLL for (int q = 0; q < SIDE; q++) {
        V column[SIDE], out[4];
        UNROLL for (int u = 0; u < SIDE; u++) {
          column[u] = load(from + (u * SIDE + q) * product_step + t);
        }
        transform_output<SIDE>(column, out);
        UNROLL for (int u = 0; u < 4; u++) half[u * SIDE + q] = out[u];
      }
      UNROLL for (int u = 0; u < 4; u++) {
        V out[4];
        transform_output<SIDE>(half + u * SIDE, out);
        UNROLL for (int q = 0; q < 4; q++) store(to + (u * 4 + q) * stride + t, out[q]);
      }
    }
  }
}

void transform_winograd(const Conv& v, int64_t tile, int64_t split, int64_t first, int64_t last,
                        float* z, float* scratch) {
  switch (winograd_side(*v.head)) {
    case 5: return transform_patches<5>(v, tile, split, first, last, z, scratch);
    case 6: return transform_patches<6>(v, tile, split, first, last, z, scratch);
    default: return transform_patches<7>(v, tile, split, first, last, z, scratch);
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
