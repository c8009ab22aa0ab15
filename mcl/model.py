"""A whole model: networks, tokenizer and noise schedule."""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .errors import InputError
from .networks.sparsectrl import SparseCtrl
from .networks.text_encoder import TextEncoder
from .networks.tokenizer import Tokenizer
from .networks.unet import ControlNetResiduals, UNet3D
from .networks.vae import AutoencoderKL
from .schedule import NoiseSchedule


class Model(nn.Module):
    """The networks of a config; `.to(device, dtype)` moves all of them.

    Attributes:
        config: Sizes and default settings.
        unet: Noise predictor.
        vae: Autoencoder.
        text_encoder: Text encoder.
        sparsectrl: SparseCtrl, or None for most models.
        tokenizer: CLIP's tokenizer.
        schedule: Noise schedule.
        new_vectors: Vectors (n, d) of the tokenizer's new words, or None without any.
    """

    new_vectors: Tensor | None = None

    def __init__(self, config: ModelConfig):
        """Create a model with random weights."""
        super().__init__()
        self.config, self.file_sha256 = config, ""
        self.tokenizer, self.schedule = Tokenizer(), NoiseSchedule()
        self.unet, self.vae = UNet3D(config.unet), AutoencoderKL(config.vae)
        self.text_encoder = TextEncoder(config.text_encoder)
        self.sparsectrl = SparseCtrl(config.unet, config.sparsectrl) if (
            config.sparsectrl.kind) else None

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def sha256(self) -> str:
        """Hash of the file that the model was loaded from, or else of its config and weights."""
        if self.file_sha256:
            return self.file_sha256
        digest = hashlib.sha256(json.dumps(asdict(self.config)).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def description(self) -> str:
        """The model's name in messages, such as "demo model"."""
        return "demo model" if self.config.name == "tiny" else f"model {self.config.name}"

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return text embeddings (b, 77, d). Warns if a prompt is longer than 75 tokens."""
        with torch.no_grad():
            tokens = self.tokenizer(prompts).to(next(self.text_encoder.parameters()).device)
            return self.text_encoder(tokens, self.new_vectors).to(self.device, self.dtype)

    @torch.no_grad()
    def controlnet_residuals(self, condition: Tensor | None, t: int, text: Tensor,
                             frames: Tensor | slice = slice(None)) -> ControlNetResiduals | None:
        """Return what SparseCtrl adds to the UNet for a condition, or None without a condition.

        Args:
            condition: Condition of the whole clip (1, c, f, h, w).
            t: Timestep.
            text: Text embeddings (b, n, d); one condition serves all of them.
            frames: Frame indices of a context window; all frames by default.

        Raises:
            InputError: If the model has no SparseCtrl.
        """
        if condition is None:
            return None
        if self.sparsectrl is None:
            raise InputError("this model has no SparseCtrl: convert one with --sparsectrl")
        window = condition[:, :, frames].expand(len(text), -1, -1, -1, -1)
        return self.sparsectrl(window.to(self.device, self.dtype), t, text)

    def out_of_vocabulary(self, prompt: str) -> list[str]:
        """Return the prompt's words that the model was not trained on, if it knows its words."""
        known, pieces = set(self.config.training_vocabulary), self.tokenizer.split(prompt)
        return [w for w, _ in pieces if known and w.isalnum() and w not in known
                and w not in self.tokenizer.new_words]
