"""The comparison of heads: its statistics by hand, its plans, and that a
comparison that was stopped is resumed and repeats nothing.

    python -m pytest tests/test_compare_heads.py [-m long]
"""
import argparse
import csv
import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import network
import settings
from conftest import SMALL, refused
from lib import results
from tools import compare_heads, comparison
from utils import RunError, UserError

EMPTY = {'mF1': 1, 'classes': {}, 'precision': {}, 'recall': {}, 'F1': {}}


def read_table(out, title, row):
    """Return the cells of a row of the first table whose head has title."""
    lines = out[out.index(f'| {title}'):].split('\n\n')[0].splitlines()
    return next(cells for name, *cells in (
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in lines) if name == row)


# ------------------------------------------------- statistics
def test_paired_differences_by_hand():
    """Of 2, 1 and 0: mean 1, standard deviation 1, error 1 / sqrt(3)."""
    first, second = {1: 3.0, 2: 5.0, 3: 4.0}, {3: 4.0, 2: 4.0, 1: 1.0, 4: 9.0}
    mean, error, n = comparison.paired_difference(first, second)
    assert (mean, n) == (1, 3) and error == pytest.approx(3 ** -0.5)
    assert comparison.paired_difference(second, first)[0] == -1
    assert comparison.paired_difference({1: 3.0}, second) == (2, None, 1)
    assert comparison.paired_difference({7: 3.0}, second) == (None, None, 0)
    for seeds, text in ((first, '+1.00 ± 0.58 (3)'), ({1: 3.0},
                        '+2.00 ± - (1)'), ({}, 'not run')):
        assert comparison.describe_difference(seeds, second) == text


def test_the_spread_and_the_rise_by_hand():
    """Spread: of 1, 2 and 6, squares 4 + 1 + 9 over 2. Rise: from step 40."""
    assert comparison.describe_spread([1.0, 2.0, 6.0]) == '3.00 ± 2.65 (3)'
    assert comparison.describe_spread([1.0]) == '1.00 ± - (1)'
    assert comparison.describe_spread([]) == 'not run'
    curve = [(10, 1.0), (20, 2.0), (30, 9.0), (40, 6.0), (50, 7.5)]
    assert comparison.final_rise(curve) == 1.5
    assert comparison.final_rise(curve[:1]) == 0


# ------------------------------------------------- plans
def test_pairs_differ_in_the_head_alone():
    plan = comparison.plan_long(5)
    names = [run.name for run in plan[:21]]         # the others score alone
    assert {name: names.count(f'long.{name}')
            for name in comparison.LONG_HEADS} == {
        'ema': 5, 'no_ema': 5, 'nonlocal': 3, 'learned': 2, 'zero': 3,
        'grad': 1, 'ema_2400': 1, 'no_ema_2400': 1}
    assert [run.key for run in plan[:6]] == [
        f'camvid.long.{name}' for name in (
            'ema.1', 'no_ema.1', 'ema.2', 'no_ema.2', 'ema.3', 'no_ema.3')]
    ema, no_ema = plan[:2]
    assert {name for name in ema.changes if ema.changes[name]
            != no_ema.changes[name]} == {'HEAD'}
    assert [*ema.changes] == [*no_ema.changes] and ema.seed == no_ema.seed
    assert ema.scorings == no_ema.scorings
    again = plan[21:]
    assert len({run.key for run in plan[:21]}) == 21
    once = 'long.grad', 'long.ema_2400', 'long.no_ema_2400'
    assert [scoring['STAGE_NUM_EVAL'] for run in again[:5]
            for scoring in run.scorings] == 5 * [1, 2, 4, 5, 6, 7, 8]
    assert [run.name for run in again[5:]] == [
        name for name in names if name not in once]
    for a, b in comparison.PAIRS:
        assert {f'long.{a}', f'long.{b}'} <= {run.name for run in plan}
    for run in plan + comparison.plan_short(2):     # each word is a setting
        settings.override([f'{name}={value}' for changes in (
            comparison.RECIPE, run.changes, *run.scorings)
            for name, value in changes.items()])
        settings.validate(for_training=True)


def test_scores_are_found_by_what_was_scored(tmp_path, monkeypatch):
    """By T too, but for a file of an older version, which has no T."""
    monkeypatch.chdir(tmp_path)
    run, *_, multi_scale = comparison.plan_long(1)
    (test, val), (multi_scale,) = run.scorings, multi_scale.scorings
    other = {**test, 'STAGE_NUM_EVAL': 1}
    older = {'checkpoint': run.final, 'split': 'val', 'scales': '0.5',
             'flip': False}
    results.append_result(older, 'net', {**EMPTY, 'mIoU': 0.25}, 1)
    for stages in (3, 1):
        results.append_result({**older, 'split': 'test', 'stages': [stages]},
                              'average', {**EMPTY, 'mIoU': stages / 10}, 1)
    known = comparison.read_results('.')
    assert comparison.find_score(known, run, val) == 25
    assert comparison.find_score(known, run, test) is None
    assert comparison.find_score(known, run, multi_scale, 'average') is None
    assert comparison.find_score(known, run, test, 'average') == 30
    assert comparison.find_score(known, run, other, 'average') == 10


# ------------------------------------------------- a whole comparison
@pytest.fixture
def camvid(toy, tmp_path, monkeypatch):
    """The toy set in CamVid's place, with a test split; the comparison is to
    be in the folder 'compare' of an empty one."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / 'camvid'
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    for part in ('JPEGImages', 'SegmentationClassAug', 'classes.txt'):
        (root / part).symlink_to(os.path.join(toy, part))
    for split, source in (('train', 'train'), ('val', 'val'),
                          ('test', 'val')):
        with open(os.path.join(toy, 'ImageSets', 'Segmentation',
                               f'{source}.txt')) as file:
            (lists / f'{split}.txt').write_text(file.read())
    net = network.ResNet(18, 16, 'plain')
    torch.save({'conv1.weight': net[0].weight.detach()}, 'resnet.pth')
    return 'camvid'


@pytest.fixture
def compare(camvid, monkeypatch, capsys):
    """Run the long comparison on it; return what it printed."""
    def compare(*arguments):
        monkeypatch.setattr(sys, 'argv', [
            'compare_heads.py', '--long', '--camvid', camvid, '--weights',
            'resnet.pth', '--jobs', '1', *arguments])
        compare_heads.main()
        return capsys.readouterr().out
    return compare


class Scripts:
    """In place of train.py and eval.py: what they leave, in no time.

    mIoU in per cent is 40 for ema and 42 for no_ema, the seed added; ema has
    its distance from T = 3 less; averaged weights have 1 more.
    """

    def __init__(self, stop_at):
        self.calls, self.stop_at = [], stop_at

    def execute(self, args, key, script, *words, **changes):
        if len(self.calls) == self.stop_at:
            raise RunError('stopped')
        self.calls.append((key, script, changes))
        getattr(self, script[:-3])(args.to, key, changes)
        return 60.0, 1000.0

    def train(self, folder, key, changes):
        for part in ('models', 'logdir'):
            os.makedirs(os.path.join(folder, part, key))
        net = {'fc0.bn.weight': torch.ones(2)}
        if '.ema.' in key:
            net.update({'emau.conv2.0.weight': torch.ones(2, 2, 1, 1),
                        'emau.conv2.1.weight': torch.tensor([-1.5, 1.0])})
        torch.save({'net': net},
                   os.path.join(folder, 'models', key, 'final.pth'))
        with open(os.path.join(folder, 'logdir', key, 'log.csv'), 'w') as file:
            writer = csv.writer(file)
            writer.writerow(('step', 'loss', 'val_mIoU', 'val_mIoU_average',
                             'images_per_s'))
            for step in range(1, 11):
                val = (step / 40, step / 50) if step % 2 == 0 else ('', '')
                writer.writerow((step, 2 - step / 10, *val, 4))

    def eval(self, folder, key, changes):
        _, _, head, seed = key.split('.')
        stages = changes.get('STAGE_NUM_EVAL', 3)
        mIoU = (42 + int(seed) if head == 'no_ema'
                else 40 + int(seed) - abs(stages - 3))
        before = os.getcwd()
        os.chdir(folder)
        for weights in comparison.WEIGHTS:
            results.append_result({
                'checkpoint': f'models/{key}/final.pth',
                'split': changes['VAL_SPLIT'],
                'scales': changes['EVAL_SCALES'].split(','),
                'flip': changes['EVAL_FLIP'],
                'stages': [stages] if head != 'no_ema' else []}, weights,
                {**EMPTY, 'mIoU': (mIoU + (weights == 'average')) / 100}, 1)
        os.chdir(before)


@pytest.mark.parametrize('stop_at', (0, 1, 4, 13, 14))
def test_a_stopped_comparison_is_resumed(stop_at, compare, monkeypatch):
    """Wherever it stops, no script runs twice, and the tables are those of
    one that did not stop."""
    scripts = Scripts(stop_at)
    monkeypatch.setattr(compare_heads, 'execute', scripts.execute)
    monkeypatch.setattr(comparison, 'LONG_HEADS', {
        name: ({'HEAD': name}, 2) for name in ('ema', 'no_ema')})
    monkeypatch.setattr(comparison, 'PAIRS', [('ema', 'no_ema')])
    with pytest.raises(RunError, match='stopped'):
        compare()
    scripts.stop_at = None
    out = compare('--figure', 'curves.png')
    assert len(scripts.calls) == 2 * (1 + 10) + 2 * (1 + 3)
    assert len({str(call) for call in scripts.calls}) == len(scripts.calls)
    table = compare('--table')
    assert out.endswith(table) and compare().endswith(table)
    assert len(scripts.calls) == 2 * (1 + 10) + 2 * (1 + 3)

    assert read_table(out, 'camvid', 'ema')[:2] == ['41.50 ± 0.71 (2)',
                                                    '42.50 ± 0.71 (2)']
    assert read_table(out[out.index('Difference'):], 'camvid',
                      'ema - no_ema') == 6 * ['-2.00 ± 0.00 (2)']
    assert read_table(out, 'T  ', '5') == [
        '39.50 ± 0.71 (2)', '-2.00 ± 0.00 (2)', '40.50 ± 0.71 (2)',
        '-2.00 ± 0.00 (2)']
    training = out[out.index('Training: '):]
    assert read_table(training, 'camvid', 'no_ema') == [
        '5.00 ± 0.00 (2)', '4.00 ± 0.00 (2)', '1.05 ± 0.00 (2)',
        '2.00 ± 0.00 (2)', '1000', '-']     # from step 8; of steps 9, 10
    assert read_table(training, 'camvid', 'ema')[-1] == '1.2500'
    assert 'nonlocal' not in training
    with Image.open('curves.png') as page:
        assert min(page.size) > 200
    with open('compare/curves.csv', newline='') as file:
        assert len(list(csv.DictReader(file))) == 4 * 5


def test_after_a_failure_no_run_starts(monkeypatch):
    """But what runs beside it ends."""
    begun, ended = [], []

    def carry_out(run, args):
        begun.append(run)
        if run == 'b':
            raise RunError('b failed')
        time.sleep(0.2)
        ended.append(run)
    monkeypatch.setattr(compare_heads, 'carry_out', carry_out)
    with pytest.raises(RunError, match='b failed'):
        compare_heads.carry_out_all('abcd', argparse.Namespace(jobs=2))
    assert begun == ['a', 'b'] and ended == ['a']


@pytest.mark.long
def test_a_long_comparison_by_its_scripts(compare, monkeypatch):
    """Training, cut off after two of four steps, is resumed."""
    small = {name: value for name, value in SMALL.items()
             if name not in ('TRAIN_SPLIT', 'N_CLASSES', 'PRETRAINED')}
    for name, value in small.items():
        monkeypatch.setitem(comparison.RECIPE, name, value)
    for name, value in {'ITER_MAX': 4, 'ITER_VAL': 2, 'ITER_SAVE': 2}.items():
        monkeypatch.setitem(comparison.LONG, name, value)
    monkeypatch.setitem(comparison.SETS, 'camvid', {
        'N_CLASSES': 6, 'TRAIN_SPLIT': 'train'})
    monkeypatch.setattr(comparison, 'LONG_HEADS', {
        name: ({'HEAD': name}, 1) for name in ('ema', 'no_ema')})
    monkeypatch.setattr(comparison, 'PAIRS', [('ema', 'no_ema')])
    monkeypatch.setattr(comparison, 'STAGES', range(3, 5))
    inner = compare_heads.execute

    def cut_off(*arguments, **changes):
        inner(*arguments, **changes)
        folder = f'compare/models/{arguments[1]}'
        os.replace(f'{folder}/step_2.pth', f'{folder}/latest.pth')
        os.remove(f'{folder}/final.pth')
        raise RunError('cut off')
    monkeypatch.setattr(compare_heads, 'execute', cut_off)
    with pytest.raises(RunError, match='cut off'):
        compare()
    monkeypatch.setattr(compare_heads, 'execute', inner)
    out = compare()
    with open('compare/camvid.long.ema.1.log') as file:
        assert 'models/camvid.long.ema.1/latest.pth' in file.read()
    with open('compare/results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['step'] for row in rows} == {'4'}
    assert [row['stages'] for row in rows] == (
        4 * ['3'] + 4 * [''] + 2 * ['4'] + 2 * ['3'] + 2 * [''])
    with open('compare/curves.csv', newline='') as file:
        assert [row['step'] for row in csv.DictReader(file)] == 2 * ['2', '4']
    assert 'not run' not in out and compare('--table') in out


# ------------------------------------------------- the command line
@pytest.mark.parametrize('given, threads', (({}, '2'),
                                            ({'OMP_NUM_THREADS': '1'}, '1')))
def test_threads_are_those_of_the_environment(given, threads, tmp_path,
                                              monkeypatch):
    """Where it names none, the runs share the cores."""
    found = []

    def start(*words, env, **options):
        found.append(env['OMP_NUM_THREADS'])
        return subprocess.Popen(['true'])
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, 'cpu_count', lambda: 6)
    monkeypatch.setattr(compare_heads, 'start_script', start)

    class Args:
        to, jobs = str(tmp_path), 3
    compare_heads.execute(Args, 'key', 'train.py')
    assert found == [threads]


@pytest.mark.parametrize('arguments, message', (
    (['--long', '--animals', 'camvid'], '--long compares on CamVid'),
    (['--long', '--table', '--figure', 'a.png'], 'has no curves.csv')))
def test_what_the_long_comparison_lacks_is_named(
        arguments, message, camvid, monkeypatch, capsys):
    status, line = refused(compare_heads.main, '--weights', 'resnet.pth',
                           *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert status == UserError.exit_status and message in line
