// Threads over a batch of problems: whole problems to threads where there are enough of them, else threads share each
// problem. Either way gives the same bits.
#pragma once

#include <stdexcept>
#include <string>

#include "parallel.h"

namespace parrot {
namespace PARROT_ISA {

constexpr int64_t kShared = 40000;  // costs of a problem from which threads share its iteration

// What decides: multiply-adds of one problem, those from which it is shared whatever the batch, its costs.
struct BatchSize {
    int64_t batch;
    double work, large;
    int64_t costs;
};

// Problem(params, index) has carve(memory, threads), which returns the bytes it needs, empty(), write_empty() and
// run(team). `op` names the op in errors.
template <typename Problem, typename Params>
void run_batch(const Params& params, BatchSize size, const char* op) {
    bool out_of_memory = false;
    const int threads = params.num_threads;
    const int64_t batch = size.batch;
    const bool tiny = size.work * double(batch) < 1e6;
    const bool share = !tiny && (size.work > size.large || threads_share(threads, batch, size.costs >= kShared));
    // Null if the problem is done or there is no memory for it.
    const auto prepare = [&](Problem& problem, int team_size) -> char* {
        const size_t bytes = problem.carve(nullptr, team_size);
        if (problem.empty()) {
            problem.write_empty();
            return nullptr;
        }
        char* memory = thread_arena().reserve(bytes);
        if (!memory) __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return memory;
    };
    if (share) {
        for (int64_t index = 0; index < batch && !out_of_memory; ++index) {
            Problem problem(params, index);
            char* memory = prepare(problem, threads);
            if (!memory) continue;
            run_team(threads, [&](const Team& team) {
                Problem mine(params, index);
                mine.carve(memory, threads);
                mine.run(team);
            });
        }
        thread_arena().trim();
    } else {
        const int used = tiny ? 1 : static_cast<int>(batch < threads ? batch : threads);
#pragma omp parallel num_threads(used) if (used > 1)
        {
#pragma omp for schedule(dynamic, 1)
            for (int64_t index = 0; index < batch; ++index) {
                Problem problem(params, index);
                char* memory = prepare(problem, 1);
                if (!memory) continue;
                problem.carve(memory, 1);
                problem.run(Team{});
            }
            thread_arena().trim();
        }
    }
    if (out_of_memory) throw std::runtime_error(std::string(op) + " (cpu): out of memory for the kernel matrix");
}

}  // namespace PARROT_ISA
}  // namespace parrot
