"""What a command prints when it is done: one JSON object, or a few lines for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from .reporting.tables import headline_table
from .terminal_text import printable, words

_FLAGS = {"already_complete", "dry_run"}


def finish(command: str, value: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a command made: one JSON object, or a few lines for people that end with what to do next."""
    if as_json:
        print(json.dumps(_finite(value)), flush=True)
        return
    summary = {"evaluate": _evaluation, "run": _evaluation, "info": _description, "compare": _comparison}.get(command, _made)
    lines = [*summary(value), *_next(command, value)]
    console = Console(highlight=False)
    for line in lines:
        if sys.stdout.isatty():
            console.print(Text(printable(line)))  # wrapped between words
        else:
            print(printable(line))
    sys.stdout.flush()


def _made(value: Mapping[str, Any]) -> list[str]:
    """Name and value of everything that a stage reports."""
    empty = [name for name, item in value.items() if item is None or item == {} or (item is False and name in _FLAGS)]
    pairs = {words(name): _told(name, item) for name, item in value.items() if name not in empty}
    width = max(map(len, pairs), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in pairs.items()]


def _next(command: str, value: Mapping[str, Any]) -> list[str]:
    """The command that comes after this one."""
    store, out = value.get("store", "STORE"), value.get("out", "OUT")
    following = {
        "encode-latents": f"revq fit-codebooks {store} CODEBOOKS",
        "fit-codebooks": f"revq train-rectifier {store} {out} RUN",
        "train-rectifier": f"revq evaluate {out} IMAGES EVALUATION",
    }
    if command == "encode-latents" and (value.get("dry_run") or value.get("split") != "train"):
        return []
    return [f"next: {following[command]}"] if command in following else []


def _evaluation(value: Mapping[str, Any]) -> list[str]:
    """The table of rows, why a figure is missing, tokens and bits, and where the report lies."""
    lines = [*_aligned(headline_table(value)), ""]
    # That PSNR of equal images is infinite stands in the table; what is no text, such as a list of files, is for metrics.json.
    lines += [f"{name}: {reason}" for name, reason in value.get("notes", {}).items() if isinstance(reason, str) and name != "psnr_db"]
    tokens, bits = value.get("tokens_per_image"), value.get("bits_per_image")
    lines.append(f"{value.get('images')} images, {tokens} tokens and {bits:g} bits per image" if tokens and bits else f"{value.get('images')} images")
    return [*lines, f"report: {value.get('report')}"]


def _comparison(value: Mapping[str, Any]) -> list[str]:
    """The table of `revq compare`, names to the left and numbers to the right."""
    return [*_aligned(value["table"]), *([f"report: {value['report']}"] if "report" in value else [])]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in table]


def _description(value: Mapping[str, Any]) -> list[str]:
    """What `revq info` found: pairs, and an indented block for each part."""
    plain = {name: item for name, item in value.items() if not isinstance(item, Mapping)}
    lines = [f"{value.get('path')}: {value.get('kind')}", *_made({name: item for name, item in plain.items() if name not in {"path", "kind"}})]
    for name, part in value.items():
        if name == "rows":
            lines += ["", *_evaluation(value)]
        elif name == "splits":
            lines += ["", *_splits(part)]
        elif isinstance(part, Mapping):
            lines += ["", f"{words(name)}:", *_made(part)]
    return lines


def _splits(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of a store's splits, then why images failed."""
    names = ("images", "views", "rows", "failed", "bytes", "compression", "state")
    cells = [["split", *names]]
    for name, split in splits.items():
        cells.append([name, *("-" if split[column] is None else _told(column, split[column]) for column in names)])
    lines = [f"  {line}" for line in _aligned(cells)]
    for name, split in splits.items():
        lines += ["", f"  source of {name}: {split['source']}, seed {split['seed']}"]
        lines += [f"  failed in {name}: {count} x {reason}" for reason, count in split["failures"].items()]
    return lines if splits else ["  no split yet"]


def _told(name: str, value: Any) -> str:
    """One value in a line, with the unit that its name carries."""
    if isinstance(value, Mapping):
        return ", ".join(f"{words(key)} {_told(key, item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return "(" + ",".join(_told(name, item) for item in value) + ")"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes"):
        return _bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _finite(value: Any) -> Any:
    """`value` with None for what JSON has no word for: infinity and not-a-number."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
