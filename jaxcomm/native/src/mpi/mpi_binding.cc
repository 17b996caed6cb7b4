#include "mpi_binding.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

#include "kernels.h"

namespace jaxcomm {
namespace {

// Held around every MPI call of this process under MPI_THREAD_SERIALIZED.
std::mutex turn;

template <typename Handle>
Handle Narrow(uint64_t word) {
  if constexpr (sizeof(Handle) == 4) {
    return static_cast<Handle>(static_cast<uint32_t>(word));
  } else {
    return reinterpret_cast<Handle>(word);
  }
}

template <typename Handle>
uint64_t Widen(Handle handle) {
  if constexpr (sizeof(Handle) == 4) {
    return static_cast<uint32_t>(handle);
  } else {
    return reinterpret_cast<uint64_t>(handle);
  }
}

// An MPI_User_function; the datatype argument is a pointer to a handle of either width.
using UserFn = void (*)(void* in, void* inout, int* n, void* datatype);

// MPI may run the operation inside another thread's call. It orders that with the call
// that asked for it, but unseen by ThreadSanitizer, which is told here.
std::atomic<uint64_t> handed_over{0};
void HandOver() { handed_over.fetch_add(1, std::memory_order_acq_rel); }

template <DType kType, Op kOp>
void Combine(void* in, void* inout, int* n, void*) {
  HandOver();
  ChosenKernels().combine[kType][kOp](in, inout, *n);
  HandOver();
}

struct UserOp {
  DType dtype;
  Op op;
  UserFn function;
};

constexpr UserOp kUserOps[] = {
    {kBF16, kSum, Combine<kBF16, kSum>}, {kBF16, kProd, Combine<kBF16, kProd>},
    {kBF16, kMin, Combine<kBF16, kMin>}, {kBF16, kMax, Combine<kBF16, kMax>},
    {kF16, kSum, Combine<kF16, kSum>},   {kF16, kProd, Combine<kF16, kProd>},
    {kF16, kMin, Combine<kF16, kMin>},   {kF16, kMax, Combine<kF16, kMax>},
    {kF32, kMin, Combine<kF32, kMin>},   {kF32, kMax, Combine<kF32, kMax>},
    {kF64, kMin, Combine<kF64, kMin>},   {kF64, kMax, Combine<kF64, kMax>},
    {kF32, kMeanOfTwo, Combine<kF32, kMeanOfTwo>},
    {kF64, kMeanOfTwo, Combine<kF64, kMeanOfTwo>},
    {kBF16, kMeanOfTwo, Combine<kBF16, kMeanOfTwo>},
    {kF16, kMeanOfTwo, Combine<kF16, kMeanOfTwo>},
};

// A preloaded PMPI tool stands in the global scope and must see our calls, so it
// is asked first. libmpi itself is loaded with local scope by mpi4py.
template <typename Fn>
bool Find(void* library, const char* name, Fn* function, std::string* error) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  if (symbol == nullptr) symbol = dlsym(library, name);
  if (symbol == nullptr) {
    *error = std::string("no entry point ") + name;
    return false;
  }
  *function = reinterpret_cast<Fn>(symbol);
  return true;
}

template <typename Handle>
struct Entries {
  int (*all_reduce)(const void*, void*, int, Handle, Handle, Handle);
  int (*broadcast)(void*, int, Handle, int, Handle);
  int (*i_all_reduce)(const void*, void*, int, Handle, Handle, Handle, Handle*);
  int (*i_broadcast)(void*, int, Handle, int, Handle, Handle*);
  int (*i_all_gather)(const void*, int, Handle, void*, int, Handle, Handle, Handle*);
  int (*i_all_to_all)(const void*, int, Handle, void*, int, Handle, Handle, Handle*);
  int (*i_reduce_scatter)(const void*, void*, int, Handle, Handle, Handle, Handle*);
  int (*i_send)(const void*, int, Handle, int, int, Handle, Handle*);
  int (*i_receive)(void*, int, Handle, int, int, Handle, Handle*);
  int (*test)(Handle*, int*, void*);
  int (*error_string)(int, char*, int*);
  int (*op_create)(UserFn, int, Handle*);

  bool Resolve(void* library, std::string* error) {
    return Find(library, "MPI_Allreduce", &all_reduce, error) &&
           Find(library, "MPI_Bcast", &broadcast, error) &&
           Find(library, "MPI_Iallreduce", &i_all_reduce, error) &&
           Find(library, "MPI_Ibcast", &i_broadcast, error) &&
           Find(library, "MPI_Iallgather", &i_all_gather, error) &&
           Find(library, "MPI_Ialltoall", &i_all_to_all, error) &&
           Find(library, "MPI_Ireduce_scatter_block", &i_reduce_scatter, error) &&
           Find(library, "MPI_Isend", &i_send, error) &&
           Find(library, "MPI_Irecv", &i_receive, error) &&
           Find(library, "MPI_Test", &test, error) &&
           Find(library, "MPI_Error_string", &error_string, error) &&
           Find(library, "MPI_Op_create", &op_create, error);
  }
};

template <typename Handle>
class MpiOf final : public Mpi {
 public:
  MpiOf(const Entries<Handle>& entries, const MpiHandles& handles)
      : mpi_(entries), handles_(handles) {
    for (auto& row : ops_) {
      for (int op = 0; op < kMpiOps; ++op) row[op] = handles.op[op];
      row[kMeanOfTwo] = 0;
    }
  }

  int CreateOps() {
    for (const UserOp& user : kUserOps) {
      Handle op;
      const int code = mpi_.op_create(user.function, /*commute=*/1, &op);
      if (code != 0) return code;
      ops_[user.dtype][user.op] = Widen(op);
    }
    return 0;
  }

  int AllReduce(void* data, int n, DType dtype, Op op, uint64_t comm) override {
    if (!handles_.serialized) {
      HandOver();
      const int code =
          mpi_.all_reduce(InPlace(), data, n, Narrow<Handle>(handles_.dtype[dtype]),
                          Narrow<Handle>(ops_[dtype][op]), Narrow<Handle>(comm));
      HandOver();
      return code;
    }
    return PatientAllReduce(data, n, dtype, op, comm);
  }

  int PatientAllReduce(void* data, int n, DType dtype, Op op, uint64_t comm) override {
    return TakeTurns([&](Handle* request) {
      return mpi_.i_all_reduce(InPlace(), data, n, Narrow<Handle>(handles_.dtype[dtype]),
                               Narrow<Handle>(ops_[dtype][op]), Narrow<Handle>(comm),
                               request);
    });
  }

  int Broadcast(void* bytes, int n, int root, uint64_t comm) override {
    const Handle byte = Narrow<Handle>(handles_.byte);
    const Handle on = Narrow<Handle>(comm);
    if (!handles_.serialized) return mpi_.broadcast(bytes, n, byte, root, on);
    return TakeTurns([&](Handle* request) {
      return mpi_.i_broadcast(bytes, n, byte, root, on, request);
    });
  }

  int AllGather(const void* from, void* to, int n, uint64_t comm) override {
    const Handle byte = Narrow<Handle>(handles_.byte);
    return TakeTurns([&](Handle* request) {
      return mpi_.i_all_gather(from, n, byte, to, n, byte, Narrow<Handle>(comm), request);
    });
  }

  int AllToAll(const void* from, void* to, int n, uint64_t comm) override {
    const Handle byte = Narrow<Handle>(handles_.byte);
    return TakeTurns([&](Handle* request) {
      return mpi_.i_all_to_all(from, n, byte, to, n, byte, Narrow<Handle>(comm), request);
    });
  }

  int ReduceScatter(const void* from, void* to, int n, DType dtype, Op op,
                    uint64_t comm) override {
    return TakeTurns([&](Handle* request) {
      return mpi_.i_reduce_scatter(from, to, n, Narrow<Handle>(handles_.dtype[dtype]),
                                   Narrow<Handle>(ops_[dtype][op]), Narrow<Handle>(comm),
                                   request);
    });
  }

  int Exchange(const void* from, int target, void* to, int source, int n,
               uint64_t comm) override {
    const Handle byte = Narrow<Handle>(handles_.byte);
    const Handle on = Narrow<Handle>(comm);
    Handle sent, received;
    int code = 0;
    Locked([&] {
      if (source >= 0) code = mpi_.i_receive(to, n, byte, source, 0, on, &received);
      if (code == 0 && target >= 0) code = mpi_.i_send(from, n, byte, target, 0, on, &sent);
    });
    if (code == 0 && source >= 0) code = Finish(&received);
    if (code == 0 && target >= 0) code = Finish(&sent);
    return code;
  }

  int StartSend(const void* from, int n, int target, int tag, uint64_t comm,
                uint64_t* request) override {
    const Handle byte = Narrow<Handle>(handles_.byte);
    Handle sent;
    int code = 0;
    Locked([&] {
      code = mpi_.i_send(from, n, byte, target, tag, Narrow<Handle>(comm), &sent);
    });
    if (code == 0) *request = Widen(sent);
    return code;
  }

  int StartReceive(void* to, int n, int source, int tag, uint64_t comm,
                   uint64_t* request) override {
    const Handle byte = Narrow<Handle>(handles_.byte);
    Handle received;
    int code = 0;
    Locked([&] {
      code = mpi_.i_receive(to, n, byte, source, tag, Narrow<Handle>(comm), &received);
    });
    if (code == 0) *request = Widen(received);
    return code;
  }

  int Test(uint64_t* request, bool* done) override {
    Handle handle = Narrow<Handle>(*request);
    int flag = 0;
    const int code = TestLocked(&handle, &flag);
    *request = Widen(handle);
    *done = flag != 0;
    return code;
  }

  uint64_t OpHandle(DType dtype, Op op) override { return ops_[dtype][op]; }

  std::string ErrorText(int code) override {
    char text[1024] = {};  // MPI_MAX_ERROR_STRING is 256 (Open MPI), 512 (MPICH).
    int length = 0;
    if (mpi_.error_string(code, text, &length) != 0 || length <= 0) {
      return "MPI error " + std::to_string(code);
    }
    return std::string(text, static_cast<size_t>(length));
  }

 private:
  void* InPlace() const { return reinterpret_cast<void*>(handles_.in_place); }

  template <typename Call>
  void Locked(Call call) {
    if (handles_.serialized) LockMpi();
    call();
    if (handles_.serialized) UnlockMpi();
  }

  // A blocking call inside the lock could wait for a peer that waits for another of
  // our threads. So: start it, then test for its end, and let others in between.
  template <typename Start>
  int TakeTurns(Start start) {
    Handle request;
    int code = 0;
    HandOver();
    Locked([&] { code = start(&request); });
    return code == 0 ? Finish(&request) : code;
  }

  int Finish(Handle* request) {
    Patience patience;
    int code = 0, done = 0;
    while (true) {
      code = TestLocked(request, &done);
      if (code != 0 || done) return code;
      patience.Wait();
    }
  }

  int TestLocked(Handle* request, int* done) {
    // MPI_STATUS_IGNORE has no portable value; no MPI has a status this large.
    alignas(16) char status[256];
    int code = 0;
    Locked([&] { code = mpi_.test(request, done, status); });
    if (*done) HandOver();
    return code;
  }

  Entries<Handle> mpi_;
  MpiHandles handles_;
  uint64_t ops_[kDTypes][kOps];
};

template <typename Handle>
std::unique_ptr<Mpi> Bind(void* library, const MpiHandles& handles, std::string* error) {
  Entries<Handle> entries;
  if (!entries.Resolve(library, error)) return nullptr;
  auto mpi = std::make_unique<MpiOf<Handle>>(entries, handles);
  if (const int code = mpi->CreateOps(); code != 0) {
    *error = "MPI_Op_create: " + mpi->ErrorText(code);
    return nullptr;
  }
  return mpi;
}

}  // namespace

void LockMpi() { turn.lock(); }
void UnlockMpi() { turn.unlock(); }

std::unique_ptr<Mpi> OpenMpi(const char* path, int handle_bytes,
                             const MpiHandles& handles, std::string* error) {
  void* library = dlopen(path, RTLD_NOLOAD | RTLD_NOW);
  if (library == nullptr) {
    *error = std::string("not loaded in this process: ") + path;
    return nullptr;
  }
  if (handle_bytes == 8) return Bind<void*>(library, handles, error);
  if (handle_bytes == 4) return Bind<int>(library, handles, error);
  *error = "MPI handles of " + std::to_string(handle_bytes) + " bytes; expected 4 or 8";
  return nullptr;
}

}  // namespace jaxcomm
