"""Fine-tune one attached model, with transformers' Trainer or this library's bi-level one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import milora
from milora.data import CompletionCollator
from milora.train import MiLoRATrainer
from quality.methods import ROUTED

Row = dict[str, list[int]]
ACTIVATION_SHARE = 0.01  # lr of the rational coefficients ÷ lr, as in the paper: 1e-6 and 1e-4
WARMUP_SHARE = 0.06


class _AllocateRanks(TrainerCallback):
    """AdaLoRA's pruning: after the optimizer's step, before the gradients are cleared."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def finetune(
    model: nn.Module,
    method: str,
    rows: Sequence[Row],
    activation_rows: Sequence[Row],
    collate: CompletionCollator,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train in place. `rows` are in the order of their use, the same for every method and seed.

    `activation_rows` feed the bi-level steps of MiLoRA and MiDoRA alone: other examples of the same
    tasks, so that all methods take the same number of steps on the very same training examples.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, round(WARMUP_SHARE * steps)),
            train_sampling_strategy="sequential",  # the examples are shuffled already
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer_class, extra = Trainer, {}
        if method in ROUTED:
            trainer_class = MiLoRATrainer
            extra["activation_lr"] = ACTIVATION_SHARE * learning_rate
            if milora.activation_parameters(model):
                extra["activation_dataset"] = activation_rows
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[*callbacks, *([_AllocateRanks()] if method == "AdaLoRA" else [])],
            **extra,
        )
        trainer.remove_callback(PrinterCallback)  # it prints on stdout
        trainer.train()
    model.eval()
