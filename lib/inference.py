"""Predicts images of any size with a network: padding, scales, flip, sliding
window.

Shapes: b images, n classes, H x W pixels.
"""
import math

import torch
import torch.nn.functional as F

import settings
from lib.backbones import grid_extra
from lib.cost import available_memory
from utils import UserError, log_once

MAX_WHOLE = 2 ** 23          # pixels; larger images use a sliding window even
#                              with EVAL_WINDOW=0 (Cityscapes at scale 2 fits)
DEFAULT_WINDOW = 513         # its side then


# ------------------------------------------------- padding, scaling
def predict_logits(net, image, extra=None):
    """Return net's logits (b, n, H, W) of a normalised image (b, 3, H, W),
    which is padded for it. extra: see fit_grid."""
    height, width = image.shape[-2:]
    return net(pad_to_grid(image, extra))[..., :height, :width]


def pad_to_grid(image, extra=None):
    """Return a normalised image (b, 3, H, W) padded on the right and at the
    bottom with 0, the mean colour, to the size that fits the backbone's grid:
    with any other the prediction would be shifted. extra: see fit_grid."""
    down, right = (fit_grid(size, extra) - size for size in image.shape[-2:])
    return F.pad(image, (0, right, 0, down))


def fit_grid(side, extra=None):
    """Return the least side, pixels, from this on, that fits the backbone's
    grid: k * STRIDE + 1, or k * STRIDE of patches (lib/backbones.py).

    extra: grid_extra(), where it is known.
    """
    extra = grid_extra() if extra is None else extra
    return side + (extra - side) % settings.STRIDE


def padded_size(size):
    """Return the size (H, W) that an image of a size is padded to, if it is
    predicted once and whole; else its own."""
    if is_simple(size, settings.EVAL_SCALES, settings.EVAL_FLIP):
        return tuple(map(fit_grid, size))
    return size


def is_simple(size, scales, flip):
    """Tell whether an image of size (H, W) is predicted once and whole."""
    return (tuple(scales) == (1,) and not flip
            and not window_size(size, scales))


def scaled_size(size, scale):
    """Return the size (H', W') of an image of size (H, W) when scaled."""
    return [max(1, round(side * scale)) for side in size]


def resize(x, size):
    """Return x (b, c, h, w) at another size, on the half-pixel grid."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size, mode='bilinear', align_corners=False)


def infer(net, image, scales=(1.0,), flip=False):
    """Return class probabilities, averaged over the scales and, with flip,
    over the left-right flip.

    Args:
        net: image (b, 3, H, W) to logits, such as prepare_network returns.
        image: normalised, float (b, 3, H, W).
        scales: the image is resized by each, and its probabilities resized
            back, on the half-pixel grid of the training data.
        flip: average over the flipped image too.
    Returns: (b, n, H, W), 0..1.
    Raises: UserError where that does not fit into memory.
    """
    size, total = image.shape[-2:], None
    side = window_size(size, scales) or math.inf
    check_memory(image.shape, image.device, scales)
    for scale in scales:
        scaled = resize(image, scaled_size(size, scale))
        prob = resize(sliding_window(net, scaled, side, flip), size)
        total = prob if total is None else total.add_(prob)
        del prob                # the next scale needs the memory
    return total.div_(len(scales))


def predict_scores(net, image, scales=(1.0,), flip=False):
    """Return what the classes of each pixel are chosen by, (b, n, H, W):
    logits where that is_simple, else infer's probabilities."""
    if not is_simple(image.shape[-2:], scales, flip):
        return infer(net, image, scales, flip)
    check_memory(image.shape, image.device, scales)
    return predict_logits(net, image)


def predict_classes(net, image, scales=(1.0,), flip=False):
    """Return the most probable class of each pixel, (b, H, W) uint8; see
    infer."""
    return best_classes(predict_scores(net, image, scales, flip))


def best_classes(score):
    """Return the class with the greatest score, (b, H, W) uint8; on a CPU
    several times as fast as argmax(1)."""
    return score.max(1).indices.to(torch.uint8)


def sum_loss(score, label, scales, flip):
    """Return the sum of the cross-entropy over the labelled pixels, a scalar.

    score: of predict_scores; label: (b, H, W).
    """
    if not is_simple(score.shape[-2:], scales, flip):
        score = score.clamp(min=torch.finfo(score.dtype).tiny).log()
    return F.cross_entropy(score, label.long(), reduction='sum',
                           ignore_index=settings.IGNORE_LABEL)


# ------------------------------------------------- sliding window
def window_size(size, scales):
    """Return the side of the sliding window for an image of size (H, W) at
    these scales, of fit_grid; 0: the image is taken whole."""
    wanted = settings.EVAL_WINDOW
    side = fit_grid(max(2, wanted or DEFAULT_WINDOW))
    if wanted and max(size) > side:
        return side
    if math.prod(scaled_size(size, max(scales))) <= MAX_WHOLE:
        return 0
    if not wanted:
        log_once(f'above {MAX_WHOLE} pixels, at the largest scale, images '
                 f'are predicted by a sliding window of {side} x {side}; '
                 f'EVAL_WINDOW sets its side')
    return side


def window_starts(length, side):
    """Return where windows begin that lie evenly on a length, the last at
    its end, each sharing at least a third with the next."""
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (2 * side // 3)) + 1
    return [i * (length - side) // (count - 1) for i in range(count)]


def sliding_window(net, image, side, flip=False):
    """Return class probabilities (b, n, H, W) of an image (b, 3, H, W),
    predicted in windows of at most side x side pixels and averaged where
    they overlap; with flip, those of the flipped image too."""
    b, _, height, width = image.shape
    total = image.new_zeros(b, settings.N_CLASSES, height, width)
    count = image.new_zeros(height, width)
    side = min(side, max(height, width))
    for is_flipped in (False, True)[:1 + flip]:
        source = image.flip(3) if is_flipped else image
        for top in window_starts(height, side):
            for left in window_starts(width, side):
                window = source[:, :, top:top + side, left:left + side]
                prob = predict_logits(net, window).softmax(1)
                if is_flipped:
                    prob, left = prob.flip(3), max(0, width - side - left)
                here = (..., slice(top, top + side), slice(left, left + side))
                total[here] += prob
                count[here] += 1
                del prob        # the next window needs the memory
    return total.div_(count)


def check_memory(shape, device, scales):
    """Raise UserError unless the memory is there that infer needs for images
    (b, 3, H, W) of float32 on a CPU: Linux kills a process that takes too
    much before it sees an error. (A GPU raises one.)"""
    (b, _, *size), n = shape, settings.N_CLASSES
    side = window_size(size, scales) or math.inf
    scaled = scaled_size(size, max(scales))
    numbers = (n + 7) * math.prod(scaled)   # the sum; image, its flip, count
    numbers += 2 * n * math.prod(min(x, side) for x in scaled)  # of a window
    resized = any(scale != 1 for scale in scales) + (len(scales) > 1)
    numbers += (n * resized + 3) * math.prod(size)  # 3: class, its score
    needed, free = 4 * b * numbers, available_memory()
    if device.type == 'cpu' and free is not None and needed > free:
        raise UserError(
            f'images of {size[1]} x {size[0]} pixels in {n} classes, {b} at '
            f'once at EVAL_SCALES={tuple(scales)}, need {needed / 1e9:.1f} GB '
            f'of memory, {free / 1e9:.1f} GB are free; make them smaller, or '
            f'name fewer, smaller scales')
