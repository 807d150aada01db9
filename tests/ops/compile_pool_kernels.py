"""Compiles max pooling's kernels for compute capability 9.0, which needs no GPU; `test_max_pool.py` runs this."""

import re

import torch
import triton
from compile_kernels import TARGET, disassembled
from triton.compiler import ASTSource

from syncbn.ops import max_pool, triton_pool_kernels

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
# Shape of the input; kernel, stride, padding, ceil_mode.
INCEPTIONS = [
    ((32, 64, 112, 112), (3, 2, 0, True)),
    ((32, 24, 56, 56), (3, 2, 0, True)),
    ((32, 1024, 7, 7), (3, 1, 1, False)),
]
MOST_REGISTERS = 64  # of a thread: 1024 threads, then, are on a multiprocessor at least


class Launch:
    """Stands in for a kernel: keeps what it is called with."""

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.arguments, self.constants = arguments, constants

        return launch


def arguments_of(name, shape, pool, dtype, rows):
    """What the host would launch the kernel with."""
    launch = Launch()
    max_pool._kernels = lambda: type("Kernels", (), {name: launch})
    window = max_pool.PoolWindow(pool[0], *((number, number) for number in pool[1:3]), pool[3])
    x = max_pool._empty(shape, torch.empty(0, dtype=dtype, device="meta"), rows)
    y = max_pool._empty(max_pool._output_shape(x.shape, window), x, rows)
    if name == "max_pool":
        max_pool._pooled(x, window, with_positions=True)
    else:
        max_pool._input_gradient(y, torch.empty_like(y, dtype=torch.uint8), window, x.shape, rows)
    return launch.arguments, launch.constants


def compiled(name, shape, pool, dtype, rows):
    """Typed, and made a variant, as Triton does it when it launches."""
    kernel = getattr(triton_pool_kernels, name)
    arguments, constants = arguments_of(name, shape, pool, dtype, rows)
    warps = constants.pop("num_warps")
    signature, values, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = constants[parameter.name] if parameter.name in constants else arguments[i]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES.get(value.dtype, "*u8")
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif parameter.name in constants or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], values[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=TARGET, options={"num_warps": warps})


def check_memory_accesses(name, shape, pool):
    """Each thread loads 16 bytes of every element of a window at once, and stores as many."""
    kernel, stride = pool[:2]
    registers, instructions = disassembled(compiled(name, shape, pool, torch.bfloat16, True).asm["cubin"])
    found = [re.search(r"\b(LDG|STG|LDL|STL)\S*", text) for _, text in instructions]
    accesses = sorted(match[0] for match in found if match)
    windows = kernel**2  # that hold one of the elements of a patch
    if name == "max_pool":
        expected = ["LDG.E.128"] * windows + ["STG.E.128", "STG.E.64"]  # y and the positions
    else:
        expected = ["LDG.E.128"] * windows + ["LDG.E.64"] * windows + ["STG.E.128"] * stride**2
    assert [re.sub(r"\.CONSTANT", "", access) for access in accesses] == expected, (name, shape, accesses)
    assert registers <= MOST_REGISTERS, (name, shape, registers)
    print(name, shape, registers, "registers", len(instructions), "instructions")


def main():
    for name in ("max_pool", "max_pool_gradient"):
        for shape, pool in INCEPTIONS:
            check_memory_accesses(name, shape, pool)
        for dtype, rows, pool in (
            (torch.float64, False, (3, 2, 1, True)),
            (torch.float32, True, (15, 4, 7, False)),
            (torch.float16, True, (2, 3, 0, True)),
        ):
            compiled(name, (2, 33, 30, 29), pool, dtype, rows)


if __name__ == "__main__":
    main()
