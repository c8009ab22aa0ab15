"""Operations tuned for speed or memory, apart from the textbook code that uses them.

Each function computes the same as its textbook form. `Conv2d` and `Linear` are the layers that the
networks are built from.
"""
import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class FrozenConv2dFunction(torch.autograd.Function):
    """Convolution with frozen weights that does not store its input for the backward pass.

    PyTorch's own convolution stores its input for the gradient of the weights, which guidance does
    not need.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...],
                padding: tuple[int, ...]) -> Tensor:
        """Return the convolution of x (b, c_in, h, w)."""
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Store the weights and the size of the input."""
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.size = x.shape
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input."""
        weight = ctx.saved_tensors[0].to(grad.dtype)        # autocast may have changed grad's dtype
        return conv2d_input(ctx.size, weight, grad, ctx.stride, ctx.padding), None, None, None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1),
           padding: tuple[int, ...] = (0, 0)) -> Tensor:
    """Return the convolution of x (b, c_in, h, w) with weight (c_out, c_in, *kernel)."""
    is_frozen = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
    convolve = FrozenConv2dFunction.apply if is_frozen else F.conv2d
    return convolve(x, weight, bias, stride, padding)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., c_in) times the transposed weight (c_out, c_in), plus bias.

    In float32 on the CPU this is a 1x1 convolution in channels-last layout, because oneDNN takes
    five sixths of the time of PyTorch's matrix product there (BENCHMARKS.md).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)
    y = conv2d(rows, weight[:, None, None].movedim(-1, 1), bias)
    return y.movedim(1, -1).reshape(*x.shape[:-1], -1)


class Conv2d(nn.Conv2d):
    """2-D convolution, x (b, c_in, h, w) -> (b, c_out, h', w')."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class Linear(nn.Linear):
    """Linear layer over the last axis, (..., c_in) -> (..., c_out)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of x."""
        return linear(x, self.weight, self.bias)


class GEGLUFunction(torch.autograd.Function):
    """value * gelu(gate) that computes gelu(gate) again in the backward pass.

    value and gate are the largest activations of the networks; gelu(gate) would be a third one.
    """

    @staticmethod
    def forward(value: Tensor, gate: Tensor) -> Tensor:
        """Return value * gelu(gate), with the exact (erf) gelu."""
        return F.gelu(gate).mul_(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Store value and gate."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of value and gate."""
        value, gate = ctx.saved_tensors
        return F.gelu(gate).mul_(grad), torch.ops.aten.gelu_backward(grad * value, gate)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
                                 ) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for tensors (b, heads, n, d), by the fastest kernel."""
    is_long = q.shape[-2] * k.shape[-2] >= 256 ** 2
    if q.device.type == "mps" and is_long:      # all scores would take more than its limit of 4 GB
        return torch.stack([*map(F.scaled_dot_product_attention, q, k, v)])
    # On CPUs and short sequences the fused kernel takes up to four times as long as plain products.
    if q.device.type != "cpu" or is_long:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1) @ v


def autocast_disabled(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without autocast, or an empty context on devices that have none."""
    return (torch.autocast(device_type, enabled=False)
            if torch.amp.is_autocast_available(device_type) else contextlib.nullcontext())


def channels_last_weight(weight: Tensor) -> Tensor:
    """Return a convolution weight in channels-last layout, and any other tensor unchanged."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
