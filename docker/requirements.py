"""Prints what syncbn requires, with some of its extras: ``python3 requirements.py imagenet,export``.

The image has a layer of these, which a change of the code leaves alone.
"""

import sys
from pathlib import Path

import tomllib

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [extra for extra in sys.argv[1].split(",") if extra]
unknown = sorted(set(extras) - set(project["optional-dependencies"]))
if unknown:
    sys.exit(f"no extra {', '.join(unknown)}: there are {', '.join(project['optional-dependencies'])}")
print(
    *project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra]), sep="\n"
)
