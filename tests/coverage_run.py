"""Coverage of the Python packages and, by a build with gcov, of the C++ of the CPU extension; into runs/coverage.

    python tests/coverage_run.py [PYTEST ARGUMENTS]     by default: -m "not slow"

Builds and tests a copy of the sources. What tests start as processes of their own is not counted, nor is CUDA C++.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from distributions import IGNORED, PACKAGES, ROOT

OUTPUT = ROOT / "runs" / "coverage"


def main() -> int:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    source = OUTPUT / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED))

    def run(*command: str, **variables: str) -> int:
        return subprocess.run(command, cwd=source, env={**os.environ, **variables}, check=False).returncode

    # Optimised as ever; atomic, since kernels run in threads.
    flags = "--coverage -fprofile-update=atomic"
    if run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", CXXFLAGS=flags, PARROT_BUILD_CUDA="0"):
        return 1
    options = sys.argv[1:] or ["-m", "not slow"]
    reports = [f"--cov-report=json:{OUTPUT / 'python.json'}", "--cov-report=term-missing:skip-covered"]
    status = run(sys.executable, "-m", "pytest", "-q", *(f"--cov={name}" for name in PACKAGES), *reports, *options)
    gcovr = ["--root", ".", "--filter", "csrc/", "--exclude-unreachable-branches", "--exclude-throw-branches"]
    summary = ["--json-summary", str(OUTPUT / "cpp.json"), "--json-summary-pretty", "--txt", "-"]
    status |= run(sys.executable, "-m", "gcovr", *gcovr, "--gcov-ignore-errors", "all", *summary, "build")
    totals = json.loads((OUTPUT / "python.json").read_text())["totals"]
    cpp = json.loads((OUTPUT / "cpp.json").read_text())
    print(f"Python: {totals['percent_covered']:.1f} % of {totals['num_statements']} statements")
    print(
        f"C++: {cpp['line_percent']:.1f} % of {cpp['line_total']} lines, {cpp['function_percent']:.1f} % of functions"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
