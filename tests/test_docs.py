"""The documentation is about this very code: pages, options and commands that it names are there. `make docs` checks links within the site."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import site_pages
import typer

from revq import cli
from revq.pipeline.config import TABLES, load_plan
from revq.stages.configs import describe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
SOURCES = sorted(path for kind in ("*.py", "*.toml", "*.md") for path in ROOT.rglob(kind) if not {".venv", "site", "build"} & {*path.parts})


def of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_page_that_the_code_names_exists():
    named = {(of(path), page) for path in SOURCES for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|png|jpg)\b", path.read_text())}
    assert len(named) > 10
    assert {(path, page) for path, page in named if not (ROOT / page).is_file()} == set()


@pytest.mark.parametrize("path", TEXTS, ids=of)
def test_what_a_text_links_to_exists(path: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", TEXTS, ids=of)
def test_lines_are_short_but_for_tables(path: Path):
    in_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        in_code ^= line.startswith("```")
        is_code = in_code or line.startswith("    ")
        assert line.startswith("|") or len(line) <= (108 if "](" in line or is_code else 100), f"line {number}: {line}"


def commands_of(path: Path) -> list[list[str]]:
    """Calls of revq in the code of a text, in words, the first of them the command."""
    text = path.read_text().replace("\\\n", " ")
    code = "\n".join([*re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"^    .*$", text, re.MULTILINE)])
    code += "\n" + "\n".join(re.findall(r"`(revq [^`]+)`", text))
    lines = [re.sub(r"^.*-m revq ", "revq ", line.strip()) for line in code.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("revq ")]


@pytest.mark.parametrize("path", [path for path in TEXTS if commands_of(path)], ids=of)
def test_every_command_that_a_text_shows_is_one(path: Path):
    for name, *words in commands_of(path):
        if name.startswith("--"):
            continue
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
        given = {word.strip("[]").split("=")[0] for word in words if word.lstrip("[").startswith("--")}
        assert given <= options, f"revq {name} has no {', '.join(given - options)}"


@pytest.mark.parametrize("path", [path for path in TEXTS if "```python" in path.read_text()], ids=of)
def test_the_python_of_a_text_is_python(path: Path):
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        compile(code, of(path), "exec")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_option_of_a_command_with_its_help(name: str):
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    assert f"## revq {name}\n\n<!-- made: command {name} -->" in page
    rows = [line for line in site_pages.command(name).splitlines() if line.startswith("| `")]
    for parameter in COMMANDS[name].params:
        spelled = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        (row,) = [row for row in rows if re.match(rf"\| `\[?{re.escape(spelled)}\]?(?:\.\.\.)?`", row)]
        assert parameter.help.split(" (")[0].rstrip(".") in row
    if name in TABLES:
        rows = {row.split("`")[1]: row for row in rows}
        for one in describe(TABLES[name]):
            if one.kind is not bool and one.setting and one.default is not None:
                default = rows[one.option].split(" | ")[1].strip("`")
                assert one.kind(default) == one.default


def test_the_configuration_file_of_the_reference_is_the_defaults(tmp_path: Path):
    path = tmp_path / "all.toml"
    path.write_text(site_pages.configuration().removeprefix("```toml\n").removesuffix("```"))
    said = {line.split(" =")[0].lstrip("# ") for line in path.read_text().splitlines() if " =" in line}
    plan = load_plan(path)
    short = tmp_path / "short.toml"
    short.write_text('out = "runs/mine"\n[encode-latents]\ntrain = "imagenet/train"\nval = "imagenet/val"\n')
    assert plan == load_plan(short)
    assert plan != replace(plan, out=tmp_path)
    run_sets = {"store", "codebooks", "out", "tokenizer", "split", "val_split", "overwrite", "dry_run"}
    assert {one.name for config in TABLES.values() for one in describe(config)} - run_sets - said == set()


def test_a_page_that_would_fetch_from_elsewhere_is_refused():
    class Page:
        class file:  # noqa: N801
            src_uri = "index.md"

    for html in ('<script src="https://cdn.example/x.js"></script>', '<link rel="stylesheet" href="//fonts.example/a.css">'):
        with pytest.raises(ValueError, match=r"index\.md would make a browser fetch from elsewhere: <"):
            site_pages.on_post_page(html, Page)
    link = '<a href="https://arxiv.org/abs/2507.10547">paper</a><script src="assets/x.js"></script>'
    assert site_pages.on_post_page(link, Page) == link
