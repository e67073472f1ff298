"""Find a model's Transformer blocks and the linear modules in them, by structure.

No table of model families: blocks are the elements of the outermost `nn.ModuleList`s whose
elements share one class and hold linear modules. What a family does differently is data that the
model itself carries (`get_decoder`, `is_encoder_decoder`, an `experts` submodule).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from milora.config import MiLoRAConfig, matches


@dataclass(frozen=True)
class Block:
    """One Transformer block.

    `source` is None for a block that routes on its own input. A decoder block of an
    encoder-decoder model routes on the pooled input of encoder block `source` (an index into the
    model's list of blocks).
    """

    path: str
    module: nn.Module
    experts: tuple[str, ...]
    source: int | None = None


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear module, or None when `module` is not one.

    Quantized linears keep `in_features` and `out_features`, so they are recognised by those and
    not by the shape of their (packed) weight. GPT-2's Conv1D stores its weight as [d_in, d_out].
    """
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return linear_shape(module.base_layer)  # a module that already carries experts
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return tuple(module.weight.shape)
    return None


def find_blocks(model: nn.Module, config: MiLoRAConfig) -> list[Block]:
    """The model's blocks in the order in which a forward visits them, with the targeted experts.

    Raises:
        ValueError: no block was found, or `target_modules` names a module that no block has (with
            the nearest names).
    """
    stacks = _block_lists(model)
    if not stacks:
        raise ValueError(
            f"attach: {type(model).__name__} has no list of Transformer blocks with linear modules "
            "(an nn.ModuleList whose elements share one class)"
        )
    _check_targets(config, stacks)

    encoder_length = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and len(stacks) == 2:
        stacks.sort(key=lambda stack: "decoder" in stack[0].split("."))
        encoder_length = len(stacks[0][1])
    blocks: list[Block] = []
    for stack_index, (stack_path, modules) in enumerate(stacks):
        for position, module in enumerate(modules):
            path = f"{stack_path}.{position}"
            experts = tuple(p for p in _linear_paths(module) if config.targets(path, p))
            source = None
            if encoder_length is not None and stack_index == 1:
                source = min(position * encoder_length // len(modules), encoder_length - 1)
            blocks.append(Block(path, module, experts, source))
    return blocks


def _block_lists(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    found: list[tuple[str, list[nn.Module]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(path.startswith(outer + ".") for outer, _ in found):
            continue
        if len({type(child) for child in module}) == 1 and all(_linear_paths(c) for c in module):
            found.append((path, list(module)))
    if len(found) > 1 and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = _inside_decoder(model, found)
    return found


def _inside_decoder(
    model: nn.Module, found: list[tuple[str, list[nn.Module]]]
) -> list[tuple[str, list[nn.Module]]]:
    """Of several towers (a vision encoder beside a language model) keep the language model's."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        return found
    inside = {id(module) for module in decoder.modules()}
    return [entry for entry in found if id(entry[1][0]) in inside]


def _linear_paths(block: nn.Module) -> list[str]:
    """Paths of the linear modules inside `block`, in module order.

    Left out: linears under a mixture-of-experts module (it gathers tokens, so a row of its input
    is no longer a row of the batch) and inside `nn.MultiheadAttention` (it reads the weight and
    never calls the module).
    """
    skipped = [
        path + "."
        for path, module in block.named_modules()
        if path and (_gathers_tokens(module) or isinstance(module, nn.MultiheadAttention))
    ]
    skipped += [p + "." for p, m in block.named_modules() if p and hasattr(m, "base_layer")]
    return [
        path
        for path, module in block.named_modules()
        if linear_shape(module) and not any(path.startswith(prefix) for prefix in skipped)
    ]


def _gathers_tokens(module: nn.Module) -> bool:
    return isinstance(getattr(module, "experts", None), nn.Module)


def _check_targets(config: MiLoRAConfig, stacks: list[tuple[str, list[nn.Module]]]) -> None:
    patterns = [] if config.target_modules == "all-linear" else list(config.target_modules)
    patterns += [*config.rank_pattern, *config.alpha_pattern]
    modules = [
        (f"{stack}.{position}", path)
        for stack, blocks in stacks
        for position, block in enumerate(blocks)
        for path in _linear_paths(block)
    ]
    for pattern in patterns:
        if not any(matches(pattern, block, path) for block, path in modules):
            paths = {path for _, path in modules}
            names = sorted(paths | {path.rsplit(".", 1)[-1] for path in paths})
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"attach: no linear module inside the blocks matches {pattern!r}{hint} "
                f"(there are: {', '.join(sorted(paths))})"
            )
