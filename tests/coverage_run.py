"""Coverage of the Python packages and, by a build with gcov, of the C++ of the CPU extension; into runs/coverage.

    python tests/coverage_run.py [PYTEST ARGUMENTS]     by default: -m "not slow"

Builds and tests a copy of the sources. Processes that tests start are counted too, so are Triton kernels where they are
interpreted; CUDA C++ is not. A line of a C++ template counts once, not for each of its instances and instruction sets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import PurePath

from distributions import IGNORED, PACKAGES, ROOT

OUTPUT = ROOT / "runs" / "coverage"
SOURCE = OUTPUT / "source"
CONFIGURATION = f"""\
[run]
source =
    {SOURCE}/{f"{chr(10)}    {SOURCE}/".join(PACKAGES)}
data_file = {OUTPUT}/data
parallel = true
patch =
    subprocess
    _exit
disable_warnings = module-not-imported, no-data-collected
"""


def run(*command: str, **variables: str) -> int:
    return subprocess.run(command, cwd=SOURCE, env={**os.environ, **variables}, check=False).returncode


def python_coverage(options: list[str]) -> int:
    """Runs the tests; the report and python.json."""
    configuration = OUTPUT / "coverage.ini"
    configuration.write_text(CONFIGURATION)
    coverage, rc = (sys.executable, "-m", "coverage"), f"--rcfile={configuration}"
    status = run(*coverage, "run", rc, "-m", "pytest", "-q", *options, PYTHONPATH=str(SOURCE))
    run(*coverage, "combine", "-q", rc)
    run(*coverage, "report", rc, "--show-missing", "--skip-covered")
    return run(*coverage, "json", "-q", rc, "-o", str(OUTPUT / "python.json")) or status


def cpp_coverage() -> int:
    """The report and cpp.json."""
    # gcov takes the counts of hot loops for an overflow unless the threshold is off.
    gcovr = ["--root", ".", "--filter", "csrc/", "--merge-lines", "--gcov-suspicious-hits-threshold", "0"]
    gcovr += ["--exclude-unreachable-branches", "--exclude-throw-branches", "--gcov-ignore-errors", "all"]
    summary = ["--json-summary", str(OUTPUT / "cpp.json"), "--json-summary-pretty", "--txt", "-"]
    return run(sys.executable, "-m", "gcovr", *gcovr, *summary, "build")


def by_package() -> list[str]:
    """Lines of a table: package, statements, how many of them ran."""
    statements, covered = Counter(), Counter()
    for path, file in json.loads((OUTPUT / "python.json").read_text())["files"].items():
        folders = PurePath(path).parts[:-1]
        for package in ("Python", "/".join(folders[:2])):
            statements[package] += file["summary"]["num_statements"]
            covered[package] += file["summary"]["covered_lines"]
    cpp = json.loads((OUTPUT / "cpp.json").read_text())
    statements["C++"], covered["C++"] = cpp["line_total"], cpp["line_covered"]
    return [f"{name:<32} {n:>6} {covered[name] / n:>8.1%}" for name, n in statements.items() if n]


def main() -> int:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    shutil.copytree(ROOT, SOURCE, ignore=shutil.ignore_patterns(*IGNORED))
    # Optimised as ever; atomic, since kernels run in threads.
    flags = "--coverage -fprofile-update=atomic"
    if run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", CXXFLAGS=flags, PARROT_BUILD_CUDA="0"):
        return 1
    status = python_coverage(sys.argv[1:] or ["-m", "not slow"])
    status |= cpp_coverage()
    print("\n".join(by_package()))
    return status


if __name__ == "__main__":
    sys.exit(main())
