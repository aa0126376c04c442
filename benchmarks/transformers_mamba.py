"""transformers' Mamba on our kernels and on its own slow path: forward, memory, and cached generation token by token.

    python -m benchmarks.transformers_mamba --threads 4
    python -m benchmarks.transformers_mamba --modes generate --seconds 20

Models of random weights, 768 wide, 24 layers (those of state-spaces/mamba-130m), fp32. ``forward`` is the backbone on
one sequence of 512 tokens, ``generate`` one token of the language model with its cache. Rows and table as in
`benchmarks.run`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from . import machine, rows, run, timing

LENGTH, WIDTH, LAYERS, VOCABULARY = 512, 768, 24, 50280
MODES = {"forward": f"1x{LENGTH}", "generate": "1x1"}


def providers() -> dict[str, Callable[[], AbstractContextManager]]:
    from parrot_kernels.compat import transformers as fast

    return {"parrot_kernels[cpu]": fast.enabled, "transformers' slow path": contextlib.nullcontext}


def make(mode: str, layers: int = LAYERS) -> tuple[torch.nn.Module, Tensor]:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=WIDTH, num_hidden_layers=layers, vocab_size=VOCABULARY)
    model = transformers.MambaModel(config) if mode == "forward" else transformers.MambaForCausalLM(config)
    return model.eval(), torch.randint(0, VOCABULARY, (1, LENGTH))


def work(
    mode: str, model: torch.nn.Module, tokens: Tensor, enabled: Callable[[], AbstractContextManager]
) -> Callable[[], Tensor]:
    if mode == "forward":

        def forward() -> Tensor:
            with enabled(), torch.inference_mode():
                return model(tokens, use_cache=False).last_hidden_state

        return forward
    with enabled(), torch.inference_mode():
        cache = model(tokens, use_cache=True).cache_params

    def token() -> Tensor:
        with enabled(), torch.inference_mode():
            return model(tokens[:, -1:], cache_params=cache, use_cache=True).logits

    return token


def peak_mib(provider: str) -> float | None:
    command = [sys.executable, "-m", "benchmarks.transformers_mamba", "--peak-of", provider]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_peak(provider: str) -> None:
    """Peak memory of one forward, beyond the model and what a first call allocates once.

    Without gradients a layer's activations are gone when the next one runs: two layers need as much as all.
    """
    model, tokens = make("forward", layers=2)
    work("forward", model, tokens[:, :4], providers()[provider])()
    print(run.growth_mib(work("forward", model, tokens, providers()[provider])))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformers_mamba",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--seconds", type=float, default=10.0, help="per provider and mode")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print_peak(arguments.peak_of)
        return 0
    device = machine.device_name("cpu")
    context = {
        "device": device, "threads": torch.get_num_threads(), "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"), "allocator": "default",
        "versions": machine.versions("transformers"),
    }  # fmt: skip
    print(f"transformers_mamba on {device}, torch {torch.__version__}, commit {context['commit']}")
    for mode in arguments.modes:
        print(f"\n{mode}, {MODES[mode]}", flush=True)
        model, tokens = make(mode)
        works = {name: work(mode, model, tokens, enabled) for name, enabled in providers().items()}
        first = {name: call() for name, call in works.items()}
        want = first["transformers' slow path"].double()
        samples = timing.interleaved(works, "cpu", arguments.seconds)
        errors = {n: ((got.double() - want).abs().max() / want.abs().max()).item() for n, got in first.items()}
        peaks = {name: peak_mib(name) for name in works} if mode == "forward" else None
        measured = rows.of_samples("transformers_mamba", mode, MODES[mode], samples, errors, peaks)
        run.show(measured)
        if not arguments.no_save:
            rows.append(({**row, **context} for row in measured), rows.RESULTS / f"{device}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
