// A tensor map for the emulator: what cuTensorMapEncodeTiled is told about a matrix.
#pragma once

#include <cstdint>

struct CUtensorMap {
  const uint8_t* data;
  int64_t rows, columns, row_bytes;  // of 16-bit elements
  int box_rows;                      // by 64 columns
};
