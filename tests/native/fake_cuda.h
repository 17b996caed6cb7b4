// What the fake NCCL knows of the fake driver: see fake_cuda.cc.
#pragma once

namespace jaxcomm {

int CurrentDevice();   // of this thread; -1 for none
bool RecordsGraphs();  // instead of running what is put on a stream

}  // namespace jaxcomm
