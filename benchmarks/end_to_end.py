"""PARROT from end to end: embedding a clip, and a training step.

    python -m benchmarks.end_to_end --threads 4

``embedding`` (forward): one clip of 2.5 s through SSAM base and HuBERT base of random weights, as `parrot features`
does it, beside the same with SSAM's mixers written in plain PyTorch, a step after another; HuBERT is transformers' on
both sides, on ours with `parrot_kernels.modules.Linear`. ``training_step`` (forward + backward): forward, loss,
backward and Adam's step of PARROT in the paper's configuration on 32 utterances, beside those of the baseline that
concatenates, which has no transport to compute.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import machine, rows, run, selective_scan, timing

SAMPLES, BATCH, DIMS, CLASSES = 40_000, 32, (3840, 768), 6
OURS = "parrot_kernels[cpu]"
SHAPES = {"embedding": f"1x{SAMPLES}", "training_step": f"{BATCH}x{DIMS[0]}+{DIMS[1]}"}
PEERS = {"embedding": "sequential scan", "training_step": "concatenation"}
MODES = {"embedding": "forward", "training_step": "both"}
Works = dict[str, Callable[[], Tensor]]


class SequentialMixer(nn.Module):
    """A Mamba mixer in plain PyTorch, with the weights of one of ours."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.scan = selective_scan.step_loop(selective_scan.step)

    def forward(self, hidden: Tensor) -> Tensor:
        m = self.mixer
        x, z = F.linear(hidden, m.in_proj.weight).mT.chunk(2, dim=1)
        x = F.silu(m.conv1d(x)[..., : hidden.shape[1]])
        rank, state = m.dt_proj.in_features, m.A_log.shape[1]
        dt, B, C = F.linear(x.mT, m.x_proj.weight).split((rank, state, state), dim=-1)
        delta = (dt @ m.dt_proj.weight.T).mT
        y = self.scan(x, delta, -m.A_log.exp(), B.mT, C.mT, m.D, z, m.dt_proj.bias)
        return F.linear(y.mT, m.out_proj.weight)


def embedding(samples: int = SAMPLES, layers: int | None = None) -> Works:
    import transformers

    from parrot.encoders.speech import SpeechModel
    from parrot.encoders.ssam import SSAM
    from parrot_kernels.modules import accelerate_linear

    torch.manual_seed(0)
    depth = {} if layers is None else {"depth": layers}
    ssam = SSAM(**depth).eval()
    config = transformers.HubertConfig(**({} if layers is None else {"num_hidden_layers": layers}))
    hubert = SpeechModel(transformers.HubertModel(config), do_normalize=False).eval()
    fast_hubert = accelerate_linear(copy.deepcopy(hubert))  # as `parrot.encoders.load` does
    plain = SSAM(**depth).eval()
    plain.load_state_dict(ssam.state_dict())
    for block in plain.blocks:
        block.mixer = SequentialMixer(block.mixer)
    clip = 0.1 * torch.randn(1, samples)

    def embed(mamba: SSAM, hubert: SpeechModel) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def both_encoders() -> Tensor:
            return torch.cat([mamba.embed(clip), hubert.embed(clip)], dim=1)

        return both_encoders

    return {OURS: embed(ssam, fast_hubert), PEERS["embedding"]: embed(plain, hubert)}


def training_step(batch: int = BATCH, dims: tuple[int, ...] = DIMS) -> Works:
    from parrot import model

    torch.manual_seed(0)
    features, labels = [torch.randn(batch, dim) for dim in dims], torch.randint(0, CLASSES, (batch,))

    def step(name: str) -> Callable[[], Tensor]:
        system = model.build(name, dims, CLASSES).train()
        optimizer = torch.optim.Adam(system.parameters(), lr=1e-3)

        def once() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(system(*features), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return once

    return {OURS: step("parrot"), PEERS["training_step"]: step("concat")}


WORKS = {"embedding": embedding, "training_step": training_step}


def measure(op: str, seconds: float) -> list[dict]:
    works = WORKS[op]()
    errors = dict.fromkeys(works, 0.0)
    if op == "embedding":  # the same numbers, to rounding
        got, want = (works[name]() for name in (OURS, PEERS[op]))
        errors[OURS] = ((got - want).abs().max() / want.abs().max()).item()
        if errors[OURS] > 1e-3:
            raise RuntimeError(f"end_to_end: the embeddings differ by {errors[OURS]:.1e} of the largest")
    return rows.of_samples(op, MODES[op], SHAPES[op], timing.interleaved(works, "cpu", seconds), errors)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--seconds", type=float, default=10.0, help="per provider")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = machine.device_name("cpu")
    context = {
        "device": device, "threads": torch.get_num_threads(), "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"), "allocator": "default", "versions": machine.versions("transformers"),
    }  # fmt: skip
    print(f"end_to_end on {device}, torch {torch.__version__}, commit {context['commit']}")
    for op in WORKS:
        print(f"\n{op}, {SHAPES[op]}", flush=True)
        measured = measure(op, arguments.seconds)
        run.show(measured)
        if not arguments.no_save:
            rows.append(({**row, **context} for row in measured), rows.RESULTS / f"{device}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
