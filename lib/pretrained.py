"""Backbone weights: the known ones, where they are, and strict loading."""
import difflib
import os
import re

import settings
from lib.backbones import (
    describe_setting,
    import_timm,
    own_normalisation,
)
from lib.checkpoint import (
    check_finite,
    check_keys,
    find_checkpoint,
    load,
    load_matching,
    missing_keys,
    read_checkpoint,
    summarize_keys,
)
from lib.download import check_hash, download, read_pointer
from utils import RunError, UserError, first_line, log

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
_HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')   # a mirror
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
    s = settings
    path = find_encoder_weights() if s.BACKBONE else find_weights()
    if path is None:
        log('backbone: random weights' + (
            '; warning: FREEZE keeps them so' if s.FREEZE else ''))
        return
    missing = (load_encoder(net.extractor, path) if s.BACKBONE else
               load_backbone(net.extractor, load(path), path,
                             s.PRETRAINED_PARTIAL))
    log(f'backbone: {path}' + (
        f'; not in it and so random: {", ".join(missing)}' if missing else ''))
    for name, value in own_normalisation().items():
        if getattr(s, name) != value:
            log(f'warning: {name}={getattr(s, name)}, but weights of '
                f'{describe_setting()} are trained with {value}, which '
                f'{name}=() takes')


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


# ------------------------------------------------- encoders of timm
def find_encoder_weights():
    """Return the path of the weights for BACKBONE: a file that PRETRAINED
    names, or for 'auto' timm's own, fetched into WEIGHTS_DIR if need be; None
    if none are wanted. Raises UserError, RunError."""
    name, given = settings.BACKBONE, settings.PRETRAINED
    if not given:
        return None
    for path in (given, os.path.join(WEIGHTS_DIR, given)):
        if os.path.isfile(path):
            return path
    if given != 'auto':
        raise UserError(f'PRETRAINED={given} is no file, here or in '
                        f'{WEIGHTS_DIR}; for BACKBONE={name} name a '
                        f'.safetensors or .pth, or set PRETRAINED=auto')
    about = import_timm(name).get_pretrained_cfg(name)
    if about.hf_hub_id:
        file = about.hf_hub_filename or 'model.safetensors'
        url, pointer = (f'{_HUB}/{about.hf_hub_id}/{kind}/main/{file}'
                        for kind in ('resolve', 'raw'))
        file = (about.hf_hub_id.rpartition('/')[2]
                + os.path.splitext(file)[1])
    elif (about.url or '').endswith(('.pth', '.pt', '.safetensors')):
        url, pointer, file = about.url, '', os.path.basename(about.url)
    else:
        raise UserError(f'PRETRAINED=auto: timm publishes no weights of '
                        f'{name}; name a file, or set PRETRAINED= for none')
    path = os.path.join(WEIGHTS_DIR, file)
    if not os.path.exists(path):
        try:
            digits = re.search(r'-([0-9a-f]{8,})\.', os.path.basename(url))
            download(url, path, read_pointer(pointer, path) if pointer else
                     f'sha256:{digits[1]}' if digits else '')
        except RunError as error:
            raise RunError(f'{error}, or set PRETRAINED= (random weights)'
                           ) from None
    return path


def load_encoder(encoder, path):
    """Load a file of weights into a backbones.Encoder.

    The whole classifier of timm takes them, strictly and with timm's own
    conversion of older keys; the encoder has its tensors from there. Raises
    UserError that lists what is missing, unknown or of another shape.
    """
    s = settings
    state = (read_checkpoint(path)['net'] if path.endswith('.safetensors')
             else load(path))
    for name in ('state_dict', 'model'):        # of timm's own training
        state = state.get(name, state) if isinstance(state, dict) else state
    timm = import_timm(s.BACKBONE)
    try:
        whole = timm.create_model(
            s.BACKBONE, pretrained=True,
            pretrained_cfg_overlay={'state_dict': dict(state)})
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is not of BACKBONE={s.BACKBONE}: '
                        f'{_explain(error)}') from None
    given = {_flat(key): value for key, value in whole.state_dict().items()}
    check_finite(given, path)
    own = encoder.net.state_dict()
    encoder.net.load_state_dict({
        key: given[_flat(key.removeprefix('model.'))] for key in own})


def _flat(key):
    """Return a key as it is in nets with and without nested parts: timm
    writes stages_0 for stages.0."""
    return key.replace('.', '_')


def _explain(error):
    """Return in words what load_state_dict says on many lines."""
    if isinstance(error, KeyError):     # timm's conversion of older keys
        return f'it lacks {error.args[0]}'
    parts, lines = [], str(error).splitlines()
    for what, start in (('it lacks', 'Missing key'),
                        ('it has, unknown to that,', 'Unexpected key')):
        keys = [key for line in lines if start in line
                for key in re.findall('"([^"]+)"', line)]
        if keys:
            parts.append(f'{what} {summarize_keys(keys)}')
    shapes = re.findall(r'size mismatch for (\S+):', str(error))
    if shapes:
        parts.append(f'it has other shapes, {summarize_keys(shapes)}')
    return '; '.join(parts) or first_line(error)
