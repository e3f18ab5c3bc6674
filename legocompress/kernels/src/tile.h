// Tiles of output pixels: how they are chosen, and the transform of one split on one of them.

// A run of output pixels of one image, at `offset` within the tile.
struct Run {
  int64_t image, first, count, offset;
};

// Calls f(run) for each run of a tile, in order.
template <class F>
INLINE void each_run(const Conv& v, int64_t tile, F f) {
  const int64_t plane = v.out_h * v.out_w;
  if (v.images_per_tile) {  // whole images, or parts of one
    if (v.tiles_per_image > 1) {
      const int64_t first = tile % v.tiles_per_image * v.tile_pixels;
      f(Run{tile / v.tiles_per_image, first, least(v.tile_pixels, plane - first), 0});
      return;
    }
    const int64_t image = tile * v.images_per_tile;
    const int64_t n = least(v.images_per_tile, v.batch - image);
    for (int64_t i = 0; i < n; i++) f(Run{image + i, 0, plane, i * v.slot});
    return;
  }
  // All images as one run of pixels.
  const int64_t start = tile * v.tile_pixels;
  const int64_t end = tile + 1 == v.n_tiles ? v.batch * plane : start + v.tile_pixels;
  for (int64_t at = start; at < end;) {
    const int64_t first = at % plane, n = least(end - at, plane - first);
    f(Run{at / plane, first, n, at - start});
    at += n;
  }
}

// Where the taps of one channel lie in the packed input of a run of pixels.
struct Taps {
  int64_t count, at[kMaxTaps];
  int64_t channel_floats;  // of one run
};

// Packed as one copy of the run a kernel column and row phase, shifted so that a tap is an offset.
INLINE void flat_taps(const Conv& v, int64_t run_pixels, Taps& t) {
  const int64_t kh = v.head->kernel_h, kw = v.head->kernel_w;
  t.count = kh * kw;
  int64_t at = 0;
  for (int64_t x = 0; x < kw; x++) {
    for (int64_t phase = 0; phase < v.stride_h; phase++) {
      int64_t shift = -1;
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

INLINE void pack_flat_run(const Conv& v, float* to, int64_t stride, const Run& run, int64_t channel,
                          int64_t channels, int64_t run_pixels) {
  const int64_t kh = v.head->kernel_h, kw = v.head->kernel_w;
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

struct Rows {  // of zero-padded input rows of a tile, where tiles are whole rows
  int64_t count, floats;
};
INLINE Rows padded_rows(const Conv& v, int64_t out_rows) {
  return {out_rows + (v.head->kernel_h - 1) * v.dilation_h,
          v.out_w + (v.head->kernel_w - 1) * v.dilation_w};
}

INLINE int64_t channel_stride(const Conv& v, const Taps& t) {
  if (v.direct_rows) {
    const Rows r = padded_rows(v, v.tile_pixels / v.out_w);
    return odd_lines(r.count * r.floats + kLanes);
  }
  return odd_lines(t.channel_floats * most(1, v.images_per_tile) + kLanes);
}

INLINE int64_t column_floats(const Conv& v) {
  return round_up(kMaxColumns * v.channel_block * v.head->kernel_h * v.head->kernel_w *
                      most(1, v.images_per_tile), 16);
}

void plan_direct(Conv& v, int threads) {
  const Header& h = *v.head;
  const int64_t plane = v.out_h * v.out_w, taps = h.kernel_h * h.kernel_w;
  const int64_t pixels = v.batch * plane;
  // What fits: Z of all splits and the input block share the second cache.
  const int64_t room = most(kPixels, v.tile_floats / most(1, h.n_rows) / kPixels * kPixels);
  int64_t want = least(room, v.tile_pixels_most);
  v.direct_rows = taps > 1 && v.stride_h == 1 && v.stride_w == 1 &&
                  v.out_w % kLanes == 0 && v.out_w >= 56;
  v.images_per_tile = 0;
  v.tiles_per_image = 1;
  v.slot = 0;
  if (taps == 1) {
    // Even tiles of whole vectors; the last one takes the pixels that are left. As many for each
    // thread where these come out alike.
    const int64_t vectors = most(1, pixels / kLanes);
    int64_t n = ceil_div(vectors * kLanes, want);
    const int64_t dealt = round_up(n, threads), size = ceil_div(vectors, dealt);
    if (threads > 1 && 10 * size * dealt <= 11 * vectors) n = dealt;
    v.tile_pixels = ceil_div(vectors, n) * kLanes;
    v.n_tiles = ceil_div(vectors * kLanes, v.tile_pixels);
    v.most_pixels = v.tile_pixels + least(kLanes - 1, pixels % kLanes);
    v.z_stride = odd_lines(round_up(v.most_pixels, kLanes));
    v.whole_tiles = v.n_tiles - (vectors * kLanes % v.tile_pixels && v.n_tiles % threads);
  } else if (v.direct_rows) {
    const int64_t rows = v.batch * v.out_h;
    // Rows of padding are packed again by every tile, so these want to be taller.
    int64_t r = most(1, least(room, 2 * v.tile_pixels_most) / v.out_w);
    if (threads > 1) r = least(r, most(1, ceil_div(rows, 2 * threads)));
    const int64_t n = ceil_div(v.out_h, r);
    v.tile_pixels = ceil_div(v.out_h, n) * v.out_w;
    v.images_per_tile = 1;
    v.tiles_per_image = ceil_div(plane, v.tile_pixels);
    v.n_tiles = v.batch * v.tiles_per_image;
    v.z_stride = odd_lines(round_up(v.tile_pixels, kPixels));
    if (v.tiles_per_image == 1) v.slot = v.z_stride;
  } else if (plane > want) {
    const int64_t blocks = ceil_div(plane, kPixels);
    int64_t n = ceil_div(blocks * kPixels, want);
    if (v.batch % threads) n = least(blocks, round_up(n, threads));
    v.tile_pixels = ceil_div(blocks, n) * kPixels;
    v.images_per_tile = 1;
    v.tiles_per_image = ceil_div(plane, v.tile_pixels);
    v.n_tiles = v.batch * v.tiles_per_image;
    v.z_stride = odd_lines(v.tile_pixels);
    if (v.tiles_per_image == 1) v.slot = v.z_stride;
  } else {
    v.slot = round_up(plane, kPixels);
    int64_t n = most(1, want / v.slot);
    n = least(n, ceil_div(v.batch, threads));
    v.tile_pixels = plane;
    v.images_per_tile = n;
    v.n_tiles = ceil_div(v.batch, n);
    v.z_stride = odd_lines(v.slot * n);
  }
  // Of several images' tiles the smaller ones lie between the others: all count as whole.
  if (taps > 1) {
    v.most_pixels = v.images_per_tile > 1 ? plane : v.tile_pixels;
    v.whole_tiles = v.batch == 1 ? pixels / v.tile_pixels : v.n_tiles;
  }
  // Input block: as many channels as keep one register tile's worth of input in the first cache.
  const int64_t depth_channels = most(1, v.depth / taps);
  const int64_t n_blocks = most(1, ceil_div(h.width, depth_channels));
  v.channel_block = ceil_div(h.width, n_blocks);
  v.z_floats = most(1, h.n_rows) * v.z_stride + kPixels;
  Taps t;
  flat_taps(v, v.most_pixels, t);
  const int64_t input = v.channel_block * channel_stride(v, t);
  v.scratch_floats = column_floats(v) + input + 4 * kPixels;
}

// The first channel of a 1 x 1 conv's tile, where its pixels stand in the image as the inner loops
// want them; null where they must be packed. Planes a power of two apart would share cache sets, and
// the last vector may reach past the tile but not past the batch.
INLINE const float* pixels_in_place(const Conv& v, int64_t tile) {
  const int64_t plane = v.height * v.width;
  if (v.channels_last || v.stride_h != 1 || v.stride_w != 1 || v.pad_h || v.pad_w ||
      plane % 256 == 0) {
    return nullptr;
  }
  const int64_t start = tile * v.tile_pixels, image = start / plane, first = start % plane;
  const int64_t count = tile + 1 == v.n_tiles ? v.batch * plane - start : v.tile_pixels;
  if (first + count > plane) return nullptr;
  const int64_t last = (v.batch - image) * v.head->channels * plane - (v.head->channels - 1) * plane;
  if (first + round_up(count, kLanes) > last) return nullptr;
  return v.x + image * v.head->channels * plane + first;
}

void transform_direct(const Conv& v, int64_t tile, int64_t split, int64_t first_panel,
                      int64_t last_panel, float* z_tile, float* scratch) {
  const Header& h = *v.head;
  const int64_t n_taps = h.kernel_h * h.kernel_w;
  const int64_t channels = most(0, least(h.width, h.channels - split * h.width));
  const Panels panels(v.split_rows[split]);
  const float* filters = v.filters;
  int64_t z_row = 0;
  for (int64_t i = 0; i < split; i++) {
    filters += v.split_rows[i] * most(0, least(h.width, h.channels - i * h.width)) * n_taps;
    z_row += v.split_rows[i];
  }
  const bool joint = n_taps == 1;
  Taps t;
  int64_t row_floats = 0;
  if (v.direct_rows) {
    t.count = n_taps;
    row_floats = padded_rows(v, 1).floats;
    for (int64_t y = 0; y < h.kernel_h; y++) {
      for (int64_t x = 0; x < h.kernel_w; x++) {
        t.at[y * h.kernel_w + x] = y * v.dilation_h * row_floats + x * v.dilation_w;
      }
    }
  } else {
    flat_taps(v, v.most_pixels, t);
  }
  int64_t stride = channel_stride(v, t);
  const float* in_place = joint ? pixels_in_place(v, tile) : nullptr;
  if (in_place) stride = v.height * v.width;
  const PanelTile(*by_vectors)[3][kPanel] = kPanelTile;
  const int64_t tap_kind = n_taps == 1 ? 1 : n_taps == 9 ? 2 : 0;
  float* column = scratch;
  float* packed = scratch + column_floats(v);
  const float* input = packed;
  const int64_t block = v.channel_block;
  // A split without channels still writes its rows: zeros.
  for (int64_t c0 = 0; c0 == 0 || c0 < channels; c0 += block) {
    const int64_t c = least(block, channels - c0);
    const int64_t channel = split * h.width + c0;
    int64_t total = 0;  // pixels, where the runs of all images are one
    each_run(v, tile, [&](const Run& run) {
      total = run.offset + run.count;
      if (in_place) {
        input = in_place + channel * stride;
      } else if (joint) {
        pack_flat(v, packed + run.offset, stride, run.image, channel, c, run.first, run.count, 0, 0);
      } else if (v.direct_rows) {
        const Rows rows = padded_rows(v, run.count / v.out_w);
        const Span span(-v.pad_w, 1, rows.floats, v.width);
        const int64_t at_once = v.channels_last ? c : 1;
        for (int64_t i = 0; i < c; i += at_once) {
          if (!v.channels_last && i + kAhead < c) {
            const int64_t low = most(0, run.first / v.out_w - v.pad_h);
            fetch(v.x + ((run.image * h.channels + channel + i + kAhead) * v.height + low) * v.width,
                  least(v.height - low, rows.count) * v.width);
          }
          for (int64_t r = 0; r < rows.count; r++) {
            pack_row(v, packed + i * stride + r * rows.floats, stride, run.image, channel + i,
                     at_once, run.first / v.out_w + r - v.pad_h, span);
          }
        }
      } else {
        pack_flat_run(v, packed + run.offset / most(1, v.slot) * t.channel_floats, stride, run,
                      channel, c, v.most_pixels);
      }
    });
    const bool add = c0 > 0;
    int64_t n_runs = 0;
    // A run's pixels beyond its last whole vectors, as columns.
    const auto tail_of = [&](int64_t count) {
      const int64_t rest = count % kLanes;
      return rest <= kMaxColumns ? rest : 0;
    };
    const auto prepare_columns = [&](int64_t count, const float* x, int64_t n) {
      const int64_t rest = tail_of(count);
      for (int64_t p = 0; p < rest; p++) {
        float* to = column + (n * kMaxColumns + p) * v.channel_block * n_taps;
        const int64_t pixel = count - rest + p;
        const float* from = x + pixel;  // rows of tiles of whole rows have no such rest
        for (int64_t k = 0; k < c; k++, from += stride) {
          for (int64_t u = 0; u < n_taps; u++) *to++ = from[t.at[u]];
        }
      }
    };
    const int64_t slot_floats = t.channel_floats;
    if (joint) {
      prepare_columns(total, input, 0);
    } else {
      each_run(v, tile, [&](const Run& run) {
        prepare_columns(run.count, input + n_runs * slot_floats, n_runs);
        n_runs++;
      });
    }
    for (int64_t p = first_panel; p < last_panel; p++) {
      const int64_t mr = panels.height(p);
      // Panels stand one after the other, each with all channels of the split.
      const float* a = filters + (panels.first(p) * channels + c0 * mr) * n_taps;
      float* z = z_tile + (z_row + panels.first(p)) * v.z_stride;
      const auto run_panel = [&](int64_t count, const float* x, float* to, int64_t n) {
        const int64_t rest = tail_of(count), whole = count - rest;
        int64_t dx[LEGO_VECTORS];
        int64_t column_at = 0, row_at = 0;  // of the next vector, where tiles are whole rows
        for (int64_t i = 0, nv; i < whole; i += nv * kLanes) {
          // Register tiles as even as can be.
          const int64_t vectors = ceil_div(whole - i, kLanes);
          nv = ceil_div(vectors, ceil_div(vectors, LEGO_VECTORS));
          const float* from = x + i;
          if (v.direct_rows) {
            from = x + row_at + column_at;
            for (int64_t u = 0; u < nv; u++) {
              dx[u] = x + row_at + column_at - from;
              column_at += kLanes;
              if (column_at == v.out_w) column_at = 0, row_at += row_floats;
            }
          } else {
            UNROLL for (int64_t u = 0; u < LEGO_VECTORS; u++) dx[u] = u * kLanes;
          }
          by_vectors[nv - 1][tap_kind][mr - 1](a, c, n_taps, t.at, from, stride, dx, to + i,
                                              v.z_stride, add);
        }
        if (rest) {
          const int64_t depth = v.channel_block * n_taps;
          kPanelColumns[rest - 1](a, mr, c * n_taps, column + n * kMaxColumns * depth, depth,
                                  to + whole, v.z_stride, add);
        }
      };
      if (joint) {
        run_panel(total, input, z, 0);
      } else {
        int64_t n = 0;
        each_run(v, tile, [&](const Run& run) {
          run_panel(run.count, input + n * slot_floats, z + run.offset, n);
          n++;
        });
      }
    }
  }
}
