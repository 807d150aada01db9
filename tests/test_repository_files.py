"""Files for the people and machines around the repository: citation, security, issues, continuous integration."""

import os
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from syncbn.cli import main

REPOSITORY = Path(__file__).parents[1]
GITHUB = REPOSITORY / ".github"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation), "what the format requires"
    assert citation["version"] == version("syncbn")
    assert citation["license"] == "Apache-2.0"


def steps_of(workflow: str) -> list[str]:
    """The commands of a workflow."""
    jobs = yaml.safe_load((GITHUB / "workflows" / workflow).read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_workflows_run_what_there_is():
    assert steps_of("ci.yml") == [".ci/run"]
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
    assert steps_of("docs.yml") == ["make docs"]
    subprocess.run(["make", "--dry-run", "docs"], cwd=REPOSITORY, check=True, capture_output=True, timeout=60)


def test_the_form_for_bugs_asks_for_what_the_doctor_writes(capsys):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {field["id"]: field["attributes"] for field in form["body"] if "id" in field}
    assert all(field["label"] for field in fields.values())
    [command] = re.findall(r"^ *(syncbn doctor .*)$", fields["doctor"]["description"], flags=re.MULTILINE)
    words = shlex.split(command)
    assert (REPOSITORY / words[words.index("--config") + 1]).is_file()
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert words[-2] == "--doctor.json" and words[-2] in capsys.readouterr().out
