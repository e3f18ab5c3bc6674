// The transform: sums of products of one part's filters with the input, rounded to 16 bits.

// Sums of MR filters and NV vectors of pixels. (Inlined, GCC would keep the sums in memory.)
template <int MR, int NV>
__attribute__((noinline)) void multiply_panel(const int8_t* w, const Input& in, int64_t at, const int32_t* offsets, const int32_t* shifts,
                           int16_t* z, int64_t z_stride) {
  I s[MR][NV];
  repeat<MR>([&](auto r) INLINE_LAMBDA {
    const I offset = splat(offsets[r]);
    repeat<NV>([&](auto n) INLINE_LAMBDA { s[r][n] = offset; });
  });
  // Adds the products with the weights of each filter that lie side by side.
  const auto add_products = [&](const I* x, auto multiply) INLINE_LAMBDA {
    repeat<MR>([&](auto r) INLINE_LAMBDA {
      int32_t quad;
      __builtin_memcpy(&quad, w + r * 4, 4);
      const I b = splat(quad);
      repeat<NV>([&](auto n) INLINE_LAMBDA { s[r][n] = multiply(s[r][n], x[n], b); });
    });
    w += MR * 4;
  };
  for (int64_t t = 0; t < in.n_taps; t++) {
    const uint8_t* p = in.x + in.taps[t] + at;
    for (int64_t q = 0; q < in.quads; q++, p += in.stride) {
      I x[NV];
      repeat<NV>([&](auto n) INLINE_LAMBDA { x[n] = load(p + n * 4 * kLanes); });
#if LEGO_PAIRS
      I even[NV];
      repeat<NV>([&](auto n) INLINE_LAMBDA { even[n] = low_words(x[n]), x[n] = high_words(x[n]); });
      add_products(even, dot_pairs);
      add_products(x, dot_pairs);
#else
      add_products(x, dot);
#endif
    }
  }
  repeat<MR>([&](auto r) INLINE_LAMBDA {
    const I shift = splat(shifts[r]);
    repeat<NV / 2>([&](auto n) INLINE_LAMBDA {
      const H h = narrow(shift_right(s[r][2 * n], shift), shift_right(s[r][2 * n + 1], shift));
      store(z + r * z_stride + n * kGranule, (I)h);
    });
  });
}

typedef void (*MultiplyPanel)(const int8_t*, const Input&, int64_t, const int32_t*, const int32_t*, int16_t*, int64_t);
#define LEGO_ROW(NV)                                                               \
  {multiply_panel<1, NV>, multiply_panel<2, NV>, multiply_panel<3, NV>, \
   multiply_panel<4, NV>, multiply_panel<5, NV>, multiply_panel<6, NV>}
// For a wide and a narrow register tile, by the number of filters - 1.
const MultiplyPanel kMultiplyPanel[2][kPanelRows] = {LEGO_ROW(LEGO_VECTORS), LEGO_ROW(2)};

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
      const bool wide = t.count - i > kGranule;
      kMultiplyPanel[!wide][rows - 1](w, in, 4 * i, offsets, shifts, to, v.z_stride);
    }
  }
}
