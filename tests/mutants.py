"""Mutation test of the kernels' tests: plants one fault at a time and sees whether a test fails.

    python tests/mutants.py                     # all, an hour or more; exit status 1 if one is not caught
    python tests/mutants.py --only 'cpu/.*edge'

Each kernel gets a wrong sign, something off by one at an edge, and a mask that is dropped. The faults are planted in a
copy of the tree, never in the tree itself. `test_mutants.py` sees to it that every fault still has its place.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".git", ".venv", "build", "runs", "dist", "*.egg-info", "__pycache__", ".pytest_cache", "site")


@dataclass(frozen=True)
class Mutant:
    kind: str  # sign, edge or mask
    path: str
    old: str
    new: str
    tests: str  # test files, apart by spaces

    def __str__(self) -> str:
        return f"{self.path.removeprefix('csrc/').removeprefix('parrot_kernels/')}: {self.kind}"

    def plant(self, root: Path) -> None:
        path = root / self.path
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.path} has {text.count(self.old)} places like {self.old!r}, wanted one")
        path.write_text(text.replace(self.old, self.new))


def of(path: str, tests: str, **places: tuple[str, str]) -> list[Mutant]:
    files = " ".join(f"tests/test_{name}.py" for name in tests.split())
    return [Mutant(kind, path, old, new, files) for kind, (old, new) in places.items()]


MUTANTS = [
    # CPU
    *of(
        "csrc/cpu/selective_scan_forward.cpp", "scan_cpu",
        sign=("y += h[n] * entry<F, C_constant>(C, n);", "y -= h[n] * entry<F, C_constant>(C, n);"),
        edge=("stop = chunk - in_chunk < steps - s ?", "stop = chunk - in_chunk < steps - s - 1 ?"),
        mask=("if (tile.starts && tile.starts[s]) {", "if (false) {"),
    ),
    *of(
        "csrc/cpu/selective_scan_backward.cpp", "scan_cpu",
        sign=("ddt += e * A2[n];", "ddt -= e * A2[n];"),
        edge=("for (; i < count; ++i) sums[i]", "for (; i < count - 1; ++i) sums[i]"),
        mask=("if (starts) clear(decay_row, NB * W);", ""),
    ),
    *of(
        "csrc/cpu/conv_by_channel.h", "conv_cpu",
        sign=("value *= silu_derivative", "value *= -silu_derivative"),
        edge=("own = index == 0 ? 0 : before;", "own = index == 0 ? 0 : before - 1;"),
        mask=("if (!MIXED || tile.ids[i + k] == tile.ids[i + width - 1])", ""),
    ),
    *of(
        "csrc/cpu/conv_by_time.h", "conv_cpu",
        sign=("return dout * silu_derivative", "return -dout * silu_derivative"),
        edge=("const int rest = static_cast<int>(row.line.length - t);", "const int rest = row.line.length - t - 1;"),
        mask=("(PACKED ? same(ids + tap(k), ids + own) ? x : Vec<F>{} : x)", "x"),
    ),
    *of(
        "csrc/cpu/causal_conv1d_update.cpp", "causal_conv1d_update",
        sign=("y += load(filter + k * W) * load(line", "y -= load(filter + k * W) * load(line"),
        edge=("j + L < ring.size ? line", "j + L <= ring.size ? line"),
        mask=("if (entry < 0) return zero_times", "if (false) return zero_times"),
    ),
    *of(
        "csrc/cpu/selective_state_update.cpp", "selective_state_update",
        sign=("input * load_line<T, F>(B", "-input * load_line<T, F>(B"),
        edge=("if (c >= count) continue;", "if (c >= count - 1) continue;"),
        mask=("if (entry < 0) return store_line", "if (false) return store_line"),
    ),
    *of(
        "csrc/cpu/pairwise_cost.h", "sinkhorn_cpu",
        sign=("const T product = cosine ? T(-1)", "const T product = cosine ? T(1)"),
        edge=("for (int64_t lane = m - j; lane", "for (int64_t lane = m - j + 1; lane"),
        mask=("if (any(cancels))", "if (false)"),
    ),
    *of(
        "csrc/cpu/sinkhorn_iteration.h", "sinkhorn_cpu",
        sign=("u_new = exp<T>(potential - offset);", "u_new = exp<T>(offset - potential);"),
        edge=("return n - i > L / 2 ? dot_rows<L>", "return n - i > L / 2 + 1 ? dot_rows<L>"),
        mask=("if (any(untrusted(t))) {", "if (false) {"),
    ),
    *of(
        "csrc/cpu/sinkhorn_adjoint.h", "sinkhorn_cpu_backward",
        sign=("load(dF + i) - load(h() + i) * with_p", "load(dF + i) + load(h() + i) * with_p"),
        edge=("n - i > L / 2 ? add_rows<L>", "n - i > L / 2 + 1 ? add_rows<L>"),
        mask=("        have_t = false;\n        have_kernel = !flagged();", "        have_kernel = !flagged();"),
    ),
    *of(
        "csrc/cpu/sinkhorn_streaming.h", "sinkhorn_cpu",
        sign=("potential = (offset - log_one(s)) * it.damp_x;", "potential = (offset + log_one(s)) * it.damp_x;"),
        edge=("end = j + L < it.m ? j + L : it.m;", "end = j + L < it.m ? j + L : it.m - 1;"),
        mask=("|| any(Iteration::untrusted(t))", ""),
    ),
    *of(
        "csrc/cpu/sinkhorn_streaming_backward.h", "sinkhorn_cpu_streaming_backward",
        sign=("gradient = it.dF[i] - through_G", "gradient = it.dF[i] + through_G"),
        edge=("limit = last < it.m ? last : it.m;", "limit = last < it.m ? last : it.m - 1;"),
        mask=("(padding ? Vec<T>{} : by_G + by_F)", "(by_G + by_F)"),
    ),
    # Triton
    *of(
        "parrot_kernels/triton_kernels/selective_scan.py", "scan_triton",
        sign=("h = pick(a, k, step) * h + pick(b, k, step)", "h = pick(a, k, step) * h - pick(b, k, step)"),
        edge=("ahead = s + STEPS", "ahead = s + STEPS - 1"),
        mask=("a = tl.where(restarts, 0.0, a)", "a = a"),
    ),
    *of(
        "parrot_kernels/triton_kernels/selective_scan_backward.py", "scan_triton",
        sign=("return kept + added, kept, adjoint, carry", "return kept - added, kept, adjoint, carry"),
        edge=("for j in range(1, tiles):", "for j in range(1, tiles - 1):"),
        mask=("add(sums_dt + place, sum_states(decayed * A2) / LOG2E, first_state > 0)",
              "add(sums_dt + place, sum_states(decayed * A2) / LOG2E, first_state < 0)"),
    ),
    *of(
        "parrot_kernels/triton_kernels/causal_conv1d.py", "conv_triton",
        sign=("grad *= gate * (1.0 + pre", "grad *= gate * (1.0 - pre"),
        edge=("(s < 0) & (s >= 1 - WIDTH)", "(s < 0) & (s > 1 - WIDTH)"),
        mask=("value = tl.where(same[None, :], value, 0.0)", "value = value"),
    ),
    *of(
        "parrot_kernels/triton_kernels/sinkhorn_resident.py", "sinkhorn_triton",
        sign=("tile = 1.0 - (tile / spread(norm_x, True))", "tile = 1.0 + (tile / spread(norm_x, True))"),
        edge=("mask = spread(valid_i, True) & spread(columns < m, False)",
              "mask = spread(valid_i, True) & spread(columns < m - 1, False)"),
    ),
    *of(
        "parrot_kernels/triton_kernels/sinkhorn_hadamard.py", "sinkhorn_triton",
        mask=('c = tl.where(valid, c / divisor / unit, float("inf"))', "c = c / divisor / unit"),
    ),
    *of(
        "parrot_kernels/triton_kernels/sinkhorn_resident_adjoint.py", "sinkhorn_triton_backward",
        sign=("dF -= h * sum_tile(part, True)", "dF += h * sum_tile(part, True)"),
        edge=("known_j = j < tl.where(steps > 0, m, 0)", "known_j = j < tl.where(steps > 1, m, 0)"),
    ),
    *of(
        "parrot_kernels/triton_kernels/sinkhorn_hadamard_backward.py", "sinkhorn_triton_backward",
        mask=('c = tl.where(valid, c / divisor / unit, float("inf"))', "c = c / divisor / unit"),
    ),
    *of(
        "parrot_kernels/triton_kernels/sinkhorn_tiles.py", "sinkhorn_streaming",
        sign=("tile = squares - 2.0 * tile", "tile = squares + 2.0 * tile"),
        edge=("for _ in range(chunks):", "for _ in range(chunks - 1):"),
        mask=('+ at + j, mask=valid_j, other=float("-inf"))', "+ at + j, mask=valid_j, other=0.0)"),
    ),
    *of(
        "parrot_kernels/triton_kernels/sinkhorn_cost_gradient.py", "sinkhorn_streaming_backward",
        sign=("through -= direct * c * unit", "through += direct * c * unit"),
        edge=("valid = (i < own_left)[:, None] & (j < others - at)[None, :]",
              "valid = (i < own_left)[:, None] & (j < others - at - 1)[None, :]"),
        mask=("gradient = tl.where(valid_i[:, None] & valid_j[None, :], gradient, 0.0)", "gradient = gradient"),
    ),
    # CUDA C++, run on the host by an emulation
    *of(
        "csrc/cuda/selective_scan_forward.cuh", "cuda_compile",
        sign=("y[k] = fmaf(h[i], C[i], y[k]);", "y[k] = fmaf(-h[i], C[i], y[k]);"),
        edge=("if (!by_step(C) || s0 + s >= end) return;", "if (!by_step(C) || s0 + s >= end - 1) return;"),
        mask=("inputs[c][s].x = c < channels && s < steps ? dt : 0.0f;", "inputs[c][s].x = dt;"),
    ),
    *of(
        "csrc/cuda/selective_scan_backward.cuh", "cuda_scan_backward",
        sign=("dinput[k] = fmaf(g, B[i], dinput[k]);", "dinput[k] = fmaf(-g, B[i], dinput[k]);"),
        edge=("steps = min(kTile, length - s0);", "steps = min(kTile, length - s0 - 1);"),
        mask=("s > 0 && s < length && starts_sequence(p, b, s, length)", "false"),
    ),
    *of(
        "csrc/cuda/causal_conv1d_forward.cuh", "cuda_conv",
        edge=("if (t0 + i >= line.length) tile[i][c] = 0;", "if (t0 + i > line.length) tile[i][c] = 0;"),
    ),
    *of(
        "csrc/cuda/causal_conv1d_backward.cuh", "cuda_conv",
        sign=("gradient[i][c] * silu_derivative(dpre[i][c])", "-gradient[i][c] * silu_derivative(dpre[i][c])"),
        edge=("t0 + kSteps > line.length - (WIDTH - 1)", "t0 + kSteps > line.length - (WIDTH - 2)"),
        mask=("t0 + i < line.length ? tile[i][c] : Real(0)", "tile[i][c]"),
    ),
    *of(
        "csrc/cuda/selective_state_update.cu", "cuda_updates",
        sign=("sum += next * to_compute", "sum -= next * to_compute"),
        edge=("for (int n = lane; n < p.states;", "for (int n = lane; n < p.states - 1;"),
        mask=("from_compute<T>(padding ? Real(0) : sum)", "from_compute<T>(sum)"),
    ),
    *of(
        "csrc/cuda/causal_conv1d_update.cu", "cuda_updates",
        sign=("y += weight[k * p.weight_by[1]] * value;", "y -= weight[k * p.weight_by[1]] * value;"),
        edge=("const Real value = from >= 0 ?", "const Real value = from > 0 ?"),
    ),
    *of(
        "csrc/cuda/sinkhorn_hadamard_iteration.cuh", "sinkhorn_cuda",
        sign=("s.v[j] = exp2(potential - offset);", "s.v[j] = exp2(offset - potential);"),
        edge=("if (j >= m || i0 + r >= n) continue;", "if (j >= m - 1 || i0 + r >= n) continue;"),
        mask=("(i < n && untrusted(sum))", "false"),
    ),
    *of(
        "csrc/cuda/sinkhorn_hadamard_backward.cuh", "sinkhorn_cuda_backward",
        sign=("if (grad_plan) value += arguments.grad_plan", "if (grad_plan) value -= arguments.grad_plan"),
        mask=("staged[d * (width + 4) + i] = valid ?", "staged[d * (width + 4) + i] = true ?"),
    ),
    *of(
        "csrc/cuda/sinkhorn_hadamard_projections.cuh", "sinkhorn_cuda_backward",
        edge=("group + r < count && d < arguments.features)", "group + r < count && d < arguments.features - 1)"),
    ),
]  # fmt: skip


def run(mutant: Mutant, root: Path, seconds: float) -> str:
    """ "caught", or how the tests took it."""
    source = root / mutant.path
    text = source.read_text()
    mutant.plant(root)
    environment = {**os.environ, "PYTHONPATH": str(root), "PARROT_BUILD_CUDA": "0"}
    try:
        if mutant.path.startswith("csrc/cpu"):
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=root, env=environment, check=True, capture_output=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not compiles_without"]
        for marker in ("not slow", "slow"):  # the quick ones first; compiling for GPUs tells nothing
            tests = [*command, "-m", marker, *mutant.tests.split()]
            done = subprocess.run(tests, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds)
            if done.returncode not in (0, 5):  # 5: no tests of this kind
                break
    except subprocess.TimeoutExpired:
        return f"NO END in {seconds:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"NOT BUILT: {error.stderr.decode()[-500:]}"
    finally:
        source.write_text(text)
    if done.returncode == 1:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return f"caught: {failed[0] if failed else 'a failure'}"
    return "caught: a crash" if done.returncode < 0 else f"NOT CAUGHT (pytest's status {done.returncode})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="on what is printed of a fault")
    parser.add_argument("--seconds", type=float, default=900, help="limit for the tests of one fault (900)")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if re.search(arguments.only, str(m))]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for number, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            result = run(mutant, root, arguments.seconds)
            survivors += not result.startswith("caught")
            print(f"{number}/{len(chosen)} {mutant}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
