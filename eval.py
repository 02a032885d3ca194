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
from lib.backbones import grid_extra
from lib.checkpoint import (
    check_writable,
    find_checkpoint,
    get_classes,
    load_strict,
)
from lib.distributed import describe_device, join, leave, pick_devices_for
from lib.download import file_hash
from lib.folding import fold_batch_norm
from lib.images import read_classes
from lib.inference import (  # noqa: F401
    MAX_WHOLE,
    best_classes,
    infer,
    pad_to_grid,
    padded_size,
    predict_classes,
    predict_logits,
    predict_scores,
    resize,
    scaled_size,
    sum_loss,
    window_size,
)
from lib.recorded import adopt_data, report_folder
from lib.results import (
    RESULTS,
    append_result,
    log_scores,
    open_results,
    write_report,
)
from utils import UserError

MAX_BATCH = 2 ** 22          # pixels of a batch on a GPU, at the largest scale
SHOWN_BASES = 8              # of which attention maps are drawn
MOVED = {'--submit': 'python -m tools.submit',
         '--compare': 'python -m tools.compare_runs DIR'}


# ------------------------------------------------- a split
def prepare_network(net):
    """Return a function image -> logits in evaluation mode, as INFERENCE
    asks: the net, or a copy with batch norm folded, which is compiled, or in
    bfloat16, if wanted."""
    net.eval()
    if settings.INFERENCE == 'plain':
        return lambda image: net(image.contiguous())
    folded = fold_batch_norm(net)
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
def predicted_scores(net, data):
    """Yield (scores (b, n, H, W), see predict_scores, label, IDs) of this
    process's share of a split, on the net's device, at EVAL_SCALES and
    EVAL_FLIP; smaller images of a batch are padded, their labels by void. The
    net is left in evaluation mode."""
    s = settings
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
        is_large = window_size(image.shape[-2:], s.EVAL_SCALES) > 0
        count = 1 if is_large else len(ids)     # so many at once
        for i in range(0, len(ids), count):
            yield (predict_scores(run, image[i:i + count], s.EVAL_SCALES,
                                  s.EVAL_FLIP),
                   label[i:i + count], ids[i:i + count])
        bar.update(len(ids) * utils.world())
    bar.close()


def predictions(net, data):
    """Yield (classes (b, H, W) uint8, label, IDs); see predicted_scores."""
    for score, label, ids in predicted_scores(net, data):
        pred = best_classes(score)
        del score               # the next ones need the memory
        yield pred, label, ids


def measure(net, data):
    """Return (confusion matrix (n, n) int64, rows label; mean cross-entropy of
    the labelled pixels) of a net on a split, which all processes share; the
    net is left in evaluation mode."""
    s, n, device = settings, settings.N_CLASSES, get_device(net)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    loss = torch.zeros((), device=device, dtype=(
        torch.float32 if device.type == 'mps' else torch.float64))
    for score, label, _ in predicted_scores(net, data):
        confusion += utils.confusion_matrix(best_classes(score), label, n,
                                            s.IGNORE_LABEL)
        loss += sum_loss(score, label, s.EVAL_SCALES, s.EVAL_FLIP)
        del score               # the next ones need the memory
    if utils.world() > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(loss)
    return confusion.cpu(), float(loss) / max(1, int(confusion.sum()))


def evaluate(net, data):
    """Return the confusion matrix of a net on a split; see measure."""
    return measure(net, data)[0]


# ------------------------------------------------- attention maps
def ema_unit(net):
    """Return a network's EMA unit; raise UserError where it has none."""
    unit = getattr(net, 'emau', None)
    if not isinstance(unit, network.EMAU):
        raise UserError(f'attention maps are those of an EMA unit, and this '
                        f'network has none (HEAD={settings.HEAD}); name a '
                        f'checkpoint with HEAD=ema')
    return unit


def whole_image(image, device):
    """Return an image (H, W, 3) uint8 as attention is computed of it, (1, 3,
    H', W') normalised: whole, at the first of EVAL_SCALES, or smaller where
    it is huge."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None]      # (1, 3, H, W)
    scale = min(settings.EVAL_SCALES[0],
                math.sqrt(MAX_WHOLE / math.prod(image.shape[:2])))
    return resize(dataset.normalise(x, device),
                  scaled_size(image.shape[:2], scale))


@torch.no_grad()
def encode(net, image):
    """Return the features (1, c, h, w) that enter the EMA unit of an EMANet,
    of a normalised image (1, 3, H, W), which is padded."""
    ema_unit(net)
    return net.fc0(net.extractor(pad_to_grid(image)))


@torch.no_grad()
def run_em(unit, features, stage_num=None):
    """Return what EM makes of features (1, c, h, w): its input after conv1
    (c, h, w), and the responsibilities z of each iteration, (T, k, h, w),
    which sum to 1 over k. stage_num: T, if not the unit's."""
    x = unit.conv1(features)                                # (1, c, h, w)
    z = [z[0].t().reshape(-1, *x.shape[2:]) for z, _ in unit.em(
        x.flatten(2), unit.mu.to(x.dtype), stage_num)]
    return x[0], torch.stack(z)


def attention(net, image):
    """Return the responsibilities z of each EM iteration, (T, k, h, w), of a
    normalised image (1, 3, H, W); see run_em."""
    return run_em(ema_unit(net), encode(net, image))[1]


def attention_maps(net, image, device, bases=()):
    """Compute where the bases of an EMA unit attend in an image, as of
    whole_image.

    Args:
        net: an EMANet on the device.
        image: (H, W, 3) uint8 RGB.
        bases: their indices; () for those of select_diverse_bases.
    Returns: (bases, their shares of the image, maps (T, bases, h, w), 0..1,
    of the size of a panel of lib.visualize, number of all bases).
    """
    x = whole_image(image, device)
    z = attention(net, x)                                   # (T, k, h, w)
    last = inside_image(z[-1], x).flatten(1)                # (k, n)
    bases, shares = list(bases) or select_diverse_bases(last), last.mean(1)
    maps = [[visualize.fit_panel(map_on_pixels(z[t, i], x), image.shape[:2])
             for i in bases] for t in range(len(z))]
    return bases, shares[bases].tolist(), np.array(maps), len(last)


def inside_image(z, image):
    """Return maps (k, h, w) without the cells of what pads their image (1, 3,
    H, W)."""
    rows, columns = ((side - 1) // settings.STRIDE + 1
                     for side in image.shape[2:])
    return z[:, :rows, :columns]


def check_implied(unit):
    """Raise UserError where a unit implies no attention between pixels."""
    if unit.norm == 'layer':
        raise UserError('EM_NORM=layer: its bases are no weighted means of '
                        'the features, so a pixel attends nowhere; name a '
                        'checkpoint of EM_NORM=l2 or none')


def implied_attention(unit, x, z, i):
    """Return by how much each position is weighted in the reconstruction of
    position i: a(j, i) for all j, (n,), positive.

    The M step makes mu_k = sum_j z_jk x_j / (s_k sum_j z_jk), with s_k the
    length of that mean of x where EM_NORM is l2, and 1 where it is none. The
    reconstruction is y_i = sum_k z_ik mu_k (A_R). So y_i = sum_j a(j, i) x_j
    with a(j, i) = sum_k z_ik z_jk / (s_k sum_j z_jk): attention of rank k.

    Args:
        unit: an EMAU.
        x: its features after conv1, (c, n).
        z: the responsibilities of the last iteration, (k, n).
    Raises: UserError where EM_NORM is layer, which subtracts a mean over the
    channels: its bases are no weighted sums of x.
    """
    check_implied(unit)
    total = 1e-6 + z.sum(1)                                 # (k,)
    means = x @ z.t() / total                               # (c, k)
    length = 1e-6 + means.norm(dim=0) if unit.norm == 'l2' else 1
    return (z[:, i] / (total * length)) @ z                 # (n,)


def attention_from(unit, x, z, cell):
    """Return implied_attention of a cell (row, column) as a map (h, w) of sum
    1; x (c, h, w), z (k, h, w)."""
    i = cell[0] * z.shape[2] + cell[1]
    weight = implied_attention(unit, x.flatten(1), z.flatten(1), i)
    return (weight / weight.sum()).view(z.shape[1:])


def query_attention(net, image, device, query):
    """Return where a pixel attends in an image: the map (H', W') of
    attention_from on the pixels of whole_image, and its number of cells.

    Args: net, image, device: as of attention_maps; query: the pixel (x, y).
    """
    unit, scaled = ema_unit(net), whole_image(image, device)
    x, z = run_em(unit, encode(net, scaled))
    weight = attention_from(unit, x, z[-1],
                            cell_of(query, image.shape[:2], scaled))
    return map_on_pixels(weight, scaled), weight.numel()


def cell_of(query, size, image):
    """Return the cell (row, column) nearest to a pixel (x, y) of an image of
    size (H, W), in the features of image (1, 3, H', W'), that image scaled."""
    s, extra = settings.STRIDE, grid_extra()
    first = 0 if extra else (s - 1) / 2     # where the first cell lies
    places = [(place + 0.5) * scaled / side - 0.5 for place, side, scaled in
              zip(query[::-1], size, image.shape[2:])]
    return [min(max(0, round((place - first) / s)), (scaled - 1) // s)
            for place, scaled in zip(places, image.shape[2:])]


def map_on_pixels(z, image):
    """Return a map (h, w) of `attention` on the pixels of its image (1, 3, H,
    W), as an array (H, W)."""
    height, width = image.shape[-2:]
    size = pad_to_grid(image).shape[-2:]
    z = network.upsample(z[None, None], size, grid_extra() == 1)
    return z[0, 0, :height, :width].cpu().numpy()


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
    confusion, loss = measure(net, data)
    result = utils.scores(confusion, settings.EVAL_CLASSES)
    classes = {name: dict(zip(names, result.pop(name)))
               for name in utils.PER_CLASS}
    log_scores(classes, result)
    return {**result, 'loss': loss, 'classes': classes.pop('IoU'), **classes,
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
