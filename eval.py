"""Scores a checkpoint: mIoU of the whole image, single-scale by default.

    python eval.py [CHECKPOINT] [KEY=VALUE ...]
    python eval.py --submit [CHECKPOINT] [KEY=VALUE ...]
    python eval.py --compare DIR

CHECKPOINT is models/final.pth if not named, or a file that predict.py
--export wrote. The network is rebuilt from what the checkpoint recorded.
Writes LOG_DIR/eval.json, confusion.png and classes.png beside it, and a line
of results.csv. --submit writes the VOC test server's results.tgz instead, and
needs no labels. --compare prints a table of the experiments in DIR's folders.
Shapes: b images, n classes, H x W pixels.
"""
import argparse
import ast
import collections
import csv
import fcntl
import functools
import glob
import json
import math
import os
import shutil
import statistics
import sys
import tarfile
import textwrap
import time

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import baselines
import dataset
import network
import settings
import utils

INFERENCES = ('plain', 'folded', 'bf16')
WHOLE = 2 ** 23              # pixels that EVAL_WINDOW=0 sees at once, at most:
#                              a Cityscapes picture at scale 2
WINDOW = 513                 # side of the windows for larger ones
BAND = 64                    # rows that windows' scores are finished at once
SUMS = 2 ** 29               # scores of windows that are kept at once, 2 GB
DRAWN = 4                    # images of a split that are drawn for the log
SHOWN = 8                    # bases that are drawn
PANEL = 256                  # longer side of a drawn map, pixels
RESULTS = 'results.csv'
COLUMNS = ('experiment', 'checkpoint', 'sha256', 'weights', 'step', 'data',
           'split', 'images', 'stride', 'scales', 'flip', 'window',
           'inference', 'mean_over', 'mIoU', 'seconds', 'git', 'IoU')
SUBMISSION = 'results/VOC2012/Segmentation/comp6_test_cls'
ARCHIVE = 'results.tgz'


# ------------------------------------------------- pixels
def logits(net, image):
    """Return net's logits (b, n, H, W) of a normalised image (b, 3, H, W),
    which is padded for it."""
    height, width = image.shape[-2:]
    return net(padded(image))[..., :height, :width]


def padded(image):
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


# ------------------------------------------------- windows
class Blend:
    """How pixels in a range of a resized side are made of the source's: from
    those of start to stop, as resize makes them."""

    def __init__(self, span, source, resized):
        place = (torch.arange(span.start, span.stop, dtype=torch.float64)
                 + 0.5) * source / resized - 0.5
        place = place.clamp(0, source - 1)
        above = place.long()
        below = (above + 1).clamp(max=source - 1)
        self.start, self.stop = int(above[0]), int(below[-1]) + 1
        self.above, self.below = above - self.start, below - self.start
        self.share = place - above

    def of(self, x, dim):
        """Return the range made of x, which has start to stop along dim."""
        a, b = (x.index_select(dim, i.to(x.device))
                for i in (self.above, self.below))
        share = self.share.to(x.dtype).to(x.device)
        return a.lerp(b, share[:, None] if dim == 2 else share)


def window_side(size, scales):
    """Return the side of the windows that an image of size (H, W) is seen
    through at these scales, k * STRIDE + 1; 0: as a whole."""
    asked, stride = settings.EVAL_WINDOW, settings.STRIDE
    side = max(1, math.ceil(((asked or WINDOW) - 1) / stride)) * stride + 1
    if asked and max(size) > side:
        return side
    if math.prod(scaled_size(size, max(scales))) <= WHOLE:
        return 0
    if not asked:
        _say(f'above {WHOLE} pixels, at the largest scale, an image is seen '
             f'through windows of {side} x {side}; EVAL_WINDOW sets their '
             f'side')
    return side


@functools.cache
def _say(text):
    """Log a text once, not for every image."""
    utils.log(text)


def starts(length, side):
    """Return where windows begin that lie evenly on a length, the last at
    its end, each sharing at least a third with the next."""
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (2 * side // 3)) + 1
    return [i * (length - side) // (count - 1) for i in range(count)]


def spans(length, most):
    """Return ranges of at most `most` that make up a length."""
    return [range(start, min(start + most, length))
            for start in range(0, length, most)]


@torch.no_grad()
def through_windows(net, image, scales, flip, side):
    """Yield (rows, columns, class probabilities (b, n, h, w)) of the parts of
    an image, which cover it: infer's, where each scaled image is seen through
    windows of side x side and averaged where they overlap.

    The scales go down the image together, so that no more is kept of any than
    a row of windows; of a very wide image it is done in several columns, and
    windows across their borders are seen twice.
    """
    height, width = image.shape[-2:]
    per_column = settings.N_CLASSES * side * sum(scales)
    columns = spans(width, max(side, int(SUMS / per_column)))
    rows = spans(height, BAND)
    with utils.progress(total=len(rows) * len(columns), desc='windows',
                        unit='part', leave=False, delay=10) as bar:
        for across in columns:
            parts = zip(*[_bands(net, image, scale, flip, side, rows, across)
                          for scale in scales])
            for down, prob in zip(rows, parts):
                yield (slice(down.start, down.stop),
                       slice(across.start, across.stop),
                       sum(prob) / len(scales))
                bar.update()


def _bands(net, image, scale, flip, side, rows, across):
    """Yield one scale's probabilities (b, n, h, w) of each range of rows, at
    the image's own size, of the columns `across`.

    Kept are the windows' sums, and as the last channel how many they are, of
    those scaled rows that are not finished with.
    """
    size = scaled_size(image.shape[-2:], scale)             # (H', W')
    downs = [Blend(down, size[0], image.shape[2]) for down in rows]
    across = Blend(across, size[1], image.shape[3])
    tops, sums, first = starts(size[0], side), None, 0
    for top, after in zip(tops, [*tops[1:], size[0]]):
        new = _row_of_windows(net, image, size, flip, side, top, across)
        if sums is not None:
            known = first + sums.shape[2] - top             # rows of new
            sums[:, :, top - first:] += new[:, :, :known]
            new = torch.cat([sums, new[:, :, known:]], 2)
        sums, new = new, None                               # (b, n + 1, h, w')
        while downs and downs[0].stop <= after:
            down = downs.pop(0)
            prob = sums[:, :, down.start - first:down.stop - first]
            prob = prob[:, :-1] / prob[:, -1:]              # (b, n, h, w')
            yield across.of(down.of(prob, 2), 3)
        if not downs:
            return
        done, first = first, min(after, downs[0].start)
        sums = sums[:, :, first - done:].clone()


def _row_of_windows(net, image, size, flip, side, top, across):
    """Return the sums of class probabilities, and their number as the last
    channel, (b, n + 1, h, w'), of the windows of an image scaled to size
    (H', W') that begin at row `top`, in the columns that `across` blends.

    With flip, the flipped image's windows are others where windows do not lie
    evenly to a pixel.
    """
    height, width = min(side, size[0]), min(side, size[1])
    down = Blend(range(top, top + height), image.shape[2], size[0])
    sums = None
    for turned, left in [(turned, left) for turned in (False, True)[:1 + flip]
                         for left in starts(size[1], side)]:
        left = size[1] - width - left if turned else left
        first, last = max(left, across.start), min(left + width, across.stop)
        if first >= last:
            continue
        columns = Blend(range(left, left + width), image.shape[3], size[1])
        window = columns.of(down.of(
            image[:, :, down.start:down.stop, columns.start:columns.stop],
            2), 3)                                          # (b, 3, h, w)
        prob = logits(net, window.flip(3) if turned else window).softmax(1)
        prob = prob.flip(3) if turned else prob             # (b, n, h, w)
        if sums is None:
            b, n = prob.shape[:2]
            sums = prob.new_zeros(b, n + 1, height,
                                  across.stop - across.start)
        part = sums[..., first - across.start:last - across.start]
        part[:, :-1] += prob[..., first - left:last - left]
        part[:, -1] += 1
    return sums


# ------------------------------------------------- inference
def infer(net, image, scales=(1.0,), flip=False):
    """Return class probabilities (b, n, H, W), averaged over the scales and,
    with flip, over the left-right flip.

    image: normalised, float (b, 3, H, W). A scaled image is resized, and its
    probabilities resized back, on the half-pixel grid of the training data.
    """
    size, total = image.shape[-2:], None
    if not window_side(size, scales):
        return _whole(net, image, scales, flip)
    for rows, columns, prob in parts(net, image, scales, flip):
        if total is None:
            total = prob.new_empty(*prob.shape[:2], *size)
        total[:, :, rows, columns] = prob
    return total


def parts(net, image, scales=(1.0,), flip=False):
    """Yield (rows, columns, infer's class probabilities (b, n, h, w)) of the
    parts that make up an image: the whole, or what windows finish at once.

    Where the parts are written away, the memory does not grow with the image.
    """
    side = window_side(image.shape[-2:], scales)
    if side:
        yield from through_windows(net, image, scales, flip, side)
    else:
        yield slice(None), slice(None), _whole(net, image, scales, flip)


def _whole(net, image, scales, flip):
    """Return infer's result for an image that is seen whole."""
    size, total = image.shape[-2:], 0
    for scale in scales:
        scaled = image if scale == 1 else resize(
            image, scaled_size(size, scale))
        prob = logits(net, scaled).softmax(1)               # (b, n, H', W')
        if flip:
            prob = prob + logits(net, scaled.flip(3)).softmax(1).flip(3)
        total = total + resize(prob, size)                  # (b, n, H, W)
    return total / (len(scales) * (2 if flip else 1))


def classify(net, image, scales=(1.0,), flip=False):
    """Return the likeliest class of each pixel, (b, H, W) uint8; see infer.

    Through windows the memory does not grow with the image, but for the image
    and the result themselves.
    """
    side = window_side(image.shape[-2:], scales)
    if side:
        pred = image.new_empty((len(image), *image.shape[2:]),
                               dtype=torch.uint8)
        for one, result in zip(image.split(1), pred.split(1)):
            for rows, columns, prob in through_windows(net, one, scales, flip,
                                                       side):
                result[:, rows, columns] = likeliest(prob)
        return pred
    if tuple(scales) == (1.0,) and not flip:
        return likeliest(logits(net, image))
    return likeliest(_whole(net, image, scales, flip))


def likeliest(score):
    """Return where scores (b, n, H, W) are greatest over n, (b, H, W) uint8,
    the first of equal ones.

    The scores are spoilt. On a CPU, two maxima without indices take half the
    time of one with them.
    """
    n = score.shape[1]
    rank = torch.arange(n, 0, -1, dtype=score.dtype, device=score.device)
    score = score.eq_(score.amax(1, keepdim=True)).mul_(rank[:, None, None])
    return (n - score.amax(1)).to(torch.uint8)


def prepared(net):
    """Return what gives the net's logits, in evaluation mode, as INFERENCE
    asks: itself, or a copy with batch norm folded, in bfloat16 if wanted."""
    net.eval()
    if settings.INFERENCE == 'plain':
        return lambda image: net(image.contiguous())
    folded = network.fold_batch_norm(net)
    if settings.INFERENCE == 'folded':
        return folded
    for part in folded.modules():       # EM and its bases stay in float32
        if isinstance(part, torch.nn.Conv2d):
            part.to(torch.bfloat16)

    def in_bfloat16(image):
        with torch.autocast(image.device.type, torch.bfloat16):
            return folded(image)
    return in_bfloat16


def device_of(net):
    """Return the device that a network takes images on."""
    return next((p.device for p in net.parameters()), torch.device('cpu'))


def batch_size(device):
    """Return how many images of one size are seen at once."""
    return settings.EVAL_BATCH or (8 if device.type == 'cuda' else 1)


@torch.no_grad()
def predictions(net, loader, scales, flip):
    """Yield (classes (b, H, W) uint8, label, IDs) of a loader's images, on
    the net's device; the net is left in evaluation mode."""
    device, run = device_of(net), prepared(net)
    dataset.keep_memory()
    bar = utils.progress(total=len(loader.dataset), desc='evaluate',
                         unit='image', leave=False)
    for image, label, names in dataset.to_device(loader, device):
        yield classify(run, dataset.normalise(image, device), scales,
                       flip), label, names
        bar.update(len(names) * utils.world())
    bar.close()


def evaluate(net, loader, scales=(1.0,), flip=False):
    """Return the confusion matrix (n, n) int64, rows label, of the images
    of all processes' loaders; the net is left in evaluation mode."""
    n = settings.N_CLASSES
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device_of(net))
    for pred, label, _ in predictions(net, loader, scales, flip):
        confusion += utils.confusion_matrix(pred, label, n,
                                            settings.IGNORE_LABEL)
    if utils.world() > 1:
        dist.all_reduce(confusion)
    return confusion.cpu()


# ------------------------------------------------- checkpoints
def find_checkpoint(path):
    """Return path, or that of MODEL_DIR/final.pth if none is named.

    Raises FileNotFoundError: a network is never scored on random weights.
    """
    chosen = path or os.path.join(settings.MODEL_DIR, 'final.pth')
    if not os.path.isfile(chosen):
        folder = os.path.dirname(chosen) or '.'
        there = sorted(name for name in os.listdir(folder)
                       if name.endswith('.pth')) if os.path.isdir(
                           folder) else []
        raise FileNotFoundError(f'{chosen} is not there; {folder} has: '
                                f'{", ".join(there) or "no checkpoint"}. '
                                f'Train first, or name a checkpoint')
    return chosen


def recorded_in(texts):
    """Return the entries of a checkpoint that travel in an exported file, as
    texts {name: JSON}: step, git, classes, colours, mean, std, and settings,
    those of the network. A file of others has other texts: {}."""
    if 'settings' not in texts:
        return {}
    found = {name: json.loads(text) for name, text in texts.items()}
    found['settings'] = {                               # JSON has no tuples
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found['settings'].items()}
    return found


def read_checkpoint(path):
    """Return what a .pth or .safetensors file holds, a checkpoint."""
    if not path.endswith('.safetensors'):
        return utils.load_checkpoint(path)
    safetensors = utils.needed('safetensors')
    try:
        with safetensors.safe_open(path, 'pt') as file:
            return {'net': {key: file.get_tensor(key) for key in file.keys()},
                    **recorded_in(file.metadata() or {})}
    except Exception as error:          # of its own classes, or JSON's
        raise ValueError(f'{path} is truncated or no file of weights '
                         f'({error})') from None


class Onnx(torch.nn.Module):
    """A network in a file, run by onnxruntime on the CPU: image (b, 3, H, W)
    float32, normalised, to logits (b, n, H, W)."""

    def __init__(self, path):
        super().__init__()
        runtime = utils.needed('onnxruntime')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(
                path, options, providers=['CPUExecutionProvider'])
        except Exception as error:      # of its own classes
            raise ValueError(f'{path} cannot be run by onnxruntime '
                             f'({str(error).splitlines()[0]})') from None
        self.recorded = recorded_in(
            self.session.get_modelmeta().custom_metadata_map)

    def forward(self, image):
        logits, = self.session.run(None, {'image': image.numpy()})
        return torch.from_numpy(logits)


def load_onnx(path):
    """Return (net, checkpoint) of a file that predict.py --export wrote.

    Raises ValueError where the command line asks for what is not in it: the
    settings of the network are those that it was written with.
    """
    net = Onnx(path)
    if not net.recorded:
        raise ValueError(f'{path} is not of predict.py --export: it does not '
                         f'tell its settings')
    take_settings(net.recorded['settings'], path)
    for name, value in net.recorded['settings'].items():
        if getattr(settings, name) != value:
            raise ValueError(f'{name}={getattr(settings, name)}: {path} was '
                             f'written with {value}; export it anew')
    if settings.INFERENCE != 'plain':
        raise ValueError(f'INFERENCE={settings.INFERENCE}: {path} is run as '
                         f'it is; INFERENCE=plain')
    return net.eval(), {'net': {}, **net.recorded}


def devices_for(path):
    """Return the devices to work on, DEVICES; for an ONNX file the CPU."""
    if not path.endswith('.onnx'):
        return utils.pick_devices(settings.DEVICES)
    devices = utils.pick_devices(settings.DEVICES or [-1])
    if any(device.type != 'cpu' for device in devices):
        raise ValueError(f'DEVICES={settings.DEVICES}: {path} is run on the '
                         f'CPU; DEVICES=-1')
    return devices


def take_settings(recorded, path):
    """Take the network's settings from a checkpoint's record, unless the
    command line gave them; log what did not come from settings.py."""
    for name, value in settings.given().items():
        utils.log(f'{name} = {value!r} (command line)')
    for name, value in settings.adopt(recorded).items():
        utils.log(f'{name} = {value!r} ({path})')


def load_network(path, device):
    """Return (net, checkpoint) of a file that train.py wrote, or of a
    published {'net': ..., 'step': ...}, or that predict.py --export wrote.

    The settings of the network are taken from it unless the command line
    gave them; what did not come from settings.py is logged.
    """
    if path.endswith('.onnx'):
        return load_onnx(path)
    checkpoint = read_checkpoint(path)
    take_settings(checkpoint.get('settings')
                  or baselines.recognise(checkpoint['net']), path)
    net = baselines.build_network()
    network.load_whole(net, checkpoint['net'], path)
    return net.to(device).eval(), checkpoint


def classes_of(checkpoint):
    """Return the classes' names and colours that the checkpoint recorded; a
    published one has none, then those of DATA_ROOT."""
    if 'classes' in checkpoint:
        return checkpoint['classes'], checkpoint['colours']
    return utils.read_classes(settings.DATA_ROOT, settings.N_CLASSES)


# ------------------------------------------------- data
def open_split(split, train=False, checked=False):
    """Return a split whose every label was looked at, by one process for
    all, or before (checked); its classes are checked against N_CLASSES."""
    data = dataset.Segmentation(split, train)
    names, _ = utils.read_classes(data.root, data.n_classes)
    if utils.rank() or checked:
        return data
    counts = data.check(lambda results: utils.progress(
        results, total=len(data), desc=f'check {split}', leave=False))
    absent = [name for name, count in zip(names, counts) if not count]
    if train and absent:
        utils.log(f'warning: no pixel of {split} is {", ".join(absent)}')
    return data


# ------------------------------------------------- drawing
def painted(image, pred, colours):
    """Return an image (H, W, 3) uint8 RGB with the classes of pred (H, W) in
    their colours over it, outlined; black ones, as background is, let it
    through."""
    pred = np.asarray(pred, np.uint8)
    table = utils.full_palette(colours).astype(np.float32)
    alpha = 0.55 * table.any(1)[pred][..., None]                # (H, W, 1)
    mixed = (1 - alpha) * image + alpha * table[pred]
    edge = cv2.morphologyEx(pred, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    mixed[edge] = 255
    return mixed.astype(np.uint8)


def enlarged(x, width=320):
    """Return a small picture or map (H, W, ...) several times as large, for
    the sake of what is written beside it: nearly `width` wide."""
    times = max(1, width // x.shape[1])
    return np.repeat(np.repeat(x, times, 0), times, 1)


def overlay(image, pred, names, colours, all_classes=False):
    """Return a picture of a prediction, (H', W', 3) uint8: see painted and
    enlarged, and a legend of the classes that occur, or of all.

    image: (H, W, 3) uint8 RGB; pred: (H, W) class indices.
    """
    image, pred = enlarged(image), enlarged(np.asarray(pred, np.uint8))
    count = np.bincount(pred.ravel(), minlength=len(names))
    present = [i for i in range(len(names)) if all_classes or count[i]]
    return np.vstack([painted(image, pred, colours),
                      legend(image.shape[1], [names[i] for i in present],
                             [colours[i] for i in present])])


def em_unit(net):
    """Return a network's EMA unit; raise ValueError where it has none."""
    unit = getattr(net, 'emau', None)
    if not isinstance(unit, network.EMAU):
        raise ValueError(f'attention maps are those of an EMA unit, and this '
                         f'network has none to look into (HEAD='
                         f'{settings.HEAD}, or an ONNX file)')
    return unit


@torch.no_grad()
def attention(net, image):
    """Return z of each EM iteration, (T, k, h, w), which sums to 1 over the k
    bases, of a normalised image (1, 3, H, W), which is padded for it."""
    unit = em_unit(net)
    x = unit.conv1(net.fc0(net.extractor(padded(image))))       # (1, c, h, w)
    return torch.stack([
        z[0].t().reshape(-1, *x.shape[2:])
        for z, _ in unit.em(x.flatten(2), unit.mu.to(x.dtype))])


def on_pixels(maps, image):
    """Return maps (b, c, h, w), as `attention` gives them of an image (1, 3,
    H, W), on its pixels, (b, c, H, W)."""
    height, width = image.shape[-2:]
    return network.upsample(maps, padded(image).shape[-2:])[
        ..., :height, :width]


def heat(image, share):
    """Return a map (H, W) of 0..1 over a grey and dark image (H, W, 3) uint8
    RGB: from black over red to bright yellow, the hotter the more."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]   # (H, W, 1)
    level = (255 * np.clip(share, 0, 1)).astype(np.uint8)
    colour = cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[..., ::-1]
    return (0.3 * grey + 0.7 * colour).astype(np.uint8)


def grid(panels, captions, columns):
    """Return panels (H, W, 3) uint8 of one size, a caption under each, on a
    white page, row by row."""
    font, gap, line = ImageFont.load_default(14), 6, 22
    height, width = panels[0].shape[:2]
    across = max(width, *(int(font.getlength(text)) for text in captions))
    rows = -(-len(panels) // columns)
    page = Image.new('RGB', (gap + min(columns, len(panels)) * (across + gap),
                             gap + rows * (height + line)), 'white')
    draw = ImageDraw.Draw(page)
    for i, (panel, text) in enumerate(zip(panels, captions)):
        x = gap + i % columns * (across + gap)
        y = gap + i // columns * (height + line)
        page.paste(Image.fromarray(panel), (x + (across - width) // 2, y))
        draw.text((x + across / 2, y + height + line / 2 - 1), text, 'black',
                  font, 'mm')
    return np.asarray(page)


def legend(width, names, colours):
    """Return a strip (h, width, 3) uint8 of coloured squares with names."""
    font, line, x, y = ImageFont.load_default(14), 24, 6, 4
    places = []
    for name in names:
        wide = 34 + int(font.getlength(name))
        if x + wide > width and x > 6:
            x, y = 6, y + line
        places.append((x, y))
        x += wide
    strip = Image.new('RGB', (width, y + line), 'white')
    draw = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(places, names, colours):
        draw.rectangle((x, y, x + 14, y + 14), tuple(colour), 'black')
        draw.text((x + 20, y - 1), name, 'black', font)
    return np.asarray(strip)


def draw_confusion(confusion, names):
    """Return a picture of a confusion matrix (n, n): a row shows what the
    pixels of a class were taken for, the darker the more (by the root, so
    that a few show), with percentages where there is room. A grey row's class
    has no pixel.
    """
    counts = np.asarray(confusion, np.float64)
    total = counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)                       # (n, n)
    cell = max(12, min(48, 960 // len(names)))
    colour = 255 - share[..., None] ** 0.5 * (225, 175, 105)    # (n, n, 3)
    colour[total[:, 0] == 0] = 225
    cells = colour.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    cells[::cell] = cells[:, ::cell] = 235
    font = ImageFont.load_default(min(14, cell - 2))
    edge = max(140, 20 + int(max(map(font.getlength, names))))
    page = Image.new('RGB', [edge + len(cells) + 12] * 2, 'white')
    page.paste(Image.fromarray(cells), (edge, edge))
    for label, place in (('rm', edge - 8), ('lm', 8)):
        strip = Image.new('RGB', (edge, len(cells)), 'white')
        draw = ImageDraw.Draw(strip)
        for i, name in enumerate(names):
            draw.text((place, (i + 0.5) * cell), name, 'black', font, label)
        page.paste(strip if label == 'rm' else strip.rotate(90, expand=True),
                   (0, edge) if label == 'rm' else (edge, 0))
    draw = ImageDraw.Draw(page)
    draw.text((8, 8), 'row: label\ncolumn: prediction', 'black', font)
    for y, x in np.argwhere(share >= 0.005) if cell > 26 else ():
        draw.text((edge + (x + 0.5) * cell, edge + (y + 0.5) * cell),
                  f'{100 * share[y, x]:.0f}',
                  'white' if share[y, x] > 0.25 else 'black', font, 'mm')
    return page


def draw_classes(classes, colours, mean):
    """Return a picture of the classes' IoU {name: 0..1 or None}, a bar each,
    and of their mean, a line."""
    font, line, wide = ImageFont.load_default(13), 20, 480
    left = 16 + int(max(map(font.getlength, classes)))
    bottom = 28 + line * len(classes)
    page = Image.new('RGB', (left + wide + 70, bottom + 24), 'white')
    draw = ImageDraw.Draw(page)
    for tenth in range(0, 11, 2):
        x = left + wide * tenth / 10
        draw.line((x, 28, x, bottom), (225, 225, 225))
        draw.text((x, 14), f'{10 * tenth}', 'grey', font, 'mm')
    x = left + wide * mean
    draw.line((x, 28, x, bottom), 'black', 2)
    draw.text((x, bottom + 10), f'mIoU {100 * mean:.2f}', 'black', font, 'mm')
    for i, (name, iou) in enumerate(classes.items()):
        y, end = 28 + (i + 0.5) * line, left + wide * (iou or 0)
        draw.text((left - 8, y), name, 'black', font, 'rm')
        draw.rectangle((left, y - 7, end, y + 7), tuple(colours[i]), 'black')
        draw.text((left + wide + 60, y),
                  '-' if iou is None else f'{100 * iou:.2f}', 'black', font,
                  'rm')
    return page


# ------------------------------------------------- what a net sees
def fitted(x):
    """Return a picture or map (H, W, ...) at PANEL pixels along its longer
    side."""
    scale = PANEL / max(x.shape[:2])
    size = [max(1, round(side * scale)) for side in x.shape[1::-1]]
    return cv2.resize(x, size, interpolation=cv2.INTER_AREA if scale < 1
                      else cv2.INTER_LINEAR)


def look(net, image, device, bases):
    """Return (bases, their shares of the picture, maps (T, bases, h, w)) of
    what the EM bases attend to in a picture (H, W, 3) uint8; h x w as fitted.

    bases: numbers, or () for `telling` ones. The picture is seen whole, at
    the first of EVAL_SCALES, or smaller where it is huge.
    """
    x = torch.from_numpy(image).permute(2, 0, 1)[None]      # (1, 3, H, W)
    scale = min(settings.EVAL_SCALES[0],
                math.sqrt(WHOLE / math.prod(image.shape[:2])))
    x = resize(dataset.normalise(x, device),
               scaled_size(image.shape[:2], scale))
    z = attention(net, x)                                   # (T, k, h, w)
    rows, columns = ((side - 1) // settings.STRIDE + 1 for side in x.shape[2:])
    last = z[-1, :, :rows, :columns].flatten(1)             # (k, n)
    bases, shares = list(bases) or telling(last), last.mean(1)
    maps = [[fitted(on_pixels(z[t, i][None, None], x)[0, 0].cpu().numpy())
             for i in bases] for t in range(len(z))]
    return bases, shares[bases].tolist(), np.array(maps)


def telling(z):
    """Return the numbers of SHOWN bases of z (k, n), each the one that is
    most used and least like those before it: many bases may attend alike."""
    alike = F.normalize(z, dim=1) @ F.normalize(z, dim=1).t()   # (k, k)
    value, bases = z.mean(1), []                                # (k,)
    for _ in range(min(SHOWN, len(z))):
        bases.append(int(value.argmax()))
        value = value.minimum(z.mean(1) * (1 - alike[bases[-1]]))
        value[bases[-1]] = -1
    return bases


def draw_attention(image, bases, shares, maps):
    """Return a page of a picture and, over it, the last iteration's maps (T,
    bases, h, w), each as bright as its greatest value."""
    panels, captions = [fitted(image)], ['the picture']
    for i, share, z in zip(bases, shares, maps[-1]):
        panels.append(heat(panels[0], z / z.max()))
        captions.append(f'basis {i}: {share:.1%}, up to {z.max():.2f}')
    return grid(panels, captions, 3)


def draw_sample(image, label, pred, names, colours):
    """Return a page (H', W', 3) uint8: an image (H, W, 3) uint8 RGB, its
    label and a prediction (H, W) uint8 in the classes' colours, the error in
    red with its share of the pixels that are not void, and a legend."""
    void, table = settings.IGNORE_LABEL, utils.full_palette(colours)
    counted, wrong = label != void, label != pred
    share = (wrong & counted).sum() / max(1, counted.sum())
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]   # (H, W, 1)
    error = np.repeat(128 + grey // 2, 3, 2)                    # (H, W, 3)
    error[wrong], error[~counted] = (220, 20, 20), table[void]
    page = grid([fitted(panel) for panel in (image, table[label], table[pred],
                                             error)],
                ['image', 'label', 'prediction', f'error: {share:.1%}'], 4)
    known = {**dict(enumerate(names)), void: 'void'}
    present = [i for i in np.union1d(label, pred) if i in known]
    return np.vstack([page, legend(page.shape[1], [known[i] for i in present],
                                   table[present].tolist())])


@torch.no_grad()
def drawings(net, data, confusion):
    """Yield (name, page (H, W, 3) uint8) of what a net sees, for the log: of
    DRAWN images, evenly spaced in the split, what draw_sample and, of an EMA
    unit, draw_attention show; the confusion matrix. The net is left in
    evaluation mode."""
    device, run = device_of(net), prepared(net)
    names, colours = utils.read_classes(data.root, data.n_classes)
    for i in np.unique(np.linspace(0, len(data) - 1, DRAWN).astype(int)):
        image, label = data.read(i)                 # (H, W, 3), (H, W)
        x = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
        pred = classify(run, dataset.normalise(x, device),
                        settings.EVAL_SCALES, settings.EVAL_FLIP)
        yield f'Val/{data.ids[i]}', draw_sample(
            image, label, pred[0].cpu().numpy(), names, colours)
        if network.ema_units(net):
            yield f'ValBases/{data.ids[i]}', draw_attention(
                image, *look(net, image, device, ()))
    yield 'ValConfusion', np.asarray(draw_confusion(confusion, names))


# ------------------------------------------------- submission
def submit(net):
    """Write the VOC test server's archive: VAL_SPLIT's masks, in VOC's
    palette, at the images' own sizes. Labels are not looked at."""
    data = dataset.Segmentation(settings.VAL_SPLIT, False, labelled=False)
    sizes = data.sizes()
    os.makedirs(SUBMISSION, exist_ok=True)
    for preds, _, ids in predictions(net, shared_loader(net, data),
                                     settings.EVAL_SCALES,
                                     settings.EVAL_FLIP):
        for pred, name in zip(preds.cpu().numpy(), ids):
            utils.save_label(pred, os.path.join(SUBMISSION, f'{name}.png'),
                             utils.voc_palette())
    utils.gather(None)                  # until all processes are here
    if utils.rank() == 0:
        pack(data.ids, sizes)
    utils.log(f'{len(data)} masks of {data.split} are in {SUBMISSION}, and '
              f'in {ARCHIVE} for the server')


def pack(ids, sizes):
    """Write the archive of the masks of all ids, sizes (H, W); raise
    ValueError, and leave what was there, unless each is as it shall be."""
    with utils.atomic(ARCHIVE) as part, tarfile.open(part, 'w:gz') as tar:
        for name, size in zip(utils.progress(ids, desc='pack', unit='mask',
                                             leave=False), sizes):
            path = os.path.join(SUBMISSION, f'{name}.png')
            fault = _fault(path, size)
            if fault:
                raise ValueError(f'{path} {fault}; {ARCHIVE} was not written.'
                                 f' Run again, alone in this folder')
            tar.add(path, filter=_nobodys)


def _fault(path, size):
    """Say what keeps a mask from being one of an image of size (H, W)."""
    try:
        with Image.open(path, formats=('PNG',)) as image:
            mode, label = image.mode, np.array(image)
            palette = image.getpalette()
    except dataset.UNREADABLE as error:
        return f'cannot be read ({type(error).__name__})'
    if mode != 'P' or palette != utils.voc_palette().ravel().tolist():
        return 'has not the VOC palette'
    if label.shape != size:
        return (f'has {label.shape[1]} x {label.shape[0]} pixels, the image '
                f'{size[1]} x {size[0]}')
    if label.max() >= settings.N_CLASSES:
        return f'has the class {label.max()}, of {settings.N_CLASSES}'
    return ''


def _nobodys(member):
    """Return an archive's member without its owner's name."""
    member.uid = member.gid = 0
    member.uname = member.gname = ''
    return member


# ------------------------------------------------- results.csv
def open_results():
    """Return results.csv to append to, its header written and the file kept
    from other processes until it is closed.

    Raises OSError where it cannot be written, ValueError where its columns
    are others.
    """
    try:
        file = open(RESULTS, 'a+', newline='')
    except OSError as error:
        raise OSError(f'{RESULTS} cannot be written in this folder '
                      f'({error.strerror}); work in a folder of yours'
                      ) from None
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    text = file.read()
    if text and text.splitlines()[0] != ','.join(COLUMNS):
        file.close()
        raise ValueError(f'{RESULTS} has other columns than '
                         f'{",".join(COLUMNS)}; move it away')
    if not text:
        file.write(','.join(COLUMNS))
    if not text.endswith('\n'):
        file.write('\n')
    return file


def keep_result(scored, weights, result, seconds):
    """Append a line to results.csv: what was scored, of which weights ('net',
    'average'), and the result; IoU as 'name: 0.1234; name: ...'."""
    classes = '; '.join(f'{name}: ' + ('-' if iou is None else f'{iou:.4f}')
                        for name, iou in result['classes'].items())
    row = {'experiment': os.path.basename(os.getcwd()), 'weights': weights,
           **scored, 'mIoU': f'{result["mIoU"]:.6f}', 'git': utils.git_hash(),
           'seconds': f'{seconds:.1f}', 'IoU': classes}
    with open_results() as file:
        csv.DictWriter(file, COLUMNS, lineterminator='\n').writerow({
            name: ' '.join(map(str, value)) if isinstance(
                value, (list, tuple)) else value
            for name, value in row.items()})


# ------------------------------------------------- comparison of folders
def compare(folder):
    """Print a table of the experiments in a folder's folders: how far each
    has come, and which settings it has that most have not.

    Raises FileNotFoundError where there is none.
    """
    runs = find_runs(folder)
    if not runs:
        raise FileNotFoundError(f'{folder} holds no experiment: no folder in '
                                f'it has a settings.py of ours or a log.csv; '
                                f'name the folder around your experiments')
    found = {name: progress_of(log) for name, (_, log) in runs.items()}
    records = {name: record_of(*run) for name, run in runs.items()}
    usual, own = differences({name: values for name, (values, _)
                              in records.items()})
    order = sorted(runs, key=lambda name: (
        -found[name]['best'], found[name]['step'] is None, name))
    print(table(('experiment', 'steps', 'best mIoU', 'at', 'images/s',
                 'what differs'),
                [(name, *cells(found[name], records[name][0]),
                  ' '.join(own[name])) for name in order]))
    if usual:
        print(textwrap.fill('the others: ' + ' '.join(usual), _width(),
                            break_long_words=False, break_on_hyphens=False,
                            subsequent_indent='    '))
    for name, (_, source) in records.items():
        if source:
            print(f'{name}: {source}')


def find_runs(folder):
    """Return {name: (folder of the experiment, of its log or None)}: of the
    folder itself if it is one, else of those in it; of a folder of logs,
    those. Logs are looked for in LOG_DIR and in folders in it, as
    LOG_DIR=logdir/NAME on the command line makes them, whose settings are
    not those of settings.py: None is their folder.
    """
    runs, folder = {}, os.path.abspath(folder)
    inside = map(os.path.dirname, glob.glob(os.path.join(
        glob.escape(folder), '*', '')))
    for place in [folder] if _is_experiment(folder) else filter(
            _is_experiment, sorted(inside)):
        name = os.path.basename(place)
        home = os.path.join(place, str(settings_in(place).get('LOG_DIR')))
        for log in _logs(home) or [None]:
            deeper = os.path.relpath(log, home) if log else '.'
            runs[os.path.normpath(os.path.join(name, deeper))] = (
                place if deeper == '.' else None), log
    return runs or {os.path.relpath(log, os.path.dirname(folder)):
                    (None, log) for log in _logs(folder)}


def _is_experiment(folder):
    return {'ITER_MAX', 'LOG_DIR'} <= set(settings_in(folder))


def _logs(folder):
    """Return the folders of log.csv files: itself, in it, and in those."""
    return sorted(os.path.dirname(path) for depth in ('', '*', '*/*')
                  for path in glob.glob(os.path.join(
                      glob.escape(folder), depth, 'log.csv')))


def settings_in(folder):
    """Return {name: value} of a folder's settings.py, which is read and never
    run: what is no literal is its text. {} where there is none, or none that
    can be read."""
    try:
        with open(os.path.join(folder, 'settings.py'), 'rb') as file:
            lines = ast.parse(file.read()).body
    except (OSError, SyntaxError, ValueError):
        return {}
    found = {}
    for line in lines:
        name = getattr(line, 'targets', [None])[0]
        if isinstance(name, ast.Name) and name.id[0] != '_':
            try:
                found[name.id] = ast.literal_eval(line.value)
            except ValueError:
                found[name.id] = ast.unparse(line.value)
    return found


def record_of(place, log):
    """Return (settings of a run, '' or a note on where they are from): of
    what the run wrote beside its log; without that, of its checkpoint; else
    of settings.py, which may have been edited since."""
    if log:
        try:
            with open(os.path.join(log, 'settings.json')) as file:
                return dict(json.load(file)), ''
        except (OSError, ValueError, TypeError):
            pass
    stated = settings_in(place) if place else {}
    for name in ('final', 'latest') if log and stated else ():
        try:
            return utils.load(os.path.join(place, stated['MODEL_DIR'],
                                           f'{name}.pth'))['settings'], ''
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return stated, 'settings as settings.py has them now' if (
        log and stated) else ''


def progress_of(log):
    """Return dict(step, best: val mIoU or -1, at, speed: images/s or None) of
    a run, by its log.csv; what is cut off or garbled there is passed over."""
    found, speeds = {'step': None, 'best': -1.0, 'at': None}, []
    for row in _rows(log) if log else ():
        step = _number(row.get('step'))
        if step is None:
            continue
        found['step'] = max(found['step'] or 0, int(step))
        speeds.append(_number(row.get('images_per_s')))
        for name in ('val_mIoU', 'val_mIoU_average'):
            value = _number(row.get(name))
            if value is not None and value > found['best']:
                found.update(best=value, at=int(step))
    speeds = [speed for speed in speeds if speed is not None]
    return {**found, 'speed': statistics.median(speeds) if speeds else None}


def _rows(log):
    try:
        with open(os.path.join(log, 'log.csv'), newline='',
                  errors='replace') as file:
            return list(csv.DictReader(file.read().replace('\0', '')
                                       .splitlines()))
    except (OSError, csv.Error):
        return []


def _number(text):
    """Return the finite float that a cell holds, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def differences(records):
    """Return what is usual of settings {name: {setting: value}} where they
    differ, [KEY=VALUE], and {name: [KEY=VALUE] that are not so}.

    Usual is what most have, of equally many the first's. Where a run writes
    to is no difference.
    """
    known = {name: values for name, values in records.items() if values}
    usual, own = [], {name: [] for name in records}
    own.update({name: ['settings unknown'] for name in records
                if name not in known})
    for key in sorted(set().union(*known.values())
                      - {'LOG_DIR', 'MODEL_DIR'}):
        words = {name: _word(key, values) for name, values in known.items()}
        most = collections.Counter(words.values()).most_common(1)[0][0]
        if set(words.values()) != {most}:
            usual.append(most)
        for name, word in words.items():
            if word != most:
                own[name].append(word)
    return usual, own


def _word(key, values):
    """Return a setting as the command line takes it; ?: the run's version
    had no such setting."""
    if key not in values:
        return f'{key}=?'
    value = values[key]
    if isinstance(value, (list, tuple)):
        value = ','.join(map(str, value)) or '[]'
    return f'{key}={value}'


def cells(found, values):
    """Return a run's cells: steps, best mIoU in percent, its step, speed."""
    step, last = found['step'], values.get('ITER_MAX', '?')
    return ('not run' if step is None else f'{step} of {last}',
            '-' if found['at'] is None else f'{100 * found["best"]:.2f}',
            '-' if found['at'] is None else str(found['at']),
            '-' if found['speed'] is None else f'{found["speed"]:.1f}')


def table(head, rows):
    """Return a Markdown table of strings that fits the terminal: the last
    column goes on in further lines."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rest = max(30, _width() - sum(widths[:-1]) - 3 * len(head) - 1)
    widths[-1] = min(widths[-1], rest)
    lines = [head, ['-' * width for width in widths]]
    for *first, last in rows:
        parts = textwrap.wrap(last, rest, break_long_words=False,
                              break_on_hyphens=False) or ['']
        lines.append([*first, parts[0]])
        lines += [[''] * len(first) + [part] for part in parts[1:]]
    return '\n'.join('| ' + ' | '.join(
        cell.ljust(width) for cell, width in zip(line, widths)) + ' |'
        for line in lines)


def _width():
    return shutil.get_terminal_size((100, 24)).columns


# ------------------------------------------------- report
def shared_loader(net, data):
    """Return the loader of this process's share of a split's images."""
    return dataset.val_loader(data, utils.rank(), utils.world(),
                              batch_size(device_of(net)))


def measure(net, data):
    """Return the confusion matrix of a net on a split, which all processes
    share, at EVAL_SCALES and EVAL_FLIP."""
    return evaluate(net, shared_loader(net, data), settings.EVAL_SCALES,
                    settings.EVAL_FLIP)


def score(net, data, names):
    """Score a net on a split and print it; return the result as eval.json
    has it."""
    confusion = measure(net, data)
    found = utils.scores(confusion, settings.EVAL_CLASSES)
    classes = dict(zip(names, found.pop('IoU')))
    for name, iou in classes.items():
        shown = '-' if iou is None else f'{100 * iou:.2f}'
        utils.log(f'{name:20} {shown:>6}')
    utils.log('  '.join(f'{name} {100 * value:.2f}'
                        for name, value in found.items()))
    return {**found, 'classes': classes, 'confusion': confusion.tolist()}


def check_settings():
    """Raise ValueError unless the settings of evaluation can be met."""
    n, classes = settings.N_CLASSES, settings.EVAL_CLASSES
    wrong = [i for i in classes if i not in range(n)]
    if wrong:
        raise ValueError(f'EVAL_CLASSES={classes}: there is no class '
                         f'{wrong[0]}; classes are 0 to {n - 1}')
    scales = settings.EVAL_SCALES
    if not scales or min(scales) <= 0:
        raise ValueError(f'EVAL_SCALES={scales}: name at least one, all '
                         f'above 0')
    if settings.INFERENCE not in INFERENCES:
        raise ValueError(f'INFERENCE={settings.INFERENCE}: it can be '
                         f'{", ".join(map(repr, INFERENCES))}')
    for name in ('EVAL_BATCH', 'EVAL_WINDOW'):
        if getattr(settings, name) < 0:
            raise ValueError(f'{name}={getattr(settings, name)}: it is at '
                             f'least 0')


def report(net, checkpoint, path, digest):
    """Score a checkpoint's weights on VAL_SPLIT; say and keep the result."""
    data = open_split(settings.VAL_SPLIT)
    names, colours = classes_of(checkpoint)
    if utils.rank() == 0:
        open_results().close()          # what can fail is tried before
    scored = {
        'checkpoint': path, 'sha256': digest[:12],
        'step': checkpoint.get('step'), 'data': data.root,
        'split': data.split, 'images': len(data),
        'stride': settings.STRIDE, 'scales': settings.EVAL_SCALES,
        'flip': settings.EVAL_FLIP, 'window': settings.EVAL_WINDOW,
        'inference': settings.INFERENCE, 'mean_over': settings.EVAL_CLASSES}
    found = {}
    for weights in [name for name in ('net', 'average') if name in checkpoint]:
        if weights == 'average':
            utils.log('the same with averaged weights:')
            network.load_whole(net, checkpoint['average'], path)
        start = time.perf_counter()
        found[weights] = score(net, data, names)
        if utils.rank() == 0:
            keep_result(scored, weights, found[weights],
                        time.perf_counter() - start)
    result = {**found.pop('net'), **found, 'scored': scored}
    out = os.path.join(settings.LOG_DIR, 'eval.json')
    if utils.rank() == 0:
        utils.save_json(result, out)
        for name, page in (
                ('confusion', draw_confusion(result['confusion'], names)),
                ('classes', draw_classes(result['classes'], colours,
                                         result['mIoU']))):
            page.save(os.path.join(settings.LOG_DIR, f'{name}.png'))
    utils.log(f'{len(data)} images of {data.split}, step '
              f'{checkpoint.get("step")} of {path}; written to {out}, '
              f'confusion.png and classes.png, and a line of {RESULTS}')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage='eval.py [--submit | --compare DIR] '
        '[CHECKPOINT] [KEY=VALUE ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--submit', action='store_true',
                        help='write the VOC test server\'s archive')
    parser.add_argument('--compare', metavar='DIR',
                        help='print a table of the experiments in DIR')
    parser.add_argument('checkpoint', nargs='?', help=argparse.SUPPRESS)
    asked = parser.parse_args(settings.override(sys.argv[1:]))
    if asked.compare is not None:
        if asked.checkpoint or asked.submit or settings.given():
            raise ValueError('--compare DIR goes alone: it takes no '
                             'checkpoint and no settings')
        compare(asked.compare)
        return
    path = find_checkpoint(asked.checkpoint)
    device = utils.join(devices_for(path))
    utils.log(f'device: {utils.describe_device(device)}, processes: '
              f'{utils.world()}')
    digest = utils.file_hash(path)      # now: a run may write the file anew
    net, checkpoint = load_network(path, device)
    check_settings()
    if asked.submit:
        submit(net)
    else:
        report(net, checkpoint, path, digest)
    utils.leave(0)


if __name__ == '__main__':
    utils.launch(main)
