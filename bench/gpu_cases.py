"""What the GPU benches measure, what is aimed at, and which kernels there are: one place for it.

G1 to G5 are ratios that must be reached; each kernel has a row in bench/results/GPU.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

LLAMA_7B = "4096,32,32,11008,32000"  # hidden, layers, heads, intermediate, vocab
TINY = "64,2,4,96,256"  # of --quick: every path, in seconds, on a CPU
GROUPS = {  # modules of a block that read the same x, and therefore share one call of the op
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Target:
    """`value` is of the JSON line (bench gpu, this case, provider and metric)."""

    stage: str
    text: str
    case: str
    provider: str
    metric: str
    goal: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.goal if self.at_least else value <= self.goal


TARGETS = (
    Target("G1", "share of copy bandwidth", "g1 64x64 r32 distinct 4096-4096", "milora",
           "share", 0.75, at_least=True),
    Target("G1", "speed ÷ best peer", "g1 64x64 r32 distinct 4096-4096", "milora",
           "over_best_peer", 1.5, at_least=True),
    Target("G2", "added time ÷ its bytes floor, CUDA graph", "g2 graph", "milora",
           "added_over_floor", 1.3),
    Target("G2", "tokens/s ÷ base, eager", "g2 eager", "milora", "speed_over_base", 0.95,
           at_least=True),
    Target("G3", "time ÷ bare linears, top_k 3", "g3 top_k 3", "milora", "time_over_base", 1.08),
    Target("G3", "time ÷ floor, all active", "g3 all", "milora", "time_over_floor", 1.2),
    Target("G3", "time ÷ bare linears, top_k 3, fused", "g3 top_k 3", "fused",
           "time_over_base", 1.03),
    Target("G4", "time ÷ one read of H", "g4 pool 1x4096", "milora", "time_over_read", 1.5),
    # Twice the gains of the paper's Table 4.
    Target("G5", "tokens/s ÷ MOELoRA, beam 1", "g5 eager beam 1", "milora", "over_moelora", 1.434,
           at_least=True),
    Target("G5", "tokens/s ÷ MOELoRA, beam 3", "g5 eager beam 3", "milora", "over_moelora", 1.358,
           at_least=True),
    Target("G5", "tokens/s ÷ DoRA, beam 1", "g5 eager beam 1", "milora", "over_dora", 1.394,
           at_least=True),
    Target("G5", "tokens/s ÷ DoRA, beam 3", "g5 eager beam 3", "milora", "over_dora", 1.264,
           at_least=True),
)  # fmt: skip


@dataclass(frozen=True)
class DecodeCase:
    """G1: one decode token a row."""

    rows: int = 64
    adapters: int = 64
    ranks: tuple[int, ...] = (32,)  # taken in turns by the adapters
    popularity: str = "distinct"
    d_in: int = 4096
    d_out: tuple[int, ...] = (4096,)

    @property
    def name(self) -> str:
        outs = "+".join(map(str, self.d_out))
        return (
            f"g1 {self.rows}x{self.adapters} r{self.rank_name} {self.popularity} {self.d_in}-{outs}"
        )

    @property
    def rank_name(self) -> str:
        return "+".join(map(str, self.ranks))

    def ranks_of_adapters(self) -> list[int]:
        return [self.ranks[adapter % len(self.ranks)] for adapter in range(self.adapters)]


def decode_cases(popularities: list[str], *, quick: bool) -> list[DecodeCase]:
    if quick:
        point = DecodeCase(4, 4, (8,), d_in=128, d_out=(128,))
        return [
            point,
            replace(point, popularity="zipf"),
            replace(point, d_out=(64, 96)),
            replace(point, d_out=(64, 96), ranks=(8, 16, 32)),
        ]
    point = DecodeCase()
    return [
        *(replace(point, popularity=mix) for mix in popularities),
        *(replace(point, rows=n, adapters=n) for n in (1, 8, 32, 256)),
        *(replace(point, ranks=(rank,)) for rank in (8, 128)),
        replace(point, ranks=(8, 16, 32, 64, 128)),
        replace(point, d_out=(4096, 4096, 4096)),
        replace(point, d_out=(11008, 11008)),
        replace(point, d_in=11008),
    ]


@dataclass(frozen=True)
class Kernel:
    """A row of GPU.md.

    `title` is what lines call it; `tests` matches the ids of the tests that show it to be correct
    on a GPU; `runs_on` takes a compute capability (90 is 9.0).
    """

    title: str
    tests: str
    runs_on: Callable[[int], bool] = lambda capability: True


def has_clusters(capability: int) -> bool:
    """As MILORA_DECODE_BY_CLUSTERS."""
    return 90 <= capability < 120


DECODE_TESTS = (
    r"test_grouped_lora::test_pool_(against_reference|is_batch_invariant)\[.*\b0\b"
    r"|test_grouped_lora::test_pool_(leaves_idle_rows|takes_any)"
    r"|test_(rank_gates|cores)::\w+\[.*-0\]"
    r"|test_cuda_graphs::test_(grouped_lora_replays|streams_do_not_disturb\w+)\[0"
)
PREFILL_TESTS = (
    r"test_grouped_lora::test_pool_(against_reference|is_batch_invariant)\[.*\b1\b"
    r"|test_(rank_gates|cores)::\w+\[.*-1\]"
    r"|test_cuda_graphs::test_(grouped_lora_replays|streams_do_not_disturb\w+)\[1"
)
WGMMA_TESTS = (
    r"test_prefill_wgmma::"
    r"|test_cuda_graphs::test_(grouped_lora_replays|streams_do_not_disturb\w+)\[2"
)
TRAIN_TESTS = r"test_grouped_lora::test_train|test_cuda_graphs::test_training"
ROUTER_TESTS = r"test_prompt_router::|test_cuda_graphs::test_prompt_router"
KERNELS = {
    "decode_cluster": Kernel(
        "grouped_lora_, decode: clusters (9.0, 10.x)", DECODE_TESTS, has_clusters
    ),
    "decode_split": Kernel(
        "grouped_lora_, decode: two launches", DECODE_TESTS, lambda c: not has_clusters(c)
    ),
    "prefill": Kernel("grouped_lora_, prefill", PREFILL_TESTS),
    "prefill_wgmma": Kernel(
        "grouped_lora_, prefill by wgmma (9.0)", WGMMA_TESTS, lambda c: c == 90
    ),
    "fused_lora": Kernel(
        "fused_lora (9.0)", r"test_fused_lora::|::test_fused_lora", lambda c: c == 90
    ),
    "train_forward": Kernel("grouped_lora, forward", TRAIN_TESTS),
    "train_backward": Kernel("grouped_lora, backward", TRAIN_TESTS),
    "router_forward": Kernel("prompt_router, forward", ROUTER_TESTS),
    "router_backward": Kernel(
        "prompt_router, backward",
        r"test_prompt_router::test_(against_reference|widths|rows_of_whole|first_maximum|poolers)",
    ),
    "pool_copies": Kernel("adapter pool, copies", r"test_pool_copies::test_(traffic|the_budget)"),
}


def decode_kernel(capability: int) -> str:
    return "decode_cluster" if has_clusters(capability) else "decode_split"
