"""The LoRA kernels of other engines, to be timed beside ours.

`load(name)` gives a `Peer` class or raises `PeerAbsent`, which says why there is none: a bench
reports that line, it never leaves a peer out in silence. Kernel files of the engines are not part
of this repository: `python bench/peers/fetch.py` puts them into `bench/peers/unpacked/`.

    peer = load("vllm")(adapter_of, ranks, decode=True)
    weights = peer.pack(a, b)       # the engine's own layout, once per layer
    peer.prepare()                  # its metadata, once per step: timed apart
    peer.update(y, x, weights)      # its kernels
"""

from __future__ import annotations

import abc
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # fetch.py runs on machines without torch
    from torch import Tensor

UNPACKED = Path(__file__).parent / "unpacked"
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}  # whose files the loaders know
# name -> (module of this folder, class)
PEERS = {
    "vllm": ("peers.vllm_kernels", "Vllm"),
    "sglang": ("peers.sglang_kernels", "Sglang"),
    "sglang_csgmv": ("peers.sglang_csgmv", "Csgmv"),
    "grouped_mm": ("peers.torch_grouped", "GroupedMm"),
}


class PeerAbsent(Exception):
    """A peer cannot run here; the message is the reason."""


class Peer(abc.ABC):
    """One engine's update of S linear modules that read the same x, for one batch of rows.

    Args:
        adapter_of: [num_rows] int32 on the device, adapter of each row; -1 = none.
        ranks: of each adapter that the engine has loaded; the highest is that of its slots.
        decode: whether each row is a request's one new token; else rows are prompts' tokens.

    Raises: PeerAbsent, if the engine has no kernel for what is asked.
    """

    def __init__(self, adapter_of: Tensor, ranks: list[int], *, decode: bool):
        self.adapter_of = adapter_of
        self.ranks = ranks
        self.num_adapters = len(ranks)
        self.rank = max(ranks)
        self.decode = decode

    @abc.abstractmethod
    def pack(self, a: list[Tensor], b: list[Tensor]) -> Any:
        """The weights as the engine keeps them.

        Args, with zeros beyond an adapter's own rank:
            a: S of [num_adapters, rank, d_in].
            b: S of [num_adapters, d_out_s, rank].
        """

    @abc.abstractmethod
    def prepare(self) -> None:
        """The batch's metadata. Must have run before `update`."""

    @abc.abstractmethod
    def update(self, y: Tensor, x: Tensor, weights: Any) -> None:
        """y[:, slice s] += B_s (A_s x).

        Args:
            y: [num_rows, sum of d_out_s], contiguous, changed in place.
            x: [num_rows, d_in], contiguous.
        """


def load(name: str) -> type[Peer]:
    """The peer's class.

    Raises: PeerAbsent; KeyError if no peer is called so.
    """
    module, cls = PEERS[name]
    return getattr(importlib.import_module(module), cls)


def reason(error: BaseException) -> str:
    """One line of an error, for a report."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
