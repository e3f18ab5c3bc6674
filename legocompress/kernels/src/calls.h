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
