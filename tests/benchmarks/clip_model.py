"""OpenAI's CLIP, texts and pictures in one space (arXiv 2103.00020), in Hugging Face's names."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from mcl.config import CLIPTextConfig, CLIPVisionConfig
from mcl.checkpoints.lazy import filled
from mcl.checkpoints.containers import open_checkpoint
from mcl.checkpoints.infer_config import clip_configs
from mcl.networks.layers import Conv2d, Linear
from mcl.networks.text_encoder import Embedding, Encoder, TextTransformer
from mcl.networks.tokenizer import Tokenizer
from mcl.video.write import to_uint8

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionEmbeddings(nn.Module):
    """pixels (b, 3, H, W) -> (b, 1 + n, c): a token of the whole, then one of each patch."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        c = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(c))
        self.patch_embedding = Conv2d(3, c, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = Embedding(1 + config.patches_per_side ** 2, c)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "b c h w -> b (h w) c")
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """pixels (b, 3, H, W) -> (b, c), of the token of the whole."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size)        # so spelt in the files
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class Clip(nn.Module):
    """Texts and pictures to vectors (b, d) of length 1, whose products are cosines."""

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig, d: int):
        super().__init__()
        self.side = vision.patch * vision.grid
        self.text_model, self.vision_model = TextTransformer(text), VisionTransformer(vision)
        self.text_projection = Linear(text.hidden_size, d, bias=False)
        self.visual_projection = Linear(vision.hidden_size, d, bias=False)

    def embed_text(self, ids: Tensor) -> Tensor:
        """ids (b, 77) of `Tokenizer`; a text is read at its first end token, of the highest id."""
        at_end = self.text_model(ids)[torch.arange(len(ids)), ids.argmax(dim=1)]
        return F.normalize(self.text_projection(at_end), dim=-1)

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """pixels (b, 3, side, side) of `pixels_of`."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    @torch.no_grad()
    def cosines(self, prompt: str, frames: Tensor) -> tuple[float, float]:
        """Means over frames (f, 3, H, W) in [-1, 1]: of each with the prompt, and of each with the
        next, which is nan of one frame."""
        device = self.text_projection.weight.device
        text = self.embed_text(Tokenizer()(prompt).to(device))
        seen = self.embed_pictures(pixels_of(frames, self.side).to(device))
        return float((seen @ text.T).mean()), float((seen[1:] * seen[:-1]).sum(dim=1).mean())


def pixels_of(frames: Tensor, side: int) -> Tensor:
    """Frames (f, 3, H, W) in [-1, 1] as CLIP knows them: (f, 3, side, side) of 8 bits, by Pillow's
    bicubic filter, the middle cut out, normalised by its pictures' mean and deviation."""
    height, width = (side * n // min(frames.shape[-2:]) for n in frames.shape[-2:])
    left, top = (width - side) // 2, (height - side) // 2
    small = [np.array(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC))
             for one in to_uint8(frames)]
    middle = np.stack(small)[:, top:top + side, left:left + side]
    pixels = torch.from_numpy(middle).float() / 255
    return rearrange((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION), "f h w c -> f c h w")


def load_clip(path: Path, device: torch.device | str = "cpu") -> Clip:
    """A CLIP in float32, of a CLIPModel's model.safetensors, pytorch_model.bin or folder.

    Raises InputError, naming the file, for one that is damaged, incomplete or of another kind.
    """
    found = open_checkpoint(path)
    # Without the scale of its training, and old files' positions 0, 1, 2, ...
    tensors = {name: tensor for name, tensor in found.tensors.items()
               if name != "logit_scale" and not name.endswith(".position_ids")}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with torch.device("meta"):
        clip = Clip(*clip_configs(path, shapes, found.configs.get("", {})))
    return filled(path, clip, tensors, device)


def clip_configs(path: Any, clip: Shapes, config: Mapping[str, Any]
                 ) -> tuple[CLIPTextConfig, CLIPVisionConfig, int]:
    """Of Hugging Face's CLIPModel: its towers, and the channels of the space that they share."""
    if not any(name.startswith("vision_model.") for name in clip):
        raise InputError(f"{path}: holds no CLIP of texts and pictures; the model.safetensors of "
                         "openai/clip-vit-large-patch14 or openai/clip-vit-base-patch32 does")
    hidden, *_, patch = shape_of(clip, "vision_model.embeddings.patch_embedding.weight", path)
    places = shape_of(clip, "vision_model.embeddings.position_embedding.weight", path)[0] - 1
    channels, text_hidden = shape_of(clip, "text_projection.weight", path)[:2]
    heads = {}
    for part, width in zip(CLIP_PARTS, (text_hidden, hidden)):
        own = given(config, part, {})
        if not isinstance(own, dict):
            raise InputError(f"{path}: its {part} is {short_repr(own)}, which is no config")
        check_config(path, part, own)
        if own.get("num_attention_heads") is None and width % CLIP_HEAD:
            raise InputError(f"{path}: how many heads its {width} channels have is told by its "
                             "config.json alone, which is to lie beside it")
        heads[part] = given(own, "num_attention_heads", width // CLIP_HEAD)
    text = text_config(path, clip, {"num_attention_heads": heads["text_config"]})
    if text.max_position_embeddings < MAX_LENGTH:
        raise InputError(f"{path}: reads {text.max_position_embeddings} tokens of a text, CLIP reads {MAX_LENGTH}")
    return text, made(
        path, CLIPVisionConfig, hidden_size=hidden, num_attention_heads=heads["vision_config"], patch_size=patch,
        patches_per_side=round(max(places, 0) ** 0.5), num_hidden_layers=count(clip, "vision_model.encoder.layers"),
        intermediate_size=shape_of(clip, "vision_model.encoder.layers.0.mlp.fc1.weight", path)[0]
    ), channels
