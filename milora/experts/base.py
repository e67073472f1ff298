"""What an expert kind is: a few trainable tensors that turn into the (A, B, scale) that ops take.

An expert updates one linear module `y = W x + bias`. Every kind, whatever it stores, materialises
to one `ExpertWeights`; ops, serving and export know that form and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.random import derive_seed

MAX_SERVED_RANK = 256  # of the kernels

# Gives the dense base weight [d_out, d_in]; a callable, since for a quantized base this means work.
WeightSource = Callable[[], Tensor]


@dataclass(frozen=True)
class ExpertSpec:
    """One expert's shape and settings, fixed for its life. Build it with `make_spec`.

    `scale` is stored and never recomputed from alpha / rank: merging and pruning change the rank
    but must not change the update. `options` are the kind's own, `seed` is unique per module.
    """

    d_in: int
    d_out: int
    rank: int
    alpha: float
    scale: float
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    place: tuple[str, str] = ("", "")  # the block's path, the module's path in it


def make_spec(
    d_in: int,
    d_out: int,
    rank: int,
    alpha: float | None = None,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    path: str = "",
    block: str = "",
) -> ExpertSpec:
    """Build the spec of the expert on module `path` of `block`.   [rsLoRA: arXiv 2312.03732]

    Args:
        alpha: None means rank. The scale is alpha / rank, with `rslora` alpha / sqrt(rank).
        seed, block, path: the adapter's seed, the block's path in the model and the module's in the
            block; hashed together.
    Raises:
        ValueError: d_in, d_out or rank is not positive.
    """
    for name, value in (("d_in", d_in), ("d_out", d_out), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"make_spec: {name} must be a positive integer, got {value!r}")
    alpha = float(rank if alpha is None else alpha)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    seed = derive_seed(seed, f"{block}.{path}" if block else path)
    return ExpertSpec(
        d_in, d_out, rank, alpha, scale, dropout, dict(options or {}), seed, (block, path)
    )


@dataclass
class ExpertWeights:
    """The update of one expert with gate g:  y += g · (scale · B C A x + output ⊙ (y - bias)).

    a: [rank, d_in].  b: [d_out, rank].  Both contiguous.
    output: [d_out] or None. With DoRA's per-row factor c it is c - 1, and b already holds
        diag(c) B. An op therefore takes u = output and v = -output ⊙ bias, and adds u ⊙ y + v.
    """

    a: Tensor
    b: Tensor
    scale: float
    output: Tensor | None = None
    core: Tensor | None = None  # C [rank, rank], of `ExpertKind.served` alone; None: 1


class ExpertKind(ABC):
    """One way to parametrise an expert. Stateless: an instance serves every module.

    A new kind is one file with a subclass, plus one line in `milora.experts.REGISTRY`. A tensor is
    one of three: trained and saved; fixed, that is saved but never trained (it came from the base
    weight or from data, by operations whose bits differ between machines); or frozen, that is made
    again from the seed wherever it is needed, never saved.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # what the kind is, in a few words, for `milora methods`
    defaults: ClassVar[dict[str, Any]] = {}  # the kind's own options
    fixed: ClassVar[frozenset[str]] = frozenset()  # those of `tensors` that are never trained
    has_output: ClassVar[bool] = False  # materialise gives an output vector
    shares_tensors: ClassVar[bool] = False  # `shared` is not empty
    has_products: ClassVar[bool] = True  # materialise computes; False: it hands tensors through

    @abstractmethod
    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        """Names (with "lora_" in them, without ".weight") and shapes of the saved tensors."""

    def shared(self, spec: ExpertSpec) -> dict[str, str]:
        """Those of `tensors` that experts of one adapter have in common: to what, by name.

        Experts with the same answer for a name hold one tensor; the first of them in the model has
        it in the file. Such a tensor has one shape wherever the answer is the same.
        """
        return {}

    @abstractmethod
    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        """Initial values of `tensors(spec)`: float32, on the CPU.

        The update that they give is 0, except where a kind's docstring says otherwise.

        Raises:
            ValueError: the kind needs the base weight and `weight` is None or of another shape.
        """

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `frozen(spec)`."""
        return {}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        """Tensors that follow from the spec: float32, on the CPU, never trained, never saved."""
        return {}

    def checksum(self, spec: ExpertSpec, frozen: dict[str, Tensor] | None = None) -> str | None:
        """Short hash of `frozen(spec)`, None for a kind that has none.

        Saved in an adapter's config, it shows at load time that the tensors came out the same.
        Pass `frozen` when it is at hand, to spare making it again.
        """
        if not self.frozen_shapes(spec):
            return None
        digest = hashlib.sha256()
        for name, tensor in sorted((frozen or self.frozen(spec)).items()):
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def served_rank(self, spec: ExpertSpec) -> int:
        """Rank of the (A, B) that `materialise` gives."""
        return spec.rank

    def check(self, spec: ExpertSpec) -> None:
        """Whether an expert of this kind can be on a module of this shape.

        Raises:
            ValueError: it cannot; the message says why, and what would do.
        """
        if (rank := self.served_rank(spec)) > MAX_SERVED_RANK:
            raise ValueError(
                f"{self.name}: rank {spec.rank} on a {spec.d_in} x {spec.d_out} module makes an "
                f"update of rank {rank}; kernels take at most {MAX_SERVED_RANK}"
            )

    def validate(self, options: dict[str, Any]) -> None:
        """Check the kind's own options.

        Raises:
            ValueError: an unknown option, or a value out of its range.
        """
        if unknown := sorted(set(options) - set(self.defaults)):
            known = ", ".join(self.defaults) or "none"
            raise ValueError(f"{self.name}: unknown options {unknown}; known options: {known}")

    def drawn(self, tensors: dict[str, Tensor], spec: ExpertSpec) -> dict[str, Any]:
        """What holds for one training forward: values that join `tensors` or stand in for them.

        Asked for once per forward, in training mode; its recomputations under activation
        checkpointing get the same.
        """
        return {}

    @abstractmethod
    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        """A [served_rank, d_in] and B [d_out, served_rank], from `tensors` and `frozen` in one."""

    def materialise(
        self,
        tensors: dict[str, Tensor],
        frozen: dict[str, Tensor],
        spec: ExpertSpec,
        weight: WeightSource | None = None,
    ) -> ExpertWeights:
        """The expert's current weights, differentiable with respect to `tensors`.

        Everything lies on one device. `weight` is called under no_grad, by kinds that need it.

        Raises:
            ValueError: the kind needs the base weight and `weight` is None or of another shape.
        """
        a, b = self.factors({**frozen, **tensors}, spec)
        return ExpertWeights(a, b, spec.scale)

    def has_fixed_factors(self, spec: ExpertSpec) -> bool:
        """Whether `served` gives an A and a B that are never trained, around a core that is: an
        `AdapterPool` then keeps them once for all adapters that have the same."""
        return False

    def served(
        self,
        tensors: dict[str, Tensor],
        frozen: dict[str, Tensor],
        spec: ExpertSpec,
        weight: WeightSource | None = None,
    ) -> ExpertWeights:
        """The expert as inference kernels read it: as `materialise`, or with its core apart."""
        return self.materialise(tensors, frozen, spec, weight)

    def option(self, spec: ExpertSpec, name: str) -> Any:
        return spec.options.get(name, self.defaults[name])

    def base_weight(self, spec: ExpertSpec, weight: WeightSource | None) -> Tensor:
        """weight() under no_grad, with its shape checked."""
        if weight is None:
            raise ValueError(f"{self.name}: weight must give the base weight, got None")
        with torch.no_grad():
            dense = weight()
        if tuple(dense.shape) != (spec.d_out, spec.d_in):
            raise ValueError(
                f"{self.name}: weight must be [d_out, d_in] = [{spec.d_out}, {spec.d_in}], "
                f"got {list(dense.shape)}"
            )
        return dense


def kaiming_uniform(num_rows: int, fan_in: int, seed: int) -> Tensor:
    """[num_rows, fan_in] float32, kaiming-uniform with a = √5, as `nn.Linear` and LoRA start.

    The bound √(6 / ((1 + a²) fan_in)) is then 1 / √fan_in.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    bound = 1.0 / math.sqrt(fan_in)
    values = torch.empty(num_rows, fan_in, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=generator)


def seeded(values: Tensor, bound: float) -> Tensor:
    """float32 numbers, uniform on (-bound, bound), of values on (-1, 1) from `random.uniform`.

    The float64 product is correctly rounded by IEEE 754, hence the same everywhere.
    """
    return values.mul_(bound).float()


def check_positive(kind: str, options: dict[str, Any], *names: str, most: int = 1 << 62) -> None:
    """Raises: ValueError: one of the options `names` is there and no integer in [1, most]."""
    for name in names:
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{kind}: {name} must be a positive integer, got {value!r}")
        if value > most:
            raise ValueError(f"{kind}: {name} must be at most {most}, got {value}")


def check_choice(kind: str, options: dict[str, Any], name: str, choices: tuple[Any, ...]) -> None:
    """Raises: ValueError: the option `name` is there and none of `choices`."""
    if name in options and options[name] not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{kind}: {name} must be one of {listed}, got {options[name]!r}")


def zeros(*shape: int) -> Tensor:
    """float32 zeros on the CPU, whatever dtype and device are torch's defaults at the moment.

    While a model is being loaded the defaults are its own: bf16, or the meta device.
    """
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
