"""The documentation builds without a warning, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
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
