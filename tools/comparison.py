"""What tools.compare_heads compares: the plans of its runs, and the tables of
those that were run, from results.csv, runs.csv and curves.csv."""
import csv
import itertools
import os
from typing import NamedTuple

import numpy as np

import settings
from heads import HEADS
from lib import visualize
from lib.images import save_image
from tools.measure import markdown_table
from utils import UserError

RECIPE = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'EM_CHANNELS': 256,
          'BN_MOM': 0.1, 'LR': 0.01, 'BATCH_SIZE': 8, 'CROP_SIZE': 129,
          'SCALES': '0.4,0.5,0.6', 'EVAL_SCALES': 0.5, 'ITER_MAX': 120,
          'ITER_VAL': 0, 'ITER_SAVE': 1000, 'VAL_SPLIT': '', 'NUM_WORKERS': 1,
          'DEVICES': '-1', 'PRETRAINED_PARTIAL': True}
LONG = {'ITER_MAX': 1200, 'ITER_VAL': 240, 'VAL_SPLIT': 'val',
        'AVERAGE': 0.99, 'ITER_SAVE': 2000}
SETS = {'camvid': {'N_CLASSES': 11, 'TRAIN_SPLIT': 'train'},
        'animals': {'N_CLASSES': 21, 'TRAIN_SPLIT': 'trainaug'}}
SCORED = {'camvid': {'VAL_SPLIT': 'val'},
          'animals': {'VAL_SPLIT': 'val_quarter',
                      'EVAL_CLASSES': '0,8,10,12,13,15,17'}}
SINGLE = {'EVAL_SCALES': '0.5', 'EVAL_FLIP': False}
MULTI_SCALE = {'EVAL_SCALES': '0.375,0.5,0.625', 'EVAL_FLIP': True}
SET_HEADS = {'camvid': HEADS, 'animals': HEADS[:3]}     # of each data set
SWITCHES = ('STAGE_NUM=1', 'STAGE_NUM=2', 'STAGE_NUM=4', 'STAGE_NUM=8',
            'EM_KEEP=learned', 'EM_KEEP=fixed', 'EM_NORM=layer',
            'EM_NORM=none', 'EM_GRAD=True')             # on camvid
EMA = {'HEAD': 'ema'}
LONGER = {'ITER_MAX': 2400, 'ITER_VAL': 480}
LONG_HEADS = {'ema': (EMA, 5), 'no_ema': ({'HEAD': 'no_ema'}, 5),
              'nonlocal': ({'HEAD': 'nonlocal'}, 3),    # changes, seeds
              'learned': ({**EMA, 'EM_KEEP': 'learned'}, 2),
              # of what the difference between the first two may come:
              'zero': ({**EMA, 'EM_ZERO_INIT': True}, 3),
              'grad': ({**EMA, 'EM_GRAD': True}, 1),
              'ema_2400': ({**EMA, **LONGER}, 1),
              'no_ema_2400': ({'HEAD': 'no_ema', **LONGER}, 1)}
LONG_SCORED = {'test': {'VAL_SPLIT': 'test', **SINGLE},
               'test, MS + flip': {'VAL_SPLIT': 'test', **MULTI_SCALE},
               'val': {'VAL_SPLIT': 'val', **SINGLE}}
PAIRS = (('ema', 'no_ema'), ('nonlocal', 'no_ema'), ('learned', 'ema'),
         ('grad', 'ema'), ('zero', 'ema'), ('zero', 'no_ema'),
         ('zero', 'nonlocal'), ('ema_2400', 'ema'),
         ('no_ema_2400', 'no_ema'), ('ema_2400', 'no_ema_2400'))
STAGES = range(1, 9)        # T in evaluation
WEIGHTS = 'net', 'average'


class Run(NamedTuple):
    """A run of the comparison.

    Args:
        name: of its row in the tables.
        data: of SETS.
        seed: SEED.
        changes: {setting: value}, beside RECIPE.
        scorings: {setting: value} of each evaluation.
    """

    name: str
    data: str
    seed: int
    changes: dict
    scorings: tuple

    @property
    def key(self):
        return f'{self.data}.{self.name}.{self.seed}'

    @property
    def final(self):
        return f'models/{self.key}/final.pth'


# ------------------------------------------------- plans
def plan_short(seeds):
    """Return the runs of every head and switch, all of a seed before the
    next, so that a table is whole early."""
    runs = []
    for seed in range(1, seeds + 1):
        runs += [Run(head, data, seed, {'HEAD': head},
                     ({**SCORED[data], **SINGLE},
                      {**SCORED[data], **MULTI_SCALE}))
                 for head in HEADS for data in SETS
                 if head in SET_HEADS[data]]
        runs += [Run(switch.replace('=', '-'), 'camvid', seed,
                     {**EMA, **dict([switch.split('=')])},
                     ({**SCORED['camvid'], **SINGLE},))
                 for switch in SWITCHES]
    return runs


def plan_long(seeds):
    """Return the long runs, EMANet and its control first, seed by seed; then
    those of several seeds come again, to be scored in the ways that take
    longest."""
    single, multi_scale, val = LONG_SCORED.values()
    stages = tuple({**single, 'STAGE_NUM_EVAL': t}
                   for t in STAGES if t != settings.STAGE_NUM)

    def plan(names, *scorings):
        return [Run(f'long.{name}', 'camvid', seed, {**LONG, **changes},
                    scorings)
                for seed in range(1, seeds + 1)
                for name in names
                for changes, count in [LONG_HEADS[name]] if seed <= count]
    pair = PAIRS[0]
    others = [name for name in LONG_HEADS if name not in pair]
    several = [name for name in others if LONG_HEADS[name][1] > 1]
    return [*plan(pair, single, val), *plan(others, single, val),
            *plan(['ema'], *stages), *plan(pair, multi_scale),
            *plan(several, multi_scale)]


# ------------------------------------------------- what was run
def read_rows(folder, name):
    """Return the rows of a CSV file, [] where there is none."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def read_results(folder):
    """Return {(checkpoint, weights, split, scales, flip, stages): mIoU in per
    cent} of results.csv."""
    return {(row['checkpoint'], row['weights'], row['split'], row['scales'],
             row['flip'], row.get('stages') or ''): 100 * float(row['mIoU'])
            for row in read_rows(folder, 'results.csv')}


def find_score(results, run, scoring, weights='net'):
    """Return what read_results has of a scoring of a run, or None."""
    stages = scoring.get('STAGE_NUM_EVAL') or run.changes.get(
        'STAGE_NUM', settings.STAGE_NUM)
    for text in (str(stages), ''):      # no unit, or not yet recorded
        key = (run.final, weights, scoring['VAL_SPLIT'],
               scoring['EVAL_SCALES'].replace(',', ' '),
               str(scoring['EVAL_FLIP']), text)
        if key in results:
            return results[key]
    return None


# ------------------------------------------------- statistics
def describe_range(values):
    """Return 'mean (lowest .. highest)' of the seeds' mIoU, in per cent."""
    if not values:
        return 'not run'
    if len(values) == 1:
        return f'{values[0]:.2f} (one seed)'
    return f'{np.mean(values):.2f} ({min(values):.2f} .. {max(values):.2f})'


def describe_spread(values):
    """Return 'mean ± standard deviation (n)' of the seeds' values."""
    if not values:
        return 'not run'
    spread = f'{np.std(values, ddof=1):.2f}' if len(values) > 1 else '-'
    return f'{np.mean(values):.2f} ± {spread} ({len(values)})'


def paired_difference(first, second):
    """Return (mean, standard error, n) of first - second over the seeds that
    both have; the mean is None for no seed, the error for fewer than two.

    first, second: {seed: value}.
    """
    found = [first[seed] - second[seed] for seed in first if seed in second]
    n = len(found)
    return (float(np.mean(found)) if n else None,
            float(np.std(found, ddof=1) / n ** 0.5) if n > 1 else None, n)


def describe_difference(first, second):
    """Return 'mean ± standard error (n)' of paired_difference."""
    mean, error, n = paired_difference(first, second)
    if mean is None:
        return 'not run'
    return f'{mean:+.2f} ± {"-" if error is None else f"{error:.2f}"} ({n})'


def final_rise(curve):
    """Return how much a curve, [(step, value)] in order, rises over the last
    fifth of its steps."""
    bound = 0.8 * curve[-1][0]
    return curve[-1][1] - next(y for step, y in curve if step >= bound)


# ------------------------------------------------- tables
def read_runs(folder):
    """Return {'SET.NAME': [row of each seed]} of runs.csv."""
    runs = {}
    for row in read_rows(folder, 'runs.csv'):
        runs.setdefault(row['name'].rpartition('.')[0], []).append(row)
    return runs


def describe_mean(rows, column, digits=0):
    """Return the mean of a column, '-' where no row has it."""
    found = [float(row[column]) for row in rows if row.get(column)]
    return f'{np.mean(found):.{digits}f}' if found else '-'


def print_table(head, rows):
    print('\n' + markdown_table(head, rows))


def print_short(args):
    """Print the tables of every head and switch."""
    runs, known = read_runs(args.to), read_results(args.to)
    cells = {}                          # {(data, name, flip): [mIoU]}
    for run in plan_short(args.seeds):
        for scoring in run.scorings:
            found = find_score(known, run, scoring)
            cells.setdefault((run.data, run.name, scoring['EVAL_FLIP']),
                             []).extend([] if found is None else [found])
    for data, names in SET_HEADS.items():
        rows = []
        for head in names:
            found = runs.get(f'{data}.{head}', [])
            rows.append([
                head, *(describe_range(cells[data, head, flip])
                        for flip in (False, True)),
                describe_mean(found, 'seconds'),
                describe_mean(found, 'memory_MB')])
        print_table([data, 'single-scale mIoU, %', 'MS + flip mIoU, %',
                     's a run', 'MB'], rows)
    rows = [['the default: T = 3, moving_avg, l2, no gradient',
             describe_range(cells['camvid', 'ema', False])]]
    rows += [[f'`{switch}`', describe_range(
        cells['camvid', switch.replace('=', '-'), False])]
        for switch in SWITCHES]
    print_table(['camvid, one change from the default',
                 'single-scale mIoU, %'], rows)


def long_scores(args, name, scoring, weights):
    """Return {seed: mIoU in per cent} of the long runs of a head."""
    known = read_results(args.to)
    found = {run.seed: find_score(known, run, scoring, weights)
             for run in plan_long(args.seeds) if run.name == f'long.{name}'}
    return {seed: mIoU for seed, mIoU in found.items() if mIoU is not None}


def long_curves(args, name, column):
    """Return the curves [(step, value)] of a head's seeds, of curves.csv;
    mIoU in per cent."""
    keys = [run.key for run in plan_long(args.seeds)
            if run.name == f'long.{name}']
    rows = [row for row in read_rows(args.to, 'curves.csv')
            if row['name'] in keys and row[column]]
    factor = 100 if 'mIoU' in column else 1
    return [[(int(row['step']), factor * float(row[column])) for row in part]
            for _, part in itertools.groupby(rows, lambda row: row['name'])]


def print_long(args):
    """Print the tables of the long runs."""
    columns = [(title, scoring, weights) for title, scoring
               in LONG_SCORED.items() for weights in WEIGHTS]
    titles = [f'{title}, {weights}' for title, _, weights in columns]
    print('\nmIoU in per cent: mean ± standard deviation (seeds)')
    print_table(['camvid', *titles], [
        [name, *(describe_spread([*long_scores(
            args, name, scoring, weights).values()])
            for _, scoring, weights in columns)]
        for name in LONG_HEADS])
    print('\nDifference of one seed, in points: mean ± standard error (seeds)')
    print_table(['camvid', *titles], [
        [f'{a} - {b}', *(describe_difference(*(
            long_scores(args, name, scoring, weights) for name in (a, b)))
            for _, scoring, weights in columns)] for a, b in PAIRS])
    print('\nT in evaluation, trained with T = 3; mIoU in per cent as above, '
          'beside the difference from T = 3')
    rows = []
    for t in STAGES:
        row = [str(t)]
        for weights in WEIGHTS:
            found, trained = (long_scores(args, 'ema', {
                **LONG_SCORED['test'], 'STAGE_NUM_EVAL': each}, weights)
                for each in (t, settings.STAGE_NUM))
            row += [describe_spread([*found.values()]),
                    describe_difference(found, trained)]
        rows.append(row)
    print_table(['T', 'test, net', 'from T = 3', 'test, average',
                 'from T = 3'], rows)
    print_training(args)


def print_training(args):
    """Print what the long runs cost, and whether their curves are flat."""
    runs, rows = read_runs(args.to), []
    for name in LONG_HEADS:
        curves, average, loss, seconds = (
            long_curves(args, name, column) for column in (
                'val_mIoU', 'val_mIoU_average', 'loss', 's_a_step'))
        steps = [np.median([y for _, y in curve]) for curve in seconds]
        found = runs.get(f'camvid.long.{name}', [])
        rows.append([
            name, *(describe_spread([final_rise(curve) for curve in each])
                    for each in (curves, average)),
            describe_spread([curve[-1][1] for curve in loss]),
            describe_spread(steps),
            describe_mean(found, 'memory_MB'),
            describe_mean(found, 'unit_weight', 4)])
    print('\nTraining: rise of mIoU on val over the last fifth of the steps, '
          'in points; loss since the validation before the last; mean size '
          "of the weights of the unit's last batch norm at the end")
    print_table(['camvid', 'rise, net', 'rise, average', 'loss', 's a step',
                 'MB', 'weight of the unit'], rows)


def draw_curves(args):
    """Write the mean curves of the long runs, not of their averaged weights,
    into args.figure."""
    found = {name: long_curves(args, name, 'val_mIoU') for name in LONG_HEADS}
    curves = {f'{name} ({len(each)})': np.mean(each, 0)
              for name, each in found.items() if each}
    if not curves:
        raise UserError(f'--figure {args.figure}: {args.to} has no curves.csv '
                        f'of long runs; run the comparison with --long')
    save_image(visualize.plot_curves(
        curves, 'step', "mIoU on CamVid's val, %"), args.figure)
