"""Training progress on stderr: a bar on a terminal, a line per log elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import TrainerCallback

from milora.cli.console import note, progress


class TrainProgress(TrainerCallback, AbstractContextManager):
    """Shows step, loss, dev perplexity and balance loss.

    The bar keeps the newest of each; a line has those of its own step alone.

    Use it as a context manager around `trainer.train()`: a bar that an error leaves running keeps
    the terminal's cursor hidden.
    """

    def __init__(self):
        self._status: dict[str, str] = {}
        self._context = None
        self._bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._context = progress("training", state.max_steps)
        self._bar = self._context.__enter__()
        self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        new = {
            label: f"{label} {logs[key]:.4g}"
            for key, label in (
                ("loss", "loss"),
                ("eval_perplexity", "dev perplexity"),
                ("balance_loss", "balance"),
            )
            if key in (logs or {})
        }
        self._status |= new
        if self._bar is None or not new:
            return
        if self._bar.disable:
            note(f"step {state.global_step}/{state.max_steps}: {', '.join(new.values())}")
        else:
            self._bar.update(self._bar.task_ids[0], status=", ".join(self._status.values()))

    def __exit__(self, *exc_info):
        if self._bar is not None:
            self._context.__exit__(None, None, None)
            self._bar = None
