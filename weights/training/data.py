"""Training data of the built-in demo model: frames drawn when needed, clips as latents on disk."""
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mcl.errors import InputError
from mcl.files import atomic_write
from mcl.networks.vae import AutoencoderKL

from .clips import Rng, caption, select_frames
from .photos import random_photo_scene
from .scenes import TEXTURES, render
from .trainer import autocast

SIZE, NUM_FRAMES = 128, 16              # of the demo model's clips
CLIPS_PER_SHARD, CAPTIONS_PER_CLIP = 250, 4


def random_frames(seed: int, count: int, photos: Sequence[Path]) -> tuple[Tensor, list[str]]:
    """Return frames (count, 3, SIZE, SIZE) in [-1, 1] of random clips, and their captions."""
    rng = np.random.default_rng([7, seed])
    n = 4                               # frames of each scene: rendering more frames is cheap
    scenes = [random_photo_scene(rng, NUM_FRAMES, photos) for _ in range(0, count, n)]
    frames = [render(select_frames(s, rng.permutation(NUM_FRAMES)[:n].tolist()), SIZE)
              for s in scenes]
    captions = [caption(s, rng) for _ in range(n) for s in scenes]
    return rearrange(frames, "n f c h w -> (f n) c h w")[:count], captions[:count]


def random_crops(rng: Rng, progress: float, *batches: Tensor) -> list[Tensor]:
    """Return the same random quarter of frames (b, 3, H, W) and of their latents (b, c, h, w).

    Quarters train faster. From a progress of 0.85 on, every third frame is returned whole.

    Args:
        rng: Random numbers.
        progress: Fraction of the training that is finished.
        batches: Frames and latents.
    """
    if progress >= 0.85:
        return [x[::3] for x in batches]
    top, left = rng.integers(0, 9, 2).tolist()              # in sixteenths of the side
    return [x[..., top * n:(top + 8) * n, left * n:(left + 8) * n]
            for x in batches for n in (x.shape[-1] // 16,)]


def encode_clips(folder: Path, photos: Sequence[Path], vae: AutoencoderKL, num_clips: int,
                 device: str) -> None:
    """Render random clips and write their latents and captions to a folder, in shards."""
    folder.mkdir(exist_ok=True)
    for first in tqdm(range(0, num_clips, CLIPS_PER_SHARD), folder.name, file=sys.stderr):
        file = folder / f"{first:06d}.pt"
        if file.exists():
            continue
        latents, logvars, captions = [], [], []
        for seed in range(first, first + CLIPS_PER_SHARD):
            rng = np.random.default_rng([1, seed])
            scene = random_photo_scene(rng, NUM_FRAMES, photos)
            frames = render(scene, SIZE).to(device, memory_format=torch.channels_last)
            with torch.no_grad(), autocast(device):
                mean, logvar = vae.moments(frames)
            latents.append(mean.half().cpu())
            logvars.append(logvar.float().mean(dim=(0, 2, 3)).cpu())
            captions.append([caption(scene, rng) for _ in range(CAPTIONS_PER_CLIP)])
        with atomic_write(file) as temporary:
            torch.save({"latents": torch.stack(latents), "captions": captions,
                        "logvar": torch.stack(logvars).mean(dim=0)}, temporary)


class LatentClips:
    """The encoded clips of a folder.

    Attributes:
        latents: Unscaled latents (clips, f, c, h, w), float16.
        logvar: Mean log variance of the latents' posterior, (c,).
        captions: Captions of each clip.
        clip_probs: Probability of each clip in batches of clips.
        frame_probs: Probability of each clip in batches of single frames.
    """

    def __init__(self, folder: Path):
        """Read the shards that `encode_clips` wrote. Raises InputError if there are none."""
        shards = [torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pt"))]
        if not shards:
            raise InputError(f"{folder}: has no clips. Draw some with --num-clips 250 or more")
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.logvar = torch.stack([shard["logvar"] for shard in shards]).mean(dim=0)
        self.captions = [captions for shard in shards for captions in shard["captions"]]
        # Stars, crosses and textured backgrounds are learned last, so they are twice as frequent.
        # Single frames are for learning words, so photos without a subject are less frequent.
        words = [set(" ".join(texts).replace(",", "").split()) for texts in self.captions]
        odds = np.array([(1 + bool(w & {"star", "cross"})) * (1 + any(t in w for t in TEXTURES))
                         for w in words])
        frame_odds = odds * [.25 if w == {"a", "photo"} else 1 for w in words]
        self.clip_probs, self.frame_probs = odds / odds.sum(), frame_odds / frame_odds.sum()

    def whiten(self) -> "LatentClips":
        """Change the latents in place to channels of more equal variance, and return the clips.

        A new autoencoder's channels are correlated in brightness and differ little in hue. The
        latents z become mix @ (z - mean), in which each principal component has the square root of
        its former standard deviation. Colors are then decided as early in sampling as brightness.
        `fold_into_vae` changes the autoencoder likewise.
        """
        self.mean = self.latents[::10].float().mean(dim=(0, 1, 3, 4))
        samples = rearrange(self.latents[::10].float(), "n f c h w -> c (n f h w)")
        variance, basis = torch.linalg.eigh((samples - self.mean[:, None]).cov())
        mix = basis @ torch.diag(variance ** -0.25) @ basis.T
        self.mix = mix / float((mix @ (samples - self.mean[:, None])).std())
        for shard in self.latents.split(CLIPS_PER_SHARD):
            centered = shard.float() - rearrange(self.mean, "c -> c 1 1")
            shard.copy_(torch.einsum("d c, n f c h w -> n f d h w", self.mix, centered))
        return self

    def fold_into_vae(self, vae: AutoencoderKL) -> None:
        """Make an autoencoder encode to the whitened latents, by its own 1x1 convolutions."""
        c, state = len(self.mean), vae.state_dict()
        weight, bias = state["quant_conv.weight"][..., 0, 0], state["quant_conv.bias"]
        variance = (self.mix ** 2) @ self.logvar.exp()      # of the posterior, as constants
        weight[:c], bias[:c] = self.mix @ weight[:c], self.mix @ (bias[:c] - self.mean)
        weight[c:], bias[c:] = 0, variance.log()
        weight, bias = state["post_quant_conv.weight"][..., 0, 0], state["post_quant_conv.bias"]
        bias += weight @ self.mean
        weight.copy_(weight @ self.mix.inverse())

    def batch(self, rng: Rng, batch_size: int, num_frames: int, p_empty: float
              ) -> tuple[Tensor, list[str]]:
        """Return random latents (b, c, num_frames, h, w), float32, and captions.

        Args:
            rng: Random numbers.
            batch_size: Number of clips or frames.
            num_frames: NUM_FRAMES for clips, 1 for single frames.
            p_empty: Probability that a caption is empty.
        """
        probs = self.frame_probs if num_frames == 1 else self.clip_probs
        chosen = rng.choice(len(self.captions), size=batch_size, p=probs)
        latents = self.latents[torch.from_numpy(chosen)].float()
        if num_frames == 1:
            frame = torch.from_numpy(rng.integers(NUM_FRAMES, size=batch_size))
            latents = latents[torch.arange(batch_size), frame][:, None]
        elif rng.random() < 0.5:
            latents = latents.flip(1)                       # time runs both ways in this world
        captions = ["" if rng.random() < p_empty
                    else self.captions[i][rng.integers(CAPTIONS_PER_CLIP)] for i in chosen]
        return rearrange(latents, "b f c h w -> b c f h w"), captions
