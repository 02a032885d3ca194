"""Which encoders of timm fit under a head: their grid, size, cost and time.

    python -m tools.backbones [PATTERN] [KEY=VALUE ...]
    python -m tools.backbones 'convnext*'
    python -m tools.backbones --no-time STRIDE=16 'vit_*'

PATTERN is a glob of timm's names; without one the table has a small net of
each of timm's families. It has a row for each output stride that a net can
take, or STRIDE alone where that is given, and says why it cannot take the
others. Parameters and MACs are those of the whole network, at CROP_SIZE
fitted to the net's grid, counted on the meta device. Time is that of one
image in evaluation mode, at output stride 16 or the nearest that the net can
take, and in turns with ResNet-18. Prints a Markdown table, row by row;
downloads and writes nothing.
"""
import difflib
import functools
import re
import warnings

import numpy as np
import torch

import heads
import settings
from lib import backbones
from lib.cost import available_memory, complexity
from lib.inference import fit_grid
from tools.complexity import pick_device
from tools.measure import Stopwatch, describe_machine
from utils import UserError, first_line, import_optional, make_parser, run_main

COLUMNS = {'net': 31, 'stride': 9, 'sides': 6, 'params, M': 9, 'MACs, G': 7,
           'ms': 4, 'of ResNet-18': 12, 'why not': 7}       # and their widths
TIMED_STRIDE = 16            # or the nearest that a net can take
MAX_MACS = 300e9             # of what is timed: seconds on a CPU
MAX_PARAMS = 100e6           # of a family's net, where it has a smaller one
SMALL = 'tiny', 'small', 'nano', 'xs', 'xxs', 's', 't', 'ti', 'b0', 'm0', 's0'
ROUNDS = 3


# ------------------------------------------------- which nets
def list_nets(pattern):
    """Return timm's names that match a pattern; '': one of each family.
    Raises UserError where none does."""
    timm = import_optional('timm')
    if not pattern:
        return [pick_net(timm, family) for family in timm.list_modules()]
    pattern = pattern.partition('.')[0]         # a tag is of the weights
    names = timm.list_models(pattern)
    if not names:
        near = difflib.get_close_matches(pattern, timm.list_models(), 1)
        raise UserError(f'{pattern}: timm {timm.__version__} has no net of '
                        f'that name; ' + (
                            f'the nearest is {near[0]}' if near else
                            'a pattern is written as \'convnext*\''))
    return names


def pick_net(timm, family):
    """Return a small net of a family of timm: if there are such, one that has
    weights, the family's name, a word for small, at most MAX_PARAMS."""
    def rank(name):
        words = [word if word in SMALL else word.rstrip('0123456789')
                 for word in name.split('_')]           # s18 is s, b0 is b0
        return (name.startswith('test_'), not timm.is_model_pretrained(name),
                not name.startswith(family.partition('_')[0]),
                min([(SMALL.index(word), at) for at, word in enumerate(words)
                     if word in SMALL], default=(len(SMALL), 0)))
    names = sorted(timm.list_models(module=family), key=rank)
    return next((name for name in names
                 if count_parameters(timm, name) <= MAX_PARAMS), names[0])


def count_parameters(timm, name):
    """Return the parameters of a net of timm, its classifier included."""
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = timm.create_model(name)
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------- a row
def count(name, stride):
    """Return dict(sides, side, macs, params) of the settings' head on a net
    of timm, or '' for ResNet-18; dict(reason: why it cannot be)."""
    settings.BACKBONE, settings.STRIDE = name, stride
    try:
        if name:
            backbones.describe(name, stride)
        elif stride == 14:
            return {'reason': 'it has 8, 16 and 32'}
        side = fit_crop()
        with torch.device('meta'):
            cost = complexity(heads.build_network(), (side, side))
    except UserError as error:
        return {'reason': shorten(str(error))}
    except Exception as error:      # the table goes on, whatever timm raises
        return {'reason': f'{type(error).__name__}: {first_line(error)}'[:90]}
    return {'sides': f'k*{stride}' + '+1' * backbones.grid_extra(),
            'side': side, **cost}


def fit_crop():
    """Return the largest side up to CROP_SIZE that fits the grid, or the
    least there is."""
    side, stride, crop = fit_grid(settings.CROP_SIZE), settings.STRIDE, (
        settings.CROP_SIZE)
    return side - stride if side > crop > stride else side


def shorten(text):
    """Return the reason in what lib/backbones.py says of a net, for a cell.
    """
    if text.startswith('BACKBONE='):
        text = text.partition(': ')[2].rpartition('; ')[0]
    for pattern, words in (
            (r'it takes no.*divisible by .*\((\d+)\).*',
             r'its patches have \1 pixels'),
            (r'it takes no.*match model.*',
             'it takes images of one size alone'),
            (r'(it takes no images of any size) .*', r'\1')):
        text = re.sub(pattern, words, text)
    return text


@functools.cache
def build_reference(stride):
    """Return (ResNet-18 in evaluation mode, an image) to compare with."""
    settings.BACKBONE, settings.STRIDE = '', stride
    return build_for_timing(fit_crop())


def build_for_timing(side):
    """Return (the settings' network in evaluation mode, an image)."""
    device = pick_device()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = heads.build_network().to(device).eval()
    return net, torch.randn(1, 3, side, side).to(device)


def measure(name, stride, found):
    """Return (seconds of a forward pass, how many times ResNet-18's), medians
    of what is timed in turns; None where that would take too long or needs
    too much memory."""
    free = available_memory()
    if found['macs'] > MAX_MACS or free and 8 * found['params'] > free:
        return None
    reference, its_image = build_reference(nearest(
        [s for s in strides() if s != 14] or [TIMED_STRIDE]))
    settings.BACKBONE, settings.STRIDE = name, stride
    net, image = build_for_timing(found['side'])
    watch, seconds = Stopwatch(pick_device(), ROUNDS), []
    with torch.no_grad():
        for _ in range(1 + ROUNDS):         # the first warms up
            seconds.append([watch.time(lambda: reference(its_image)),
                            watch.time(lambda: net(image))])
    theirs, ours = np.array(seconds[1:]).T
    return float(np.median(ours)), float(np.median(ours / theirs))


# ------------------------------------------------- the table
def strides():
    """Return the output strides of the table."""
    given = settings.given()
    return [given['STRIDE']] if 'STRIDE' in given else [
        *settings.choices('STRIDE')]


def nearest(available):
    """Return the output stride, of those available, that is timed."""
    return min(available, key=lambda stride: abs(stride - TIMED_STRIDE))


def net_rows(name, is_timed):
    """Yield the rows of a net of timm, or '' for ResNet-18, strings each:
    those of the output strides that it can take, then why not the others."""
    costs = {stride: count(name, stride) for stride in strides()}
    fits = [stride for stride, found in costs.items() if 'macs' in found]
    reasons = {}
    for stride, found in costs.items():
        if 'macs' not in found and (stride != 14 or len(costs) == 1):
            reasons.setdefault(found['reason'], []).append(str(stride))
    settings.BACKBONE = name
    label = backbones.describe_setting()
    for stride in fits:
        found, times, error = costs[stride], None, ''
        if is_timed and stride == nearest(fits):
            try:
                times = measure(name, stride, found)
            except Exception as caught:     # the table goes on
                error = f'{type(caught).__name__}: {first_line(caught)}'[:90]
        ms, ratio = (f'{1e3 * times[0]:.0f}',
                     f'{times[1]:.2f}') if times else '--'
        yield [label, str(stride), found['sides'],
               f'{found["params"] / 1e6:.2f}', f'{found["macs"] / 1e9:.2f}',
               ms, ratio, error]
    for reason, refused in reasons.items():
        yield [label, ', '.join(refused), *['-'] * 5, reason]


def print_row(cells):
    """Print a row of a Markdown table."""
    print('| ' + ' | '.join(
        cell.replace('|', r'\|').ljust(width) for cell, width in zip(
            cells, COLUMNS.values(), strict=True)) + ' |', flush=True)


def main():
    """Print the table of the nets that the command line names."""
    parser = make_parser(__doc__, settings.describe())
    parser.add_argument('--no-time', action='store_true',
                        help='count only')
    args, words = parser.parse_known_args()
    others = settings.override(words)
    pattern = others[0] if others else settings.BACKBONE
    settings.override_all(others[1:])           # which refuses them
    settings.BACKBONE = pattern or '*'          # STRIDE=14 is of timm's alone
    settings.validate()
    names = list_nets(pattern)
    settings.N_LAYERS = 18
    print(f'HEAD={settings.HEAD}, CROP_SIZE={settings.CROP_SIZE}, timm '
          f'{import_optional("timm").__version__}\n'
          f'{describe_machine(pick_device())}\n')
    print_row([*COLUMNS])
    print_row(['-' * width for width in COLUMNS.values()])
    for name in ['', *names]:
        for row in net_rows(name, not args.no_time):
            print_row(row)


if __name__ == '__main__':
    run_main(main)
