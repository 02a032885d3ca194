"""Backbone weights: the known ones, where they are, and strict loading."""
import difflib
import os

import settings
from lib.checkpoint import (
    check_keys,
    find_checkpoint,
    load,
    load_matching,
    missing_keys,
    read_checkpoint,
)
from lib.download import check_hash, download
from utils import RunError, UserError, log

WEIGHTS_DIR = 'models'       # where downloaded weights are kept
# name: (where, hash). The first three are those of the 2019 recipe (the
# authors' own link is dead, this is a mirror); the gluon ones are of the same
# architecture; the others have the plain stem.
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
# What PRETRAINED=auto means for (STEM, N_LAYERS).
DEFAULTS = {('deep', 50): 'resnet50-25c4b509',
            ('deep', 101): 'resnet101-2a57e44d',
            ('deep', 152): 'resnet152-0d43d698',
            ('plain', 18): 'resnet18-f37072fd',
            ('plain', 34): 'resnet34-b627a593',
            ('plain', 50): 'resnet50-0676ba61',
            ('plain', 101): 'resnet101-63fe2227',
            ('plain', 152): 'resnet152-394f9c45'}


def load_initial_weights(net):
    """Load the weights to start from: INIT_FROM's, else the backbone that
    PRETRAINED names, fetched if need be."""
    if not settings.INIT_FROM:
        load_pretrained(net)
        return
    path = find_checkpoint(settings.INIT_FROM)
    left_out, random = load_matching(
        net, read_checkpoint(path)['net'], path)
    for text, keys in (('not taken from it', left_out),
                       ('not in it and so random', random)):
        path += f'; {text}: {", ".join(keys)}' if keys else ''
    log(f'weights: {path}')


def load_pretrained(net):
    """Load the backbone weights that PRETRAINED names into net.extractor."""
    path = find_weights()
    if path is None:
        log('backbone: random weights' + (
            '; warning: FREEZE keeps them so' if settings.FREEZE else ''))
        return
    missing = load_backbone(net.extractor, load(path), path,
                            settings.PRETRAINED_PARTIAL)
    log(f'backbone: {path}' + (
        f'; not in it and so random: {", ".join(missing)}' if missing else ''))


def find_weights():
    """Return the path of the backbone weights, fetched if need be; None if
    none are wanted. Raises UserError, RunError."""
    name, s = settings.PRETRAINED, settings
    if not name:
        return None
    if name == 'auto':
        name = DEFAULTS.get((s.STEM, s.N_LAYERS))
        if name is None:
            raise UserError(f'PRETRAINED=auto: no weights are known for '
                            f'N_LAYERS={s.N_LAYERS} with STEM={s.STEM}; '
                            f'name a file, or set PRETRAINED= for none')
    if os.path.isfile(name):
        return name
    name = name.removesuffix('.pth')
    if name not in KNOWN:
        return _find_own(name)
    folder, digest = KNOWN[name]
    path = os.path.join(WEIGHTS_DIR, f'{name}.pth')
    if os.path.exists(path):
        try:
            check_hash(path, digest)
        except UserError as error:
            raise UserError(f'{error}; remove it, and it is fetched again'
                            ) from None
    else:
        try:
            download(f'{folder}{name}.pth', path, digest)
        except RunError as error:
            raise RunError(f'{error}, or set PRETRAINED= (random weights)'
                           ) from None
    return path


def _find_own(name):
    """Return the path of WEIGHTS_DIR's file that PRETRAINED names; raise
    UserError, with the nearest known name, where there is none."""
    given = settings.PRETRAINED
    path = os.path.join(WEIGHTS_DIR, given)
    if os.path.isfile(path):
        return path
    near = difflib.get_close_matches(name, KNOWN, 1)
    raise UserError(f'PRETRAINED={given} is neither a file, here or in '
                    f'{WEIGHTS_DIR}, nor a known name; ' + (
                        f'the nearest known is {near[0]}' if near else
                        'docs/data.md lists these'))


def load_backbone(resnet, state, name, is_partial=False):
    """Copy ImageNet weights into a ResNet; return the keys it still lacks.

    Args:
        resnet: a network.ResNet.
        state: {key: tensor} with torchvision's keys (conv1, bn1, layer1 to
            layer4; fc, the ImageNet classifier, is left out).
        name: the file's, for messages.
        is_partial: keys may be missing.
    Raises: UserError that lists what is missing, unknown or of another shape.
    """
    parts = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2',
             '6': 'layer3', '7': 'layer4'}
    if not isinstance(state, dict):
        raise UserError(f'{name} is no file of weights: it holds a '
                        f'{type(state).__name__}')
    own = {parts[key[0]] + key[1:]: value
           for key, value in resnet.state_dict().items()}
    given = {key: value for key, value in state.items()
             if key not in ('fc.weight', 'fc.bias')}
    try:
        check_keys(own, given, name, is_partial)
    except UserError as error:
        hint = '' if is_partial or not own.keys() & given.keys() else (
            ' A file without some layers is taken by PRETRAINED_PARTIAL=True')
        raise UserError(f'{error}{hint}') from None
    for key, value in given.items():
        own[key].copy_(value)               # the backbone's own storage
    return missing_keys(own, given)
