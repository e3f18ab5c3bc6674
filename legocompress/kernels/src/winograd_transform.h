// The transform in Winograd's form: the Lego filters of one split on one tile, in three steps.
//   input[f][c]   = B^T d B of each patch           (transform_channel)
//   product[f][r] = sum over c of filter * input    (multiply_frequencies)
//   Z[r]          = A^T product A of each patch     (transform_products)

// Stores lanes 0, 4, 8, ... of a, b, c, d at `to`, lanes 1, 5, 9, ... at to + step, and so on.
INLINE void store_every_fourth(V a, V b, V c, V d, float* to, int64_t step) {
  const V even0 = even_lanes(a, b), even1 = even_lanes(c, d);
  const V odd0 = odd_lanes(a, b), odd1 = odd_lanes(c, d);
  store(to, even_lanes(even0, even1));
  store(to + step, even_lanes(odd0, odd1));
  store(to + 2 * step, odd_lanes(even0, even1));
  store(to + 3 * step, odd_lanes(odd0, odd1));
}

// Rearranges the input rows of one channel of `bands` bands of an image into lines of patches:
//   lines[(span * r + q) * floats + i] = row r, column q of patch i, counted from its first pixel.
// Rows r >= period of a patch are the first rows of the patch in the next band. So lines are stored for
// r < period only, and those that are shared hold one band more. `row` is scratch: it holds zeros where
// the padding is, and keeps them.
INLINE void load_patch_lines(const Conv& v, const Patch& p, float* lines, float* row,
                             const float* plane, int64_t top, int64_t bands) {
  const int64_t across = ceil_div(v.out_w, 4), floats = count_line_floats(v);
  const int64_t step = v.channels_last ? v.header->channels : 1, pitch = v.width * step;
  const int64_t n = max(0, min(v.width, p.period * across - v.pad_w));
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
        store_every_fourth(x[0], x[1], x[2], x[3], line + i, floats);
        continue;
      }
      UNROLL for (int u = 4; u < 8; u++) x[u] = load(from + u * kLanes);
      V even[4], odd[4];
      UNROLL for (int u = 0; u < 4; u++) {
        even[u] = even_lanes(x[2 * u], x[2 * u + 1]);
        odd[u] = odd_lanes(x[2 * u], x[2 * u + 1]);
      }
      store_every_fourth(even[0], even[1], even[2], even[3], line + i, 2 * floats);
      store_every_fourth(odd[0], odd[1], odd[2], odd[3], line + floats + i, 2 * floats);
    }
    // Columns q >= period are columns of the next patch, or lie past the last patch of the row.
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

// The work on one split of one tile, and its scratch memory.
struct WinogradTransform {
  const Conv& v;
  Bands b;
  Patch p;
  TileBands tile;
  Panels panels;
  SplitShare share;
  int64_t first_channel, n_rows;       // of the split
  int64_t depth;                       // products per frequency: channels x phases
  int64_t stride;                      // floats of one line of patches
  int64_t input_step, product_step;    // floats from one frequency to the next
  float *input, *product;              // (products, depth, stride), (products, rows, stride)
  float *column, *lines, *row;
  int64_t line;                        // floats of a line in `lines`

  INLINE WinogradTransform(const Conv& conv, int64_t tile_, int64_t split, float* scratch)
      : v(conv), b(conv), p(conv), tile(conv, b, tile_), panels(conv.split_rows[split]) {
    const int64_t width = v.header->width, max_depth = width * p.phases;
    share = locate_split(v, split, p.phases * p.products);
    first_channel = split * width;
    n_rows = v.split_rows[split];
    depth = share.channels * p.phases;
    stride = v.z_stride;
    input_step = count_frequency_floats(max_depth, stride);
    product_step = count_frequency_floats(n_rows, stride);
    line = count_line_floats(v);
    input = scratch;
    product = input + p.products * input_step;
    column = product + p.products * product_step;
    lines = column + kMaxColumns * max_depth;
    row = lines + p.period * p.span * line;
    for (int64_t i = 0; i < p.period * line; i += kLanes) store(row + i, V{});
  }

  // Patches that are multiplied as vectors; the others are columns.
  INLINE int64_t count_vector_patches() const {
    const int64_t rest = tile.patches % kLanes;
    return rest <= kMaxColumns ? tile.patches - rest : tile.patches;
  }

  // Transforms one phase of one channel on n patches, from the lines to the input at `to`.
  template <int SIDE>
  INLINE void transform_phase(int64_t phase, int64_t n, float* to) const {
    int64_t at[SIDE];  // of a patch's first column in its row u
    UNROLL for (int u = 0; u < SIDE; u++) {
      const int64_t r = u * p.stride + phase / p.stride;
      at[u] = (r % p.period * p.span + phase % p.stride) * line + r / p.period * b.across;
    }
    for (int64_t t = 0; t < n; t += kLanes) {
      V half[SIDE * SIDE];
      UNROLL for (int q = 0; q < SIDE; q++) {
        V d[SIDE], out[SIDE];
        UNROLL for (int u = 0; u < SIDE; u++) d[u] = load(lines + at[u] + q * p.stride * line + t);
        transform_input<SIDE>(d, out);
        UNROLL for (int u = 0; u < SIDE; u++) half[u * SIDE + q] = out[u];
      }
      UNROLL for (int u = 0; u < SIDE; u++) {
        V out[SIDE];
        transform_input<SIDE>(half + u * SIDE, out);
        UNROLL for (int q = 0; q < SIDE; q++) store(to + (u * SIDE + q) * input_step + t, out[q]);
      }
    }
  }

  // Transforms channel c of the split on all bands of the tile.
  template <int SIDE>
  INLINE void transform_channel(int64_t c) const {
    const int64_t channels = v.header->channels, plane = v.height * v.width;
    for (int64_t band = tile.first; band < tile.last;) {
      const int64_t image = band / b.down, down = band % b.down;
      const int64_t bands = min(b.down - down, tile.last - band);  // of this image
      const int64_t channel = image * channels + first_channel + c;
      const float* x = v.x + (v.channels_last ? image * (channels * (plane - 1)) + channel
                                              : channel * plane);
      const int64_t top = p.period * down - v.pad_h;
      if (!v.channels_last && c + kPrefetchChannels < share.channels) {
        prefetch(x + kPrefetchChannels * plane + max(0, top) * v.width,
                 min(v.height - max(0, top), p.period * (bands - 1) + p.span) * v.width);
      }
      load_patch_lines(v, p, lines, row, x, top, bands);
      for (int64_t phase = 0; phase < p.phases; phase++) {
        transform_phase<SIDE>(phase, bands * b.across,
                              input + (c * p.phases + phase) * stride +
                                  (band - tile.first) * b.across);
      }
      band += bands;
    }
  }

  // For each frequency, multiplies the filters of the panels [first_panel, last_panel) with the input.
  INLINE void multiply_frequencies(int64_t first_panel, int64_t last_panel) const {
    const int64_t block = max(1, v.max_depth), patches = tile.patches;
    const int64_t whole = count_vector_patches();
    int64_t dx[LEGO_VECTORS];
    UNROLL for (int64_t u = 0; u < LEGO_VECTORS; u++) dx[u] = u * kLanes;
    const int64_t no_tap = 0;
    for (int64_t f = 0; f < p.products; f++) {
      for (int64_t c0 = 0; c0 == 0 || c0 < depth; c0 += block) {
        const int64_t n = min(block, depth - c0);
        const float* x = input + f * input_step + c0 * stride;
        for (int64_t i = whole; i < patches; i++) {
          for (int64_t k = 0; k < n; k++) column[(i - whole) * n + k] = x[k * stride + i];
        }
        for (int64_t panel = first_panel; panel < last_panel; panel++) {
          const int64_t mr = panels.height(panel), first = panels.first(panel);
          const float* a = share.filters + (f * n_rows + first) * depth + c0 * mr;
          float* z = product + f * product_step + (first - panels.first(first_panel)) * stride;
          for (int64_t i = 0; i < whole; i += kPixels) {
            const int64_t nv = min(LEGO_VECTORS, ceil_div(whole - i, kLanes));
            kMultiplyPanel[nv - 1][1][mr - 1](a, n, 1, &no_tap, x + i, stride, dx, z + i, stride,
                                              c0 > 0);
          }
          if (whole < patches) {
            kMultiplyColumns[patches - whole - 1](a, mr, n, column, n, z + whole, stride, c0 > 0);
          }
        }
      }
    }
  }

  // Transforms `rows` rows of products to rows of Z.
  template <int SIDE>
  INLINE void transform_products(int64_t rows, float* z) const {
    for (int64_t r = 0; r < rows; r++) {
      const float* from = product + r * stride;
      float* to = z + r * 16 * stride;
      for (int64_t t = 0; t < tile.patches; t += kLanes) {
        V half[4 * SIDE];
        UNROLL for (int q = 0; q < SIDE; q++) {
          V frequencies[SIDE], out[4];
          UNROLL for (int u = 0; u < SIDE; u++) {
            frequencies[u] = load(from + (u * SIDE + q) * product_step + t);
          }
          transform_output<SIDE>(frequencies, out);
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
};

template <int SIDE>
void transform_patches(const Conv& v, int64_t tile, int64_t split, int64_t first_panel,
                       int64_t last_panel, float* z_tile, float* scratch) {
  const WinogradTransform t(v, tile, split, scratch);
  for (int64_t c = 0; c < t.share.channels; c++) t.transform_channel<SIDE>(c);
  t.multiply_frequencies(first_panel, last_panel);
  const int64_t first = t.panels.first(first_panel), rows = t.panels.first(last_panel) - first;
  t.transform_products<SIDE>(rows, z_tile + (t.share.z_row + first) * 16 * t.stride);
}

void transform_winograd(const Conv& v, int64_t tile, int64_t split, int64_t first, int64_t last,
                        float* z, float* scratch) {
  switch (winograd_side(*v.header)) {
    case 5: return transform_patches<5>(v, tile, split, first, last, z, scratch);
    case 6: return transform_patches<6>(v, tile, split, first, last, z, scratch);
    default: return transform_patches<7>(v, tile, split, first, last, z, scratch);
  }
}
