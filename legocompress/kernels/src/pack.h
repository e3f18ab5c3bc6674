// Input pixels to where the inner loops want them: channels one stride apart, pixels side by side.

// to[i] = from[start + i * step], zero where that is outside of [0, width).
INLINE void copy_row(float* to, const float* from, int64_t start, int64_t step, int64_t count,
                     int64_t width) {
  const int64_t low = start < 0 ? least(count, ceil_div(-start, step)) : 0;
  const int64_t high = most(low, least(count, width > start ? ceil_div(width - start, step) : 0));
  int64_t i = 0;
  for (; i < low; i++) to[i] = 0;
  const float* p = from + start;
  if (step == 1) {
    for (; i + kLanes <= high; i += kLanes) store(to + i, load(p + i));
    for (; i < high; i++) to[i] = p[i];
  } else if (step == 2) {
    // The last float that the second load touches lies one past the last pixel used.
    for (; i + kLanes < high; i += kLanes) {
      store(to + i, even_lanes(load(p + 2 * i), load(p + 2 * i + kLanes)));
    }
    for (; i < high; i++) to[i] = p[2 * i];
  } else {
    for (; i < high; i++) to[i] = p[step * i];
  }
  for (; i < count; i++) to[i] = 0;
}

// to[c * stride + i] = from[i * step + c]: pixels of a channels-last map.
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

// A row of pixels, of `channels` channels from `channel` on, of either format. `row` outside of
// the image gives zeros.
INLINE void pack_row(const Conv& v, float* to, int64_t stride, int64_t image, int64_t channel,
                     int64_t channels, int64_t row, int64_t start, int64_t step, int64_t count) {
  if (row < 0 || row >= v.height) {
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t i = 0; i < count; i++) to[c * stride + i] = 0;
    }
    return;
  }
  const int64_t c_in = v.head->channels;
  if (!v.channels_last) {
    const int64_t plane = v.height * v.width;
    const float* from = v.x + ((image * c_in + channel) * v.height + row) * v.width;
    for (int64_t c = 0; c < channels; c++) {
      copy_row(to + c * stride, from + c * plane, start, step, count, v.width);
    }
    return;
  }
  const int64_t low = start < 0 ? least(count, ceil_div(-start, step)) : 0;
  const int64_t high = most(low, least(count, v.width > start ? ceil_div(v.width - start, step) : 0));
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t i = 0; i < low; i++) to[c * stride + i] = 0;
    for (int64_t i = high; i < count; i++) to[c * stride + i] = 0;
  }
  if (high > low) {
    const int64_t pixel = (image * v.height + row) * v.width + start + low * step;
    gather_pixels(to + low, stride, v.x + pixel * c_in + channel, step * c_in, high - low, channels);
  }
}

// Output pixels [first, first + count) of one image, the lines of `tap` (kernel column) and `phase`
// (row modulo the row stride): to[i] belongs to the output pixel first + i.
INLINE void pack_flat(const Conv& v, float* to, int64_t stride, int64_t image, int64_t channel,
                      int64_t channels, int64_t first, int64_t count, int64_t phase, int64_t tap) {
  const int64_t start = tap * v.dilation_w - v.pad_w;
  // Channel by channel where a channel is a plane, so that its rows are read in order.
  const int64_t at_once = v.channels_last ? channels : 1;
  for (int64_t c = 0; c < channels; c += at_once) {
    int64_t row = first / v.out_w, column = first % v.out_w;
    for (int64_t done = 0; done < count; row++, column = 0) {
      const int64_t n = least(v.out_w - column, count - done);
      pack_row(v, to + c * stride + done, stride, image, channel + c, at_once,
               row * v.stride_h + phase - v.pad_h, start + column * v.stride_w, v.stride_w, n);
      done += n;
    }
  }
}

// The same for 1 x 1, stride 1, no padding, in register tiles: to[(i / kPixels)][c][i % kPixels].
INLINE void pack_tiles(const Conv& v, float* to, int64_t offset, int64_t image, int64_t channel,
                       int64_t channels, int64_t first, int64_t count) {
  const int64_t c_in = v.head->channels, plane = v.height * v.width;
  const int64_t tile = channels * kPixels;
  if (v.channels_last) {
    for (int64_t i = 0; i < count;) {
      const int64_t at = offset + i, lane = at % kPixels;
      const int64_t n = least(kPixels - lane, count - i);
      gather_pixels(to + at / kPixels * tile + lane, kPixels,
                    v.x + (image * plane + first + i) * c_in + channel, c_in, n, channels);
      i += n;
    }
    return;
  }
  for (int64_t c = 0; c < channels; c++) {
    const float* from = v.x + (image * c_in + channel + c) * plane + first;
    if (c + 4 < channels) {
      for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + 4 * plane + i);
    }
    for (int64_t i = 0; i < count;) {
      const int64_t at = offset + i, lane = at % kPixels;
      const int64_t n = least(kPixels - lane, count - i);
      float* p = to + at / kPixels * tile + c * kPixels + lane;
      if (n == kPixels) {
        UNROLL for (int64_t u = 0; u < kPixels; u += kLanes) store(p + u, load(from + i + u));
      } else {
        for (int64_t u = 0; u < n; u++) p[u] = from[i + u];
      }
      i += n;
    }
  }
}
