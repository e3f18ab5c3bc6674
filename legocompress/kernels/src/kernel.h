// The kernels of one instruction set; LEGO_ISA, LEGO_LANES and LEGO_VECTORS are set by who includes.
#include "lego.h"

namespace lego {
namespace LEGO_ISA {
namespace {
#include "simd.h"
#include "gemm.h"
#include "pack.h"
#include "tile.h"
#include "merge.h"
#include "winograd.h"
#include "pool.h"
#include "linear.h"
#include "depthwise.h"

void plan(Conv& v, int threads) {
  v.head->winograd_stride ? plan_winograd(v, threads) : plan_direct(v, threads);
}

void transform(const Conv& v, int64_t tile, int64_t split, int64_t first, int64_t last, float* z,
               float* scratch) {
  if (v.head->winograd_stride) {
    transform_winograd(v, tile, split, first, last, z, scratch);
  } else {
    transform_direct(v, tile, split, first, last, z, scratch);
  }
}

void merge(const Conv& v, int64_t tile, int64_t first, int64_t last, const float* z,
           float* scratch) {
  if (v.head->winograd_stride) {
    merge_winograd(v, tile, first, last, z, scratch);
  } else {
    merge_direct(v, tile, first, last, z);
  }
}
}  // namespace

const Kernel kKernel = {LEGO_NAME, LEGO_LANES, LEGO_LANES * LEGO_VECTORS,
                        plan,      transform,  merge,
                        max_pool,  means,      linear,
                        depthwise_floats,      depthwise};
}  // namespace LEGO_ISA
}  // namespace lego
