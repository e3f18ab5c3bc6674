// Layers that compute each pixel on its own, pooling, conversions from and to floats, and linear layers.

// Writes the border of one plane.
INLINE void write_plane_border(uint8_t* plane, const Int8Geometry& g, int64_t zero_point) {
  if (!g.border) return;
  const int32_t zero = static_cast<int32_t>(zero_point * 0x01010101);
  fill_pixels(plane, g.first, zero);
  for (int64_t row = 0; row < g.height - 1; row++) {
    fill_pixels(plane + 4 * (g.first + row * g.pitch + g.width), g.border, zero);
  }
  const int64_t at = g.first + (g.height - 1) * g.pitch + g.width;
  fill_pixels(plane + 4 * at, g.plane - at, zero);
}

void add_planes(const Int8Elementwise& e, int64_t first, int64_t last) {
  const Finish finish(e.low, e.high, e.out_shift);
  const H a_zero = splat16(static_cast<int16_t>(e.a_zero << 7)), b_zero = splat16(static_cast<int16_t>(e.b_zero << 7));
  const H a_multiplier = splat16(static_cast<int16_t>(e.a_multiplier));
  const H b_multiplier = splat16(static_cast<int16_t>(e.b_multiplier));
  const H bias = splat16(static_cast<int16_t>(e.bias));
  const int64_t bytes = 4 * e.at.plane;
  for (int64_t plane = first; plane < last; plane++) {
    const uint8_t *a = e.a + plane * bytes, *b = e.b + plane * bytes;
    uint8_t* y = e.y + plane * bytes;
    for (int64_t i = 0; i < bytes; i += 4 * kLanes) {
      H p[2], q[2], s[2];
      widen_bytes(load(a + i), p[0], p[1]);
      widen_bytes(load(b + i), q[0], q[1]);
      UNROLL for (int u = 0; u < 2; u++) {
        s[u] = add_saturated(bias, multiply_high(a_multiplier, subtract16(p[u], a_zero)));
        s[u] = finish(add_saturated(s[u], multiply_high(b_multiplier, subtract16(q[u], b_zero))));
      }
      store(y + i, narrow_bytes(s[0], s[1]));
    }
    write_plane_border(y, e.at, e.out_zero);
  }
}

void scale_planes(const Int8Elementwise& e, int64_t first, int64_t last) {
  const Finish finish(0, 255, e.out_shift);
  const H a_zero = splat16(static_cast<int16_t>(e.a_zero << 7)), bias = splat16(static_cast<int16_t>(e.bias));
  const int64_t bytes = 4 * e.at.plane;
  const Int8Geometry gates = locate_pixels(e.channels, 1, 1, 0);
  for (int64_t plane = first; plane < last; plane++) {
    const uint8_t *a = e.a + plane * bytes, *gate = e.b + 4 * plane * gates.plane;
    uint8_t* y = e.y + plane * bytes;
    int16_t factors[8];
    for (int u = 0; u < 4; u++) {
      const int64_t factor = ((gate[u] - e.b_zero) * e.b_multiplier + 128) >> 8;
      factors[u] = factors[4 + u] = static_cast<int16_t>(max(-32768, min(32767, factor)));
    }
    const H m = (H)repeat16(factors);
    for (int64_t i = 0; i < bytes; i += 4 * kLanes) {
      H p[2];
      widen_bytes(load(a + i), p[0], p[1]);
      UNROLL for (int u = 0; u < 2; u++) {
        p[u] = finish(add_saturated(bias, multiply_high(m, subtract16(p[u], a_zero))));
      }
      store(y + i, narrow_bytes(p[0], p[1]));
    }
    write_plane_border(y, e.at, e.out_zero);
  }
}

void look_up_planes(const Int8Elementwise& e, int64_t first, int64_t last) {
  const int64_t bytes = 4 * e.at.plane;
  for (int64_t plane = first; plane < last; plane++) {
    uint8_t* y = e.y + plane * bytes;
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_memcpy(y + i, e.a + plane * bytes + i, 64);
    }
    look_up_bytes(y, bytes, e.table);
    write_plane_border(y, e.at, e.out_zero);
  }
}

// Max pooling of planes [first, last); `scratch` holds a padded row. Pixels outside of the image are 0, the
// smallest value, so that they never win.
void max_pool_planes(const Int8Pool& p, int64_t first, int64_t last, uint8_t* scratch) {
  const Int8Geometry &in = p.in, &out = p.out;
  uint8_t* inside = scratch + 4 * p.pad_w;
  const int64_t row_pixels = p.pad_w + max(in.width + p.pad_w, (out.width + kLanes) * p.stride_w +
                                                                   (p.kernel_w - 1) * p.dilation_w);
  for (int64_t plane = first; plane < last; plane++) {
    const uint8_t* x = p.x + plane * in.plane * 4 + 4 * in.first;
    uint8_t* start = p.y + plane * out.plane * 4;
    for (int64_t row = 0; row < out.height; row++) {
      const int64_t top = row * p.stride_h - p.pad_h;
      for (int64_t i = 0; i < in.width; i += kLanes) {
        I m = splat(0);
        for (int64_t k = 0; k < p.kernel_h; k++) {
          const int64_t y = top + k * p.dilation_h;
          if (y >= 0 && y < in.height) m = max_bytes(m, load(x + 4 * (y * in.pitch + i)));
        }
        store(inside + 4 * i, m);
      }
      fill_pixels(scratch, p.pad_w, 0);
      fill_pixels(inside + 4 * in.width, row_pixels - p.pad_w - in.width, 0);
      uint8_t* y = start + 4 * (out.first + row * out.pitch);
      for (int64_t i = 0; i < out.width; i += kLanes) {
        I m = splat(0);
        for (int64_t k = 0; k < p.kernel_w; k++) {
          const uint8_t* q = scratch + 4 * (i * p.stride_w + k * p.dilation_w);
          if (p.stride_w == 1) {
            m = max_bytes(m, load(q));
          } else if (p.stride_w == 2) {
            m = max_bytes(m, even_pixels(load(q), load(q + 4 * kLanes)));
          } else {
            int32_t pixels[kLanes];
            for (int64_t u = 0; u < kLanes; u++) __builtin_memcpy(pixels + u, q + 4 * u * p.stride_w, 4);
            m = max_bytes(m, load(pixels));
          }
        }
        if (out.width - i >= kLanes) {
          store(y + 4 * i, m);
        } else {
          uint8_t pixels[4 * kLanes];
          store(pixels, m);
          __builtin_memcpy(y + 4 * i, pixels, static_cast<std::size_t>(4 * (out.width - i)));
        }
      }
    }
    write_plane_border(start, out, p.out_zero);
  }
}

// uint8 of x: clamp(round(x * inverse) + zero). Rounds halves to even by adding 1.5 * 2^23, which the bounds
// before it keep from becoming one instruction with the product.
INLINE int32_t quantize_value(float x, float inverse, float zero) {
  float steps = x * inverse;
  steps = steps > -1024.0f ? steps : -1024.0f;
  steps = steps < 1024.0f ? steps : 1024.0f;
  steps = (steps + 12582912.0f) - 12582912.0f + zero;
  steps = steps > 0.0f ? steps : 0.0f;
  steps = steps < 255.0f ? steps : 255.0f;
  return static_cast<int32_t>(steps);
}

void quantize_planes(const float* x, uint8_t* y, const Int8Geometry& g, int64_t channels, float inverse, int64_t zero,
                     int64_t first, int64_t last) {
  const float z = static_cast<float>(zero);
  const int64_t size = g.height * g.width;
  for (int64_t plane = first; plane < last; plane++) {
    const int64_t image = plane / g.quads, channel = plane % g.quads * 4;
    const float* from[4];
    for (int64_t u = 0; u < 4; u++) {
      from[u] = x + (image * channels + min(channel + u, channels - 1)) * size;
    }
    uint8_t* start = y + plane * g.plane * 4;
    for (int64_t row = 0; row < g.height; row++) {
      const float *a = from[0] + row * g.width, *b = from[1] + row * g.width;
      const float *c = from[2] + row * g.width, *d = from[3] + row * g.width;
      int32_t* to = reinterpret_cast<int32_t*>(start + 4 * (g.first + row * g.pitch));
      for (int64_t i = 0; i < g.width; i++) {
        to[i] = static_cast<int32_t>(
            static_cast<uint32_t>(quantize_value(a[i], inverse, z) | quantize_value(b[i], inverse, z) << 8 |
                                  quantize_value(c[i], inverse, z) << 16) |
            static_cast<uint32_t>(quantize_value(d[i], inverse, z)) << 24);
      }
    }
    write_plane_border(start, g, zero);
  }
}

void dequantize_planes(const uint8_t* x, float* y, const Int8Geometry& g, int64_t channels, float scale, int64_t zero,
                       int64_t first, int64_t last) {
  const int64_t size = g.height * g.width;
  const int32_t z = static_cast<int32_t>(zero);
  for (int64_t plane = first; plane < last; plane++) {
    const int64_t image = plane / g.quads, channel = plane % g.quads * 4;
    for (int64_t row = 0; row < g.height; row++) {
      const uint8_t* from = x + plane * g.plane * 4 + 4 * (g.first + row * g.pitch);
      for (int64_t u = 0; u < min(4, channels - channel); u++) {
        float* to = y + (image * channels + channel + u) * size + row * g.width;
        const int32_t* quads = reinterpret_cast<const int32_t*>(from);
        for (int64_t i = 0; i < g.width; i++) to[i] = static_cast<float>((quads[i] >> 8 * u & 255) - z) * scale;
      }
    }
  }
}

void sum_planes(const uint8_t* x, const Int8Geometry& g, int64_t first, int64_t last, int64_t* sums) {
  for (int64_t plane = first; plane < last; plane++) {
    int64_t total[4] = {};
    for (int64_t row = 0; row < g.height; row++) {
      const int32_t* p = reinterpret_cast<const int32_t*>(x + plane * g.plane * 4) + g.first + row * g.pitch;
      for (int64_t i0 = 0; i0 < g.width; i0 += 1 << 20) {
        int32_t s[4] = {};
        for (int64_t i = i0; i < min(g.width, i0 + (1 << 20)); i++) {
          UNROLL for (int u = 0; u < 4; u++) s[u] += p[i] >> 8 * u & 255;
        }
        for (int u = 0; u < 4; u++) total[u] += s[u];
      }
    }
    for (int u = 0; u < 4; u++) sums[4 * (plane - first) + u] = total[u];
  }
}

void linear_blocks(const Int8Linear& l, const uint8_t* x, int64_t first, int64_t last) {
  const int64_t quads = l.in.quads;
  constexpr int kVectors = 16 / kLanes;
  for (int64_t block = first; block < last; block++) {
    const int8_t* weight = l.weight + block * quads * 64;
    const int64_t n = min(16, l.n_out - 16 * block);
    for (int64_t image = 0; image < l.batch; image++) {
      I s[kVectors][2] = {};  // even and odd quads, so that sums wait less for each other
      const uint8_t* p = x + image * quads * 4;
      for (int64_t q = 0; q + 2 <= quads; q += 2) {
        UNROLL for (int u = 0; u < 2; u++) {
          int32_t quad;
          __builtin_memcpy(&quad, p + 4 * (q + u), 4);
          UNROLL for (int i = 0; i < kVectors; i++) {
            s[i][u] = dot(s[i][u], splat(quad), load(weight + 64 * (q + u) + 4 * kLanes * i));
          }
        }
      }
      if (quads % 2) {
        int32_t quad;
        __builtin_memcpy(&quad, p + 4 * (quads - 1), 4);
        UNROLL for (int i = 0; i < kVectors; i++) {
          s[i][0] = dot(s[i][0], splat(quad), load(weight + 64 * (quads - 1) + 4 * kLanes * i));
        }
      }
      int32_t sums[16];
      UNROLL for (int i = 0; i < kVectors; i++) store(sums + kLanes * i, add(s[i][0], s[i][1]));
      float products[16];
      for (int64_t i = 0; i < n; i++) {
        const int64_t j = 16 * block + i;
        products[i] = static_cast<float>(sums[i] + l.offsets[j]) * l.scales[j];
      }
      asm volatile("" ::: "memory");  // so that product and sum are rounded one after the other
      for (int64_t i = 0; i < n; i++) l.y[image * l.n_out + 16 * block + i] = products[i] + l.bias[16 * block + i];
    }
  }
}
