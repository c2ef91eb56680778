#include "thread_pool.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ssmcore {
namespace {

// About 50 µs: longer than the gap between two operators of a block, far shorter than anything
// that a user would see as load.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
bool spin_until(const Condition& done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    pause();
  }
  return done();
}

}  // namespace

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

ThreadPool::ThreadPool(int num_threads) {
  start(num_threads);
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::set_num_threads(int num_threads) {
  std::lock_guard<std::mutex> lock(use_);
  if (num_threads == this->num_threads()) return;
  stop();
  start(num_threads);
}

void ThreadPool::start(int num_threads) {
  owner_pid_ = getpid();
  num_threads_ = num_threads;
  stopping_ = false;
  for (int worker = 1; worker < num_threads; ++worker)
    workers_.emplace_back(&ThreadPool::work, this, worker, generation_.load());
}

void ThreadPool::stop() {
  if (owner_pid_ != getpid()) {
    // A forked child has the thread objects, but not the threads.
    for (std::thread& thread : workers_) thread.detach();
    workers_.clear();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(wake_mutex_);
    stopping_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (std::thread& thread : workers_) thread.join();
  workers_.clear();
}

void ThreadPool::run(int64_t num_tasks, int max_workers, const void* body, TaskFn call) {
  std::unique_lock<std::mutex> lock(use_, std::defer_lock);
  const bool alone = num_tasks <= 1 || max_workers <= 1 || !lock.try_lock() || workers_.empty() ||
                     owner_pid_ != getpid();
  if (alone) {
    for (int64_t task = 0; task < num_tasks; ++task) call(body, task, 0);
    return;
  }
  body_ = body;
  call_ = call;
  num_tasks_ = num_tasks;
  max_workers_ = max_workers;
  next_task_ = 0;
  joined_.store(kOpen, std::memory_order_release);
  {
    std::lock_guard<std::mutex> wake_lock(wake_mutex_);
    ++generation_;
  }
  wake_.notify_all();
  run_tasks(0);
  joined_.fetch_and(~kOpen, std::memory_order_relaxed);
  const auto all_done = [&] { return joined_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(all_done)) std::this_thread::yield();
}

void ThreadPool::run_tasks(int worker) {
  for (;;) {
    const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks_) return;
    call_(body_, task, worker);
  }
}

bool ThreadPool::join() {
  uint32_t joined = joined_.load(std::memory_order_relaxed);
  while (joined & kOpen)
    if (joined_.compare_exchange_weak(joined, joined + 1, std::memory_order_acquire)) return true;
  return false;
}

void ThreadPool::work(int worker, uint64_t seen) {
  for (;;) {
    const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(called)) {
      std::unique_lock<std::mutex> lock(wake_mutex_);
      wake_.wait(lock, called);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_) return;
    if (!join()) continue;
    if (worker < max_workers_) run_tasks(worker);
    joined_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace ssmcore
