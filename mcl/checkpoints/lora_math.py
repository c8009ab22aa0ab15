"""Applies the change of one weight in each form that LoRAs have, in float32.

- LoRA, LoCon: W += up @ down, with a core between them in Tucker form
- LoHa: W += (a1 @ b1) * (a2 @ b2), Hadamard's product
- LoKr: W += w1 (x) w2, Kronecker's product, each whole or of two factors
- GLoRA: W += W @ a1 @ a2 + b1 @ b2
- full, norms: W += diff
- DoRA: any of them; then each row or column is rescaled to a learned magnitude
"""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import einsum
from torch import Tensor

from ..files import LazyTensor
from .containers import Shapes
from .model_file import check_finite

# Factors whose first dimension is the rank.
RANK_FACTORS = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


@dataclass(frozen=True)
class WeightDelta:
    """A change of one weight: W += strength * alpha / rank * delta.

    Attributes:
        path: The LoRA's file.
        module: The LoRA's name of the module.
        factors: The tensors that the change is computed from, by role, such as "down" and "up".
        alpha: Numerator of the LoRA's own scale.
        rank: Denominator of the LoRA's own scale.
        strength: The user's scale.
    """

    path: Path
    module: str
    factors: Mapping[str, LazyTensor]
    alpha: float
    rank: float
    strength: float

    def read(self, role: str, weight: Tensor) -> Tensor:
        """Return a factor in float32 on the weight's device; without values on the meta device."""
        if weight.is_meta:
            return torch.empty(self.factors[role].shape, device="meta")
        factor = self.factors[role].read().to(weight.device, torch.float32)
        check_finite(self.path, f"{self.module} ({role})", factor)
        return factor

    def add_to(self, weight: Tensor) -> Tensor:
        """Return a float32 weight with the change added.

        With a weight on the meta device this checks the shapes and reads no file.

        Raises:
            KeyError: If a factor is missing or superfluous.
            IndexError, RuntimeError, ValueError: If the shapes do not fit.
            InputError: If a factor is not finite.
        """
        factors = {role: self.read(role, weight) for role in self.factors}
        names = factors.keys() & {"dora_scale", "magnitude"}
        magnitudes = {name: factors.pop(name) for name in names}
        delta = delta_weight(factors, weight)
        if factors:
            raise KeyError(*factors)
        fitting = [squeeze_trailing(t.shape) for t in (weight, weight.reshape(len(weight), -1))]
        if squeeze_trailing(delta.shape) not in fitting:
            raise ValueError(delta.shape)
        delta = delta.reshape(weight.shape)
        if not magnitudes:
            return weight + self.strength * self.alpha / self.rank * delta
        adapted = apply_dora(weight + self.alpha / self.rank * delta, **magnitudes)
        return weight + self.strength * (adapted - weight)


def infer_rank(shapes: Shapes) -> int | None:
    """Return the rank of factors by role, or None for a form without one.

    Raises:
        IndexError, ValueError: If a factor has no dimensions.
    """
    if "a1" in shapes:
        return min(shapes["a1"][:2])
    return next((shapes[role][0] for role in RANK_FACTORS if role in shapes), None)


def delta_weight(factors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Return the change that factors make of a weight; the factors used are removed.

    Raises:
        KeyError: If a factor is missing.
        RuntimeError: If the shapes do not fit.
    """
    take = factors.pop
    if "down" in factors or "up" in factors:
        return low_rank(take("up"), take("down"), take("mid", None))
    if "hada_w1_a" in factors:
        return (low_rank(take("hada_w1_a"), take("hada_w1_b"), hada=take("hada_t1", None))
                * low_rank(take("hada_w2_a"), take("hada_w2_b"), hada=take("hada_t2", None)))
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        w1 = (take("lokr_w1") if "lokr_w1" in factors else
              low_rank(take("lokr_w1_a"), take("lokr_w1_b")))
        w2 = (take("lokr_w2") if "lokr_w2" in factors else
              low_rank(take("lokr_w2_a"), take("lokr_w2_b"), hada=take("lokr_t2", None)))
        return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim)), w2)
    if "a1" in factors:
        return glora_delta(weight, *(take(role) for role in ("a1", "a2", "b1", "b2")))
    return take("diff")


def low_rank(up: Tensor, down: Tensor, mid: Tensor | None = None, hada: Tensor | None = None
             ) -> Tensor:
    """Return up @ down as a weight.

    Args:
        up: (o, r) or (o, r, 1, 1).
        down: (r, i) or (r, i, h, w).
        mid: Core (r, r, h, w) of the Tucker form, whose kernel size it has.
        hada: The core of LoHa and LoKr, for which LyCORIS stores `up` transposed.

    Returns:
        (o, i) or (o, i, h, w).
    """
    if hada is not None:
        up, mid = up.flatten(1).T, hada
    if mid is not None:
        down = einsum(mid, down.flatten(1), "p q h w, q i -> p i h w")
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def glora_delta(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    """Return W @ a1 @ a2 + b1 @ b2. Before 2024 LyCORIS swapped the names in each pair."""
    if a1.shape[0] < a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    product = einsum(weight.flatten(2) if weight.ndim > 2 else weight[..., None],
                     a1.flatten(1), a2.flatten(1), "o i k, i r, r j -> o j k")
    return product.reshape(weight.shape) + low_rank(b1, b2).reshape(weight.shape)


def apply_dora(weight: Tensor, dora_scale: Tensor | None = None, magnitude: Tensor | None = None
               ) -> Tensor:
    """Return a weight whose rows or columns are rescaled to the given norms.

    Args:
        weight: (o, i, ...).
        dora_scale: Norms of LyCORIS: of columns if it has one row (1, i, ...), otherwise of rows.
        magnitude: Norms of rows (o), of PEFT.
    """
    magnitudes = magnitude if dora_scale is None else dora_scale
    assert magnitudes is not None
    is_columns = dora_scale is not None and dora_scale.ndim > 1 and dora_scale.shape[0] == 1
    rows = weight.transpose(0, 1) if is_columns else weight
    norms = rows.flatten(1).norm(dim=1) + torch.finfo(rows.dtype).eps
    rows = rows * (magnitudes.reshape(len(rows)) / norms).reshape(-1, *[1] * (rows.ndim - 1))
    return rows.transpose(0, 1) if is_columns else rows


def squeeze_trailing(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without ones at its end: a 1x1 convolution equals a linear layer."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
