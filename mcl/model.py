"""A whole model: its networks, its tokenizer and its schedule, on one device."""
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from .config import ModelConfig
from .schedule import Schedule
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet3D
from .vae import AutoencoderKL


@dataclass(frozen=True)
class Model:
    unet: UNet3D
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    config: ModelConfig
    sha256: str = ""                # of the file that it was read from

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (b, 77, d) of the prompts; warns of what is cut off a prompt too long."""
        with torch.no_grad():
            return self.text_encoder(self.tokenizer(prompts).to(self.device))

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words on which the model was not trained, where those can be listed."""
        known = set(self.config.vocabulary)
        words = [word for word, _ in self.tokenizer.split(prompt) if word.isalnum()]
        return [word for word in words if word not in known] if known else []


def build_model(config: ModelConfig, device: str = "cpu", sha256: str = "") -> Model:
    """A model of this shape with random weights; on the meta device with none yet."""
    with torch.device(device):
        unet, vae = UNet3D(config.unet), AutoencoderKL(config.vae)
        text_encoder = TextEncoder(config.text)
    return Model(unet, vae, text_encoder, Tokenizer(), Schedule(config.schedule), config, sha256)
