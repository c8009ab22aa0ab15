"""CLIP's text transformer: token ids to the embeddings that the UNet attends to."""
import torch
from torch import Tensor, nn

from ..config import CLIPTextConfig, CLIPTransformerConfig
from .attention import attention
from .ops import Linear


class SelfAttention(nn.Module):
    """Of n tokens, each of which sees all or, if `causal`, itself and those before it."""

    def __init__(self, config: CLIPTransformerConfig, causal: bool):
        super().__init__()
        c = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj, self.k_proj = Linear(c, c), Linear(c, c)
        self.v_proj, self.out_proj = Linear(c, c), Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads,
                           causal=self.causal)
        return self.out_proj(out)


class MLP(nn.Module):
    """With CLIP's quick gelu, x * sigmoid(1.702 x)."""

    def __init__(self, config: CLIPTransformerConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPTransformerConfig, causal: bool):
        super().__init__()
        self.self_attn = SelfAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embedding(nn.Embedding):
    """A table of vectors: ids -> (..., c)."""

    def reset_parameters(self) -> None:
        # On the meta device torch would import its compiler, in two seconds, to draw nothing.
        if not self.weight.is_meta:
            super().reset_parameters()


class Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, config: CLIPTransformerConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config, causal) for _ in range(config.num_hidden_layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class TextEncoder(nn.Module):
    """ids (b, 77) int64 -> embeddings (b, 77, c): the last layer's, after the final norm.

    Causal mask, no padding mask: what stands behind the end token is seen by the UNet too, as in
    the training of Stable Diffusion 1.5.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)
