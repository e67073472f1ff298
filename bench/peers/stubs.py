"""Load single files of an engine without the engine: what they import from it is made up here.

The files import little (a logger, environment switches, the platform), so that a handful of
attributes serves them. Everything stays below the engine's own name in `sys.modules`.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peers import UNPACKED, VERSIONS, PeerAbsent


def kernel_folder(engine: str) -> Path:
    """Where the engine's files lie.

    Raises: PeerAbsent, if they were not fetched, are of another version, or Triton is missing.
    """
    folder, marker = UNPACKED / engine, UNPACKED / f"{engine}.version"
    if not folder.is_dir() or not marker.is_file():
        raise PeerAbsent(f"bench/peers/unpacked/{engine} is not there: run bench/peers/fetch.py")
    found = marker.read_text().strip()
    if found != VERSIONS[engine]:
        raise PeerAbsent(f"unpacked files are of {engine} {found}, wanted is {VERSIONS[engine]}")
    if importlib.util.find_spec("triton") is None:
        raise PeerAbsent("Triton is not installed")
    return folder


def module(name: str, **attributes: Any) -> types.ModuleType:
    """Put an empty package with these attributes into `sys.modules`, or add them to the one that
    an earlier call has put there, since two peers may be of one engine."""
    made = sys.modules.get(name)
    if made is None or made.__spec__.loader is not None:
        made = types.ModuleType(name)
    made.__path__ = []
    # Others ask find_spec() whether the engine is there, which fails on a module without a spec.
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__dict__.update(attributes)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, made)
    return made


def file(name: str, path: Path) -> types.ModuleType:
    """Run one file as the module `name`.

    Raises: PeerAbsent, if it is not there or does not run here.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except (ImportError, OSError, AttributeError, TypeError) as error:
        del sys.modules[name]
        raise PeerAbsent(f"{path.name} cannot be loaded: {error}") from error
    return loaded


@contextlib.contextmanager
def instead(**modules: types.ModuleType) -> Iterator[None]:
    """These modules in place of others of their names, inside."""
    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, before in kept.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before


class Silent:
    """A logger that says nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def capability() -> int:
    """90 on Hopper; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
