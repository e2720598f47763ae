"""Integers and booleans of stand-in GPUs, computed on the CPU: in GRPO tokens, masks and lengths decide what is done next.

Copies of up to 8 MiB are real there, kernels are not. So an operation on integers alone runs on copies of them, and its
result is copied to the GPU. What turns floats, which nothing computes, into integers gives zeros.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnTheCpu(TorchDispatchMode):
    """Computes what has integers only. Views, collectives and parts of sharded tensors go their way."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        sharded = any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        if func.namespace != "aten" or func.is_view or sharded or _device(tensors, kwargs).type != "cuda":
            return func(*args, **kwargs)
        if not any(map(_is_float, tensors)):
            return _computed(func, args, kwargs, _device(tensors, kwargs))
        if func in BY_MASK:  # the GPU would count where it is true
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        elif func is aten.masked_scatter_backward.default:  # it counts, too, though the shape is given
            return args[0].new_empty(args[2])
        return tree_map_only(torch.Tensor, _with_zeros, func(*args, **kwargs))


def _tensors(arguments):
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def _device(tensors, kwargs):
    """The GPU that an operation takes part in, or the CPU."""
    devices = [tensor.device for tensor in tensors] or [torch.device(kwargs.get("device") or "cpu")]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _is_float(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def _with_zeros(result):
    known = _is_float(result) or not result.is_cuda
    return result if known else result.copy_(torch.zeros(result.shape, dtype=result.dtype))


def _places(index):
    if index is None or index.dtype != torch.bool:
        return [index]
    return [place.to(index.device) for place in Copy(index).values.nonzero(as_tuple=True)]


def _computed(func, args, kwargs, gpu):
    copies = {id(tensor): Copy(tensor) for tensor in _tensors((args, kwargs)) if tensor.is_cuda}
    asked = kwargs.get("device", gpu)

    def on_the_cpu(tensor):
        return copies[id(tensor)].values if tensor.is_cuda else tensor

    args, kwargs = tree_map_only(torch.Tensor, on_the_cpu, (args, kwargs))
    result = func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
    if func._schema.is_mutable:
        for copy in copies.values():
            copy.write_back()
    changed = {id(copy.values): copy.origin for copy in copies.values()}
    return tree_map_only(torch.Tensor, lambda made: changed.get(id(made), made.to(asked)), result)


class Copy:
    """A tensor's values on the CPU. Its whole storage is copied: gathering strided ones first would take a kernel."""

    def __init__(self, origin):
        self.origin, self.bytes = origin, torch.empty(0, dtype=torch.uint8, device=origin.device)
        self.bytes.set_(origin.untyped_storage())
        self.here = self.bytes.cpu()
        layout = origin.shape, origin.stride(), origin.storage_offset()
        self.values = torch.empty(0, dtype=origin.dtype).set_(self.here.untyped_storage()).as_strided(*layout)

    def write_back(self):
        self.bytes.copy_(self.here)
