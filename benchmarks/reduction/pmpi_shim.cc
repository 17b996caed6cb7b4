// Counts MPI calls by name. Preload it: calls of jaxcomm, mpi4jax and mpi4py all come
// here first and go on to the PMPI entry points. Arguments are passed on as ten machine
// words, as the calling conventions of x86-64 and aarch64 allow.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>

namespace {

using Word = std::uintptr_t;
using Any = int (*)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);

Any Next(const char* name) {
  for (const char* library : {"libmpi.so.40", "libmpi.so.12", "libmpi.so"}) {
    if (void* handle = dlopen(library, RTLD_NOLOAD | RTLD_LAZY)) {
      if (void* symbol = dlsym(handle, name)) return reinterpret_cast<Any>(symbol);
    }
  }
  return nullptr;
}

}  // namespace

#define COUNTED(name)                                                              \
  std::atomic<std::int64_t> count_##name{0};                                       \
  extern "C" int MPI_##name(Word a, Word b, Word c, Word d, Word e, Word f, Word g, \
                            Word h, Word i, Word j) {                              \
    static const Any next = Next("PMPI_" #name);                                   \
    count_##name++;                                                                \
    return next(a, b, c, d, e, f, g, h, i, j);                                     \
  }

#define ALL(X)                                                                       \
  X(Allreduce) X(Iallreduce) X(Bcast) X(Ibcast) X(Barrier) X(Ibarrier) X(Gather)     \
  X(Gatherv) X(Allgather) X(Allgatherv) X(Iallgather) X(Iallgatherv) X(Scatter)      \
  X(Scatterv) X(Alltoall) X(Alltoallv) X(Reduce) X(Reduce_scatter)                   \
  X(Reduce_scatter_block) X(Scan) X(Send) X(Isend) X(Ssend) X(Recv) X(Irecv)         \
  X(Sendrecv) X(Probe) X(Iprobe) X(Mprobe) X(Improbe) X(Mrecv) X(Put) X(Get)         \
  X(Accumulate) X(Comm_dup) X(Comm_split)

ALL(COUNTED)

#define NAME(name) #name " "
#define VALUE(name) out[k++] = count_##name;

extern "C" const char* pmpi_shim_names() { return ALL(NAME); }

extern "C" void pmpi_shim_counts(std::int64_t* out) {
  int k = 0;
  ALL(VALUE)
}
