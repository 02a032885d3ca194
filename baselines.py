"""The networks that one recipe trains: EMANet and what it is compared with.

`build_network()` gives the one that the settings describe. All have the same
face, `logits = net(image)`, and the backbone is `net.extractor`.
`python baselines.py [KEY=VALUE ...]` prints what each costs.

Shapes: b images, c channels, h x w feature grid, n = h * w, H x W pixels. New
heads' weights are drawn as PyTorch draws them, as those of EMANet's fc0 to
fc2 are.
"""
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.deeplabv3 import ASPP

import network
import settings

HEADS = ('ema', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psa', 'nonlocal')


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


def complexity(net, size=(513, 513)):
    """Count what one image of size (H, W) pixels costs.

    Returns dict(macs, activations, params): multiply-accumulates of
    convolutions and matrix products by torch's counter; elements that
    modules without children put out; elements of all parameters. The network
    may be on the meta device, where nothing is allocated.
    """
    put_out = []
    hooks = [m.register_forward_hook(lambda m, x, y: put_out.append(y.numel()))
             for m in net.modules() if not list(m.children())]
    device = next(net.parameters()).device
    net.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, *size, device=device))
    for hook in hooks:
        hook.remove()
    return {'macs': counter.get_total_flops() // 2,
            'activations': sum(put_out),
            'params': sum(p.numel() for p in net.parameters())}


def main():
    settings.take(sys.argv[1:])
    print(f'ResNet-{settings.N_LAYERS}, {settings.STEM} stem, output stride '
          f'{settings.STRIDE}, one image of 513 x 513\n')
    print(f'{"HEAD":14} {"MACs":>10} {"activations":>12} {"parameters":>11}')
    for settings.HEAD in HEADS:
        with torch.device('meta'):
            cost = complexity(build_network())
        print(f'{settings.HEAD:14} {cost["macs"] / 1e9:9.2f}G '
              f'{cost["activations"] / 1e6:11.1f}M '
              f'{cost["params"] / 1e6:10.3f}M')


if __name__ == '__main__':
    import utils
    utils.launch(main)
