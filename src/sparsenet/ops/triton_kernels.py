"""The kernels of ``sparsenet.ops.triton``: what happens between two convolutions.

Features lie as rows of channels: with *m* running over batch and pixels, element ``x[m, c]`` of a
feature is at ``block[first * pixels + m * width + c]``. Work is split into **pieces** of at most
``WIDTH`` neighbouring columns of one feature; what a reader gathers is a list of pieces. Program
*p* takes piece ``p % pieces`` in the ``span`` rows from ``p // pieces * span`` on, ``ROWS`` at a
time. So a program learns once, in scalars, where its feature lies, reads it densely, and knows that
all these numbers are multiples of ``UNIT``, which makes for 16-byte loads.

Arithmetic is in ``PRECISION`` whatever the storage. Sums over rows go through ``partials (parts, 2,
columns)``, each part written by one program, and the ``finish`` kernels add up the ``parts``, at
most ``ROWS``, in one order: the same input gives the same bits.

Shapes: ``statistics (2, channels)`` holds mean and rstd of every channel of the stage, ``totals (2,
channels)`` the two sums that ``feature_gradient`` needs; ``scale``, ``shift`` and their
gradients are ``(columns,)``; ``activated`` and ``d_activated`` are ``(pixels, columns)``.
"""

# mypy: ignore-errors
# (a kernel's arguments are pointers and constants of Triton's own language)

from __future__ import annotations

from sparsenet.extras import require

triton = require("triton", "triton")
tl = require("triton.language", "triton")
# There are no variants of a kernel for numbers that happen to be 1 or multiples of 16, because the
# table says all that helps.
_kernel = triton.jit(do_not_specialize=["pieces", "parts", "pixels", "channels", "span"])


@triton.jit
def read_piece(table, piece, UNIT: tl.constexpr):
    """Where a piece lies, the eight numbers of its row in the table.

    These are the first column of its feature in the block and the feature's width; the piece's
    first channel within the feature and its number of channels; its first column in what the reader
    gathers and the width of that; its first channel in the statistics; and whether the feature's
    gradient sum holds another reader's gradient already, to which this reader adds.
    """
    row = table + piece * 8
    first = tl.multiple_of(tl.load(row), UNIT).to(tl.int64)
    width = tl.multiple_of(tl.load(row + 1), UNIT)
    channel = tl.multiple_of(tl.load(row + 2), UNIT)
    count = tl.multiple_of(tl.load(row + 3), UNIT)
    column = tl.multiple_of(tl.load(row + 4), UNIT)
    columns = tl.multiple_of(tl.load(row + 5), UNIT)
    index = tl.multiple_of(tl.load(row + 6), UNIT)
    return first, width, channel, count, column, columns, index, tl.load(row + 7)


@triton.jit
def load_statistics(statistics, channels, index, lane, in_piece, UNIT: tl.constexpr):
    """Two rows of ``statistics`` or ``totals``, ``(1, WIDTH)`` each, for a piece."""
    place = statistics + index + lane
    other = place + channels // UNIT * UNIT  # the same number, now known to be a multiple
    upper = tl.load(place, mask=in_piece, other=0.0)
    lower = tl.load(other, mask=in_piece, other=0.0)
    return upper[None, :], lower[None, :]


@_kernel
def write_activation(
    block, statistics, scale, shift, activated, table, pieces, pixels, channels, span,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes what a reader gathers, normalised, scaled, shifted and rectified.

    ``activated[m, c] = relu((x[m, c] - mean[c]) * rstd[c] * scale[c] + shift[c])``
    """
    program = tl.program_id(0)
    first, width, channel, count, column, columns, index, _ = read_piece(
        table, program % pieces, UNIT
    )
    lane = tl.arange(0, WIDTH)
    in_piece = lane < count
    mean, rstd = load_statistics(statistics, channels, index, lane, in_piece, UNIT)
    gain = tl.load(scale + column + lane, mask=in_piece, other=0.0).to(PRECISION)[None, :]
    offset = tl.load(shift + column + lane, mask=in_piece, other=0.0).to(PRECISION)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    begin = (program // pieces) * span
    for start in range(begin, tl.minimum(begin + span, pixels), ROWS):
        mask = (row < pixels - start) & in_piece[None, :]
        place = block + first * pixels + start * width.to(tl.int64) + channel
        x = tl.load(place + row * width + lane[None, :], mask=mask, other=0.0).to(PRECISION)
        y = (x - mean) * rstd * gain + offset
        y = tl.where(y <= 0, 0.0, y)  # NaN stays
        target = activated + start * columns.to(tl.int64) + column
        tl.store(target + row * columns + lane[None, :], y, mask=mask)


@_kernel
def measure(
    feature, block, partials, table, pieces, pixels, channels, span,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores a feature, with ``partials = mean, sum((feature - mean) ** 2)`` of each part's rows.

    Tiles are joined by Chan, Golub and LeVeque's update (1979), which never takes a difference of
    large sums.
    """
    program = tl.program_id(0)
    first, width, channel, count, _, _, _, _ = read_piece(table, program % pieces, UNIT)
    lane = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)[:, None]
    begin = (program // pieces) * span
    mean = tl.zeros((WIDTH,), PRECISION)
    squares = tl.zeros((WIDTH,), PRECISION)
    for start in range(begin, tl.minimum(begin + span, pixels), ROWS):
        mask = (row < pixels - start) & (lane < count)[None, :]
        place = start * width.to(tl.int64) + channel
        within = row * width + lane[None, :]
        x = tl.load(feature + place + within, mask=mask, other=0.0)
        tl.store(block + first * pixels + place + within, x, mask=mask)
        x = x.to(PRECISION)
        new = tl.minimum(pixels - start, ROWS).to(PRECISION)
        old = (start - begin).to(PRECISION)
        tile_mean = tl.sum(x, 0) / new
        centred = tl.where(mask, x - tile_mean[None, :], 0.0)
        apart = tile_mean - mean
        mean += apart * (new / (old + new))
        squares += tl.sum(centred * centred, 0) + apart * apart * (old * new / (old + new))
    part = partials + (program // pieces) * 2 * width + channel + lane
    tl.store(part, mean, mask=lane < count)
    tl.store(part + width, squares, mask=lane < count)


@_kernel
def finish_statistics(
    partials, statistics, running_mean, running_var, table, parts, pixels, channels, span,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Finds a feature's mean and ``rstd = 1 / sqrt(var + EPS)`` from the parts of ``measure``.

    The running variance takes the unbiased one, ``var * pixels / (pixels - 1)``, as PyTorch's batch
    norm does.
    """
    _, width, channel, count, _, _, index, _ = read_piece(table, tl.program_id(0), UNIT)
    lane = tl.arange(0, WIDTH)
    in_piece = lane < count
    part = tl.arange(0, ROWS)[:, None]
    mask = (part < parts) & in_piece[None, :]
    place = partials + part * 2 * width + channel + lane[None, :]
    means = tl.load(place, mask=mask, other=0.0)
    squares = tl.load(place + width, mask=mask, other=0.0)
    rows = tl.where(mask, tl.minimum(pixels - part * span, span), 0).to(PRECISION)
    mean = tl.sum(means * rows, 0) / pixels
    apart = means - mean[None, :]
    square = tl.sum(squares + apart * apart * rows, 0)
    tl.store(statistics + index + lane, mean, mask=in_piece)
    tl.store(
        statistics + channels + index + lane, 1.0 / tl.sqrt(square / pixels + EPS), mask=in_piece
    )
    old = tl.load(running_mean + channel + lane, mask=in_piece, other=0.0).to(PRECISION)
    tl.store(running_mean + channel + lane, old + (mean - old) * MOMENTUM, mask=in_piece)
    old = tl.load(running_var + channel + lane, mask=in_piece, other=0.0).to(PRECISION)
    tl.store(
        running_var + channel + lane, old + (square / (pixels - 1) - old) * MOMENTUM, mask=in_piece
    )


@_kernel
def backward_activation(
    block, sums, d_activated, statistics, scale, shift, partials,
    table, pieces, pixels, channels, span,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ``scale * g`` to the gradient sums, the first reader of a feature writes it.

    ``g`` is ``d_activated`` where the activation, computed again, is above 0.
    ``partials = sum(g), sum(g * (x - mean))``
    """
    program = tl.program_id(0)
    first, width, channel, count, column, columns, index, adds = read_piece(
        table, program % pieces, UNIT
    )
    lane = tl.arange(0, WIDTH)
    in_piece = lane < count
    mean, rstd = load_statistics(statistics, channels, index, lane, in_piece, UNIT)
    gain = tl.load(scale + column + lane, mask=in_piece, other=0.0).to(PRECISION)[None, :]
    offset = tl.load(shift + column + lane, mask=in_piece, other=0.0).to(PRECISION)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    begin = (program // pieces) * span
    total = tl.zeros((ROWS, WIDTH), PRECISION)
    total_x = tl.zeros((ROWS, WIDTH), PRECISION)
    for start in range(begin, tl.minimum(begin + span, pixels), ROWS):
        mask = (row < pixels - start) & in_piece[None, :]
        given = d_activated + start * columns.to(tl.int64) + column
        d = tl.load(given + row * columns + lane[None, :], mask=mask, other=0.0).to(PRECISION)
        place = first * pixels + start * width.to(tl.int64) + channel
        within = row * width + lane[None, :]
        x = tl.load(block + place + within, mask=mask, other=0.0).to(PRECISION) - mean
        before = tl.load(sums + place + within, mask=mask & (adds > 0), other=0.0).to(PRECISION)
        g = tl.where(x * rstd * gain + offset <= 0, 0.0, d)
        tl.store(sums + place + within, before + gain * g, mask=mask)
        total += g
        total_x += g * x
    part = partials + (program // pieces) * 2 * columns + column + lane
    tl.store(part, tl.sum(total, 0), mask=in_piece)
    tl.store(part + columns, tl.sum(total_x, 0), mask=in_piece)


@_kernel
def finish_gradients(
    partials, statistics, scale, d_scale, d_shift, totals, table, parts, pixels, channels, span,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of ``backward_activation``.

    ``d_shift = sum(g)``, ``d_scale = rstd * sum(g * (x - mean))``. Adds ``scale * d_shift`` and
    ``scale * d_scale`` to the totals of the features that the reader gathers.
    """
    _, _, _, count, column, columns, index, _ = read_piece(table, tl.program_id(0), UNIT)
    lane = tl.arange(0, WIDTH)
    in_piece = lane < count
    part = tl.arange(0, ROWS)[:, None]
    mask = (part < parts) & in_piece[None, :]
    place = partials + part * 2 * columns + column + lane[None, :]
    sum_g = tl.sum(tl.load(place, mask=mask, other=0.0), 0)
    sum_gx = tl.sum(tl.load(place + columns, mask=mask, other=0.0), 0)
    sum_gz = sum_gx * tl.load(statistics + channels + index + lane, mask=in_piece, other=0.0)
    gain = tl.load(scale + column + lane, mask=in_piece, other=0.0).to(PRECISION)
    tl.store(d_shift + column + lane, sum_g, mask=in_piece)
    tl.store(d_scale + column + lane, sum_gz, mask=in_piece)
    place = totals + index + lane
    tl.store(place, tl.load(place, mask=in_piece, other=0.0) + gain * sum_g, mask=in_piece)
    tl.store(
        place + channels,
        tl.load(place + channels, mask=in_piece, other=0.0) + gain * sum_gz,
        mask=in_piece,
    )


@_kernel
def feature_gradient(
    block, sums, statistics, totals, d_feature, table, pieces, pixels, channels, span,
    TRAINING: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_feature = rstd * (h - (total_h + z * total_hz) / pixels)`` with *h* the gradient sum.

    Here ``z = (x - mean) * rstd``. In evaluation mean and rstd are constants, and the result is
    ``rstd * h``.
    """
    program = tl.program_id(0)
    first, width, channel, count, _, _, index, _ = read_piece(table, program % pieces, UNIT)
    lane = tl.arange(0, WIDTH)
    in_piece = lane < count
    mean, rstd = load_statistics(statistics, channels, index, lane, in_piece, UNIT)
    total_h, total_hz = load_statistics(totals, channels, index, lane, in_piece, UNIT)
    row = tl.arange(0, ROWS)[:, None]
    begin = (program // pieces) * span
    for start in range(begin, tl.minimum(begin + span, pixels), ROWS):
        mask = (row < pixels - start) & in_piece[None, :]
        place = start * width.to(tl.int64) + channel
        within = row * width + lane[None, :]
        h = tl.load(sums + first * pixels + place + within, mask=mask, other=0.0).to(PRECISION)
        if TRAINING:
            x = tl.load(block + first * pixels + place + within, mask=mask, other=0.0).to(PRECISION)
            h -= (total_h + (x - mean) * rstd * total_hz) / pixels
        tl.store(d_feature + place + within, rstd * h, mask=mask)
