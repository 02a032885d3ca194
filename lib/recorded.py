"""Takes from a checkpoint what it recorded of its run: settings, data set,
the place of its log. What the command line has set stays; whatever does not
come from settings.py is logged with its source.
"""
import os

import settings
from lib.images import read_class_file
from utils import UserError, log


def adopt_network(recorded, checkpoint, path):
    """Take the network's settings and EVAL_CLASSES from a record; check all
    settings.

    Args:
        recorded: {name: value} of settings.
        checkpoint: its other entries, such as 'classes'.
        path: the checkpoint's, for messages.
    Raises: UserError where the command line names other classes.
    """
    n, given = recorded.get('N_CLASSES'), settings.given().get('N_CLASSES')
    if n and given and n != given:
        found = _trained_on(checkpoint, n, path)
        raise UserError(f'N_CLASSES={given}: {found}, and its weights are of '
                        f'that size; leave N_CLASSES out')
    for name, value in settings.adopt(recorded).items():
        log(f'{name} = {value!r} ({path})')
    _adopt('EVAL_CLASSES', recorded, path)
    settings.validate()


def adopt_data(checkpoint, path):
    """Take DATA_ROOT, VAL_SPLIT and IGNORE_LABEL from a checkpoint's record,
    where that folder is here and the command line names no other.

    Raises UserError where there is no split to score on, or the data set has
    another number of classes than the network.
    """
    recorded = checkpoint.get('settings') or {}
    root = recorded.get('DATA_ROOT', settings.DATA_ROOT)
    if os.path.isdir(root):
        _adopt('DATA_ROOT', recorded, path)
    if _is_same(root, settings.DATA_ROOT):
        _adopt('VAL_SPLIT', recorded, path)
        _adopt('IGNORE_LABEL', recorded, path)
    elif 'DATA_ROOT' not in settings.given():
        log(f'{path} was trained on {root}, which is not here: '
            f'DATA_ROOT = {settings.DATA_ROOT!r} (settings.py)')
    if not settings.VAL_SPLIT:
        raise UserError(f'VAL_SPLIT is empty, so there is nothing to score '
                        f'{path} on; name a list of {settings.DATA_ROOT}, '
                        f'such as VAL_SPLIT=val')
    _check_classes(checkpoint, path)


def report_folder(checkpoint, path):
    """Return the folder for a checkpoint's scores: LOG_DIR of its run, where
    that can be told; else one of its own in LOG_DIR/eval, so that they never
    replace those of another run."""
    folder, run = os.path.dirname(path), checkpoint.get('settings') or {}
    if 'LOG_DIR' in settings.given():
        return settings.LOG_DIR
    if {'MODEL_DIR', 'LOG_DIR'} <= run.keys() and _is_same(
            folder, run['MODEL_DIR']) and os.path.isdir(run['LOG_DIR']):
        return run['LOG_DIR']
    if _is_same(folder, settings.MODEL_DIR):
        return settings.LOG_DIR
    name = os.path.relpath(path).removesuffix('.pth').replace('../', '')
    return os.path.join(settings.LOG_DIR, 'eval', name.replace(os.sep, '-'))


def _adopt(name, recorded, path):
    """Set a setting as a record has it, unless the command line gave it; log
    a change."""
    value = recorded.get(name, getattr(settings, name))
    if name not in settings.given() and value != getattr(settings, name):
        setattr(settings, name, value)
        log(f'{name} = {value!r} ({path})')


def _trained_on(checkpoint, n, path):
    """Return in words how many classes a checkpoint was trained on."""
    names = checkpoint.get('classes', [])
    if len(names) > 3:
        names = [*names[:3], '...']
    return f'{path} was trained on {n} classes' + (
        f' ({", ".join(names)})' if names else '')


def _is_same(folder, other):
    """Tell whether two paths lead to one folder; '' is the working folder."""
    return os.path.realpath(folder) == os.path.realpath(other)


def _check_classes(checkpoint, path):
    """Raise UserError where DATA_ROOT has another number of classes than a
    checkpoint's network; warn where their names differ."""
    root, n = settings.DATA_ROOT, settings.N_CLASSES
    file = os.path.join(root, 'classes.txt')
    if not os.path.isfile(file):
        return
    names, _ = read_class_file(file)
    if len(names) != n:
        raise UserError(f'{_trained_on(checkpoint, n, path)}; {root} has '
                        f'{len(names)}: name the data set it belongs to with '
                        f'DATA_ROOT=..., or train on this one')
    differ = [f'{old} is {new}' for old, new in zip(
        checkpoint.get('classes', ()), names)
        if old != new and not old.isdecimal()]
    if differ:
        log(f'warning: {path} has other class names than {root}: '
            f'{", ".join(differ[:3])}')
