"""Operations tuned for speed or memory, apart from the textbook code that uses them.

Each function computes the same as its textbook form. `Conv2d` is the layer that the networks are
built from.
"""
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


class Conv2d(nn.Conv2d):
    """2-D convolution, x (b, c_in, h, w) -> (b, c_out, h', w')."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x."""
        is_frozen = torch.is_grad_enabled() and x.requires_grad and not self.weight.requires_grad
        convolve: Any = FrozenConv2dFunction.apply if is_frozen else F.conv2d
        return convolve(x, self.weight, self.bias, self.stride, self.padding)


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


def channels_last_weight(weight: Tensor) -> Tensor:
    """Return a convolution weight in channels-last layout, and any other tensor unchanged."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
