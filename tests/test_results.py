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
import utils
from conftest import refused
from lib import results


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
    with open('logdir/eval.json') as file:
        result = json.load(file)
    known = {'experiment': 'EMANet18, mine', 'checkpoint': 'a.pth',
             'sha256': digest[:12], 'weights': 'net', 'step': '7',
             'split': 'val', 'images': '5', 'scales': '0.5 1.0',
             'flip': 'True', 'window': '0', 'inference': 'folded',
             'mean_over': '', 'git': utils.git_hash(), 'stride': '16'}
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
    evaluate('a.pth', 'EVAL_SCALES=1', 'EVAL_FLIP=False')
    assert [row['scales'] for row in read_lines()] == (
        2 * ['0.5 1.0'] + 2 * ['1.0'])
    for name in ('confusion', 'classes'):
        with Image.open(f'logdir/{name}.png') as page:
            assert page.format == 'PNG' and min(page.size) > 150
            page.load()


def append_twenty(number):
    result = {'mIoU': 0.5, 'classes': {f'class {i}': 0.25 for i in range(99)}}
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
