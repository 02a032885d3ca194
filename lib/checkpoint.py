"""Checkpoints: saving, loading, restoring a run, strict checks of keys.

A checkpoint is {'net': state_dict, 'step': ..., 'settings': ..., ...}, see
train.py; a published one has 'net' and 'step' alone. Exported files
(.safetensors, .onnx) carry the rest as JSON in their metadata.
"""
import collections
import glob
import json
import os
import tempfile

import torch

import settings
import utils
from lib.images import read_classes, voc_palette
from lib.integrity import DIGEST, digest, find_damage, is_weights, remedy
from utils import RunError, UserError, first_line, log

# what a checkpoint is scored on
DATA_SETTINGS = 'DATA_ROOT', 'VAL_SPLIT', 'IGNORE_LABEL', 'EVAL_CLASSES'
METADATA = 'classes', 'colours', 'mean', 'std', 'step', 'git', 'settings'


# ------------------------------------------------- files
def save(state, path):
    """Write a checkpoint so that a crash never costs the old one.

    Raises RunError that names the file when it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with utils.atomic_write(path) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:     # torch's own: a full disk
        if utils.is_lost_worker(error):
            raise
        raise RunError(
            f'{path} cannot be written: is the disk full? '
            f'({first_line(error)}) Make room or set MODEL_DIR elsewhere; '
            f'what it held before is whole') from None


def check_writable(name, folder):
    """Raise RunError unless files can be written in a folder, the value of
    the setting `name`, or where it will be made. Nothing is left behind."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RunError(f'{name}={folder}: nothing can be written there '
                       f'({error.strerror}); name another folder') from None


def load(path):
    """Read a file that torch.save wrote; tensors and plain values only.

    Raises UserError for a file that is missing, damaged, no such file at
    all, or holds anything that could run code.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise UserError(f'{path} is not there')
    damage = find_damage(path)
    if damage:
        raise UserError(f'{path} {damage}; {remedy(path)}')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # unpickling fails in a dozen ways
        if 'global' in str(error).lower():      # the pickle names a function
            raise UserError(f'{path} holds more than tensors and plain '
                            f'values, and is not loaded: it could run any '
                            f'code. Take it from another source') from None
        raise UserError(f'{path} is truncated or no file of weights; '
                        f'{remedy(path)}') from None


def read_checkpoint(path):
    """Return the checkpoint that a .pth or .safetensors file holds.

    Raises UserError, as load does and for files without a network.
    """
    if path.endswith('.safetensors'):
        return _read_safetensors(path)
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or not isinstance(
            checkpoint.get('net'), dict):
        raise UserError(f'{path} is no checkpoint of a network: it has no '
                        f'"net". Backbone weights go into PRETRAINED')
    for name in ('net', 'average'):
        if name in checkpoint and not is_weights(checkpoint[name]):
            raise UserError(f'{path} is no checkpoint of a network: its '
                            f'"{name}" is no dict of tensors; take another')
    return checkpoint


def _read_safetensors(path):
    """Return the checkpoint that a .safetensors file holds; its digest, which
    tools.export writes, is checked."""
    safetensors = utils.import_optional('safetensors')
    try:
        with safetensors.safe_open(path, 'pt') as file:
            texts = file.metadata() or {}
            net = {key: file.get_tensor(key) for key in file.keys()}
    except Exception:       # of its own classes, in words of its own
        raise UserError(f'{path} is truncated or no file of weights; '
                        f'{remedy(path)}') from None
    if not is_weights(net):
        raise UserError(f'{path} holds other numbers than weights; take '
                        f'another file')
    if DIGEST in texts and texts[DIGEST] != digest(net, texts):
        raise UserError(f'{path} is damaged: its checksum does not match; '
                        f'{remedy(path)}')
    return {'net': net, **decode_metadata(texts, path)}


def final_in(folder):
    """Return the final.pth of a folder, or of its models/; None without one.
    """
    paths = (os.path.join(folder, place, 'final.pth')
             for place in ('', 'models'))
    return next(filter(os.path.isfile, paths), None)


def find_checkpoint(path):
    """Return path, or the final.pth of a folder, MODEL_DIR if none is named.

    Raises UserError: a network is never scored on random weights.
    """
    chosen = path or os.path.join(settings.MODEL_DIR, 'final.pth')
    if os.path.isfile(chosen):
        return chosen
    folder, wanted = os.path.dirname(chosen), ('*.pth',)
    if os.path.isdir(chosen):
        if final_in(chosen):
            return os.path.normpath(final_in(chosen))
        folder, wanted = chosen, ('*.pth', 'models/*.pth')
        chosen = os.path.join(chosen, 'final.pth')
    found = sorted((file for each in wanted for file in glob.glob(
        os.path.join(glob.escape(folder), each))), key=os.path.getmtime)
    raise UserError(f'{chosen} is not there' + (
        f'; name one of the newest that are: {", ".join(found[:-4:-1])}'
        if found else ', nor any other checkpoint; train first, or name one'))


# ------------------------------------------------- what travels with weights
def get_classes(checkpoint):
    """Return the class names and colours that a checkpoint recorded; of a
    published one, which has none, those of DATA_ROOT, where they are as many
    as the network's, or numbers and VOC's colours."""
    if 'classes' in checkpoint:
        return checkpoint['classes'], checkpoint['colours']
    root, n = settings.DATA_ROOT, settings.N_CLASSES
    try:
        return read_classes(root, n)
    except UserError:
        log(f'warning: {root}/classes.txt does not name the {n} classes of '
            f'this network; they are numbered')
        return [str(i) for i in range(n)], voc_palette()[:n].tolist()


def encode_metadata(checkpoint):
    """Return what travels in an exported file, {name: JSON}: classes,
    colours, mean, std, step, git, and the settings of the network and of the
    data that it is scored on."""
    names, colours = get_classes(checkpoint)
    data = {name: value for name, value in (
        checkpoint.get('settings') or {}).items() if name in DATA_SETTINGS}
    return {name: json.dumps(value) for name, value in {
        'classes': names, 'colours': colours, 'mean': settings.MEAN,
        'std': settings.STD, 'step': checkpoint.get('step'),
        'git': checkpoint.get('git', utils.git_hash()),
        'settings': {**settings.network_settings(), **data}}.items()}


def decode_metadata(texts, path):
    """Return the entries of a checkpoint that encode_metadata wrote; {} for
    the texts of a file from elsewhere. What other programs have added is left
    out. path: the file's. Raises UserError for what is no JSON."""
    if not {'classes', 'colours', 'settings'} <= texts.keys():
        return {}
    found = {}
    for name in [name for name in METADATA if name in texts]:
        try:
            found[name] = json.loads(texts[name])
        except (ValueError, RecursionError):
            raise UserError(f'{path}: "{name}" in its metadata is no JSON; '
                            f'export it again') from None
    if isinstance(found['settings'], dict):             # JSON has no tuples
        found['settings'] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found['settings'].items()}
    return found


class OnnxNetwork(torch.nn.Module):
    """A network in an ONNX file, run by onnxruntime on the CPU: image (b, 3,
    H, W) float32, normalised, to logits (b, n, H, W)."""

    def __init__(self, path):
        super().__init__()
        runtime, self.path = utils.import_optional('onnxruntime'), path
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4      # what fails is said here
        try:
            self.session = runtime.InferenceSession(
                path, options, providers=['CPUExecutionProvider'])
            texts = self.session.get_modelmeta().custom_metadata_map
        except Exception:               # of its own classes
            raise self._damaged() from None
        self.recorded = decode_metadata(texts, path)

    def forward(self, image):
        wanted = len(image), settings.N_CLASSES, *image.shape[2:]
        try:
            logits, = self.session.run(None, {'image': image.numpy()})
        except Exception as error:
            if 'alloc' in str(error):   # too large an image
                raise MemoryError from None
            raise self._damaged() from None
        if logits.shape != wanted:
            raise self._damaged()
        return torch.from_numpy(logits)

    def _damaged(self):
        return UserError(f'{self.path} cannot be run by onnxruntime: it is '
                         f'damaged, or no network of tools.export; '
                         f'{remedy(self.path)}')


# ------------------------------------------------- weights into a network
def load_strict(net, state, name):
    """Copy a network's own weights into it; raise UserError that lists what
    is missing, unknown or of another shape. name: the file's."""
    check_keys(net.state_dict(), state, name)
    net.load_state_dict(state, strict=False)    # BN's counters may be missing


def load_matching(net, state, name):
    """Copy those of another network's weights that fit by key and shape, the
    whole backbone among them.

    Returns: ([keys of the file that are left out], [keys of the net that
    stay random]). Raises UserError.
    """
    own = net.state_dict()
    check_keys(*({key: value for key, value in each.items()
                  if key.startswith('extractor.')} for each in (own, state)),
               name)
    fits = {key: value for key, value in state.items()
            if key in own and isinstance(value, torch.Tensor)
            and own[key].shape == value.shape}
    check_finite(fits, name)
    net.load_state_dict(fits, strict=False)
    return ([key for key in state if key not in fits],
            missing_keys(own, fits))


def check_keys(own, given, name, is_partial=False):
    """Raise UserError unless the weights `given` are those that `own` has,
    and finite; is_partial: some may be missing, but not all."""
    if not is_weights(given):
        holds = (summarize_keys(given) if isinstance(given, dict)
                 else f'a {type(given).__name__}')
        raise UserError(f'{name} is no file of weights: it holds {holds}')
    errors, missing = [], missing_keys(own, given)
    if missing and not (is_partial and own.keys() & given.keys()):
        errors.append(f'lacks {summarize_keys(missing)}')
    unknown = [key for key in given if key not in own]
    if unknown:
        errors.append(f'has, unknown to the network, '
                      f'{summarize_keys(unknown)}')
    other = [key for key, value in given.items()
             if key in own and own[key].shape != value.shape]
    if other:
        key = other[0]
        listed = f'{summarize_keys(other)}, such as ' * (len(other) > 1)
        errors.append(f'has other shapes, {listed}{key} '
                      f'{tuple(given[key].shape)} for '
                      f'{tuple(own[key].shape)}')
    if errors:
        raise UserError(f'{name} does not fit the network: it '
                        f'{"; it ".join(errors)}. Is it for other settings '
                        f'(BACKBONE, N_LAYERS, STEM, HEAD)?')
    check_finite(given, name)


def check_finite(state, name):
    """Raise UserError where a file's weights are not finite."""
    broken = not_finite(state)
    if broken:
        raise UserError(f'{name} holds numbers that are not finite '
                        f'({summarize_keys(broken)}): its training has '
                        f'diverged; take an earlier checkpoint')


def not_finite(state):
    """Return the keys of the tensors that hold inf or NaN; the device is
    waited for once."""
    floats = {key: value for key, value in state.items()
              if isinstance(value, torch.Tensor) and value.is_floating_point()}
    if not floats:
        return []
    finite = torch.stack([value.isfinite().all() for value in floats.values()])
    return [key for key, is_finite in zip(floats, finite.tolist())
            if not is_finite]


def missing_keys(own, given):
    """Return own's keys that are not given. BN's batch counters, which older
    files lack and nothing here reads, do not count."""
    return [key for key in own if key not in given
            and not key.endswith('num_batches_tracked')]


def summarize_keys(keys, most=4):
    """Return keys of a state_dict in words; where they are many, by module:
    'extractor.7 (25 tensors), fc2 (2 tensors)'."""
    keys = [' '.join(key.split())[:80] if isinstance(key, str)
            else f'a {type(key).__name__}' for key in keys]
    if len(keys) <= most:
        return ', '.join(keys)
    for depth in (3, 2, 1):
        groups = collections.Counter('.'.join(
            key.split('.')[:-1][:depth]) or key for key in keys)
        if len(groups) <= most:
            break
    shown = [f'{name} ({utils.plural(count, "tensor")})'
             for name, count in groups.most_common(most)]
    rest = len(keys) - sum(n for _, n in groups.most_common(most))
    return ', '.join(shown) + (f' and {rest} more' if rest else '')
