// The tiling of the direct form: which output pixels form a tile, and how many channels are packed at once.

// 1 x 1 convs. Even tiles of whole vectors over the pixels of all images; the last tile also takes the
// pixels beyond the last whole vector.
void tile_pixels_of_batch(Conv& v, int64_t target_pixels, int threads) {
  const int64_t pixels = v.batch * v.out_h * v.out_w;
  const int64_t vectors = max(1, pixels / kLanes);
  int64_t n = ceil_div(vectors * kLanes, target_pixels);
  // The same number of tiles for each thread, unless that leaves the last tiles much smaller.
  const int64_t even = round_up(n, threads), size = ceil_div(vectors, even);
  if (threads > 1 && 10 * size * even <= 11 * vectors) n = even;
  v.tile_pixels = ceil_div(vectors, n) * kLanes;
  v.n_tiles = ceil_div(vectors * kLanes, v.tile_pixels);
  v.max_pixels = v.tile_pixels + min(kLanes - 1, pixels % kLanes);
  v.z_stride = round_to_odd_lines(round_up(v.max_pixels, kLanes));
  v.n_even_tiles = v.n_tiles - (vectors * kLanes % v.tile_pixels && v.n_tiles % threads);
}

// Whole output rows of one image, read from zero-padded input rows.
void tile_whole_rows(Conv& v, int64_t most, int threads) {
  const int64_t plane = v.out_h * v.out_w, rows = v.batch * v.out_h;
  // Every tile packs the rows that it shares with its neighbours again, so these tiles are taller.
  int64_t r = max(1, min(most, 2 * v.max_tile_pixels) / v.out_w);
  if (threads > 1) r = min(r, max(1, ceil_div(rows, 2 * threads)));
  const int64_t n = ceil_div(v.out_h, r);
  v.tile_pixels = ceil_div(v.out_h, n) * v.out_w;
  v.images_per_tile = 1;
  v.tiles_per_image = ceil_div(plane, v.tile_pixels);
  v.n_tiles = v.batch * v.tiles_per_image;
  v.z_stride = round_to_odd_lines(round_up(v.tile_pixels, kPixels));
  if (v.tiles_per_image == 1) v.image_stride = v.z_stride;
}

// Parts of one image, of whole register tiles.
void tile_parts_of_images(Conv& v, int64_t target_pixels, int threads) {
  const int64_t plane = v.out_h * v.out_w, blocks = ceil_div(plane, kPixels);
  int64_t n = ceil_div(blocks * kPixels, target_pixels);
  if (v.batch % threads) n = min(blocks, round_up(n, threads));
  v.tile_pixels = ceil_div(blocks, n) * kPixels;
  v.images_per_tile = 1;
  v.tiles_per_image = ceil_div(plane, v.tile_pixels);
  v.n_tiles = v.batch * v.tiles_per_image;
  v.z_stride = round_to_odd_lines(v.tile_pixels);
  if (v.tiles_per_image == 1) v.image_stride = v.z_stride;
}

// One or more whole images.
void tile_whole_images(Conv& v, int64_t target_pixels, int threads) {
  const int64_t plane = v.out_h * v.out_w;
  v.image_stride = round_up(plane, kPixels);
  int64_t n = max(1, target_pixels / v.image_stride);
  n = min(n, ceil_div(v.batch, threads));
  v.tile_pixels = plane;
  v.images_per_tile = n;
  v.n_tiles = ceil_div(v.batch, n);
  v.z_stride = round_to_odd_lines(v.image_stride * n);
}

// The block of channels, and the floats of Z and of the scratch memory.
void plan_direct_memory(Conv& v) {
  const Header& h = *v.header;
  // As many channels as keep the input of one register tile in the first cache.
  const int64_t depth_channels = max(1, v.max_depth / (h.kernel_h * h.kernel_w));
  const int64_t n_blocks = max(1, ceil_div(h.width, depth_channels));
  v.channel_block = ceil_div(h.width, n_blocks);
  v.z_floats = max(1, h.n_rows) * v.z_stride + kPixels;
  Taps t;
  locate_flat_taps(v, v.max_pixels, t);
  const int64_t input = v.channel_block * channel_stride(v, t);
  v.scratch_floats = count_column_floats(v) + input + 4 * kPixels;
}

void plan_direct(Conv& v, int threads) {
  const Header& h = *v.header;
  const int64_t plane = v.out_h * v.out_w, taps = h.kernel_h * h.kernel_w;
  // The most pixels whose Z, of all splits, shares the second cache with the input block.
  const int64_t most = max(kPixels, v.tile_floats / max(1, h.n_rows) / kPixels * kPixels);
  const int64_t target_pixels = min(most, v.max_tile_pixels);
  v.whole_rows = taps > 1 && v.stride_h == 1 && v.stride_w == 1 &&
                 v.out_w % kLanes == 0 && v.out_w >= 56;
  v.images_per_tile = 0;
  v.tiles_per_image = 1;
  v.image_stride = 0;
  if (taps == 1) {
    tile_pixels_of_batch(v, target_pixels, threads);
  } else if (v.whole_rows) {
    tile_whole_rows(v, most, threads);
  } else if (plane > target_pixels) {
    tile_parts_of_images(v, target_pixels, threads);
  } else {
    tile_whole_images(v, target_pixels, threads);
  }
  if (taps > 1) {
    v.max_pixels = v.images_per_tile > 1 ? plane : v.tile_pixels;
    // With several images the smaller tiles lie between the others: all count as even.
    v.n_even_tiles = v.batch == 1 ? plane / v.tile_pixels : v.n_tiles;
  }
  plan_direct_memory(v);
}
