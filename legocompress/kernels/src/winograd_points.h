// Winograd's transforms of one row or column of a patch, by interpolation points (Lavin and Gray, 2016).
// SIDE = r + 3 is the number of points, infinity among them; pack.py lists them and transforms the filters.

// The sum of d times the coefficients of (x^2 - 1) (x^2 - 4) = x^4 - 5 x^2 + 4: the product of x - b over
// the points 1, -1, 2, -2. At d + 1 it is the sum for x (x^2 - 1) (x^2 - 4).
INLINE V apply_quartic(const V* d) { return 4.0f * d[0] + (d[4] - 5.0f * d[2]); }

// The first rows of B^T d for the points 0, 1, -1, 2, -2. The row of a point holds the coefficients of the
// product of (x - b) over the other finite points b, and the last row, of infinity, those over all.
INLINE void transform_finite_points(const V* d, V* out) {
  const V a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = d[3] - d[1];
  out[0] = apply_quartic(d);
  out[1] = a + b;
  out[2] = a - b;
  out[3] = 2.0f * e + c;
  out[4] = c - 2.0f * e;
}

// B^T d: input pixels to frequencies.
template <int SIDE>
INLINE void transform_input(const V* d, V* out) {
  if constexpr (SIDE == 5) {  // points 0, 1, -1, 2
    const V a = d[3] - d[1], b = d[3] - d[2];
    out[0] = 2.0f * (d[0] - d[2]) + a;
    out[1] = b - 2.0f * d[1];
    out[2] = b + 2.0f * (d[1] - d[2]);
    out[3] = a;
    out[4] = d[4] - d[2] - 2.0f * a;
  } else if constexpr (SIDE == 6) {  // points 0, 1, -1, 2, -2
    transform_finite_points(d, out);
    out[5] = apply_quartic(d + 1);
  } else {  // points 0, 1, -1, 2, -2, 1/2: the polynomials for SIDE 6, times 2 x - 1
    V one[5], next[5];
    transform_finite_points(d, one);
    transform_finite_points(d + 1, next);
    UNROLL for (int i = 0; i < 5; i++) out[i] = 2.0f * next[i] - one[i];
    out[5] = next[0];
    out[6] = 2.0f * apply_quartic(d + 2) - next[0];
  }
}

// A^T m: frequencies to 4 output pixels.
template <int SIDE>
INLINE void transform_output(const V* m, V* out) {
  const V a = m[1] + m[2], b = m[1] - m[2];
  if constexpr (SIDE == 5) {
    out[0] = m[0] + a + m[3];
    out[1] = 2.0f * m[3] + b;
    out[2] = 4.0f * m[3] + a;
    out[3] = 8.0f * m[3] + b + m[4];
    return;
  } else {
    const V c = m[3] + m[4], e = m[3] - m[4];
    out[0] = m[0] + a + c;
    out[1] = 2.0f * e + b;
    out[2] = 4.0f * c + a;
    out[3] = 8.0f * e + b + m[SIDE - 1];
    if constexpr (SIDE == 7) {
      UNROLL for (int i = 0; i < 4; i++) out[i] += m[5] * (1.0f / (1 << i));
    }
  }
}
