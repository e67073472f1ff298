// milora._native: facts about the build. It holds no kernel, and no op needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the compiled part of milora.";
  m.def("build_info", &build_info, "What was compiled: compilers, instruction sets, CUDA.");
}
