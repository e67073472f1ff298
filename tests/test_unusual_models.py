"""Models that `attach` must not take for granted: plain modules, hybrids, shared blocks, towers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from plain_model import plain_model
from tiny_models import COMMON, HIDDEN, VOCAB, build, config_of, left_padded, randomize, spread
from tolerance import assert_as_good_as_torch
from torch import nn

import milora
from milora.attach import runtime_of

Config = milora.MiLoRAConfig


# ---- models that are not from transformers ----------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    """A model with none of transformers' methods; `keyword` is how it calls its blocks."""

    def __init__(self, keyword: str | None = None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, VOCAB)])  # linear modules are no blocks
        self.keyword = keyword

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(**{self.keyword: x}) if self.keyword else block(x)
        return self.heads[0](x)


class OtherNames(Plain):
    def forward(self, tokens):
        return super().forward(tokens)


def test_plain_module():
    bare = Plain()
    model = randomize(milora.attach(copy.deepcopy(bare), Config(rank=4, top_k=1)))
    assert [block.path for block in runtime_of(model).blocks] == ["blocks.0", "blocks.1"]
    batch = left_padded((5, 8))
    with pytest.raises(ValueError, match=r"milora\.prompt_lengths"):
        model(**batch)
    with milora.record_routing(model) as states, milora.prompt_lengths(model, [3, 8]):
        logits = model(**batch)
    assert states[0].prompt_lengths.tolist() == [3, 8]
    with torch.no_grad():
        for row in range(2):
            expected, same_dtype = (
                plain_model(model, bare, states[0], row, dtype)(batch["input_ids"])[row]
                for dtype in (torch.float64, torch.float32)
            )
            assert_as_good_as_torch(logits[row], expected, same_dtype)
        milora.detach(model)
        assert torch.equal(model(**batch), bare(**batch))


def test_the_routers_width_is_the_blocks_whatever_is_targeted(tmp_path):
    model = randomize(milora.attach(Plain(), Config(rank=4, top_k=1, target_modules=["down"])))
    milora.save(model, tmp_path)
    again = Plain()
    again.load_state_dict(milora.detach(copy.deepcopy(model)).state_dict())
    milora.load(again, tmp_path)
    ids = left_padded((5,))["input_ids"]
    with milora.prompt_lengths(model, 5), milora.prompt_lengths(again, 5), torch.no_grad():
        assert torch.equal(model(ids), again(ids))


def test_plain_modules_that_cannot_be_routed():
    with pytest.raises(ValueError, match="no list of Transformer blocks"):
        milora.attach(nn.Sequential(nn.Linear(4, 4)), Config(rank=2))
    model = milora.attach(OtherNames(), Config(rank=4))
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(left_padded((5,))["input_ids"])
    model = milora.attach(Plain(keyword="x"), Config(rank=4))
    with (
        pytest.raises(RuntimeError, match=r"first positional .* got keywords \['x'\]"),
        milora.prompt_lengths(model, 3),
    ):
        model(left_padded((5,))["input_ids"])
    model = milora.attach(Plain(), Config(rank=4))
    with pytest.raises(RuntimeError, match=r"blocks\.0 was called outside the forward of Plain"):
        model.blocks[0](torch.zeros(1, 3, HIDDEN))


class Reader(Layer):
    """Reads the weight of `up` without calling it, unless it is skipped altogether."""

    skipped = False

    def forward(self, x):
        return x if self.skipped else x + self.down(torch.relu(x @ self.up.weight.T))


@pytest.mark.parametrize("training", [False, True])
def test_experts_that_are_never_called_are_named_once(training):
    model = Plain()
    model.blocks = nn.ModuleList(Reader() for _ in range(3))
    model.blocks[2].skipped = True  # says nothing about its modules
    milora.attach(model, Config(rank=4, target_modules=["down"])).train(training)

    def run() -> list[str]:
        with warnings.catch_warnings(record=True) as caught, milora.prompt_lengths(model, 3):
            warnings.simplefilter("always")
            model(**left_padded((5, 8))).sum().backward()
        return [str(warning.message) for warning in caught]

    assert run() == []
    milora.attach(model, Config(rank=4), "all")
    (message,) = run()
    assert "the experts on up (in 2 blocks) have no effect" in message
    assert run() == []


@pytest.mark.parametrize("how", ["block.compile", "torch.compile of a block", "of a forward"])
def test_compiled_blocks_are_not_said_to_call_nothing(how):
    """Compiled code does not tell which modules it calls."""
    model = milora.attach(Plain(), Config(rank=4)).eval()
    for i, block in enumerate(model.blocks):
        if how == "block.compile":
            block.compile(backend="eager")
        elif how == "of a forward":
            block.forward = torch.compile(block.forward, backend="eager")
        else:
            model.blocks[i] = torch.compile(block, backend="eager")
    with warnings.catch_warnings(), torch.no_grad(), milora.prompt_lengths(model, 3):
        warnings.filterwarnings("error", message="milora: the experts")
        model(**left_padded((5, 8)))


def test_float64_is_refused():
    model = Plain().double()
    with pytest.raises(ValueError, match=r"blocks\.0\.\w+ computes in float64; experts take"):
        milora.attach(model, Config(rank=4))
    assert runtime_of(model, required=False) is None


class Mixture(nn.Module):
    """A mixture of experts that keeps them in a list, beside a linear gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 2)
        self.experts = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_mixtures_of_experts_are_left_out():
    model = Plain()
    for block in model.blocks:
        block.mixture = Mixture()
    milora.attach(model, Config(rank=4))
    assert all(set(block.experts) == {"up", "down"} for block in runtime_of(model).blocks)


def test_a_shared_module_belongs_to_its_first_block():
    """Its other users follow the first block's gate, as Zamba's shared transformer does."""
    model = Plain()
    shared = Layer()
    for block in model.blocks:
        block.up, block.down = shared, nn.Linear(HIDDEN, HIDDEN)
    randomize(milora.attach(model, Config(rank=4, top_k=1)))
    first, second = runtime_of(model).blocks
    assert (set(first.experts), set(second.experts)) == ({"up.up", "up.down", "down"}, {"down"})
    seen = []
    shared.up.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    ids = left_padded((4,))["input_ids"]
    with torch.no_grad(), milora.record_routing(model) as states, milora.prompt_lengths(model, 4):
        model(ids)
    assert len(seen) == 2
    gate = states[0].block_gates[0][0, first.experts.index("up.up")]
    weights = shared.up.weights("default")
    for x, y in seen:
        change = gate * weights.scale * x @ weights.a.T @ weights.b.T
        torch.testing.assert_close(y, shared.up.base_layer(x) + change)


# ---- unusual models of transformers -----------------------------------------------------------


def tiny(model: str, config) -> nn.Module:
    torch.manual_seed(0)
    built = getattr(transformers, model)(config).eval()
    spread(built)
    return built


def test_hybrid_blocks_of_two_classes():
    """Jamba: state-space blocks beside attention, a dense and a mixture-of-experts layer."""
    model = tiny(
        "JambaForCausalLM",
        transformers.JambaConfig(
            **COMMON,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_d_state=4,
        ),
    )
    milora.attach(model, Config(rank=4, top_k=2))
    first, second = (set(block.experts) for block in runtime_of(model).blocks)
    assert {"mamba.in_proj", "feed_forward.up_proj"} <= first
    assert second == {f"self_attn.{name}_proj" for name in "qkvo"}
    with pytest.warns(UserWarning, match=r"experts on mamba\.dt_proj \(in 1 blocks\) have no eff"):
        out = randomize(model).generate(
            **left_padded((3, 6)), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
        )
    state = milora.routing_state(out.past_key_values)
    assert state.gates.shape == (2, 2, len(first))
    assert not state.gates[1, :, len(second) :].any()  # padded with gate 0
    assert milora.stats(model).routed_prompts == 4


def test_a_block_that_is_shared_is_routed_once():
    config = transformers.AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=16,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = tiny("AlbertForSequenceClassification", config)
    randomize(milora.attach(model, Config(rank=4)))
    with torch.no_grad():
        model(**left_padded((3, 6), side="right"))
    assert milora.stats(model) == milora.Stats(2, 1)


def test_only_the_language_model_of_a_multimodal_model():
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=config_of("gemma3").to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    model = tiny("Gemma3ForConditionalGeneration", config)
    randomize(milora.attach(model, Config(rank=4)))
    paths = [block.path for block in runtime_of(model).blocks]
    assert paths == ["model.language_model.layers.0", "model.language_model.layers.1"]
    model.generate(**left_padded((3, 6)), max_new_tokens=3, min_new_tokens=3)
    assert milora.stats(model) == milora.Stats(4, 2)


def test_blocks_that_see_the_time_axis_first_are_refused():
    config = transformers.XLNetConfig(vocab_size=VOCAB, d_model=HIDDEN, n_layer=1, n_head=4)
    model = milora.attach(tiny("XLNetForSequenceClassification", config), Config(rank=4))
    with pytest.raises(RuntimeError, match=r"sees tokens \[6, 2\].*prompt's place is unknown"):
        model(**left_padded((6, 6)))


def test_linears_that_see_the_time_axis_first_are_refused():
    config = transformers.LongformerConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        attention_window=4,
        pad_token_id=0,
    )
    model = milora.attach(tiny("LongformerForSequenceClassification", config), Config(rank=4))
    with pytest.raises(RuntimeError, match="leave this module out of target_modules"):
        model(**left_padded((8, 8)))
    milora.detach(model)
    milora.attach(model, Config(rank=4, target_modules=["intermediate.dense"]))
    assert model(**left_padded((8, 8))).logits.isfinite().all()


# ---- weights that are not there -----------------------------------------------------------------


def test_a_base_that_accelerate_offloads(tmp_path):
    """Its weights are on the meta device but for the forward; the adapter's must not be."""
    accelerate = pytest.importorskip("accelerate")
    whole = randomize(milora.attach(build("llama"), Config(rank=4, top_k=2)))
    milora.save(whole, tmp_path)
    bare = build("llama")
    accelerate.cpu_offload(bare, execution_device="cpu")
    assert all(parameter.is_meta for parameter in bare.parameters())
    batch, options = left_padded((3, 6)), {"max_new_tokens": 4, "min_new_tokens": 4}
    with milora.record_routing(whole) as states:
        want = whole.generate(**batch, **options)

    model = milora.load(bare, tmp_path)
    assert torch.equal(model.generate(**batch, **options), want)
    with milora.pin_route(model, states[0]):
        assert torch.equal(model.generate(**batch, **options), want)
    for kind in ("dora", "lora_xs"):
        with pytest.raises(
            TypeError, match="needs the base weight, which accelerate has offloaded"
        ):
            milora.attach(model, Config(rank=4, expert=kind), kind)
    assert torch.equal(model.generate(**batch, **options), want)
    milora.detach(model)
    with milora.AdapterPool(model, device_bytes=1 << 20, host_bytes=1 << 20) as pool:
        pool.register("tenant", tmp_path)
        out = model.generate(**batch, adapter_names=["tenant", "tenant"], **options)
    assert torch.equal(out, want)


def test_a_base_that_was_made_in_inference_mode_comes_off_outside_of_it():
    with torch.inference_mode():
        model = milora.attach(build("llama"), Config(rank=4))
    milora.detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(hasattr(module, "base_layer") for module in model.modules())
