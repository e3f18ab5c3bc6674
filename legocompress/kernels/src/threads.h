// Run a job on several threads: the caller's and those of a pool of the library's own.
#pragma once

namespace lego {

// Calls work(context) on up to `threads` threads at once, the caller's among them, and waits for
// those that came. The caller's own call must be able to do all of the work.
void on_threads(int threads, void (*work)(void*), void* context);

// 0 for the caller of on_threads, 1 and up for the threads of the pool: the same all its life.
int thread_number();

}  // namespace lego
