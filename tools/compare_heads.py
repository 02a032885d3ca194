"""Trains and scores every head, and EMANet's switches, by one recipe.

    python -m tools.compare_heads --camvid DIR [--animals DIR] [--seeds N]
                                  [--weights FILE] [--jobs N] [--to DIR]
    python -m tools.compare_heads --table [--seeds N] [--to DIR]

A small-scale comparison, for a CPU: ResNet-18 from ImageNet weights (FILE may
lack layers), output stride 16, images at half their size, the same number of
steps for all. Each run is train.py, then eval.py single-scale and, for the
heads, with several scales and flip, in DIR/models and DIR/logdir. DIR
(`compare`) keeps results.csv, which eval.py writes, and runs.csv: seconds and
memory of training. A comparison that was stopped is resumed: what results.csv
has is not run again. --table prints the tables of what was run.
"""
import csv
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

from dataset import LABELS, LISTS
from heads import HEADS
from lib.pretrained import KNOWN
from predict import check_folder
from tools.measure import markdown_table, start_script
from utils import RunError, UserError, git_hash, make_parser, run_main

RECIPE = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'EM_CHANNELS': 256,
          'BN_MOM': 0.1, 'LR': 0.01, 'BATCH_SIZE': 8, 'CROP_SIZE': 129,
          'SCALES': '0.4,0.5,0.6', 'EVAL_SCALES': 0.5, 'ITER_MAX': 120,
          'ITER_VAL': 0, 'ITER_SAVE': 1000, 'VAL_SPLIT': '', 'NUM_WORKERS': 1,
          'DEVICES': '-1', 'PRETRAINED_PARTIAL': True}
SETS = {'camvid': {'N_CLASSES': 11, 'TRAIN_SPLIT': 'train'},
        'animals': {'N_CLASSES': 21, 'TRAIN_SPLIT': 'trainaug'}}
SCORED = {'camvid': {'VAL_SPLIT': 'val'},
          'animals': {'VAL_SPLIT': 'val_quarter',
                      'EVAL_CLASSES': '0,8,10,12,13,15,17'}}
MULTI_SCALE = {'EVAL_SCALES': '0.375,0.5,0.625', 'EVAL_FLIP': True}
SET_HEADS = {'camvid': HEADS, 'animals': HEADS[:3]}     # of each data set
SWITCHES = ('STAGE_NUM=1', 'STAGE_NUM=2', 'STAGE_NUM=4', 'STAGE_NUM=8',
            'EM_KEEP=learned', 'EM_KEEP=fixed', 'EM_NORM=layer',
            'EM_NORM=none', 'EM_GRAD=True')             # on camvid
RUNS = ('name', 'seconds', 'memory_MB', 'git')
LOCK = Lock()


# ------------------------------------------------- running
def plan_runs(seeds, sets):
    """Return the runs [(name, data set, KEY=VALUE, seed, whether multi-scale
    too)], all of a seed before the next, so that a table is whole early."""
    runs = []
    for seed in range(1, seeds + 1):
        runs += [(head, data, f'HEAD={head}', seed, True)
                 for head in HEADS for data in SETS
                 if head in SET_HEADS[data]]
        runs += [(run_name(switch), 'camvid', switch, seed, False)
                 for switch in SWITCHES]
    return [run for run in runs if run[1] in sets]


def run_name(switch):
    return switch.replace('=', '-')


def read_results(folder):
    """Return {(checkpoint, whether multi-scale): mIoU} of results.csv."""
    path = os.path.join(folder, 'results.csv')
    if not os.path.exists(path):
        return {}
    with open(path, newline='') as file:
        return {(row['checkpoint'], row['flip'] == 'True'): float(row['mIoU'])
                for row in csv.DictReader(file)}


def carry_out(run, args):
    """Train and score one run, but for what is there already."""
    name, data, change, seed, multi_scale = run
    key = f'{data}.{name}.{seed}'
    final = f'models/{key}/final.pth'
    missing = [flip for flip in (False, True)[:1 + multi_scale]
               if (final, flip) not in read_results(args.to)]
    places = {'DATA_ROOT': f'data/{data}', 'LOG_DIR': f'logdir/{key}'}
    if missing and not os.path.exists(os.path.join(args.to, final)):
        seconds, memory = execute(args, key, 'train.py', change, **{
            **RECIPE, **SETS[data], **places, 'SEED': seed,
            'MODEL_DIR': f'models/{key}', 'PRETRAINED': args.weights})
        with LOCK, open(os.path.join(args.to, 'runs.csv'), 'a') as file:
            csv.writer(file, lineterminator='\n').writerow(
                [key, f'{seconds:.1f}', round(memory), git_hash()])
    for flip in missing:
        execute(args, key, 'eval.py', final, **{
            'EVAL_SCALES': 0.5, **SCORED[data], **(MULTI_SCALE if flip else
                                                   {}),
            **places, 'NUM_WORKERS': 1, 'DEVICES': '-1'})
    with LOCK:
        print(f'{time.strftime("%H:%M:%S")} {key} is done', flush=True)


def execute(args, key, script, *words, **changes):
    """Run a script in the comparison's folder; return (seconds, peak MB)."""
    words += tuple(f'{name}={value}' for name, value in changes.items())
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    start = time.perf_counter()
    with open(os.path.join(args.to, f'{key}.log'), 'a') as log:
        process = start_script(
            script, *words, cwd=args.to, stdout=log, stderr=log,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RunError(f'{script} failed for {key}; {log.name} says why')
    return time.perf_counter() - start, used.ru_maxrss / 1024


# ------------------------------------------------- data
def link_sets(args):
    """Make data/camvid and data/animals in the folder, by links; return the
    names of those given. Raises UserError."""
    given = [name for name in SETS if getattr(args, name)]
    if not given:
        raise UserError('name the folder of at least one data set: --camvid '
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
        for split in ('train', 'trainaug', 'val'):
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


# ------------------------------------------------- tables
def show_scores(args, data, name, flip=False):
    """Return 'mean (lowest .. highest)' of the seeds' mIoU, in percent."""
    known = read_results(args.to)
    keys = [(f'models/{data}.{name}.{seed}/final.pth', flip)
            for seed in range(1, args.seeds + 1)]
    values = [100 * known[key] for key in keys if key in known]
    if not values:
        return 'not run'
    if len(values) == 1:
        return f'{values[0]:.2f} (one seed)'
    return f'{np.mean(values):.2f} ({min(values):.2f} .. {max(values):.2f})'


def read_costs(folder):
    """Return {'SET.NAME': [(seconds, MB) of each seed]} of runs.csv."""
    path, costs = os.path.join(folder, 'runs.csv'), {}
    if os.path.exists(path):
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                costs.setdefault(row['name'].rpartition('.')[0], []).append(
                    (float(row['seconds']), float(row['memory_MB'])))
    return costs


def print_tables(args):
    """Print the tables of what was run."""
    costs = read_costs(args.to)
    for data, names in SET_HEADS.items():
        rows = []
        for head in names:
            cost = costs.get(f'{data}.{head}')
            rows.append([
                head, *(show_scores(args, data, head, flip)
                        for flip in (False, True)),
                *([f'{mean:.0f}' for mean in np.mean(cost, 0)]
                  if cost else ['-', '-'])])
        print('\n' + markdown_table(
            [data, 'single-scale mIoU, %', 'MS + flip mIoU, %', 's a run',
             'MB'], rows))
    rows = [['the default: T = 3, moving_avg, l2, no gradient',
             show_scores(args, 'camvid', 'ema')]]
    rows += [[f'`{switch}`', show_scores(args, 'camvid', run_name(switch))]
             for switch in SWITCHES]
    print('\n' + markdown_table(
        ['camvid, one change from the default', 'single-scale mIoU, %'],
        rows))


def main():
    """Compare, and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument('--camvid', metavar='DIR')
    parser.add_argument('--animals', metavar='DIR')
    parser.add_argument('--weights', metavar='FILE',
                        default='resnet18-f37072fd')
    parser.add_argument('--seeds', metavar='N', type=int, default=2)
    parser.add_argument('--jobs', metavar='N', type=int, default=2)
    parser.add_argument('--to', metavar='DIR', default='compare')
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
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
        runs = plan_runs(args.seeds, link_sets(args))
        path = os.path.join(args.to, 'runs.csv')
        if not os.path.exists(path):
            with open(path, 'w') as file:
                csv.writer(file, lineterminator='\n').writerow(RUNS)
        with ThreadPoolExecutor(args.jobs) as pool:
            for _ in pool.map(lambda run: carry_out(run, args), runs):
                pass
    print_tables(args)


if __name__ == '__main__':
    run_main(main)
