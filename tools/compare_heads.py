"""Trains and scores every head, and EMANet's switches, by one recipe.

    python -m tools.compare_heads --camvid DIR [--animals DIR] [--seeds N]
                                  [--weights FILE] [--jobs N] [--to DIR]
    python -m tools.compare_heads --long --camvid DIR [--seeds N] ...
    python -m tools.compare_heads --table [--long] [--figure FILE.png]
                                  [--seeds N] [--to DIR]

A small-scale comparison, for a CPU: ResNet-18 from ImageNet weights (FILE may
lack layers), output stride 16, images at half their size, the same number of
steps for all. Each run is train.py, then eval.py single-scale and, for the
heads, with several scales and flip, in DIR/models and DIR/logdir.

--long: EMANet, and what its unit is compared with, on CamVid for ten times the
steps and more, with averaged weights, scored on the test split, and EMANet at
T = 1 to 8 in evaluation. Runs of one seed start from the same weights and read
the same images in the same order.

DIR (`compare`) keeps results.csv, which eval.py writes, runs.csv (seconds and
memory of training; of a run that was resumed, of its last part; the weight of
its unit at the end) and curves.csv (validations of the long runs). One that
was stopped is resumed: what results.csv has is not run again. OMP_NUM_THREADS
sets the threads of a run; else --jobs runs share the cores. --table prints the
tables of what was run, --figure draws the curves of the long runs.
"""
import csv
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import numpy as np
import torch

from dataset import LABELS, LISTS
from lib.checkpoint import read_checkpoint
from lib.pretrained import KNOWN
from predict import check_folder
from tools import comparison
from tools.comparison import RECIPE, SETS, WEIGHTS, find_score, read_rows
from tools.measure import start_script
from utils import RunError, UserError, git_hash, make_parser, run_main

RUNS = ('name', 'seconds', 'memory_MB', 'git', 'unit_weight')
CURVES = ('name', 'step', 'loss', 'val_mIoU', 'val_mIoU_average', 's_a_step')
LOCK = Lock()


# ------------------------------------------------- running
def append_rows(folder, name, head, rows):
    """Append rows to a CSV file, which gets a header if it is new."""
    path = os.path.join(folder, name)
    with LOCK, open(path, 'a', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows(
            rows if file.tell() else [head, *rows])


def carry_out(run, args):
    """Train and score one run, but for what is there already."""
    last = WEIGHTS['AVERAGE' in run.changes]        # of the weights scored
    known = comparison.read_results(args.to)
    missing = [scoring for scoring in run.scorings
               if find_score(known, run, scoring, last) is None]
    places = {'DATA_ROOT': f'data/{run.data}', 'LOG_DIR': f'logdir/{run.key}',
              'NUM_WORKERS': 1, 'DEVICES': '-1'}
    if missing and not os.path.exists(os.path.join(args.to, run.final)):
        seconds, memory = execute(args, run.key, 'train.py', **{
            **RECIPE, **SETS[run.data], **places, 'SEED': run.seed,
            'MODEL_DIR': f'models/{run.key}', 'PRETRAINED': args.weights,
            **run.changes})
        append_rows(args.to, 'runs.csv', RUNS, [
            [run.key, f'{seconds:.1f}', round(memory), git_hash(),
             unit_weight(os.path.join(args.to, run.final))]])
    if missing and run.changes.get('ITER_VAL'):
        record_curve(args.to, run.key)
    for scoring in missing:
        execute(args, run.key, 'eval.py', run.final, **{**scoring, **places})
    with LOCK:
        print(f'{time.strftime("%H:%M:%S")} {run.key} is done', flush=True)


def carry_out_all(runs, args):
    """Carry out runs, args.jobs at a time; once one failed, no other starts,
    as one that is stopped shall stop all."""
    failed = Event()

    def attempt(run):
        if not failed.is_set():
            try:
                carry_out(run, args)
            except BaseException:
                failed.set()
                raise
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(attempt, runs))


def execute(args, key, script, *words, **changes):
    """Run a script in the comparison's folder; return (seconds, peak MB)."""
    words += tuple(f'{name}={value}' for name, value in changes.items())
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    start = time.perf_counter()
    with open(os.path.join(args.to, f'{key}.log'), 'a') as log:
        process = start_script(
            script, *words, cwd=args.to, stdout=log, stderr=log,
            env={'OMP_NUM_THREADS': str(threads), **os.environ})
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RunError(f'{script} failed for {key}; {log.name} says why')
    return time.perf_counter() - start, used.ru_maxrss / 1024


def unit_weight(path):
    """Return the mean size of the weights of a unit's last batch norm, as
    text, '' without a unit. It starts at 1, by EM_ZERO_INIT and of NonLocal
    at 0, where the unit adds nothing to its input."""
    found = [value for key, value in read_checkpoint(path)['net'].items()
             if key.startswith('emau.') and key.endswith('.weight')
             and value.dim() == 1]
    return f'{torch.cat(found).abs().mean():.4f}' if found else ''


def record_curve(folder, key):
    """Append a run's validations to curves.csv, unless they are there: mIoU
    0..1; the mean loss and the median of a step's seconds since the last
    validation."""
    if any(row['name'] == key for row in read_rows(folder, 'curves.csv')):
        return
    curve, losses, seconds = [], [], []
    for row in read_rows(os.path.join(folder, 'logdir', key), 'log.csv'):
        losses.append(float(row['loss']))
        seconds.append(RECIPE['BATCH_SIZE'] / float(row['images_per_s']))
        if row['val_mIoU']:
            curve.append([key, row['step'], f'{np.mean(losses):.6f}',
                          row['val_mIoU'], row['val_mIoU_average'],
                          f'{np.median(seconds):.4f}'])
            losses, seconds = [], []
    append_rows(folder, 'curves.csv', CURVES, curve)


# ------------------------------------------------- data
def link_sets(args):
    """Make data/camvid and data/animals in the folder, by links; return the
    names of those given. Raises UserError."""
    given = [name for name in SETS if getattr(args, name)]
    if not given:
        raise UserError('name the folder of at least one data set: --camvid '
                        'DIR')
    if args.long and 'camvid' not in given:
        raise UserError('--long compares on CamVid: name its folder, --camvid '
                        'DIR')
    for name in given:
        source = os.path.abspath(getattr(args, name))
        if not os.path.isdir(os.path.join(source, LISTS)):
            raise UserError(f'--{name} {getattr(args, name)}: no such folder '
                            f'with {LISTS} in it; make it by prepare.py')
        to = os.path.join(args.to, 'data', name)
        os.makedirs(os.path.join(to, LISTS), exist_ok=True)
        for part in ('JPEGImages', LABELS, 'classes.txt'):
            path = os.path.join(source, part)
            if os.path.exists(path) and not os.path.exists(
                    os.path.join(to, part)):
                os.symlink(path, os.path.join(to, part))
        for split in ('train', 'trainaug', 'val', 'test'):
            copy_lists(os.path.join(source, LISTS), os.path.join(to, LISTS),
                       split)
    return given


def copy_lists(source, to, split):
    """Copy a split's list, and every fourth id of it as SPLIT_quarter."""
    path = os.path.join(source, f'{split}.txt')
    if not os.path.exists(path):
        return
    with open(path) as file:
        ids = file.read().split()
    for name, part in ((split, ids), (f'{split}_quarter', ids[::4])):
        with open(os.path.join(to, f'{name}.txt'), 'w') as file:
            file.write('\n'.join(part) + '\n')


def main():
    """Compare, and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument('--camvid', metavar='DIR')
    parser.add_argument('--animals', metavar='DIR')
    parser.add_argument('--weights', metavar='FILE',
                        default='resnet18-f37072fd')
    parser.add_argument('--seeds', metavar='N', type=int)
    parser.add_argument('--jobs', metavar='N', type=int, default=2)
    parser.add_argument('--to', metavar='DIR', default='compare')
    parser.add_argument('--long', action='store_true')
    parser.add_argument('--table', action='store_true')
    parser.add_argument('--figure', metavar='FILE.png')
    args = parser.parse_args()
    if args.seeds is None:
        args.seeds = 5 if args.long else 2
    if args.seeds < 1 or args.jobs < 1:
        raise UserError(f'--seeds {args.seeds} --jobs {args.jobs}: at least '
                        f'1 each')
    check_folder(args.to, f'--to {args.to}')
    if os.path.isfile(args.weights):
        args.weights = os.path.abspath(args.weights)
    elif args.weights not in KNOWN:
        raise UserError(f'--weights {args.weights} is neither a file nor a '
                        f'known name; docs/data.md lists these')
    if not args.table:
        given = link_sets(args)
        plan = (comparison.plan_long if args.long
                else comparison.plan_short)(args.seeds)
        carry_out_all([run for run in plan if run.data in given], args)
    (comparison.print_long if args.long else comparison.print_short)(args)
    if args.figure:
        comparison.draw_curves(args)


if __name__ == '__main__':
    run_main(main)
