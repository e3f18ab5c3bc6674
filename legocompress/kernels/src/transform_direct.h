// The transform in the direct form: the Lego filters of one split on one tile.

// The first channel of a 1 x 1 conv's tile, if the inner loops can read its pixels from the image; null
// if they must be packed. Channels a multiple of 256 floats apart would share cache sets, and the last
// vector may reach past the tile but not past the batch.
INLINE const float* find_pixels_in_place(const Conv& v, int64_t tile) {
  const int64_t plane = v.height * v.width;
  if (v.channels_last || v.stride_h != 1 || v.stride_w != 1 || v.pad_h || v.pad_w ||
      plane % 256 == 0) {
    return nullptr;
  }
  const int64_t channels = v.header->channels;
  const int64_t start = tile * v.tile_pixels, image = start / plane, first = start % plane;
  const int64_t count = tile + 1 == v.n_tiles ? v.batch * plane - start : v.tile_pixels;
  if (first + count > plane) return nullptr;
  const int64_t end = (v.batch - image) * channels * plane - (channels - 1) * plane;
  if (first + round_up(count, kLanes) > end) return nullptr;
  return v.x + image * channels * plane + first;
}

// The work on one split of one tile.
struct DirectTransform {
  const Conv& v;
  int64_t tile;
  SplitShare share;
  Panels panels;
  int64_t first_channel, n_taps;
  bool one_run;             // of a 1 x 1 conv: the runs of all images are multiplied as one
  int64_t one_run_pixels;
  Taps taps;
  int64_t row_floats;       // of a padded row, where tiles are whole rows
  const float* in_place;    // or null
  int64_t stride;           // floats from one channel of the input to the next
  float *columns, *packed;  // scratch

  INLINE DirectTransform(const Conv& conv, int64_t tile_, int64_t split, float* scratch)
      : v(conv), tile(tile_), panels(conv.split_rows[split]) {
    const Header& h = *v.header;
    n_taps = h.kernel_h * h.kernel_w;
    share = locate_split(v, split, n_taps);
    first_channel = split * h.width;
    one_run = n_taps == 1;
    one_run_pixels = 0;
    if (one_run) {
      for_each_run(v, tile, [&](const Run& run) { one_run_pixels = run.offset + run.count; });
    }
    row_floats = 0;
    if (v.whole_rows) {
      row_floats = padded_rows(v, 1).floats;
      locate_row_taps(v, taps);
      taps.channel_floats = 0;  // a tile has one run
    } else {
      locate_flat_taps(v, v.max_pixels, taps);
    }
    in_place = one_run ? find_pixels_in_place(v, tile) : nullptr;
    stride = in_place ? v.height * v.width : channel_stride(v, taps);
    columns = scratch;
    packed = scratch + count_column_floats(v);
  }

  // Calls f(pixels, offset in the tile, number) for each run that is multiplied separately.
  template <class F>
  INLINE void for_each_product(F f) const {
    if (one_run) return f(one_run_pixels, int64_t{0}, int64_t{0});
    int64_t n = 0;
    for_each_run(v, tile, [&](const Run& run) { f(run.count, run.offset, n++); });
  }

  // Pixels of a run beyond its last whole vector, if they are computed as columns.
  INLINE static int64_t count_columns(int64_t pixels) {
    const int64_t rest = pixels % kLanes;
    return rest <= kMaxColumns ? rest : 0;
  }

  INLINE void pack_rows(const Run& run, int64_t channel, int64_t channels) const {
    const PaddedRows rows = padded_rows(v, run.count / v.out_w);
    const Span span(-v.pad_w, 1, rows.floats, v.width);
    const int64_t at_once = v.channels_last ? channels : 1;
    for (int64_t i = 0; i < channels; i += at_once) {
      if (!v.channels_last && i + kPrefetchChannels < channels) {
        const int64_t low = max(0, run.first / v.out_w - v.pad_h);
        const int64_t plane = run.image * v.header->channels + channel + i + kPrefetchChannels;
        prefetch(v.x + (plane * v.height + low) * v.width,
                 min(v.height - low, rows.count) * v.width);
      }
      for (int64_t r = 0; r < rows.count; r++) {
        pack_row(v, packed + i * stride + r * rows.floats, stride, run.image, channel + i, at_once,
                 run.first / v.out_w + r - v.pad_h, span);
      }
    }
  }

  // Packs channels [c0, c0 + channels) of the split, where they are not read in place; returns them.
  INLINE const float* pack_channels(int64_t c0, int64_t channels) const {
    const int64_t channel = first_channel + c0;
    if (in_place) return in_place + channel * stride;
    for_each_run(v, tile, [&](const Run& run) {
      if (one_run) {
        pack_flat(v, packed + run.offset, stride, run.image, channel, channels, run.first,
                  run.count, 0, 0);
      } else if (v.whole_rows) {
        pack_rows(run, channel, channels);
      } else {
        const int64_t number = run.offset / max(1, v.image_stride);
        pack_flat_run(v, packed + number * taps.channel_floats, stride, run, channel, channels,
                      v.max_pixels);
      }
    });
    return packed;
  }

  // Copies the inputs of those pixels that are computed as columns.
  INLINE void fill_columns(const float* input, int64_t channels) const {
    for_each_product([&](int64_t pixels, int64_t, int64_t number) {
      const float* x = input + number * taps.channel_floats;
      const int64_t rest = count_columns(pixels);
      for (int64_t p = 0; p < rest; p++) {
        float* to = columns + (number * kMaxColumns + p) * v.channel_block * n_taps;
        const int64_t pixel = pixels - rest + p;
        const float* from = x + pixel;  // tiles of whole rows have no such pixels
        for (int64_t k = 0; k < channels; k++, from += stride) {
          for (int64_t u = 0; u < n_taps; u++) *to++ = from[taps.at[u]];
        }
      }
    });
  }

  // Multiplies one panel, from channel c0 of the split on, with the input of one run of pixels.
  INLINE void multiply_run(int64_t panel, int64_t c0, int64_t channels, const float* x, int64_t pixels,
                           int64_t number, float* z) const {
    const int64_t mr = panels.height(panel);
    // Panels stand one after the other, each with all channels of the split.
    const float* a = share.filters + (panels.first(panel) * share.channels + c0 * mr) * n_taps;
    const int64_t tap_kind = n_taps == 1 ? 1 : n_taps == 9 ? 2 : 0;
    const bool add = c0 > 0;
    const int64_t rest = count_columns(pixels), whole = pixels - rest;
    int64_t dx[LEGO_VECTORS];
    int64_t column_at = 0, row_at = 0;  // of the next vector, where tiles are whole rows
    for (int64_t i = 0, nv; i < whole; i += nv * kLanes) {
      // Register tiles as even as possible.
      const int64_t vectors = ceil_div(whole - i, kLanes);
      nv = ceil_div(vectors, ceil_div(vectors, LEGO_VECTORS));
      const float* from = x + i;
      if (v.whole_rows) {
        from = x + row_at + column_at;
        for (int64_t u = 0; u < nv; u++) {
          dx[u] = x + row_at + column_at - from;
          column_at += kLanes;
          if (column_at == v.out_w) column_at = 0, row_at += row_floats;
        }
      } else {
        UNROLL for (int64_t u = 0; u < LEGO_VECTORS; u++) dx[u] = u * kLanes;
      }
      kMultiplyPanel[nv - 1][tap_kind][mr - 1](a, channels, n_taps, taps.at, from, stride, dx, z + i,
                                               v.z_stride, add);
    }
    if (rest) {
      const int64_t depth = v.channel_block * n_taps;
      kMultiplyColumns[rest - 1](a, mr, channels * n_taps, columns + number * kMaxColumns * depth,
                                 depth, z + whole, v.z_stride, add);
    }
  }
};

void transform_direct(const Conv& v, int64_t tile, int64_t split, int64_t first_panel,
                      int64_t last_panel, float* z_tile, float* scratch) {
  const DirectTransform t(v, tile, split, scratch);
  // A split without channels still writes its rows: zeros.
  for (int64_t c0 = 0; c0 == 0 || c0 < t.share.channels; c0 += v.channel_block) {
    const int64_t channels = min(v.channel_block, t.share.channels - c0);
    const float* input = t.pack_channels(c0, channels);
    t.fill_columns(input, channels);
    for (int64_t p = first_panel; p < last_panel; p++) {
      float* z = z_tile + (t.share.z_row + t.panels.first(p)) * v.z_stride;
      t.for_each_product([&](int64_t pixels, int64_t offset, int64_t number) {
        t.multiply_run(p, c0, channels, input + number * t.taps.channel_floats, pixels, number,
                       z + offset);
      });
    }
  }
}
