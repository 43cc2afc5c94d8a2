"""The command line from outside: help, options, exit codes, what goes to which stream."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from revq import __version__, cli
from revq.stages.configs import EncodeLatentsConfig, EvaluateConfig, FitCodebooksConfig, TrainRectifierConfig

Cli = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ("encode-latents", "fit-codebooks", "train-rectifier", "evaluate", "compare", "run", "demo", "info")
CONFIGS = {
    "encode-latents": EncodeLatentsConfig,
    "fit-codebooks": FitCodebooksConfig,
    "train-rectifier": TrainRectifierConfig,
    "evaluate": EvaluateConfig,
}


def test_the_command_line_loads_without_torch():
    program = "import sys, revq.cli; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'zarr')))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_help_names_every_command(revq_cli: Cli):
    text = revq_cli("--help", env={"COLUMNS": "80"}).stdout
    assert all(f" {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example_and_fits_80_columns(revq_cli: Cli, command: str):
    text = revq_cli(command, "--help", env={"COLUMNS": "80"}).stdout
    assert f"Example: revq {command}" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


@pytest.mark.parametrize("command", CONFIGS)
def test_every_setting_of_a_stage_is_an_option_with_the_same_default_and_its_own_help(command: str):
    options = {option.name: option for option in typer.main.get_command(cli.app).commands[command].params}  # type: ignore[attr-defined]
    fields = {field.name: field for field in dataclasses.fields(CONFIGS[command])}
    assert set(options) == {*fields, "as_json"}
    for name, field in fields.items():
        assert options[name].required == (field.default is dataclasses.MISSING), name
        if field.default is True:  # its flag turns it off
            assert (options[name].opts, options[name].default) == ([f"--no-{name}"], False)
        elif not options[name].required:
            assert options[name].default == field.default, name
        assert options[name].help
    assert len({option.help for option in options.values()}) == len(options)


def test_the_version_is_that_of_the_package(revq_cli: Cli):
    assert revq_cli("--version").stdout == f"revq {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [("fit-codebooks", "a"), ("fit-codebooks", "a", "b", "--tokens", "x"), ("encode-latents", "a", "b", "--nothing"), ("fly",)],
    ids=["argument missing", "no number", "unknown option", "unknown command"],
)
def test_wrong_usage_exits_with_2(revq_cli: Cli, arguments: tuple[str, ...]):
    done = revq_cli(*arguments, check=2)
    assert done.stdout == ""
    assert "Usage:" in done.stderr


def test_a_number_of_tolerance_images_and_none_at_all_exclude_each_other(revq_cli: Cli):
    done = revq_cli("evaluate", "a", "b", "c", "--tolerance-images", "4", "--no-tolerance", check=2)
    assert "--tolerance-images / --no-tolerance: give one of the two" in done.stderr


def test_epochs_and_steps_exclude_each_other(revq_cli: Cli):
    done = revq_cli("train-rectifier", "a", "b", "c", "--epochs", "100", "--steps", "5", check=2)
    assert "--epochs / --steps: give one of the two" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit-codebooks", "a", "b", "--tokens", "0"), "tokens must be at least 1, not 0"),
        (("fit-codebooks", "a", "b", "--transform", "fourier"), "transform must be one of"),
        (("encode-latents", "a", "b", "--dtype", "int8"), "dtype must be one of float16, float32, not 'int8'"),
        (("run",), "give either a CONFIG.toml or --preset"),
        (("info", "/nowhere/at/all"), "/nowhere/at/all does not exist; give the path of a latent store, codebooks"),
    ],
    ids=["tokens", "transform", "dtype", "run", "info"],
)
def test_a_setting_out_of_range_is_one_line_and_exit_1(revq_cli: Cli, arguments: tuple[str, ...], message: str):
    done = revq_cli(*arguments, check=1)
    assert done.stdout == ""
    assert done.stderr.startswith("revq: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_debugging_shows_the_traceback(revq_cli: Cli):
    assert "Traceback" in revq_cli("info", "/nowhere", env={"REVQ_DEBUG": "1"}, check=1).stderr


def test_info_on_what_revq_did_not_make_says_what_it_could_be(revq_cli: Cli, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"kind": "something"}')
    done = revq_cli("info", tmp_path, check=1)
    assert "is nothing that revq made (its config.json is of kind 'something'); give the path of a latent store" in done.stderr


def test_json_is_one_object_on_standard_output_and_progress_goes_to_standard_error(revq_cli: Cli, imagenet_sample: Path, taef2: str, tmp_path: Path):
    arguments = ("encode-latents", imagenet_sample / "val", tmp_path / "a.zarr", "--vae", taef2, "--image-size", 64, "--limit", 4, "--json")
    done = revq_cli(*arguments)
    value = json.loads(done.stdout)
    assert (value["rows"], value["latent_shape"], value["already_complete"]) == (4, [32, 8, 8], False)
    assert "encode train: 4/4 images (100 %)" in done.stderr
    again = revq_cli(*arguments)
    assert json.loads(again.stdout)["already_complete"] is True


def test_a_reader_that_goes_away_ends_the_command_silently(imagenet_sample: Path, taef2: str, tmp_path: Path):
    command = [sys.executable, "-m", "revq", "encode-latents", imagenet_sample / "val", tmp_path / "a.zarr", "--vae", taef2, "--image-size", "64"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*map(str, command), "--limit", "4"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_a_vae_plugin_and_its_programs_print_does_not_spoil_the_json(revq_cli: Cli, taef2: str, tmp_path: Path):
    plugin = tmp_path / "talks.py"
    plugin.write_text(
        f"""
import os, runpy
print("loading")
os.system("echo from a shell")

def load():
    network = runpy.run_path({taef2.removesuffix(":load")!r})["load"]()
    network.register_forward_pre_hook(lambda *_: print("encoding"))
    network.encoder.register_forward_pre_hook(lambda *_: print("encoding"))
    return network
"""
    )
    arguments = ("encode-latents", "photographs:held-out", tmp_path / "a.zarr", "--vae", f"{plugin}:load", "--image-size", 64, "--limit", 4)
    done = revq_cli(*arguments, "--json")
    assert json.loads(done.stdout)["rows"] == 4
    assert {"loading", "from a shell", "encoding"} <= set(done.stderr.splitlines())
