// All int8 kernels, compiled for one instruction set. The file that includes this one defines LEGO_ISA,
// LEGO_NAME, LEGO_LANES, LEGO_VECTORS, LEGO_PAIRS, LEGO_VNNI, LEGO_VBMI and LEGO_AMX.
#if LEGO_LANES > 4
#include <immintrin.h>
#endif

#include "int8.h"

namespace lego {
namespace LEGO_ISA {
namespace {
#include "int8_simd.h"
#include "int8_input.h"
#include "int8_transform.h"
#include "int8_merge.h"
#include "int8_depthwise.h"
#include "int8_elementwise.h"
#if LEGO_AMX
#include "int8_amx.h"
#else
constexpr int64_t kStagingBytes = 0;
void begin(const Int8Conv&) {}
void end(const Int8Conv&) {}
const auto& transform = transform_panels;
#endif

int64_t count_scratch_bytes(const Int8Conv& v, int64_t& input_bytes) {
  input_bytes = 0;
  if (v.header->layout == static_cast<int64_t>(Int8Layout::kDepthwise)) {
    input_bytes = count_input_bytes(v, 1);
  } else {
    for (int64_t i = 0; i < v.header->n_parts; i++) {
      input_bytes = max(input_bytes, count_input_bytes(v, v.parts[i].quads));
    }
  }
  input_bytes = round_up(input_bytes, 64);
  return input_bytes + kStripBytes + kStagingBytes + 1024;
}
}  // namespace

const Int8Kernel kInt8Kernel = {
    LEGO_NAME, LEGO_LANES* LEGO_VECTORS,
    1u << (LEGO_PAIRS ? 1 : 0) | 1u << 4 | (LEGO_AMX ? 3u << 2 : 0),
    begin, end, count_scratch_bytes, transform, merge_quads, depthwise_quads, add_planes, scale_planes,
    look_up_planes, max_pool_planes, quantize_planes, dequantize_planes, sum_planes, linear_blocks};
}  // namespace LEGO_ISA
}  // namespace lego
