// The fake NCCL's groups and the frame of every call.
//
// A call checks its arguments and queues what it has to do; the queue runs at once, or
// in GroupEnd for all calls of a group. It runs in the calling thread; or in one of its
// own for nonblocking communicators, and where that is injected.
#pragma once

#include <functional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fake_nccl_transfer.h"

namespace jaxcomm {

// Making or ending a communicator; runs before the group's transfers.
struct Founding {
  NcclComm* comm;
  std::function<void()> run;
};

enum class Where { kHere, kBackground, kNowhere };

struct Group {
  int depth = 0;
  NcclResult error = kNcclSuccess;
  Where where = Where::kHere;
  std::vector<Founding> foundings;
  std::vector<Transfer> transfers;
};

inline thread_local Group group;
inline std::atomic<int> groups{0};

inline std::string Text(const char* call, const std::string& what) {
  return std::string(call) + ": " + what;
}

// Runs the body of a call and what has been injected for it. `comms`: whose abort ends a
// stall.
template <typename Body>
NcclResult Run(const char* call, const std::vector<NcclComm*>& comms, Body&& body) {
  try {
    const Injection injected = Inject(call);
    if (injected.kind == Injection::kError) {
      Fail(injected.result, Text(call, "injected error"));
    }
    if (injected.kind == Injection::kStall) {
      const Working working(comms);
      Hang();
    }
    const NcclResult result =
        body(injected.kind == Injection::kInProgress  ? Where::kBackground
             : injected.kind == Injection::kNeverDone ? Where::kNowhere
                                                      : Where::kHere);
    if (injected.kind == Injection::kAsync) {
      SetError(Text(call, "injected asynchronous error"));
      for (NcclComm* comm : comms) comm->poisoned = injected.result;
    }
    return result;
  } catch (const Failure& failure) {
    for (NcclComm* comm : comms) {
      int fine = kNcclSuccess;
      if (!comm->blocking) comm->state.compare_exchange_strong(fine, failure.result);
    }
    if (group.depth > 0 && group.error == kNcclSuccess) group.error = failure.result;
    return failure.result;
  }
}

inline void CheckPointer(const char* call, const void* pointer, const char* name) {
  if (!pointer) Fail(kNcclInvalidArgument, Text(call, std::string(name) + " is null"));
}

inline bool Alive(const NcclComm* comm) { return comm && !comm->dead && !comm->aborted; }

// For the calls whose abort must be noticed, before any of them looks at the pointer.
inline std::vector<NcclComm*> Those(NcclComm* comm) {
  return Alive(comm) ? std::vector<NcclComm*>{comm} : std::vector<NcclComm*>{};
}

inline NcclResult AsyncError(const NcclComm* comm) {
  const int poisoned = comm->poisoned;
  return static_cast<NcclResult>(poisoned ? poisoned : comm->state.load());
}

inline void CheckComm(const char* call, const NcclComm* comm) {
  CheckPointer(call, comm, "communicator");
  if (!Alive(comm)) {
    Fail(kNcclInvalidArgument, Text(call, "communicator was destroyed or aborted"));
  }
}

inline void CheckReady(const char* call, const NcclComm* comm) {
  CheckComm(call, comm);
  const NcclResult state = AsyncError(comm);
  if (state == kNcclInProgress) {
    Fail(kNcclInvalidArgument, Text(call, "the communicator's last call is in progress"));
  }
  if (state != kNcclSuccess) {
    Fail(state, Text(call, "the communicator has had an asynchronous error"));
  }
}

// No other thread may use the communicators meanwhile.
class Exclusive {
 public:
  explicit Exclusive(const std::vector<NcclComm*>& comms) {
    for (NcclComm* comm : comms) {
      if (comm->busy.exchange(true)) {
        Release();
        Fail(kNcclInvalidUsage, "two threads use a communicator at once");
      }
      held_.push_back(comm);
    }
  }
  ~Exclusive() { Release(); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  void Release() {
    for (NcclComm* comm : held_) comm->busy = false;
  }

  std::vector<NcclComm*> held_;
};

inline void Execute(const std::vector<NcclComm*>& comms, const Group& work) {
  const Working working(comms);
  CheckAborted();
  for (const NcclComm* comm : comms) CheckComm("ncclGroupEnd", comm);
  const Exclusive exclusive(comms);
  if (work.where == Where::kNowhere) Hang();
  for (const Founding& founding : work.foundings) founding.run();
  RunTransfers(work.transfers);
}

inline std::vector<NcclComm*> CommsOf(const Group& work) {
  std::set<NcclComm*> comms;
  for (const Founding& founding : work.foundings) comms.insert(founding.comm);
  for (const Transfer& t : work.transfers) comms.insert(t.comm);
  return {comms.begin(), comms.end()};
}

// Runs what has been queued, here or in a thread.
inline NcclResult Launch(Group work) {
  const std::vector<NcclComm*> comms = CommsOf(work);
  if (comms.empty()) return kNcclSuccess;
  bool here = work.where == Where::kHere;
  for (const NcclComm* comm : comms) {
    if (comm->blocking != comms[0]->blocking) {
      Fail(kNcclInvalidArgument, "blocking and nonblocking communicators in one group");
    }
    // What a lone rank does needs no launch.
    const bool launched = Version() >= 22304 && comm->size > 1;
    if (!comm->blocking && (launched || !work.foundings.empty())) here = false;
  }
  if (here) {
    Execute(comms, work);
    return kNcclSuccess;
  }
  for (NcclComm* comm : comms) {
    comm->state = kNcclInProgress;
    ++comm->active;  // until the thread has ended
  }
  std::thread([comms, work = std::move(work)] {
    NcclResult result = kNcclSuccess;
    try {
      Execute(comms, work);
    } catch (const Failure& failure) {
      result = failure.result;
    }
    for (NcclComm* comm : comms) {
      comm->state = result;
      --comm->active;
    }
  }).detach();
  return kNcclInProgress;
}

inline NcclResult Submit(Where where) {
  if (group.depth > 0) return where == Where::kHere ? kNcclSuccess : kNcclInProgress;
  Group work;
  std::swap(work, group);
  work.where = where;
  return Launch(std::move(work));
}

// Waits until no thread is in a call, and leaves a tombstone.
inline void Bury(NcclComm* comm) {
  while (comm->active > 0) Sleep(300);
  if (!comm->dead.exchange(true)) Detach(comm);
}

}  // namespace jaxcomm
