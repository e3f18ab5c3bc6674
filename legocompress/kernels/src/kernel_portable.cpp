// Any CPU, by what the compiler makes of 4 floats side by side: 6 filters x 8 pixels.
#define LEGO_ISA portable
#define LEGO_NAME "portable"
#define LEGO_LANES 4
#define LEGO_VECTORS 2
#include "kernel.h"

const lego::Kernel* lego::portable_kernel() { return &lego::portable::kKernel; }
