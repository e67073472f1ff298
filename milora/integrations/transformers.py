"""Make stock transformers code treat an attached model as one with adapters.

On the model itself: `save_pretrained` writes the active adapter (so that Trainer's checkpoints hold
nothing else), and `_hf_peft_config_loaded` says that a quantized base carries trainable adapters.
In `Trainer`: loading a checkpoint, which has no hook for models other than PEFT's, learns of ours.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    """Let `Trainer` resume from, and load the best of, checkpoints that hold an adapter.

    Its two loading methods know PEFT's models by class and take every other checkpoint for a whole
    model. For a model with a `Runtime` they load the adapter; other models go the old way.
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


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
