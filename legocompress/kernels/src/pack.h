// Packs input pixels for the inner loops: channels a fixed stride apart, the pixels of a channel side by side.

// Copies `count` floats. The last vector overlaps the one before it.
INLINE void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  if (count >= kLanes) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store(to + count - kLanes, load(from + count - kLanes));
    return;
  }
  if (count >= 4) {
    store4(to, load4(from));
    for (i = 4; i + 4 <= count; i += 4) store4(to + i, load4(from + i));
    store4(to + count - 4, load4(from + count - 4));
    return;
  }
  for (; i < count; i++) {
    to[i] = from[i];
    asm volatile("");
  }
}

// Zeroes `count` floats, mostly none or a few. The empty statement keeps the compiler from calling memset.
INLINE void zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    to[i] = 0;
    asm volatile("");
  }
}

// How many channels ahead input is prefetched. Planes lie pages apart, where the hardware does not prefetch.
constexpr int64_t kPrefetchChannels = 4;
INLINE void prefetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

// Which of the `count` outputs of a row read an input pixel inside the image: [low, high). Output i reads
// pixel start + i * step of a row of `width` pixels.
struct Span {
  int64_t start, step, count, low, high;
  INLINE Span(int64_t start_, int64_t step_, int64_t count_, int64_t width)
      : start(start_), step(step_), count(count_) {
    low = start < 0 ? min(count, ceil_div(-start, step)) : 0;
    high = max(low, min(count, width > start ? ceil_div(width - start, step) : 0));
  }
};

// to[i] = from[start + i * step], or 0 if that is outside the image.
INLINE void copy_row(float* to, const float* from, const Span& s) {
  zero(to, s.low);
  const float* p = from + s.start;
  if (s.step == 1) {
    copy(to + s.low, p + s.low, s.high - s.low);
  } else if (s.step == 2) {
    int64_t i = s.low;
    // The second load reads one float past the last pixel that is used.
    for (; i + kLanes < s.high; i += kLanes) {
      store(to + i, even_lanes(load(p + 2 * i), load(p + 2 * i + kLanes)));
    }
    if (s.high - s.low > kLanes) {  // a vector that ends at the last pixel
      const int64_t j = s.high - kLanes;
      const float* last = p + 2 * j - 1;
      store(to + j, odd_lanes(load(last), load(last + kLanes)));
    } else {
      for (; i < s.high; i++) to[i] = p[2 * i];
    }
  } else {
    for (int64_t i = s.low; i < s.high; i++) to[i] = p[s.step * i];
  }
  zero(to + s.high, s.count - s.high);
}

// copy_row for a run of pixels that spans rows, where input and output rows are equally long:
// to[i] = from[start + i + shift], or 0 if that is outside the image or in another row than start + i.
INLINE void copy_run(float* to, const float* from, int64_t start, int64_t shift, int64_t count,
                     int64_t width, int64_t plane) {
  // `start` does not include the shift, so that start + i gives the row and the column of pixel i.
  const int64_t low = min(count, max(0, max(-start, -start - shift)));
  const int64_t high = max(low, min(count, min(plane - start, plane - start - shift)));
  zero(to, low);
  copy(to + low, from + start + shift + low, high - low);
  zero(to + high, count - high);
  if (shift == 0) return;
  const int64_t column = ((start + low) % width + width) % width;
  const int64_t first = shift < 0 ? 0 : width - shift, n = shift < 0 ? -shift : shift;
  for (int64_t x = max(0, first); x < max(0, first) + min(n, width); x++) {
    for (int64_t i = low + (x - column + width) % width; i < high; i += width) to[i] = 0;
  }
}

// copy_row with step 2 for several rows that are `pitch` floats apart. A vector may write past its row, which
// the next row overwrites. Reads nothing at or after `end`, and returns how many rows it could copy.
INLINE int64_t copy_alternate(float* to, const float* from, int64_t pitch, int64_t rows,
                              const Span& s, const float* end) {
  const int64_t n = s.high - s.low;
  const float* p = from + s.start + 2 * s.low;
  int64_t r = 0;
  for (; r < rows && n > 0 && end - p >= 2 * max(n, kLanes); r++, to += s.count, p += pitch) {
    for (int64_t i = 0; i < s.low; i++) to[i] = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      if (n - i < kLanes) i = max(0, n - kLanes);
      store(to + s.low + i, even_lanes(load(p + 2 * i), load(p + 2 * i + kLanes)));
    }
    for (int64_t i = s.high; i < s.count; i++) to[i] = 0;
  }
  return r;
}

// to[c * stride + i] = from[i * step + c], for pixels of a channels-last map.
INLINE void gather_pixels(float* to, int64_t stride, const float* from, int64_t step, int64_t count,
                          int64_t channels) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    const float* p = from + i * step;
    int64_t c = 0;
    for (; c + kBlock <= channels; c += kBlock) {
      B r[kBlock];
      UNROLL for (int64_t u = 0; u < kBlock; u++) r[u] = load_block(p + u * step + c);
      transpose(r);
      UNROLL for (int64_t u = 0; u < kBlock; u++) store_block(to + (c + u) * stride + i, r[u]);
    }
    for (; c < channels; c++) {
      UNROLL for (int64_t u = 0; u < kBlock; u++) to[c * stride + i + u] = p[u * step + c];
    }
  }
  for (; i < count; i++) {
    for (int64_t c = 0; c < channels; c++) to[c * stride + i] = from[i * step + c];
  }
}

// Packs one row of an image of either memory format, of `channels` channels from `channel` on. A row
// outside the image gives zeros.
INLINE void pack_row(const Conv& v, float* to, int64_t stride, int64_t image, int64_t channel,
                     int64_t channels, int64_t row, const Span& s) {
  if (row < 0 || row >= v.height) {
    for (int64_t c = 0; c < channels; c++) zero(to + c * stride, s.count);
    return;
  }
  const int64_t c_in = v.header->channels;
  if (!v.channels_last) {
    const int64_t plane = v.height * v.width;
    const float* from = v.x + ((image * c_in + channel) * v.height + row) * v.width;
    for (int64_t c = 0; c < channels; c++) copy_row(to + c * stride, from + c * plane, s);
    return;
  }
  for (int64_t c = 0; c < channels; c++) {
    zero(to + c * stride, s.low);
    zero(to + c * stride + s.high, s.count - s.high);
  }
  if (s.high > s.low) {
    const int64_t pixel = (image * v.height + row) * v.width + s.start + s.low * s.step;
    gather_pixels(to + s.low, stride, v.x + pixel * c_in + channel, s.step * c_in, s.high - s.low,
                  channels);
  }
}

// Packs the input of the output pixels [first, first + count) of one image, for the kernel column `tap` and
// the row phase `phase` (row modulo the row stride): to[i] is the input of output pixel first + i.
INLINE void pack_flat(const Conv& v, float* to, int64_t stride, int64_t image, int64_t channel,
                      int64_t channels, int64_t first, int64_t count, int64_t phase, int64_t tap) {
  const int64_t start = tap * v.dilation_w - v.pad_w;
  if (!v.channels_last && v.stride_h == 1 && v.stride_w == 1 && v.out_w == v.width) {
    const int64_t plane = v.height * v.width;
    const float* from = v.x + (image * v.header->channels + channel) * plane;
    for (int64_t c = 0; c < channels; c++) {
      if (tap == 0 && c + kPrefetchChannels < channels) {
        const int64_t low = max(0, first - v.pad_h * v.width);
        prefetch(from + (c + kPrefetchChannels) * plane + low, min(count, plane - low));
      }
      copy_run(to + c * stride, from + c * plane, first - v.pad_h * v.width, start, count, v.width,
               plane);
    }
    return;
  }
  // The run is the end of one row (head), whole rows, and the start of another row (tail).
  const int64_t row0 = first / v.out_w, column = first % v.out_w;
  const int64_t head = min(v.out_w - column, count);
  const int64_t whole = (count - head) / v.out_w, tail = (count - head) % v.out_w;
  const Span of_head(start + column * v.stride_w, v.stride_w, head, v.width);
  const Span of_whole(start, v.stride_w, v.out_w, v.width);
  const Span of_tail(start, v.stride_w, tail, v.width);
  const int64_t row = row0 * v.stride_h + phase - v.pad_h;
  const Span rows(row + v.stride_h, v.stride_h, whole, v.height);  // of the whole ones
  const int64_t plane = v.height * v.width;
  const float* from = v.x + (image * v.header->channels + channel) * plane;
  const float* end = v.x + v.batch * v.header->channels * plane;
  // Channel by channel if a channel is a plane, so that its rows are read in order.
  const int64_t at_once = v.channels_last ? channels : 1;
  for (int64_t c = 0; c < channels; c += at_once) {
    float* p = to + c * stride;
    if (!v.channels_last && tap == 0 && c + kPrefetchChannels < channels) {
      const int64_t low = max(0, row0 * v.stride_h - v.pad_h);
      prefetch(from + (c + kPrefetchChannels) * plane + low * v.width,
               min(v.height - low, (whole + 2) * v.stride_h) * v.width);
    }
    pack_row(v, p, stride, image, channel + c, at_once, row, of_head);
    p += head;
    for (int64_t r = 0; r < whole; r++) {
      if (r == rows.low && v.stride_w == 2 && !v.channels_last) {
        r += copy_alternate(p + r * v.out_w, from + c * plane + (rows.start + r * rows.step) * v.width,
                            rows.step * v.width, rows.high - r, of_whole, end);
        if (r == whole) break;
      }
      pack_row(v, p + r * v.out_w, stride, image, channel + c, at_once, rows.start + r * rows.step,
               of_whole);
    }
    p += whole * v.out_w;
    if (tail) {
      pack_row(v, p, stride, image, channel + c, at_once, rows.start + whole * rows.step, of_tail);
    }
  }
}
