// The transform by AMX: 32 filters x 32 pixels at once, as 2 x 2 tiles of sums. A tile of filters holds 16
// filters x 64 channels, a tile of input 16 quads x 16 pixels, straight from the map or the packed input.

constexpr int64_t kBlockSums = 4 * 256;  // int32 of 2 x 2 tiles
constexpr int64_t kStagingBytes = 2 * 4 * kBlockSums + 64;

INLINE bool uses_tiles(const Int8Conv& v) {
  return v.header->layout == static_cast<int64_t>(Int8Layout::kTiles) ||
         v.header->layout == static_cast<int64_t>(Int8Layout::kColumns);
}

// Quads of one tile.
INLINE int64_t count_tile_quads(const Int8Conv& v) {
  if (v.header->layout == static_cast<int64_t>(Int8Layout::kColumns)) return kTileQuads;
  const int64_t quads = v.parts[0].quads;
  return quads / ceil_div(quads, kTileQuads);
}

void begin(const Int8Conv& v) {
  if (!uses_tiles(v)) return;
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  const uint8_t quads = static_cast<uint8_t>(count_tile_quads(v));
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = i == 4 || i == 5 ? 4 * quads : 64;  // 0 to 3: sums, 4 and 5: filters
    config.rows[i] = i < 6 ? 16 : quads;                      // 6 and 7: input
  }
  asm volatile("" : : "r"(&config) : "memory");  // GCC thinks that the next line reads 8 bytes
  _tile_loadconfig(&config);
}

void end(const Int8Conv& v) {
  if (uses_tiles(v)) _tile_release();
}

// Sums of 2 x 2 tiles that have been stored and wait to be rounded.
struct PendingSums {
  const int32_t* sums = nullptr;
  int64_t rows;
  const int32_t *offsets, *shifts;
  int16_t* z;
};

INLINE void round_sums(const PendingSums& p, int64_t z_stride) {
  if (!p.sums) return;
  for (int64_t r = 0; r < p.rows; r++) {
    const int32_t* s = p.sums + r / 16 * 512 + r % 16 * 16;
    const I offset = splat(p.offsets[r]), shift = splat(p.shifts[r]);
    const I a = shift_right(add(load(s), offset), shift), b = shift_right(add(load(s + 256), offset), shift);
    store(p.z + r * z_stride, narrow(a, b));
  }
}

template <bool TWO>
INLINE void multiply_tiles(const int8_t* w, int64_t panel_bytes, const Input& in, int64_t at, int64_t tile_quads,
                           int32_t* sums, const PendingSums& pending, int64_t z_stride) {
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t step = tile_quads * in.stride, w_bytes = 4 * tile_quads, blocks = in.quads / tile_quads;
  for (int64_t t = 0; t < in.n_taps; t++) {
    const uint8_t* p = in.x + in.taps[t] + at;
    for (int64_t b = 0; b < blocks; b++, p += step, w += 16 * w_bytes) {
      _tile_loadd(6, p, in.stride);
      _tile_loadd(4, w, w_bytes);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, p + 64, in.stride);
      _tile_dpbsud(1, 4, 7);
      if (TWO) {
        _tile_loadd(5, w + panel_bytes, w_bytes);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
  }
  round_sums(pending, z_stride);  // meanwhile
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (TWO) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

void transform(const Int8Conv& v, const Int8Tile& t, int64_t part, int64_t first, int64_t last, bool pack, int16_t* z,
               uint8_t* scratch) {
  if (!uses_tiles(v)) return transform_panels(v, t, part, first, last, pack, z, scratch);
  const Int8Part& p = v.parts[part];
  Input in;
  find_input(v, t, p.first_quad, p.quads, pack, scratch, in);
  asm volatile("" ::: "memory");
  int32_t* staging = reinterpret_cast<int32_t*>(scratch + v.input_bytes + kStripBytes);
  const int64_t tile_quads = count_tile_quads(v), row0 = first_row(v, part);
  const int64_t panel_bytes = kTileRows * 4 * in.n_taps * in.quads;
  PendingSums pending;
  bool odd = false;
  for (int64_t n = first; n < last; n += 2) {
    const bool two = n + 1 < last;
    const int64_t row = n * kTileRows, rows = min(two ? 2 * kTileRows : kTileRows, p.rows - row);
    const int8_t* w = v.filters + p.filters_at + n * panel_bytes;
    for (int64_t i = 0; i < t.count; i += 32, odd = !odd) {
      int32_t* sums = staging + (odd ? kBlockSums : 0);
      if (two) {
        multiply_tiles<true>(w, panel_bytes, in, 4 * i, tile_quads, sums, pending, v.z_stride);
      } else {
        multiply_tiles<false>(w, panel_bytes, in, 4 * i, tile_quads, sums, pending, v.z_stride);
      }
      pending = {sums, rows, v.offsets + row0 + row, v.shifts + row0 + row,
                 z + (row - first * kTileRows) * v.z_stride + i};
    }
  }
  round_sums(pending, v.z_stride);
}
