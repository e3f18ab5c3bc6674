// AVX2 and FMA: 16 registers of 8 floats, a register tile of 6 filters x 16 pixels.
#if defined(__AVX2__) && defined(__FMA__)
#define LEGO_ISA avx2
#define LEGO_NAME "avx2"
#define LEGO_LANES 8
#define LEGO_VECTORS 2
#include "kernel.h"

const lego::Kernel* lego::avx2_kernel() { return &lego::avx2::kKernel; }
#else
#include "lego.h"
const lego::Kernel* lego::avx2_kernel() { return nullptr; }
#endif
