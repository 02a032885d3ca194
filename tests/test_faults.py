"""What strikes a run from outside: signals, a full disk, short memory, lost
processes. Each ends in one line, and nothing that was saved is lost.

    python -m pytest tests/test_faults.py
"""
import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

import dataset
import settings
import train
import utils
from conftest import REPO, SMALL, refused, words
from converters import layout
from files import full_disk
from lib import checkpoint, distributed, signals
from training import train_here

# latest.pth at every step, no validation
LONG = {'ITER_MAX': 3000, 'ITER_SAVE': 10, 'VAL_SPLIT': '', 'CROP_SIZE': 33}


@pytest.fixture
def start(small, toy):
    """Start train.py in this folder; what still runs at the end is killed."""
    running = []
    short = tempfile.mkdtemp()         # a socket's path has 108 bytes at most
    os.symlink(short, 'temporary')

    def begin(*arguments, child=None, **changes):
        program = [os.path.join(REPO, 'train.py')] if child is None else [
            '-c', child, REPO]
        given = words({**SMALL, 'DATA_ROOT': toy, **changes})
        process = subprocess.Popen(
            [sys.executable, *program, *given, *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'TMPDIR': short},
            start_new_session=True)
        running.append(process)
        return process
    yield begin
    for process in running:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_for_steps(count, log='logdir/log.csv'):
    """Wait until log.csv has so many steps; return the last."""
    for _ in range(1200):
        if os.path.exists(log):
            with open(log) as file:
                rows = file.read().splitlines()[1:]
            if len(rows) >= count:
                return int(rows[-1].split(',')[0])
        time.sleep(0.1)
    raise AssertionError('the run makes no progress')


def children(pid):
    """Return the processes that a process has started."""
    with open(f'/proc/{pid}/task/{pid}/children') as file:
        return [int(child) for child in file.read().split()]


def is_alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def ending(process, seconds=60):
    """Return (exit status, the one line for the user) of a run that ends."""
    out, err = process.communicate(timeout=seconds)
    lines = [part for line in err.splitlines() for part in line.split('\r')
             if 'train.py: ' in part]
    assert 'Traceback' not in err, err
    assert not glob.glob('temporary/pymp-*')    # of loader processes
    return process.returncode, (lines or [''])[0], out


def test_sigterm_saves_and_asks_to_be_started_again(start):
    """To the process that has started two others, to them and to the loader
    processes of both, as schedulers send it."""
    process = start('DEVICES=-1,-1', **{**LONG, 'ITER_SAVE': 5000,
                                        'NUM_WORKERS': 1})
    wait_for_steps(3)
    os.killpg(process.pid, signal.SIGTERM)
    status, _, out = ending(process)
    assert status == utils.STOPPED and 'to resume: python ' in out
    step = checkpoint.load('models/latest.pth')['step']
    assert step == wait_for_steps(1)
    assert sorted(os.listdir('models')) == ['.lock', 'latest.pth']


# a package that train.py imports first, and that takes its time
SLOW = '''
import sys, time
print('importing', flush=True)
time.sleep(60)
'''


@pytest.mark.parametrize('script, number, status, end, word', (
    ('train.py', 'SIGTERM', 75, 'SIGTERM: stopped before the first step; to '
     'resume: python {}/train.py LR=1\n', ''),
    ('train.py', 'SIGINT', 75, 'SIGINT: stopped before the first step; the '
     'same torchrun command resumes\n', 'RANK=0'),
    ('train.py', 'SIGTERM', 75, '', 'RANK=1'),
    ('train.py', 'SIGTERM', -15, '', 'SPAWNED_BY=1'),
    ('eval.py', 'SIGINT', 130, 'eval.py: interrupted\n', ''),
    ('predict.py', 'SIGINT', 130, 'predict.py: interrupted\n', ''),
    ('prepare.py', 'SIGINT', 130, 'prepare.py: interrupted\n', ''),
    ('eval.py', 'SIGINT', -2, '', 'SPAWNED_BY=1')))
def test_a_signal_while_a_program_is_imported(tmp_path, script, number,
                                              status, end, word):
    for name in ('numpy', 'cv2', 'torch'):
        (tmp_path / f'{name}.py').write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, os.path.join(REPO, script), 'LR=1'], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env={
            **os.environ, 'PYTHONPATH': str(tmp_path),
            **dict([word.split('=')] if word else [])})
    assert process.stdout.readline() == 'importing\n'
    process.send_signal(signal.Signals[number])
    assert process.stdout.read() == end.format(
        os.path.relpath(REPO, tmp_path))
    assert process.wait() == status


def test_the_exit_statuses_of_signals():
    """Two places have them, since utils.py imports torch."""
    assert signals.STOPPED == utils.STOPPED
    assert signals.INTERRUPTED == utils.INTERRUPTED


@pytest.mark.parametrize('owner, name', (
    (train, 'open_data'), (train, 'class_weights'),
    (dataset.Segmentation, '__getitem__')))
def test_a_signal_before_the_first_step(small, monkeypatch, owner, name,
                                        capfd):
    """Ends the run at once; test_exit_statuses has one in the first step."""
    vars(settings).update(LONG)
    monkeypatch.setattr(distributed, 'end_at_once', sys.exit)
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (
        os.kill(os.getpid(), signal.SIGTERM), inner(*a, **k))[1])
    monkeypatch.setattr(sys, 'argv', ['train.py', 'LR=1'])
    with pytest.raises(SystemExit) as end:
        utils.run_main(train.main)
    assert end.value.code == utils.STOPPED
    assert capfd.readouterr().out.endswith(
        'SIGTERM: stopped before the first step; to resume: python '
        'train.py LR=1\n')
    assert not os.path.exists('models/latest.pth')


def handles_signals(pid):
    """Tell whether a process handles SIGTERM, which Python does not."""
    with open(f'/proc/{pid}/status') as file:
        caught = re.search(r'SigCgt:\s*(\w+)', file.read())[1]
    return int(caught, 16) >> signal.SIGTERM - 1 & 1


@pytest.mark.long
@pytest.mark.parametrize('devices', ('-1', '-1,-1'))
@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGINT))
def test_signals_at_any_time_of_the_start(start, devices, number):
    """To the first process alone, or to all, as a terminal sends Ctrl-C."""
    for i, seconds in enumerate((0, 1, 2, 3, 4, 6)):
        process = start(f'DEVICES={devices}', **{**LONG, 'NUM_WORKERS': 1})
        while not handles_signals(process.pid):
            time.sleep(0.01)
        time.sleep(seconds)
        (os.kill if i % 2 else os.killpg)(process.pid, number)
        status, _, out = ending(process)
        assert status == utils.STOPPED and out.count('to resume: ') == 1


def note(folder, number):
    """A job of a conversion: it takes a while and leaves a file."""
    time.sleep(0.1)
    open(os.path.join(folder, str(number)), 'w').close()
    return number


def test_a_conversion_that_is_stopped_begins_no_other_job(tmp_path):
    jobs = layout.map_in_processes(
        note, ((str(tmp_path), i) for i in range(99)), 'test')
    assert next(jobs) == 0
    jobs.close()
    assert len(os.listdir(tmp_path)) < 60       # 65 are read ahead


def test_ctrl_c_waits_until_processes_are_started():
    done = []
    with pytest.raises(KeyboardInterrupt), layout._delayed_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(1)
    assert done


HOLDING = '''
import os, sys
sys.path.insert(0, sys.argv[1])
import dataset, settings, utils
settings.override(sys.argv[2:-1])
def main():
    global held                         # as an error's traceback holds it
    held = iter(dataset.val_loader(dataset.Segmentation('val', False)))
    next(held)
    assert os.listdir('temporary')      # has sockets of the loader processes
    exec(sys.argv[-1])
utils.run_main(main)
'''


@pytest.mark.parametrize('end, status', (
    ('sys.exit(1)', 1),
    pytest.param('os.kill(os.getpid(), 9)', -9, marks=pytest.mark.long)))
def test_loader_processes_end_with_the_program(start, end, status):
    """They ignore SIGTERM, which is what Python ends them with; and they see
    within some seconds that it was killed. Their sockets are removed."""
    assert start(end, child=HOLDING, NUM_WORKERS=2).wait(60) == status
    for _ in range(0 if status == 1 else 300):
        if not os.listdir('temporary'):
            break
        time.sleep(0.1)
    assert not os.listdir('temporary')


@pytest.fixture
def train_on_one_thread(monkeypatch):
    """Run train.py to its end in this process, on the thread of `start`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(**changes):
        vars(settings).update(changes)
        return train_here(monkeypatch)
    yield train
    torch.set_num_threads(threads)


def test_a_disk_that_fills_under_the_log_saves_the_run(small, monkeypatch,
                                                       capsys):
    """It cannot write the second step's line; MODEL_DIR has room."""
    vars(settings).update(LONG, ITER_SAVE=5000)
    inner = train.log_steps

    def log_steps(rows, *arguments):
        with full_disk() if rows[0][0] == 2 else contextlib.nullcontext():
            inner(rows, *arguments)
    monkeypatch.setattr(train, 'log_steps', log_steps)
    status, line = refused(train.main, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 1 and 'LOG_DIR=logdir cannot be written' in line
    assert checkpoint.load('models/latest.pth')['step'] == 3


def test_a_full_disk_costs_nothing(start, train_on_one_thread):
    """A limit on the size of files stands for the disk."""
    changes = {'ITER_MAX': 4, 'ITER_SAVE': 3, 'VAL_SPLIT': ''}
    train_on_one_thread(**changes)
    os.replace('models/step_3.pth', 'models/latest.pth')
    size = os.path.getsize('models/latest.pth')
    with full_disk(size // 2):
        process = start(**changes)
    status, line, _ = ending(process)
    assert status == 1 and 'models/latest.pth cannot be written' in line
    assert 'Make room' in line
    assert checkpoint.load('models/latest.pth')['step'] == 3
    assert not [name for name in os.listdir('models') if 'tmp' in name]


DYING = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, train, utils
save, count = torch.save, [0]
def half(state, path):
    save(state, path)
    count[0] += 1
    if count[0] == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
sys.argv = ['train.py', *sys.argv[2:]]
utils.run_main(train.main)
'''


def test_kill_9_in_the_middle_of_a_save(start, train_on_one_thread):
    """The next start finds the checkpoint before, whole, and ends where an
    uninterrupted run does."""
    changes = {**LONG, 'ITER_MAX': 5, 'DROPOUT': 0.5}
    train_on_one_thread(MODEL_DIR='whole', LOG_DIR='whole', **changes)
    process = start(child=DYING, **changes)
    assert process.wait(120) == -signal.SIGKILL
    assert checkpoint.load('models/latest.pth')['step'] == 2
    rows = train_on_one_thread(MODEL_DIR='models', LOG_DIR='logdir')
    assert list(rows) == [1, 2, 3, 4, 5]
    a, b = (checkpoint.load(f'{folder}/final.pth')['net']
            for folder in ('whole', 'models'))
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert not [name for name in os.listdir('models') if 'tmp' in name]


def test_a_killed_process_ends_the_others(start):
    """Also one that cannot end by itself, as in a collective that hangs."""
    process = start('DEVICES=-1,-1', **LONG)
    wait_for_steps(2)
    both = children(process.pid)
    assert len(both) == 2
    os.kill(both[0], signal.SIGSTOP)
    os.kill(both[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'a process was ended by SIGKILL' in out + err
    assert not any(is_alive(pid) for pid in both)
    assert checkpoint.load('models/latest.pth')['step'] >= 1


def test_processes_end_with_the_one_that_started_them(start):
    process = start('DEVICES=-1,-1', **LONG)
    wait_for_steps(2)
    both = children(process.pid)
    process.kill()
    for _ in range(300):
        if not any(is_alive(pid) for pid in both):
            break
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in both)
    assert checkpoint.load('models/latest.pth')['step'] >= 2


def test_a_killed_loader_process_ends_the_run(start):
    process = start(NUM_WORKERS=1, **LONG)
    wait_for_steps(2)
    worker = min(children(process.pid))     # later ones: git, of a save
    os.kill(worker, signal.SIGKILL)
    status, line, _ = ending(process)
    assert status == 1 and 'a loader process died' in line
    assert checkpoint.load('models/latest.pth')['step'] >= 1


def test_an_error_of_two_processes_is_told_once(start):
    process = start('DEVICES=-1,-1', N_LAYERS=20)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count('N_LAYERS=20') == 1, err


def test_a_folder_that_machines_do_not_share_is_noticed(monkeypatch):
    monkeypatch.setattr(distributed, 'gather',
                        lambda value: [value, not value])
    with pytest.raises(utils.RunError, match='have all machines share'):
        distributed.assert_agreed(True, 'models/latest.pth is there')
    monkeypatch.setattr(distributed, 'gather', lambda value: [value] * 3)
    assert distributed.assert_agreed(False, 'x') is False


def test_a_resume_by_another_number_of_processes_is_warned_of(small, capsys,
                                                              monkeypatch):
    vars(settings).update(ITER_MAX=2, VAL_SPLIT='')
    train_here(monkeypatch)
    state = checkpoint.load('models/latest.pth')
    state['random'] *= 2
    checkpoint.save({**state, 'step': 1}, 'models/latest.pth')
    train_here(monkeypatch)
    assert 'is of 2 processes, these are 1' in capsys.readouterr().out


def test_short_memory_of_a_gpu_ends_in_a_line(small, monkeypatch, capsys):
    """In the second step; the first one's checkpoint stays."""
    vars(settings).update(LONG)
    losses = []
    monkeypatch.setattr(train, 'log_start', lambda *a: None)

    def loss(*arguments, inner=train.segmentation_loss):
        if losses:
            raise torch.OutOfMemoryError(
                'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a '
                'total capacity of 79 GiB of which 1.5 GiB is free.\nMore')
        losses.append(inner(*arguments))
        return losses[0]
    monkeypatch.setattr(train, 'segmentation_loss', loss)
    status, line = refused(train.main, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 1 and 'Tried to allocate 2.00 GiB' in line
    for name in ('BATCH_SIZE', 'ACCUM', 'CROP_SIZE', 'RECOMPUTE'):
        assert name in line
    assert checkpoint.load('models/latest.pth')['step'] == 1


@pytest.mark.parametrize('status, word, act', (
    (0, '', lambda: None),
    (1, 'LOG_DIR=file/inside', lambda: None),
    (2, 'N_LAYERS=20', lambda: None),
    (75, '', lambda: os.kill(os.getpid(), signal.SIGTERM))))
def test_exit_statuses(small, monkeypatch, status, word, act):
    """Done; a fault of the run; of what was asked; stopped on request."""
    vars(settings).update(ITER_MAX=2, VAL_SPLIT='', CROP_SIZE=33)
    open('file', 'w').close()
    rate = train.set_learning_rate
    monkeypatch.setattr(train, 'set_learning_rate',
                        lambda *a: (act(), rate(*a))[1])
    monkeypatch.setattr(sys, 'argv', ['train.py', *word.split()])
    try:
        utils.run_main(train.main)
    except SystemExit as end:
        assert end.code == status != 0
    else:
        assert status == 0
    assert os.path.exists('models/final.pth') == (status == 0)


def test_a_defect_keeps_its_traceback(small, monkeypatch):
    """It is no fault of the user's or the run's."""
    monkeypatch.setattr(train, 'open_data', lambda device: [][0])
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    with pytest.raises(IndexError):
        utils.run_main(train.main)
