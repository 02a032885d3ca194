"""Takes from a checkpoint what it recorded of its run: settings, data set,
the place of its log. What the command line has set stays; whatever does not
come from settings.py is logged with its source.
"""
import json
import os

import settings
from lib.checkpoint import DATA_SETTINGS
from lib.images import CONTROL, is_class_name, read_class_file
from utils import UserError, log, read_text


def check_record(recorded, checkpoint, path):
    """Raise UserError unless what a checkpoint records, and what is taken
    from it, is what a run could have written.

    Args: as of adopt_network.
    """
    if not isinstance(recorded, dict):
        raise UserError(f'{path} is spoilt: its settings are a '
                        f'{type(recorded).__name__}, no dict; take another '
                        f'checkpoint')
    for name in (*settings.network_settings(), *DATA_SETTINGS, 'MODEL_DIR',
                 'LOG_DIR'):
        if name in recorded:
            _check_setting(name, recorded[name], path)
    n = recorded.get('N_CLASSES', settings.N_CLASSES)
    step, git, error = checkpoint.get('step'), checkpoint.get('git', ''), ''
    if not (step is None or type(step) is int and 0 <= step < 2 ** 63):
        error = 'its step is no number of steps'
    elif not (isinstance(git, str) and _is_plain(git)):
        error = 'its commit is no line of text'
    elif {'classes', 'colours'} & checkpoint.keys() and not (
            _are_classes(checkpoint.get('classes'), n)
            and _are_colours(checkpoint.get('colours'), n)):
        error = f'its classes are no {n} names with a colour each'
    if error:
        raise UserError(f'{path} is spoilt: {error}; take another checkpoint')


def _check_setting(name, value, path):
    """Raise UserError unless a recorded value is one that a setting can have.
    """
    if not _is_plain(value):            # nothing that a message could show
        raise UserError(f'{path} is spoilt: what it records as {name} is no '
                        f'value of a setting; take another checkpoint')
    try:
        settings.check_value(name, value, f'{path}: ')
    except settings.SettingError as error:
        raise UserError(f'{error}; take another checkpoint') from None


def _is_plain(value):
    """Tell whether a value is a number, a short line, or a short list of
    these."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 256 and all(
            _is_plain(each) and not isinstance(each, (list, tuple))
            for each in value)
    if isinstance(value, str):
        return len(value) < 4096 and not CONTROL.search(value)
    return type(value) in (bool, float) or (
        type(value) is int and abs(value) < 2 ** 63)


def _are_classes(names, n):
    """Tell whether a value is a list of n class names."""
    return isinstance(names, list) and len(names) == n and all(
        isinstance(name, str) and is_class_name(name) for name in names)


def _are_colours(colours, n):
    """Tell whether a value is a list of n colours [r, g, b], 0..255."""
    return isinstance(colours, list) and len(colours) == n and all(
        isinstance(colour, (list, tuple)) and len(colour) == 3 and all(
            type(x) is int and 0 <= x < 256 for x in colour)
        for colour in colours)


def adopt_network(recorded, checkpoint, path):
    """Take the network's settings and EVAL_CLASSES from a record, which is
    checked first; check all settings.

    Args:
        recorded: {name: value} of settings.
        checkpoint: its other entries, such as 'classes'.
        path: the checkpoint's, for messages.
    Raises: UserError where the record is none, or the command line names
    other classes.
    """
    check_record(recorded, checkpoint, path)
    n, given = recorded.get('N_CLASSES'), settings.given().get('N_CLASSES')
    if n and given and n != given:
        found = _trained_on(checkpoint, n, path)
        raise UserError(f'N_CLASSES={given}: {found}, and its weights are of '
                        f'that size; leave N_CLASSES out')
    changed = (*_adopt(None, recorded, path),
               *_adopt(['EVAL_CLASSES'], recorded, path))
    try:
        settings.validate()
    except settings.SettingError as error:
        if str(error).startswith(changed):
            raise UserError(f'{path}: {error}') from None
        raise


def adopt_data(checkpoint, path):
    """Take DATA_ROOT, VAL_SPLIT and IGNORE_LABEL from a checkpoint's record,
    where that folder is here and the command line names no other.

    Raises UserError where there is no split to score on, or the data set has
    another number of classes than the network.
    """
    recorded = checkpoint.get('settings') or {}
    root = recorded.get('DATA_ROOT', settings.DATA_ROOT)
    if os.path.isdir(root):
        _adopt(['DATA_ROOT'], recorded, path)
    if _is_same(root, settings.DATA_ROOT):
        _adopt(['VAL_SPLIT', 'IGNORE_LABEL'], recorded, path)
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
    if _is_run({'MODEL_DIR': folder, 'LOG_DIR': run.get('LOG_DIR')}):
        return run['LOG_DIR']
    if _is_same(folder, settings.MODEL_DIR):
        return settings.LOG_DIR
    name = os.path.relpath(path).removesuffix('.pth').replace('../', '')
    return os.path.join(settings.LOG_DIR, 'eval', name.replace(os.sep, '-'))


def _is_run(folders):
    """Tell whether the run in LOG_DIR had this LOG_DIR and this MODEL_DIR, as
    its own settings.json says: a checkpoint may name anyone's folder."""
    try:
        path = os.path.join(folders['LOG_DIR'], 'settings.json')
        record = json.loads(read_text(path))
        return all(_is_same(folders[name], record[name]) for name in folders)
    except (UserError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _adopt(names, recorded, path):
    """Take settings as settings.adopt does; log and return what this
    changed."""
    changed = settings.adopt(recorded, names)
    for name, value in changed.items():
        log(f'{name} = {value!r} ({path})')
    return changed


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
