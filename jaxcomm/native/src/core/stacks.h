// Where all threads of this process are, in native code, for reports of stalls.
#pragma once

#include <string>

namespace jaxcomm {

// A text of some KB: for each thread its number, its name and its innermost frames;
// threads with equal stacks are told of once. The calling thread is left out. Returns after
// `seconds` at the latest, if need be with what it has until then, or with a reason.
std::string NativeStacks(double seconds);

}  // namespace jaxcomm
