"""MiLoRA in PEFT 0.20 and 0.21: `peft.get_peft_model(model, milora.MiLoRAConfig(...))` and on.

PEFT keeps its life cycle (get_peft_model, save_pretrained, add_adapter, set_adapter, Trainer), and
milora does the work: the tuner calls `milora.attach` and switches adapters in the model's
`Runtime`. Modules are re-classed in place, so that PEFT finds its `BaseTunerLayer`s.

A MiLoRAConfig given to PEFT registers the method by itself. To read a saved folder with
`PeftModel.from_pretrained` in a fresh process, `import milora.integrations.peft` first.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from milora._version import __version__
from milora.adapter_files import PEFT_TYPE, WEIGHTS_FILE, read_config, sha256_of, write_config
from milora.adapter_validation import (
    BARE_TENSORS,
    DTYPES,
    form_problems,
    key_of,
    raise_all,
    value_problems,
)
from milora.adapters import adapter_config, adapter_parameters, read_folder
from milora.attach import attach, delete_adapter, detach
from milora.config import FORMAT_VERSION, MiLoRAConfig
from milora.experts import get_kind
from milora.nn import MiLoRALinear
from milora.runtime import ROUTER_NAME, Runtime, runtime_of

# PEFT 0.19 saves the tensors of all adapters into each adapter's file.
if tuple(int(part) for part in peft.__version__.split(".")[:2]) not in ((0, 20), (0, 21)):
    raise ImportError(f"milora.integrations.peft needs peft 0.20 or 0.21, found {peft.__version__}")


@dataclass
class PeftMiLoRAConfig(MiLoRAConfig, PeftConfig):
    """`MiLoRAConfig` with PEFT's own fields (task_type, inference_mode, ...).

    `experts`, `checksums` and `sha256` describe the adapter of a file and are filled in by the
    tuner.
    """

    format_version: int = FORMAT_VERSION
    milora_version: str = __version__
    experts: dict[str, list[str]] | None = None
    checksums: dict[str, str] | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        MiLoRAConfig.__post_init__(self)
        self.peft_type = PeftType[PEFT_TYPE]
        # The local folder it was read from, whose weights are checked before a model is touched.
        self.folder: Path | None = None

    def plain(self) -> MiLoRAConfig:
        return MiLoRAConfig(**MiLoRAConfig.to_dict(self))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` with the sum of the weights that PEFT has just written.

        PEFT replaces the weights first. A crash in between leaves the old config beside new
        weights; its sum gives that away to both libraries' loading.
        """
        data = self.to_dict()
        if (auto_mapping := kwargs.get("auto_mapping_dict")) is not None:
            data["auto_mapping"] = auto_mapping
        weights = Path(save_directory) / WEIGHTS_FILE
        data["sha256"] = sha256_of(weights) if weights.is_file() else None
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_config(save_directory, data)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftMiLoRAConfig:
        """Read a config as PEFT does, and check one in a local folder first.

        Raises:
            milora.AdapterError: it is damaged, or of a version this release cannot read.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            read_config(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.folder = folder if folder.is_dir() else None
        return config


def become_peft_config(config: MiLoRAConfig) -> PeftMiLoRAConfig:
    """Turn `config`, the very object, into a `PeftMiLoRAConfig`."""
    fresh = PeftMiLoRAConfig(**MiLoRAConfig.to_dict(config))
    for name, value in vars(fresh).items():
        config.__dict__.setdefault(name, value)
    config.__class__ = PeftMiLoRAConfig
    return config


class PeftMiLoRALinear(MiLoRALinear, BaseTunerLayer):
    """A `MiLoRALinear` as PEFT sees it: its tensors by adapter, and which adapter is active."""

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        names = [get_kind(self.kinds[name]).tensors(spec) for name, spec in self.specs.items()]
        return tuple(dict.fromkeys(key for keys in names for key in keys))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        trainable = (*self.adapter_layer_names, "base_layer")
        return tuple(key for key in self._modules if key not in trainable)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # PEFT before 0.21 puts the adapter's name behind a bare key and knows no ".weight" there.
        for name in self.specs:
            for tensor in BARE_TENSORS:
                if (value := state_dict.pop(f"{prefix}{tensor}.{name}", None)) is not None:
                    state_dict[f"{prefix}{tensor}.{name}.weight"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def modules_of(self, adapter_name: str) -> list[nn.Module]:
        containers = [self._modules[key] for key in self.adapter_layer_names]
        return [container[adapter_name] for container in containers if adapter_name in container]

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        """`PeftMiLoRAModel._cast_adapter_dtype` does it, without rounding to the base's dtype."""


class PeftRouters(nn.ModuleDict, BaseTunerLayer):
    """A block's routers by adapter, as PEFT sees them."""

    adapter_layer_names = ("routers",)

    @property
    def routers(self) -> PeftRouters:
        return self

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        """As for the linear modules; a router has no base layer."""


class PeftMiLoRAModel(BaseTuner):
    """The tuner: what PEFT calls on a model with MiLoRA adapters, on top of `milora.attach`."""

    prefix = "milora_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # before 0.21 PEFT goes past the model's hooks here

    # ---- adding and removing ------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach the adapter; its parameters are float32 whatever `autocast_adapter_dtype` says.

        Raises:
            milora.AdapterError: its files do not fit the model; nothing was touched.
            ValueError: as `milora.attach`.
        """
        config = self.peft_config[adapter_name]
        if get_kind(config.expert).shares_tensors:
            raise ValueError(
                f"milora: experts of kind {config.expert} share tensors between modules, which "
                "PEFT's files cannot hold; use milora.attach, milora.save and milora.load"
            )
        if config.folder is not None:
            read_folder(model, config.folder)
            config.folder = None
        runtime = runtime_of(model, required=False)
        before = None if runtime is None else runtime.active
        is_active = adapter_name in self.active_adapters
        with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
            trainable = is_active and not config.inference_mode
            attach(model, config.plain(), adapter_name, trainable=trainable)
        runtime = runtime_of(model)
        runtime.active = adapter_name if is_active else before
        for linear in (linear for linears in runtime.linears for linear in linears):
            linear.__class__ = PeftMiLoRALinear
        for block in runtime.blocks:
            if hasattr(block.module, ROUTER_NAME):
                getattr(block.module, ROUTER_NAME).__class__ = PeftRouters
        for layer in self._layers():
            layer._active_adapter = self.active_adapters
        description = adapter_config(model, adapter_name)
        config.experts, config.checksums = description["experts"], description["checksums"]
        self.targeted_module_names = [
            f"{block.path}.{path}" for block in runtime.blocks for path in block.experts
        ]

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the last one leaves the bare model."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        delete_adapter(self.model, adapter_name)
        if adapter_name in self.active_adapters:
            remaining = next(iter(self.peft_config), None)
            self.active_adapter = []
            if remaining is not None:
                self.set_adapter(remaining)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("milora: adapters are put on a model by inject_adapter")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Bring an adapter to float32 and to its block's device; PEFT calls this when it has put
        tensors in. What is still on the meta device waits for its tensors."""
        runtime = self._runtime()
        routers = runtime.routers_of(adapter_name)
        for linears, router in zip(runtime.linears, routers, strict=True):
            modules = [m for linear in linears for m in linear.modules_of(adapter_name)]
            for module in modules + [router] * (router is not None):
                if not any(parameter.is_meta for parameter in module.parameters()):
                    module.to(linears[0].device, torch.float32)

    # ---- switching ----------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one, and alone trainable (unless `inference_mode`).

        Raises:
            ValueError: more than one is named.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(
                f"set_adapter: one MiLoRA adapter can be active at a time, got {names}; rows of a "
                "batch get their own with generate(..., adapter_names=[...])"
            )
        is_disabled = any(layer.disable_adapters for layer in self._layers())
        for layer in self._layers():
            layer.set_adapter(names, inference_mode=inference_mode)
        self._freeze_coefficients()
        self.active_adapter = adapter_name
        if not is_disabled:
            self._runtime().active = names[0] if names else None

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        for layer in self._layers():
            layer.set_requires_grad(adapter_names, requires_grad)
        self._freeze_coefficients()

    def disable_adapter_layers(self) -> None:
        """The bare model, until `enable_adapter_layers`. No parameter's requires_grad changes."""
        self._set_enabled(False)

    def enable_adapter_layers(self) -> None:
        self._set_enabled(True)

    def _set_enabled(self, enabled: bool) -> None:
        for layer in self._layers():
            layer._disable_adapters = not enabled
        runtime = self._runtime()
        runtime.disabled = not enabled
        runtime.active = next(iter(self.active_adapters), None) if enabled else None

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a forward or `generate` of the PeftModel, which drops `adapter_names` itself."""
        local = self._runtime().local
        before, local.adapter_names = local.adapter_names, kwargs.get("adapter_names")
        try:
            yield
        finally:
            local.adapter_names = before

    # ---- merging ------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "a MiLoRA adapter cannot be merged: which experts are on depends on the prompt. "
            "milora.export_route writes the route of one prompt as an ordinary LoRA, which can"
        )

    def unmerge_adapter(self) -> None:
        self._check_merge_allowed()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any):
        if merge:
            self._check_merge_allowed()
        detach(self.model)
        del self.model.peft_config
        return self.model

    # ---- state dicts: PEFT takes the adapter's name out of keys and puts it in -----------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key_of(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors that are about to be loaded, then name them as the model does."""
        state_dict = {key_of(key): tensor for key, tensor in state_dict.items()}
        parameters = adapter_parameters(model, adapter_name)
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        dtypes = {dtype: name for name, dtype in DTYPES.items()}
        forms = {
            key: (tuple(tensor.shape), dtypes.get(tensor.dtype, str(tensor.dtype)))
            for key, tensor in state_dict.items()
        }
        problems = [*form_problems(shapes, forms).values()]
        raise_all(adapter_name, problems + value_problems(state_dict.items()))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # ---- small things -------------------------------------------------------------------------

    def _runtime(self) -> Runtime:
        return runtime_of(self.model)

    def _layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def _freeze_coefficients(self) -> None:
        """The rational coefficients train in `milora.activation_phase` alone."""
        runtime = self._runtime()
        for name in runtime.configs if not runtime.train_theta else ():
            for router in runtime.routers_of(name):
                if router is not None and router.theta is not None:
                    router.theta.requires_grad_(False)


def _register() -> None:
    """Add MILORA to PEFT's methods. PEFT takes only names that its enum has."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(), config_cls=PeftMiLoRAConfig, model_cls=PeftMiLoRAModel
        )
        # Before 0.21 PEFT finds an adapter's tensors by this: what all of ours have in their keys.
        PEFT_TYPE_TO_PREFIX_MAPPING[PeftType[PEFT_TYPE]] = "lora_"


_register()
