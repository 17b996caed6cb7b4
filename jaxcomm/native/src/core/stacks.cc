// A signal makes each thread write down its own stack, which needs no debugger and works
// for threads that wait in MPI or XLA, or hold Python's interpreter.

#include "stacks.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "exit.h"

#if defined(__linux__) && __has_include(<execinfo.h>)
#include <cxxabi.h>
#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace jaxcomm {
namespace {

constexpr int kSlots = 256;     // threads that are asked
constexpr int kCaptured = 64;   // frames of a thread, with those of the handler
constexpr int kShown = 24;      // frames of a thread in the text, runs of Python's being one
constexpr int kGroups = 40;     // different stacks in the text
constexpr size_t kName = 110;   // characters of a function's name
constexpr size_t kListed = 4;   // threads of a group that are named

constexpr char kEnded[] = "it has ended";

enum State : int { kFree, kAsked, kWriting, kWritten, kGivenUp };

// A thread that is asked. What is not atomic belongs to that thread while the slot is
// kWriting, and to who asks once it is kWritten.
struct Slot {
  std::atomic<int> state{kFree};
  std::atomic<pid_t> thread{0};  // who is asked
  void* interrupted = nullptr;   // where the signal came
  int depth = 0;                 // how many frames there are
  void* frames[kCaptured];       // the innermost first
};

// Never destroyed: an answer may come late.
Slot* const slots = new Slot[kSlots];

// The first call of backtrace() loads a library, which a signal handler must not.
[[maybe_unused]] const int prepared = [] {
  void* frame[1];
  return backtrace(frame, 1);
}();

pid_t OwnThread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

void* ProgramCounter(void* context) {
  [[maybe_unused]] const auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<void*>(machine.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(machine.pc);
#else
  return nullptr;
#endif
}

// The handler: only what is safe wherever a thread happens to be.
void WriteDown(int, siginfo_t*, void* context) {
  const int error = errno;
  const pid_t own = OwnThread();
  for (int index = 0; index < kSlots; ++index) {
    Slot& slot = slots[index];
    if (slot.thread.load(std::memory_order_relaxed) != own) continue;
    int asked = kAsked;
    // Fails where the answer comes too late: the slot may be another thread's soon.
    if (!slot.state.compare_exchange_strong(asked, kWriting)) continue;
    slot.interrupted = ProgramCounter(context);
    slot.depth = backtrace(slot.frames, kCaptured);
    slot.state.store(kWritten, std::memory_order_release);
    break;
  }
  errno = error;
}

struct Thread {
  pid_t number = 0;
  std::string name, state;
  uint64_t blocked = 0;  // signals
  Slot* slot = nullptr;
  std::string reason;  // why there is no stack
};

// False where the thread has ended.
bool Read(Thread* thread) {
  std::ifstream status("/proc/self/task/" + std::to_string(thread->number) + "/status");
  std::string line;
  bool found = false;
  while (std::getline(status, line)) {
    const size_t colon = line.find(":\t");
    if (colon == std::string::npos) continue;
    const std::string key = line.substr(0, colon), value = line.substr(colon + 2);
    if (key == "Name") thread->name = value;
    if (key == "State") thread->state = value;
    if (key == "SigBlk") thread->blocked = std::strtoull(value.c_str(), nullptr, 16);
    found = true;
  }
  return found;
}

// The thread of jaxcomm_dump_on_signal, which has nothing to tell.
std::atomic<pid_t> dumper{0};

std::vector<Thread> AllBut(pid_t one, pid_t other) {
  std::vector<Thread> threads;
  DIR* folder = opendir("/proc/self/task");
  if (folder == nullptr) return threads;
  while (const dirent* entry = readdir(folder)) {
    Thread thread;
    thread.number = static_cast<pid_t>(std::atoi(entry->d_name));
    if (thread.number == 0 || thread.number == one || thread.number == other) continue;
    if (thread.number == dumper.load()) continue;
    if (Read(&thread)) threads.push_back(std::move(thread));
  }
  closedir(folder);
  std::sort(threads.begin(), threads.end(),
            [](const Thread& a, const Thread& b) { return a.number < b.number; });
  return threads;
}

// A signal that nobody uses; 0 if there is none.
int UnusedSignal(struct sigaction* before) {
  for (int number = SIGRTMAX - 1; number >= SIGRTMIN; --number) {
    if (sigaction(number, nullptr, before) != 0) continue;
    if ((before->sa_flags & SA_SIGINFO) == 0 ? before->sa_handler == SIG_DFL
                                             : before->sa_sigaction == WriteDown) {
      return number;
    }
  }
  return 0;
}

bool Pause(std::chrono::steady_clock::time_point end) {
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return std::chrono::steady_clock::now() < end;
}

// Lets every thread write its stack into a slot. The threads keep their slots until they
// are Released.
void Ask(std::vector<Thread>* threads, double seconds) {
  struct sigaction before, action;
  const int number = UnusedSignal(&before);
  if (number == 0) {
    for (Thread& thread : *threads) thread.reason = "the process uses all signals itself";
    return;
  }
  std::memset(&action, 0, sizeof(action));
  action.sa_sigaction = WriteDown;
  // Interrupted calls of the system go on by themselves where the system lets them.
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigfillset(&action.sa_mask);
  sigaction(number, &action, nullptr);
  int next = 0;
  for (Thread& thread : *threads) {
    if (thread.blocked >> (number - 1) & 1) {
      thread.reason = "it blocks the signal";
      continue;
    }
    // One whose thread got stuck in the handler is never used again.
    while (next < kSlots && slots[next].state.load() == kWriting) ++next;
    if (next == kSlots) {
      thread.reason = "there are too many threads";
      continue;
    }
    Slot& slot = slots[next++];
    slot.thread.store(thread.number, std::memory_order_relaxed);
    slot.state.store(kAsked);
    thread.slot = &slot;
    if (syscall(SYS_tgkill, getpid(), thread.number, number) != 0) {
      slot.state.store(kFree);
      thread.slot = nullptr;
      thread.reason = errno == ESRCH ? kEnded : "it cannot be signalled";
    }
  }
  const auto answered = [threads] {
    return std::all_of(threads->begin(), threads->end(), [](const Thread& thread) {
      return thread.slot == nullptr || thread.slot->state.load() == kWritten;
    });
  };
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration_cast<
      std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
  while (!answered() && Pause(end)) {
  }
  bool all = true;
  for (Thread& thread : *threads) {
    if (thread.slot == nullptr) continue;
    int state = kAsked;
    if (thread.slot->state.compare_exchange_strong(state, kGivenUp)) {
      all = false;
      // Where it waits in the kernel, the signal waits too.
      thread.reason = Read(&thread) ? "no answer; state " + thread.state : kEnded;
    } else if (state == kWriting) {
      all = false;
      thread.reason = "no answer from within the signal handler";
    }
    if (!thread.reason.empty()) thread.slot = nullptr;
  }
  const auto ended = [](const Thread& thread) { return thread.reason == kEnded; };
  threads->erase(std::remove_if(threads->begin(), threads->end(), ended), threads->end());
  // A signal that is still on its way must find the handler: it would end the process.
  if (all) sigaction(number, &before, nullptr);
}

std::string Hexadecimal(uintptr_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Functions' names by the addresses that were looked for.
using Names = std::map<uintptr_t, std::string>;

// Adds the names of functions that a file has kept but does not export, as XLA's are; dladdr
// knows only those that are exported. `addresses` are places in the file, loaded at `base`.
void AddHidden(const char* path, uintptr_t base, const std::set<uintptr_t>& addresses,
               Names* names) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return;
  struct stat status;
  const size_t size = fstat(file, &status) == 0 ? static_cast<size_t>(status.st_size) : 0;
  void* mapped = size > sizeof(ElfW(Ehdr))
                     ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0)
                     : MAP_FAILED;
  close(file);
  if (mapped == MAP_FAILED) return;
  const char* data = static_cast<const char*>(mapped);
  const auto inside = [size](uint64_t start, uint64_t length) {
    return start <= size && length <= size - start;
  };
  const auto& head = *reinterpret_cast<const ElfW(Ehdr)*>(data);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(data + head.e_shoff);
  const bool readable = std::memcmp(head.e_ident, ELFMAG, SELFMAG) == 0 &&
                        head.e_shentsize == sizeof(*sections) &&
                        inside(head.e_shoff, uint64_t{head.e_shnum} * sizeof(*sections));
  for (int index = 0; readable && index < head.e_shnum; ++index) {
    const auto& table = sections[index];
    if (table.sh_type != SHT_SYMTAB || table.sh_link >= head.e_shnum) continue;
    const auto& texts = sections[table.sh_link];
    if (!inside(table.sh_offset, table.sh_size)) continue;
    if (!inside(texts.sh_offset, texts.sh_size)) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(data + table.sh_offset);
    for (size_t at = 0; at < table.sh_size / sizeof(*symbols); ++at) {
      const auto& symbol = symbols[at];
      const bool function = (symbol.st_info & 0xf) == STT_FUNC && symbol.st_value != 0;
      if (!function || symbol.st_name >= texts.sh_size) continue;
      const uintptr_t begin = base + symbol.st_value, end = begin + symbol.st_size;
      for (auto found = addresses.lower_bound(begin); found != addresses.end() && *found < end;
           ++found) {
        const char* text = data + texts.sh_offset + symbol.st_name;
        (*names)[*found] = std::string(text, strnlen(text, texts.sh_size - symbol.st_name));
      }
    }
  }
  munmap(mapped, size);
}

// The frames of a thread from where the signal came on; before are the handler and what
// the kernel returns to from it.
std::vector<uintptr_t> Addresses(const Slot& slot) {
  void* const* const last = slot.frames + slot.depth;
  void* const* first = std::find(slot.frames, last, slot.interrupted);
  if (first == last) first = slot.frames;
  std::vector<uintptr_t> addresses;
  for (void* const* frame = first; frame != last; ++frame) {
    const auto address = reinterpret_cast<uintptr_t>(*frame);
    // A return address may belong to the next function already.
    addresses.push_back(frame == first ? address : address - 1);
  }
  return addresses;
}

Names HiddenNames(const std::vector<Thread>& threads) {
  std::map<std::string, std::pair<uintptr_t, std::set<uintptr_t>>> files;
  for (const Thread& thread : threads) {
    if (thread.slot == nullptr) continue;
    for (const uintptr_t address : Addresses(*thread.slot)) {
      Dl_info info;
      const bool known = dladdr(reinterpret_cast<void*>(address), &info) != 0;
      if (!known || info.dli_fname == nullptr || info.dli_sname != nullptr) continue;
      auto& [base, addresses] = files[info.dli_fname];
      base = reinterpret_cast<uintptr_t>(info.dli_fbase);
      addresses.insert(address);
    }
  }
  Names names;
  for (const auto& [path, found] : files) {
    AddHidden(path.c_str(), found.first, found.second, &names);
  }
  return names;
}

// The function at an address, and the file with the offset, which addr2line understands.
// `python` is set where it belongs to the interpreter.
std::string Describe(uintptr_t address, const Names& names, bool* python) {
  *python = false;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(address), &info) == 0 || info.dli_fname == nullptr) {
    return Hexadecimal(address) + " (in no file: compiled by XLA, or the kernel's)";
  }
  const char* slash = std::strrchr(info.dli_fname, '/');
  const std::string file = slash == nullptr ? info.dli_fname : slash + 1;
  const std::string place =
      file + "+" + Hexadecimal(address - reinterpret_cast<uintptr_t>(info.dli_fbase));
  *python = file.rfind("python", 0) == 0 || file.rfind("libpython", 0) == 0;
  std::string name;
  if (info.dli_sname != nullptr) {
    name = info.dli_sname;
  } else if (const auto found = names.find(address); found != names.end()) {
    name = found->second;
  } else {
    return place;
  }
  int status = 1;
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (status == 0) name = demangled;
  std::free(demangled);
  if (name.size() > kName) name = name.substr(0, kName) + "...";
  return name + " (" + place + ")";
}

std::string Frames(const Slot& slot, const Names& names) {
  std::string text;
  int lines = 0, more = 0;  // frames of Python's, after the first of them
  bool before = false;
  const auto tell_more = [&] {
    if (more > 0) text += "      and " + std::to_string(more) + " more of Python\n";
    more = 0;
  };
  for (const uintptr_t address : Addresses(slot)) {
    bool python;
    const std::string line = Describe(address, names, &python);
    if (python && before) {
      ++more;
      continue;
    }
    tell_more();
    before = python;
    if (lines++ == kShown) {
      text += "      ...\n";
      break;
    }
    text += "      " + line + "\n";
  }
  tell_more();
  return text;
}

std::string Head(const std::vector<const Thread*>& threads) {
  std::vector<std::string> names;
  std::string numbers;
  for (const Thread* thread : threads) {
    if (std::find(names.begin(), names.end(), thread->name) == names.end()) {
      names.push_back(thread->name);
    }
  }
  for (size_t index = 0; index < std::min(threads.size(), kListed); ++index) {
    numbers += (index ? ", " : "") + std::to_string(threads[index]->number);
  }
  if (threads.size() > kListed) numbers += ", ...";
  std::string all;
  for (size_t index = 0; index < std::min(names.size(), kListed); ++index) {
    all += (index ? ", " : "") + names[index];
  }
  if (names.size() > kListed) all += ", ...";
  if (threads.size() == 1) return "    thread " + numbers + " (" + all + "):";
  return "    " + std::to_string(threads.size()) + " threads (" + all + "; " + numbers + "):";
}

std::string Describe(const std::vector<Thread>& threads, const Names& names) {
  std::vector<std::pair<std::string, std::vector<const Thread*>>> groups;
  std::map<std::string, size_t> known;
  for (const Thread& thread : threads) {
    const std::string text = thread.slot != nullptr
                                 ? Frames(*thread.slot, names)
                                 : "      no stack: " + thread.reason + "\n";
    const auto [place, added] = known.emplace(text, groups.size());
    if (added) groups.emplace_back(text, std::vector<const Thread*>());
    groups[place->second].second.push_back(&thread);
  }
  std::string all;
  for (size_t index = 0; index < groups.size(); ++index) {
    if (index == kGroups) {
      all += "    and " + std::to_string(groups.size() - kGroups) + " other stacks\n";
      break;
    }
    all += Head(groups[index].second) + "\n" + groups[index].first;
  }
  return all;
}

// Gives `tell` the text twice: with what names are known at once, and with all.
void Collect(pid_t caller, double seconds, const std::function<void(std::string)>& tell) {
  static std::mutex& one_at_a_time = *new std::mutex;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  std::vector<Thread> threads = AllBut(caller, OwnThread());
  Ask(&threads, seconds);
  tell(Describe(threads, Names()));
  tell(Describe(threads, HiddenNames(threads)));
  for (Thread& thread : threads) {
    if (thread.slot != nullptr) thread.slot->state.store(kFree);
  }
}

// Of the signal at which this process writes its stacks to standard error.
struct sigaction before_dump;
sem_t dump_wanted;

void WantDump(int number, siginfo_t* info, void* context) {
  const int error = errno;
  sem_post(&dump_wanted);
  if ((before_dump.sa_flags & SA_SIGINFO) != 0) {
    before_dump.sa_sigaction(number, info, context);
  } else if (before_dump.sa_handler != SIG_DFL && before_dump.sa_handler != SIG_IGN) {
    before_dump.sa_handler(number);
  }
  errno = error;
}

}  // namespace

// Returns a signal that nobody uses; 0 if there is none.
JAXCOMM_API int jaxcomm_unused_signal() {
  struct sigaction before;
  return UnusedSignal(&before);
}

// From now on this process writes `head` and its native stacks to standard error when it
// gets the signal, also where a thread holds Python's interpreter; then it does what it
// would have done before.
JAXCOMM_API void jaxcomm_dump_on_signal(int number, const char* head) {
  sem_init(&dump_wanted, 0, 0);
  struct sigaction action;
  std::memset(&action, 0, sizeof(action));
  action.sa_sigaction = WantDump;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigemptyset(&action.sa_mask);
  std::thread([head = std::string(head)] {
    dumper.store(OwnThread());
    while (true) {
      while (sem_wait(&dump_wanted) != 0) {
      }
      WriteToStandardError(head + NativeStacks(1));
    }
  }).detach();
  sigaction(number, &action, &before_dump);
}

std::string NativeStacks(double seconds) {
  struct Result {
    std::mutex mutex;
    std::condition_variable changed;
    int texts = 0;
    std::string text;
  };
  // On a thread of its own: looking up names takes the dynamic linker's lock, which a
  // thread that hangs may hold, and reads files.
  auto result = std::make_shared<Result>();
  std::thread([result, caller = OwnThread(), seconds] {
    Collect(caller, seconds / 4, [&result](std::string text) {
      std::lock_guard<std::mutex> lock(result->mutex);
      result->text = std::move(text);
      ++result->texts;
      result->changed.notify_all();
    });
  }).detach();
  std::unique_lock<std::mutex> lock(result->mutex);
  result->changed.wait_for(lock, std::chrono::duration<double>(seconds),
                           [&result] { return result->texts == 2; });
  if (result->texts > 0) return result->text;
  return "    none in time: a thread holds the dynamic linker's lock, or the machine is "
         "overloaded\n";
}

}  // namespace jaxcomm

#else

namespace jaxcomm {

std::string NativeStacks(double) { return "    not to be had on this system\n"; }

}  // namespace jaxcomm

#endif

namespace jaxcomm {

// Writes the text, as far as it fits, and a zero.
JAXCOMM_API void jaxcomm_native_stacks(double seconds, char* out, int64_t capacity) {
  const std::string text = NativeStacks(seconds);
  const size_t length = std::min(text.size(), static_cast<size_t>(capacity - 1));
  std::memcpy(out, text.data(), length);
  out[length] = '\0';
}

}  // namespace jaxcomm
