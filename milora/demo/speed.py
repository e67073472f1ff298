"""Generation speed of several models, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedTokenizerBase

from milora.demo.evaluate import generate


def tokens_per_second(
    models: dict[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    num_tokens: int,
    rounds: int,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Median new tokens per second (prefill and decode) of each model, adapters unmerged.

    Every round times all models, each time in another order: on a shared machine a model timed
    apart from the others would be compared with another hour's load.
    """
    names = list(models)
    for name in names:
        generate(models[name], tokenizer, prompts, num_tokens, exactly=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            generate(models[name], tokenizer, prompts, num_tokens, exactly=True)
            seconds[name].append(time.perf_counter() - started)
        progress(number + 1)
    new_tokens = len(prompts) * num_tokens
    return {name: new_tokens / statistics.median(times) for name, times in seconds.items()}
