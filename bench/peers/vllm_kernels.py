"""vLLM's dense LoRA: a split-K shrink into float32 with atomics, then an expand (Triton)."""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor

from peers import Peer, PeerAbsent, stubs

FILES = ("utils", "kernel_utils", "lora_kernel_metadata", "lora_shrink_op", "lora_expand_op")
PREFIX = "vllm.lora.ops.triton_ops"


class Switches:
    """vLLM's environment variables at their defaults."""

    VLLM_BATCH_INVARIANT = False
    VLLM_TUNED_CONFIG_FOLDER = None
    VLLM_LORA_ENABLE_DUAL_STREAM = False
    VLLM_LORA_DISABLE_PDL = False


class Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def is_device_capability(self, number: int) -> bool:
        return stubs.capability() == number

    def has_device_capability(self, number: int) -> bool:
        return stubs.capability() >= number


def no_custom_op(**_: object) -> None:
    raise AttributeError("no custom ops")  # the files then keep their plain Python functions


def on_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@functools.cache
def kernels() -> dict[str, types.ModuleType]:
    folder = stubs.kernel_folder("vllm")
    import triton
    import triton.language

    stubs.module("vllm", envs=Switches())
    for name in ("vllm.lora", "vllm.lora.ops", PREFIX, "vllm.utils"):
        stubs.module(name)
    stubs.module("vllm.logger", init_logger=lambda name: stubs.Silent())
    stubs.module("vllm.platforms", current_platform=Platform())
    stubs.module("vllm.triton_utils", tl=triton.language, triton=triton)
    stubs.module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    stubs.module(
        "vllm.utils.torch_utils", direct_register_custom_op=no_custom_op, async_tensor_h2d=on_device
    )
    path = folder / "lora" / "ops" / "triton_ops"
    return {name: stubs.file(f"{PREFIX}.{name}", path / f"{name}.py") for name in FILES}


class Vllm(Peer):
    def __init__(self, adapter_of: Tensor, ranks: list[int], *, decode: bool):
        super().__init__(adapter_of, ranks, decode=decode)
        files = kernels()
        self.shrink = files["lora_shrink_op"].lora_shrink
        self.expand = files["lora_expand_op"].lora_expand
        # Their tables of pointers are kept by address, which the next problem's tensors may get.
        files["utils"]._LORA_A_PTR_DICT.clear()
        files["utils"]._LORA_B_PTR_DICT.clear()
        meta = files["lora_kernel_metadata"].LoRAKernelMeta
        self.meta = meta.make(self.num_adapters, len(adapter_of), adapter_of.device)

    def pack(self, a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if a[0].dtype not in (torch.bfloat16, torch.float16):
            raise PeerAbsent(f"vLLM has bfloat16 and float16 adapters only, not {a[0].dtype}")
        return a, b

    def prepare(self) -> None:
        self.meta.prepare_tensors(self.adapter_of)

    def update(self, y: Tensor, x: Tensor, weights: tuple[list[Tensor], list[Tensor]]) -> None:
        a, b = weights
        rows = len(x)
        # As the engine does: a fresh float32 buffer, which the shrink fills with zeros first.
        hidden = torch.empty(len(a), rows, self.rank, dtype=torch.float32, device=x.device)
        arguments = self.meta.meta_args(rows, False)
        self.shrink(x, a, hidden, *arguments, 1.0)
        self.expand(hidden, b, y, *arguments, offset_start=0, add_inputs=True)
