"""Trains and scores every head, and EMANet's switches, under one recipe.

    python tests/compare.py --camvid DIR [--animals DIR] [--weights FILE]
                            [--seeds N] [--jobs N] [--to DIR] [--table]

A small-scale comparison, on what a CPU can do: ResNet-18 from ImageNet weights
(FILE may lack layers), output stride 16, images at half their size, the same
number of steps for all. Each run is train.py, then eval.py single-scale and,
for the heads, with several scales and flip, in DIR/models and DIR/logdir.
DIR (`compare`) keeps results.csv, which eval.py writes, and runs.csv: seconds
and memory of training. Stopped, it goes on where it was: what results.csv has
is not run again. --table prints the tables of what has been run.
"""
import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
import utils        # noqa: E402

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
SEVERAL = {'EVAL_SCALES': '0.375,0.5,0.625', 'EVAL_FLIP': True}
HEADS = ('ema', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psa', 'nonlocal')
SWITCHES = (
    {'STAGE_NUM': 1}, {'STAGE_NUM': 2}, {'STAGE_NUM': 4}, {'STAGE_NUM': 8},
    {'EM_KEEP': 'learned'}, {'EM_KEEP': 'fixed'}, {'EM_NORM': 'layer'},
    {'EM_NORM': 'none'}, {'EM_GRAD': True})
RUNS = ('name', 'seconds', 'memory_MB', 'git')
ONE_AT_A_TIME = Lock()


# ------------------------------------------------- running
def plan(seeds, sets):
    """Return the runs [(name, set, changes, seed, whether MS+flip)]: all of
    a seed's before those of the next, so that a table is whole early."""
    runs = []
    for seed in range(1, seeds + 1):
        for head in HEADS:
            runs.append((head, 'camvid', {'HEAD': head}, seed, True))
            if head in HEADS[:3]:
                runs.append((head, 'animals', {'HEAD': head}, seed, True))
        for change in SWITCHES:
            name = '-'.join(f'{k}-{v}' for k, v in change.items())
            runs.append((name, 'camvid', change, seed, False))
    return [run for run in runs if run[1] in sets]


def results(asked):
    """Return {(checkpoint, whether with scales and flip): mIoU} of what
    results.csv has."""
    path = os.path.join(asked.to, 'results.csv')
    if not os.path.exists(path):
        return {}
    with open(path, newline='') as file:
        return {(row['checkpoint'], row['flip'] == 'True'): float(row['mIoU'])
                for row in csv.DictReader(file)}


def carry_out(run, asked):
    """Train and score one run, but for what is there already."""
    name, data, changes, seed, several = run
    key = f'{data}.{name}.{seed}'
    models, final = f'models/{key}', f'models/{key}/final.pth'
    wanted = [flip for flip in (False, True)[:1 + several]
              if (final, flip) not in results(asked)]
    common = {**RECIPE, **SETS[data], **changes, 'SEED': seed,
              'DATA_ROOT': os.path.join('data', data),
              'PRETRAINED': asked.weights}
    if wanted and not os.path.exists(os.path.join(asked.to, final)):
        seconds, memory = execute('train.py', {
            **common, 'MODEL_DIR': models, 'LOG_DIR': f'logdir/{key}'}, asked,
            key)
        with ONE_AT_A_TIME, open(os.path.join(asked.to, 'runs.csv'),
                                 'a') as file:
            csv.writer(file, lineterminator='\n').writerow(
                [key, f'{seconds:.1f}', round(memory), utils.git_hash()])
    for flip in wanted:
        execute('eval.py', {
            'EVAL_SCALES': 0.5, **SCORED[data], **(SEVERAL if flip else {}),
            'DATA_ROOT': os.path.join('data', data), 'NUM_WORKERS': 1,
            'DEVICES': '-1', 'LOG_DIR': f'logdir/{key}'}, asked, key, final)
    with ONE_AT_A_TIME:
        print(f'{time.strftime("%H:%M:%S")} {key} is done', flush=True)


def execute(script, changes, asked, key, *more):
    """Run a script in the comparison's folder; return (seconds, peak MB)."""
    words = [f'{name}={value}' for name, value in changes.items()]
    threads = max(1, (os.cpu_count() or 1) // asked.jobs)
    start = time.perf_counter()
    with open(os.path.join(asked.to, f'{key}.log'), 'a') as log:
        process = subprocess.Popen(
            [sys.executable, os.path.join(REPO, script), *more, *words],
            cwd=asked.to, stdout=log, stderr=log,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f'{script} failed for {key}; {log.name} says why')
    return time.perf_counter() - start, used.ru_maxrss / 1024


def link(asked):
    """Make data/camvid and data/animals in the folder; the latter's
    val_quarter is every fourth image of val."""
    found = {}
    for name in SETS:
        source = getattr(asked, name)
        if source is None:
            continue
        if not os.path.isdir(source):
            raise FileNotFoundError(f'--{name} {source}: no such folder')
        to = os.path.join(asked.to, 'data', name)
        lists = os.path.join(to, 'ImageSets', 'Segmentation')
        os.makedirs(lists, exist_ok=True)
        for part in ('JPEGImages', 'SegmentationClassAug', 'classes.txt'):
            path = os.path.abspath(os.path.join(source, part))
            if os.path.exists(path) and not os.path.exists(
                    os.path.join(to, part)):
                os.symlink(path, os.path.join(to, part))
        for split in ('train', 'trainaug', 'val'):
            path = os.path.join(source, 'ImageSets', 'Segmentation',
                                f'{split}.txt')
            if os.path.exists(path):
                with open(path) as file:
                    ids = file.read().split()
                for label, some in ((split, ids), (f'{split}_quarter',
                                                   ids[::4])):
                    with open(os.path.join(lists, f'{label}.txt'),
                              'w') as file:
                        file.write('\n'.join(some) + '\n')
        found[name] = to
    if not found:
        raise ValueError('name the folder of at least one set: --camvid DIR')
    return found


# ------------------------------------------------- tables
def scores(asked, data, name, flip=False):
    """Return the mIoU, in per cent, of a run's seeds that have one."""
    known = results(asked)
    keys = [(f'models/{data}.{name}.{seed}/final.pth', flip)
            for seed in range(1, asked.seeds + 1)]
    return [100 * known[key] for key in keys if key in known]


def shown(values):
    """Return 'mean (lowest .. highest)' of the values there are."""
    if not values:
        return 'not run'
    if len(values) == 1:
        return f'{values[0]:.2f} (one seed)'
    return f'{np.mean(values):.2f} ({min(values):.2f} .. {max(values):.2f})'


def tables(asked):
    """Print what has been run, as README has it."""
    used = {}
    path = os.path.join(asked.to, 'runs.csv')
    if os.path.exists(path):
        with open(path) as file:
            for name, seconds, memory, _ in csv.reader(file):
                if seconds != 'seconds':
                    used.setdefault(name.rpartition('.')[0], []).append(
                        (float(seconds), float(memory)))
    for data in SETS:
        heads = HEADS if data == 'camvid' else HEADS[:3]
        print(f'\n| {data} | single-scale | MS + flip | s a run | MB |')
        print('|---|---|---|---|---|')
        for head in heads:
            one, several = (shown(scores(asked, data, head, flip))
                            for flip in (False, True))
            cost = np.mean(used.get(f'{data}.{head}', [(np.nan,) * 2]), 0)
            print(f'| {head} | {one} | {several} | {cost[0]:.0f} | '
                  f'{cost[1]:.0f} |')
    print('\n| camvid, one change from the default | single-scale |\n'
          '|---|---|')
    print('| the default: T = 3, moving_avg, l2, no gradient | '
          + shown(scores(asked, 'camvid', 'ema')) + ' |')
    for change in SWITCHES:
        name = '-'.join(f'{k}-{v}' for k, v in change.items())
        print(f'| {", ".join(f"`{k}={v}`" for k, v in change.items())} | '
              f'{shown(scores(asked, "camvid", name))} |')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--camvid', metavar='DIR')
    parser.add_argument('--animals', metavar='DIR')
    parser.add_argument('--weights', metavar='FILE',
                        default='resnet18-f37072fd')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--to', metavar='DIR', default='compare')
    parser.add_argument('--table', action='store_true')
    asked = parser.parse_args()
    if os.path.exists(asked.weights):
        asked.weights = os.path.abspath(asked.weights)
    if not asked.table:
        os.makedirs(asked.to, exist_ok=True)
        runs = plan(asked.seeds, link(asked))
        path = os.path.join(asked.to, 'runs.csv')
        if not os.path.exists(path):
            with open(path, 'w') as file:
                csv.writer(file, lineterminator='\n').writerow(RUNS)
        with ThreadPoolExecutor(asked.jobs) as pool:
            for _ in pool.map(lambda run: carry_out(run, asked), runs):
                pass
    tables(asked)


if __name__ == '__main__':
    utils.launch(main)
