#include "mpi.h"

#include <dlfcn.h>

namespace jaxcomm {
namespace {

template <typename Handle>
Handle Narrow(uint64_t word) {
  if constexpr (sizeof(Handle) == 4) {
    return static_cast<Handle>(static_cast<uint32_t>(word));
  } else {
    return reinterpret_cast<Handle>(word);
  }
}

template <typename Handle>
class MpiOf final : public Mpi {
 public:
  using AllReduceFn = int (*)(const void*, void*, int, Handle, Handle, Handle);
  using BcastFn = int (*)(void*, int, Handle, int, Handle);
  using ErrorStringFn = int (*)(int, char*, int*);

  MpiOf(AllReduceFn all_reduce, BcastFn bcast, ErrorStringFn error_string,
        const MpiHandles& handles)
      : all_reduce_(all_reduce), bcast_(bcast), error_string_(error_string),
        handles_(handles) {}

  int AllReduce(void* data, int n, DType dtype, Op op, uint64_t comm) const override {
    return all_reduce_(reinterpret_cast<void*>(handles_.in_place), data, n,
                       Narrow<Handle>(handles_.dtype[dtype]),
                       Narrow<Handle>(handles_.op[op]), Narrow<Handle>(comm));
  }

  int Broadcast(void* bytes, int n, int root, uint64_t comm) const override {
    return bcast_(bytes, n, Narrow<Handle>(handles_.byte), root, Narrow<Handle>(comm));
  }

  std::string ErrorText(int code) const override {
    char text[1024] = {};  // MPI_MAX_ERROR_STRING is 256 (Open MPI), 512 (MPICH).
    int length = 0;
    if (error_string_(code, text, &length) != 0 || length <= 0) {
      return "MPI error " + std::to_string(code);
    }
    return std::string(text, static_cast<size_t>(length));
  }

 private:
  AllReduceFn all_reduce_;
  BcastFn bcast_;
  ErrorStringFn error_string_;
  MpiHandles handles_;
};

// A preloaded PMPI tool stands in the global scope and must see our calls, so it
// is asked first. libmpi itself is loaded with local scope by mpi4py.
void* Find(void* library, const char* name, std::string* error) {
  if (void* tool = dlsym(RTLD_DEFAULT, name)) return tool;
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) *error = std::string("no entry point ") + name;
  return symbol;
}

template <typename Handle>
std::unique_ptr<Mpi> Bind(void* library, const MpiHandles& handles, std::string* error) {
  using Of = MpiOf<Handle>;
  void* all_reduce = Find(library, "MPI_Allreduce", error);
  void* bcast = Find(library, "MPI_Bcast", error);
  void* error_string = Find(library, "MPI_Error_string", error);
  if (!all_reduce || !bcast || !error_string) return nullptr;
  return std::make_unique<Of>(reinterpret_cast<typename Of::AllReduceFn>(all_reduce),
                              reinterpret_cast<typename Of::BcastFn>(bcast),
                              reinterpret_cast<typename Of::ErrorStringFn>(error_string),
                              handles);
}

}  // namespace

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
