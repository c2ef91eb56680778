// ThreadPool: every task once, whoever calls and whatever happens to the threads meanwhile.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "thread_pool.h"

using namespace ssmcore;

namespace {

// Runs a loop and tells whether every task ran exactly once, on a worker below `max_workers` that
// ran nothing else at that time.
bool runs_each_task_once(ThreadPool& pool, int64_t num_tasks, int max_workers) {
  std::vector<std::atomic<int>> runs(num_tasks);
  std::vector<std::atomic<int>> running(std::max(max_workers, 1));
  std::atomic<bool> exclusive{true};
  pool.parallel_for(num_tasks, max_workers, [&](int64_t task, int worker) {
    if (worker < 0 || worker >= static_cast<int>(running.size()) || running[worker]++ != 0) {
      exclusive = false;
      return;
    }
    ++runs[task];
    --running[worker];
  });
  return exclusive &&
         std::all_of(runs.begin(), runs.end(), [](const auto& count) { return count == 1; });
}

}  // namespace

TEST_CASE("ThreadPool: every task runs once, on its own worker") {
  for (const int num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    CHECK(pool.num_threads() == num_threads);
    for (const int64_t num_tasks : {0, 1, 2, 7, 1000})
      for (const int max_workers : {1, 2, num_threads, 100})
        CHECK(runs_each_task_once(pool, num_tasks, max_workers));
  }
}

TEST_CASE("ThreadPool: several workers run at the same time") {
  ThreadPool pool(3);
  // Three tasks that wait for one another can only end on three threads.
  std::atomic<int> arrived{0};
  pool.parallel_for(3, 3, [&](int64_t, int) {
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
  });
  CHECK(arrived == 3);
}

TEST_CASE("ThreadPool: workers that have gone to sleep are woken") {
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK(runs_each_task_once(pool, 50, 2));
  }
}

TEST_CASE("ThreadPool: many short loops in a row") {
  ThreadPool pool(4);
  int64_t total = 0;
  for (int round = 0; round < 5000; ++round) {
    std::atomic<int64_t> sum{0};
    pool.parallel_for(4, 4, [&](int64_t task, int) { sum += task; });
    total += sum;
  }
  CHECK(total == 5000 * (0 + 1 + 2 + 3));
}

TEST_CASE("ThreadPool: callers share it while its size changes") {
  ThreadPool pool(2);
  std::atomic<bool> all_well{true};
  std::atomic<int> callers{4};
  std::vector<std::thread> threads;
  for (int caller = 0; caller < 4; ++caller)
    threads.emplace_back([&] {
      for (int round = 0; round < 300; ++round)
        if (!runs_each_task_once(pool, 20, 8)) all_well = false;
      --callers;
    });
  for (int n = 1; callers > 0; n = n % 5 + 1) {
    pool.set_num_threads(n);
    if (pool.num_threads() != n) all_well = false;
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(all_well);
}

TEST_CASE("ThreadPool: a forked child works alone, then with threads of its own") {
  ThreadPool pool(3);
  REQUIRE(runs_each_task_once(pool, 100, 3));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    bool all_well = runs_each_task_once(pool, 100, 3);
    pool.set_num_threads(2);
    all_well &= runs_each_task_once(pool, 100, 2);
    _exit(all_well ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(runs_each_task_once(pool, 100, 3));
}
