# Finds CUTLASS's headers and sets CUTLASS_INCLUDE_DIR.
#
# They come from the PyPI package nvidia-cutlass (folder cutlass_library/source/include), located by
# its metadata rather than imported: importing it would pull in its whole generator. The environment
# variable CUTLASS_PATH (a CUTLASS checkout) comes first. The version is checked, because the tile
# shapes were chosen with it.
set(MILORA_CUTLASS_VERSION 4.2)

if(DEFINED ENV{CUTLASS_PATH})
  set(CUTLASS_INCLUDE_DIR "$ENV{CUTLASS_PATH}/include")
else()
  find_package(Python COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "from importlib.metadata import distribution as find
print(find('nvidia-cutlass').locate_file('cutlass_library/source/include'))"
    OUTPUT_VARIABLE CUTLASS_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

if(NOT EXISTS "${CUTLASS_INCLUDE_DIR}/cutlass/version.h")
  message(FATAL_ERROR "The CUDA build needs CUTLASS's headers, and '${CUTLASS_INCLUDE_DIR}' has no "
                      "cutlass/version.h: pip install nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH "
                      "to a checkout")
endif()
file(READ "${CUTLASS_INCLUDE_DIR}/cutlass/version.h" version_header)
string(REGEX MATCH "CUTLASS_MAJOR ([0-9]+)" _ "${version_header}")
set(CUTLASS_VERSION "${CMAKE_MATCH_1}")
string(REGEX MATCH "CUTLASS_MINOR ([0-9]+)" _ "${version_header}")
string(APPEND CUTLASS_VERSION ".${CMAKE_MATCH_1}")
if(NOT CUTLASS_VERSION VERSION_EQUAL MILORA_CUTLASS_VERSION)
  message(FATAL_ERROR "CUTLASS must be ${MILORA_CUTLASS_VERSION}, got ${CUTLASS_VERSION} in "
                      "${CUTLASS_INCLUDE_DIR}")
endif()
message(STATUS "CUTLASS ${CUTLASS_VERSION}: ${CUTLASS_INCLUDE_DIR}")
