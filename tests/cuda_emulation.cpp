// The extension with its CUDA kernels emulated on the host and its CPU kernels left out.
#include "cuda_emulation.h"

#include "selective_scan_forward.cu"
#include "selective_scan_forward_bf16.cu"
#include "selective_scan_forward_f16.cu"
#include "selective_scan_forward_f32.cu"
#include "selective_scan_forward_f64.cu"

#define PARROT_WITH_CUDA
#include "bindings.cpp"

namespace parrot {
namespace cpu {
#define PARROT_ABSENT(function, Params) \
    void function(const Params&) { throw std::logic_error(#function " is not part of the emulation"); }
PARROT_CPU_KERNELS(PARROT_ABSENT)
const char* isa() { return "emulation"; }
}  // namespace cpu
}  // namespace parrot
