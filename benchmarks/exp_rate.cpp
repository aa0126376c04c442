// How many exponentials a second one thread computes: what the floors of the scan and the convolution are made of.
#include <chrono>

#include "lanes.h"

using namespace parrot::PARROT_ISA;

extern "C" double exponentials_per_second() {
    constexpr int W = kLanes<float>, kCount = 4096;  // stays in the first cache
    alignas(64) float values[kCount];
    for (int i = 0; i < kCount; ++i) values[i] = -0.001f * static_cast<float>(i);
    double best = 0;
    volatile float sink = 0;
    for (int repeat = 0; repeat < 2000; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        Vec<float> sums[4] = {};
        for (int i = 0; i < kCount; i += 4 * W)
            for (int j = 0; j < 4; ++j) sums[j] += exp2(load(values + i + j * W));
        sink = sink + sum_lanes<float>(sums[0] + sums[1] + sums[2] + sums[3]);
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
        if (kCount / passed.count() > best) best = kCount / passed.count();
    }
    return best;
}
