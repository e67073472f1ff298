"""PRoLoRA: A and B tiled from rotated copies of a small chunk.   [Wang et al., arXiv 2402.16902]

Of the rank r, u ranks are ordinary. For the other s = r - u, A is m chunks side by side: row j of
chunk t is row (j + t · max(s // m, 1)) mod s of A_0 [s, ceil(d_in / m)], and what is beyond d_in is
cut off. B is made likewise of n chunks of B_0 [ceil(d_out / n), s]. dW = scale · B A has rank r and
s (d_in / m + d_out / n) + u (d_in + d_out) numbers are trained.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertKind, ExpertSpec, WeightSource, check_positive, zeros
from milora.random import derive_seed

_NAMES = ("prolora_A", "prolora_B", "prolora_unshared_A", "prolora_unshared_B")


class Prolora(ExpertKind):
    """A_0 and the ordinary rows of A uniform with LoRA's bound 1 / √d_in (the paper's "rectified"
    start: the fan of the whole A, not of a chunk), all of B zero.

    Options: `chunks_in` (m), `chunks_out` (n), `unshared` (u); `stride_in` and `stride_out`, the
    roll from one chunk to the next, 0 for max(s // m, 1) and max(s // n, 1).
    """

    name = "prolora"
    summary = "B A of rotated chunks"
    defaults: ClassVar[dict[str, Any]] = {
        "chunks_in": 4, "chunks_out": 4, "unshared": 1, "stride_in": 0, "stride_out": 0,
    }  # fmt: skip

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        unshared = self.option(spec, "unshared")
        shared = spec.rank - unshared
        m, n = self.option(spec, "chunks_in"), self.option(spec, "chunks_out")
        shapes = (
            (shared, -(-spec.d_in // m)),
            (-(-spec.d_out // n), shared),
            (unshared, spec.d_in),
            (spec.d_out, unshared),
        )
        return {name: s for name, s in zip(_NAMES, shapes, strict=True) if 0 not in s}

    def check(self, spec: ExpertSpec) -> None:
        super().check(spec)
        if (unshared := self.option(spec, "unshared")) > spec.rank:
            raise ValueError(
                f"prolora: unshared must be at most the rank, {spec.rank}, got {unshared}"
            )
        for name, size in (("chunks_in", spec.d_in), ("chunks_out", spec.d_out)):
            if (count := self.option(spec, name)) > size:
                raise ValueError(f"prolora: {name} must be at most {size}, got {count}")

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "chunks_in", "chunks_out")
        for name in ("unshared", "stride_in", "stride_out"):
            value = options.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"prolora: {name} must be an integer >= 0, got {value!r}")

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        tensors = {name: zeros(*shape) for name, shape in self.tensors(spec).items()}
        bound = 1 / math.sqrt(spec.d_in)
        for name in tensors:
            if name.endswith("_A"):
                generator = torch.Generator("cpu").manual_seed(derive_seed(spec.seed, name))
                tensors[name].uniform_(-bound, bound, generator=generator)
        return tensors

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        shared_a, shared_b, unshared_a, unshared_b = (values.get(name) for name in _NAMES)
        parts_a, parts_b = [], []
        if shared_a is not None and shared_b is not None:
            m, n = self.option(spec, "chunks_in"), self.option(spec, "chunks_out")
            a = _rotated(shared_a, m, self.option(spec, "stride_in"))
            b = _rotated(shared_b.T, n, self.option(spec, "stride_out"))
            parts_a.append(a[:, : spec.d_in])
            parts_b.append(b[:, : spec.d_out].T)
        if unshared_a is not None and unshared_b is not None:
            parts_a.append(unshared_a)
            parts_b.append(unshared_b)
        return torch.cat(parts_a), torch.cat(parts_b, dim=1)


def _rotated(chunk: Tensor, count: int, stride: int) -> Tensor:
    """[s, count · width]: `count` copies of a chunk [s, width], each rolled `stride` rows on."""
    stride = stride or max(chunk.shape[0] // count, 1)
    rows = torch.arange(chunk.shape[0], device=chunk.device)
    shifts = torch.arange(count, device=chunk.device) * stride
    picked = (rows[:, None] + shifts) % chunk.shape[0]  # [s, count]
    return chunk[picked].flatten(1)
