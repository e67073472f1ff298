"""Adapters for the tests of saving and loading, and what a failed load must not change."""

from __future__ import annotations

import torch
from tiny_models import build, prompts, randomize

import milora
from milora import MiLoRAConfig

LENGTH = 7
OPTIONS = {
    "plain": {},
    "dora": {"expert": "dora"},
    "lora_mini": {"expert": "lora_mini", "expert_options": {"inner_in": 6, "inner_out": 5}},
    "no_router": {"router": False},
    "bare_router": {"pooler": "mean", "activation": ["relu", "gelu"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "mlp.up_proj": 5},
        "alpha_pattern": {"o_proj": 3.0},
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rslora": True,
    },
    # The first pattern that matches wins, so a file must keep their order.
    "pattern_order": {
        "rank_pattern": {"up_proj": 2, "mlp.*": 3},
        "alpha_pattern": {"z?mlp.*": 5.0},
    },
}


def attached(options: dict | None = None, dtype: torch.dtype = torch.float32, seed: int = 1):
    model = build("llama").to(dtype)
    milora.attach(model, MiLoRAConfig(rank=4, **(options or {})))
    return randomize(model, seed=seed)


def logits(model) -> torch.Tensor:
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        return model(prompts(2, LENGTH)).logits


def snapshot(model) -> dict:
    """Everything of a model that a failed load could change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": set(vars(model)),
        "adapters": dict(milora.adapters(model)),
    }


def assert_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    values, others = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)
