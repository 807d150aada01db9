"""The documentation builds without a warning, its examples run, and what it points to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_import import ORDER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SIGNPOSTS = [ROOT / "CONTRIBUTING.md", *(DOCS / f"{name}.md" for name in ("how_it_works", "extending", "glossary"))]
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in sorted(DOCS.glob("*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(code)
    launcher = re.match(r"# torchrun (.*)\n", code)
    words = ["-m", "torch.distributed.run", *launcher[1].split()] if launcher else []
    done = subprocess.run(
        [sys.executable, *words, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_pages_build(tmp_path):
    pytest.importorskip("sphinx", reason="pip install 'syncbn[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "api.html").read_text().count("sync_batch_norm_group") > 0


def in_code_style(page):
    """What a page has in backticks, besides its examples and what only stands for a name (FORMAT, NAME)."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}
    return {span for span in found if not re.search(r"FORMAT|NAME|PARAMETER", span)}


@pytest.fixture(scope="module")
def words_of_the_code():
    """Every word of the package and its tests, and the names of their files."""
    files = [
        path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp")
    ]
    return {path.stem for path in files}.union(*(re.findall(r"\w+", path.read_text()) for path in files))


def is_there(path):
    """From the repository or the package on; a name alone may be anywhere below."""
    if "/" in path.rstrip("/"):
        return any(any(place.glob(path)) for place in (ROOT, ROOT / "src" / "syncbn"))
    return any(any(ROOT.glob(pattern)) for pattern in (path, f"src/**/{path}", f"tests/**/{path}"))


@pytest.mark.parametrize("page", SIGNPOSTS, ids=lambda page: page.stem)
def test_what_is_named_is_there(page, words_of_the_code):
    spans = in_code_style(page)
    paths = {span for span in spans if re.fullmatch(r"[\w*./]+(/|\.(py|cpp|md|toml))", span)}
    assert {path for path in paths if not is_there(path)} == set()
    names = {span for span in spans - paths if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span)}
    assert {name for name in names if not set(re.findall(r"\w+", name.partition("(")[0])) <= words_of_the_code} == set()


def test_the_table_of_the_package_is_in_the_order_of_imports():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("## To add")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    assert [name for cell in cells for name in re.findall(r"`(\w+)[./]", cell)] == ORDER
