"""The routing cache: design points 1 to 6, 9 and 10, each with a test that fails if it breaks."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from tiny_models import VOCAB, ragged_prompts

import milora
from milora.router import _codes

NUM_BLOCKS = 3
LENGTHS = (5, 9, 7)


def make_model(seed: int = 0, **config) -> torch.nn.Module:
    """A tiny Llama whose experts matter and whose routes differ between prompts."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=NUM_BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            max_position_embeddings=128,
            initializer_range=0.15,
        )
    ).eval()
    milora.attach(model, milora.MiLoRAConfig(rank=4, **{"top_k": 3, **config}))
    randomize(model, seed)
    return model


def randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif name.endswith(("w_r", "w_sa")):  # not so sharp that probabilities vanish
                parameter.normal_(0, 0.2, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0, 1.0, generator=generator)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(LENGTHS, seed=7)


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Each prompt's route when it is forwarded by itself, without padding."""
    return [route_of(model, prompt[None]) for prompt in prompts]


def route_of(model, ids, **kwargs) -> milora.RoutingState:
    with milora.record_routing(model) as states, torch.no_grad():
        model(ids, use_cache=True, **kwargs)
    assert len(states) == 1
    return states[0]


def pad(prompts, side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        columns = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_routes(state: milora.RoutingState, expected: list[milora.RoutingState]) -> None:
    assert state.num_prompts == len(expected)
    for row, want in enumerate(expected):
        assert state.select(row).same_route(want, tolerance=1e-5), f"route of prompt {row}"


def test_prompts_of_the_fixture_take_different_routes(alone):
    assert len({str((state.gates > 0).tolist()) for state in alone}) == len(alone)
    assert all(state.margins.min() > 1e-4 for state in alone)  # no near-tie hides an error


# ---- 1: what the prompt is ----------------------------------------------------------------------

GENERATIONS = {
    "greedy": ({}, 1),
    "sampling": ({"do_sample": True}, 1),
    "beams": ({"num_beams": 3}, 3),
    "beam_sampling": ({"num_beams": 3, "do_sample": True}, 3),
    "return_sequences": ({"num_return_sequences": 3, "do_sample": True}, 3),
    "beams_and_sequences": ({"num_beams": 3, "num_return_sequences": 2}, 3),
    "static_cache": ({"cache_implementation": "static"}, 1),
    "static_cache_beams": ({"cache_implementation": "static", "num_beams": 2}, 2),
    "no_cache": ({"use_cache": False}, 1),
    "no_cache_beams": ({"use_cache": False, "num_beams": 3}, 3),
}


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_generate_routes_each_prompt_once(model, prompts, alone, name, count):
    options, expand = GENERATIONS[name]
    options = {"do_sample": False, **options}
    milora.reset_stats(model)
    with milora.record_routing(model) as states:
        out = model.generate(
            **pad(prompts[:count], "left"),
            max_new_tokens=6,
            return_dict_in_generate=True,
            **options,
        )
    assert len(states) == 1
    assert_routes(states[0], alone[:count])
    assert states[0].num_rows == count * expand
    assert states[0].prompt_lengths.tolist() == list(LENGTHS[:count])
    # 2: whatever the number of new tokens, beams or sequences
    assert milora.stats(model) == milora.Stats(NUM_BLOCKS * count, NUM_BLOCKS)
    if out.past_key_values is not None:
        assert_routes(milora.routing_state(out.past_key_values), alone[:count])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_the_router(model, prompts, alone, side):
    batch = pad(prompts, side)
    assert_routes(
        route_of(model, batch["input_ids"], attention_mask=batch["attention_mask"]), alone
    )
    garbage = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
    assert_routes(route_of(model, garbage, attention_mask=batch["attention_mask"]), alone)


def test_a_mask_with_holes_pools_the_attended_tokens_only(model, prompts):
    ids = prompts[1][None]
    mask = torch.ones_like(ids)
    mask[0, [2, 3, 6]] = 0
    state = route_of(model, ids, attention_mask=mask)
    assert state.prompt_lengths.tolist() == [6]
    # Block 0 reads embeddings, so its route is that of the attended tokens alone.
    kept = route_of(model, ids[mask == 1][None])
    torch.testing.assert_close(state.probabilities[0], kept.probabilities[0], rtol=1e-5, atol=1e-6)


def test_embeddings_count_as_tokens(model, prompts, alone):
    embeds = model.get_input_embeddings()(prompts[1][None]).detach()
    with milora.record_routing(model) as states:
        from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    assert_routes(states[0], [alone[1]])
    from_ids = model.generate(prompts[1][None], max_new_tokens=4, do_sample=False)
    assert torch.equal(from_embeds[0], from_ids[0, len(prompts[1]) :])


def test_labels_say_where_the_prompt_ends(model, prompts, alone):
    answers = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))
    rows = [torch.cat([p, a]) for p, a in zip(prompts, answers, strict=True)]
    batch = pad(rows, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in enumerate(LENGTHS):
        labels[row, :length] = -100
    with milora.record_routing(model) as states, torch.no_grad():
        model(**batch, labels=labels)
    assert_routes(states[0], alone)
    # No token of the answer reaches the router, also when a cache is asked for.
    changed = batch["input_ids"].clone()
    changed[labels != -100] = 11
    with milora.record_routing(model) as again, torch.no_grad():
        model(changed, attention_mask=batch["attention_mask"], labels=labels, use_cache=True)
    assert again[0].same_route(states[0])


@pytest.mark.parametrize("kind", [int, list, torch.tensor])
def test_prompt_lengths_say_where_the_prompt_ends(model, prompts, alone, kind):
    rows = [torch.cat([p, p[:2]]) for p in prompts]
    lengths = list(LENGTHS)
    if kind is int:
        rows, lengths = rows[:1], lengths[0]
    for side in ("left", "right"):
        with (
            milora.prompt_lengths(model, kind(lengths)),
            milora.record_routing(model) as states,
            torch.no_grad(),
        ):
            model(**pad(rows, side))
        assert_routes(states[0], alone[: len(rows)])


def test_packed_rows_route_per_segment(model, prompts, alone):
    """Padding-free batches: position ids start again at 0, one answer per segment."""
    tokens, labels, positions = [], [], []
    for prompt in prompts:
        row = torch.cat([prompt, prompt[:3]])
        tokens.append(row)
        labels.append(torch.cat([torch.full_like(prompt, -100), row[len(prompt) :]]))
        positions.append(torch.arange(len(row)))
    packed = {
        "input_ids": torch.cat(tokens)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(positions)[None],
        "use_cache": False,  # with a cache transformers would attend across the segments
    }
    with milora.record_routing(model) as states, torch.no_grad():
        out = model(**packed).logits[0]
    assert_routes(states[0], alone)
    start = 0
    for row, label in zip(tokens, labels, strict=True):
        with torch.no_grad():
            want = model(row[None], labels=label[None]).logits[0]
        torch.testing.assert_close(out[start : start + len(row)], want, rtol=1e-4, atol=1e-4)
        start += len(row)


UNCLEAR = {
    "nothing said": ({}, "prompt_lengths"),
    "labels on every token": ({"labels": torch.arange(3, 9)[None]}, "empty"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_forward_without_a_prompt_is_refused(model, name):
    kwargs, message = UNCLEAR[name]
    with pytest.raises(ValueError, match=message):
        model(torch.arange(3, 9)[None], **kwargs)
    route_of(model, torch.arange(3, 9)[None])  # and leaves nothing behind


@pytest.mark.parametrize("lengths", [0, 7, [1, 2], 2.5, [1.5]])
def test_wrong_prompt_lengths_are_refused(model, lengths):
    with (
        milora.prompt_lengths(model, lengths),
        pytest.raises(ValueError, match=r"prompt_lengths|empty"),
    ):
        model(torch.arange(3, 9)[None])


# ---- 3: what a forward inside generate looks like ------------------------------------------------


def test_a_prompt_of_one_token_is_a_prefill(model):
    milora.reset_stats(model)
    with milora.record_routing(model) as states:
        model.generate(torch.tensor([[17]]), max_new_tokens=4, do_sample=False)
    assert len(states) == 1
    assert milora.stats(model) == milora.Stats(NUM_BLOCKS, NUM_BLOCKS)


@pytest.mark.parametrize("mode", ["prompt_lookup", "assisted"])
def test_speculative_tokens_stay_out_of_the_router(model, prompts, mode):
    # The prompt repeats itself, so that prompt lookup proposes tokens from the first forward on.
    prompt = torch.cat([prompts[1], prompts[1][:4]])[None]
    want = route_of(model, prompt)
    plain = model.generate(prompt, max_new_tokens=10, do_sample=False)
    options = {"prompt_lookup_num_tokens": 4}
    if mode == "assisted":
        options = {"assistant_model": make_model(seed=3)}
    widths: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    milora.reset_stats(model)
    try:
        with milora.record_routing(model) as states:
            out = model.generate(prompt, max_new_tokens=10, do_sample=False, **options)
    finally:
        handle.remove()
    assert widths[0] > prompt.shape[1], "the first forward holds speculative tokens"
    assert any(width > 1 for width in widths[1:]), "and so do later ones"
    assert len(states) == 1
    assert_routes(states[0], [want])
    assert milora.stats(model) == milora.Stats(NUM_BLOCKS, NUM_BLOCKS)
    assert torch.equal(out, plain)


def test_static_cache_hides_the_mask_and_generate_still_knows_it(model, prompts, alone):
    """A static cache that serves another batch must not keep the first one's mask."""
    for order in ([0, 1, 2], [1, 2, 0]):
        batch = pad([prompts[i] for i in order], "left")
        with milora.record_routing(model) as states:
            model.generate(
                **batch, max_new_tokens=3, do_sample=False, cache_implementation="static"
            )
        assert_routes(states[0], [alone[i] for i in order])


# ---- 4: the route lives with the cache -----------------------------------------------------------


def prefill(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=True, **kwargs)


def step(model, cache, token: int, rows: int = 1):
    with torch.no_grad():
        return model(torch.full((rows, 1), token), past_key_values=cache, use_cache=True).logits


def test_interleaved_requests_keep_their_own_routes(model, prompts, alone):
    caches = [prefill(model, prompt[None]).past_key_values for prompt in prompts[:2]]
    milora.reset_stats(model)
    interleaved = [[step(model, cache, t) for cache in caches] for t in (4, 8, 15)]
    assert milora.stats(model) == milora.Stats(0, 0)
    for index, prompt in enumerate(prompts[:2]):
        cache = prefill(model, prompt[None]).past_key_values
        for position, token in enumerate((4, 8, 15)):
            assert torch.equal(step(model, cache, token), interleaved[position][index])
    assert_routes(milora.routing_state(caches[1]), [alone[1]])


def test_a_copied_cache_has_its_own_route(model, prompts):
    cache = prefill(model, prompts[0][None]).past_key_values
    state = milora.routing_state(cache)
    twin = copy.deepcopy(cache)
    assert milora.routing_state(twin).same_route(state)
    assert milora.routing_state(twin) is not state
    assert torch.equal(step(model, twin, 4), step(model, cache, 4))
    twin.batch_repeat_interleave(3)
    assert milora.routing_state(twin).num_rows == 3
    assert milora.routing_state(cache).num_rows == 1
    twin.reset()
    assert milora.routing_state(twin) is None
    assert milora.routing_state(cache) is not None


def test_repeated_and_selected_rows_take_their_route_along(model, prompts):
    batch = pad(prompts, "left")
    cache = prefill(model, ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    cache = cache.past_key_values
    cache.batch_repeat_interleave(2)
    assert milora.routing_state(cache).row_of.tolist() == [0, 0, 1, 1, 2, 2]
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    assert milora.routing_state(cache).row_of.tolist() == [2, 0, 1]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)[[2, 0, 1]]
    with torch.no_grad():
        mixed = model(torch.full((3, 1), 4), past_key_values=cache, attention_mask=mask).logits
    for row, prompt in enumerate([prompts[2], prompts[0], prompts[1]]):
        lone = step(model, prefill(model, prompt[None]).past_key_values, 4)
        torch.testing.assert_close(mixed[row], lone[0], rtol=1e-4, atol=1e-4)


def test_another_number_of_rows_is_refused(model, prompts):
    cache = prefill(model, prompts[0][None]).past_key_values
    with pytest.raises(ValueError, match="1 rows, the forward has 2"):
        step(model, cache, 4, rows=2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_runs_a_second_prompt_of_its_own(model, prompts, alone, use_cache):
    negative = prompts[2][None]
    milora.reset_stats(model)
    with milora.record_routing(model) as states:
        model.generate(
            prompts[0][None],
            negative_prompt_ids=negative,
            guidance_scale=2.0,
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
        )
    assert len(states) == 2
    assert_routes(states[0], [alone[0]])
    # The unconditional branch sees the negative prompt and the first new token.
    assert not states[1].same_route(states[0], tolerance=1e-3)
    assert milora.stats(model) == milora.Stats(2 * NUM_BLOCKS, 2 * NUM_BLOCKS)


def test_threads_do_not_see_each_others_calls(model, prompts):
    want = [model.generate(p[None], max_new_tokens=12, do_sample=False) for p in prompts]
    got: list = [None] * len(prompts)

    def work(index: int) -> None:
        for _ in range(4):
            got[index] = model.generate(prompts[index][None], max_new_tokens=12, do_sample=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_exception_leaves_nothing_behind(model, prompts, alone):
    def explode(*_):
        raise KeyError("boom")

    handle = model.model.layers[1].register_forward_pre_hook(explode)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(KeyError):
        model.generate(prompts[0][None], past_key_values=cache, max_new_tokens=2)
    handle.remove()
    assert milora.routing_state(cache) is None
    assert_routes(route_of(model, prompts[1][None]), [alone[1]])


# ---- 5 and 6: continuing -------------------------------------------------------------------------


def test_a_continued_cache_keeps_its_route(model, prompts):
    cache = transformers.DynamicCache(config=model.config)
    first = model.generate(
        prompts[0][None], past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    state = milora.routing_state(cache)
    milora.reset_stats(model)
    longer = torch.cat([first, prompts[1][None]], 1)
    model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert milora.routing_state(cache).same_route(state)
    assert milora.stats(model) == milora.Stats(0, 0)


def test_chunked_prefill_is_refused(model, prompts):
    with pytest.raises(ValueError, match="prefill_chunk_size=4 cannot be exact"):
        model.generate(prompts[1][None], prefill_chunk_size=4, max_new_tokens=2)
    config = transformers.GenerationConfig(prefill_chunk_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(prompts[1][None], generation_config=config)


def test_keys_without_a_route_are_refused(model, prompts):
    with milora.disabled(model):
        cache = prefill(model, prompts[0][None]).past_key_values
    with pytest.raises(ValueError, match="holds 5 tokens but no route"):
        step(model, cache, 4)


def test_continuous_batching_is_refused(model, prompts):
    with pytest.raises(ValueError, match="paged"):
        model.generate(prompts[0][None], cache_implementation="paged", max_new_tokens=2)


# ---- the cached route is the prompt's route ------------------------------------------------------


@pytest.mark.parametrize("gate", ["probability", "renormalized", "hard"])
@pytest.mark.parametrize("pooler", ["self_attention", "mean", "max", "last"])
def test_decode_equals_one_forward_with_the_prompts_route(prompts, gate, pooler):
    model = make_model(gate=gate, pooler=pooler)
    prompt = prompts[1][None]
    out = model.generate(
        prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with milora.prompt_lengths(model, prompt.shape[1]), torch.no_grad():
        whole = model(out.sequences).logits[:, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-4)
    other = route_of(model, prompts[0][None])
    with milora.pin_route(model, other), torch.no_grad():
        wrong = model(out.sequences).logits[:, prompt.shape[1] - 1 : -1]
    assert (wrong - whole).abs().max() > 1e-2, "another route would be seen"


# ---- 10: isolation -------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_what_fills_the_others(model):
    """Bitwise, at a fixed batch shape: rows and padded length."""
    generator = torch.Generator().manual_seed(5)
    mine = torch.randint(3, VOCAB, (8,), generator=generator)
    seen = []
    # One row is always padded: generate drops an all-ones mask, which changes the base's kernels.
    for length in (3, 7, 5, 4):
        others = [torch.randint(3, VOCAB, (n,), generator=generator) for n in (length, 8)]
        batch = pad([others[0], mine, others[1]], "left")
        out = model.generate(
            **batch,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        state = milora.routing_state(out.past_key_values)
        seen.append((torch.stack(out.logits)[:, 1], state.gates[:, 1]))
    assert all(torch.equal(seen[0][0], s[0]) and torch.equal(seen[0][1], s[1]) for s in seen[1:])


def test_training_after_inference_mode():
    """Nothing that inference keeps is an inference tensor, which autograd could not save."""
    model = make_model(top_k=2, seed=77)
    _codes.cache_clear()
    prompts = torch.full((2, 5), 7)
    with torch.inference_mode():
        model(input_ids=prompts, use_cache=True)
    model.train()
    labels = prompts.clone()
    labels[:, :3] = -100
    model(input_ids=prompts, labels=labels).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("w_r"))
