// AVX-512 without VNNI: products of 16-bit pairs, 6 filters x 64 pixels.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LEGO_ISA avx512_int8
#define LEGO_NAME "avx512"
#define LEGO_LANES 16
#define LEGO_VECTORS 4
#define LEGO_PAIRS 1
#define LEGO_VNNI 0
#define LEGO_VBMI 0
#define LEGO_AMX 0
#include "int8_kernel.h"

const lego::Int8Kernel* lego::int8_avx512_kernel() { return &lego::avx512_int8::kInt8Kernel; }
#else
#include "int8.h"
const lego::Int8Kernel* lego::int8_avx512_kernel() { return nullptr; }
#endif
