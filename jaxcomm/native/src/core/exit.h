// Ends this process from a thread that Python does not know of.
#pragma once

#include <unistd.h>

#include <string>

namespace jaxcomm {

// The exit code of a job that ranks cannot finish, as Python's watchdog has it.
inline constexpr int kStalled = 70;

inline void WriteToStandardError(const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = write(STDERR_FILENO, text.data() + done, text.size() - done);
    if (n <= 0) return;
    done += static_cast<size_t>(n);
  }
}

[[noreturn]] inline void EndProcess(const std::string& text, int code) {
  WriteToStandardError(text);
  _exit(code);
}

}  // namespace jaxcomm
