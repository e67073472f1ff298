"""Pack an adapter: its tensors, one expert at a time, into blobs as the layout says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from milora.adapter_validation import checksum_problem, expert_key, router_key, value_problems
from milora.blocks import spec_of
from milora.config import MiLoRAConfig
from milora.experts import get_kind
from milora.packing import expert_runs, padded_rows
from milora.pool.layout import ROUTER_PARTS, Layout, Layouts


@torch.no_grad()
def pack(
    layouts: Layouts,
    layout: Layout,
    config: MiLoRAConfig,
    read: Callable[[str], Tensor],
    checksums: dict[str, str] | None,
    own: Tensor | None,
    factors: Tensor | None,
) -> tuple[str | None, list[str]]:
    """Fill blobs with an adapter whose tensors have the right forms; all of it is read and checked.

    Args:
        read: gives a tensor by its key in a file.
        checksums: what the frozen factors of each module must come out as; None: not known.
        own, factors: [num_bytes] uint8 of these runs of the layout, zeros, on the CPU; None: not
            wanted.
    Returns: the digest of the factors, which adapters with the very same bytes have in common
        (None where the layout has none), and what is wrong with the values; if anything is, the
        blobs are worthless.
    """
    kind = get_kind(config.expert)
    problems: list[str] = []
    common: dict[tuple[str, str], str] = {}

    def checked(key: str) -> Tensor:
        tensor = read(key)
        problems.extend(value_problems([(key, tensor)]))
        return tensor.float()  # the master copy of `milora.load`, so that both round the same

    digest = hashlib.sha256(str(layout.factors.sizes).encode())

    def write(run: int, data: Tensor | None) -> None:
        if data is None:
            return
        # numpy copies in this thread alone; torch would wake others, for bytes that fit into a
        # cache.
        source = data.cpu().numpy()
        is_factor, start = layout.place(run)
        if is_factor:
            digest.update(len(source).to_bytes(8, "little"))
            digest.update(source)
        blob = factors if is_factor else own
        if blob is not None:
            blob.numpy()[start : start + len(source)] = source

    for place in layout.experts:
        block, linear = layout.blocks[place.block].path, layouts.linears[place.block][place.path]
        spec = spec_of(config, block, place.path, (linear.d_in, linear.d_out))
        keys = {name: expert_key(block, place.path, name) for name in kind.tensors(spec)}
        for name, tag in kind.shared(spec).items():  # the first expert that shares it has it
            keys[name] = common.setdefault((name, tag), keys[name])
        tensors = {name: checked(key) for name, key in keys.items()}
        frozen = kind.frozen(spec)
        if checksums is not None:
            whole = f"{block}.{place.path}"
            made = kind.checksum(spec, frozen)
            problems += checksum_problem(whole, made, checksums.get(whole))
        # Products are made where attached adapters make theirs.
        if kind.has_products and not kind.has_fixed_factors(spec):
            tensors, frozen = (
                {name: tensor.to(linear.device) for name, tensor in group.items()}
                for group in (tensors, frozen)
            )
        weights = kind.served(tensors, frozen, spec, linear.dense_weight)
        bias = getattr(linear.base_layer, "bias", None)
        dtype = layouts.dtypes[place.block][place.column]
        for run, data in zip(place.runs, expert_runs(weights, bias, dtype), strict=True):
            write(run, data)
    for place in layout.routers:
        block = layout.blocks[place.block].path
        for run, part in zip(place.runs, ROUTER_PARTS, strict=True):
            if run >= 0:
                write(run, padded_rows(checked(router_key(block, part))))
    return digest.hexdigest() if layout.factors.sizes else None, problems
