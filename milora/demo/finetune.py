"""Fine-tune one method on all tasks together, with transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from milora.data import CompletionCollator
from milora.demo.methods import MILORA
from milora.train import MiLoRATrainer


@dataclass(frozen=True)
class FinetuneConfig:
    """The same for every method. The learning rate suits so small a base; the paper's is 1e-4."""

    steps: int = 160
    batch_size: int = 16
    learning_rate: float = 3e-3
    seed: int = 0


class _Report(TrainerCallback):
    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress(state.global_step)


def finetune(
    model: nn.Module,
    method: str,
    config: FinetuneConfig,
    train: Dataset,
    activation: Dataset,
    collator: CompletionCollator,
    scratch: Path,
    progress: Callable[[int], None],
) -> float:
    """Train the adapter on `model`; `train` holds the batches in the order they are used.

    `activation` feeds the bi-level steps of MiLoRA alone. It is other data of the same topics, so
    that all methods see the very same training examples.

    Returns: seconds spent training.
    """
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(0.06 * config.steps)),
        train_sampling_strategy="sequential",  # the examples are shuffled already
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer_class, extra = (
        (MiLoRATrainer, {"activation_dataset": activation}) if method == MILORA else (Trainer, {})
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train,
        data_collator=collator,
        callbacks=[_Report(progress)],
        **extra,
    )
    trainer.remove_callback(PrinterCallback)  # it prints a dict on stdout, where JSON may go
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.eval()
    return seconds
