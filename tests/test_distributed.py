"""Are devices picked, stop requests noticed, processes started and joined?

    python -m pytest tests/test_distributed.py

What several processes compute together is in test_processes.py.
"""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from conftest import REPO
from lib import distributed
from utils import INTERRUPTED, STOPPED, RunError, UserError


# ------------------------------------------------- stop requests
@pytest.fixture
def stop(monkeypatch):
    """A stop request that has begun; what would end this process at once
    raises SystemExit."""
    monkeypatch.setattr(distributed, 'end_at_once', sys.exit)
    stop = distributed.StopRequest()
    stop.begin()
    return stop


def test_stop_request_on_sigterm(stop):
    assert not stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop and stop.name == 'SIGTERM'
    os.kill(os.getpid(), signal.SIGTERM)         # a second one changes nothing
    assert stop


def test_stop_request_second_ctrl_c_ends(stop, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    assert stop and stop.name == 'SIGINT'
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == INTERRUPTED
    assert capfd.readouterr().err.endswith(': interrupted\n')


@pytest.mark.parametrize('number', (signal.SIGINT, signal.SIGTERM))
def test_stop_request_before_the_first_step_ends_at_once(
        stop, number, monkeypatch, capfd):
    monkeypatch.setattr(sys, 'argv', ['train.py', 'LR=1'])
    distributed.StopRequest()
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), number)
    assert end.value.code == STOPPED
    assert capfd.readouterr().out == (
        f'{number.name}: stopped before the first step; to resume: python '
        f'train.py LR=1\n')
    # a spawned process may wait for the others, where Python does not listen
    monkeypatch.setenv('SPAWNED_BY', str(os.getppid()))
    again = distributed.StopRequest()
    assert signal.getsignal(number) == signal.SIG_DFL
    again.begin()
    os.kill(os.getpid(), number)
    assert again.name == number.name


def test_stop_request_is_not_for_a_loader_process(stop):
    """One that is just forked has its parent's handlers."""
    pid = os.fork()
    if not pid:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(bool(stop))
    assert os.waitpid(pid, 0)[1] == 0


def test_stop_request_where_the_parent_is_gone(stop, monkeypatch):
    monkeypatch.setenv('SPAWNED_BY', str(os.getppid()))
    assert distributed.is_spawned() and not stop
    monkeypatch.setenv('SPAWNED_BY', str(os.getpid()))
    assert stop and 'process that started us' in stop.name


# ------------------------------------------------- devices
@pytest.mark.parametrize('numbers', [[99], [-2], [0, 99]])
def test_pick_devices_refuses_a_gpu_that_is_not_there(numbers):
    with pytest.raises(UserError, match=(
            rf'DEVICES=\[{str(numbers)[1:-1]}\]: this machine has \d+ ')):
        distributed.pick_devices(numbers)


@pytest.mark.parametrize('numbers', [[0, 0], [-1, 0], [1, 0, 1]])
def test_pick_devices_refuses_what_is_named_twice(numbers, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match=r'name GPUs, each once, or the CPU'):
        distributed.pick_devices(numbers)


@pytest.mark.parametrize('count, numbers, names', [
    (0, [], ['cpu']), (0, [-1], ['cpu']), (2, [], ['cuda:0', 'cuda:1']),
    (2, [1], ['cuda:1']), (2, [1, 0], ['cuda:1', 'cuda:0']),
    (2, [-1, -1], ['cpu', 'cpu'])])
def test_pick_devices(count, numbers, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert [str(each) for each in distributed.pick_devices(numbers)] == names


# ------------------------------------------------- processes
@pytest.fixture
def launched(monkeypatch):
    """This process looks like the second of two."""
    for name, value in (('RANK', 1), ('LOCAL_RANK', 1), ('WORLD_SIZE', 2)):
        monkeypatch.setenv(name, str(value))


def test_one_device_needs_no_other_process():
    device = torch.device('cpu')
    assert distributed.join([device]) == device
    assert distributed.gather({'a': 1}) == [{'a': 1}]
    assert distributed.assert_agreed(True, 'it is') is True
    assert distributed.leave(0) is None
    with pytest.raises(SystemExit) as stop:
        distributed.leave(STOPPED)
    assert stop.value.code == STOPPED


def test_a_process_without_a_device_is_refused(launched):
    with pytest.raises(UserError, match='process 1 of .* there are 1; start'):
        distributed.join([torch.device('cuda', 0)])


def test_processes_that_disagree_are_named(launched, monkeypatch):
    monkeypatch.setattr(distributed, 'gather', lambda value: [True, value])
    assert distributed.assert_agreed(True, 'x is there')
    with pytest.raises(RunError, match=r'whether x is there: \[True, False'):
        distributed.assert_agreed(False, 'x is there')


# what a spawned process runs: it notes who it is and ends as told
CHILD = """
import os, pathlib, signal, sys, time
rank = int(os.environ['RANK'])
names = 'WORLD_SIZE', 'LOCAL_RANK', 'SPAWNED_BY', 'MASTER_ADDR'
pathlib.Path(f'{rank}.txt').write_text(
    ' '.join([__name__, *(os.environ[name] for name in names)]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
end = sys.argv[1 + rank]
if end.startswith('SIG'):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.Signals[end])
if end == 'wait':
    time.sleep(60)
sys.exit(int(end))
"""


@pytest.fixture
def spawn(tmp_path, monkeypatch):
    """spawn() of two processes of CHILD, which end as the words say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'child.py').write_text(CHILD)

    def spawn(*ends, command=('child.py',)):
        monkeypatch.setattr(sys, 'orig_argv', ['python', *command, *ends])
        began = time.monotonic()
        status = distributed.spawn(2)
        assert time.monotonic() - began < 30         # nobody waited
        return status
    return spawn


@pytest.mark.parametrize('ends, status', [
    (('0', '0'), 0), (('0', '75'), STOPPED), (('75', '75'), STOPPED),
    (('3', '0'), 3), (('75', '4'), 4), (('wait', '2'), 2)])
def test_the_status_of_processes_is_that_of_the_first_failure(ends, status,
                                                              spawn):
    assert spawn(*ends) == status


@pytest.mark.parametrize('codes, status', [
    ([0, None, STOPPED], 0), ([None, 1, 2], 2), ([1, -9, -15], -9)])
def test_the_failure_that_tells_most(codes, status):
    """Of those that end at the same time."""
    assert distributed._failure(codes) == status


def test_processes_that_had_not_begun_stop_the_run(spawn, monkeypatch,
                                                   capfd):
    """SIGTERM has ended one of them; the first process takes it, too."""
    monkeypatch.setattr(distributed, 'end_at_once', sys.exit)
    distributed.StopRequest()                   # as train.main has begun
    with pytest.raises(SystemExit) as end:
        spawn('SIGTERM', 'wait')
    assert end.value.code == STOPPED
    assert 'SIGTERM: stopped before the first' in capfd.readouterr().out


@pytest.mark.parametrize('command', [('child.py',), ('-m', 'child')])
def test_processes_are_started_as_this_one_was(command, spawn, tmp_path):
    assert spawn('0', '0', command=command) == 0
    for rank in range(2):
        assert (tmp_path / f'{rank}.txt').read_text() == (
            f'__main__ 2 {rank} {os.getpid()} localhost')


def test_a_killed_process_ends_the_others(spawn, capsys):
    assert spawn('SIGKILL', 'wait') == 1
    assert 'a process was ended by SIGKILL; the others' in (
        capsys.readouterr().out)


def test_a_stop_request_is_passed_on(spawn, tmp_path):
    def stop():
        while len(list(tmp_path.glob('?.txt'))) < 2:
            time.sleep(0.1)
        time.sleep(0.5)                              # they handle it by now
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    assert spawn('wait', 'wait') == STOPPED


JOINED = """
import os
import torch
from lib import distributed

device = distributed.join([torch.device('cpu')] * 2)
ranks = distributed.gather(int(os.environ['RANK']))
if os.environ['RANK'] == '0':
    print(device, ranks, distributed.is_spawned(), __name__, flush=True)
distributed.leave(75)
"""


@pytest.mark.long
def test_a_module_joins_its_two_processes(tmp_path):
    (tmp_path / 'pack').mkdir()
    (tmp_path / 'pack' / '__init__.py').touch()
    (tmp_path / 'pack' / 'joined.py').write_text(JOINED)
    done = subprocess.run(
        [sys.executable, '-m', 'pack.joined'], cwd=tmp_path, text=True,
        capture_output=True, timeout=120,
        env={**os.environ, 'PYTHONPATH': REPO, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == STOPPED, done.stderr
    assert done.stdout == 'cpu [0, 1] True __main__\n'
