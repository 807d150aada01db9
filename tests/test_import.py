"""What an import costs, and which part of the package may know which."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import syncbn

PACKAGE = Path(syncbn.__file__).parent
HEAVY = ["triton", "lightning", "deepspeed", "matplotlib", "torchmetrics", "cv2", "tensorboard", "jsonargparse", "rich"]
HEAVY_TORCH = ["torch._dynamo", "torch._inductor", "torch.fx.experimental", "torch.testing", "torch.utils.tensorboard"]
ORDER = [
    "files",
    "random_streams",
    "recipes",
    "run_folders",
    "verbs",
    "options",
    "paths",
    "pictures",
    "progress",
    "ops",
    "collectives",
    "recomputing",
    "functional",
    "exchange",
    "nn",
    "grouping",
    "preprocessing",
    "models",
    "data",
    "inference",
    "training",
    "doctor",
    "experiments",
    "benchmarks",
    "errors",
    "cli",
]
COLLECTIVES = {
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "monitored_barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "recv",
    "isend",
    "irecv",
    "new_group",
    "new_subgroups",
}


def modules_after(statement):
    """Names in sys.modules of a fresh interpreter that ran `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def imported():
    return modules_after("import torch"), modules_after("from syncbn import *")


def test_import_brings_nothing_heavy(imported):
    before, after = imported
    new = after - before
    assert [m for m in HEAVY if m in after and m not in before] == []
    assert [m for m in HEAVY_TORCH if any(n == m or n.startswith(m + ".") for n in new)] == []


def test_import_brings_little_besides_itself(imported):
    """Counted in modules, which is steadier than seconds: torch brings about two thousand."""
    before, after = imported
    new = {m for m in after - before if not m.startswith("syncbn")}
    assert len(new) < 40, sorted(new)


def test_import_alone_brings_no_torch_and_its_names_bring_themselves():
    assert "torch" not in modules_after("import syncbn, syncbn.cli")
    code = (
        "import syncbn; before = {*dir(syncbn)}; syncbn.new_group; assert before == {*dir(syncbn)}; syncbn.ops.common"
    )
    assert "torch" in modules_after(f"{code}; import pickle; pickle.loads(pickle.dumps(syncbn.SyncBatchNorm(1)))")


def test_parts_without_the_trainer():
    loaded = modules_after("import syncbn.nn, syncbn.ops, syncbn.models, syncbn.collectives.reduction")
    assert [m for m in ("lightning", "deepspeed", "matplotlib", "cv2") if m in loaded] == []


def test_public_names():
    for name in syncbn.__all__:
        assert getattr(syncbn, name) is not None
    wanted = {
        "SyncBatchNorm",
        "sync_batch_norm_group",
        "convert_sync_batchnorm",
        "revert_sync_batchnorm",
        "estimate_population_statistics",
        "fold_batch_norm",
        "new_group",
    }
    assert wanted <= set(syncbn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = syncbn.nothing


# ---- which part imports which --------------------------------------------------------------------


def files():
    return sorted(
        p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py") or p.parent != PACKAGE
    )


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(tree):
    """The parts of syncbn that a module's import statements name, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "syncbn":
                yield rest.split(".")[0] or "syncbn"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    part = part_of(path)
    assert part in ORDER, f"{part} has no place in the order of the package"
    found = set(imported_parts(ast.parse(path.read_text())))
    allowed = set(ORDER[: ORDER.index(part) + 1])
    if part == "data":
        allowed -= {"models", "nn", "functional"}
    if part == "ops":
        allowed = {"ops"}
    allowed |= {"__version__"}
    assert found <= allowed, f"{part} may import {sorted(allowed)}"


def calls_of_collectives(tree):
    """Collectives called through torch.distributed, by whatever name it goes in the file."""
    names = {"dist", "distributed", "c10d", "funcol"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            yield from (alias.name for alias in node.names if alias.name in COLLECTIVES)
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = ast.unparse(node.value)
            if owner in names - {"distributed"} or owner.startswith(("torch.distributed", "torch.ops")):
                yield f"{owner}.{node.attr}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_one_folder_calls_collectives(path):
    found = list(calls_of_collectives(ast.parse(path.read_text())))
    if part_of(path) == "benchmarks":  # where the algorithms of others have their own
        return
    assert found == [] or part_of(path) == "collectives", found


def test_the_search_for_collectives_finds_them():
    for text in (
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.barrier()",
        "from torch.distributed import broadcast",
        "torch.ops._c10d_functional.all_reduce(x)",
    ):
        assert list(calls_of_collectives(ast.parse(text))), text


def neighbours(folder):
    """Which entries of a folder import which others of it."""
    prefix = ("syncbn", *folder.relative_to(PACKAGE).parts)
    found = {}
    for path in folder.rglob("*.py"):
        if path == folder / "__init__.py":
            continue
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    name = (*node.module.split("."), alias.name)
                    if name[: len(prefix)] == prefix and len(name) > len(prefix) and name[len(prefix)] != own:
                        found.setdefault(own, set()).add(name[len(prefix)])
    return found


@pytest.mark.parametrize("folder", ["training", "data", "models", "benchmarks", "collectives", "functional", "nn"])
def test_imports_within_a_folder_run_one_way(folder):
    graph = neighbours(PACKAGE / folder)
    assert graph
    TopologicalSorter(graph).prepare()
