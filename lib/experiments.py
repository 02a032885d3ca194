"""Finds experiments and their logs. The settings.py of a folder, which may be
anyone's, is read as data, never run.

    python -m lib.experiments DIR LINKS     what tensorboard.sh shows

This makes, in the folder LINKS, a link to each log of the experiments in DIR,
or of DIR where it is one, under the experiment's name.
"""
import ast
import glob
import os
import sys
import warnings


def read_settings(folder):
    """Return {name: value} of a folder's settings.py, the text of a value
    that is no literal; {} without one that can be parsed."""
    path = os.path.join(folder, 'settings.py')
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, 'rb') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')     # of another project's code
            statements = ast.parse(file.read(2 ** 20)).body
        targets = [getattr(each, 'targets', [None])[0] for each in statements]
        return {target.id: _evaluate(each.value)
                for each, target in zip(statements, targets)
                if isinstance(target, ast.Name) and target.id[0] != '_'}
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _evaluate(value):
    """Return what a literal stands for, the text of another expression."""
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):
        return ast.unparse(value)


def is_experiment(folder):
    """Tell whether a folder has a settings.py of this project."""
    return {'ITER_MAX', 'LOG_DIR'} <= set(read_settings(folder))


# ------------------------------------------------- TensorBoard's events
def has_events(folder):
    """Tell whether events lie in a folder, or at most two below it."""
    return any(next(glob.iglob(os.path.join(
        glob.escape(folder), depth, 'events.out.tfevents.*')), None)
        for depth in ('', '*', '*/*'))


def find_boards(place):
    """Return the folders of events of an experiment: its LOG_DIR, and those
    in it that have the settings.json of a run."""
    stated = [os.path.join(place, str(value)) for name, value
              in read_settings(place).items() if name == 'LOG_DIR']
    recorded = sorted(map(os.path.dirname, glob.iglob(os.path.join(
        glob.escape(place), '*', 'settings.json'))))
    found = dict.fromkeys(map(os.path.realpath, stated + recorded))
    return [folder for folder in found if has_events(folder)]


def link_logs(root, links):
    """Link the logs in a folder as the file's docstring says; all of root
    where no experiment in it has a log, but events are there."""
    root = os.path.abspath(root)
    places = [root] if os.path.isfile(os.path.join(root, 'settings.py')) else [
        os.path.dirname(path) for path in sorted(glob.iglob(os.path.join(
            glob.escape(root), '*', 'settings.py')))]
    boards = {place: find_boards(place) for place in places}
    if not any(boards.values()) and has_events(root):
        boards = {root: [root]}
    for place, folders in boards.items():
        name = os.path.join(links, os.path.basename(place) or 'log')
        if len(folders) == 1:
            os.symlink(folders[0], name)
        for folder in folders[1:] and folders:
            os.makedirs(name, exist_ok=True)
            os.symlink(folder, os.path.join(name, os.path.basename(folder)))


if __name__ == '__main__':
    link_logs(*sys.argv[1:])
