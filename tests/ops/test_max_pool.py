"""Max pooling where there is no GPU: left to torch; and its kernels, interpreted and compiled."""

import pytest
import torch
from pool_problems import EACH_POOL, few_numbers, pooled, torchs
from processes import NEEDS_TRITON, compile_kernels_of, interpret

from syncbn.ops.max_pool import max_pool2d


@NEEDS_TRITON
@pytest.mark.timeout(900)  # some 15 s of one core, of which a busy machine may give little
def test_kernels_under_the_interpreter():
    interpret("max_pool_interpreted.py")


@NEEDS_TRITON
@pytest.mark.timeout(900)
def test_kernels_compile_for_a_gpu(tmp_path):
    """To machine code of compute capability 9.0, which loads and stores 16 bytes at once."""
    compile_kernels_of("compile_pool_kernels.py", tmp_path)


@EACH_POOL
def test_on_a_cpu_it_is_torchs(shape, pool):
    x = few_numbers(shape).requires_grad_()
    y, expected = pooled(pool, x), torchs(pool, x)
    assert torch.equal(y, expected)
    assert type(y.grad_fn) is type(expected.grad_fn)


def test_what_a_batch_may_lack():
    assert max_pool2d(torch.ones(3, 8, 8), 3, 2).shape == (3, 3, 3)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        max_pool2d(torch.ones(1, 3, 8, 8), 3, 2, padding=2)
