"""A whole routed model on a GPU against the same model on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from test_routing import LENGTHS, NUM_BLOCKS, VOCAB, make_model, pad

import milora
from milora import _build

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def models():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    if not _build.cuda_archs():
        pytest.skip("milora was built without CUDA")
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model()
    return model, copy.deepcopy(model).cuda()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]
    return pad(prompts, "left")


def generate(model, batch, **options):
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options).cpu()


STATIC = {"cache_implementation": "static"}


# On a GPU transformers compiles the steps on a static cache unless it is told not to.
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {**STATIC, "disable_compile": True}])
def test_generation_and_routes_equal_the_cpus(models, batch, options):
    cpu, gpu = models
    milora.reset_stats(gpu)
    with milora.record_routing(cpu) as want, milora.record_routing(gpu) as got:
        expected, actual = (generate(model, batch, **options) for model in models)
    assert torch.equal(actual, expected)
    assert got[0].to(torch.device("cpu")).same_route(want[0], tolerance=1e-4)
    assert milora.stats(gpu) == milora.Stats(NUM_BLOCKS * len(LENGTHS), NUM_BLOCKS)


def test_compiled_generation_equals_the_cpus(models, batch):
    cpu, gpu = models
    assert torch.equal(generate(gpu, batch, **STATIC), generate(cpu, batch, **STATIC))


def test_gradients_equal_the_cpus(models, batch):
    gradients = []
    for model in models:
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        model.train()
        model(**inputs, labels=labels).loss.backward()
        model.eval()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert gradients[0].keys() <= gradients[1].keys()
    for name, gradient in gradients[1].items():
        want = gradients[0].get(name)
        want = torch.zeros_like(gradient, device="cpu") if want is None else want
        torch.testing.assert_close(gradient.cpu(), want, rtol=1e-3, atol=1e-5)
