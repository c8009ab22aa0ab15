"""Trains the embedded model from nothing, as AnimateDiff is trained.

    python -m weights.training.train --out runs/tiny

Five stages, each of which goes on where it was stopped:
    vae      the autoencoder, on single frames
    latents  clips, encoded once and kept on disk
    image    the UNet but for its motion modules, and the text encoder, on single frames
    motion   the motion modules, on clips and on single frames, and the rest
    decoder  the autoencoder's decoder a second time, on latents less exact than the encoder's, and
             everything into weights/tiny.safetensors

`--start FILE` goes on with a model that is there, in place of the stages vae and image, and teaches
it the words that it does not know.
"""
import argparse
import dataclasses
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mcl.checkpoints.model_file import DEFAULT_WEIGHTS, load_model, save_model
from mcl.cli import OneLineErrorParser, exit_code_of, run_main
from mcl.config import TINY
from mcl.files import check_writable
from mcl.device import resolve_device
from mcl.model import Model
from mcl.networks.ops import to_channels_last
from mcl.networks.vae import AutoencoderKL
from .clips import VOCABULARY
from .data import FRAMES, Clips, encode_clips, parts, pictures
from .photos import FOLDERS, find_photos
from .trainer import Trainee, autocast
from .vocabulary import EMOJI, emoji

# The settings of SampleConfig that suit this model.
DEFAULTS: dict[str, Any] = {
    "steps": 32, "guidance_steps": 16, "guidance_span": 0.25, "warmup": 5, "cooldown": 5,
    "cfg_scale": 5.0, "motion_weight": 25000.0, "extract_t": 200,
    # The second module of the block tells the sense of a camera's move, the first hardly does.
    "blocks": ("up_blocks.1.motion_modules.0", "up_blocks.1.motion_modules.1"),
    "block_weights": (1.0, 4.0)}
MOVES_FROM, ERROR_TO = 0.38, 0.08       # of held-out references and real clips: BENCHMARKS.md


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """How long and how fast; BENCHMARKS.md has what was really done."""
    vae_steps: int = 2600
    vae_batch: int = 32
    vae_rate: float = 2e-3
    clips: int = 14000
    image_steps: int = 3600
    image_batch: int = 64
    image_rate: float = 4e-3
    motion_steps: int = 18000
    motion_batch: int = 6
    motion_rate: float = 2.4e-3
    spatial_rate: float = 2.4e-3        # of the layers already trained, in the motion stage
    text_rate: float = 4e-4             # of the text encoder there
    word_rate: float = 2e-3             # of words that a model to start with did not know
    image_share: float = 0.6            # of the motion stage's steps, on single frames
    decoder_steps: int = 1600
    decoder_rate: float = 2e-3
    drop_caption: float = 0.1           # share of empty prompts, for classifier-free guidance
    ema: float = 0.998


# ------------------------------------------------------------------------------------- the VAE

def train_vae(folder: Path, photos: Sequence[Path], plan: Hyperparameters, device: str
              ) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(TINY.vae).to(device)
    to_channels_last(vae)
    trainee = Trainee(vae, lambda name: plan.vae_rate, folder / "vae.pt", plan.ema)

    def loss_of(step: int) -> tuple[Tensor, str]:
        x, _ = pictures(step, plan.vae_batch, photos)
        x, = parts(np.random.default_rng([8, step]), step / plan.vae_steps, x)
        x = x.to(device, memory_format=torch.channels_last)
        with autocast(device):
            mean, logvar = (y.float() for y in vae.moments(x))
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape).to(device)
            out = vae.decoder(vae.post_quant_conv(z)).float()
        mse = F.mse_loss(out, x)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        # Three of the channels stay near the picture made small: a latent space that looks like
        # pictures is learnt many times faster by a small UNet than one that is merely compact.
        small = F.mse_loss(mean[:, :3], 1.3 * F.avg_pool2d(x, TINY.vae.downsampling))
        return picture_loss(out, x) + 2e-4 * kl + 0.03 * small, f"mse {mse:.5f} kl {kl:.2f}"

    trainee.run(plan.vae_steps, loss_of)
    vae.load_state_dict(trainee.average.state_dict())
    return vae.requires_grad_(False)


def picture_loss(out: Tensor, x: Tensor) -> Tensor:
    """Of pictures (b, 3, H, W). The differences of neighbours are where shapes are told apart."""
    edges = sum(F.l1_loss(out.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
    return F.mse_loss(out, x) + 0.3 * F.l1_loss(out, x) + 0.3 * edges


# ------------------------------------------------------------------------- the diffusion model

def denoising_loss(model: Model, x0: Tensor, text: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean square error of the noise, weighted by SNR ** -0.5.

    That makes all timesteps count about alike. Unweighted, or by min(SNR, 5) / SNR (arXiv
    2303.09556), a tenth as much comes from the noisy ones, in which a small picture's subject,
    its place and its shape are decided. The timesteps of a batch are spread over the whole range,
    which a few clips would not be.
    """
    spread = (rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0)
    t = torch.from_numpy((spread * model.schedule.config.num_train_timesteps).astype(np.int64))
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(x0)
    z = model.schedule.add_noise(x0, noise, t)
    with autocast(str(x0.device)):
        eps, _ = model.unet(z, t.to(x0.device), text)
    alpha_bar = rearrange(model.schedule.alpha_bar(t).to(x0), "b -> b 1 1 1 1")
    snr = alpha_bar / (1 - alpha_bar)
    return (snr.rsqrt() * (eps.float() - noise).square()).mean()


def train_denoiser(model: Model, file: Path, clips: Clips, steps: int, images: int, share: float,
                   rate_of: Callable[[str], float], plan: Hyperparameters) -> None:
    """Trains the UNet and the text encoder: in a share of the steps on so many single frames, else
    on clips, of as many frames, but of sixteen times fewer scenes (arXiv 2204.03458, section 3.1).
    """
    torch.manual_seed(2)
    both = nn.ModuleDict({"unet": model.unet, "text_encoder": model.text_encoder})
    to_channels_last(both.requires_grad_(True).train())
    learn_words(model)
    trainee = Trainee(both, rate_of, file, plan.ema)

    def loss_of(step: int) -> tuple[Tensor, str]:
        rng = np.random.default_rng([2, step])
        number, frames = (images, 1) if rng.random() < share else (images // FRAMES, FRAMES)
        x0, captions = clips.batch(rng, number, frames, plan.drop_caption)
        text = model.text_encoder(model.tokenizer(captions).to(model.device))
        return denoising_loss(model, x0.to(model.device), text, rng), ""

    trainee.run(steps, loss_of)
    both.load_state_dict(trainee.average.state_dict())


def first_model(vae: AutoencoderKL, clips: Clips) -> Model:
    """One with an autoencoder that is trained, to which the clips are balanced. Its residual
    branches start at zero, so that motion modules change nothing yet; so do the embeddings of the
    words, see learn_words."""
    torch.manual_seed(1)
    model = Model(TINY)
    model.vae = vae.cpu()
    clips.balance().fold(model.vae)
    for name, p in model.unet.named_parameters():
        if name.rpartition(".")[0].endswith(("conv_out", "proj_out", "conv2")):
            nn.init.zeros_(p)
    nn.init.zeros_(model.text_encoder.text_model.embeddings.token_embedding.weight)
    model.text_encoder.text_model.embeddings.position_embedding.weight.data.mul_(0.1)
    return model


def learn_words(model: Model) -> None:
    """Gives the words that have no vectors yet some; no gradient moves those of others."""
    vectors = model.text_encoder.text_model.embeddings.token_embedding.weight
    words = (*VOCABULARY, ",", "<|startoftext|>", "<|endoftext|>")
    tokens = sorted({i for word in words for i in model.tokenizer.encode(word)})
    new = torch.zeros(len(vectors), 1, device=vectors.device)
    new[tokens] = 1
    new *= vectors.data.abs().amax(dim=1, keepdim=True) == 0
    vectors.data += new * torch.randn(vectors.shape).to(vectors) * 0.5
    vectors.register_hook(lambda gradient: gradient * new)


# ------------------------------------------------------------------------- the decoder, again

def train_decoder(model: Model, folder: Path, photos: Sequence[Path], plan: Hyperparameters
                  ) -> None:
    vae, device = model.vae, str(model.device)
    to_channels_last(vae)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    trainee = Trainee(decoder, lambda name: plan.decoder_rate, folder / "decoder.pt", plan.ema)

    @torch.no_grad()
    def latents(x: Tensor, captions: list[str], rng: np.random.Generator) -> Tensor:
        """Half of them as encoded, half as the UNet guesses them out of some noise."""
        z = vae.moments(x)[0].float()
        half = len(z) // 2
        text = model.encode_text(captions[:half])
        t = torch.from_numpy(rng.integers(20, 350, half)).to(device)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(z)
        noisy = model.schedule.add_noise(z[:half], noise[:half], t)
        eps, _ = model.unet(noisy[:, :, None], t, text)
        alpha_bar = rearrange(model.schedule.alpha_bar(t), "b -> b 1 1 1")
        guess = (noisy - (1 - alpha_bar).sqrt() * eps[:, :, 0].float()) / alpha_bar.sqrt()
        return torch.cat([guess, z[half:] + 0.05 * noise[half:]])

    def loss_of(step: int) -> tuple[Tensor, str]:
        x, captions = pictures(100_000 + step, plan.vae_batch, photos)
        x = x.to(device, memory_format=torch.channels_last)
        rng = np.random.default_rng([10, step])
        with autocast(device):
            x, z = parts(rng, step / plan.decoder_steps, x, latents(x, captions, rng))
            out = vae.decoder(vae.post_quant_conv(z)).float()
        return picture_loss(out, x), f"mse {F.mse_loss(out, x):.5f}"

    trainee.run(plan.decoder_steps, loss_of)
    decoder.load_state_dict(trainee.average.state_dict())


# ----------------------------------------------------------------------------------- the command

def save(model: Model, weights: Path) -> None:
    """One self-describing file, with the settings that suit it: float16, and the large matrices
    int8, for a repository's sake."""
    model.config = dataclasses.replace(
        model.config, sample=dataclasses.replace(model.config.sample, **DEFAULTS),
        training_vocabulary=VOCABULARY, min_reference_motion=MOVES_FROM, max_denoising_error=ERROR_TO)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, weights, torch.float16, sources={}, pack_from=1 << 16)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineErrorParser(prog="-m weights.training.train", description="Trains the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS)
    parser.add_argument("--start", type=Path, help="model to go on with, in place of the stages "
                                                   "vae and image")
    parser.add_argument("--photos", type=Path, nargs="+", default=FOLDERS,
                        help="folders of the photographs")
    for f in dataclasses.fields(Hyperparameters):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default),
                            default=f.default)
    return exit_code_of(lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    plan = Hyperparameters(**{f.name: getattr(args, f.name)
                              for f in dataclasses.fields(Hyperparameters)})
    device = str(resolve_device(args.device))
    if not args.out.is_dir():
        check_writable(args.out, folder=True)
    photos = find_photos(args.photos, held_out=False)
    for word in EMOJI:
        emoji(word)                                         # before anything is trained
    args.out.mkdir(exist_ok=True)
    model = load_model(args.start, device, "float32") if args.start else None
    vae = model.vae if model else train_vae(args.out, photos, plan, device)
    encode_clips(args.out / "latents", photos, vae, plan.clips, device)
    clips = Clips(args.out / "latents")
    if model is None:
        model = first_model(vae, clips).to(device)
        train_denoiser(model, args.out / "image.pt", clips, plan.image_steps, plan.image_batch, 1,
                       lambda name: plan.image_rate * ("motion_modules" not in name), plan)

    def rate_of(name: str) -> float:
        if name.startswith("text_encoder."):
            return plan.word_rate if "token_embedding" in name else plan.text_rate
        return plan.motion_rate if "motion_modules" in name else plan.spatial_rate

    train_denoiser(model, args.out / "motion.pt", clips, plan.motion_steps,
                   plan.motion_batch * FRAMES, plan.image_share, rate_of, plan)
    train_decoder(model, args.out, photos, plan)
    save(model, args.weights)


if __name__ == "__main__":
    run_main(main)
