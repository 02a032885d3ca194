"""The table that compares experiments, by folders of every state.

    python -m pytest tests/test_compare_runs.py
"""
import csv
import os
import shutil
import sys

import numpy as np
import pytest

import settings
import train
from conftest import REPO, SMALL, refused, run_tool, words
from lib.checkpoint import save
from tools import compare_runs
from tools.measure import markdown_table

HEAD = b'step,loss,lr,grad_norm,val_mIoU,val_mIoU_average,images_per_s'


@pytest.fixture
def experiments(small, tmp_path, monkeypatch):
    """A folder of two sibling experiments, trained for 4 steps."""
    around, root = tmp_path / 'around', settings.DATA_ROOT
    before = settings.as_dict()
    monkeypatch.setattr(train, 'validation_images', lambda *_: ())
    for name, changes in (('EMANet18', {}),
                          ('EMANet18.t1', {'STAGE_NUM': 1, 'LR': 0.002})):
        (around / name).mkdir(parents=True)
        shutil.copy(os.path.join(REPO, 'settings.py'), around / name)
        monkeypatch.chdir(around / name)
        vars(settings).update(before)
        monkeypatch.setattr(sys, 'argv', ['train.py', *words(
            {'DATA_ROOT': root, 'ITER_VAL': 2, 'EVAL_SCALES': 0.5,
             **changes})])
        train.main()
        settings._given.clear()
    return around


@pytest.fixture
def compare(capsys):
    """Compare a folder; return ({experiment: {column: cell}}, the lines below
    the table)."""
    def compare(folder):
        capsys.readouterr()
        compare_runs.compare(str(folder))
        return parse(capsys.readouterr().out)
    return compare


def parse(out):
    head, _, *lines = out.splitlines()
    rows = [dict(zip(split(head), split(line), strict=True))
            for line in lines if line[0] == '|']
    return ({row.pop('experiment'): row for row in rows},
            [line for line in lines if line[0] != '|'])


def split(line):
    return [cell.strip() for cell in line.strip('|').split(' | ')]


def write_experiment(folder, lines=(), where='logdir', **changes):
    """Write an experiment's folder, and a log of these lines, by hand."""
    folder.mkdir(exist_ok=True)
    values = {**SMALL, 'LR': 0.01, 'SCALES': (0.5, 1.0), 'LOG_DIR': 'logdir',
              'MODEL_DIR': 'models', **changes}
    (folder / 'settings.py').write_text('"""A text."""\n' + ''.join(
        f'{name} = {value!r}    # a comment\n'
        for name, value in values.items()))
    if lines:
        (folder / where).mkdir(parents=True)
        (folder / where / 'log.csv').write_bytes(b'\n'.join(lines))


# ------------------------------------------------- real runs
@pytest.mark.long
def test_trained_experiments_are_compared(experiments, compare):
    """As a user does; what the command line set counts, not settings.py."""
    done = run_tool('compare_runs', '..', cwd=experiments / 'EMANet18')
    assert done.returncode == 0, done.stderr
    rows, below = compare(experiments)
    assert parse(done.stdout) == (rows, below) and not below
    assert list(rows) == sorted(
        rows, key=lambda name: -float(rows[name]['best mIoU, %']))
    for name, row in rows.items():
        with open(experiments / name / 'logdir' / 'log.csv') as file:
            log = list(csv.DictReader(file))
        best, at = max((float(line['val_mIoU']), -int(line['step']))
                       for line in log if line['val_mIoU'])
        assert (row['steps'], row['at step']) == ('4 of 4', str(-at))
        assert row['best mIoU, %'] == f'{100 * best:.2f}'
        assert float(row['images/s']) == pytest.approx(np.median(
            [float(line['images_per_s']) for line in log]), abs=0.06)
    assert [*rows['EMANet18'].items()][4:] == [('STAGE_NUM', '3'),
                                               ('LR', '0.009')]
    assert [*rows['EMANet18.t1'].items()][4:] == [('STAGE_NUM', '1'),
                                                  ('LR', '0.002')]
    os.remove(experiments / 'EMANet18.t1' / 'logdir' / 'settings.json')
    assert compare(experiments)[0] == rows      # by its checkpoint


# ------------------------------------------------- folders by hand
@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Experiments of every state: finished, garbled, not run, of a seed's
    folder, of 2019; and folders that are none."""
    write_experiment(tmp_path / 'a', [
        HEAD, b'1,2.0,0.01,9,,,4', b'2,1,0.01,9,0.25,0.5,6',
        b'3,1,0.01,9,0.3,0.4,5'])
    write_experiment(tmp_path / 'b', [
        HEAD, b'10,nan,0.01,,nan,,inf', b'11,0.\x00', b'\xff\xfe,"', b'1'],
        LR=0.02)
    write_experiment(tmp_path / 'c', SCALES=(0.5,), DEVICES=[], NEW='x|y z')
    write_experiment(tmp_path / 'd', [HEAD], where='logdir/seed 2')
    for name, text in (
            ('e', 'import os\nos.mkdir("run")\nITER_MAX = 30000\n'
                  'LOG_DIR = "./logdir"\nMEAN = torch.Tensor([0.5])\n'
                  'DEVICES = list(range(4))\n'),
            ('site', 'DEBUG = True'), ('torn', 'ITER_MAX = (')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'settings.py').write_text(text)
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_progress_of_every_state_is_read(folders, compare):
    rows, below = compare('.')
    columns = 'steps', 'best mIoU, %', 'at step', 'images/s'
    assert {name: [row[column] for column in columns]
            for name, row in rows.items()} == {
        'a': ['3 of 4', '50.00', '2', '5.0'],
        'b': ['11 of 4', '-', '-', '-'],
        'c': ['not run', '-', '-', '-'],
        'd/seed 2': ['not run', '-', '-', '-'],
        'e': ['not run', '-', '-', '-']}
    assert list(rows) == ['a', 'b', 'c', 'd/seed 2', 'e']
    assert below == [f'{name}: its settings are those that settings.py has '
                     f'now' for name in 'ab']


def test_a_folder_that_was_not_started_adds_no_column(folders, compare):
    """Its settings.py may differ in all: they are not those of a run."""
    rows, _ = compare('.')
    assert [*rows['a']][4:] == ['LR']
    assert {name: row['LR'] for name, row in rows.items()} == {
        'a': '0.01', 'b': '0.02', 'c': '-', 'd/seed 2': '?', 'e': '-'}


def test_each_setting_that_varies_has_a_column(folders, compare):
    for name in 'ce':
        (folders / name / 'logdir').mkdir()
        (folders / name / 'logdir' / 'log.csv').write_bytes(HEAD)
    rows, _ = compare('.')

    def column(name):
        return [row[name] for row in rows.values()]
    assert column('LR') == ['0.01', '0.02', '0.01', '?', '?']
    assert column('SCALES') == ['0.5,1.0', '0.5,1.0', '0.5', '?', '?']
    assert column('ITER_MAX') == ['4', '4', '4', '?', '30000']
    assert column('DEVICES') == ['?', '?', '[]', '?', 'list(range(4))']
    assert column('NEW') == ['?', '?', r'x\|y z', '?', '?']
    assert column('PRETRAINED') == ["''", "''", "''", '?', '?']
    assert not {'LOG_DIR', 'MODEL_DIR'} & set(rows['a'])
    shutil.rmtree('e')
    rows, _ = compare('.')          # all that are known agree on ITER_MAX
    assert [*rows['a']][4:] == ['LR', 'SCALES', 'DEVICES', 'NEW']


def test_settings_of_other_folders_are_not_run(folders, compare):
    compare('.')
    assert not os.path.exists('run')


def test_one_experiment_and_a_folder_of_logs_are_taken(folders, compare):
    rows, _ = compare('a')
    assert [*rows] == ['a'] and len(rows['a']) == 4
    rows, _ = compare('d/logdir')
    assert list(rows) == ['logdir/seed 2']


@pytest.mark.parametrize('garbage', ('[1, 2', '[1]', '7', '',
                                     '[' * 99999))
def test_garbled_settings_do_no_harm(folders, compare, garbage):
    """What the run recorded cannot be read: its checkpoint's count, and of
    one that cannot be read either, settings.py's."""
    (folders / 'a' / 'logdir' / 'settings.json').write_text(garbage)
    assert compare('.')[0]['a']['LR'] == '0.01'
    save({'settings': {'LR': 0.5}}, 'a/models/latest.pth')
    assert compare('.')[0]['a']['LR'] == '0.5'
    (folders / 'a' / 'models' / 'final.pth').write_bytes(b'PK torn')
    assert compare('.')[0]['a']['LR'] == '0.5'


def test_a_folder_without_experiments_is_refused(tmp_path, monkeypatch,
                                                 capsys):
    for folder, text in ((tmp_path, f'{tmp_path} holds no experiment'),
                         ('gone', 'gone is no folder')):
        status, line = refused(compare_runs.main, folder,
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and text in line


def test_experiments_that_were_not_started_are_refused(folders, monkeypatch,
                                                       capsys):
    for name in 'abd':
        shutil.rmtree(name)
    status, line = refused(compare_runs.main, '.', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and '. holds 2 experiments, but none has a' in line
    assert 'python train.py in c' in line


@pytest.mark.parametrize('text', (
    r"ITER_MAX, LOG_DIR = 1, '\d'", 'LOG_DIR = {[]: 1}\nITER_MAX = 2',
    'LOG_DIR = ' + '(' * 300 + ')' * 300, 'ITER_MAX = 1 is 1; LOG_DIR = None',
    '\0', 'x = ' + '-' * 9999 + '1'))
def test_other_projects_do_no_harm(folders, compare, text, recwarn):
    """Nor their logs, which have no steps."""
    (folders / 'x' / 'logs').mkdir(parents=True)
    (folders / 'x' / 'settings.py').write_text(text)
    (folders / 'a' / 'logdir' / 'old').mkdir()
    (folders / 'a' / 'logdir' / 'old' / 'log.csv').write_text('epoch,loss\n')
    rows, _ = compare('.')
    assert rows['a']['best mIoU, %'] == '50.00' and 'a/old' not in rows
    assert rows.get('x', {'LR': '-'})['LR'] == '-' and not recwarn.list


def test_it_takes_a_folder_alone(monkeypatch, capsys):
    status, line = refused(compare_runs.main, '..', 'LR=0.1',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'LR=0.1' in line


def test_a_table_is_aligned():
    assert markdown_table(['a', 'bcd'], [['x|y', ''], ['long', '1']]) == (
        '| a    | bcd |\n| ---- | --- |\n'
        '| x\\|y |     |\n| long | 1   |')
