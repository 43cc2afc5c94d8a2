"""What the documentation site takes from the code, so that nothing is written twice: a hook of MkDocs (mkdocs.yml names it).

A line of a page such as `<!-- made: command encode-latents -->` is replaced by what `command("encode-latents")` returns. Commands and
options come from `stages/configs.py` and `cli.py`, presets from their files; nothing of torch is imported, nor of MkDocs."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import tomllib
from importlib.resources import files
from typing import Any

import click
import typer

from revq.cli import app
from revq.pipeline.config import _SET_BY_RUN, TABLES, preset_names
from revq.stages.configs import DC_AE, Described, describe

_MARK = re.compile(r"<!-- made: (\w+)(?: ([\w-]+))? -->")
_PAGE = re.compile(r"docs/([\w/-]+)\.md")
_FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>""")
_KINDS = {int: "whole number", float: "number", str: "text"}
_PRESETS = ("demo", "revq-512", "paper-512", "paper-256-64k", "paper-256-256k")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the source of each page."""
    makers = {"command": command, "configuration": configuration, "presets": presets}
    return _MARK.sub(lambda mark: makers[mark[1]](*filter(None, [mark[2]])), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """MkDocs calls this with the HTML of each page. A reader's browser must fetch nothing from elsewhere.

    Raises:
        ValueError: it would.
    """
    if fetched := _FETCHED.search(output):
        raise ValueError(f"{page.file.src_uri} would make a browser fetch from elsewhere: {fetched[0]}")
    return output


def command(name: str) -> str:
    """Everything about one command: what it does, how it is called, an example, its arguments and options."""
    found = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    what, _, example = (found.help or "").partition("[dim]Example:[/]")
    arguments = [one for one in found.params if one.param_type_name == "argument"]
    places = " ".join(_place(one) for one in arguments)
    called = f"revq {name} {places} [OPTIONS]".replace("  ", " ")
    parts = [what.strip(), _code(called), "Example:", _code(" ".join(example.split()))]
    if name in TABLES:
        parts += [_settings(name), _table(("Option", "Default", "Meaning"), [_row(name, one) for one in found.params[-1:]])]
    else:
        parts.append(_table(("Argument or option", "Default", "Meaning"), [_row(name, one) for one in found.params]))
    return "\n\n".join(parts)


def _place(argument: click.Parameter) -> str:
    name = argument.metavar or str(argument.name).upper()
    return f"{name if argument.required else f'[{name}]'}{'...' if argument.nargs == -1 else ''}"


def _settings(name: str) -> str:
    """A stage's arguments, and a table of options for each panel of `--help`."""
    settings = describe(TABLES[name])
    arguments = [(f"`{one.name.upper()}`", _meaning(one)) for one in settings if one.setting is None]
    parts = [_table(("Argument", "Meaning"), arguments)]
    for panel in dict.fromkeys(one.setting.panel for one in settings if one.setting):
        rows = [
            (f"`{one.option}`{{ #{name}-{one.name.replace('_', '-')} }}", _default(one), _meaning(one))
            for one in settings
            if one.setting and one.setting.panel == panel
        ]
        parts.append(f"**{panel}**\n\n{_table(('Option', 'Default', 'Meaning'), rows)}")
    return "\n\n".join(parts)


def _row(name: str, parameter: click.Parameter) -> tuple[str, str, str]:
    """A parameter that is no setting of a stage, as typer knows it."""
    shown, default = getattr(parameter, "show_default", None), parameter.default
    text = shown if isinstance(shown, str) else "off" if default is False else f"`{default}`" if default else ""
    is_argument = parameter.param_type_name == "argument"
    spelled = _place(parameter) if is_argument else f"{parameter.opts[0]}"
    anchor = "" if is_argument else f"{{ #{name}{parameter.opts[0][1:]} }}"
    return f"`{spelled}`{anchor}", "" if parameter.required else text, str(getattr(parameter, "help", ""))


def _default(one: Described) -> str:
    if one.kind is bool:
        return "off"
    return one.setting.none if one.default is None and one.setting else f"`{_toml(one.default).strip(chr(34))}`"


def _meaning(one: Described) -> str:
    text = " ".join(filter(None, [one.help, one.details, _allowed(one)]))
    return _PAGE.sub(r"[\1](../\1.md)", text)


def _allowed(one: Described) -> str:
    """Values that the check lets pass, in words."""
    rule = one.setting
    if rule is None or one.kind is bool or (one.kind is str and not one.choices):
        return ""
    if one.choices:
        return f"One of {', '.join(f'`{choice}`' for choice in one.choices)}."
    bounds = [
        f"a multiple of {rule.multiple_of}" if rule.multiple_of else "",
        f"at least {rule.at_least:g}" if rule.at_least is not None else "",
        f"above {rule.above:g}" if rule.above is not None else "",
        f"below {rule.below:g}" if rule.below is not None else "",
    ]
    return f"A {', '.join(filter(None, [_KINDS[one.kind], *bounds]))}."


def configuration() -> str:
    """A whole configuration file: every setting that it may hold, each at its default."""
    lines = ['out = "runs/mine"']
    for table, config in TABLES.items():
        lines += ["", f"[{table}]"]
        if table == "encode-latents":
            lines += ['train = "imagenet/train"', 'val = "imagenet/val"']
        for one in describe(config):
            if one.name in _SET_BY_RUN or (one.name == "images" and table == "encode-latents"):
                continue
            required = one.default is dataclasses.MISSING
            value = f"# {one.name} =  # {one.setting.none}" if one.default is None and one.setting else f"{one.name} = {_toml(one.default)}"
            lines.append(f"# {one.name} =  # val of [encode-latents]" if required else value)
    return _code("\n".join(lines), "toml")


def presets() -> str:
    """What every preset says, a table for each stage; an empty cell is the stage's own default."""
    said = {name: tomllib.loads(files("revq.pipeline").joinpath("presets", f"{name}.toml").read_text()) for name in _PRESETS}
    assert sorted(said) == preset_names()
    parts = []
    for table in TABLES:
        keys = dict.fromkeys(key for tables in said.values() for key in tables.get(table, {}) if key not in ("train", "val"))
        rows = [(f"`{key}`", *(_cell(said[name].get(table, {}).get(key)) for name in _PRESETS)) for key in keys]
        if rows:
            parts.append(f"### {table}\n\n{_table(('', *(f'`{name}`' for name in _PRESETS)), rows)}")
    return "\n\n".join(parts)


def _cell(value: object) -> str:
    return "" if value is None else "DC-AE f32c32" if value == DC_AE else _toml(value).strip('"')


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f'"{value}"' if isinstance(value, str) else str(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{textwrap.dedent(text)}\n```"
