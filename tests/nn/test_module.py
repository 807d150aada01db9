"""The layer as a module: arguments, state_dict, copies, pickles, repr, and what it says about bad input."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from ranks import RankError, run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.nn import start_sync_batch_norm

PLAIN = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


def shaken(layer):
    with torch.no_grad():
        for t in layer.state_dict().values():
            t.copy_(torch.rand(t.shape) + 0.5) if t.is_floating_point() else t.fill_(7)
    return layer


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_state_dict_goes_both_ways_strictly(plain, options):
    ours, theirs = shaken(SyncBatchNorm(5, **options)), shaken(plain(5, **options))
    copied = SyncBatchNorm(5, **options)
    assert not any(copied.load_state_dict(theirs.state_dict(), strict=True))
    assert equal_states(copied, theirs)
    copied = plain(5, **options)
    assert not any(copied.load_state_dict(ours.state_dict(), strict=True))
    assert equal_states(copied, ours)


def test_state_dict_of_before_num_batches_tracked():
    """Checkpoints of version 1 have no counter; nn.BatchNorm2d fills it in."""
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = SyncBatchNorm(3)
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 0


def test_state_dict_through_a_file_with_weights_only():
    layer = shaken(SyncBatchNorm(3, activation="relu"))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == list(nn.BatchNorm2d(3).state_dict())


def test_is_a_batch_norm_to_code_that_asks():
    """Weight decay filters and DDP look for _BatchNorm; DDP refuses subclasses of nn.SyncBatchNorm on a CPU."""
    layer = SyncBatchNorm(3)
    assert isinstance(layer, _BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)


def used(layer):
    layer(torch.randn(4, 3, 5, requires_grad=True)).sum().backward()
    layer.zero_grad()
    return layer


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: through_file(layer),
}


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("in_use", [False, True, "checkpoint"])
def test_copies(duplicate, in_use):
    layer = SyncBatchNorm(3, 1e-3, 0.2, activation="relu")
    if in_use == "checkpoint":
        x = torch.randn(4, 3, 5, requires_grad=True)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer.zero_grad()
    elif in_use:
        used(layer)
    layer.eval()
    twin = duplicate(layer)
    assert type(twin) is SyncBatchNorm
    assert (twin.eps, twin.momentum, twin.activation, twin.training) == (1e-3, 0.2, "relu", False)
    assert equal_states(twin, layer)
    assert repr(twin) == repr(layer)
    x = torch.randn(4, 3, 5)
    assert torch.equal(twin(x), layer(x))
    before = layer.running_mean.clone()
    used(twin.train())
    assert torch.equal(layer.running_mean, before)


def test_a_pickle_does_not_carry_activations():
    layer = SyncBatchNorm(3)
    small = len(pickle.dumps(layer))
    x = torch.randn(2000, 3, 50, requires_grad=True)
    for _ in range(5):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer.zero_grad()
    assert len(pickle.dumps(layer)) < small + 2000


def test_pickles_from_before_a_field_existed():
    """Old nn.BatchNorm2d pickles lack no field of ours by accident: a plain copy of __dict__ must do."""
    layer = SyncBatchNorm(3)
    twin = SyncBatchNorm.__new__(SyncBatchNorm)
    twin.__setstate__(copy.deepcopy(layer.__dict__))
    assert repr(twin) == repr(layer)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_models_of_several_layers(duplicate):
    shared = SyncBatchNorm(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, SyncBatchNorm(3, activation="relu"))})
    twin = duplicate(model)
    assert twin["a"] is twin["b"][0]
    assert list(twin.state_dict()) == list(model.state_dict())


def test_meta_device():
    with torch.device("meta"):
        layer = SyncBatchNorm(3)
    assert layer.weight.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.running_var.tolist() == layer.weight.tolist() == [1, 1, 1]
    assert SyncBatchNorm(3, device="meta").running_mean.is_meta


@pytest.mark.usefixtures("float64")
def test_functional_call():
    layer = SyncBatchNorm(3)
    twice = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3)}
    x = torch.randn(4, 3, 5)
    y = torch.func.functional_call(layer, twice, x)
    torch.testing.assert_close(y, 2 * layer(x) + 1)


def test_extra_repr():
    layer = SyncBatchNorm(8, 1e-3, None, False, activation="relu")
    plain = repr(nn.BatchNorm2d(8, 1e-3, None, False))
    assert repr(layer).startswith("Sync" + plain.replace("2d", "")[:-1])
    assert "activation=" in repr(layer) and "relu" in repr(layer)
    assert "world" in repr(layer)


@pytest.mark.parametrize("kind", [SyncBatchNorm, syncbn.nn.BatchNorm])
def test_device_and_dtype_may_be_positional(kind):
    group = (None,) if kind is SyncBatchNorm else ()
    layer = kind(3, 1e-5, 0.1, True, True, *group, "meta", torch.float64)
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.float64


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [SyncBatchNorm, syncbn.nn.BatchNorm])
def test_without_bias(kind):
    layer, plain = kind(3, bias=False), nn.BatchNorm1d(3)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


@pytest.mark.usefixtures("float64")
def test_statistics_that_are_no_longer_tracked():
    """As nn.BatchNorm2d: training normalises by the batch and leaves them as they are."""
    layer = shaken(SyncBatchNorm(3))
    layer.track_running_stats = False
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x).mean((0, 2)), layer.bias)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_no_count_of_batches(momentum):
    """As nn.BatchNorm2d: without a count there is no cumulative average to take."""
    layer, plain = SyncBatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    layer.num_batches_tracked = plain.num_batches_tracked = None
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_count_of_another_dtype(dtype):
    """load_state_dict(assign=True) takes any; the address of a narrow one must not be written to as of a wide one."""
    layer = SyncBatchNorm(3)
    counts = torch.zeros(2, dtype=dtype)
    layer.num_batches_tracked = counts[0]
    layer(torch.randn(4, 3, 5))
    assert counts.tolist() == [1, 0]


# ---- process groups as attributes ----------------------------------------------------------------


def copies_with_a_group(rank):
    pair = syncbn.new_group(2)
    layer = SyncBatchNorm(3, process_group=pair)
    twins = [duplicate(layer) for duplicate in COPIES.values()]
    return repr(layer), [twin.process_group is pair for twin in twins], [repr(t) for t in twins], pickle.dumps(layer)


def test_copies_with_a_group():
    found = run_ranks(copies_with_a_group, 4)
    for rank, (text, same, texts, _) in enumerate(found):
        assert same == [True] * 3
        assert set(texts) == {text}
        assert str([0, 1] if rank < 2 else [2, 3]) in text
    twin = pickle.loads(found[2][3])  # here, where there is no such group
    assert "[2, 3]" in repr(twin)
    assert twin.eval()(torch.randn(2, 3)).shape == (2, 3)
    assert copy.deepcopy(twin).state_dict()
    pickle.loads(pickle.dumps(twin))
    with pytest.raises((ValueError, RuntimeError), match="2, 3") as caught:
        twin.train()(torch.randn(4, 3))
    assert_one_line(caught)
    twin.process_group = None
    twin(torch.randn(4, 3))


# ---- bad input -----------------------------------------------------------------------------------


def assert_one_line(caught):
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) > 30


BAD_ARGUMENTS = [
    ({"num_features": 0}, "num_features.*0"),
    ({"num_features": -3}, "num_features.*-3"),
    ({"momentum": 1.5}, r"momentum.*\[0, 1\].*1.5"),
    ({"momentum": -0.1}, r"momentum.*\[0, 1\].*-0.1"),
    ({"momentum": float("nan")}, "momentum.*nan"),
    ({"eps": -1e-5}, "eps.*-1e-05"),
    ({"activation": "gelu"}, "activation.*relu.*'gelu'"),
    ({"activation": nn.ReLU()}, "activation.*relu"),
    ({"process_group": "world"}, "process_group.*'world'"),
    ({"process_group": [0, 1]}, r"process_group.*\[0, 1\]"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text) as caught:
        SyncBatchNorm(**{"num_features": 3, **arguments})
    assert_one_line(caught)


BAD_INPUTS = [
    (torch.randn(3), r"\[3\]"),
    (torch.tensor(1.0), r"\[\]"),
    (torch.randn(4, 5), r"3 channels.*5"),
    (torch.randn(4, 5, 3), r"3 channels.*5"),
    (torch.ones(4, 3, dtype=torch.int64), r"int64.*float"),
    (torch.ones(4, 3, dtype=torch.bool), "bool.*float"),
    (torch.ones(4, 3, dtype=torch.uint8), "uint8.*float"),
    (torch.ones(4, 3, dtype=torch.complex64), "complex64"),
    (torch.empty(0, 5), r"3 channels.*5"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x", "text"), BAD_INPUTS, ids=[f"{tuple(x.shape)}-{x.dtype}" for x, _ in BAD_INPUTS])
def test_bad_inputs(x, text, training):
    layer = SyncBatchNorm(3).train(training)
    with pytest.raises((ValueError, RuntimeError), match=text) as caught:
        layer(x)
    assert_one_line(caught)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize(
    "value",
    [torch.ones(2), torch.ones(4), torch.ones(1, 3), torch.ones(3, device="meta")],
    ids=["2", "4", "1x3", "meta"],
)
def test_tensors_that_do_not_fit(value, name, training):
    """Compiled code reads them by their address: past the end of a short one there is other memory."""
    layer = SyncBatchNorm(3).train(training)
    setattr(layer, name, nn.Parameter(value) if name in ("weight", "bias") else value)
    with pytest.raises(ValueError, match=rf"{name} of size.* on .*3 channels.*cpu") as caught:
        layer(torch.randn(4, 3, 5))
    assert_one_line(caught)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (1, 3, 5), (4, 3, 5, 1), (3, 5)], ids=str)
def test_residual_of_another_size(shape, training):
    """Not broadcast: x's gradient formula and the residual's would both have to know."""
    layer = SyncBatchNorm(3).train(training)
    with pytest.raises(ValueError, match=r"residual.*\[4, 3, 5\]") as caught:
        layer(torch.randn(4, 3, 5), torch.randn(shape))
    assert_one_line(caught)


def test_lists_that_do_not_match():
    a, b = SyncBatchNorm(3), SyncBatchNorm(4)
    x, y = torch.randn(4, 3), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"2.*1"):
        sync_batch_norm_group([a, b], [x])
    with pytest.raises(ValueError, match=r"3 channels.*4"):
        sync_batch_norm_group([a, b], [y, x])
    with pytest.raises(ValueError):
        start_sync_batch_norm([a, b], [x, y]).finish([None])
    with pytest.raises(ValueError, match=r"7 channels.*3"):
        sync_batch_norm_group([[a, b]], [x])
    assert a.num_batches_tracked == b.num_batches_tracked == 0


def test_no_layers_at_all():
    assert sync_batch_norm_group([], []) == []


@pytest.mark.parametrize("option", [{"eps": 1e-3}, {"activation": "relu"}, {"affine": False}, {"bias": False}])
def test_siblings_that_differ(option):
    a, b = SyncBatchNorm(3), SyncBatchNorm(3, **option)
    with pytest.raises(ValueError, match=next(iter(option))) as caught:
        sync_batch_norm_group([[a, b]], [torch.randn(4, 6)])
    assert_one_line(caught)


def test_siblings_in_different_modes():
    with pytest.raises(ValueError, match="training"):
        sync_batch_norm_group([[SyncBatchNorm(3), SyncBatchNorm(3).eval()]], [torch.randn(4, 6)])


@pytest.mark.parametrize("size", [1, 2, 0])
def test_new_group_without_a_world(size):
    with pytest.raises((ValueError, RuntimeError), match="init_process_group") as caught:
        syncbn.new_group(size)
    assert_one_line(caught)


def bad_groups(rank):
    """Messages of what is refused in a world of 4."""
    texts = {}
    for size in (3, 0, -2, 8, 2.0, "2", True):
        try:
            syncbn.new_group(size)
            texts[repr(size)] = "no error"
        except ValueError as error:
            texts[repr(size)] = str(error)
    group = dist.new_group([0, 1])
    try:
        SyncBatchNorm(3, process_group=group)
        texts["member"] = "accepted"
    except ValueError as error:
        texts["member"] = str(error)
    return texts


def test_bad_groups():
    for rank, texts in enumerate(run_ranks(bad_groups, 4)):
        member = texts.pop("member")
        texts.pop("True")  # an int to Python
        for size, text in texts.items():
            assert "size" in text and size in text and "[1, 2, 4]" in text, (size, text)
            assert "\n" not in text
        if rank < 2:
            assert member == "accepted"
        else:
            assert str(rank) in member and "new_group" in member and "\n" not in member


def group_after_the_world_is_gone(rank):
    layer = SyncBatchNorm(3, process_group=dist.group.WORLD)
    layer(torch.randn(4, 3))
    dist.destroy_process_group()
    layer(torch.randn(4, 3))


def test_group_after_the_world_is_gone():
    with pytest.raises(RankError) as caught:
        run_ranks(group_after_the_world_is_gone, 2)
    for kind, text in caught.value.errors.values():
        assert kind in ("ValueError", "RuntimeError")
        assert "init_process_group" in text or "not initialised" in text


def layers_of_different_groups(rank):
    pair = syncbn.new_group(2)
    sync_batch_norm_group([SyncBatchNorm(3), SyncBatchNorm(3, process_group=pair)], [torch.randn(4, 3)] * 2)


def test_layers_of_different_groups_in_one_message():
    with pytest.raises(RankError) as caught:
        run_ranks(layers_of_different_groups, 4)
    assert {kind for kind, _ in caught.value.errors.values()} == {"ValueError"}
    assert all("process group" in text and "\n" not in text for _, text in caught.value.errors.values())
