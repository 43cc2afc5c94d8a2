"""Train the embedded VAE `revq-tiny-f8c8` from a folder of images, on a CPU, in about an hour or two.

    python scripts/train_tiny_vae.py IMAGES OUT --val VAL_IMAGES

The network is a small `diffusers.AutoencoderDC` of residual blocks: 8 latent channels at 1/8 resolution. Its only loss is
the logarithm of each image's squared error, that is, the PSNR itself, plus a faint pull of the latents toward unit scale.
There is no noise, no perceptual and no adversarial loss: it is made to be small and faithful, not to look sharp.

Shapes: B batch, C latent channels, H,W latent rows and columns; images (B,3,8H,8W) in [-1,1].
The same command again continues from `OUT/checkpoint.pt`; `OUT/vae` is written at the end in diffusers' format, as float16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor

STORED_SIDE = 192  # shorter side of the images kept in memory; crops of 128..192 px are scaled down to the training size


def build_vae() -> AutoencoderDC:
    """2.9 M parameters; nothing runs at full resolution, which is what makes it quick on a CPU."""
    channels = (32, 48, 96, 128)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 2, 2, 2),
        decoder_layers_per_block=(0, 3, 3, 2),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )


def load_images(folder: Path, shorter_side: int) -> list[Tensor]:
    """Every image under `folder` as (3,h,w) uint8, its shorter side scaled to `shorter_side` (bilinear, antialiased)."""
    images = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = shorter_side / min(image.size)
        size = tuple(max(shorter_side, round(side * scale)) for side in image.size)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        images.append(torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size[1], size[0], 3).permute(2, 0, 1))
    if not images:
        raise SystemExit(f"train_tiny_vae: no image under {folder}")
    return images


def training_batch(images: list[Tensor], batch_size: int, side: int, generator: torch.Generator) -> Tensor:
    """Random crops of side..STORED_SIDE px, scaled to (B,3,side,side) in [-1,1], half of them mirrored."""
    crops = []
    for index in torch.randint(len(images), (batch_size,), generator=generator).tolist():
        image = images[index]
        crop = int(torch.randint(side, STORED_SIDE + 1, (), generator=generator))
        top = int(torch.randint(image.shape[1] - crop + 1, (), generator=generator))
        left = int(torch.randint(image.shape[2] - crop + 1, (), generator=generator))
        window = image[None, :, top : top + crop, left : left + crop].float()
        window = F.interpolate(window, (side, side), mode="bilinear", antialias=True)
        crops.append(window.flip(-1) if torch.rand((), generator=generator) < 0.5 else window)
    return torch.cat(crops) / 127.5 - 1


def centre_crop(image: Tensor, side: int) -> Tensor:
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


@torch.no_grad()
def validation_psnr_db(vae: AutoencoderDC, images: Tensor) -> float:
    """Mean over images of the RGB PSNR in dB; `images` (N,3,side,side) uint8."""
    values = []
    for batch in images.split(20):
        target = batch / 255
        output = vae.decode(vae.encode(target * 2 - 1).latent).sample
        error = ((output.clamp(-1, 1) + 1) / 2 - target).square().flatten(1).mean(1)
        values.append(-10 * torch.log10(error))
    return float(torch.cat(values).mean())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_checkpoint(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.images, STORED_SIDE)
    validation = torch.stack([centre_crop(image, args.side) for image in load_images(args.val, args.side)])
    vae = build_vae().to(memory_format=torch.channels_last)
    ema = build_vae()
    ema.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    step, seconds, log = 0, 0.0, []
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, log = state["step"], state["seconds"], state["log"]
    while step < args.steps:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        batch = training_batch(images, args.batch_size, args.side, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            latent = vae.encode(batch).latent
            output = vae.decode(latent).sample
        error = (output.float() - batch).square().flatten(1).mean(1)
        loss = 0.5 * torch.log(error + 1e-5).mean() + 1e-4 * latent.float().square().mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, value in zip(ema.state_dict().values(), vae.state_dict().values(), strict=True):
                average.lerp_(value, 1 - decay)
        seconds += time.perf_counter() - started
        if step % args.log_every == 0 or step == args.steps:
            train_psnr = float((10 * torch.log10(4 / error.detach())).mean())
            log.append({"step": step, "train_psnr_db": train_psnr, "val_psnr_db": validation_psnr_db(ema, validation), "seconds": seconds})
            print(json.dumps(log[-1]), flush=True)
            save_checkpoint(
                checkpoint,
                {"vae": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds, "log": log},
            )
    shipped = ema.half()
    shipped.save_pretrained(args.out / "vae")
    print(json.dumps({"val_psnr_db_as_shipped": validation_psnr_db(shipped.float(), validation), "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of training images")
    parser.add_argument("out", type=Path, help="output folder: checkpoint.pt, then vae/")
    parser.add_argument("--val", type=Path, required=True, help="folder of images never trained on, for the reported PSNR")
    parser.add_argument("--side", type=int, default=128, help="training and validation size in pixels")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast (faster where the CPU has it)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
