// The merge: sums of rows of Z, plus bias and residual, shifted, clamped and looked up.

constexpr int64_t kStripPixels = 64;  // at most, of the output that is computed together

// What is applied to the 16-bit sums of every output.
struct Finish {
  H low, high;
  int64_t shift;
  INLINE explicit Finish(int64_t low_, int64_t high_, int64_t shift_)
      : low(splat16(static_cast<int16_t>(low_))), high(splat16(static_cast<int16_t>(high_))), shift(shift_) {}
  INLINE H operator()(H y) const { return clamp16(shift_right16(y, shift), low, high); }
};

// Looks up bytes in place.
INLINE void look_up_bytes(uint8_t* p, int64_t bytes, const uint8_t* table) {
#if LEGO_VBMI
  const I t0 = load(table), t1 = load(table + 64), t2 = load(table + 128), t3 = load(table + 192);
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    const I at = load(p + i);
    const I low = _mm512_permutex2var_epi8(t0, at, t1), high = _mm512_permutex2var_epi8(t2, at, t3);
    store(p + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), low, high));
  }
  for (; i < bytes; i++) p[i] = table[p[i]];
#else
  for (int64_t i = 0; i < bytes; i++) p[i] = table[p[i]];
#endif
}

// Sums NV granules of pixels of the four channels of one quad, from pixel i of the tile on.
template <int NV>
INLINE void merge_quad(const Int8Conv& v, int64_t quad, const int16_t* z, int64_t z_row, const uint8_t* residual,
                       const Finish& finish, uint8_t* y, int64_t bytes) {
  const Int8Header& h = *v.header;
  const int32_t* rows = v.rows + quad * h.n_sum * 4;
  const int32_t* multipliers = v.multipliers + quad * h.n_sum * 4;
  H s[NV][4];
  UNROLL for (int u = 0; u < 4; u++) {
    UNROLL for (int n = 0; n < NV; n++) s[n][u] = (H)splat(v.bias[quad * 4 + u]);
  }
  for (int64_t t = 0; t < h.n_sum; t++, rows += 4, multipliers += 4) {
    UNROLL for (int u = 0; u < 4; u++) {
      const H m = (H)splat(multipliers[u]);
      const int16_t* p = z + (rows[u] - z_row) * v.z_stride;
      UNROLL for (int n = 0; n < NV; n++) {
        s[n][u] = add_saturated(s[n][u], multiply_high(m, (H)load(p + n * kGranule)));
      }
    }
  }
  if (residual) {
    const H m = splat16(static_cast<int16_t>(h.residual_multiplier));
    const H zero = splat16(static_cast<int16_t>(h.residual_zero << 7));
    UNROLL for (int n = 0; n < NV; n++) {
      H r[4];
      const uint8_t* p = residual + n * 4 * kGranule;
      unzip(load(p), load(p + 4 * kLanes), r);
      UNROLL for (int u = 0; u < 4; u++) s[n][u] = add_saturated(s[n][u], multiply_high(m, subtract16(r[u], zero)));
    }
  }
  UNROLL for (int n = 0; n < NV; n++) {
    UNROLL for (int u = 0; u < 4; u++) s[n][u] = finish(s[n][u]);
    I a, b;
    zip(s[n], a, b);
    // Vectors of which no pixel is in the tile belong to another one.
    if (n * 4 * kGranule < bytes) store(y + n * 4 * kGranule, a);
    if (n * 4 * kGranule + 4 * kLanes < bytes) store(y + n * 4 * kGranule + 4 * kLanes, b);
  }
}

// Calls f(number, count, row, column) for the real pixels of [first, first + count), row by row.
template <class F>
INLINE void for_each_row(const Int8Conv& v, int64_t first, int64_t count, F f) {
  const int64_t end = min(first + count, v.last);
  for (int64_t i = max(first, 0); i < end;) {
    const int64_t row = i / v.pitch, column = i % v.pitch;
    const int64_t n = min(min(v.out.width - column, end - i), INT32_MAX);
    if (n > 0) f(i, n, row, column);
    i += v.pitch - column;
  }
}

// Writes the border pixels of the quads [first, last) that belong to a tile.
INLINE void write_border(const Int8Conv& v, const Int8Tile& t, int64_t first, int64_t last) {
  const Int8Geometry& g = v.out;
  const int64_t b = g.border;
  if (!b) return;
  const int32_t zero = static_cast<int32_t>(v.out_zero * 0x01010101);
  const int64_t end = t.first + t.count;
  for (int64_t q = first; q < last; q++) {
    uint8_t* plane = v.y + t.image * g.image_bytes + q * g.plane * 4;
    if (t.first == v.first) fill_pixels(plane, g.first, zero);
    for (int64_t row = max(0, t.first) / v.pitch; row < g.height - 1; row++) {
      const int64_t at = row * v.pitch + g.width;  // the first number after the row
      if (at - 1 >= end) break;
      // A flat tile writes whatever is between its rows, so it repairs what it wrote. Any other one
      // writes the border after each row that it finishes.
      int64_t low = 0, high = b;
      if (v.flat_store) {
        low = max(0, t.first - at), high = min(b, end - at);
      } else if (at - 1 < t.first) {
        continue;
      }
      fill_pixels(plane + 4 * (g.first + row * g.pitch + g.width + low), max(0, high - low), zero);
    }
    if (end >= v.last) {
      const int64_t at = g.first + (g.height - 1) * g.pitch + g.width;
      fill_pixels(plane + 4 * at, g.plane - at, zero);
    }
  }
}

// Pixels of the output that a tile may write in whole vectors.
INLINE int64_t end_of_stores(const Int8Conv& v, const Int8Tile& t) {
  return min(t.first + t.count, v.first + round_up(v.last - v.first, 16)) - t.first;
}

// Where a strip of pixels of a quad is computed if its rows are not `pitch` apart in the map.
struct Strips {
  uint8_t *y, *residual;
  INLINE explicit Strips(const Int8Conv& v, uint8_t* scratch) {
    y = scratch + v.input_bytes;
    residual = y + 8 * kStripPixels;
  }
};
constexpr int64_t kStripBytes = 16 * kStripPixels;

// Runs `compute(y, residual, bytes)` for one strip of a quad, on the map itself or on copies.
template <class F>
INLINE void run_strip(const Int8Conv& v, const Int8Tile& t, int64_t quad, int64_t i, int64_t pixels,
                      const Strips& strips, F compute) {
  const Int8Geometry& g = v.out;
  const int64_t at = t.image * g.image_bytes + 4 * (quad * g.plane + g.first);
  const int64_t count = min(pixels, t.count - i), number = t.first + i;
  if (v.flat_store) {
    uint8_t* y = v.y + at + 4 * number;
    const int64_t bytes = 4 * min(pixels, end_of_stores(v, t) - i);
    compute(y, v.residual ? v.residual + at + 4 * number : nullptr, bytes);
    if (v.table) look_up_bytes(y, bytes, v.table);
    return;
  }
  if (v.residual) {
    for_each_row(v, number, count, [&](int64_t from, int64_t n, int64_t row, int64_t column) {
      __builtin_memcpy(strips.residual + 4 * (from - number), v.residual + at + 4 * (row * g.pitch + column),
                       static_cast<std::size_t>(4 * n));
    });
  }
  compute(strips.y, v.residual ? strips.residual : nullptr, 4 * pixels);
  if (v.table) look_up_bytes(strips.y, 4 * pixels, v.table);
  for_each_row(v, number, count, [&](int64_t from, int64_t n, int64_t row, int64_t column) {
    __builtin_memcpy(v.y + at + 4 * (row * g.pitch + column), strips.y + 4 * (from - number),
                     static_cast<std::size_t>(4 * n));
  });
}

void merge_quads(const Int8Conv& v, const Int8Tile& t, int64_t first, int64_t last, const int16_t* z, int64_t z_row,
                 uint8_t* scratch) {
  const Int8Header& h = *v.header;
  const Finish finish(h.low, h.high, h.out_shift);
  const Strips strips(v, scratch);
  for (int64_t i = 0; i < t.count;) {
    const bool wide = t.count - i > kGranule;
    for (int64_t quad = first; quad < last; quad++) {
      run_strip(v, t, quad, i, wide ? 2 * kGranule : kGranule, strips,
                [&](uint8_t* y, const uint8_t* residual, int64_t bytes) {
                  if (wide) {
                    merge_quad<2>(v, quad, z + i, z_row, residual, finish, y, bytes);
                  } else {
                    merge_quad<1>(v, quad, z + i, z_row, residual, finish, y, bytes);
                  }
                });
    }
    i += wide ? 2 * kGranule : kGranule;
  }
  write_border(v, t, first, last);
}
