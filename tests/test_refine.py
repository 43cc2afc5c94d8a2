"""Tokens searched for with the decoder in the loop, on real photographs through a real VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from revq import ReVQTokenizer
from revq.models import refine
from revq.models.refine import refine_tokens
from revq.stages.configs import EvaluateConfig
from revq.stages.evaluate import evaluate
from revq.stages.events import run_quietly


def errors(tokenizer: ReVQTokenizer, images: Tensor, indices: Tensor) -> Tensor:
    return (tokenizer.decode(indices) - images).square().mean((1, 2, 3))


def test_a_few_steps_bring_every_picture_much_nearer_to_its_image(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    plain, refined = errors(tokenizer, images, tokenizer.encode(images)), errors(tokenizer, images, tokenizer.encode(images, refine=8))
    assert bool((refined < 0.95 * plain).all()), refined / plain
    assert float(refined.mean()) < 0.85 * float(plain.mean()), refined / plain


def decoding(tokenizer: ReVQTokenizer) -> refine.Decode:
    return lambda quantized: tokenizer.vae.decode(tokenizer.latents_of(quantized))


def test_no_image_is_made_worse_even_by_steps_far_too_long(tokenizer: ReVQTokenizer, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine.math, "pi", 0.0)  # the first step's length for ever
    plain, refined = errors(tokenizer, images, tokenizer.encode(images)), errors(tokenizer, images, tokenizer.encode(images, refine=2))
    assert bool((refined <= plain).all())


def test_no_steps_give_the_nearest_codes(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    coordinates = tokenizer.transform(tokenizer.vae.encode(images))
    assert torch.equal(refine_tokens(tokenizer.quantizer, decoding(tokenizer), images, coordinates, 0), tokenizer.encode(images))


def test_the_gradient_is_that_of_the_decoded_picture(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    indices = tokenizer.encode(images[:1])
    error, gradient = refine._error_and_gradient(tokenizer.quantizer, decoding(tokenizer), images[:1], indices)
    assert torch.allclose(error, errors(tokenizer, images[:1], indices), rtol=1e-5)
    direction = gradient / gradient.norm()
    codes = tokenizer.quantizer.decode(indices)
    near = [
        (tokenizer.vae.decode(tokenizer.latents_of(codes + side * 0.02 * direction)) - images[:1]).square().mean().detach().double()
        for side in (-1, 1)
    ]
    assert float(near[1] - near[0]) / 0.04 == pytest.approx(float(gradient.norm()), rel=0.1)


def test_refining_is_the_same_at_every_call_and_leaves_the_tokenizer_as_it_was(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    before = tokenizer.fingerprint
    assert torch.equal(tokenizer.encode(images, refine=2), tokenizer.encode(images, refine=2))
    assert tokenizer.fingerprint == before
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_an_evaluation_of_refined_tokens_says_so_and_scores_higher(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    def run(refine: int) -> dict:
        config = EvaluateConfig(
            tokenizer=str(small_run), images=str(imagenet_sample / "val"), out=str(tmp_path / str(refine)), limit=4, refine=refine,
            tolerance=False, cache="off", download=False,
        )  # fmt: skip
        return dict(run_quietly(evaluate(config)))

    plain, refined = run(0), run(8)
    assert refined["rows"]["rectified"]["psnr_db"] > plain["rows"]["rectified"]["psnr_db"] + 0.2
    assert refined["rows"]["vae"] == plain["rows"]["vae"]
    assert (plain["protocol"]["refine_steps"], refined["protocol"]["refine_steps"]) == (0, 8)
    assert "refined for each image in 8 steps" in refined["notes"]["refined"]
    assert "refined" not in plain["notes"]
    assert refined["round_trip"]["largest_difference"] == 0
