"""The route of a batch of prompts: what a block keeps from prefill to the last new token.

A `RoutingState` belongs to one request and lives with its KV cache. A `Call` belongs to one
forward of the model: it says which token follows which prompt's route.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from milora import ops

if TYPE_CHECKING:
    from milora.packs import Packs
    from milora.pooled import PooledWeights
    from milora.siblings import SiblingWatch
    from milora.updates import Update

STATE_FORMAT = "milora_routing_state"
STATE_VERSION = 1
DECODE_TOKENS = 16  # of a row, speculative ones included: what one tile of a decode kernel takes


class RoutingState:
    """The routes of `num_prompts` prompts through all blocks.

    Args:
        names: per block, the experts' paths inside the block; the order of the gates' columns.
        blocks: path of each block in the model.
        adapters: name of the adapter of each prompt (None: the bare model).
        row_of: [rows] int64, the prompt that each row of the batch follows. Beams and
            `num_return_sequences` have several rows of one prompt.
        prompt_lengths: [num_prompts] int64, attended tokens of each prompt.
    """

    def __init__(
        self,
        names: tuple[tuple[str, ...], ...],
        blocks: tuple[str, ...],
        adapters: tuple[str | None, ...],
        row_of: Tensor,
        prompt_lengths: Tensor | None = None,
    ):
        self.names = names
        self.blocks = blocks
        self.adapters = adapters
        self.row_of = row_of
        self.prompt_lengths = prompt_lengths
        self.block_gates: list[Tensor | None] = [None] * len(names)
        self.block_probabilities: list[Tensor | None] = [None] * len(names)
        self.block_pooled: list[Tensor | None] = [None] * len(names)
        self.block_active: list[tuple[bool, ...] | None] = [None] * len(names)
        self._adapters: tuple[tuple[str, ...], Tensor] | None = None
        self._slots: tuple[tuple[int, ...], Tensor] | None = None
        self._maps: dict[int, Tensor] = {}
        self.updates: dict[nn.Module, Update] = {}  # of decode steps, by the first module of each

    # ---- reading ------------------------------------------------------------------------------

    @property
    def num_prompts(self) -> int:
        return len(self.adapters)

    @property
    def num_rows(self) -> int:
        return self.row_of.shape[0]

    @property
    def gates(self) -> Tensor:
        """[num_layers, num_prompts, N_max] float32; blocks with fewer experts end in zeros."""
        return self._padded(self.block_gates)

    @property
    def probabilities(self) -> Tensor:
        """[num_layers, num_prompts, N_max] float32, the softmax before the top-k."""
        return self._padded(self.block_probabilities)

    @property
    def margins(self) -> Tensor:
        """[num_layers, num_prompts]: probability of the last kept minus the first dropped expert.

        Near zero means a near-tie: another batch shape or dtype may decide it the other way.
        Infinity where nothing was dropped.
        """
        kept = self.gates > 0
        p = self.probabilities
        widths = torch.tensor([len(names) for names in self.names], device=p.device)
        real = torch.arange(p.shape[-1], device=p.device) < widths[:, None, None]
        last_kept = p.masked_fill(~kept, torch.inf).amin(-1)
        first_dropped = p.masked_fill(kept | ~real, -torch.inf).amax(-1)
        return last_kept - first_dropped

    def active_names(self, layer: int, row: int = 0) -> tuple[str, ...]:
        """Paths of the experts that prompt `row` switches on in block `layer`.

        Raises: IndexError for a layer or row that is not there.
        """
        _check_index("active_names: layer", layer, len(self.names))
        _check_index("active_names: row", row, self.num_prompts)
        gates = self._filled(self.block_gates)[layer][row].tolist()
        return tuple(name for name, gate in zip(self.names[layer], gates, strict=True) if gate > 0)

    def same_route(self, other: RoutingState, *, tolerance: float = 0.0) -> bool:
        """Whether both choose the same experts, with gates that differ by at most `tolerance`."""
        if self.names != other.names or self.num_prompts != other.num_prompts:
            return False
        mine, theirs = self.gates, other.gates.to(self.gates.device)
        return bool(((mine > 0) == (theirs > 0)).all() and (mine - theirs).abs().max() <= tolerance)

    def select(self, row: int) -> RoutingState:
        """The route of prompt `row` alone."""
        _check_index("select: row", row, self.num_prompts)
        row %= self.num_prompts
        state = RoutingState(
            self.names,
            self.blocks,
            (self.adapters[row],),
            self.row_of.new_zeros(1),
            None if self.prompt_lengths is None else self.prompt_lengths[row : row + 1],
        )
        for mine, theirs in zip(state._tensor_lists(), self._tensor_lists(), strict=True):
            mine[:] = [None if t is None else t[row : row + 1] for t in theirs]
        for block, gates in enumerate(state.block_gates):
            if gates is not None:
                state.note_active(block)
        return state

    def note_active(self, block: int) -> None:
        """Remember which experts of a block any prompt switches on, where asking is free.

        On a GPU the answer would cost a wait for the device; there the kernels find out.
        """
        gates = self.block_gates[block]
        if gates.device.type == "cpu" and not torch.compiler.is_compiling():
            self.block_active[block] = tuple((gates.detach() != 0).any(0).tolist())

    @property
    def complete(self) -> bool:
        return all(gates is not None for gates in self.block_gates)

    def adapter_table(self) -> tuple[tuple[str, ...], Tensor]:
        """The distinct adapters, and [num_prompts] int32 indices into them (-1: bare model)."""
        if self._adapters is None:
            distinct = tuple(dict.fromkeys(name for name in self.adapters if name is not None))
            index = [-1 if name is None else distinct.index(name) for name in self.adapters]
            self._adapters = (
                distinct,
                torch.tensor(index, dtype=torch.int32, device=self.row_of.device),
            )
        return self._adapters

    def slot_table(self, slots: tuple[int, ...]) -> Tensor:
        """[num_prompts] int32: the slot of each prompt's adapter (-1: bare model).

        Args:
            slots: of the distinct adapters, in the order of `adapter_table`.
        """
        if self._slots is None or self._slots[0] != slots:
            place = dict(zip(self.adapter_table()[0], slots, strict=True))
            index = [-1 if name is None else place[name] for name in self.adapters]
            device = self.row_of.device
            self._slots = slots, torch.tensor(index, dtype=torch.int32, device=device)
        return self._slots[1]

    # ---- following the cache ------------------------------------------------------------------

    def repeat_rows(self, repeats: int) -> RoutingState:
        return self.with_rows(self.row_of.repeat_interleave(repeats))

    def select_rows(self, indices: Tensor) -> RoutingState:
        return self.with_rows(self.row_of[indices.to(self.row_of.device)])

    def with_rows(self, row_of: Tensor) -> RoutingState:
        """The same routes for another batch of rows; tensors of the routes are shared."""
        state = RoutingState(self.names, self.blocks, self.adapters, row_of, self.prompt_lengths)
        for mine, theirs in zip(state._tensor_lists(), self._tensor_lists(), strict=True):
            mine[:] = theirs
        state.block_active = self.block_active
        return state

    def detached(self) -> RoutingState:
        """A copy without autograd history, for keeping."""
        state = self.with_rows(self.row_of)
        for tensors in state._tensor_lists():
            tensors[:] = [None if t is None else t.detach() for t in tensors]
        return state

    def to(self, device: torch.device) -> RoutingState:
        state = self.with_rows(self.row_of.to(device))
        for tensors in state._tensor_lists():
            tensors[:] = [None if t is None else t.to(device) for t in tensors]
        return state

    def __deepcopy__(self, memo: dict) -> RoutingState:
        state = self.detached()
        state.row_of = state.row_of.clone()
        for tensors in state._tensor_lists():
            tensors[:] = [None if t is None else t.clone() for t in tensors]
        return state

    def route_map(self, num_tokens: int) -> Tensor:
        """[num_tokens] int32: the prompt that each token of equally long rows follows."""
        if num_tokens not in self._maps:
            per_row, rest = divmod(num_tokens, self.num_rows)
            if rest:
                raise RuntimeError(
                    f"milora: a linear module got {num_tokens} tokens, which is no multiple of the "
                    f"batch's {self.num_rows} rows"
                )
            if len(self._maps) >= 4:  # prefill, decode, encoder: bounded for speculative lengths
                self._maps.clear()
            self._maps[num_tokens] = self.row_of.repeat_interleave(per_row).to(torch.int32)
        return self._maps[num_tokens]

    # ---- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the state as safetensors, with its name table in the header.

        Raises: FileNotFoundError: the folder does not exist.
        """
        header = {
            "format": STATE_FORMAT,
            "version": STATE_VERSION,
            "names": self.names,
            "blocks": self.blocks,
            "adapters": self.adapters,
        }
        tensors = {
            "gates": self.gates.contiguous(),
            "probabilities": self.probabilities.contiguous(),
            "row_of": self.row_of,
        }
        if self.prompt_lengths is not None:
            tensors["prompt_lengths"] = self.prompt_lengths
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"RoutingState.save: no folder {folder}")
        temporary = f"{os.fspath(path)}.tmp"
        save_file(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            temporary,
            metadata={"milora": json.dumps(header)},
        )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RoutingState:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a routing state, another version, or tensors that do not fit it.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"RoutingState.load: no file {os.fspath(path)}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("milora", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"RoutingState.load: {path} is no routing state: {error}") from None
        if header.get("format") != STATE_FORMAT or header.get("version") != STATE_VERSION:
            raise ValueError(
                f"RoutingState.load: {path} must hold {STATE_FORMAT} version {STATE_VERSION}, got "
                f"{header.get('format')} version {header.get('version')}"
            )
        names = tuple(tuple(block) for block in header["names"])
        shape = (len(names), len(header["adapters"]), max(map(len, names), default=0))
        for name in ("gates", "probabilities"):
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.isfinite().all():
                raise ValueError(f"RoutingState.load: {name} must be finite with shape {shape}")
        row_of = tensors.get("row_of")
        if row_of is None or row_of.dim() != 1 or not ((row_of >= 0) & (row_of < shape[1])).all():
            raise ValueError(f"RoutingState.load: row_of must be [rows] in [0, {shape[1]})")
        state = cls(
            names,
            tuple(header["blocks"]),
            tuple(header["adapters"]),
            row_of,
            tensors.get("prompt_lengths"),
        )
        for block, columns in enumerate(map(len, names)):
            state.block_gates[block] = tensors["gates"][block, :, :columns].contiguous()
            state.block_probabilities[block] = tensors["probabilities"][block, :, :columns]
            state.note_active(block)
        return state

    def __repr__(self) -> str:
        return (
            f"RoutingState(layers={len(self.names)}, prompts={self.num_prompts}, "
            f"rows={self.num_rows}, adapters={sorted({a or '__base__' for a in self.adapters})})"
        )

    def _tensor_lists(self) -> tuple[list[Tensor | None], ...]:
        return self.block_gates, self.block_probabilities, self.block_pooled

    def _filled(self, tensors: list[Tensor | None]) -> list[Tensor]:
        if any(tensor is None for tensor in tensors):
            raise RuntimeError("RoutingState: this route is not complete; did its forward fail?")
        return tensors

    def _padded(self, tensors: list[Tensor | None]) -> Tensor:
        width = max(map(len, self.names), default=0)
        device = self.row_of.device  # the blocks may stand on several
        return torch.stack(
            [
                torch.nn.functional.pad(t.detach().float(), (0, width - t.shape[-1])).to(device)
                for t in self._filled(tensors)
            ]
        )


def _check_index(what: str, index: int, count: int) -> None:
    if not -count <= index < count:
        raise IndexError(f"RoutingState.{what} must be in [0, {count}), got {index}")


@dataclass
class Plan:
    """Which tokens are the prompts of a forward; nothing in here has autograd history.

    Attributes:
        spans: [num_prompts, 2] int32 over the flattened tokens that `take` leaves.
        take: indices of the attended prompt tokens where they are no runs (a mask with holes).
        segment_of: [num_tokens] int32, for packed rows: the prompt that each token follows.
        num_tokens: tokens of the forward, to catch a block that sees another number.
    """

    spans: Tensor
    num_tokens: int
    take: Tensor | None = None
    segment_of: Tensor | None = None


class Call:
    """One forward of the model: the state to fill or to reuse, and where the prompts are.

    Without a `plan` the state must already hold the gates. The counts join the model's `Stats` when
    the forward has succeeded.
    """

    def __init__(self, state: RoutingState, plan: Plan | None = None):
        self.state = state
        self.adapters, self.adapter_of = state.adapter_table()
        self.plan = plan
        self.fresh = plan is not None  # a prefill or a training forward, not a decode step
        self.depth = 1
        self.routed_prompts = 0
        self.router_launches = 0
        self.cache: object | None = None  # where the state goes when the forward has succeeded
        self.labels: Tensor | None = None
        self.num_items: Tensor | int | None = None
        # Inference: where the weights are (`Packs` or `PooledWeights`), outputs that a sibling has
        # computed along with its own (x, its version, y), and who watches for siblings.
        self.weights: Packs | PooledWeights | None = None
        self.pooled = False
        self.ready: dict[nn.Module, tuple[Tensor, int | None, Tensor]] = {}
        self.watch: SiblingWatch | None = None
        self.called: set[nn.Module] | None = None  # linear modules, where nobody knows them yet
        # Training: what experts drew for this forward (`ExpertKind.drawn`), by block, column and
        # adapter.
        self.drawn: dict[tuple[int, int, str], dict[str, Any]] = {}
        self._slot_of: Tensor | None = None

    @property
    def slot_of(self) -> Tensor:
        """[num_prompts] int32: the slot of each prompt's adapter in `weights`; -1: bare model."""
        if self._slot_of is None:
            self._slot_of = self.state.slot_table(self.weights.slots(self.adapters))
        return self._slot_of

    def route_of(self, num_tokens: int) -> Tensor:
        if self.plan is not None and self.plan.segment_of is not None:
            if num_tokens != self.plan.num_tokens:
                raise RuntimeError(
                    f"milora: a linear module got {num_tokens} tokens of a packed batch of "
                    f"{self.plan.num_tokens}"
                )
            return self.plan.segment_of
        return self.state.route_map(num_tokens)

    def path_of(self, num_tokens: int) -> int:
        """The kernel's path for this many tokens: decode up to `DECODE_TOKENS` of each row.

        It follows the shape of the batch and nothing that fills it: a row's bits must not depend on
        the rows beside it.
        """
        is_decode = num_tokens <= DECODE_TOKENS * self.state.num_rows
        return ops.DECODE if is_decode else ops.PREFILL

    def for_replay(self) -> Call:
        """What a checkpointed block needs to run again, without this forward's autograd graph."""
        state = self.state
        empty = RoutingState(
            state.names, state.blocks, state.adapters, state.row_of, state.prompt_lengths
        )
        empty._maps, empty._adapters = state._maps, state._adapters
        replay = Call(empty, self.plan)
        replay.drawn = self.drawn
        replay.called = self.called
        return replay


def spans_of(
    prompt: Tensor, rows: Tensor, num_columns: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Token ranges of the prompts of padded rows.

    Args:
        prompt: [num_prompts, columns] bool, the prompt tokens of each row that is routed.
        rows: [num_prompts] int64, where in the batch these rows stand (beams repeat a row).
        num_columns: columns of the batch; `prompt` may have fewer.
    Returns: spans [num_prompts, 2] int32 over the batch's flattened tokens; None, or, where a
        prompt has holes, the indices that pack the prompts' tokens (spans are then over the packed
        tokens); prompt lengths [num_prompts] int64.
    """
    lengths = prompt.sum(1)
    first = prompt.int().argmax(1)
    last = prompt.shape[1] - 1 - prompt.flip(1).int().argmax(1)
    if bool(((last - first + 1 == lengths) | (lengths == 0)).all()):
        start = first + rows * num_columns
        return torch.stack([start, start + lengths], 1).to(torch.int32), None, lengths
    row, column = prompt.nonzero(as_tuple=True)
    ends = lengths.cumsum(0)
    spans = torch.stack([ends - lengths, ends], 1).to(torch.int32)
    return spans, rows[row] * num_columns + column, lengths
