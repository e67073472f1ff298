"""Whole models for G2 and G5: weights drawn on the device, a static cache, steps in CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from gpu_problem import generator
from gpu_timing import captured
from measure import Run
from providers import Provider
from tenants import MODULES, Shape, Tenants, base_model
from torch import Tensor, nn
from transformers import StaticCache

SPARE = 8  # positions of a static cache behind the prompt


@contextlib.contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New parameters lie on `device` in `dtype` from the start: a 7B model is not first drawn on
    the CPU in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def base_on(device: str, shape: Shape, dtype: torch.dtype) -> nn.Module:
    with made_on(device, dtype):
        return base_model(shape, dtype, device)


def tenants_on(
    device: str, shape: Shape, rank: int, num_adapters: int, adapter_of: list[int],
    dtype: torch.dtype,
) -> Tenants:  # fmt: skip
    """As `Tenants.random`, drawn on the device."""
    a, b, draw = {}, {}, generator(device, seed=1)
    for layer in range(shape.layers):
        for module in MODULES:
            d_in, d_out = shape.sizes(module)
            for made, rows, columns in ((a, rank, d_in), (b, d_out, rank)):
                values = torch.randn(
                    num_adapters, rows, columns, device=device, dtype=dtype, generator=draw
                )
                made[layer, module] = values.mul_(columns**-0.5)
    return Tenants(shape, rank, adapter_of, a, b)


class StaticDecoding:
    """A decode step behind the prompts on a static cache, which each run leaves as it was.

    The attention mask is given, so that the model has none to make: it would ask the device how
    long the cache is.
    """

    def __init__(self, provider: Provider, prompts: Tensor):
        self.provider = provider
        rows, length = prompts.shape
        config = provider.model.config
        self.cache = StaticCache(config=config, max_cache_len=length + SPARE)
        self.prefilled = provider(
            input_ids=prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.length = length
        self.token = prompts[:, :1].contiguous()
        self.position = torch.full((rows, 1), length, device=prompts.device)
        self.mask = torch.zeros(rows, 1, 1, length + SPARE, dtype=torch.bool, device=prompts.device)
        self.mask[..., : length + 1] = True

    def step(self) -> Tensor:
        output = self.provider(
            input_ids=self.token, past_key_values=self.cache, use_cache=True,
            attention_mask=self.mask, position_ids=self.position,
        )  # fmt: skip
        return output.logits

    def reset(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def run(self, device: str) -> Run:
        """Replays of a graph on a GPU, the step itself elsewhere.

        Raises: RuntimeError, if the model does what a graph cannot hold.
        """
        if device != "cuda":
            return Run(self.step, self.reset)
        graph = captured(self.step, self.reset)
        self.reset()
        return Run(graph.replay, self.reset)
