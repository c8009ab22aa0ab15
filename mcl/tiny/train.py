"""Trains the embedded model from nothing, as AnimateDiff is trained.

    python -m mcl.tiny.train --out runs/tiny

Six stages, each of which goes on where it was stopped:
    vae      the autoencoder, on single frames
    latents  clips of the training world, encoded once and kept on disk
    image    the UNet without motion modules and the text encoder, on single frames
    motion   the motion modules, on clips, and all the rest at a lower learning rate
    decoder  the autoencoder's decoder a second time, on latents less exact than the encoder's
    export   everything into one file, weights/tiny.safetensors
"""
import argparse
import copy
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checkpoint import save_model
from ..config import TINY
from ..layers import channels_last
from ..model import Model, build_model
from ..text_encoder import TextEncoder
from ..unet import UNet3D
from ..vae import AutoencoderKL
from .clips import VOCABULARY, at, caption, random_scene
from .scenes import render

SIZE, FRAMES = 128, 16
SHARD = 250                             # clips in one file of latents
CAPTIONS = 4                            # phrasings kept of each clip
DEFAULTS: dict[str, Any] = {}           # the settings of SampleConfig that suit this model
STAGES = ("vae", "latents", "image", "motion", "decoder", "export")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how fast; what BENCHMARKS.md reports was trained with these."""
    vae_steps: int = 1200
    vae_batch: int = 32
    vae_rate: float = 2e-3
    clips: int = 5000
    image_steps: int = 1600
    image_batch: int = 64
    image_rate: float = 1.5e-3
    motion_steps: int = 1500
    motion_batch: int = 6
    motion_rate: float = 1e-3
    spatial_rate: float = 4e-4          # of the layers already trained, in the motion stage
    decoder_steps: int = 800
    decoder_rate: float = 1.5e-3
    drop_caption: float = 0.1           # share of empty prompts, for classifier-free guidance
    ema: float = 0.998


class Trainee:
    """Weights under training, with their running average, and where they are kept."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], file: Path, ema: float):
        self.module, self.file, self.ema = module, file, ema
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(groups, betas=(.9, .99), weight_decay=1e-3)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        torch.save({"module": self.module.state_dict(), "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(), "step": self.step}, temporary)
        temporary.replace(self.file)

    def run(self, steps: int, loss_of: Callable[[int], tuple[Tensor, str]]) -> None:
        """Trains up to `steps`; the rate rises over 50 of them and falls by a cosine."""
        began, first, mean = time.perf_counter(), self.step, math.nan
        while self.step < steps:
            cosine = (1 + math.cos(math.pi * self.step / steps)) / 2
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * min(1, (self.step + 1) / 50) * (.02 + .98 * cosine)
            loss, more = loss_of(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            keep = min(self.ema, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.module.parameters()):
                    slow.lerp_(fast, 1 - keep)
            self.step += 1
            mean = float(loss) if math.isnan(mean) else 0.98 * mean + 0.02 * float(loss)
            if self.step % 20 == 0:
                pace = (time.perf_counter() - began) / (self.step - first)
                print(f"{self.file.stem} {self.step}/{steps} loss {float(loss):.4f} "
                      f"mean {mean:.4f} {more} {pace:.2f} s/step", file=sys.stderr, flush=True)
            if self.step % 100 == 0 or self.step == steps:
                self.save()


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


# ------------------------------------------------------------------------------------- the VAE

def pictures(seed: int, number: int) -> tuple[Tensor, list[str]]:
    """Single frames of random clips, (number, 3, SIZE, SIZE) in [-1, 1], and their captions."""
    rng = np.random.default_rng([7, seed])
    scenes = [at(random_scene(rng, FRAMES), [int(rng.integers(FRAMES))]) for _ in range(number)]
    return torch.cat([render(s, SIZE) for s in scenes]), [caption(s, rng) for s in scenes]


def crop(rng: np.random.Generator, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same random quarter of pictures (b, 3, H, W) and of their latents (b, c, h, w)."""
    half, s = z.shape[-1] // 2, x.shape[-1] // z.shape[-1]
    top, left = rng.integers(0, half + 1, 2)
    return (x[..., s * top:s * (top + half), s * left:s * (left + half)],
            z[..., top:top + half, left:left + half])


def train_vae(folder: Path, plan: Plan, device: str) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(TINY.vae).to(device)
    channels_last(vae)
    trainee = Trainee(vae, [{"params": list(vae.parameters()), "lr": plan.vae_rate}],
                      folder / "vae.pt", plan.ema)

    def loss_of(step: int) -> tuple[Tensor, str]:
        x, _ = pictures(step, plan.vae_batch)
        if step < 0.85 * plan.vae_steps:                    # crops cost a quarter
            rng = np.random.default_rng([8, step])
            top, left = rng.integers(0, SIZE // 2 + 1, 2)
            x = x[..., top:top + SIZE // 2, left:left + SIZE // 2]
        else:
            x = x[:plan.vae_batch // 3]
        x = x.to(device, memory_format=torch.channels_last)
        with autocast(device):
            mean, logvar = (y.float() for y in vae.moments(x))
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape).to(device)
            out = vae.decoder(vae.post_quant_conv(z)).float()
        mse, l1 = F.mse_loss(out, x), F.l1_loss(out, x)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        # Three of the channels stay near the picture made small: a latent space that looks like
        # pictures is learnt many times faster by a small UNet than one that is merely compact.
        small = F.mse_loss(mean[:, :3], 1.3 * F.avg_pool2d(x, TINY.vae.downsampling))
        return mse + 0.3 * l1 + 2e-4 * kl + 0.03 * small, f"mse {mse:.5f} kl {kl:.2f}"

    trainee.run(plan.vae_steps, loss_of)


def trained_vae(folder: Path, device: str) -> AutoencoderKL:
    vae = AutoencoderKL(TINY.vae)
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["average"])
    channels_last(vae)
    return vae.to(device).requires_grad_(False)


# ------------------------------------------------------------------------------------- latents

def encode_clips(folder: Path, plan: Plan, device: str) -> None:
    vae = trained_vae(folder, device)
    (folder / "latents").mkdir(exist_ok=True)
    for first in range(0, plan.clips, SHARD):
        file = folder / "latents" / f"{first:06d}.pt"
        if file.exists():
            continue
        latents, logvars, captions = [], [], []
        for seed in range(first, first + SHARD):
            rng = np.random.default_rng([1, seed])
            scene = random_scene(rng, FRAMES)
            frames = render(scene, SIZE).to(device, memory_format=torch.channels_last)
            with torch.no_grad(), autocast(device):
                mean, logvar = vae.moments(frames)
            latents.append(mean.half().cpu())
            logvars.append(logvar.float().mean(dim=(0, 2, 3)).cpu())
            captions.append([caption(scene, rng) for _ in range(CAPTIONS)])
        torch.save({"latents": torch.stack(latents), "captions": captions,
                    "logvar": torch.stack(logvars).mean(dim=0)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        print(f"latents {first + SHARD}/{plan.clips}", file=sys.stderr, flush=True)


class Clips:
    """All encoded clips: latents (clips, f, c, h, w) float16, balanced.

    The autoencoder's channels are alike in all that is bright or dark and differ little in hue.
    Its latents z become `mix @ (z - mean)`, in which the standard deviation of each principal
    component is the square root of what it was: colours then stand out of the noise as early in
    sampling as brightness does. `fold` puts this into the autoencoder's own 1x1 convolutions.
    """

    def __init__(self, folder: Path):
        shards = [torch.load(file, weights_only=True)
                  for file in sorted((folder / "latents").glob("*.pt"))]
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.logvar = torch.stack([shard["logvar"] for shard in shards]).mean(dim=0)
        self.captions = [c for shard in shards for c in shard["captions"]]
        self.mean = self.latents[::10].float().mean(dim=(0, 1, 3, 4))
        some = rearrange(self.latents[::10].float(), "n f c h w -> c (n f h w)")
        variance, basis = torch.linalg.eigh((some - self.mean[:, None]).cov())
        mix = basis @ torch.diag(variance ** -0.25) @ basis.T
        self.mix = mix / float((mix @ (some - self.mean[:, None])).std())
        for shard in self.latents.split(SHARD):
            centred = shard.float() - rearrange(self.mean, "c -> c 1 1")
            shard.copy_(torch.einsum("d c, n f c h w -> n f d h w", self.mix, centred))

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
        chosen = rng.integers(len(self.captions), size=number)
        latents = self.latents[torch.from_numpy(chosen)].float()
        if frames == 1:
            which = torch.from_numpy(rng.integers(FRAMES, size=number))
            latents = latents[torch.arange(number), which][:, None]
        elif rng.random() < 0.5:
            latents = latents.flip(1)                       # time runs both ways in this world
        captions = ["" if rng.random() < drop_caption
                    else self.captions[i][rng.integers(CAPTIONS)] for i in chosen]
        return rearrange(latents, "b f c h w -> b c f h w"), captions


# ------------------------------------------------------------------------- the diffusion model

def denoising_loss(model: Model, unet: UNet3D, x0: Tensor, text: Tensor, rng: np.random.Generator
                   ) -> Tensor:
    """Mean square error of the noise, weighted by min(SNR, 5) / SNR (arXiv 2303.09556).

    The timesteps of a batch are spread over the whole range, which a few clips would not be.
    """
    spread = (rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0)
    t = torch.from_numpy((spread * model.schedule.config.train_steps).astype(np.int64))
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(x0)
    abar = rearrange(model.schedule.alphas_cumprod[t].to(x0), "b -> b 1 1 1 1")
    z = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    with autocast(str(x0.device)):
        eps, _ = unet(z, t.to(x0.device), text)
    assert eps is not None
    snr = abar / (1 - abar)
    return (snr.clamp(max=5) / snr * (eps.float() - noise).square()).mean()


def initialize(unet: UNet3D, text: TextEncoder, tokens: list[int]) -> None:
    """Residual branches start at zero; so do the embeddings of all words it will never read."""
    for name, module in unet.named_modules():
        if name.endswith(("conv_out", "proj_out", "conv2")):
            for p in module.parameters():
                nn.init.zeros_(p)
    embedding = text.text_model.embeddings.token_embedding.weight.data
    used = torch.randn(len(tokens), embedding.shape[1]) * 0.5
    embedding.zero_()
    embedding[tokens] = used
    text.text_model.embeddings.position_embedding.weight.data.mul_(0.1)


def train_images(folder: Path, plan: Plan, device: str) -> None:
    torch.manual_seed(1)
    model, clips = build_model(TINY), Clips(folder)
    unet = UNet3D(dataclasses.replace(TINY.unet, motion_modules=False))
    words = (*VOCABULARY, ",", "<|startoftext|>", "<|endoftext|>")
    tokens = sorted({i for word in words for i in model.tokenizer.encode(word)})
    initialize(unet, model.text_encoder, tokens)
    both = nn.ModuleDict({"unet": unet, "text_encoder": model.text_encoder})
    channels_last(both.to(device))
    trainee = Trainee(both, [{"params": list(both.parameters()), "lr": plan.image_rate}],
                      folder / "image.pt", plan.ema)

    def loss_of(step: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng([2, step])
        x0, captions = clips.batch(rng, plan.image_batch, 1, plan.drop_caption)
        with autocast(device):
            text = model.text_encoder(model.tokenizer(captions).to(device))
        return denoising_loss(model, unet, x0.to(device), text, rng), ""

    trainee.run(plan.image_steps, loss_of)


def train_motion(folder: Path, plan: Plan, device: str) -> None:
    torch.manual_seed(2)
    model, clips = build_model(TINY), Clips(folder)
    initialize(model.unet, model.text_encoder, [])
    trained = torch.load(folder / "image.pt", weights_only=True)["average"]
    both = nn.ModuleDict({"unet": model.unet, "text_encoder": model.text_encoder})
    both.load_state_dict(both.state_dict() | trained)
    channels_last(both.to(device))
    model.text_encoder.requires_grad_(False)
    new = [p for name, p in model.unet.named_parameters() if "motion_modules" in name]
    old = [p for name, p in model.unet.named_parameters() if "motion_modules" not in name]
    # All layers at the motion modules' rate diverge.
    trainee = Trainee(model.unet, [{"params": new, "lr": plan.motion_rate},
                                   {"params": old, "lr": plan.spatial_rate}],
                      folder / "motion.pt", plan.ema)

    def loss_of(step: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng([3, step])
        x0, captions = clips.batch(rng, plan.motion_batch, FRAMES, plan.drop_caption)
        text = model.encode_text(captions)
        return denoising_loss(model, model.unet, x0.to(device), text, rng), ""

    trainee.run(plan.motion_steps, loss_of)


# -------------------------------------------------------------------------------------- export

def balanced_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder whose latents are those that the UNet was trained on."""
    vae = trained_vae(folder, "cpu")
    Clips(folder).fold(vae)
    return vae


def train_decoder(folder: Path, plan: Plan, device: str) -> None:
    torch.manual_seed(3)
    vae = balanced_vae(folder).to(device)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    decoder.requires_grad_(True)
    model = build_model(TINY)
    unet = UNet3D(dataclasses.replace(TINY.unet, motion_modules=False))
    trained = nn.ModuleDict({"unet": unet, "text_encoder": model.text_encoder}).to(device)
    trained.load_state_dict(torch.load(folder / "image.pt", weights_only=True)["average"])
    channels_last(unet.requires_grad_(False))
    trainee = Trainee(decoder, [{"params": list(decoder.parameters()), "lr": plan.decoder_rate}],
                      folder / "decoder.pt", plan.ema)

    @torch.no_grad()
    def latents(x: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        """Half of them as encoded, half as the UNet guesses them out of some noise."""
        z = vae.moments(x)[0].float()
        half = len(z) // 2
        text = model.encode_text(captions[:half])
        t = torch.from_numpy(rng.integers(20, 350, half)).to(device)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(z)
        abar = rearrange(model.schedule.alphas_cumprod.to(z)[t], "b -> b 1 1 1")
        noisy = abar.sqrt() * z[:half] + (1 - abar).sqrt() * noise[:half]
        eps, _ = unet(noisy[:, :, None], t, text)
        assert eps is not None
        guess = (noisy - (1 - abar).sqrt() * eps[:, :, 0].float()) / abar.sqrt()
        return torch.cat([guess, z[half:] + 0.05 * noise[half:]])

    def loss_of(step: int) -> tuple[Tensor, str]:
        x, captions = pictures(100_000 + step, plan.vae_batch)
        x = x.to(device, memory_format=torch.channels_last)
        rng = np.random.default_rng([10, step])
        with autocast(device):
            z = latents(x, captions, rng)
            if step < 0.85 * plan.decoder_steps:            # crops cost a quarter
                x, z = crop(rng, x, z)
            else:
                x, z = x[::3], z[::3]
            out = vae.decoder(vae.post_quant_conv(z)).float()
        mse = F.mse_loss(out, x)
        return mse + 0.3 * F.l1_loss(out, x), f"mse {mse:.5f}"

    trainee.run(plan.decoder_steps, loss_of)


def export(folder: Path, weights: Path, sample: dict[str, Any]) -> None:
    """Puts the averaged weights of the three networks into one self-describing file, in fp16."""
    config = dataclasses.replace(TINY, sample=dataclasses.replace(TINY.sample, **sample),
                                 vocabulary=VOCABULARY)
    model = build_model(config)
    vae = balanced_vae(folder).state_dict()
    if (folder / "decoder.pt").exists():
        vae |= torch.load(folder / "decoder.pt", weights_only=True)["average"]
    model.vae.load_state_dict(vae)
    model.unet.load_state_dict(torch.load(folder / "motion.pt", weights_only=True)["average"])
    image = torch.load(folder / "image.pt", weights_only=True)["average"]
    model.text_encoder.load_state_dict({
        name.removeprefix("text_encoder."): value for name, value in image.items()
        if name.startswith("text_encoder.")})
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, weights, torch.float16, sources={})


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded model, or goes on with it.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny.safetensors"))
    for f in dataclasses.fields(Plan):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default),
                            default=f.default)
    args = parser.parse_args()
    plan = Plan(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Plan)})
    args.out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[], None]] = {
        "vae": lambda: train_vae(args.out, plan, args.device),
        "latents": lambda: encode_clips(args.out, plan, args.device),
        "image": lambda: train_images(args.out, plan, args.device),
        "motion": lambda: train_motion(args.out, plan, args.device),
        "decoder": lambda: train_decoder(args.out, plan, args.device),
        "export": lambda: export(args.out, args.weights, DEFAULTS)}
    for stage in STAGES:
        if stage in args.stage:
            stages[stage]()


if __name__ == "__main__":
    main()
