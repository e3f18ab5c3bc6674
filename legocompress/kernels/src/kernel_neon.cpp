// NEON of AArch64: 32 registers of 4 floats, a register tile of 6 filters x 16 pixels.
#if defined(__aarch64__)
#define LEGO_ISA neon
#define LEGO_NAME "neon"
#define LEGO_LANES 4
#define LEGO_VECTORS 4
#include "kernel.h"

const lego::Kernel* lego::neon_kernel() { return &lego::neon::kKernel; }
#else
#include "lego.h"
const lego::Kernel* lego::neon_kernel() { return nullptr; }
#endif
