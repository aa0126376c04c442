"""A Mamba model of transformers on these kernels: the same logits and the same text. Its weights are random."""

from __future__ import annotations

import time

import torch
import transformers

import parrot_kernels.compat.transformers as fast_mamba

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = transformers.MambaConfig(vocab_size=200, hidden_size=128, num_hidden_layers=4, state_size=16)
model = transformers.MambaForCausalLM(config).eval()
tokens = torch.randint(1, 200, (1, 128))


def run() -> tuple[torch.Tensor, torch.Tensor, float]:
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(tokens).logits
        text = model.generate(tokens, max_new_tokens=8, do_sample=False)
    return logits, text, time.perf_counter() - start


run()  # the first call of anything is slower
logits, text, seconds = run()
with fast_mamba.enabled():
    run()
    fast_logits, fast_text, fast_seconds = run()

print(f"largest difference of the logits: {(fast_logits - logits).abs().max():.1e}")
print(f"same text: {torch.equal(fast_text, text)}")
print(f"transformers alone {seconds:.2f} s, with parrot_kernels {fast_seconds:.2f} s")
