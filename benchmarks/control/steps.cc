// Rank 0's work in Horovod's coordinator, and every rank's with cached responses, for
// worker.py to time. The steps follow the description of Horovod's controller: read
// every request into an object, file it under its tensor's name, and once all ranks
// have sent one, go through them to compare dtype, shape and the rest. The wire format
// is ours, of the size that a FlatBuffers request has (132 bytes: four dimensions, a
// name of 40 characters).

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr int kNameBytes = 40;
constexpr int kDims = 4;

#pragma pack(push, 4)
struct Wire {
  int32_t rank, kind, dtype, root, device, group, dims, name_bytes;
  int64_t shape[kDims];
  double prescale, postscale;
  char name[kNameBytes];
  int32_t pad[3];
};
#pragma pack(pop)
static_assert(sizeof(Wire) == 132, "the size of a FlatBuffers request");

struct Request {
  int32_t rank, kind, dtype, root, device, group;
  std::vector<int64_t> shape;
  double prescale, postscale;
  std::string name;
};

struct Response {
  std::vector<std::string> names;
  std::vector<int32_t> devices;
  std::vector<int64_t> sizes;
};

bool agree(const std::vector<Request>& all) {
  const Request& first = all.front();
  // One pass per property, as the error of each is worded differently.
  for (const Request& r : all)
    if (r.dtype != first.dtype) return false;
  for (const Request& r : all)
    if (r.kind != first.kind || r.root != first.root) return false;
  for (const Request& r : all)
    if (r.prescale != first.prescale || r.postscale != first.postscale) return false;
  for (const Request& r : all)
    if (r.shape != first.shape) return false;
  return true;
}

std::string name_of(int tensor) {
  std::string name = "DistributedAdam_Allreduce/gradient_" + std::to_string(tensor);
  name.resize(kNameBytes, '_');
  return name;
}

}  // namespace

extern "C" {

// Writes one rank's requests; returns their bytes.
int64_t write_requests(char* out, int rank, int tensors) {
  for (int t = 0; t < tensors; ++t) {
    Wire w{rank, 0, 7, -1, 0, -1, kDims, kNameBytes, {3, 3, 256, 64 + t}, 1.0, 1.0,
           {}, {}};
    std::memcpy(w.name, name_of(t).data(), kNameBytes);
    std::memcpy(out + t * sizeof(Wire), &w, sizeof(Wire));
  }
  return tensors * static_cast<int64_t>(sizeof(Wire));
}

// Reads the requests of all ranks, counts them by tensor and makes a response of every
// tensor that is complete; returns how many are.
int count_requests(const char* in, int64_t bytes, int ranks) {
  std::unordered_map<std::string, std::vector<Request>> table;
  std::vector<Response> responses;
  for (const char* p = in; p < in + bytes; p += sizeof(Wire)) {
    Wire w;
    std::memcpy(&w, p, sizeof(Wire));
    Request r{w.rank, w.kind, w.dtype, w.root, w.device, w.group,
              std::vector<int64_t>(w.shape, w.shape + w.dims), w.prescale, w.postscale,
              std::string(w.name, w.name_bytes)};
    std::vector<Request>& filed = table[r.name];
    if (filed.empty()) filed.reserve(ranks);
    filed.push_back(std::move(r));
    if (static_cast<int>(filed.size()) < ranks || !agree(filed)) continue;
    Response response;
    response.names.push_back(filed.front().name);
    response.devices.resize(ranks);
    for (const Request& q : filed) response.devices[q.rank] = q.device;
    response.sizes.push_back(filed.front().shape[0]);
    responses.push_back(std::move(response));
    table.erase(responses.back().names[0]);
  }
  return static_cast<int>(responses.size());
}

// Copies cached responses of so many ranks and compares their devices, as the fast path
// does on every rank; returns how many are equal.
int copy_responses(int tensors, int ranks, int repeats) {
  std::vector<Response> cache(tensors);
  for (int t = 0; t < tensors; ++t) {
    cache[t].names.push_back(name_of(t));
    cache[t].devices.assign(ranks, 0);
    cache[t].sizes.push_back(1);
  }
  int equal = 0;
  for (int k = 0; k < repeats; ++k) {
    std::vector<Response> released(cache);
    for (int t = 1; t < tensors; ++t)
      equal += released[t].devices == released[t - 1].devices;
  }
  return equal;
}

}  // extern "C"
