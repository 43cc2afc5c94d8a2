"""The command line: parse the options, make the stage's config, run it, show what comes. No logic lives here.

Stages are imported inside the commands, so that `revq --help` does not wait for torch. Exit codes: 0 done, 2 wrong usage, and those
of `pipeline.progress.one_line_errors`: 1 an error, 130 or 143 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import typer

from . import __version__
from .pipeline.distributed import process_group
from .pipeline.progress import finish, one_line_errors, show
from .stages.events import Event

app = typer.Typer(
    help="Turn any frozen, pre-trained image VAE into a discrete image tokenizer: encode-latents, fit-codebooks, train-rectifier, evaluate. "
    "[bold]revq demo[/] shows it all in minutes, offline. Every command resumes when given again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_data = partial(typer.Option, rich_help_panel="Data")
_method = partial(typer.Option, rich_help_panel="Method")
_advanced = partial(typer.Option, rich_help_panel="Advanced")
_machine = partial(typer.Option, rich_help_panel="Machine")

Split = Annotated[str, _data(help="Name of the split in the store.")]
Device = Annotated[str, _machine(help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, _machine(help="The same seed gives the same result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Overwrite = Annotated[bool, _data("--overwrite", help="Replace what an earlier run made there.")]
OtherVAE = Annotated[str | None, _data(help="Where the VAE is now, if not where it was: hub id, folder, FILE.py:FACTORY.")]
Workers = Annotated[int, _machine(help="Threads that read and resize images.")]
Limit = Annotated[int | None, _data(help="Use only the first so many images.", show_default="all")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"revq {__version__}")
        raise typer.Exit()


@app.callback()
def _revq(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False) -> None:
    """Options that stand before the command."""


@app.command("encode-latents")
def _encode_latents(
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="Folder of images or of class folders, .tar, WebDataset shards or .parquet: path, glob or URL.")
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Latent store to make or add a split to: a path or s3:// URL.")],
    vae: Annotated[
        str, _data(help="Hub id, folder in diffusers' format, FILE.py:FACTORY, or revq-tiny-f8c8.")
    ] = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    split: Split = "train",
    image_size: Annotated[int, _data(help="Side of the square crop in pixels.")] = 256,
    views: Annotated[int, _data(help="Rows for each image: the centre crop, then random crops.")] = 1,
    dtype: Annotated[str, _data(help="float16 or float32.")] = "float16",
    limit: Limit = None,
    new_classes: Annotated[str, _data(help="Classes that no other split has: append or refuse.")] = "append",
    max_failed: Annotated[float, _data(help="Share of unreadable images, above ten, that ends the run.")] = 0.01,
    strict: Annotated[bool, _data("--strict", help="Stop at an unreadable image instead of noting it.")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, _data("--dry-run", help="Check and count only; write nothing.")] = False,
    shard_rows: Annotated[int | None, _machine(help="Rows in one file.", show_default="about 32 MiB")] = None,
    batch_size: Annotated[int, _machine(help="Images at once.")] = 64,
    workers: Workers = 8,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage 1: run every image through the frozen encoder, once, into a latent store.

    [dim]Example:[/] revq encode-latents imagenet/train latents.zarr --batch-size 128
    """

    def events() -> Iterator[Event]:
        from .stages.encode_latents import EncodeLatentsConfig, encode_latents

        config = EncodeLatentsConfig(
            images=images, store=store, vae=vae, split=split, image_size=image_size, batch_size=batch_size, workers=workers, dtype=dtype,
            views=views, seed=seed, device=device, limit=limit, new_classes=new_classes, max_failed=max_failed, strict=strict,
            overwrite=overwrite, dry_run=dry_run, shard_rows=shard_rows,
        )  # fmt: skip
        return encode_latents(config)

    _execute("encode-latents", events, as_json=as_json)


@app.command("fit-codebooks")
def _fit_codebooks(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Latent store of encode-latents.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the codebooks.")],
    split: Split = "train",
    tokens: Annotated[int, _method(help="Tokens per image: one codebook each.")] = 512,
    codes: Annotated[int, _method(help="Codes in each codebook.")] = 16384,
    transform: Annotated[str, _method(help="decoder (best), pca or standardize (the paper's).")] = "decoder",
    iterations: Annotated[int, _method(help="Rounds of k-means.")] = 20,
    max_samples: Annotated[int | None, _method(help="Fit on at most so many latents.", show_default="all")] = None,
    rectifier_share: Annotated[float, _advanced(help="Share of the images kept for train-rectifier; for small data sets.")] = 0.0,
    calibration_samples: Annotated[int, _advanced(help="Products through the decoder for --transform decoder.")] = 2048,
    backend: Annotated[
        str, _machine(help="k-means: faiss, torch, or auto: faiss on a GPU with faiss-gpu and on a CPU without Numba, else torch.")
    ] = "auto",
    vae: OtherVAE = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage 2a: fit one codebook for each token position, from cached latents alone.

    [dim]Example:[/] revq fit-codebooks latents.zarr codebooks --tokens 256 --codes 65536
    """

    def events() -> Iterator[Event]:
        from .stages.fit_codebooks import FitCodebooksConfig, fit_codebooks

        config = FitCodebooksConfig(
            store=store, out=out, split=split, tokens=tokens, codes=codes, transform=transform, iterations=iterations, max_samples=max_samples,
            rectifier_share=rectifier_share, calibration_samples=calibration_samples, backend=backend, seed=seed, device=device, vae=vae,
            overwrite=overwrite,
        )  # fmt: skip
        return fit_codebooks(config)

    _execute("fit-codebooks", events, as_json=as_json)


@app.command("train-rectifier")
def _train_rectifier(
    context: typer.Context,
    store: Annotated[str, typer.Argument(metavar="STORE", help="Latent store of encode-latents.")],
    codebooks: Annotated[str, typer.Argument(metavar="CODEBOOKS", help="Folder of fit-codebooks.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Run folder; the tokenizer is OUT/tokenizer.")],
    split: Split = "train",
    val_split: Annotated[str, _data(help="Split to validate on; none: the last 2 % of --split, as where there is no val.")] = "val",
    epochs: Annotated[int, _method(help="Passes over the latents.")] = 100,
    steps: Annotated[int | None, _method(help="Steps in all, instead of --epochs.")] = None,
    finish_steps: Annotated[int, _method(help="Last steps with the loss taken through the decoder.")] = 0,
    batch_size: Annotated[int, _method(help="Latents in a step.")] = 256,
    lr: Annotated[float, _method(help="Learning rate of the rectifier.")] = 5e-4,
    codebook_lr: Annotated[float, _method(help="Learning rate of the codebooks; 0 keeps them.")] = 0.01,
    width: Annotated[int, _method(help="Channels of the rectifier.")] = 512,
    depth: Annotated[int, _method(help="Blocks of the rectifier.")] = 3,
    ema: Annotated[float, _method(help="Decay of the averaged weights.")] = 0.999,
    patience: Annotated[int | None, _method(help="Stop after so many evaluations that are no better.", show_default="off")] = None,
    schedule: Annotated[str, _advanced(help="exponential, cosine, or constant: can be made longer.")] = "exponential",
    weight_decay: Annotated[float, _advanced(help="AdamW's, on the rectifier.")] = 1e-4,
    block: Annotated[str, _advanced(help="conv or efficientvit (the paper's).")] = "conv",
    finish_batch_size: Annotated[int, _advanced(help="Latents in a step of --finish-steps.")] = 32,
    finish_lpips: Annotated[float, _advanced(help="Weight of LPIPS in --finish-steps.")] = 0.0,
    evaluations: Annotated[int, _advanced(help="How often to validate and save a checkpoint; at least 4 times a phase.")] = 20,
    keep: Annotated[int, _advanced(help="Checkpoints kept besides the best.")] = 2,
    previews: Annotated[int, _advanced(help="Latents decoded at each evaluation; needs the VAE.")] = 0,
    wandb: Annotated[bool, _advanced("--wandb", help="Log to Weights & Biases too.")] = False,
    micro_batch: Annotated[int | None, _machine(help="Latents decoded at once in --finish-steps.", show_default="as fit in memory")] = None,
    latents: Annotated[str, _machine(help="auto (as the run began), resident (in memory) or stream.")] = "auto",
    precision: Annotated[str, _machine(help="auto, bf16 or fp32.")] = "auto",
    compile: Annotated[str, _machine(help="torch.compile: auto, on or off.")] = "auto",
    vae: OtherVAE = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage 2b: train the rectifier and the codebooks, from cached latents alone.

    [dim]Example:[/] revq train-rectifier latents.zarr codebooks runs/first --epochs 100
    """
    given = context.get_parameter_source("epochs")
    if steps is not None and given is not None and given.name == "COMMANDLINE":
        raise typer.BadParameter("give one of the two", param_hint="--epochs / --steps")

    def events() -> Iterator[Event]:
        from .stages.train_rectifier import TrainRectifierConfig, train_rectifier

        config = TrainRectifierConfig(
            store=store, codebooks=codebooks, out=out, split=split, val_split=val_split, epochs=epochs, steps=steps, finish_steps=finish_steps,
            batch_size=batch_size, lr=lr, codebook_lr=codebook_lr, width=width, depth=depth, weight_decay=weight_decay, block=block,
            schedule=schedule, finish_batch_size=finish_batch_size, micro_batch=micro_batch, finish_lpips=finish_lpips, evaluations=evaluations,
            keep=keep, patience=patience, previews=previews, wandb=wandb, latents=latents, precision=precision, compile=compile, ema=ema, seed=seed,
            device=device, vae=vae, overwrite=overwrite,
        )  # fmt: skip
        return train_rectifier(config)

    _execute("train-rectifier", events, as_json=as_json)


@app.command("evaluate")
def _evaluate(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help="Tokenizer folder, or run folder of train-rectifier.")],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Images that training has not seen: folder, .tar, WebDataset shards or .parquet.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for metrics.json, report.html and pictures.")],
    protocol: Annotated[str, _method(help="revq or adm.")] = "revq",
    inception_weights: Annotated[str | None, _method(help="Inception file for rFID.", show_default="download")] = None,
    no_download: Annotated[bool, _method("--no-download", help="Never try the network for metric weights.")] = False,
    tolerance_images: Annotated[
        int | None, _method(help="Images for the tolerance curve.", show_default="up to 128, in no more time than all else takes")
    ] = None,
    no_tolerance: Annotated[bool, _method("--no-tolerance", help="Leave the tolerance curve out.")] = False,
    precision: Annotated[str, _method(help="The decoder's: fp32 or bf16.")] = "fp32",
    refine: Annotated[int, _method(help="Steps of the search for better tokens, image by image; 16 is much.")] = 0,
    limit: Limit = None,
    vae: OtherVAE = None,
    overwrite: Overwrite = False,
    batch_size: Annotated[int, _machine(help="Images at once.")] = 64,
    workers: Workers = 8,
    cache: Annotated[str | None, _machine(help="Folder for originals' features, or off.", show_default="user's cache")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage 3: decode and measure rFID, PSNR, SSIM, LPIPS and codebook usage; make the report.

    [dim]Example:[/] revq evaluate runs/first imagenet/val runs/first/evaluation
    """
    if no_tolerance and tolerance_images is not None:
        raise typer.BadParameter("give one of the two", param_hint="--tolerance-images / --no-tolerance")

    def events() -> Iterator[Event]:
        from .pipeline.run import evaluate_and_report
        from .stages.evaluate import EvaluateConfig

        config = EvaluateConfig(
            tokenizer=tokenizer, images=images, out=out, protocol=protocol, inception_weights=inception_weights, batch_size=batch_size,
            limit=limit, tolerance_images=0 if no_tolerance else tolerance_images, seed=seed, precision=precision, refine=refine, vae=vae,
            device=device, workers=workers, cache=cache, overwrite=overwrite, download=not no_download,
        )  # fmt: skip
        return evaluate_and_report(config)

    _execute("evaluate", events, as_json=as_json)


@app.command("compare")
def _compare(
    evaluations: Annotated[list[str], typer.Argument(metavar="EVALUATION", help="Folders of revq evaluate, two or more.")],
    out: Annotated[str | None, typer.Option(help="Folder for compare.html and compare.md.", show_default="only print")] = None,
    as_json: Json = False,
) -> None:
    """Evaluations side by side, and what keeps their numbers from comparing.

    [dim]Example:[/] revq compare runs/*/evaluation --out comparison
    """

    def events() -> Iterator[Event]:
        from .pipeline.compare import compare

        return compare(evaluations, out=out)

    _execute("compare", events, as_json=as_json)


@app.command("run")
def _run(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="TOML file with the settings of every stage.", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(help="paper-512, paper-256-64k, paper-256-256k, revq-512 or demo, instead of CONFIG.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of training images.", show_default="as configured")] = None,
    val_images: Annotated[str | None, typer.Option(help="Folder of unseen images.", show_default="as configured")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for everything that is made.", show_default="as configured")] = None,
    vae: Annotated[str | None, typer.Option(help="The VAE: see encode-latents.", show_default="as configured")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo stages whose settings have changed.")] = False,
    as_json: Json = False,
) -> None:
    """All stages one after the other, skipping what is up to date.

    [dim]Example:[/] revq run --preset paper-512 --images in/train --val-images in/val --out runs/a
    """

    def events() -> Iterator[Event]:
        from .pipeline.config import load_plan
        from .pipeline.run import run

        return run(load_plan(config, preset=preset, images=images, val_images=val_images, out=out, vae=vae), overwrite=overwrite)

    _execute("run", events, as_json=as_json)


@app.command("demo")
def _demo(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for everything that is made.")] = "revq-demo", as_json: Json = False
) -> None:
    """The whole pipeline on an embedded VAE and embedded photographs: offline, minutes on a CPU.

    [dim]Example:[/] revq demo
    """

    def events() -> Iterator[Event]:
        from .pipeline.config import load_plan
        from .pipeline.run import run

        return run(load_plan(preset="demo", out=out))

    _execute("run", events, as_json=as_json)


@app.command("info")
def _info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Store, codebooks, tokenizer, run or evaluation.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything again and check it.")] = False,
    as_json: Json = False,
) -> None:
    """What lies there: shape, size, fingerprint, settings, metrics.

    [dim]Example:[/] revq info latents.zarr --verify
    """

    def events() -> Iterator[Event]:
        from .pipeline.info import info

        return info(path, verify=verify)

    _execute("info", events, as_json=as_json)


def _execute(command: str, events: Callable[[], Iterator[Event]], *, as_json: bool) -> None:
    """Run one command from config to summary."""
    with one_line_errors(), process_group() as rank:
        value = show(events(), as_json=as_json, silent=rank > 0)
        if rank == 0:
            finish(command, value, as_json=as_json)


def main() -> None:
    """Entry point of `revq` and of `python -m revq`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()
