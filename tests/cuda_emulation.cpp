// The extension with its CUDA kernels, compiled against cuda_emulation.h, and its CPU kernels left out.
#include "cuda_emulation.h"

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
