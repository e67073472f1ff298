"""The configuration of one MiLoRA adapter, checked when it is built."""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from milora.patterns import matches, problem_of

# Of saved adapters. A new field of `MiLoRAConfig` needs a new version: a file must hold them all.
FORMAT_VERSION = 1

POOLERS = ("self_attention", "mean", "max", "last")
ACTIVATIONS = ("rational", "gelu", "relu")
ROUTER_NORMS = ("none", "rms")
GATES = ("probability", "renormalized", "hard")
MAX_RANK = 256


@dataclass
class MiLoRAConfig:
    """How an adapter is built: experts, router, losses.   [MiLoRA, section 3; its defaults]

    Args:
        rank: rank of each expert, 1 to 256.
        alpha: the update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank)); None means rank.
        top_k: experts that a block keeps for a prompt. More than a block has means all of them.
        router: False makes a plain LoRA: no router, every expert on with gate 1.
        target_modules: "all-linear", or a list of path suffixes ("q_proj", "mlp.up_proj") or
            regular expressions (full match on the path inside the block, or on the whole path).
        expert: expert kind, a name in `milora.experts.REGISTRY`; `expert_options`: its own options.
        pooler: prompt pooling (paper, eq. 2 and 8): self_attention, mean, max or last.
        activation: rational, gelu or relu; or a list with one entry per block.
        gate: probability (eq. 3 as written), renormalized (kept gates sum to 1) or hard (gate 1,
            straight-through gradient).
        router_norm: "rms" normalises the pooled vector first; "none" is the paper.
        dropout: dropout on an expert's input while training.
        rslora: scale by alpha / sqrt(rank).
        balance_coef: weight of the load-balance loss (eq. 5), added to the model's own loss.
        balance_window: prompts over which the argmax shares f_i run, at least 1.
        rank_pattern, alpha_pattern: {pattern: value}, patterns as in target_modules; the first one
            that matches an expert's path wins.
        bilevel: the rational coefficients train only inside `milora.activation_phase` (paper,
            appendix A); False freezes them.
        seed: seed of every initial value that is random.

    Raises:
        ValueError: an option is out of its range; the message names it and what is allowed.
    """

    rank: int = 32
    alpha: float | None = None
    top_k: int = 3
    router: bool = True
    target_modules: str | list[str] = "all-linear"
    expert: str = "lora"
    expert_options: dict[str, Any] = field(default_factory=dict)
    pooler: str = "self_attention"
    activation: str | list[str] = "rational"
    gate: str = "probability"
    router_norm: str = "none"
    dropout: float = 0.0
    rslora: bool = False
    balance_coef: float = 1e-2
    balance_window: int = 64
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bilevel: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        from milora.experts import get_kind

        for name, rank in [("rank", self.rank), *self._items("rank_pattern")]:
            _check_int(name, rank, 1, MAX_RANK)
        for name, alpha in [("alpha", self.alpha), *self._items("alpha_pattern")]:
            if alpha is not None and not _is_number(alpha):
                raise ValueError(f"MiLoRAConfig: {name} must be a number, got {alpha!r}")
        _check_int("top_k", self.top_k, 1, 1 << 30)
        _check_int("balance_window", self.balance_window, 1, 1 << 30)
        _check_int("seed", self.seed, 0, (1 << 63) - 1)
        _check_choice("pooler", self.pooler, POOLERS)
        _check_choice("gate", self.gate, GATES)
        _check_choice("router_norm", self.router_norm, ROUTER_NORMS)
        for activation in (
            self.activation if isinstance(self.activation, list) else [self.activation]
        ):
            _check_choice("activation", activation, ACTIVATIONS)
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"MiLoRAConfig: dropout must be in [0, 1), got {self.dropout!r}")
        if not _is_number(self.balance_coef) or self.balance_coef < 0:
            raise ValueError(
                f"MiLoRAConfig: balance_coef must be a number >= 0, got {self.balance_coef!r}"
            )
        for name in ("router", "rslora", "bilevel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"MiLoRAConfig: {name} must be True or False, got {getattr(self, name)!r}"
                )
        if not isinstance(self.expert, str) or not isinstance(self.expert_options, dict):
            raise ValueError(
                "MiLoRAConfig: expert must be a name and expert_options a dict, got "
                f"{self.expert!r} and {self.expert_options!r}"
            )
        self._check_targets()
        get_kind(self.expert).validate(self.expert_options)

    def _items(self, name: str) -> list[tuple[str, Any]]:
        pattern = getattr(self, name)
        if not isinstance(pattern, dict):
            raise ValueError(f"MiLoRAConfig: {name} must be a dict, got {pattern!r}")
        for key in pattern:
            _check_regex(name, key)
        return [(f"{name}[{key!r}]", value) for key, value in pattern.items()]

    def _check_targets(self) -> None:
        targets = self.target_modules
        if targets == "all-linear":
            return
        if isinstance(targets, str):
            self.target_modules = targets = [targets]
        if not isinstance(targets, list | tuple) or not targets:
            raise ValueError(
                "MiLoRAConfig: target_modules must be 'all-linear' or a non-empty list of names or "
                f"patterns, got {targets!r}"
            )
        self.target_modules = list(targets)
        for target in targets:
            _check_regex("target_modules", target)

    # ---- one expert ---------------------------------------------------------------------------

    def rank_of(self, block: str, path: str) -> int:
        """Rank of the expert at `path` inside the block at path `block`."""
        return _first_match(self.rank_pattern, block, path, self.rank)

    def alpha_of(self, block: str, path: str) -> float:
        alpha = _first_match(self.alpha_pattern, block, path, self.alpha)
        return float(self.rank_of(block, path) if alpha is None else alpha)

    def targets(self, block: str, path: str) -> bool:
        if self.target_modules == "all-linear":
            return True
        return any(matches(pattern, block, path) for pattern in self.target_modules)

    def activation_of(self, block: int) -> str:
        return self.activation[block] if isinstance(self.activation, list) else self.activation

    # ---- as JSON, and for PEFT ----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.fields(MiLoRAConfig)  # a subclass for PEFT has more
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MiLoRAConfig:
        """Build a config from `to_dict`'s form.

        Raises:
            ValueError: an unknown key (all of them are named) or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"MiLoRAConfig: unknown keys {unknown}; known are {sorted(known)}")
        return cls(**data)

    def __getattr__(self, name: str) -> Any:
        # `peft.get_peft_model(model, MiLoRAConfig(...))`: PEFT reads one of these first, and from
        # then on this object is a PEFT config. It is PEFT that asks, so PEFT is imported.
        asked = ("base_model_name_or_path", "peft_type", "is_prompt_learning")
        if name in asked and "peft" in sys.modules:
            from milora.integrations.peft import become_peft_config

            return getattr(become_peft_config(self), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _first_match(patterns: dict[str, Any], block: str, path: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if matches(key, block, path)), default)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # NaN and infinity are not


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"MiLoRAConfig: {name} must be an integer in [{low}, {high}], got {value!r}"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"MiLoRAConfig: {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_regex(name: str, pattern: Any) -> None:
    if problem := problem_of(pattern):
        raise ValueError(f"MiLoRAConfig: {name}: {pattern!r} {problem}")
