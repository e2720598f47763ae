"""A frozen base in float8: its weights, and its products forward and backward.

    y  = x W'    rows of x in float8, rows of W in float8 once at loading        (`method: fp8`)
    dx = dy W    rows of dy, times W's scales, in float8

A row has a scale of its own, so that a token's result does not depend on what lies beside it: the layout of a step
changes no loss. Scales are powers of two, which are exact in every type and lose nothing in a format with exponents.
Elements are e4m3 (four bits of exponent, three of mantissa; Micikevicius et al., 2022), in gradients too, as usual where
rows have scales.

torchao 0.18 (`convert_to_float8_training`) is for weights that are trained: it keeps them in 16 bits, casts them in each
forward and backward, and keeps the layer's input for their gradient. Of a frozen base only the product is needed, which is torch's own.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
LARGEST_EXPONENT = 8  # rows are scaled to less than 2**8; e4m3 ends at 448
LEAST_EXPONENT = -100  # of a scale, whose inverse must be finite; what is smaller becomes 0
UNIT = 16  # `torch._scaled_mm` wants both sides of a matrix in multiples of it on GPUs


def _cpus_scale_rows() -> bool:
    """Return whether torch's product takes a scale for each row on CPUs: 2.11 takes one for a tensor, 2.13 both."""
    matrix, scale = torch.zeros(UNIT, UNIT, dtype=E4M3), torch.ones(UNIT, 1)
    try:
        torch._scaled_mm(matrix, matrix.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


CPUS_SCALE_ROWS = _cpus_scale_rows()


def rows_to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float8, to be multiplied by their scales.

    Args:
        x: (rows, n), bf16 or float32.

    Returns:
        (rows, n) in e4m3, and (rows, 1) in float32. A row that is not finite stays so.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).float()
    exponent = (torch.frexp(largest).exponent - LARGEST_EXPONENT).clamp(min=LEAST_EXPONENT)
    one = 1 + 0 * largest  # nan where a row is not finite: a cast alone makes the largest number of infinity
    return (x * torch.ldexp(one, -exponent).to(x.dtype)).to(E4M3), torch.ldexp(one, exponent)


def _product(x: torch.Tensor, columns: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply rows of x (rows, n) with a matrix (n, m) in e4m3, stored by columns, of scales (1, m)."""
    rows, scale = rows_to_float8(x)
    if x.device.type == "cpu" and not CPUS_SCALE_ROWS:  # the same bits in the same time, with float32 copies
        return (rows.float() @ columns.float() * (scale * scales)).to(x.dtype)
    return torch._scaled_mm(rows, columns, scale_a=scale, scale_b=scales, out_dtype=x.dtype)


class _Float8Product(torch.autograd.Function):
    """y = x W' of a frozen weight. Args of `apply`: x (tokens, in), weight (out, in) in e4m3, scale (out, 1) in float32."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return _product(x, weight.T, scale.T.contiguous())

    @staticmethod
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        # The sum is over W's rows, so their scales go to dy. GPUs before Blackwell multiply e4m3 in this one layout alone.
        columns = weight.T.contiguous().T
        ones = torch.ones(1, weight.shape[1], device=dy.device)
        return _product(dy * scale.T.to(dy.dtype), columns, ones), None, None


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer with its weight in float8.

    The weight's parameter has the bytes as integers: DeepSpeed casts all floats of a module to 16 bits.
    """

    scale: torch.Tensor  # (out, 1), a power of two in whatever type it is

    def __init__(self, linear: torch.nn.Linear, device: torch.device) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        weight, scale = rows_to_float8(linear.weight.detach().to(device))
        self.weight = torch.nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        if linear.bias is not None:
            self.bias = torch.nn.Parameter(linear.bias.detach().to(device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind, shape = x.device.type, x.shape
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.flatten(0, -2).to(dtype)
        with torch.autocast(kind, enabled=False):
            y = _Float8Product.apply(x, self.weight.view(E4M3), self.scale.float())
            y = y if self.bias is None else y + self.bias.to(dtype)
        return y.unflatten(0, shape[:-1])


@torch.no_grad()
def to_float8(model: torch.nn.Module, device: torch.device) -> None:
    """Put the linear layers of a base into float8, lm_head and those of odd sizes aside.

    Args:
        device: where they are converted, and stay.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child is not head and not any(n % UNIT for n in child.weight.shape):
                setattr(parent, name, Float8Linear(child, device))
