// Runs recorded calls of lego_conv2d in a process of its own, built with sanitizers by
// tests/test_kernels.py: every buffer has exactly its size, outputs stand between canaries.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct LegoCall {
  const char* packed;
  int64_t packed_bytes;
  const float* x;
  int64_t channels;
  const float *bias, *residual;
  float* y;
  int64_t numbers[14];
};
extern "C" int64_t lego_conv2d(const LegoCall*);
extern "C" const char* lego_isa();

static FILE* file;
static int64_t number() {
  int64_t n = 0;
  if (std::fread(&n, 8, 1, file) != 1) std::exit(3);
  return n;
}
template <class T>
static std::vector<T> values() {
  std::vector<T> v(static_cast<size_t>(number()));
  if (!v.empty() && std::fread(v.data(), sizeof(T), v.size(), file) != v.size()) std::exit(3);
  v.shrink_to_fit();
  return v;
}

int main(int argc, char** argv) {
  file = argc > 1 ? std::fopen(argv[1], "rb") : nullptr;
  if (!file) return 3;
  const int64_t n_cases = number();
  double worst = 0;
  for (int64_t i = 0; i < n_cases; i++) {
    const int64_t status_wanted = number();
    const std::vector<char> packed = values<char>();
    const std::vector<float> x = values<float>(), bias = values<float>();
    const std::vector<float> residual = values<float>(), expected = values<float>();
    LegoCall call{};
    call.packed = packed.data();
    call.packed_bytes = static_cast<int64_t>(packed.size());
    call.x = x.data();
    call.channels = number();
    call.bias = bias.empty() ? nullptr : bias.data();
    call.residual = residual.empty() ? nullptr : residual.data();
    for (int64_t& n : call.numbers) n = number();
    const size_t guard = 64;
    const float canary = 12345.5f;
    std::vector<float> y(expected.size() + 2 * guard, canary);
    call.y = y.data() + guard;
    const std::vector<char> packed_before = packed;
    const std::vector<float> x_before = x;
    const int64_t status = lego_conv2d(&call);
    if (status != status_wanted) {
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
  std::printf("%s: %lld calls, worst error %.1e\n", lego_isa(), static_cast<long long>(n_cases),
              worst);
  return 0;
}
