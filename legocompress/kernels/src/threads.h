// Runs a job on several threads: the caller's and those of the library's own pool.
#pragma once

namespace lego {

// Calls work(context) on up to `threads` threads at once, the caller's among them, and waits for the
// threads that joined. The caller's own call must be able to do all of the work.
void run_on_threads(int threads, void (*work)(void*), void* context);

// The number of the calling thread, which never changes: 1 and up in the pool, 0 in other threads.
int thread_number();

}  // namespace lego
