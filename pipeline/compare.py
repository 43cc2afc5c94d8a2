"""Several evaluations side by side: one table, and what stands between their numbers and a fair comparison.

Command: revq compare EVALUATION... [--out FOLDER]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from ..files import local_path, read_json, write_bytes
from ..lock import naming_writer, writer_of
from ..stages import ranks
from ..stages.events import Event, Note, Result
from ..stages.output_folder import note_on_writer, output_folder
from .reporting.html import comparison_page
from .reporting.markdown import markdown_table
from .reporting.tables import COLUMNS, METRICS_NAME, headline_table, metric_text, number

COMPARISON_KIND = "revq-comparison"
_ALIKE = {
    "protocol": ("protocol", "name"),
    "image size": ("protocol", "image_size"),
    "images": ("fingerprints", "images"),
    "weights of rfid": ("protocol", "weights", "rfid", "sha256"),
    "weights of lpips_alex": ("protocol", "weights", "lpips_alex", "sha256"),
    "weights of lpips_vgg": ("protocol", "weights", "lpips_vgg", "sha256"),
    "decoder precision": ("protocol", "precision"),
}


def compare(evaluations: Sequence[str], *, out: str | None = None) -> Iterator[Event]:
    """Put finished evaluations side by side; with `out`, write compare.html and compare.md there.

    Raises:
        ConfigError: fewer than two evaluations; one that is named twice counts once.
        OutputError: one of them is not finished, or `out` holds something else or cannot be written.
    """
    named: dict[Path, str] = {}
    for name in evaluations:
        named.setdefault(local_path(name).resolve(), name)
    names = list(named.values())
    if len(names) < 2:
        told = f"{names[0]} alone is named, {len(evaluations)} times" if len(evaluations) > 1 else f"there is {len(names)}"
        raise ConfigError(f"a comparison needs at least two evaluations, and {told}; give the folders of revq evaluate")
    for name in names:
        yield from note_on_writer(name)
    found = {name: _read(name) for name in names}
    names = short_names(names)
    table, differences = comparison_table(list(found.values()), names), unlike(list(found.values()), names)
    for text in differences:
        yield Note(text=text, warning=True)
    value: dict[str, Any] = {"table": table, "differences": differences, "evaluations": {name: _values(each) for name, each in found.items()}}
    if out is not None:
        with output_folder(out, kind=COMPARISON_KIND, command="compare") as folder:
            folder.claim({})
            value["report"] = str(ranks.on_first(lambda: _write(folder.path, table, differences)))
    yield Result(value=value)


def _read(name: str) -> dict[str, Any]:
    folder = local_path(name)
    with naming_writer(name, lambda: writer_of(folder)):
        metrics = read_json(folder / METRICS_NAME)
        if metrics is None or "rows" not in metrics:
            raise OutputError(
                f"{name} holds no finished evaluation ({METRICS_NAME} is missing or is none); give the folder of a finished revq evaluate"
            )
    return metrics


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without what they have in common at either end, so that a column stays narrow."""
    parts = [Path(path).parts for path in paths]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), 0)
    names = ["/".join(part[start : len(part) - end]) for part in parts]
    return names if all(names) and len(set(names)) == len(names) else list(paths)


def comparison_table(evaluations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """Rows of text, the heading first: every evaluation's rectified row, with the ceiling that its VAE sets beside it."""
    columns = [name for name in COLUMNS if any(each["rows"]["rectified"].get(name) is not None for each in evaluations)]
    labels = {str(each.get("rfid_label")) for each in evaluations}
    titles = dict(zip(COLUMNS, headline_table(_with_all(evaluations[0]))[0][1:], strict=True))
    titles["rfid"] = f"{labels.pop()} ↓" if len(labels) == 1 else "rFID@n ↓"
    head = ["tokenizer", "tokens", "codes", "bits", "bits/px", *(titles[name] for name in columns), "VAE PSNR", "recovered", "used codes"]
    table = [head]
    for name, each in zip(names, evaluations, strict=True):
        row, usage = each["rows"]["rectified"], each["codebook_usage"]
        won = (each.get("recovered") or {}).get("psnr_db")
        values = [metric_text(row, column) + (f" ({each['rfid_label']})" if column == "rfid" and labels else "") for column in columns]
        sizes = [f"{each['tokens_per_image']:,}", f"{usage['codes']:,}", f"{each['bits_per_image']:,.0f}", f"{each['bits_per_pixel']:.3f}"]
        more = [number(each["rows"]["vae"]["psnr_db"], 2), "–" if won is None else f"{won:.0%}", f"{usage['usage']['median']:.0%}"]
        table.append([name, *sizes, *values, *more])
    return table


def unlike(evaluations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """What differs between the evaluations that their numbers depend on, one sentence each."""
    sentences = []
    for title, path in _ALIKE.items():
        values = [_at(each, path) for each in evaluations]
        if len(set(values)) > 1:
            told = ", ".join(f"{name}: {_short(value)}" for name, value in zip(names, values, strict=True))
            sentences.append(f"not comparable: {title} differ ({told})")
    steps = [_at(each, ("protocol", "refine_steps")) or 0 for each in evaluations]
    if len(set(steps)) > 1:
        told = ", ".join(f"{name}: {value}" for name, value in zip(names, steps, strict=True))
        sentences.append(f"tokens were refined for unlike numbers of steps ({told}), which cost time when encoding")
    return sentences


def _with_all(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with a value in every column, so that every column has a heading."""
    return {**metrics, "rows": {"rectified": {name: metrics["rows"]["rectified"].get(name) or 0.0 for name in COLUMNS}}}


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:16]


def _values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    names = ("images", "rfid_label", "rows", "recovered", "tokens_per_image", "bits_per_image", "bits_per_pixel", "codebook_usage", "fingerprints")
    return {name: metrics.get(name) for name in names}


def _write(out: Path, table: Sequence[Sequence[str]], differences: Sequence[str]) -> Path:
    """compare.md and compare.html in `out`; returns the path of the latter."""
    lines = ["# Tokenizers compared", "", *markdown_table(table), "", *(f"- {text}" for text in differences)]
    write_bytes(out / "compare.md", ("\n".join(lines).rstrip() + "\n").encode())
    write_bytes(out / "compare.html", comparison_page(table, differences).encode())
    return out / "compare.html"
