"""Where a program branches on what a kernel has computed, give it a value: the stand-in libraries compute nothing.

Python imports this file first in every process of tests/fake_cuda/run.sh. Each patch says what reads the value. Nothing
else is changed; keep the list short.
"""

import importlib.abc
import importlib.util
import os
import sys

PATCHES = {}


def after(name):
    """Run the decorated function on a module once it is imported."""

    def register(patch):
        PATCHES[name] = patch
        return patch

    return register


class Hook(importlib.abc.MetaPathFinder):
    """Runs the patch of a module after the module itself."""

    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                PATCHES[name](module)

            spec.loader.exec_module = exec_module
        return spec


@after("torch")
def _torch(torch):
    """Losses and norms are read as 0, and no element is found. Trials of the loss and of packing compare tensors;
    generation takes a token."""
    # The tests fork processes after bitsandbytes has initialised CUDA; here there is no driver that this could break.
    torch.cuda._is_in_bad_fork = lambda: False
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN builds its graphs with a real driver
    equal, argwhere, argmax, shown = torch.equal, torch.argwhere, torch.Tensor.argmax, torch.Tensor.__repr__

    def reading(name):
        read = getattr(torch.Tensor, name)

        def number(self):
            value = read(self)  # which waits for the device
            known = not self.is_cuda or not self.is_floating_point()
            return value if known else read(torch.zeros(self.shape, dtype=self.dtype))

        setattr(torch.Tensor, name, number)

    for name in ("item", "tolist", "__float__"):
        reading(name)

    def same(a, b):
        return (a.shape, a.dtype) == (b.shape, b.dtype) if a.is_cuda else equal(a, b)

    def nowhere(tensor):  # int8 looks for outliers
        return (
            argwhere(torch.zeros_like(tensor, device="cpu")).to(tensor.device) if tensor.is_cuda else argwhere(tensor)
        )

    def first(self, *args, **kwargs):
        indices = argmax(self, *args, **kwargs)
        return indices.copy_(torch.zeros(indices.shape, dtype=indices.dtype)) if indices.is_cuda else indices

    def show(self, **kwargs):
        return f"<{tuple(self.shape)} {self.dtype} on {self.device}>" if self.is_cuda else shown(self, **kwargs)

    torch.equal, torch.argwhere, torch.Tensor.argmax, torch.Tensor.__repr__ = same, nowhere, first, show
    torch.nn.Parameter.__repr__ = show


@after("torch.distributed.distributed_c10d")
def _objects(c10d):
    """Collectives of Python objects exchange sizes that a kernel has computed: they go by gloo."""
    groups = {}

    def by_gloo(name, place):
        collective = getattr(c10d, name)

        def run(*args, **kwargs):
            args = list(args)
            group = args.pop(place) if len(args) > place else kwargs.pop("group", None)
            kwargs.pop("device", None)
            if group not in groups:
                ranks = None if group is None else c10d.get_process_group_ranks(group)
                groups[group] = c10d.new_group(ranks, backend="gloo")
            return collective(*args, group=groups[group], **kwargs)

        setattr(c10d, name, run)

    by_gloo("broadcast_object_list", 2)
    by_gloo("all_gather_object", 2)
    by_gloo("gather_object", 3)


@after("deepspeed.runtime.engine")
def _step(engine):
    engine.DeepSpeedEngine.was_step_applied = lambda self: True


def _no_overflow(module, optimizer):
    """Whether a gradient has overflowed, and the step is left out, are flags that a kernel sets and a collective sums."""

    def never(asked):
        def never_so(*args, **kwargs):
            asked(*args, **kwargs)
            return False

        return never_so

    optimizer.has_overflow = never(optimizer.has_overflow)
    module.is_invalid_grad_norm = never(module.is_invalid_grad_norm)


@after("deepspeed.runtime.zero.stage_1_and_2")
def _stage_1_and_2(module):
    _no_overflow(module, module.DeepSpeedZeroOptimizer)


@after("deepspeed.runtime.zero.stage3")
def _stage3(module):
    _no_overflow(module, module.DeepSpeedZeroOptimizer_Stage3)


@after("manyrank.training.memory")
def _least_memory(memory):
    """The least memory of all ranks is a minimum that a kernel takes."""
    import torch

    memory._least_memory = lambda accelerator: torch.cuda.mem_get_info(accelerator.device)[1]


@after("transformers.generation.utils")
def _generation(utils):
    """Ranks that generate together go on while one has not finished: a sum of floats. Here all have the same length."""
    asked = utils.GenerationMixin._has_unfinished_sequences

    def unfinished(self, this_peer_finished, synced_gpus, device):
        asked(self, this_peer_finished, synced_gpus, device)
        return not this_peer_finished

    utils.GenerationMixin._has_unfinished_sequences = unfinished


@after("manyrank.tasks.grpo.task")
def _grpo(module):
    """Completions are cut where a turn ends, and losses select tokens by masks, also in the backward."""
    import integers

    def on_integers(name):
        method = getattr(module.GRPO, name)

        def run(self, *args, **kwargs):
            with integers.OnTheCpu():
                return method(self, *args, **kwargs)

        setattr(module.GRPO, name, run)

    on_integers("forward_backward")
    on_integers("evaluate")


if os.environ.get("FAKECUDA"):
    sys.meta_path.insert(0, Hook())
