"""The mask: exactly the assistant's content and its end-of-turn token are supervised, or the row is refused."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyrank.formats import BadRow
from manyrank.render import IGNORE, render

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda t: t.strip() and "<|" not in t
)


@st.composite
def conversations(draw):
    turns = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    return turns


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(conversations())
def test_supervised_is_what_the_assistant_says(tokenizer, messages):
    said = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    rendered = render(tokenizer, messages)
    assert rendered.supervised_texts == said
    assert len(rendered.labels) == len(rendered.input_ids)
    assert all(label in (IGNORE, token) for label, token in zip(rendered.labels, rendered.input_ids))
    supervised = [label for label in rendered.labels if label != IGNORE]
    assert supervised.count(tokenizer.eos_token_id) == len(said)
    # NFC is the tokenizer's own normalisation of the text.
    decoded = tokenizer.decode(supervised)
    assert decoded == tokenizer.decode(tokenizer("".join(said), add_special_tokens=False)["input_ids"])


def test_echoed_words_are_not_confused(tokenizer):
    rendered = render(
        tokenizer, [{"role": "user", "content": "It is 4."}, {"role": "assistant", "content": "It is 4."}]
    )
    first = next(i for i, label in enumerate(rendered.labels) if label != IGNORE)
    assert (
        tokenizer.decode(rendered.input_ids[:first]) == "<|im_start|>user\nIt is 4.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_text_in_content_is_refused(tokenizer):
    with pytest.raises(BadRow, match=r"turn 1 contains <\|im_end\|>"):
        render(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
            "drops the system",
        ),
        ("{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}", "drops the system"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "without an end-of-turn token",
        ),
        ("{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", "rewrites"),
        ("{{ raise_exception('no') }}", "refuses the conversation"),
        (
            "{% for m in messages %}<|im_start|>{{ 'X' if m.role == 'assistant' else m.content }}<|im_end|>{% endfor %}",
            "changes the content of turn 3",
        ),
    ],
)
def test_templates_that_cannot_be_masked_are_refused(tokenizer, template, reason):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say ok"},
        {"role": "assistant", "content": "ok then"},
    ]
    with pytest.raises(BadRow, match=reason):
        render(other, messages)
