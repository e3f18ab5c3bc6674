// Winograd's form F(4 x 4, r x r) for r = 2, 3 or 4 (Lavin and Gray, 2016): its sizes and its tiling.
// It computes a patch of 4 x 4 output pixels by (r + 3)^2 products per channel. A conv of stride 2 is a
// conv of stride 1 over the 4 phases of each channel, with half the kernel.
//
// A band is a row of patches: 4 output rows of one image. A tile is a run of bands. Z holds, per row, 16
// lines of one float per patch, one line for each pixel of the patch.

// Numbers of patches of an image.
struct Bands {
  int64_t across, down;
  INLINE explicit Bands(const Conv& v) : across(ceil_div(v.out_w, 4)), down(ceil_div(v.out_h, 4)) {}
};

struct Patch {
  int64_t stride;    // of the conv
  int64_t side;      // r + 3
  int64_t period;    // input pixels from one patch to the next
  int64_t span;      // input pixels of one patch
  int64_t phases;    // stride^2
  int64_t products;  // side^2, the number of frequencies
  INLINE explicit Patch(const Conv& v)
      : stride(v.header->winograd_stride), side(winograd_side(*v.header)), period(4 * stride),
        span(side * stride), phases(stride * stride), products(side * side) {}
};

// The bands of one tile.
struct TileBands {
  int64_t first, last;  // [first, last)
  int64_t patches;
  INLINE TileBands(const Conv& v, const Bands& b, int64_t tile) {
    first = tile * v.tile_pixels;
    last = min(first + v.tile_pixels, v.batch * b.down);
    patches = (last - first) * b.across;
  }
};

// Floats of a line of patches: those of all bands of a tile side by side, and of one more band.
INLINE int64_t count_line_floats(const Conv& v) {
  return round_up((v.tile_pixels + 1) * ceil_div(v.out_w, 4), kLanes) + 2 * kLanes;
}

// Floats from one frequency to the next: an odd number of cache lines, so that they do not all fall into
// one cache set.
INLINE int64_t count_frequency_floats(int64_t rows, int64_t stride) {
  return round_to_odd_lines(rows * stride);
}

void plan_winograd(Conv& v, int threads) {
  const Header& h = *v.header;
  const Bands b(v);
  const Patch p(v);
  const int64_t bands = v.batch * b.down;
  int64_t max_rows = 0;
  for (int64_t i = 0; i < h.n_split; i++) max_rows = max(max_rows, v.split_rows[i]);
  int64_t tile_bands = max(1, v.max_patches / b.across);
  // At least one tile per thread, unless such small tiles left most lanes empty: then the threads share
  // the splits of a tile.
  const int64_t thread_bands = ceil_div(bands, threads);
  if (thread_bands * b.across >= 2 * kPixels) tile_bands = min(tile_bands, thread_bands);
  v.n_tiles = ceil_div(bands, tile_bands);
  v.tile_pixels = ceil_div(bands, v.n_tiles);  // bands of a tile
  v.n_tiles = ceil_div(bands, v.tile_pixels);
  v.n_even_tiles = bands / v.tile_pixels;
  const int64_t patches = v.tile_pixels * b.across;
  // The last vector of an image may reach into the place of the next image, which is written after it.
  v.z_stride = round_to_odd_lines(round_up(patches, kLanes) + (v.batch > 1 ? kLanes : 0));
  v.z_floats = max(1, h.n_rows) * 16 * v.z_stride + kPixels;
  const int64_t depth = h.width * p.phases;
  v.scratch_floats = p.products * (count_frequency_floats(depth, v.z_stride) +
                                   count_frequency_floats(max_rows, v.z_stride)) +
                     kMaxColumns * depth + p.period * (p.span + 1) * count_line_floats(v) + 4 * kPixels;
}
