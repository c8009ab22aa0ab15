"""Attention with maps as return values, and the request for them.

Letters of every shape and einops string in this project:
    b batch    f frames    c channels    h w rows and columns of the latents (H W of the picture)
    n tokens   m tokens of the text      d width of one attention head
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .ops import scaled_dot_product_attention


class AttentionRequest(NamedTuple):
    """Names of the blocks, modules or layers whose attention a forward pass returns.

    `UNet3D.resolve_layers` turns them into full layer names.

    Attributes:
        temporal: Temporal attention maps.
        temporal_keys: Keys of the temporal attention.
        cross: Attention maps between the picture and the text.
    """

    temporal: tuple[str, ...] = ()
    temporal_keys: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()


NO_REQUEST = AttentionRequest()


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one forward pass, by full layer name.

    Attributes:
        temporal: Temporal maps (b*h*w, heads, f, f), float32; each row sums to 1.
        temporal_keys: Temporal keys (b*h*w, f, c), before they are split into heads.
        cross: Cross-attention maps (b*f, heads, h*w, m), float32; each row sums to 1.
        grids: Rows and columns (h, w) of each layer's positions.
        frame_offset: First frame of the context window that was seen, in a long clip.
    """

    temporal: dict[str, Tensor] = field(default_factory=dict)
    temporal_keys: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    frame_offset: int = 0

    def select(self, request: AttentionRequest) -> "AttentionMaps":
        """Return only the attention of a request, which consists of full layer names."""
        pairs = zip((self.temporal, self.temporal_keys, self.cross), request, strict=True)
        temporal, keys, cross = ({name: maps[name] for name in names} for maps, names in pairs)
        return AttentionMaps(temporal, keys, cross, self.grids, self.frame_offset)

    def __or__(self, other: "AttentionMaps") -> "AttentionMaps":
        return AttentionMaps(self.temporal | other.temporal,
                             self.temporal_keys | other.temporal_keys, self.cross | other.cross,
                             self.grids | other.grids)


LayerOutput = tuple[Tensor, AttentionMaps]      # features, requested attention


def merge_requests(requests: Sequence[AttentionRequest]) -> AttentionRequest:
    """Return one request for everything that several requests name, without duplicates."""
    kinds = zip(*requests, strict=True)
    return AttentionRequest(*(tuple(dict.fromkeys(chain(*names))) for names in kinds))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, return_map: bool = False,
              causal: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return multi-head attention, softmax(q k^T / sqrt(d)) v, and its map on request.

    Args:
        q: Queries (b, n, heads*d).
        k: Keys (b, m, heads*d).
        v: Values (b, m, heads*d).
        heads: Number of heads.
        return_map: Whether to return the map too.
        causal: Whether a token sees only itself and earlier tokens. Not possible with a map.

    Returns:
        The output (b, n, heads*d), and the map (b, heads, n, m) or None. The map is float32 (or
        float64) in half precision too, because the loss overflows there.
    """
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    if not return_map:
        mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril() if causal else None
        return rearrange(scaled_dot_product_attention(q, k, v, mask),
                         "b heads n d -> b n (heads d)"), None
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        scores = q.to(compute_dtype) * q.shape[-1] ** -0.5 @ k.to(compute_dtype).transpose(-1, -2)
        attention_probs = scores.softmax(dim=-1)
        out = attention_probs.to(v.dtype) @ v
    return rearrange(out, "b heads n d -> b n (heads d)"), attention_probs


class Attention(nn.Module):
    """Attention layer with projections; self-attention without a context.

    Attributes:
        name: Full name of the layer in its `UNet3D`, under which its map is requested.
    """

    name = ""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None):
        """Create a layer of `channels` for contexts of `context_channels`."""
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_channels or channels, channels, bias=False)
                                for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, return_map: bool = False
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the output, the keys and, on request, the map.

        Args:
            x: Tokens (b, n, c).
            context: Tokens (b, m, c') that are attended to; x itself if None.
            return_map: Whether to return the map.

        Returns:
            The output (b, n, c), the keys (b, m, c), and the map (b, heads, n, m) or None.
        """
        context = x if context is None else context
        keys = self.to_k(context)
        out, probs = attention(self.to_q(x), keys, self.to_v(context), self.heads, return_map)
        return self.to_out[0](out), keys, probs
