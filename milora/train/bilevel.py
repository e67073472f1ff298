"""Bi-level training: the rational coefficients Θ learn on other data than all the rest, Ω.

    Ω ← Ω − lr   · ∇_Ω L(training batch;   Ω, Θ)
    Θ ← Θ − lr_Θ · ∇_Θ L(activation batch; Ω, Θ)          one after the other, 1 : 1, first order
                                                          [MiLoRA, appendix A]

A mixin, so that it works with `transformers.Trainer` and with trainers built on it (TRL). The
Trainer's own loop does the Ω step and knows nothing of Θ: outside `milora.activation_phase` Θ asks
for no gradient and so is in no optimizer of the Trainer's. The Θ step hangs on `on_step_end`:
after the Ω step and its `zero_grad`, before a checkpoint of this step is written.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset, Subset
from transformers import TrainerCallback, get_scheduler

import milora
from milora.train.metrics import MiLoRACallback
from milora.train.stream import BatchStream

ACTIVATION_STATE = "activation_optimizer.pt"
STATE_VERSION = 1
# These follow a measured loss, not the step number; Θ has no such loss of its own.
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


class _ActivationStep(TrainerCallback):
    """Calls the trainer back after each Ω step."""

    def __init__(self, trainer: BilevelTrainerMixin):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.activation_step()


class BilevelTrainerMixin:
    """Adds the Θ step, perplexity and MiLoRA's logs to a Trainer. Put it before the Trainer class.

    Args:
        activation_dataset: data of the Θ steps. None holds out `activation_share` of the training
            data, by a seeded choice. Pass the dev set for the paper's own choice.
        activation_share: the held-out share, in (0, 1).
        activation_lr: learning rate of Θ (paper: 1e-6); its schedule is that of Ω.
        activation_max_grad_norm: Θ's own gradient clipping. One norm over both would let a steep
            coefficient gradient silence every other parameter.
        bilevel: False trains nothing of Θ. None: as the model's MiLoRA config says.

    Raises:
        ValueError: an option out of range, a streaming training set with no `activation_dataset`,
            a schedule or a parallel form that has no Θ step.
    """

    def __init__(
        self,
        *args,
        activation_dataset: Any = None,
        activation_share: float = 0.1,
        activation_lr: float = 1e-6,
        activation_max_grad_norm: float = 1.0,
        bilevel: bool | None = None,
        **kwargs,
    ):
        if not 0.0 < activation_share < 1.0:
            raise ValueError(f"bilevel: activation_share must be in (0, 1), got {activation_share}")
        if activation_lr < 0 or activation_max_grad_norm < 0:
            raise ValueError(
                "bilevel: activation_lr and activation_max_grad_norm must be >= 0, got "
                f"{activation_lr} and {activation_max_grad_norm}"
            )
        super().__init__(*args, **kwargs)
        self.activation_lr = activation_lr
        self.activation_max_grad_norm = activation_max_grad_norm
        self.activation_dataset = activation_dataset
        self.activation_optimizer: torch.optim.Optimizer | None = None
        self.activation_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self._activation_stream: BatchStream | None = None
        self._eval_sums: torch.Tensor | None = None
        theta = milora.activation_parameters(self.model)
        if bilevel and not theta:
            raise ValueError(
                "bilevel: True needs a router with the rational activation, and bilevel=True in "
                "its MiLoRAConfig"
            )
        # A router with GELU or ReLU, or a plain LoRA, has no Θ to train.
        self.bilevel = bool(theta) and bilevel is not False
        # Ω's optimizer takes what asks for a gradient, and DDP waits for a gradient of each such.
        for parameter in theta:
            parameter.requires_grad_(False)
        if not any(isinstance(c, MiLoRACallback) for c in self.callback_handler.callbacks):
            # First, so that every reporter after it sees the balance loss in the logs.
            self.callback_handler.callbacks.insert(0, MiLoRACallback())
        if self.bilevel:
            self._check_bilevel()
            if self.activation_dataset is None and self.train_dataset is not None:
                self._hold_out(activation_share)
            self.add_callback(_ActivationStep(self))

    # ---- data ---------------------------------------------------------------------------------

    def _hold_out(self, share: float) -> None:
        """Split the training data in two, the same way on every rank and after every resume."""
        data = self.train_dataset
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise ValueError(
                "bilevel: a streaming train_dataset has no tenth to hold out; pass "
                "activation_dataset=..., or bilevel=False"
            )
        if len(data) < 2:
            raise ValueError(f"bilevel: train_dataset must have 2 rows or more, got {len(data)}")
        generator = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(data), generator=generator).tolist()
        held_out = max(1, round(len(data) * share))
        activation, training = sorted(order[:held_out]), sorted(order[held_out:])
        if hasattr(data, "select"):  # a datasets.Dataset keeps its columns only through select
            self.activation_dataset, self.train_dataset = (
                data.select(activation),
                data.select(training),
            )
        else:
            self.activation_dataset, self.train_dataset = (
                Subset(data, activation),
                Subset(data, training),
            )

    def _make_stream(self) -> BatchStream:
        data, collate = self.activation_dataset, self.data_collator
        if hasattr(data, "column_names") and hasattr(data, "remove_columns"):
            data = self._remove_unused_columns(data, description="activation")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="activation")
        return BatchStream(
            data,
            collate,
            self._train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )

    # ---- the Θ step ---------------------------------------------------------------------------

    def activation_step(self) -> None:
        """One step of Θ on as many micro-batches as the Ω step before it had.

        It runs on the model inside DDP: DDP waits for a gradient of every parameter that trained
        at wrapping time, and Θ did not; so Θ's few gradients are averaged over the ranks here.
        """
        parameters = milora.activation_parameters(self.model)
        batches = self._activation_stream.take(self.current_gradient_accumulation_steps)
        num_items = self._get_num_items_in_batch(batches, self.args.device)
        with _asking_for_gradients(parameters), milora.activation_phase(self.model):
            for inputs in batches:
                self.training_step(self.model, inputs, num_items)
        # fp16: `training_step` scaled the loss, and only the Trainer's optimizer knows by how much.
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        _average(parameters, scale)
        limit = self.activation_max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if scale == 1.0 or bool(torch.isfinite(norm)):  # an fp16 overflow skips the step, as for Ω
            self.activation_optimizer.step()
        self.activation_scheduler.step()
        self.activation_optimizer.zero_grad(set_to_none=True)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Build Ω's schedule, and beside it Θ's optimizer and the same schedule over it."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.bilevel:
            args = self.args
            # Weight decay would pull the activation towards the zero function: none.
            self.activation_optimizer = torch.optim.AdamW(
                milora.activation_parameters(self.model),
                lr=self.activation_lr,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=0.0,
            )
            self.activation_scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer=self.activation_optimizer,
                num_warmup_steps=args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
            self._activation_stream = self._make_stream()
        return scheduler

    def _check_bilevel(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError("bilevel: DeepSpeed owns the backward pass; pass bilevel=False")
        if self.args.n_gpu > 1:
            raise ValueError(
                "bilevel: several GPUs need one process each (torchrun), got "
                f"{self.args.n_gpu} GPUs in one process"
            )
        if (schedule := str(self.args.lr_scheduler_type.value)) in METRIC_SCHEDULES:
            raise ValueError(
                "bilevel: lr_scheduler_type must be a schedule of the step number, got " + schedule
            )

    # ---- checkpoints --------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.bilevel:
            state = {
                "version": STATE_VERSION,
                "optimizer": _plain(self.activation_optimizer.state_dict()),
                "scheduler": self.activation_scheduler.state_dict(),
                "position": self._activation_stream.position,
            }
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, ACTIVATION_STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.bilevel:
            return
        path = os.path.join(checkpoint, ACTIVATION_STATE)
        if not os.path.isfile(path):
            if not os.path.isfile(os.path.join(checkpoint, "optimizer.pt")):
                return  # saved with save_only_model: Ω's optimizer starts anew as well
            raise FileNotFoundError(
                f"bilevel: {checkpoint} has no {ACTIVATION_STATE}: it was saved without bi-level "
                "training; pass bilevel=False to resume it"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"bilevel: {path} must have version {STATE_VERSION}, got {state.get('version')}"
            )
        self.activation_optimizer.load_state_dict(
            _like(state["optimizer"], milora.activation_parameters(self.model))
        )
        self.activation_scheduler.load_state_dict(state["scheduler"])
        self._activation_stream.position = state["position"]

    # ---- perplexity ---------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        labels = inputs.get("labels")
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._eval_sums is not None and labels is not None and result[0] is not None:
            tokens = labels[..., 1:].ne(-100).sum().to(self._eval_sums.device)
            self._eval_sums += torch.stack([result[0].double() * tokens, tokens.double()])
        return result

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Trainer's loop, with `<prefix>_perplexity` = exp(mean loss of an answer's token).

        Trainer's own mean is over batches, so its value moves with the batch size and padding.
        """
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            loss, tokens = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        finally:
            self._eval_sums = None
        if tokens:
            perplexity = math.exp(min(loss / tokens, 700.0))  # e^709 is the end of float64
            output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity
        return output


class MiLoRATrainer(BilevelTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` with bi-level training; arguments of both."""


@contextlib.contextmanager
def _asking_for_gradients(parameters: list[torch.Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _average(parameters: list[torch.Tensor], scale: float) -> None:
    """Divide by the fp16 loss scale, and average over the ranks what FSDP has not averaged yet."""
    for parameter in parameters:
        if parameter.grad is None:  # every rank must bring the same tensors
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad /= scale
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    local = [p.grad for p in parameters if not hasattr(p.grad, "full_tensor")]
    if local:
        flat = torch.cat([gradient.flatten() for gradient in local])  # one message, not one each
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, mean in zip(local, flat.split([g.numel() for g in local]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _plain(state: Any) -> Any:
    """An optimizer's state with sharded tensors gathered: any number of ranks can read it."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def _like(state: dict, parameters: list[torch.Tensor]) -> dict:
    """The reverse of `_plain`: each moment sharded as its parameter is."""
    for index, moments in state["state"].items():
        parameter = parameters[index]
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements
                    )
    return state
