// One way to fail: `op: argument must be ..., got ...` as a std::runtime_error, which reaches
// Python as RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace milora {

template <class... Args>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

template <class... Args>
inline void check(bool ok, const char* op, const Args&... args) {
  if (!ok) [[unlikely]]
    fail(op, args...);
}

}  // namespace milora
