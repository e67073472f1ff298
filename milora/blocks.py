"""Find a model's Transformer blocks and the linear modules in them, by structure.

No table of model families: blocks are the elements of the outermost `nn.ModuleList`s whose
elements share a class and hold linear modules. (Hybrid models alternate attention and state-space
blocks of two classes; transformers derives both from one.) What a family does differently is data
that the model itself carries (`get_decoder`, `is_encoder_decoder`, an `experts` submodule).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from milora.config import MiLoRAConfig
from milora.experts import ExpertSpec, get_kind, make_spec
from milora.patterns import matches


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
    not by the shape of their (packed) weight; those of GPTQ, AWQ or HQQ are no `nn.Linear`.
    GPT-2's Conv1D stores its weight as [d_in, d_out].
    """
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return linear_shape(module.base_layer)  # a module that already carries experts
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return tuple(module.weight.shape)
    if not isinstance(module, nn.Linear) and "Linear" not in type(module).__name__:
        return None
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return shape if all(isinstance(size, int) for size in shape) else None


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
            "(an nn.ModuleList whose elements share a class)"
        )
    _check_targets(config, stacks)

    encoder_length = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and len(stacks) == 2:
        stacks.sort(key=lambda stack: "decoder" in stack[0].split("."))
        encoder_length = len(stacks[0][1])
    blocks: list[Block] = []
    taken: set[int] = set()  # a linear that several blocks share (Zamba2) belongs to the first
    for stack_index, (stack_path, modules) in enumerate(stacks):
        for position, module in enumerate(modules):
            path = f"{stack_path}.{position}"
            own = [p for p in _linear_paths(module) if id(module.get_submodule(p)) not in taken]
            taken.update(id(module.get_submodule(p)) for p in own)
            experts = tuple(p for p in own if config.targets(path, p))
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
        if _share_a_class(module) and any(_linear_paths(child) for child in module):
            found.append((path, list(module)))
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = _inside_decoder(model, found)
    return found


def _share_a_class(modules: nn.ModuleList) -> bool:
    common = set.intersection(*(set(type(module).__mro__) for module in modules))
    return bool(common - set(nn.Module.__mro__))


def _inside_decoder(
    model: nn.Module, found: list[tuple[str, list[nn.Module]]]
) -> list[tuple[str, list[nn.Module]]]:
    """Of several towers (a vision encoder beside a language model) keep the language model's."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not any(isinstance(m, nn.ModuleList) for m in decoder.modules()):
        return found  # ModernBERT's `decoder` is the head's last linear
    inside = {id(module) for module in decoder.modules()}
    return [entry for entry in found if id(entry[1][0]) in inside]


def _linear_paths(block: nn.Module) -> list[str]:
    """Paths of the linear modules inside `block`, in module order.

    Left out: linears under a mixture-of-experts module (it gathers tokens, so a row of its input
    is no longer a row of the batch) and inside `nn.MultiheadAttention` (it reads the weight and
    never calls the module). A block that is itself a linear module has none.
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
        if path and linear_shape(module) and not any(path.startswith(p) for p in skipped)
    ]


def _gathers_tokens(module: nn.Module) -> bool:
    """Whether `module` is a mixture of experts: it has `experts`, or a child of such a class."""
    if isinstance(getattr(module, "experts", None), nn.Module):
        return True
    return any(type(child).__name__.endswith("Experts") for child in module.children())


def _check_targets(config: MiLoRAConfig, stacks: list[tuple[str, list[nn.Module]]]) -> None:
    """Refuse a pattern without effect: a rank or alpha must be one of a module that is targeted."""
    linears = [
        (f"{stack}.{position}", path)
        for stack, blocks in stacks
        for position, block in enumerate(blocks)
        for path in _linear_paths(block)
    ]
    targeted = [(block, path) for block, path in linears if config.targets(block, path)]
    patterns = [] if config.target_modules == "all-linear" else config.target_modules
    _check_patterns(patterns, linears, "linear module inside the blocks")
    patterns = [*config.rank_pattern, *config.alpha_pattern]
    _check_patterns(patterns, targeted, "targeted linear module")


def _check_patterns(patterns: list[str], modules: list[tuple[str, str]], what: str) -> None:
    for pattern in patterns:
        if not any(matches(pattern, block, path) for block, path in modules):
            paths = {path for _, path in modules}
            names = sorted(paths | {path.rsplit(".", 1)[-1] for path in paths})
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"attach: no {what} matches {pattern!r}{hint} "
                f"(there are: {', '.join(sorted(paths))})"
            )


def spec_of(config: MiLoRAConfig, block: str, path: str, shape: tuple[int, int]) -> ExpertSpec:
    """The spec of the expert on the module at `path` inside the block at path `block`.

    Raises:
        ValueError: a module of this shape cannot have an expert of this kind.
    """
    spec = make_spec(
        *shape,
        config.rank_of(block, path),
        config.alpha_of(block, path),
        rslora=config.rslora,
        dropout=config.dropout,
        options=config.expert_options,
        seed=config.seed,
        path=path,
        block=block,
    )
    try:
        get_kind(config.expert).check(spec)
    except ValueError as error:
        raise ValueError(f"{block}.{path}: {error}") from None
    return spec


def hidden_size(model: nn.Module, block: nn.Module) -> int:
    """Width of a block's input: the config's, else what the block's first linear module reads,
    targeted or not."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    return linear_shape(block.get_submodule(_linear_paths(block)[0]))[0]
