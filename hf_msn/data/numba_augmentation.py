"""Flip, colour jitter, grayscale, blur and normalisation of views on a CPU, compiled by numba.

Each view goes through all of it while it is in the core's cache. The code is float32 throughout and loops over slices
that begin at 0, which become vector instructions. Its slow twin is `augmentation.finish_views_with_torch`.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numba
import numpy as np
import torch

from .view_parameters import (
    BLUR_REACH,
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    FLIP,
    GRAY_WEIGHTS,
    GRAYSCALE,
    JITTER,
    ORDER,
    SATURATION,
    SIGMA,
)

_SETTINGS = {
    "nogil": True,
    "error_model": "numpy",
    # sums may be reordered, which vector instructions need; NaN and infinity keep their meaning
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}
_inner = numba.njit(inline="never", **_SETTINGS)

# numba compiles these in as constants, and its cache looks at this file alone: touch it when one of them changes
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in GRAY_WEIGHTS)
_ZERO, _ONE, _FOUR, _SIX = np.float32(0), np.float32(1), np.float32(4), np.float32(6)
_BYTE, _SIXTH = np.float32(1 / 255), np.float32(1 / 6)
_BLOCK = 256  # pixels whose gray values are summed in float32, before their sums are in float64


def finish_views(
    crops: torch.Tensor, parameters: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Finish N views on as many threads as torch has.

    Arguments and result are those of [`~hf_msn.data.augmentation.finish_views_with_torch`], on the CPU.
    """
    num_views, height, width, _ = crops.shape
    finished = torch.empty(num_views, 3, height, width)
    tensors = (crops, parameters, multiplier, offset, finished)
    arrays = tuple(np.ascontiguousarray(tensor.numpy()) for tensor in tensors)
    finish, threads = compiled(), min(torch.get_num_threads(), num_views)
    if threads < 2:
        finish(*arrays, 0, num_views)
        return finished
    # several pieces per thread, as views with blur take longer than others
    pieces = min(num_views, 4 * threads)
    bounds = [piece * num_views // pieces for piece in range(pieces + 1)]
    pool = _threads(os.getpid(), threads)
    for piece in [pool.submit(finish, *arrays, *pair) for pair in pairwise(bounds)]:
        piece.result()
    return finished


@cache
def _threads(process: int, number: int) -> ThreadPoolExecutor:
    # one pool per process: threads do not survive the fork into a loader's worker
    return ThreadPoolExecutor(number, thread_name_prefix="views")


@cache
def compiled() -> Callable[..., None]:
    """Compile the loop over the views. It takes seconds unless numba finds an earlier result on disk."""
    array = numba.types.Array
    tables = [array(numba.float32, dimensions, "C") for dimensions in (2, 1, 1, 4)]
    signature = numba.void(array(numba.uint8, 4, "C"), *tables, numba.int64, numba.int64)
    try:
        return numba.njit(signature, cache=True, **_SETTINGS)(_finish)
    except RuntimeError as error:  # neither the package's folder nor the user's is writable
        if "cannot cache" not in str(error):
            raise
        return numba.njit(signature, **_SETTINGS)(_finish)


def _finish(crops, parameters, multiplier, offset, finished, start, stop):
    height, width = crops.shape[1:3]
    view = np.empty((3, height * width), np.float32)
    rows = np.empty((height, width), np.float32)
    line = np.empty(3 * width, np.float32)
    for number in range(start, stop):
        parameter = parameters[number]
        _load(crops[number], parameter[FLIP] > 0, view)
        if parameter[JITTER] > 0:
            for place in range(4):
                operator = int(parameter[ORDER + place])
                factor = parameter[FACTORS + operator]
                if operator == BRIGHTNESS:
                    _brightness(view, factor)
                elif operator == CONTRAST:
                    _contrast(view, factor)
                elif operator == SATURATION:
                    _saturation(view, factor)
                else:
                    _hue(view, factor)
        if parameter[GRAYSCALE] > 0:
            _gray(view)
        if parameter[SIGMA] > 0:
            _blur(view, parameter[SIGMA], rows, line)
        _store(view, multiplier, offset, finished[number].reshape(3, height * width))


@_inner
def _load(crop, flip, view):
    height, width = crop.shape[:2]
    for y in range(height):
        pixels = crop[y]
        begin = y * width
        red, green, blue = (
            view[0, begin : begin + width],
            view[1, begin : begin + width],
            view[2, begin : begin + width],
        )
        for x in range(width):
            red[x] = pixels[x, 0] * _BYTE
            green[x] = pixels[x, 1] * _BYTE
            blue[x] = pixels[x, 2] * _BYTE
        if flip:
            for channel in range(3):
                line = view[channel, begin : begin + width]
                for x in range(width // 2):
                    line[x], line[width - 1 - x] = line[width - 1 - x], line[x]


@_inner
def _brightness(view, factor):
    for channel in range(3):
        values = view[channel]
        for i in range(values.size):
            values[i] = min(max(values[i] * factor, _ZERO), _ONE)


@_inner
def _contrast(view, factor):
    red, green, blue = view[0], view[1], view[2]
    total = 0.0
    for begin in range(0, red.size, _BLOCK):
        r, g, b = red[begin : begin + _BLOCK], green[begin : begin + _BLOCK], blue[begin : begin + _BLOCK]
        block = _ZERO
        for i in range(r.size):
            block += _RED * r[i] + _GREEN * g[i] + _BLUE * b[i]
        total += block
    rest = np.float32((1 - factor) * (total / red.size))
    for channel in range(3):
        values = view[channel]
        for i in range(values.size):
            values[i] = min(max(values[i] * factor + rest, _ZERO), _ONE)


@_inner
def _saturation(view, factor):
    red, green, blue = view[0], view[1], view[2]
    rest = _ONE - factor
    for i in range(red.size):
        gray = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i] = min(max(red[i] * factor + gray, _ZERO), _ONE)
        green[i] = min(max(green[i] * factor + gray, _ZERO), _ONE)
        blue[i] = min(max(blue[i] * factor + gray, _ZERO), _ONE)


@_inner
def _hue(view, factor):
    # channel = value - chroma * clip(min(k, 4 - k), 0, 1), with k its place on the circle of six colours + the hue
    red, green, blue = view[0], view[1], view[2]
    shift = factor * _SIX
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        share = _ONE / (chroma if chroma > _ZERO else _ONE)
        if value == r:
            hue = (g - b) * share
        elif value == g:
            hue = (b - r) * share + np.float32(2)
        else:
            hue = (r - g) * share + _FOUR
        hue += shift
        k = hue + np.float32(5)
        k -= _SIX * np.floor(k * _SIXTH)
        red[i] = value - chroma * max(_ZERO, min(_ONE, min(k, _FOUR - k)))
        k = hue + np.float32(3)
        k -= _SIX * np.floor(k * _SIXTH)
        green[i] = value - chroma * max(_ZERO, min(_ONE, min(k, _FOUR - k)))
        k = hue + _ONE
        k -= _SIX * np.floor(k * _SIXTH)
        blue[i] = value - chroma * max(_ZERO, min(_ONE, min(k, _FOUR - k)))


@_inner
def _gray(view):
    red, green, blue = view[0], view[1], view[2]
    for i in range(red.size):
        gray = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
        red[i] = gray
        green[i] = gray
        blue[i] = gray


@_inner
def _blur(view, sigma, rows, line):
    height, width = rows.shape
    radius = min(math.ceil(BLUR_REACH * sigma), min(height, width) - 1)  # reflection needs that many pixels
    weights = np.empty(radius + 1, np.float32)
    total = 0.0
    for k in range(radius + 1):
        weights[k] = math.exp(-0.5 * (k / sigma) ** 2)
        total += weights[k] * (1 if k == 0 else 2)
    for k in range(radius + 1):
        weights[k] /= total
    for channel in range(3):
        values = view[channel].reshape(height, width)
        for y in range(height):
            row = values[y]
            middle = line[radius : radius + width]
            for x in range(width):
                middle[x] = row[x]
            for k in range(1, radius + 1):
                line[radius - k] = row[k]
                line[radius + width - 1 + k] = row[width - 1 - k]
            _blur_row(rows[y], line, weights, radius)
        for y in range(height):
            out, middle, weight = values[y], rows[y], weights[0]
            for x in range(width):
                out[x] = weight * middle[x]
            for k in range(1, radius + 1):
                above, weight = rows[abs(y - k)], weights[k]
                below = rows[y + k if y + k < height else 2 * (height - 1) - y - k]
                for x in range(width):
                    out[x] += weight * (above[x] + below[x])


@_inner
def _blur_row(out, line, weights, radius):
    width = out.size
    middle, weight = line[radius : radius + width], weights[0]
    for x in range(width):
        out[x] = weight * middle[x]
    for k in range(1, radius + 1):
        left, right, weight = line[radius - k : radius - k + width], line[radius + k : radius + k + width], weights[k]
        for x in range(width):
            out[x] += weight * (left[x] + right[x])


@_inner
def _store(view, multiplier, offset, finished):
    for channel in range(3):
        values, out, factor, rest = view[channel], finished[channel], multiplier[channel], offset[channel]
        for i in range(values.size):
            out[i] = values[i] * factor - rest
