"""The tests of the CPU kernels under GCC's sanitizers; exit status 1 if one has anything to report, or a test fails.

    python tests/sanitize.py [memory|threads ...]     by default both

memory: addresses and undefined behaviour. threads: races; what libgomp does to start, join and meet threads is told to
the sanitizer by `sanitize_openmp.cpp`, as it can't see into it. Builds a copy of the sources for each, in
runs/sanitize, where tests.log then is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from distributions import IGNORED, ROOT

OUTPUT = ROOT / "runs" / "sanitize"
FLAGS = "-g1 -fno-omit-frame-pointer"
KINDS = {"memory": ("address,undefined", "libasan.so"), "threads": ("thread", "libtsan.so")}
TESTS = {
    "memory": "sinkhorn_cpu sinkhorn_cpu_backward sinkhorn_cpu_streaming_backward scan_cpu conv_cpu "
    "selective_state_update causal_conv1d_update parallel_branch_fusion workspace_limit processes fuzz",
    "threads": "processes sinkhorn_cpu sinkhorn_cpu_backward sinkhorn_cpu_streaming_backward scan_cpu conv_cpu fuzz",
}
SELECTED = {"memory": "not interpreter and not cuda and not triton and not spawn and not forkserver"}
SELECTED["threads"] = f"{SELECTED['memory']} and not fork"  # after which ThreadSanitizer can't follow threads
# Python and torch leak by design, and torch frees with one allocator what another one made. Tests of crashes want
# those of the system. Frames that outlive their function can't be seen: GCC aligns them to less than a vector.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:handle_segv=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",  # so that a test notices what its process did
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:history_size=4:exitcode=66:handle_segv=0",
}
REPORT = re.compile(r"runtime error:|(ERROR|WARNING): \w+Sanitizer")


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def library(name: str) -> str:
    """Where GCC keeps a runtime; it comes before libstdc++, whose exceptions it intercepts."""
    done = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check(kind: str) -> bool:
    sanitizers, runtime = KINDS[kind]
    folder = OUTPUT / kind
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED))

    def run(*command: str, **variables: str) -> int:
        return subprocess.run(command, cwd=source, env={**os.environ, **variables}, check=False).returncode

    flags = f"-fsanitize={sanitizers} {FLAGS}"
    if run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", CXXFLAGS=flags, PARROT_BUILD_CUDA="0"):
        return False
    preload = [library(runtime), library("libstdc++.so")]
    if kind == "threads":
        shim = folder / "openmp.so"
        if run(compiler(), "-O2", "-shared", "-fPIC", "tests/sanitize_openmp.cpp", "-o", str(shim), "-fopenmp", "-ldl"):
            return False
        preload.insert(1, str(shim))
    files = [f"tests/test_{name}.py" for name in TESTS[kind].split()]
    selection = ("-m", "not slow", "-k", SELECTED[kind])
    tests = (sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *selection)
    threads = {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, "LD_PRELOAD": ":".join(preload), "PYTHONPATH": str(source), **threads, **OPTIONS}
    reports = 0
    with (
        (folder / "tests.log").open("w") as log,
        subprocess.Popen(
            (*tests, *files), cwd=source, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        ) as running,
    ):  # fmt: skip
        for line in running.stdout:
            reports += bool(REPORT.search(line))
            log.write(line)
            sys.stdout.write(line)
    print(f"{kind}: tests {'failed' if running.returncode else 'passed'}, {reports} reports")
    return running.returncode == 0 and reports == 0


def main() -> int:
    kinds = sys.argv[1:] or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        print(f"no such sanitizer: {', '.join(unknown)}; there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    return 0 if all([check(kind) for kind in kinds]) else 1


if __name__ == "__main__":
    sys.exit(main())
