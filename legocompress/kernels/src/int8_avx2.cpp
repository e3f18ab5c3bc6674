// AVX2: products of 16-bit pairs, since those of bytes saturate; 6 filters x 16 pixels.
#if defined(__AVX2__)
#define LEGO_ISA avx2_int8
#define LEGO_NAME "avx2"
#define LEGO_LANES 8
#define LEGO_VECTORS 2
#define LEGO_PAIRS 1
#define LEGO_VNNI 0
#define LEGO_VBMI 0
#define LEGO_AMX 0
#include "int8_kernel.h"

const lego::Int8Kernel* lego::int8_avx2_kernel() { return &lego::avx2_int8::kInt8Kernel; }
#else
#include "int8.h"
const lego::Int8Kernel* lego::int8_avx2_kernel() { return nullptr; }
#endif
