"""Merging saved adapters: read the updates of several folders, write one ordinary LoRA folder."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milora.adapter_files import open_weights, read_config, write_folder
from milora.adapter_validation import (
    DTYPES,
    PREFIX,
    expert_key,
    open_folder,
    raise_all,
    tensor_forms,
    tensor_keys,
    value_problems,
)
from milora.blocks import linear_shape, spec_of
from milora.config import MAX_RANK, MiLoRAConfig
from milora.errors import AdapterError
from milora.experts import RankGated, get_kind
from milora.merge.low_rank import LowRank, distance, weighted_stack
from milora.merge.methods import METHODS


@dataclass(frozen=True)
class MergeReport:
    """What a merge made.

    Attributes:
        ranks: by the path of each module.
        error: ‖merged - weighted sum‖ / ‖weighted sum‖ over all modules, Frobenius; 0 for an exact
            method, up to rounding to float32.
    """

    ranks: dict[str, int]
    error: float


@dataclass(frozen=True)
class Source:
    """An open adapter: the paths of its modules, and their updates on demand."""

    config: dict[str, Any]
    paths: list[str]
    update: Callable[[str], LowRank]


@torch.no_grad()
def merge(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    method: str = "stack",
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> MergeReport:
    """Merge the adapters in `folders` and write the result to `output` as a PEFT LoRA.

    The scale of each adapter counts and is folded into the result, so that alpha = rank there.
    Ranks and modules may differ between adapters where the method allows it; a module that an
    adapter leaves out counts as an update of 0.

    Args:
        folders: MiLoRA adapters without a router, or PEFT LoRA folders.
        method: see `milora.merge.METHODS`: stack, sum, svd, ffa, fair, lego.
        weights: one number an adapter; None: 1 / K each (lego: 1 each).
        rank: of the result, for svd and lego; None: the largest rank of the adapters.
        model: the base, needed for expert kinds other than lora; may be on the meta device.
        options: of the method: fair has `regularization`, `solver` and `steps`.
    Raises:
        FileNotFoundError: a folder holds no adapter.
        milora.AdapterError: an adapter is damaged, has a router, or is no low-rank update.
        ValueError: an argument is wrong, or the method cannot merge these adapters.
    """
    chosen, weights = _checked(folders, method, weights, rank, options)
    with contextlib.ExitStack() as open_files:
        sources = [open_files.enter_context(_open(Path(f), model)) for f in folders]
        paths = sorted({path for source in sources for path in source.paths})
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        squares = [0.0, 0.0]
        for path in paths:
            merged, total = _merge_module(path, sources, chosen, weights, rank, options)
            ranks[path] = merged.rank
            tensors[f"{PREFIX}{path}.lora_A.weight"] = merged.a.float().contiguous()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = merged.b.float().contiguous()
            for i, norm in enumerate((distance(merged, total), total.norm())):
                squares[i] += norm**2
        config = _lora_config([source.config for source in sources], ranks)
    raise_all("the merged adapter", value_problems(tensors.items()))  # weights of 1e300, say
    write_folder(output, tensors, config)
    error = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
    return MergeReport(ranks, error)


def _checked(folders, method, weights, rank, options) -> tuple[Any, list[float]]:
    if isinstance(folders, str | os.PathLike) or len(folders) < 1:
        raise ValueError(f"merge: folders must be a list of one or more folders, got {folders!r}")
    if method not in METHODS:
        raise ValueError(f"merge: method must be one of {', '.join(METHODS)}, got {method!r}")
    chosen = METHODS[method]
    weights = chosen.weights(len(folders)) if weights is None else [float(w) for w in weights]
    if len(weights) != len(folders) or not all(math.isfinite(w) for w in weights):
        raise ValueError(
            f"merge: weights must be {len(folders)} finite numbers, one per folder, got {weights}"
        )
    if rank is not None:
        if not chosen.takes_rank:
            takes = [name for name, other in METHODS.items() if other.takes_rank]
            raise ValueError(f"merge: rank is for {' and '.join(takes)}; {method} has its own")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"merge: rank must be an integer in [1, {MAX_RANK}], got {rank!r}")
    if unknown := sorted(set(options) - set(chosen.options)):
        known = ", ".join(chosen.options) or "none"
        raise ValueError(f"merge: {method} has no options {unknown}; known: {known}")
    return chosen, weights


def _merge_module(path, sources, chosen, weights, rank, options) -> tuple[LowRank, LowRank]:
    """The merged update of a module, and the exact weighted sum that it stands for."""
    found = [(s.update(path), w) for s, w in zip(sources, weights, strict=True) if path in s.paths]
    if len({(u.a.shape[1], u.b.shape[0]) for u, _ in found}) > 1:
        raise ValueError(f"merge: {path} has other sizes in one adapter than in another")
    if len(found) < len(sources) and not chosen.takes_partial:
        raise ValueError(f"merge: {path} is not in all adapters; use stack, sum, svd or lego")
    updates, weights = [u for u, _ in found], [w for _, w in found]
    try:
        merged = chosen.apply(updates, weights, rank, **options)
    except ValueError as error:
        raise ValueError(f"merge: {path}: {error}") from None
    if merged.rank > MAX_RANK:
        raise ValueError(
            f"merge: {path} would have rank {merged.rank}, more than the {MAX_RANK} that can be "
            "served; use svd with a rank"
        )
    return merged, weighted_stack(updates, weights)


# ---- reading ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(folder: Path, model: nn.Module | None) -> Iterator[Source]:
    data = read_config(folder)
    if data.get("router"):
        raise AdapterError(
            f"{folder}: has a router, so its update depends on the prompt; export a route first "
            "(milora export), or train with router=False"
        )
    if data["peft_type"] != "LORA" and data.get("expert") != "lora":
        with _open_on_model(folder, data, model) as source:
            yield source
        return
    with open_weights(folder, data.get("sha256")) as file:
        names, forms = tensor_forms(file)
        scales = _scales(folder, data, {key: shape for key, (shape, _) in forms.items()})
        raise_all(folder, _pair_problems(forms, list(scales)))

        def update(path: str) -> LowRank:
            keys = [f"{PREFIX}{path}.lora_{side}.weight" for side in "AB"]
            pair = {key: file.get_tensor(names[key]) for key in keys}
            raise_all(folder, value_problems(pair.items()))
            a, b = (tensor.double() for tensor in pair.values())
            return LowRank(a, scales[path] * b)

        yield Source(data, list(scales), update)


@contextlib.contextmanager
def _open_on_model(folder: Path, data: dict[str, Any], model: nn.Module | None) -> Iterator[Source]:
    """An adapter whose file does not hold A and B as they are: its kind makes them."""
    if model is None:
        raise ValueError(
            f"merge: {folder} has experts of kind {data.get('expert')!r}, whose (A, B) follow from "
            "the base model's shapes; give the model"
        )
    with open_folder(model, folder) as file:
        kind = get_kind(file.config.expert)
        if kind.has_output or isinstance(kind, RankGated):
            raise AdapterError(f"{folder}: {kind.name} experts are no low-rank update")
        places = {f"{b.path}.{path}": (b, path) for b in file.blocks for path in b.experts}
        all_keys = tensor_keys(file.config, file.blocks)

        def update(path: str) -> LowRank:
            block, inner = places[path]
            shape = linear_shape(block.module.get_submodule(inner))
            spec = spec_of(file.config, block.path, inner, shape)
            keys = all_keys[path]
            tensors = {name: file.read(key) for name, key in keys.items()}
            raise_all(folder, value_problems((keys[n], t) for n, t in tensors.items()))
            frozen = kind.frozen(spec)
            if (made := kind.checksum(spec, frozen)) != file.checksums.get(path):
                raise AdapterError(
                    f"{folder}: {path}: its frozen factors came out with checksum {made}, the "
                    f"file says {file.checksums.get(path)}"
                )
            wide = [{n: t.double() for n, t in group.items()} for group in (tensors, frozen)]
            weights = kind.materialise(*wide, spec)
            return LowRank(weights.a, weights.scale * weights.b)

        yield Source(data, list(places), update)


def _scales(folder: Path, data: dict[str, Any], shapes: dict[str, tuple]) -> dict[str, float]:
    """The factor on B A of each module, by its path."""
    if data["peft_type"] == "LORA":
        from milora.integrations.peft_lora import scales_of_lora

        return scales_of_lora(data, shapes, folder)
    known = MiLoRAConfig.__dataclass_fields__
    try:
        config = MiLoRAConfig(**{key: value for key, value in data.items() if key in known})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{folder}: its config cannot be used: {error}") from None
    scales = {}
    for block, inner_paths in data["experts"].items():
        for inner in inner_paths:
            rank = config.rank_of(block, inner)
            if (found := shapes.get(expert_key(block, inner, "lora_A"), (rank,))[:1]) != (rank,):
                raise AdapterError(f"{folder}: {inner}: rank must be {rank}, got {list(found)}")
            divisor = math.sqrt(rank) if config.rslora else rank
            scales[f"{block}.{inner}"] = config.alpha_of(block, inner) / divisor
    return scales


def _pair_problems(forms: dict[str, tuple[tuple[int, ...], str]], paths: list[str]) -> list[str]:
    """What is wrong with a LoRA's tensors: each path has an A and a B of one rank, no more."""
    problems = [f"{key}: dtype must be one of {', '.join(DTYPES)}, got {dtype}"
                for key, (_, dtype) in forms.items() if dtype not in DTYPES]  # fmt: skip
    expected = set()
    for path in paths:
        key_a, key_b = (f"{PREFIX}{path}.lora_{side}.weight" for side in "AB")
        expected |= {key_a, key_b}
        a, b = (forms.get(key, ((), ""))[0] for key in (key_a, key_b))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            problems.append(f"{path}: needs lora_A [rank, d_in] and lora_B [d_out, rank], got "
                            f"{list(a)} and {list(b)}")  # fmt: skip
    problems += [f"unknown tensor {key}" for key in forms.keys() - expected]
    return problems


# ---- writing ------------------------------------------------------------------------------------


def _lora_config(configs: list[dict[str, Any]], ranks: dict[str, int]) -> dict[str, Any]:
    """PEFT's `adapter_config.json` of a LoRA with alpha = rank in every module."""
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: r for path, r in ranks.items() if r != rank}

    def common(key: str) -> Any:
        values = [config.get(key) for config in configs]
        return values[0] if all(value == values[0] for value in values) else None

    return {
        "peft_type": "LORA",
        "task_type": common("task_type"),
        "base_model_name_or_path": common("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "inference_mode": True,
    }
