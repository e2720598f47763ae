"""What a step reads back from its device, which on a GPU waits for all that was asked of it: nothing but its sums."""

import pytest
import torch
from launches import ROOT
from operators import counted
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from manyrank import SFTConfig, SFTTrainer
from manyrank.tasks.sft import SFT
from manyrank.training.trainer import Trainer


def test_reads_are_seen():
    with counted() as counter:
        one = torch.ones(3)
        one.tolist(), one.sum().item(), bool(one[0]), one[one > 0], one.nonzero()
    assert counter.reads == ["tolist", "item", "__bool__", "index", "nonzero"]


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
        with counted() as counter:
            result = step(self, given)
        steps.append(counter.reads)
        return result

    def watched_forward(self, given, *, number):
        assert len(given.micro_batches) > 1
        with counted() as counter:
            loss = forward_backward(self, given, number=number)
        forwards.append(counter.reads)
        return loss

    monkeypatch.setattr(Trainer, "train_step", watched_step)
    monkeypatch.setattr(SFT, "forward_backward", watched_forward)
    given = {"data_path": str(ROOT / "data" / "sample.jsonl"), "output_dir": tmp_path / "run", "max_steps": 3}
    given |= {"per_device_train_batch_size": 1, "global_batch_size": 6, "max_length": 256, "bf16": False}
    config = SFTConfig(model="own", lora_target_modules="all-linear", logging_steps=1, **given, **options)
    result = SFTTrainer(config, **own_model(embedded_model), callbacks=[TrainerCallback()]).train()
    assert forwards == [[], [], []] and steps == [["tolist"]] * 3
    assert [line["grad_norm"] > 0 for line in result.history] == [True] * 3
