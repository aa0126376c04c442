"""PARROT and its baselines against a plain fp64 transcription of the method."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from parrot import Parrot, ParrotConfig, SingleEncoderClassifier
from parrot.fusion import FUSIONS, build_fusion
from parrot.model import SYSTEMS, VARIANTS, build

DIMS = (37, 20)
CLASSES = 4


def convolved(x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    h = x[:, None]
    for layer in (1, 4):
        h = F.conv1d(h, weights[f"{prefix}.{layer}.weight"], weights[f"{prefix}.{layer}.bias"], padding=1)
        h = h.relu()
        h = h[..., : h.shape[-1] // 2 * 2].unflatten(-1, (-1, 2)).amax(-1)
    return h.reshape(len(x), -1)  # channel-major


def linear(x: torch.Tensor, weights: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    return x @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]


def classified(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return linear(linear(x, weights, "classifier.0").relu(), weights, "classifier.3")


@torch.no_grad()
def paper_plan(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    cost = (p[:, None] - q[None]).square().sum(-1).sqrt()
    cost = cost / max(cost.max().item(), 1e-8)
    n, eps = len(p), 0.05
    f, g = torch.zeros(n, dtype=p.dtype), torch.zeros(n, dtype=p.dtype)
    for _ in range(50):
        f = eps * (-math.log(n) - torch.logsumexp((g[None] - cost) / eps, 1))
        g = eps * (-math.log(n) - torch.logsumexp((f[:, None] - cost) / eps, 0))
    return torch.exp((f[:, None] + g[None] - cost) / eps)


def transcribed(name: str, weights: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Logits of a named system from its weights, written from the method's description."""
    if name in ("fcn-0", "fcn-1"):
        return classified((a, b)[int(name[-1])], weights)
    if name in ("cnn-0", "cnn-1"):
        return classified(convolved((a, b)[int(name[-1])], weights, "stem"), weights)
    p = linear(convolved(a, weights, "streams.0.0"), weights, "streams.0.1")
    q = linear(convolved(b, weights, "streams.1.0"), weights, "streams.1.1")
    if name == "concat":
        return classified(torch.cat([p, q], 1), weights)
    if name == "hadamard":
        return classified(p * q, weights)
    plan, n = paper_plan(p, q), len(p)
    transported = [n * plan.T @ p, q, n * plan @ q, p]
    return classified(torch.cat(transported if name == "ot" else [p * q, *transported], 1), weights)


def batch(rows: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(rows, dim, dtype=dtype) for dim in DIMS]


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("rows", [32, 7, 1])
def test_systems_are_their_transcription(name, rows):
    model = build(name, DIMS, CLASSES).double().eval()
    features = batch(rows)
    logits = model(*features)
    assert logits.shape == (rows, CLASSES)
    weights = dict(model.named_parameters())
    want = transcribed(name, weights, *features)
    assert (logits - want).abs().max() <= 1e-9

    labels = torch.arange(rows) % CLASSES
    got = torch.autograd.grad(F.cross_entropy(logits, labels), weights.values())
    wanted = torch.autograd.grad(F.cross_entropy(want, labels), weights.values())
    for key, g, w in zip(weights, got, wanted, strict=True):
        assert (g - w).abs().max() <= 1e-9, key


def test_the_paper_at_its_size_is_its_transcription():
    """SSAM base and HuBERT base widths, six classes, a full batch: logits and the gradients of all 17.8 M weights."""
    model = Parrot((3840, 768), 6).double().eval()
    weights = dict(model.named_parameters())
    assert sum(weight.numel() for weight in weights.values()) == 17_822_582
    a, b = torch.randn(32, 3840, dtype=torch.float64), torch.randn(32, 768, dtype=torch.float64)
    labels = torch.arange(32) % 6
    logits, want = model(a, b), transcribed("parrot", weights, a, b)
    assert (logits - want).abs().max() <= 1e-9
    got = torch.autograd.grad(F.cross_entropy(logits, labels), weights.values())
    wanted = torch.autograd.grad(F.cross_entropy(want, labels), weights.values())
    for key, g, w in zip(weights, got, wanted, strict=True):
        assert (g - w).abs().max() <= 1e-9, key


def test_the_fused_row_is_in_the_papers_order():
    model = build("parrot", DIMS, CLASSES).double().eval()
    p, q = model.project(*batch(7))
    plan = paper_plan(p, q)
    want = torch.cat([p * q, 7 * plan.T @ p, q, 7 * plan @ q, p], 1)
    assert (model.fusion(p, q) - want).abs().max() <= 1e-9


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_in_single_precision(name):
    model = build(name, DIMS, CLASSES).eval()
    features = batch(32, torch.float32)
    weights = {key: weight.double() for key, weight in model.state_dict().items()}
    want = transcribed(name, weights, *(x.double() for x in features))
    assert (model(*features) - want).abs().max() <= 1e-5


def test_number_of_parameters_of_the_paper():
    def size(model):
        return sum(weight.numel() for weight in model.parameters())

    with torch.device("meta"):
        parrot = Parrot((3840, 768), 6)
        assert size(parrot) == 17_822_582
        assert size(parrot.streams[0][1]) == 122_880 * 120 + 120
        widths = {name: build(name, (3840, 768), 6).classifier[0].in_features for name in SYSTEMS}
    assert widths == {
        "fcn-0": 3840,
        "fcn-1": 768,
        "cnn-0": 122_880,
        "cnn-1": 24_576,
        "concat": 240,
        "hadamard": 120,
        "ot": 480,
        "parrot": 600,
    }


def test_the_default_is_the_paper():
    assert Parrot(DIMS, CLASSES).config == ParrotConfig.paper() == ParrotConfig()
    paper = ParrotConfig.paper()
    assert (paper.fusion, paper.eps, paper.n_iters, paper.gradient) == ("parrot", 0.05, 50, "detached")
    assert (paper.filters, paper.projection, paper.hidden, paper.dropout) == ((64, 128), 120, 128, 0.3)


def test_a_configuration_reaches_the_model():
    config = ParrotConfig(filters=(3, 5), projection=7, hidden=11, dropout=0.5, eps=0.2, n_iters=9, gradient="unrolled")
    model = Parrot(DIMS, CLASSES, config)
    assert model.streams[0][0].width == 5 * 9
    assert model.classifier[0].in_features == 35
    assert model.classifier[2].p == 0.5
    options = model.fusion.transport.options
    assert (options["eps"], options["n_iters"], options["gradient"]) == (0.2, 9, "unrolled")
    assert options["cost"] == "euclidean"
    assert options["cost_scale"] == "max"
    assert model(*batch(3, torch.float32)).shape == (3, CLASSES)


def test_frames_are_averaged_first():
    model = build("parrot", DIMS, CLASSES).double().eval()
    a, b = torch.randn(5, 9, DIMS[0], dtype=torch.float64), torch.randn(5, 3, DIMS[1], dtype=torch.float64)
    assert torch.equal(model(a, b), model(a.mean(1), b.mean(1)))
    single = build("cnn-1", DIMS, CLASSES).double().eval()
    assert torch.equal(single(a, b), single(b.mean(1)))


@pytest.mark.parametrize("name", SYSTEMS)
def test_plan_of_a_batch(name):
    model = build(name, DIMS, CLASSES).double().eval()
    features = batch(6)
    plan = getattr(model, "plan", lambda *_: None)(*features)
    if name not in ("ot", "parrot"):
        assert plan is None
        return
    weights = model.state_dict()
    p = linear(convolved(features[0], weights, "streams.0.0"), weights, "streams.0.1")
    q = linear(convolved(features[1], weights, "streams.1.0"), weights, "streams.1.1")
    assert (plan - paper_plan(p, q)).abs().max() <= 1e-9
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_logits_depend_on_the_batch_only_through_transport():
    features = batch(8)
    for name in SYSTEMS:
        model = build(name, DIMS, CLASSES).double().eval()
        moved = (model(*features)[:4] - model(*(x[:4] for x in features))).abs().max().item()
        assert (moved > 1e-4) == (name in ("ot", "parrot")), name


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_empty_batch(name):
    assert build(name, DIMS, CLASSES)(*batch(0, torch.float32)).shape == (0, CLASSES)


def test_a_single_encoder_takes_its_tensor_alone_or_among_all():
    a, b = batch(3)
    model = build("fcn-1", DIMS, CLASSES).double().eval()
    assert torch.equal(model(a, b), model(b))


def test_identical_rows_keep_everything_finite():
    model = build("parrot", DIMS, CLASSES)
    features = [torch.ones(8, dim) for dim in DIMS]
    loss = F.cross_entropy(model(*features), torch.arange(8) % CLASSES)
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def with_reference():
    torch.manual_seed(0)
    model = build("parrot-reference", DIMS, CLASSES).double()
    model.set_reference(*batch(31))
    return model.eval()


def test_a_reference_set_makes_a_row_independent_of_its_batch():
    model, features = with_reference(), batch(8)
    logits = model(*features)
    for k in range(8):
        alone = model(*(x[k : k + 1] for x in features))
        assert (logits[k] - alone[0]).abs().max() <= 1e-12
    other = build("parrot-reference", DIMS, CLASSES).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*features), logits)
    assert model(*(x[:0] for x in features)).shape == (0, CLASSES)


def test_transport_among_references_is_that_of_a_batch_of_them():
    model, features = with_reference(), batch(2)
    paper = build("parrot", DIMS, CLASSES).double().eval()
    paper.load_state_dict({k: w for k, w in model.state_dict().items() if not k.startswith("reference")})
    stored = [model.reference_0, model.reference_1]
    for k in range(2):
        joined = [torch.cat([x[k : k + 1], others]) for x, others in zip(features, stored, strict=True)]
        assert (model(*features)[k] - paper(*joined)[0]).abs().max() <= 1e-12
        assert (model.plan(*features)[k] - paper.plan(*joined)).abs().max() <= 1e-12
    model.train()
    paper.train()
    model.classifier[2].p = paper.classifier[2].p = 0.0
    assert torch.equal(model(*features), paper(*features))  # training is the paper's


def test_variants_change_one_thing_each():
    features = batch(16)
    torch.manual_seed(0)
    paper = build("parrot", DIMS, CLASSES).double().eval()
    weights = paper.state_dict()
    loss = F.cross_entropy(paper(*features), torch.arange(16) % CLASSES)
    gradient = torch.autograd.grad(loss, paper.streams[0][1].weight)[0]
    for name in VARIANTS:
        if name in ("parrot-frames", "parrot-first-pairs"):  # another architecture; the same with two encoders
            continue
        model = build(name, DIMS, CLASSES).double().eval()
        model.load_state_dict(weights, strict=False)
        if name == "parrot-reference":
            model.set_reference(*batch(31))
        logits = model(*features)
        assert torch.allclose(logits, paper(*features), rtol=1e-6) == (
            name in ("parrot-unrolled", "parrot-learned-eps")
        )
        loss = F.cross_entropy(logits, torch.arange(16) % CLASSES)
        assert (torch.autograd.grad(loss, model.streams[0][1].weight)[0] - gradient).abs().max() > 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("attention", DIMS, 4), r"`name` must be one of fcn-0, .*parrot.*got 'attention'"),
        (lambda: build("cnn-2", DIMS, 4), "among the 2 given; got 'cnn-2'"),
        (lambda: build("fcn-", DIMS, 4), "got 'fcn-'"),
        (lambda: Parrot((37,), 4), r"widths of two or more encoders; got \[37\]"),
        (lambda: Parrot((37, 3), 4), "`dim` must be at least 4, two poolings halve it; got 3"),
        (lambda: ParrotConfig(fusion="sum"), "`fusion` must be one of concat, hadamard, ot, parrot; got 'sum'"),
        (lambda: ParrotConfig(pairs="last"), "`pairs` must be one of all, first; got 'last'"),
        (lambda: ParrotConfig(transport="all"), "`transport` must be one of batch, reference, frames; got 'all'"),
        (lambda: Parrot(DIMS, 4).set_reference(*batch(31)), "`transport` must be 'reference'"),
        (
            lambda: build("parrot-reference", DIMS, 4).set_reference(*batch(3)),
            r"shapes \[\(31, 37\), \(31, 20\)\]; got",
        ),
        (lambda: build_fusion("sum"), "`name` must be one of concat, hadamard, ot, parrot; got 'sum'"),
        (lambda: SingleEncoderClassifier(8, 4, "mlp"), "`head` must be one of fcn, cnn; got 'mlp'"),
        (lambda: Parrot(DIMS, 4)(torch.zeros(2, 37)), "wanted 2 feature tensors, one per encoder; got 1"),
        (
            lambda: Parrot(DIMS, 4)(torch.zeros(2, 37), torch.zeros(2, 21)),
            r"feature tensor 1 must be \(B, 20\) or \(B, T, 20\), T at least 1; got \(2, 21\)",
        ),
        (
            lambda: Parrot(DIMS, 4)(torch.zeros(2, 0, 37), torch.zeros(2, 20)),
            r"feature tensor 0 must be .* got \(2, 0, 37\)",
        ),
        (
            lambda: Parrot(DIMS, 4)(torch.zeros(2, 37), torch.zeros(3, 20)),
            r"the same rows from all encoders; got \[2, 3\] rows",
        ),
        (lambda: build("fcn-1", DIMS, 4)(torch.zeros(2, 37)), r"feature tensor 0 must be \(B, 20\)"),
        (lambda: build("fcn-1", DIMS, 4)(), "wanted the tensor of encoder 1, alone or among all; got 0 tensors"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_reference_set_must_be_there():
    with pytest.raises(RuntimeError, match="no reference set yet"):
        build("parrot-reference", DIMS, CLASSES).double().eval()(*batch(2))


def test_fusions_are_the_parts_of_one_module():
    assert build_fusion("parrot").parts == ("hadamard", "x_to_y", "y", "y_to_x", "x")
    assert {name: build_fusion(name).solves_transport for name in FUSIONS} == {
        "concat": False,
        "hadamard": False,
        "ot": True,
        "parrot": True,
    }


THREE = (37, 20, 12)


@pytest.mark.parametrize(("name", "parts"), [("parrot", 12), ("ot", 9), ("hadamard", 3), ("concat", 3)])
def test_three_encoders(name, parts):
    """Each pair's row by the transcription of two encoders, every stream once."""
    model = build(name, THREE, CLASSES).double().eval()
    features = [torch.randn(9, dim, dtype=torch.float64) for dim in THREE]
    streams, n = model.project(*features), 9
    row = []
    for k, l in ((0, 1), (0, 2), (1, 2)):
        p, q = streams[k], streams[l]
        plan = paper_plan(p, q)
        pair = {"hadamard": p * q, "x_to_y": n * plan.T @ p, "y": q, "y_to_x": n * plan @ q, "x": p}
        if k == 1:
            del pair["y"]
        if (k, l) != (0, 1):
            del pair["x"]
        row += [pair[part] for part in FUSIONS[name] if part in pair]
    want = classified(torch.cat(row, 1), dict(model.named_parameters()))
    assert (model(*features) - want).abs().max() <= 1e-9
    filters, p, h = (64, 128), 120, 128
    size = sum(4 * 64 + 3 * 64 * 128 + 128 + filters[1] * (dim // 4) * p + p for dim in THREE)
    assert sum(w.numel() for w in model.parameters()) == size + h * (parts * p + 1) + CLASSES * (h + 1)
    if model.fusion.solves_transport:
        assert (model.plan(*features) - paper_plan(*streams[:2])).abs().max() <= 1e-9


def test_pairs_with_the_first_encoder():
    assert build("parrot-first-pairs", THREE, CLASSES).fusion.width(1) == 9
    torch.manual_seed(0)
    paper = build("parrot", DIMS, CLASSES).double().eval()
    torch.manual_seed(0)
    first = build("parrot-first-pairs", DIMS, CLASSES).double().eval()
    features = batch(5)
    assert torch.equal(paper(*features), first(*features))


def test_a_reference_set_of_three_encoders():
    torch.manual_seed(0)
    model = Parrot(THREE, CLASSES, ParrotConfig(transport="reference", reference_size=5)).double()
    model.set_reference(*(torch.randn(5, dim, dtype=torch.float64) for dim in THREE))
    features = [torch.randn(4, dim, dtype=torch.float64) for dim in THREE]
    logits = model.eval()(*features)
    assert (model(*(x[2:3] for x in features))[0] - logits[2]).abs().max() <= 1e-12
