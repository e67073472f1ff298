"""`AdapterPool`: thousands of registered adapters, some of them resident, in fixed memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from milora.attach import close_runtime, open_runtime
from milora.config import MiLoRAConfig
from milora.errors import PoolError
from milora.pool.entry import Entry, PoolStats
from milora.pool.host import HostBlobs
from milora.pool.layout import Layouts, compute_dtype
from milora.pool.memory import PoolMemory
from milora.pool.prefetch import Prefetcher
from milora.pool.residency import Residency
from milora.pool.sources import FolderSource, TensorSource
from milora.tables import BlockTables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Lease:
    """Adapters that stay in their slots until `release`, which may be called more than once.

    A lease that is forgotten ends when it is garbage collected. Usable as a context manager.

    Attributes:
        slots: rows in the pool's tables, in the order of the names that were acquired.
    """

    def __init__(self, residency: Residency, entries: list[Entry]):
        self.slots = tuple(entry.slot for entry in entries)
        self._residency = residency
        self._entries: list[Entry] = entries

    def release(self) -> None:
        entries, self._entries = self._entries, []
        if entries:
            self._residency.done(entries, lease=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_entries", None):
            self._residency.lose(self._entries)


class AdapterPool:
    """Registered adapters for inference on one frozen model; each row of a batch names its own.

    All memory is allocated here and now: `register` costs a few kilobytes, `load` none on the
    device. Adapters that are named in `adapter_names` and not resident are loaded for the call; the
    least recently used ones that are neither pinned nor in use make room. Every method may be
    called from any thread.

    Kinds that train nothing but a core between A and B (LoRA-XS, LoRA-SB, LoLDU) share A and B with
    every adapter that has the same bytes there: in both budgets these count once, beside a core for
    each adapter. The first use of such an adapter reads it before it is loaded, to learn what it
    can share.

    Args:
        model: a model that `milora.attach` takes, on one device. Adapters that are attached to it
            stay usable beside the pool, but not in one batch with it.
        device_bytes: for everything the pool has on the model's device: weights, tables.
        host_bytes: for adapters packed in host memory on their way to the device, kept there while
            nothing else needs the room. Reading a folder takes one expert's tensors beside it.
        max_resident: slots, i.e. how many adapters can be resident at a time.
        target_modules: modules that adapters may have experts on, as in `MiLoRAConfig`.
    Raises:
        ValueError: the model has a pool already, a budget is too small, or the model lies on
            several devices or computes in a dtype that experts do not have.
        ImportError: milora's pybind11 module was not built for this Python.

    Attributes:
        tables: per block, what kernels read. The tensors are never replaced.
        dtypes: per block and column, the dtype of A and B.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device_bytes: int,
        host_bytes: int,
        max_resident: int = 256,
        target_modules: str | list[str] = "all-linear",
    ):
        for name, value in (
            ("device_bytes", device_bytes),
            ("host_bytes", host_bytes),
            ("max_resident", max_resident),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"AdapterPool: {name} must be a positive integer, got {value!r}")
        self._runtime = open_runtime(model, target_modules)
        try:
            layouts = Layouts(self._runtime)
            device = _only_device(layouts)
            # Made in inference mode they could not be changed outside of it.
            with torch.inference_mode(False):
                memory = PoolMemory(device_bytes, max_resident, layouts.widths, device)
            host = HostBlobs(host_bytes)
            self._residency = Residency(memory, host, layouts, max_resident)
            self._prefetcher = Prefetcher(self._residency)
            self.tables: list[BlockTables] = memory.tables
            self.dtypes: list[list[torch.dtype]] = layouts.dtypes
        except BaseException:
            close_runtime(self._runtime)
            raise
        self._layouts = layouts
        self._first = next(linear for block in layouts.linears for linear in block.values())
        self._first_dtype = compute_dtype(self._first, model)
        self._runtime.pool = self

    # ---- registering ----------------------------------------------------------------------------

    def register(
        self,
        name: str,
        folder: str | os.PathLike | None = None,
        *,
        config: MiLoRAConfig | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        attached: str | None = None,
    ) -> None:
        """Make an adapter known under `name`, from exactly one of three sources.

        Args:
            folder: where `milora.save` or PEFT saved it. Its config is read now, and its weights
                whenever it is loaded, with all the checks of `milora.load`.
            config, tensors: an adapter in memory; keys as in the file. It is packed now, and kept
                in host memory under the host budget.
            attached: an adapter that is attached to the model, as it is now; kept as above.
        Raises:
            ValueError: the name is empty, taken, or "__base__"; or no or several sources.
            FileNotFoundError: `folder` holds no adapter.
            milora.AdapterError: the adapter does not fit the model.
            milora.PoolError: it is larger than a budget.
        """
        self._residency.check_open()
        if not isinstance(name, str) or name in ("", "__base__"):
            raise ValueError(
                f"AdapterPool.register: name must be a non-empty string other than '__base__', got "
                f"{name!r}"
            )
        if name in self or name in self._runtime.configs:
            raise ValueError(f"AdapterPool.register: there is an adapter {name!r} already")
        in_memory = config is not None or tensors is not None
        given = [folder is not None, in_memory, attached is not None]
        if sum(given) != 1 or (config is None) != (tensors is None):
            raise ValueError(
                "AdapterPool.register: give a folder, or config and tensors, or attached"
            )
        if folder is not None:
            source = FolderSource(self._layouts, folder)
        else:
            if attached is not None:
                config, tensors = self._attached(attached)
            source = TensorSource(self._layouts, name, config, tensors)
        layout = self._layouts.of(source.config)
        if folder is not None:
            self._residency.add(Entry(name, source.config, layout, source))
        else:
            self._residency.add(Entry(name, source.config, layout, None), source)

    def unregister(self, name: str) -> None:
        """Forget an adapter. Raises: ValueError: unknown; milora.PoolError: in use or pinned."""
        self._residency.remove(name)

    def _attached(self, name: str) -> tuple[MiLoRAConfig, dict[str, Tensor]]:
        from milora.adapters import adapter_parameters

        if name not in self._runtime.configs:
            raise ValueError(
                f"AdapterPool.register: no adapter {name!r} is attached; there are "
                f"{sorted(self._runtime.configs)}"
            )
        return self._runtime.configs[name], adapter_parameters(self._runtime.model, name)

    def __contains__(self, name: object) -> bool:
        return name in self._residency.entries

    def __len__(self) -> int:
        return len(self._residency.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._residency.entries))

    def entry(self, name: str) -> Entry:
        """What is known of a registered adapter: its `config`, `columns` and state; to be read."""
        self._residency.check_open()
        return self._residency.known(name)

    # ---- residency ------------------------------------------------------------------------------

    def load(self, name: str) -> None:
        """Make an adapter resident; it may be evicted again.

        Raises:
            ValueError: unknown.
            milora.PoolError: no room beside the adapters that are in use or pinned.
            milora.AdapterError, FileNotFoundError: its files are damaged or gone; the pool is as it
                was. So do the errors of an earlier `prefetch` come out.
        """
        self._check_model()
        entries = self._residency.use([name], lease=False)
        self._residency.done(entries, lease=False)

    def prefetch(self, name: str) -> None:
        """Load an adapter in a background thread. What goes wrong there is raised by the next
        `load` or `acquire` of it, want of room excepted, which may have ended by then."""
        self._check_model()
        self._residency.known(name)
        self._prefetcher.add(name)

    def pin(self, name: str) -> None:
        """Load an adapter and keep it resident until `unpin`. Raises: as `load`."""
        self._check_model()
        entries = self._residency.use([name], lease=False)
        with self._residency.changed:
            entries[0].is_pinned = True
        self._residency.done(entries, lease=False)

    def unpin(self, name: str) -> None:
        """Let a pinned adapter be evicted again; one that is not pinned is no error."""
        with self._residency.changed:
            self._residency.check_open()
            self._residency.known(name).is_pinned = False
            self._residency.changed.notify_all()

    def evict(self, name: str) -> None:
        """Take an adapter out of the pool; one that is not resident is no error.

        Raises:
            ValueError: unknown.
            milora.PoolError: it is in use or pinned.
        """
        with self._residency.changed:
            entry = self._residency.idle(name, "evict")
            if entry.slot is not None:
                self._residency.space.evict(entry)

    def compact(self) -> None:
        """Close the gaps between resident adapters, once the running forwards have ended.

        Loads do it by themselves when they must; this does it at a time of the caller's choice.
        Raises: milora.PoolError: this thread is inside a forward.
        """
        self._residency.compact()

    def is_resident(self, name: str) -> bool:
        return self.entry(name).slot is not None

    def statistics(self) -> PoolStats:
        self._residency.check_open()
        return self._residency.stats()

    # ---- what the runtime calls -----------------------------------------------------------------

    def acquire(self, names: tuple[str, ...] | list[str]) -> Lease:
        """Make distinct adapters resident and keep them so until the lease is released.

        All or nothing, and before anything is loaded or evicted it is clear that they fit. Where
        host memory holds them all at once, all are read and checked before the first is loaded.

        On CUDA the current stream waits for what was loaded, and no other: acquire on the stream
        that will read. Forwards of the model do all of this themselves, but the replay of a
        captured CUDA graph does nothing: hold a lease of the adapters that it reads, and put each
        replay between `begin_forward` and `end_forward`, or a later load may overwrite them.
        Raises: as `load`.
        """
        if len(set(names)) != len(names):
            raise ValueError(f"AdapterPool.acquire: names must be distinct, got {list(names)}")
        self._check_model()
        entries = self._residency.use(names, lease=True)
        for entry in entries:
            self._residency.memory.copies.wait(entry.event)
        return Lease(self._residency, entries)

    def begin_forward(self) -> None:
        """Until `end_forward`, in this thread, no byte of an adapter in use moves."""
        self._residency.gate.begin()
        try:
            self._residency.check_open()
        except PoolError:
            self._residency.gate.end()
            raise

    def end_forward(self) -> None:
        self._residency.memory.copies.fence()
        self._residency.gate.end()

    @property
    def epoch(self) -> int:
        """Grows whenever an adapter's slot changes."""
        return self._residency.space.epoch

    def _check_model(self) -> None:
        """Refuse a model that was moved or cast: its adapters' bytes would be misread."""
        self._residency.check_open()
        linear, dtype = self._first, self._first_dtype
        if linear.device != self._residency.memory.device:
            raise PoolError(
                f"AdapterPool: the model was moved to {linear.device} and its pool lies on "
                f"{self._residency.memory.device}; close the pool and make a new one"
            )
        now = compute_dtype(linear, self._runtime.model)
        if now != dtype:
            raise PoolError(
                f"AdapterPool: the model computes in {now} and its pool was made for {dtype}; "
                "close the pool and make a new one"
            )

    # ---- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Take the pool off the model and give its memory back; from then on every method raises.

        Waits for running loads and forwards. `milora.detach` calls it. A second call does nothing.
        Raises: milora.PoolError: this thread is inside a forward.
        """
        if self._residency.close(self._prefetcher.stop):
            self.tables = []
            close_runtime(self._runtime)

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model with an AdapterPool cannot be copied or pickled; close the pool first"
        )


def _only_device(layouts: Layouts) -> torch.device:
    linears = [linear for block in layouts.linears for linear in block.values()]
    devices = {linear.device for linear in linears}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            "AdapterPool: the model must lie on one CPU or CUDA device, got "
            f"{', '.join(sorted(map(str, devices))) or 'no linear modules'}"
        )
    if wrong := {dtype for block in layouts.dtypes for dtype in block} - set(DTYPES):
        raise ValueError(
            "AdapterPool: modules must compute in float32, bfloat16 or float16, got "
            f"{', '.join(sorted(map(str, wrong)))}"
        )
    return devices.pop()
