"""EVA: start A from the principal components of a module's inputs.   [arXiv 2410.07170]

A = the leading right singular vectors of the centred inputs x, over the tokens that have labels;
B = 0. Ranks follow the explained variance: of the first rho · rank components of every module the
ones with the largest shares stay, as many as there were ranks; a module may end with none. alpha
moves with the rank so that the scale stays. Modules that read the same x share one decomposition.

Source: PEFT's port and the authors' README. Where they leave it open: components are those of an
incremental PCA [Ross et al., IJCV 2008], and a module's is done when every component turned by
less than `tau` in cosine from one batch to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from milora.attach import attach
from milora.blocks import find_blocks, linear_shape, spec_of
from milora.config import MAX_RANK, MiLoRAConfig
from milora.forwards import disabled
from milora.runtime import runtime_of

KINDS = ("lora", "dora")  # those whose lora_A is the module's own


def attach_eva(
    model: nn.Module,
    config: MiLoRAConfig,
    batches: Iterable[dict[str, Any]],
    adapter_name: str = "default",
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    trainable: bool = True,
) -> MiLoRAConfig:
    """`milora.attach` with EVA's start and ranks.

    Args:
        config: expert lora or dora; its ranks are the budget.
        batches: for the bare model; tokens with label -100 do not count, without labels those
            that `attention_mask` leaves out.
        rho: at most rho · rank components a module; 1 keeps every rank as it is.
        tau: cosine at which components count as settled; the batches after that are not read.
        whiten: divide each component by its standard deviation.
    Returns: the configuration that was attached, with the new ranks as patterns.
    Raises:
        ValueError: as `attach`; another kind, a rho below 1, or no token to learn from.
    """
    if config.expert not in KINDS:
        raise ValueError(f"attach_eva: expert must be lora or dora, got {config.expert!r}")
    if not rho >= 1:
        raise ValueError(f"attach_eva: rho must be at least 1, got {rho!r}")
    places = {
        f"{block.path}.{path}": spec_of(
            config, block.path, path, linear_shape(block.module.get_submodule(path))
        )
        for block in find_blocks(model, config)
        for path in block.experts
    }
    wanted = {
        path: min(math.ceil(rho * spec.rank), MAX_RANK, spec.d_in) for path, spec in places.items()
    }
    found = _components(model, wanted, batches, tau)
    if rho > 1:
        budget = sum(spec.rank for spec in places.values())
        ranks = redistribute({path: pca.ratios for path, pca in found.items()}, budget)
    else:
        ranks = {path: spec.rank for path, spec in places.items()}
    kept = {path: rank for path, rank in ranks.items() if rank > 0}
    divisor = math.sqrt if config.rslora else float
    changed = {
        "target_modules": list(kept),
        "rank_pattern": kept,
        "alpha_pattern": {path: places[path].scale * divisor(rank) for path, rank in kept.items()},
    }
    config = MiLoRAConfig.from_dict({**config.to_dict(), **changed})
    attach(model, config, adapter_name, trainable=trainable)
    for path, rank in kept.items():
        a = found[path].components[:rank]
        if whiten:
            deviation = found[path].deviations[:rank, None]
            a = a / deviation.where(deviation > 0, 1.0)
        with torch.no_grad():
            target = model.get_submodule(path).tensors(adapter_name)["lora_A"]
            target[: len(a)].copy_(a)  # of a rank above d_in, the rest stays LoRA's start
    return config


def redistribute(ratios: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks by the modules' paths: the `budget` largest shares of explained variance win.

    Args:
        ratios: [candidates] each, in falling order.
    """
    flat = torch.cat(list(ratios.values()))
    owners = [path for path, values in ratios.items() for _ in values]
    order = torch.sort(flat, descending=True, stable=True).indices[:budget]
    ranks = dict.fromkeys(ratios, 0)
    for index in order.tolist():
        ranks[owners[index]] += 1
    return ranks


class IncrementalPCA:
    """The first `count` principal components of rows that come in batches.

    Exact as long as `count` is the full rank; otherwise what a batch drops is lost.

    Attributes:
        components: [at most count, d].  ratios: shares of the variance.  deviations: standard
            deviations along the components.
    """

    def __init__(self, count: int):
        self.count = count
        self.seen = 0
        self.turned = math.inf  # 1 - cosine of the component that turned most, at the last update

    def update(self, rows: Tensor) -> None:
        """Take in rows [n, d]; in float64 where they are float64, else in float32."""
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        parts = [rows - mean]
        total = parts[0].square().sum()
        if self.seen:
            factor = self.seen * len(rows) / (self.seen + len(rows))
            shift = mean - self._mean
            parts = [self._scaled, parts[0], math.sqrt(factor) * shift[None]]
            total = total + self._total + factor * shift.square().sum()
            mean = self._mean + shift * (len(rows) / (self.seen + len(rows)))
        _, s, vt = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        s, vt = s[: self.count], vt[: self.count]
        # Signs are free: the entry of largest magnitude of each component is positive.
        vt = vt * vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
        if self.seen and len(vt) == len(self.components):
            self.turned = float((1 - (vt * self.components).sum(1).abs()).max())
        self.components, self._scaled, self._mean, self._total = vt, s[:, None] * vt, mean, total
        self.seen += len(rows)
        self.ratios = (s.square() / total.clamp(min=torch.finfo(s.dtype).tiny)).cpu()
        self.deviations = s / math.sqrt(max(self.seen - 1, 1))


@torch.no_grad()
def _components(
    model: nn.Module, wanted: dict[str, int], batches: Iterable[dict[str, Any]], tau: float
) -> dict[str, IncrementalPCA]:
    """Components of the inputs of the modules at the paths `wanted`, so many of each."""
    found = {path: IncrementalPCA(count) for path, count in wanted.items()}
    bare = nullcontext() if runtime_of(model, required=False) is None else disabled(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    inputs = _Inputs(found)
    try:
        with bare, inputs.watch(model):
            for batch in batches:
                batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                inputs.start(batch)
                model(**batch)
                if all(1 - pca.turned > tau for pca in found.values()):
                    break
    finally:
        model.train(was_training)
    if any(pca.seen == 0 for pca in found.values()):
        missing = next(path for path, pca in found.items() if pca.seen == 0)
        raise ValueError(f"attach_eva: no token reached {missing}; give batches with labels")
    return found


class _Inputs:
    """Feeds the inputs of modules to their PCAs; the modules that read one x share one PCA."""

    def __init__(self, found: dict[str, IncrementalPCA]):
        self.found = found
        self._counts: Tensor | None = None
        self._last: tuple[Tensor | None, str] = (None, "")

    def start(self, batch: dict[str, Any]) -> None:
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        self._counts = mask.bool().flatten() if mask is not None else None
        if labels is not None:
            self._counts = (labels != -100).flatten()
        self._last = (None, "")

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        handles = [
            model.get_submodule(path).register_forward_pre_hook(self._hook(path))
            for path in self.found
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, (last, leader) = args[0], self._last
            mine = self.found[path]
            if x is last and self.found[leader].count == mine.count:
                self.found[path] = self.found[leader]
                return
            if x is not last:
                self._last = (x, path)
            rows = x.reshape(-1, x.shape[-1])
            if self._counts is not None and len(rows) != len(self._counts):
                raise ValueError(
                    f"attach_eva: {path} reads {len(rows)} tokens where the batch has "
                    f"{len(self._counts)}; leave it out of target_modules"
                )
            mine.update(rows if self._counts is None else rows[self._counts])

        return hook
