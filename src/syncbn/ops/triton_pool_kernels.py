"""Max pooling as GPU kernels. Only `max_pool` imports this file, and with it Triton, once a GPU's tensor asks for it.

Every tensor has four strides of its own, for image, channel, row and column, so that any layout is read in place. A
program has a tile of BLOCK_C channels x BLOCK_P pixels of one image, counted row by row. ALIGNED tells the compiler of
how many elements C and all strides are multiples, where channels lie side by side; elsewhere it is 1.

A window's position is the number of one of its elements, row by row from 0, those in the padding included. With UNROLL
the loops over a window are unrolled.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

# Arguments whose value must not make another variant of a kernel; only strides of 1 do.
_SIZES = ["C", "height", "width", "out_height", "out_width", "channel_blocks", "pixel_blocks"]
_OUTER = ["x_image", "x_row", "y_image", "y_row", "dy_image", "dy_row", "dx_image", "dx_row"]


@triton.jit
def _tile(
    C,
    height,
    width,
    channel_blocks,
    pixel_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """This program's image, channels (BLOCK_C, 1), rows and columns (1, BLOCK_P), and which of them exist.

    Programs that follow one another take the channels of the same pixels, then the next pixels.
    """
    program = tl.program_id(0)
    first = (program % channel_blocks) * BLOCK_C
    block = program // channel_blocks
    image = (block // pixel_blocks).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    left = tl.multiple_of(C - first, ALIGNED)
    pixel = (block % pixel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = pixel // width
    column = pixel - row * width
    c = (first + channels).to(tl.int64)
    return image, c[:, None], (channels < left)[:, None], row[None, :], column[None, :], (row < height)[None, :]


@triton.jit
def _offsets(image, c, row, column, image_stride, channel_stride, row_stride, column_stride, ALIGNED: tl.constexpr):
    """Of a tile's elements (BLOCK_C, BLOCK_P), 64 bits wide."""
    of_pixels = image * image_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    return tl.multiple_of(of_pixels + c * channel_stride, (ALIGNED, 1))


@triton.jit
def _moved(offsets, rows, columns, row_stride, column_stride, ALIGNED: tl.constexpr):
    """The offsets so many rows and columns further."""
    step = tl.cast(rows, tl.int64) * row_stride + tl.cast(columns, tl.int64) * column_stride
    return tl.multiple_of(offsets + step, (ALIGNED, 1))


@triton.jit(do_not_specialize=[*_SIZES, *_OUTER])
def max_pool(
    x,
    y,
    positions,
    C,
    height,
    width,
    out_height,
    out_width,
    channel_blocks,
    pixel_blocks,
    x_image,
    x_channel,
    x_row,
    x_column,
    y_image,
    y_channel,
    y_row,
    y_column,
    KERNEL: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write y, the maximum of each window of x, and its position unless there is no place for it.

    As ATen: of equal elements the first counts, of several NaN the last. Of zeros, 0 counts for more than -0 in y.
    """
    image, c, exists, row, column, inside = _tile(
        C, out_height, out_width, channel_blocks, pixel_blocks, BLOCK_C, BLOCK_P, ALIGNED
    )
    top = row * STRIDE_H - PADDING_H
    left = column * STRIDE_W - PADDING_W
    origin = _offsets(image, c, top, left, x_image, x_channel, x_row, x_column, ALIGNED)
    best = tl.full((BLOCK_C, BLOCK_P), float("-inf"), COMPUTE)
    # The first element outside the padding, for a window in which nothing is more than -inf.
    first = tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0)
    position = tl.broadcast_to(first, (BLOCK_C, BLOCK_P))
    for i in tl.range(KERNEL, loop_unroll_factor=KERNEL if UNROLL else 1):
        for j in tl.range(KERNEL, loop_unroll_factor=KERNEL if UNROLL else 1):
            h, w = top + i, left + j
            ok = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            offsets = _moved(origin, i, j, x_row, x_column, ALIGNED)
            v = tl.load(x + offsets, mask=exists & ok, other=float("-inf")).to(COMPUTE)
            better = (v > best) | (v != v)
            best = tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)
            position = tl.where(better, i * KERNEL + j, position)
    written = exists & inside
    offsets = _offsets(image, c, row, column, y_image, y_channel, y_row, y_column, ALIGNED)
    tl.store(y + offsets, best, mask=written)
    if positions is not None:
        tl.store(positions + offsets, position.to(tl.uint8), mask=written)


@triton.jit(do_not_specialize=[*_SIZES, *_OUTER])
def max_pool_gradient(
    dy,
    positions,
    dx,
    C,
    height,
    width,
    out_height,
    out_width,
    channel_blocks,
    pixel_blocks,
    dy_image,
    dy_channel,
    dy_row,
    dy_column,
    y_image,
    y_channel,
    y_row,
    y_column,
    dx_image,
    dx_channel,
    dx_row,
    dx_column,
    KERNEL: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write dx, for each element the sum of dy over the windows that hold it and whose position names it.

    A pixel of the tile is a patch of STRIDE_H x STRIDE_W elements of dx: where in its windows an element of a patch
    lies, then, is the same for all patches.
    """
    image, c, exists, row, column, inside = _tile(
        C,
        tl.cdiv(height, STRIDE_H),
        tl.cdiv(width, STRIDE_W),
        channel_blocks,
        pixel_blocks,
        BLOCK_C,
        BLOCK_P,
        ALIGNED,
    )
    of_y = _offsets(image, c, row, column, y_image, y_channel, y_row, y_column, ALIGNED)
    of_dy = _offsets(image, c, row, column, dy_image, dy_channel, dy_row, dy_column, ALIGNED)
    top, left = row * STRIDE_H, column * STRIDE_W
    of_dx = _offsets(image, c, top, left, dx_image, dx_channel, dx_row, dx_column, ALIGNED)
    WINDOWS_H: tl.constexpr = (KERNEL + STRIDE_H - 1) // STRIDE_H  # that hold an element, at most
    WINDOWS_W: tl.constexpr = (KERNEL + STRIDE_W - 1) // STRIDE_W
    for a in tl.range(STRIDE_H, loop_unroll_factor=STRIDE_H if UNROLL else 1):
        for b in tl.range(STRIDE_W, loop_unroll_factor=STRIDE_W if UNROLL else 1):
            total = tl.zeros((BLOCK_C, BLOCK_P), COMPUTE)
            for i in tl.range(WINDOWS_H, loop_unroll_factor=WINDOWS_H if UNROLL else 1):
                for j in tl.range(WINDOWS_W, loop_unroll_factor=WINDOWS_W if UNROLL else 1):
                    # Of the element, in the window that begins i and j steps before the last that may hold it.
                    position_h = (a + PADDING_H) % STRIDE_H + i * STRIDE_H
                    position_w = (b + PADDING_W) % STRIDE_W + j * STRIDE_W
                    if (position_h < KERNEL) & (position_w < KERNEL):
                        down, right = (a + PADDING_H) // STRIDE_H - i, (b + PADDING_W) // STRIDE_W - j
                        h, w = row + down, column + right
                        ok = exists & inside & (h >= 0) & (h < out_height) & (w >= 0) & (w < out_width)
                        position_at = positions + _moved(of_y, down, right, y_row, y_column, ALIGNED)
                        dy_at = dy + _moved(of_dy, down, right, dy_row, dy_column, ALIGNED)
                        named = tl.load(position_at, mask=ok, other=255) == position_h * KERNEL + position_w
                        total = tl.where(named, total + tl.load(dy_at, mask=ok, other=0.0).to(COMPUTE), total)
            ok = exists & inside & (top + a < height) & (left + b < width)
            tl.store(dx + _moved(of_dx, a, b, dx_row, dx_column, ALIGNED), total, mask=ok)
