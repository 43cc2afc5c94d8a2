"""The tokenizer as a module of PyTorch: moved, copied, sent to workers, and used in every mode that torch has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from revq import FrozenVAE, ReVQTokenizer
from revq.errors import TokenizerError, VAEError
from revq.models.nearest import NearestCodes, nearest_codes
from revq.models.quantizer import MultiGroupQuantizer
from revq.models.transform import LatentTransform

Mode = Callable[[], AbstractContextManager[object]]
MODES: dict[str, Mode] = {"plain": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
OTHER_DTYPES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.bfloat16),
}


@pytest.fixture
def fresh(small_run: Path) -> ReVQTokenizer:
    """One that a test may move and change; its VAE is not loaded yet."""
    return ReVQTokenizer.from_pretrained(small_run / "tokenizer")


@pytest.fixture(scope="module")
def expected(tokenizer: ReVQTokenizer, images: Tensor) -> dict[str, Tensor]:
    """What a tokenizer loaded and used in plain mode gives."""
    indices = tokenizer.encode(images)
    return {"indices": indices, "pictures": tokenizer.decode(indices), "refined": tokenizer.encode(images, refine=1)}


def use(tokenizer: ReVQTokenizer, images: Tensor) -> dict[str, Tensor]:
    indices = tokenizer.encode(images)
    return {"indices": indices, "pictures": tokenizer.decode(indices), "refined": tokenizer.encode(images, refine=1)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# modes


@pytest.mark.parametrize("use_in", MODES)
@pytest.mark.parametrize("first_use_in", ["plain", "inference"])
@pytest.mark.parametrize("load_in", MODES)
def test_it_may_be_loaded_and_used_in_any_mode(
    load_in: str, first_use_in: str, use_in: str, small_run: Path, images: Tensor, expected: dict[str, Tensor]
) -> None:
    with MODES[load_in]():
        tokenizer = ReVQTokenizer.from_pretrained(small_run / "tokenizer")
    with MODES[first_use_in]():
        tokenizer.encode(images[:1])  # the VAE is loaded here
    with MODES[use_in]():
        assert_same(use(tokenizer, images), expected)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: module.to("cpu", torch.float32)])
def test_what_was_made_of_it_in_inference_mode_gives_gradients_outside(change: Callable, taef2: str, fresh: ReVQTokenizer, images: Tensor) -> None:
    with torch.inference_mode():
        changed, vae = change(fresh), change(FrozenVAE.load(taef2))
    latents = torch.zeros(1, 32, 8, 8, requires_grad=True)
    vae.decode(latents).sum().backward()
    assert float(latents.grad.abs().sum()) > 0
    assert torch.equal(changed.encode(images, refine=1), fresh.encode(images, refine=1))
    assert not any(tensor.is_inference() for module in (changed, vae) for tensor in module.state_dict().values())


def test_latents_and_pictures_made_in_inference_mode_are_taken_outside(fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        given, latents, indices = images.clone(), fresh.vae.encode(images), expected["indices"].clone()
    assert torch.equal(fresh.encode(given, refine=1), expected["refined"])
    assert torch.equal(fresh.encode_latents(latents), expected["indices"])
    assert torch.equal(fresh.decode(indices), expected["pictures"])


def test_a_quantizer_made_in_inference_mode_follows_its_codes() -> None:
    with torch.inference_mode():
        quantizer = MultiGroupQuantizer(torch.randn(2, 40, 4)).eval()
        coordinates = torch.randn(5, 2, 4)
        first = quantizer.encode(coordinates)
        quantizer.codebooks.copy_(quantizer.codebooks.flip(1))
        assert torch.equal(quantizer.encode(coordinates), 39 - first)


def test_another_default_dtype_of_torch_rounds_no_weight(small_run: Path, fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        tokenizer = ReVQTokenizer.from_pretrained(small_run / "tokenizer")
    finally:
        torch.set_default_dtype(torch.float32)
    assert tokenizer.fingerprint == fresh.fingerprint
    assert_same(use(tokenizer, images), expected)


@pytest.mark.parametrize("rounding", ["autocast", "high", "medium"])
def test_where_products_are_rounded_coordinates_and_search_are_not(rounding: str) -> None:
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    transform = LatentTransform(mean=torch.zeros(4, 4, 4), std=torch.ones(4, 4, 4), tokens=16, axes=axes)
    quantizer = MultiGroupQuantizer(torch.randn(16, 300, 4, generator=generator)).eval()
    quantizer._search = NearestCodes(quantizer.codebooks.data, "product")  # the one that computes by products on a CPU too
    latents = torch.randn(20, 4, 4, 4, generator=generator)
    coordinates = transform(latents)
    back, nearest = transform.inverse(coordinates), nearest_codes(coordinates.transpose(0, 1), quantizer.codebooks.detach()).T
    with torch.autocast("cpu", torch.bfloat16) if rounding == "autocast" else nullcontext():
        if rounding != "autocast":
            torch.set_float32_matmul_precision(rounding)
        try:
            assert torch.equal(transform(latents), coordinates)
            assert torch.equal(transform.inverse(coordinates), back)
            assert torch.equal(quantizer.encode(coordinates), nearest)
            assert torch.is_autocast_enabled("cpu") == (rounding == "autocast")
            assert torch.get_float32_matmul_precision() == ("highest" if rounding == "autocast" else rounding)
        finally:
            torch.set_float32_matmul_precision("highest")


# moves


def test_the_vae_goes_where_its_tokenizer_goes(fresh: ReVQTokenizer) -> None:
    vae = fresh.vae
    assert vae.device == fresh.device == torch.device("cpu")
    fresh.to("meta")
    assert vae.device == fresh.device == torch.device("meta")


def test_it_may_be_loaded_within_another_default_device(small_run: Path, images: Tensor, expected: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        tokenizer = ReVQTokenizer.from_pretrained(small_run / "tokenizer")
        vae = tokenizer.vae
    assert tokenizer.device.type == vae.device.type == "cpu"
    assert_same(use(tokenizer, images), expected)


def test_it_goes_along_with_a_module_around_it_too(fresh: ReVQTokenizer) -> None:
    vae = fresh.vae
    outer = nn.ModuleDict({"tokenizer": fresh})
    assert not any("network" in name for name in outer.state_dict())
    outer.to("meta")
    assert vae.device.type == fresh.device.type == "meta"


def test_emptied_it_loads_its_vae_anew(small_run: Path, fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    weights = ReVQTokenizer.from_pretrained(small_run / "tokenizer").state_dict()
    assert fresh.vae.device.type == "cpu"
    fresh.to("meta").to_empty(device="cpu").load_state_dict(weights)
    assert_same(use(fresh, images), expected)


def test_a_vae_that_two_tokenizers_share_comes_to_the_one_that_uses_it(small_run: Path, taef2: str) -> None:
    vae = FrozenVAE.load(taef2)
    here, there = (ReVQTokenizer.from_pretrained(small_run / "tokenizer", vae=vae) for _ in range(2))
    there.to("meta")
    assert vae.device.type == "meta"
    with pytest.raises(NotImplementedError, match="no data"):  # on real devices it comes back; from the meta device nothing does
        _ = here.vae


@pytest.mark.gpu
def test_on_a_gpu_and_back_it_works_at_every_stop(small_run: Path, taef2: str, images: Tensor, expected: dict[str, Tensor]) -> None:
    vae = FrozenVAE.load(taef2)
    one, other = (ReVQTokenizer.from_pretrained(small_run / "tokenizer", vae=vae) for _ in range(2))
    one.encode(images)
    for tokenizer, move in ((one, one.cuda), (other, other.cpu), (one, lambda: one.to("cuda:0")), (one, one.cpu)):
        move()
        agreement = (tokenizer.encode(images).cpu() == expected["indices"]).float().mean()
        assert float(agreement) > 0.99
        assert tokenizer.decode(expected["indices"]).device == tokenizer.device == vae.device
    assert_same(use(one, images), expected)


@pytest.mark.parametrize("way", OTHER_DTYPES)
def test_another_dtype_is_refused_and_changes_nothing(way: str, fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    for module, error in ((fresh, TokenizerError), (fresh.vae, VAEError)):
        with pytest.raises(error, match=r"^a \w+ keeps its weights in float32, not torch\.\w+.*autocast.*$"):
            OTHER_DTYPES[way](module)
    assert_same(use(fresh, images), expected)


def test_what_leaves_float32_as_it_is_passes(fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    _ = fresh.vae
    assert fresh.float() is fresh
    fresh.to(torch.float32).to("cpu").cpu().to(memory_format=torch.contiguous_format).share_memory()
    assert_same(use(fresh, images), expected)


# copies


def test_a_copy_is_one_of_its_own(fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    fresh.encode(images)
    for other in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        with torch.no_grad():
            fresh.quantizer.codebooks.copy_(fresh.quantizer.codebooks.flip(1))
        assert_same(use(other, images), expected)
        with torch.no_grad():
            fresh.quantizer.codebooks.copy_(fresh.quantizer.codebooks.flip(1))
    copy.deepcopy(fresh).to("meta")
    assert_same(use(fresh, images), expected)


def test_a_copy_searches_its_own_codes_after_as_many_changes_as_the_first_had() -> None:
    codes, coordinates = torch.randn(2, 40, 4), torch.randn(5, 2, 4)
    quantizer = MultiGroupQuantizer(codes.clone()).eval()
    with torch.no_grad():
        quantizer.codebooks.copy_(codes.flip(1))
    first = quantizer.encode(coordinates)
    other = copy.deepcopy(quantizer)
    with torch.no_grad():
        other.codebooks.copy_(codes)
    assert torch.equal(other.encode(coordinates), 39 - first)


@pytest.mark.parametrize("way", ["data", "assign", "parameter"])
def test_codes_that_were_replaced_are_the_ones_searched(way: str) -> None:
    codes, coordinates = torch.randn(2, 40, 4), torch.randn(5, 2, 4)
    quantizer = MultiGroupQuantizer(codes).eval()
    first = quantizer.encode(coordinates)
    if way == "data":
        quantizer.codebooks.data = codes.flip(1)
    elif way == "assign":
        quantizer.load_state_dict({"codebooks": codes.flip(1)}, assign=True)
    else:
        quantizer.codebooks = nn.Parameter(codes.flip(1)[:, 1:])
    moved = quantizer.encode(coordinates)
    assert torch.equal(moved, nearest_codes(coordinates.transpose(0, 1), quantizer.codebooks.detach()).T)
    assert not torch.equal(moved, first)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_data_loaders_workers_give_the_same_tokens(start: str, fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    assert torch.equal(fresh.encode(images), expected["indices"])  # also loads the plug-in, whose classes no other process can import
    loader = DataLoader([images], batch_size=None, collate_fn=fresh.encode, num_workers=1, multiprocessing_context=start)
    assert torch.equal(next(iter(loader)), expected["indices"])


# modes of training


def test_a_training_module_around_it_leaves_it_frozen(taef2: str, fresh: ReVQTokenizer, images: Tensor, expected: dict[str, Tensor]) -> None:
    vae = FrozenVAE.load(taef2)
    outer = nn.ModuleList([fresh, vae]).train()
    assert outer.training
    assert not any(module.training for part in (fresh, fresh.vae, vae) for module in part.modules())
    assert not any(parameter.requires_grad for parameter in outer.parameters())
    fresh.requires_grad_(True)
    assert_same(use(fresh, images), expected)
    assert all(parameter.grad is None for parameter in fresh.parameters())


def test_a_vae_with_batch_norm_is_the_same_after_a_training_module_used_it() -> None:
    network = nn.BatchNorm2d(3)
    network.encode, network.decode = network.forward, network.forward
    vae = FrozenVAE(network, vae_id="batch norm", revision=None, config_sha256="")
    images = torch.randn(4, 3, 8, 8)
    before = vae.encode(images)
    nn.Sequential(vae).train()
    assert torch.equal(vae.encode(images), before)
