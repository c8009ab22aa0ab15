"""Train the built-in demo model from nothing, as AnimateDiff is trained.

    python -m weights.training.train --out runs/tiny

The five stages each resume where they were stopped:
    vae      the autoencoder, on single frames
    latents  random clips, encoded once and stored
    image    the UNet without its motion modules, and the text encoder, on single frames
    motion   the motion modules, on clips and on single frames, and all other layers
    decoder  the autoencoder's decoder again, on latents less exact than the encoder's

The last stage writes weights/tiny.safetensors. `--start FILE` continues with a model in place of
the stages vae and image, and teaches it the words that it does not know. README.md has the recipe.
"""
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mcl.checkpoints.model_file import DEFAULT_WEIGHTS, load_model, save_model
from mcl.cli.process import run_main
from mcl.config import CLIPTextConfig, ModelConfig, SampleConfig, UNetConfig, VAEConfig
from mcl.device import resolve_device
from mcl.model import Model
from mcl.networks.ops import channels_last_weight
from mcl.networks.vae import AutoencoderKL
from mcl.ownership import check_writable
from mcl.schedule import NUM_TRAIN_TIMESTEPS

from .clips import VOCABULARY, Rng
from .data import NUM_FRAMES, SIZE, LatentClips, encode_clips, random_crops, random_frames
from .options import option, run_with_options
from .photos import PHOTO_FOLDERS, find_photos
from .scenes import EMOJI, emoji_sprite
from .trainer import TrainingRun, autocast

TINY = ModelConfig(
    "tiny", UNetConfig(
        block_out_channels=(48, 96, 192), layers_per_block=1, cross_attention_levels=(1, 2),
        num_attention_heads=4, cross_attention_dim=64, norm_num_groups=8,
        motion_num_attention_heads=4, motion_max_seq_length=NUM_FRAMES),
    VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8,
              scaling_factor=1.0), CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4),
    # The second motion module of the block determines a camera's direction, the first hardly.
    sample=SampleConfig(
        steps=18, guidance_steps=12, guidance_noise_range=0.25, guidance_warmup_steps=5,
        guidance_cooldown_steps=5, cfg_scale=6.0, cfg_start_fraction=0.3, cfg_end_fraction=0.85,
        motion_weight=29000.0, extraction_timestep=200, height=SIZE, width=SIZE,
        guidance_blocks=("up_blocks.1.motion_modules.0", "up_blocks.1.motion_modules.1"),
        guidance_block_weights=(1.0, 4.0)),
    # The two limits were chosen on held-out references and real clips (BENCHMARKS.md).
    training_vocabulary=VOCABULARY, min_reference_motion=0.38, max_denoising_error=0.08)
P_EMPTY_CAPTION = 0.1           # for classifier-free guidance


@dataclasses.dataclass
class Options:
    """Train the built-in demo model.

    The lengths and learning rates are those of the stages; README.md says what the published
    weights had.
    """

    out: Path = option(Path(), "folder of the checkpoints", required=True)
    device: str = option("cpu", "auto, cpu, cuda or mps")
    weights: Path = option(DEFAULT_WEIGHTS, "file to write")
    start: Path | None = option(None, "model to continue with, in place of the first stages")
    photos: tuple[Path, ...] = option(PHOTO_FOLDERS, "folders of the photographs")
    vae_steps: int = 2600
    vae_batch_size: int = 32
    vae_lr: float = 2e-3                # also of the stage decoder
    num_clips: int = 14000
    image_steps: int = 3600
    image_batch_size: int = 64
    image_lr: float = 4e-3
    motion_steps: int = 18000
    motion_batch_size: int = 6
    motion_lr: float = 2.4e-3           # of the UNet, in the motion stage
    text_lr: float = 4e-4               # of the text encoder, in the motion stage
    token_lr: float = 2e-3              # of words that the model of --start does not know
    p_single_frames: float = 0.6        # fraction of the motion stage's steps on single frames
    decoder_steps: int = 1600


def reconstruction_loss(output: Tensor, x: Tensor) -> Tensor:
    """Return the loss of decoded frames (b, 3, H, W), with the differences of neighbors."""
    edges = sum(F.l1_loss(output.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
    return F.mse_loss(output, x) + 0.3 * F.l1_loss(output, x) + 0.3 * edges


def to_channels_last(module: nn.Module) -> None:
    """Change the memory layout of all convolution weights to channels-last, in place."""
    for p in module.parameters():
        p.data = channels_last_weight(p.data)


def train_vae(photos: Sequence[Path], options: Options, device: str) -> AutoencoderKL:
    """Train the autoencoder on single frames."""
    torch.manual_seed(0)
    vae = AutoencoderKL(TINY.vae).to(device)
    to_channels_last(vae)

    def loss_of(step: int) -> Tensor:
        x, _ = random_frames(step, options.vae_batch_size, photos)
        x, = random_crops(np.random.default_rng([8, step]), step / options.vae_steps, x)
        x = x.to(device, memory_format=torch.channels_last)
        with autocast(device):
            mean, logvar = (y.float() for y in vae.moments(x))
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape).to(device)
            output = vae.decoder(vae.post_quant_conv(z)).float()
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        # Three channels stay close to the reduced frame: a small UNet learns latents that look like
        # a picture many times faster than latents that are only compact.
        reduced = F.mse_loss(mean[:, :3], 1.3 * F.avg_pool2d(x, TINY.vae.downsampling))
        return reconstruction_loss(output, x) + 2e-4 * kl + 0.03 * reduced

    run = TrainingRun(vae, lambda name: options.vae_lr, options.out / "vae.pt")
    run.run(options.vae_steps, loss_of)
    return vae.requires_grad_(False)


def denoising_loss(model: Model, x0: Tensor, text: Tensor, rng: Rng) -> Tensor:
    """Return the mean squared error of the predicted noise, weighted by SNR ** -0.5.

    With this weight all timesteps contribute about equally. Without it, or with min(SNR, 5) / SNR
    (arXiv 2303.09556), the noisy timesteps contribute a tenth of that, and those decide the
    subject, its place and its shape. The timesteps of a batch are stratified over the schedule.
    """
    fraction = (rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0)
    t = torch.from_numpy((fraction * NUM_TRAIN_TIMESTEPS).astype(np.int64))
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(x0)
    z = model.schedule.add_noise(x0, noise, t)
    with autocast(x0.device):
        eps, _ = model.unet(z, t.to(x0.device), text)
    alpha_bar = rearrange(model.schedule.alpha_bar(t).to(x0), "b -> b 1 1 1 1")
    snr = alpha_bar / (1 - alpha_bar)
    return (snr.rsqrt() * (eps.float() - noise).square()).mean()


def train_denoiser(model: Model, file: Path, clips: LatentClips, steps: int, num_images: int,
                   p_single_frames: float, lr_of: Callable[[str], float]) -> None:
    """Train the UNet and the text encoder on single frames and on clips (arXiv 2204.03458, 3.1).

    Args:
        model: The model.
        file: Checkpoint.
        clips: Training clips.
        steps: Number of steps.
        num_images: Frames in each batch, of as many scenes or of NUM_FRAMES times fewer clips.
        p_single_frames: Fraction of the steps on single frames.
        lr_of: Function of a parameter's name that returns its learning rate.
    """
    torch.manual_seed(2)
    networks = nn.ModuleDict({"unet": model.unet, "text_encoder": model.text_encoder})
    to_channels_last(networks.requires_grad_(True).train())
    init_new_tokens(model)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        batch_size, num_frames = ((num_images, 1) if rng.random() < p_single_frames else
                                  (num_images // NUM_FRAMES, NUM_FRAMES))
        x0, captions = clips.batch(rng, batch_size, num_frames, P_EMPTY_CAPTION)
        text = model.text_encoder(model.tokenizer(captions).to(model.device))
        return denoising_loss(model, x0.to(model.device), text, rng)

    TrainingRun(networks, lr_of, file).run(steps, loss_of)


def init_model(vae: AutoencoderKL, clips: LatentClips) -> Model:
    """Return a new model with a trained autoencoder, whose latents are whitened.

    The residual branches start at zero, so the motion modules change nothing yet. The token
    embeddings start at zero too (`init_new_tokens`).
    """
    torch.manual_seed(1)
    model = Model(TINY)
    model.vae = vae.cpu()
    clips.whiten().fold_into_vae(model.vae)
    for name, p in model.unet.named_parameters():
        if name.rpartition(".")[0].endswith(("conv_out", "proj_out", "conv2")):
            nn.init.zeros_(p)
    embeddings = model.text_encoder.text_model.embeddings
    nn.init.zeros_(embeddings.token_embedding.weight)
    embeddings.position_embedding.weight.data.mul_(0.1)
    return model


def init_new_tokens(model: Model) -> None:
    """Give random embeddings to words that have none. Gradients change only those of new words."""
    embeddings = model.text_encoder.text_model.embeddings.token_embedding.weight
    words = (*VOCABULARY, ",", "<|startoftext|>", "<|endoftext|>")
    tokens = sorted({i for word in words for i in model.tokenizer.encode(word)})
    is_new = torch.zeros(len(embeddings), 1, device=embeddings.device)
    is_new[tokens] = 1
    is_new *= embeddings.data.abs().amax(dim=1, keepdim=True) == 0
    embeddings.data += is_new * torch.randn(embeddings.shape).to(embeddings) * 0.5
    embeddings.register_hook(lambda grad: grad * is_new)


def train_decoder(model: Model, photos: Sequence[Path], options: Options) -> None:
    """Train the decoder on latents as encoded, and on the UNet's estimates of noised latents."""
    vae, device = model.vae, str(model.device)
    to_channels_last(vae)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    @torch.no_grad()
    def inexact_latents(x: Tensor, captions: list[str], rng: Rng) -> Tensor:
        z = vae.moments(x)[0].float()
        half = len(z) // 2
        text = model.encode_text(captions[:half])
        t = torch.from_numpy(rng.integers(20, 350, half)).to(device)
        noise = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)).to(z)
        noised = model.schedule.add_noise(z[:half], noise[:half], t)
        eps, _ = model.unet(noised[:, :, None], t, text)
        alpha_bar = rearrange(model.schedule.alpha_bar(t), "b -> b 1 1 1")
        estimate = (noised - (1 - alpha_bar).sqrt() * eps[:, :, 0].float()) / alpha_bar.sqrt()
        return torch.cat([estimate, z[half:] + 0.05 * noise[half:]])

    def loss_of(step: int) -> Tensor:
        x, captions = random_frames(100_000 + step, options.vae_batch_size, photos)
        x = x.to(device, memory_format=torch.channels_last)
        rng = np.random.default_rng([10, step])
        with autocast(device):
            x, z = random_crops(rng, step / options.decoder_steps, x,
                                inexact_latents(x, captions, rng))
            output = vae.decoder(vae.post_quant_conv(z)).float()
        return reconstruction_loss(output, x)

    run = TrainingRun(decoder, lambda name: options.vae_lr, options.out / "decoder.pt")
    run.run(options.decoder_steps, loss_of)


def run(options: Options) -> None:
    """Run all stages, and write the model: float16, and large matrices as int8."""
    device, out = str(resolve_device(options.device)), options.out
    check_writable(out, "cache")
    photos = find_photos(options.photos, held_out=False)
    emoji_sprite(min(EMOJI))                # fails without the font, before anything is trained
    out.mkdir(exist_ok=True)
    model = load_model(options.start, device, "float32") if options.start else None
    vae = model.vae if model else train_vae(photos, options, device)
    encode_clips(out / "latents", photos, vae, options.num_clips, device)
    clips = LatentClips(out / "latents")
    if model is None:
        model = init_model(vae, clips).to(device)
        train_denoiser(model, out / "image.pt", clips, options.image_steps,
                       options.image_batch_size, 1,
                       lambda name: options.image_lr * ("motion_modules" not in name))

    def lr_of(name: str) -> float:
        text_lr = options.token_lr if "token_embedding" in name else options.text_lr
        return text_lr if name.startswith("text_encoder.") else options.motion_lr

    train_denoiser(model, out / "motion.pt", clips, options.motion_steps,
                   options.motion_batch_size * NUM_FRAMES, options.p_single_frames, lr_of)
    train_decoder(model, photos, options)
    model.config = dataclasses.replace(TINY, **{
        part: getattr(model.config, part) for part in ("unet", "vae", "text_encoder")})
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, options.weights, torch.float16, sources={}, quantize_min_numel=1 << 16)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options("-m weights.training.train", Options, run, argv)


if __name__ == "__main__":
    run_main(main)
