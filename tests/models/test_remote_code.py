"""Code that comes with a model runs only where this command says so; what a run's own config says does not count."""

import json
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from manyrank.config.resolve import Setting, recipe_of, resolve
from manyrank.errors import UserError
from manyrank.runs.artifact import find
from manyrank.tools import chat, generate, inspect_data
from manyrank.tools.evaluate import main as evaluate
from manyrank.tools.merge import main as merge

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_code"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TYPED = "--trust-remote-code"


@pytest.fixture(scope="module")
def given(tmp_path_factory, embedded_model):
    """A run whose config says to trust its base, and what appears when the base's code runs."""
    folder = tmp_path_factory.mktemp("remote")
    base, run, marker = folder / "base", folder / "run", folder / "has-run"
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "own_code.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own_code", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (base / "config.json").write_text(json.dumps(config))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(run / "final_model")
    tokenizer.save_pretrained(run / "final_model")
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    trained = [
        ("model", str(base)),
        ("trust_remote_code", "true"),
        ("data_path", str(rows)),
        ("eval_data_path", str(rows)),
    ]
    (run / "config.yaml").write_text(resolve(None, [Setting(key, value, "test") for key, value in trained]).as_yaml())
    return run, rows, marker


def forget(marker) -> None:
    """As in a new process: a module that was imported once would leave no marker again."""
    marker.unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.endswith(".own_code")]:
        del sys.modules[name]


def commands(run, rows, output) -> dict:
    name = str(run)
    fast = ["--max-new-tokens", "2"]
    return {
        "evaluate": (evaluate.main, [name, "--nproc", "1", "--output", str(output / "e"), *fast]),
        "generate": (generate.main, [name, str(rows), str(output / "g.jsonl"), *fast]),
        "merge": (merge.main, [name, "--output", str(output / "m")]),
        "chat": (chat.main, [name, *fast]),
    }


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge", "chat"])
def test_a_runs_own_config_is_no_leave_to_run_code(given, command, tmp_path):
    run, rows, marker = given
    forget(marker)
    main, argv = commands(run, rows, tmp_path)[command]
    with pytest.raises(UserError, match="needs Python code that comes with it") as error:
        main(argv)
    assert not marker.exists() and TYPED in error.value.fix and "base" in error.value.where
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge"])
def test_what_is_typed_is(given, command, tmp_path):
    run, rows, marker = given
    forget(marker)
    main, argv = commands(run, rows, tmp_path)[command]
    assert main([*argv, TYPED]) == 0
    assert marker.exists() and list(tmp_path.iterdir())


def test_only_the_recipe_of_this_command_counts(given, tmp_path):
    run, rows, _ = given
    assert "trust_remote_code: true" in (run / "config.yaml").read_text()
    assert recipe_of(find(str(run))).trust_remote_code is False
    own = [Setting(key, value, "typed") for key, value in {"task": "grpo", "sft_model": str(run)}.items()]
    grpo = resolve(None, [*own, Setting("data_path", str(rows), "typed"), Setting("rewards", "{exact: 1}", "typed")])
    assert grpo.config.model_name_or_path.endswith("base") and grpo.config.trust_remote_code is False
    assert resolve(str(run / "config.yaml")).config.trust_remote_code is False  # `manyrank train RUN/config.yaml`
    typed = resolve(str(run / "config.yaml"), [Setting("trust_remote_code", "true", "typed")], finished=True)
    assert typed.config.trust_remote_code is True
    (tmp_path / "recipe.yaml").write_text((run / "config.yaml").read_text())
    assert resolve(str(tmp_path / "recipe.yaml")).config.trust_remote_code is True  # a recipe of one's own
    (tmp_path / "other.yaml").write_text(f"base: {run / 'config.yaml'}\n")
    assert resolve(str(tmp_path / "other.yaml")).config.trust_remote_code is False


def test_inspecting_the_data_of_a_run_runs_no_code(given):
    run, _, marker = given
    forget(marker)
    assert inspect_data.main([str(run / "config.yaml")]) == 0
    assert not marker.exists()
