"""What a run says and refuses: its lock, its commands, its start and end.

    python -m pytest tests/test_run.py
"""
import os
import subprocess
import sys

import pytest
import torch

import heads
import settings
import train
from conftest import REPO, refused
from files import expect_error
from lib import cost, run, signals
from utils import RunError


# ------------------------------------------------- commands
def test_commands_repeat_what_was_typed(monkeypatch):
    """Quoted for a shell, with what is to change at the end."""
    monkeypatch.setattr(sys, 'argv', [
        'train.py', 'DATA_ROOT=my data', 'LR=0.1', 'ITER_MAX=4'])
    assert run.command() == ("python train.py 'DATA_ROOT=my data' LR=0.1 "
                             "ITER_MAX=4")
    assert run.command(ITER_MAX=8, LR=None) == (
        "python train.py 'DATA_ROOT=my data' ITER_MAX=8")
    assert signals.resume_command() == f'to resume: {run.command()}'
    for name in 'RANK', 'LOCAL_RANK', 'WORLD_SIZE':
        monkeypatch.setenv(name, '1')
    assert 'torchrun' in signals.resume_command()
    monkeypatch.setenv('SPAWNED_BY', '1')       # by train.py itself
    assert signals.resume_command() == f'to resume: {run.command()}'


# ------------------------------------------------- the lock
HOLD = '''
import os, sys
import settings
from lib.run import lock_folders
locks = lock_folders()
child = os.fork() if sys.argv[1:] else 1    # as a loader process
if child:
    print(child, flush=True)
sys.stdin.read()
'''


@pytest.fixture
def other_run(tmp_path):
    """Return a function that starts a process which holds the folders'
    locks; all are ended."""
    processes = []

    def start(*arguments):
        processes.append(subprocess.Popen(
            [sys.executable, '-c', HOLD, *arguments], cwd=tmp_path, text=True,
            env={**os.environ, 'PYTHONPATH': REPO}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE))
        return processes[-1], int(processes[-1].stdout.readline())
    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_in_a_folder_is_refused(small, monkeypatch, capsys,
                                             other_run):
    """Before its labels are read; a killed run's loader processes, which live
    on for a moment, hold nothing."""
    process, child = other_run('fork')
    monkeypatch.setattr(train, 'open_data', None)
    status, line = refused(train.main, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and ('MODEL_DIR=models: another train.py is at work '
                            'there') in line
    status, line = refused(train.main, 'MODEL_DIR=m2', 'BATCH_SIZE=4',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'LOG_DIR=logdir: another' in line
    assert not os.path.exists('m2')
    process.kill()
    process.wait()
    os.kill(child, 0)                   # it is alive
    run.lock_folders(is_trial=True)
    assert len(run.lock_folders()) == 2
    os.kill(child, 9)


def test_other_processes_of_a_run_take_no_lock(small, monkeypatch):
    monkeypatch.setattr(run.utils, 'rank', lambda: 1)
    assert run.lock_folders() == [] and os.listdir() == []


# ------------------------------------------------- numbers
def test_what_is_not_finite_is_named_by_part(small):
    net = heads.build_network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    net(torch.rand(2, 3, 33, 33)).mean().backward()
    optimizer.step()
    parts = {'net': net, 'optimizer': optimizer}
    run.check_finite(parts, 3)
    optimizer.state[net.fc2.bias]['momentum_buffer'][0] = torch.inf
    expect_error(lambda: run.check_finite(parts, 3), 'the run has diverged: '
                 'at step 3 the optimizer has numbers', 'momentum',
                 kind=RunError)
    net.extractor[1].running_var[0] = torch.nan
    expect_error(lambda: run.check_finite(parts, 3), 'the run has diverged: '
                 'at step 3 the net', 'extractor.1.running_var',
                 kind=RunError)


# ------------------------------------------------- the start
def test_the_start_of_a_run(small, monkeypatch, capsys, toy):
    monkeypatch.setattr(sys, 'argv', ['train.py', 'LR=0.01'])
    vars(settings).update(ITER_MAX=1, VAL_SPLIT='')
    train.main()
    out = capsys.readouterr().out
    for line in ('command line: LR = 0.01',
                 f'data: {toy}, 12 images of train to train on, none to',
                 'classes: 6, background, disc, square, triangle, star, ring',
                 'network: HEAD=ema on ResNet-18, plain stem, 11,401,958 '
                 'parameters',
                 'schedule: 1 step of 2 images; an epoch is 6 steps, so 0.2',
                 'device: cpu (', '; 1 training and 0 loader processes',
                 'writes: checkpoints into models, logs into logdir',
                 'done: step 1, models/final.pth\n'
                 'next: python eval.py models/final.pth\n'):
        assert line in out
    assert 'warning' not in out


@pytest.mark.parametrize('free, warned', ((10 ** 8, True), (10 ** 11, False)))
def test_a_step_that_needs_more_memory_than_there_is(small, capsys, free,
                                                     monkeypatch, warned):
    monkeypatch.setattr(run, 'available_memory', lambda: free)
    with torch.device('meta'):
        net = heads.build_network()
    monkeypatch.setattr(run, 'log_start', lambda *a: None)
    train.log_start(net, None, None, torch.device('cpu'))
    out = capsys.readouterr().out
    assert ('warning: a step needs about 0.1 GB of memory, 0.1 GB are free; '
            'lower CROP_SIZE' in out) == warned


def test_the_memory_of_a_step_is_what_the_backward_pass_keeps(small):
    """Counted without memory; on the CPU, storages of their own."""
    with torch.device('meta'):
        sketch = heads.build_network()
    net, image = heads.build_network(), torch.rand(2, 3, 65, 65)
    label = torch.zeros(2, 65, 65, dtype=torch.uint8)
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = sum(x.untyped_storage().nbytes() for x in cost.saved_tensors(
        lambda: train.segmentation_loss(net(image), label))
        if x.untyped_storage()._cdata not in own)
    estimate = cost.step_memory(sketch, train.segmentation_loss, image.shape)
    n_params = sum(p.numel() for p in net.parameters())
    assert estimate == pytest.approx(kept + 12 * n_params, rel=0.02)
    large = [cost.step_memory(sketch, train.segmentation_loss,
                              (4, 3, 257, 257))
             for sketch.extractor.recompute in (False, True)]
    assert large[1] < 0.8 * large[0]


@pytest.mark.parametrize('word, part', (
    ('BATCH_SIZE=13', 'but train has 12 images; make'),
    ('VAL_SPLIT=train', '12 images of train are in train'),
    ('LOG_DIR=/proc/x', 'LOG_DIR=/proc/x: nothing can be'),
    ('INIT_FROM=x.pth', 'x.pth is not there')))
def test_what_costs_nothing_is_checked_before_labels(small, monkeypatch,
                                                     capsys, word, part):
    """And makes no folders."""
    monkeypatch.setattr(train.eval, 'check_labels', None)
    _, line = refused(train.main, word, monkeypatch=monkeypatch,
                      capsys=capsys)
    assert part in line
    assert os.listdir() == []
