// Runs calls of the library in a separate process, which tests/kernels/test_library.py builds with
// sanitizers. It reads the calls of lego_conv2d from a file, and makes up those of the other layers. Every
// buffer has exactly the size that the call needs, and the outputs of lego_conv2d lie between canaries.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct LegoCall {
  const char* packed;
  const float *bias, *x, *residual;
  float* y;
  int64_t packed_bytes, channels, numbers[14];
};
extern "C" int64_t lego_conv2d(const LegoCall*);
struct PoolCall {
  const float* x;
  float* y;
  int64_t planes, sizes[4], kernel[2], stride[2], pad[2], dilation[2], threads;
};
extern "C" int64_t lego_max_pool2d(const PoolCall*);
struct MeansCall {
  const float* x;
  float* y;
  int64_t planes, size, threads;
};
extern "C" int64_t lego_means(const MeansCall*);
struct LinearCall {
  const float *weight, *bias, *x;
  float* y;
  int64_t batch, channels, n_out, activation, threads;
};
extern "C" int64_t lego_linear(const LinearCall*);
struct DepthwiseCall {
  const float *weight, *bias, *x;
  float* y;
  int64_t batch, channels, n_out, sizes[4], kernel[2], stride[2], pad[2], dilation[2];
  int64_t activation, threads;
};
extern "C" int64_t lego_depthwise(const DepthwiseCall*);
struct Int8ConvCall {
  const char* packed;
  const uint8_t *x, *residual;
  uint8_t* y;
  int64_t packed_bytes, numbers[8], isa, threads;
};
extern "C" int64_t lego_int8_conv(const Int8ConvCall*);
struct RunCall {
  const int64_t* code;
  int64_t words;
};
extern "C" int64_t lego_run(const RunCall*);
extern "C" const char* lego_isa();

static FILE* file;
static int64_t read_number() {
  int64_t n = 0;
  if (std::fread(&n, 8, 1, file) != 1) std::exit(3);
  return n;
}
template <class T>
static std::vector<T> read_values() {
  std::vector<T> v(static_cast<size_t>(read_number()));
  if (!v.empty() && std::fread(v.data(), sizeof(T), v.size(), file) != v.size()) std::exit(3);
  v.shrink_to_fit();
  return v;
}

// A pseudo-random number in [0, limit).
static int64_t random_below(int64_t limit) {
  static uint32_t seed = 1;
  seed = seed * 1664525u + 1013904223u;
  return static_cast<int64_t>(seed >> 16) % limit;
}

// Compares random linear layers with plain loops; returns how many, or exits.
static int check_linear_layers() {
  const int n_cases = 200;
  for (int n = 0; n < n_cases; n++) {
    // Some with more channels than are summed at once.
    const int64_t channels = n % 10 ? 1 + random_below(90) : 4000 + random_below(5000);
    LinearCall c{};
    c.batch = 1 + random_below(11), c.channels = channels, c.n_out = 1 + random_below(70);
    c.activation = random_below(2), c.threads = 1 + random_below(3);
    std::vector<float> weight(static_cast<size_t>(c.n_out * channels));
    std::vector<float> bias(static_cast<size_t>(c.n_out)), x(static_cast<size_t>(c.batch * channels));
    for (std::vector<float>* all : {&weight, &bias, &x}) {
      for (float& a : *all) a = static_cast<float>(random_below(7)) - 3;  // so that sums are exact
    }
    std::vector<float> y(static_cast<size_t>(c.batch * c.n_out));
    c.weight = weight.data(), c.x = x.data(), c.y = y.data();
    c.bias = n % 3 ? bias.data() : nullptr;
    if (lego_linear(&c)) std::exit(5);
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); i++) {
      const int64_t image = i / c.n_out, row = i % c.n_out;
      float expected = c.bias ? c.bias[row] : 0;
      for (int64_t k = 0; k < channels; k++) {
        expected += weight[static_cast<size_t>(row * channels + k)] *
                    x[static_cast<size_t>(image * channels + k)];
      }
      if (c.activation) expected = std::fmax(expected, 0.0f);
      if (y[static_cast<size_t>(i)] != expected) {
        std::printf("linear %d: %g, not %g\n", n, y[static_cast<size_t>(i)], expected);
        std::exit(5);
      }
    }
  }
  return n_cases;
}

// Compares random depthwise convs with plain loops; returns how many, or exits.
static int check_depthwise_convs() {
  int n = 0;
  while (n < 300) {
    DepthwiseCall c{};
    c.batch = 1 + random_below(2), c.channels = 1 + random_below(9), c.n_out = c.channels * (1 + random_below(2));
    c.activation = random_below(2), c.threads = 1 + random_below(3);
    const int64_t square = 2 * random_below(4) + 1;  // every other case has a specialised form
    for (int u = 0; u < 2; u++) {
      c.sizes[u] = 1 + random_below(70);
      c.kernel[u] = n % 2 ? square : 1 + random_below(4);
      c.stride[u] = n % 2 ? 1 + n / 2 % 2 : 1 + random_below(3);
      c.pad[u] = random_below(c.kernel[u] + 1);
      c.dilation[u] = n % 2 ? 1 : 1 + random_below(2);
      const int64_t room = c.sizes[u] + 2 * c.pad[u] - c.dilation[u] * (c.kernel[u] - 1) - 1;
      c.sizes[2 + u] = room < 0 ? 0 : room / c.stride[u] + 1;
    }
    if (!c.sizes[2] || !c.sizes[3]) continue;
    const int64_t taps = c.kernel[0] * c.kernel[1], plane = c.sizes[0] * c.sizes[1];
    std::vector<float> weight(static_cast<size_t>(c.n_out * taps));
    std::vector<float> bias(static_cast<size_t>(c.n_out));
    std::vector<float> x(static_cast<size_t>(c.batch * c.channels * plane));
    for (std::vector<float>* all : {&weight, &bias, &x}) {
      for (float& a : *all) a = static_cast<float>(random_below(7)) - 3;  // so that sums are exact
    }
    std::vector<float> y(static_cast<size_t>(c.batch * c.n_out * c.sizes[2] * c.sizes[3]));
    c.weight = weight.data(), c.x = x.data(), c.y = y.data();
    c.bias = n % 3 ? bias.data() : nullptr;
    if (lego_depthwise(&c)) std::exit(6);
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); i++) {
      const int64_t at[2] = {i / c.sizes[3] % c.sizes[2], i % c.sizes[3]};
      const int64_t out = i / (c.sizes[2] * c.sizes[3]), channel = out % c.n_out;
      const int64_t in = out / c.n_out * c.channels + channel / (c.n_out / c.channels);
      float expected = c.bias ? c.bias[channel] : 0;
      for (int64_t k = 0; k < taps; k++) {
        const int64_t h = at[0] * c.stride[0] - c.pad[0] + k / c.kernel[1] * c.dilation[0];
        const int64_t w = at[1] * c.stride[1] - c.pad[1] + k % c.kernel[1] * c.dilation[1];
        if (h < 0 || w < 0 || h >= c.sizes[0] || w >= c.sizes[1]) continue;
        expected += weight[static_cast<size_t>(channel * taps + k)] *
                    x[static_cast<size_t>(in * plane + h * c.sizes[1] + w)];
      }
      if (c.activation) expected = std::fmax(expected, 0.0f);
      if (y[static_cast<size_t>(i)] != expected) {
        std::printf("depthwise %d: %g, not %g\n", n, y[static_cast<size_t>(i)], expected);
        std::exit(6);
      }
    }
    n++;
  }
  return n;
}

// Compares random poolings and means with plain loops; returns how many, or exits.
static int check_pooling() {
  int n = 0;
  while (n < 300) {
    PoolCall c{};
    c.planes = 1 + random_below(20);
    c.threads = 1 + random_below(3);
    for (int u = 0; u < 2; u++) {
      c.sizes[u] = 1 + random_below(70);
      c.kernel[u] = 1 + random_below(4);
      c.stride[u] = 1 + random_below(3);
      c.pad[u] = random_below(c.kernel[u] / 2 + 1);
      c.dilation[u] = 1 + random_below(2);
      const int64_t room = c.sizes[u] + 2 * c.pad[u] - c.dilation[u] * (c.kernel[u] - 1) - 1;
      c.sizes[2 + u] = room < 0 ? 0 : room / c.stride[u] + 1;
    }
    if (!c.sizes[2] || !c.sizes[3]) continue;
    std::vector<float> x(static_cast<size_t>(c.planes * c.sizes[0] * c.sizes[1]));
    for (float& a : x) a = static_cast<float>(random_below(1000)) - 500;
    std::vector<float> y(static_cast<size_t>(c.planes * c.sizes[2] * c.sizes[3]));
    c.x = x.data();
    c.y = y.data();
    if (lego_max_pool2d(&c)) std::exit(4);
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); i++) {
      const int64_t at[2] = {i / c.sizes[3] % c.sizes[2], i % c.sizes[3]};
      float expected = -INFINITY;
      for (int64_t k = 0; k < c.kernel[0] * c.kernel[1]; k++) {
        const int64_t h = at[0] * c.stride[0] - c.pad[0] + k / c.kernel[1] * c.dilation[0];
        const int64_t w = at[1] * c.stride[1] - c.pad[1] + k % c.kernel[1] * c.dilation[1];
        if (h < 0 || w < 0 || h >= c.sizes[0] || w >= c.sizes[1]) continue;
        const int64_t plane = i / (c.sizes[2] * c.sizes[3]);
        expected = std::fmax(expected, x[static_cast<size_t>((plane * c.sizes[0] + h) * c.sizes[1] + w)]);
      }
      if (y[static_cast<size_t>(i)] != expected) {
        std::printf("pooling %d: %g, not %g\n", n, y[static_cast<size_t>(i)], expected);
        std::exit(4);
      }
    }
    n++;
  }
  for (int64_t size = 1; size < 70; size++, n++) {
    std::vector<float> x(static_cast<size_t>(5 * size)), y(5);
    for (float& a : x) a = static_cast<float>(random_below(1000)) - 500;
    const MeansCall c{x.data(), y.data(), 5, size, 1 + size % 3};
    if (lego_means(&c)) std::exit(4);
    for (int64_t i = 0; i < 5; i++) {
      double sum = 0;
      for (int64_t k = 0; k < size; k++) sum += x[static_cast<size_t>(i * size + k)];
      if (std::fabs(y[static_cast<size_t>(i)] - sum / static_cast<double>(size)) > 1e-3) {
        std::printf("mean of %d: %g\n", static_cast<int>(size), y[static_cast<size_t>(i)]);
        std::exit(4);
      }
    }
  }
  return n;
}

// Compares calls of lego_int8_conv from the file with their expected outputs; returns how many, or exits.
static int64_t check_int8_convs() {
  const int64_t n_cases = read_number();
  for (int64_t i = 0; i < n_cases; i++) {
    const int64_t expected_status = read_number();
    const std::vector<char> packed = read_values<char>();
    const std::vector<uint8_t> x = read_values<uint8_t>(), residual = read_values<uint8_t>();
    // The whole buffer of the output, and which of its bytes are pixels of channels.
    const std::vector<uint8_t> expected = read_values<uint8_t>(), is_pixel = read_values<uint8_t>();
    Int8ConvCall c{};
    c.packed = packed.data(), c.packed_bytes = static_cast<int64_t>(packed.size());
    c.x = x.data(), c.residual = residual.empty() ? nullptr : residual.data();
    for (int64_t& n : c.numbers) n = read_number();
    c.isa = read_number(), c.threads = 1 + i % 3;
    std::vector<uint8_t> y(expected.size(), 77);
    c.y = y.data();
    const int64_t status = lego_int8_conv(&c);
    if (status != expected_status) {
      std::printf("int8 case %lld: status %lld\n", static_cast<long long>(i), static_cast<long long>(status));
      std::exit(7);
    }
    if (status) continue;
    for (size_t u = 0; u < y.size(); u++) {
      // Nothing is written before and after the planes.
      const bool in_slack = u < 1024 || u >= y.size() - 1024;
      if (in_slack ? y[u] != 77 : is_pixel[u] && y[u] != expected[u]) {
        std::printf("int8 case %lld: y[%zu] is %d, not %d\n", static_cast<long long>(i), u, y[u], expected[u]);
        std::exit(7);
      }
    }
  }
  return n_cases;
}

int main(int argc, char** argv) {
  file = argc > 1 ? std::fopen(argv[1], "rb") : nullptr;
  if (!file) return 3;
  const int64_t n_cases = read_number();
  double worst = 0;
  for (int64_t i = 0; i < n_cases; i++) {
    const int64_t expected_status = read_number();
    const std::vector<char> packed = read_values<char>();
    const std::vector<float> x = read_values<float>(), bias = read_values<float>();
    const std::vector<float> residual = read_values<float>(), expected = read_values<float>();
    LegoCall call{};
    call.packed = packed.data();
    call.packed_bytes = static_cast<int64_t>(packed.size());
    call.x = x.data();
    call.channels = read_number();
    call.bias = bias.empty() ? nullptr : bias.data();
    call.residual = residual.empty() ? nullptr : residual.data();
    for (int64_t& n : call.numbers) n = read_number();
    const size_t guard = 64;
    const float canary = 12345.5f;
    std::vector<float> y(expected.size() + 2 * guard, canary);
    call.y = y.data() + guard;
    const std::vector<char> packed_before = packed;
    const std::vector<float> x_before = x;
    // Every other call is made twice by lego_run; the second one overwrites the output of the first.
    int64_t code[2 * (1 + sizeof call / 8)] = {};
    std::memcpy(code + 1, &call, sizeof call);
    std::memcpy(code + 2 + sizeof call / 8, &call, sizeof call);
    const RunCall both{code, sizeof code / 8};
    const int64_t status = i % 2 ? lego_run(&both) : lego_conv2d(&call);
    if (status != expected_status) {
      std::printf("case %lld: status %lld\n", static_cast<long long>(i),
                  static_cast<long long>(status));
      return 1;
    }
    for (size_t u = 0; u < guard; u++) {
      if (y[u] != canary || y[guard + expected.size() + u] != canary) {
        std::printf("case %lld: wrote outside of its output\n", static_cast<long long>(i));
        return 1;
      }
    }
    if (packed != packed_before || x != x_before) return 2;
    if (status) continue;
    double top = 1;
    for (float e : expected) top = std::fmax(top, std::fabs(e));
    for (size_t u = 0; u < expected.size(); u++) {
      const double error = std::fabs(y[guard + u] - expected[u]) / top;
      worst = error <= worst ? worst : error;
      if (!(error < 2e-4)) {
        std::printf("case %lld: y[%zu] is %g, not %g\n", static_cast<long long>(i), u, y[guard + u],
                    expected[u]);
        return 1;
      }
    }
  }
  if (check_pooling() != 300 + 69 || check_linear_layers() != 200 || check_depthwise_convs() != 300) return 4;
  const int64_t n_int8 = check_int8_convs();
  std::printf("%s: %lld int8 calls\n", lego_isa(), static_cast<long long>(n_int8));
  std::printf("%s: %lld calls, worst error %.1e\n", lego_isa(), static_cast<long long>(n_cases),
              worst);
  return 0;
}
