"""What a step reads back from its device, which on a GPU waits for all that was asked of it: nothing but its sums."""

import contextlib

import pytest
import torch
from launches import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from manyrank import SFTConfig, SFTTrainer
from manyrank.tasks.sft import SFT
from manyrank.training.trainer import Trainer

METHODS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "is_nonzero"}
OPERATORS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


class Reads(TorchFunctionMode):
    """Note the calls that give Python a tensor's values."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in METHODS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Note the operators whose result depends on values."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in OPERATORS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(seen: list[list[str]]):
    seen.append([])
    with Reads(seen[-1]), Operators(seen[-1]):
        yield


def test_the_modes_see_reads():
    seen = []
    with counted(seen):
        one = torch.ones(3)
        one.tolist(), one.sum().item(), bool(one[0]), one[one > 0], one.nonzero()
    assert {"tolist", "item", "__bool__", "aten::nonzero"} <= set(seen[0])


def own_model(embedded_model) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **small))
    return {"model": model, "tokenizer": tokenizer}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": "full"}, {"packing": "dataset"}], ids=str)
def test_a_step_is_read_once_and_its_micro_batches_never(options, tmp_path, embedded_model, monkeypatch):
    steps, forwards = [], []
    step, forward_backward = Trainer.train_step, SFT.forward_backward

    def watched_step(self, given):
        with counted(steps):
            return step(self, given)

    def watched_forward(self, given, *, number):
        assert len(given.micro_batches) > 1
        with counted(forwards):
            return forward_backward(self, given, number=number)

    monkeypatch.setattr(Trainer, "train_step", watched_step)
    monkeypatch.setattr(SFT, "forward_backward", watched_forward)
    given = {"data_path": str(ROOT / "data" / "sample.jsonl"), "output_dir": tmp_path / "run", "max_steps": 3}
    given |= {"per_device_train_batch_size": 1, "global_batch_size": 6, "max_length": 256, "bf16": False}
    config = SFTConfig(model="own", lora_target_modules="all-linear", logging_steps=1, **given, **options)
    result = SFTTrainer(config, **own_model(embedded_model), callbacks=[TrainerCallback()]).train()
    assert forwards == [[], [], []] and steps == [["tolist"]] * 3
    assert [line["grad_norm"] > 0 for line in result.history] == [True] * 3
