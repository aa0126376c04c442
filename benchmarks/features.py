"""Hours of audio embedded per minute, by 1, 2 and 4 processes that share the cores.

    python -m benchmarks.features
    python -m benchmarks.features --processes 1 2 --encoders ssam-demo hubert-demo

Clips of noise, 2 to 4 s, go through `parrot.features.extract` into an empty store: reading, hashing, decoding,
embedding, writing, and the wait for the slowest process; starting and loading the encoder do not. The base
encoders have their published sizes and random weights. Rows go to the results of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from parrot.workers import usable_cores

from . import machine, rows

RATE = 16_000
# encoder -> clips of a pass: a few seconds each
CLIPS = {"ssam-demo": 128, "hubert-demo": 64, "ssam-base": 8, "hubert-base": 16}
WAYS = {"fp32": {}, "bf16": {"precision": "bf16"}}
SAMPLES = 3


def encoder(name: str):
    from parrot import encoders
    from parrot.encoders.speech import SpeechModel
    from parrot.encoders.ssam import SSAM

    if name == "ssam-base":
        return SSAM(name=name).eval().requires_grad_(False)
    if name == "hubert-base":
        from transformers import HubertConfig, HubertModel

        return SpeechModel(HubertModel(HubertConfig()), do_normalize=True, name=name).eval().requires_grad_(False)
    return encoders.load(name)


def corpus(folder: Path, clips: int):
    """Clips of noise whose loudness changes; made once."""
    import soundfile

    from parrot.corpora import Corpus, Utterance

    random, utterances, seconds = np.random.default_rng(0), [], 0.0
    for number in range(clips):
        samples = int(random.integers(2 * RATE, 4 * RATE))
        wave = 0.1 * random.standard_normal(samples) * np.sin(np.arange(samples) / 3000)
        path = folder / f"{number:04d}.wav"
        if not path.exists():
            soundfile.write(path, wave, RATE, "PCM_16")
        utterances.append(Utterance(path, "s", "a", "x"))
        seconds += samples / RATE
    return Corpus("noise", folder, tuple(utterances), ("a",)), seconds


def passes(names: list[str], way: str, samples: int, folder: Path) -> None:
    """What each process does: print, as the main one, the seconds of every pass."""
    from parrot.distributed import join, leave
    from parrot.features import Extraction, extract

    group = join("cpu")
    for name in names:
        torch.manual_seed(0)
        model, (clips, audio) = encoder(name), corpus(folder, CLIPS[name])
        measured = []
        for number in range(samples + 1):  # the first is warm-up
            group.gather(None)
            start = time.perf_counter()
            extract(
                clips, model, folder / f"{group.size}-{name}-{number}", False, how=Extraction(**WAYS[way]), group=group
            )
            measured.append(time.perf_counter() - start)
        if group.main:
            print(
                json.dumps({"encoder": name, "audio": audio, "clips": len(clips), "seconds": measured[1:]}), flush=True
            )
    leave()


def measure(names: list[str], processes: int, way: str, samples: int, folder: Path) -> Iterator[dict]:
    threads = max(1, usable_cores() // processes)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "benchmarks.features", "--child", way, str(samples), str(folder), "--encoders", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            result = json.loads(line)
            p20, p50, p80 = np.quantile(result["seconds"], (0.2, 0.5, 0.8))
            hours = result["audio"] / 60 / p50
            print(f"{processes} x {threads} threads, {way}: {result['encoder']}: {hours:.3g} h/min", flush=True)
            yield {
                "op": "features", "provider": "parrot.features", "mode": "extract", "dtype": way,
                "shape": f"{result['encoder']}, {result['clips']} clips", "processes": processes, "threads": threads,
                "p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80, "samples": len(result["seconds"]),
                "hours_per_minute": hours, "peak_mib": None,
            }  # fmt: skip
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {running.returncode}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--encoders", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--way", choices=WAYS, default="fp32")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        way, samples, folder = arguments.child
        passes(arguments.encoders, way, int(samples), Path(folder))
        return 0
    device = machine.device_name("cpu")
    context = {"device": device, "commit": machine.commit(), "date": time.strftime("%Y-%m-%d"), "allocator": "default",
               "versions": machine.versions("transformers", "accelerate")}  # fmt: skip
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(arguments.encoders, processes, arguments.way, arguments.samples, Path(folder)):
                rows.append([{**row, **context}], arguments.results / f"{device}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
