// Where the kernels read the input of a tile: in the map itself, or packed in the scratch memory.

// The input of one part: `n_taps` times `quads` rows of pixels.
struct Input {
  const uint8_t* x;  // of the first tap's zero shift
  int64_t stride;    // bytes from one quad to the next
  int64_t quads, n_taps;
  int64_t taps[kMaxInt8Taps];  // bytes
};

// One axis of a strided kernel: which of the distinct phases (tap modulo stride) a tap belongs to.
struct Phases {
  int64_t count = 0, max_shift = 0;
  int64_t phase[kMaxInt8Taps];  // of each distinct phase, in pixels
  int64_t of_tap[kMaxInt8Taps], shift[kMaxInt8Taps];
  INLINE Phases(int64_t kernel, int64_t dilation, int64_t stride) {
    for (int64_t k = 0; k < kernel; k++) {
      const int64_t p = k * dilation % stride;
      int64_t i = 0;
      while (i < count && phase[i] != p) i++;
      if (i == count) phase[count++] = p;
      of_tap[k] = i;
      shift[k] = k * dilation / stride;
      max_shift = max(max_shift, shift[k]);
    }
  }
};

INLINE void fill_pixels(uint8_t* to, int64_t count, int32_t value) {
  int32_t* p = reinterpret_cast<int32_t*>(to);
  for (int64_t i = 0; i < count; i++) {
    p[i] = value;
    asm volatile("");
  }
}

// Copies pixels of a quad; may write a vector past them.
INLINE void copy_pixels(uint8_t* to, const uint8_t* from, int64_t step, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + 4 * i, load(from + 4 * i));
  } else if (step == 2) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const uint8_t* p = from + 8 * i;
      store(to + 4 * i, even_pixels(load(p), load(p + 4 * kLanes)));
    }
  } else {
    for (int64_t i = 0; i < count; i++) __builtin_memcpy(to + 4 * i, from + 4 * step * i, 4);
  }
}

// Packs the input of the pixels [first, first + count) at one tap: to[i] is the input pixel at row
// row_i * stride_h + dy and column column_i * stride_w + dx, or the zero point outside of the image.
INLINE void pack_tap(const Int8Conv& v, uint8_t* to, const uint8_t* plane, int64_t first, int64_t count, int64_t dy,
                     int64_t dx) {
  const Int8Geometry& g = v.in;
  const Int8Header& h = *v.header;
  const int64_t b = g.border, last_row = v.out.height - 1;
  if (h.stride_h == 1 && h.stride_w == 1 && v.pitch == g.pitch && dy >= -b && dx >= -b &&
      last_row + dy < g.height + b && v.out.width + dx <= g.width + b) {
    copy_pixels(to, plane + 4 * (g.first + first + dy * g.pitch + dx), 1, count);
    return;
  }
  const int32_t zero = static_cast<int32_t>(h.x_zero * 0x01010101);
  for (int64_t i = max(0, -first); i < count;) {
    const int64_t row = (first + i) / v.pitch, column = (first + i) % v.pitch;
    const int64_t n = min(v.pitch - column, count - i);
    const int64_t y = row * h.stride_h + dy, x = column * h.stride_w + dx;
    int64_t low = n, high = n;  // of these pixels, [low, high) are in the image or its border
    if (y >= -b && y < g.height + b) {
      low = x < -b ? min(n, ceil_div(-b - x, h.stride_w)) : 0;
      high = x < g.width + b ? max(low, min(n, ceil_div(g.width + b - x, h.stride_w))) : low;
    }
    fill_pixels(to + 4 * i, low, zero);
    if (high > low) {
      const int64_t at = g.first + y * g.pitch + x + low * h.stride_w;
      copy_pixels(to + 4 * (i + low), plane + 4 * at, h.stride_w, high - low);
    }
    fill_pixels(to + 4 * (i + high), n - high, zero);
    i += n;
  }
}

// Bytes of the packed input of one part of a tile.
INLINE int64_t count_input_bytes(const Int8Conv& v, int64_t quads) {
  const Int8Header& h = *v.header;
  const int64_t taps = h.kernel_h * h.kernel_w;
  const int64_t pixels = v.tile_pixels + 64;
  if (h.layout == static_cast<int64_t>(Int8Layout::kColumns)) {
    return round_up(taps * quads, kTileQuads) * round_to_odd_lines(4 * pixels) + 256;
  }
  if (v.flat_read) return 0;
  const Phases rows(h.kernel_h, h.dilation_h, h.stride_h), columns(h.kernel_w, h.dilation_w, h.stride_w);
  const int64_t shift = rows.max_shift * v.pitch + columns.max_shift;
  return quads * rows.count * columns.count * round_to_odd_lines(4 * (pixels + shift)) + 256;
}

// Finds the input of `quads` quads from `first_quad` on, and packs it if `pack`.
INLINE void find_input(const Int8Conv& v, const Int8Tile& t, int64_t first_quad, int64_t quads, bool pack,
                       uint8_t* scratch, Input& in) {
  const Int8Header& h = *v.header;
  const Int8Geometry& g = v.in;
  const uint8_t* planes = v.x + t.image * g.image_bytes + first_quad * g.plane * 4;
  const int64_t kh = h.kernel_h, kw = h.kernel_w, pixels = v.tile_pixels + 64;
  const int64_t count = round_up(t.count, 64);
  in.quads = quads;
  if (h.layout == static_cast<int64_t>(Int8Layout::kColumns)) {
    in.x = scratch;
    in.stride = round_to_odd_lines(4 * pixels);
    in.quads = round_up(kh * kw * quads, kTileQuads);
    in.n_taps = 1;
    in.taps[0] = 0;
    if (!pack) return;
    for (int64_t k = 0; k < kh * kw; k++) {
      const int64_t dy = k / kw * h.dilation_h - h.pad_top, dx = k % kw * h.dilation_w - h.pad_left;
      for (int64_t q = 0; q < quads; q++) {
        pack_tap(v, scratch + (k * quads + q) * in.stride, planes + q * g.plane * 4, t.first, count, dy, dx);
      }
    }
    return;
  }
  in.n_taps = kh * kw;
  if (v.flat_read) {
    in.x = planes + 4 * (g.first + t.first);
    in.stride = 4 * g.plane;
    for (int64_t k = 0; k < kh * kw; k++) {
      in.taps[k] = 4 * ((k / kw * h.dilation_h - h.pad_top) * g.pitch + k % kw * h.dilation_w - h.pad_left);
    }
    return;
  }
  const Phases rows(kh, h.dilation_h, h.stride_h), columns(kw, h.dilation_w, h.stride_w);
  const int64_t shift = rows.max_shift * v.pitch + columns.max_shift;
  const int64_t phase_bytes = round_to_odd_lines(4 * (pixels + shift));
  in.x = scratch;
  in.stride = rows.count * columns.count * phase_bytes;
  for (int64_t k = 0; k < kh * kw; k++) {
    in.taps[k] = (rows.of_tap[k / kw] * columns.count + columns.of_tap[k % kw]) * phase_bytes +
                 4 * (rows.shift[k / kw] * v.pitch + columns.shift[k % kw]);
  }
  if (!pack) return;
  for (int64_t q = 0; q < quads; q++) {
    for (int64_t i = 0; i < rows.count; i++) {
      for (int64_t j = 0; j < columns.count; j++) {
        pack_tap(v, scratch + q * in.stride + (i * columns.count + j) * phase_bytes, planes + q * g.plane * 4, t.first,
                 count + shift, rows.phase[i] - h.pad_top, columns.phase[j] - h.pad_left);
      }
    }
  }
}
