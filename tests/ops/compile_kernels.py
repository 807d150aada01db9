"""Compiles every kernel for a GPU of compute capability 9.0, which needs none; `test_triton_kernels.py` runs this."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.ops import triton_kernels
from syncbn.ops.triton_plan import MOST_REGISTERS, KernelPlan, aligned_to, plan_of

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LIKE_X = {"x", "y", "dy", "dx", "residual", "cut"}
PARAMETERS = {"weight", "bias", "running_mean", "running_var", "dweight", "dbias", "weight_copy", "bias_copy"}
NUMBERS = {"M", "id_sum", "square_sum", "eps", "momentum"}
PLAIN = {"outer", "splits", "sums_at", "count_at", "id", "length"}
# What is None in the variants that Inception-BN runs on several ranks; that a layer runs alone, without parameters and
# buffers, on an activation too small to split; and that one with a residual runs.
ON_RANKS = {"residual", "y_read", "cut"}
BARE = {*ON_RANKS, "count", "signature", "weight", "bias", "dweight", "dbias", "running_mean", "running_var", "steps"}
BARE |= {"partials", "counters", "weight_copy", "bias_copy"}
WITH_RESIDUAL = {"count", "signature"}
# With mean and variance given.
NO_SUMS = {*BARE, "sums"}
SHARED_MEMORY = 227 * 1024  # of a multiprocessor
SMALLEST_SHARED_MEMORY = 99 * 1024  # that a program can have, of all GPUs that the kernels run on: 8.6 and 8.9
LARGE = [((256, 192, 56, 56), False), ((32, 192, 28, 28), True), ((256, 256, 14, 14), True)]
TENSORS = {"input_sums": 1, "normalize": 1, "gradient": 2, "input_gradient": 2}


def arguments(name, names, plan, absent, x_type, compute, step):
    """(type, value of a constant or None, divisible by 16) of each argument; step is dy's or y's, 0 where it is x's."""
    layout = dict(
        zip(("C", "outer", "inner", "outer_stride", "channel_stride", "inner_stride"), plan.layout, strict=True)
    )
    rows = layout["channel_stride"] == 1
    for other in ("dy", "y"):
        layout[f"{other}_outer_stride"] = 0 if rows else step or layout["outer_stride"]
        layout[f"{other}_inner_stride"] = step or layout["inner_stride"] if rows else 1
    for argument in names:
        if argument in absent or (name == "gradient" and argument == "y" and "y_read" in absent):
            yield "constexpr", None, False
        elif argument in LIKE_X:
            yield x_type, None, True
        elif argument in PARAMETERS:
            yield "*fp32", None, True
        elif argument in NUMBERS:
            yield "fp64", None, False
        elif argument in PLAIN:
            yield "i32", None, False
        elif argument in layout:
            size = layout[argument]
            yield ("constexpr", 1, False) if size == 1 else ("i32", None, size % 16 == 0)
        elif argument in ("counters", "steps"):
            yield "*i32" if argument == "counters" else "*i64", None, True
        elif argument in ("DY_LIKE_X", "Y_LIKE_X"):
            yield "constexpr", not step, False
        elif argument in ("RELU", "SPLIT"):
            yield "constexpr", "partials" not in absent, False
        elif argument == "COMPUTE":
            yield "constexpr", compute, False
        elif argument in plan.tile:
            yield "constexpr", plan.tile[argument], False
        else:
            yield "*fp64", None, False


def compiled(name, plan, absent, x_type="*bf16", compute=tl.float32, step=0):
    kernel = getattr(triton_kernels, name)
    found = list(arguments(name, kernel.arg_names, plan, absent, x_type, compute, step))
    signature = {n: kind for n, (kind, _, _) in zip(kernel.arg_names, found, strict=True)}
    constants = {(i,): value for i, (kind, value, _) in enumerate(found) if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, _, divisible) in enumerate(found) if divisible}
    options = {n: plan.tile[n] for n in ("num_warps", "maxnreg")}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGET, options=options)


def disassembled(code):
    """(Registers of a thread, address and text of every instruction), as the assembler made them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, instructions = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.findall(r"/\*([0-9a-f]+)\*/ +(.*?);", instructions)
    return int(re.search(r"REG:(\d+)", usage)[1]), [(int(address, 16), text) for address, text in found]


def loop_with_copies(instructions):
    """From where the first branch back over the last copy to shared memory leads."""
    copies = [address for address, text in instructions if "LDGSTS" in text]
    assert copies, "nothing is copied to shared memory"
    last = copies[-1]
    for end, text in instructions:
        target = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if end > last and target and int(target[1], 16) <= last:
            return [text for address, text in instructions if int(target[1], 16) <= address <= end]
    raise AssertionError("no loop")


def check_memory_accesses(name, plan, binary, planes):
    """All tiles under way are copied in as few pieces as there can be; a loop over rows finds registers for all."""
    registers, instructions = disassembled(binary.asm["cubin"])
    assert registers <= MOST_REGISTERS, name
    assert binary.metadata.shared < SHARED_MEMORY // 2, "two programs on a multiprocessor"
    # 16 bytes at a time, or the memory's bandwidth is out of reach.
    width = 2 * plan.tile["ALIGNED"] if planes else 16
    pieces = TENSORS[name] * plan.tile["BLOCK_C"] * plan.tile["BLOCK_I"] * 2 // (32 * plan.tile["num_warps"] * width)
    loop, whole = loop_with_copies(instructions), [text for _, text in instructions]
    for code, copied in ((loop, 1), (whole, plan.tile["STAGES"])):
        copies = [text for text in code if "LDGSTS" in text]
        assert len(copies) == pieces * copied, (name, copies)
        assert all(f".{8 * width} " in text for text in copies), (name, copies)
    assert planes or not [text for text in loop if re.search("LDL|STL", text)], name
    stores = [text for text in loop if "STG" in text]
    assert len(stores) == (pieces // TENSORS[name] if name in ("normalize", "input_gradient") else 0), (name, stores)
    print(name, plan.tile, registers, "registers", len(loop), "instructions in the loop")


def main():
    for name, tensors in TENSORS.items():
        for shape, planes in LARGE:
            plan = plan_of(shape, planes, 2, tensors, 132)
            check_memory_accesses(name, plan, compiled(name, plan, ON_RANKS), planes)
            # x cut out of a tensor of twice the channels; y and dy are not
            dense = plan.layout[3] if planes else plan.layout[0]
            cut = plan_of(shape, planes, 2, tensors, 132, 2 * dense)
            check_memory_accesses(name, cut, compiled(name, cut, ON_RANKS, step=dense), planes)
            if name in ("gradient", "input_gradient"):  # of a tensor of twice the channels; and with 4 numbers appended
                own = plan.layout[3] if planes else plan.layout[0]
                for step in (2 * own, own + 4) if planes else (2 * own,):
                    apart = aligned_to(plan, step) if planes else plan
                    check_memory_accesses(name, apart, compiled(name, apart, ON_RANKS, step=step), planes)
        if name in ("normalize", "gradient"):  # which may read one tensor more
            binary = compiled(name, plan_of(LARGE[0][0], False, 2, tensors, 132), WITH_RESIDUAL)
            assert binary.metadata.shared <= SMALLEST_SHARED_MEMORY, name
        for shape, planes in (((5, 33, 7, 9), False), ((1, 2049), True), ((3, 1, 9, 9), True)):
            plan = plan_of(shape, planes, 8, tensors, 132)
            for absent in (BARE, WITH_RESIDUAL, NO_SUMS) if name == "normalize" else (BARE, WITH_RESIDUAL):
                compiled(name, plan, absent, "*fp64", tl.float64)
    for absent in (set(), {"count", "steps"}):
        plan = KernelPlan((33, 1, 1, 0, 1, 33), (1, 1), {"BLOCK_C": 1024, "num_warps": 4, "maxnreg": MOST_REGISTERS})
        compiled("update_running", plan, absent)


if __name__ == "__main__":
    main()
