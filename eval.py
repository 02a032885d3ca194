"""Scores a checkpoint: mIoU of whole images, single-scale by default.

    python eval.py [CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT is MODEL_DIR/final.pth if not named, a file of tools.export, or a
folder that holds final.pth. It brings along its network, data set and split.
Writes eval.json, confusion.png and classes.png into LOG_DIR (of another run's
checkpoint: see docs/evaluation.md), and a line of results.csv. What test
servers score is written by tools.submit.

Shapes: b images, n classes, h x w feature grid, T iterations, k bases, H x W
pixels.
"""
if __name__ == '__main__':      # before torch, whose import takes seconds
    from lib import signals
    signals.end_while_starting()

import argparse
import functools
import math
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import dataset
import heads
import network
import settings
import utils
from lib import visualize
from lib.checkpoint import (
    check_writable,
    find_checkpoint,
    get_classes,
    load_strict,
)
from lib.cost import available_memory
from lib.distributed import describe_device, join, leave, pick_devices_for
from lib.download import file_hash
from lib.images import read_classes
from lib.recorded import adopt_data, report_folder
from lib.results import (
    RESULTS,
    append_result,
    log_scores,
    open_results,
    write_report,
)
from utils import UserError

MAX_WHOLE = 2 ** 23          # pixels; larger images use a sliding window even
#                              with EVAL_WINDOW=0 (Cityscapes at scale 2 fits)
MAX_BATCH = 2 ** 22          # pixels of a batch on a GPU, at the largest scale
DEFAULT_WINDOW = 513         # its side then
SHOWN_BASES = 8              # of which attention maps are drawn
_log_once = functools.cache(utils.log)
MOVED = {'--submit': 'python -m tools.submit',
         '--compare': 'python -m tools.compare_runs DIR'}


# ------------------------------------------------- one image
def predict_logits(net, image):
    """Return net's logits (b, n, H, W) of a normalised image (b, 3, H, W),
    which is padded for it."""
    height, width = image.shape[-2:]
    return net(pad_to_grid(image))[..., :height, :width]


def pad_to_grid(image):
    """Return a normalised image (b, 3, H, W) padded on the right and at the
    bottom with 0, the mean colour, to k * STRIDE + 1 pixels: with aligned
    corners any other size would shift the prediction."""
    down, right = (-(size - 1) % settings.STRIDE for size in image.shape[-2:])
    return F.pad(image, (0, right, 0, down))


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


def predict_classes(net, image, scales=(1.0,), flip=False):
    """Return the most probable class of each pixel, (b, H, W) uint8; see
    infer."""
    has_window = window_size(image.shape[-2:], scales) > 0
    if has_window and len(image) > 1:   # large ones: one after the other
        return torch.cat([predict_classes(net, one, scales, flip)
                          for one in image.split(1)])
    if tuple(scales) == (1.0,) and not flip and not has_window:
        check_memory(image.shape, image.device, scales)
        score = predict_logits(net, image)      # no softmax is needed
    else:
        score = infer(net, image, scales, flip)
    # on a CPU several times as fast as argmax(1)
    return score.max(1).indices.to(torch.uint8)


# ------------------------------------------------- sliding window
def window_size(size, scales):
    """Return the side of the sliding window for an image of size (H, W) at
    these scales, k * STRIDE + 1; 0: the image is taken whole."""
    wanted, stride = settings.EVAL_WINDOW, settings.STRIDE
    side = max(1, math.ceil(((wanted or DEFAULT_WINDOW) - 1) / stride)
               ) * stride + 1
    if wanted and max(size) > side:
        return side
    if math.prod(scaled_size(size, max(scales))) <= MAX_WHOLE:
        return 0
    if not wanted:
        _log_once(f'above {MAX_WHOLE} pixels, at the largest scale, images '
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


# ------------------------------------------------- a split
def prepare_network(net):
    """Return a function image -> logits in evaluation mode, as INFERENCE
    asks: the net, or a copy with batch norm folded, which is compiled, or in
    bfloat16, if wanted."""
    net.eval()
    if settings.INFERENCE == 'plain':
        return lambda image: net(image.contiguous())
    folded = network.fold_batch_norm(net)
    if settings.INFERENCE == 'folded':
        return folded
    if settings.INFERENCE == 'compiled':
        utils.check_compiler('INFERENCE=compiled')
        return torch.compile(folded, dynamic=True)
    for part in folded.modules():       # EM and its bases stay in float32
        if isinstance(part, torch.nn.Conv2d):
            part.to(torch.bfloat16)

    def run_in_bfloat16(image):
        with torch.autocast(image.device.type, torch.bfloat16):
            return folded(image)
    return run_in_bfloat16


def get_device(net):
    """Return the device that a network takes images on."""
    return next((p.device for p in net.parameters()), torch.device('cpu'))


def eval_batch_size(device, size):
    """Return how many images of size (H, W) are predicted at once."""
    if settings.EVAL_BATCH or device.type != 'cuda':
        return settings.EVAL_BATCH or 1
    pixels = math.prod(scaled_size(size, max(settings.EVAL_SCALES)))
    return max(1, min(8, MAX_BATCH // pixels))


def padded_size(size):
    """Return the size (H, W) that an image of a size is padded to, if it is
    predicted once and whole; else its own."""
    s = settings
    if tuple(s.EVAL_SCALES) != (1,) or s.EVAL_FLIP or window_size(size, (1,)):
        return size
    return tuple(side + -(side - 1) % s.STRIDE for side in size)


def check_labels(data):
    """Check a split's class names against N_CLASSES and, in the first
    process, read every label. Raises UserError."""
    names, _ = read_classes(data.root, data.n_classes)
    if utils.rank():
        return
    counts = data.scan_labels(lambda results: utils.progress(
        results, total=len(data), desc=f'check {data.split}', leave=False))
    absent = [name for name, count in zip(names, counts) if not count]
    if data.train and absent:
        utils.log(f'warning: no pixel of {data.split} is '
                  f'{", ".join(absent)}')


@torch.no_grad()
def predictions(net, data):
    """Yield (classes (b, H, W) uint8, label, IDs) of this process's share of
    a split, on the net's device, at EVAL_SCALES and EVAL_FLIP; smaller images
    of a batch are padded, their labels by void. The net is left in evaluation
    mode."""
    device, run = get_device(net), prepare_network(net)
    batch_size, sizes = functools.partial(eval_batch_size, device), []
    if batch_size((1, 1)) > 1:
        sizes = data.image_sizes()
    loader = dataset.val_loader(data, utils.rank(), utils.world(),
                                [*map(padded_size, sizes)], batch_size)
    size_of = dict(zip(data.ids, sizes))
    dataset.retain_freed_memory()
    bar = utils.progress(total=len(data), desc='evaluate', unit='image',
                         leave=False)
    for image, label, ids in dataset.to_device(loader, device):
        image = dataset.normalise(image, device)
        for one, name in zip(image, ids):       # pad_to_grid pads with 0
            height, width = size_of.get(name, one.shape[1:])
            one[:, height:], one[:, :, width:] = 0, 0
        yield predict_classes(run, image, settings.EVAL_SCALES,
                              settings.EVAL_FLIP), label, ids
        bar.update(len(ids) * utils.world())
    bar.close()


def evaluate(net, data):
    """Return the confusion matrix (n, n) int64, rows label, of a net on a
    split, which all processes share; the net is left in evaluation mode."""
    n = settings.N_CLASSES
    confusion = torch.zeros(n, n, dtype=torch.int64, device=get_device(net))
    for pred, label, _ in predictions(net, data):
        confusion += utils.confusion_matrix(pred, label, n,
                                            settings.IGNORE_LABEL)
    if utils.world() > 1:
        dist.all_reduce(confusion)
    return confusion.cpu()


# ------------------------------------------------- attention maps
def ema_unit(net):
    """Return a network's EMA unit; raise UserError where it has none."""
    unit = getattr(net, 'emau', None)
    if not isinstance(unit, network.EMAU):
        raise UserError(f'attention maps are those of an EMA unit, and this '
                        f'network has none (HEAD={settings.HEAD}); name a '
                        f'checkpoint with HEAD=ema')
    return unit


@torch.no_grad()
def attention(net, image):
    """Return the responsibilities z of each EM iteration, (T, k, h, w), which
    sum to 1 over k, of a normalised image (1, 3, H, W), which is padded."""
    unit = ema_unit(net)
    x = unit.conv1(net.fc0(net.extractor(pad_to_grid(image))))  # (1, c, h, w)
    return torch.stack([
        z[0].t().reshape(-1, *x.shape[2:])
        for z, _ in unit.em(x.flatten(2), unit.mu.to(x.dtype))])


def attention_maps(net, image, device, bases=()):
    """Compute where the bases of an EMA unit attend in an image.

    The image is taken whole, at the first of EVAL_SCALES, or smaller where
    it is huge.

    Args:
        net: an EMANet on the device.
        image: (H, W, 3) uint8 RGB.
        bases: their indices; () for those of select_diverse_bases.
    Returns: (bases, their shares of the image, maps (T, bases, h, w), 0..1,
    of the size of a panel of lib.visualize, number of all bases).
    """
    x = torch.from_numpy(image).permute(2, 0, 1)[None]      # (1, 3, H, W)
    scale = min(settings.EVAL_SCALES[0],
                math.sqrt(MAX_WHOLE / math.prod(image.shape[:2])))
    x = resize(dataset.normalise(x, device),
               scaled_size(image.shape[:2], scale))
    z = attention(net, x)                                   # (T, k, h, w)
    rows, columns = ((side - 1) // settings.STRIDE + 1 for side in x.shape[2:])
    last = z[-1, :, :rows, :columns].flatten(1)             # (k, n)
    bases, shares = list(bases) or select_diverse_bases(last), last.mean(1)
    maps = [[visualize.fit_panel(map_on_pixels(z[t, i], x), image.shape[:2])
             for i in bases] for t in range(len(z))]
    return bases, shares[bases].tolist(), np.array(maps), len(last)


def map_on_pixels(z, image):
    """Return a map (h, w) of `attention` on the pixels of its image (1, 3, H,
    W), as an array (H, W)."""
    height, width = image.shape[-2:]
    return network.upsample(z[None, None], pad_to_grid(image).shape[-2:])[
        0, 0, :height, :width].cpu().numpy()


def select_diverse_bases(z):
    """Return SHOWN_BASES indices of z (k, n), chosen one after the other for
    much use and little similarity to those chosen: many attend alike."""
    normed = F.normalize(z, dim=1)
    similarity, value, bases = normed @ normed.t(), z.mean(1), []   # (k, k)
    for _ in range(min(SHOWN_BASES, len(z))):
        bases.append(int(value.argmax()))
        value = value.minimum(z.mean(1) * (1 - similarity[bases[-1]]))
        value[bases[-1]] = -1
    return bases


# ------------------------------------------------- report
def score(net, data, names):
    """Score a net on a split and log it; return the result as eval.json has
    it."""
    confusion = evaluate(net, data)
    result = utils.scores(confusion, settings.EVAL_CLASSES)
    classes = {name: dict(zip(names, result.pop(name)))
               for name in utils.PER_CLASS}
    log_scores(classes, result)
    return {**result, 'classes': classes.pop('IoU'), **classes,
            'confusion': confusion.tolist()}


def report(net, checkpoint, path, digest):
    """Score a checkpoint's weights, averaged ones too, on VAL_SPLIT; write
    the result. digest: the sha256 of the file."""
    data = dataset.Segmentation(settings.VAL_SPLIT, train=False)
    check_labels(data)
    names, colours = get_classes(checkpoint)
    folder = report_folder(checkpoint, path)
    if utils.rank() == 0:
        check_writable('LOG_DIR', folder)
        open_results().close()          # fail early
    scored = {
        'checkpoint': path, 'sha256': digest[:12],
        'step': checkpoint.get('step'), 'data': data.root,
        'split': data.split, 'images': len(data),
        'stride': settings.STRIDE, 'scales': settings.EVAL_SCALES,
        'flip': settings.EVAL_FLIP, 'window': settings.EVAL_WINDOW,
        'inference': settings.INFERENCE, 'mean_over': settings.EVAL_CLASSES,
        'stages': [unit.stages[1] for unit in network.ema_units(net)]}
    results = {}
    for weights in [name for name in ('net', 'average') if name in checkpoint]:
        if weights == 'average':
            utils.log('the same with averaged weights:')
            load_strict(net, checkpoint['average'], path)
        start = time.perf_counter()
        results[weights] = score(net, data, names)
        if utils.rank() == 0:
            append_result(scored, weights, results[weights],
                          time.perf_counter() - start)
    if utils.rank() == 0:
        write_report({**results.pop('net'), **results,
                      'scored': {**scored, 'unit': '0..1'}},
                     names, colours, folder)
    utils.log(f'{utils.plural(len(data), "image")} of {data.split}, step '
              f'{checkpoint.get("step")} of {path}; eval.json, '
              f'confusion.png and classes.png are in {folder}, and a line in '
              f'{RESULTS}')


def parse_arguments(words):
    """Return the checkpoint that the command line names, or None; set the
    settings that it gives."""
    parser = utils.make_parser(__doc__, settings.describe())
    parser.add_argument('checkpoint', nargs='?', help=argparse.SUPPRESS)
    for option in {word.partition('=')[0] for word in words} & set(MOVED):
        raise UserError(f'{option}: this is now {MOVED[option]}')
    path = parser.parse_args(settings.override(words)).checkpoint
    if path == '':
        raise UserError("'': name a checkpoint, or nothing for MODEL_DIR's "
                        "final.pth")
    return path


def main():
    path = find_checkpoint(parse_arguments(sys.argv[1:]))
    device = join(pick_devices_for(path))
    utils.log(f'device: {describe_device(device)}, processes: '
              f'{utils.world()}')
    digest = file_hash(path)            # now: a run may write the file anew
    net, checkpoint = heads.load_network(path, device)
    adopt_data(checkpoint, path)
    report(net, checkpoint, path, digest)
    leave(0)


if __name__ == '__main__':
    utils.run_main(main)
