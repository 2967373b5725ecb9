"""Triton device code of multi-scale deformable attention, forward and backward.

A row is one head of one query. Each program computes ROWS rows with all their channels, so half-precision values are
read in 16-byte pieces. Values may be half precision; geometry, weights and sums are float32.

GEOMETRY selects the inputs. With 0, `places` are sampling locations and `scores` are attention weights. With 2 or 4,
`places` are sampling offsets around reference points (2) or boxes (4), in the units of `sampling_geometry`, and
`scores` are logits whose softmax over levels and points gives the weights.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels of deformable attention need Triton: pip install triton.") from error


@triton.jit
def _pixel(
    row,
    real,
    point,
    level,
    height,
    width,
    places,
    references,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    GEOMETRY: tl.constexpr,
):
    """Position of a sample in cells of its level, counted from the centre of cell (0, 0), with its offset and box."""
    at = (row * (LEVELS * POINTS) + point) * 2
    x = tl.load(places + at, mask=real, other=0.0).to(tl.float32)
    y = tl.load(places + at + 1, mask=real, other=0.0).to(tl.float32)
    dx, dy, box_width, box_height = x, y, x, y
    if GEOMETRY != 0:
        reference = references + (row // HEADS * LEVELS + level) * GEOMETRY
        x = tl.load(reference, mask=real, other=0.0).to(tl.float32)
        y = tl.load(reference + 1, mask=real, other=0.0).to(tl.float32)
        if GEOMETRY == 2:
            x += dx / width
            y += dy / height
        else:
            box_width = tl.load(reference + 2, mask=real, other=0.0).to(tl.float32)
            box_height = tl.load(reference + 3, mask=real, other=0.0).to(tl.float32)
            x += dx / POINTS * box_width * 0.5
            y += dy / POINTS * box_height * 0.5
    return x * width - 0.5, y * height - 0.5, dx, dy, box_width, box_height


@triton.jit
def _corners(x, y, real, height, width):
    """Upper left cell of a sample and the sample's position within it; `near` is false far outside and for NaN."""
    near = real & (x > -1) & (x < width) & (y > -1) & (y < height)
    x = tl.where(near, x, 0.0)
    y = tl.where(near, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return near, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _corner_mask(near, row, column, height, width):
    return near & (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _softmax_terms(row, real, scores, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr):
    """Logits (ROWS, COLUMNS) of each row's samples, their maximum and the sum of exp(logit - maximum)."""
    column = tl.arange(0, COLUMNS)
    mask = real[:, None] & (column < SAMPLES)[None, :]
    logits = tl.load(scores + row[:, None] * SAMPLES + column[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    # Rows past the end have no logits; a maximum of -inf would turn them into NaN.
    logits = tl.where(real[:, None], logits, 0.0)
    peak = tl.max(logits, 1)
    return logits, peak, tl.sum(tl.exp(logits - peak[:, None]), 1)


@triton.jit(do_not_specialize=["sizes", "tokens", "queries", "num_rows"])
def forward_kernel(
    value,
    places,
    scores,
    references,
    output,
    sizes,
    tokens,
    queries,
    num_rows,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write output (B, Q, M, WIDTH) from value (B, S, M, WIDTH); ROWS and CHANNELS >= WIDTH are powers of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    channel = tl.arange(0, CHANNELS)
    used = (channel < WIDTH)[None, :]
    head = value + (row // (queries * HEADS) * tokens * HEADS + row % HEADS) * WIDTH
    head = head[:, None] + channel[None, :]
    if GEOMETRY != 0:
        _logits, peak, total = _softmax_terms(row, real, scores, LEVELS * POINTS, COLUMNS)
    result = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height = sizes[2 * level]
        width = sizes[2 * level + 1]
        for k in range(POINTS):
            point = level * POINTS + k
            weight = tl.load(scores + row * (LEVELS * POINTS) + point, mask=real, other=0.0).to(tl.float32)
            if GEOMETRY != 0:
                weight = tl.exp(weight - peak) / total
            x, y, _dx, _dy, _box_width, _box_height = _pixel(
                row, real, point, level, height, width, places, references, HEADS, LEVELS, POINTS, GEOMETRY
            )
            near, left, top, fx, fy = _corners(x, y, real, height, width)
            first = (start + top * width + left).to(tl.int64)[:, None] * (HEADS * WIDTH)
            for corner in tl.static_range(4):
                right = corner % 2
                below = corner // 2
                mask = _corner_mask(near, top + below, left + right, height, width)
                sample = tl.load(
                    head + first + (below * width + right) * (HEADS * WIDTH), mask=mask[:, None] & used, other=0.0
                )
                share = weight * (fx if right else 1.0 - fx) * (fy if below else 1.0 - fy)
                result += share[:, None] * sample.to(tl.float32)
        start += height * width
    tl.store(output + row[:, None] * WIDTH + channel[None, :], result, mask=real[:, None] & used)


# long: the running sums live in registers, which helpers would have to pass around
@triton.jit(do_not_specialize=["sizes", "tokens", "queries", "num_rows"])
def backward_kernel(
    grad_output,
    value,
    places,
    scores,
    references,
    grad_value,
    grad_places,
    grad_scores,
    grad_references,
    sizes,
    tokens,
    queries,
    num_rows,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    REFERENCE_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradients of `forward_kernel`; grad_value and grad_references are float32 and must be zero at first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    channel = tl.arange(0, CHANNELS)
    used = (channel < WIDTH)[None, :]
    head = (row // (queries * HEADS) * tokens * HEADS + row % HEADS) * WIDTH
    head = head[:, None] + channel[None, :]
    grad = tl.load(grad_output + row[:, None] * WIDTH + channel[None, :], mask=real[:, None] & used, other=0.0)
    grad = grad.to(tl.float32)
    column = tl.arange(0, COLUMNS)
    if GEOMETRY != 0:
        logits, peak, total = _softmax_terms(row, real, scores, LEVELS * POINTS, COLUMNS)
        grad_weights = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height = sizes[2 * level]
        width = sizes[2 * level + 1]
        if REFERENCE_GRADIENT:
            sum_x = tl.zeros((ROWS,), dtype=tl.float32)
            sum_y = tl.zeros((ROWS,), dtype=tl.float32)
            sum_width = tl.zeros((ROWS,), dtype=tl.float32)
            sum_height = tl.zeros((ROWS,), dtype=tl.float32)
        for k in range(POINTS):
            point = level * POINTS + k
            at = row * (LEVELS * POINTS) + point
            weight = tl.load(scores + at, mask=real, other=0.0).to(tl.float32)
            if GEOMETRY != 0:
                weight = tl.exp(weight - peak) / total
            x, y, dx, dy, box_width, box_height = _pixel(
                row, real, point, level, height, width, places, references, HEADS, LEVELS, POINTS, GEOMETRY
            )
            near, left, top, fx, fy = _corners(x, y, real, height, width)
            first = (start + top * width + left).to(tl.int64)[:, None] * (HEADS * WIDTH)
            grad_weight = tl.zeros((ROWS,), dtype=tl.float32)
            grad_x = tl.zeros((ROWS,), dtype=tl.float32)
            grad_y = tl.zeros((ROWS,), dtype=tl.float32)
            for corner in tl.static_range(4):
                right = corner % 2
                below = corner // 2
                mask = _corner_mask(near, top + below, left + right, height, width)[:, None] & used
                cell = head + first + (below * width + right) * (HEADS * WIDTH)
                across = fx if right else 1.0 - fx
                down = fy if below else 1.0 - fy
                dot = tl.sum(grad * tl.load(value + cell, mask=mask, other=0.0).to(tl.float32), 1)
                grad_weight += across * down * dot
                grad_x += (dot if right else -dot) * down
                grad_y += (dot if below else -dot) * across
                tl.atomic_add(grad_value + cell, (weight * across * down)[:, None] * grad, mask=mask, sem="relaxed")
            grad_x *= weight
            grad_y *= weight
            if GEOMETRY == 0:
                tl.store(grad_scores + at, grad_weight, mask=real)
                tl.store(grad_places + 2 * at, grad_x * width, mask=real)
                tl.store(grad_places + 2 * at + 1, grad_y * height, mask=real)
            else:
                grad_weights = tl.where((column == point)[None, :], grad_weight[:, None], grad_weights)
                if GEOMETRY == 2:
                    # If the reference is a point, offsets and positions are both measured in cells.
                    tl.store(grad_places + 2 * at, grad_x, mask=real)
                    tl.store(grad_places + 2 * at + 1, grad_y, mask=real)
                else:
                    tl.store(grad_places + 2 * at, grad_x * width * box_width * (0.5 / POINTS), mask=real)
                    tl.store(grad_places + 2 * at + 1, grad_y * height * box_height * (0.5 / POINTS), mask=real)
            if REFERENCE_GRADIENT:
                sum_x += grad_x * width
                sum_y += grad_y * height
                sum_width += grad_x * width * dx * (0.5 / POINTS)
                sum_height += grad_y * height * dy * (0.5 / POINTS)
        if REFERENCE_GRADIENT:
            reference = grad_references + (row // HEADS * LEVELS + level) * GEOMETRY
            tl.atomic_add(reference, sum_x, mask=real, sem="relaxed")
            tl.atomic_add(reference + 1, sum_y, mask=real, sem="relaxed")
            if GEOMETRY == 4:
                tl.atomic_add(reference + 2, sum_width, mask=real, sem="relaxed")
                tl.atomic_add(reference + 3, sum_height, mask=real, sem="relaxed")
        start += height * width
    if GEOMETRY != 0:
        # Gradient of the softmax: p * (g - sum(p * g)).
        weights = tl.exp(logits - peak[:, None]) / total[:, None]
        mean = tl.sum(weights * grad_weights, 1)
        tl.store(
            grad_scores + row[:, None] * (LEVELS * POINTS) + column[None, :],
            weights * (grad_weights - mean[:, None]),
            mask=real[:, None] & (column < LEVELS * POINTS)[None, :],
        )
