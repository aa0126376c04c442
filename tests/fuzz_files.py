"""Fuzzing of every file reader with damaged files.

    python tests/fuzz_files.py [--cases N] [--seconds S] [--seed FIRST] [--reader NAME] [--processes P]

A case is its reader and its seed. It damages a valid file: bits flipped, cut short, blocks moved, inserted or removed,
numbers overwritten, entries of JSON (also of a safetensors header) replaced. The reader must return, or raise the
exception its documentation names. Cases run in forked processes of limited memory, each under an alarm: crashes,
hangs and greed are seen. An audit hook sees processes started and connections made, and files must keep their bytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from fuzz_readers import READERS, Reader

MEMORY = 3 << 30  # beyond what the process has when it starts
SECONDS = 20  # for one case
BATCH = 250
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")
VALUES = (
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    -(2**70),
    1e308,
    0.5,
    "",
    "x",
    "../..",
    "\u2028",
    [],
    [[]],
    {},
    {"a": 1},
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """``data`` damaged in one to four ways."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.choice(("bits", "bits", "cut", "splice", "insert", "remove", "number", "number", "json", "json"))
        if kind == "json" and (edited := _edit(data, rng)) is not None:
            data = edited
            continue
        # What a file says of itself stands at its beginning more often than elsewhere.
        at = rng.randrange(min(len(data), rng.choice((16, 64, 512, 1 << 30))) or 1)
        block = rng.choice((1, 2, 4, 8, 60, 1000))
        if kind == "bits":
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 1, 8))):
                if damaged:
                    damaged[(at + rng.randrange(32)) % len(damaged)] ^= 1 << rng.randrange(8)
            data = bytes(damaged)
        elif kind == "cut":
            data = data[: rng.randrange(len(data) + 1)]
        elif kind == "splice":
            source = rng.choice(others)
            start = rng.randrange(len(source) or 1)
            data = data[:at] + source[start : start + block] + data[at + rng.choice((0, block)) :]
        elif kind == "insert":
            data = data[:at] + rng.choice((rng.randbytes(block), bytes(block), b"[" * block, b"," * block)) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + block :]
        else:
            size = rng.choice((1, 2, 3, 4, 5, 8))
            number = rng.choice((*NUMBERS, rng.getrandbits(64))) & ((1 << 8 * size) - 1)
            data = data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]
    return data


def _edit(data: bytes, rng: random.Random) -> bytes | None:
    """One entry of the JSON in ``data`` replaced, removed or renamed; None if there is none."""
    safetensors = data[8:9] == b"{"
    size = int.from_bytes(data[:8], "little") if safetensors else 0
    head, rest = (data[8 : 8 + size], data[8 + size :]) if safetensors else (data, b"")
    lines = [head] if safetensors else head.split(b"\n")
    at = rng.randrange(len(lines))
    for candidate, span in ((head, None), (lines[at], at)):
        try:
            content = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        place = content
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            how = rng.random()
            if how < 0.2:
                del place[key]
            elif how < 0.3 and isinstance(place, dict):
                place[str(rng.choice(VALUES))] = place.pop(key)
            else:
                place[key] = rng.choice(VALUES)
            break
        else:
            content = rng.choice(VALUES)
        text = json.dumps(content).encode()
        if rng.random() < 0.02:
            text = b"[" * 100_000 + text + b"]" * 100_000
        if span is not None:
            lines[span] = text
            return b"\n".join(lines)
        return len(text).to_bytes(8, "little") + text + rest if safetensors else text
    return None


def check(name: str, seed: int, folder: Path) -> str:
    """Run one case in ``folder``, which is empty; "read" or the name of the exception. Raises what is no answer."""
    rng, reader = random.Random(f"{name} {seed}"), READERS[name]
    files = dict(reader.files())
    victim = rng.choice([file for file in files if reader.damages(file)])
    files[victim] = mutate(files[victim], rng, list(files.values()))
    if reader.mend is not None and rng.random() < 0.5:
        reader.mend(files, victim)
    for file, data in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    outcome = "read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder, rng)
    except reader.raises as exception:  # documented
        if not str(exception):
            raise AssertionError("an exception without a message") from exception
        outcome = type(exception).__name__
    found = collections.Counter(
        path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"
    )
    assert found == collections.Counter(files.values()), "files were changed"
    return outcome


def _watch(event: str, arguments: tuple) -> None:
    if event.startswith(FORBIDDEN):
        raise BaseException(f"the reader ran {event} {arguments}")


def _hang(*_: object) -> None:
    raise BaseException(f"no answer in {SECONDS} s")


def _child(name: str, seeds: range, place: Path, pipe: int) -> None:
    """Write each seed before its case, and after it the outcome."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _hang)
    sys.addaudithook(_watch)
    for seed in seeds:
        os.write(pipe, f"{seed}\t".encode())
        with tempfile.TemporaryDirectory(dir=place) as folder:
            signal.alarm(SECONDS)
            try:
                outcome = check(name, seed, Path(folder))
            except BaseException as exception:  # all that is no documented answer
                outcome = f"FAILED {type(exception).__name__}: {str(exception)[:200]!r}"
            signal.alarm(0)
        os.write(pipe, f"{outcome}\n".encode())


def run_batch(name: str, seeds: range) -> list[tuple[int, str]]:
    """(seed, outcome) of each case, run in a process of its own; after a crash in another one."""
    results: list[tuple[int, str]] = []
    while seeds:
        read, write = os.pipe()
        with tempfile.TemporaryDirectory(
            prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
        ) as place:
            process = multiprocessing.get_context("fork").Process(target=_child, args=(name, seeds, Path(place), write))
            process.start()
            os.close(write)
            with os.fdopen(read, encoding="utf-8", errors="replace") as answers:
                lines = answers.read().splitlines()
            process.join()
        for line in lines:
            seed, _, outcome = line.partition("\t")
            results.append((int(seed), outcome or f"FAILED the process ended with {process.exitcode}"))
        done = len(lines)
        if process.exitcode and not done:
            raise RuntimeError(f"{name}: no case could be started, exit code {process.exitcode}")
        seeds = seeds[done:]
    return results


def run(names: list[str], cases: int, first: int, seconds: float, report: Callable[[str], None]) -> int:
    """Failures among ``cases`` cases of these readers in turn."""
    start, failures, count = time.monotonic(), 0, 0
    outcomes: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    while count < cases and time.monotonic() - start < seconds:
        name = names[count // BATCH % len(names)]
        for seed, outcome in run_batch(name, range(first + count, first + min(count + BATCH, cases))):
            outcomes[name][outcome.split(" ")[0]] += 1
            if outcome.startswith("FAILED"):
                failures += 1
                report(f"{name}: {outcome}\n    python tests/fuzz_files.py --reader {name} --seed {seed} --cases 1")
        count += BATCH
    for name, counted in outcomes.items():
        report(f"{name}: {sum(counted.values())} files: {dict(counted.most_common())}")
    report(f"{sum(sum(c.values()) for c in outcomes.values())} files, {failures} failed")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; those of the others follow")
    parser.add_argument("--reader", choices=READERS, help="this one only")
    options = parser.parse_args()
    names = [options.reader] if options.reader else list(READERS)
    for name in names:  # valid files are read, and what readers import is there before processes fork
        with tempfile.TemporaryDirectory() as folder:
            _valid(READERS[name], Path(folder))
    return 1 if run(names, options.cases, options.seed, options.seconds, lambda text: print(text, flush=True)) else 0


def _valid(reader: Reader, folder: Path) -> None:
    for file, data in reader.files().items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    reader.read(folder, random.Random(0))


if __name__ == "__main__":
    sys.exit(main())
