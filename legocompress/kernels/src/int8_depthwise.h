// Depthwise convs: every output channel reads the input channel of its own number.

INLINE int64_t count_tap_groups(const Int8Header& h) { return ceil_div(h.kernel_h * h.kernel_w, 4); }

void depthwise_quads(const Int8Conv& v, const Int8Tile& t, int64_t first, int64_t last, uint8_t* scratch) {
  const Int8Header& h = *v.header;
  const Finish finish(h.low, h.high, h.out_shift);
  const Strips strips(v, scratch);
  const int64_t groups = count_tap_groups(h);
  const H residual_multiplier = splat16(static_cast<int16_t>(h.residual_multiplier));
  const H residual_zero = splat16(static_cast<int16_t>(h.residual_zero << 7));
  Input in;
  for (int64_t quad = first; quad < last; quad++) {
    find_input(v, t, quad, 1, true, scratch, in);
    for (int64_t k = in.n_taps; k < 4 * groups; k++) in.taps[k] = in.taps[0];  // their weights are zero
    const int8_t* weights = v.filters + quad * groups * 16;
    const I offsets = repeat16(v.offsets + quad * 4), shifts = repeat16(v.shifts + quad * 4);
    // Two pixels side by side in 128 bits, four channels each.
    const I multipliers = repeat16(v.multipliers + quad * 4), bias = repeat16(v.bias + quad * 4);
    const H m = narrow(shift_right(multipliers, splat(16)), shift_right(multipliers, splat(16)));
    const H b = narrow(shift_right(bias, splat(16)), shift_right(bias, splat(16)));
    for (int64_t i = 0; i < t.count; i += kLanes) {
      run_strip(v, t, quad, i, kLanes, strips, [&](uint8_t* y, const uint8_t* residual, int64_t bytes) {
        I s[4] = {offsets, offsets, offsets, offsets};
        for (int64_t k = 0; k < groups; k++) {
          I x[4];
          UNROLL for (int u = 0; u < 4; u++) x[u] = load(in.x + in.taps[4 * k + u] + 4 * i);
          transpose_taps(x);
          const I w = repeat16(weights + 16 * k);
          UNROLL for (int u = 0; u < 4; u++) s[u] = dot(s[u], x[u], w);
        }
        UNROLL for (int u = 0; u < 4; u++) s[u] = shift_right(s[u], shifts);
        H low = add_saturated(b, multiply_high(m, narrow(s[0], s[1])));
        H high = add_saturated(b, multiply_high(m, narrow(s[2], s[3])));
        if (residual) {
          H r[2];
          widen_bytes(load(residual), r[0], r[1]);
          low = add_saturated(low, multiply_high(residual_multiplier, subtract16(r[0], residual_zero)));
          high = add_saturated(high, multiply_high(residual_multiplier, subtract16(r[1], residual_zero)));
        }
        if (bytes > 0) store(y, narrow_bytes(finish(low), finish(high)));
      });
    }
  }
  write_border(v, t, first, last);
}
