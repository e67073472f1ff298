"""The per-token mixture of LoRA against one loop over experts and tokens in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_as_good_as_torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from milora.baselines import (
    TokenMixtureConfig,
    TokenMixtureLinear,
    attach_token_mixture,
    detach_token_mixture,
)


@dataclass(frozen=True)
class Case:
    num_experts: int
    expert_rank: int
    top_k: int
    shape: tuple[int, ...] = (2, 5)
    alpha: float | None = None
    bias: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.num_experts}x{self.expert_rank}-top{self.top_k}-{shape}"


CASES = [
    Case(8, 4, 2),
    Case(5, 6, 2, shape=(7,)),
    Case(4, 1, 1, alpha=2.0),
    Case(3, 2, 3, bias=True),
    Case(1, 8, 1, shape=(1, 1)),
    Case(4, 2, 2, shape=(0, 3)),
]


def make_layer(case: Case, d_in: int = 12, d_out: int = 10) -> TokenMixtureLinear:
    config = TokenMixtureConfig(case.num_experts, case.expert_rank, case.top_k, case.alpha)
    layer = TokenMixtureLinear(
        nn.Linear(d_in, d_out, bias=case.bias), config, torch.Generator().manual_seed(1)
    )
    nn.init.normal_(layer.lora_B)
    return layer


def reference(layer: TokenMixtureLinear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The module's docstring, expert by expert."""
    config = layer.config
    x, a, b, r = (t.to(dtype) for t in (x, layer.lora_A, layer.lora_B, layer.router))
    bias = layer.base_layer.bias
    y = x @ layer.base_layer.weight.to(dtype).T
    y = y if bias is None else y + bias.to(dtype)
    p = (x @ r.T).softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, p.topk(config.top_k, -1).indices, 1.0) * p
    gates = kept / kept.sum(-1, keepdim=True)
    for e in range(config.num_experts):
        rows = slice(e * config.expert_rank, (e + 1) * config.expert_rank)
        y = y + config.scale * gates[..., e : e + 1] * (x @ a[rows].T @ b[:, rows].T)
    return y


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_equals_the_loop_over_experts(case: Case):
    layer = make_layer(case)
    x = torch.randn(*case.shape, 12)
    expected = reference(layer, x, torch.float64)
    assert_as_good_as_torch(layer(x), expected, reference(layer, x, torch.float32), "y")


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_gradients_equal_those_of_the_loop(case: Case):
    layer = make_layer(case)
    x = torch.randn(*case.shape, 12, requires_grad=True)
    parameters = [x, layer.lora_A, layer.lora_B, layer.router]
    grads = [
        torch.autograd.grad(y.square().sum(), parameters)
        for y in (layer(x), reference(layer, x, torch.float64), reference(layer, x, torch.float32))
    ]
    for name, *values in zip(("x", "A", "B", "router"), *grads, strict=True):
        assert_as_good_as_torch(*values, name)


def test_a_bfloat16_base_keeps_its_dtype():
    layer = make_layer(Case(4, 2, 2))
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    expected = reference(layer, x, torch.float64)
    assert_as_good_as_torch(y, expected, expected.to(torch.bfloat16), "y")


def test_attach_starts_as_the_base_and_detach_restores_it():
    model, ids = make_model(), torch.arange(8)[None]
    before, keys = model(ids).logits, set(model.state_dict())
    attach_token_mixture(model, TokenMixtureConfig(4, 2))
    assert torch.equal(model(ids).logits, before)
    trainable = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B", "router"}
    assert not isinstance(model.lm_head, TokenMixtureLinear)
    for layer in model.modules():
        if isinstance(layer, TokenMixtureLinear):
            nn.init.normal_(layer.lora_B)
    assert not torch.equal(model(ids).logits, before)
    detach_token_mixture(model)
    assert torch.equal(model(ids).logits, before) and set(model.state_dict()) == keys


def test_the_seed_decides_the_experts():
    first, second, other = (
        attach_token_mixture(make_model(), TokenMixtureConfig(seed=seed)).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    key = "model.layers.0.mlp.up_proj.router"
    assert not torch.equal(first[key], other[key])


def balance_of(model, coefficient: float, **batch) -> Tensor:
    """The balance term alone: the loss of training mode less that of evaluation mode."""
    return (model.train()(**batch).loss - model.eval()(**batch).loss) / coefficient


def test_balance_loss_is_one_when_balanced_and_joins_only_the_training_loss():
    model = attach_token_mixture(make_model(), TokenMixtureConfig(4, 2, balance_coef=0.5))
    ids = torch.randint(32, (2, 6))
    for layer in model.modules():
        if isinstance(layer, TokenMixtureLinear):
            nn.init.zeros_(layer.router)  # all probabilities are 1/E, so the loss is 1
    torch.testing.assert_close(
        balance_of(model, 0.5, input_ids=ids, labels=ids), torch.tensor(1.0), rtol=1e-5, atol=1e-5
    )
    assert model.train()(input_ids=ids).loss is None


def test_balance_loss_does_not_see_padding():
    model = attach_token_mixture(make_model(), TokenMixtureConfig(4, 2, balance_coef=1.0))
    ids = torch.randint(32, (2, 6))
    short = balance_of(model, 1.0, input_ids=ids, labels=ids)
    padded_ids = torch.cat([ids, torch.full((2, 3), 7)], dim=1)
    labels = torch.cat([ids, torch.full((2, 3), -100)], dim=1)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, 6:] = 0
    padded = balance_of(model, 1.0, input_ids=padded_ids, labels=labels, attention_mask=mask)
    torch.testing.assert_close(padded, short, rtol=1e-5, atol=1e-5)


def test_balance_loss_is_shared_among_accumulated_micro_batches():
    model = attach_token_mixture(make_model(), TokenMixtureConfig(4, 2, balance_coef=1.0))
    ids = torch.randint(32, (2, 6))
    whole = balance_of(model, 1.0, input_ids=ids, labels=ids)
    # Two equal halves of one optimizer step: each carries half of its own balance loss.
    half = balance_of(model, 1.0, input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(half, whole / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"expert_rank": -1}, "expert_rank must be at least 1, got -1"),
        ({"num_experts": 2, "top_k": 3}, "top_k must be at most num_experts = 2, got 3"),
    ],
)
def test_config_names_what_is_wrong(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TokenMixtureConfig(**options)


def test_attach_and_detach_refuse_what_they_cannot_do():
    model = make_model()
    with pytest.raises(ValueError, match="no token mixture"):
        detach_token_mixture(model)
    attach_token_mixture(model, TokenMixtureConfig())
    with pytest.raises(ValueError, match="has a mixture already"):
        attach_token_mixture(model, TokenMixtureConfig())
