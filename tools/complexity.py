"""What the heads cost: Table 1 of the paper, counted; time, memory, measured.

    python -m tools.complexity [KEY=VALUE ...]
    python -m tools.complexity --training [KEY=VALUE ...]
    python -m tools.complexity --measure [KEY=VALUE ...]

Counts on the meta device, where nothing is allocated, take seconds; those of a
training step (--training), at CROP_SIZE and BATCH_SIZE, a minute. --measure
runs each head in a process of its own, at these too. Prints a Markdown table;
writes nothing.
"""
import argparse
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

import heads
import network
import settings
import train
from lib.cost import complexity, peak_memory, training_cost
from tools.measure import Stopwatch, markdown_table
from utils import RunError, make_parser, run_main

# Table 1 (ResNet-101, output stride 8, 513 x 513): the settings of a row; its
# MACs (G), "memory" (M) and parameters (M), from the second row on what a
# head adds. How the paper measured memory could not be determined.
ROWS = {'ResNet': ({'HEAD': 'fcn'}, (190.6, 2603.0, 42.6)),
        'DeepLabV3': ({'HEAD': 'deeplabv3'}, (63.4, 66.0, 15.5)),
        'DeepLabV3+': ({'HEAD': 'deeplabv3plus'}, (84.1, 99.3, 16.3)),
        'PSANet': ({'HEAD': 'psa'}, (56.3, 59.4, 18.5)),
        'EMANet 256': ({'HEAD': 'ema', 'EM_CHANNELS': 256},
                       (21.1, 12.3, 4.87)),
        'EMANet 512': ({'HEAD': 'ema', 'EM_CHANNELS': 512},
                       (43.1, 22.1, 10.0)),
        'non-local': ({'HEAD': 'nonlocal', 'EM_CHANNELS': 512},
                      (None, None, None)),
        'no unit': ({'HEAD': 'no_ema', 'EM_CHANNELS': 512},
                    (None, None, None))}
COUNTS = ('Table 1: MACs (G)', 'memory (M)', 'params (M)',
          "paper's conventions: MACs (G)", 'params (M)', 'as built: MACs (G)',
          'params (M)', 'activations (M)')
TRAINING = ('GFLOP', 'saved, float32, GB', 'saved, bf16, GB',
            'traffic, float32, GB', 'traffic, bf16, GB',
            'operators, float32', 'operators, bf16')
MEASURES = ('inference, s', 'its peak, GiB', 'training step, s',
            'its peak, GiB')


# ------------------------------------------------- counted
def simplify_as_counted(net):
    """Leave of a network what Table 1 counts, found by what reproduces its
    cells: of EMANet the reduction, the unit with its bases, and a classifier
    on them; of DeepLabV3+'s decoder one 3x3; of PSA no sums over positions.
    """
    if isinstance(net, network.EMANet):
        net.fc2 = nn.Conv2d(net.fc0.conv.out_channels, settings.N_CLASSES, 1)
        net.fc1 = nn.Identity()
        if settings.HEAD == 'ema':
            net.emau.mu = nn.Parameter(net.emau.mu)
    if isinstance(net, heads.DeepLabV3Plus):
        net.decoder = net.decoder[0]
    for part in net.modules():
        if isinstance(part, heads.Pointwise):
            part.aggregate = lambda mask, x: x
    return net


def count_rows():
    """Yield (row, Table 1's cells, dict of its count, dict of the network as
    built) of each row; the dicts are complexity's."""
    s, size = settings, (settings.CROP_SIZE, settings.CROP_SIZE)
    with torch.device('meta'):
        backbone = network.ResNet(s.N_LAYERS, s.STRIDE, s.STEM)
        features = backbone(torch.zeros(1, 3, *size), low=True)
    for row, (changes, paper) in ROWS.items():
        vars(s).update(changes)
        with torch.device('meta'):
            net = heads.build_network()
        del net.extractor               # the head alone, on its features
        net.extractor = lambda image, low=False: (
            features if low else features[1])
        net.extractor.align_corners = backbone.align_corners
        with torch.device('meta'):
            built = complexity(net, size)
            counted = complexity(simplify_as_counted(net), size)
        if row == 'ResNet':             # the paper's has no classifier
            counted = complexity(backbone, size)
            built = {key: value + counted[key]
                     for key, value in built.items()}
        yield row, paper, counted, built


def print_counts():
    """Print what the heads cost beside Table 1."""
    print(f'{describe_network()}. Below the first row: what a head adds.\n')
    rows = []
    for row, (macs, memory, params), counted, built in count_rows():
        rows.append([
            row, *('-' if value is None else format(value, form)
                   for value, form in ((macs, '.1f'), (memory, '.1f'),
                                       (params, '#.3g'))),
            f'{counted["macs"] / 1e9:.2f}', f'{counted["params"] / 1e6:.3f}',
            f'{built["macs"] / 1e9:.2f}', f'{built["params"] / 1e6:.3f}',
            f'{built["activations"] / 1e6:.1f}'])
    print(markdown_table(['head', *COUNTS], rows))


def describe_network():
    """Return the settings that all rows share, in words."""
    s = settings
    return (f'ResNet-{s.N_LAYERS}, {s.STEM} stem, output stride {s.STRIDE}, '
            f'{s.CROP_SIZE} x {s.CROP_SIZE} pixels')


def count_training(row, amp):
    """Return training_cost's dict of a row's network at BATCH_SIZE and
    CROP_SIZE; amp: autocast's type, None for float32."""
    s = settings
    vars(s).update(ROWS[row][0])
    return training_cost(
        heads.build_network, train.segmentation_loss,
        (s.BATCH_SIZE, 3, s.CROP_SIZE, s.CROP_SIZE), amp)


def print_training():
    """Print what a training step costs an image, operators but a step."""
    b, rows = settings.BATCH_SIZE, []
    print(f'{describe_network()}, a step of {b} images; FLOP and bytes are '
          f'those of one image. torch {torch.__version__}.\n')
    for row in ROWS:
        costs = [count_training(row, amp) for amp in (None, torch.bfloat16)]
        rows.append([row, f'{costs[0]["flop"] / b / 1e9:.1f}', *(
            format(cost[key] / unit, form) for key, unit, form in (
                ('saved', b * 1e9, '.3f'), ('traffic', b * 1e9, '.2f'),
                ('operators', 1, ',.0f')) for cost in costs)])
    print(markdown_table(['head', *TRAINING], rows))


# ------------------------------------------------- measured
def pick_device():
    """Return the GPU, else the CPU."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def measure_one():
    """Print time (the best of three, once warm) and peak memory of the
    settings' network: inference of an image, a training step."""
    settings.validate(for_training=True)
    s, device = settings, pick_device()
    amp = train.amp_dtype(device)
    net = heads.build_network().to(
        device, memory_format=train.memory_format(device))
    net.extractor.recompute = s.RECOMPUTE
    optimizer = torch.optim.SGD(net.parameters(), s.LR, s.LR_MOM)
    image = torch.randn(s.BATCH_SIZE, 3, s.CROP_SIZE, s.CROP_SIZE).to(device)
    label = torch.zeros(image[:, 0].shape, dtype=torch.long, device=device)

    def infer():
        with torch.no_grad():
            net.eval()(image[:1])

    def step():
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = net.train()(image)
        F.cross_entropy(network.to_float32(logits), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch = Stopwatch(device, rounds=4)
    for run in infer, step:
        seconds = [watch.time(run) for _ in range(watch.rounds)]
        print(f'{min(seconds[1:]):.3f} {peak_memory(device):.3f}')


def print_measures(words):
    """Measure every row, each in a process of its own; words: KEY=VALUE."""
    device, amp = pick_device(), train.amp_dtype(pick_device())
    where = (f'{torch.cuda.get_device_name()}, peak of the tensors'
             if device.type == 'cuda' else
             f'{torch.get_num_threads()} CPU threads, peak of the process')
    print(f'{describe_network()}: inference of 1 in float32, a training step '
          f'of {settings.BATCH_SIZE} in {str(amp or torch.float32)[6:]}; '
          f'torch {torch.__version__}, {where}.\n')
    rows = []
    for row, (changes, _) in ROWS.items():
        done = subprocess.run(
            [sys.executable, '-m', 'tools.complexity', '--measure-one', *words,
             *(f'{name}={value}' for name, value in changes.items())],
            stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RunError(f'{row}: measuring ended with status '
                           f'{done.returncode}; a smaller CROP_SIZE or '
                           f'BATCH_SIZE needs less memory')
        rows.append([row, *done.stdout.split()])
    print(markdown_table(['head', *MEASURES], rows))


def main():
    """Count, or measure, by the command line."""
    parser = make_parser(__doc__, settings.describe())
    parser.add_argument('--training', action='store_true',
                        help='what a training step costs')
    parser.add_argument('--measure', action='store_true',
                        help='memory and time instead of counts')
    parser.add_argument('--measure-one', action='store_true',
                        help=argparse.SUPPRESS)     # of this tool's processes
    args, words = parser.parse_known_args()
    settings.override_all(words)
    settings.validate()
    if args.measure_one:
        measure_one()
    elif args.measure:
        print_measures(words)
    elif args.training:
        print_training()
    else:
        print_counts()


if __name__ == '__main__':
    run_main(main)
