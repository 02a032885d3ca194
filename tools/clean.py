"""Removes the checkpoints and the log of a run, to start anew.

    sh clean.sh [KEY=VALUE ...]         the words that train.py was given

LOG_DIR/settings.json, which the run wrote, says where its checkpoints are.
Only files that train.py and eval.py write are removed, by their exact names;
a run at work is left alone.
"""
import json
import os
import re
import sys

import settings
from lib.run import lock_folders
from utils import UserError, make_parser, plural, run_main

CHECKPOINTS = re.compile(r'(latest|best|final|step_\d+)\.pth(\.tmp)?|\.lock')
LOGS = re.compile(r'(log\.csv|(settings|eval)\.json|(samples|confusion|'
                  r'classes)\.png)(\.tmp)?|events\.out\.tfevents\..+|\.lock')


def read_model_dir():
    """Return MODEL_DIR of the run in LOG_DIR, None where no run is there.

    Raises UserError where the command line names another.
    """
    path = os.path.join(settings.LOG_DIR, 'settings.json')
    try:
        with open(path) as file:
            folder = json.load(file)['MODEL_DIR'] + ''
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f'{path} cannot be read: remove the files of the run '
                        f'by hand') from None
    asked = settings.given().get('MODEL_DIR', folder)
    if asked != folder:
        raise UserError(f'MODEL_DIR={asked}: the run in LOG_DIR='
                        f'{settings.LOG_DIR} wrote to {folder}; nothing was '
                        f'removed. Name the LOG_DIR of the run too')
    return folder


def find_files(folder, names):
    """Return the paths of a folder's files whose whole name matches."""
    if not os.path.isdir(folder):
        return []
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)
                  if names.fullmatch(name))


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
    lock_folders(is_trial=True)
    files = find_files(models, CHECKPOINTS) + find_files(log, LOGS)
    for path in files:
        os.remove(path)
        print(f'removed {path}')
    print(f'{plural(len(files), "file")} of the run in {log} removed')
    if os.path.isdir(log) and not os.listdir(log):
        os.rmdir(log)


if __name__ == '__main__':
    run_main(main)
