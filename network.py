"""EMANet: the dilated ResNet and the Expectation-Maximization Attention unit.

Li et al., "Expectation-Maximization Attention Networks for Semantic
Segmentation", ICCV 2019 (arXiv 1907.13426). This file imports nothing of
ours, so it can be copied into another project as it is. `python network.py`
prints the shapes at every stage.

Shapes: b images, c channels, h x w feature grid, n = h * w, k bases, H x W
pixels.
"""
import argparse
import contextlib
import math
import signal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
          101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
KEEPS = ('moving_avg', 'learned', 'fixed')
NORMS = ('l2', 'layer', 'none')


def _check_choice(name, value, choices):
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f'{name}={value}: it can be {[*choices]}')


def to_float32(x):
    """Return x in float32, or as it is where it is wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def upsample(x, size, align_corners=True):
    """Resize (b, c, h, w) to size (H, W), bilinear, in float32: bfloat16 would
    be rougher, and slower on a CPU. Corners are aligned, or cells are patches
    of the image."""
    x = to_float32(x).contiguous()
    if x.is_cuda:
        return upsample_by_products(x, size, align_corners)
    return F.interpolate(x, size, mode='bilinear', align_corners=align_corners)


def upsample_by_products(x, size, align_corners=True):
    """Resize as upsample, by matrix products with the weights of the rows and
    the columns. On a GPU the gradient of interpolate is summed by atomics:
    slowly, and in another order each time."""
    with torch.autocast(x.device.type, enabled=False):
        for length in size:         # the last two sides change places twice
            n = x.shape[2]
            first = 0 if align_corners else (n / length - 1) / 2
            place = torch.linspace(first, n - 1 - first, length,
                                   dtype=torch.float64,
                                   device=x.device).clamp(0, n - 1)
            cells = torch.arange(n, device=x.device)
            weight = 1 - (place - cells[:, None]).abs()     # (n, length)
            x = x.transpose(2, 3) @ weight.clamp(min=0).to(x.dtype)
    return x


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
    """Return the projection shortcut of a block, or the identity."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                         nn.BatchNorm2d(c_out))


class ResNet(nn.Sequential):
    """The dilated ResNet: image (b, 3, H, W) to features (b, c, h, w).

    Args:
        n_layers: 18, 34, 50, 101, 152.
        stride: output stride H / h, of 8, 16, 32. Where a layer's stride is
            taken out, what follows is dilated instead; the three blocks of
            layer4 by 1, 2, 4 times as much (multi-grid).
        stem: 'deep' (3x3 convolutions 64, 64, 128) or 'plain' (7x7, 64).

    Attributes:
        channels: c; low_channels: of layer1's features.
        align_corners: cells lie on the pixels 0, stride, 2 stride, ...
        can_train_alone: batches of one image can be trained on.
        recompute: activation checkpointing, a block at a time: blocks are
            computed again in the backward pass, for less memory.

    Source: the backbone of the 2019 code, key for key. Differs: 18 and 34
    layers, and the plain stem, are ours.
    """

    align_corners = can_train_alone = True

    def __init__(self, n_layers, stride=8, stem='deep'):
        _check_choice('N_LAYERS', n_layers, BLOCKS)
        _check_choice('STRIDE', stride, (8, 16, 32))
        _check_choice('STEM', stem, ('deep', 'plain'))
        block = BasicBlock if n_layers < 50 else Bottleneck
        conv, c = (_deep_stem(), 128) if stem == 'deep' else (
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), 64)
        layers, total_stride, dilation = [], 4, 1
        for i, count in enumerate(BLOCKS[n_layers]):
            layer_stride, first = 1 if i == 0 else 2, dilation
            if total_stride * layer_stride > stride:
                dilation, layer_stride = dilation * layer_stride, 1
            total_stride *= layer_stride
            dilations = [dilation] * count
            if i == 3 and dilation > 1:         # multi-grid
                dilations = [dilation, 2 * dilation, 4 * dilation][:count]
            blocks = []     # the convolution that has the stride, or had it
            for j, d in enumerate(dilations):   # once, is dilated by `first`
                blocks.append(block(c, 64 << i, 1 if j else layer_stride,
                                    d if j else first, d))
                c = (64 << i) * block.expansion
            layers.append(nn.Sequential(*blocks))
        super().__init__(conv, nn.BatchNorm2d(layers[0][0].conv1.in_channels),
                         nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), *layers)
        self.channels, self.low_channels = c, 64 * block.expansion
        self.recompute = False
        _init_weights(self)

    def forward(self, image, low=False):
        """Return features (b, c, h, w) of image (b, 3, H, W); with low,
        (those of layer1, (b, c', H / 4, W / 4), and these)."""
        recompute = self.recompute and torch.is_grad_enabled()
        x, low_features = image, None
        for i, part in enumerate(self):
            if recompute and i > 3:
                for block in part:
                    x = _recompute(block, x)
            else:
                x = part(x)
            if low and i == 4:
                low_features = x
        return (low_features, x) if low else x


def _recompute(block, x):
    """Return block(x), which is computed again in the backward pass."""
    contexts = {} if torch.compiler.is_compiling() else {   # updates once
        'context_fn': lambda: (contextlib.nullcontext(),
                               _preserve_statistics(block))}
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False,
                      **contexts)


@contextlib.contextmanager
def _preserve_statistics(block):
    """Keep batch norm's running statistics as they are: a block that is
    computed again would update them twice."""
    buffers = [(m, dict(m.named_buffers(recurse=False)))
               for m in block.modules()]
    for m, own in buffers:
        m._buffers.update({name: x.clone() for name, x in own.items()})
    try:
        yield
    finally:
        for m, own in buffers:
            m._buffers.update(own)


def _deep_stem():
    return nn.Sequential(
        conv3x3(3, 64, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        conv3x3(64, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        conv3x3(64, 128))


def _init_weights(module):
    """Draw convolution weights with deviation sqrt(2 / (kh * kw * c_out))."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
            nn.init.normal_(m.weight, 0, math.sqrt(2 / fan))


# ------------------------------------------------- EMA unit
class EMAU(nn.Module):
    """The Expectation-Maximization Attention Unit (paper, section 3.2).

    Args:
        c: channels of the input and of the bases.
        k: number of bases.
        stage_num: EM iterations (T) in training.
        stage_num_eval: T in evaluation; 0 for the same.
        keep: how the bases mu (1, c, k) persist between steps: 'moving_avg'
            (a buffer, updated in training only), 'learned' (a parameter; all
            iterations are differentiated) or 'fixed' (random, never updated).
        norm: of each basis after the M step: 'l2', 'layer' (layer norm
            without parameters) or 'none'.
        grad: differentiate the last iteration, E step and M step.
        momentum: share of the bases kept a step (unlike batch norm's, which
            is the share replaced).

    Attributes:
        accum: micro-batches of a step (gradient accumulation). All start
            from the same bases, which are updated once, by the mean over all
            micro-batches and processes.
        metrics: {name: scalar on the device} of the last training pass, see
            record_entropies and update_bases.

    As released, EM runs without gradients, so none reaches conv1: it keeps
    its random initial weights, which the authors confirm, and is frozen here
    by requires_grad.

    Differs: the paper back-propagates through the iterations; the 2019 code,
    which made the published weights, does not (grad=False). The moving
    average is taken here, not in the training loop.
    """

    def __init__(self, c, k, stage_num=3, stage_num_eval=0,
                 keep='moving_avg', norm='l2', grad=False, momentum=0.9):
        super().__init__()
        _check_choice('EM_KEEP', keep, KEEPS)
        _check_choice('EM_NORM', norm, NORMS)
        if stage_num < 1 or stage_num_eval < 0:
            raise ValueError(f'STAGE_NUM={stage_num}, STAGE_NUM_EVAL='
                             f'{stage_num_eval}: at least 1 and 0')
        self.stages = stage_num, stage_num_eval or stage_num
        self.keep, self.norm, self.grad = keep, norm, grad
        self.momentum, self.accum = momentum, 1
        self.pending_means, self.metrics = [], {}
        mu = torch.randn(1, c, k) * math.sqrt(2 / k)            # (1, c, k)
        mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        if keep == 'learned':
            self.mu = nn.Parameter(mu)
        else:
            self.register_buffer('mu', mu)
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False),
                                   nn.BatchNorm2d(c))
        _init_weights(self)
        self.conv1.requires_grad_(grad or keep == 'learned')

    def forward(self, x, stage_num=None):
        """Return x (b, c, h, w) plus its reconstruction from the bases.
        stage_num: see em."""
        y = self.conv1(x)                                       # (b, c, h, w)
        device = 'cpu' if y.is_meta else y.device.type
        with torch.autocast(device, enabled=False):
            flat = to_float32(y).flatten(2)                     # (b, c, n)
            start = self.mu.to(flat.dtype).expand(len(x), -1, -1)
            for z, mu in self.em(flat, start, stage_num):   # noqa: B007
                pass                                # the last are used
            y = torch.bmm(mu, z.transpose(1, 2))                # (b, c, n)
        y = F.relu(y.view(x.shape).to(x.dtype))                 # (b, c, h, w)
        if self.training:
            self.record_entropies(z)
            if self.keep == 'moving_avg':
                self.update_bases(mu)
        return F.relu(x + self.conv2(y))

    def em(self, x, mu, stage_num=None):
        """Yield (z, mu) of each iteration: responsibilities (b, n, k), which
        sum to 1 over k, and bases (b, c, k).

        x: (b, c, n); mu: (b, c, k), the bases to start from; stage_num: T, if
        not the unit's. The E step (A_E) and the M step (A_M) of the paper.
        """
        stages = stage_num or self.stages[0 if self.training else 1]
        for stage in range(stages):
            needs_grad = torch.is_grad_enabled() and (
                self.keep == 'learned' or self.grad and stage == stages - 1)
            with torch.set_grad_enabled(needs_grad):
                z = torch.bmm(x.transpose(1, 2), mu).softmax(2)  # (b, n, k)
                weight = z / (1e-6 + z.sum(1, keepdim=True))     # (b, n, k)
                mu = self.normalise(torch.bmm(x, weight))        # (b, c, k)
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
    def record_entropies(self, z):
        """Record two entropies of z (b, n, k), divided by log k and averaged
        over the batch: of an image's mean responsibilities (1: all bases are
        used alike, 0: one alone) and of a position's (0: hard assignment)."""
        greatest, self.metrics = math.log(max(2, z.shape[2])), {}
        for name, share in (('usage', z.mean(1)), ('position', z)):
            entropy = torch.special.entr(share).sum(-1).mean()
            self.metrics[f'{name}_entropy'] = entropy / greatest

    @torch.no_grad()
    def update_bases(self, mu):
        """Update the bases by the moving average of mu (b, c, k), whose mean
        is over the step's whole batch; record the update's norm relative to
        the bases', averaged over them.

        They are not normalised again, as in the 2019 code.
        """
        self.pending_means.append(mu.mean(0, keepdim=True).to(self.mu.dtype))
        if len(self.pending_means) < self.accum:
            return
        mean = torch.stack(self.pending_means).mean(0)          # (1, c, k)
        self.pending_means.clear()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        moved = (1 - self.momentum) * (mean - self.mu).norm(dim=1)  # (1, k)
        self.metrics['bases_moved'] = (moved / self.mu.norm(dim=1)).mean()
        self.mu.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)


def ema_units(net):
    """Return the EMA units of a net: none where it has another head."""
    return [part for part in net.modules() if isinstance(part, EMAU)]


# ------------------------------------------------- network
class ConvBNReLU(nn.Module):
    """A convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel=3, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, 1, dilation * (kernel // 2),
                              dilation, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def set_bn_momentum(net, momentum):
    """Set the share of the running statistics that a step replaces."""
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            m.momentum = momentum


class EMANet(nn.Module):
    """Backbone, reduction, EMA unit, classifier: image to logits.

    Defaults are the paper's. fc0, fc1 and fc2 are convolutions; their names
    are those of the published weights.

    Args:
        n_classes, dropout: of the classifier; channels are dropped whole.
        n_layers, stride, stem: see ResNet.
        extractor: another backbone, with the face of a ResNet, in its place.
        c, k, stage_num, stage_num_eval, keep, norm, grad, em_mom: see EMAU.
        bn_mom: share of the running statistics replaced (PyTorch's sense).

    Differs: as the 2019 code has it, a 3x3 convolution stands before the
    classifier, which Table 1 does not count.
    """

    def __init__(self, n_classes, n_layers, stride=8, stem='deep', c=512,
                 k=64, stage_num=3, stage_num_eval=0, keep='moving_avg',
                 norm='l2', grad=False, em_mom=0.9, dropout=0.1,
                 bn_mom=3e-4, extractor=None):
        super().__init__()
        self.extractor = extractor or ResNet(n_layers, stride, stem)
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
        return self.classify(self.emau(x), image.shape[-2:])

    def classify(self, x, size):
        """Return logits (b, n_classes, H, W), of size (H, W), of the EMA
        unit's output x (b, c, h, w)."""
        x = self.fc2(self.fc1(x))                       # (b, n_classes, h, w)
        return upsample(x, size, self.extractor.align_corners)


def main():
    argparse.ArgumentParser(
        description=__doc__, usage='python network.py',
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    net, x = EMANet(21, 50).eval(), torch.zeros(1, 3, 513, 513)
    print(f'EMANet(21, 50, stride=8) of an image {tuple(x.shape)}')
    with torch.no_grad():
        for name, part in [*net.extractor.named_children(),
                           *list(net.named_children())[1:]]:
            x = part(x)
            size = sum(p.numel() for p in part.parameters())
            print(f'{"extractor." * name.isdigit() + name:12} '
                  f'{tuple(x.shape)!s:20} {size:>10,} parameters')
        print(f'{"logits":12} {tuple(upsample(x, (513, 513)).shape)}')


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # be quiet in `| head`
    main()
