"""Operations that are written to be fast or frugal; each has a textbook form, which it equals."""
import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class FrozenConvolution(torch.autograd.Function):
    """A convolution with weights that are not trained, which keeps nothing of its input x
    (b, c_in, h, w); torch's own keeps it for the gradient of the weights, be that wanted or not.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...],
                padding: tuple[int, ...]) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors[0].to(grad.dtype)        # autocast may have narrowed grad
        return (conv2d_input(ctx.shape, weight, grad, ctx.stride, ctx.padding),
                None, None, None, None)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1),
                padding: tuple[int, ...] = (0, 0)) -> Tensor:
    """x (b, c_in, h, w), weight (c_out, c_in, *kernel) -> (b, c_out, h', w')."""
    frozen = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
    convolve = FrozenConvolution.apply if frozen else F.conv2d
    return convolve(x, weight, bias, stride, padding)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., c_in), weight (c_out, c_in) -> (..., c_out).

    In float32 on the CPU as a 1x1 convolution, channels last: there oneDNN takes five sixths of the
    time that the matrix product of torch's BLAS takes (BENCHMARKS.md).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)
    y = convolution(rows, weight[:, None, None].movedim(-1, 1), bias)
    return y.movedim(1, -1).reshape(*x.shape[:-1], -1)


class Gate(torch.autograd.Function):
    """value * gelu(gate), with the exact (erf) gelu, which is computed again for the gradient:
    value and gate are the largest features of all, and gelu(gate) would be kept as a third."""

    @staticmethod
    def forward(value: Tensor, gate: Tensor) -> Tensor:
        return F.gelu(gate).mul_(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = ctx.saved_tensors
        return F.gelu(gate).mul_(grad), torch.ops.aten.gelu_backward(grad * value, gate)


def gated(value: Tensor, gate: Tensor) -> Tensor:
    """value * gelu(gate), of any shape."""
    if torch.is_grad_enabled() and (value.requires_grad or gate.requires_grad):
        return Gate.apply(value, gate)
    return F.gelu(gate).mul_(value)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (b, heads, tokens, d), by the kernel that is quickest."""
    # On short sequences the fused kernel takes up to four times as long as plain products, on CPUs.
    if q.device.type != "cpu" or q.shape[-2] * k.shape[-2] >= 256 ** 2:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1) @ v


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Products in the precision of what is multiplied, as on devices that have no autocast."""
    return (torch.autocast(device_type, enabled=False)
            if torch.amp.is_autocast_available(device_type) else contextlib.nullcontext())


def channels_last(module: nn.Module) -> nn.Module:
    """Lays the convolutions' weights out as the CPU and tensor cores want them; in place."""
    for p in module.parameters():
        p.data = layout(p.data)
    return module


def layout(weight: Tensor) -> Tensor:
    """One weight as `channels_last` lays it out."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
