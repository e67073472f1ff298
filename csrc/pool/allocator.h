// Places runs of bytes in a fixed range: the bookkeeping of the adapter pool, without the memory.
//
// A run is what a kernel reads as one piece (A, or Bᵀ); the runs of one adapter may lie apart.
// Sizes are rounded up to the alignment, so every run and every hole starts on it. Runs go into the
// smallest hole that takes them (best fit), and neighbouring holes always merge. What does not fit
// because the free bytes are scattered fits after `compact`, which leaves one hole at the end.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace milora {

class PoolAllocator {
 public:
  struct Move {
    int64_t from, to, size;
  };

  // The range is [0, capacity rounded down to the alignment); the alignment is a power of two.
  // Throws std::invalid_argument.
  PoolAllocator(int64_t capacity, int64_t alignment);

  // One offset per size, side by side in one hole if one takes them all; nullopt, with nothing
  // changed, if there is no place for every one. Throws std::invalid_argument for a size below 1.
  std::optional<std::vector<int64_t>> allocate(const std::vector<int64_t>& sizes);

  // All or nothing. Throws std::invalid_argument if an offset is no run's or stands there twice.
  void free(const std::vector<int64_t>& offsets);

  // Slides every run towards the front. Moves are in ascending order, each towards a lower offset,
  // so bytes copied in this order (with memmove) never overwrite what is still to be moved.
  std::vector<Move> compact();

  int64_t capacity() const { return capacity_; }
  int64_t alignment() const { return alignment_; }
  int64_t used() const { return used_; }
  int64_t largest_hole() const;
  int64_t num_runs() const { return static_cast<int64_t>(runs_.size()); }

 private:
  using Runs = std::map<int64_t, int64_t>;  // offset -> size

  std::optional<std::vector<int64_t>> place_apart(const std::vector<int64_t>& sizes);
  int64_t take(int64_t size);  // from the front of the smallest hole that has it; there is one
  void release(Runs::iterator run);
  void add_hole(int64_t offset, int64_t size);
  void remove_hole(Runs::iterator hole);

  int64_t capacity_;
  int64_t alignment_;
  int64_t used_ = 0;
  Runs runs_;
  Runs holes_;
  std::set<std::pair<int64_t, int64_t>> holes_by_size_;  // (size, offset)
};

}  // namespace milora
