// AVX-512: 32 registers of 16 floats, a register tile of 6 filters x 64 pixels.
#if defined(__AVX512F__) && defined(__AVX512VL__)
#define LEGO_ISA avx512
#define LEGO_NAME "avx512"
#define LEGO_LANES 16
#define LEGO_VECTORS 4
#include "kernel.h"

const lego::Kernel* lego::avx512_kernel() { return &lego::avx512::kKernel; }
#else
#include "lego.h"
const lego::Kernel* lego::avx512_kernel() { return nullptr; }
#endif
