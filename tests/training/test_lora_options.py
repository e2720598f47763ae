"""What a recipe says of its adapters beyond their rank: each option is seen in the result, on every strategy."""

import re

import pytest
import torch
from launches import Run, launch, nightly
from peft import PeftModel
from safetensors.torch import load_file
from small_models import LAUNCHED, made, plain_loss, save_for_launch
from small_models import recipe as tiny_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from manyrank import cli
from manyrank.errors import UserError
from manyrank.models.adapter_start import weights_of
from manyrank.models.load import LoadPlan, base_model, with_adapters

RECIPE = ("--eval_data_path=data/validation.jsonl", "--max_steps=4", "--save_steps=2", "--lr=3e-3")
OPTIONS = {
    "plain": (),
    "rslora": ("--use_rslora",),
    "dora": ("--use_dora",),
    "bias": ("--lora_bias",),
    "gaussian": ("--init_lora_weights=gaussian",),
    "orthogonal": ("--init_lora_weights=orthogonal",),
    "pissa": ("--init_lora_weights=pissa",),
    "pissa_niter_2": ("--init_lora_weights=pissa_niter_2",),
    "olora": ("--init_lora_weights=olora", "--rank_pattern={q_proj: 3}"),
    "eva": ("--init_lora_weights=eva",),
    "patterns": ("--rank_pattern={layers.0.mlp.down_proj: 24, '.*_proj': 3}", "--alpha_pattern={up_proj: 5}"),
    "layers": ("--layers_to_transform=1,2", "--layers_pattern=layers"),
    "exclude": (r"--exclude_modules=[up_proj, 'model\.layers\.0\..*']",),
    "head": ("--modules_to_save=lm_head",),
    "embedding": ("--modules_to_save=embed_tokens",),
    "tokens": ("--trainable_token_indices=1,16",),
    "tokens of both": ("--trainable_token_indices={embed_tokens: [1, 16], lm_head: [1, 3]}",),
    "loraplus": ("--loraplus_lr_ratio=4",),
}
STRATEGIES = ("fsdp", "zero3", "ddp", "zero2")
PAIRS = [(option, strategy) for option in OPTIONS for strategy in STRATEGIES]
OFTEN = list(zip(OPTIONS, STRATEGIES[:2] * len(OPTIONS)))  # the others nightly


def loss_in_peft(run: Run, base, tokenizer) -> float:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.folder / "final_model")
    return plain_loss(model.eval(), tokenizer, "data/validation.jsonl")


@pytest.fixture(scope="module")
def alone(embedded_model, tmp_path_factory):
    """The runs of one process, made once for each option."""
    runs = {}

    def run(option: str) -> Run:
        if option not in runs:
            folder = tmp_path_factory.mktemp("alone") / option
            runs[option] = launch(folder, *RECIPE, *OPTIONS[option], "--strategy=single")
            assert runs[option].code == 0, runs[option].stderr
        return runs[option]

    return run


@pytest.mark.parametrize("option", OPTIONS)
def test_peft_gives_the_loss_of_the_training(option, alone, embedded_model, tokenizer):
    run = alone(option)
    assert loss_in_peft(run, embedded_model, tokenizer) == pytest.approx(run.metrics("eval_loss")[-1], abs=1e-5)
    if option != "plain":  # the option is seen
        assert run.metrics() != alone("plain").metrics()
        key = OPTIONS[option][0].removeprefix("--").partition("=")[0]
        assert f"- {key}: " in (run.folder / "final_model" / "README.md").read_text()
        assert f", {key}" in next(line for line in run.stdout.splitlines() if line.startswith("method "))


@pytest.mark.parametrize("option, strategy", [*OFTEN, *nightly(*(pair for pair in PAIRS if pair not in OFTEN))])
def test_strategies_agree_and_resume(option, strategy, alone, tmp_path):
    args = (*RECIPE, *OPTIONS[option], f"--strategy={strategy}", "--nproc=2")
    run = launch(tmp_path / "run", *args)
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(alone(option).metrics(), abs=1e-5)
    resumed = launch(tmp_path / "again", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0 and resumed.metrics() == run.metrics()[2:], resumed.stderr
    first, second = (
        load_file(folder / "final_model" / "adapter_model.safetensors") for folder in (run.folder, resumed.folder)
    )
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    "more",
    [
        ("--bf16=true", "--strategy=single"),
        ("--method=qlora", "--strategy=fsdp", "--nproc=2"),
        ("--use_dora", "--strategy=zero3", "--nproc=2"),
    ],
    ids=" ".join,
)
def test_eva_starts_alike_in_16_bits_and_on_quantised_bases(more, tmp_path):
    starts = {}
    for name, args in {"plain": ("--strategy=single",), "other": more}.items():
        run = launch(tmp_path / name, "--init_lora_weights=eva", "--max_steps=1", "--lr=0", *args)
        assert run.code == 0, run.stderr
        starts[name] = load_file(run.folder / "final_model" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"  # its input is the embedding, normed
    plain, other = (starts[name][key] for name in ("plain", "other"))
    assert (plain @ plain.T - torch.eye(len(plain))).abs().max() < 1e-4
    assert ((plain[:3] * other[:3]).sum(1) > 0.99).all()


def small(kind: str, folder, embedded_model, **shape):
    """A small random model of another architecture, in a folder to launch."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LAUNCHED, **shape))
    save_for_launch(model, folder, embedded_model)
    return folder


def trained(base, tokenizer, folder, *args: str) -> None:
    """A run that is the same in plain peft, and resumes exactly."""
    args = (*RECIPE, f"--model={base}", "--max_length=128", *args)
    run = launch(folder / "run", *args)
    assert run.code == 0, run.stderr
    wanted = plain_loss(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.folder / "final_model").eval(),
        tokenizer,
        "data/validation.jsonl",
    )
    assert run.metrics("eval_loss")[-1] == pytest.approx(wanted, abs=1e-4)
    resumed = launch(folder / "again", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0 and resumed.metrics() == run.metrics()[2:], resumed.stderr


@pytest.mark.parametrize("strategy", ["fsdp", *nightly("single", "zero3", "ddp", "zero2")])
def test_tokens_of_tied_embeddings(strategy, embedded_model, tokenizer, tmp_path):
    base = small("qwen2", tmp_path / "base", embedded_model, tie_word_embeddings=True)
    nproc = 1 if strategy == "single" else 2
    trained(base, tokenizer, tmp_path, "--trainable_token_indices=1,16", f"--strategy={strategy}", f"--nproc={nproc}")


@pytest.mark.parametrize("strategy", ["zero3", *nightly("single", "fsdp", "ddp", "zero2")])
def test_experts_as_parameters(strategy, embedded_model, tokenizer, tmp_path):
    moe = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    base = small("qwen3_moe", tmp_path / "base", embedded_model, **moe)
    args = ("--target_parameters=mlp.experts.gate_up_proj,mlp.experts.down_proj", "--lora_target_modules=q_proj")
    trained(base, tokenizer, tmp_path, *args, f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}")


def test_adapters_on_experts_are_continued(embedded_model, tmp_path):
    moe = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    base = small("qwen3_moe", tmp_path / "base", embedded_model, **moe)
    args = (*RECIPE[:1], f"--model={base}", "--max_length=128", "--max_steps=1", "--eval_on_start", "--strategy=single")
    first = launch(tmp_path / "first", *args)
    second = launch(tmp_path / "second", *args, f"--adapter={first.folder}")
    assert second.code == 0, second.stderr
    assert second.metrics("eval_loss")[0] == pytest.approx(first.metrics("eval_loss")[-1], abs=1e-5)
    above = launch(tmp_path / "above", *args, f"--adapter={first.folder}", "--new_adapter")
    assert above.code == 2 and "which is more than A and B of linear layers" in above.stderr


def test_weights_of_a_base_in_memory_are_read_below_its_adapters(embedded_model):
    plain = AutoModelForCausalLM.from_pretrained(embedded_model)
    wanted = {name: value.clone() for name, value in plain.named_parameters()}
    options = ("--trainable_token_indices=1,16", "--modules_to_save=lm_head", "--use_dora")
    model = with_adapters(plain, tiny_recipe("--method=lora", *options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    read = weights_of("x", plain)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert read(name).equal(wanted[name])
    quantised = base_model(LoadPlan(str(embedded_model), torch.float32, torch.float32, "nf4", {"": "cpu"}))
    read = weights_of("x", with_adapters(quantised, tiny_recipe("--method=qlora")).get_base_model())
    with pytest.raises(UserError, match="the model in memory is quantised"):
        read("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    "option, value",
    [
        ("modules_to_save", "nope"),
        ("modules_to_save", "rotary_emb"),  # which has nothing to train
        ("modules_to_save", ".*norm"),  # peft takes no patterns here
        ("modules_to_save", "model"),
        ("modules_to_save", "layers.0"),
        ("exclude_modules", "nope"),
        ("rank_pattern", "{embed_tokens: 3}"),  # which has no adapters
        ("alpha_pattern", "{nope: 3}"),
        ("layers_to_transform", "99"),
        ("layers_pattern", "nope"),
        ("target_parameters", "mlp.nope"),
        ("trainable_token_indices", "{nope: [1]}"),
    ],
)
def test_a_name_that_fits_nothing_is_refused_before_the_launch(option, value, tmp_path, capsys):
    beside = ["--layers_to_transform=1"] if option == "layers_pattern" else []
    line = ["train", "verify", "--model=embedded", f"--{option}={value}", *beside, f"--output_dir={tmp_path / 'run'}"]
    assert cli.main(line) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "where: ", "fix: "))]
    what, where, fix = said
    assert (
        what.startswith("error: ")
        and re.search(r"nope|rotary_emb|embed_tokens|99|norm|whole layers", what)
        and fix.startswith("fix: ")
    )
    assert where == f"where: {option} (command line, --{option})"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank, says", [(500, "has 192 inputs"), (190, "learned tokens")])
def test_eva_of_too_large_a_rank_is_refused_and_leaves_nothing(rank, says, embedded_model, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"question": "What is one?", "answer": "It is one."}\n')
    args = ("--init_lora_weights=eva", f"--data_path={tmp_path / 'one.jsonl'}", "--max_steps=1", "--strategy=single")
    run = launch(tmp_path / "run", *args, f"--lora_r={rank}")
    assert run.code == 2 and says in run.stderr and "fix:   lower lora_r" in run.stderr, run.stderr
    assert not run.folder.exists()
    fixed = launch(tmp_path / "run", *args, "--lora_r=2")
    assert fixed.code == 0, fixed.stderr


def test_names_of_modules_that_files_call_otherwise_are_no_error(embedded_model, tmp_path, capsys):
    base = small("mixtral", tmp_path / "base", embedded_model, num_local_experts=4, num_experts_per_tok=2)
    assert not any("gate_up_proj" in name for name in load_file(base / "model.safetensors"))
    line = ["train", "verify", f"--model={base}", "--lora_target_modules=q_proj", f"--output_dir={tmp_path / 'run'}"]
    assert cli.main([*line, "--target_parameters=mlp.experts.gate_up_proj", "--check"]) == 0
    assert "no rule refuses it" in capsys.readouterr().out


def test_experts_that_peft_would_not_exclude_are_refused():
    with pytest.raises(UserError, match="has adapters all the same") as caught:
        made("qwen3_moe", tiny_recipe("--method=lora", r"--exclude_modules=['mlp\..*']"), torch.float32)
    assert "lora_target_modules" in caught.value.fix


def test_parameters_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"target_parameters: .* 'mlp.experts.down'"):
        made(
            "qwen3_moe",
            tiny_recipe("--method=lora", "--target_parameters=mlp.experts.down", "--lora_target_modules=q_proj"),
            torch.float32,
        )


@pytest.mark.parametrize("option", ["head", "tokens"])
def test_what_is_trained_beside_adapters_is_float32_in_bf16_too(option, tmp_path):
    args = (*RECIPE, *OPTIONS[option], "--strategy=single", "--bf16=true")
    run = launch(tmp_path / "run", *args)
    assert run.code == 0, run.stderr
    resumed = launch(tmp_path / "again", *args, f"--resume_from_checkpoint={run.folder / 'checkpoint-2'}")
    assert resumed.code == 0 and resumed.metrics() == run.metrics()[2:], resumed.stderr
    saved = load_file(resumed.folder / "final_model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
