// The library's C interface. Python (library.py) fills in one struct per call: first the pointers,
// constants first and the output last, then the numbers. All fields are 8 bytes wide. Every function
// returns a Status.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace lego {
enum Status : int64_t {
  kDone = 0,
  kBadHeader = 1,
  kBadRows = 2,
  kBadCall = 3,
  kNoMemory = 4,
  kNoKernel = 5,
};
}  // namespace lego

struct LegoCall {
  const char* packed;
  const float *bias, *x, *residual;
  float* y;
  int64_t packed_bytes, channels;
  int64_t batch, height, width, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t channels_last, activation, threads;
};

struct PoolCall {
  const float* x;
  float* y;
  int64_t planes, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t threads;
};

struct MeansCall {
  const float* x;
  float* y;
  int64_t planes, size, threads;
};

struct LinearCall {
  const float *weight, *bias, *x;
  float* y;
  int64_t batch, channels, n_out, activation, threads;
};

struct DepthwiseCall {
  const float *weight, *bias, *x;
  float* y;
  int64_t batch, channels, n_out, height, width, out_h, out_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t activation, threads;
};

// Layers on maps of uint8 (int8.h). A pointer to a map is that of its buffer, whose first kMapSlack bytes
// come before the planes. `isa` is 0 for the best kernels of this CPU, or the number of other ones plus 1.
// Floats are passed as the bits of a float32. All maps of a call but the input of a conv, a pooling or a
// mean have the same border.
struct Int8ConvCall {
  const char* packed;
  const uint8_t *x, *residual;
  uint8_t* y;
  int64_t packed_bytes, batch, height, width, border;
  int64_t out_h, out_w, out_border, out_zero, isa, threads;
};

struct Int8AddCall {
  const uint8_t *a, *b;
  uint8_t* y;
  int64_t batch, channels, height, width, border, out_zero;
  int64_t a_zero, b_zero, a_multiplier, b_multiplier, bias, out_shift, low, high, isa, threads;
};

struct Int8ScaleCall {  // the gate has one pixel and no border
  const uint8_t *x, *gate;
  uint8_t* y;
  int64_t batch, channels, height, width, border, out_zero;
  int64_t x_zero, gate_zero, multiplier, bias, out_shift, isa, threads;
};

struct Int8TableCall {
  const uint8_t *table, *x;
  uint8_t* y;
  int64_t batch, channels, height, width, border, out_zero, isa, threads;
};

// Copies all channels of x to the channels of y from first_channel on.
struct Int8CopyCall {
  const uint8_t* x;
  uint8_t* y;
  int64_t batch, channels, height, width, border, out_channels, first_channel, out_zero, threads;
};

struct Int8PoolCall {
  const uint8_t* x;
  uint8_t* y;
  int64_t batch, channels, height, width, border, out_h, out_w, out_border, out_zero;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, isa, threads;
};

struct Int8MeanCall {  // y has one pixel and no border
  const uint8_t* x;
  uint8_t* y;
  int64_t batch, channels, height, width, border, x_zero, multiplier, zero, isa, threads;
};

struct Int8QuantizeCall {
  const float* x;
  uint8_t* y;
  int64_t batch, channels, height, width, border, scale, zero, isa, threads;
};

struct Int8DequantizeCall {
  const uint8_t* x;
  float* y;
  int64_t batch, channels, height, width, border, scale, zero, isa, threads;
};

struct Int8LinearCall {  // x has one pixel and no border
  const int8_t* weight;
  const int32_t* offsets;
  const float *scales, *bias;
  const uint8_t* x;
  float* y;
  int64_t batch, channels, n_out, isa, threads;
};

// Recorded calls, for lego_run: each is the number of its function, then its struct.
struct RunCall {
  const int64_t* code;
  int64_t words;
};

EXPORT int64_t lego_conv2d(const LegoCall* c);
EXPORT int64_t lego_max_pool2d(const PoolCall* c);
EXPORT int64_t lego_means(const MeansCall* c);
EXPORT int64_t lego_linear(const LinearCall* c);
EXPORT int64_t lego_depthwise(const DepthwiseCall* c);
EXPORT int64_t lego_int8_conv(const Int8ConvCall* c);
EXPORT int64_t lego_int8_add(const Int8AddCall* c);
EXPORT int64_t lego_int8_scale(const Int8ScaleCall* c);
EXPORT int64_t lego_int8_table(const Int8TableCall* c);
EXPORT int64_t lego_int8_copy(const Int8CopyCall* c);
EXPORT int64_t lego_int8_max_pool(const Int8PoolCall* c);
EXPORT int64_t lego_int8_mean(const Int8MeanCall* c);
EXPORT int64_t lego_int8_quantize(const Int8QuantizeCall* c);
EXPORT int64_t lego_int8_dequantize(const Int8DequantizeCall* c);
EXPORT int64_t lego_int8_linear(const Int8LinearCall* c);
// The name of the int8 kernels of a number, and whether they run on this CPU; null if there are no more.
EXPORT const char* lego_int8_isa(int64_t number);
EXPORT int64_t lego_int8_runs(int64_t number);
