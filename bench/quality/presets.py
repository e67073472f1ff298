"""How large an experiment is. `cpu-small` takes about 35 minutes on two free cores, all stages."""

from __future__ import annotations

from dataclasses import dataclass

from quality.base import BaseConfig


@dataclass(frozen=True)
class Preset:
    """Sizes of base, adapters, training and evaluation, and how often each is repeated.

    Args:
        rank: rank of the plain LoRA whose parameters are everybody's budget.
        steps, single_steps, long_steps: of a multi-task and of a single-task fine-tuning, and of
            the controls that train for longer.
        learning_rates: the grid, the same for every method.
        test_per_task, dev_per_task: examples; one set for all seeds.
        main_seeds, single_seeds, ablation_seeds, routing_seeds: repetitions.
        single_tasks: the tasks that also get an adapter of their own.
        ranks: ablated ranks of MiLoRA.
    """

    base: BaseConfig
    rank: int
    steps: int
    single_steps: int
    long_steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    test_per_task: int
    dev_per_task: int
    main_seeds: int
    single_seeds: int
    ablation_seeds: int
    routing_seeds: int
    single_tasks: tuple[str, ...]
    ranks: tuple[int, ...]


PRESETS = {
    "cpu-small": Preset(
        base=BaseConfig(
            hidden_size=128, num_layers=4, num_heads=4, intermediate_size=256, steps=2400,
            batch_size=64, num_examples=60_000, learning_rate=2e-3,
        ),
        rank=10, steps=120, single_steps=60, long_steps=480, batch_size=24,
        learning_rates=(3e-3, 1e-2, 3e-2, 1e-1),
        test_per_task=64, dev_per_task=32,
        main_seeds=5, single_seeds=5, ablation_seeds=3, routing_seeds=3,
        single_tasks=("string", "unit"), ranks=(4, 8, 16, 32, 64),
    ),
    "gpu": Preset(
        base=BaseConfig(
            hidden_size=512, num_layers=10, num_heads=8, intermediate_size=1024, steps=6000,
            batch_size=256, num_examples=400_000, learning_rate=1e-3,
        ),
        rank=10, steps=400, single_steps=200, long_steps=1600, batch_size=64,
        learning_rates=(5e-4, 2e-3, 6e-3, 2e-2),
        test_per_task=256, dev_per_task=64,
        main_seeds=8, single_seeds=5, ablation_seeds=3, routing_seeds=3,
        single_tasks=("string", "unit"), ranks=(4, 8, 16, 32, 64),
    ),
    # A smoke test of every stage; its numbers mean nothing.
    "tiny": Preset(
        base=BaseConfig(
            hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, steps=4,
            batch_size=8, num_examples=64, learning_rate=2e-3,
        ),
        rank=2, steps=4, single_steps=4, long_steps=6, batch_size=4,
        learning_rates=(2e-3,),
        test_per_task=2, dev_per_task=2,
        main_seeds=1, single_seeds=1, ablation_seeds=1, routing_seeds=1,
        single_tasks=("string",), ranks=(4,),
    ),
}  # fmt: skip
