"""One TOML file for all stages, and the presets."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import site_pages

from revq.errors import ConfigError
from revq.pipeline.config import Plan, load_plan, preset_names
from revq.stages.fit_codebooks import settings_of_codebooks
from revq.stages.training.run import settings_of_weights

WHOLE = """
out = "runs/first"

[encode-latents]
train = "in/train"
val = "in/val"
vae = "revq-tiny-f8c8"
image-size = 128
views = 3

[fit-codebooks]
tokens = 128
transform = "pca"

[train-rectifier]
steps = 100
lr = 1

[evaluate]
batch_size = 8
"""


def plan_of(tmp_path: Path, text: str, **overrides: str) -> Plan:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_plan(path, **overrides)  # type: ignore[arg-type]


def test_one_file_gives_every_stage_its_settings(tmp_path: Path):
    plan = plan_of(tmp_path, WHOLE)
    assert plan.out == Path("runs/first")
    assert (plan.encode_train.images, plan.encode_train.split, plan.encode_train.image_size, plan.encode_train.views) == ("in/train", "train", 128, 3)
    assert plan.encode_val is not None
    assert (plan.encode_val.images, plan.encode_val.split, plan.encode_val.views, plan.encode_val.vae) == ("in/val", "val", 1, "revq-tiny-f8c8")
    assert plan.encode_val.store == plan.encode_train.store == plan.fit.store == plan.train.store == "runs/first/latents.zarr"
    assert (plan.fit.tokens, plan.fit.transform, plan.fit.codes) == (128, "pca", 16384)
    assert (plan.train.steps, plan.train.lr, plan.train.codebooks) == (100, 1.0, plan.fit.out)
    assert isinstance(plan.train.lr, float)
    assert (plan.evaluate.images, plan.evaluate.tokenizer, plan.evaluate.batch_size) == ("in/val", plan.train.out, 8)


def test_the_command_line_stands_over_the_file(tmp_path: Path):
    plan = plan_of(tmp_path, WHOLE, images="a", val_images="b", out="c", vae="d")
    assert plan.encode_val is not None
    assert (plan.encode_train.images, plan.encode_val.images, plan.evaluate.images, plan.encode_train.vae) == ("a", "b", "b", "d")
    assert plan.out == Path("c")
    assert plan.fit.store == "c/latents.zarr"


def test_without_validation_images_another_set_can_be_evaluated(tmp_path: Path):
    plan = plan_of(tmp_path, 'out = "x"\n[encode-latents]\ntrain = "a"\n[evaluate]\nimages = "b"')
    assert plan.encode_val is None
    assert plan.evaluate.images == "b"


@dataclass(frozen=True)
class Bad:
    name: str
    text: str
    message: str


BASE = 'out = "x"\n[encode-latents]\ntrain = "a"\nval = "b"\n'
BAD = [
    Bad("unknown key", BASE + "imagesize = 3", r"table \[encode-latents\]: unknown key 'imagesize'; did you mean image_size\?"),
    Bad("unknown table", BASE + "[fit-codebook]\ntokens = 3", r"unknown key 'fit-codebook'; did you mean fit-codebooks\?"),
    Bad("key of nothing", BASE + "[evaluate]\nzzzzqqq = 3", r"unknown key 'zzzzqqq'; it knows images, protocol"),
    Bad("set by the run", BASE + '[fit-codebooks]\nstore = "x"', r"unknown key 'store'; a run sets it by itself"),
    Bad("text for a number", BASE + '[fit-codebooks]\ntokens = "512"', r"table \[fit-codebooks\]: tokens must be a whole number, not '512'"),
    Bad("fraction for a whole number", BASE + "[fit-codebooks]\ntokens = 5.5", "tokens must be a whole number, not 5.5"),
    Bad("true for a number", BASE + "[train-rectifier]\nlr = true", "lr must be a number, not True"),
    Bad("number for a text", BASE + "[evaluate]\nvae = 3", "vae must be a text, not 3"),
    Bad("number for a folder", 'out = "x"\n[encode-latents]\ntrain = 3', "train must be a text, not 3"),
    Bad("out is no text", "out = 3", "out must be a text, not 3"),
    Bad("no table", "evaluate = 3", r"evaluate must be a table: write \[evaluate\]"),
    Bad("both spellings", BASE + "image_size = 3\nimage-size = 3", "image_size is given twice"),
    Bad("epochs and steps", BASE + "[train-rectifier]\nsteps = 3\nepochs = 3", "epochs and steps exclude each other"),
    Bad("out of range", BASE + "[fit-codebooks]\ntokens = 0", "tokens must be at least 1, not 0"),
    Bad("no TOML", "out = = 3", r"config\.toml is not valid TOML"),
    Bad("no out", '[encode-latents]\ntrain = "a"\nval = "b"', r"does not say where to write: set out .* or pass --out"),
    Bad("no images", 'out = "x"', r"names no training images: set train in \[encode-latents\] or pass --images"),
    Bad("nothing to evaluate", 'out = "x"\n[encode-latents]\ntrain = "a"', r"names no images to evaluate on"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_fault_in_the_file_is_named_with_its_place(tmp_path: Path, case: Bad):
    with pytest.raises(ConfigError, match=case.message) as caught:
        plan_of(tmp_path, case.text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read \(No such file or directory\)"):
        load_plan(tmp_path / "none.toml")


def test_exactly_one_of_file_and_preset_is_needed():
    for arguments in ({}, {"config": "a.toml", "preset": "demo"}):
        with pytest.raises(
            ConfigError, match=r"either a CONFIG\.toml or --preset demo\|paper-256-256k\|paper-256-64k\|paper-512\|revq-512, and not both"
        ):
            load_plan(**arguments)  # type: ignore[arg-type]


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match="there is no preset 'papers'; there are demo, paper-256-256k, paper-256-64k, paper-512, revq-512"):
        load_plan(preset="papers")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_needs_no_more_than_images_and_a_place(name: str):
    plan = load_plan(preset=name, images="a", val_images="b", out="c")
    assert (plan.encode_train.images, plan.out) == ("a", Path("c"))


@pytest.mark.parametrize(
    ("name", "tokens", "codes", "width", "depth", "batch_size"),
    [("paper-512", 512, 16384, 512, 3, 256), ("paper-256-64k", 256, 65536, 1024, 4, 256), ("paper-256-256k", 256, 262144, 512, 4, 128)],
)
def test_the_paper_presets_are_the_references_settings(name: str, tokens: int, codes: int, width: int, depth: int, batch_size: int):
    plan = load_plan(preset=name, images="a", val_images="b", out="c")
    assert (plan.encode_train.image_size, plan.encode_train.vae) == (256, "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers")
    assert (plan.fit.transform, plan.fit.tokens, plan.fit.codes, plan.fit.backend) == ("standardize", tokens, codes, "faiss")
    train = plan.train
    assert (train.block, train.width, train.depth, train.batch_size) == ("efficientvit", width, depth, batch_size)
    assert (train.epochs, train.lr, train.codebook_lr, train.decoder_steps) == (100, 5e-4, 0.01, 0)


def test_the_demo_preset_is_whole_and_stays_offline():
    plan = load_plan(preset="demo")
    assert (plan.encode_train.images, plan.encode_train.vae) == ("photographs:train", "revq-tiny-f8c8")
    assert plan.evaluate.images == "photographs:held-out"
    assert not plan.evaluate.download


# Given by the run, by the machine, or None, which TOML cannot say; epochs and steps exclude each other.
NOT_SAID = {"split", "val_split", "latents", "precision", "patience", "max_samples", "store_fingerprint", "data_digest", "backend", "epochs", "steps"}


def preset_tables(name: str) -> dict[str, dict[str, object]]:
    return tomllib.loads(files("revq.pipeline").joinpath("presets", f"{name}.toml").read_text())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_every_setting_that_shapes_its_weights(name: str):
    plan, tables = load_plan(preset=name, images="a", val_images="b", out="c"), preset_tables(name)
    train = set(settings_of_weights(plan.train)) - NOT_SAID
    if plan.train.decoder_steps == 0:
        train -= {"decoder_batch_size"}
    split = SimpleNamespace(encoding=SimpleNamespace(fingerprint=""), data_digest="")
    fit = set(settings_of_codebooks(plan.fit, split, backend="torch")) - NOT_SAID  # type: ignore[arg-type]
    assert train - set(tables["train-rectifier"]) == set()
    assert fit - set(tables["fit-codebooks"]) == set()
    assert {"vae", "image_size", "views", "dtype", "seed"} - set(tables["encode-latents"]) == set()
    assert ("epochs" in tables["train-rectifier"]) != ("steps" in tables["train-rectifier"])


def test_the_table_in_the_documentation_is_what_the_presets_say():
    page = (Path(__file__).parent.parent / "docs" / "reference" / "presets.md").read_text()
    documented: dict[tuple[str, str, str], str] = {}
    for part in site_pages.on_page_markdown(page).split("\n### ")[1:]:
        table, *lines = part.splitlines()
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        names = [cell.strip("`") for cell in head[1:]]
        assert sorted(names) == preset_names()
        for key, *cells in rows:
            documented |= {(name, table, key.strip("`")): cell for name, cell in zip(names, cells, strict=True) if cell}
    said = {
        (name, table, key): f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
        for name in names
        for table, keys in preset_tables(name).items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if key not in ("train", "val")
    }
    assert documented == {where: value.replace("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "DC-AE f32c32") for where, value in said.items()}
