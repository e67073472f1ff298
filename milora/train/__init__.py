"""Training: the bi-level trainer of the paper's appendix A, metrics, a stop that can be resumed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milora.train.beam import BeamCallback, BeamSearch
    from milora.train.bilevel import BilevelTrainerMixin, MiLoRATrainer
    from milora.train.metrics import MiLoRACallback

__all__ = [
    "BeamCallback",
    "BeamSearch",
    "BilevelTrainerMixin",
    "MiLoRACallback",
    "MiLoRATrainer",
]

_HOMES = {
    "BeamCallback": "beam",
    "BeamSearch": "beam",
    "BilevelTrainerMixin": "bilevel",
    "MiLoRATrainer": "bilevel",
    "MiLoRACallback": "metrics",
}


def __getattr__(name: str):
    # Importing transformers' Trainer takes seconds; nobody who only serves should wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'milora.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"milora.train.{_HOMES[name]}"), name)
