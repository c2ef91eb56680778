// The CPU threads of a Context.
#pragma once

#include <cstdint>
#include <memory>

namespace ssmcore {

// Runs loops over independent tasks. A task's result must not depend on which worker runs it, so
// results do not depend on the number of threads either. Workers sleep when there is no work.
class ThreadPool {
 public:
  // Throws Error(out_of_memory) when the system has no more threads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();

  int num_threads() const;
  void set_num_threads(int num_threads);

  // Whether all workers sleep, so that a loop would have to wake one.
  bool is_asleep() const;

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
  class Workers;
  using TaskFn = void (*)(const void* body, int64_t task, int worker);

  void run(int64_t num_tasks, int max_workers, const void* body, TaskFn call);
  // After fork() the child has the pool's memory, but not its threads: nothing that they shared can
  // be used or destroyed any more.
  void abandon_after_fork();

  std::unique_ptr<Workers> workers_;
};

// Cores this process may run on.
int available_cores();

}  // namespace ssmcore
