"""What turns a model's forwards into routed forwards: hooks around the model and its blocks.

One `Runtime` serves one model with any number of adapters. It finds out, when a forward begins,
which tokens are prompts (or which cache already has a route), lets each block's router run in
front of the block, and hands the gates to the block's linear modules through a thread-local
`Call`. Nothing about a request is kept here: routes live with their KV cache.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from milora import prompts
from milora.balance import BalanceWindow, Collected, add_balance_loss
from milora.blocks import Block
from milora.checkpointing import CheckpointedBlock
from milora.config import MiLoRAConfig
from milora.nn import MiLoRALinear
from milora.route_cache import ROUTE, follow_cache, held_by
from milora.router import PromptRouter, route
from milora.routing import Call, RoutingState

ROUTER_NAME = "milora_router"


class Local(threading.local):
    """What belongs to the thread that runs a forward. Copies of a model start with a fresh one."""

    call: Call | None = None
    pinned: RoutingState | None = None
    prompt_lengths: Any = None
    generation: Any = None
    disabled: bool = False
    adapter_names: list | None = None  # of forwards and generate() calls that name none themselves
    collected: Collected | None = None

    def __deepcopy__(self, memo: dict) -> Local:
        return Local()

    def __reduce__(self):
        return Local, ()


@dataclass
class Stats:
    """`routed_prompts` = blocks × prompts; `router_launches` = blocks × prefills."""

    routed_prompts: int = 0
    router_launches: int = 0


class Runtime:
    """See the module's docstring. `blocks[i].experts` are the columns of block i's gates."""

    def __init__(self, model: nn.Module, blocks: list[Block]):
        self.model = model
        self.blocks = blocks
        self.linears: list[list[MiLoRALinear]] = [[] for _ in blocks]
        self.configs: dict[str, MiLoRAConfig] = {}
        self.columns: dict[str, list[list[int]]] = {}  # adapter -> per block, its experts' columns
        self.active: str | None = None
        self.local = Local()
        self.stats = Stats()
        self.windows: dict[str, BalanceWindow] = {}
        self.recorders: list[list[RoutingState]] = []
        self.train_theta = False
        self.handles: list[Any] = []
        self.replaced: dict[str, Any] = {}  # instance attributes of the model to restore
        self.base_requires_grad: dict[str, bool] = {}
        self.is_encoder_decoder = any(block.source is not None for block in blocks)
        self.is_causal = hasattr(model, "can_generate") and bool(model.can_generate())
        # Encoders and classifiers give no tokens back: all that they read is the prompt, and their
        # labels are classes. Of a model that is not from transformers nobody knows.
        self.whole = hasattr(model, "can_generate") and not self.is_causal

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(block.experts for block in self.blocks)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(block.path for block in self.blocks)

    def routers_of(self, name: str) -> list[PromptRouter | None]:
        """An adapter's router in each block; None where it has no router or no expert."""
        modules = (getattr(block.module, ROUTER_NAME, {}) for block in self.blocks)
        return [routers[name] if name in routers else None for routers in modules]  # noqa: SIM401

    # ---- the model's forward ------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Forward pre-hook of the model and of the modules that own its block lists."""
        call = self.local.call
        if call is not None and module is not self.model:
            call.depth += 1
            return None
        self.local.call = None
        names = kwargs.get("adapter_names", self.local.adapter_names)
        if "adapter_names" in kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key != "adapter_names"}
        if self.local.disabled or (
            self.active is None and names is None and not self._generating()
        ):
            return args, kwargs
        inputs = _bind(module, args, kwargs)
        if (collected := self.local.collected) is not None:
            if inputs.get("labels") is None:
                inputs["labels"] = collected.labels
            inputs["num_items_in_batch"] = collected.num_items
        is_compiling = torch.compiler.is_compiling()
        prepare = self._prepare_uncompiled if is_compiling else self._prepare
        self.local.call = prepare(module, inputs, names)
        return args, kwargs

    def finish(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook, also called when the forward raised (then `output` is None)."""
        call = self.local.call
        if call is None:
            return None
        call.depth -= 1
        if call.depth > 0:
            return None
        self.local.call = None
        if output is None or not call.fresh:
            return None
        close = self._close_uncompiled if torch.compiler.is_compiling() else self._close
        return close(call, module, output)

    def _prepare(self, module: nn.Module, inputs: dict[str, Any], names: list | None) -> Call:
        """What happens before the first block.

        Outside of compiled graphs, as `_close`: values of tensors would cut them in many places.
        """
        call = self._open(module, inputs, names)
        if self.model.training and torch.is_grad_enabled():
            CheckpointedBlock.install(self)
        elif call.fresh or not _is_continued(inputs.get("past_key_values")):
            for linear in itertools.chain(*self.linears):
                linear.drop_stale_packs()
        return call

    @torch.compiler.disable
    def _prepare_uncompiled(self, *args: Any) -> Call:
        call = self._prepare(*args)
        dtype = getattr(self.model, "dtype", None)
        if dtype is not None and not (self.model.training or torch.is_grad_enabled()):
            for linear in itertools.chain(*self.linears):
                linear.pack(call.adapters, dtype)  # no graph should have to build one
        return call

    def _close(self, call: Call, module: nn.Module, output: Any) -> Any:
        """Hand on the route of a forward that made one, and its load-balance loss."""
        state = call.state
        self.stats.routed_prompts += call.routed_prompts
        self.stats.router_launches += call.router_launches
        cache = call.cache if call.cache is not None else _get(output, "past_key_values")
        if cache is not None:
            follow_cache(cache, state.detached())
            cache.__dict__.pop(prompts.PENDING, None)
        if self.is_encoder_decoder and module is not self.model and hasattr(output, "keys"):
            setattr(output, ROUTE, state)
        if state.complete:
            for recorder in self.recorders:
                recorder.append(state.detached())
        if self.model.training and torch.is_grad_enabled():
            return add_balance_loss(self, call, output)
        return None

    _close_uncompiled = torch.compiler.disable(_close)

    def _generating(self) -> bool:
        return self.local.generation is not None and self.local.generation.adapters is not None

    # ---- finding the route of a forward ---------------------------------------------------------

    def _open(self, module: nn.Module, inputs: dict[str, Any], names: list | None) -> Call:
        if inputs.get("cache") is not None and inputs.get("past_key_values") is None:
            raise NotImplementedError(
                "milora: continuous batching packs several requests into one row of a paged cache, "
                "whose routes milora cannot tell apart; use generate() with a padded batch"
            )
        x = next(
            (inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None
        )
        if self.is_encoder_decoder:
            return self._open_encoder_decoder(module, inputs, x, names)
        if x is None:
            raise ValueError("milora: the forward got neither input_ids nor inputs_embeds")
        rows, num_columns = x.shape[:2]
        cache = inputs.get("past_key_values")
        generation = self.local.generation
        slot = None  # where a generate() without a cache keeps its route
        if generation is not None and cache is None:
            slot = generation.slot(inputs.get("input_ids"))

        state = self._known_state(cache, slot, rows, x.device)
        if state is not None:
            return Call(state)
        if not self.configs_with_router(names):
            return Call(self._ungated_state(rows, names, x.device))
        if cache is not None and (length := int(cache.get_seq_length())) > 0:
            raise ValueError(
                f"milora: past_key_values holds {length} tokens but no route. A prompt's route "
                "needs the whole prompt in one forward: chunked prefill and key-value caches made "
                "without this adapter cannot be continued. Prefill the whole prompt at once, or "
                "pin a route with milora.pin_route(model, state)"
            )
        source = prompts.Source(
            rows=rows,
            num_columns=num_columns,
            device=x.device,
            mask=prompts.attended(inputs.get("attention_mask"), rows, num_columns),
            labels=inputs.get("labels") if module is self.model and not self.whole else None,
            lengths=self.local.prompt_lengths,
            position_ids=inputs.get("position_ids"),
            cu_seq_lens=inputs.get("cu_seq_lens_q"),
            pending=self._pending(cache, slot),
            prefill=cache is not None or slot is not None or inputs.get("use_cache") is True,
            whole=self.whole,
        )
        call = self._route_anew(source, inputs, names)
        if slot is not None:
            slot.state = call.state
        return call

    def _known_state(
        self, cache: Any, slot: Any, rows: int, device: torch.device
    ) -> RoutingState | None:
        if self.local.pinned is not None:
            state = self.local.pinned
            if state.num_rows != rows:
                state = state.with_rows(prompts.rows_of(state.num_prompts, rows, device))
            self._check_layout(state)
            return state
        state = held_by(cache) if cache is not None else getattr(slot, "state", None)
        if state is None:
            return None
        if state.num_rows != rows:
            raise ValueError(
                f"milora: the route that lives with past_key_values has {state.num_rows} rows, the "
                f"forward has {rows}; select or repeat the cache's rows with its own methods"
            )
        self._check_layout(state)
        return state

    def _check_layout(self, state: RoutingState) -> None:
        missing = sorted({name for name in state.adapters if name} - set(self.configs))
        if missing:
            raise ValueError(f"milora: this route belongs to adapter {missing}, not on the model")
        if state.names != self.names:
            raise ValueError("milora: this route was made for other modules than the model has now")

    def _pending(self, cache: Any, slot: Any) -> Any:
        if cache is not None:
            return getattr(cache, prompts.PENDING, None)
        return getattr(slot, "pending", None)

    def configs_with_router(self, names: list | None) -> list[str]:
        used = self.adapters_of(1, names)
        return [name for name in used if name is not None and self.configs[name].router]

    def adapters_of(self, num_prompts: int, names: list | None) -> tuple[str | None, ...]:
        """The adapter of each prompt: as named for this call, else the active one."""
        if names is None and self.local.generation is not None:
            names = self.local.generation.adapters
        if names is None:
            return (self.active,) * num_prompts
        names = [None if name in (None, "__base__") else name for name in names]
        if unknown := sorted({n for n in names if n is not None and n not in self.configs}):
            raise ValueError(f"adapter_names: unknown {unknown}; there are {sorted(self.configs)}")
        if num_prompts != 1 and len(names) != num_prompts:
            raise ValueError(
                f"adapter_names must name one adapter per prompt ({num_prompts}), got {len(names)}"
            )
        return tuple(names)

    def _route_anew(
        self, source: prompts.Source, inputs: dict[str, Any], names: list | None
    ) -> Call:
        """A call whose blocks will route the prompts that `source` finds."""
        plan, row_of, lengths = source.resolve()
        adapters = self.adapters_of(plan.spans.shape[0], names)
        call = Call(RoutingState(self.names, self.paths, adapters, row_of, lengths), plan)
        call.cache = inputs.get("past_key_values")
        call.labels = inputs.get("labels")
        call.num_items = inputs.get("num_items_in_batch")
        return call

    def _ungated_state(self, rows: int, names: list | None, device: torch.device) -> RoutingState:
        """Adapters without a router: every expert on, nothing to find out."""
        adapters = self.adapters_of(rows if names else 1, names)
        if len(adapters) == 1:
            row_of = torch.zeros(rows, dtype=torch.int64, device=device)
        else:
            row_of = prompts.rows_of(len(adapters), rows, device)
        state = RoutingState(self.names, self.paths, adapters, row_of)
        for block in range(len(self.blocks)):
            state.block_gates[block] = self._ones(state, block)
            state.block_probabilities[block] = state.block_gates[block]
            state.note_active(block)
        return state

    def _ones(self, state: RoutingState, block: int) -> Tensor:
        gates = torch.zeros(state.num_prompts, len(self.blocks[block].experts))
        for row, name in enumerate(state.adapters):
            if name is not None and not self.configs[name].router:
                gates[row, self.columns[name][block]] = 1.0
        return gates.to(state.row_of.device)

    def _open_encoder_decoder(
        self, module: nn.Module, inputs: dict[str, Any], x: Tensor | None, names: list | None
    ) -> Call:
        encoded = inputs.get("encoder_outputs") if module is self.model else None
        if self.local.pinned is not None or encoded is not None:
            rows = _get(encoded, "last_hidden_state", 0).shape[0] if encoded is not None else len(x)
            device = self.model.device
            state = self._known_state(inputs.get("past_key_values"), None, rows, device)
            if state is None:
                state = getattr(encoded, ROUTE, None)
                if state is None and self.configs_with_router(names):
                    raise ValueError(
                        "milora: encoder_outputs carry no route; call the model's encoder while "
                        "the adapter is active and pass on its output object"
                    )
                if state is not None and state.num_rows != rows:
                    state = state.with_rows(prompts.rows_of(state.num_prompts, rows, device))
                if state is None:
                    state = self._ungated_state(rows, names, device)
            call = Call(state)
            call.fresh = not state.complete  # the decoder's blocks route on their first forward
            call.cache = inputs.get("past_key_values")
            return call
        if x is None:
            raise ValueError("milora: the encoder got neither input_ids nor inputs_embeds")
        if not self.configs_with_router(names):
            return Call(self._ungated_state(x.shape[0], names, x.device))
        source = prompts.Source(
            rows=x.shape[0],
            num_columns=x.shape[1],
            device=x.device,
            mask=prompts.attended(inputs.get("attention_mask"), *x.shape[:2]),
            whole=True,
        )
        return self._route_anew(source, inputs, names)

    # ---- a block's forward --------------------------------------------------------------------

    def enter_block(self, index: int, args: tuple, kwargs: dict) -> None:
        """Route in front of block `index`, unless the call's state already has its gates."""
        call = self.local.call
        if call is None:
            if self.active is None or self.local.disabled:
                return
            raise RuntimeError(
                f"milora: block {self.blocks[index].path} was called outside the forward of "
                f"{type(self.model).__name__}, so there is no prompt to route"
            )
        if call.state.block_gates[index] is None:
            self._route_block(call, index, args, kwargs)

    def _route_block(self, call: Call, index: int, args: tuple, kwargs: dict) -> None:
        state, block = call.state, self.blocks[index]
        if block.source is not None:
            h = state.block_pooled[block.source]
            if h is None:
                raise RuntimeError(
                    f"milora: {block.path} routes on the encoder, which has not run in this call"
                )
            starts = torch.arange(h.shape[0], dtype=torch.int32, device=h.device)
            spans = torch.stack([starts, starts + 1], 1)
        else:
            h, spans = self._prompt_hidden(call, index, args, kwargs)
        modules = getattr(block.module, ROUTER_NAME, {})
        routed = [name for name in call.adapters if name in modules]
        if not routed:
            state.block_gates[index] = state.block_probabilities[index] = self._ones(state, index)
            state.note_active(index)
            return
        router_of = _lookup([routed.index(n) if n in routed else -1 for n in call.adapters], call)
        probabilities, gates, pooled = route(
            [modules[name] for name in routed],
            h,
            spans,
            router_of.to(h.device),
            train_theta=self.train_theta,
        )
        if routed != list(call.adapters) or not self._is_full(routed, index):
            probabilities, gates = (
                self._scatter(state, index, routed, t) for t in (probabilities, gates)
            )
        state.block_probabilities[index] = probabilities
        state.block_gates[index] = gates
        if self.is_encoder_decoder:
            state.block_pooled[index] = pooled
        state.note_active(index)
        call.routed_prompts += sum(name in routed for name in state.adapters)
        call.router_launches += 1

    def _prompt_hidden(
        self, call: Call, index: int, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        plan = call.plan
        if plan is None:
            raise RuntimeError(
                f"milora: no route for block {self.blocks[index].path}; the prefill that should "
                "have made it did not finish"
            )
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                f"milora: block {self.blocks[index].path} must get its hidden states as the first "
                f"positional argument or as hidden_states, got keywords {sorted(kwargs)}"
            )
        h = hidden.reshape(-1, hidden.shape[-1])
        # XLNet's blocks see [T, B, d]: as many tokens, in another order.
        is_other_order = (
            plan.segment_of is None and hidden.dim() > 2 and hidden.shape[0] != call.state.num_rows
        )
        if h.shape[0] != plan.num_tokens or is_other_order:
            raise RuntimeError(
                f"milora: block {self.blocks[index].path} sees tokens {[*hidden.shape[:-1]]} where "
                f"the model was given {plan.num_tokens} in {call.state.num_rows} rows, so the "
                "prompt's place is unknown"
            )
        return (h if plan.take is None else h[plan.take]), plan.spans.to(h.device)

    def _is_full(self, routed: list[str], index: int) -> bool:
        everything = list(range(len(self.blocks[index].experts)))
        return all(self.columns[name][index] == everything for name in routed)

    def _scatter(
        self, state: RoutingState, index: int, routed: list[str], values: Tensor
    ) -> Tensor:
        """Move each row's values to the columns of its adapter; router-less adapters get ones."""
        width = len(self.blocks[index].experts)
        table = torch.full((len(state.adapters), values.shape[1]), width, dtype=torch.int64)
        for row, name in enumerate(state.adapters):
            if name in routed:
                columns = self.columns[name][index]
                table[row, : len(columns)] = torch.tensor(columns)
        full = values.new_zeros(len(state.adapters), width + 1)
        full = full.scatter(1, table.to(values.device), values)[:, :width]
        return full + self._ones(state, index).to(values.device)


def _lookup(table: list[int], call: Call) -> Tensor:
    """`table[adapter]` of each prompt; -1 for the bare model."""
    if table == list(range(len(call.adapters))):
        return call.adapter_of
    values = torch.tensor([*table, -1], dtype=torch.int32, device=call.adapter_of.device)
    return values[call.adapter_of.long()]


def _is_continued(cache: Any) -> bool:
    """Whether a transformers cache holds tokens, as far as its layers know without asking a GPU."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None) or ()
    return any(getattr(layer, "is_initialized", False) for layer in layers)


def _bind(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The forward's arguments by name."""
    inputs = dict(kwargs)
    if args:
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        inputs.update(zip(parameters, args, strict=False))
    return inputs


def _get(output: Any, name: str, position: int | None = None) -> Any:
    if isinstance(output, tuple):
        return output[position] if position is not None and len(output) > position else None
    return getattr(output, name, None)


class BlockHook:
    """Forward pre-hook of one block, as an object so that copies of the model copy it too."""

    def __init__(self, runtime: Runtime, index: int):
        self.runtime = runtime
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.runtime.enter_block(self.index, args, kwargs)


def add_router(
    runtime: Runtime,
    name: str,
    block: int,
    d: int,
    device: torch.device,
    generator: torch.Generator,
) -> PromptRouter:
    """Give block `block` the router of adapter `name`, as a child module of the block.

    A child of the block, so that FSDP gathers its parameters together with the block's own.
    """
    entry = runtime.blocks[block]
    if not hasattr(entry.module, ROUTER_NAME):
        entry.module.add_module(ROUTER_NAME, nn.ModuleDict())
    router = PromptRouter(
        d,
        len(runtime.columns[name][block]),
        runtime.configs[name],
        block,
        pooled_input=entry.source is not None,
        device=device,
        generator=generator,
    )
    getattr(entry.module, ROUTER_NAME)[name] = router
    return router
