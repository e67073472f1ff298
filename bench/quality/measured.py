"""Look-ups in the measured lines that the report's sections share."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from quality.compare import Comparison, paired
from quality.lines import Record
from quality.methods import BASE, METHODS

MEAN = "mean"
BySeed = dict[int, float]
EXACT, LOSS = "test/exact_match", "test/loss"


class Measured:
    """The lines of one preset."""

    def __init__(self, records: list[Record]):
        self.records = records

    def seeds(
        self,
        stage: str,
        method: str,
        metric: str,
        *,
        trained_on: str = "all",
        setting: str = "default",
        task: str = MEAN,
    ) -> BySeed:
        """Value by seed; empty if it was not measured."""
        wanted = {
            "stage": stage, "method": method, "metric": metric, "trained_on": trained_on,
            "setting": setting, "task": task,
        }  # fmt: skip
        found = [r for r in self.records if all(r[k] == v for k, v in wanted.items())]
        return {r["seed"]: r["value"] for r in sorted(found, key=lambda r: r["seed"])}

    def first(self, stage: str, method: str, trained_on: str = "all") -> Record:
        """Some line of the method's runs, for what all of them share."""
        return next(
            r
            for r in self.records
            if (r["stage"], r["method"], r["trained_on"]) == (stage, method, trained_on)
        )

    def trained_on(self) -> list[str]:
        """The single tasks that were trained on, in order."""
        names = [r["trained_on"] for r in self.records if r["stage"] == "main"]
        return sorted(set(names) - {"all"})

    def methods(self, trained_on: str = "all") -> list[str]:
        mine = [r for r in self.records if (r["stage"], r["trained_on"]) == ("main", trained_on)]
        found = {r["method"] for r in mine}
        return [name for name in (BASE, *METHODS) if name in found]

    def settings(self, stage: str) -> list[str]:
        return list(dict.fromkeys(r["setting"] for r in self.records if r["stage"] == stage))

    def ablation(self, setting: str, metric: str) -> BySeed:
        method = "LoRA" if setting.startswith("LoRA") else "MiLoRA"
        return self.seeds("ablations", method, metric, setting=setting)

    def rates(self, name: str) -> dict[float, str]:
        """learning rate -> setting, of what was run over the whole grid."""
        found = {}
        for r in self.records:
            if r["stage"] == "ablations" and r["setting"].startswith(f"{name} lr="):
                found[r["learning_rate"]] = r["setting"]
        return dict(sorted(found.items()))

    def best_rate(self, name: str) -> float:
        """The learning rate with the lowest mean loss on dev values."""
        rates = self.rates(name)
        losses = {
            rate: statistics.fmean(self.ablation(setting, "dev/loss").values())
            for rate, setting in rates.items()
        }
        return min(losses, key=losses.__getitem__)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison | None:
    """The paired comparison, or None where the two share no seed."""
    return paired(a, b) if set(a) & set(b) else None
