// What the fake NCCL knows of the fake driver: see fake_cuda.cc.
#pragma once

namespace jaxcomm {

bool HasContext();     // whether this thread has a device
bool RecordsGraphs();  // instead of running what is put on a stream

}  // namespace jaxcomm
