"""Tiny random models, one builder per family, for every test that needs a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from milora.attach import runtime_of

VOCAB, HIDDEN, LAYERS, HEADS, INTERMEDIATE, MAX_LENGTH = 96, 32, 2, 4, 48, 128
PAD, EOS = 0, 1
LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA = tuple(f"self_attn.{n}" for n in LLAMA_ATTENTION) + tuple(f"mlp.{n}" for n in LLAMA_MLP)


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model, and what `attach` must find in it.

    Attributes:
        config, model: names of classes in `transformers`.
        options: the configuration, on top of the names and values that most families share.
        blocks: path of the list of blocks (of the encoder, for encoder-decoder models).
        experts: paths of the linear modules of a block, as a set: order belongs to the model.
        decoder_blocks, decoder_experts: the same of an encoder-decoder model's decoder.
    """

    name: str
    config: str
    model: str
    blocks: str
    experts: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    decoder_blocks: str | None = None
    decoder_experts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
T5 = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INTERMEDIATE,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": PAD,
}
T5_SELF = tuple(f"layer.0.SelfAttention.{n}" for n in "qkvo")
T5_CROSS = tuple(f"layer.1.EncDecAttention.{n}" for n in "qkvo")
LLAMA_SELF = LLAMA[:4]
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BERT = (
    *(f"attention.self.{n}" for n in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)

_FAMILIES = [
    Family("llama", "LlamaConfig", "LlamaForCausalLM", "model.layers", LLAMA),
    Family("mistral", "MistralConfig", "MistralForCausalLM", "model.layers", LLAMA),
    Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM", "model.layers", LLAMA),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM", "model.layers", LLAMA, {"head_dim": 8}),
    Family("gemma2", "Gemma2Config", "Gemma2ForCausalLM", "model.layers", LLAMA, GEMMA),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        "model.layers",
        LLAMA,
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family(
        "phi",
        "PhiConfig",
        "PhiForCausalLM",
        "model.layers",
        (*BIASED, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    ),
    Family(
        "phi3",
        "Phi3Config",
        "Phi3ForCausalLM",
        "model.layers",
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    Family(
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        "gpt_neox.layers",
        (
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
    ),
    Family(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        "model.decoder.layers",
        (*BIASED, "self_attn.out_proj", "fc1", "fc2"),
        {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN},
    ),
    Family(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        "transformer.h",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    Family(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        "transformer.h",
        (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
    ),
    Family(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        "transformer.h",
        (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    ),
    Family(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        "model.layers",
        LLAMA_SELF,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        "model.layers",
        LLAMA_SELF,
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        "model.layers",
        LLAMA_SELF,
        {**QWEN_EXPERTS, "head_dim": 8},
    ),
    Family(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        "encoder.block",
        (*T5_SELF, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
        {**T5, "feed_forward_proj": "relu"},
        "decoder.block",
        (*T5_SELF, *T5_CROSS, "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
    ),
    Family(
        "t5_gated",
        "T5Config",
        "T5ForConditionalGeneration",
        "encoder.block",
        (*T5_SELF, *(f"layer.1.DenseReluDense.{n}" for n in ("wi_0", "wi_1", "wo"))),
        {**T5, "feed_forward_proj": "gated-gelu", "num_layers": 3, "num_decoder_layers": 2},
        "decoder.block",
        (
            *T5_SELF,
            *T5_CROSS,
            *(f"layer.2.DenseReluDense.{n}" for n in ("wi_0", "wi_1", "wo")),
        ),
    ),
    Family(
        "bart",
        "BartConfig",
        "BartForConditionalGeneration",
        "model.encoder.layers",
        (*BIASED, "self_attn.out_proj", "fc1", "fc2"),
        {
            "d_model": HIDDEN,
            **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": INTERMEDIATE for side in ("encoder", "decoder")},
            "max_position_embeddings": MAX_LENGTH,
            "bos_token_id": 2,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
        },
        "model.decoder.layers",
        (
            *(f"{a}.{n}_proj" for a in ("self_attn", "encoder_attn") for n in "qkv"),
            *(f"{a}.out_proj" for a in ("self_attn", "encoder_attn")),
            "fc1",
            "fc2",
        ),
    ),
    Family("bert", "BertConfig", "BertForSequenceClassification", "bert.encoder.layer", BERT),
]
FAMILIES = {family.name: family for family in _FAMILIES}
ENCODER_DECODER = ("t5", "t5_gated", "bart")
ENCODER = ("bert",)
CAUSAL = tuple(n for n in FAMILIES if n not in ENCODER_DECODER + ENCODER)


def config_of(name: str, **options: Any) -> transformers.PretrainedConfig:
    """The tiny configuration of family `name`; `options` override."""
    family = FAMILIES[name]
    shared = dict(COMMON)
    if name in ENCODER_DECODER:
        shared = {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "eos_token_id")}
    return getattr(transformers, family.config)(**{**shared, **family.options, **options})


def build(name: str, *, seed: int = 0, **options: Any) -> transformers.PreTrainedModel:
    """A tiny random model of family `name`, float32, in eval mode, the same for the same seed.

    Args:
        options: override entries of the configuration (`num_hidden_layers=3`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, FAMILIES[name].model)(config_of(name, **options))
        spread(model)
    return model.eval()


@torch.no_grad()
def spread(model: nn.Module, std: float = 0.2) -> None:
    """Give all matrices and biases a spread that makes tokens, and thus logits, tell apart.

    The standard initialisation (std 0.02) leaves a tiny model's logits nearly equal: greedy
    decoding would hang on rounding, and adapters could be wrong without any output saying so.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std)
        elif not parameter.any():
            parameter.normal_(0.0, 0.1)


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.3, seed: int = 1) -> nn.Module:
    """Fill what starts at zero in all attached adapters, so that they matter: B, LoRA-Mini's M_2
    and `w_sa`; move DoRA's magnitudes off the norms; draw router weights that separate prompts.

    Gates of untrained routers are near ties; here probabilities differ clearly between experts.
    Returns: `model`.
    """
    runtime = runtime_of(model)
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))

    for linears in runtime.linears:
        for linear in linears:
            for name in linear.specs:
                for key, tensor in linear.tensors(name).items():
                    if key.endswith("_B"):
                        fill(tensor, std)
                    elif key == "lora_magnitude_vector":
                        tensor.mul_(1.0 + std * torch.rand(tensor.shape, generator=generator))
    for name in runtime.configs:
        for router in runtime.routers_of(name):
            if router is None:
                continue
            fill(router.w_r, 4.0 / router.w_r.shape[1] ** 0.5)
            if router.w_sa is not None:
                fill(router.w_sa, 1.0 / router.w_r.shape[1] ** 0.5)
    return model


def left_padded(
    lengths: tuple[int, ...] | list[int], *, seed: int = 0, side: str = "left"
) -> dict[str, Tensor]:
    """Random prompts of these lengths as {"input_ids", "attention_mask"}, padded on `side`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    column = torch.arange(width)
    if side == "left":
        mask = torch.stack([column >= width - n for n in lengths])
    else:
        mask = torch.stack([column < n for n in lengths])
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def ragged_prompts(lengths: tuple[int, ...] | list[int], *, seed: int) -> list[Tensor]:
    """Random prompts of these lengths, each a tensor of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def prompts(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """[rows, length] random token ids without padding and end-of-sequence tokens."""
    return left_padded([length] * rows, seed=seed)["input_ids"]
