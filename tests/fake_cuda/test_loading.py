"""Llama-3.1 of 8B and 70B in shards on stand-in GPUs: the peak while loading against the plan's, of checkpoints that are all holes."""

import functools
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from launches import Run, launch
from load_model import header
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manyrank.models.catalog import known, read
from manyrank.models.load import LoadPlan, base_model
from manyrank.models.shards import Share, take_parts

pytestmark = pytest.mark.cuda


GiB = 2**30
FILE = 5 * GiB


def write_holes(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that takes no room on the disk: a header, and a length."""
    with file.open("wb") as stream:
        stream.write(header(tensors))
        stream.truncate(stream.tell() + sum(tensor.nbytes for tensor in tensors.values()))


@pytest.fixture(scope="module")
def holes(embedded_model, tmp_path_factory) -> Callable[[str], Path]:
    """Folders of models, by name, whose weights take no room on the disk."""

    @functools.cache
    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("holes")
        config = AutoConfig.for_model(**known()[name], dtype="bfloat16")
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(embedded_model).save_pretrained(folder)
        files, room = [], 0
        for key, tensor in model.state_dict().items():
            if tensor.nbytes > room:
                files, room = [*files, {}], FILE
            files[-1][key], room = tensor, room - tensor.nbytes
        names = [f"model-{number}.safetensors" for number in range(len(files))]
        for file, tensors in zip(names, files):
            write_holes(folder / file, tensors)
        places = {key: file for file, tensors in zip(names, files) for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return folder

    return folder_of


def measured_to_planned(run: Run) -> float:
    """Divide the peak of a GPU while loading by the plan's."""
    memory = json.loads((run.folder / "logs" / "memory.json").read_text())
    loading, context = memory["loading"], memory["parts"]["context"]  # which is none of torch's allocator
    return (loading["allocated_bytes"] + context) / loading["planned_bytes"]


# The plan has the whole embedding beside all that lasts, as a file may have it last. These have it first, when a rank of
# QLoRA under FSDP2 holds little; DeepSpeed makes room for it again.
@pytest.mark.parametrize(
    ("method", "strategy", "reached"),
    [("qlora", "fsdp", 0.81), ("qlora", "zero3", 1.0), ("lora", "fsdp", 1.01), ("lora", "zero3", 1.0)],
)
def test_peak(method, strategy, reached, holes, tmp_path):
    args = [
        f"--model={holes('llama-3.1-8b')}",
        f"--method={method}",
        f"--strategy={strategy}",
        "--nproc=2",
        "--max_steps=1",
    ]
    args += ["--bf16=true", "--sample_questions=[]", "--quantized_cache=off", "--learning_rate=1e-5"]
    run = launch(tmp_path / "run", *args, recipe="quickstart")
    assert run.code == 0, run.stdout + run.stderr
    assert measured_to_planned(run) == pytest.approx(reached, abs=0.01)
    assert run.facts()["base_bytes_here"][0] < 0.51 * run.facts()["base_bytes"]


# Not eight ranks, which would take 26 GiB of host memory: test_70b_loads.
@pytest.mark.parametrize(
    ("cards", "name", "mib", "reached"),
    [(2, "RTX A6000", 48 * 1024, 0.93), (4, "GeForce RTX 4090", 24 * 1024, 0.87)],
)
def test_70b(cards, name, mib, reached, holes, tmp_path):
    args = [f"--model={holes('llama-3.1-70b')}", "--method=qlora", "--strategy=fsdp", f"--nproc={cards}"]
    args += [
        "--max_steps=1",
        "--bf16=true",
        "--sample_questions=[]",
        "--quantized_cache=off",
        "--per_device_train_batch_size=1",
    ]
    here = {"FAKECUDA_DEVICES": str(cards), "FAKECUDA_NAME": f"NVIDIA {name}", "FAKECUDA_MEMORY_MIB": str(mib)}
    run = launch(tmp_path / "run", *args, recipe="quickstart", cold=True, **here)
    assert run.code == 0, run.stdout + run.stderr
    assert measured_to_planned(run) == pytest.approx(reached, abs=0.01)
    assert run.facts()["base_bytes_here"][0] < 1.02 / cards * run.facts()["base_bytes"]


@pytest.mark.parametrize("strategy", ["fsdp", "zero3", "fsdp_offload"])
@pytest.mark.parametrize("cards", [2, 4, 8])
def test_70b_loads(cards, strategy, holes):
    """One process loads the parts of the first rank, then those of the last: the launch of so many does not fit here."""
    gpu, shape = torch.device("cuda", 0), read("llama-3.1-70b")
    largest = max(linear.weights for linear in shape.layers[0].linears.values())
    matrix = largest * (2 + 1 / 2 + 4 / 64)  # in 16 and in 4 bits, and the blocks' float32, while it is quantised
    own = (shape.active / 2 + 2 * (shape.parameters - shape.active)) / cards
    constants = shape.active / 64 * (1 + 4 / 256)  # of each block a byte, and a float32 for 256 of them: on every rank
    kept = torch.device("cpu") if strategy == "fsdp_offload" else gpu
    for index in (0, cards - 1):
        share = Share(index, cards, strategy == "zero3", kept, trained=False, storage=torch.bfloat16)
        plan = LoadPlan(str(holes("llama-3.1-70b")), torch.bfloat16, torch.bfloat16, "nf4", {"": gpu}, share)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = base_model(plan)
        held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        parts = sum(part.nbytes for part in take_parts(model).values())
        print(f"{cards} {strategy} {index}: {[round(size / GiB, 2) for size in (parts, held, peak)]} GiB")
        assert parts == pytest.approx(own, rel=1e-3)
        assert held == pytest.approx(constants + (own if kept == gpu else 0), rel=0.01)  # the allocator rounds up
        assert peak < max(held + matrix, 1.01 * 2 * shape.embedding)  # which is read when little is held
        del model


BUFFERS = """
import os
from transformers import TrainerCallback

class Note(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        with open(os.environ["NOTES"], "a") as file:
            print(*sorted({buffer.device.type for buffer in model.buffers()}), file=file)
"""


@pytest.mark.parametrize(
    ("method", "strategy"), [("lora", "zero3"), ("qlora", "zero3"), ("lora", "fsdp"), ("qlora", "fsdp")]
)
def test_buffers_are_on_the_gpu(method, strategy, embedded_model, tmp_path):
    """DeepSpeed moves no buffers of a model whose parameters are partitioned already."""
    (tmp_path / "noting.py").write_text(BUFFERS)
    paths = {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}", "NOTES": str(tmp_path / "notes")}
    args = [f"--method={method}", f"--strategy={strategy}", "--nproc=2", "--max_steps=1", "--bf16=true"]
    args += ["--sample_questions=[]", f"--quantized_cache={tmp_path / 'cache'}"] if method == "qlora" else []
    for start in ("first", "second"):  # the second from the cache
        run = launch(tmp_path / start, *args, "--callbacks=noting:Note", recipe="quickstart", **paths)
        assert run.code == 0, run.stdout + run.stderr
    assert set((tmp_path / "notes").read_text().split()) == {"cuda"}
    assert ("the quantised base comes from" in run.stdout) == (method == "qlora")
