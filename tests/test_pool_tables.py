"""What a pool's tables show of a loaded adapter: its weights and routers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_model import dense, update_of
from pool_tools import (
    KINDS,
    expert_runs,
    lora_bytes,
    new_pool,
    resident_bytes,
    router_runs,
    save_adapter,
)
from tiny_models import build
from tolerance import assert_as_good_as_torch

import milora
from milora import AdapterPool, MiLoRAConfig
from milora.adapters import read_folder
from milora.attach import runtime_of

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@contextmanager
def loaded(model, folder) -> Iterator[AdapterPool]:
    """A pool of `model` with the adapter in `folder` resident as "adapter"."""
    with torch.no_grad(), new_pool(model) as pool:
        pool.register("adapter", folder)
        pool.load("adapter")
        yield pool


def assert_shows(pool, name: str, attached, adapter: str) -> None:
    """The tables hold the very bits that inference reads of the attached adapter."""
    runtime = runtime_of(attached)
    found = expert_runs(pool, name)
    places = set()
    for index, linears in enumerate(runtime.linears):
        for linear in linears:
            if adapter not in linear.specs:
                continue
            path = runtime.blocks[index].experts[linear.column]
            column = pool._runtime.blocks[index].experts.index(path)
            places.add((index, column))
            a, b, scale, u, v = found[index, column]
            want = linear.weights(adapter)
            dtype = linear.base_layer.weight.dtype
            assert torch.equal(a, want.a.to(dtype)) and torch.equal(b, want.b.to(dtype))
            assert scale == pytest.approx(want.scale)
            if want.output is None:
                assert u is None and v is None
            else:
                bias = linear.base_layer.bias
                assert torch.equal(u, want.output)
                assert torch.equal(v, -u * (0.0 if bias is None else bias.float()))
    assert found.keys() == places
    for shown, router in zip(router_runs(pool, name), runtime.routers_of(adapter), strict=True):
        if router is None:
            assert shown is None
            continue
        assert tuple(shown.pop("codes").tolist()) == router.codes
        parameters = dict(router.named_parameters())
        assert shown.keys() == parameters.keys()
        for key, value in parameters.items():
            assert torch.equal(shown[key].reshape(value.shape), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_show_what_attached_adapters_compute_with(tmp_path, kind, dtype):
    save_adapter(tmp_path, KINDS[kind])
    attached = milora.load(build("llama").to(DTYPES[dtype]), tmp_path, "other")
    with loaded(build("llama").to(DTYPES[dtype]), tmp_path) as pool:
        assert_shows(pool, "adapter", attached, "other")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_against_a_plain_reference(tmp_path, kind):
    """scale · B A + u ⊙ W read back is the update that the saved tensors stand for, in float64."""
    made = save_adapter(tmp_path, KINDS[kind])
    runtime = runtime_of(made)
    with loaded(build("llama"), tmp_path) as pool:
        for (index, column), (a, b, scale, u, _) in expert_runs(pool, "adapter").items():
            path = pool._runtime.blocks[index].experts[column]
            linear = runtime.blocks[index].module.get_submodule(path)
            weight = dense(linear.base_layer)
            want = update_of(linear, "default", weight.double())
            got = scale * (b @ a) + (0 if u is None else u[:, None] * weight)
            assert_as_good_as_torch(got, want, want.float(), f"{path} of block {index}")


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_peft_folders(tmp_path, family, use_dora):
    """phi has biases, gpt2 transposed weights."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=use_dora)
    model = get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path)
    attached = milora.load(build(family), tmp_path, "other")
    with loaded(build(family), tmp_path) as pool:
        assert not pool.entry("adapter").config.router
        assert_shows(pool, "adapter", attached, "other")


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_other_architectures(tmp_path, family):
    """Decoder blocks of t5 have no pooler of their own; bert has no causal routing."""
    model = save_adapter(tmp_path, {"top_k": 2}, family=family)
    with loaded(build(family), tmp_path) as pool:
        assert_shows(pool, "adapter", model, "default")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_from_memory(tmp_path, kind):
    """Tensors, and attached adapters, give the same bytes as the folder; later changes do not."""
    model = save_adapter(tmp_path, KINDS[kind])
    config, tensors = read_folder(model, tmp_path)
    with new_pool(model) as pool:
        pool.register("folder", tmp_path)
        pool.register("tensors", config=config, tensors=tensors)
        pool.register("attached", attached="default")
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        for name in ("tensors", "attached"):
            pool.load("folder")
            pool.load(name)
            assert resident_bytes(pool, name) == resident_bytes(pool, "folder")
            assert pool.entry(name).config == config


def test_sizes(tmp_path):
    """Runs take what the formula says: rows on 16 bytes, runs on 64, no padding of ranks."""
    save_adapter(tmp_path, {"router": False}, rank=5)
    for dtype in (torch.float32, torch.bfloat16):
        with loaded(build("llama").to(dtype), tmp_path) as pool:
            want = lora_bytes(5, dtype=dtype)
            assert pool.entry("adapter").num_bytes == pool.statistics().device_used == want


def test_an_evicted_slot_is_empty(tmp_path):
    save_adapter(tmp_path, {"expert": "dora"})
    with new_pool(build("llama")) as pool:
        before = [[t.clone() for t in vars(tables).values()] for tables in pool.tables]
        tensors = [[id(t) for t in vars(tables).values()] for tables in pool.tables]
        pool.register("adapter", tmp_path)
        pool.load("adapter")
        pool.evict("adapter")
        for was, tables in zip(before, pool.tables, strict=True):
            for old, new in zip(was[1:5], list(vars(tables).values())[1:5], strict=True):
                assert torch.equal(old, new)
        assert tensors == [[id(t) for t in vars(tables).values()] for tables in pool.tables]


def test_tables_are_changed_in_place(tmp_path):
    """Their addresses stay, also through compaction: a captured graph reads on."""
    for seed in range(3):
        save_adapter(tmp_path / str(seed), {}, seed=seed + 1)
    with new_pool(build("llama")) as pool:
        addresses = [[t.data_ptr() for t in vars(tables).values()] for tables in pool.tables]
        for seed in range(3):
            pool.register(str(seed), tmp_path / str(seed))
            pool.load(str(seed))
        before = {name: resident_bytes(pool, name) for name in ("1", "2")}
        pool.evict("0")
        pool.compact()
        assert pool.statistics().compactions == 1
        assert {name: resident_bytes(pool, name) for name in before} == before
        assert addresses == [[t.data_ptr() for t in vars(tab).values()] for tab in pool.tables]


def test_a_model_with_mixed_dtypes(tmp_path):
    """Each expert is kept in the dtype of its own module."""
    save_adapter(tmp_path, {})
    model = build("llama")
    model.model.layers[1].mlp.to(torch.bfloat16)
    with loaded(model, tmp_path) as pool:
        experts = model.model.layers
        kinds = {torch.float32: 0, torch.bfloat16: 0}
        for index, dtypes in enumerate(pool.dtypes):
            for dtype in dtypes:
                kinds[dtype] += 1
                assert dtype == torch.float32 or index == 1
        assert kinds == {torch.float32: 11, torch.bfloat16: 3} and len(experts) == 2
        assert len(expert_runs(pool, "adapter")) == 14


def test_a_seed_is_not_part_of_the_layout(tmp_path):
    """Adapters that differ in what shapes nothing share one layout, and keep their own weights."""
    models = [save_adapter(tmp_path / str(s), KINDS["lora_mini"], seed=s) for s in (1, 2)]
    with torch.no_grad(), new_pool(build("llama")) as pool:
        for seed, model in zip((1, 2), models, strict=True):
            pool.register(str(seed), tmp_path / str(seed))
            pool.load(str(seed))
            assert_shows(pool, str(seed), model, "default")
        assert pool.entry("1").layout is pool.entry("2").layout
        assert pool.entry("1").config.seed == 1 and pool.entry("2").config.seed == 2
        assert isinstance(pool.entry("1").config, MiLoRAConfig)
