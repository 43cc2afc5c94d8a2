"""Every setting of every stage, written once: its name, type, default, choices, range and meaning.

The command line, the TOML file, the presets' check and the documentation's tables of settings are all made from this. The string below a
setting is its help: its first line for `--help`, all of it for the documentation. A setting without a default is an argument of the command.

Nothing of torch is imported here, since `revq --help` must answer at once.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import Field, dataclass, fields
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError

DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What type and default do not say of a setting."""

    panel: Literal["Data", "Method", "Advanced", "Machine"]
    """Where `--help` shows it."""
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    none: str = ""
    """What None means, in a few words."""
    excludes: str = ""
    """Another setting that may not be given beside this one."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings that every stage has; all are checked when they are made."""

    overwrite: Annotated[bool, Setting(panel="Data")] = False
    """Replace what an earlier run of other settings made there, once this one has succeeded."""
    device: Annotated[str, Setting(panel="Machine")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: Annotated[int, Setting(panel="Machine")] = 0
    """The same seed gives the same result."""

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the setting, what was given and what is allowed."""
        for described in describe(type(self)):
            described.check(getattr(self, described.name))


@dataclass(frozen=True, kw_only=True)
class EncodeLatentsConfig(StageConfig):
    """What to encode, with what, to where."""

    images: str
    """Folder of images or of class folders, .tar, WebDataset shards or .parquet: path, glob or URL.
    All kinds: docs/reference/images.md."""
    store: str
    """Latent store to make or add a split to: a path or s3:// URL."""
    vae: Annotated[str, Setting(panel="Data")] = DC_AE
    """Hub id, folder in diffusers' format, FILE.py:FACTORY, or revq-tiny-f8c8."""
    split: Annotated[str, Setting(panel="Data")] = "train"
    """Name of the split in the store."""
    image_size: Annotated[int, Setting(panel="Data", at_least=1)] = 256
    """Side of the square crop in pixels."""
    views: Annotated[int, Setting(panel="Data", at_least=1)] = 1
    """Rows for each image: the centre crop, then random crops.
    Crops and flips are drawn from (seed, image, view)."""
    dtype: Annotated[Literal["float16", "float32"], Setting(panel="Data")] = "float16"
    """How latents are kept."""
    limit: Annotated[int | None, Setting(panel="Data", at_least=1, none="all")] = None
    """Use only the first so many images."""
    new_classes: Annotated[Literal["append", "refuse"], Setting(panel="Data")] = "append"
    """What becomes of classes that no other split of the store has.
    append numbers them after those that are there, and says so; refuse is an error. Held-out sets with classes of their own are common."""
    max_failed: Annotated[float, Setting(panel="Data", at_least=0, at_most=1)] = 0.01
    """Share of unreadable images, above ten, that ends the run.
    Ten are always allowed, unless it is 0. The split stays incomplete, and the same command tries the failed images again."""
    strict: Annotated[bool, Setting(panel="Data")] = False
    """Stop at an unreadable image instead of noting it."""
    dry_run: Annotated[bool, Setting(panel="Data")] = False
    """Check and count only; write nothing."""
    shard_rows: Annotated[int | None, Setting(panel="Machine", at_least=1, none="about 32 MiB")] = None
    """Rows in one file.
    None is an eighth of the split where that is less than 32 MiB."""
    batch_size: Annotated[int, Setting(panel="Machine", at_least=1)] = 64
    """Images at once.
    Another size can change the last bits of a latent, but is no other run."""
    workers: Annotated[int, Setting(panel="Machine", at_least=1)] = 8
    """Threads that read and resize images; the result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class FitCodebooksConfig(StageConfig):
    """How to fit transform and codebooks."""

    store: str
    """Latent store of encode-latents."""
    out: str
    """Folder for the codebooks.
    New, empty, or this very run's, to be resumed."""
    split: Annotated[str, Setting(panel="Data")] = "train"
    """Name of the split in the store."""
    tokens: Annotated[int, Setting(panel="Method", at_least=1)] = 512
    """T, tokens per image: one codebook each.
    It divides the C*H*W numbers of a latent."""
    codes: Annotated[int, Setting(panel="Method", at_least=2)] = 16384
    """K, codes in each codebook."""
    transform: Annotated[Literal["decoder", "pca", "standardize"], Setting(panel="Method")] = "decoder"
    """Coordinates to quantize in.
    standardize is the paper's; pca decorrelates; decoder does so in the decoder's metric, where a squared error is one of the picture."""
    iterations: Annotated[int, Setting(panel="Method", at_least=1)] = 20
    """Rounds of k-means, at most."""
    max_samples: Annotated[int | None, Setting(panel="Method", at_least=1, none="all")] = None
    """Fit on at most so many latents, drawn by the seed."""
    rectifier_share: Annotated[float, Setting(panel="Advanced", at_least=0, below=1)] = 0.0
    """Share of the images kept for train-rectifier; for small data sets.
    With few latents a code, quantization errors on fitted latents are smaller than on unseen ones, and a rectifier that trains on them learns the
    wrong errors."""
    calibration_samples: Annotated[int, Setting(panel="Advanced", at_least=1)] = 2048
    """Vector-Jacobian products through the frozen decoder, for --transform decoder."""
    backend: Annotated[Literal["auto", "faiss", "torch"], Setting(panel="Machine")] = "auto"
    """What computes k-means.
    auto: faiss on a GPU with faiss-gpu and on a CPU without Numba, else torch."""
    vae: Annotated[str | None, Setting(panel="Data", none="as in the store")] = None
    """Where the VAE is now, for --transform decoder: hub id, folder, FILE.py:FACTORY."""


@dataclass(frozen=True, kw_only=True)
class TrainRectifierConfig(StageConfig):
    """How to train the rectifier, and the codebooks beside it."""

    store: str
    """Latent store of encode-latents."""
    codebooks: str
    """Folder of fit-codebooks."""
    out: str
    """Run folder; the tokenizer is OUT/tokenizer.
    New, empty, or this very run's, to be resumed."""
    split: Annotated[str, Setting(panel="Data")] = "train"
    """Name of the split in the store."""
    val_split: Annotated[str, Setting(panel="Data")] = "val"
    """Split to validate on; none: the last 2 % of --split, as where there is no val."""
    epochs: Annotated[int, Setting(panel="Method", at_least=1)] = 100
    """Passes over the latents in the latent phase."""
    steps: Annotated[int | None, Setting(panel="Method", at_least=0, none="as --epochs say", excludes="epochs")] = None
    """Steps of the latent phase, instead of --epochs."""
    decoder_steps: Annotated[int, Setting(panel="Method", at_least=0)] = 0
    """Steps after it, with the loss taken through the frozen decoder."""
    batch_size: Annotated[int, Setting(panel="Method", at_least=1)] = 256
    """Latents in a step of the latent phase, on all ranks together."""
    lr: Annotated[float, Setting(panel="Method", above=0)] = 5e-4
    """Peak learning rate of the rectifier."""
    codebook_lr: Annotated[float, Setting(panel="Method", at_least=0)] = 0.01
    """Learning rate of the codebooks; 0 keeps them.
    Then tokens are computed only once."""
    width: Annotated[int, Setting(panel="Method", at_least=0, multiple_of=32)] = 512
    """Channels of the rectifier; 0 trains none."""
    depth: Annotated[int, Setting(panel="Method", at_least=0)] = 3
    """Blocks of the rectifier."""
    ema: Annotated[float, Setting(panel="Method", at_least=0, below=1)] = 0.999
    """Decay of the moving average of the weights, which the tokenizer gets; 0 turns it off."""
    patience: Annotated[int | None, Setting(panel="Method", at_least=1, none="off")] = None
    """Stop a phase after so many evaluations that are no better.
    The tokenizer then gets the best weights. Without it training goes to the end and the last weights are taken, but after a decoder phase
    that ends no better than it began the best ones."""
    schedule: Annotated[Literal["exponential", "cosine", "constant"], Setting(panel="Advanced")] = "exponential"
    """How the rates fall after a warm-up.
    Exponential to 5 % (the paper's), cosine to zero; a run with constant can be made longer afterwards.
    The decoder phase always ends in a cosine to zero."""
    weight_decay: Annotated[float, Setting(panel="Advanced", at_least=0)] = 1e-4
    """AdamW's, on the rectifier."""
    block: Annotated[Literal["conv", "efficientvit"], Setting(panel="Advanced")] = "conv"
    """Kind of block.
    efficientvit is the paper's; conv gained more in short runs (docs/notes/rectifier.md)."""
    decoder_batch_size: Annotated[int, Setting(panel="Advanced", at_least=1)] = 32
    """Latents in a step of --decoder-steps, on all ranks together."""
    perceptual: Annotated[str | None, Setting(panel="Advanced", none="squared error alone")] = None
    """Network of a second term in --decoder-steps: lpips-vgg, efficientnet-lite2 or FILE.py:FACTORY.
    Name none that evaluate judges by. An object of FACTORY has features(images float (B,3,H,W) in [0,255]) -> (B,F), which can be differentiated."""
    perceptual_weight: Annotated[float, Setting(panel="Advanced", above=0)] = 0.03
    """Weight of that term beside the squared error of pixels in [0,1]."""
    evaluations: Annotated[int, Setting(panel="Advanced", at_least=1)] = 20
    """How often to validate and save a checkpoint; at least 4 times a phase."""
    keep: Annotated[int, Setting(panel="Advanced", at_least=1)] = 2
    """Checkpoints kept besides the best and that of the latent phase's end."""
    previews: Annotated[int, Setting(panel="Advanced", at_least=0)] = 0
    """Validation latents decoded at each evaluation for TensorBoard; needs the VAE."""
    wandb: Annotated[bool, Setting(panel="Advanced")] = False
    """Log to Weights & Biases too."""
    micro_batch: Annotated[int | None, Setting(panel="Machine", at_least=1, none="all of a step's")] = None
    """Latents decoded at once in --decoder-steps; gradients add up.
    It changes rounding alone."""
    latents: Annotated[Literal["auto", "resident", "stream"], Setting(panel="Machine")] = "auto"
    """In memory or streamed from disk.
    auto: as the run began. A new run has them resident where half of the free memory holds the latents and, with frozen codebooks, their tokens.
    The two take them in another order."""
    precision: Annotated[Literal["auto", "bf16", "fp32"], Setting(panel="Machine")] = "auto"
    """Of forward passes.
    auto: bf16 where the device has instructions for it, else fp32. A run keeps what it began with. Weights are float32 always."""
    compile: Annotated[Literal["auto", "on", "off"], Setting(panel="Machine")] = "auto"
    """Whether to use torch.compile.
    auto: on CUDA. Where there is no compiler the run goes on without, and says so."""
    vae: Annotated[str | None, Setting(panel="Data", none="as in the store")] = None
    """Where the VAE is now, for --decoder-steps and --previews: hub id, folder, FILE.py:FACTORY."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """What to measure, on what."""

    tokenizer: str
    """Tokenizer folder, or run folder of train-rectifier."""
    images: str
    """Images that training has not seen: folder, .tar, WebDataset shards or .parquet."""
    out: str
    """Folder for metrics.json, report.html and pictures."""
    protocol: Annotated[Literal["revq", "adm"], Setting(panel="Method")] = "revq"
    """How images are cropped and compared."""
    inception_weights: Annotated[str | None, Setting(panel="Method", none="download")] = None
    """Inception file for rFID: torch-fidelity's checkpoint."""
    features: Annotated[str | None, Setting(panel="Method", none="rFID's alone")] = None
    """One more network to judge by: efficientnet-lite0, or FILE.py:FACTORY.
    An object with features(images uint8 (B,3,H,W)) -> (B,F) and, optional, logits(features) -> (B,L). Its class name in lower case is NAME, and the
    metrics fd_NAME, kid_NAME and, with logits, agreement_NAME: the share of images whose first class is that of the original."""
    download: Annotated[bool, Setting(panel="Method")] = True
    """Never try the network for metric weights."""
    tolerance_images: Annotated[int | None, Setting(panel="Method", at_least=1, none="up to 128, in no more time than all else takes")] = None
    """Images for the tolerance curve, spread over all."""
    tolerance: Annotated[bool, Setting(panel="Method", excludes="tolerance_images")] = True
    """Leave the tolerance curve out."""
    precision: Annotated[Literal["fp32", "bf16"], Setting(panel="Method")] = "fp32"
    """The decoder's; encoder and features are always float32."""
    refine: Annotated[int, Setting(panel="Method", at_least=0)] = 0
    """Steps of the search for better tokens, image by image; 16 is much.
    Each costs a pass through the decoder and back (docs/notes/refined-tokens.md)."""
    limit: Annotated[int | None, Setting(panel="Data", at_least=1, none="all")] = None
    """Use only the first so many images."""
    vae: Annotated[str | None, Setting(panel="Data", none="as in the tokenizer")] = None
    """Where the VAE is now: hub id, folder, FILE.py:FACTORY."""
    batch_size: Annotated[int, Setting(panel="Machine", at_least=1)] = 64
    """Images at once; does not change the numbers."""
    workers: Annotated[int, Setting(panel="Machine", at_least=1)] = 8
    """Threads that read and resize images."""
    cache: Annotated[str | None, Setting(panel="Machine", none="user's cache")] = None
    """Folder for originals' features, or off."""


@dataclass(frozen=True)
class Described:
    """One setting of a stage, as everything that shows or checks it needs it."""

    name: str
    kind: type
    """int, float, str or bool."""
    optional: bool
    """Whether None is allowed."""
    choices: tuple[str, ...]
    """Empty: no closed list."""
    default: Any
    """`dataclasses.MISSING` for an argument."""
    setting: Setting | None
    """None for an argument."""
    help: str
    """One line."""
    details: str
    """What the documentation says beyond that; "" where nothing."""

    @property
    def option(self) -> str:
        """As on the command line: a flag that is on by default is named after what it turns off."""
        return f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}"

    def check(self, value: Any) -> None:
        """Raises ConfigError where `value` is not allowed."""
        if value is None or self.setting is None:
            return
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}")
        rule, name = self.setting, self.name.replace("_", "-")
        if rule.multiple_of is not None and (value < (rule.at_least or 0) or value % rule.multiple_of):
            raise ConfigError(f"{name} must be a multiple of {rule.multiple_of}, not {value}")
        if rule.below is not None and not (rule.at_least or 0) <= value < rule.below:
            raise ConfigError(f"{name} must be in [{rule.at_least or 0:g},{rule.below:g}), not {value}")
        if rule.at_most is not None and not (rule.at_least or 0) <= value <= rule.at_most:
            raise ConfigError(f"{name} must be from {rule.at_least or 0:g} to {rule.at_most:g}, not {value}")
        if rule.at_least is not None and not value >= rule.at_least:
            raise ConfigError(f"{name} must be at least {rule.at_least:g}, not {value}")
        if rule.above is not None and not value > rule.above:
            raise ConfigError(f"{name} must be above {rule.above:g}, not {value}")


def describe(config: type[StageConfig]) -> tuple[Described, ...]:
    """The settings of a stage in the order they are written, those that every stage has last."""
    hints, own = get_type_hints(config, include_extras=True), _strings(config)
    strings = {**own, **_strings(StageConfig)}
    by_name = {field.name: field for field in fields(config)}
    return tuple(_described(by_name[name], hints[name], text) for name, text in strings.items())


def _described(field: Field[Any], hint: Any, text: str) -> Described:
    setting = None
    if get_origin(hint) is Annotated:
        hint, setting = get_args(hint)
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = next(one for one in allowed if one is not type(None))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    first, _, rest = text.partition("\n")
    return Described(field.name, str if choices else kind, type(None) in allowed, choices, field.default, setting, first, " ".join(rest.split()))


def _strings(config: type) -> dict[str, str]:
    """The string below each field, which Python itself throws away."""
    body = next(node.body for node in _source().body if isinstance(node, ast.ClassDef) and node.name == config.__name__)
    return {
        field.target.id: str(below.value.value)
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


@cache
def _source() -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[__name__]))
