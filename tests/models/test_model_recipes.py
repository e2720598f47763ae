"""The recipes of docs/models.md, each as it stands, on a small model of the same architecture with a template of its kind."""

import json
import math
import runpy

import pytest
from launches import ROOT, launch, nightly
from safetensors.torch import load_file
from small_models import LAUNCHED
from templates import OWN, PACKAGED, tokenizer_for
from transformers import AutoConfig, AutoModelForCausalLM

from manyrank.models.catalog import known

MADE = runpy.run_path(str(ROOT / "docs" / "make_models.py"))
PAGE = MADE["FILE"].read_text(encoding="utf-8")
RECIPES = MADE["recipes"](PAGE)
PHI_4 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Name in data/architectures.json, and the template; the first of each architecture are in the default tier.
FIRST = {
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b", PACKAGED["llama3_1"]),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2.5-7b", PACKAGED["qwen2_5"]),
    "Qwen/Qwen3-8B": ("qwen3-8b", PACKAGED["qwen3"]),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral-7b-v0.3", OWN["mistral"]),
    "google/gemma-2-9b-it": ("gemma-2-9b", PACKAGED["gemma"]),
    "microsoft/phi-4": ("phi-4", PHI_4),
}
MORE = {
    "meta-llama/Llama-3.2-3B-Instruct": ("llama-3.2-3b", PACKAGED["llama3_2"]),
    "Qwen/Qwen2.5-Coder-7B-Instruct": ("qwen2.5-coder-7b", PACKAGED["qwen2_5"]),
    "deepseek-ai/deepseek-math-7b-instruct": ("deepseek-math-7b", DEEPSEEK),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": ("deepseek-r1-distill-qwen-32b", PACKAGED["deepseek_r1_distill"]),
}


def test_the_table_is_what_its_script_makes():
    assert MADE["text"](PAGE) == PAGE


def test_every_recipe_is_tried():
    assert RECIPES.keys() == FIRST.keys() | MORE.keys() and len(RECIPES) == 10


@pytest.mark.parametrize("name", [*FIRST, *nightly(*MORE)])
def test_two_steps(name, tmp_path):
    architecture, template = (FIRST | MORE)[name]
    tokenizer = tokenizer_for(template)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, "tie_word_embeddings": False}
    config = {**known()[architecture], **LAUNCHED, **sizes}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "my.yaml"
    block = next(block for block in PAGE.split("```yaml\n") if block.startswith(f"model_name_or_path: {name}\n"))
    recipe.write_text(block.partition("```")[0], encoding="utf-8")
    thinking = "<think>\nI add them.\n</think>\n\n" if "R1" in name else ""
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{thinking}It is {2 * i}."} for i in range(60)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = launch(
        tmp_path / "run",
        f"--model={tmp_path / 'model'}",
        "--max_steps=2",
        "--bf16=false",
        recipe="my.yaml",
        cwd=tmp_path,
    )
    assert run.code == 0, run.stderr
    assert len(run.metrics()) == 2 and all(map(math.isfinite, run.metrics()))
    assert run.metrics()[0] == pytest.approx(math.log(len(tokenizer)), rel=0.1)  # random weights know nothing
    weights = load_file(run.folder / "final_model" / "adapter_model.safetensors")
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
