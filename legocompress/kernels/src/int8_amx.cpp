// AMX: a register tile of 32 filters x 32 pixels.
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define LEGO_ISA amx_int8
#define LEGO_NAME "amx"
#define LEGO_LANES 16
#define LEGO_VECTORS 4
#define LEGO_PAIRS 0
#define LEGO_VNNI 512
#define LEGO_VBMI 1
#define LEGO_AMX 1
#include "int8_kernel.h"

const lego::Int8Kernel* lego::int8_amx_kernel() { return &lego::amx_int8::kInt8Kernel; }
#else
#include "int8.h"
const lego::Int8Kernel* lego::int8_amx_kernel() { return nullptr; }
#endif
