// A thread that does what it is given, in order.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "exit.h"
#include "guard.h"

#ifdef __linux__
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace jaxcomm {

// Asks Linux (6.12 and newer) for short time slices for this thread. It then runs when it
// wakes, if it has used little time, and not when a busy core's slice has ended: up to 4
// ms later, as long as hundreds of kilobytes take to travel.
inline void WakePromptly() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  struct {  // sched_attr of linux/sched/types.h, first version
    uint32_t size = 48, policy = 0;
    uint64_t flags = 0;
    int32_t nice = 0;
    uint32_t priority = 0;
    uint64_t runtime = 100000, deadline = 0, period = 0;  // ns
  } attributes;
  errno = 0;
  attributes.nice = getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)));
  // Older systems refuse or ignore it.
  if (errno == 0) syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

class Worker {
 public:
  // `prepare()` is the first thing that the thread does.
  explicit Worker(void (*prepare)() = nullptr)
      : thread_([this, prepare] {
          if (prepare != nullptr) prepare();
          Run();
        }) {}
  ~Worker() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void Add(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Run() {
    WakePromptly();
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      // A program waits for what the task was to say.
      Guarded([&task] { task(); }, [](const char* text) {
        EndProcess(std::string(text) + "\n", kStalled);
      });
      lock.lock();
    }
  }

  // Guards `tasks_` and `stop_`; not held while a task runs.
  std::mutex mutex_;
  // Signalled when either changes; only the thread waits for it.
  std::condition_variable wake_;
  // What is still to be done, in order: added by any thread, taken by `thread_`.
  std::deque<std::function<void()>> tasks_;
  // Set by the destructor: the thread ends when it has done all tasks.
  bool stop_ = false;
  // Runs Run(). Last: it uses the others from its first moment on.
  std::thread thread_;
};

}  // namespace jaxcomm
