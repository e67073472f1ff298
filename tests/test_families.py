"""Every supported model family: blocks found, routed, decoded, trained and restored.

The reference is the bare model in float64 with a prompt's route merged into its weights
(tests/plain_model.py), each prompt alone and without padding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from plain_model import dense, plain_model, update_of
from tiny_models import CAUSAL, ENCODER, ENCODER_DECODER, FAMILIES, build, left_padded, randomize
from tolerance import assert_as_good_as_torch

import milora
from milora.attach import runtime_of
from milora.nn import MiLoRALinear

LENGTHS = (3, 7, 5)
NEW_TOKENS = 5
KINDS = {
    "lora": {},
    "dora": {},
    "lora_mini": {"inner_in": 12, "inner_out": 8},
}
GENERATING = CAUSAL + ENCODER_DECODER
families = pytest.mark.parametrize("name", FAMILIES)
kinds = pytest.mark.parametrize("kind", KINDS)


def config(kind: str = "lora") -> milora.MiLoRAConfig:
    return milora.MiLoRAConfig(rank=4, alpha=8, top_k=2, expert=kind, expert_options=KINDS[kind])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Prompts of unequal lengths. BART and BERT count positions from the left, padding included."""
    return left_padded(LENGTHS, side="right" if name in ("bart", "bert") else "left")


def attached(name: str, kind: str = "lora", dtype: torch.dtype = torch.float32):
    """The bare tiny model, and the same one with an adapter that matters."""
    bare = build(name).to(dtype)
    return bare, randomize(milora.attach(copy.deepcopy(bare), config(kind)), seed=2)


def greedy(model, batch: dict):
    return model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def forward_all(name: str, model, batch: dict, sequences=None) -> torch.Tensor:
    """Logits of one forward without a cache: [rows, new tokens, vocabulary], BERT: [rows, classes].

    `sequences` are what `generate` returned.
    """
    if name in ENCODER:
        return model(**batch).logits
    if name in ENCODER_DECODER:
        return model(**batch, decoder_input_ids=sequences[:, :-1]).logits
    prompt = batch["attention_mask"]
    mask = torch.cat([prompt, torch.ones_like(sequences[:, prompt.shape[1] :])], 1)
    inputs = {"input_ids": sequences, "attention_mask": mask}
    if name not in ("bloom", "falcon"):  # their positions follow from the mask
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with milora.prompt_lengths(model, prompt.sum(1)):
        return model(**inputs, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]


def forward_alone(name: str, plain, batch: dict, row: int, sequences=None) -> torch.Tensor:
    """The same of prompt `row` in a plain model: no padding, no other rows."""
    ids = batch["input_ids"][row, batch["attention_mask"][row] == 1][None]
    if name in ENCODER:
        return plain(ids).logits
    if name in ENCODER_DECODER:
        return plain(ids, decoder_input_ids=sequences[row : row + 1, :-1]).logits
    padding = batch["input_ids"].shape[1] - ids.shape[1]
    return plain(sequences[row : row + 1, padding:], use_cache=False).logits[
        :, ids.shape[1] - 1 : -1
    ]


@torch.no_grad()
def alone(name: str, model, bare, state, batch: dict, sequences=None) -> list[torch.Tensor]:
    """[rows, ...] in float64 and in float32: each prompt in a plain model with its route merged."""
    return [
        torch.cat(
            [
                forward_alone(
                    name, plain_model(model, bare, state, row, dtype), batch, row, sequences
                )
                for row in range(len(LENGTHS))
            ]
        )
        for dtype in (torch.float64, torch.float32)
    ]


def separation(state: milora.RoutingState) -> float:
    """How far the last kept expert is from the first dropped one, as a ratio of probabilities - 1.

    Against rounding errors of 1e-6 this tells that another batch shape cannot flip a route.
    """
    ordered = state.probabilities.sort(-1, descending=True).values
    return (ordered[..., 1] / ordered[..., 2] - 1).min().item()


@families
def test_blocks_and_names(name):
    family, model = FAMILIES[name], build(name)
    kind = type(model)
    milora.attach(model, config())
    runtime = runtime_of(model)
    encoder = [block for block in runtime.blocks if block.source is None]
    decoder = [block for block in runtime.blocks if block.source is not None]
    assert [b.path for b in encoder] == [f"{family.blocks}.{i}" for i in range(len(encoder))]
    assert [b.path for b in decoder] == [
        f"{family.decoder_blocks}.{i}" for i in range(len(decoder))
    ]
    assert len(encoder) == len(model.get_submodule(family.blocks))
    if decoder:
        assert len(decoder) == len(model.get_submodule(family.decoder_blocks))
        last = len(encoder) - 1
        assert [b.source for b in decoder] == [min(i * len(encoder) // 2, last) for i in (0, 1)]
    for block in runtime.blocks:
        expected = family.experts if block.source is None else family.decoder_experts
        assert sorted(block.experts) == sorted(expected)
        for path in block.experts:
            assert isinstance(block.module.get_submodule(path), MiLoRALinear)
    assert type(model) is kind


@kinds
@pytest.mark.parametrize("name", GENERATING)
def test_decode_and_full_forward_match_each_prompt_alone(name, kind):
    bare, model = attached(name, kind)
    batch = batch_of(name)
    with milora.record_routing(model) as states:
        out = greedy(model, batch)
    assert milora.stats(model).routed_prompts == len(states[0].names) * len(LENGTHS)
    assert len(states) == 1 and separation(states[0]) > 1e-4
    decoded = torch.stack(out.logits, 1)
    with milora.record_routing(model) as states_full:  # with autograd: the training kernels
        full = forward_all(name, model, batch, out.sequences)
    assert states_full[0].same_route(states[0], tolerance=1e-5)
    expected, same_dtype = alone(name, model, bare, states[0], batch, out.sequences)
    assert_as_good_as_torch(decoded, expected, same_dtype, "decode")
    assert_as_good_as_torch(full, expected, same_dtype, "full forward")
    with torch.no_grad(), milora.disabled(model):
        base = forward_all(name, model, batch, out.sequences)
    assert (base - full).abs().max() > 1e-2, "the adapter makes no difference"


@kinds
def test_encoder_matches_each_prompt_alone(kind):
    bare, model = attached("bert", kind)
    batch = batch_of("bert")
    with milora.record_routing(model) as states, torch.no_grad():
        logits = model(**batch).logits
    assert torch.equal(states[0].prompt_lengths, torch.tensor(LENGTHS))  # all attended tokens
    assert milora.stats(model) == milora.Stats(2 * len(LENGTHS), 2)
    expected, same_dtype = alone("bert", model, bare, states[0], batch)
    assert_as_good_as_torch(logits, expected, same_dtype, "inference")
    with_autograd = model(**batch, labels=torch.tensor([0, 1, 0])).logits
    assert_as_good_as_torch(with_autograd, expected, same_dtype, "training")


class Captured:
    """Inputs and outputs of every attached linear module, and inputs of every block."""

    def __init__(self, model):
        self.linears, self.blocks = [], {}
        runtime = runtime_of(model)
        for linears in runtime.linears:
            for linear in linears:
                linear.register_forward_hook(self.linear)
        for index, block in enumerate(runtime.blocks):
            block.module.register_forward_pre_hook(self.block(index), with_kwargs=True)

    def linear(self, module, args, output):
        self.linears.append((module, args[0].detach().clone(), output.detach().clone()))

    def block(self, index):
        def keep(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            self.blocks.setdefault(index, hidden.detach().clone())  # the first call: the prefill

        return keep


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("lora", torch.bfloat16)]
)
@families
def test_every_linear_follows_the_formula(name, kind, dtype):
    _, model = attached(name, kind, dtype)
    captured = Captured(model)
    batch = batch_of(name)
    with milora.record_routing(model) as states:
        if name in ENCODER:
            with torch.no_grad():
                model(**batch)
        else:
            greedy(model, batch)
    called = {id(module) for module, _, _ in captured.linears}
    for linears in runtime_of(model).linears:
        assert {id(linear) for linear in linears} <= called
    for module, x, y in captured.linears:
        gates = states[0].block_gates[module.block][:, module.column]
        weight = dense(module.base_layer)
        update = update_of(module, "default", weight.double())

        def formula(dtype, x=x, module=module, weight=weight, update=update, gates=gates):
            x = x.reshape(len(LENGTHS), -1, module.d_in).to(dtype)  # rows of one prompt are a run
            bias = 0 if module.bias is None else module.bias.to(dtype)
            change = torch.stack(
                [g * (r @ update.T.to(dtype)) for g, r in zip(gates, x, strict=True)]
            )
            return (x @ weight.T.to(dtype) + bias + change).flatten(0, 1)

        with torch.no_grad():
            expected, same_dtype = formula(torch.float64), formula(dtype)
        assert_as_good_as_torch(
            y.flatten(0, -2), expected, same_dtype, f"{module.block} {module.column}"
        )


@families
def test_router_reads_the_prompt_before_the_block(name):
    """Equations 2, 3 and 6 in float64, on the hidden states that each block gets."""
    _, model = attached(name)
    captured = Captured(model)
    batch = batch_of(name)
    with milora.record_routing(model) as states, torch.no_grad():
        if name in ENCODER:
            model(**batch)
        else:
            greedy(model, batch)
    runtime = runtime_of(model)
    routers = runtime.routers_of("default")

    def pool(index: int, row: int) -> torch.Tensor:
        h = captured.blocks[index][row, batch["attention_mask"][row] == 1].double()
        weights = torch.softmax(h @ routers[index].w_sa.double(), 0)
        return weights @ h

    for index, block in enumerate(runtime.blocks):
        source = index if block.source is None else block.source
        pooled = torch.stack([pool(source, row) for row in range(len(LENGTHS))])
        a, b = routers[index].theta.double().split([7, 5])
        top = sum(c * pooled**j for j, c in enumerate(a))
        bottom = 1 + sum(c * pooled ** (j + 1) for j, c in enumerate(b)).abs()
        p = torch.softmax(top / bottom @ routers[index].w_r.double().T, -1)
        kept = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
        torch.testing.assert_close(
            states[0].block_probabilities[index].double(), p, atol=1e-5, rtol=1e-4
        )
        assert torch.equal(states[0].block_gates[index] > 0, kept > 0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@families
def test_training_step(name, kind):
    _, model = attached(name, kind)
    batch = batch_of(name)
    if name in ENCODER:
        labels = torch.tensor([0, 1, 0])
    elif name in ENCODER_DECODER:
        labels = left_padded((4, 4, 4), seed=3)["input_ids"]
    else:
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100  # the last two tokens are the answer
    with milora.record_routing(model) as states:
        model(**batch, labels=labels).loss.backward()
    if name in CAUSAL:
        assert states[0].prompt_lengths.tolist() == [n - 2 for n in LENGTHS]
    for index, (linears, gates) in enumerate(
        zip(runtime_of(model).linears, states[0].block_gates, strict=True)
    ):
        for linear in linears:
            is_kept = bool((gates[:, linear.column] > 0).any())
            for key, tensor in linear.tensors("default").items():
                has_grad = tensor.grad is not None and bool(tensor.grad.any())
                assert has_grad == is_kept, (index, linear.column, key)
    for block, router in zip(
        runtime_of(model).blocks, runtime_of(model).routers_of("default"), strict=True
    ):
        assert router.w_r.grad.any() and router.theta.grad is None, block.path
        if block.source is None:
            assert router.w_sa.grad.any(), block.path
    for key, parameter in model.named_parameters():
        if not (".lora_" in key or ".milora_router." in key):
            assert parameter.grad is None and not parameter.requires_grad, key


@families
def test_detach_restores_the_model(name):
    model = build(name)
    # All but one: torch multiplies by a weight that wants a gradient in another order (5e-7).
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    modules = dict(model.named_modules())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(model.__dict__)
    batch = batch_of(name)
    inputs = (
        {**batch, "decoder_input_ids": batch["input_ids"]} if name in ENCODER_DECODER else batch
    )
    with torch.no_grad():
        before = model(**inputs).logits
        randomize(milora.attach(model, config("dora")))
        with milora.disabled(model):
            assert torch.equal(model(**inputs).logits, before)
        milora.detach(model)
        assert torch.equal(model(**inputs).logits, before)
    assert dict(model.named_modules()) == modules  # modules compare by identity
    assert set(model.__dict__) == attributes
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    for module in modules.values():
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        assert not any("milora" in type(h).__module__ for table in hooks for h in table.values())
