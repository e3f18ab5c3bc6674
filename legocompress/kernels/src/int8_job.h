// What the functions of quantised layers share.
#pragma once
#include "int8.h"
#include "job.h"

namespace lego {

// The int8 kernels of a number plus 1, or the best ones for 0; null if they do not run on this CPU.
const Int8Kernel* int8_kernel(int64_t isa);

// Whether maps of these sizes can exist.
inline bool are_valid_maps(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t border) {
  return are_valid_sizes({batch, channels, height, width}) && border >= 0 && border <= kMaxBorder &&
         multiply_saturating(multiply_saturating(batch, channels + 3),
                             multiply_saturating(height + 2 * border + 1, width + border + 16)) < int64_t{1} << 40;
}

inline bool are_bytes(std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [](int64_t v) { return v >= 0 && v <= 255; });
}

inline bool are_16_bit(std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [](int64_t v) { return v >= -32768 && v <= 32767; });
}

// Memory for bytes of the calling thread.
inline uint8_t* scratch_bytes(int64_t bytes) {
  return reinterpret_cast<uint8_t*>(thread_scratch().floats((bytes + 3) / 4));
}

}  // namespace lego
