"""README and docs: links lead somewhere, commands exist, and every public name is in the reference."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from syncbn.benchmarks.command import SECTIONS, parser
from syncbn.verbs import MODULES, OF_TRAINER

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PACKAGES = ["syncbn", "syncbn.nn", "syncbn.models", "syncbn.training", "syncbn.data"]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def without_blocks(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The places in a page that a link can name, as GitHub and MyST make them from headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", re.sub(r"`[^`]+`", "", without_blocks(page))):
        path, _, anchor = " ".join(link.split()).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def command_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [
        line for line in lines if re.match(r"(syncbn|sbatch|launch/\S+|torchrun|srun syncbn|FIRST_NODE=\S+) ", line)
    ]


@each_page
def test_commands_name_verbs_and_files_that_there_are(page):
    for line in command_lines(page):
        words = shlex.split(line, comments=True)
        if "syncbn" in words:
            assert words[words.index("syncbn") + 1] in {*OF_TRAINER, *MODULES}, line
        for word in words:
            if word.startswith(("configs/", "launch/", "examples/")):
                assert (REPOSITORY / word).is_file(), line


def test_benchmarks_have_the_options_that_the_pages_name():
    commands = {command for page in PAGES for command in re.findall(r"`syncbn benchmark (--.*?)`", page.read_text())}
    assert len(commands) > 5
    for command in commands:
        assert parser().parse_args(shlex.split(command)).section in SECTIONS


def test_every_public_name_is_in_the_reference():
    """By object: a function that two packages export needs one entry."""
    documented, module = [], None
    for directive, name in re.findall(
        r"^\.\. (currentmodule|auto\w+):: (\S+)$", (REPOSITORY / "docs/api.md").read_text(), flags=re.MULTILINE
    ):
        if directive == "currentmodule":
            module = importlib.import_module(name)
        else:
            assert name in module.__all__, f"{module.__name__}.{name} is not public"
            documented.append(getattr(module, name))
    public = {f"{name}.{export}" for name in PACKAGES for export in importlib.import_module(name).__all__}
    missing = {name for name in public if not any(resolve(name) is entry for entry in documented)}
    assert not missing
    assert len(documented) == len({id(entry) for entry in documented}), "one entry each"


def resolve(name: str):
    package, _, export = name.rpartition(".")
    return getattr(importlib.import_module(package), export)
