"""Speed and memory of real architectures on a GPU, with random weights made there, so that nothing is downloaded.

    python benchmarks/gpu.py [--toy]             all cases as a table; --toy: tiny ones on the CPU, to try the script
    python benchmarks/gpu.py --case N [--toy]    one case in its own process; prints one line of JSON

Every step is one micro-batch of packed documents through the very modules that a training uses. FLOPs are those that
LoRA needs: 4 for each weight of the layers and token (no gradient of a frozen weight), of the head for supervised tokens
only, and those of the attention inside documents; recomputed ones are not counted. MFU is against a matrix product
measured in the same process.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import own_process

from manyrank.config.resolve import ResolvedConfig
from manyrank.errors import EXIT_FAILED
from manyrank.models.catalog import known
from manyrank.models.spec import from_config
from manyrank.plan import memory
from manyrank.plan.planned_run import PlannedRun
from manyrank.rules.context import RunContext
from manyrank.topology.gpus import planned_hardware, probe
from manyrank.topology.strategies import default_strategy

BUDGET = 9 * 60  # seconds for all cases
STEPS, WARM_UP = 8, 3
COLUMNS = f"{'case':<34} {'tokens/s':>9} {'of first':>8} {'TFLOP/s':>8} {'MFU':>6} {'weights GiB':>11} {'peak GiB':>9} {'planned':>8}"
TOY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@dataclass(frozen=True)
class Case:
    """rows x length: tokens of a micro-batch. by: whose trainer. compiled: torch_compile."""

    model: str
    method: str
    rows: int
    length: int
    checkpointing: str = "off"
    plain: tuple[str, ...] = ()
    by: str = "manyrank"
    compiled: bool = False

    @property
    def name(self) -> str:
        without = "".join(f" -{part}" for part in self.plain)
        again = " +ckpt" if self.checkpointing != "off" else ""
        more = (" trl" if self.by == "trl" else "") + (" +compile" if self.compiled else "")
        return f"{self.model} {self.method} {self.rows}x{self.length}{again}{without}{more}"


CASES = [
    Case("Llama-3.1-8B", "lora", 2, 4096),
    Case("Llama-3.1-8B", "lora", 2, 4096, by="trl"),
    Case("Llama-3.1-8B", "lora", 2, 4096, plain=("lm_head",)),
    Case("Llama-3.1-8B", "lora", 2, 4096, plain=("lora",)),
    Case("Llama-3.1-8B", "lora", 2, 4096, "full"),
    Case("Qwen2.5-7B", "qlora", 4, 1024),
    Case("Qwen2.5-7B", "qlora", 4, 1024, "full"),
    Case("Qwen2.5-7B", "lora", 2, 4096),
    Case("Qwen2.5-32B", "qlora", 1, 4096, "full"),
]


@dataclass(frozen=True)
class Figures:
    """tokens_per_second: median over the steps. flops: of a step. product: FLOP/s of a large matrix product. Bytes."""

    tokens_per_second: float
    tokens: int
    flops: float
    product: float
    weights: int
    peak: int
    planned: int
    losses: list[float]

    @property
    def flops_per_second(self) -> float:
        return self.flops * self.tokens_per_second / self.tokens


@dataclass(frozen=True)
class Bench:
    """One case on one device."""

    case: Case
    toy: bool

    @cached_property
    def device(self):
        import torch

        return torch.device("cpu" if self.toy else "cuda")

    @cached_property
    def config(self):
        from manyrank.config.resolve import Setting, resolve

        given = {
            "model_name_or_path": self.case.model,
            "data_path": "random",
            "method": self.case.method,
            "gradient_checkpointing": self.case.checkpointing,
            "disable_fused": list(self.case.plain),
            "torch_compile": self.case.compiled,
        }
        return resolve(None, [Setting(key, value, "bench") for key, value in given.items()]).config

    def measure(self) -> Figures:
        """Make the model, run the steps."""
        import torch

        self._forget_earlier()
        torch.manual_seed(0)
        product = self._product()
        base = self._base()
        weights = sum(p.numel() * p.element_size() for p in base.parameters())
        rows = self._rows()
        tokens = sum(len(row["input_ids"]) for row in rows)
        steps = self._trl(base, rows) if self.case.by == "trl" else self._steps(base, rows)
        seconds, losses = zip(*steps)
        return Figures(
            tokens / sorted(seconds[WARM_UP:])[len(seconds[WARM_UP:]) // 2],
            tokens,
            self._flops(rows),
            product,
            weights,
            torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
            self._planned(),
            list(losses),
        )

    def _forget_earlier(self) -> None:
        """Free what an earlier case of this process has left, whose peak is not this one's."""
        import torch

        gc.collect()  # engines and models refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _steps(self, base, rows) -> Iterator[tuple[float, float]]:
        from manyrank.data.loader import side_by_side

        engine, token_loss = self.prepared(base)
        on_cpu = side_by_side(rows)
        for _ in range(STEPS):
            started = self._now()
            total = self.step(engine, token_loss, micro := on_cpu.to(self.device))
            yield self._now() - started, total / len(micro.targets)

    def prepared(self, base):
        """The engine of the model with adapters, and its loss."""
        from accelerate import Accelerator

        from manyrank.models.load import with_adapters
        from manyrank.parallel.sharded_engines import prepare_engine
        from manyrank.training.loss import TokenLoss
        from manyrank.training.optim import build_optimizer

        accelerator = Accelerator(mixed_precision="bf16", cpu=self.toy)
        model = with_adapters(base, self.config)
        engine = prepare_engine(accelerator, model, build_optimizer(model, self.config))
        return engine, TokenLoss(engine.wrapped, engine.model, fused="lm_head" not in self.case.plain)

    @staticmethod
    def step(engine, token_loss, micro) -> float:
        """A step of one micro-batch; returns the sum of its losses."""
        with engine.forward_backward(last=True):
            loss = token_loss(micro.inputs, micro.positions, micro.targets)
            engine.backward(loss / len(micro.targets), last=True)
        total, _ = engine.step(learning_rate=1e-4, max_grad_norm=1.0, sums=loss.detach()[None])
        return total

    def _trl(self, base, rows) -> Iterator[tuple[float, float]]:
        """SFTTrainer on the same documents, side by side, with the kernels that are installed (see `kernels_of_trl`).

        Without flash attention transformers makes a dense mask of them for sdpa.
        """
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        data = [
            {"input_ids": row["input_ids"].tolist(), "completion_mask": (row["labels"] >= 0).astype(int).tolist()}
            for row in rows
        ]
        seconds, output, kernels = [], tempfile.TemporaryDirectory(), kernels_of_trl()
        if kernels["flash attention"] and not self.toy:
            base.set_attn_implementation("flash_attention_2")

        class Timer(TrainerCallback):
            def on_step_begin(_, *args, **kwargs):
                seconds.append(-self._now())

            def on_step_end(_, *args, **kwargs):
                seconds[-1] += self._now()

        arguments = SFTConfig(
            output_dir=output.name,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=len(rows),
            max_steps=STEPS,
            padding_free=True,
            max_length=None,
            bf16=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=self.toy,
            gradient_checkpointing=self.case.checkpointing != "off",
            disable_tqdm=True,
            completion_only_loss=True,
            use_liger_kernel=kernels["liger"] and not self.toy,
        )
        trainer = SFTTrainer(
            base,
            arguments,
            train_dataset=Dataset.from_list(data * STEPS),
            callbacks=[Timer()],
            processing_class=self._tokenizer(PreTrainedTokenizerFast),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        yield from zip(seconds, losses)

    @staticmethod
    def _tokenizer(cls):
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        return cls(tokenizer_object=Tokenizer(WordLevel({"<e>": 0}, "<e>")), eos_token="<e>", pad_token="<e>")

    def _rows(self) -> list[dict]:
        """Documents of the lengths of chats (log-normal, median 400 tokens) that fill rows x length; a third is prompt."""
        import numpy as np

        random, left, rows = np.random.default_rng(0), self.case.rows * self.case.length, []
        if self.toy:
            left = 256
        while left:
            length = min(left, self.case.length, max(16, int(random.lognormal(np.log(400), 0.7))))
            length = left if left - length < 16 else length
            ids = random.integers(1, self._shape()["vocab_size"], length)
            labels = np.where(np.arange(length) < max(1, length // 3), -100, ids)
            rows.append({"input_ids": ids, "labels": labels, "source": "random", "row": len(rows)})
            left -= length
        return rows

    def _planned(self) -> int:
        """Bytes of tensors that the plan expects at the peak: without CUDA's own, and what the allocator keeps beside."""
        config = self.config.model_copy(
            update={
                "per_device_train_batch_size": 1,
                "max_length": 256 if self.toy else self.case.rows * self.case.length,
            }
        )
        shape = from_config(self._shape(), name=self.case.model)
        context = RunContext(ResolvedConfig(config), default_strategy(1), 1, 1, planned_hardware(0 if self.toy else 1))
        parts = memory.estimate(PlannedRun(context, shape)).parts
        return sum(size for name, size in parts.items() if name not in ("context", "slack"))

    def _shape(self) -> dict:
        return known()[self.case.model.lower()] | (TOY if self.toy else {})

    def _base(self):
        """The architecture with random weights, made layer by layer on the device; NF4 or float8 where the case says so."""
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        from manyrank.models.float8 import to_float8

        config = AutoConfig.for_model(**self._shape())
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if self.case.method == "qlora" and type(child) is torch.nn.Linear and name != "lm_head":
                    setattr(module, name, self._quantised(child))
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = torch.empty_like(parameter, device=self.device)
                    value = value.normal_(std=0.02) if parameter.ndim > 1 else value.fill_(float(name != "bias"))
                    setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        model.is_loaded_in_4bit = self.case.method == "qlora"
        model.to(self.device)
        if self.case.method == "fp8":
            to_float8(model, self.device)
        return model

    def _quantised(self, linear):
        import bitsandbytes as bnb
        import torch

        dtype = torch.bfloat16
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            quant_storage=dtype,
            device="meta",
        )
        value = torch.empty(linear.weight.shape, dtype=dtype, device=self.device).normal_(std=0.02)
        made.weight = bnb.nn.Params4bit(value, quant_type="nf4", quant_storage=dtype, module=made).to(self.device)
        if linear.bias is not None:
            made.bias = torch.nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=self.device), False)
        return made

    def _flops(self, rows: Sequence[dict]) -> float:
        lengths = [len(row["input_ids"]) for row in rows]
        supervised = sum(int((row["labels"] >= 0).sum()) for row in rows)
        shape = self._shape()
        size, heads = shape["hidden_size"] // shape["num_attention_heads"], shape["num_attention_heads"]
        keys = shape["num_key_value_heads"] * size
        layer = (
            2 * shape["hidden_size"] * (shape["hidden_size"] + keys)
            + 3 * shape["hidden_size"] * shape["intermediate_size"]
        )
        attention = 6 * sum(length**2 for length in lengths) * heads * size
        layers = shape["num_hidden_layers"] * (4 * layer * sum(lengths) + attention)
        return layers + 4 * shape["hidden_size"] * shape["vocab_size"] * supervised

    def _product(self) -> float:
        """FLOP/s of a large bf16 matrix product, the best of some."""
        import torch

        size, best = (256 if self.toy else 8192), float("inf")
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        for _ in range(12):
            started = self._now()
            a @ b
            best = min(best, self._now() - started)
        return 2 * size**3 / best

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def kernels_of_trl() -> dict[str, bool]:
    """Which of the kernels that make trl fast are installed."""
    names = {"flash attention": "flash_attn", "liger": "liger_kernel"}
    return {kernel: importlib.util.find_spec(name) is not None for kernel, name in names.items()}


def row(case: Case, found: Figures, first: Figures) -> str:
    return (
        f"{case.name:<34} {found.tokens_per_second:>9,.0f} {found.tokens_per_second / first.tokens_per_second:>8.2f} "
        f"{found.flops_per_second / 1e12:>8.1f} {found.flops_per_second / found.product:>6.1%} {found.weights / 2**30:>11.2f} "
        f"{found.peak / 2**30:>9.2f} {found.planned / 2**30:>8.2f}"
    )


def run(cases: Sequence[Case] = CASES, *, toy: bool) -> int:
    """Print a line for each case when it ends; a case that fails or runs out of time gets a line that says so.

    Returns:
        The exit code.
    """
    end, first, code = time.monotonic() + BUDGET, {}, 0
    print(COLUMNS, flush=True)
    for case in cases:
        try:
            found = in_own_process(case, toy=toy, seconds=end - time.monotonic())
            line = row(case, found, first.setdefault((case.model, case.method), found))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            why = "no time left" if late else f"FAILED: {str(error).splitlines()[-1][:160]}"
            line, code = f"{case.name:<34} {why}", EXIT_FAILED
        print(line, flush=True)
    return code


def in_own_process(case: Case, *, toy: bool, seconds: float) -> Figures:
    """Measure a case in a new process.

    Raises:
        RuntimeError: it fails; subprocess.TimeoutExpired: it takes too long.
    """
    argv = [sys.executable, __file__, f"--case={CASES.index(case)}", *(["--toy"] if toy else [])]
    return Figures(**own_process.result(own_process.run(argv, seconds=max(1, seconds))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    cases = "; ".join(f"{number}: {case.name}" for number, case in enumerate(CASES))
    parser.add_argument(
        "--case", type=int, choices=range(len(CASES)), metavar="N", help=f"measure one, and print JSON: {cases}"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try the script")
    options = parser.parse_args()
    if not options.toy and not probe().gpus:
        parser.error("there is no GPU here; add --toy to try it on the CPU")
    if options.case is None:
        return run(toy=options.toy)
    own_process.print_result(asdict(Bench(CASES[options.case], options.toy).measure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
