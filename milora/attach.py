"""Put MiLoRA adapters on a model, and take them off again; what a user calls."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from milora.balance import BalanceWindow
from milora.blocks import find_blocks, linear_shape
from milora.checkpointing import CheckpointedBlock
from milora.config import MiLoRAConfig
from milora.experts import ExpertSpec, get_kind, make_spec
from milora.generation import GenerateMethods, Replaced
from milora.nn import MiLoRALinear, Weight
from milora.opening import check_layout
from milora.routing import RoutingState
from milora.runtime import ROUTER_NAME, BlockHook, Runtime, Stats, add_router

RUNTIME = "_milora_runtime"
ExpertValues = Callable[[str, str], dict[str, Tensor]]


def attach(
    model: nn.Module,
    config: MiLoRAConfig,
    adapter_name: str = "default",
    *,
    trainable: bool = True,
) -> nn.Module:
    """Put a new adapter on `model`, in place, and make it the active one.

    Every targeted linear module becomes a `MiLoRALinear` around itself; every block gets a router
    as a child module. The model keeps its class, and `generate`, Trainer, gradient checkpointing,
    `torch.compile`, DDP and FSDP work as before. All parameters of the base are frozen; the
    adapter's are float32. A second call adds another adapter.

    Args:
        model: any Hugging Face model, or any module with lists of Transformer blocks.
        config: see `MiLoRAConfig`.
        adapter_name: a name without dots.
        trainable: whether the adapter's parameters require gradients.
    Returns: `model`.
    Raises:
        ValueError: the name is taken or unusable, no blocks were found, a target matches none, or
            the parameters are sharded already.
        ImportError: this version of transformers is not supported; the message names the range.
    """
    return attach_values(model, config, adapter_name, trainable, None)


def attach_values(
    model: nn.Module,
    config: MiLoRAConfig,
    adapter_name: str,
    trainable: bool,
    values: ExpertValues | None,
) -> nn.Module:
    """`attach` with the experts' tensors at hand: `values` gives those of a block's path and a
    path in it. Some kinds take minutes to draw initial ones from a large base."""
    existing = runtime_of(model, required=False)
    _check_name(adapter_name, existing)
    _check_model(model, existing)
    blocks = find_blocks(model, config)
    runtime = existing or _install(model, blocks)
    try:
        _add_adapter(runtime, adapter_name, config, blocks, trainable, values)
    except BaseException:
        _drop_adapter(runtime, adapter_name)
        if existing is None:
            _uninstall(runtime)
        raise
    runtime.active = adapter_name
    if trainable and hasattr(model, "save_pretrained"):
        from milora.integrations.transformers import teach_trainer

        teach_trainer()
    if trainable and any(getattr(b.module, "gradient_checkpointing", False) for b in blocks):
        model.enable_input_require_grads()  # as transformers does for PEFT models
    return model


def open_runtime(model: nn.Module, target_modules: str | list[str] = "all-linear") -> Runtime:
    """Make `model` ready for the adapters of a pool: its targeted linear modules can take experts.

    Raises:
        ValueError, ImportError: as `attach`; or the model has a pool already.
    """
    existing = runtime_of(model, required=False)
    if existing is not None and existing.pool is not None:
        raise ValueError("AdapterPool: this model has a pool already; close it first")
    _check_model(model, existing)
    blocks = find_blocks(model, MiLoRAConfig(target_modules=target_modules))
    runtime = existing or _install(model, blocks)
    for index, found in enumerate(blocks):
        for path in found.experts:
            _linear_at(runtime, index, path)
    return runtime


def close_runtime(runtime: Runtime) -> None:
    """Let go of a pool that is closing: with nothing attached the model is bare again."""
    runtime.pool = None
    if not runtime.configs:
        _uninstall(runtime)
    elif runtime.active is not None and not runtime.knows(runtime.active):
        runtime.active = None


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off: the bare model again, bit for bit, its modules the very same objects.

    A pool on the model is closed.

    Raises:
        ValueError: nothing is attached.
    """
    runtime = runtime_of(model)
    for name in list(runtime.configs):
        _drop_adapter(runtime, name)
    if runtime.pool is not None:
        runtime.pool.close()  # which closes the runtime
    else:
        _uninstall(runtime)
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter; with the last one the model is detached.

    Raises:
        ValueError: no adapter has this name.
    """
    runtime = runtime_of(model)
    _check_known(runtime, adapter_name)
    _drop_adapter(runtime, adapter_name)
    if not runtime.configs and runtime.pool is None:
        _uninstall(runtime)
    elif runtime.configs and runtime.active == adapter_name:
        runtime.active = next(iter(runtime.configs))


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Choose the adapter of forwards that name none; None switches to the bare model."""
    runtime = runtime_of(model)
    if adapter_name is not None and not runtime.knows(adapter_name):
        _check_known(runtime, adapter_name)
    runtime.active = adapter_name


def adapters(model: nn.Module) -> dict[str, MiLoRAConfig]:
    """The adapters on `model` by name; empty where nothing is attached."""
    runtime = runtime_of(model, required=False)
    return dict(runtime.configs) if runtime else {}


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


# ---- how forwards are routed ------------------------------------------------------------------


@contextlib.contextmanager
def _local(model: nn.Module, **values: Any) -> Iterator[Runtime]:
    runtime = runtime_of(model)
    previous = {name: getattr(runtime.local, name) for name in values}
    for name, value in values.items():
        setattr(runtime.local, name, value)
    try:
        yield runtime
    finally:
        for name, value in previous.items():
            setattr(runtime.local, name, value)


@contextlib.contextmanager
def prompt_lengths(model: nn.Module, lengths: int | list[int] | Tensor) -> Iterator[None]:
    """Say how many tokens of each row are the prompt, for forwards that give no labels.

    Args:
        lengths: one integer, or one per row (per segment of a packed row): attended tokens from
            the row's first one. Serves likelihood scoring, DPO, GRPO.
    """
    with _local(model, prompt_lengths=lengths):
        yield


@contextlib.contextmanager
def pin_route(model: nn.Module, state: RoutingState) -> Iterator[None]:
    """Use `state` for every forward inside, whatever the prompts say.

    A state of one prompt serves every row; otherwise the rows of each forward must be a multiple
    of its prompts.
    """
    runtime = runtime_of(model)
    device = next(model.parameters()).device
    state = state.to(device)
    state.adapters = tuple(
        runtime.active if name is not None and not runtime.knows(name) else name
        for name in state.adapters
    )
    check_layout(runtime, state)
    with _local(model, pinned=state):
        yield


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare model inside: no router, no expert."""
    with _local(model, disabled=True):
        yield


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingState]]:
    """Collect the route of each routed forward inside: one state per prefill."""
    runtime = runtime_of(model)
    states: list[RoutingState] = []
    runtime.recorders.append(states)
    try:
        yield states
    finally:
        runtime.recorders = [kept for kept in runtime.recorders if kept is not states]


@contextlib.contextmanager
def activation_phase(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Train the rational coefficients Θ inside, and nothing else.   [MiLoRA, appendix A]

    Outside of it Θ asks for no gradient: an optimizer made of what does will not hold it, and DDP
    will not wait for it. Inside of it nothing else does.
    Yields: the coefficients.
    """
    runtime = runtime_of(model)
    theta = activation_parameters(model)
    before = [(p, p.requires_grad) for p in runtime.model.parameters()]
    runtime.model.requires_grad_(False)
    for parameter in theta:
        parameter.requires_grad_(True)
    runtime.train_theta = True
    try:
        yield theta
    finally:
        runtime.train_theta = False
        for parameter, asked in before:
            parameter.requires_grad_(asked)


# ---- statistics -------------------------------------------------------------------------------


def stats(model: nn.Module) -> Stats:
    """A copy of the counters; see `Stats`."""
    counted = runtime_of(model).stats
    return Stats(counted.routed_prompts, counted.router_launches)


def reset_stats(model: nn.Module) -> None:
    runtime_of(model).stats = Stats()


def balance_report(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """The last load-balance loss and each expert's share f_i over the window, per block."""
    runtime = runtime_of(model)
    name = adapter_name or runtime.active
    window = runtime.windows.get(name)
    shares = window.shares() if window else []
    loss = None if window is None or window.last_loss is None else window.last_loss.item()
    per_block = {}
    for block, share in enumerate(shares):
        experts = [runtime.blocks[block].experts[c] for c in runtime.columns[name][block]]
        per_block[block] = dict(zip(experts, share, strict=True))
    return {"balance_loss": loss, "share": per_block}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of one adapter.

    `activated` is the worst case for one prompt: the router and the `top_k` largest experts of
    each block; `activated_mean` the mean over experts.
    """

    trainable: int
    experts: int
    router: int
    pooler: int
    activation: int
    activated: int
    activated_mean: float


def count_parameters(model: nn.Module, adapter_name: str = "default") -> ParameterCount:
    """Count an adapter's parameters; works on the meta device. Fixed tensors are none."""
    runtime = runtime_of(model)
    _check_known(runtime, adapter_name)
    experts = router = pooler = activation = activated = 0
    activated_mean = 0.0
    counted: set[int] = set()
    for block, linears in enumerate(runtime.linears):
        groups = [
            linear.trained(adapter_name) for linear in linears if adapter_name in linear.specs
        ]
        sizes = sorted(sum(t.numel() for t in group.values()) for group in groups)
        for tensor in (tensor for group in groups for tensor in group.values()):
            experts += 0 if id(tensor) in counted else tensor.numel()  # some kinds share tensors
            counted.add(id(tensor))
        top_k = len(sizes)
        module = runtime.routers_of(adapter_name)[block]
        if module is not None:
            router += module.w_r.numel()
            pooler += 0 if module.w_sa is None else module.w_sa.numel()
            activation += 0 if module.theta is None else module.theta.numel()
            top_k = min(runtime.configs[adapter_name].top_k, len(sizes))
        activated += sum(sizes[len(sizes) - top_k :])
        activated_mean += top_k * sum(sizes) / max(len(sizes), 1)
    if get_kind(runtime.configs[adapter_name].expert).shares_tensors:
        activated, activated_mean = experts, float(experts)
    routing = router + pooler + activation
    return ParameterCount(
        experts + routing, experts, router, pooler, activation, activated + routing,
        activated_mean + routing,
    )  # fmt: skip


def activation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Θ: the rational coefficients of all routers of the active adapter."""
    runtime = runtime_of(model)
    name = runtime.active
    if name is None or not runtime.configs[name].router or not runtime.configs[name].bilevel:
        return []
    thetas = [router.theta for router in runtime.routers_of(name) if router is not None]
    return [theta for theta in thetas if theta is not None]


# ---- installing -------------------------------------------------------------------------------


def _check_name(name: str, runtime: Runtime | None) -> None:
    if not name or "." in name or name in ("__base__", "base_layer"):
        raise ValueError(f"attach: adapter_name must be non-empty without dots, got {name!r}")
    if runtime is not None and runtime.knows(name):
        raise ValueError(f"attach: there is an adapter {name!r} already")


def _check_model(model: nn.Module, runtime: Runtime | None) -> None:
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            "attach: the model's parameters are sharded already. Attach first and call fully_shard "
            "after it; tensor-parallel bases are not supported"
        )
    if runtime is None and hasattr(model, "save_pretrained"):
        from milora.integrations.transformers import check_version

        check_version()


def _check_known(runtime: Runtime, name: str) -> None:
    if name not in runtime.configs:
        raise ValueError(f"milora: no adapter {name!r}; there are {sorted(runtime.configs)}")


def _install(model: nn.Module, blocks: list) -> Runtime:
    runtime = Runtime(model, blocks)
    owners = {id(model): model}
    for block in blocks:
        owner = model.get_submodule(block.path.rpartition(".")[0].rpartition(".")[0])
        owners[id(owner)] = owner
    for owner in owners.values():
        runtime.handles += [
            owner.register_forward_pre_hook(runtime.begin, with_kwargs=True),
            owner.register_forward_hook(runtime.finish, with_kwargs=True, always_call=True),
        ]
    for index, block in enumerate(blocks):
        hook = BlockHook(runtime, index)
        runtime.handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
    runtime.base_requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    methods = GenerateMethods(runtime)
    if runtime.is_causal:
        bodies = {
            "generate": methods.generate,
            "prepare_inputs_for_generation": methods.prepare_inputs,
        }
        for name, body in bodies.items():
            _replace(runtime, name, Replaced(model, name, body))
    if hasattr(model, "save_pretrained"):
        from milora.integrations.transformers import install

        for name, value in install(runtime).items():
            _replace(runtime, name, value)
    model.__dict__[RUNTIME] = runtime
    return runtime


def _replace(runtime: Runtime, name: str, value: Any) -> None:
    """Set an instance attribute of the model, to be restored on detach."""
    model = runtime.model
    runtime.replaced[name] = (name in model.__dict__, model.__dict__.get(name))
    model.__dict__[name] = value


def _uninstall(runtime: Runtime) -> None:
    model = runtime.model
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        for linear in linears:
            path = next(p for p, m in block.module.named_modules() if m is linear)
            _set_submodule(block.module, path, linear.base_layer)
        if hasattr(block.module, ROUTER_NAME):
            delattr(block.module, ROUTER_NAME)
    CheckpointedBlock.remove(runtime)
    for handle in runtime.handles:
        handle.remove()
    for name, (existed, value) in runtime.replaced.items():
        if existed:
            model.__dict__[name] = value
        else:
            del model.__dict__[name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(runtime.base_requires_grad.get(name, parameter.requires_grad))
    del model.__dict__[RUNTIME]


def _set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _add_adapter(
    runtime: Runtime,
    name: str,
    config: MiLoRAConfig,
    blocks: list,
    trainable: bool,
    values: ExpertValues | None,
) -> None:
    activations = config.activation
    if isinstance(activations, list) and len(activations) != len(blocks):
        raise ValueError(
            f"attach: activation must be one name or {len(blocks)} names, one per block, got "
            f"{len(activations)}"
        )
    runtime.configs[name] = config
    runtime.columns[name] = []
    if config.router:
        runtime.windows[name] = BalanceWindow(config.balance_window)
    common: dict[tuple[str, str], Weight] = {}
    for index, found in enumerate(blocks):
        linears = {path: _linear_at(runtime, index, path) for path in found.experts}
        columns = [linears[path].column for path in found.experts]
        runtime.columns[name].append(columns)
        for path, linear in linears.items():
            spec = spec_of(config, found.path, path, (linear.d_in, linear.d_out))
            tensors = None if values is None else values(found.path, path)
            linear.add_adapter(name, config.expert, spec, tensors, trainable, common)
        if config.router and linears:
            seed = hashlib.sha256(f"{config.seed}/{index}/{ROUTER_NAME}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
            first = next(iter(linears.values()))
            width = hidden_size(runtime.model, first)
            router = add_router(runtime, name, index, width, first.device, generator)
            router.requires_grad_(trainable)
            if router.theta is not None:
                router.theta.requires_grad_(False)  # until `activation_phase`


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


def hidden_size(model: nn.Module, first: nn.Module) -> int:
    """Width of a block's input: the config's, else what the block's first linear module reads."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else linear_shape(first)[0]


def _linear_at(runtime: Runtime, index: int, path: str) -> MiLoRALinear:
    """The `MiLoRALinear` at `path` in a block; swapped in on first use."""
    block = runtime.blocks[index]
    module = block.module.get_submodule(path)
    if isinstance(module, MiLoRALinear):
        return module
    if path not in block.experts:
        if runtime.pool is not None:
            raise ValueError(
                f"attach: {block.path}.{path} is none of the modules that the model's adapter pool "
                "serves; make the pool with target_modules that include it"
            )
        blocks = list(runtime.blocks)
        block = blocks[index] = type(block)(
            block.path, block.module, (*block.experts, path), block.source
        )
        runtime.blocks = blocks
    column = block.experts.index(path)
    linear = MiLoRALinear(module, linear_shape(module), index, column, runtime.local)
    linear.train(module.training)
    _set_submodule(block.module, path, linear)
    runtime.linears[index].append(linear)
    runtime.forget_siblings()
    return linear


def _drop_adapter(runtime: Runtime, name: str) -> None:
    for index, linears in enumerate(runtime.linears):
        for linear in linears:
            if name in linear.specs:
                linear.remove_adapter(name)
        routers = getattr(runtime.blocks[index].module, ROUTER_NAME, {})
        if name in routers:
            del routers[name]
    runtime.configs.pop(name, None)
    runtime.columns.pop(name, None)
    runtime.windows.pop(name, None)
    runtime.packs.clear()
    if runtime.active == name:
        runtime.active = None
