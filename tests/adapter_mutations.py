"""Damaged adapter folders for the fuzz test: each mutation takes a random generator and a folder
in memory, and leaves one that a disk, a bad writer or an attacker could have made.

A mutation may turn out harmless: what a loader owes us is an answer, not a refusal.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"),
    *("U64", "F4", "C64", "f32", "", "F32 ", "PICKLE"),
)
NAMES = (
    *("..", "../x", "../../../etc/passwd", "/etc/passwd", "", ".", "a/b", "a\x00b", "\ud800"),
    *("model.layers.0", "model.layers.-1.self_attn.q_proj", "x" * 5000, "__metadata__", "ключ"),
    *("__class__", "model.layers.0.self_attn", "lm_head", "default", "~", "%s%n", "{0}"),
)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 256, 257, 0.5, -0.0, 1e308, 5e-324, *HUGE, -(2**63)),
    *("", "4", "lora", "dora", "lora_mini", "MILORA", "LORA", "all-linear", "q_proj", *NAMES),
    *("(", "[", "a{9999999}", "(?P<x>", ".*", "^$", "*"),
    *([], {}, [[]], [None], [0] * 50, {"": {}}, {"q_proj": 2}, {"..": ["../x"]}, [["q_proj"]]),
)


@dataclass
class Folder:
    """A folder's two files, and how they are written.

    Attributes:
        old_sum, fix_sum: the sha256 of the weights before; whether to write the new one for it.
        place: called with the folder once it is written: for links and what is no file.
    """

    config: bytes
    weights: bytes
    old_sum: str
    fix_sum: bool = True
    place: Callable[[Path], None] | None = None
    log: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Folder:
        weights = path / WEIGHTS_FILE
        return cls((path / CONFIG_FILE).read_bytes(), weights.read_bytes(), sha256_of(weights))

    def write(self, path: Path) -> None:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            target = path / name
            if target.is_dir() and not target.is_symlink():
                target.rmdir()
            else:
                target.unlink(missing_ok=True)
        (path / WEIGHTS_FILE).write_bytes(self.weights)
        config = self.config
        if self.fix_sum:
            new = sha256_of(path / WEIGHTS_FILE)
            config = config.replace(self.old_sum.encode(), new.encode())
        (path / CONFIG_FILE).write_bytes(config)
        if self.place is not None:
            self.place(path)


# ---- bytes of either file -----------------------------------------------------------------------


def damage(rng: random.Random, payload: bytes) -> bytes:
    """Cut, flip, insert, remove, repeat or replace some bytes."""
    data = bytearray(payload)
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:  # most of what is delicate stands in front
        at = rng.randrange(min(len(data), 200) + 1)
    size = rng.choice((1, 2, 7, 8, 64, 1000))
    how = rng.randrange(7)
    if how == 0:
        del data[at:]
    elif how == 1:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if data:
                position = min(len(data) - 1, at + rng.randrange(size))
                data[position] ^= 1 << rng.randrange(8)
    elif how == 2:
        data[at:at] = rng.randbytes(size)
    elif how == 3:
        del data[at : at + size]
    elif how == 4:
        data[at:at] = data[at : at + size]
    elif how == 5:
        data[at : at + size] = rng.randbytes(size)
    else:
        data += rng.choice((b"\0", b"\0" * 4096, b"}", b"\n", rng.randbytes(size)))
    return bytes(data)


def weights_bytes(rng: random.Random, folder: Folder) -> None:
    folder.weights = damage(rng, folder.weights)


def config_bytes(rng: random.Random, folder: Folder) -> None:
    folder.config = damage(rng, folder.config)


def config_encoding(rng: random.Random, folder: Folder) -> None:
    text = folder.config.decode()
    folder.config = rng.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-8-sig"),
            b"\0" + folder.config,
            folder.config * 2,
            b"[" * rng.choice((10, 1000, 100_000)) + folder.config,
            b"",
            text.replace(":", ": NaN, ", 1).encode(),
            text.replace('"rank"', '"rank": 7, "rank"', 1).encode(),
            text.replace("}", ', "alpha": 1e999}', 1).encode(),
        )
    )


# ---- the config's values ------------------------------------------------------------------------


def config_values(rng: random.Random, folder: Folder) -> None:
    """Replace, remove, add or rename values anywhere in the JSON."""
    data = json.loads(folder.config)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        holder: Any = data
        key = rng.choice(list(holder))
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.6:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        how = rng.random()
        if how < 0.6:
            holder[key] = rng.choice(JUNK)
        elif how < 0.75:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key) if how < 0.85 else rng.choice(JUNK)
        if not data:
            break
    folder.config = json.dumps(data).encode()


# ---- the weights' header ------------------------------------------------------------------------


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def join(header: str | dict, data: bytes, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_length(rng: random.Random, folder: Folder) -> None:
    header, data = split(folder.weights)
    true = len(json.dumps(header))
    wrong = rng.choice(
        (0, 1, 7, true - 1, true + 1, true + len(data), *(n for n in HUGE if n < 2**64))
    )
    folder.weights = join(header, data, wrong)


def header_entries(rng: random.Random, folder: Folder) -> None:
    """Offsets that overlap, swap, run backwards or out of the file; giant shapes; odd types."""
    header, data = split(folder.weights)
    tensors = [key for key in header if key != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        entry = header[rng.choice(tensors)]
        other = header[rng.choice(tensors)]
        if not isinstance(entry, dict) or "data_offsets" not in entry or "shape" not in entry:
            continue
        how = rng.randrange(10)
        if how == 0:
            entry["data_offsets"] = list(other.get("data_offsets", [0, 0]))
        elif how == 1:
            entry["data_offsets"], other["data_offsets"] = (
                other.get("data_offsets"),
                entry["data_offsets"],
            )
        elif how == 2:
            number = rng.choice((-1, 0, 1, len(data), len(data) + 1, *HUGE))
            entry["data_offsets"][rng.randrange(2)] = number
        elif how == 3:
            entry["data_offsets"].reverse()
        elif how == 4:
            shape = entry["shape"]
            shape[rng.randrange(len(shape))] = rng.choice((-1, 0, 1, 0.5, None, "4", *HUGE))
        elif how == 5:
            entry["shape"] = rng.choice(
                ([], [0], [2**62, 4], [1] * 1000, [2**32, 2**32], None, "x")
            )
        elif how == 6:
            entry["dtype"] = rng.choice(DTYPES)
        elif how == 7:
            del entry[rng.choice(list(entry))]
        elif how == 8:
            entry[rng.choice(NAMES)] = rng.choice(JUNK)
        else:
            entry["shape"].reverse()
    folder.weights = join(header, data)


def header_names(rng: random.Random, folder: Folder) -> None:
    """Names renamed, removed, added, or there twice."""
    header, data = split(folder.weights)
    key = rng.choice(list(header))
    how = rng.randrange(5)
    if how == 0:
        header[rng.choice(NAMES)] = header.pop(key)
    elif how == 1:
        del header[key]
    elif how == 2:
        header[rng.choice(NAMES)] = rng.choice((header[key], *JUNK))
    elif how == 3:
        header["__metadata__"] = rng.choice(JUNK)
    else:
        first = json.dumps({key: header[rng.choice(list(header))]})
        folder.weights = join(first[:-1] + ", " + json.dumps(header)[1:], data)
        return
    folder.weights = join(header, data)


def header_of_giants(rng: random.Random, folder: Folder) -> None:
    """A file of a few bytes that says it holds terabytes, or millions of nothings."""
    header, data = split(folder.weights)
    rows = rng.choice((2**20, 2**31, 2**40))
    key = rng.choice([key for key in header if key != "__metadata__"])
    if rng.random() < 0.5:
        header[key]["shape"] = [rows, 32]
        header[key]["data_offsets"] = [0, rows * 32 * 4]
        folder.weights = join(header, data)
    else:
        empty = {"dtype": "F32", "shape": [0, rows], "data_offsets": [0, 0]}
        many = {f"x.{i}": empty for i in range(rng.choice((1, 1000, 5000)))}
        folder.weights = join({**many, **header}, data)


# ---- whole tensors ------------------------------------------------------------------------------

OTHER_DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8),
    *(torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
)


def tensors(rng: random.Random, folder: Folder) -> None:
    """Well-formed files that hold other tensors than they should."""
    found = load(folder.weights)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(found))
        t = found[key].clone()
        how = rng.randrange(9)
        if how == 0:
            bad = rng.choice((torch.nan, torch.inf, -torch.inf))
            if t.is_floating_point() and t.dtype.itemsize > 1:
                t.view(-1)[rng.randrange(t.numel())] = bad
        elif how == 1:
            t = t.float().to(rng.choice(OTHER_DTYPES))
        elif how == 2:
            t = t.float().T.contiguous() if t.dim() == 2 else t[:-1].clone()
        elif how == 3:
            t = t[: rng.randrange(t.shape[0])].contiguous()
        elif how == 4:
            t = t.reshape(-1, 1) if rng.random() < 0.5 else t.flatten()
        elif how == 5:
            del found[key]
            if not found:
                break
            continue
        elif how == 6:
            name = rng.choice([name for name in NAMES if name.isprintable()])
            if name != "__metadata__":
                found[name] = t.clone()
        elif how == 7:
            t = torch.zeros(rng.choice(((), (0,), (1,), (0, 32), (3, 0), (1, 1, 1))))
        else:
            t = (t.float() * rng.choice((0.0, -1.0, 1e30, 1e38))).clone()
        if key in found:
            found[key] = t
    folder.weights = save(found, metadata={"format": "pt"})


# ---- the file system ----------------------------------------------------------------------------


def places(rng: random.Random, folder: Folder) -> None:
    """Links to elsewhere and to nowhere, loops, folders and devices in place of files."""
    name = rng.choice((CONFIG_FILE, WEIGHTS_FILE))
    target = rng.choice(
        (
            *("/dev/zero", "/dev/null", "/proc/self/maps", "/proc/self/mem", "/etc/passwd"),
            *("../../../../../../etc/passwd", "..", ".", "nowhere", name, "/proc/self/fd/0"),
            *(CONFIG_FILE, WEIGHTS_FILE, "kept"),
        )
    )
    how = rng.randrange(5)

    def place(path: Path) -> None:
        kept = path / "kept"
        kept.unlink(missing_ok=True)
        os.replace(path / name, kept)
        if how == 0:
            (path / name).mkdir()
        elif how == 1:
            os.mkfifo(path / name)
        elif how == 2:
            pass  # missing
        else:
            (path / name).symlink_to(target)

    folder.place = place


def nothing_at_all(rng: random.Random, folder: Folder) -> None:
    folder.weights = rng.choice(
        (b"", b"\0", b"\0" * 8, rng.randbytes(100), b"\x80\x04K\x01.", b"{}")
    )


NOTHING_LEFT = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
MUTATIONS = (
    *(weights_bytes, weights_bytes, config_bytes, config_bytes, config_encoding, config_values),
    *(config_values, config_values, header_length, header_entries, header_entries, header_names),
    *(header_of_giants, tensors, tensors, tensors, places, nothing_at_all),
)


def mutated(rng: random.Random, original: Folder) -> Folder:
    """A copy of `original` with one damage, sometimes two; most of them with the right sum."""
    folder = dataclasses.replace(original, fix_sum=rng.random() < 0.85, log=[])
    for mutation in rng.sample(MUTATIONS, rng.choice((1, 1, 1, 1, 2))):
        try:
            mutation(rng, folder)
            folder.log.append(mutation.__name__)
        except (*NOTHING_LEFT, struct.error, SafetensorError):
            # Written for the first damage, this one found nothing left to change.
            folder.log.append(f"({mutation.__name__})")
    return folder
