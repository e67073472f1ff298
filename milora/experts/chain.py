"""A chain of factors: dW = scale · B C A, each factor trained, fixed, or made from the seed.

    LoRA        A, B trained                        FFA-LoRA    A from the seed, B trained
    LoRA-Mini   A = M_1 N_1, B = N_2 M_2, the outer factors N from the seed
    LoRA-XS     C trained between fixed A and B     LoRA-SB     the same, started from a gradient
    SLoRA, NLoRA   all three trained                IntTune     C alone
    LoLDU       a diagonal C between fixed A and B
    LoRA-GA     A, B trained, and minus B_0 A_0: where training started

What distinguishes them is their flags and their initial values, so each is a few lines. Where C
alone is trained, inference reads it apart from A and B, which many adapters may then share.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertKind, ExpertSpec, ExpertWeights, WeightSource


class FactorChain(ExpertKind):
    """A [rank, inner_in] and B [inner_out, rank], with what the flags add between and around.

    The inner sizes are the module's d_in and d_out, unless outer factors widen A and B to them:
    frozen tensors `outer_in` [inner_in, d_in] and `outer_out` [d_out, inner_out].

    Attributes:
        prefix: of the tensors' names: `<prefix>_A`, `<prefix>_B`, `<prefix>_core`, ...
        core: "" for no C, "square" for [rank, rank], "diagonal" for [rank].
    """

    prefix: ClassVar[str]
    core: ClassVar[str] = ""

    def inner(self, spec: ExpertSpec) -> tuple[int, int]:
        """inner_in and inner_out."""
        return spec.d_in, spec.d_out

    def is_anchored(self, spec: ExpertSpec) -> bool:
        """Whether the fixed product B_0 A_0, the start, is taken off the update.

        A residual base W - scale · B_0 C_0 A_0 would do the same for one adapter; here W is shared
        with other adapters and stays what it is.
        """
        return False

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        inner_in, inner_out = self.inner(spec)
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.prefix}_A": (spec.rank, inner_in),
            f"{self.prefix}_B": (inner_out, spec.rank),
        }
        if self.core:
            size = (spec.rank, spec.rank) if self.core == "square" else (spec.rank,)
            shapes[f"{self.prefix}_core"] = size
        if self.is_anchored(spec):
            shapes[f"{self.prefix}_start_A"] = (spec.rank, inner_in)
            shapes[f"{self.prefix}_start_B"] = (inner_out, spec.rank)
        made = self.frozen_shapes(spec)
        return {name: shape for name, shape in shapes.items() if name not in made}

    def served_rank(self, spec: ExpertSpec) -> int:
        return 2 * spec.rank if self.is_anchored(spec) else spec.rank

    def named(self, a: Tensor, b: Tensor, core: Tensor | None = None) -> dict[str, Tensor]:
        """The factors under their names, contiguous float32 on the CPU."""
        values = {f"{self.prefix}_A": a, f"{self.prefix}_B": b}
        if core is not None:
            values[f"{self.prefix}_core"] = core
        return {
            name: value.to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
            for name, value in values.items()
        }

    def anchor(self, spec: ExpertSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` with their own product as the start, where the chain has one: dW is then 0."""
        if not self.is_anchored(spec):
            return tensors
        a, b = self._inner_factors(tensors)
        start = {f"{self.prefix}_start_A": a.clone(), f"{self.prefix}_start_B": b.clone()}
        return {**tensors, **start}

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        a, b = self._inner_factors(values)
        if "outer_in" in values:
            a, b = a @ values["outer_in"], values["outer_out"] @ b
        if self.is_anchored(spec):
            # B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0): nothing cancels in the kernels' dtype.
            start_a, start_b = (values[f"{self.prefix}_start_{side}"] for side in "AB")
            a, b = torch.cat([a, a - start_a]), torch.cat([b - start_b, start_b], dim=1)
        return a, b

    def has_fixed_factors(self, spec: ExpertSpec) -> bool:
        never_trained = self.fixed | self.frozen_shapes(spec).keys()
        factors = {f"{self.prefix}_A", f"{self.prefix}_B"}
        return bool(self.core) and factors <= never_trained and not self.is_anchored(spec)

    def served(
        self,
        tensors: dict[str, Tensor],
        frozen: dict[str, Tensor],
        spec: ExpertSpec,
        weight: WeightSource | None = None,
    ) -> ExpertWeights:
        if not self.has_fixed_factors(spec):
            return super().served(tensors, frozen, spec, weight)
        values = {**frozen, **tensors}
        a, b, core = (values[f"{self.prefix}_{name}"] for name in ("A", "B", "core"))
        core = torch.diag(core) if self.core == "diagonal" else core
        return ExpertWeights(a, b, spec.scale, core=core)

    def _inner_factors(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A, and B C: an A that adapters have in common keeps its bits."""
        a, b = values[f"{self.prefix}_A"], values[f"{self.prefix}_B"]
        if self.core:
            core = values[f"{self.prefix}_core"]
            b = b @ core if self.core == "square" else b * core
        return a, b
