// Run a job on several threads: by PyTorch's own OpenMP where it was found, else by a pool of ours.
#pragma once
#include <cstdint>

namespace lego {

// Calls work(context) on up to `threads` threads at once, the caller's among them, and waits.
void on_threads(int threads, void (*work)(void*), void* context);

// The address of GOMP_parallel of the OpenMP runtime that the process already uses.
void use_openmp(void* gomp_parallel);

}  // namespace lego
