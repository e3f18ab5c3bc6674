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
}  // namespace

const Kernel kKernel = {LEGO_NAME, LEGO_LANES, LEGO_LANES * LEGO_VECTORS, plan_direct, transform_direct,
                        merge_direct};
}  // namespace LEGO_ISA
}  // namespace lego
