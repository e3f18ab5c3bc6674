// AVX-VNNI: a register tile of 6 filters x 16 pixels.
#if defined(__AVXVNNI__)
#define LEGO_ISA avx_vnni_int8
#define LEGO_NAME "avx_vnni"
#define LEGO_LANES 8
#define LEGO_VECTORS 2
#define LEGO_PAIRS 0
#define LEGO_VNNI 256
#define LEGO_VBMI 0
#define LEGO_AMX 0
#include "int8_kernel.h"

const lego::Int8Kernel* lego::int8_avx_vnni_kernel() { return &lego::avx_vnni_int8::kInt8Kernel; }
#else
#include "int8.h"
const lego::Int8Kernel* lego::int8_avx_vnni_kernel() { return nullptr; }
#endif
