"""The networks that one recipe trains: EMANet and what it is compared with.

`build_network()` gives the one that the settings describe. All have the same
face, `logits = net(image)`, and the backbone is `net.extractor`.

    python baselines.py [KEY=VALUE ...]             Table 1's costs, counted
    python baselines.py --measure [KEY=VALUE ...]   memory and time, measured

Shapes: b images, c channels, h x w feature grid, n = h * w, H x W pixels. New
heads' weights are drawn as PyTorch draws them, as those of EMANet's fc0 to
fc2 are.
"""
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import network
import settings

HEADS = ('ema', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psa', 'nonlocal')
# Table 1 of the paper, ResNet-101 at output stride 8, 513 x 513: what is set
# for a row; MACs (G), "memory" (M) and parameters (M), from the second row on
# as increments over the first.
ROWS = {'ResNet': ({'HEAD': 'fcn'}, (190.6, 2603, 42.6)),
        'DeepLabV3': ({'HEAD': 'deeplabv3'}, (63.4, 66.0, 15.5)),
        'DeepLabV3+': ({'HEAD': 'deeplabv3plus'}, (84.1, 99.3, 16.3)),
        'PSANet': ({'HEAD': 'psa'}, (56.3, 59.4, 18.5)),
        'EMANet 256': ({'HEAD': 'ema', 'EM_CHANNELS': 256},
                       (21.1, 12.3, 4.87)),
        'EMANet 512': ({'HEAD': 'ema', 'EM_CHANNELS': 512},
                       (43.1, 22.1, 10.0)),
        'non-local': ({'HEAD': 'nonlocal', 'EM_CHANNELS': 512},
                      (None, None, None))}


# ------------------------------------------------- heads
class Segmenter(nn.Module):
    """A head on the backbone's features: image to logits."""

    def __init__(self, extractor, head):
        super().__init__()
        self.extractor, self.fc = extractor, head

    def forward(self, image):
        """Return logits (b, n_classes, H, W) of image (b, 3, H, W)."""
        x = self.fc(self.extractor(image))              # (b, n_classes, h, w)
        return network.upsample(x, image.shape[-2:])    # (b, n_classes, H, W)


def classifier(c, n_classes, dropout):
    """Return a 1x1 classifier of c channels; dropout: of whole channels
    before it. On the backbone alone it is the ResNet row of Table 1 (an FCN,
    Long et al., CVPR 2015, at the backbone's stride)."""
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(c, n_classes, 1))


def aspp(c, stride):
    """Return atrous spatial pyramid pooling, (b, c, h, w) to (b, 256, h, w):
    a 1x1, three dilated 3x3, the image's mean, and a 1x1 over all of them.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image
    Segmentation" (DeepLabV3, arXiv 1706.05587), section 3.3, by torchvision:
    rates 6, 12, 18 at output stride 16, twice that at 8, half of it at 32.
    Differs: torchvision drops half of its elements; here `classifier` drops,
    as DROPOUT says, and torchvision's further 3x3 is not in the paper.
    """
    # takes a second to import, which only the DeepLabs shall wait for
    from torchvision.models.segmentation.deeplabv3 import ASPP
    module = ASPP(c, [96 // stride * i for i in (1, 2, 3)])
    module.project[3] = nn.Identity()
    return module


class DeepLabV3Plus(nn.Module):
    """DeepLabV3's pyramid, refined beside features of stride 4.

    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution"
    (arXiv 1802.02611), section 3.1 and Table 2: 48 channels of layer1, two
    3x3 of 256. Differs: plain convolutions, not separable ones, which the
    paper has for its Xception backbone; corners are aligned, as everywhere
    here.
    """

    def __init__(self, extractor, n_classes, stride, dropout):
        super().__init__()
        self.extractor = extractor
        self.aspp = aspp(extractor.channels, stride)
        c = extractor[5][0].conv1.in_channels           # of layer1
        self.low = network.ConvBNReLU(c, 48, 1)
        self.decoder = nn.Sequential(network.ConvBNReLU(256 + 48, 256),
                                     network.ConvBNReLU(256, 256))
        self.fc = classifier(256, n_classes, dropout)

    def forward(self, image):
        """Return logits (b, n_classes, H, W) of image (b, 3, H, W)."""
        low, x = self.extractor(image, low=True)
        low = self.low(low)                         # (b, 48, H / 4, W / 4)
        x = network.upsample(self.aspp(x), low.shape[-2:]).to(low.dtype)
        x = self.fc(self.decoder(torch.cat([x, low], 1)))
        return network.upsample(x, image.shape[-2:])    # (b, n_classes, H, W)


class PSA(nn.Module):
    """Point-wise spatial attention: to the features (b, c, h, w), what each
    position collects from all others and what all distribute to it.

    The weight between two positions is said by one of them, for each offset
    to the other. On the grid halved to s x s it has (2s - 1)^2 masks; side
    is s, (grid - 1) // 2 + 1 of a training crop. A smaller grid uses the
    middle of the masks; a larger one is resized to s.
    Source: Zhao et al., "PSANet: Point-wise Spatial Attention Network for
    Scene Parsing" (ECCV 2018), section 3.
    Differs: weights are a softmax over what is summed, as in its authors'
    PyTorch code, not 1 / n; the result is added to the features, not
    concatenated, as Table 1's 18.5M parameters demand; no auxiliary loss.
    """

    def __init__(self, c, side):
        super().__init__()
        self.collect = Pointwise(c, side, distribute=False)
        self.distribute = Pointwise(c, side, distribute=True)
        self.project = network.ConvBNReLU(2 * 512, c, 1)

    def forward(self, x):                                       # (b, c, h, w)
        y = torch.cat([self.collect(x), self.distribute(x)], 1)
        y = self.project(y.to(x.dtype))                         # (b, c, s, s)
        return x + network.upsample(y, x.shape[-2:]).to(x.dtype)


class Pointwise(nn.Module):
    """One branch of PSA, (b, c, h, w) to (b, 512, h', w') on the halved
    grid. distribute: a mask says what its position gives to others, not what
    it takes from them."""

    def __init__(self, c, side, distribute):
        super().__init__()
        self.side, self.distribute = side, distribute
        self.reduce = network.ConvBNReLU(c, 512, 1)
        self.mask = nn.Sequential(
            network.ConvBNReLU(512, 512, 1),
            nn.Conv2d(512, (2 * side - 1) ** 2, 1, bias=False))

    def forward(self, x):
        grid = [min((size - 1) // 2 + 1, self.side) for size in x.shape[-2:]]
        x = network.upsample(self.reduce(x), grid)      # (b, 512, h', w')
        return self.aggregate(self.mask(x), x)

    def aggregate(self, mask, x):
        """Return for each position i the sum over all j of x[j], weighted by
        the softmax over j of mask[j - i, at i], or, to distribute, of
        mask[i - j, at j]; mask is (b, (2s - 1)^2, h', w')."""
        down, right = (at - at[:, None] + self.side - 1 for at in (
            torch.arange(size, device=x.device) for size in x.shape[-2:]))
        at = (2 * self.side - 1) * down[:, None, :, None] + right[:, None, :]
        n = len(down) * len(right)                  # at: (h', w', h', w')
        weight = network.wide(mask).flatten(2).transpose(1, 2).gather(
            2, at.reshape(1, n, n).expand(len(x), -1, -1))      # (b, n, n)
        if self.distribute:
            weight = weight.transpose(1, 2)
        weight = weight.softmax(2).transpose(1, 2)      # (b, n of j, n of i)
        return torch.bmm(x.flatten(2), weight).view(x.shape)


class NonLocal(nn.Module):
    """Dot-product self-attention, (b, c, h, w) to the same: what the EMA unit
    puts a few bases in place of.

    Source: Wang et al., "Non-local Neural Networks" (CVPR 2018), the embedded
    Gaussian with c / 2 channels, batch norm that begins at 0 behind it, added
    to its input. Its (n, n) map is held or not as torch's kernel likes.
    """

    def __init__(self, c):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Conv2d(c, c // 2, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(c // 2, c, 1, bias=False),
                                 nn.BatchNorm2d(c))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x):
        q, k, v = (conv(x).flatten(2).transpose(1, 2)[:, None]  # (b, 1, n, c)
                   for conv in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.out(y[:, 0].transpose(1, 2).unflatten(
            2, x.shape[-2:]))


# ------------------------------------------------- by the settings
def check_settings():
    """Raise ValueError for what the network cannot be trained with."""
    s = settings
    if s.HEAD.startswith('deeplab') and s.BATCH_SIZE < 2 * s.ACCUM:
        raise ValueError(f'HEAD={s.HEAD} with BATCH_SIZE={s.BATCH_SIZE} and '
                         f'ACCUM={s.ACCUM}: batch norm over the means of '
                         f'whole images needs at least 2 images at a time')


def build_network():
    """Return the network that the settings describe, weights as drawn.

    Raises ValueError for a setting that no network has.
    """
    s = settings
    if s.N_CLASSES < 2:
        raise ValueError(f'N_CLASSES={s.N_CLASSES}: a network tells at least '
                         f'2 classes apart, background included')
    if s.HEAD == 'ema':
        return network.EMANet(
            s.N_CLASSES, s.N_LAYERS, s.STRIDE, s.STEM, s.EM_CHANNELS,
            s.EM_BASES, s.STAGE_NUM, s.STAGE_NUM_EVAL, s.EM_KEEP, s.EM_NORM,
            s.EM_GRAD, s.EM_MOM, s.DROPOUT, s.BN_MOM)
    if s.HEAD not in HEADS:
        raise ValueError(f'HEAD={s.HEAD}: there are {", ".join(HEADS)}')
    if s.HEAD == 'nonlocal':
        net = network.EMANet(s.N_CLASSES, s.N_LAYERS, s.STRIDE, s.STEM,
                             s.EM_CHANNELS, dropout=s.DROPOUT)
        net.emau = NonLocal(s.EM_CHANNELS)
    else:
        net = _baseline(network.ResNet(s.N_LAYERS, s.STRIDE, s.STEM))
    network.set_bn_momentum(net, s.BN_MOM)
    return net


def _baseline(extractor):
    """Return the network of HEAD on a backbone."""
    s, c = settings, extractor.channels
    if s.HEAD == 'deeplabv3plus':
        return DeepLabV3Plus(extractor, s.N_CLASSES, s.STRIDE, s.DROPOUT)
    if s.HEAD == 'deeplabv3':
        return Segmenter(extractor, nn.Sequential(
            aspp(c, s.STRIDE), *classifier(256, s.N_CLASSES, s.DROPOUT)))
    if s.HEAD == 'psa':
        side = (s.CROP_SIZE - 1) // s.STRIDE // 2 + 1
        return Segmenter(extractor, nn.Sequential(
            PSA(c, side), network.ConvBNReLU(c, 512),
            *classifier(512, s.N_CLASSES, s.DROPOUT)))
    return Segmenter(extractor, classifier(c, s.N_CLASSES, s.DROPOUT))


def recognise(state):
    """Return the settings that an EMANet's weights show, as {name: value}.

    For published checkpoints, which record none; {} for other networks. The
    output stride leaves no trace in the weights.
    """
    if not {'emau.mu', 'fc2.weight'} <= set(state):
        return {}
    counts = tuple(sum(key.startswith(f'extractor.{i}.')
                       and key.endswith('.conv1.weight') for key in state)
                   for i in (4, 5, 6, 7))
    deep = 'extractor.4.0.conv3.weight' in state
    layers = [n for n, blocks in network.BLOCKS.items()
              if blocks == counts and (n >= 50) == deep]
    _, c, k = state['emau.mu'].shape
    found = {'HEAD': 'ema', 'EM_CHANNELS': c, 'EM_BASES': k,
             'N_CLASSES': state['fc2.weight'].shape[0],
             'STEM': 'deep' if 'extractor.0.0.weight' in state else 'plain'}
    return {**found, 'N_LAYERS': layers[0]} if layers else found


# ------------------------------------------------- cost, counted
class PutOut(TorchDispatchMode):
    """Count the numbers that operators put out, views aside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(
                x.numel() for x in (out if isinstance(out, tuple) else [out])
                if isinstance(x, torch.Tensor) and x.is_floating_point())
        return out


def complexity(net, size=(513, 513)):
    """Count what one image of size (H, W) pixels costs.

    Returns dict(macs, activations, params): multiply-accumulates of
    convolutions and matrix products by torch's counter; numbers that
    operators put out, in place or not; numbers in all parameters. The
    network may be on the meta device, where nothing is allocated.
    """
    parameters = list(net.parameters())
    image = torch.zeros(1, 3, *size, device=parameters[0].device)
    net.eval()
    with (torch.no_grad(), sdpa_kernel(SDPBackend.MATH), PutOut() as put_out,
          FlopCounterMode(display=False) as counter):
        net(image)
    return {'macs': counter.get_total_flops() // 2,
            'activations': put_out.count,
            'params': sum(p.numel() for p in parameters)}


def as_counted(net):
    """Leave of a network what Table 1 counts, by what reproduces its cells:
    of EMANet the reduction, the unit with its bases, and a classifier on
    them; of DeepLabV3+'s decoder one 3x3; of PSA no sums over positions."""
    if isinstance(net, network.EMANet):
        net.fc2 = nn.Conv2d(net.fc0.conv.out_channels, settings.N_CLASSES, 1)
        net.fc1 = nn.Identity()
        if settings.HEAD == 'ema':
            net.emau.mu = nn.Parameter(net.emau.mu)
    if isinstance(net, DeepLabV3Plus):
        net.decoder = net.decoder[0]
    for part in net.modules():
        if isinstance(part, Pointwise):
            part.aggregate = lambda mask, x: x
    return net


def memory_as_counted(net, n):
    """Return Table 1's "memory" on a grid of n, in millions, by the count
    that gives the row's cell: each has its own. None: none known does."""
    if settings.HEAD == 'ema':          # numbers put out, some left out
        _, c, k = net.emau.mu.shape
        stages = net.emau.stages[1]
        return ((9 * c + 3 * stages * k + settings.N_CLASSES) * n
                + stages * c * k) / 1e6
    if settings.HEAD == 'deeplabv3':    # MiB of the pyramid's 16 maps
        return 16 * 256 * n * 4 / 2 ** 20
    return None


def costs():
    """Yield (row, Table 1's cells, ours by its count, ours as the network
    is) of each row; cells: MACs (G), activations (M), parameters (M)."""
    s, features = settings, []
    size = s.CROP_SIZE, s.CROP_SIZE
    n = ((s.CROP_SIZE - 1) // s.STRIDE + 1) ** 2
    for row, (changes, paper) in ROWS.items():
        vars(s).update(changes)
        with torch.device('meta'):
            net = build_network()
            backbone = net.extractor
            del net.extractor           # the head alone, on its features
            net.extractor = lambda image, low=False: (
                features if low else features[1])
            if not features:
                counted = complexity(backbone, size)
                features += backbone(torch.zeros(1, 3, *size), low=True)
                whole = {key: value + counted[key] for key, value
                         in complexity(net, size).items()}
            else:
                whole = complexity(net, size)
                counted = complexity(as_counted(net), size)
        whole, counted = ([cost['macs'] / 1e9, cost['activations'] / 1e6,
                           cost['params'] / 1e6] for cost in (whole, counted))
        counted[1] = memory_as_counted(net, n)
        yield row, paper, counted, whole


def print_costs():
    """Print what the heads cost beside Table 1."""
    s = settings
    print(f'ResNet-{s.N_LAYERS}, {s.STEM} stem, output stride {s.STRIDE}, '
          f'{s.CROP_SIZE} x {s.CROP_SIZE} pixels; below: what a head\nadds. '
          f'MACs in G, activations (act.) and parameters in M. Table 1 is of\n'
          f'ResNet-101, output stride 8, 513 x 513 pixels.\n')
    titles = 'Table 1', 'as Table 1 counts', 'as the network is'
    print(' ' * 11 + ''.join(f'{title:>22}' for title in titles))
    print(' ' * 11 + f'{"MACs":>8}{"act.":>7}{"params":>7}' * 3)
    for row, *groups in costs():
        print(f'{row:11}' + ''.join(
            f'{"-" if value is None else format(value, form):>{width}}'
            for group, forms in zip(groups, (
                ('.1f', '.1f', '#.3g'), *[('.2f', '.1f', '.3f')] * 2))
            for value, form, width in zip(group, forms, (8, 7, 7))))


# ------------------------------------------------- cost, measured
def peak_memory(device):
    """Return the greatest memory so far, GiB: of tensors on a GPU, since
    this was last asked for; else of the whole process."""
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2 ** 30
    import resource                                 # not on every system
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def in_bfloat16():
    """Say whether training runs in bfloat16, as AMP has it in train.py."""
    return settings.AMP == 'bf16' or (
        settings.AMP == 'auto' and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False))


def measure_one():
    """Print time (the best of three, once warm) and peak memory of the
    settings' network: inference of an image, a step of BATCH_SIZE."""
    s, half = settings, in_bfloat16()
    check_settings()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    layout = (torch.channels_last if half or device.type == 'cuda'
              else torch.contiguous_format)         # as train.py has it
    net = build_network().to(device, memory_format=layout)
    net.extractor.recompute = s.RECOMPUTE
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], s.LR, s.LR_MOM)
    image = torch.randn(s.BATCH_SIZE, 3, s.CROP_SIZE, s.CROP_SIZE).to(device)
    label = torch.zeros(image[:, 0].shape, dtype=torch.long, device=device)

    def infer():
        with torch.no_grad():
            net.eval()(image[:1])

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = net.train()(image)
        F.cross_entropy(network.wide(logits), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    for act in infer, step:
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            act()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        print(f'{min(seconds[1:]):11.3f}{peak_memory(device):11.3f}', end='')
    print()


def measure(words):
    """Measure every row, each in a process of its own."""
    s, gpu = settings, torch.cuda.is_available()
    where = (f'{torch.cuda.get_device_name()}, peak of the tensors' if gpu else
             f'{torch.get_num_threads()} CPU threads, peak of the process')
    print(f'ResNet-{s.N_LAYERS}, {s.STEM} stem, output stride {s.STRIDE}, '
          f'{s.CROP_SIZE} x {s.CROP_SIZE} pixels: inference of 1\nin float32, '
          f'a training step of {s.BATCH_SIZE} in '
          f'{"bfloat16" if in_bfloat16() else "float32"}.\ntorch '
          f'{torch.__version__}, {where}\n')
    print(' ' * 11 + f'{"inference s":>11}{"peak GiB":>11}'
          f'{"training s":>11}{"peak GiB":>11}')
    for row, (changes, _) in ROWS.items():
        print(f'{row:11}', end='', flush=True)
        status = subprocess.run([
            sys.executable, sys.argv[0], '--measure-one', *words,
            *(f'{name}={value}' for name, value in changes.items())]
        ).returncode
        if status:
            raise RuntimeError(f'{row}: measuring ended with status {status};'
                               f' a smaller CROP_SIZE or BATCH_SIZE needs '
                               f'less memory')


def main():
    option, *words = sys.argv[1:] or ['']
    if option not in ('--measure', '--measure-one'):
        option, words = '', sys.argv[1:]
    settings.take(words)
    if option == '--measure-one':
        measure_one()
    elif option:
        measure(words)
    else:
        print_costs()


if __name__ == '__main__':
    import utils
    utils.launch(main)
