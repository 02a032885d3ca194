"""The networks that one recipe trains: EMANet and what it is compared with.

`build_network()` gives the one that the settings describe. All have the same
face, `logits = net(image)`, and the backbone is `net.extractor`.
`python baselines.py [KEY=VALUE ...]` prints what each costs.
"""
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import network
import settings

HEADS = ('ema', 'fcn')


class FCN(nn.Module):
    """A 1x1 classifier on the backbone: the ResNet row of Table 1."""

    def __init__(self, n_classes, n_layers, stride, stem, dropout, bn_mom):
        super().__init__()
        self.extractor = network.ResNet(n_layers, stride, stem)
        self.fc = nn.Sequential(
            nn.Dropout2d(dropout),
            nn.Conv2d(self.extractor.channels, n_classes, 1))
        network.set_bn_momentum(self, bn_mom)

    def forward(self, image):
        """Return logits (b, n_classes, H, W) of image (b, 3, H, W)."""
        x = self.fc(self.extractor(image))              # (b, n_classes, h, w)
        return network.upsample(x, image.shape[-2:])    # (b, n_classes, H, W)


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
    if s.HEAD == 'fcn':
        return FCN(s.N_CLASSES, s.N_LAYERS, s.STRIDE, s.STEM, s.DROPOUT,
                   s.BN_MOM)
    raise ValueError(f'HEAD={s.HEAD}: there are {", ".join(HEADS)}')


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
    print(f'{"HEAD":8} {"MACs":>10} {"activations":>12} {"parameters":>11}')
    for settings.HEAD in HEADS:
        with torch.device('meta'):
            cost = complexity(build_network())
        print(f'{settings.HEAD:8} {cost["macs"] / 1e9:9.2f}G '
              f'{cost["activations"] / 1e6:11.1f}M '
              f'{cost["params"] / 1e6:10.3f}M')


if __name__ == '__main__':
    import utils
    utils.launch(main)
