"""What turns a model's forwards into routed forwards: hooks around the model and its blocks.

One `Runtime` serves one model with any number of adapters. When a forward begins it opens a `Call`
(`milora.opening`): which tokens are prompts, or which cache already has a route. It lets each
block's router run in front of the block (`milora.block_routing`), and hands the gates to the
block's linear modules through the thread-local call. Nothing about a request is kept here: routes
live with their KV cache.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milora import prompts
from milora.balance import BalanceWindow, Collected, add_balance_loss
from milora.block_routing import route_block
from milora.blocks import Block
from milora.checkpointing import CheckpointedBlock
from milora.config import MiLoRAConfig
from milora.nn import MiLoRALinear
from milora.opening import open_call
from milora.packs import Packs
from milora.pooled import PooledWeights, PoolLease
from milora.route_cache import ROUTE, carried_route, follow_cache
from milora.router import ROUTER_NAME, PromptRouter
from milora.routing import Call, RoutingState
from milora.siblings import SiblingWatch, may_watch
from milora.uncalled import warn_of_uncalled

if TYPE_CHECKING:
    from milora.pool import AdapterPool


RUNTIME = "_milora_runtime"  # attribute of a model: its `Runtime`


class Local(threading.local):
    """What belongs to the thread that runs a forward. Copies of a model start with a fresh one."""

    def __init__(self) -> None:  # runs in every thread
        # No defaults in the class: torch.compile of torch 2.10 would read those instead.
        self.call: Call | None = None
        self.pinned: RoutingState | None = None
        self.prompt_lengths: Any = None
        self.generation: Any = None
        self.disabled = False
        self.adapter_names: list | None = None  # of calls that name none themselves
        self.collected: Collected | None = None
        self.recorders: tuple[list[RoutingState], ...] = ()

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
        self.pool: AdapterPool | None = None  # of registered adapters
        self.packs = Packs(self)  # of attached ones
        self.siblings_known = False
        self.calls_known = False  # whether a forward has shown which linear modules are called
        self.active: str | None = None
        self.disabled = False  # in every thread; `local.disabled` is one thread's
        self.local = Local()
        self.stats = Stats()
        self.windows: dict[str, BalanceWindow] = {}
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
        self.abandon()
        names = kwargs.get("adapter_names", self.local.adapter_names)
        if "adapter_names" in kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key != "adapter_names"}
        if self.is_disabled():
            return args, kwargs
        inputs = _bind(module, args, kwargs)
        if not self._generating() and self.is_bare(names, inputs):
            return args, kwargs
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
        self.abandon()
        if output is None:
            return None
        if call.watch is not None:
            call.watch.tell()
            self.siblings_known = True
        if call.called is not None and module is self.model:
            self.calls_known = True
            warn_of_uncalled(self, call.called)
        for linear in call.ready:  # nobody asked for it: no siblings of this kind of forward
            for other in self.linears[linear.block]:
                other.siblings = ()
        if not call.fresh:
            return None
        close = self._close_uncompiled if torch.compiler.is_compiling() else self._close
        return close(call, module, output)

    def abandon(self) -> None:
        """End this thread's call. torch runs no hooks after a KeyboardInterrupt: then a `generate`
        or the next forward does what `finish` could not."""
        call, self.local.call = self.local.call, None
        if call is not None and call.pooled:
            call.weights.release()

    def _prepare(self, module: nn.Module, inputs: dict[str, Any], names: list | None) -> Call:
        """What happens before the first block.

        Outside of compiled graphs, as `_close`: values of tensors would cut them in many places.
        """
        call = open_call(self, module, inputs, names)
        if self.model.training and torch.is_grad_enabled():
            CheckpointedBlock.install(self)
            self.forget_packs()  # the weights are about to change
        elif call.fresh or not _is_continued(inputs.get("past_key_values")):
            self.packs.drop_stale()
        generation = self.local.generation
        kept = None if generation is None else generation.lease
        is_kept = kept is not None and kept.covers(call.adapters)
        lease = kept if is_kept else self.lease(call.adapters)
        call.pooled = lease is not None
        call.weights = PooledWeights(self.pool, lease, not is_kept) if call.pooled else self.packs
        if not self.siblings_known and may_watch():
            call.watch = SiblingWatch()
        if not self.calls_known:
            call.called = set()
        return call

    @torch.compiler.disable
    def _prepare_uncompiled(self, *args: Any) -> Call:
        call = self._prepare(*args)
        call.watch = call.called = None
        dtype = getattr(self.model, "dtype", None)
        if dtype is not None and not (self.model.training or torch.is_grad_enabled()):
            _ = call.slot_of
            for index in range(len(self.blocks)):
                call.weights.block(index, dtype)  # no graph should have to build one
        return call

    def forget_packs(self) -> None:
        """Adapters have changed, or are about to: the next forward packs anew."""
        self.packs = Packs(self)

    def forget_siblings(self) -> None:
        """The next forward will show which modules share an input."""
        self.siblings_known = False
        for linears in self.linears:
            for linear in linears:
                linear.siblings = ()

    def _close(self, call: Call, module: nn.Module, output: Any) -> Any:
        """Hand on the route of a forward that made one, and its load-balance loss."""
        state = call.state
        self.stats.routed_prompts += call.routed_prompts
        self.stats.router_launches += call.router_launches
        cache = call.cache if call.cache is not None else _get(output, "past_key_values")
        if cache is not None:
            follow_cache(cache, state.detached())
            if hasattr(cache, prompts.PENDING):  # and no `__dict__.pop`: dynamo stops there
                delattr(cache, prompts.PENDING)
        if self.is_encoder_decoder and module is not self.model and hasattr(output, "keys"):
            setattr(output, ROUTE, state)
        if state.complete:
            for recorder in self.local.recorders:
                recorder.append(state.detached())
        if self.model.training and torch.is_grad_enabled():
            return add_balance_loss(self, call, output)
        return None

    _close_uncompiled = torch.compiler.disable(_close)

    def is_disabled(self) -> bool:
        return self.disabled or self.local.disabled

    def is_bare(self, names: list | None, inputs: dict[str, Any]) -> bool:
        """Whether a call has no adapter, active or named, and goes on with no route: none is
        pinned, or came with the cache or the encoder's outputs."""
        is_named = self.active is not None or names is not None
        return not is_named and self.local.pinned is None and carried_route(inputs) is None

    def _generating(self) -> bool:
        return self.local.generation is not None and self.local.generation.adapters is not None

    # ---- adapters, attached and pooled -----------------------------------------------------------

    def knows(self, name: str) -> bool:
        return name in self.configs or (self.pool is not None and name in self.pool)

    def config_of(self, name: str) -> MiLoRAConfig:
        return self.configs[name] if name in self.configs else self.pool.entry(name).config

    def columns_of(self, name: str) -> list[list[int]]:
        """Per block, the columns of an adapter's experts, in the order of its router's outputs."""
        return self.columns[name] if name in self.columns else self.pool.entry(name).columns

    def has_router(self, name: str, block: int) -> bool:
        """Whether an adapter routes in front of this block: it has a router, and experts there."""
        return self.config_of(name).router and bool(self.columns_of(name)[block])

    def adapters_of(self, num_prompts: int, names: list | None) -> tuple[str | None, ...]:
        """The adapter of each prompt: as named for this call, else the active one."""
        if names is None and self.local.generation is not None:
            names = self.local.generation.adapters
        if names is None:
            return (self.active,) * num_prompts
        if isinstance(names, str):
            raise ValueError(f"adapter_names must be a list, one name per prompt, got {names!r}")
        names = [None if name in (None, "__base__") else name for name in names]
        if unknown := sorted({n for n in names if n is not None and not self.knows(n)}):
            raise ValueError(f"adapter_names: unknown {unknown}; there are {self._known()}")
        if not names or (num_prompts != 1 and len(names) != num_prompts):
            raise ValueError(
                f"adapter_names must name one adapter per prompt ({num_prompts}), got {len(names)}"
            )
        return tuple(names)

    def _known(self) -> str:
        attached = str(sorted(self.configs))
        return attached if self.pool is None else f"{attached} and {len(self.pool)} in the pool"

    def lease_for(
        self, num_prompts: int | None, names: list | None, route: RoutingState | None
    ) -> PoolLease | None:
        """As `lease`, for the rows of a `generate` call, which may continue a route."""
        if self.pool is None or num_prompts is None or self.local.pinned is not None:
            return None  # each forward takes its own
        if route is not None:
            return self.lease(route.adapter_table()[0])
        rows = self.adapters_of(num_prompts, names)
        return self.lease(tuple(dict.fromkeys(name for name in rows if name is not None)))

    def lease(self, names: tuple[str, ...]) -> PoolLease | None:
        """What keeps these adapters in the pool while they are read; None for attached ones.

        Raises:
            ValueError: some are attached and some pooled.
            milora.PoolError: the pool cannot hold them together.
        """
        attached = [name for name in names if name in self.configs]
        if len(attached) == len(names):
            return None
        if attached:
            raise ValueError(
                f"adapter_names: {attached} are attached to the model and the others live in its "
                "pool; one batch reads one of them. Register the attached ones in the pool"
            )
        return PoolLease(self.pool, names)

    # ---- a block's forward --------------------------------------------------------------------

    def enter_block(self, index: int, args: tuple, kwargs: dict) -> None:
        """Route in front of block `index`, unless the call's state already has its gates."""
        call = self.local.call
        if call is None:
            if self.active is None or self.is_disabled():
                return
            raise RuntimeError(
                f"milora: block {self.blocks[index].path} was called outside the forward of "
                f"{type(self.model).__name__}, so there is no prompt to route"
            )
        if call.state.block_gates[index] is None:
            route_block(self, call, index, args, kwargs)


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


def runtime_of(model: nn.Module, *, required: bool = True) -> Runtime | None:
    """The model's `Runtime`; looks through DDP, torch.compile and PEFT wrappers.

    Raises:
        ValueError: nothing is attached and `required`.
    """
    for name in (None, "module", "_orig_mod", "base_model.model"):
        inner: Any = model
        for part in name.split(".") if name else ():
            inner = getattr(inner, part, None)
        if isinstance(inner, nn.Module) and RUNTIME in inner.__dict__:
            return inner.__dict__[RUNTIME]
    for module in model.modules():
        if RUNTIME in module.__dict__:
            return module.__dict__[RUNTIME]
    if required:
        raise ValueError(
            f"milora: no adapter is attached to this {type(model).__name__}; call milora.attach"
        )
    return None


def check_known(runtime: Runtime, name: str) -> None:
    if name not in runtime.configs:
        raise ValueError(f"milora: no adapter {name!r}; there are {sorted(runtime.configs)}")
