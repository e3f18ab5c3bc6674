// AVX-512 VNNI: a register tile of 6 filters x 64 pixels.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LEGO_ISA avx512_vnni_int8
#define LEGO_NAME "avx512_vnni"
#define LEGO_LANES 16
#define LEGO_VECTORS 4
#define LEGO_PAIRS 0
#define LEGO_VNNI 512
#define LEGO_VBMI 0
#define LEGO_AMX 0
#include "int8_kernel.h"

const lego::Int8Kernel* lego::int8_avx512_vnni_kernel() { return &lego::avx512_vnni_int8::kInt8Kernel; }
#else
#include "int8.h"
const lego::Int8Kernel* lego::int8_avx512_vnni_kernel() { return nullptr; }
#endif
