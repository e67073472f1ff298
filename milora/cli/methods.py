"""`milora methods`: every expert kind, and what it would train on a model of a given shape."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass

from rich.table import Table

from milora.cli.console import add_json_option, note, stdout, write_json
from milora.errors import UserError
from milora.experts import REGISTRY, ExpertKind, ExpertSpec, get_kind, make_spec

LLAMA_2_7B = {"hidden": 4096, "layers": 32, "intermediate": 11008, "heads": 32, "kv_heads": 32}

EPILOG = """The default shape is Llama-2-7B's, all seven linear modules of a block.

examples:
  milora methods
  milora methods --rank 8 --hidden 1024 --layers 8 --intermediate 2816 --heads 8 --kv-heads 8
  milora methods --model ./llama     (only its config is read)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="take the shape of the model in this folder")
    for name, value in LLAMA_2_7B.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="N", type=int, help=f"default: {value}"
        )
    parser.add_argument("--rank", metavar="R", type=int, default=32, help="default: 32")
    add_json_option(parser)


@dataclass(frozen=True)
class Count:
    """What an adapter of a kind amounts to on a model.

    Attributes:
        trained: numbers that training changes, the routers' not counted.
        saved: numbers in its file, the routers' not counted.
        served_rank: the largest rank of an (A, B) that kernels read.
        served: numbers of all these (A, B).
        refused: why the model cannot have this kind at this rank; all else is then 0.
    """

    kind: str
    summary: str
    trained: int = 0
    saved: int = 0
    served_rank: int = 0
    served: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Module:
    """A linear module: its block, its path there, its sizes."""

    block: str
    path: str
    d_in: int
    d_out: int

    def spec(self, rank: int) -> ExpertSpec:
        return make_spec(self.d_in, self.d_out, rank, path=self.path, block=self.block)


def count_kind(name: str, modules: list[Module], rank: int) -> Count:
    """Count a kind with its default options."""
    kind = get_kind(name)
    trained = saved = served = served_rank = 0
    common: set[tuple[str, str]] = set()
    for module in modules:
        spec = module.spec(rank)
        try:
            kind.check(spec)
        except ValueError as error:
            most = _largest_rank(kind, modules, rank)
            advice = f"at most rank {most} here" if most else "not on these modules"
            return Count(name, kind.summary, refused=f"{advice}: {error}")
        shared = kind.shared(spec)
        for key, shape in kind.tensors(spec).items():
            if (tag := (key, shared.get(key, ""))) in common:
                continue
            if key in shared:
                common.add(tag)
            saved += math.prod(shape)
            trained += 0 if key in kind.fixed else math.prod(shape)
        served_rank = max(served_rank, kind.served_rank(spec))
        served += kind.served_rank(spec) * (module.d_in + module.d_out)
    return Count(name, kind.summary, trained, saved, served_rank, served)


def _largest_rank(kind: ExpertKind, modules: list[Module], rank: int) -> int:
    """The largest rank below `rank` that every module can have; 0: none."""
    shapes = {(module.d_in, module.d_out): module for module in modules}
    for smaller in range(rank - 1, 0, -1):
        try:
            for module in shapes.values():
                kind.check(module.spec(smaller))
        except ValueError:
            continue
        return smaller
    return 0


def llama_modules(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int
) -> list[Module]:
    """The linear modules of a Llama's blocks."""
    narrow = hidden // heads * kv_heads
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    return [
        Module(f"model.layers.{layer}", path, *sizes)
        for layer in range(layers)
        for path, sizes in block.items()
    ]


def run(namespace: argparse.Namespace) -> int:
    given = {name: getattr(namespace, name) for name in LLAMA_2_7B}
    if namespace.model is not None:
        if any(value is not None for value in given.values()):
            raise UserError("give --model or the sizes, not both")
        modules, router, shape = _of_model(namespace.model)
    else:
        sizes = {name: LLAMA_2_7B[name] if v is None else v for name, v in given.items()}
        if any(value < 1 for value in sizes.values()) or sizes["hidden"] % sizes["heads"]:
            raise UserError("sizes must be positive, and --heads must divide --hidden")
        modules = llama_modules(**sizes)
        # A router: W_r [7, hidden], w_sa [hidden] and 12 coefficients in each block.
        router = sizes["layers"] * (8 * sizes["hidden"] + 12)
        shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    if not 1 <= namespace.rank <= 256:
        raise UserError(f"--rank must be from 1 to 256, got {namespace.rank}")

    counts = [count_kind(name, modules, namespace.rank) for name in REGISTRY]
    result = {
        "shape": shape,
        "rank": namespace.rank,
        "modules": len(modules),
        "router": router,
        "kinds": [asdict(count) for count in counts],
    }
    if namespace.json != "-":
        _print(counts, shape, namespace.rank, router)
    write_json(namespace.json, result)
    return 0


def _of_model(folder: str) -> tuple[list[Module], int, str]:
    """Modules, numbers of the routers, and a title, for the model in a folder."""
    from milora.blocks import find_blocks, hidden_size, linear_shape
    from milora.cli.models import is_local, meta_model, user_errors
    from milora.config import MiLoRAConfig

    if not is_local(folder):
        raise UserError(f"no model folder at {folder}")
    model = meta_model(folder)
    with user_errors(ValueError):
        blocks = find_blocks(model, MiLoRAConfig())
    modules: list[Module] = []
    router = 0
    for block in blocks:
        linears = {path: block.module.get_submodule(path) for path in block.experts}
        modules += [Module(block.path, p, *linear_shape(linear)) for p, linear in linears.items()]
        if linears:
            router += (len(linears) + 1) * hidden_size(model, block.module) + 12
    return modules, router, folder


def _print(counts: list[Count], shape: str, rank: int, router: int) -> None:
    plain = next(count.trained for count in counts if count.kind == "lora")
    table = Table(title=f"{shape}; rank {rank}", title_justify="left")
    table.add_column("kind", no_wrap=True)
    for column in ("trained", "of lora", "file", "served"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("dW / scale")
    for count in counts:
        numbers = (
            f"{count.trained:,}",
            f"{count.trained / plain:.2%}",
            _bytes(4 * count.saved),
            f"{count.served_rank}",
        )
        table.add_row(count.kind, *(("-",) * 4 if count.refused else numbers), count.summary)
    stdout().print(table)
    for count in counts:
        if count.refused:
            note(f"{count.kind}: {count.refused}")
    note("served: the rank of the (A, B) that kernels read. Kinds have their default options.")
    note(f"Routers add {router:,} trained numbers to each.")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
