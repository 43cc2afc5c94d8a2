"""The product of train-rectifier: the tokenizer folder, and what the command prints of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...files import local_path, read_json
from ...models.codebooks import Codebooks
from ...models.rectifier import parameter_count
from ...models.tokenizer import FORMAT_VERSION, TOKENIZER_KIND, ReVQTokenizer
from .. import ranks
from ..configs import TrainRectifierConfig
from .data import Inputs
from .state import TrainState


def is_complete(out: Path, planned: tuple[int, int]) -> bool:
    """Whether the tokenizer of this very plan is there; one of fewer steps is replaced when the run has been made longer.

    Raises:
        OutputError: the run is already longer.
    """
    made = ranks.broadcast(read_json(out / "tokenizer" / "config.json"))
    if made is None:
        return False
    steps = made.get("planned_steps", list(planned))
    if steps[0] > planned[0]:
        raise OutputError(f"{out} has been trained for {steps[0]} steps, more than the {planned[0]} asked for; choose another folder")
    return bool(steps == list(planned))


def build_tokenizer(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, fitted: Codebooks, step: int) -> ReVQTokenizer:
    """Transform, codebooks and averaged rectifier of a state that has reached its end and holds the weights of `step`."""
    tokens, codes, _ = fitted.codebooks.shape
    encoding = inputs.store.encoding
    row = next(row for row in state.evaluations if row["step"] == step)
    tokenizer = ReVQTokenizer(
        {
            "kind": TOKENIZER_KIND,
            "format_version": FORMAT_VERSION,
            "tokens": tokens,
            "codes": codes,
            "latent_shape": list(encoding.latent_shape),
            "image_size": encoding.image_size,
            "resize_filter": encoding.resize_filter,
            "crop": encoding.crop,
            "transform": fitted.identity["transform"],
            "rectifier": state.rectifier.settings if config.width else None,
            "vae": encoding.vae,
            "store_fingerprint": inputs.store.fingerprint,
            "metrics": {"val_mse_quantized": row["val_mse_quantized"], "val_mse_rectified": row["val_mse_rectified"]},
            "validated_on": inputs.val_name,
            "steps": state.total_steps,
            "weights_of_step": step,
            "planned_steps": list(state.planned),
        }
    )
    tokenizer.transform.load_state_dict(fitted.transform.state_dict())
    tokenizer.quantizer.load_state_dict(state.quantizer.state_dict())
    if tokenizer.rectifier is not None:
        tokenizer.rectifier.load_state_dict(state.ema.state_dict())
    return tokenizer


def save_tokenizer(tokenizer: ReVQTokenizer, folder: Path) -> None:
    """The folder appears under its name only when it is whole; that of a shorter run makes way for it."""
    temporary, shorter = (folder.with_name(f".{folder.name}{suffix}.tmp") for suffix in ("", ".shorter"))
    for left in (temporary, shorter):
        shutil.rmtree(left, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        folder.rename(shorter)
    temporary.rename(folder)
    shutil.rmtree(shorter, ignore_errors=True)


def result(config: TrainRectifierConfig, tokenizer: ReVQTokenizer) -> dict[str, Any]:
    """What `--json` prints."""
    rectifier = tokenizer.rectifier
    return {
        "out": config.out,
        "tokenizer": str(local_path(config.out) / "tokenizer"),
        "steps": tokenizer.config["steps"],
        "weights_of_step": tokenizer.config["weights_of_step"],
        "tokens": tokenizer.tokens,
        "codes": tokenizer.codes,
        "bits_per_image": tokenizer.bits_per_image,
        "rectifier_parameters": 0 if rectifier is None else parameter_count(rectifier.requires_grad_(True)),
        "fingerprint": tokenizer.fingerprint,
        **tokenizer.config["metrics"],
        "validated_on": tokenizer.config["validated_on"],
    }
