"""Checkpoints: saving, loading, restoring a run, strict checks of keys.

A checkpoint is {'net': state_dict, 'step': ..., 'settings': ..., ...}, see
train.py; a published one has 'net' and 'step' alone. Exported files
(.safetensors, .onnx) carry the rest as JSON in their metadata.
"""
import json
import os
import sys
import tempfile

import numpy as np
import torch

import settings
import utils
from lib.distributed import gather
from lib.images import read_classes
from utils import RunError, UserError, first_line, log, world


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
    """Make a folder, the value of the setting `name`; raise RunError unless
    files can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f'{name}={folder}: nothing can be written there '
                       f'({error.strerror}); name another folder') from None


def load(path):
    """Read a file that torch.save wrote; tensors and plain values only.

    Raises UserError for a file that is missing, truncated, no such file at
    all, or holds anything that could run code.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path} is not there')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # unpickling fails in a dozen ways
        if 'global' in str(error).lower():      # the pickle names a function
            raise UserError(f'{path} holds more than tensors and plain '
                            f'values, and is not loaded: it could run any '
                            f'code. Take it from another source') from None
        raise UserError(f'{path} is truncated or no file of weights '
                        f'({first_line(error)}); fetch it again') from None


def read_checkpoint(path):
    """Return the checkpoint that a .pth or .safetensors file holds.

    Raises UserError, as load does and for files without a network.
    """
    if path.endswith('.safetensors'):
        safetensors = utils.import_optional('safetensors')
        try:
            with safetensors.safe_open(path, 'pt') as file:
                return {'net': {key: file.get_tensor(key)
                                for key in file.keys()},
                        **decode_metadata(file.metadata() or {})}
        except Exception as error:          # of its own classes, or JSON's
            raise UserError(f'{path} is truncated or no file of weights '
                            f'({error})') from None
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or not isinstance(
            checkpoint.get('net'), dict):
        raise UserError(f'{path} is no checkpoint of a network: it has no '
                        f'"net". Backbone weights go into PRETRAINED')
    return checkpoint


def find_checkpoint(path):
    """Return path, or MODEL_DIR/final.pth if none is named.

    Raises UserError: a network is never scored on random weights.
    """
    chosen = path or os.path.join(settings.MODEL_DIR, 'final.pth')
    if not os.path.isfile(chosen):
        folder = os.path.dirname(chosen) or '.'
        found = sorted(name for name in os.listdir(folder)
                       if name.endswith('.pth')) if os.path.isdir(
                           folder) else []
        raise UserError(f'{chosen} is not there; {folder} has: '
                        f'{", ".join(found) or "no checkpoint"}. Train '
                        f'first, or name a checkpoint')
    return chosen


# ------------------------------------------------- what travels with weights
def get_classes(checkpoint):
    """Return the class names and colours that a checkpoint recorded; of a
    published one, which has none, those of DATA_ROOT."""
    if 'classes' in checkpoint:
        return checkpoint['classes'], checkpoint['colours']
    return read_classes(settings.DATA_ROOT, settings.N_CLASSES)


def encode_metadata(checkpoint):
    """Return what travels in an exported file, {name: JSON}: classes,
    colours, mean, std, step, git and the network's settings."""
    names, colours = get_classes(checkpoint)
    return {name: json.dumps(value) for name, value in {
        'classes': names, 'colours': colours, 'mean': settings.MEAN,
        'std': settings.STD, 'step': checkpoint.get('step'),
        'git': checkpoint.get('git', utils.git_hash()),
        'settings': settings.network_settings()}.items()}


def decode_metadata(texts):
    """Return the entries of a checkpoint that encode_metadata wrote; {} for
    the texts of a file from elsewhere."""
    if 'settings' not in texts:
        return {}
    found = {name: json.loads(text) for name, text in texts.items()}
    found['settings'] = {                               # JSON has no tuples
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found['settings'].items()}
    return found


class OnnxNetwork(torch.nn.Module):
    """A network in an ONNX file, run by onnxruntime on the CPU: image (b, 3,
    H, W) float32, normalised, to logits (b, n, H, W)."""

    def __init__(self, path):
        super().__init__()
        runtime = utils.import_optional('onnxruntime')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(
                path, options, providers=['CPUExecutionProvider'])
        except Exception as error:      # of its own classes
            raise UserError(f'{path} cannot be run by onnxruntime '
                            f'({first_line(error)})') from None
        self.recorded = decode_metadata(
            self.session.get_modelmeta().custom_metadata_map)

    def forward(self, image):
        logits, = self.session.run(None, {'image': image.numpy()})
        return torch.from_numpy(logits)


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
    net.load_state_dict(fits, strict=False)
    return ([key for key in state if key not in fits],
            missing_keys(own, fits))


def check_keys(own, given, name, is_partial=False):
    """Raise UserError unless the weights `given` are those that `own` has;
    is_partial: some may be missing, but not all."""
    if not all(isinstance(value, torch.Tensor) for value in given.values()):
        raise UserError(f'{name} is no file of weights: it holds '
                        f'{_shorten(list(given))}')
    faults, missing = [], missing_keys(own, given)
    if missing and not (is_partial and own.keys() & given.keys()):
        faults.append(f'lacks {_shorten(missing)}')
    unknown = [key for key in given if key not in own]
    if unknown:
        faults.append(f'has, unknown to the network, {_shorten(unknown)}')
    shapes = [f'{key} {tuple(value.shape)} for {tuple(own[key].shape)}'
              for key, value in given.items()
              if key in own and own[key].shape != value.shape]
    if shapes:
        faults.append(f'has other shapes, {_shorten(shapes)}')
    if faults:
        raise UserError(f'{name} does not fit the network: it '
                        f'{"; it ".join(faults)}. Is it for other settings '
                        f'(N_LAYERS, STEM, HEAD)?')


def missing_keys(own, given):
    """Return own's keys that are not given. BN's batch counters, which older
    files lack and nothing here reads, do not count."""
    return [key for key in own if key not in given
            and not key.endswith('num_batches_tracked')]


def _shorten(words, most=12):
    rest = len(words) - most
    return ', '.join(words[:most]) + (f' and {rest} more' if rest > 0 else '')


# ------------------------------------------------- a run
def versions():
    """Return {name: version} of what a run's numbers depend on."""
    return {'python': sys.version.split()[0], 'torch': str(torch.__version__),
            'numpy': str(np.__version__), 'threads': torch.get_num_threads()}


def random_state():
    """Return this process's random state, of the CPU and of its GPU."""
    return [torch.get_rng_state()] + (
        [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_state(state):
    """Restore what random_state() returned."""
    torch.set_rng_state(state[0])
    if state[1:] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


def capture(parts, step, best, for_resume):
    """Return a checkpoint of a run. All processes call it.

    Args:
        parts: {name: what has a state_dict}; 'net' and 'average' are what
            eval.py and predict.py need.
        step, best: the step, the best val mIoU so far.
        for_resume: with all parts and the random state.
    """
    names, colours = read_classes(settings.DATA_ROOT, settings.N_CLASSES)
    state = {'step': step, 'best': best, 'settings': settings.as_dict(),
             'classes': names, 'colours': colours, 'git': utils.git_hash(),
             'versions': versions(), 'processes': world()}
    for name, part in parts.items():
        if for_resume or name in ('net', 'average'):
            state[name] = part.state_dict()
    if for_resume:
        state['random'] = gather(random_state())
    return state


def restore(path, parts):
    """Restore a run's parts from latest.pth; return (step, best mIoU).

    Raises UserError where a setting that alters the run has changed, or the
    file is no run that could be resumed.
    """
    state = load(path)
    if not isinstance(state, dict) or 'optimizer' not in state:
        raise UserError(f'{path} is no run to resume: it holds no optimizer. '
                        f'Move it away to start anew')
    changed = settings.changed_since(state['settings'])
    unknown = sorted(set(state['settings']) - set(settings.as_dict()))
    if unknown:
        raise UserError(f'{path} is of a version with other settings '
                        f'({", ".join(unknown)}): finish the run with that '
                        f'version, or move the file away and start from its '
                        f'weights with INIT_FROM')
    if changed:
        listed = ', '.join(f'{name} {old!r} -> {new!r}'
                           for name, (old, new) in changed.items())
        raise UserError(f'{path} is of a run with other settings ({listed}); '
                        f'put them back, or start anew with sh clean.sh')
    for name, part in parts.items():
        if name in ('net', 'average'):
            load_strict(part, state[name], path)
        else:
            part.load_state_dict(state[name])
    if len(state['random']) == world():
        set_random_state(state['random'][utils.rank()])
    else:
        log(f'warning: {path} is of {len(state["random"])} processes, these '
            f'are {world()}: dropout will differ')
    for name, now in versions().items():
        if state['versions'].get(name) != now:
            log(f'warning: {path} was written with {name} '
                f'{state["versions"].get(name)}, this is {now}: the run is '
                f'resumed, but not bit for bit')
    log(f'{path}: resumed after step {state["step"]}')
    return state['step'], state['best']
