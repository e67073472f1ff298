"""The model and the adapters of bench_multitenant.py, before any provider has its own form of them.

The model is a Llama with random weights; all providers share its tensors. An adapter is a pair A, B
on each of the seven linear modules of every block. What a case computes is said by its gates: one
number per block, row of the batch and module.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Shape:
    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    intermediate: int = 2816
    vocab: int = 8192

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "1024,8,16,2816,8192": hidden, layers, heads, intermediate, vocab."""
        return cls(*(int(part) for part in text.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, vars(self).values()))

    def sizes(self, module: str) -> tuple[int, int]:
        """(d_in, d_out) of one of `MODULES`."""
        if module.startswith("self_attn"):
            return self.hidden, self.hidden
        sizes = self.hidden, self.intermediate
        return sizes[::-1] if module == "mlp.down_proj" else sizes

    @property
    def linear_weights(self) -> int:
        """Weights of all blocks' linear modules, which a token's forward multiplies once."""
        blocks = sum(d_in * d_out for d_in, d_out in map(self.sizes, MODULES))
        return self.layers * blocks


def base_model(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter with `model`."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@dataclass
class Tenants:
    """The adapters and which row of the batch asks for which.

    `a[layer, module]` is [num_adapters, rank, d_in] and `b[...]` [num_adapters, d_out, rank], in
    the model's dtype and with the scale (1) in them. An update is about as large as what it is
    added to, so that a wrong or a missing one shows in the logits.
    """

    shape: Shape
    rank: int
    adapter_of: list[int]
    a: dict[tuple[int, str], Tensor]
    b: dict[tuple[int, str], Tensor]

    @classmethod
    def random(
        cls,
        shape: Shape,
        rank: int,
        num_adapters: int,
        adapter_of: list[int],
        dtype: torch.dtype,
        device: str,
    ) -> Tenants:
        draw = torch.Generator().manual_seed(1)
        a, b = {}, {}
        for layer in range(shape.layers):
            for module in MODULES:
                d_in, d_out = shape.sizes(module)
                shapes = (num_adapters, rank, d_in), (num_adapters, d_out, rank)
                a[layer, module], b[layer, module] = (
                    (torch.randn(s, generator=draw) * s[-1] ** -0.5).to(device, dtype)
                    for s in shapes
                )
        return cls(shape, rank, adapter_of, a, b)

    @property
    def num_adapters(self) -> int:
        return next(iter(self.a.values())).shape[0]

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"tenant{i}" for i in self.adapter_of]

    def gates(self, modules: tuple[str, ...] = MODULES) -> Tensor:
        """[layers, rows, 7]: these modules on, for every row."""
        gates = torch.zeros(self.shape.layers, len(self.adapter_of), len(MODULES))
        gates[:, :, [MODULES.index(module) for module in modules]] = 1
        return gates

    def active_bytes(self, gates: Tensor) -> int:
        """Bytes of the distinct adapters' experts that any row switches on: what must be read."""
        itemsize = next(iter(self.a.values())).element_size()
        adapters = torch.tensor(self.adapter_of)
        total = 0
        for column, module in enumerate(MODULES):
            for layer in range(self.shape.layers):
                distinct = adapters[gates[layer, :, column] != 0].unique().numel()
                total += distinct * self.rank * sum(self.shape.sizes(module)) * itemsize
        return total

    def active_flops(self, gates: Tensor, tokens_per_row: int) -> int:
        """Floating-point operations of the updates in one forward."""
        active = (gates != 0).sum((0, 1)).tolist()
        sizes = [sum(self.shape.sizes(module)) for module in MODULES]
        multiplies = sum(n * size for n, size in zip(active, sizes, strict=True))
        return 2 * self.rank * tokens_per_row * multiplies

    def prompts(self, length: int) -> Tensor:
        """[rows, length] token ids; each row has a vocabulary of its own, so that routes differ."""
        draw = torch.Generator().manual_seed(2)
        vocab = self.shape.vocab
        rows = []
        for _ in self.adapter_of:
            words = torch.randperm(vocab, generator=draw)[: max(8, vocab // 128)]
            rows.append(words[torch.randint(len(words), (length,), generator=draw)])
        return torch.stack(rows)
