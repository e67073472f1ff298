// A tensor map: what cuTensorMapEncodeTiled is told about a matrix of 16-bit elements.
#pragma once

#include <stdint.h>

struct CUtensorMap {
  const uint8_t* data;
  int64_t rows, columns, row_bytes;
  int box_rows;  // by 64 columns
};
