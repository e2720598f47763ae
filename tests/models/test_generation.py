"""Batched answers: the same as of single rows, in any batch and order; stops, seeds, and nothing of the model's own settings."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

from manyrank.chat_template.render import RenderOptions, stop_ids
from manyrank.errors import UserError
from manyrank.models.generation import Completion, Sampling, _processors, generate

QUESTIONS = [
    "What is the variance of a Bernoulli variable with p = 0.3?",
    "What does the central limit theorem say?",
    "How?",
    "What is the t statistic if the sample mean is 12, the null mean is 10 and the standard error is 0.5?",
    "Why is the median robust?",
]


@pytest.fixture(scope="module")
def model(embedded_model):
    return AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(text, add_generation_prompt=True)["input_ids"] for text in texts]


def answers(model, tokenizer, prompts, sampling, *, batch_size=5, numbers=None, stops=None) -> dict[int, Completion]:
    stops = stop_ids(tokenizer, RenderOptions()) if stops is None else stops
    found = generate(
        model,
        prompts,
        sampling=sampling,
        stops=stops,
        pad_token=tokenizer.pad_token_id,
        batch_size=batch_size,
        numbers=numbers,
    )
    return {answer.number: answer for batch in found for answer in batch}


def by_hand(model, prompt, stops, most) -> list[int]:
    """Greedy, without batch, padding, cache or `generate`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_are_those_of_single_rows(model, tokenizer, prompts, batch_size):
    stops = stop_ids(tokenizer, RenderOptions())
    found = answers(model, tokenizer, prompts, Sampling(max_new_tokens=24), batch_size=batch_size)
    assert [found[row].tokens for row in range(5)] == [by_hand(model, prompt, stops, 24) for prompt in prompts]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=24, temperature=1.0, seed=3),
        Sampling(max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=20, seed=3),
    ],
)
def test_a_sampled_answer_depends_on_its_row_alone(model, tokenizer, prompts, sampling):
    whole = answers(model, tokenizer, prompts, sampling)
    assert answers(model, tokenizer, prompts, sampling, batch_size=2) == whole
    turned = answers(model, tokenizer, prompts[::-1], sampling, batch_size=3, numbers=[4, 3, 2, 1, 0])
    assert turned == whole
    parts = [answers(model, tokenizer, prompts[part::2], sampling, numbers=range(part, 5, 2)) for part in (0, 1)]
    assert parts[0] | parts[1] == whole
    other = Sampling(**{**vars(sampling), "seed": 4})
    assert answers(model, tokenizer, prompts, other) != whole
    same = answers(model, tokenizer, [prompts[0]] * 3, sampling)
    assert same[0].tokens == whole[0].tokens and same[0].tokens != same[1].tokens != same[2].tokens


def test_draws_follow_the_distribution():
    """20,000 rows' first tokens against the probabilities of the likeliest 5 of 50 tokens."""
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    likely = (scores / 0.7).softmax(-1).topk(5)
    wanted = (likely.values / likely.values.sum()).tolist()
    process = _processors(Sampling(temperature=0.7, top_k=5), list(range(20_000)), 3, torch.device("cpu"))
    seen = Counter(process(torch.zeros(20_000, 3), scores.repeat(20_000, 1)).argmax(-1).tolist())
    assert set(seen) == set(likely.indices.tolist())
    for token, part in zip(likely.indices.tolist(), wanted):
        assert abs(seen[token] / 20_000 - part) < 4 * (part * (1 - part) / 20_000) ** 0.5


def test_top_p_and_a_small_temperature_leave_the_likeliest(model, tokenizer, prompts):
    greedy = answers(model, tokenizer, prompts, Sampling(max_new_tokens=8))
    for narrow in ({"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1e-4}):
        assert answers(model, tokenizer, prompts, Sampling(max_new_tokens=8, **narrow)) == greedy


def test_it_stops_at_any_stop_token_and_says_why(model, tokenizer, prompts):
    long = answers(model, tokenizer, prompts, Sampling(max_new_tokens=12), stops=())
    assert all(len(answer.tokens) == 12 and answer.finish == "length" for answer in long.values())
    stop = long[1].tokens[5]
    ended = answers(model, tokenizer, prompts, Sampling(max_new_tokens=12), stops={stop, None})
    for row, answer in ended.items():
        there = stop in long[row].tokens
        assert answer.finish == ("stop" if there else "length")
        assert answer.tokens == long[row].tokens[: long[row].tokens.index(stop) if there else None]
    # The last token that may be said can be the stop.
    last = answers(
        model, tokenizer, prompts[1:2], Sampling(max_new_tokens=long[1].tokens.index(stop) + 1), stops={stop}
    )
    assert last[0].finish == "stop"


def test_batches_come_longest_first_as_they_are_done(model, tokenizer, prompts):
    batches = generate(
        model, prompts, sampling=Sampling(max_new_tokens=2), stops=(), pad_token=tokenizer.pad_token_id, batch_size=2
    )
    order = [[answer.number for answer in batch] for batch in batches]
    lengths = [len(prompts[row]) for batch in order for row in batch]
    assert list(map(len, order)) == [2, 2, 1] and lengths == sorted(lengths, reverse=True)


def test_the_models_own_settings_change_nothing_and_stay(model, tokenizer, prompts):
    plain = answers(model, tokenizer, prompts, Sampling(max_new_tokens=16))
    before = model.generation_config
    strange = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=3, suppress_tokens=plain[0].tokens[:1])
    model.generation_config = strange
    try:
        assert answers(model, tokenizer, prompts, Sampling(max_new_tokens=16)) == plain
        assert model.generation_config is strange
    finally:
        model.generation_config = before


def test_adapters_answer_and_their_base_too(model, tokenizer, prompts, embedded_model):
    from peft import LoraConfig, get_peft_model

    base = answers(model, tokenizer, prompts, Sampling(max_new_tokens=8))
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    tuned = answers(adapted, tokenizer, prompts, Sampling(max_new_tokens=8))
    assert tuned != base
    stops = stop_ids(tokenizer, RenderOptions())
    assert [tuned[row].tokens for row in range(5)] == [by_hand(adapted, prompt, stops, 8) for prompt in prompts]
    with adapted.disable_adapter():
        assert answers(adapted, tokenizer, prompts, Sampling(max_new_tokens=8)) == base


def test_a_batch_never_goes_beyond_positions_that_are_learned(tokenizer):
    shape = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    learned = AutoModelForCausalLM.from_config(shape).eval()
    prompts = [list(range(5, 35)), list(range(5, 10)), list(range(9, 13))]
    together = answers(learned, tokenizer, prompts, Sampling(max_new_tokens=16), batch_size=3, stops=())
    alone = answers(learned, tokenizer, prompts, Sampling(max_new_tokens=16), batch_size=1, stops=())
    assert together == alone and [len(together[row].tokens) for row in range(3)] == [2, 16, 16]


def test_the_context_is_never_left(model, tokenizer, prompts):
    context = model.config.max_position_embeddings
    long = [5] * (context - 3)
    found = answers(model, tokenizer, [long, prompts[0]], Sampling(max_new_tokens=6), stops=())
    assert (len(found[0].tokens), found[0].finish, len(found[1].tokens)) == (3, "length", 6)
    with pytest.raises(UserError, match="leaves no room"):
        answers(model, tokenizer, [[5] * context], Sampling())
    with pytest.raises(UserError, match="empty"):
        answers(model, tokenizer, [[]], Sampling())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
