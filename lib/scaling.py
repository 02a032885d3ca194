"""Scales images and labels, of which only the window that a crop shows is
computed, bit for bit as in the whole.
"""
import functools
from fractions import Fraction

import cv2
import numpy as np


@functools.cache
def _ratio(scale):
    """Return a scale as the fraction that it is meant to be: 0.4 is 2/5."""
    return Fraction(str(scale))


def scaled_side(side, scale):
    """Return the pixels of a side that is scaled: side * scale rounded, half
    a pixel downwards."""
    p, q = _ratio(scale).as_integer_ratio()
    return max(1, (2 * side * p + q - 1) // (2 * q))


def scaled_image(image, scale, rows, columns):
    """Return the window rows x columns (ranges) of an image (H, W, 3) that is
    scaled bilinearly: pixel i shows the place (i + 0.5) / scale - 0.5.

    Bit-equal to scaling the whole, whatever OpenCV and processor: where
    scale is p / q, the grid repeats every q pixels, so a window that begins
    at a multiple of q is weighted as the whole is; and INTER_LINEAR_EXACT,
    unlike INTER_LINEAR, keeps its weights free of rounding that grows with
    the coordinate.
    """
    if scale == 1:
        return image[rows.start:rows.stop, columns.start:columns.stop]
    period, source, inside = _ratio(scale).denominator, [], []
    for span, side in zip((rows, columns), image.shape):
        first, last = ((i + 0.5) / scale - 0.5 for i in (span[0], span[-1]))
        first = max(0, int(first)) // period * period
        skipped = round(first * scale)
        source.append(slice(first, min(side, int(last) + 3)))
        inside.append(slice(span.start - skipped, span.stop - skipped))
    window = cv2.resize(image[tuple(source)], None, fx=scale, fy=scale,
                        interpolation=cv2.INTER_LINEAR_EXACT)
    return window[tuple(inside)]


def scaled_label(label, scale, rows, columns):
    """Return the same window of a label (H, W): each pixel has the value of
    the source pixel that its centre lies in."""
    if scale == 1:
        return label[rows.start:rows.stop, columns.start:columns.stop]
    y, x = (np.minimum(((np.asarray(span) + 0.5) / scale).astype(np.intp),
                       side - 1) for span, side in zip((rows, columns),
                                                       label.shape))
    return label[y][:, x]
