"""A file that lacks a tensor, has another or one of another shape is refused by name: no loader makes a value up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from random_weights import save_random_alexnet, save_random_inception, save_random_vgg16
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_vae import save_tiny, tiny_kl
from training_runs import config, stop_at

from revq import FrozenVAE, ReVQTokenizer
from revq.errors import CodebookError, ConfigError, TokenizerError, TrainingError, VAEError
from revq.models.codebooks import CODEBOOKS_NAME, load_codebooks
from revq.models.vae_files import EMBEDDED_VAE
from revq.models.weight_keys import compare_weights
from revq.stages.evaluation.inception import Inception
from revq.stages.evaluation.networks import Lpips
from revq.stages.events import Note, run_quietly
from revq.stages.train_rectifier import train_rectifier

WEIGHTS = "diffusion_pytorch_model.safetensors"
State = dict[str, torch.Tensor]


def save_as(path: Path, state: State) -> None:
    """Replace the tensors of a safetensors file, not its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)


def renamed(state: State) -> State:
    return {f"network.{name}": tensor for name, tensor in state.items()}


def swapped(state: State) -> tuple[State, tuple[str, str]]:
    """Two tensors of unlike shapes under each other's names."""
    names = sorted(state)
    first = names[0]
    second = next(name for name in names if state[name].shape != state[first].shape)
    return {**state, first: state[second], second: state[first]}, (first, second)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def check_every_way(path: Path, load: Callable[[], object], kind: type[Exception], *, every: int = 1) -> None:
    """Delete each tensor (or every so many-th) in turn, rename all, swap shapes: each is an error that names the tensor."""
    state = load_file(path)
    for name in sorted(state)[::every]:
        save_as(path, {other: tensor for other, tensor in state.items() if other != name})
        with pytest.raises(kind) as caught:
            load()
        assert f"1 tensor is missing: {name}" in one_line(caught) or f"no tensor {name}" in one_line(caught)
    save_as(path, renamed(state))
    with pytest.raises(kind) as caught:
        load()
    assert f"{len(state)} tensors are missing: " in one_line(caught) or "no tensor" in one_line(caught)
    mixed, names = swapped(state)
    save_as(path, mixed)
    with pytest.raises(kind) as caught:
        load()
    assert "of another shape: " in one_line(caught)
    assert any(name in str(caught.value) for name in names)
    save_as(path, state)
    load()


def tiny_dc() -> diffusers.AutoencoderDC:
    torch.manual_seed(0)
    two: dict[str, object] = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    layers: dict[str, object] = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    scales: dict[str, object] = {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    types = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, **types, **two, **layers, **scales)


@pytest.mark.parametrize("make", [tiny_kl, tiny_dc], ids=["AutoencoderKL", "AutoencoderDC"])
def test_a_vae_that_lacks_any_tensor_or_has_another_is_refused_by_name(
    tmp_path: Path, make: Callable[[], torch.nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(make(), tmp_path / "vae")
    check_every_way(folder / WEIGHTS, lambda: FrozenVAE.load(str(folder)), VAEError)
    assert capfd.readouterr().err == ""


def test_the_embedded_vae_without_its_last_layer_is_refused(tmp_path: Path) -> None:
    from revq.models import vae_files

    folder = Path(shutil.copytree(Path(vae_files.__file__).parent / EMBEDDED_VAE, tmp_path / "vae"))
    check_every_way(folder / WEIGHTS, lambda: FrozenVAE.load(str(folder)), VAEError, every=7)


def test_a_tensor_that_the_network_does_not_have_is_refused_but_for_what_training_leaves(tmp_path: Path) -> None:
    folder = save_tiny(tiny_kl(), tmp_path / "kl")
    fingerprint, state = FrozenVAE.load(str(folder)).fingerprint, load_file(folder / WEIGHTS)
    save_as(folder / WEIGHTS, {**state, "loss.discriminator.main.0.weight": torch.zeros(3), "model_ema.decay": torch.zeros(())})
    assert FrozenVAE.load(str(folder)).fingerprint == fingerprint
    save_as(folder / WEIGHTS, {**state, "decoder.up_blocks.0.resnets.9.conv1.weight": torch.zeros(3)})
    with pytest.raises(VAEError, match=r"1 tensor is unexpected: decoder\.up_blocks\.0\.resnets\.9\.conv1\.weight"):
        FrozenVAE.load(str(folder))


def test_the_attention_of_older_files_is_renamed_and_loads_to_the_same_vae(tmp_path: Path) -> None:
    folder = save_tiny(tiny_kl(), tmp_path / "kl")
    fingerprint, state = FrozenVAE.load(str(folder)).fingerprint, load_file(folder / WEIGHTS)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    names = {name: name for name in state}
    for new, old in older.items():
        names = {name: was.replace(f".{new}.", f".{old}.") for name, was in names.items()}
    assert sum(name != was for name, was in names.items()) == 16
    save_as(folder / WEIGHTS, {names[name]: tensor for name, tensor in state.items()})
    assert FrozenVAE.load(str(folder)).fingerprint == fingerprint


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_kl().save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    return tmp_path / "shards"


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(shards: Path) -> None:
    index = json.loads((shards / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    name, file = next((name, file) for name, file in index.items() if name == "decoder.conv_out.weight")
    assert FrozenVAE.load(str(shards)).class_name == "AutoencoderKL"
    state = load_file(shards / file)
    save_as(shards / file, {other: tensor for other, tensor in state.items() if other != name})
    with pytest.raises(VAEError, match=r"1 tensor is missing: decoder\.conv_out\.weight"):
        FrozenVAE.load(str(shards))
    save_as(shards / file, {**state, "extra": torch.zeros(1)})
    with pytest.raises(VAEError, match="1 tensor is unexpected: extra"):
        FrozenVAE.load(str(shards))


def test_an_index_that_lacks_a_tensor_and_a_shard_that_is_not_there_are_refused(shards: Path) -> None:
    path = shards / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    shorter = {name: file for name, file in index["weight_map"].items() if name != "quant_conv.weight"}
    path.write_text(json.dumps({**index, "weight_map": shorter}))
    with pytest.raises(VAEError, match=r"quant_conv\.weight"):
        FrozenVAE.load(str(shards))
    path.write_text(json.dumps(index))
    next(shards.glob("*-00002-of-*")).unlink()
    with pytest.raises(VAEError, match="lacks diffusion_pytorch_model-00002-of-"):
        FrozenVAE.load(str(shards))
    path.write_text("{}")
    with pytest.raises(VAEError, match="is no index of shards"):
        FrozenVAE.load(str(shards))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=["one file", "shards"])
def test_a_folder_with_the_fp16_variant_alone_loads_it(tmp_path: Path, options: dict[str, str]) -> None:
    tiny_kl().half().save_pretrained(tmp_path / "half", variant="fp16", **options)
    vae = FrozenVAE.load(str(tmp_path / "half"))
    assert all(tensor.dtype == torch.float32 for tensor in vae.parameters())
    expected = {name: tensor.half().float() for name, tensor in tiny_kl().state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.network.state_dict().items())


def test_full_precision_goes_before_the_variant(tmp_path: Path) -> None:
    tiny_kl().half().save_pretrained(tmp_path / "both", variant="fp16")
    tiny_kl().save_pretrained(tmp_path / "both")
    save_tiny(tiny_kl(), tmp_path / "full")
    assert FrozenVAE.load(str(tmp_path / "both")).fingerprint == FrozenVAE.load(str(tmp_path / "full")).fingerprint


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(
        VAEError, match=r"only as diffusion_pytorch_model\.bin: revq never unpickles weights.*save_pretrained\(NEW\), and pass --vae NEW"
    ):
        FrozenVAE.load(str(tmp_path / "pickled"))
    network = diffusers.AutoencoderKL.from_pretrained(tmp_path / "pickled", use_safetensors=False, low_cpu_mem_usage=False)
    network.save_pretrained(tmp_path / "new")  # the very lines that the message and docs/reference/vaes.md give
    save_tiny(tiny_kl(), tmp_path / "full")
    assert FrozenVAE.load(str(tmp_path / "new")).fingerprint == FrozenVAE.load(str(tmp_path / "full")).fingerprint


def test_a_tokenizer_that_lacks_any_tensor_or_has_another_is_refused_by_name(small_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run / "tokenizer", tmp_path / "tokenizer"))
    check_every_way(folder / "model.safetensors", lambda: ReVQTokenizer.from_pretrained(folder), TokenizerError)


def test_a_tokenizer_whose_config_lacks_a_setting_is_one_line(small_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run / "tokenizer", tmp_path / "tokenizer"))
    settings = json.loads((folder / "config.json").read_text())
    for name in ("tokens", "latent_shape", "transform"):
        (folder / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != name}))
        with pytest.raises(TokenizerError, match=rf"config\.json: KeyError: '{name}'"):
            ReVQTokenizer.from_pretrained(folder)


def test_codebooks_that_lack_any_tensor_or_have_another_are_refused_by_name(small_codebooks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_codebooks, tmp_path / "codebooks"))
    check_every_way(folder / CODEBOOKS_NAME, lambda: load_codebooks(folder), CodebookError)


def test_codebooks_in_rotated_coordinates_without_their_axes_are_not_taken_for_plain_ones(small_store: Path, tmp_path: Path) -> None:
    from revq.stages.configs import FitCodebooksConfig
    from revq.stages.fit_codebooks import fit_codebooks

    settings = {"tokens": 64, "codes": 4, "iterations": 1, "transform": "pca"}
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(small_store), out=str(tmp_path / "pca"), **settings)))  # type: ignore[arg-type]
    check_every_way(tmp_path / "pca" / CODEBOOKS_NAME, lambda: load_codebooks(tmp_path / "pca"), CodebookError)


CPU = torch.device("cpu")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("save", "load", "name"),
    [
        (lambda home: save_random_inception(home / "inception.pth"), lambda path: Inception(path, CPU), "Mixed_6c.branch7x7_2.conv.weight"),
        (save_random_alexnet, lambda path: Lpips("alex", path, CPU), "features.8.bias"),
        (save_random_vgg16, lambda path: Lpips("vgg", path, CPU), "features.28.weight"),
    ],
    ids=["Inception", "AlexNet", "VGG16"],
)
def test_networks_of_the_metrics_are_all_there_or_refused_by_name(
    hub_cache: Path, save: Callable[[Path], Path], load: Callable[[Path], object], name: str
) -> None:
    path = save(hub_cache)
    state = torch.load(path, weights_only=True)
    torch.save({other: tensor for other, tensor in state.items() if other != name}, path)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert f"1 tensor is missing: {name}" in one_line(caught)
    torch.save(renamed(state), path)
    with pytest.raises(ConfigError, match=r"\d+ tensors are missing: .*; \d+ tensors are unexpected: network\."):
        load(path)
    torch.save({**state, name: torch.zeros(7, 7)}, path)
    with pytest.raises(ConfigError, match=f"{name} is 7x7 and not "):
        load(path)
    for other in (b"", b"junk\n", b"<!DOCTYPE html>", bytes(range(256)), path.read_bytes()[:1000]):
        path.write_bytes(other)
        with pytest.raises(ConfigError, match="cannot be read"):
            load(path)


def test_a_checkpoint_that_lacks_a_tensor_is_left_out_by_name_and_none_of_it_is_taken(
    small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    settings = config(small_store, small_codebooks, tmp_path / "run", keep=9)
    stop_at(9, train_rectifier(settings))
    paths = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    assert len(paths) >= 2
    content = torch.load(paths[-1], weights_only=True)
    del content["ema"]["conv_out.bias"]
    torch.save(content, paths[-1])
    notes = [event.text for event in train_rectifier(settings) if isinstance(event, Note)]
    assert notes[0] == f"checkpoint {paths[-1].name} is damaged (ema: 1 tensor is missing: conv_out.bias) and left out"
    whole = config(small_store, small_codebooks, tmp_path / "whole", keep=9)
    run_quietly(train_rectifier(whole))
    assert (tmp_path / "run/tokenizer/model.safetensors").read_bytes() == (tmp_path / "whole/tokenizer/model.safetensors").read_bytes()


@pytest.mark.parametrize("part", ["step", "optimizer", "counts", "a moment", "shape"])
def test_checkpoints_of_which_every_one_lacks_something_are_an_error_and_no_traceback(
    small_store: Path, small_codebooks: Path, tmp_path: Path, part: str
) -> None:
    settings = config(small_store, small_codebooks, tmp_path / "run", keep=1)
    stop_at(9, train_rectifier(settings))
    for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt"):
        content = torch.load(path, weights_only=True)
        if part == "a moment":
            del content["optimizer"]["state"][2]
        elif part == "shape":
            content["optimizer"]["state"][2]["exp_avg"] = torch.zeros(3)
        else:
            del content[part]
        torch.save(content, path)
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be read .*start again with --overwrite"):
        run_quietly(train_rectifier(settings))


def test_counters_of_batches_that_older_files_do_not_have_are_no_fault() -> None:
    network = torch.nn.BatchNorm2d(3)
    state = {name: tensor for name, tensor in network.state_dict().items() if name != "num_batches_tracked"}
    expected = {f"norm.{name}": tensor for name, tensor in network.state_dict().items()}
    assert compare_weights(expected, {f"norm.{name}": tensor for name, tensor in state.items()}) == ""
