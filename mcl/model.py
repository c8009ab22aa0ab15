"""A whole model: its networks, its tokenizer and its schedule."""
import hashlib
import json
from typing import Sequence

import torch
from torch import Tensor, nn

from .config import ModelConfig, to_dict
from .errors import InputError
from .schedule import Schedule
from .networks.sparsectrl import SparseCtrl
from .networks.text_encoder import TextEncoder
from .networks.tokenizer import Tokenizer
from .networks.unet import Residuals, UNet3D
from .networks.vae import AutoencoderKL


class Model(nn.Module):
    """Networks of a config's sizes, with random weights; `.to(device, dtype)` moves them all.

    unet, vae, text_encoder, and sparsectrl, which is None in most models
    tokenizer, schedule, config
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.file_sha256 = config, ""
        self.tokenizer, self.schedule = Tokenizer(), Schedule(config.schedule)
        self.unet, self.vae = UNet3D(config.unet), AutoencoderKL(config.vae)
        self.text_encoder = TextEncoder(config.text)
        self.sparsectrl = SparseCtrl(config.unet, config.sparsectrl) if (
            config.sparsectrl.kind) else None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def sha256(self) -> str:
        """What tells this model from others: of the file that it was read from, else of its config
        and weights as they are now."""
        if self.file_sha256:
            return self.file_sha256
        digest = hashlib.sha256(json.dumps(to_dict(self.config)).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (b, 77, d) of the prompts; warns of what is cut off a prompt too long."""
        with torch.no_grad():
            tokens = self.tokenizer(prompts).to(next(self.text_encoder.parameters()).device)
            return self.text_encoder(tokens).to(self.device, self.dtype)

    @torch.no_grad()
    def residuals(self, condition: Tensor | None, t: int, text: Tensor) -> Residuals | None:
        """What SparseCtrl adds to the UNet under a condition; it does not depend on the noise.

        Raises InputError for a condition given to a model without SparseCtrl.
        """
        if condition is None:
            return None
        if self.sparsectrl is None:
            raise InputError("this model has no SparseCtrl, which frames are given to")
        residuals: Residuals = self.sparsectrl(condition.to(self.device, self.dtype), t, text)
        return residuals

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words on which the model was not trained, where those can be listed."""
        known = set(self.config.vocabulary)
        words = [word for word, _ in self.tokenizer.split(prompt) if word.isalnum()]
        return [word for word in words if word not in known] if known else []
