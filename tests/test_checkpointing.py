"""Gradient checkpointing leaves every gradient as it is without it, for all orders of hooks.

The reference of each case is the same model with checkpointing off, from the same random state and
an empty window of the load-balance loss. The recompute repeats the forward's own arithmetic, so
the gradients are equal bit for bit. One case is not: T5's decoder blocks all read the encoder's
output, and reentrant autograd adds up their gradients in another order. What rounding alone does
there is measured, by a backward pass of three times the loss.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref

import pytest
import tiny_models
import torch
from tolerance import assert_as_good_as_torch
from torch import Tensor

import milora
from milora.attach import runtime_of
from milora.checkpointing import CheckpointedBlock
from milora.routing import Call

FAMILIES = ("llama", "t5")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # matrices of 32 columns: a second thread would only wait


def make_model(family: str = "llama", **options):
    options = {"rank": 4, "balance_coef": 0.5, **options}  # a balance loss that would be missed
    model = milora.attach(tiny_models.build(family), milora.MiLoRAConfig(**options))
    return tiny_models.randomize(model).train()


def checkpoint(model, reentrant: bool | None) -> None:
    """Switch checkpointing on, under the name that this version of transformers has; None: off."""
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    if reentrant is None:
        getattr(model, f"{name}_disable")()
    else:
        getattr(model, f"{name}_enable")({"use_reentrant": reentrant})


def batch(family: str, rows: int, length: int, prompt: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows whose prompts differ in length, padded on the left."""
    lengths = [length - i for i in range(rows)]
    inputs = tiny_models.left_padded(lengths, seed=seed)
    if family == "t5":
        labels = tiny_models.prompts(rows, length - 2, seed=seed + 1)
        # Checkpointing switches T5's cache off, and without one its attention rounds otherwise.
        return {**inputs, "labels": labels, "use_cache": False}
    labels = inputs["input_ids"].clone()
    labels[:, : length - prompt] = -100
    return {**inputs, "labels": labels}


def gradients(
    model, batches: list[dict[str, Tensor]], theta: bool = False, factor: float = 1.0
) -> dict[str, Tensor]:
    """All forwards, then one backward of `factor` times the loss; divided by `factor`."""
    for window in runtime_of(model).windows.values():
        window.load_state_dict({"widths": [], "steps": []}, torch.device("cpu"))
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    with milora.activation_phase(model) if theta else contextlib.nullcontext():
        losses = [(i + 1) * model(**inputs).loss for i, inputs in enumerate(batches)]
        (factor * sum(losses)).backward()
    return {n: p.grad / factor for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differing


def check(model, batches: list[dict[str, Tensor]], reentrant: bool, theta: bool = False):
    """Compare checkpointing with none; returns the gradients."""
    expected = gradients(model, batches, theta)
    rounded = gradients(model, batches, theta, factor=3.0)
    checkpoint(model, reentrant)
    actual = gradients(model, batches, theta)
    if model.config.is_encoder_decoder and reentrant:
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_as_good_as_torch(actual[name], gradient.double(), rounded[name], name)
    else:
        assert_same(actual, expected)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"expert": "lora"},
        {"expert": "dora"},
        {"expert": "lora", "dropout": 0.3},
        {"expert": "dora", "dropout": 0.3},
        {"gate": "hard", "router_norm": "rms"},
        {"router": False},
    ],
    ids=["lora", "dora", "lora_dropout", "dora_dropout", "hard", "no_router"],
)
def test_gradients_are_exact(family, reentrant, forwards, options):
    model = make_model(family, **options)
    # Two forwards before the backward, as DPO has them: other prompts, other lengths.
    shapes = [(3, 12, 6), (2, 17, 5)][:forwards]
    batches = [batch(family, *shape, seed=i) for i, shape in enumerate(shapes)]
    trained = {name.rsplit(".", 1)[-1] for name in check(model, batches, reentrant)}
    assert trained == ({"weight"} if "router" in options else {"weight", "w_r", "w_sa"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_gradients_of_the_coefficients_are_exact(family, reentrant, forwards):
    model = make_model(family)
    batches = [batch(family, 2, 9 + 4 * i, 5, seed=i) for i in range(forwards)]
    trained = check(model, batches, reentrant, theta=True)
    assert len(trained) == len(runtime_of(model).blocks)
    assert all(name.endswith("theta") for name in trained)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_a_forward_in_between_changes_nothing(reentrant):
    """Two training batches with an evaluation and a generate between forward and backward."""
    model = make_model()
    checkpoint(model, reentrant)
    inputs = batch("llama", 2, 12, 6)
    expected = gradients(model, [inputs])
    window = runtime_of(model).windows["default"]
    window.load_state_dict({"widths": [], "steps": []}, torch.device("cpu"))
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    model.eval()
    with torch.no_grad():
        model(**batch("llama", 3, 9, 4, seed=5))
        model.generate(tiny_models.prompts(1, 6, seed=3), max_new_tokens=3, do_sample=False)
    model.train()
    loss.backward()
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_recompute_is_not_counted(family, reentrant):
    model = make_model(family)
    checkpoint(model, reentrant)
    milora.reset_stats(model)
    with milora.record_routing(model) as states:
        model(**batch(family, 3, 12, 6)).loss.backward()
    num_blocks = len(runtime_of(model).blocks)
    stats = milora.stats(model)
    assert (stats.routed_prompts, stats.router_launches) == (3 * num_blocks, num_blocks)
    assert len(states) == 1
    assert len(runtime_of(model).windows["default"].steps) == 1


def test_recorded_routes_do_not_depend_on_checkpointing():
    model = make_model()
    inputs = batch("llama", 3, 12, 6)
    with milora.record_routing(model) as plain:
        model(**inputs)
    checkpoint(model, False)
    with milora.record_routing(model) as checkpointed:
        model(**inputs)
    assert checkpointed[0].same_route(plain[0])
    assert not checkpointed[0].gates.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["off", "saved_tensors", "reentrant"]
)
def test_nothing_outlives_the_backward(family, reentrant, monkeypatch):
    """Every `Call` is gone after its backward, without the help of the garbage collector."""
    calls: list[weakref.ref] = []
    start = Call.__init__

    def remember(self, *args, **kwargs):
        start(self, *args, **kwargs)
        calls.append(weakref.ref(self))

    monkeypatch.setattr(Call, "__init__", remember)
    model = make_model(family)
    checkpoint(model, reentrant)
    inputs = batch(family, 2, 12, 6)
    gc.collect()
    gc.disable()
    try:
        loss = model(**inputs).loss
        loss.backward()
        graph = weakref.ref(loss)
        del loss
        assert graph() is None
        assert calls and not [call for call in calls if call() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_memory_is_flat_over_steps(reentrant):
    model = make_model()
    checkpoint(model, reentrant)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for step, rows in enumerate(itertools.islice(itertools.cycle([2, 3]), 22)):
        model(**batch("llama", rows, 12, 6, seed=step)).loss.backward()
        model.zero_grad(set_to_none=True)
        if step == 1:  # the window and the caches have their first entries
            before = tensors() - len(runtime_of(model).windows["default"].steps)
    assert tensors() - len(runtime_of(model).windows["default"].steps) <= before


def test_switching_off_and_detaching_leave_the_models_own_function():
    model = make_model()
    inputs = batch("llama", 2, 12, 6)
    checkpoint(model, False)
    inner = [block.module._gradient_checkpointing_func for block in runtime_of(model).blocks]
    model(**inputs).loss.backward()
    blocks = [block.module for block in runtime_of(model).blocks]
    assert all(isinstance(b._gradient_checkpointing_func, CheckpointedBlock) for b in blocks)
    milora.detach(model)
    assert [block._gradient_checkpointing_func for block in blocks] == inner
    model.requires_grad_(True)
    model(**inputs).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
