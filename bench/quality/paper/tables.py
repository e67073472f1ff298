"""What each of the paper's tables is made of, as far as it is known; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass

# Names of lm-evaluation-harness: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA.
TASKS = (
    "boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
    "openbookqa",
)  # fmt: skip
SEEDS = (0, 1, 2, 3, 4)  # the paper reports medians over five


@dataclass(frozen=True)
class Table:
    """`together`: one adapter for all tasks; else one adapter for each."""

    backbone: str
    together: bool


TABLES = {
    1: Table("Llama-2-7B", together=False),
    2: Table("Llama-2-7B", together=True),
    3: Table("Gemma 2B", together=False),
}
# The paper's hyper-parameters, as options of `milora train`; it stops early by dev perplexity.
PAPER = {
    "--rank": "32", "--lr": "1e-4", "--schedule": "linear", "--warmup": "0.06", "--patience": "10",
}  # fmt: skip
ROUTED = {
    "--top-k": "3", "--pooler": "self_attention", "--activation": "rational",
    "--balance-coef": "0.01", "--gate": "probability", "--router-norm": "none",
    "--activation-lr": "1e-6", "--activation-data": "dev",
}  # fmt: skip
METHODS: dict[str, list[str]] = {
    "LoRA": ["--no-router", "--expert", "lora"],
    "DoRA": ["--no-router", "--expert", "dora"],
    "MiLoRA": ["--expert", "lora", *(word for pair in ROUTED.items() for word in pair)],
    "MiDoRA": ["--expert", "dora", *(word for pair in ROUTED.items() for word in pair)],
}
