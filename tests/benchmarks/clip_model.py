"""OpenAI's CLIP (arXiv 2103.00020), which embeds texts and images in one space.

Weights are those of Hugging Face's CLIPModel, such as openai/clip-vit-large-patch14.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mcl.checkpoints.model_file import check_finite, check_names, check_shape, load_weights
from mcl.config import CLIPTextConfig, CLIPTransformerConfig, bounded
from mcl.errors import InputError
from mcl.networks.ops import Conv2d, Linear
from mcl.networks.text_encoder import Embedding, Encoder, TextTransformer
from mcl.networks.tokenizer import Tokenizer
from mcl.video.write import to_uint8

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_SIZE = 64                          # channels of an attention head, in all of OpenAI's models
IGNORED = ("logit_scale", "text_model.embeddings.position_ids",
           "vision_model.embeddings.position_ids")


@dataclass(frozen=True)
class CLIPVisionConfig(CLIPTransformerConfig):
    """Sizes of CLIP's image transformer."""

    patch_size: int = bounded(14, 1, 1 << 10)
    patches_per_side: int = bounded(16, 1, 1 << 10)


class VisionEmbeddings(nn.Module):
    """Tokens of images: one for the whole image, then one for each patch."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        c = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(c))
        self.patch_embedding = Conv2d(3, c, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = Embedding(1 + config.patches_per_side ** 2, c)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens (b, 1 + n, c) of pixels (b, 3, H, W)."""
        patches = rearrange(self.patch_embedding(pixels), "b c h w -> b (h w) c")
        image_token = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([image_token, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """CLIP's image transformer; the output is the token of the whole image."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size)    # spelled so in the files
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (b, c) of pixels (b, 3, H, W)."""
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class CLIPModel(nn.Module):
    """Embeds texts and images as unit vectors (b, d), whose products are cosine similarities."""

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig, d: int):
        super().__init__()
        self.size = vision.patch_size * vision.patches_per_side
        self.text_model, self.vision_model = TextTransformer(text), VisionTransformer(vision)
        self.text_projection = Linear(text.hidden_size, d, bias=False)
        self.visual_projection = Linear(vision.hidden_size, d, bias=False)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids (b, 77), read at the end token, the highest id."""
        tokens = self.text_model(ids)[torch.arange(len(ids)), ids.argmax(dim=1)]
        return F.normalize(self.text_projection(tokens), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of `preprocess`ed pixels (b, 3, size, size)."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    @torch.no_grad()
    def clip_scores(self, prompt: str, frames: Tensor) -> tuple[float, float]:
        """Return text alignment and temporal consistency of frames (f, 3, H, W) in [-1, 1].

        They are the mean cosine similarity of the frames with the prompt, and of each frame with
        the next; the latter is nan for one frame.
        """
        device = self.text_projection.weight.device
        text = self.encode_text(Tokenizer()(prompt).to(device))
        images = self.encode_image(preprocess(frames, self.size).to(device))
        consistency = (images[1:] * images[:-1]).sum(dim=1).mean()
        return float((images @ text.T).mean()), float(consistency)


def preprocess(frames: Tensor, size: int) -> Tensor:
    """Return frames (f, 3, H, W) in [-1, 1] as CLIP's input (f, 3, size, size).

    As for CLIP's training, 8-bit images are resized by Pillow's bicubic filter, cropped to the
    middle, and normalized.
    """
    height, width = (size * n // min(frames.shape[-2:]) for n in frames.shape[-2:])
    left, top = (width - size) // 2, (height - size) // 2
    resized = [np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
               for image in to_uint8(frames)]
    pixels = torch.from_numpy(np.stack(resized)[:, top:top + size, left:left + size]) / 255
    return rearrange((pixels - torch.tensor(MEAN)) / torch.tensor(STD), "f h w c -> f c h w")


def load_clip(path: Path) -> CLIPModel:
    """Load a CLIPModel in float32 from its model.safetensors.

    Raises:
        InputError: If the file is damaged, incomplete or of another kind.
    """
    try:
        tensors = {name: t.float() for name, t in load_file(path).items() if name not in IGNORED}
        with torch.device("meta"):
            model = CLIPModel(*infer_clip_configs(path, tensors))
    except (OSError, SafetensorError, KeyError, InputError) as error:
        raise InputError(f"{path}: not a CLIPModel ({error}). Give the model.safetensors of "
                         "openai/clip-vit-large-patch14") from error
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    check_names(path, set(tensors), shapes)
    for name, tensor in tensors.items():
        check_shape(path, name, tensor, shapes[name])
        check_finite(path, name, tensor)
    return load_weights(model, tensors.items())


def infer_clip_configs(path: Path, tensors: Mapping[str, Tensor]
                       ) -> tuple[CLIPTextConfig, CLIPVisionConfig, int]:
    """Return the sizes of both transformers, and of the common space, from the shapes.

    Raises:
        KeyError: If a tensor is missing.
        InputError: If a size is not possible, or a config.json beside the file has an activation
            that OpenAI's models do not have.
    """
    config = path.parent / "config.json"
    if config.exists() and "quick_gelu" not in config.read_text("utf-8"):
        raise InputError(f"{config} has another activation than quick_gelu")
    sizes = {}
    for part in ("text_model", "vision_model"):
        mlp, hidden = tensors[f"{part}.encoder.layers.0.mlp.fc1.weight"].shape
        layers = {name.split(".")[3] for name in tensors if name.startswith(f"{part}.encoder.")}
        sizes[part] = {"hidden_size": hidden, "intermediate_size": mlp,
                       "num_hidden_layers": len(layers), "num_attention_heads": hidden // HEAD_SIZE}
    patch_size = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    positions = len(tensors["vision_model.embeddings.position_embedding.weight"])
    vision = CLIPVisionConfig(patch_size=patch_size, patches_per_side=math.isqrt(positions - 1),
                              **sizes["vision_model"])
    return (CLIPTextConfig(**sizes["text_model"]), vision, len(tensors["text_projection.weight"]))
