"""Weights of attached adapters in the packed form that inference reads.

The adapters' parameters stay float32 masters; a pack is a copy of them in the dtype that a module
computes with. Registered adapters, of which there may be thousands, live in an `AdapterPool`
instead.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from milora.packing import expert_runs
from milora.tables import EXPERT_PARTS, BlockTables

if TYPE_CHECKING:
    from milora.runtime import Runtime


# Around what two threads could do to one `Packs`. Not an attribute: models are copied and pickled.
_CHANGES = threading.Lock()


class Packs:
    """One pool per block and dtype, with a slot for each adapter that inference has named.

    A slot once given stays: forwards of other threads may be reading by it. To forget everything,
    the runtime takes a new object, and running forwards end with the one that they began with.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.names: list[str] = []
        # Of a block and dtype: the weights' versions, the pack, and the GPU streams that read it.
        self._blocks: dict[tuple[int, torch.dtype], tuple[tuple, BlockTables, set[int]]] = {}

    def slots(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The slots of these adapters; a name that is new to inference gets the next one."""
        if any(name not in self.names for name in names):
            with _CHANGES:
                self.names += [name for name in dict.fromkeys(names) if name not in self.names]
                self._blocks.clear()
        return tuple(self.names.index(name) for name in names)

    def dtype(self, block: int, column: int, wanted: torch.dtype) -> torch.dtype:
        """The dtype in which an expert is kept for a module that computes in `wanted`."""
        return wanted

    def block(self, index: int, dtype: torch.dtype) -> BlockTables:
        entry = self._blocks.get((index, dtype))
        while entry is None:
            names = tuple(self.names)
            built = self._build(index, dtype, names)
            with _CHANGES:
                if len(self.names) == len(names):  # else it lacks an adapter of another thread's
                    entry = self._blocks[index, dtype] = (*built, set())
        _, tables, streams = entry
        if tables.pool.is_cuda and not torch.compiler.is_compiling():
            _note_stream(tables, streams)
        return tables

    def drop_stale(self) -> None:
        """Forget packs of weights that have changed; asked for at the start of a prefill."""
        for key, (versions, *_) in list(self._blocks.items()):
            if versions != self._versions(key[0], self.names):
                self._blocks.pop(key, None)

    def _versions(self, index: int, names: Sequence[str]) -> tuple:
        return tuple(
            (tensor.data_ptr(), tensor._version)
            for linear in self.runtime.linears[index]
            for name in names
            if name in linear.specs
            for tensor in linear.tensors(name).values()
        )

    @torch.compiler.disable
    @torch.no_grad()
    def _build(
        self, index: int, dtype: torch.dtype, names: tuple[str, ...]
    ) -> tuple[tuple, BlockTables]:
        versions = self._versions(index, names)
        linears = self.runtime.linears[index]
        shape = (len(names), len(self.runtime.blocks[index].experts))
        offsets = torch.full((*shape, len(EXPERT_PARTS)), -1, dtype=torch.int64)
        ranks = torch.zeros(shape, dtype=torch.int32)
        scales = torch.zeros(shape, dtype=torch.float32)
        runs: list[Tensor] = []
        end = 0
        for slot, name in enumerate(names):
            for linear in linears:
                if name not in linear.specs:
                    continue
                expert = linear.served(name)
                bias = getattr(linear.base_layer, "bias", None)
                for part, run in enumerate(expert_runs(expert, bias, dtype)):
                    if run is not None:
                        offsets[slot, linear.column, part] = end
                        runs.append(run)
                        end += run.numel()
                ranks[slot, linear.column] = expert.a.shape[0]
                scales[slot, linear.column] = expert.scale
        device = linears[0].device
        pool = torch.cat(runs) if runs else torch.empty(0, dtype=torch.uint8, device=device)
        tables = (table.to(device) for table in (offsets, ranks, scales))
        return versions, BlockTables(pool, *tables)


def _note_stream(tables: BlockTables, streams: set[int]) -> None:
    """Tell torch's allocator that the current stream reads a pack: else the memory of one that is
    forgotten would go to the stream that made it, while kernels of other threads still read it."""
    stream = torch._C._cuda_getCurrentRawStream(tables.pool.get_device())  # asked at each call
    if stream not in streams:
        streams.add(stream)
        for tensor in (tables.pool, tables.offsets, tables.ranks, tables.scales):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
