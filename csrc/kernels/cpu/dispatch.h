// From a Dtype to the storage type: MILORA_DISPATCH_DTYPE(dtype, T, { ... T ... });
#pragma once

#include "common/dtype.h"

#define MILORA_DISPATCH_DTYPE(dtype, T, ...) \
  switch (dtype) {                           \
    case ::milora::Dtype::kFloat32: {        \
      using T = float;                       \
      __VA_ARGS__                            \
      break;                                 \
    }                                        \
    case ::milora::Dtype::kBFloat16: {       \
      using T = ::milora::Bf16;              \
      __VA_ARGS__                            \
      break;                                 \
    }                                        \
    case ::milora::Dtype::kFloat16: {        \
      using T = ::milora::F16;               \
      __VA_ARGS__                            \
      break;                                 \
    }                                        \
  }
