// Runs the reductions without XLA or Python, for sanitizers: two threads on two
// communicators, every dtype, op and wire, over real MPI calls and through shared
// memory, while a third looks where they are. Built by sanitize.sh.
#include <dlfcn.h>
#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels.h"
#include "node.h"
#include "reduce.h"
#include "stacks.h"
#include "tiers.h"

namespace {

using namespace jaxcomm;

template <typename Handle>
uint64_t Word(Handle handle) {
  uint64_t word = 0;
  std::memcpy(&word, &handle, sizeof handle);
  return word;
}

void Store(DType dtype, char* to, double value) {
  const float f = static_cast<float>(value);
  switch (dtype) {
    case kF32: case kC64: std::memcpy(to, &f, 4); break;
    case kF64: case kC128: std::memcpy(to, &value, 8); break;
    case kBF16: case kF16: ChosenKernels().encode[dtype](&f, to, 1, 1.0f); break;
    case kI8: case kU8: case kBool: *to = static_cast<char>(value); break;
    case kI16: case kU16: { auto x = static_cast<int16_t>(value); std::memcpy(to, &x, 2); break; }
    case kI32: case kU32: { auto x = static_cast<int32_t>(value); std::memcpy(to, &x, 4); break; }
    case kI64: case kU64: { auto x = static_cast<int64_t>(value); std::memcpy(to, &x, 8); break; }
    case kDTypes: break;
  }
}

double Read(DType dtype, const char* from) {
  switch (dtype) {
    case kF32: case kC64: { float x; std::memcpy(&x, from, 4); return x; }
    case kF64: case kC128: { double x; std::memcpy(&x, from, 8); return x; }
    case kBF16: case kF16: {
      uint16_t h;
      float x;
      std::memcpy(&h, from, 2);
      ChosenKernels().decode[dtype](&h, &x, 1, 1.0f, 1);
      return x;
    }
    case kI8: case kU8: case kBool: return *from;
    case kI16: case kU16: { int16_t x; std::memcpy(&x, from, 2); return x; }
    case kI32: case kU32: { int32_t x; std::memcpy(&x, from, 4); return x; }
    case kI64: case kU64: { int64_t x; std::memcpy(&x, from, 8); return x; }
    case kDTypes: break;
  }
  return 0;
}

double Expected(Op op, int size, int64_t i) {
  double result = static_cast<double>(i % 2);
  for (int rank = 1; rank < size; ++rank) {
    const double x = static_cast<double>((i + rank) % 2);
    result = op == kSum    ? result + x
             : op == kProd ? result * x
             : op == kMin  ? std::min(result, x)
                           : std::max(result, x);
  }
  return result;
}

bool Meaningful(DType dtype, Op op) {
  const bool extreme = op == kMin || op == kMax;
  if (dtype == kBool) return extreme;
  return !extreme || (dtype != kC64 && dtype != kC128);
}

// Sizes around the limits: a lone element, a packed leaf, one beyond the staging
// buffer, one of several segments.
constexpr int64_t kCounts[] = {1, 37, 5000, 40000};

int Check(Communicator* comm, DType dtype, Op op, bool mean, DType wire,
          Algorithm algorithm) {
  const auto item = static_cast<int64_t>(kItemSize[dtype]);
  std::vector<std::vector<char>> data;
  std::vector<Leaf> leaves;
  for (const int64_t n : kCounts) {
    data.emplace_back(static_cast<size_t>(n * item));
    for (int64_t i = 0; i < n; ++i) {
      Store(dtype, data.back().data() + i * item, static_cast<double>((i + comm->rank) % 2));
    }
    leaves.push_back({data.back().data(), n});
  }
  const int divisor = mean ? comm->size : 1;
  std::lock_guard<std::mutex> lock(comm->mutex);
  if (AllReduce(comm, {dtype, op, divisor, wire, 20000, {}, algorithm}, leaves) != 0) return 1;
  for (size_t k = 0; k < leaves.size(); ++k) {
    for (int64_t i = 0; i < leaves[k].count; ++i) {
      double want = Expected(op, comm->size, i) / divisor;
      const bool integer = dtype >= kI8 && dtype <= kU64;
      if (integer) want = static_cast<double>(static_cast<int64_t>(want));
      const double got = Read(dtype, data[k].data() + i * item);
      if (got != want) {
        std::fprintf(stderr, "dtype %d op %d wire %d leaf %zu element %ld: %g, not %g\n",
                     dtype, op, wire, k, static_cast<long>(i), got, want);
        return 1;
      }
    }
  }
  return 0;
}

int CheckAll(Communicator* comm, Algorithm algorithm) {
  int failures = 0;
  for (int d = 0; d < kDTypes; ++d) {
    for (int o = 0; o < kMpiOps; ++o) {
      const auto dtype = static_cast<DType>(d);
      const auto op = static_cast<Op>(o);
      if (!Meaningful(dtype, op)) continue;
      failures += Check(comm, dtype, op, false, dtype, algorithm);
      if (op == kSum) failures += Check(comm, dtype, op, true, dtype, algorithm);
      if (dtype != kF32) continue;
      for (const DType wire : {kBF16, kF16}) {
        failures += Check(comm, dtype, op, false, wire, algorithm);
        if (op == kSum) failures += Check(comm, dtype, op, true, wire, algorithm);
      }
    }
  }
  std::vector<char> bytes(100000, static_cast<char>(comm->rank));
  failures += Broadcast(comm, 1 % comm->size, bytes.data(), 100000);
  failures += bytes[99999] != 1 % comm->size;
  return failures;
}

constexpr int64_t kWindowBytes = 1 << 16;

// Zero-filled windows of the ranks of `comm`, which are on one host.
std::vector<char*> Windows(MPI_Comm comm, int size) {
  MPI_Win window;
  void* own = nullptr;
  MPI_Win_allocate_shared(kWindowBytes, 1, MPI_INFO_NULL, comm, &own, &window);
  std::memset(own, 0, kWindowBytes);
  std::vector<char*> windows;
  for (int p = 0; p < size; ++p) {
    MPI_Aint bytes;
    int unit;
    void* address;
    MPI_Win_shared_query(window, p, &bytes, &unit, &address);
    windows.push_back(static_cast<char*>(address));
  }
  MPI_Barrier(comm);
  return windows;
}

std::unique_ptr<Node> ShareMemory(MPI_Comm comm, int rank, int size) {
  return std::make_unique<Node>(Windows(comm, size), rank, kWindowBytes, false);
}

// The ranks pretend to be on up to three hosts, neighbours on the same.
std::unique_ptr<Tiers> JoinHosts(Mpi* mpi, MPI_Comm comm, int rank, int size) {
  std::vector<int> hosts;
  for (int p = 0; p < size; ++p) hosts.push_back(p * std::min(size, 3) / size);
  MPI_Comm host;
  int locals;
  MPI_Comm_split(comm, hosts[static_cast<size_t>(rank)], rank, &host);
  MPI_Comm_size(host, &locals);
  return std::make_unique<Tiers>(mpi, Word(comm), rank, hosts, Windows(host, locals),
                                 kWindowBytes);
}

}  // namespace

int main(int argc, char** argv) {
  int level = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &level);
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&MPI_Init), &info);
  MpiHandles handles = {};
  const MPI_Datatype types[kDTypes] = {
      MPI_FLOAT, MPI_DOUBLE, MPI_UINT16_T, MPI_UINT16_T, MPI_INT8_T, MPI_INT16_T,
      MPI_INT32_T, MPI_INT64_T, MPI_UINT8_T, MPI_UINT16_T, MPI_UINT32_T, MPI_UINT64_T,
      MPI_UINT8_T, MPI_C_FLOAT_COMPLEX, MPI_C_DOUBLE_COMPLEX};
  const MPI_Op ops[kMpiOps] = {MPI_SUM, MPI_MIN, MPI_MAX, MPI_PROD};
  for (int i = 0; i < kDTypes; ++i) handles.dtype[i] = Word(types[i]);
  for (int i = 0; i < kMpiOps; ++i) handles.op[i] = Word(ops[i]);
  handles.byte = Word(MPI_BYTE);
  handles.in_place = reinterpret_cast<uint64_t>(MPI_IN_PLACE);
  int failures = level < MPI_THREAD_MULTIPLE, looks = 0;
  std::atomic<bool> done{false};
  std::thread looking([&] {
    while (!done) {
      looks += NativeStacks(5).find("thread") != std::string::npos;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  });
  enum Way : int { kBlocking, kSerialized, kRing, kShared, kTiers };
  for (const Way way : {kBlocking, kSerialized, kRing, kShared, kTiers}) {
    handles.serialized = way == kSerialized;
    std::string error;
    auto mpi = OpenMpi(info.dli_fname, sizeof(MPI_Comm), handles, &error);
    if (!mpi) {
      std::fprintf(stderr, "%s\n", error.c_str());
      return 1;
    }
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm comms[2];
    std::vector<std::unique_ptr<Communicator>> ours;
    int found[2] = {};
    std::vector<std::thread> threads;
    for (int k = 0; k < 2; ++k) {
      MPI_Comm_dup(MPI_COMM_WORLD, &comms[k]);
      ours.push_back(std::make_unique<Communicator>(k, mpi.get(), Word(comms[k]), rank,
                                                    size, 65536, 32768));
      std::vector<int> members(static_cast<size_t>(size));
      std::iota(members.begin(), members.end(), 0);
      if (way == kRing) {
        ours.back()->ring =
            std::make_unique<Exchange>(mpi.get(), Word(comms[k]), members, rank, 8192);
      }
      if (way == kShared) ours.back()->node = ShareMemory(comms[k], rank, size);
      if (way == kTiers) ours.back()->tiers = JoinHosts(mpi.get(), comms[k], rank, size);
    }
    for (int k = 0; k < 2; ++k) {
      threads.emplace_back([&, k] {
        for (const Algorithm algorithm : {kPairwise, kDoubling}) {
          found[k] += CheckAll(ours[static_cast<size_t>(k)].get(), algorithm);
          if (way != kTiers) break;  // there is nothing to choose
        }
      });
    }
    for (auto& thread : threads) thread.join();
    failures += found[0] + found[1];
  }
  done = true;
  looking.join();
  failures += looks == 0;
  MPI_Finalize();
  std::printf("%s: %d failures; looked %d times\n", ChosenKernels().name, failures, looks);
  return failures != 0;
}
