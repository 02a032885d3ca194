"""Compares experiments: how far each run has come, which settings vary.

    python -m tools.compare_runs DIR

DIR holds folders of experiments, or is one, or is a folder of logs. Prints a
Markdown table of the runs, best mIoU (in per cent) first, with a column for
each setting that varies among those that have started; `?` is a setting that a
run's version lacks, or that is unknown. Writes nothing; the settings.py of
other folders is read, never run.
"""
import csv
import glob
import json
import math
import os
import statistics

from lib.checkpoint import load
from lib.experiments import is_experiment, read_settings
from tools.measure import markdown_table
from utils import UserError, make_parser, plural, run_main

PLACES = ('LOG_DIR', 'MODEL_DIR')    # where a run writes: no difference
COLUMNS = 'experiment', 'steps', 'best mIoU, %', 'at step', 'images/s'


# ------------------------------------------------- finding runs
def find_runs(folder):
    """Return {name: (folder of the experiment or None, of its log or None)}.

    Of the folder itself if it is an experiment, else of those in it, else of
    the logs in it. A log may lie in LOG_DIR or deeper, as
    LOG_DIR=logdir/NAME on the command line puts it; the settings of such a
    run are not those of settings.py, so its experiment is None.
    """
    runs, folder = {}, os.path.abspath(folder)
    inside = map(os.path.dirname, glob.glob(os.path.join(
        glob.escape(folder), '*', '')))
    for place in [folder] if is_experiment(folder) else filter(
            is_experiment, sorted(inside)):
        name = os.path.basename(place)
        log_dir = os.path.join(place, str(read_settings(place)['LOG_DIR']))
        for log in find_logs(log_dir) or [None]:
            deeper = os.path.relpath(log, log_dir) if log else '.'
            runs[os.path.normpath(os.path.join(name, deeper))] = (
                place if deeper == '.' else None), log
    return runs or {os.path.relpath(log, os.path.dirname(folder)):
                    (None, log) for log in find_logs(folder)}


def find_logs(folder):
    """Return the folders of this project's log.csv, at most two below this
    one."""
    return sorted(os.path.dirname(path) for depth in ('', '*', '*/*')
                  for path in glob.glob(os.path.join(
                      glob.escape(folder), depth, 'log.csv'))
                  if is_log(path))


def is_log(path):
    """Tell whether a log.csv has a column of steps."""
    try:
        with open(path, errors='replace') as file:
            return 'step' in file.readline().strip().split(',')
    except OSError:
        return False


# ------------------------------------------------- settings
def settings_of_run(place, log):
    """Return (settings of a run, whether they are settings.py's of today).

    The run wrote them beside its log and into its checkpoints; settings.py
    may have been edited since.
    """
    if log:
        try:
            with open(os.path.join(log, 'settings.json')) as file:
                return dict(json.load(file)), False
        except (OSError, ValueError, TypeError, RecursionError):
            pass
    stated = read_settings(place) if place else {}
    for name in ('final', 'latest') if log and stated else ():
        try:
            path = os.path.join(place, stated['MODEL_DIR'], f'{name}.pth')
            return dict(load(path)['settings']), False
        except (UserError, KeyError, TypeError, ValueError):
            continue
    return stated, bool(log and stated)


def varying_settings(records):
    """Return the names of the settings that differ among the runs whose
    settings are known; one that some of these lack differs, too."""
    known = [values for values in records if values]
    names = dict.fromkeys(name for values in known for name in values)
    return [name for name in names if name not in PLACES
            and len({show_setting(values, name) for values in known}) > 1]


def show_setting(values, name):
    """Return a setting as the command line takes it, '?' if it is unknown.
    """
    value = values.get(name, '?')
    if isinstance(value, (list, tuple)):
        return ','.join(map(str, value)) or '[]'
    return ' '.join(str(value).split()) or "''"


# ------------------------------------------------- progress
def progress_of(log):
    """Return dict(step, best: val mIoU or -1, at: its step, speed: images/s)
    of a run, None for what its log.csv does not tell. Lines that are cut off
    or garbled are skipped."""
    found, speeds = {'step': None, 'best': -1.0, 'at': None}, []
    for row in read_log(log) if log else ():
        step = parse_number(row.get('step'))
        if step is None:
            continue
        found['step'] = max(found['step'] or 0, int(step))
        speeds.append(parse_number(row.get('images_per_s')))
        for name in ('val_mIoU', 'val_mIoU_average'):
            value = parse_number(row.get(name))
            if value is not None and value > found['best']:
                found.update(best=value, at=int(step))
    speeds = [speed for speed in speeds if speed is not None]
    return {**found, 'speed': statistics.median(speeds) if speeds else None}


def read_log(log):
    """Return the rows of a folder's log.csv, [] where it cannot be read."""
    try:
        with open(os.path.join(log, 'log.csv'), newline='',
                  errors='replace') as file:
            return list(csv.DictReader(file.read().replace('\0', '')
                                       .splitlines()))
    except (OSError, csv.Error):
        return []


def parse_number(text):
    """Return the finite float that a cell holds, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def show_progress(found, values):
    """Return a run's cells: steps, best mIoU in percent, its step, speed."""
    step, last = found['step'], values.get('ITER_MAX', '?')
    return ['not run' if step is None else f'{step} of {last}',
            '-' if found['at'] is None else f'{100 * found["best"]:.2f}',
            '-' if found['at'] is None else str(found['at']),
            '-' if found['speed'] is None else f'{found["speed"]:.1f}']


# ------------------------------------------------- the table
def compare(folder):
    """Print the table of the runs in a folder; raise UserError without any.
    """
    runs = find_runs(folder)
    check_runs(folder, runs)
    found = {name: progress_of(log) for name, (_, log) in runs.items()}
    records = {name: settings_of_run(*run) for name, run in runs.items()}
    varying = varying_settings([records[name][0] for name, (_, log)
                                in runs.items() if log])
    rows = []
    for name in sorted(runs, key=lambda name: (
            -found[name]['best'], found[name]['step'] is None, name)):
        values, has_started = records[name][0], runs[name][1]
        rows.append([name, *show_progress(found[name], values), *(
            show_setting(values, setting) if has_started else '-'
            for setting in varying)])
    print(markdown_table([*COLUMNS, *varying], rows))
    for name, (_, is_of_today) in records.items():
        if is_of_today:
            print(f'{name}: its settings are those that settings.py has now')


def check_runs(folder, runs):
    """Raise UserError unless there is a run that has started."""
    if not os.path.isdir(folder):
        raise UserError(f'{folder} is no folder; name the folder around your '
                        f'experiments')
    if not runs:
        raise UserError(f'{folder} holds no experiment: no folder in it has '
                        f'a settings.py of this project or a log.csv; name '
                        f'the folder around your experiments')
    if not any(log for _, log in runs.values()):
        raise UserError(f'{folder} holds {plural(len(runs), "experiment")}, '
                        f'but none has a log.csv in its LOG_DIR: train first '
                        f'(python train.py in {next(iter(runs))})')


def main():
    """Compare the runs in the folder that the command line names."""
    parser = make_parser(__doc__)
    parser.add_argument('folder', metavar='DIR')
    compare(parser.parse_args().folder)


if __name__ == '__main__':
    run_main(main)
