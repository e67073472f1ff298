"""SGLang's csgmv LoRA, its default backend: chunks of rows of one adapter, shrink, expand (Triton).

The backend's own code sorts the rows and cuts the chunks (`srt/lora/backend/chunked_backend.py`, on
the CPU, as in the engine), and its kernels run with the tiles of its tuned tables where these have
the shape. Two options are set as its help and its comments advise for speed: the shrink's depth is
split, and a prefill's chunks may have 128 rows; those of a decode keep the default, 16.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from peers import Peer, stubs
from peers.sglang_kernels import KERNELS, PACKAGES, stacked

DENSE = f"{KERNELS}.dense"
BACKEND = "sglang.srt.lora.backend"
MAX_CHUNK = {"decode": 16, "prefill": 128}


class Switch:
    def __init__(self, value: bool):
        self.value = value

    def get(self) -> bool:
        return self.value


class Backend:
    """What ChunkedSgmvLoRABackend inherits, as far as prepare_lora_batch needs it."""

    def __init__(self, max_loras: int, device: torch.device):
        self.max_loras_per_batch, self.device = max_loras, device

    def _add_moe_lora_info(self, batch: Batch, info: object) -> object:
        return info


class Batch:
    """The engine's ForwardBatch: requests of so many tokens each."""

    def __init__(self, lengths: list[int], *, decode: bool):
        self.lengths = lengths
        self.batch_size = len(lengths)
        self.forward_mode = types.SimpleNamespace(is_decode=lambda: decode)


class Unpinned:
    """torch for a machine that has no GPU, and so nothing to pin memory for."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("arange", "empty", "tensor", "zeros"):
            return found
        return lambda *args, pin_memory=False, **options: found(*args, **options)


def no_kernel(*_: object, **__: object) -> None:
    raise NotImplementedError("not part of the bench")


@functools.cache
def backend() -> types.ModuleType:
    folder = stubs.kernel_folder("sglang")
    for name in (*PACKAGES, DENSE, BACKEND):
        stubs.module(name)
    stubs.module(
        "sglang.srt.utils",
        cached_triton_kernel=lambda key: lambda kernel: kernel,  # a graph has no launches to save
        get_device_name=lambda: torch.cuda.get_device_name() if stubs.capability() else "cpu",
    )
    stubs.module(
        "sglang.srt.environ",
        envs=types.SimpleNamespace(
            SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=Switch(True),
            SGLANG_ENABLE_DETERMINISTIC_INFERENCE=Switch(False),
        ),
    )
    stubs.module(
        "sglang.srt.lora.utils",
        LoRABatchInfo=types.SimpleNamespace,
        generate_sequence_lengths=lambda batch, device=None: torch.tensor(
            batch.lengths, dtype=torch.int32, device="cpu"
        ),
        get_batch_token_counts=lambda batch: (sum(batch.lengths), max(batch.lengths)),
        get_lm_head_pruned_lens=lambda batch: None,
        merge_and_chunk_segments=no_kernel,
    )
    stubs.module(f"{BACKEND}.base_backend", BaseLoRABackend=Backend)
    stubs.module("sglang.srt.model_executor.forward_batch_info", ForwardBatch=Batch)
    options = types.SimpleNamespace(max_lora_chunk_size=None)  # `Csgmv` sets it
    stubs.module("sglang.srt.runtime_context", get_lora=lambda: options)
    stubs.module("sglang.srt.server_args", ServerArgs=object)
    stubs.module(f"{DENSE}.chunked_embedding_lora_a", chunked_embedding_lora_a_forward=no_kernel)
    path = folder / "kernels" / "ops" / "lora" / "dense"
    for name in ("lora_tuning_config", "chunked_sgmv_shrink", "chunked_sgmv_expand"):
        stubs.file(f"{DENSE}.{name}", path / f"{name}.py")
    loaded = stubs.file(
        f"{BACKEND}.chunked_backend", folder / "srt" / "lora" / "backend" / "chunked_backend.py"
    )
    if not stubs.capability():
        loaded.torch = Unpinned()
    return loaded


class Csgmv(Peer):
    """A row without an adapter has a slot of rank 0, as in the engine: its blocks leave at once."""

    def __init__(self, adapter_of: Tensor, ranks: list[int], *, decode: bool):
        super().__init__(adapter_of, ranks, decode=decode)
        slots = torch.where(adapter_of < 0, self.num_adapters, adapter_of).cpu()
        lengths = torch.ones_like(slots)
        if not decode:  # runs of rows take the place of the engine's requests
            slots, lengths = torch.unique_consecutive(slots, return_counts=True)
        self.slots = slots.tolist()
        self.batch = Batch(lengths.tolist(), decode=decode)
        made = backend().ChunkedSgmvLoRABackend
        self.engine = made(self.num_adapters + 1, adapter_of.device, None)
        self.engine.max_chunk_size = MAX_CHUNK["decode" if decode else "prefill"]
        if decode:
            self.engine.init_decode_cuda_graph_batch_info(len(self.slots), 1)

    def pack(self, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor, dict]:
        ends = torch.tensor([0, *(b_s.shape[1] for b_s in b)]).cumsum(0)
        options = {
            "output_offset": ends.to(torch.int32).to(self.adapter_of.device),
            "output_offset_cpu": ends,
            "max_qkv_out_dim": max(b_s.shape[1] for b_s in b),
            "n_slices": len(b),
        }
        return stacked(a, self.ranks), torch.cat(b, dim=1), options

    def prepare(self) -> None:
        ranks = [*self.ranks, 0]
        self.engine.prepare_lora_batch(
            self.batch, self.slots, ranks, [1.0] * len(ranks), use_cuda_graph=self.decode
        )

    def update(self, y: Tensor, x: Tensor, weights: tuple[Tensor, Tensor, dict]) -> None:
        a, b, options = weights
        self.engine.run_qkv_lora(x, a, b, base_output=y, **options)
