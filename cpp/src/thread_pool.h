// The CPU threads of a Context.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace ssmcore {

// Runs loops over independent tasks. A task's result must not depend on which worker runs it, so
// results do not depend on the number of threads either. Workers sleep when there is no work.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }
  void set_num_threads(int num_threads);

  // Calls body(task, worker) once for every task in [0, num_tasks); `worker`, in
  // [0, max_workers), is unique among the calls running at one time. Tasks must neither throw nor
  // use the pool. When another thread is using it, the caller runs all tasks itself; and it never
  // waits for a worker that is slow to wake.
  template <typename Body>
  void parallel_for(int64_t num_tasks, int max_workers, const Body& body) {
    run(num_tasks, max_workers, &body, [](const void* f, int64_t task, int worker) {
      (*static_cast<const Body*>(f))(task, worker);
    });
  }

 private:
  using TaskFn = void (*)(const void* body, int64_t task, int worker);

  void run(int64_t num_tasks, int max_workers, const void* body, TaskFn call);
  void run_tasks(int worker);
  void work(int worker, uint64_t seen);
  bool join();
  void start(int num_threads);
  void stop();

  std::mutex use_;  // held by the thread whose loop is running
  std::atomic<int> num_threads_{1};
  std::vector<std::thread> workers_;
  int owner_pid_ = 0;  // threads do not survive fork()

  const void* body_ = nullptr;
  TaskFn call_ = nullptr;
  int64_t num_tasks_ = 0;
  int max_workers_ = 0;
  std::atomic<int64_t> next_task_{0};
  // The loop that is open to workers: how many have joined it, and whether more may.
  static constexpr uint32_t kOpen = 1u << 31;
  std::atomic<uint32_t> joined_{0};

  std::mutex wake_mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};  // one more for every loop, and for stopping
  std::atomic<bool> stopping_{false};
};

// Cores this process may run on.
int available_cores();

}  // namespace ssmcore
