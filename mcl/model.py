"""A whole model: its networks, its tokenizer and its schedule, on one device."""
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .errors import InputError
from .schedule import Schedule
from .sparsectrl import SparseCtrl
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import Residuals, UNet3D
from .vae import AutoencoderKL


@dataclass(frozen=True)
class Model:
    unet: UNet3D
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    config: ModelConfig
    sparsectrl: SparseCtrl | None = None
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
            tokens = self.tokenizer(prompts).to(next(self.text_encoder.parameters()).device)
            return self.text_encoder(tokens).to(self.device)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names that their weights have in a file."""
        named = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return named if self.sparsectrl is None else named | {"sparsectrl": self.sparsectrl}

    @torch.no_grad()
    def residuals(self, condition: Tensor | None, t: int, text: Tensor) -> Residuals | None:
        """What SparseCtrl adds to the UNet under a condition; it does not depend on the noise."""
        if condition is None:
            return None
        if self.sparsectrl is None:
            raise InputError("this model has no SparseCtrl to give frames to: convert one with "
                             "--sparsectrl")
        return self.sparsectrl(condition.to(self.device, self.dtype), t, text)

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
        sparsectrl = SparseCtrl(config.unet, config.sparsectrl) if config.sparsectrl.kind else None
    return Model(unet, vae, text_encoder, Tokenizer(), Schedule(config.schedule), config,
                 sparsectrl, sha256)
