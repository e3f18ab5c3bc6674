// Any CPU: a register tile of 6 filters x 8 pixels.
#if 1
#define LEGO_ISA portable_int8
#define LEGO_NAME "portable"
#define LEGO_LANES 4
#define LEGO_VECTORS 2
#define LEGO_PAIRS 0
#define LEGO_VNNI 0
#define LEGO_VBMI 0
#define LEGO_AMX 0
#include "int8_kernel.h"

const lego::Int8Kernel* lego::int8_portable_kernel() { return &lego::portable_int8::kInt8Kernel; }
#else
#include "int8.h"
const lego::Int8Kernel* lego::int8_portable_kernel() { return nullptr; }
#endif
