"""results.csv: a line for each evaluation, whole whoever else writes.

    python -m pytest tests/test_results.py
"""
import csv
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
import threading

import pytest
import torch
from PIL import Image

import eval
import heads
import settings
import utils
from conftest import refused
from lib import results

EMPTY = {'mIoU': 1, 'mF1': 1, 'classes': {}, 'precision': {}, 'recall': {},
         'F1': {}}


@pytest.fixture
def evaluate(monkeypatch):
    """Run eval.py's main in this process and folder."""
    def evaluate(*arguments):
        monkeypatch.setattr(sys, 'argv', ['eval.py', *arguments])
        eval.main()
    return evaluate


def read_lines():
    with open('results.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_a_line_holds_what_was_scored(small, tmp_path, monkeypatch, evaluate):
    """Twice, with two sets of weights; every column is read back."""
    folder = tmp_path / 'EMANet18, mine'
    folder.mkdir()
    monkeypatch.chdir(folder)
    net = heads.build_network()
    average = {k: v.flip(0) for k, v in net.state_dict().items()}
    torch.save({'net': net.state_dict(), 'average': average, 'step': 7,
                'classes': ['back ground', 'a, b', 'c: d', 'e', 'f', 'g'],
                'colours': [[9 * i] * 3 for i in range(6)]}, 'a.pth')
    evaluate('a.pth', 'EVAL_SCALES=0.5,1', 'EVAL_FLIP=True')
    first, second = read_lines()
    assert tuple(first) == results.COLUMNS
    with open('a.pth', 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    with open('logdir/eval/a/eval.json') as file:
        result = json.load(file)
    known = {'experiment': 'EMANet18, mine', 'checkpoint': 'a.pth',
             'sha256': digest[:12], 'weights': 'net', 'step': '7',
             'split': 'val', 'images': '5', 'scales': '0.5 1.0',
             'flip': 'True', 'window': '0', 'inference': 'folded',
             'mean_over': '', 'git': utils.git_hash(), 'stride': '16',
             'parent': utils.forked_from().get('parent', ''), 'stages': '3'}
    assert {name: first[name] for name in known} == known
    assert float(first['mIoU']) == pytest.approx(result['mIoU'], abs=1e-6)
    assert 0 < float(first['seconds']) < 60
    pairs = [pair.rsplit(': ', 1) for pair in first['IoU'].split('; ')]
    assert [name for name, _ in pairs] == list(result['classes'])
    for (_, text), iou in zip(pairs, result['classes'].values()):
        assert text == '-' if iou is None else float(text) == pytest.approx(
            iou, abs=1e-4)
    assert second['weights'] == 'average'
    assert float(second['mIoU']) == pytest.approx(
        result['average']['mIoU'], abs=1e-6)
    assert second['mIoU'] != first['mIoU']

    with open('results.csv', 'rb+') as file:    # an editor left no newline
        file.seek(-1, 2)
        file.truncate()
    evaluate('a.pth', 'EVAL_SCALES=1', 'EVAL_FLIP=False', 'STAGE_NUM_EVAL=5')
    assert [(row['scales'], row['stages']) for row in read_lines()] == (
        2 * [('0.5 1.0', '3')] + 2 * [('1.0', '5')])
    for name in ('confusion', 'classes'):
        with Image.open(f'logdir/eval/a/{name}.png') as page:
            assert page.format == 'PNG' and min(page.size) > 150
            page.load()


def test_a_network_without_a_unit_has_no_stages(small, evaluate):
    settings.HEAD = 'no_ema'
    torch.save({'net': heads.build_network().state_dict(), 'step': 1,
                'settings': settings.as_dict()}, 'a.pth')
    settings.HEAD = 'ema'
    evaluate('a.pth', 'STAGE_NUM_EVAL=5')
    assert [row['stages'] for row in read_lines()] == ['']


def append_twenty(number):
    result = {**EMPTY, 'classes': {f'class {i}': 0.25 for i in range(99)}}
    for i in range(20):
        results.append_result({'step': 100 * number + i}, 'net', result, 1.0)


def test_runs_that_end_at_once_tear_no_lines(small, monkeypatch):
    monkeypatch.setattr(results, 'git_hash', lambda: 'abc')
    with multiprocessing.get_context('fork').Pool(6) as pool:
        pool.map(append_twenty, range(6), 1)
    assert sorted(int(row['step']) for row in read_lines()) == sorted(
        100 * n + i for n in range(6) for i in range(20))
    assert len({row['IoU'] for row in read_lines()}) == 1

    size, writer = os.path.getsize('results.csv'), threading.Thread(
        target=append_twenty, args=[6])
    with open('results.csv', 'a') as file:      # another run has its turn
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        assert os.path.getsize('results.csv') == size
    writer.join(30)
    assert len(read_lines()) == 140


OLDER = ('experiment,checkpoint,step,mIoU,IoU\n'
         '"a, b",ä.pth,7,0.25,"x: 0.5; y: 0"\n'
         '\nc,d.pth,,0.5,\n')


@pytest.mark.parametrize('content', (
    OLDER.encode(), OLDER[:-1].encode(), OLDER.encode('utf-16'),
    OLDER.replace('\n', '\r\n').encode('utf-8-sig')))
def test_an_older_file_gains_empty_columns(content, tmp_path, monkeypatch):
    """Also one that an editor has saved in another encoding; and a link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'shared.csv').write_bytes(content)
    os.symlink('shared.csv', 'results.csv')
    results.append_result({'step': 3}, 'net', EMPTY, 1)
    first, second, last = read_lines()
    assert os.path.islink('results.csv') and tuple(first) == results.COLUMNS
    assert {name: value for name, value in first.items() if value} == {
        'experiment': 'a, b', 'checkpoint': 'ä.pth', 'step': '7',
        'mIoU': '0.25', 'IoU': 'x: 0.5; y: 0'}
    assert second['mIoU'] == '0.5' and last['step'] == '3'
    before = os.stat('shared.csv').st_ino
    results.append_result({'step': 4}, 'net', EMPTY, 1)
    assert os.stat('shared.csv').st_ino == before       # added to, no more
    assert len(read_lines()) == 4


def test_a_line_goes_to_the_file_that_is_there(tmp_path, monkeypatch):
    """Another run replaces the file, while this one waits for the lock."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'new').write_text(results.HEADER)
    writer = threading.Thread(target=append_twenty, args=[0])
    with open('results.csv', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        os.replace('new', 'results.csv')
    writer.join(30)
    assert len(read_lines()) == 20


@pytest.mark.parametrize('content, named', (
    ('mIoU;seconds\n0.8;12\n', 'mIoU;seconds'),
    ('experiment,mIoU,note\na,0.5,good\n', 'note'),
    ('experiment,mIoU\na,0.5,6\n', 'a line is longer'),
    ('a,' + 200_000 * 'b', 'limit')))
def test_a_file_of_others_is_refused_and_stays(content, named, tmp_path,
                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'results.csv').write_text(content)
    for _ in range(2):              # the lock is free again
        with pytest.raises(utils.UserError, match='results.csv has other '
                           'columns than those of eval.py') as error:
            results.open_results()
        assert named in str(error.value) and 'move it away' in str(
            error.value) and '\n' not in str(error.value)
    assert (tmp_path / 'results.csv').read_text() == content
    assert os.listdir() == ['results.csv']


def test_what_cannot_be_kept_is_refused_before_scoring(small, monkeypatch,
                                                       capsys):
    monkeypatch.setattr(eval, 'score', None)
    torch.save({'net': heads.build_network().state_dict(), 'step': 1},
               'a.pth')
    with open('results.csv', 'w') as file:
        file.write('mIoU;seconds\n0.8;12\n')
    status, line = refused(eval.main, 'a.pth', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and 'results.csv has other columns' in line
    assert 'move it away' in line
    os.remove('results.csv')
    os.mkdir('results.csv')
    status, line = refused(eval.main, 'a.pth', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 1 and 'results.csv cannot be written' in line
