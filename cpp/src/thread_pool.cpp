#include "thread_pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ssmcore/error.h"

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

class ThreadPool::Workers {
 public:
  explicit Workers(int num_threads) { start(num_threads); }
  ~Workers() { stop(); }

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }
  bool is_asleep() const { return num_awake_.load(std::memory_order_relaxed) == 0; }
  bool forked() const { return owner_pid_ != getpid(); }

  void set_num_threads(int num_threads) {
    std::lock_guard<std::mutex> lock(use_);
    const int before = this->num_threads();
    if (num_threads == before) return;
    stop();
    try {
      start(num_threads);
    } catch (const Error&) {
      start(before);
      throw;
    }
  }

  void run(int64_t num_tasks, int max_workers, const void* body, TaskFn call) {
    std::unique_lock<std::mutex> lock(use_, std::defer_lock);
    if (num_tasks <= 1 || max_workers <= 1 || forked() || !lock.try_lock() || threads_.empty()) {
      for (int64_t task = 0; task < num_tasks; ++task) call(body, task, 0);
      return;
    }
    body_ = body;
    call_ = call;
    num_tasks_ = num_tasks;
    max_workers_ = max_workers;
    next_task_ = 0;
    next_worker_ = 1;
    joined_.store(kOpen, std::memory_order_release);
    {
      std::lock_guard<std::mutex> wake_lock(wake_mutex_);
      ++generation_;
    }
    if (max_workers > static_cast<int>(threads_.size()))
      wake_.notify_all();
    else
      for (int i = 1; i < max_workers; ++i) wake_.notify_one();
    run_tasks(0);
    joined_.fetch_and(~kOpen, std::memory_order_relaxed);
    const auto all_done = [&] { return joined_.load(std::memory_order_acquire) == 0; };
    while (!spin_until(all_done)) std::this_thread::yield();
  }

 private:
  void start(int num_threads) {
    num_threads_ = num_threads;
    stopping_ = false;
    try {
      while (static_cast<int>(threads_.size()) < num_threads - 1)
        threads_.emplace_back(&Workers::work, this, generation_.load());
    } catch (const std::system_error&) {
      stop();
      throw Error(ErrorCode::out_of_memory,
                  "context: cannot start " + std::to_string(num_threads) + " threads");
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(wake_mutex_);
      stopping_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void run_tasks(int worker) {
    for (;;) {
      const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks_) return;
      call_(body_, task, worker);
    }
  }

  // Enters the running loop, unless it has closed.
  bool join() {
    uint32_t joined = joined_.load(std::memory_order_relaxed);
    while (joined & kOpen)
      if (joined_.compare_exchange_weak(joined, joined + 1, std::memory_order_acquire)) return true;
    return false;
  }

  void work(uint64_t seen) {
    num_awake_.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(called)) {
        num_awake_.fetch_sub(1, std::memory_order_relaxed);
        std::unique_lock<std::mutex> lock(wake_mutex_);
        wake_.wait(lock, called);
        num_awake_.fetch_add(1, std::memory_order_relaxed);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) break;
      if (!join()) continue;
      const int worker = next_worker_.fetch_add(1, std::memory_order_relaxed);
      if (worker < max_workers_) run_tasks(worker);
      joined_.fetch_sub(1, std::memory_order_release);
    }
    num_awake_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::mutex use_;  // held by the thread whose loop is running
  std::atomic<int> num_threads_{1};
  std::atomic<int> num_awake_{0};     // workers
  std::vector<std::thread> threads_;  // all but the callers'
  const int owner_pid_ = getpid();

  const void* body_ = nullptr;
  TaskFn call_ = nullptr;
  int64_t num_tasks_ = 0;
  int max_workers_ = 0;
  std::atomic<int64_t> next_task_{0};
  std::atomic<int> next_worker_{1};
  // The loop that is open to workers: how many have joined it, and whether more may.
  static constexpr uint32_t kOpen = 1u << 31;
  std::atomic<uint32_t> joined_{0};

  std::mutex wake_mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};  // one more for every loop, and for stopping
  std::atomic<bool> stopping_{false};
};

ThreadPool::ThreadPool(int num_threads) : workers_(std::make_unique<Workers>(num_threads)) {}

ThreadPool::~ThreadPool() {
  abandon_after_fork();
}

int ThreadPool::num_threads() const {
  return workers_->num_threads();
}

void ThreadPool::set_num_threads(int num_threads) {
  abandon_after_fork();
  if (workers_)
    workers_->set_num_threads(num_threads);
  else
    workers_ = std::make_unique<Workers>(num_threads);
}

bool ThreadPool::is_asleep() const {
  return workers_->is_asleep();
}

void ThreadPool::run(int64_t num_tasks, int max_workers, const void* body, TaskFn call) {
  workers_->run(num_tasks, max_workers, body, call);
}

void ThreadPool::abandon_after_fork() {
  if (workers_->forked()) workers_.release();  // NOLINT: lost on purpose
}

}  // namespace ssmcore
