// Tiles of output pixels in the direct form: their runs of pixels, and the layout of their packed input.

// A run of output pixels of one image, at `offset` within the tile.
struct Run {
  int64_t image, first, count, offset;
};

// Calls f(run) for each run of a tile, in order.
template <class F>
INLINE void for_each_run(const Conv& v, int64_t tile, F f) {
  const int64_t plane = v.out_h * v.out_w;
  if (v.images_per_tile) {  // whole images, or parts of one
    if (v.tiles_per_image > 1) {
      const int64_t first = tile % v.tiles_per_image * v.tile_pixels;
      f(Run{tile / v.tiles_per_image, first, min(v.tile_pixels, plane - first), 0});
      return;
    }
    const int64_t image = tile * v.images_per_tile;
    const int64_t n = min(v.images_per_tile, v.batch - image);
    for (int64_t i = 0; i < n; i++) f(Run{image + i, 0, plane, i * v.image_stride});
    return;
  }
  // The pixels of all images are numbered one after the other, and a tile may span images.
  const int64_t start = tile * v.tile_pixels;
  const int64_t end = tile + 1 == v.n_tiles ? v.batch * plane : start + v.tile_pixels;
  for (int64_t at = start; at < end;) {
    const int64_t first = at % plane, n = min(end - at, plane - first);
    f(Run{at / plane, first, n, at - start});
    at += n;
  }
}

// The share of one split: its channels, its filters, and its first row of Z.
struct SplitShare {
  int64_t channels;
  const float* filters;
  int64_t z_row;
};
// `values` is the number of filter values per channel.
INLINE SplitShare locate_split(const Conv& v, int64_t split, int64_t values) {
  const Header& h = *v.header;
  SplitShare share{0, v.filters, 0};
  for (int64_t i = 0; i < split; i++) {
    share.filters += v.split_rows[i] * max(0, min(h.width, h.channels - i * h.width)) * values;
    share.z_row += v.split_rows[i];
  }
  share.channels = max(0, min(h.width, h.channels - split * h.width));
  return share;
}

// Offsets of the kernel's taps in the packed input of one channel.
struct Taps {
  int64_t count, at[kMaxTaps];
  int64_t channel_floats;  // of one run
};

// Taps of a flat run of pixels, for which the input is packed once per kernel column and row phase. A
// copy holds as many further pixels as its taps are shifted, so that each tap is an offset into it.
INLINE void locate_flat_taps(const Conv& v, int64_t run_pixels, Taps& t) {
  const int64_t kh = v.header->kernel_h, kw = v.header->kernel_w;
  t.count = kh * kw;
  int64_t at = 0;
  for (int64_t x = 0; x < kw; x++) {
    for (int64_t phase = 0; phase < v.stride_h; phase++) {
      int64_t shift = -1;  // in output rows
      for (int64_t y = 0; y < kh; y++) {
        if (y * v.dilation_h % v.stride_h != phase) continue;
        shift = y * v.dilation_h / v.stride_h;
        t.at[y * kw + x] = at + shift * v.out_w;
      }
      if (shift >= 0) at += round_up(run_pixels + shift * v.out_w, 16);
    }
  }
  t.channel_floats = at;
}

// Packs a run in the layout of locate_flat_taps.
INLINE void pack_flat_run(const Conv& v, float* to, int64_t stride, const Run& run, int64_t channel,
                          int64_t channels, int64_t run_pixels) {
  const int64_t kh = v.header->kernel_h, kw = v.header->kernel_w;
  int64_t at = 0;
  for (int64_t x = 0; x < kw; x++) {
    for (int64_t phase = 0; phase < v.stride_h; phase++) {
      int64_t shift = -1;
      for (int64_t y = 0; y < kh; y++) {
        if (y * v.dilation_h % v.stride_h == phase) shift = y * v.dilation_h / v.stride_h;
      }
      if (shift < 0) continue;
      pack_flat(v, to + at, stride, run.image, channel, channels, run.first,
                run.count + shift * v.out_w, phase, x);
      at += round_up(run_pixels + shift * v.out_w, 16);
    }
  }
}

// The zero-padded input rows of `out_rows` output rows, where tiles are whole rows.
struct PaddedRows {
  int64_t count, floats;  // floats of one row
};
INLINE PaddedRows padded_rows(const Conv& v, int64_t out_rows) {
  return {out_rows + (v.header->kernel_h - 1) * v.dilation_h,
          v.out_w + (v.header->kernel_w - 1) * v.dilation_w};
}

// Taps of a tile of whole output rows, whose input rows are packed once.
INLINE void locate_row_taps(const Conv& v, Taps& t) {
  const Header& h = *v.header;
  const int64_t row_floats = padded_rows(v, 1).floats;
  t.count = h.kernel_h * h.kernel_w;
  for (int64_t y = 0; y < h.kernel_h; y++) {
    for (int64_t x = 0; x < h.kernel_w; x++) {
      t.at[y * h.kernel_w + x] = y * v.dilation_h * row_floats + x * v.dilation_w;
    }
  }
}

// Floats from one channel of the packed input to the next.
INLINE int64_t channel_stride(const Conv& v, const Taps& t) {
  if (v.whole_rows) {
    const PaddedRows r = padded_rows(v, v.tile_pixels / v.out_w);
    return round_to_odd_lines(r.count * r.floats + kLanes);
  }
  return round_to_odd_lines(t.channel_floats * max(1, v.images_per_tile) + kLanes);
}

// Floats of the columns of all runs of a tile (kMaxColumns per run).
INLINE int64_t count_column_floats(const Conv& v) {
  return round_up(kMaxColumns * v.channel_block * v.header->kernel_h * v.header->kernel_w *
                      max(1, v.images_per_tile), 16);
}
