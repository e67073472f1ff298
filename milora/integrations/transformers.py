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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora.balance import Collected

if TYPE_CHECKING:
    from transformers import Trainer

    from milora.runtime import Runtime

WINDOW_FILE = "milora_balance_window.json"


class SaveAdapter:
    """Stands in for the model's `save_pretrained`: writes the active adapter."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def __call__(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        from milora.adapters import save

        runtime = self.runtime
        name = runtime.active or next(iter(runtime.configs))
        save(runtime.model, save_directory, name, is_main_process=is_main_process)
        if is_main_process and name in runtime.windows:
            target = Path(save_directory) / WINDOW_FILE
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps(runtime.windows[name].state_dict()))
            os.replace(temporary, target)


def install(runtime: Runtime) -> dict[str, Any]:
    """The attributes that an attached transformers model gets."""
    return {"save_pretrained": SaveAdapter(runtime), "_hf_peft_config_loaded": True}


def load_checkpoint(model: Any, folder: str | os.PathLike) -> None:
    """Load a Trainer checkpoint into the active adapter of `model`."""
    from milora.adapters import load_weights
    from milora.attach import runtime_of

    runtime = runtime_of(model)
    load_weights(model, folder, runtime.active)
    window = Path(folder) / WINDOW_FILE
    if window.is_file() and runtime.active in runtime.windows:
        device = next(runtime.model.parameters()).device
        runtime.windows[runtime.active].load_state_dict(json.loads(window.read_text()), device)


@functools.cache
def teach_trainer() -> None:
    """Let `Trainer` load checkpoints that hold an adapter, and see the load-balance loss.

    Its two loading methods know PEFT's models by class and take every other checkpoint for a whole
    model. For a model with a `Runtime` they load the adapter. Its two steps run inside `own_loss`.
    Trainers of other models do what they did.
    """
    try:
        from transformers.trainer import Trainer
    except ImportError:  # accelerate is not installed: there is no Trainer to teach
        return
    from milora.attach import runtime_of

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
    Trainer.training_step = _inside_own_loss(Trainer.training_step)
    Trainer.prediction_step = _inside_own_loss(Trainer.prediction_step)


def _inside_own_loss(step: Callable) -> Callable:
    @functools.wraps(step)
    def wrapped(self, *args, **kwargs):
        with own_loss(self):
            return step(self, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def own_loss(trainer: Trainer) -> Iterator[None]:
    """Add the load-balance loss in `trainer.compute_loss`, if it does not use the model's loss."""
    from milora.attach import runtime_of

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
