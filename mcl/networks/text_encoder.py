"""CLIP's text transformer: token ids to the embeddings that the UNet attends to.

Parameter names are those of transformers' CLIPTextModel.
"""
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..config import CLIPTextConfig
from .attention import attention


class SelfAttention(nn.Module):
    """Causal self-attention: a token sees only itself and earlier tokens."""

    def __init__(self, config: CLIPTextConfig):
        """Create a layer with random weights."""
        super().__init__()
        c = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, like x (b, n, c)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal=True)[0])


class MLP(nn.Module):
    """Feed-forward layer with CLIP's quick GELU, x * sigmoid(1.702 x)."""

    def __init__(self, config: CLIPTextConfig):
        """Create a layer with random weights."""
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, like x (b, n, c)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward layer, each with a residual connection."""

    def __init__(self, config: CLIPTextConfig):
        """Create a layer with random weights."""
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.mlp, self.layer_norm2 = MLP(config), nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, like x (b, n, c)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embedding(nn.Embedding):
    """Table of vectors that stays uninitialized on the meta device.

    Initializing a table there would import PyTorch's compiler, which takes two seconds.
    """

    def reset_parameters(self) -> None:
        """Draw random vectors."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Embeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: CLIPTextConfig):
        """Create tables with random vectors."""
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor, new_vectors: Tensor | None = None) -> Tensor:
        """Return the embeddings (b, n, c) of ids (b, n), as for `TextEncoder`."""
        weight = self.token_embedding.weight
        vectors = weight if new_vectors is None else torch.cat([weight, new_vectors.to(weight)])
        return nn.functional.embedding(ids, vectors) + self.position_embedding.weight[:ids.shape[1]]


class TextTransformer(nn.Sequential):
    """CLIP's text transformer with a final norm, from ids (b, n) to embeddings (b, n, c)."""

    def __init__(self, config: CLIPTextConfig):
        """Create a transformer with random weights."""
        layers = nn.Sequential(*(EncoderLayer(config) for _ in range(config.num_hidden_layers)))
        super().__init__(OrderedDict(
            embeddings=Embeddings(config), encoder=nn.Sequential(OrderedDict(layers=layers)),
            final_layer_norm=nn.LayerNorm(config.hidden_size)))


class TextEncoder(nn.Module):
    """Text encoder of Stable Diffusion 1.5.

    The attention is causal and has no padding mask. The UNet also sees the embeddings after the end
    token, as it did in training.
    """

    def __init__(self, config: CLIPTextConfig):
        """Create an encoder with random weights."""
        super().__init__()
        self.config, self.text_model = config, TextTransformer(config)

    def forward(self, ids: Tensor, new_vectors: Tensor | None = None) -> Tensor:
        """Return the embeddings (b, 77, c) of token ids (b, 77), after the final norm.

        Args:
            ids: Token ids. The ids after the vocabulary are those of the new vectors.
            new_vectors: Vectors (n, c) of new words.
        """
        embeddings, encoder, final_layer_norm = self.text_model
        return final_layer_norm(encoder(embeddings(ids, new_vectors)))
