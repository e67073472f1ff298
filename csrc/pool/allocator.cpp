#include "pool/allocator.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace milora {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw std::invalid_argument("PoolAllocator: " + message);
}

}  // namespace

PoolAllocator::PoolAllocator(int64_t capacity, int64_t alignment) : alignment_(alignment) {
  if (capacity < 0) fail("capacity must be at least 0, got " + std::to_string(capacity));
  if (alignment < 1 || (alignment & (alignment - 1)) != 0) {
    fail("alignment must be a power of two, got " + std::to_string(alignment));
  }
  capacity_ = capacity / alignment * alignment;
  if (capacity_ > 0) add_hole(0, capacity_);
}

int64_t PoolAllocator::largest_hole() const {
  return holes_by_size_.empty() ? 0 : holes_by_size_.rbegin()->first;
}

std::optional<std::vector<int64_t>> PoolAllocator::allocate(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> rounded;
  rounded.reserve(sizes.size());
  int64_t free_bytes = capacity_ - used_;
  bool fits = true;
  for (int64_t size : sizes) {
    if (size < 1) fail("size must be at least 1, got " + std::to_string(size));
    fits = fits && size <= free_bytes;  // a multiple of the alignment, so rounding stays below it
    if (!fits) continue;
    rounded.push_back((size + alignment_ - 1) / alignment_ * alignment_);
    free_bytes -= rounded.back();
  }
  if (!fits) return std::nullopt;
  const int64_t total = capacity_ - used_ - free_bytes;
  if (total > largest_hole()) return place_apart(rounded);

  std::vector<int64_t> offsets;
  offsets.reserve(rounded.size());
  int64_t offset = total > 0 ? take(total) : 0;
  for (int64_t size : rounded) {
    offsets.push_back(offset);
    runs_.emplace(offset, size);
    offset += size;
  }
  return offsets;
}

std::optional<std::vector<int64_t>> PoolAllocator::place_apart(const std::vector<int64_t>& sizes) {
  // Large runs first: they have the fewest places.
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
  std::vector<int64_t> offsets(sizes.size());
  for (size_t placed = 0; placed < order.size(); ++placed) {
    const int64_t size = sizes[order[placed]];
    if (size > largest_hole()) {
      for (size_t i = 0; i < placed; ++i) release(runs_.find(offsets[order[i]]));
      return std::nullopt;
    }
    const int64_t offset = take(size);
    runs_.emplace(offset, size);
    offsets[order[placed]] = offset;
  }
  return offsets;
}

void PoolAllocator::free(const std::vector<int64_t>& offsets) {
  std::vector<int64_t> sorted = offsets;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); ++i) {
    const std::string offset = std::to_string(sorted[i]);
    if (runs_.find(sorted[i]) == runs_.end()) fail("no run starts at offset " + offset);
    if (i > 0 && sorted[i] == sorted[i - 1]) fail("offset " + offset + " is given twice");
  }
  for (int64_t offset : sorted) release(runs_.find(offset));
}

std::vector<PoolAllocator::Move> PoolAllocator::compact() {
  std::vector<Move> moves;
  Runs packed;
  int64_t end = 0;
  for (const auto& [offset, size] : runs_) {
    if (offset != end) moves.push_back({offset, end, size});
    packed.emplace_hint(packed.end(), end, size);
    end += size;
  }
  runs_ = std::move(packed);
  holes_.clear();
  holes_by_size_.clear();
  if (end < capacity_) add_hole(end, capacity_ - end);
  return moves;
}

int64_t PoolAllocator::take(int64_t size) {
  const auto [hole_size, offset] = *holes_by_size_.lower_bound({size, 0});
  remove_hole(holes_.find(offset));
  if (hole_size > size) add_hole(offset + size, hole_size - size);
  used_ += size;
  return offset;
}

void PoolAllocator::release(Runs::iterator run) {
  int64_t begin = run->first, end = begin + run->second;
  used_ -= run->second;
  runs_.erase(run);
  auto after = holes_.lower_bound(begin);
  if (after != holes_.begin()) {
    auto before = std::prev(after);
    if (before->first + before->second == begin) {
      begin = before->first;
      remove_hole(before);
    }
  }
  if (after != holes_.end() && after->first == end) {
    end += after->second;
    remove_hole(after);
  }
  add_hole(begin, end - begin);
}

void PoolAllocator::add_hole(int64_t offset, int64_t size) {
  holes_.emplace(offset, size);
  holes_by_size_.emplace(size, offset);
}

void PoolAllocator::remove_hole(Runs::iterator hole) {
  holes_by_size_.erase({hole->second, hole->first});
  holes_.erase(hole);
}

}  // namespace milora
