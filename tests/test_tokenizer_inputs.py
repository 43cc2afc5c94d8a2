"""What a tokenizer makes of whatever it is given: the right tokens, or one line that says what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from revq import FrozenVAE, ReVQTokenizer
from revq.errors import TokenizerError, VAEError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]


def refusal(call: Callable[..., Any], *given: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(TokenizerError) as caught:
        call(*given)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def pixels(images: Tensor) -> Tensor:
    """The images as they are in files: uint8 (4,3,64,64)."""
    return ((images + 1) * 127.5).round().byte()


# images


def test_bytes_give_the_tokens_of_the_same_picture_in_floats(tokenizer: ReVQTokenizer, images: Tensor, pixels: Tensor) -> None:
    assert torch.equal(pixels.float() / 127.5 - 1, images)
    for refine in (0, 1):
        assert torch.equal(tokenizer.encode(pixels, refine=refine), tokenizer.encode(images, refine=refine))
    assert torch.equal(tokenizer.reconstruct(pixels), tokenizer.reconstruct(images))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_of_every_width_are_rounded_as_they_are_and_no_more(dtype: torch.dtype, tokenizer: ReVQTokenizer, images: Tensor) -> None:
    rounded = images.to(dtype)
    assert torch.equal(tokenizer.encode(rounded), tokenizer.encode(rounded.float()))
    latents = tokenizer.vae.encode(images).to(dtype)
    assert torch.equal(tokenizer.encode_latents(latents), tokenizer.encode_latents(latents.float()))


@pytest.mark.parametrize(
    "layout",
    [
        lambda images: images.to(memory_format=torch.channels_last),
        lambda images: images.transpose(0, 1).contiguous().transpose(0, 1),
        lambda images: images.repeat_interleave(2, 3)[..., ::2],
        lambda images: images.clone().requires_grad_(),
    ],
    ids=["channels last", "strided batch", "strided rows", "with gradient"],
)
def test_the_layout_in_memory_does_not_matter(layout: Callable[[Tensor], Tensor], tokenizer: ReVQTokenizer, images: Tensor) -> None:
    given, indices = layout(images), tokenizer.encode(images)
    assert float((tokenizer.encode(given) == indices).float().mean()) > 0.99  # a convolution rounds by layout
    latents = tokenizer.vae.encode(images)
    assert torch.equal(tokenizer.encode_latents(layout(latents)), tokenizer.encode_latents(latents))
    assert torch.equal(tokenizer.decode(indices.T.contiguous().T), tokenizer.decode(indices))


def test_an_empty_batch_gives_empty_results(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    for none in (images[:0], torch.empty(0, 3, 64, 64, dtype=torch.uint8)):
        for refine in (0, 1):
            indices = tokenizer.encode(none, refine=refine)
            assert (tuple(indices.shape), indices.dtype) == ((0, 512), torch.int64)
        assert tokenizer.reconstruct(none).shape == (0, 3, 64, 64)
    latents = tokenizer.decode_latents(indices)
    assert latents.shape == (0, 32, 8, 8)
    assert tokenizer.encode_latents(latents).shape == (0, 512)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_picture_that_is_not_finite_is_named_and_gets_no_token(value: float, dtype: torch.dtype, tokenizer: ReVQTokenizer, images: Tensor) -> None:
    spoiled = images.to(dtype, copy=True)
    spoiled[2, 1, 5, 5] = value
    for refine in (0, 1):
        assert refusal(lambda given, steps: tokenizer.encode(given, refine=steps), spoiled, refine).startswith(
            "image 2 of the batch holds values that are not"
        )
    assert "image 2" in refusal(tokenizer.reconstruct, spoiled)
    latents = tokenizer.vae.encode(images).to(dtype)
    latents[1, 0, 0, 0] = value
    assert refusal(tokenizer.encode_latents, latents).startswith("latent 1 of the batch holds values that are not")


def test_a_picture_whose_latent_is_not_finite_gets_no_token(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    network = tokenizer.vae.network
    hook = network.encoder.register_forward_hook(lambda module, given, latents: latents / (torch.arange(4) != 3).float()[:, None, None, None])
    try:
        assert refusal(tokenizer.encode, images).startswith("latent 3 of the batch")
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda images: (images + 1) * 127.5, ["[-1,1]", "0 to 255", "/ 127.5 - 1", "uint8"]),
        (lambda images: 3 * images, ["[-1,1]", "-3 to 3"]),
        (lambda images: ((images + 1) * 127.5).int(), ["torch.int32", "uint8"]),
        (lambda images: images > 0, ["torch.bool"]),
        (lambda images: images.to(torch.complex64), ["torch.complex64"]),
        (lambda images: images[0], ["(B,3,64,64)", "found (3, 64, 64)", "images[None]"]),
        (lambda images: images[:, :1], ["(B,3,64,64)", "found (4, 1, 64, 64)"]),
        (lambda images: images.permute(0, 2, 3, 1), ["(B,3,64,64)", "found (4, 64, 64, 3)"]),
        (lambda images: images[..., :32], ["(B,3,64,64)", "found (4, 3, 64, 32)", "resize"]),
        (lambda images: images.numpy(), ["torch.Tensor", "ndarray", "torch.as_tensor"]),
        (lambda images: images.tolist(), ["torch.Tensor", "list", "torch.as_tensor"]),
        (lambda images: images.to("meta"), ["images", "meta device"]),
    ],
    ids=["0 to 255", "-3 to 3", "int32", "bool", "complex", "one image", "one channel", "channels last", "other size", "array", "list", "meta"],
)
def test_what_is_no_batch_of_images_is_refused(make: Callable[[Tensor], Any], words: list[str], tokenizer: ReVQTokenizer, images: Tensor) -> None:
    message = refusal(tokenizer.encode, make(images / images.abs().max()))
    assert [word for word in words if word not in message] == []


def test_what_a_sharp_filter_oversteps_is_taken(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    sharp = torch.nn.functional.interpolate(torch.nn.functional.interpolate(images.sign(), 40), 64, mode="bicubic")
    assert float(sharp.abs().max()) > 1.1
    assert tokenizer.encode(sharp).shape == (4, 512)


def test_the_vae_takes_every_float_and_no_bytes(tokenizer: ReVQTokenizer, images: Tensor, pixels: Tensor) -> None:
    vae: FrozenVAE = tokenizer.vae
    assert torch.equal(vae.encode(images.double()), vae.encode(images))
    latents = vae.encode(images)
    assert torch.equal(vae.decode(latents.double()), vae.decode(latents))
    with pytest.raises(VAEError, match=r"\[-1,1\], found torch\.uint8"):
        vae.encode(pixels)


# latents and indices


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda latents: latents[0], ["(B,32,8,8)", "found (32, 8, 8)"]),
        (lambda latents: latents[:, :4], ["(B,32,8,8)", "found (4, 4, 8, 8)"]),
        (lambda latents: latents.long(), ["float latents", "torch.int64"]),
        (lambda latents: latents.numpy(), ["torch.Tensor", "ndarray"]),
    ],
    ids=["one latent", "other channels", "integers", "array"],
)
def test_what_is_no_batch_of_latents_is_refused(make: Callable[[Tensor], Any], words: list[str], tokenizer: ReVQTokenizer, images: Tensor) -> None:
    message = refusal(tokenizer.encode_latents, make(tokenizer.vae.encode(images)))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_indices_of_any_integer_type_give_the_same_picture(dtype: torch.dtype, tokenizer: ReVQTokenizer, images: Tensor) -> None:
    indices = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(indices.to(dtype)), tokenizer.decode(indices))
    stored = torch.from_numpy(indices.numpy().astype(str(dtype).removeprefix("torch.")))
    assert torch.equal(tokenizer.decode_latents(stored), tokenizer.decode_latents(indices))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda indices: torch.where(indices == 3, -1, indices), ["[0,32)", "found -1 to"]),
        (lambda indices: torch.where(indices == 3, 32, indices), ["[0,32)", "to 32"]),
        (lambda indices: torch.full_like(indices, 200).to(torch.uint8), ["[0,32)", "found 200"]),
        (lambda indices: indices.numpy().astype(np.uint64) + np.uint64(2**63), ["torch.Tensor"]),
        (lambda indices: torch.from_numpy(indices.numpy().astype(np.uint64) + np.uint64(2**63)), ["[0,32)"]),
        (lambda indices: indices.float(), ["integer indices", "torch.float32"]),
        (lambda indices: indices > 3, ["integer indices", "torch.bool"]),
        (lambda indices: indices[:, :100], ["(B,512)", "found (4, 100)"]),
        (lambda indices: indices[0], ["(B,512)", "found (512,)", "indices[None]"]),
        (lambda indices: indices[None], ["(B,512)", "found (1, 4, 512)"]),
        (lambda indices: indices.tolist(), ["torch.Tensor", "list"]),
        (lambda indices: indices.to("meta"), ["indices", "meta device"]),
    ],
    ids=[
        "negative",
        "K",
        "uint8 beyond K",
        "array",
        "uint64 beyond int64",
        "float",
        "bool",
        "fewer tokens",
        "one image",
        "three axes",
        "list",
        "meta",
    ],
)
def test_what_is_no_batch_of_indices_is_refused(make: Callable[[Tensor], Any], words: list[str], tokenizer: ReVQTokenizer, images: Tensor) -> None:
    given = make(tokenizer.encode(images))
    for call in (tokenizer.decode, tokenizer.decode_latents):
        message = refusal(call, given)
        assert [word for word in words if word not in message] == []


def test_a_tokenizer_on_the_meta_device_says_that_it_has_no_weights(small_run: Any, images: Tensor) -> None:
    tokenizer = ReVQTokenizer.from_pretrained(small_run / "tokenizer").to("meta")
    assert "the tokenizer is on the meta device" in refusal(tokenizer.encode, images)


@pytest.mark.parametrize("refine", [-1, 1.5, True, "2"])
def test_what_is_no_number_of_steps_is_refused(refine: Any, tokenizer: ReVQTokenizer, images: Tensor) -> None:
    message = refusal(lambda given: tokenizer.encode(given, refine=refine), images)
    assert message == f"expected refine as a number of steps, 0 or more, found {refine!r}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_refused(tokenizer: ReVQTokenizer, images: Tensor) -> None:
    assert refusal(tokenizer.encode, images.to_sparse()) == "expected images as a dense tensor, found a torch.sparse_coo one"
    assert refusal(tokenizer.encode, torch.nested.nested_tensor(list(images))) == "expected images as a dense tensor, found a nested one"
    assert refusal(tokenizer.decode, tokenizer.encode(images).to_sparse()) == "expected indices as a dense tensor, found a torch.sparse_coo one"
