// Any CPU, by the compiler's code for vectors of 4 floats: a register tile of 6 filters x 8 pixels.
#define LEGO_ISA portable
#define LEGO_NAME "portable"
#define LEGO_LANES 4
#define LEGO_VECTORS 2
#include "kernel.h"

const lego::Kernel* lego::portable_kernel() { return &lego::portable::kKernel; }
