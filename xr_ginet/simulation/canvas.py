"""What the land is drawn with: cells of 5 m, streams of random numbers, smooth fields and meandering curves.

Nothing here knows what a field or a river is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Index = NDArray[np.int32]
Mask = NDArray[np.bool_]

CELL = 5.0  # metres: the land is drawn twice as fine as the finest pixel, so that edges become mixed pixels


def random_stream(seed: int, *words: str | int) -> np.random.Generator:
    """Return a stream of its own for each purpose, so that adding one does not change the others."""
    entropy = [word if isinstance(word, int) else int.from_bytes(word.encode(), "little") for word in words]
    return np.random.default_rng([seed, *entropy])


def smooth(shape: tuple[int, int], scale: float, rng: np.random.Generator) -> Float:
    """Return a Gaussian field of mean 0, standard deviation about 1 and features of ``scale`` metres.

    Cubic B-splines over random knots: one pass per axis with four taps, whatever the scale.
    """
    knots = rng.standard_normal([int(n * CELL / scale) + 5 for n in shape], dtype=np.float32)
    for axis in (0, 1):
        position = np.arange(shape[axis], dtype=np.float32) * np.float32(CELL / scale)
        start = position.astype(np.intp)
        t = position - start
        taps = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        along = (-1, 1) if axis == 0 else (1, -1)
        out = np.zeros(1, np.float32)
        for i, tap in enumerate(taps):
            out = out + np.take(knots, start + i, axis=axis) * (tap / 6).reshape(along)
        knots = out
    return knots * np.float32(315 / 151)  # a cubic B-spline keeps 151/315 of white noise's variance per axis


def distance_to_curve(
    along: Float, across: Float, rng: np.random.Generator, *, start: float, reach: float, period: float
) -> Float:
    """Return the signed distance in metres from a curve that meanders in the direction of ``along``."""
    centre, slope = np.full(1, start, np.float32), np.zeros(1, np.float32)
    for octave in (1.0, 0.47, 0.23):
        wavenumber, phase = 2 * np.pi / (period * octave), rng.uniform(0, 6.28)
        swing = reach * octave**1.2 * rng.uniform(0.7, 1.3)
        angle = along * np.float32(wavenumber) + np.float32(phase)
        centre = centre + np.float32(swing) * np.sin(angle)
        slope = slope + np.float32(swing * wavenumber) * np.cos(angle)
    return ((across - centre) / np.sqrt(1 + slope**2)).astype(np.float32)
