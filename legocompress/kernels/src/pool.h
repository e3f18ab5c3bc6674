// Pooling of NCHW maps. Max pooling takes the maximum of input rows first, then of the columns of that row.

// The larger value, or NaN if either is NaN, as in PyTorch.
INLINE V vmax_or_nan(V a, V b) { return ((a > b) | (a != a)) ? a : b; }

// Computes output rows [first_row, last_row) of planes [first, last). `row` is scratch of p.row_floats floats.
void max_pool(const Pool& p, int64_t first, int64_t last, int64_t first_row, int64_t last_row,
              float* row) {
  const V lowest = splat(-__builtin_inff());
  for (int64_t i = 0; i < p.row_floats; i += kLanes) store(row + i, lowest);
  float* inside = row + p.pad_w;
  const int64_t rows = last_row - first_row;
  for (int64_t i = first * rows; i < last * rows; i++) {
    const int64_t plane = i / rows, out_row = first_row + i % rows;
    const int64_t at = plane * p.out_h + out_row, top = out_row * p.stride_h - p.pad_h;
    const float* from[kMaxPool];
    int64_t n = 0;
    for (int64_t k = 0; k < p.kernel_h; k++) {
      const int64_t y = top + k * p.dilation_h;
      if (y >= 0 && y < p.height) from[n++] = p.x + (plane * p.height + y) * p.width;
    }
    for (int64_t i = 0; i < p.width; i += kLanes) {
      if (p.width - i < kLanes) {
        if (p.width < kLanes || !n) {
          for (; i < p.width; i++) {
            float maximum = -__builtin_inff();
            for (int64_t k = 0; k < n; k++) {
              const float a = from[k][i];
              if (a > maximum || a != a) maximum = a;
              if (maximum != maximum) break;
            }
            inside[i] = maximum;
          }
          break;
        }
        i = p.width - kLanes;  // the last vector overlaps the one before it
      }
      V m = lowest;
      for (int64_t k = 0; k < n; k++) m = vmax_or_nan(load(from[k] + i), m);
      store(inside + i, m);
    }
    float* y = p.y + at * p.out_w;
    for (int64_t i = 0; i < p.out_w; i += kLanes) {
      if (p.out_w - i < kLanes && p.out_w >= kLanes) i = p.out_w - kLanes;
      V m = lowest;
      for (int64_t k = 0; k < p.kernel_w; k++) {
        const float* q = row + i * p.stride_w + k * p.dilation_w;
        V a;
        if (p.stride_w == 1) {
          a = load(q);
        } else if (p.stride_w == 2) {
          a = even_lanes(load(q), load(q + kLanes));
        } else {
          UNROLL for (int u = 0; u < kLanes; u++) a[u] = q[u * p.stride_w];
        }
        m = vmax_or_nan(a, m);
      }
      if (p.out_w - i >= kLanes) {
        store(y + i, m);
      } else {
        for (int64_t u = 0; u < p.out_w - i; u++) y[i + u] = m[u];
      }
    }
  }
}

// Computes the means of planes [first, last), each of `size` floats.
void means(const float* x, int64_t size, int64_t first, int64_t last, float* y) {
  for (int64_t plane = first; plane < last; plane++) {
    const float* from = x + plane * size;
    V sums = V{};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sums += load(from + i);
    float sum = 0;
    for (; i < size; i++) sum += from[i];
    UNROLL for (int u = 0; u < kLanes; u++) sum += sums[u];
    y[plane] = sum / static_cast<float>(size);
  }
}
