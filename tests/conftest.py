"""What the tests share: a small toy set, settings restored after each test,
scripts run as a user runs them. `sh test.sh` runs them all.
"""
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

import prepare
import settings
import utils
from project import EDITED, SETTINGS, copy_project

# the folder whose scripts are run; where settings.py was edited, a copy that
# has the shipped values
_copies = tempfile.TemporaryDirectory(prefix='project_')
REPO = copy_project(f'{_copies.name}/EMANet') if EDITED else utils.ROOT
vars(settings).update(SETTINGS)
# the tests are of the CPU, whatever there is; test_gpu.py has the GPUs
N_GPUS, WITH_GPUS = torch.cuda.device_count(), dict(os.environ)
os.environ['CUDA_VISIBLE_DEVICES'] = ''

# a network and a schedule of seconds, on the toy set
SMALL = {'N_CLASSES': 6, 'TRAIN_SPLIT': 'train', 'N_LAYERS': 18,
         'STEM': 'plain', 'PRETRAINED': '', 'STRIDE': 16, 'CROP_SIZE': 65,
         'EM_CHANNELS': 32, 'EM_BASES': 8, 'BATCH_SIZE': 2, 'ITER_MAX': 4,
         'ITER_VAL': 0, 'BN_MOM': 0.1, 'NUM_WORKERS': 0}


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """A toy set of 12 training and 5 validation images."""
    root = str(tmp_path_factory.mktemp('data') / 'toy')
    prepare.main(['toy', '--to', root, '--train', '12', '--val', '5'])
    return root


@pytest.fixture(scope='session')
def shared():
    """The folder of recorded facts and real pictures beside the project."""
    path = os.path.join(os.path.dirname(utils.ROOT), 'shared')
    if not os.path.isdir(path):
        pytest.skip('no ../shared')
    return path


@pytest.fixture(autouse=True)
def put_back():
    """Undo what a test does to settings and signals."""
    before, given = settings.as_dict(), set(settings._given)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM,
                                                 signal.SIGINT)}
    yield
    vars(settings).update(before)
    settings._given.clear()
    settings._given.update(given)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def small(toy, tmp_path, monkeypatch):
    """Settings of a run of seconds on the toy set, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    vars(settings).update(SMALL, DATA_ROOT=toy)
    return settings


def words(values):
    """Return settings as KEY=VALUE words."""
    return [f'{name}={value}' for name, value in values.items()]


def run(script, *arguments, cwd, **options):
    """Run a script of the project as a user does; return what it did."""
    return subprocess.run(
        [sys.executable, os.path.join(REPO, script), *map(str, arguments)],
        cwd=cwd, text=True, capture_output=True, timeout=300, **options)


def run_tool(name, *arguments, cwd, **options):
    """Run `python -m tools.NAME` as a user does; return what it did."""
    path = os.pathsep.join(filter(None, [REPO, os.environ.get('PYTHONPATH')]))
    return subprocess.run(
        [sys.executable, '-m', f'tools.{name}', *map(str, arguments)],
        cwd=cwd, text=True, capture_output=True, timeout=300,
        env={**os.environ, 'PYTHONPATH': path}, **options)


def refused(main, *arguments, monkeypatch, capsys):
    """Run a script's main in this process on bad input; return (exit status,
    its one line on stderr). Fails where there is another line."""
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        utils.run_main(main)
    lines = [line for line in capsys.readouterr().err.splitlines()
             if line.startswith('script.py: ')]
    assert len(lines) == 1 and stop.value.code not in (0, None)
    return stop.value.code, lines[0]


def pytest_sessionfinish():
    """End the loader processes that runs stopped by an error have left."""
    utils.end_workers()
    _copies.cleanup()
