// All kernels, compiled for one instruction set. The file that includes this one defines LEGO_ISA,
// LEGO_NAME, LEGO_LANES and LEGO_VECTORS.
#include "lego.h"

namespace lego {
namespace LEGO_ISA {
namespace {
#include "simd.h"
#include "gemm.h"
#include "pack.h"
#include "tile.h"
#include "plan_direct.h"
#include "transform_direct.h"
#include "merge.h"
#include "winograd_points.h"
#include "winograd.h"
#include "winograd_transform.h"
#include "winograd_merge.h"
#include "pool.h"
#include "linear.h"
#include "depthwise.h"

void plan(Conv& v, int threads) {
  v.header->winograd_stride ? plan_winograd(v, threads) : plan_direct(v, threads);
}

void transform(const Conv& v, int64_t tile, int64_t split, int64_t first, int64_t last, float* z,
               float* scratch) {
  if (v.header->winograd_stride) {
    transform_winograd(v, tile, split, first, last, z, scratch);
  } else {
    transform_direct(v, tile, split, first, last, z, scratch);
  }
}

void merge(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
           float* scratch) {
  if (v.header->winograd_stride) {
    merge_winograd(v, tile, first, last, z, scratch);
  } else {
    merge_direct(v, tile, first, last, z);
  }
}
}  // namespace

const Kernel kKernel = {LEGO_NAME, LEGO_LANES, LEGO_LANES * LEGO_VECTORS,
                        plan,      transform,  merge,
                        max_pool,  means,      linear,
                        count_depthwise_floats,      depthwise};
}  // namespace LEGO_ISA
}  // namespace lego
