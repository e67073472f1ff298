// Whether a GPU has what the kernels of this folder are made of. No CUDA here.
#pragma once

namespace milora {

#ifdef MILORA_CUDA
// wgmma and tensor copies: compute capability 9.0 (H100, H200).
bool has_wgmma(int device);
#else
inline bool has_wgmma(int) { return false; }
#endif

}  // namespace milora
