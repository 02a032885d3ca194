"""Do programs end as they should, files survive crashes, scores come out by
hand?

    python -m pytest tests/test_utils.py
"""
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

import settings
import utils
from conftest import REPO, refused
from files import contents
from lib import checkpoint


# ------------------------------------------------- how a program ends
@pytest.mark.parametrize('kind, status', [
    (utils.UserError, 2), (utils.RunError, 1), (settings.SettingError, 2)])
def test_errors_for_the_user_end_in_one_line(kind, status, monkeypatch,
                                             capsys):
    def main():
        raise kind('what, and the remedy')
    assert refused(main, monkeypatch=monkeypatch, capsys=capsys) == (
        status, 'script.py: what, and the remedy')


@pytest.mark.parametrize('kind', [
    ValueError, OSError, FileNotFoundError, RuntimeError, KeyError,
    AssertionError])
def test_any_other_error_keeps_its_traceback(kind, capsys):
    def main():
        raise kind('a defect')
    with pytest.raises(kind):                # SystemExit would be none
        utils.run_main(main)
    assert capsys.readouterr().err == ''
    assert utils.explain(kind('a defect')) == (None, 1)


def test_a_full_disk_is_no_defect():
    """Wherever it is noticed, such as in a log that the shell writes."""
    error = OSError(errno.ENOSPC, 'No space left on device')
    assert utils.explain(error) == (
        f'the disk is full ({error}); make room', 1)


def test_real_faults_end_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    for call, status in (
            (lambda: checkpoint.load(tmp_path / 'gone'), 2),
            (lambda: checkpoint.save({}, str(tmp_path / 'file' / 'x')), 1)):
        code, line = refused(call, monkeypatch=monkeypatch, capsys=capsys)
        assert code == status and str(tmp_path) in line


def test_ctrl_c_ends_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        utils.run_main(main)
    assert stop.value.code == utils.INTERRUPTED
    assert capsys.readouterr().err.endswith(': interrupted\n')
    # another one, while Python ends, prints no traceback
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_good_end_is_left_alone():
    assert utils.run_main(lambda: None) is None


def test_loader_processes_end_with_the_program():
    process = torch.multiprocessing.get_context('fork').Process(
        target=signal.pause, daemon=True)
    process.start()
    utils.run_main(lambda: None)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


def test_bars_are_closed_before_the_line(monkeypatch, capsys):
    bars = []

    def main():
        bars.append(utils.progress(total=3))
        raise utils.UserError('what, and the remedy')
    refused(main, monkeypatch=monkeypatch, capsys=capsys)
    assert bars[0].disable                   # what close() leaves behind


@pytest.mark.parametrize('kind', (ConnectionResetError, EOFError,
                                  FileNotFoundError))
def test_a_loader_process_that_dies_while_its_batch_is_fetched(kind):
    """Where Python's sharing of open files fails, and only there."""
    for file, is_known in (('/x/multiprocessing/resource_sharer.py', True),
                           ('/x/train.py', False)):
        try:
            exec(compile('raise kind()', file, 'exec'), {'kind': kind})
        except kind as error:
            line, status = utils.explain(error)
        assert status == 1
        assert (line or '').startswith('a loader process died') == is_known


def test_out_of_memory_names_the_settings_that_help():
    line, status = utils.explain(torch.OutOfMemoryError(
        'CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total '
        'capacity of 79.11 GiB of which 1.00 GiB is free.\nSee docs'))
    assert status == 1 and '\n' not in line
    assert line.startswith('CUDA out of memory. Tried to allocate 2.50 GiB. ')
    for name in ('BATCH_SIZE', 'ACCUM', 'CROP_SIZE', 'RECOMPUTE'):
        assert name in line and name in settings.as_dict()


@pytest.mark.parametrize('text', [
    'DataLoader worker (pid 7) is killed by signal: Killed. \nmore',
    'DataLoader worker (pid(s) 7, 8) exited unexpectedly'])
def test_a_lost_loader_process_is_said(text):
    line, status = utils.explain(RuntimeError(text))
    assert status == 1 and 'NUM_WORKERS' in line
    assert line.startswith(f'a loader process died ({text.splitlines()[0]}')
    assert utils.explain(ValueError(text)) == (None, 1)


@pytest.mark.parametrize('error', [
    torch.distributed.DistBackendError('NCCL error\nmore'),
    RuntimeError('[../third_party/gloo/gloo/pair.cc:534] Connection closed')],
    ids=['nccl', 'gloo'])
def test_a_lost_peer_is_said(error, monkeypatch):
    assert utils.explain(error) == (None, 1)         # alone: a defect
    for name, value in (('RANK', 1), ('LOCAL_RANK', 1), ('WORLD_SIZE', 2)):
        monkeypatch.setenv(name, str(value))
    first = str(error).splitlines()[0]
    assert utils.explain(error) == (
        f'process 1 lost another process ({first})', 1)
    assert utils.explain(RuntimeError('else')) == (None, 1)


@pytest.mark.parametrize('kind, status', [
    (utils.UserError, 2), (utils.RunError, 1)])
def test_an_error_of_a_loader_process_is_one_line(kind, status):
    """A DataLoader raises it again, with a traceback for its text."""
    try:
        raise kind('a.jpg: what, and the remedy')
    except kind:
        caught = ExceptionWrapper(where='in DataLoader worker process 0')
    with pytest.raises(kind) as error:
        caught.reraise()
    assert 'Traceback' in str(error.value)
    assert utils.explain(error.value) == ('a.jpg: what, and the remedy',
                                          status)


TWO = '''
import os, signal, sys
import torch
import torch.distributed as dist
import utils
from lib import distributed

def main():
    distributed.join([torch.device('cpu')] * 2)
    if sys.argv[1] == 'both':
        raise utils.UserError('what, and the remedy')
    dist.all_reduce(torch.zeros(1))
    if utils.rank():
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))

utils.run_main(main)
'''


def run_two(folder, *arguments, **changes):
    (folder / 'two.py').write_text(TWO)
    return subprocess.Popen(
        [sys.executable, 'two.py', *arguments], cwd=folder, text=True,
        stderr=subprocess.PIPE, env={
            **os.environ, 'PYTHONPATH': REPO, 'OMP_NUM_THREADS': '1',
            **changes})


def test_what_two_processes_say_is_said_once(tmp_path):
    process = run_two(tmp_path, 'both')
    lines = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2
    assert lines.count('two.py: what, and the remedy') == 1
    assert not [line for line in lines if 'Traceback' in line]


def test_a_process_that_lost_its_peer_says_so(tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        shared = {'MASTER_ADDR': 'localhost', 'WORLD_SIZE': '2',
                  'MASTER_PORT': str(free.getsockname()[1])}
    first, second = (run_two(tmp_path, 'one', **shared, RANK=str(i),
                             LOCAL_RANK=str(i)) for i in range(2))
    second.communicate(timeout=120)
    text = first.communicate(timeout=120)[1]
    assert second.returncode == -signal.SIGKILL and first.returncode == 1
    last = text.splitlines()[-1]
    assert last.startswith('two.py: process 0 lost another process (')
    assert 'Traceback' not in text


def test_an_optional_module_that_is_missing_is_named():
    assert utils.import_optional('json.decoder').JSONDecoder
    with pytest.raises(utils.UserError, match=(
            '^nowhere is needed for this: python -m pip install nowhere$')):
        utils.import_optional('nowhere.at_all')


# ------------------------------------------------- seed, commit
def test_seed():
    drawn = []
    for number in (5, 5, 6):
        utils.seed_everything(number, False)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.skipif(not shutil.which('git'), reason='no git')
def test_git_hash(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(['git', '-c', 'user.name=a', '-c',
                               'user.email=a@b', *words], cwd=tmp_path,
                              check=True, capture_output=True, text=True)
    monkeypatch.setattr(utils, 'ROOT', str(tmp_path))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert utils.git_hash() == 'unknown'
    git('init')
    (tmp_path / 'a').write_text('1')
    git('add', 'a')
    git('commit', '-m', 'a')
    assert utils.git_hash() == 'unknown'    # of another project
    (tmp_path / 'utils.py').write_text('1')
    git('add', 'utils.py')
    git('commit', '-m', 'b')
    commit = git('rev-parse', 'HEAD').stdout[:12]
    assert utils.git_hash() == commit
    (tmp_path / 'a').write_text('2')
    assert utils.git_hash() == commit + '-dirty'


# ------------------------------------------------- files
def test_atomic_write_writes_beside_and_swaps(tmp_path):
    path = tmp_path / 'x'
    path.write_text('old')
    with utils.atomic_write(str(path)) as part:
        with open(part, 'w') as file:
            file.write('new')
        assert path.read_text() == 'old'
        assert os.path.dirname(part) == str(tmp_path)
    assert contents(tmp_path) == {'x': b'new'}


@pytest.mark.parametrize('kind', [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_on_an_error_leaves_the_old(kind, tmp_path):
    (tmp_path / 'x').write_text('old')
    with pytest.raises(kind):
        with utils.atomic_write(str(tmp_path / 'x')) as part:
            with open(part, 'w') as file:
                file.write('half')
            raise kind
    assert contents(tmp_path) == {'x': b'old'}


@pytest.mark.parametrize('flush, expected', [
    (True, ['fsync', 'replace']), (False, ['replace'])])
def test_atomic_write_is_on_the_disk_before_it_takes_the_name(
        flush, expected, tmp_path, monkeypatch):
    calls = []

    def note(name, real):
        def noted(*words):
            calls.append(name)
            return real(*words)
        monkeypatch.setattr(os, name, noted)
    note('fsync', os.fsync)
    note('replace', os.replace)
    with utils.atomic_write(str(tmp_path / 'x'), flush) as part:
        open(part, 'w').close()
    assert calls == expected


def test_save_json_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    utils.save_json({'mIoU': 0.5, 'IoU': [None, 1]}, str(path))
    old = path.read_text()
    assert old.split() == ['{', '"mIoU":', '0.5,', '"IoU":', '[', 'null,',
                           '1', ']', '}']
    with pytest.raises(TypeError):
        utils.save_json({'mIoU': 0.5, 'IoU': object()}, str(path))
    assert contents(path.parent) == {'x.json': old.encode()}


# ------------------------------------------------- scores
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_confusion_matrix_is_a_double_loop(dtype):
    """Of 21 classes: 20 * 21 + 20 is more than a uint8 holds."""
    random = np.random.default_rng(0)
    label, pred = random.integers(0, 21, (2, 3, 20, 30))
    label[random.random(label.shape) < 0.2] = 255
    slow = np.zeros((21, 21), int)
    for a, b in zip(label.ravel(), pred.ravel()):
        if a != 255:
            slow[a, b] += 1
    found = utils.confusion_matrix(torch.tensor(pred, dtype=dtype),
                                   torch.tensor(label, dtype=dtype), 21, 255)
    assert found.dtype == torch.int64
    assert (found.numpy() == slow).all()


def test_confusion_matrix_ignores_what_is_void_alone():
    label, pred = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 1])
    found = utils.confusion_matrix(pred, label, 3, 0)
    assert found.tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize('confusion, classes, expected', [
    # class 2 occurs nowhere, and stays out of the means
    ([[6, 2, 0], [1, 3, 0], [0, 0, 0]], (), dict(
        mIoU=(6 / 9 + 3 / 6) / 2, mAcc=(6 / 8 + 3 / 4) / 2, pAcc=9 / 12,
        fIoU=8 / 12 * 6 / 9 + 4 / 12 * 3 / 6, IoU=[6 / 9, 0.5, None],
        precision=[6 / 7, 3 / 5, None], recall=[6 / 8, 3 / 4, None],
        F1=[12 / 15, 6 / 9, None], mF1=(12 / 15 + 6 / 9) / 2)),
    # it is predicted alone, and counts
    (torch.tensor([[6, 1, 1], [1, 3, 0], [0, 0, 0]]), (), dict(
        mIoU=(6 / 9 + 3 / 5 + 0) / 3, mAcc=(6 / 8 + 3 / 4) / 2, pAcc=9 / 12,
        fIoU=8 / 12 * 6 / 9 + 4 / 12 * 3 / 5, IoU=[6 / 9, 3 / 5, 0],
        precision=[6 / 7, 3 / 4, 0], recall=[6 / 8, 3 / 4, None],
        F1=[12 / 15, 6 / 8, 0], mF1=(12 / 15 + 6 / 8) / 3)),
    # two classes: the other stays in the unions, and out of the means
    ([[6, 1, 1], [1, 3, 0], [2, 0, 4]], (0, 2), dict(
        mIoU=(6 / 11 + 4 / 7) / 2, mAcc=(6 / 8 + 4 / 6) / 2, pAcc=10 / 14,
        fIoU=8 / 14 * 6 / 11 + 6 / 14 * 4 / 7, IoU=[6 / 11, 3 / 5, 4 / 7],
        precision=[6 / 9, 3 / 4, 4 / 5], recall=[6 / 8, 3 / 4, 4 / 6],
        F1=[12 / 17, 6 / 8, 8 / 11], mF1=(12 / 17 + 8 / 11) / 2)),
    (np.zeros((3, 3)), (), dict(mIoU=0, mAcc=0, pAcc=0, fIoU=0,
                                mF1=0, IoU=[None] * 3, precision=[None] * 3,
                                recall=[None] * 3, F1=[None] * 3)),
    (np.diag([5, 1, 2]), (), dict(mIoU=1, mAcc=1, pAcc=1, fIoU=1,
                                  mF1=1, IoU=[1, 1, 1], F1=[1, 1, 1],
                                  precision=[1, 1, 1], recall=[1, 1, 1]))],
    ids=['absent', 'predicted alone', 'of two', 'nothing', 'everything'])
def test_scores_by_hand(confusion, classes, expected, tmp_path):
    found = utils.scores(confusion, classes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    utils.save_json(found, str(tmp_path / 'x.json'))     # plain values


# ------------------------------------------------- learning rate
def test_poly_lr_by_hand():
    rates = [utils.poly_lr(step, 2.0, 100, 2, 10) for step in range(1, 101)]
    assert rates[:9] == [2] * 9
    assert rates[9:19] == pytest.approx([2 * 0.9 ** 2] * 10)
    assert rates[19] == pytest.approx(2 * 0.8 ** 2)
    assert rates[98] == pytest.approx(2 * 0.1 ** 2) and rates[99] == 0


def test_poly_lr_changes_at_each_step_with_a_decay_of_1():
    rates = [utils.poly_lr(step, 1.0, 4, 1, 1) for step in range(1, 5)]
    assert rates == [0.75, 0.5, 0.25, 0]


def test_poly_lr_of_the_paper():
    assert utils.poly_lr(15000, 9e-3, 30000, 0.9, 10) == pytest.approx(
        9e-3 * 0.5 ** 0.9)
    assert utils.poly_lr(29999, 9e-3, 30000, 0.9, 10) == pytest.approx(
        9e-3 * (10 / 30000) ** 0.9)
