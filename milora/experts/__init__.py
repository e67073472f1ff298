"""Expert kinds, by name. A new kind is one file here and one line in REGISTRY."""

from __future__ import annotations

from milora.experts.base import ExpertKind, ExpertSpec, ExpertWeights, make_spec
from milora.experts.beamlora import BeamLora
from milora.experts.bone import Bone
from milora.experts.dora import Dora
from milora.experts.dylora import DyLora
from milora.experts.ffa_lora import FfaLora
from milora.experts.flylora import FlyLora
from milora.experts.loldu import Loldu
from milora.experts.lora import Lora
from milora.experts.lora_ga import LoraGa
from milora.experts.lora_mini import LoraMini
from milora.experts.lora_sb import LoraSb
from milora.experts.lora_xs import LoraXs
from milora.experts.lorta import Lorta
from milora.experts.melora import Melora
from milora.experts.mora import Mora
from milora.experts.nlora import IntTune, Nlora, Slora
from milora.experts.nola import Nola
from milora.experts.prolora import Prolora
from milora.experts.randlora import Randlora
from milora.experts.rank_gated import RankGated
from milora.experts.smora import Smora

REGISTRY: dict[str, ExpertKind] = {
    kind.name: kind
    for kind in (
        Lora(),
        Dora(),
        LoraMini(),
        FfaLora(),
        LoraXs(),
        LoraSb(),
        Slora(),
        Nlora(),
        IntTune(),
        Loldu(),
        LoraGa(),
        Melora(),
        Prolora(),
        Nola(),
        Randlora(),
        Mora(),
        Bone(),
        Lorta(),
        DyLora(),
        BeamLora(),
        FlyLora(),
        Smora(),
    )
}


def get_kind(name: str) -> ExpertKind:
    """The expert kind called `name`.

    Raises:
        ValueError: no such kind; the message lists the known ones.
    """
    if name not in REGISTRY:
        raise ValueError(f"expert: must be one of {', '.join(REGISTRY)}, got {name!r}")
    return REGISTRY[name]


__all__ = [
    "REGISTRY",
    "ExpertKind",
    "ExpertSpec",
    "ExpertWeights",
    "RankGated",
    "get_kind",
    "make_spec",
]
