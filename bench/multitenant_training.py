"""Case t1: forward, backward and AdamW, MiLoRA with top_k 3 beside PEFT LoRA of the same rank."""

from __future__ import annotations

import gc

import torch
from measure import Run, interleaved
from providers import MODULES, Plain, check_logits, milora_model, peft_model, routes
from setting import TOP_3, Setting
from tenants import Tenants
from torch import Tensor, nn

import milora


class Training:
    """One provider's training step on one batch."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]):
        self.model = model.train()
        self.inputs = inputs
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()


class BaseStep:
    """The forward of the bare base and the gradient with respect to its input: what any adapter's
    training needs of the base."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]):
        self.model = model
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        self.inputs = {"inputs_embeds": embedded.requires_grad_(), "labels": inputs["labels"]}

    def step(self) -> None:
        self.inputs["inputs_embeds"].grad = None
        self.model(**self.inputs).loss.backward()


def run(s: Setting) -> None:
    device = s.args.device
    tenants = s.tenants(1, [0] * s.batch)
    ids = tenants.prompts(s.args.train_tokens).to(device)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100  # the first half is the prompt
    inputs = {"input_ids": ids, "labels": labels}
    ours = milora_model(s.base, tenants, TOP_3).train()
    theirs = peft_model(s.base, tenants).train()
    gates = check(s, tenants, ours, theirs, inputs)

    runs = {
        "base": Run(BaseStep(s.base, inputs).step),
        "milora": Run(Training(ours, inputs).step),
        "peft": Run(Training(theirs, inputs).step),
    }
    times = interleaved(runs, device, s.args.repeat or 4, 2 * s.args.seconds)
    # Forward and gradient of x for the base; forward and two gradients for an adapter.
    head = s.shape.hidden * s.shape.vocab
    rate = 4 * (s.shape.linear_weights + head) * ids.numel() / times["base"].best
    for name in runs:
        on = {"base": torch.zeros_like(gates), "milora": gates, "peft": tenants.gates()}[name]
        flops = 3 * tenants.active_flops(on, ids.shape[1])
        s.report.time(
            "t1", name, s.dtype, "training_step", times, to="peft",
            floor=(times["base"].best + flops / rate) / times["peft"].best,
            adapter_flops=flops, train_tokens=ids.shape[1],
            active_modules=(on != 0).any(1).sum().item() / s.shape.layers, **s.extra,
        )  # fmt: skip
    del runs, ours, theirs
    gc.collect()


def check(
    s: Setting, tenants: Tenants, ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]
) -> Tensor:
    """Compare the logits of training forwards with plain torch; returns MiLoRA's gates."""
    with milora.record_routing(ours) as states:
        got = {"milora": ours(**inputs).logits, "peft": theirs(**inputs).logits}
    gates = routes(states)
    with torch.no_grad():
        plain = Plain(s.base, tenants)
        bare = plain(torch.zeros_like(gates), input_ids=inputs["input_ids"]).logits
        for name, on in (("milora", gates), ("peft", tenants.gates(MODULES))):
            want = plain(on, input_ids=inputs["input_ids"]).logits
            check_logits(f"t1: {name}", got[name].detach(), want, bare, s.dtype)
    return gates
