"""The networks that one recipe trains: EMANet and the heads it is compared
with, on the same backbone.

    python heads.py [KEY=VALUE ...]

Lists them with parameters and MACs; writes nothing. `build_network()` returns
the one that the settings describe. All have the same face, `logits =
net(image)`, and their backbone is `net.extractor`.

Shapes: b images, c channels, h x w feature grid, n = h * w, H x W pixels. New
heads' weights are drawn as PyTorch draws them, as those of EMANet's fc0 to
fc2 are.
"""
import torch
import torch.nn.functional as F
from torch import nn

import network
import settings
from lib import backbones
from lib.checkpoint import (
    OnnxNetwork,
    check_keys,
    load_strict,
    read_checkpoint,
)
from lib.cost import complexity
from lib.recorded import adopt_network
from utils import UserError, log, make_parser, run_main

HEADS = settings.choices('HEAD')


# ------------------------------------------------- heads
class Segmenter(nn.Module):
    """A head on the backbone's features: image to logits."""

    def __init__(self, extractor, head):
        super().__init__()
        self.extractor, self.fc = extractor, head

    def forward(self, image):
        """Return logits (b, n_classes, H, W) of image (b, 3, H, W)."""
        x = self.fc(self.extractor(image))              # (b, n_classes, h, w)
        return network.upsample(x, image.shape[-2:],    # (b, n_classes, H, W)
                                self.extractor.align_corners)


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
    # takes seconds to import, which only the DeepLabs shall wait for
    from torchvision.models.segmentation.deeplabv3 import ASPP

    module = ASPP(c, [96 // stride * i for i in (1, 2, 3)])
    module.project[3] = nn.Identity()
    return module


class DeepLabV3Plus(nn.Module):
    """DeepLabV3's pyramid, refined beside features of stride 4.

    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution"
    (arXiv 1802.02611), section 3.1 and Table 2: 48 channels of layer1, two
    3x3 of 256. Differs: plain convolutions, not separable ones, which the
    paper has for its Xception backbone; features are upsampled with aligned
    corners, as in EMANet.
    """

    def __init__(self, extractor, n_classes, stride, dropout):
        super().__init__()
        self.extractor = extractor
        self.aspp = aspp(extractor.channels, stride)
        self.low = network.ConvBNReLU(extractor.low_channels, 48, 1)
        self.decoder = nn.Sequential(network.ConvBNReLU(256 + 48, 256),
                                     network.ConvBNReLU(256, 256))
        self.fc = classifier(256, n_classes, dropout)

    def forward(self, image):
        """Return logits (b, n_classes, H, W) of image (b, 3, H, W)."""
        low, x = self.extractor(image, low=True)
        low = self.low(low)                         # (b, 48, H / 4, W / 4)
        align_corners = self.extractor.align_corners
        x = network.upsample(self.aspp(x), low.shape[-2:], align_corners)
        x = self.fc(self.decoder(torch.cat([x.to(low.dtype), low], 1)))
        return network.upsample(x, image.shape[-2:],    # (b, n_classes, H, W)
                                align_corners)


class PSA(nn.Module):
    """Point-wise spatial attention: adds to the features (b, c, h, w) what
    each position collects from all others and what all distribute to it.

    The attention between two positions is predicted by one of them, as a mask
    over the offsets to the other. On the grid halved to s x s that is
    (2s - 1)^2 offsets.

    Args:
        c: channels.
        side: s, (grid - 1) // 2 + 1 of a training crop. A smaller grid uses
            the middle of the masks; a larger one is resized to s.

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
    grid. distribute: a mask holds what its position gives to the others, not
    what it takes from them."""

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
        weight = network.to_float32(mask).flatten(2).transpose(1, 2).gather(
            2, at.reshape(1, n, n).expand(len(x), -1, -1))      # (b, n, n)
        if self.distribute:
            weight = weight.transpose(1, 2)
        weight = weight.softmax(2).transpose(1, 2)      # (b, n of j, n of i)
        return torch.bmm(x.flatten(2), weight).view(x.shape)


class NonLocal(nn.Module):
    """Dot-product self-attention, (b, c, h, w) to the same shape: what the
    EMA unit replaces by a few bases.

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
def build_network():
    """Return the network that the settings describe, weights as drawn. What
    they leave to the backbone is settled (lib/backbones.py)."""
    s = settings
    backbones.complete_settings()
    extractor = (backbones.Encoder(s.BACKBONE, s.STRIDE) if s.BACKBONE else
                 network.ResNet(s.N_LAYERS, s.STRIDE, s.STEM))
    if s.HEAD in ('ema', 'no_ema'):
        net = network.EMANet(
            s.N_CLASSES, s.N_LAYERS, s.STRIDE, s.STEM, s.EM_CHANNELS,
            s.EM_BASES, s.STAGE_NUM, s.STAGE_NUM_EVAL, s.EM_KEEP, s.EM_NORM,
            s.EM_GRAD, s.EM_MOM, s.DROPOUT, extractor=extractor)
        if s.HEAD == 'no_ema':          # drawn too: the others' weights stay
            net.emau = nn.Identity()
        elif s.EM_ZERO_INIT:            # as torchvision's zero_init_residual
            nn.init.zeros_(net.emau.conv2[1].weight)
    elif s.HEAD == 'nonlocal':
        net = network.EMANet(s.N_CLASSES, s.N_LAYERS, s.STRIDE, s.STEM,
                             s.EM_CHANNELS, dropout=s.DROPOUT,
                             extractor=extractor)
        net.emau = NonLocal(s.EM_CHANNELS)
    else:
        net = _build_baseline(extractor)
    network.set_bn_momentum(net, s.BN_MOM)
    return net


def _build_baseline(extractor):
    """Return the network of HEAD on a backbone."""
    s, c = settings, extractor.channels
    if s.HEAD == 'deeplabv3plus':
        if not extractor.low_channels:
            raise UserError(f'HEAD={s.HEAD}: BACKBONE={s.BACKBONE} has no '
                            f'features of stride 4; HEAD=deeplabv3 needs none')
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


# ------------------------------------------------- from a checkpoint
def load_network(path, device):
    """Return (net in evaluation mode, checkpoint) of a file that train.py or
    tools.export wrote, or of a published {'net': ..., 'step': ...}.

    The network's settings and EVAL_CLASSES are taken from it unless the
    command line gave them; what did not come from settings.py is logged. Then
    all settings are checked. Raises UserError.
    """
    for name, value in settings.given().items():
        log(f'{name} = {value!r} (command line)')
    if path.endswith('.onnx'):
        return _load_onnx(path)
    checkpoint = read_checkpoint(path)
    recorded = checkpoint.get('settings')
    if recorded is None:
        recorded = detect_settings(checkpoint['net'])
    if isinstance(recorded, dict) and 'N_LAYERS' in recorded:
        recorded = {'BACKBONE': '', **recorded}     # older ones had none
    adopt_network(recorded, checkpoint, path)
    if settings.BACKBONE:       # which may be of any size: before it is built
        with torch.device('meta'):
            check_keys(build_network().state_dict(), checkpoint['net'], path)
    net = build_network()
    load_strict(net, checkpoint['net'], path)
    return net.to(device).eval(), checkpoint


def _load_onnx(path):
    """Return (net, checkpoint) of an exported network. Raises UserError where
    the command line asks for other settings than are in it."""
    net = OnnxNetwork(path)
    if not net.recorded:
        raise UserError(f'{path} was not written by tools.export: it does not '
                        f'record its settings')
    adopt_network(net.recorded['settings'], net.recorded, path)
    for name, value in settings.network_settings().items():
        recorded = net.recorded['settings'].get(name, value)
        if value != recorded:
            raise UserError(f'{name}={value}: {path} was exported with '
                            f'{recorded}; export it anew')
    asked = settings.given().get('INFERENCE', 'plain')
    if asked != 'plain' or settings.INFERENCE == 'bf16':
        raise UserError(f'INFERENCE={settings.INFERENCE}: {path} is run as '
                        f'it is; INFERENCE=plain')
    settings.INFERENCE = 'plain'
    return net.eval(), {'net': {}, **net.recorded}


def detect_settings(state):
    """Return the settings that an EMANet's weights show, as {name: value}.

    For published checkpoints, which record none; {} for other networks. The
    output stride leaves no trace in the weights.
    """
    if not {'emau.mu', 'fc2.weight'} <= set(state) or (
            state['emau.mu'].ndim, state['fc2.weight'].ndim) != (3, 4):
        return {}
    counts = tuple(sum(key.startswith(f'extractor.{i}.')
                       and key.endswith('.conv1.weight') for key in state)
                   for i in (4, 5, 6, 7))
    has_bottlenecks = 'extractor.4.0.conv3.weight' in state
    layers = [n for n, blocks in network.BLOCKS.items()
              if blocks == counts and (n >= 50) == has_bottlenecks]
    _, c, k = state['emau.mu'].shape
    found = {'HEAD': 'ema', 'EM_CHANNELS': c, 'EM_BASES': k,
             'N_CLASSES': state['fc2.weight'].shape[0],
             'STEM': 'deep' if 'extractor.0.0.weight' in state else 'plain'}
    return {**found, 'N_LAYERS': layers[0]} if layers else found


def main():
    parser = make_parser(__doc__, settings.describe())
    settings.override_all(parser.parse_known_args()[1])
    settings.validate()
    s = settings
    print(f'{backbones.describe_setting()}, output stride {s.STRIDE}, '
          f'{s.CROP_SIZE} x {s.CROP_SIZE} pixels')
    print(f'{"head":14}{"parameters, M":>15}{"MACs, G":>10}')
    for s.HEAD in HEADS:
        with torch.device('meta'):
            cost = complexity(build_network(), (s.CROP_SIZE, s.CROP_SIZE))
        print(f'{s.HEAD:14}{cost["params"] / 1e6:15.2f}'
              f'{cost["macs"] / 1e9:10.2f}')


if __name__ == '__main__':
    run_main(main)
