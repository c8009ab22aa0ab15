"""What the embedded model is trained on: pictures as they are drawn, clips as latents on disk."""
import math
import sys
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mcl.errors import InputError
from mcl.files import atomic_write
from mcl.networks.vae import AutoencoderKL
from .clips import at, caption
from .photos import mixed_scene
from .scenes import TEXTURES, render
from .trainer import autocast

SIZE, FRAMES = 128, 16                  # of the embedded model's clips
SHARD = 250                             # clips in one file of latents
CAPTIONS = 4                            # phrasings kept of each clip
EACH = 4                                # pictures of one scene, which are drawn in no time


def pictures(seed: int, number: int, photos: Sequence[Path]) -> tuple[Tensor, list[str]]:
    """Frames of random clips, EACH of a clip, and their captions.

    (number, 3, SIZE, SIZE) in [-1, 1]; the clips take turns.
    """
    rng = np.random.default_rng([7, seed])
    scenes = [mixed_scene(rng, FRAMES, photos) for _ in range(math.ceil(number / EACH))]
    drawn = [render(at(s, rng.permutation(FRAMES)[:EACH].tolist()), SIZE) for s in scenes]
    captions = [caption(s, rng) for _ in range(EACH) for s in scenes]
    return rearrange(drawn, "n f c h w -> (f n) c h w")[:number], captions[:number]


def parts(rng: np.random.Generator, done: float, *batches: Tensor) -> list[Tensor]:
    """The same random quarter of pictures (b, 3, H, W) and of their latents (b, c, h, w), which is
    quickly trained on; when 0.85 of the training is done, every third of them whole."""
    if done >= 0.85:
        return [x[::3] for x in batches]
    top, left = rng.integers(0, 9, 2).tolist()              # in sixteenths of them
    return [x[..., top * n:(top + 8) * n, left * n:(left + 8) * n]
            for x in batches for n in (x.shape[-1] // 16,)]


def encode_clips(folder: Path, photos: Sequence[Path], vae: AutoencoderKL, clips: int,
                 device: str) -> None:
    """Draws clips and writes their latents to a folder, in files of SHARD."""
    folder.mkdir(exist_ok=True)
    for first in range(0, clips, SHARD):
        file = folder / f"{first:06d}.pt"
        if file.exists():
            continue
        latents, logvars, captions = [], [], []
        for seed in range(first, first + SHARD):
            rng = np.random.default_rng([1, seed])
            scene = mixed_scene(rng, FRAMES, photos)
            frames = render(scene, SIZE).to(device, memory_format=torch.channels_last)
            with torch.no_grad(), autocast(device):
                mean, logvar = vae.moments(frames)
            latents.append(mean.half().cpu())
            logvars.append(logvar.float().mean(dim=(0, 2, 3)).cpu())
            captions.append([caption(scene, rng) for _ in range(CAPTIONS)])
        with atomic_write(file) as temporary:
            torch.save({"latents": torch.stack(latents), "captions": captions,
                        "logvar": torch.stack(logvars).mean(dim=0)}, temporary)
        print(f"{folder.name} {first + SHARD}/{clips}", file=sys.stderr, flush=True)


class Clips:
    """All encoded clips of a folder: latents (clips, f, c, h, w) float16."""

    def __init__(self, folder: Path):
        shards = [torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pt"))]
        if not shards:
            raise InputError(f"{folder}: has no clips; draw some (--clips 250, or more)")
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.logvar = torch.stack([shard["logvar"] for shard in shards]).mean(dim=0)
        self.captions = [c for shard in shards for c in shard["captions"]]
        # Stars, crosses, and grounds by which a camera's motion is seen, are the last to be learnt:
        # they come twice as often as the others. A photograph alone has no word to learn, which
        # single frames are for, at a sixteenth of a clip's cost.
        words = [set(" ".join(some).replace(",", "").split()) for some in self.captions]
        odds = np.array([(1 + bool(w & {"star", "cross"})) * (1 + any(t in w for t in TEXTURES))
                         for w in words])
        stills = odds * [.25 if w == {"a", "photo"} else 1 for w in words]
        self.odds, self.still_odds = odds / odds.sum(), stills / stills.sum()

    def balance(self) -> "Clips":
        """The same, with other latents, for an autoencoder that has just been trained.

        Its channels are alike in all that is bright or dark and differ little in hue. Its latents
        z become `mix @ (z - mean)`, in which the standard deviation of each principal component is
        the square root of what it was: colours then stand out of the noise as early in sampling as
        brightness does. `fold` puts this into the autoencoder's own 1x1 convolutions.
        """
        self.mean = self.latents[::10].float().mean(dim=(0, 1, 3, 4))
        some = rearrange(self.latents[::10].float(), "n f c h w -> c (n f h w)")
        variance, basis = torch.linalg.eigh((some - self.mean[:, None]).cov())
        mix = basis @ torch.diag(variance ** -0.25) @ basis.T
        self.mix = mix / float((mix @ (some - self.mean[:, None])).std())
        for shard in self.latents.split(SHARD):
            centred = shard.float() - rearrange(self.mean, "c -> c 1 1")
            shard.copy_(torch.einsum("d c, n f c h w -> n f d h w", self.mix, centred))
        return self

    def fold(self, vae: AutoencoderKL) -> None:
        """Makes the autoencoder encode to, and decode from, the balanced latents."""
        c, state = len(self.mean), vae.state_dict()
        weight, bias = state["quant_conv.weight"][..., 0, 0], state["quant_conv.bias"]
        spread = (self.mix ** 2) @ self.logvar.exp()        # of the posterior, as constants
        weight[:c], bias[:c] = self.mix @ weight[:c], self.mix @ (bias[:c] - self.mean)
        weight[c:], bias[c:] = 0, spread.log()
        weight, bias = state["post_quant_conv.weight"][..., 0, 0], state["post_quant_conv.bias"]
        bias += weight @ self.mean
        weight.copy_(weight @ self.mix.inverse())

    def batch(self, rng: np.random.Generator, number: int, frames: int, drop_caption: float
              ) -> tuple[Tensor, list[str]]:
        """Latents (number, c, frames, h, w) float32, and their captions, some of them empty."""
        odds = self.still_odds if frames == 1 else self.odds
        chosen = rng.choice(len(self.captions), size=number, p=odds)
        latents = self.latents[torch.from_numpy(chosen)].float()
        if frames == 1:
            which = torch.from_numpy(rng.integers(FRAMES, size=number))
            latents = latents[torch.arange(number), which][:, None]
        elif rng.random() < 0.5:
            latents = latents.flip(1)                       # time runs both ways in this world
        captions = ["" if rng.random() < drop_caption
                    else self.captions[i][rng.integers(CAPTIONS)] for i in chosen]
        return rearrange(latents, "b f c h w -> b c f h w"), captions
