"""transformers' Mamba-1 models on our kernels: the outputs and gradients of its slow path, generation, undoing."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from parrot_kernels.compat import transformers as fast

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}


def mamba(**changes):
    config = transformers.MambaConfig(**SMALL | {"state_size": 8} | changes)
    return transformers.MambaForCausalLM(config)


def falcon_mamba():
    config = transformers.FalconMambaConfig(**SMALL, state_size=8)
    return transformers.FalconMambaForCausalLM(config)


def jamba():
    config = transformers.JambaConfig(
        **SMALL,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )
    config.use_mamba_kernels = False  # before transformers 5 its slow path has to be asked for
    return transformers.JambaForCausalLM(config)


MODELS = pytest.mark.parametrize("make", [mamba, falcon_mamba, jamba])


@pytest.fixture(autouse=True)
def _left_as_found():
    yield
    fast.disable()


def batch():
    ids, mask = torch.randint(1, 50, (2, 13)), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model, inputs):
    model.zero_grad()
    result = model(**inputs, labels=inputs["input_ids"])
    result.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": result.logits.detach()} | gradients


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        error, size = (got[name] - want[name]).abs().max(), want[name].abs().max()
        assert error <= 1e-5 * size + 1e-7, f"{name}: {error:.2e} of {size:.2e}"


@MODELS
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_slow_path(make, training):
    model, inputs = make().train(training), batch()
    want = outputs(model, inputs)
    with fast.enabled():
        assert_same(outputs(model, inputs), want)
        again = make().train(training)  # a model made meanwhile
        again.load_state_dict(model.state_dict())
        assert_same(outputs(again, inputs), want)
    for m in (model, again):
        after = outputs(m, inputs)
        assert all(torch.equal(after[name], want[name]) for name in want)


@MODELS
@pytest.mark.parametrize("length", [1, 8, 9, 21])
@pytest.mark.parametrize("masked", [False, True])
def test_inference_in_pieces(make, length, masked, monkeypatch):
    monkeypatch.setattr(fast, "PIECE", 8)
    lengths = []
    inference = fast._inference
    monkeypatch.setattr(fast, "_inference", lambda m, x, mask: lengths.append(x.shape[1]) or inference(m, x, mask))
    model, ids = make().eval(), torch.randint(1, 50, (2, length))
    mask = torch.ones_like(ids)
    mask[1, : length // 2] = 0 if masked else 1
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        with fast.enabled():
            got = model(ids, attention_mask=mask, use_cache=False).logits
    if hasattr(transformers.models.mamba.modeling_mamba, "mamba_selective_scan"):
        assert lengths
        assert set(lengths) == {length}
    assert_same({"logits": got}, {"logits": want})


@MODELS
def test_cached_generation(make):
    model, inputs = make().eval(), batch()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    slow = model.generate(**inputs, **options)
    with fast.enabled():
        cached = model.generate(**inputs, **options)
        uncached = model.generate(**inputs, **options, use_cache=False)
    for result in (cached, uncached):
        assert torch.equal(result.sequences, slow.sequences)
        assert_same({"logits": torch.stack(result.logits)}, {"logits": torch.stack(slow.logits)})


def test_the_kernels_are_what_runs(monkeypatch):
    model, inputs = mamba().eval(), batch()
    calls = []
    for module, name in ((fast.mamba_ssm.ops, "selective_scan"), (fast.causal_conv1d.ops, "causal_conv1d")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _name=name, _function=function, **o: calls.append(_name) or _function(*a, **o)
        )
    model(**inputs)
    assert not calls
    with fast.enabled():
        model(**inputs)
    assert sorted(calls) == ["causal_conv1d"] * 2 + ["selective_scan"] * 2


def test_no_warning_about_a_missing_fast_path():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        for enabled in (False, True):
            logging.Logger.warning_once.cache_clear()
            records.clear()
            if enabled:
                fast.enable()
            model = mamba().train()
            outputs(model, batch())
            model.eval().generate(**batch(), max_new_tokens=3, do_sample=False, pad_token_id=0)
            about_kernels = [r for r in records if "causal_conv1d" in r or "causal-conv1d" in r]
            assert bool(about_kernels) is not enabled, about_kernels
    finally:
        logger.removeHandler(handler)


def test_half_precision():
    model, inputs = mamba().to(torch.bfloat16).eval(), batch()
    exact = mamba().eval()
    exact.load_state_dict(model.state_dict())
    want, slow = exact(**inputs).logits, model(**inputs).logits
    with fast.enabled():
        got = model(**inputs).logits
    assert got.dtype == slow.dtype
    assert (got - want).abs().max() <= 2 * (slow - want).abs().max()


def test_another_activation_is_respected():
    model, inputs = mamba(hidden_act="gelu").eval(), batch()
    want = outputs(model, inputs)
    with fast.enabled():
        assert_same(outputs(model, inputs), want)


def test_enabling_twice_and_nesting():
    modeling = transformers.models.mamba.modeling_mamba
    before = dict(vars(modeling))
    fast.enable()
    fast.enable()
    with fast.enabled():
        pass
    assert dict(vars(modeling)) != before  # the inner block did not end what was on before it
    fast.disable()
    assert dict(vars(modeling)) == before
    fast.disable()
    assert dict(vars(modeling)) == before


def test_overlapping_blocks():
    modeling = transformers.models.mamba.modeling_mamba
    before = dict(vars(modeling))
    first, second = fast.enabled(), fast.enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dict(vars(modeling)) != before
    second.__exit__(None, None, None)
    assert dict(vars(modeling)) == before


def test_a_block_that_begins_while_another_enables(monkeypatch):
    modeling = transformers.models.mamba.modeling_mamba
    before, begun, met = dict(vars(modeling)), threading.Event(), []

    def slowly(*arguments):
        begun.set()
        time.sleep(0.02)
        replace(*arguments)

    def other():
        begun.wait()
        with fast.enabled():
            first_ended.wait(timeout=10)
            met.append(dict(vars(modeling)) != before)

    replace, first_ended = fast._replace, threading.Event()
    monkeypatch.setattr(fast, "_replace", slowly)
    thread = threading.Thread(target=other)
    thread.start()
    with fast.enabled():
        time.sleep(0.2)  # the other begins
    first_ended.set()
    thread.join()
    assert met == [True]
    assert dict(vars(modeling)) == before


def test_an_exception_in_a_block_disables():
    modeling = transformers.models.mamba.modeling_mamba
    before = dict(vars(modeling))
    with pytest.raises(KeyError), fast.enabled():
        raise KeyError
    assert dict(vars(modeling)) == before


def test_a_missing_model_leaves_the_others_alone(monkeypatch):
    modeling = transformers.models.mamba.modeling_mamba
    before = dict(vars(modeling))
    monkeypatch.setitem(fast.MIXERS, "no_such_model", "NoSuchMixer")
    with pytest.raises(ModuleNotFoundError, match="no_such_model"):
        fast.enable()
    assert dict(vars(modeling)) == before
    monkeypatch.delitem(fast.MIXERS, "no_such_model")
    with fast.enabled():
        assert dict(vars(modeling)) != before
