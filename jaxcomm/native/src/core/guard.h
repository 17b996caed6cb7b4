// What Python and XLA call may fail, but must not throw: they are C, and know of no
// exceptions.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>

namespace jaxcomm {

// Gives Python a text, cut to what it has room for. Returns whether there is one.
inline int Tell(const char* text, char* to, int64_t capacity) noexcept {
  if (text[0] == '\0') return 0;
  if (capacity > 0) {
    std::strncpy(to, text, static_cast<size_t>(capacity - 1));
    to[capacity - 1] = '\0';
  }
  return 1;
}

// Does `work()`; of what it throws, `failed(text)` makes the result.
template <typename Work, typename Failed>
auto Guarded(Work&& work, Failed&& failed) noexcept -> decltype(work()) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return failed(
        "jaxcomm: out of memory. Give the ranks more (`ulimit -v`, the container's or the "
        "batch job's limit), or let them need less: init(staging_bytes=...)");
  } catch (const std::exception& error) {
    return failed(error.what());
  } catch (...) {
    return failed("jaxcomm: the native library failed for an unknown reason");
  }
}

// For the functions that Python calls: `work()` returns what went wrong, or "". Returns 1
// with the text in `error` where something did, else 0.
template <typename Work>
int Told(char* error, int64_t capacity, Work&& work) noexcept {
  return Guarded([&] { return Tell(work().c_str(), error, capacity); },
                 [&](const char* text) { return Tell(text, error, capacity); });
}

}  // namespace jaxcomm
