"""docs/migrating.md: every row of its tables does what it says."""

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import syncbn
from ranks import run_ranks
from syncbn.training.strategies.ddp import BUFFER_OPTION

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
C = 3


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """As detectron2's: a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's, which the conversion knows by its name and module: normalise, drop, activate."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class FrozenBatchNorm2d(nn.Module):
    """As detectron2's and torchvision's: buffers only."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def get_norm(norm: Callable[[int], nn.Module], out_channels: int) -> nn.Module:
    """What detectron2's does with anything that is no name."""
    return norm(out_channels)


def rows() -> list[tuple[str, str]]:
    """The first two cells of each row of the tables."""
    cells = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    return [(row[0], row[1]) for row in cells if row[0] != "before" and not row[0].startswith("---")]


def code_of(cell: str) -> str:
    return re.findall(r"`([^`]+)`", cell)[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C))


@pytest.fixture
def names(tmp_path, float64):
    """What the snippets may use, in a world of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.manual_seed(1)
    x = torch.randn(4, C, 6, 6) * 3 + 1
    from lightning.pytorch import Trainer

    yield {
        "syncbn": syncbn,
        "torch": torch,
        "C": C,
        "x": x,
        "z": torch.randn_like(x),
        "x_nhwc": x.movedim(1, -1),
        "net": network(),
        "group": dist.group.WORLD,
        "get_norm": get_norm,
        "FrozenBatchNorm2d": FrozenBatchNorm2d,
        "DistributedDataParallel": DistributedDataParallel,
        "Trainer": lambda **options: Trainer(accelerator="cpu", devices=1, barebones=True, **options),
    }
    dist.destroy_process_group()


def is_layer(layer: Any, names: dict[str, Any]) -> None:
    assert type(layer) is syncbn.SyncBatchNorm
    reference = nn.BatchNorm2d(C, layer.eps, layer.momentum)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(names["x"]), reference(names["x"]))
    torch.testing.assert_close(layer.running_var, reference.running_var)


def has_arguments(layer: Any, names: dict[str, Any]) -> None:
    is_layer(layer, names)
    assert (layer.eps, layer.momentum, layer.process_group) == (1e-3, 0.01, names["group"])


def has_group(layer: Any, names: dict[str, Any]) -> None:
    is_layer(layer, names)
    assert layer.process_group is names["group"]


def is_converted(net: Any, names: dict[str, Any]) -> None:
    assert net is names["net"]
    assert type(net[1]) is type(net[3]) is syncbn.SyncBatchNorm
    torch.testing.assert_close(net(names["x"]), network()(names["x"]))


def is_taken_over(net: Any, names: dict[str, Any]) -> None:
    is_converted(net, names)
    assert net[1].process_group is names["group"] and net[3].process_group is names["group"]


def is_reverted(net: Any, names: dict[str, Any]) -> None:
    assert net is names["net"]
    assert [type(net[place]) for place in (1, 3)] == [nn.BatchNorm2d, nn.SyncBatchNorm]


def normalised(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def is_relu(y: Any, names: dict[str, Any]) -> None:
    torch.testing.assert_close(y, normalised(names["x"]).relu())


def is_relu_of_sum(y: Any, names: dict[str, Any]) -> None:
    torch.testing.assert_close(y, (normalised(names["x"]) + names["z"]).relu())


def is_nhwc(y: Any, names: dict[str, Any]) -> None:
    torch.testing.assert_close(y, normalised(names["x"]).movedim(1, -1))


def is_group_of_one(group: Any, names: dict[str, Any]) -> None:
    assert group.size() == 1


def trains(ddp: Any, names: dict[str, Any]) -> None:
    """As the network alone does, and without a broadcast of buffers."""
    assert isinstance(ddp, DistributedDataParallel) and not ddp.will_sync_module_buffers()
    alone = network()
    for net in (ddp, alone):
        net(names["x"]).square().mul(names["z"][:, :, :4, :4]).sum().backward()
    for ours, theirs in zip(ddp.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def has_plugin(trainer: Any, names: dict[str, Any]) -> None:
    assert isinstance(trainer._accelerator_connector._layer_sync, syncbn.training.SyncBatchNormPlugin)


def is_unchanged(net: Any, names: dict[str, Any]) -> None:
    assert [type(layer) for layer in net] == [nn.BatchNorm2d, NaiveSyncBatchNorm]


def is_left_alone(layer: Any, names: dict[str, Any]) -> None:
    net = nn.Sequential(layer)
    expected = copy.deepcopy(layer)(names["x"])
    assert syncbn.convert_sync_batchnorm(net)[0] is layer and type(layer) is FrozenBatchNorm2d
    torch.testing.assert_close(net(names["x"]), expected)
    assert not any(isinstance(module, _BatchNorm) for module in net.modules())


def keeps_its_activation(net: Any, names: dict[str, Any]) -> None:
    assert net is names["net"] and net[1] is names["layer"]
    assert isinstance(net[1], syncbn.SyncBatchNorm)
    torch.testing.assert_close(net[1](names["x"]), F.silu(normalised(names["x"])))


def with_layers_of_torch(group: Any) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network(), group)


def partly_of_torch(group: Any) -> nn.Module:
    """A converted network, of which one layer was torch's synchronised one."""
    net: Any = network()
    net[3] = nn.SyncBatchNorm(C, process_group=group)
    return syncbn.convert_sync_batchnorm(net)


def with_layers_of_detectron2(group: Any) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(C), NaiveSyncBatchNorm(C))


def with_layers_of_timm(group: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, C, 3), BatchNormAct2d(C))


NETWORKS: dict[str, Callable[[Any], nn.Module]] = {
    "net = nn.SyncBatchNorm.convert_sync_batchnorm(net)": with_layers_of_torch,
    "(none)": partly_of_torch,
    "DistributedDataParallel(net)": lambda group: syncbn.convert_sync_batchnorm(network()),
    "nn.SyncBatchNorm.convert_sync_batchnorm(net)": with_layers_of_detectron2,
    "timm.layers.convert_sync_batchnorm(net)": with_layers_of_timm,
}
"""The networks that rows are about, where they are others than `network`; of a process group."""

REFUSALS = {
    "nn.SyncBatchNorm.convert_sync_batchnorm(net)": r"'1' is a .*NaiveSyncBatchNorm.*defines forward itself",
}
"""What the second cell of a row raises."""

CHECKS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "nn.SyncBatchNorm(C)": is_layer,
    "nn.SyncBatchNorm(C, 1e-3, 0.01, True, True, group)": has_arguments,
    "nn.SyncBatchNorm.convert_sync_batchnorm(net, group)": is_converted,
    "net = nn.SyncBatchNorm.convert_sync_batchnorm(net)": is_taken_over,
    "(none)": is_reverted,
    "F.relu(bn(x))": is_relu,
    "dist.new_group(ranks)": is_group_of_one,
    "DistributedDataParallel(net)": trains,
    "Trainer(sync_batchnorm=True)": has_plugin,
    "apex.parallel.SyncBatchNorm(C)": is_layer,
    "apex.parallel.SyncBatchNorm(C, process_group=group)": has_group,
    "apex.parallel.SyncBatchNorm(C, fuse_relu=True)(x)": is_relu,
    "apex.parallel.SyncBatchNorm(C, fuse_relu=True)(x, z)": is_relu_of_sum,
    "apex.parallel.SyncBatchNorm(C, channel_last=True)(x_nhwc)": is_nhwc,
    "apex.parallel.convert_syncbn_model(net)": is_converted,
    "apex.parallel.create_syncbn_process_group(1)": is_group_of_one,
    'get_norm("SyncBN", C)': is_layer,
    'get_norm("naiveSyncBN", C)': is_layer,
    'get_norm("naiveSyncBN_N", C)': is_layer,
    "NaiveSyncBatchNorm(C)": is_layer,
    "nn.SyncBatchNorm.convert_sync_batchnorm(net)": is_unchanged,
    "FrozenBatchNorm2d(C)": is_left_alone,
    "timm.layers.convert_sync_batchnorm(net)": keeps_its_activation,
}


def name_of(before: str) -> str:
    return before if before == "(none)" else code_of(before)


def test_every_row_has_a_check():
    assert [name_of(before) for before, _ in rows()] == list(CHECKS)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
@pytest.mark.parametrize(("before", "after"), rows(), ids=[name_of(before) for before, _ in rows()])
def test_a_row(before, after, names):
    code, name = code_of(after).removeprefix("net = "), name_of(before)
    code = code.replace("forward_sync_buffers", BUFFER_OPTION)  # as this version of torch calls it
    if name in NETWORKS:
        names["net"] = NETWORKS[name](names["group"])
        names["layer"] = names["net"][1]
    with pytest.raises(ValueError, match=REFUSALS[name]) if name in REFUSALS else contextlib.nullcontext():
        result = eval(code, names)
    CHECKS[name](names["net"] if name in REFUSALS else result, names)


def claims_of_two_ranks(rank: int) -> dict[str, Any]:
    """What the rows say of several ranks: of 3 images in all, this one has 3 or none, then 1 or 2."""
    torch.manual_seed(0)
    whole = torch.randn(3, C, 4, 4, dtype=torch.float64) * 3 + 1
    results: dict[str, Any] = {"group": dist.get_world_size(syncbn.new_group(1))}
    for name, shares in {"none": (slice(0, 3), slice(3, 3)), "unequal": (slice(0, 1), slice(1, 3))}.items():
        net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(C))).double()
        ddp = DistributedDataParallel(net, **{BUFFER_OPTION: False})
        images = whole[shares[rank]]
        output = ddp(images)
        output.square().sum().backward()
        results[name] = (output.detach(), net[0].running_mean, net[0].running_var)
    alone = syncbn.SyncBatchNorm(C, process_group=syncbn.new_group(1)).double()
    results["alone"] = bool(torch.allclose(alone(whole[: rank + 1]), normalised(whole[: rank + 1])))
    return results


def test_what_the_rows_say_of_several_ranks():
    torch.manual_seed(0)
    whole = torch.randn(3, C, 4, 4, dtype=torch.float64) * 3 + 1
    reference = nn.BatchNorm2d(C).double()
    expected = reference(whole).detach()
    ranks = run_ranks(claims_of_two_ranks, 2, timeout=180)
    for name in ("none", "unequal"):
        outputs, means, variances = zip(*(rank[name] for rank in ranks), strict=True)
        torch.testing.assert_close(torch.cat(outputs), expected)
        assert torch.equal(means[0], means[1]) and torch.equal(variances[0], variances[1])
        torch.testing.assert_close(means[0], reference.running_mean)
        torch.testing.assert_close(variances[0], reference.running_var)
    assert all(rank["group"] == 1 and rank["alone"] for rank in ranks)
