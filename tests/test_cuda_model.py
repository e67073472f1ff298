"""A whole routed model on a GPU against the same model on the CPU."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from test_routing import LENGTHS, NUM_BLOCKS, VOCAB, make_model, pad

import milora
from milora import _build
from milora.runtime import runtime_of

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


def test_a_forgotten_pack_outlives_the_streams_that_read_it(models):
    """Another thread's kernels may still read it when its memory would be given away."""
    packs = runtime_of(models[1]).packs
    packs.slots(("default",))
    address = packs.block(0, torch.float32).pool.data_ptr()
    size = packs.block(0, torch.float32).pool.numel()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        packs.block(0, torch.float32)
        torch.cuda._sleep(2_000_000_000)  # about a second
    packs._blocks.clear()
    taken = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(8)]
    assert not other.query()  # it still sleeps
    assert all(t.data_ptr() != address for t in taken)
    other.synchronize()


def test_blocks_on_two_devices(models, batch):
    """As accelerate spreads a model over GPUs: the first block here is on the CPU."""
    cpu, _ = models
    spread = copy.deepcopy(cpu)

    def follow(module, args, kwargs):
        move = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, torch.Tensor.cuda)
        return move(args), move(kwargs)

    for module in (spread.model.layers[-1], spread.model.norm, spread.lm_head):
        # In front of milora's own hooks, as accelerate's are where a model is spread before.
        module.cuda().register_forward_pre_hook(follow, with_kwargs=True, prepend=True)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    with torch.no_grad(), milora.record_routing(spread) as routes:
        got = spread(**batch, use_cache=True)
        want = cpu(**batch, use_cache=True)
        assert torch.isfinite(routes[0].gates).all()
        token = torch.full((len(LENGTHS), 1), 5)
        got_step = spread(input_ids=token, past_key_values=got.past_key_values, use_cache=True)
        want_step = cpu(input_ids=token, past_key_values=want.past_key_values, use_cache=True)
    for a, b in ((got, want), (got_step, want_step)):
        torch.testing.assert_close(a.logits.cpu(), b.logits, rtol=1e-3, atol=1e-4)
    spread.train()
    spread(**batch, labels=labels, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in spread.parameters() if p.grad is not None)


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
