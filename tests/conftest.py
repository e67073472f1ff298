"""What tests share: a fixed seed, two threads, the device and instruction-set axes, small pools."""

from __future__ import annotations

import os

import pytest
import torch

from milora import _build


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(2)


def pytest_runtest_logfinish():
    """After an error that a GPU does not recover from, every later test of the process would fail:
    a worker of pytest-xdist ends then, and another one goes on."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    """cpu, and cuda where there is one and the library was built for it."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU on this machine")
        if not _build.cuda_archs():
            pytest.skip("milora was built without CUDA")
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def isa(request) -> str:
    """Each instruction set of the CPU kernels; the choice is undone after the test."""
    if request.param not in _build.cpu_isas():
        pytest.skip(f"this CPU cannot run {request.param}")
    before = _build.cpu_isa()
    _build.set_cpu_isa(request.param)
    yield request.param
    _build.set_cpu_isa(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small adapters in folders by name: a to f of one size, L of twice that."""
    from pool_tools import same_size_folders  # here: tests of ops do without transformers

    return same_size_folders(tmp_path_factory)


@pytest.fixture
def pool(folders):
    """A pool that knows `folders` and has room for three of a to f."""
    from pool_tools import three_of_seven

    with three_of_seven(folders) as pool:
        yield pool
