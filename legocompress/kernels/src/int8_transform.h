// The transform: sums of products of one part's filters with the input, rounded to 16 bits.

// Sums of MR filters and NV vectors of pixels.
template <int MR, int NV>
INLINE void multiply_panel(const int8_t* w, const Input& in, int64_t at, const int32_t* offsets, const int32_t* shifts,
                           int16_t* z, int64_t z_stride) {
  I s[MR][NV];
  UNROLL for (int r = 0; r < MR; r++) {
    UNROLL for (int n = 0; n < NV; n++) s[r][n] = splat(offsets[r]);
  }
  for (int64_t t = 0; t < in.n_taps; t++) {
    const uint8_t* p = in.x + in.taps[t] + at;
    for (int64_t q = 0; q < in.quads; q++, p += in.stride) {
      I x[NV];
      UNROLL for (int n = 0; n < NV; n++) x[n] = load(p + n * 4 * kLanes);
#if LEGO_PAIRS
      I even[NV];
      UNROLL for (int n = 0; n < NV; n++) even[n] = low_words(x[n]), x[n] = high_words(x[n]);
      UNROLL for (int r = 0; r < MR; r++) {
        int32_t pair;
        __builtin_memcpy(&pair, w + r * 4, 4);
        const I b = splat(pair);
        UNROLL for (int n = 0; n < NV; n++) s[r][n] = dot_pairs(s[r][n], even[n], b);
      }
      w += MR * 4;
      UNROLL for (int r = 0; r < MR; r++) {
        int32_t pair;
        __builtin_memcpy(&pair, w + r * 4, 4);
        const I b = splat(pair);
        UNROLL for (int n = 0; n < NV; n++) s[r][n] = dot_pairs(s[r][n], x[n], b);
      }
#else
      UNROLL for (int r = 0; r < MR; r++) {
        int32_t quad;
        __builtin_memcpy(&quad, w + r * 4, 4);
        const I b = splat(quad);
        UNROLL for (int n = 0; n < NV; n++) s[r][n] = dot(s[r][n], x[n], b);
      }
#endif
      w += MR * 4;
    }
  }
  UNROLL for (int r = 0; r < MR; r++) {
    const I shift = splat(shifts[r]);
    UNROLL for (int n = 0; n < NV; n += 2) {
      store(z + r * z_stride + n * kLanes, (I)narrow(shift_right(s[r][n], shift), shift_right(s[r][n + 1], shift)));
    }
  }
}

template <int NV>
INLINE void multiply_panel_of(int64_t rows, const int8_t* w, const Input& in, int64_t at, const int32_t* offsets,
                              const int32_t* shifts, int16_t* z, int64_t z_stride) {
  switch (rows) {
    case 1: return multiply_panel<1, NV>(w, in, at, offsets, shifts, z, z_stride);
    case 2: return multiply_panel<2, NV>(w, in, at, offsets, shifts, z, z_stride);
    case 3: return multiply_panel<3, NV>(w, in, at, offsets, shifts, z, z_stride);
    case 4: return multiply_panel<4, NV>(w, in, at, offsets, shifts, z, z_stride);
    case 5: return multiply_panel<5, NV>(w, in, at, offsets, shifts, z, z_stride);
    default: return multiply_panel<6, NV>(w, in, at, offsets, shifts, z, z_stride);
  }
}

// The number of a part's first row of Z.
INLINE int64_t first_row(const Int8Conv& v, int64_t part) {
  int64_t row = 0;
  for (int64_t i = 0; i < part; i++) row += v.parts[i].rows;
  return row;
}

void transform_panels(const Int8Conv& v, const Int8Tile& t, int64_t part, int64_t first, int64_t last, bool pack,
                      int16_t* z, uint8_t* scratch) {
  const Int8Part& p = v.parts[part];
  Input in;
  find_input(v, t, p.first_quad, p.quads, pack, scratch, in);
  const int64_t panel_bytes = kPanelRows * in.n_taps * in.quads * (LEGO_PAIRS ? 8 : 4);
  const int64_t row0 = first_row(v, part);
  for (int64_t i = 0; i < t.count; i += LEGO_VECTORS * kLanes) {
    for (int64_t n = first; n < last; n++) {
      const int64_t row = n * kPanelRows, rows = min(kPanelRows, p.rows - row);
      const int8_t* w = v.filters + p.filters_at + n * panel_bytes;
      int16_t* to = z + (row - first * kPanelRows) * v.z_stride + i;
      const int32_t *offsets = v.offsets + row0 + row, *shifts = v.shifts + row0 + row;
      if (LEGO_VECTORS > 2 && t.count - i > kGranule) {
        multiply_panel_of<LEGO_VECTORS>(rows, w, in, 4 * i, offsets, shifts, to, v.z_stride);
      } else {
        multiply_panel_of<2>(rows, w, in, 4 * i, offsets, shifts, to, v.z_stride);
      }
    }
  }
}
