"""DPO's reference model without a second copy of the base.

What else TRL's trainers need is not here: SFTTrainer and DPOTrainer (1.16) give labels of the
completion to every forward, so that chosen and rejected of one pair route on their prompt alone,
and the load-balance loss joins theirs through `milora.integrations.transformers`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from milora.runtime import RUNTIME, Runtime, runtime_of


class _Switch:
    """Hooks around the reference's forward: adapters off before it, as they were after it."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.before: list[bool] = []

    def off(self, module: nn.Module, args: tuple) -> None:
        self.before.append(self.runtime.local.disabled)
        self.runtime.local.disabled = True

    def back(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.runtime.local.disabled = self.before.pop()


def bare_reference(model: nn.Module) -> nn.Module:
    """The bare base of an attached model, as a model of its own that shares every weight.

        DPOTrainer(model=model, ref_model=bare_reference(model), ...)

    Without `ref_model`, DPOTrainer loads the base a second time. The reference runs its submodules
    in the mode they are in; TRL's default `disable_dropout=True` makes that no difference. Not for
    FSDP or DeepSpeed, which shard each model's weights themselves: pass a loaded copy there.

    Raises:
        ValueError: nothing is attached.
    """
    runtime = runtime_of(model)
    reference = copy.copy(runtime.model)
    for name in (*runtime.replaced, RUNTIME, "forward"):
        reference.__dict__.pop(name, None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs", "_always_called"):
            if hooks + suffix in reference.__dict__:
                reference.__dict__[hooks + suffix] = OrderedDict()
    switch = _Switch(runtime)
    reference.register_forward_pre_hook(switch.off)
    reference.register_forward_hook(switch.back, always_call=True)
    return reference
