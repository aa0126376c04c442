// The causal convolution on CPUs, forward and backward; formulas in parrot_kernels/reference/causal_conv1d.py.
#include "conv_by_channel.h"
#include "conv_by_time.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

bool channels_last(const TensorView& view) { return !view || (view.stride[1] == 1 && view.stride[2] != 1); }

template <typename T, typename F>
void forward(const CausalConv1dForward& p) {
    prefer_huge_pages(p.out);
    channels_last(p.x) && channels_last(p.out) ? conv_forward_by_channel<T, F>(p) : conv_forward_by_time<T, F>(p);
}

template <typename T, typename F>
void backward(const CausalConv1dBackward& p) {
    prefer_huge_pages(p.dx);
    const int64_t dim = p.x.size[1], width = p.weight.size[1], taps = width + 1;
    const bool by_channel = channels_last(p.x) && channels_last(p.grad_out) && channels_last(p.dx);
    // The gradients of filter and bias before they are summed: by batch entry (and tile), channel and tap.
    const int64_t parts = p.x.size[0] * (by_channel ? conv_tiles(p) : 1);
    const Buffer<F> sums(parts * dim * taps);
    by_channel ? conv_backward_by_channel<T, F>(p, sums.get()) : conv_backward_by_time<T, F>(p, sums.get());
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
    for (int64_t d = 0; d < dim; ++d)
        for (int64_t k = 0; k < taps; ++k) {
            F total = 0;
            for (int64_t i = 0; i < parts; ++i) total += sums[(i * dim + d) * taps + k];
            if (k < width)
                p.dweight.ptr<F>()[d * p.dweight.stride[0] + k * p.dweight.stride[1]] = total;
            else if (p.dbias)
                p.dbias.ptr<F>()[d * p.dbias.stride[0]] = total;
        }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dForward& params) {
    for_dtype(params.x.dtype, [&](auto element, auto real) { forward<decltype(element), decltype(real)>(params); });
}

void causal_conv1d_backward(const CausalConv1dBackward& params) {
    for_dtype(params.x.dtype, [&](auto element, auto real) { backward<decltype(element), decltype(real)>(params); });
}

}  // namespace PARROT_ISA
}  // namespace parrot
