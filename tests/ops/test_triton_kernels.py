"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled for one."""

import pytest
import torch
from processes import NEEDS_TRITON, compile_kernels_of, interpret, run_in_process_of_its_own

from syncbn.ops import triton_passes
from syncbn.ops.triton_plan import COUNTERS, LONGEST_SUM, MOST_STAGES, RESIDENT_BYTES, aligned_to, plan_of


@NEEDS_TRITON
@pytest.mark.timeout(900)  # some 30 s of one core each, of which a busy machine may give little
@pytest.mark.parametrize("file", ["triton_interpreted.py", "layers_interpreted.py"])
def test_kernels_under_the_interpreter(file):
    interpret(file)


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_a_gpu(tmp_path):
    """To machine code of compute capability 9.0, with as many registers as the plan reckons with."""
    compile_kernels_of("compile_kernels.py", tmp_path)


def test_an_environment_variable_leaves_the_kernels_unused():
    code = "import torch; from syncbn.ops import triton_passes; assert not triton_passes._usable(torch.device('cuda'))"
    run_in_process_of_its_own("-c", code, SYNCBN_TRITON="0")


def test_tensors_elsewhere_are_left_to_other_passes():
    assert not triton_passes.takes(torch.ones(2, 2))
    assert not triton_passes.takes(torch.ones(2, 2, device="meta"))


# ---- how an activation is divided ----------------------------------------------------------------

ACTIVATIONS = [
    (256, 64, 112, 112),
    (32, 64, 112, 112),
    (32, 192, 28, 28),
    (256, 1024, 7, 7),
    (32, 352, 7, 7),
    (32, 96, 14, 14),
    (1, 2049),
    (70000, 3),
    (2, 2049, 1, 1),
    (1, 1, 4096, 4096),
    (0, 16, 7, 7),
    (64, 17, 33, 31),
    (512, 1024, 75, 75),
]


@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=str)
def test_a_plan_fills_the_gpu(shape, planes, element_size, tensors):
    multiprocessors = 132
    plan = plan_of(shape, planes, element_size, tensors, multiprocessors)
    C, outer, inner, outer_stride, channel_stride, inner_stride = plan.layout
    block_c, block_i = plan.tile["BLOCK_C"], plan.tile["BLOCK_I"]
    elements = torch.Size(shape).numel()
    assert C * outer * inner == elements
    if elements:  # the last element of all
        last = (outer - 1) * outer_stride + (C - 1) * channel_stride + (inner - 1) * inner_stride
        assert last == elements - 1
    assert plan.grid[0] * block_c >= C
    assert block_c & (block_c - 1) == block_i & (block_i - 1) == 0
    assert block_c * block_i * element_size * tensors <= RESIDENT_BYTES / 2
    chunks = outer * max(1, -(-inner // block_i))
    assert 1 <= plan.splits <= chunks
    assert -(-chunks // plan.splits) <= LONGEST_SUM
    assert plan.tile["STAGES"] == (2 if plan.splits == chunks else MOST_STAGES)
    assert plan.tile["ONE_BLOCK"] == (outer == 1)
    if plan.tile["ALIGNED"] > 1:
        numbers = [inner, *(stride for stride in (outer_stride, channel_stride, inner_stride) if stride != 1)]
        assert not any(number % plan.tile["ALIGNED"] for number in numbers)
    programs = plan.grid[0] * plan.splits
    assert plan.splits == 1 or plan.grid[0] <= COUNTERS
    if elements >= multiprocessors * 2048:  # enough for everyone
        assert programs >= 0.75 * multiprocessors


@pytest.mark.parametrize(
    ("area", "element_size", "aligned"), [(112, 2, 8), (14, 2, 4), (7, 2, 1), (14, 4, 4), (2, 8, 2)]
)
def test_how_much_of_a_plane_is_loaded_at_once(area, element_size, aligned):
    shape = (32, 64, area, area)
    assert plan_of(shape, True, element_size, 1, 132).tile["ALIGNED"] == aligned
    assert plan_of(shape, False, element_size, 1, 132).tile["ALIGNED"] == 1, "Triton finds it out from C"


def test_a_gradient_whose_images_are_oddly_far_apart():
    plan, own = plan_of((32, 64, 14, 14), True, 2, 2, 132), 64 * 14 * 14
    assert [aligned_to(plan, own + more).tile["ALIGNED"] for more in (1, 2, 3, 4)] == [1, 2, 1, 4]
    assert aligned_to(plan, 2 * own) is plan


def test_plans_of_the_passes_of_one_direction_are_one():
    assert plan_of((4, 64, 28, 28), False, 2, 1, 132) is plan_of(torch.Size((4, 64, 28, 28)), False, 2, 1, 132)
