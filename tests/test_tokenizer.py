"""The tokenizer as a Python user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from revq import FrozenVAE, ReVQTokenizer
from revq.errors import MismatchError, TokenizerError


def test_encode_gives_tokens_and_decode_gives_pictures(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    indices = tokenizer.encode(images)
    assert indices.shape == (4, 512)
    assert indices.dtype == torch.int64
    assert 0 <= int(indices.min()) <= int(indices.max()) < 32
    decoded = tokenizer.decode(indices)
    assert decoded.shape == images.shape
    assert torch.equal(decoded, tokenizer.reconstruct(images))
    assert tokenizer.bits_per_image == 512 * 5


def test_saved_and_loaded_it_gives_the_same_tokens_and_pictures_bit_for_bit(tokenizer: ReVQTokenizer, images: Tensor, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "copy")
    again = ReVQTokenizer.from_pretrained(tmp_path / "copy")
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert torch.equal(again.reconstruct(images), tokenizer.reconstruct(images))
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_vae_is_not_among_the_saved_weights(small_run: Path, tokenizer: ReVQTokenizer) -> None:
    assert tokenizer.vae is not None
    assert not any("network" in name for name in tokenizer.state_dict())
    assert "Quantize-then-Rectify" in (small_run / "tokenizer" / "README.md").read_text()


def test_loading_prints_nothing(small_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ReVQTokenizer.from_pretrained(small_run / "tokenizer")
    assert capfd.readouterr().out == ""


def test_latents_can_be_tokenized_without_the_vae(tokenizer: ReVQTokenizer, small_store: Path) -> None:
    from revq import LatentStore

    latents = torch.from_numpy(LatentStore.open(small_store)["val"].latents[:3])
    decoded = tokenizer.decode_latents(tokenizer.encode_latents(latents), rectify=False)
    quantized_error = (tokenizer.transform.standardize(decoded) - tokenizer.transform.standardize(latents.float())).square().mean()
    assert float(quantized_error) < 1


def test_a_quantized_latent_keeps_its_tokens(tokenizer: ReVQTokenizer) -> None:
    indices = torch.randint(32, (5, 512), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.encode_latents(tokenizer.decode_latents(indices, rectify=False)), indices)


def test_another_vae_is_refused_with_both_fingerprints(small_run: Path, tokenizer: ReVQTokenizer) -> None:
    with pytest.raises(MismatchError, match=tokenizer.vae_identity["fingerprint"]):
        ReVQTokenizer.from_pretrained(small_run / "tokenizer", vae=FrozenVAE.load("revq-tiny-f8c8"))


def test_a_loaded_vae_may_be_passed(small_run: Path, taef2: str) -> None:
    vae = FrozenVAE.load(taef2)
    assert ReVQTokenizer.from_pretrained(small_run / "tokenizer", vae=vae).vae is vae


def test_images_of_another_size_and_indices_out_of_range_are_refused(tokenizer: ReVQTokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"\(B,3,64,64\)"):
        tokenizer.encode(torch.zeros(1, 3, 128, 128))
    with pytest.raises(TokenizerError, match=r"\[0,32\), found 32"):
        tokenizer.decode(torch.full((1, 512), 32))
    with pytest.raises(TokenizerError, match=r"\(B,512\)"):
        tokenizer.decode(torch.zeros(1, 100, dtype=torch.int64))


def test_a_missing_or_damaged_tokenizer_is_an_error_and_never_random(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no revq tokenizer"):
        ReVQTokenizer.from_pretrained(tmp_path)
    copy = Path(shutil.copytree(small_run / "tokenizer", tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(TokenizerError, match=r"model\.safetensors"):
        ReVQTokenizer.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(TokenizerError, match=r"model\.safetensors"):
        ReVQTokenizer.from_pretrained(copy)


def test_a_tokenizer_of_a_newer_format_asks_for_an_upgrade(small_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_run / "tokenizer", tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(TokenizerError, match="upgrade revq"):
        ReVQTokenizer.from_pretrained(copy)
