// The fake NCCL's environment: errors to order, and a log of what ran.
//
//   FAKE_NCCL_INJECT   rules separated by ';', each of comma-separated key=value pairs:
//     call=ncclAllReduce   whose calls are counted (required)
//     result=RESULT        what happens instead (required): unhandledCudaError,
//                          systemError, internalError, invalidArgument, invalidUsage,
//                          remoteError; inProgress: the call does its work in a thread,
//                          as nonblocking communicators may; neverDone: the same, but
//                          the thread waits for the communicator's abort; stall: the
//                          call itself does; async:ERROR: the call succeeds, but
//                          CommGetAsyncError tells the error from then on
//     rank=1               on this rank only (default: on all)
//     after=3              let so many calls pass first (default: 0)
//     times=2              then hit so many, or `always` (default: 1)
//   FAKE_NCCL_RANK     the rank that rules and the log's name mean (default: the one of
//                      the process's first CommInitRankConfig)
//   FAKE_NCCL_LOG      PREFIX: one line per finished collective, in PREFIX.RANK
//   FAKE_NCCL_VERSION  what GetVersion tells (default: 22703). From 22304 on, NCCL
//                      launches what a nonblocking communicator does from a thread,
//                      and so it runs in one here: calls return "in progress"
//   FAKE_NCCL_WANTS_DEVICE  the device that a thread must have which makes communicators
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <sstream>
#include <string>

#include "../../jaxcomm/native/src/nccl/nccl_abi.h"

namespace jaxcomm {

struct Injection {
  enum Kind { kNone, kError, kInProgress, kNeverDone, kStall, kAsync };
  Kind kind = kNone;
  NcclResult result = kNcclSuccess;
};

inline int Version() {
  const char* chosen = std::getenv("FAKE_NCCL_VERSION");
  return chosen ? std::atoi(chosen) : 22703;
}

inline std::atomic<int> global_rank{-1};

inline void SetGlobalRank(int rank) {
  int unknown = -1;
  global_rank.compare_exchange_strong(unknown, rank);
}

struct Rule {
  int rank = -1;
  std::string call;
  int after = 0;
  int times = 1;
  Injection injection;
  std::atomic<int> calls{0};
};

// A rule that cannot be read must not pass for one that never applies.
[[noreturn]] inline void RejectRule(const std::string& text) {
  std::fprintf(stderr, "fake NCCL: cannot read FAKE_NCCL_INJECT: %s\n", text.c_str());
  std::abort();
}

inline int RuleNumber(const std::string& text, const std::string& rule) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != 0 || value < 0) RejectRule(rule);
  return static_cast<int>(value);
}

inline NcclResult ErrorNamed(const std::string& name, const std::string& rule) {
  static constexpr const char* kNames[] = {"unhandledCudaError", "systemError",
                                           "internalError",      "invalidArgument",
                                           "invalidUsage",       "remoteError"};
  for (int k = 0; k < 6; ++k) {
    if (name == kNames[k]) return static_cast<NcclResult>(k + 1);
  }
  RejectRule(rule);
}

inline Injection ParseInjection(const std::string& text, const std::string& rule) {
  if (text == "stall") return {Injection::kStall, kNcclSuccess};
  if (text == "inProgress") return {Injection::kInProgress, kNcclInProgress};
  if (text == "neverDone") return {Injection::kNeverDone, kNcclInProgress};
  if (text.rfind("async:", 0) == 0) {
    return {Injection::kAsync, ErrorNamed(text.substr(6), rule)};
  }
  return {Injection::kError, ErrorNamed(text, rule)};
}

inline bool KnownCall(const std::string& name) {
#define FAKE_NCCL_NAME(function, result, parameters) \
  if (name == "nccl" #function) return true;
  JAXCOMM_NCCL_FUNCTIONS(FAKE_NCCL_NAME)
#undef FAKE_NCCL_NAME
  return false;
}

inline std::deque<Rule> ParseRules(const char* text) {
  std::deque<Rule> rules;
  std::stringstream all(text ? text : "");
  for (std::string one; std::getline(all, one, ';');) {
    if (one.empty()) continue;
    Rule& rule = rules.emplace_back();
    std::stringstream pairs(one);
    for (std::string pair; std::getline(pairs, pair, ',');) {
      const size_t at = pair.find('=');
      if (at == std::string::npos) RejectRule(one);
      const std::string key = pair.substr(0, at), value = pair.substr(at + 1);
      if (key == "rank") {
        rule.rank = RuleNumber(value, one);
      } else if (key == "call") {
        rule.call = value;
      } else if (key == "after") {
        rule.after = RuleNumber(value, one);
      } else if (key == "times") {
        rule.times = value == "always" ? 1 << 30 : RuleNumber(value, one);
      } else if (key == "result") {
        rule.injection = ParseInjection(value, one);
      } else {
        RejectRule(one);
      }
    }
    if (!KnownCall(rule.call) || rule.injection.kind == Injection::kNone) RejectRule(one);
  }
  return rules;
}

inline std::deque<Rule>& Rules() {
  static std::deque<Rule> rules = [] {
    if (const char* rank = std::getenv("FAKE_NCCL_RANK")) SetGlobalRank(std::atoi(rank));
    return ParseRules(std::getenv("FAKE_NCCL_INJECT"));
  }();
  return rules;
}

// Counts a call and tells what is to happen to it.
inline Injection Inject(const char* call) {
  Injection found;
  for (Rule& rule : Rules()) {
    if (rule.call != call) continue;
    if (rule.rank >= 0 && rule.rank != global_rank) continue;
    const int k = rule.calls++ - rule.after;
    if (0 <= k && k < rule.times && found.kind == Injection::kNone) found = rule.injection;
  }
  return found;
}

inline void Log(const std::string& line) {
  static const int file = [] {
    const char* prefix = std::getenv("FAKE_NCCL_LOG");
    if (!prefix) return -1;
    const std::string path =
        std::string(prefix) + "." + std::to_string(global_rank.load());
    return open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  }();
  const std::string text = line + "\n";
  if (file >= 0 && write(file, text.data(), text.size()) < 0) std::perror("FAKE_NCCL_LOG");
}

}  // namespace jaxcomm
