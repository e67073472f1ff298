"""Make stock transformers code treat an attached model as one with adapters.

On the model itself: `save_pretrained` writes the active adapter (so that Trainer's checkpoints hold
nothing else), and `_hf_peft_config_loaded` says that a quantized base carries trainable adapters.
In `Trainer`: loading a checkpoint, which has no hook for models other than PEFT's, learns of ours;
and trainers that make their loss of logits (TRL's, label smoothing, `compute_loss_func`) get the
load-balance loss that the model would otherwise have added to its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from milora.balance import Collected

if TYPE_CHECKING:
    from transformers import Trainer

    from milora.runtime import Runtime

SUPPORTED = (5, 17), (5, 23)
WINDOW_FILE = "milora_balance_window.json"


class SaveAdapter:
    """Stands in for the model's `save_pretrained`: writes the active adapter."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def __call__(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        from milora.adapters import save

        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained: push_to_hub is not supported on a model with milora's adapters; "
                "save the adapter and upload its folder with huggingface_hub.upload_folder"
            )
        runtime = self.runtime
        name = runtime.active or next(iter(runtime.configs))
        save(runtime.model, save_directory, name, is_main_process=is_main_process)
        if is_main_process and name in runtime.windows:
            target = Path(save_directory) / WINDOW_FILE
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps(runtime.windows[name].state_dict()))
            os.replace(temporary, target)


def check_version() -> None:
    """Refuse a transformers that was not tested: how blocks are called changes between releases.

    Raises:
        ImportError: its version is outside of `SUPPORTED`; the message names the range.
    """
    found = version("transformers")
    first, last = SUPPORTED
    if not first <= tuple(int(part) for part in found.split(".")[:2]) <= last:
        raise ImportError(
            f"milora works with transformers {first[0]}.{first[1]} to {last[0]}.{last[1]}, got "
            f"{found}; install one of these"
        )


def install(runtime: Runtime) -> dict[str, Any]:
    """The attributes that an attached transformers model gets."""
    return {"save_pretrained": SaveAdapter(runtime), "_hf_peft_config_loaded": True}


def load_checkpoint(model: Any, folder: str | os.PathLike) -> None:
    """Load a Trainer checkpoint into the active adapter of `model`."""
    from milora.adapters import load_weights
    from milora.runtime import runtime_of

    runtime = runtime_of(model)
    load_weights(model, folder, runtime.active)
    window = Path(folder) / WINDOW_FILE
    if window.is_file() and runtime.active in runtime.windows:
        device = next(runtime.model.parameters()).device
        runtime.windows[runtime.active].load_state_dict(json.loads(window.read_text()), device)


@functools.cache
def teach_trainer() -> None:
    """Let `Trainer` save and load checkpoints that hold an adapter, and see the load-balance loss.

    Its two loading methods know PEFT's models by class and take every other checkpoint for a whole
    model. For a model with a `Runtime` they load the adapter. Under FSDP its saving gathers the
    whole model, or writes its shards; for a model with a `Runtime` the adapter is all there is to
    save, and what FSDP cannot shard is refused before the training. Its two steps run inside
    `own_loss`. Trainers of other models do what they did.
    """
    try:
        import transformers.trainer as trainer_module
        from transformers.trainer import Trainer
    except ImportError:  # accelerate is not installed: there is no Trainer to teach
        return
    from milora.runtime import runtime_of

    load_from_checkpoint, load_best_model = Trainer._load_from_checkpoint, Trainer._load_best_model

    @functools.wraps(load_from_checkpoint)
    def load_from(self, resume_from_checkpoint, model=None):
        target = self.model if model is None else model
        if runtime_of(target, required=False) is None or _is_peft(self.model):
            return load_from_checkpoint(self, resume_from_checkpoint, model)
        return load_checkpoint(target, resume_from_checkpoint)

    @functools.wraps(load_best_model)
    def load_best(self):
        if runtime_of(self.model, required=False) is None or _is_peft(self.model):
            return load_best_model(self)
        return load_checkpoint(self.model, self.state.best_model_checkpoint)

    Trainer._load_from_checkpoint = load_from
    Trainer._load_best_model = load_best
    Trainer._prepare_for_training = _checking_fsdp(Trainer._prepare_for_training)
    Trainer.save_model = _collective(Trainer.save_model)
    if hasattr(trainer_module, "save_fsdp_model"):  # accelerate may be too old for FSDP
        trainer_module.save_fsdp_model = _not_of_attached(trainer_module.save_fsdp_model)
    Trainer.training_step = _inside_own_loss(Trainer.training_step)
    Trainer.prediction_step = _inside_own_loss(Trainer.prediction_step)


def _checking_fsdp(prepare: Callable) -> Callable:
    """`Trainer._prepare_for_training`, which shards the model, where FSDP can shard adapters."""
    from milora.experts import get_kind
    from milora.runtime import runtime_of

    @functools.wraps(prepare)
    def wrapped(self, *args, **kwargs):
        runtime = runtime_of(self.model, required=False)
        if runtime is not None and self.is_fsdp_enabled and not _is_peft(self.model):
            if getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
                raise ValueError(
                    "milora: FSDP version 1 flattens the adapter's tensors; set fsdp_version to 2"
                )
            kinds = sorted({config.expert for config in runtime.configs.values()})
            if shared := [kind for kind in kinds if get_kind(kind).shares_tensors]:
                raise ValueError(
                    f"milora: the blocks' experts of kind {', '.join(shared)} share tensors, which "
                    "FSDP cannot shard block by block; train on one device or with DDP"
                )
        return prepare(self, *args, **kwargs)

    return wrapped


def _collective(save_model: Callable) -> Callable:
    """`Trainer.save_model` that under FSDP has every rank bring its shards of the adapter."""
    from milora.runtime import runtime_of

    @functools.wraps(save_model)
    def wrapped(self, output_dir=None, _internal_call=False):
        runtime = runtime_of(self.model, required=False)
        if runtime is None or not self.is_fsdp_enabled or _is_peft(self.model):
            return save_model(self, output_dir, _internal_call)
        folder = self.args.output_dir if output_dir is None else output_dir
        SaveAdapter(runtime)(folder, is_main_process=self.args.should_save)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    return wrapped


def _not_of_attached(save_fsdp_model: Callable) -> Callable:
    """Leave the base out of FSDP checkpoints: `save_model` has put the adapter there."""
    from milora.runtime import runtime_of

    @functools.wraps(save_fsdp_model)
    def wrapped(fsdp_plugin, accelerator, model, *args, **kwargs):
        if runtime_of(model, required=False) is None or _is_peft(model):
            save_fsdp_model(fsdp_plugin, accelerator, model, *args, **kwargs)

    return wrapped


def _inside_own_loss(step: Callable) -> Callable:
    @functools.wraps(step)
    def wrapped(self, *args, **kwargs):
        with own_loss(self):
            return step(self, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def own_loss(trainer: Trainer) -> Iterator[None]:
    """Add the load-balance loss in `trainer.compute_loss`, if it does not use the model's loss."""
    from milora.runtime import runtime_of

    runtime = runtime_of(trainer.model, required=False)
    if runtime is None or not _makes_own_loss(trainer):
        yield
        return
    compute_loss, set_before = trainer.compute_loss, "compute_loss" in trainer.__dict__

    def with_balance(model, inputs, *args, **kwargs):
        num_items = kwargs.get("num_items_in_batch")
        # Label smoothing takes the labels out of the inputs; they still say where prompts end.
        runtime.local.collected = collected = Collected(inputs.get("labels"), num_items)
        try:
            result = compute_loss(model, inputs, *args, **kwargs)
        finally:
            runtime.local.collected = None
        loss = result[0] if isinstance(result, tuple) else result
        if collected.terms:
            loss = loss + sum(collected.terms).to(loss) * _num_sharing(trainer, num_items)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    trainer.compute_loss = with_balance
    try:
        yield
    finally:
        del trainer.compute_loss
        if set_before:
            trainer.compute_loss = compute_loss


def _makes_own_loss(trainer: Trainer) -> bool:
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return True
    makers = (cls for cls in type(trainer).__mro__ if "compute_loss" in cls.__dict__)
    return any(cls.__module__.partition(".")[0] == "trl" for cls in makers)


def _num_sharing(trainer: Trainer, num_items: Any) -> int:
    """Ranks whose labels `num_items` counts: DDP's mean over them must become a sum."""
    if num_items is None or not trainer.args.average_tokens_across_devices:
        return 1
    return trainer.accelerator.num_processes // trainer.get_tp_size()


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
