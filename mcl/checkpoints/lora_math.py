"""A change to one weight, in each form that LoRAs have: computed and added in float32.

    LoRA, LoCon     W += up @ down, in Tucker's form with a core between them
    LoHa            W += (a1 @ b1) * (a2 @ b2), Hadamard's product
    LoKr            W += w1 (x) w2, Kronecker's product, each whole or of two factors
    GLoRA           W += W @ a1 @ a2 + b1 @ b2
    full, norms     W += diff
    DoRA            any of them, and each row or column then has a length of its own
"""
import math
from dataclasses import dataclass
from typing import Any, Mapping

import torch
from einops import einsum
from torch import Tensor

from .lazy import LazyTensor

# Of these the first dimension is the rank, by which alpha is divided.
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


@dataclass(frozen=True)
class Delta:
    """One change to one weight: strength * alpha / rank * its difference."""
    factors: Mapping[str, LazyTensor]   # by their roles, as "down" and "up"
    alpha: float
    rank: float
    strength: float

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / self.rank

    def add_to(self, weight: Tensor) -> Tensor:
        """weight, float32, with the change added."""
        factors = {role: t.read().to(weight.device, torch.float32)
                   for role, t in self.factors.items()}
        lengths = {role: factors.pop(role) for role in ("dora_scale", "magnitude")
                   if role in factors}
        change = difference(factors, weight).reshape(weight.shape)
        if not lengths:
            return weight + self.scale * change
        whole = rescaled(weight + self.alpha / self.rank * change, **lengths)
        return weight + self.strength * (whole - weight)


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Of factors by their roles; None where there is none.

    Raises IndexError or ValueError for a factor without dimensions.
    """
    if "a1" in shapes:
        return min(shapes["a1"][:2])
    return next((shapes[role][0] for role in RANKED if role in shapes), None)


def difference(factors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """What the factors add to a weight; each that is used is taken out of `factors`.

    Raises KeyError where one is missing, RuntimeError where their shapes do not fit.
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
        return generalised(weight, *(take(role) for role in ("a1", "a2", "b1", "b2")))
    return take("diff")


def low_rank(up: Tensor, down: Tensor, mid: Tensor | None = None, hada: Tensor | None = None
             ) -> Tensor:
    """up (o, r, 1, 1) @ down (r, i, h, w), or both 2-D: (o, i, h, w) or (o, i).

    With Tucker's core the kernel is the core's. LyCORIS keeps `up` transposed where it is `hada`.
    """
    if hada is not None:
        up, mid = up.flatten(1).T, hada
    if mid is not None:
        down = einsum(mid, down.flatten(1), "p q h w, q i -> p i h w")
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def generalised(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    """GLoRA's difference; until 2024 LyCORIS had the names of each pair the other way round."""
    if a1.shape[0] < a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    along = einsum(weight.flatten(2) if weight.ndim > 2 else weight[..., None],
                   a1.flatten(1), a2.flatten(1), "o i k, i r, r j -> o j k")
    return along.reshape(weight.shape) + low_rank(b1, b2).reshape(weight.shape)


def rescaled(weight: Tensor, dora_scale: Tensor | None = None, magnitude: Tensor | None = None
             ) -> Tensor:
    """DoRA: PEFT's magnitudes are of rows, LyCORIS' scales of rows or, in one row, of columns."""
    rows = magnitude if dora_scale is None else dora_scale
    if rows is None:
        return weight
    flat, side = weight.flatten(1), 0
    if dora_scale is not None and dora_scale.ndim > 1 and dora_scale.shape[0] == 1:
        flat, side = weight.transpose(0, 1).flatten(1), 1
    wanted = rows.reshape(weight.shape[side])
    length = flat.norm(dim=1) + torch.finfo(flat.dtype).eps
    factor = (wanted / length).reshape(*[1] * side, -1, *[1] * (weight.ndim - 1 - side))
    return weight * factor


def check_fit(factors: Mapping[str, LazyTensor], shape: Any) -> bool:
    """Whether a difference of these factors has the shape of the weight; reads nothing.

    Raises KeyError where a factor is missing or one is left over.
    """
    empty = {role: torch.empty(t.shape, device="meta") for role, t in factors.items()}
    lengths = {role: empty.pop(role) for role in ("dora_scale", "magnitude") if role in empty}
    weight = torch.empty(tuple(shape), device="meta")
    try:
        found = tuple(difference(empty, weight).shape)
        rescaled(weight, **lengths)
    except (RuntimeError, IndexError, ValueError):
        return False
    if empty:
        raise KeyError(next(iter(empty)))
    flattened = (*shape[:1], math.prod(shape[1:]))
    return bare(found) in (bare(tuple(shape)), bare(flattened))


def bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones at its end: a 1x1 convolution is a linear layer."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
