"""Removes the checkpoints and the log of a run, to start anew.

    sh clean.sh [KEY=VALUE ...]         the words that train.py was given

LOG_DIR/settings.json, which the run wrote, says where its checkpoints are; a
MODEL_DIR outside this folder has to be named too. Only files that train.py and
eval.py write are removed, by their exact names, and Weights & Biases' folders
of these runs; a run at work is left alone.
"""
import json
import os
import re
import shutil
import sys

import settings
from lib.run import lock_folders
from lib.wandb_log import read_ids
from utils import (
    RunError,
    UserError,
    make_parser,
    plural,
    read_text,
    run_main,
)

CHECKPOINTS = re.compile(r'(latest|best|final|step_\d+)\.pth(\.tmp)?|\.lock')
LOGS = re.compile(r'(log\.csv|(settings|eval)\.json|(samples|confusion|'
                  r'classes)\.png|wandb_ids\.txt)(\.tmp)?|'
                  r'events\.out\.tfevents\..+|\.lock')


def read_model_dir():
    """Return MODEL_DIR of the run in LOG_DIR, None where no run is there.

    Raises UserError where it is not the folder that the user means: the
    record was copied from another run, may name anyone's folder.
    """
    log = settings.LOG_DIR
    path = os.path.join(log, 'settings.json')
    if not os.path.lexists(path):
        return None
    try:
        record = json.loads(read_text(path))
        folder, former = record['MODEL_DIR'] + '', record['LOG_DIR'] + ''
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'{path} cannot be read: remove the files of the run '
                        f'by hand') from None
    asked = settings.given().get('MODEL_DIR', folder)
    if asked != folder:
        raise UserError(f'MODEL_DIR={asked}: the run in LOG_DIR={log} wrote '
                        f'to {folder}; nothing was removed. Name the LOG_DIR '
                        f'of the run too')
    if os.path.realpath(former) != os.path.realpath(log):
        raise UserError(f'{path} is of a run whose LOG_DIR was {former}, '
                        f'which is another folder; nothing was removed. '
                        f'Remove its files by hand')
    if folder != settings.MODEL_DIR and not is_here(folder):
        raise UserError(f'the run in LOG_DIR={log} wrote to {folder}, which '
                        f'is not in this folder; nothing was removed. To '
                        f'remove its checkpoints too, add MODEL_DIR={folder}')
    return folder


def is_here(folder):
    """Tell whether a folder is the current one, or named as inside it."""
    here = os.getcwd()
    return os.path.commonpath([here, os.path.abspath(folder)]) == here


def find_files(folder, names):
    """Return the paths of a folder's files whose whole name matches, the
    record of the run last, so that this can be repeated; no folders."""
    if not os.path.isdir(folder):
        return []
    paths = [os.path.join(folder, name) for name in sorted(
        os.listdir(folder), key=lambda name: (name == 'settings.json', name))
        if names.fullmatch(name)]
    return [path for path in paths
            if os.path.islink(path) or not os.path.isdir(path)]


def remove_wandb(log):
    """Remove what Weights & Biases wrote of the runs that LOG_DIR names: a
    folder each, and links into these; return how many folders."""
    folder = os.path.join(log, 'wandb')
    ids = '|'.join(map(re.escape, read_ids(log)))
    names = re.compile(rf'(offline-)?run-\d{{8}}_\d{{6}}-({ids})')
    paths = [os.path.join(folder, name) for name in (
        sorted(os.listdir(folder)) if os.path.isdir(folder) and ids else ())]
    links = [path for path in paths if os.path.islink(path)
             and names.fullmatch(os.readlink(path).partition('/')[0])]
    runs = [path for path in paths if names.fullmatch(os.path.basename(path))
            and not os.path.islink(path)]
    for path in links:
        os.remove(path)
    for path in runs:
        shutil.rmtree(path)
        print(f'removed {path}')
    if paths and not os.listdir(folder) and not os.path.islink(folder):
        os.rmdir(folder)
    return len(runs)


def remove_run(models, log):
    """Remove the files of a run from MODEL_DIR and LOG_DIR."""
    lock_folders(is_trial=True)
    count = remove_wandb(log)
    for path in find_files(models, CHECKPOINTS) + find_files(log, LOGS):
        if os.path.lexists(path):       # both may be one folder
            os.remove(path)
            print(f'removed {path}')
            count += 1
    print(f'{plural(count, "file")} removed')
    if not os.path.islink(log) and not os.listdir(log):
        os.rmdir(log)


def main():
    """Remove the files of the run that the command line names."""
    parser = make_parser(__doc__, settings.describe())
    settings.override_all(parser.parse_known_args(sys.argv[1:])[1])
    log = settings.LOG_DIR
    models = read_model_dir()
    if models is None:
        print(f'LOG_DIR={log} has no settings.json, so no run is known that '
              f'wrote there: nothing was removed')
        return
    if not (models and log):
        raise UserError(f'MODEL_DIR={models!r}, LOG_DIR={log!r}: an empty '
                        f'name is no folder; remove the files by hand')
    settings.MODEL_DIR = models
    try:
        remove_run(models, log)
    except OSError as error:
        raise RunError(f'{error.filename} cannot be removed '
                       f'({error.strerror}); mend that and repeat the '
                       f'command') from None


if __name__ == '__main__':
    run_main(main)
