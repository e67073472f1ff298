// milora._native: facts about the build, and the adapter pool's allocator. It holds no kernel, and
// no op needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "pool/allocator.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MILORA_VERSION;
  info["cxx_compiler"] = MILORA_CXX_COMPILER;
  info["cpu_isas"] = split(MILORA_ISA_NAMES, ',');
  const std::string cuda = MILORA_CUDA_COMPILER;
  info["cuda_compiler"] = cuda != "none" ? py::object(py::str(cuda)) : py::object(py::none());
  return info;
}

void bind_allocator(py::module_& m) {
  using milora::PoolAllocator;
  py::class_<PoolAllocator>(m, "PoolAllocator", "Places runs of bytes in [0, capacity).")
      .def(py::init<int64_t, int64_t>(), py::arg("capacity"), py::arg("alignment"))
      .def("allocate", &PoolAllocator::allocate, py::arg("sizes"),
           "Offsets of runs of these sizes; None, with nothing changed, if they do not all fit.")
      .def("free", &PoolAllocator::free, py::arg("offsets"), "Give runs back: all or none.")
      .def(
          "compact",
          [](PoolAllocator& self) {
            std::vector<std::tuple<int64_t, int64_t, int64_t>> moves;
            for (const auto& move : self.compact()) {
              moves.emplace_back(move.from, move.to, move.size);
            }
            return moves;
          },
          "Slide all runs to the front; the (old, new, size) to copy, in this order.")
      .def_property_readonly("capacity", &PoolAllocator::capacity)
      .def_property_readonly("alignment", &PoolAllocator::alignment)
      .def_property_readonly("used", &PoolAllocator::used)
      .def_property_readonly(
          "free_bytes", [](const PoolAllocator& self) { return self.capacity() - self.used(); })
      .def_property_readonly("largest_hole", &PoolAllocator::largest_hole)
      .def_property_readonly("num_runs", &PoolAllocator::num_runs);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the compiled part of milora, and the adapter pool's allocator.";
  m.def("build_info", &build_info, "What was compiled: compilers, instruction sets, CUDA.");
  bind_allocator(m);
}
