"""EMANet: the dilated ResNet and the Expectation-Maximization Attention unit.

Li et al., "Expectation-Maximization Attention Networks for Semantic
Segmentation", ICCV 2019 (arXiv 1907.13426). This file imports nothing of
ours, so it can be copied into another project as it is. `python network.py`
prints the shapes at every stage and the known backbone weights.

Shapes: b images, c channels, h x w feature grid, n = h * w, k bases, H x W
pixels.
"""
import contextlib
import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
          101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STEMS = ('deep', 'plain')
KEEPS = ('moving_avg', 'learned', 'fixed')
NORMS = ('l2', 'layer', 'none')

# Known backbone weights, name: (where, hash). The first three are those of
# the 2019 recipe (the authors' own link is dead, this is a mirror); the
# gluon ones are of the same architecture; the others have the plain stem.
_MIRROR = 'https://github.com/LikeLy-Journey/SegmenTron/releases/download/' \
          'v0.1.0/'
_GLUON = 'https://github.com/rwightman/pytorch-pretrained-gluonresnet/' \
         'releases/download/v0.1/'
_TORCH = 'https://download.pytorch.org/models/'
KNOWN = {
    'resnet50-25c4b509': (
        _MIRROR, 'sha1:25c4b50959ef024fcc050213a06b614899f94b3d'),
    'resnet101-2a57e44d': (
        _MIRROR, 'sha1:2a57e44de9c853fa015b172309a1ee7e2d0e4e2a'),
    'resnet152-0d43d698': (
        _MIRROR, 'sha1:0d43d698c66aceaa2bc0309f55efdd7ff4b143af'),
    'gluon_resnet50_v1s-1762acc0': (_GLUON, 'sha256:1762acc0'),
    'gluon_resnet101_v1s-60fe0cc1': (_GLUON, 'sha256:60fe0cc1'),
    'gluon_resnet152_v1s-dcc41b81': (_GLUON, 'sha256:dcc41b81'),
    'resnet18-f37072fd': (_TORCH, 'sha256:f37072fd'),
    'resnet34-b627a593': (_TORCH, 'sha256:b627a593'),
    'resnet50-0676ba61': (_TORCH, 'sha256:0676ba61'),
    'resnet50-11ad3fa6': (_TORCH, 'sha256:11ad3fa6'),
    'resnet101-63fe2227': (_TORCH, 'sha256:63fe2227'),
    'resnet101-cd907fc2': (_TORCH, 'sha256:cd907fc2'),
    'resnet152-394f9c45': (_TORCH, 'sha256:394f9c45'),
    'resnet152-f82ba261': (_TORCH, 'sha256:f82ba261'),
}
# The one that (stem, number of layers) asks for where none is named.
USUAL = {('deep', 50): 'resnet50-25c4b509',
         ('deep', 101): 'resnet101-2a57e44d',
         ('deep', 152): 'resnet152-0d43d698',
         ('plain', 18): 'resnet18-f37072fd',
         ('plain', 34): 'resnet34-b627a593',
         ('plain', 50): 'resnet50-0676ba61',
         ('plain', 101): 'resnet101-63fe2227',
         ('plain', 152): 'resnet152-394f9c45'}


def _one_of(name, value, choices):
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        listed = ', '.join(str(choice) for choice in choices)
        raise ValueError(f'{name}={value}: it can be {listed}')


def wide(x):
    """Return x in float32, or as it is where it is wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def upsample(x, size):
    """Resize (b, c, h, w) to size (H, W), bilinear, corners aligned.

    Without gradients, and where a row becomes a whole number of rows, as on
    the k * stride + 1 grid, the heights are a blend of neighbouring rows: the
    same numbers to rounding, in a third of the time on a CPU. (The loss would
    have to copy what that gives. An exported network's sizes are not known.)
    """
    x = wide(x).contiguous()
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        return F.interpolate(x, size, mode='bilinear', align_corners=True)
    times, rest = divmod(size[0] - 1, max(1, x.shape[2] - 1))
    if rest or not times or x.shape[2] == 1:
        return F.interpolate(x, size, mode='bilinear', align_corners=True)
    x = F.interpolate(x, (x.shape[2], size[1]), mode='bilinear',
                      align_corners=True)                       # (b, c, h, W)
    below = torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)           # (b, c, h, W)
    share = torch.arange(times, dtype=x.dtype, device=x.device) / times
    x = torch.lerp(x[:, :, :, None], below[:, :, :, None], share[:, None])
    return x.flatten(2, 3)[:, :, :size[0]]                      # (b, c, H, W)


# ------------------------------------------------- backbone
def conv3x3(c_in, c_out, stride=1, dilation=1):
    """Return a 3x3 convolution that keeps the size but for its stride."""
    return nn.Conv2d(c_in, c_out, 3, stride, dilation, dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18, 34); the first carries the stride."""

    expansion = 1

    def __init__(self, c_in, c, stride, first, dilation):
        super().__init__()
        self.conv1 = conv3x3(c_in, c, stride, first)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = conv3x3(c, c, 1, dilation)
        self.bn2 = nn.BatchNorm2d(c)
        self.downsample = _shortcut(c_in, c, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (ResNet-50 and up); the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, c_in, c, stride, first, dilation):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = conv3x3(c, c, stride, first)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.downsample = _shortcut(c_in, 4 * c, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def _shortcut(c_in, c_out, stride):
    """Return what brings a block's input to its output's shape."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                         nn.BatchNorm2d(c_out))


class ResNet(nn.Sequential):
    """The dilated ResNet: image (b, 3, H, W) to features (b, c, h, w).

    n_layers: 18, 34, 50, 101, 152. stride: H / h, of 8, 16, 32; where a
    layer's stride is taken out, what follows is dilated instead, and the
    three blocks of layer4 by 1, 2, 4 times as much (multi-grid). stem: 'deep'
    (3x3 convolutions 64, 64, 128) or 'plain' (7x7, 64). self.channels is c.
    recompute (an attribute): keep of each block its input alone, and compute
    it again in the backward pass, for less memory.
    Source: the backbone of the 2019 code, key for key. Differs: 18 and 34
    layers, and the plain stem, are ours.
    """

    def __init__(self, n_layers, stride=8, stem='deep'):
        _one_of('N_LAYERS', n_layers, BLOCKS)
        _one_of('STRIDE', stride, (8, 16, 32))
        _one_of('STEM', stem, STEMS)
        block = BasicBlock if n_layers < 50 else Bottleneck
        conv, c = (_deep_stem(), 128) if stem == 'deep' else (
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), 64)
        layers, now = [], 4                     # the stride up to here
        dilation = 1
        for i, count in enumerate(BLOCKS[n_layers]):
            step = 1 if i == 0 else 2
            first = dilation
            if now * step > stride:
                dilation, step = dilation * step, 1
            now *= step
            grid = [dilation] * count
            if i == 3 and dilation > 1:         # multi-grid
                grid = [dilation, 2 * dilation, 4 * dilation][:count]
            layers.append(_layer(block, c, 64 << i, step, first, grid))
            c = (64 << i) * block.expansion
        super().__init__(conv, nn.BatchNorm2d(layers[0][0].conv1.in_channels),
                         nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), *layers)
        self.channels, self.recompute = c, False
        _draw(self)

    def forward(self, image, low=False):
        """Return features (b, c, h, w) of image (b, 3, H, W); with low, those
        of layer1, (b, c', H / 4, W / 4), and them."""
        again = self.recompute and torch.is_grad_enabled()
        x, early = image, None
        for i, part in enumerate(self):
            if again and i > 3:
                for block in part:
                    x = checkpoint(
                        block, x, use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=lambda block=block: (
                            contextlib.nullcontext(), _statistics_held(block)))
            else:
                x = part(x)
            if low and i == 4:
                early = x
        return (early, x) if low else x


@contextlib.contextmanager
def _statistics_held(block):
    """Let copies of batch norm's running statistics move meanwhile: a block
    that is computed again would move them twice."""
    held = [(m, name, value) for m in block.modules()
            for name, value in m.named_buffers(recurse=False)]
    for m, name, value in held:
        setattr(m, name, value.clone())
    try:
        yield
    finally:
        for m, name, value in held:
            setattr(m, name, value)


def _deep_stem():
    return nn.Sequential(
        conv3x3(3, 64, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        conv3x3(64, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        conv3x3(64, 128))


def _layer(block, c_in, c, stride, first, grid):
    """Return one layer's blocks; grid: their dilations. The convolution that
    has, or had, the stride keeps the dilation from before it, `first`."""
    blocks = [block(c_in, c, stride, first, grid[0])]
    for dilation in grid[1:]:
        blocks.append(block(c * block.expansion, c, 1, dilation, dilation))
    return nn.Sequential(*blocks)


def _draw(module):
    """Draw convolution weights from N(0, sqrt(2 / (kh * kw * c_out)))."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
            nn.init.normal_(m.weight, 0, math.sqrt(2 / fan))


# ------------------------------------------------- EMA unit
class EMAU(nn.Module):
    """The Expectation-Maximization Attention unit.

    c: channels. k: bases. stage_num: T, iterations; stage_num_eval: T in
    evaluation, 0 for the same. keep: how the bases mu (1, c, k) are kept,
    by 'moving_avg' of each batch's (a buffer, moved in training only),
    'learned' (a parameter) or 'fixed' (as drawn). norm: of each basis after
    the M step, 'l2', 'layer' (layer norm without parameters), 'none'. grad:
    differentiate the last iteration, E and M. Where the bases are learned
    all iterations are differentiated. momentum: share of the bases kept.
    accum (an attribute): how many forward passes make a step; all of them
    start from the same bases, which then move once, by the mean over all and
    over all processes. figures (an attribute): what the unit did in training,
    {name: number on the device}, see watch and move.

    As released, EM is outside the gradient, so none reaches conv1: it stays
    as it was drawn, which the authors confirm, and is frozen openly.

    Differs: the paper back-propagates through the iterations; the 2019 code,
    which made the published weights, does not (grad=False). The moving
    average is taken here, not in the training loop.
    """

    def __init__(self, c, k, stage_num=3, stage_num_eval=0,
                 keep='moving_avg', norm='l2', grad=False, momentum=0.9):
        super().__init__()
        _one_of('EM_KEEP', keep, KEEPS)
        _one_of('EM_NORM', norm, NORMS)
        if stage_num < 1 or stage_num_eval < 0:
            raise ValueError(f'STAGE_NUM={stage_num}, STAGE_NUM_EVAL='
                             f'{stage_num_eval}: at least 1 and 0')
        self.stages = stage_num, stage_num_eval or stage_num
        self.keep, self.norm, self.grad = keep, norm, grad
        self.momentum, self.accum, self.seen = momentum, 1, []
        self.figures = {}
        mu = torch.randn(1, c, k) * math.sqrt(2 / k)            # (1, c, k)
        mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        if keep == 'learned':
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer('mu', mu)
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False),
                                   nn.BatchNorm2d(c))
        _draw(self)
        self.conv1.requires_grad_(grad or keep == 'learned')

    def forward(self, x):
        """Return x (b, c, h, w) plus its reconstruction from the bases."""
        y = self.conv1(x)                                       # (b, c, h, w)
        with _no_autocast(y):
            flat = wide(y).flatten(2)                           # (b, c, n)
            start = self.mu.to(flat.dtype).expand(len(x), -1, -1)
            for z, mu in self.em(flat, start):
                pass
            y = torch.bmm(mu, z.transpose(1, 2))                # (b, c, n)
        y = F.relu(y.view(x.shape).to(x.dtype))                 # (b, c, h, w)
        if self.training:
            self.watch(z)
            if self.keep == 'moving_avg':
                self.move(mu)
        return F.relu(x + self.conv2(y))

    def em(self, x, mu):
        """Yield (z, mu) of each iteration: responsibilities (b, n, k), which
        sum to 1 over k, and bases (b, c, k).

        x: (b, c, n); mu: (b, c, k), the bases to start from. The E step (A_E)
        and the M step (A_M) of the paper.
        """
        stages = self.stages[0] if self.training else self.stages[1]
        for stage in range(stages):
            wanted = self.keep == 'learned' or (
                self.grad and stage == stages - 1)
            with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
                z = torch.bmm(x.transpose(1, 2), mu).softmax(2)  # (b, n, k)
                share = z / (1e-6 + z.sum(1, keepdim=True))      # (b, n, k)
                mu = self.normalise(torch.bmm(x, share))         # (b, c, k)
            yield z, mu

    def normalise(self, mu):
        """Return the bases (b, c, k), each normalised over its c channels."""
        if self.norm == 'l2':
            return mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        if self.norm == 'layer':
            return F.layer_norm(mu.transpose(1, 2),
                                mu.shape[1:2]).transpose(1, 2)
        return mu

    @torch.no_grad()
    def watch(self, z):
        """Note two entropies of z (b, n, k), as shares of the greatest, log k,
        means over this pass's images: of an image's use of the bases (1: all
        alike, 0: one alone) and of a position's (0: each has one base)."""
        most = math.log(max(2, z.shape[2]))
        for name, share in (('use', z.mean(1)), ('position', z)):
            entropy = torch.special.entr(share).sum(-1).mean()
            self.figures[f'entropy_of_{name}'] = entropy / most

    @torch.no_grad()
    def move(self, mu):
        """Move the kept bases towards the mean of mu (b, c, k) over the
        step's whole batch; note by what share of its length a basis moved,
        the mean over bases.

        They are not normalised again, as in the 2019 code.
        """
        self.seen.append(mu.mean(0, keepdim=True).to(self.mu.dtype))
        if len(self.seen) < self.accum:
            return
        mean = torch.stack(self.seen).mean(0)                   # (1, c, k)
        self.seen.clear()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        way = (1 - self.momentum) * (mean - self.mu).norm(dim=1)   # (1, k)
        self.figures['bases_moved'] = (way / self.mu.norm(dim=1)).mean()
        self.mu.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)


def ema_units(net):
    """Return the EMA units of a net: one, or none where it has another head.
    """
    return [part for part in net.modules() if isinstance(part, EMAU)]


def _no_autocast(x):
    """Return a context without autocast on x's device."""
    device = x.device.type if x.device.type != 'meta' else 'cpu'
    return torch.autocast(device, enabled=False)


# ------------------------------------------------- network
class ConvBNReLU(nn.Module):
    """A convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel=3, dilation=1):
        super().__init__()
        pad = dilation * (kernel // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, 1, pad, dilation,
                              bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def set_bn_momentum(net, momentum):
    """Set the share of the running statistics replaced a step, everywhere."""
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            m.momentum = momentum


class _SumOverProcesses(torch.autograd.Function):
    """torch's all-reduce with its gradient, which is an all-reduce too. (The
    one in torch.distributed.nn.functional is about to go.)"""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _SumOverProcesses.forward(ctx, grad)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, which are of one size.

    For the CPU, where torch's SyncBatchNorm refuses; differentiable.
    """

    def forward(self, x):                                       # (b, c, h, w)
        if not self.training:
            return super().forward(x)
        y = wide(x)
        count = y.numel() // y.shape[1] * dist.get_world_size()
        total = _SumOverProcesses.apply
        mean = total(y.sum((0, 2, 3))) / count                  # (c,)
        y = y - mean[:, None, None]
        var = total(y.square().sum((0, 2, 3))) / count          # (c,)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (y * scale[:, None, None]
                + self.bias[:, None, None]).to(x.dtype)


def sync_batch_norm(net):
    """Return the net with batch statistics taken over all processes; its
    state_dict keeps its keys."""
    if next(net.parameters()).device.type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for m in net.modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = GlobalBatchNorm       # same tensors, other forward
    return net


def fold_batch_norm(net):
    """Return a copy of the net for inference, channels last, with each batch
    norm folded into the convolution that stands before it.

    Equal to the net to rounding.
    """
    net = copy.deepcopy(net).eval().to(memory_format=torch.channels_last)
    name, before = '', None
    for key, part in list(net.named_modules()):
        if isinstance(part, _BatchNorm) and isinstance(before, nn.Conv2d):
            net.set_submodule(name, fuse_conv_bn_eval(before, part))
            net.set_submodule(key, nn.Identity())
        if not list(part.children()):
            name, before = key, part
    return net


class EMANet(nn.Module):
    """Backbone, reduction, EMA unit, classifier: image to logits.

    What is not given is the paper's. c, k, stage_num, stage_num_eval, keep,
    norm, grad, em_mom: see EMAU. bn_mom: share replaced, PyTorch's sense.
    Differs: as the 2019 code has it, a 3x3 convolution stands before the
    classifier, which Table 1 does not count.
    """

    def __init__(self, n_classes, n_layers, stride=8, stem='deep', c=512,
                 k=64, stage_num=3, stage_num_eval=0, keep='moving_avg',
                 norm='l2', grad=False, em_mom=0.9, dropout=0.1,
                 bn_mom=3e-4):
        super().__init__()
        self.extractor = ResNet(n_layers, stride, stem)
        self.fc0 = ConvBNReLU(self.extractor.channels, c)
        self.emau = EMAU(c, k, stage_num, stage_num_eval, keep, norm, grad,
                         em_mom)
        self.fc1 = nn.Sequential(ConvBNReLU(c, 256), nn.Dropout2d(dropout))
        self.fc2 = nn.Conv2d(256, n_classes, 1)
        set_bn_momentum(self, bn_mom)

    def forward(self, image):
        """Return logits (b, n_classes, H, W) of image (b, 3, H, W), float,
        normalised by mean and std."""
        x = self.fc0(self.extractor(image))                     # (b, c, h, w)
        x = self.fc2(self.fc1(self.emau(x)))            # (b, n_classes, h, w)
        return upsample(x, image.shape[-2:])            # (b, n_classes, H, W)


# ------------------------------------------------- loading
def load_backbone(backbone, state, name, partial=False):
    """Copy ImageNet weights into a ResNet; return the keys it still lacks.

    state: {key: tensor} with torchvision's keys (conv1, bn1, layer1 to
    layer4; fc, the ImageNet classifier, is left out). name: the file's, for
    messages. partial: whether keys may be missing. Raises ValueError that
    lists what is missing, unknown or of another shape.
    """
    parts = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2',
             '6': 'layer3', '7': 'layer4'}
    if not isinstance(state, dict):
        raise ValueError(f'{name} is no file of weights: it holds a '
                         f'{type(state).__name__}')
    own = {parts[key[0]] + key[1:]: value
           for key, value in backbone.state_dict().items()}
    given = {key: value for key, value in state.items()
             if key not in ('fc.weight', 'fc.bias')}
    check_keys(own, given, name, partial)
    for key, value in given.items():
        own[key].copy_(value)               # the backbone's own storage
    return _lacking(own, given)


def load_whole(net, state, name):
    """Copy a network's own weights into it; raise ValueError that lists
    what is missing, unknown or of another shape."""
    check_keys(net.state_dict(), state, name)
    net.load_state_dict(state, strict=False)    # BN's counters may be missing


def load_fitting(net, state, name):
    """Copy those of a network's weights that fit another by key and shape,
    the whole backbone among them; return ([keys of the file that are left],
    [keys of the net that stay as drawn]). Raises ValueError."""
    own = net.state_dict()
    check_keys(*({key: value for key, value in each.items()
                  if key.startswith('extractor.')} for each in (own, state)),
               name)
    fits = {key: value for key, value in state.items()
            if key in own and isinstance(value, torch.Tensor)
            and own[key].shape == value.shape}
    net.load_state_dict(fits, strict=False)
    return [key for key in state if key not in fits], _lacking(own, fits)


def check_keys(own, given, name, partial=False):
    """Raise ValueError unless the weights `given` are those that `own` has;
    with partial, some may be missing, but not all."""
    if not all(isinstance(value, torch.Tensor) for value in given.values()):
        raise ValueError(f'{name} is no file of weights: it holds '
                         f'{_listed(list(given))}')
    faults = []
    lacking = _lacking(own, given)
    if lacking and not (partial and own.keys() & given.keys()):
        faults.append(f'lacks {_listed(lacking)}')
    unknown = [key for key in given if key not in own]
    if unknown:
        faults.append(f'has, unknown to the network, {_listed(unknown)}')
    shapes = [f'{key} {tuple(value.shape)} for {tuple(own[key].shape)}'
              for key, value in given.items()
              if key in own and own[key].shape != value.shape]
    if shapes:
        faults.append(f'has other shapes, {_listed(shapes)}')
    if faults:
        raise ValueError(f'{name} does not fit the network: it '
                         f'{"; it ".join(faults)}. Is it for other settings '
                         f'(N_LAYERS, STEM, HEAD)?')


def _lacking(own, given):
    """List own's keys that are not given. BN's batch counters, which older
    files lack and nothing here reads, do not count."""
    return [key for key in own if key not in given
            and not key.endswith('num_batches_tracked')]


def _listed(words, most=12):
    more = len(words) - most
    return ', '.join(words[:most]) + (f' and {more} more' if more > 0 else '')


def main():
    net, x = EMANet(21, 50).eval(), torch.zeros(1, 3, 513, 513)
    print('EMANet(n_classes=21, n_layers=50, stride=8)')
    with torch.no_grad():
        print(f'{"image":12} {tuple(x.shape)}')
        for name, part in [*net.extractor.named_children(),
                           *list(net.named_children())[1:]]:
            x = part(x)
            size = sum(p.numel() for p in part.parameters())
            label = f'extractor.{name}' if name.isdigit() else name
            print(f'{label:12} {tuple(x.shape)!s:20} {size:>10,} parameters')
        print(f'{"logits":12} {tuple(upsample(x, (513, 513)).shape)}')
    print('\nKnown backbone weights, for PRETRAINED:')
    for name, (_, digest) in KNOWN.items():
        print(f'{name:30} {digest}')


if __name__ == '__main__':
    main()
