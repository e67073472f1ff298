"""Every kind of adapter side by side in one batch, attached or in a pool, and bare rows between.

Each row is compared with an ordinary model that has the row's route merged into its weights and
runs the row's prompt alone and without padding. What one model does with its own batches (routing
once per prompt, refused names, copies) stands in test_routing*.py.
"""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from plain_model import plain_model
from pool_tools import KINDS, pool_of, save_adapter
from test_import_lora import peft_adapter
from tiny_models import VOCAB, build, ragged_prompts
from tolerance import assert_as_good_as_torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import milora
from milora import PoolError, RoutingState
from milora.attach import runtime_of

NAMES = ["lora", "dora", None, "lora_mini", "peft", "partial", "__base__", "bare_router", "lora"]
LENGTHS = (5, 9, 7, 3, 8, 1, 9, 6, 4)
NEW_TOKENS = 4
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "min_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # many times as fast on a model this small


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in (*KINDS, "peft")}
    for seed, (kind, options) in enumerate(KINDS.items(), 3):
        save_adapter(made[kind], options, rank=2 + seed, seed=seed)
    peft_adapter(made["peft"], "llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]})
    return made


@pytest.fixture(scope="module")
def attached(folders):
    model = build("llama")
    for name, folder in folders.items():
        milora.load(model, folder, name)
    milora.set_adapter(model, None)
    return model


@pytest.fixture(scope="module", params=["attached", "pooled"])
def model(request, folders, attached):
    if request.param == "attached":
        yield attached
        return
    model = build("llama")
    with pool_of(model, 1 << 20, max_resident=16) as pool:
        for name, folder in folders.items():
            pool.register(name, folder)
        yield model


@pytest.fixture(scope="module")
def bare():
    # Frozen as the others: torch takes other kernels for weights that take gradients.
    return build("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(LENGTHS, seed=11)


@pytest.fixture(scope="module")
def alone(attached, bare):
    """Makes a row's ordinary model from the route that it took, in any dtype."""

    def make(state: RoutingState, row: int, dtype=torch.float32):
        return plain_model(attached, bare, state, row, dtype)

    return make


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, rows)) + 1  # all are padded: a mask of ones takes other kernels
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        at = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, at] = tokens
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def check_row(alone, state, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """`logits` are what a row's own model gives for the last tokens of `tokens`."""
    count = len(logits)
    exact = alone(state, row, torch.float64)(tokens[None]).logits[0, -count:]
    same_dtype = alone(state, row)(tokens[None]).logits[0, -count:]
    assert_as_good_as_torch(logits, exact, same_dtype, f"row {row}, {state.adapters[row]}")


def check_generation(out, alone, prompts, side_width: int, repeats: int = 1) -> None:
    """Each step's logits, given the tokens that were chosen."""
    logits = torch.stack(out.logits, 1)
    state = milora.routing_state(out.past_key_values)
    for row in range(len(out.sequences)):
        prompt = row // repeats
        tokens = torch.cat([prompts[prompt], out.sequences[row, side_width:-1]])
        check_row(alone, state, prompt, tokens, logits[row])


# ---- what one generates with --------------------------------------------------------------------


def test_greedy(model, alone, bare, prompts):
    batch = pad(prompts)
    out = model.generate(**batch, adapter_names=NAMES, **GREEDY)
    check_generation(out, alone, prompts, batch["input_ids"].shape[1])
    plain = bare.generate(**batch, **GREEDY)
    for row, name in enumerate(NAMES):  # bare rows bit for bit
        same = torch.equal(torch.stack(out.logits)[:, row], torch.stack(plain.logits)[:, row])
        assert same == (name in (None, "__base__"))


def test_sampled_sequences(model, alone, prompts):
    batch = pad(prompts)
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    out = model.generate(**batch, adapter_names=NAMES, **options)
    check_generation(out, alone, prompts, batch["input_ids"].shape[1], repeats=2)
    assert not torch.equal(out.sequences[0::2], out.sequences[1::2])


def test_static_cache_and_none(model, alone, prompts):
    batch = pad(prompts)
    want = model.generate(**batch, adapter_names=NAMES, **GREEDY)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        out = model.generate(**batch, adapter_names=NAMES, **GREEDY, **options)
        assert torch.equal(out.sequences, want.sequences)
        torch.testing.assert_close(
            torch.stack(out.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("sequences", [1, 2])
def test_beams(model, alone, prompts, sequences):
    options = {
        "num_beams": 3,
        "num_return_sequences": sequences,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    mixed = model.generate(**pad(prompts), adapter_names=NAMES, **options)
    state = milora.routing_state(mixed.past_key_values)
    assert state.adapters == tuple(None if n == "__base__" else n for n in NAMES)
    for row, prompt in enumerate(prompts):
        own = alone(state, row).generate(prompt[None], **options)
        mine = slice(row * sequences, (row + 1) * sequences)
        new = own.sequences[:, len(prompt) :]
        got = mixed.sequences[mine, -mixed.sequences.shape[1] + max(LENGTHS) + 1 :]
        assert torch.equal(got[:, : new.shape[1]], new), f"row {row}, {NAMES[row]}"
        torch.testing.assert_close(
            mixed.sequences_scores[mine], own.sequences_scores, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", list(dict.fromkeys(NAMES)))
def test_prompt_lookup(model, alone, prompts, name):
    """transformers does this for one prompt at a time."""
    prompt = torch.cat([prompts[1], prompts[1][:4]])
    options = {**GREEDY, "max_new_tokens": 8, "min_new_tokens": 8}
    speculative = model.generate(
        prompt[None], adapter_names=[name], prompt_lookup_num_tokens=3, **options
    )
    state = milora.routing_state(speculative.past_key_values)
    if state is None:  # the bare model
        state = milora.routing_state(
            model.generate(prompt[None], adapter_names=["lora"], **GREEDY).past_key_values
        )
        state = copy.deepcopy(state)
        state.adapters = (None,)
    own = alone(state, 0).generate(prompt[None], **options)
    assert torch.equal(speculative.sequences, own.sequences)


def test_continuing_a_cache(model, alone, prompts):
    """The second turn keeps each row's route of the first."""
    cache = DynamicCache(config=model.config)
    batch = pad(prompts)
    first = model.generate(**batch, adapter_names=NAMES, past_key_values=cache, **GREEDY)
    state = copy.deepcopy(milora.routing_state(cache))
    more = torch.randint(3, VOCAB, (len(prompts), 3))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS + 3), value=1)
    milora.reset_stats(model)
    out = model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=NAMES, past_key_values=cache, **GREEDY
    )
    assert milora.stats(model) == milora.Stats(0, 0)
    assert milora.routing_state(out.past_key_values).same_route(state)
    logits, width = torch.stack(out.logits, 1), batch["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        tokens = torch.cat([prompt, out.sequences[row, width:-1]])
        check_row(alone, state, row, tokens, logits[row])


# ---- plain forwards -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forwards(model, alone, prompts, side):
    """With position ids, as a row alone has them; then one more token from the cache."""
    batch = pad(prompts, side)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**batch, position_ids=positions, adapter_names=NAMES, use_cache=True)
    state = milora.routing_state(out.past_key_values)
    for row, prompt in enumerate(prompts):
        check_row(alone, state, row, prompt, out.logits[row][mask[row] == 1])
    token = torch.randint(3, VOCAB, (len(prompts), 1))
    with torch.no_grad():
        after = model(
            token,
            attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
            position_ids=mask.sum(1, keepdim=True),
            past_key_values=out.past_key_values,
            adapter_names=NAMES,
            use_cache=True,
        )
    for row, prompt in enumerate(prompts):
        tokens = torch.cat([prompt, token[row]])
        check_row(alone, state, row, tokens, after.logits[row])


def test_bfloat16(folders, prompts, alone):
    """The kernels' other path: as close to float64 as each row's own bfloat16 model."""
    model = build("llama").bfloat16()
    with pool_of(model, 1 << 20, max_resident=16) as pool:
        for name, folder in folders.items():
            pool.register(name, folder)
        batch = pad(prompts)
        with torch.no_grad():
            out = model(
                **batch,
                position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
                adapter_names=NAMES,
                use_cache=True,
            )
        state = milora.routing_state(out.past_key_values)
        for row, prompt in enumerate(prompts):
            exact = alone(state, row, torch.float64)(prompt[None]).logits[0]
            same_dtype = alone(state, row, torch.bfloat16)(prompt[None]).logits[0]
            got = out.logits[row, -len(prompt) :]
            assert_as_good_as_torch(got, exact, same_dtype, f"row {row}, {NAMES[row]}")


# ---- nothing is left behind ---------------------------------------------------------------------


class Boom(Exception):
    """What nothing in the product raises."""


class Exploding(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > max(LENGTHS) + 2:
            raise Boom
        return scores


def hooks_of(model) -> dict[str, int]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        f"{path}{table}": len(getattr(module, table))
        for path, module in model.named_modules()
        for table in tables
    }


EXPLODES = {
    "a block": lambda model: model.model.layers[1],
    "an expert's module": lambda model: model.model.layers[0].mlp.up_proj,
    "a base module": lambda model: model.model.layers[1].self_attn.o_proj.base_layer,
    "the head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("inside", ["generate", "a forward"])
def test_an_interrupt_leaves_nothing_behind(model, prompts, inside):
    """torch calls no hook after a KeyboardInterrupt: the next call in this thread cleans up."""
    batch = pad(prompts)

    def forward():
        with torch.no_grad():
            return model(**batch, adapter_names=NAMES, use_cache=True).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    want, runtime = forward(), runtime_of(model)
    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if inside == "generate":
            model.generate(**batch, adapter_names=NAMES, **GREEDY)
        else:
            forward()
    handle.remove()
    if inside == "a forward":
        assert torch.equal(forward(), want)
    assert runtime.local.call is None
    if runtime.pool is not None:
        assert runtime.pool.statistics().in_use == 0
        runtime.pool.compact()
    assert torch.equal(forward(), want)


OTHER_NAMES = {
    "others": [*NAMES[1:], NAMES[0]],
    "bare": [None] * len(NAMES),
    "one changed": [*NAMES[:-1], "dora"],
}


@pytest.mark.parametrize("other", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_a_conversation_stays_with_its_adapters(model, prompts, other):
    """Named again or not, the cache's route is followed; a call that names others is refused."""
    batch = pad(prompts)
    first = model.generate(**batch, adapter_names=NAMES, **GREEDY)
    turn = torch.cat([first.sequences, batch["input_ids"].clamp(min=3)], 1)
    mask = torch.ones_like(turn)
    mask[:, : batch["input_ids"].shape[1]] = batch["attention_mask"]

    def go(**options):
        cache = copy.deepcopy(first.past_key_values)
        options |= {"attention_mask": mask, "past_key_values": cache}
        return torch.stack(model.generate(turn, **options, **GREEDY).logits)

    want = go(adapter_names=NAMES)
    assert torch.equal(go(), want)
    with milora.disabled(model):
        assert not torch.equal(go(), want)
    for call in (go, lambda **names: model(turn, past_key_values=first.past_key_values, **names)):
        with pytest.raises(ValueError, match="the cache was filled by adapters"):
            call(adapter_names=other)


@pytest.mark.parametrize("other", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_a_pinned_route_is_followed_without_names(model, prompts, other):
    batch = pad(prompts)
    with milora.record_routing(model) as states:
        want = model.generate(**batch, adapter_names=NAMES, **GREEDY)
    with milora.pin_route(model, states[0]):
        for names in ({}, {"adapter_names": NAMES}):
            got = model.generate(**batch, **names, **GREEDY)
            assert all(map(torch.equal, got.logits, want.logits))
        with pytest.raises(ValueError, match="the pinned route belongs to adapters"):
            model.generate(**batch, adapter_names=other, **GREEDY)


def test_routes_of_other_threads_are_not_recorded(model, prompts):
    batch = pad(prompts)
    with milora.record_routing(model) as states, ThreadPoolExecutor(1) as other:
        call = functools.partial(model.generate, adapter_names=NAMES, **GREEDY)
        other.submit(call, **batch).result()
        assert not states
        call(**batch)
    assert len(states) == 1


@pytest.mark.parametrize("where", [*EXPLODES, "a processor", "a name", "the pool"])
def test_an_exception_leaves_nothing_behind(model, prompts, where):
    batch = pad(prompts)
    runtime = runtime_of(model)

    def call(names=NAMES, **options):
        return model.generate(**batch, adapter_names=names, **GREEDY, **options)

    def forward(names=NAMES):
        with torch.no_grad():
            return model(**batch, adapter_names=names, use_cache=True).logits

    def bare_forward():
        with torch.no_grad(), milora.disabled(model):
            return model(**batch).logits

    want = call(), forward(), bare_forward()
    before, local = hooks_of(model), dict(vars(runtime.local))
    modules = {name: id(module) for name, module in model.named_modules()}
    if where in EXPLODES:
        handle = EXPLODES[where](model).register_forward_hook(explode)
        for function in (call, forward):
            with pytest.raises(Boom):
                function()
        handle.remove()
    elif where == "a processor":
        with pytest.raises(Boom):
            call(logits_processor=LogitsProcessorList([Exploding()]))
    elif where == "a name":
        mistakes = {"unknown": ["nobody", *NAMES[1:]], "must be a list": "lora", "got 0": []}
        for message, names in mistakes.items():
            for function in (call, forward):
                with pytest.raises(ValueError, match=message):
                    function(names)
    elif runtime.pool is not None:
        pool = runtime.pool
        names = [f"other {i}" for i in range(10)]
        for name in names:
            pool.register(name, pool.entry("lora").source.folder)
        lease = pool.acquire(names[:-1])  # leaves 7 of 16 slots
        with pytest.raises(PoolError, match="slots"):
            call([*KINDS, "peft", names[-1], None])
        with pytest.raises(PoolError, match="slots"):
            forward([*KINDS, "peft", names[-1], None])
        lease.release()
        for name in names:
            pool.unregister(name)
    assert hooks_of(model) == before
    assert dict(vars(runtime.local)) == local
    assert {name: id(module) for name, module in model.named_modules()} == modules
    if runtime.pool is not None:
        assert runtime.pool.statistics().in_use == 0
        runtime.pool.compact()  # would wait for a forward that has not ended
    again = call(), forward(), bare_forward()
    assert torch.equal(torch.stack(again[0].logits), torch.stack(want[0].logits))
    assert torch.equal(again[1], want[1]) and torch.equal(again[2], want[2])


def explode(*_):
    raise Boom


def test_a_pool_and_an_attached_adapter_do_not_mix(folders, prompts):
    """A batch reads one or the other; which to do is in the message."""
    model = build("llama")
    milora.load(model, folders["lora"], "mine")
    with pool_of(model, 1 << 20, max_resident=16) as pool:
        pool.register("tenant", folders["dora"])
        with pytest.raises(ValueError, match="Register"):
            model.generate(**pad(prompts[:2]), adapter_names=["mine", "tenant"], **GREEDY)
        pool.register("mine too", attached="mine")
        names = ["mine too", "tenant"]
        out = model.generate(**pad(prompts[:2]), adapter_names=names, **GREEDY)
        own = model.generate(**pad(prompts[:2]), adapter_names=["mine", None], **GREEDY)
    assert torch.equal(torch.stack(out.logits)[:, 0], torch.stack(own.logits)[:, 0])


# ---- training -----------------------------------------------------------------------------------


def test_every_kind_trains_in_one_batch(folders, prompts):
    """Gradients are those of separate runs, summed where rows share an adapter."""
    model = build("llama")
    for name, folder in folders.items():
        milora.load(model, folder, name, trainable=True)
    for config in milora.adapters(model).values():
        config.balance_coef = 0.0  # its window mixes rows by design
    model.train()
    rows = [torch.cat([prompt, prompt.flip(0)]) for prompt in prompts]
    batch = pad(rows, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(prompt)] = -100
    count = (labels[:, 1:] != -100).sum()

    def gradients() -> dict[str, torch.Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    out = model(**batch, labels=labels, adapter_names=NAMES, num_items_in_batch=count)
    out.loss.backward()
    together, separate = gradients(), {}
    for row, name in enumerate(NAMES):
        if name in (None, "__base__"):
            continue
        size = len(rows[row])
        model(
            rows[row][None],
            labels=labels[row : row + 1, :size],
            adapter_names=[name],
            num_items_in_batch=count,
        ).loss.backward()
        for key, gradient in gradients().items():
            separate[key] = separate.get(key, 0) + gradient
    trained = {name for name in NAMES if name not in (None, "__base__")}
    for name in trained:
        own = [g for key, g in separate.items() if f".{name}." in key]
        assert own and all(g.abs().max() > 0 for g in own if g.dim() > 1 and g.shape[0] > 7)
    moved = {key: g for key, g in together.items() if g.abs().max() > 0}
    assert {key for key, g in separate.items() if g.abs().max() > 0} == moved.keys()
    for key, gradient in moved.items():
        torch.testing.assert_close(gradient, separate[key], rtol=1e-4, atol=1e-6)
