// One source, several instruction sets: each CPU kernel is compiled once per entry of PARROT_CPU_ISAS into its
// own namespace, and dispatch.cpp picks the best one the processor has, once.
#pragma once

#include "causal_conv1d.h"
#include "causal_conv1d_update.h"
#include "selective_scan.h"
#include "selective_state_update.h"
#include "sinkhorn_hadamard.h"

// Every CPU kernel: X(function, parameter struct).
#define PARROT_CPU_KERNELS(X)                               \
    X(sinkhorn_hadamard_forward, SinkhornHadamardForward)   \
    X(sinkhorn_hadamard_backward, SinkhornHadamardBackward) \
    X(selective_scan_forward, SelectiveScanForward)         \
    X(selective_scan_backward, SelectiveScanBackward)       \
    X(selective_state_update, SelectiveStateUpdate)         \
    X(causal_conv1d_forward, CausalConv1dForward)           \
    X(causal_conv1d_backward, CausalConv1dBackward)         \
    X(causal_conv1d_update, CausalConv1dUpdate)

namespace parrot {

#define PARROT_DECLARE(function, Params) \
    namespace v4 {                       \
    void function(const Params& params); \
    }                                    \
    namespace v3 {                       \
    void function(const Params& params); \
    }                                    \
    namespace v2 {                       \
    void function(const Params& params); \
    }                                    \
    namespace cpu {                      \
    void function(const Params& params); \
    }
PARROT_CPU_KERNELS(PARROT_DECLARE)
#undef PARROT_DECLARE

namespace cpu {
// The instruction set in use: "v4" (AVX-512), "v3" (AVX2 and FMA), "v2" (SSE4.2, or the base set of another
// architecture). PARROT_CPU_ISA=v2|v3|v4 in the environment asks for a lower one.
const char* isa();
}  // namespace cpu

}  // namespace parrot
