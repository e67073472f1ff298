"""Hours of traffic in minutes: threads that load, evict, fail and generate on one `AdapterPool`.

    python tests/soak.py --minutes 30 --json soak.jsonl

Every answer is compared bit for bit with that of a model which carries the row's adapter alone, in
the same batch shape. A line of JSON every few seconds holds the process's memory and the counters;
the last one says whether memory was flat. Exits with 1 if an answer was wrong, anything was raised
that is no refusal, no thread got on for a minute, or memory grew.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pool_tools import KINDS, pool_of, save_adapter
from tiny_models import build, ragged_prompts

import milora
from milora import AdapterError, PoolError
from milora.adapter_files import WEIGHTS_FILE

LENGTHS = (3, 8, 5, 6)  # of the prompts; all are padded to WIDTH, so every batch has a mask
WIDTH, ROWS, NEW_TOKENS = 9, 3, 3
NUM_ADAPTERS, SLOTS = 24, 10
STUCK_SECONDS = 60.0
# Memory that a run may seem to gain from its first quarter to its end: what the allocator keeps in
# pieces moves by a few megabytes. A leak of 1 KiB an action shows in a run of half an hour.
GROWTH = 24 << 20
OPTIONS = {
    "max_new_tokens": NEW_TOKENS,
    "min_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


class Boom(Exception):
    """What a module of the model raises when it is told to."""


@dataclass
class Answer:
    tokens: torch.Tensor  # [WIDTH + NEW_TOKENS]
    logits: torch.Tensor  # [NEW_TOKENS, VOCAB]


def batch_of(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack([torch.nn.functional.pad(p, (WIDTH - len(p), 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def answers(model: Any, prompts: list[torch.Tensor], **options: Any) -> list[Answer]:
    out = model.generate(**batch_of(prompts), **OPTIONS, **options)
    logits = torch.stack(out.logits, 1)
    return [Answer(*row) for row in zip(out.sequences, logits, strict=True)]


class Soak:
    """The model, its pool, and what each adapter answers.

    Args:
        folder: an empty folder for adapters.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.prompts = ragged_prompts(LENGTHS, seed=5)
        self.folders: dict[str, Path] = {}
        kinds = list(KINDS)
        for i in range(NUM_ADAPTERS):
            name = f"tenant{i}"
            self.folders[name] = folder / name
            save_adapter(folder / name, KINDS[kinds[i % len(kinds)]], rank=1 + i % 8, seed=i + 1)
        # By adapter, prompt and row: a product of matrices may round differently in another row.
        self.expected: dict[tuple[str | None, int, int], Answer] = {}
        for name in (None, *self.folders):
            # Frozen as the served one: torch takes other kernels for weights that take gradients.
            model = build("llama").requires_grad_(False)
            if name is not None:
                milora.load(model, self.folders[name])
            for first in range(len(LENGTHS)):
                chosen = [(first + row) % len(LENGTHS) for row in range(ROWS)]
                found = answers(model, [self.prompts[i] for i in chosen])
                for row, (prompt, answer) in enumerate(zip(chosen, found, strict=True)):
                    self.expected[name, prompt, row] = answer

        self.model = build("llama")
        with pool_of(build("llama"), 1 << 20) as probe:
            for name, path in self.folders.items():
                probe.register(name, path)
            sizes = sorted(probe.entry(name).num_bytes for name in self.folders)
        # Slots run out sometimes and bytes at other times.
        room = sum(sizes) * SLOTS // NUM_ADAPTERS
        self.pool = pool_of(self.model, room, max_resident=SLOTS, host_bytes=room // 2)
        for name, path in self.folders.items():
            self.pool.register(name, path)
        self.raising = threading.local()
        self.model.model.layers[1].register_forward_pre_hook(self._maybe_raise)
        self.hooks = self.count_hooks()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.stop = threading.Event()

    def _maybe_raise(self, module: Any, args: tuple) -> None:
        if getattr(self.raising, "now", False):
            raise Boom

    def count_hooks(self) -> int:
        tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(m, table)) for m in self.model.modules() for table in tables)

    # ---- what threads do ------------------------------------------------------------------------

    def generate(self, rng: random.Random, own: Path) -> None:
        names = [rng.choice([*self.folders, None]) for _ in range(ROWS)]
        self._check(rng, names, names)

    def _check(self, rng: random.Random, names: list, adapters: list) -> None:
        """Generate with `names`, and compare with what `adapters` answer."""
        chosen = [rng.randrange(len(LENGTHS)) for _ in range(ROWS)]
        found = answers(self.model, [self.prompts[i] for i in chosen], adapter_names=names)
        for row, (name, prompt, answer) in enumerate(zip(adapters, chosen, found, strict=True)):
            want = self.expected[name, prompt, row]
            if not torch.equal(answer.tokens, want.tokens):
                raise AssertionError(f"{name}, prompt {prompt}, row {row}: other tokens")
            if not torch.equal(answer.logits, want.logits):
                worst = (answer.logits - want.logits).abs().max()
                raise AssertionError(f"{name}, prompt {prompt}, row {row}: logits {worst} off")

    def raise_inside(self, rng: random.Random, own: Path) -> None:
        self.raising.now = True
        try:
            self.generate(rng, own)
        except Boom:
            return
        finally:
            self.raising.now = False
        raise AssertionError("a module raised and nobody heard of it")

    def too_many(self, rng: random.Random, own: Path) -> None:
        names = rng.sample(list(self.folders), SLOTS + 1)
        self._refused(PoolError, lambda: self.pool.acquire(names))

    def unknown(self, rng: random.Random, own: Path) -> None:
        names = [rng.choice(list(self.folders)), "nobody", None]
        self._refused(ValueError, lambda: self._check(rng, names, names))

    def corrupt(self, rng: random.Random, own: Path) -> None:
        """An adapter that is damaged when it is loaded, and whole when it is loaded again."""
        name, like = f"{own.name} damaged", rng.choice(list(self.folders))
        shutil.copytree(self.folders[like], own / "damaged")
        weights = own / "damaged" / WEIGHTS_FILE
        whole = weights.read_bytes()
        try:
            self.pool.register(name, own / "damaged")
            weights.write_bytes(whole[: rng.randrange(len(whole))])
            names = [name, rng.choice([*self.folders, None]), None]
            self._refused((AdapterError, PoolError), lambda: self._check(rng, names, names))
            weights.write_bytes(whole)
            self._check(rng, names, [like, *names[1:]])
        finally:
            self.pool.unregister(name)
            shutil.rmtree(own / "damaged")

    def come_and_go(self, rng: random.Random, own: Path) -> None:
        """An adapter under a name of its own, from a folder or from an attached model's tensors."""
        name, like = f"{own.name} passing", rng.choice(list(self.folders))
        self.pool.register(name, self.folders[like])
        try:
            self._check(rng, [name, None, name], [like, None, like])
        finally:
            self.pool.unregister(name)

    def manage(self, rng: random.Random, own: Path) -> None:
        name = rng.choice(list(self.folders))
        pool = self.pool
        rng.choice((pool.load, pool.prefetch, pool.prefetch, pool.evict, pool.evict))(name)

    def pin(self, rng: random.Random, own: Path) -> None:
        name = rng.choice(list(self.folders))
        try:
            self.pool.pin(name)
            self.generate(rng, own)
        finally:
            self.pool.unpin(name)

    def compact(self, rng: random.Random, own: Path) -> None:
        self.pool.compact()

    ACTIONS = (
        *(("generate", 60), ("raise_inside", 6), ("too_many", 5), ("unknown", 3), ("corrupt", 5)),
        *(("come_and_go", 6), ("manage", 10), ("pin", 3), ("compact", 2)),
    )

    @staticmethod
    def _refused(kinds: Any, function: Callable[[], Any]) -> None:
        try:
            function()
        except kinds:
            return
        raise AssertionError("what should be refused was not")

    # ---- the run --------------------------------------------------------------------------------

    def work(self, number: int, seed: int) -> None:
        rng = random.Random(f"{seed} {number}")
        own = self.folder / f"thread {number}"
        own.mkdir()
        names, weights = zip(*self.ACTIONS, strict=True)
        first = rng.sample(names, len(names))  # also a short run does everything
        while not self.stop.is_set():
            action = first.pop() if first else rng.choices(names, weights)[0]
            outcome = "done"
            try:
                getattr(self, action)(rng, own)
            except PoolError:
                outcome = "refused"  # others use what it needs: an answer, too
            except BaseException:
                outcome = "wrong"
                with self.lock:
                    self.errors.append(f"{action}: {traceback.format_exc()}")
                self.stop.set()
            with self.lock:
                self.counts[f"{action} {outcome}"] += 1

    def run(self, seconds: float, threads: int, seed: int, report: Callable[[dict], None]) -> dict:
        """Work for so long; `report` gets a sample every few seconds. Returns: the summary."""
        workers = [
            threading.Thread(target=self.work, args=(i, seed), daemon=True) for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        samples: list[dict] = []
        pause = min(10.0, seconds / 40)
        elapsed = idle = 0.0
        before, actions = time.monotonic(), 0
        while not self.stop.wait(pause) and elapsed < seconds:
            now = time.monotonic()
            # Time during which the whole process was suspended is none.
            step, before = min(now - before, 2 * pause + 10.0), now
            elapsed += step
            samples.append(self.sample(elapsed))
            report(samples[-1])
            idle = idle + step if samples[-1]["actions"] == actions else 0.0
            actions = samples[-1]["actions"]
            if idle > STUCK_SECONDS:
                faulthandler.dump_traceback(all_threads=True)
                self.errors.append(f"no thread got on for {STUCK_SECONDS:.0f} s")
                break
        self.stop.set()
        for worker in workers:
            worker.join(STUCK_SECONDS)
        self.check_end(any(worker.is_alive() for worker in workers))
        growth = growth_of(samples)
        if growth > GROWTH:
            self.errors.append(f"memory grew by {growth / 2**20:.1f} MiB")
        summary = {
            "seconds": round(elapsed, 1),
            "threads": threads,
            "seed": seed,
            "growth": round(growth),
            "growth_allowed": GROWTH,
            "counts": dict(sorted(self.counts.items())),
            "pool": vars(self.pool.statistics()),
            "errors": self.errors,
        }
        report({"summary": summary})
        return summary

    def sample(self, seconds: float) -> dict:
        stats = self.pool.statistics()
        if stats.host_used > stats.host_bytes or stats.device_used + stats.device_free > (
            stats.device_bytes
        ):
            self.errors.append(f"a budget is exceeded: {stats}")
        return {
            "seconds": round(seconds, 2),
            "rss": resident_memory(),
            "actions": sum(self.counts.values()),
            "resident": stats.resident,
            "loads": stats.loads,
            "evictions": stats.evictions,
            "failures": stats.failures,
        }

    def check_end(self, is_stuck: bool) -> None:
        """After all that: nothing in use, no hook left behind, and every tenant as before."""
        stats = self.pool.statistics()
        if is_stuck:
            self.errors.append("a thread did not end")
            return
        if stats.in_use or stats.pinned or stats.registered != NUM_ADAPTERS:
            self.errors.append(f"something is still in use, pinned or registered: {stats}")
        if self.count_hooks() != self.hooks:
            self.errors.append(f"{self.count_hooks() - self.hooks} hooks were left behind")
        try:
            for name in (None, *self.folders):
                self._check(random.Random(0), [name] * ROWS, [name] * ROWS)
        except Exception:
            self.errors.append(f"after the run: {traceback.format_exc()}")


def resident_memory() -> int:
    """Bytes of this process in memory, once garbage has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_of(samples: list[dict]) -> float:
    """By how much the line through the samples rises, without the first quarter, which warms up."""
    points = [(s["seconds"], s["rss"]) for s in samples[len(samples) // 4 :]]
    if len(points) < 3:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope /= sum((x - mean_x) ** 2 for x, _ in points)
    return slope * (points[-1][0] - points[0][0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="write the samples and the summary here")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is so small that more would only wait for each other
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        with open(args.json or os.devnull, "w") as lines:

            def report(line: dict) -> None:
                lines.write(json.dumps(line) + "\n")
                lines.flush()

            summary = soak.run(args.minutes * 60, args.threads, args.seed, report)
        if not summary["errors"]:
            soak.pool.close()
    print(json.dumps(summary, indent=2))
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a thread that is stuck would keep the process
