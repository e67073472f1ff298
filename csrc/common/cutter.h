// One allocation for all that a call keeps in device memory.
#pragma once

#include <cstdint>

namespace milora {

// Cuts memory into arrays that begin on 256 bytes, so that any of them may be read in vectors. Null
// memory measures: a layout is a function that is run twice.
struct Cutter {
  char* base;
  int64_t size = 0;

  template <class V>
  V* take(int64_t count) {
    auto* at = static_cast<V*>(rest());
    size += (count * static_cast<int64_t>(sizeof(V)) + 255) / 256 * 256;
    return at;
  }
  // Where the next array begins.
  void* rest() const { return base == nullptr ? nullptr : base + size; }
};

}  // namespace milora
