"""Times this project beside the plain way and beside the machine's limit.

    python -m tools.bench [AREA ...] [--device cuda] [--rounds N]
                          [--checkpoint FILE] [KEY=VALUE ...]

AREA is among loader, inference, training, memory, evaluation, conversion; all
if none is named. What is compared runs in turn, round after round; a table has
medians over the rounds, their quartiles, and the median of the rounds'
ratios. "Plain" is float32, eager, contiguous, as one would write it down. The
loader reads VAL_SPLIT of DATA_ROOT if that is given, else generated
photographs of 500 x 375. --checkpoint tells on how many pixels of that split
the fast ways of inference agree with the plain one.
"""
import importlib.util
import itertools
import os
import sys
import tempfile

import torch
import torch.nn.functional as F
import torchvision

import dataset
import eval
import heads
import network
import settings
import train
import utils
from lib import distributed
from lib.cost import saved_tensors
from tools.bench_conversion import conversion
from tools.bench_loader import loader, write_photographs
from tools.measure import (
    Stopwatch,
    conv_arithmetic,
    count_flop,
    describe_machine,
    has_bfloat16,
    make_step,
    markdown_table,
    peak_bytes,
    random_batch,
    steps_per_read,
)
from utils import UserError, run_main

INFERENCES = settings.choices('INFERENCE')


def build_network(**changes):
    """Return a network of some settings, which stay set."""
    vars(settings).update(changes)
    torch.manual_seed(0)
    return heads.build_network()


def print_limits(watch, flop, kinds):
    """Print how fast the peak of convolutions could be in each arithmetic of
    a table, kinds: those of its rows."""
    for kind in dict.fromkeys(kinds):
        print(f'limit, {kind}: {flop / watch.peak(kind)[0]:.4f} s an image at '
              f'the peak of convolutions')
    if not has_bfloat16(watch.device):
        print('bfloat16: not run, this device has no instructions for it')


# ------------------------------------------------- inference
def inference(watch):
    """EMANet-101 on an image of 513 x 513, output stride 8."""
    batch = 1 if watch.device.type == 'cpu' else 8
    net = build_network(N_LAYERS=101, STRIDE=8, STEM='deep', N_CLASSES=21)
    flop = count_flop(513)
    net.to(watch.device).eval()
    image = torch.randn(batch, 3, 513, 513, device=watch.device)
    peer = torchvision.models.segmentation.deeplabv3_resnet101(
        weights=None, weights_backbone=None).to(watch.device).eval()
    runners = {'plain': lambda: net(image).max(1).indices,
               "torchvision's deeplabv3_resnet101":
                   lambda: peer(image)['out'].max(1).indices}
    fast = image.contiguous(memory_format=torch.channels_last)
    kinds = dict.fromkeys(runners, conv_arithmetic(watch.device))
    for settings.INFERENCE in INFERENCES[1:]:
        is_bf16 = settings.INFERENCE == 'bf16'
        if is_bf16 and not has_bfloat16(watch.device):
            continue
        name, run = (f'ours, INFERENCE={settings.INFERENCE}',
                     eval.prepare_network(net))
        runners[name] = lambda run=run: run(fast).max(1).indices
        kinds[name] = conv_arithmetic(watch.device,
                                      torch.bfloat16 if is_bf16 else None)
    with torch.no_grad():
        watch.race(f'inference: EMANet-101, 513 x 513, batch {batch}; per '
                   f'image', runners, 's', batch, flop=flop, arithmetic=kinds)
    print_limits(watch, flop, kinds.values())


@torch.no_grad()
def print_agreement(device, path):
    """Print on how many pixels of a split each way of inference finds the
    class that the plain one does."""
    net, _ = heads.load_network(path, device)
    data = dataset.Segmentation(settings.VAL_SPLIT, False)
    runs = {}
    for settings.INFERENCE in INFERENCES:
        runs[settings.INFERENCE] = eval.prepare_network(net)
    same, total = dict.fromkeys(runs, 0), 0
    for image, _, _ in data:
        image = dataset.normalise(image[None].to(device), device)
        preds = {name: eval.predict_classes(run, image, settings.EVAL_SCALES,
                                            False)
                 for name, run in runs.items()}
        for name, pred in preds.items():
            same[name] += int((pred == preds['plain']).sum())
        total += preds['plain'].numel()
    print(f'\nagreement: {path}, {len(data)} images of {data.split}\n')
    print(markdown_table(
        ['INFERENCE', 'pixels of the class that a plain loop finds'],
        [[name, f'{100 * count / total:.4f}%']
         for name, count in same.items()]))


# ------------------------------------------------- training
def plain_step(net, optimizer, batch):
    """Return a step as one would write it down."""
    image, label, _ = batch

    def run():
        loss = F.cross_entropy(net(dataset.normalise(image, image.device)),
                               label.long(), ignore_index=255,
                               reduction='none').mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return run


def training(watch):
    """A step: EMANet-50 at stride 16 with a batch of 4 on a CPU, the paper's
    recipe on a GPU; then with the loader."""
    is_gpu = watch.device.type == 'cuda'
    layers, stride, batch = (101, 8, 16) if is_gpu else (50, 16, 4)
    vars(settings).update(N_LAYERS=layers, STRIDE=stride, STEM='deep',
                          PRETRAINED='', BATCH_SIZE=batch, LR=1e-3)
    for settings.CROP_SIZE in (513,) if is_gpu else (129, 257):
        flop = 3 * count_flop(settings.CROP_SIZE)
        race_steps(watch, flop)
        race_end_to_end(watch, flop)


def training_ways(device):
    """Set the settings of each way of training that the device has; yield
    (its name, the type of its convolutions or None)."""
    for settings.AMP in ('off', 'bf16'):
        amp = train.amp_dtype(device)
        if amp and not has_bfloat16(device):
            continue
        for switch in ('', 'RECOMPUTE', 'COMPILE')[:2 + (
                device.type == 'cuda')]:
            vars(settings).update(RECOMPUTE=switch == 'RECOMPUTE',
                                  COMPILE=switch == 'COMPILE')
            yield f'ours, {"bf16" if amp else "float32"} {switch}'.strip(), amp


def race_steps(watch, flop):
    """Time plain steps and ours, in every way that the device has. flop: of
    an image in a step."""
    device, batch, before = watch.device, settings.BATCH_SIZE, (
        settings.as_dict())
    fixed, memory = random_batch(device), {}
    net = build_network().to(device).train()
    runners = {'plain': plain_step(net, torch.optim.SGD(
        train.param_groups(net), 1e-3, 0.9), fixed)}
    kinds = {'plain': conv_arithmetic(device)}
    for name, amp in training_ways(device):
        held = torch.cuda.memory_allocated()            # 0 without a GPU
        runners[name] = make_step(train.build(device, is_new=True),
                                  itertools.repeat(fixed), device)
        kinds[name] = conv_arithmetic(device, amp)
        for _ in range(2):          # cuDNN's search, momentum, compilation
            runners[name]()
        peak = peak_bytes(runners[name], device)
        if peak is not None:
            memory[name] = peak - held
    vars(settings).update(before)
    seconds = watch.race(describe_step(), runners, 's', batch, flop=flop,
                         arithmetic=kinds)
    print_limits(watch, flop, kinds.values())
    for name, used in memory.items():
        print(f'{name}: {1 / seconds[name]:.1f} images/s, {used / 1e9:.1f} '
              f'GB of tensors at most')


def describe_step():
    s = settings
    return (f'training step: EMANet-{s.N_LAYERS}, stride {s.STRIDE}, crop '
            f'{s.CROP_SIZE}, batch {s.BATCH_SIZE}; per image')


def race_end_to_end(watch, flop):
    """Time train.py's step on one batch, and with its loader, from files to
    updated weights. Not in turn: the loader would read ahead meanwhile; what
    it has read ahead at the start is used up untimed."""
    s, device = settings, watch.device
    data = dataset.Segmentation(s.VAL_SPLIT, train=True)
    data.ids *= -(-s.BATCH_SIZE // len(data.ids))       # a batch at least
    built, seconds = train.build(device, is_new=True), {}
    count = steps_per_read(device)

    def time_steps(batches):
        step = make_step(built, batches, device)
        for _ in range(2 * distributed.count_workers() + 1):
            step()
        return [watch.time(lambda: [step() for _ in range(count)])
                / count / s.BATCH_SIZE for _ in range(watch.rounds)]
    seconds['the step alone'] = time_steps(
        itertools.repeat(random_batch(device)))
    seconds['files to updated weights'] = time_steps(dataset.to_device(
        dataset.train_loader(data), device))
    kind = conv_arithmetic(device, train.amp_dtype(device))
    watch.print_times(
        f'{describe_step()}; AMP={s.AMP}, '
        f'{distributed.count_workers()} loader processes', seconds, 's', flop,
        dict.fromkeys(seconds, kind))


# ------------------------------------------------- memory
def count_saved_bytes(net, image, dtype):
    """Return the bytes that a forward pass keeps for the backward pass,
    parameters left out: (all, without copies of parameters in bfloat16)."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    shapes = {p.shape for p in net.parameters() if p.ndim > 1}
    label = torch.zeros(len(image), *image.shape[2:], dtype=torch.uint8,
                        device=image.device)

    def forward():
        with torch.autocast(image.device.type, dtype or torch.bfloat16,
                            enabled=dtype is not None):
            logits = net(image)
        return train.segmentation_loss(logits, label)
    sizes = [(x.untyped_storage().nbytes(),
              x.dtype == torch.bfloat16 and x.shape in shapes)
             for x in saved_tensors(forward)
             if x.untyped_storage()._cdata not in own]
    return (sum(size for size, _ in sizes),
            sum(size for size, is_copy in sizes if not is_copy))


def memory(watch):
    """What the forward pass keeps for the backward pass."""
    net = build_network(N_LAYERS=50, STRIDE=16, STEM='deep', N_CLASSES=21)
    image = torch.randn(4, 3, 257, 257)
    plain, _ = count_saved_bytes(net.train(), image, None)
    rows = [['plain', f'{plain / 1e6:.0f}', '1.00', '1.00']]
    net.to(memory_format=torch.channels_last)
    image = image.contiguous(memory_format=torch.channels_last)
    for net.extractor.recompute in (False, True):
        for dtype in (None, torch.bfloat16):
            every, bare = count_saved_bytes(net, image, dtype)
            name = f'ours, {"bf16" if dtype else "float32"}'
            rows.append([name + ' RECOMPUTE' * net.extractor.recompute,
                         f'{every / 1e6:.0f}', f'{every / plain:.2f}',
                         f'{bare / plain:.2f}'])
    print('\nkept for the backward pass: EMANet-50, stride 16, crop 257, '
          'batch 4\n')
    print(markdown_table(['', 'MB', 'of plain', 'without copies of weights'],
                         rows))


# ------------------------------------------------- evaluation
@torch.no_grad()
def evaluation(watch):
    """Class map and confusion matrix; on a GPU all of val."""
    torch.manual_seed(0)
    size, smooth = (513, 513), network.upsample(torch.randn(1, 21, 9, 9),
                                                (65, 65))
    x = (3 * smooth + 0.3 * torch.randn(1, 21, 65, 65)).to(watch.device)
    watch.race('upsampling and class map, 21 classes, 513 x 513', {
        'ours: max(1).indices': lambda: network.upsample(x, size).max(1),
        'argmax(1)': lambda: network.upsample(x, size).argmax(1)})
    pred = network.upsample(x, size).max(1).indices.to(torch.uint8)
    race_confusion_matrices(watch, pred)
    if watch.device.type == 'cuda':
        score_val(watch)


def race_confusion_matrices(watch, pred):
    """Time counting a prediction (1, H, W) by class, in three ways."""
    label = pred.roll(7, 1)
    label[:, :20] = 255
    long_label, long_pred = label.long(), pred.long()

    def masked():
        kept = long_label != 255
        return torch.bincount(long_label[kept] * 21 + long_pred[kept],
                              minlength=441).reshape(21, 21)

    def ours():
        return utils.confusion_matrix(pred, label, 21, 255)
    runners = {'masked int64 keys, as in 2019': masked, 'ours': ours}
    if importlib.util.find_spec('torchmetrics'):
        # optional, for this row alone
        from torchmetrics.functional.classification import (
            multiclass_confusion_matrix,
        )
        runners = {'torchmetrics': lambda: multiclass_confusion_matrix(
            long_pred, long_label, 21, ignore_index=255), **runners}
    else:
        print('torchmetrics: not run, pip install torchmetrics')
    watch.race('confusion matrix, 21 classes, 513 x 513', runners)
    for name, run in runners.items():
        assert torch.equal(run(), ours()), name


def score_val(watch):
    """Score 1,449 images of VOC's sizes, reading and decoding included."""
    net = build_network(N_LAYERS=101, STRIDE=8, STEM='deep', N_CLASSES=21)
    net.to(watch.device)
    settings.NUM_WORKERS = os.cpu_count() - 1
    with tempfile.TemporaryDirectory() as root:
        write_photographs(root, 63)
        settings.DATA_ROOT = root
        data = dataset.Segmentation('val', False)
        data.ids *= 23
        for settings.INFERENCE in INFERENCES:
            seconds = watch.time(lambda: eval.evaluate(net, data))
            print(f'{len(data)} images of val, EMANet-101, INFERENCE='
                  f'{settings.INFERENCE}: {seconds:.1f} s')


# ------------------------------------------------- all
AREAS = {area.__name__: area for area in (
    loader, inference, training, memory, evaluation, conversion)}


def parse_arguments():
    """Return the command line's options; set the settings that it gives."""
    parser = utils.make_parser(__doc__, settings.describe())
    parser.add_argument('areas', nargs='*', metavar='AREA')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--rounds', metavar='N', type=int, default=7)
    parser.add_argument('--checkpoint', metavar='FILE')
    args = parser.parse_args(settings.override(sys.argv[1:]))
    unknown = ', '.join(name for name in args.areas if name not in AREAS)
    if unknown:
        raise UserError(f'{unknown}: areas are {", ".join(AREAS)}')
    if args.rounds < 1:
        raise UserError(f'--rounds {args.rounds}: give rounds at least 1')
    if args.device != 'cpu' and not torch.cuda.is_available():
        raise UserError(f'--device {args.device}: this machine has no CUDA '
                        f'GPU; leave it out')
    settings.validate()
    return args


def main():
    """Run the areas that the command line names."""
    args = parse_arguments()
    device = torch.device(args.device)
    watch = Stopwatch(device, args.rounds)
    print(describe_machine(device))
    torch.backends.cudnn.benchmark = True
    dataset.retain_freed_memory()
    with tempfile.TemporaryDirectory() as root:
        if 'DATA_ROOT' not in settings.given():
            settings.DATA_ROOT = os.path.join(root, 'photographs')
            write_photographs(settings.DATA_ROOT)
        if args.checkpoint:
            print_agreement(device, args.checkpoint)
        for area in args.areas or ([] if args.checkpoint else AREAS):
            before = settings.as_dict()
            AREAS[area](watch)
            vars(settings).update(before)


if __name__ == '__main__':
    run_main(main)
