"""Times this project beside the plain way and beside the machine's limit.

    python tests/bench.py [AREA ...] [--device cuda] [--rounds N]
                          [--checkpoint FILE] [KEY=VALUE ...]

AREA is among loader, inference, training, memory, evaluation, conversion; all
if none is named. What is compared runs in turn, round after round; a table has
medians over the rounds, the middle half of them, and the median of the rounds'
ratios.
"Plain" is float32, eager, contiguous, as one would write it down. The loader
reads VAL_SPLIT of DATA_ROOT if that is given, else generated photographs of
500 x 375. With --checkpoint, inference also tells on how many pixels of that
split the fast ways agree with the plain one.
"""
import argparse
import importlib.util
import io
import json
import os
import platform
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(
    __file__))))
import baselines    # noqa: E402
import dataset      # noqa: E402
import eval         # noqa: E402
import network      # noqa: E402
import prepare      # noqa: E402
import settings     # noqa: E402
import train        # noqa: E402
import utils        # noqa: E402


# ------------------------------------------------- measuring
class Bench:
    """The device, the number of rounds, and the peaks measured so far."""

    def __init__(self, device, rounds):
        self.device, self.rounds, self.peaks = device, rounds, {}

    def time(self, run):
        """Return the seconds of one run, the device's work included."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def race(self, title, runners, unit='ms', per=1, work=None):
        """Time runners {name: function} in turn and print them; the first is
        what the others are measured by. per: things that one run does; work:
        FLOP that one thing needs."""
        for run in runners.values():
            run()                               # warm
        taken = {name: [] for name in runners}
        for _ in range(self.rounds):
            for name, run in runners.items():
                taken[name].append(self.time(run) / per)
        times = {'s': 1, 'ms': 1e3}[unit]
        first = np.array(next(iter(taken.values())))
        print(f'\n{title}\n{"":44}{unit:>8}{"middle half":>19}{"times":>7}')
        for name, each in taken.items():
            low, mid, high = times * np.percentile(each, (25, 50, 75))
            line = (f'{name:44}{mid:8.2f}{low:9.2f} ..{high:7.2f}'
                    f'{np.median(first / each):7.2f}')
            if work:
                speed = work / (mid / times)
                line += f'{speed / 1e9:9.0f} GFLOP/s, {times / mid:.2f} a s'
            print(line, flush=True)
        return {name: float(np.median(each)) for name, each in taken.items()}

    def peak(self, dtype):
        """Return the FLOP/s of a large convolution (3 x 3, 512 channels) and
        of a large matrix product."""
        if dtype not in self.peaks:
            c, side = 512, 65 if self.device.type == 'cpu' else 129
            x = torch.randn(1, c, side, side, device=self.device).to(
                dtype, memory_format=torch.channels_last)
            conv = torch.nn.Conv2d(c, c, 3, 1, 1, bias=False).to(
                self.device, dtype, memory_format=torch.channels_last)
            n = 1 if self.device.type == 'cpu' else 20
            square = torch.randn(4096, 4096, device=self.device, dtype=dtype)

            def convolve():
                for _ in range(n):
                    conv(x)
            with torch.no_grad():
                taken = [(self.time(convolve) / n,
                          self.time(lambda: square @ square))
                         for _ in range(6)][1:]
            conv_s, square_s = np.min(taken, 0)
            self.peaks[dtype] = (2 * 9 * c * c * side * side / conv_s,
                                 2 * 4096 ** 3 / square_s)
            print('peak, {}: convolution {:.0f} GFLOP/s, matrix product '
                  '{:.0f}'.format(str(dtype)[6:], *(
                      speed / 1e9 for speed in self.peaks[dtype])))
        return self.peaks[dtype]


def fast_bfloat16(device):
    """Say whether the device computes in bfloat16 by itself."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open('/proc/cpuinfo') as file:
            text = file.read()
    except OSError:
        return False
    return 'avx512_bf16' in text or 'amx_bf16' in text


def plain_upsample(x, size):
    return F.interpolate(x.float(), size, mode='bilinear', align_corners=True)


class Plainly:
    """A context in which the network upsamples in the plain way."""

    def __enter__(self):
        self.ours, network.upsample = network.upsample, plain_upsample

    def __exit__(self, *error):
        network.upsample = self.ours


def build(**changes):
    """Return a network of some settings; they stay set."""
    vars(settings).update(changes)
    torch.manual_seed(0)
    return baselines.build_network()


# ------------------------------------------------- loader
def photographs(root, count=16, copies=1):
    """Write generated photographs, of VOC's sizes and about its bytes, with
    labels; the list val names each of them `copies` times."""
    random = np.random.default_rng(0)
    for folder in ('JPEGImages', 'SegmentationClassAug',
                   'ImageSets/Segmentation'):
        os.makedirs(os.path.join(root, folder))
    names = [f'photo_{i:04}' for i in range(count)]
    for i, name in enumerate(names):
        h, w = ((375, 500), (375, 500), (500, 375), (333, 500))[i % 4]
        image = sum(cv2.resize(random.normal(0, side ** -0.54, (
            h * side // 500 + 1, w * side // 500 + 1, 3)), (w, h))
            for side in (4, 16, 64, 250, 500))
        image = (128 + 160 * image).clip(0, 255).astype(np.uint8)
        cv2.imwrite(f'{root}/JPEGImages/{name}.jpg', image,
                    [cv2.IMWRITE_JPEG_QUALITY, 92])
        fields = [cv2.resize(random.normal(size=(6, 8)), (w, h),
                             interpolation=cv2.INTER_CUBIC) for _ in range(5)]
        label = random.integers(1, 21, 5).astype(np.uint8)
        label[:2] = 0
        label = label[np.argmax(fields, 0)]
        label[cv2.morphologyEx(label, cv2.MORPH_GRADIENT,
                               np.ones((5, 5))) > 0] = 255
        utils.save_label(label, f'{root}/SegmentationClassAug/{name}.png',
                         utils.voc_palette())
    with open(f'{root}/ImageSets/Segmentation/val.txt', 'w') as file:
        file.write('\n'.join(names * copies))


class Whole(dataset.Segmentation):
    """The plain path: the whole image is scaled and padded, then cropped."""

    def augment(self, image, label, random):
        scale = self.scales[random.integers(len(self.scales))]
        image = cv2.resize(image, None, fx=scale, fy=scale)
        label = cv2.resize(label, image.shape[1::-1],
                           interpolation=cv2.INTER_NEAREST_EXACT)
        h, w = (max(0, self.crop - side) for side in label.shape)
        image = cv2.copyMakeBorder(image, 0, h, 0, w, cv2.BORDER_CONSTANT,
                                   value=self.fill)
        label = cv2.copyMakeBorder(label, 0, h, 0, w, cv2.BORDER_CONSTANT,
                                   value=self.ignore)
        y, x = (random.integers(side - self.crop + 1) for side in label.shape)
        here = np.s_[y:y + self.crop, x:x + self.crop]
        turn = 1 if random.random() < 0.5 else -1
        return (np.ascontiguousarray(image[here][:, ::turn]),
                np.ascontiguousarray(label[here][:, ::turn]))


class Torchvision(Whole):
    """The same by torchvision's v2 transforms, on uint8."""

    def __getitem__(self, key):
        epoch, i = key
        random = np.random.default_rng([self.seed, epoch, i, 2])
        image = torchvision.io.read_image(self.path(i, 'JPEGImages', 'jpg'))
        label = torch.from_numpy(self.label(i))[None]
        scale = self.scales[random.integers(len(self.scales))]
        size = [round(side * scale) for side in label.shape[1:]]
        image = v2.functional.resize(image, size, antialias=False)
        label = v2.functional.resize(
            label, size, v2.InterpolationMode.NEAREST_EXACT)
        pad = [0, 0, *(max(0, self.crop - side) for side in size[::-1])]
        image = v2.functional.pad(image, pad, self.fill)
        label = v2.functional.pad(label, pad, [self.ignore])
        y, x = (int(random.integers(side - self.crop + 1))
                for side in label.shape[1:])
        both = [v2.functional.crop(part, y, x, self.crop, self.crop)
                for part in (image, label)]
        if random.random() < 0.5:
            both = [v2.functional.horizontal_flip(part) for part in both]
        return both[0].contiguous(), both[1][0].contiguous(), self.ids[i]


class Pillow(Whole):
    """The same as the 2019 code had it: Pillow, then float tensors."""

    def __getitem__(self, key):
        epoch, i = key
        random = np.random.default_rng([self.seed, epoch, i, 2])
        with Image.open(self.path(i, 'JPEGImages', 'jpg')) as picture:
            image = np.array(picture.convert('RGB'))
        image = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1)
                     for x in (settings.MEAN, settings.STD))
        image, label = (image - mean) / std, torch.from_numpy(self.label(i))
        scale = self.scales[random.integers(len(self.scales))]
        size = [round(side * scale) for side in label.shape]
        image = F.interpolate(image[None], size, mode='bilinear',
                              align_corners=True)
        label = F.interpolate(label[None, None].float(), size)
        h, w = (max(0, self.crop - side) for side in size)
        image = F.pad(image, (0, w, 0, h))[0]
        label = F.pad(label, (0, w, 0, h), value=255)[0, 0]
        y, x = (int(random.integers(side - self.crop + 1))
                for side in label.shape)
        here = np.s_[..., y:y + self.crop, x:x + self.crop]
        image, label = image[here], label[here]
        if random.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        return image, label.long(), self.ids[i]


def loader(bench):
    """One augmented sample with its label, on one core; loaders of two
    processes."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    kinds = {'the 2019 way: Pillow, float tensors': Pillow,
             'plain: OpenCV, the whole image scaled': Whole,
             'torchvision v2, uint8': Torchvision,
             'ours: the window of the crop': dataset.Segmentation}
    sets = {name: kind(settings.VAL_SPLIT, True)
            for name, kind in kinds.items()}
    count, epoch = len(sets['torchvision v2, uint8']), iter(range(10 ** 9))
    data = dataset.Segmentation(settings.VAL_SPLIT, True)
    crop = np.zeros((settings.CROP_SIZE, settings.CROP_SIZE, 4), np.uint8)

    def decode(what):
        for i in range(count):
            if 'JPEG' in what:
                dataset.read_image(data.path(i, 'JPEGImages', 'jpg'))
            if 'PNG' in what:
                dataset.read_label(data.path(i, dataset.LABELS, 'png'))
            if 'copy' in what:
                crop.copy()

    def samples(some):
        now = next(epoch)
        for i in range(count):
            some[now, i]
    bench.race(f'loader: one sample, crop {settings.CROP_SIZE}, one core', {
        'limit: decode JPEG and PNG, one copy': lambda: decode('JPEG PNG '
                                                               'copy'),
        'limit: decode JPEG, one copy': lambda: decode('JPEG copy'),
        **{name: lambda some=some: samples(some)
           for name, some in sets.items()}}, per=count)

    vars(settings).update(BATCH_SIZE=8, NUM_WORKERS=2, ITER_MAX=24)

    def through(kind):
        def run():
            some = kind(settings.VAL_SPLIT, True)
            some.ids = (some.ids * 8)[:64]
            for _ in dataset.train_loader(some):
                pass
        return run
    slow = bench.rounds
    bench.rounds = min(slow, 3)
    bench.race('loader: a sample through two processes, their start included',
               {name: through(kind) for name, kind in kinds.items()}, per=192)
    bench.rounds = slow
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


# ------------------------------------------------- inference
def inference(bench):
    """EMANet-101 on an image of 513 x 513, output stride 8."""
    batch = 1 if bench.device.type == 'cpu' else 8
    net = build(N_LAYERS=101, STRIDE=8, STEM='deep', N_CLASSES=21)
    with torch.device('meta'):
        work = 2 * baselines.complexity(baselines.build_network())['macs']
    net.to(bench.device).eval()
    image = torch.randn(batch, 3, 513, 513, device=bench.device)
    fast = image.contiguous(memory_format=torch.channels_last)

    def plain():
        with Plainly():
            return net(image).max(1).indices
    peer = torchvision.models.segmentation.deeplabv3_resnet101(
        weights=None, weights_backbone=None).to(bench.device).eval()
    runners = {'plain': plain,
               "torchvision's deeplabv3_resnet101":
                   lambda: peer(image)['out'].max(1).indices}
    for mode in eval.INFERENCES:
        if mode == 'bf16' and not fast_bfloat16(bench.device):
            continue
        settings.INFERENCE = mode
        run = eval.prepared(net)
        runners[f'ours, INFERENCE={mode}'] = (
            lambda run=run: eval.likeliest(run(fast)))
    with torch.no_grad():
        bench.race(f'inference: EMANet-101, 513 x 513, batch {batch}',
                   runners, 's', batch, work)
    limits(bench, work)
    settings.INFERENCE = 'plain'


def limits(bench, work):
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.float32 or fast_bfloat16(bench.device):
            print(f'limit, {str(dtype)[6:]}: '
                  f'{work / bench.peak(dtype)[0]:.4f} s '
                  f'an image at the peak of convolutions')
    if not fast_bfloat16(bench.device):
        print('bfloat16: not run, this processor has neither AVX512-BF16 nor '
              'AMX')


def agreement(bench, path):
    """On how many pixels of a split does each way find the same class?"""
    net, _ = eval.load_network(path, bench.device)
    data = dataset.Segmentation(settings.VAL_SPLIT, False)
    ways = {}
    for settings.INFERENCE in eval.INFERENCES:
        ways[settings.INFERENCE] = eval.prepared(net)
    same, total = dict.fromkeys(ways, 0), 0
    for image, _, _ in data:
        image = dataset.normalise(image[None].to(bench.device), bench.device)
        with torch.no_grad():
            found = {name: eval.classify(run, image, settings.EVAL_SCALES)
                     for name, run in ways.items()}
        for name in ways:
            same[name] += int((found[name] == found['plain']).sum())
        total += found['plain'].numel()
    print(f'\nagreement: {path}, {len(data)} images of {data.split}')
    for name, count in same.items():
        print(f'INFERENCE={name:10} {100 * count / total:.4f}% of pixels as '
              f'in a plain loop')
    settings.INFERENCE = 'plain'


# ------------------------------------------------- training
def plain_step(net, optimizer, image, label):
    """Return a step in the plain way."""
    def run():
        with Plainly():
            loss = F.cross_entropy(net(image), label.long(), ignore_index=255,
                                   reduction='none').mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return run


def our_step(net, optimizer, image, label, amp):
    """Return a step as train.py has it; the loss of the step before is read
    in this one."""
    device, before = image.device, []
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def run():
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = net(image)
        loss = train.segmentation_loss(logits, label)
        loss.backward()
        before.append(utils.Told(train.watch(
            net, loss.detach(), optimizer, scaler), False))
        optimizer.step()
        optimizer.zero_grad()
        return before.pop(0).read() if len(before) > 1 else None
    return run


def training(bench):
    """A step: EMANet-50 at stride 16 with a batch of 4 on a CPU, the paper's
    recipe on a GPU."""
    gpu = bench.device.type == 'cuda'
    layers, stride, batch = (101, 8, 16) if gpu else (50, 16, 4)
    for crop in (513,) if gpu else (129, 257):
        vars(settings).update(N_LAYERS=layers, STRIDE=stride, STEM='deep',
                              CROP_SIZE=crop, PRETRAINED='', BATCH_SIZE=batch)
        with torch.device('meta'):
            work = 6 * baselines.complexity(baselines.build_network(),
                                            (crop, crop))['macs']
        image = torch.randn(batch, 3, crop, crop, device=bench.device)
        label = torch.randint(0, 21, (batch, crop, crop), dtype=torch.uint8,
                              device=bench.device)
        net = build().to(bench.device).train()
        runners = {'plain': plain_step(
            net, torch.optim.SGD(train.param_groups(net), 1e-3, 0.9), image,
            label)}
        memory = {}
        for settings.AMP in ('off', 'bf16'):
            amp = train.amp_dtype(bench.device)
            if amp and not fast_bfloat16(bench.device):
                continue
            for extra in ('', 'RECOMPUTE', *(['COMPILE'] if gpu else [])):
                vars(settings).update(RECOMPUTE=extra == 'RECOMPUTE',
                                      COMPILE=extra == 'COMPILE')
                others = torch.cuda.memory_allocated() if gpu else 0
                net, optimizer, _ = train.build(bench.device, fresh=True)
                train.set_training(net)
                fast = image.contiguous(
                    memory_format=train.layout(bench.device))
                name = (f'ours, {"bf16" if amp else "float32"}'
                        + f' {extra}' * bool(extra))
                runners[name] = our_step(net, optimizer, fast, label, amp)
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                    runners[name]()
                    memory[name] = (torch.cuda.max_memory_allocated()
                                    - others) / 1e9
        found = bench.race(
            f'training step: EMANet-{layers}, stride {stride}, crop {crop}, '
            f'batch {batch}; per image', runners, 's', batch, work)
        limits(bench, work)
        for name, used in memory.items():
            share = work / found[name] / bench.peak(
                torch.bfloat16 if 'bf16' in name else torch.float32)[1]
            print(f'{name}: {1 / found[name]:.1f} images/s, '
                  f'{100 * share:.0f}% of the matrix peak, {used:.1f} GB at '
                  f'most')
    vars(settings).update(RECOMPUTE=False, COMPILE=False)


# ------------------------------------------------- memory
def saved_bytes(net, image, dtype):
    """Return the bytes that a forward pass keeps for the backward pass,
    parameters left out: (all, without copies of parameters in bfloat16)."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    shapes = {p.shape for p in net.parameters() if p.ndim > 1}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x        # so none is reused
        return x
    label = torch.zeros(len(image), *image.shape[2:], dtype=torch.uint8,
                        device=image.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast(image.device.type, dtype or torch.bfloat16,
                            enabled=dtype is not None):
            logits = net(image)
        train.segmentation_loss(logits, label)
    sizes = [(x.untyped_storage().nbytes(),
              x.dtype == torch.bfloat16 and x.shape in shapes)
             for at, x in kept.items() if at not in own]
    return (sum(size for size, _ in sizes),
            sum(size for size, copy in sizes if not copy))


def memory(bench):
    """What the forward pass keeps for the backward pass."""
    net = build(N_LAYERS=50, STRIDE=16, STEM='deep', N_CLASSES=21)
    image = torch.randn(4, 3, 257, 257)
    net.train()
    with Plainly():
        plain, _ = saved_bytes(net, image, None)
    net.to(memory_format=torch.channels_last)
    image = image.contiguous(memory_format=torch.channels_last)
    print(f'\nkept for the backward pass: EMANet-50, stride 16, crop 257, '
          f'batch 4\n{"":40}{"MB":>8}{"of plain":>10}'
          f'{"without copies of weights":>27}\n{"plain":40}'
          f'{plain / 1e6:8.0f}{1:10.2f}')
    for recompute in (False, True):
        net.extractor.recompute = recompute
        for dtype in (None, torch.bfloat16):
            every, bare = saved_bytes(net, image, dtype)
            name = (f'ours, {"bf16" if dtype else "float32"}'
                    + ' RECOMPUTE' * recompute)
            print(f'{name:40}{every / 1e6:8.0f}{every / plain:10.2f}'
                  f'{bare / plain:27.2f}')


# ------------------------------------------------- evaluation
@torch.no_grad()
def evaluation(bench):
    """Upsampling and argmax; the confusion matrix; on a GPU all of val."""
    torch.manual_seed(0)
    smooth = plain_upsample(torch.randn(1, 21, 9, 9), (65, 65))
    x = (3 * smooth + 0.3 * torch.randn(1, 21, 65, 65)).to(bench.device)
    size = (513, 513)

    def ours():
        return eval.likeliest(network.upsample(x, size))

    def plain():
        return plain_upsample(x, size).max(1).indices
    bench.race('upsampling and argmax, 21 classes, 513 x 513', {
        'plain: interpolate, max': plain,
        'interpolate, argmax': lambda: plain_upsample(x, size).argmax(1),
        'ours': ours})
    print(f'pixels that differ: {int((ours() != plain()).sum())}')

    pred = ours()
    label = pred.roll(7, 1)
    label[:, :20] = 255
    long = label.long(), pred.long()

    def old():
        kept = long[0] != 255
        return torch.bincount(long[0][kept] * 21 + long[1][kept],
                              minlength=441).reshape(21, 21)

    def new():
        return utils.confusion_matrix(pred, label, 21, 255)
    runners = {'masked int64 keys, as in 2019': old, 'ours': new}
    if importlib.util.find_spec('torchmetrics'):
        from torchmetrics.functional.classification import (
            multiclass_confusion_matrix)

        def theirs():
            return multiclass_confusion_matrix(*long[::-1], 21,
                                               ignore_index=255)
        runners = {'torchmetrics': theirs, **runners}
        assert torch.equal(theirs(), new())
    else:
        print('torchmetrics: not run, pip install torchmetrics')
    bench.race('confusion matrix, 21 classes, 513 x 513', runners)
    assert torch.equal(old(), new())
    if bench.device.type == 'cuda':
        score_val(bench)


def score_val(bench):
    """Score 1,449 images of VOC's sizes, reading and decoding included."""
    net = build(N_LAYERS=101, STRIDE=8, STEM='deep', N_CLASSES=21)
    net.to(bench.device)
    settings.NUM_WORKERS = os.cpu_count() - 1
    with tempfile.TemporaryDirectory() as root:
        photographs(root, 63, 23)
        vars(settings).update(DATA_ROOT=root, VAL_SPLIT='val')
        data = dataset.Segmentation('val', False)
        for settings.INFERENCE in eval.INFERENCES:
            taken = bench.time(lambda: eval.measure(net, data))
            print(f'{len(data)} images of val, EMANet-101, INFERENCE='
                  f'{settings.INFERENCE}: {taken:.1f} s')


# ------------------------------------------------- conversion
def archives(folder, photograph):
    """Write archives of the official structure, and masks of one's own;
    return {words for prepare.py: the files that it shall make of them}."""
    folder, jpeg = Path(folder), Path(photograph).read_bytes()
    with Image.open(photograph) as image:
        image, size = image.convert('RGB'), image.size[::-1]

    def encoded(image, kind):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    def zipped(name, members):
        with zipfile.ZipFile(folder / name, 'w') as archive:
            for member, data in members.items():
                archive.writestr(member, data)

    def regions(height, width, values):
        """A mask of smooth regions."""
        coarse = np.random.default_rng(0).random((9, 12), np.float32)
        fine = cv2.resize(coarse, (width, height),
                          interpolation=cv2.INTER_CUBIC)
        return np.array(values, np.uint8)[
            (fine.clip(0, 0.999) * len(values)).astype(int)]
    city, wide = 'aachen_%06d_000019', image.resize((2048, 1024))
    wide = np.array(wide) + np.random.default_rng(0).integers(
        0, 8, (1024, 2048, 3), np.uint8)        # noise, as cameras have
    wide = encoded(Image.fromarray(wide), 'PNG')
    ids = encoded(Image.fromarray(regions(1024, 2048, range(34))), 'PNG')
    zipped('leftImg8bit_trainvaltest.zip', {
        f'leftImg8bit/train/aachen/{city % i}_leftImg8bit.png': wide
        for i in range(60)})
    zipped('gtFine_trainvaltest.zip', {
        f'gtFine/train/aachen/{city % i}_gtFine_labelIds.png': ids
        for i in range(60)})
    corners = [[[x, y, x + 150, y + 9, x + 90, y + 120, x + 5, y + 80]]
               for x in range(5, 300, 60) for y in range(5, 200, 50)]
    zipped('train2017.zip', {f'train2017/{i:012}.jpg': jpeg
                             for i in range(800)})
    zipped('val2017.zip', {})
    zipped('annotations_trainval2017.zip', {
        f'annotations/instances_{split}2017.json': json.dumps({
            'images': [{'id': i, 'file_name': f'{i:012}.jpg', 'height':
                        size[0], 'width': size[1]} for i in range(800)],
            'annotations': [{'image_id': i, 'category_id': 1 + j % 9,
                             'iscrowd': 0, 'segmentation': where}
                            for i in range(800)
                            for j, where in enumerate(corners)]})
        for split in ('train', 'val')})
    from scipy.io import savemat
    buffer = io.BytesIO()
    savemat(buffer, {'S': regions(*size, prepare.STUFF_IDS)})
    stuff = [f'COCO_train2014_{i:012}' for i in range(600)]
    zipped('cocostuff-10k-v1.1.zip', {
        'imageLists/train.txt': '\n'.join(stuff), 'imageLists/test.txt': '',
        **{f'images/{name}.jpg': jpeg for name in stuff},
        **{f'annotations/{name}.mat': buffer.getvalue() for name in stuff}})
    for kind, data in (('photos', jpeg), ('masks', encoded(
            Image.fromarray(regions(*size, range(21))), 'PNG'))):
        (folder / kind).mkdir()
        for i in range(500):
            end = 'jpg' if kind == 'photos' else 'png'
            (folder / kind / f'{i}.{end}').write_bytes(data)
    return {('cityscapes',): 120, ('coco',): 1600, ('cocostuff',): 1200,
            ('masks', str(folder / 'photos'), str(folder / 'masks')): 1000}


def conversion(bench):
    """Time prepare.py beside itself in one process: the plain loop."""
    several = prepare.in_processes

    def plain(work, jobs, desc, total=None, done=None):
        return (work(*job) for job in jobs)

    with tempfile.TemporaryDirectory() as folder:
        photograph = dataset.Segmentation(settings.VAL_SPLIT, False).path(
            0, 'JPEGImages', 'jpg')
        for words, files in archives(folder, photograph).items():
            source = prepare.SOURCES.get(words[0], {})
            source.update(unpacked=0, counts={}, archives=[
                (url, '', 0) for url, *_ in source.get('archives', ())])

            def convert(run):
                prepare.in_processes = run
                made = tempfile.mkdtemp(dir=folder)     # removed untimed
                prepare.main([*words, '--to', made] + (
                    ['--from', folder] if words[0] != 'masks' else []))
            bench.race(f'prepare.py {words[0]}, {files} files; per file', {
                'a plain loop': lambda: convert(plain),
                f'in processes, {os.cpu_count()} cores':
                    lambda: convert(several)}, per=files)
    prepare.in_processes = several


# ------------------------------------------------- all
def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    areas = {f.__name__: f
             for f in (loader, inference, training, memory, evaluation,
                       conversion)}
    parser.add_argument('areas', nargs='*', metavar='AREA')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--checkpoint')
    asked = parser.parse_args(settings.override(sys.argv[1:]))
    unknown = set(asked.areas) - set(areas)
    if unknown or asked.rounds < 1:
        raise ValueError(f'{", ".join(unknown) or asked.rounds}: areas are '
                         f'{", ".join(areas)}, rounds at least 1')
    if asked.device != 'cpu' and not torch.cuda.is_available():
        raise ValueError(f'--device {asked.device}: this machine has no CUDA '
                         f'GPU; leave it out')
    device = torch.device(asked.device)
    bench = Bench(device, asked.rounds)
    name = (torch.cuda.get_device_name() if device.type == 'cuda'
            else platform.processor() or platform.machine())
    print(f'{name}, {os.cpu_count()} cores, {torch.get_num_threads()} '
          f'threads, {torch.backends.cpu.get_cpu_capability()}\n'
          f'python {platform.python_version()}, torch {torch.__version__}, '
          f'torchvision {torchvision.__version__}, OpenCV {cv2.__version__}, '
          f'commit {utils.git_hash()}')
    torch.backends.cudnn.benchmark = True
    dataset.keep_memory()
    with tempfile.TemporaryDirectory() as root:
        if 'DATA_ROOT' not in settings.given():
            photographs(os.path.join(root, 'photographs'))
            settings.DATA_ROOT = os.path.join(root, 'photographs')
        if asked.checkpoint:
            agreement(bench, asked.checkpoint)
        for area in asked.areas or (
                [] if asked.checkpoint else areas):
            before = settings.as_dict()
            areas[area](bench)
            vars(settings).update(before)


if __name__ == '__main__':
    utils.launch(main)
