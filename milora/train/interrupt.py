"""Ctrl-C during training: finish the step, save a checkpoint to resume from, then stop."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager

from transformers import TrainerCallback


class InterruptCallback(TrainerCallback, AbstractContextManager):
    """The first Ctrl-C (or SIGTERM) saves and stops; the second one ends the program at once.

    Use it as a context manager around `trainer.train()` and pass it as a callback.

    Attributes:
        interrupted: a signal came.
        stopped: it came in time to end the training early, with a checkpoint.
    """

    def __init__(self):
        self.interrupted = False
        self.stopped = False
        self._previous: dict[int, object] = {}

    def __enter__(self):
        # Python delivers signals to the main thread only; no other thread may set a handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted and state.global_step < state.max_steps:
            self.stopped = True
            # Only a whole step has a checkpoint that resumes to the same bits.
            control.should_save = True
            control.should_training_stop = True
        return control
