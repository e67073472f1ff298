"""Expert kinds, by name. A new kind is one file here and one line in REGISTRY."""

from __future__ import annotations

from milora.experts.base import ExpertKind, ExpertSpec, ExpertWeights, make_spec
from milora.experts.dora import Dora
from milora.experts.lora import Lora
from milora.experts.lora_mini import LoraMini

REGISTRY: dict[str, ExpertKind] = {
    "lora": Lora(),
    "dora": Dora(),
    "lora_mini": LoraMini(),
}


def get_kind(name: str) -> ExpertKind:
    """The expert kind called `name`.

    Raises:
        ValueError: no such kind; the message lists the known ones.
    """
    if name not in REGISTRY:
        raise ValueError(f"expert: must be one of {', '.join(REGISTRY)}, got {name!r}")
    return REGISTRY[name]


__all__ = ["REGISTRY", "ExpertKind", "ExpertSpec", "ExpertWeights", "get_kind", "make_spec"]
