"""Scores a checkpoint: mIoU of the whole image, single-scale by default.

    python eval.py [CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT is models/final.pth if not named. The network is rebuilt from what
the checkpoint recorded. Writes LOG_DIR/eval.json. Shapes: b images, n
classes, H x W pixels.
"""
import argparse
import os
import sys

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


# ------------------------------------------------- inference
def logits(net, image):
    """Return net's logits (b, n, H, W) of a normalised image (b, 3, H, W).

    The image is padded on the right and at the bottom with 0, the mean
    colour, to k * STRIDE + 1 pixels: with aligned corners any other size
    would shift the prediction.
    """
    height, width = image.shape[-2:]
    down, right = (-(size - 1) % settings.STRIDE for size in (height, width))
    return net(F.pad(image, (0, right, 0, down)))[..., :height, :width]


def infer(net, image, scales=(1.0,), flip=False):
    """Return class probabilities (b, n, H, W), averaged over the scales and,
    with flip, over the left-right flip.

    image: normalised, float (b, 3, H, W). A scaled image is resized, and its
    probabilities resized back, on the half-pixel grid of the training data.
    """
    size = image.shape[-2:]
    total = 0
    for scale in scales:
        scaled = image if scale == 1 else _resize(
            image, [max(1, round(side * scale)) for side in size])
        prob = logits(net, scaled).softmax(1)               # (b, n, H', W')
        if flip:
            prob = prob + logits(net, scaled.flip(3)).softmax(1).flip(3)
        total = total + _resize(prob, size)                 # (b, n, H, W)
    return total / (len(scales) * (2 if flip else 1))


def _resize(x, size):
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size, mode='bilinear', align_corners=False)


def classify(net, image, scales=(1.0,), flip=False):
    """Return the likeliest class of each pixel, (b, H, W) uint8; see infer.
    """
    if tuple(scales) == (1.0,) and not flip:
        return likeliest(logits(net, image))
    return likeliest(infer(net, image, scales, flip))


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


@torch.no_grad()
def evaluate(net, loader, scales=(1.0,), flip=False):
    """Return the confusion matrix (n, n) int64, rows label, of the images
    of all processes' loaders; the net is left in evaluation mode."""
    n = settings.N_CLASSES
    device = next(net.parameters()).device
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    run = prepared(net)
    dataset.keep_memory()
    bar = utils.progress(total=len(loader.dataset), desc='evaluate',
                         unit='image', leave=False)
    for image, label, names in dataset.to_device(loader, device):
        pred = classify(run, dataset.normalise(image, device), scales, flip)
        confusion += utils.confusion_matrix(pred, label, n,
                                            settings.IGNORE_LABEL)
        bar.update(len(names) * utils.world())
    bar.close()
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


def load_network(path, device):
    """Return (net, checkpoint) of a file that train.py wrote, or of a
    published {'net': ..., 'step': ...}.

    The settings of the network are taken from it unless the command line
    gave them; what did not come from settings.py is logged.
    """
    checkpoint = utils.load(path)
    if not isinstance(checkpoint, dict) or 'net' not in checkpoint:
        raise ValueError(f'{path} is no checkpoint of a network: it has no '
                         f'"net". Backbone weights go into PRETRAINED')
    recorded = checkpoint.get('settings') or baselines.recognise(
        checkpoint['net'])
    for name, value in settings.given().items():
        utils.log(f'{name} = {value!r} (command line)')
    for name, value in settings.adopt(recorded).items():
        utils.log(f'{name} = {value!r} ({path})')
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
def overlay(image, pred, names, colours):
    """Return a picture of a prediction, (H', W', 3) uint8: classes in their
    colours over the image, outlined, and a legend of those that occur.

    image: (H, W, 3) uint8 RGB; pred: (H, W) class indices. A small image is
    drawn several times as large, for the legend's sake.
    """
    times = max(1, 320 // image.shape[1])
    image, pred = (np.repeat(np.repeat(x, times, 0), times, 1)
                   for x in (image, np.asarray(pred, np.uint8)))
    table = utils.full_palette(colours).astype(np.float32)
    alpha = np.where(pred > 0, 0.55, 0.0)[..., None]            # (H, W, 1)
    mixed = (1 - alpha) * image + alpha * table[pred]
    edge = cv2.morphologyEx(pred, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    mixed[edge] = 255
    present = [i for i in np.unique(pred) if i < len(names)]
    return np.vstack([mixed.astype(np.uint8),
                      legend(image.shape[1], [names[i] for i in present],
                             [colours[i] for i in present])])


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


# ------------------------------------------------- report
def measure(net, data):
    """Return the confusion matrix of a net on a split, which all processes
    share, at EVAL_SCALES and EVAL_FLIP."""
    gpu = next(net.parameters()).is_cuda
    loader = dataset.val_loader(data, utils.rank(), utils.world(),
                                settings.EVAL_BATCH or (8 if gpu else 1))
    return evaluate(net, loader, settings.EVAL_SCALES, settings.EVAL_FLIP)


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
    if settings.EVAL_BATCH < 0:
        raise ValueError(f'EVAL_BATCH={settings.EVAL_BATCH}: it is at least 0')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage='eval.py [CHECKPOINT] [KEY=VALUE ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', nargs='?', help=argparse.SUPPRESS)
    path = find_checkpoint(
        parser.parse_args(settings.override(sys.argv[1:])).checkpoint)
    device = utils.join(utils.pick_devices(settings.DEVICES))
    utils.log(f'device: {utils.describe_device(device)}, processes: '
              f'{utils.world()}')
    net, checkpoint = load_network(path, device)
    check_settings()
    data = open_split(settings.VAL_SPLIT)
    names, _ = classes_of(checkpoint)
    result = score(net, data, names)
    if 'average' in checkpoint:
        utils.log('the same with averaged weights:')
        network.load_whole(net, checkpoint['average'], path)
        result['average'] = score(net, data, names)
    result['scored'] = {
        'checkpoint': path, 'step': checkpoint.get('step'),
        'data': data.root, 'split': data.split, 'images': len(data),
        'stride': settings.STRIDE, 'scales': settings.EVAL_SCALES,
        'flip': settings.EVAL_FLIP, 'inference': settings.INFERENCE,
        'mean_over': settings.EVAL_CLASSES}
    out = os.path.join(settings.LOG_DIR, 'eval.json')
    if utils.rank() == 0:
        utils.save_json(result, out)
    utils.log(f'{len(data)} images of {data.split}, step '
              f'{checkpoint.get("step")} of {path}; written to {out}')
    utils.leave(0)


if __name__ == '__main__':
    utils.launch(main)
