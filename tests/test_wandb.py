"""Does Weights & Biases (WANDB) show what TensorBoard shows, and can it do a
run no harm? In its offline mode, where it is installed.

    python -m pytest tests/test_wandb.py
"""
import csv
import glob
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import train
import utils
from conftest import REPO, SMALL, refused, run, words
from files import full_disk
from lib import wandb_log
from lib.logger import Logger
from test_faults import LONG, wait_for_steps
from test_tensorboard import read_events, read_images, scalars
from tools import clean

needs_wandb = pytest.mark.skipif(not importlib.util.find_spec('wandb'),
                                 reason='no wandb')


@pytest.fixture(autouse=True)
def offline(small, tmp_path, monkeypatch):
    """A user who has never used W&B, and keeps it offline; in the end W&B
    forgets, in this process, what it has read of the environment."""
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield
    if sys.modules.get('wandb'):
        sys.modules['wandb'].teardown()


# ------------------------------------------------- W&B's file of a run
def read_records(path):
    """Yield the records of a file run-ID.wandb: a head of 7 bytes, then
    LevelDB's log, blocks of 32 KiB. W&B has no reader in Python any more."""
    from wandb.proto.wandb_internal_pb2 import Record

    with open(path, 'rb') as file:
        data = file.read()
    start, part = 7, b''
    while start + 7 <= len(data):
        left = 32768 - start % 32768
        if left < 7:
            start += left
            continue
        _, size, kind = struct.unpack_from('<IHB', data, start)
        part += data[start + 7:start + 7 + size]
        start += 7 + size
        if kind in (1, 4):              # whole, the last part
            yield Record.FromString(part)
            part = b''


def read_items(items):
    """Return {key: value} of a row or of the config."""
    values = {}
    for item in items:
        *parents, key = item.nested_key or [item.key]
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = json.loads(item.value_json)
    return values


def read_runs(folder='logdir'):
    """Return (its run, its config, {step: row}) of each file, oldest first.
    """
    found = []
    for path in sorted(glob.glob(f'{folder}/wandb/*run-*/*.wandb')):
        rows = {}
        for record in read_records(path):
            kind = record.WhichOneof('record_type')
            if kind == 'run':
                head = record.run
            elif kind == 'history':
                rows[record.history.step.num] = read_items(record.history.item)
        found.append((head, read_items(head.config.update), rows))
    return found


def services(pid):
    """Return the processes of W&B that a process has started."""
    found = []
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            with open(path, 'rb') as file:
                line = file.read().split(b'\0')
        except OSError:                 # it has ended meanwhile
            continue
        if b'wandb-core' in line[0] and str(pid).encode() in line:
            found.append(line)
    return found


# ------------------------------------------------- what is shown
@needs_wandb
@pytest.mark.long
def test_wandb_has_what_tensorboard_and_the_log_have(toy, monkeypatch):
    """Each scalar, each image, all settings; clean.sh removes it."""
    given = {**SMALL, 'DATA_ROOT': toy, 'ITER_VAL': 2, 'WANDB': 'us/de-mo'}
    done = run('train.py', *words(given), cwd='.')
    assert done.returncode == 0, done.stderr
    assert 'wandb:' not in done.stderr
    (head, config, rows), = read_runs()
    assert (head.entity, head.project) == ('us', 'de-mo')
    assert head.display_name == f'{os.path.basename(REPO)}/logdir'
    with open('logdir/settings.json') as file:
        want = json.load(file)
    assert {name: config[name] for name in want} == want
    assert 'missing: wandb sync logdir/wandb/offline-run-' in done.stdout

    with open('logdir/log.csv') as file:
        log = {int(row['step']): row for row in csv.DictReader(file)}
    assert [*rows] == [*log] == [1, 2, 3, 4]
    for step, row in rows.items():
        assert row['Curves/loss'] == pytest.approx(float(log[step]['loss']))
        if step % 2 == 0:
            assert row['Accuracy/val_mIoU'] == pytest.approx(
                100 * float(log[step]['val_mIoU']))
    events = read_events('logdir')
    for tag in events.Tags()['scalars']:
        assert scalars(events, tag) == {
            step: row[tag] for step, row in rows.items() if tag in row}, tag
    tags = events.Tags()['images']
    assert {'Val/toy_0000', 'ValConfusion'} < set(tags)
    files, = glob.glob('logdir/wandb/offline-run-*/files')
    for tag in tags:
        for step, image in zip((2, 4), read_images(events, tag), strict=True):
            path = os.path.join(files, rows[step][tag]['path'])
            assert (np.asarray(Image.open(path)) == image).all()

    monkeypatch.setattr(sys, 'argv', ['clean.py'])
    clean.main()
    assert not os.path.exists('logdir')


@needs_wandb
@pytest.mark.long
def test_a_resumed_run_is_the_same_in_wandb(toy):
    """SIGTERM saves, ends with 75, and leaves no process of W&B."""
    given = {**SMALL, **LONG, 'DATA_ROOT': toy, 'WANDB': 'demo'}
    stops = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, os.path.join(REPO, 'train.py'), *words(given)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_steps(stops[-1] + 2 if stops else 2)
        assert services(process.pid)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
        assert process.returncode == utils.STOPPED, err
        assert 'to resume: python' in out and 'Traceback' not in err
        assert not services(process.pid)
        stops.append(wait_for_steps(1))
    runs = read_runs()
    assert len({head.run_id for head, *_ in runs}) == 1
    assert wandb_log.read_ids('logdir') == [runs[0][0].run_id]
    assert [[*rows] for *_, rows in runs] == [
        [*range(1, stops[0] + 1)], [*range(stops[0] + 1, stops[1] + 1)]]


@needs_wandb
def test_a_new_run_in_a_folder_is_a_new_one_in_wandb():
    for start in (0, 0, 3):
        logger = Logger('logdir', start)
        logger.log_settings({'WANDB': 'demo'})
        logger.close()
    first, second, third = [head.run_id for head, *_ in read_runs()]
    assert first != second == third
    assert wandb_log.read_ids('logdir') == [first, second]


@needs_wandb
def test_images_that_come_before_earlier_metrics():
    """On a GPU the metrics of ten steps are read at once, after the
    validation; W&B takes no step that is before its last."""
    page = np.zeros((4, 4, 3), np.uint8)
    logger = Logger('logdir')
    logger.log_settings({'WANDB': 'demo'})
    logger.add_images(3, [('Val/a b', page)])
    for step in (1, 2, 3):
        logger.log_metrics(step, loss=step / 4)
    logger.close()
    (*_, rows), = read_runs()
    assert {step: row['Curves/loss'] for step, row in rows.items()} == {
        1: 0.25, 2: 0.5, 3: 0.75}
    assert ['Val/a_b' in row for row in rows.values()] == [False, False, True]


# ------------------------------------------------- what can fail
@pytest.mark.parametrize('change, message', (
    ('gone', 'wandb is needed for this: python -m pip install wandb'),
    ('old', 'wandb 0.30 or later, this is 0.19.11: python -m pip install -U')))
def test_wandb_is_checked_before_the_first_step(change, message, monkeypatch,
                                                capsys):
    if change == 'gone':
        monkeypatch.setitem(sys.modules, 'wandb', None)
    else:
        wandb = pytest.importorskip('wandb')
        monkeypatch.setattr(wandb, '__version__', '0.19.11')
    status, line = refused(train.main, 'WANDB=demo', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and message in line
    assert not os.path.exists('logdir')


@needs_wandb
@pytest.mark.parametrize('name, value, message', (
    ('WANDB_MODE', 'online', 'nobody is logged in to Weights & Biases; run `w'
     'andb login`, or set the environment variable WANDB_MODE=offline'),
    ('WANDB_MODE', 'maybe', "Input should be 'online', 'offline'"),
    ('WANDB_API_KEY', 'short', 'WANDB_API_KEY')))
def test_a_missing_login_is_refused(name, value, message, monkeypatch, capsys):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv(name, value)
    status, line = refused(train.main, 'WANDB=demo', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and message in line
    assert not os.path.exists('logdir')


@needs_wandb
def test_a_dead_network_keeps_the_run_offline(monkeypatch, capsys):
    """After TIMEOUT; nothing else of the log is lost."""
    for name, value in (('WANDB_MODE', 'online'), ('WANDB_API_KEY', 40 * 'a'),
                        ('WANDB_BASE_URL', 'http://127.0.0.1:9')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb_log, 'TIMEOUT', 1)
    logger = Logger('logdir')
    logger.log_settings({'WANDB': 'demo'})
    logger.log_metrics(1, loss=0.5)
    logger.close()
    out = capsys.readouterr().out
    assert 'warning: Weights & Biases: ' in out
    assert 'offline; to send what is missing: wandb sync logdir/wandb/off' in (
        out)
    *_, rows = read_runs()[0]
    assert rows[1]['Curves/loss'] == 0.5


@pytest.mark.parametrize('place', ('_start', 'add', 'log', 'finish'))
def test_an_error_of_wandb_is_a_warning(place, monkeypatch, capsys):
    """Once; log.csv and TensorBoard have all."""
    class Run:
        def __init__(self):
            self.steps = []

        def log(self, row, step):
            self.steps.append(step)
            if place == 'log' and step == 2:
                raise OSError('Connection lost\nin a thread')

        def finish(self):
            if place == 'finish':
                raise TimeoutError('Connection lost')

    def fail(*a, **k):
        raise RuntimeError('Connection lost')
    shown = Run()
    monkeypatch.setattr(wandb_log.WandbLog, '_start', lambda *a: shown)
    monkeypatch.setattr(wandb_log, '_to_image', fail)
    if place == '_start':
        monkeypatch.setattr(wandb_log.WandbLog, '_start', fail)
    logger = Logger('logdir')
    logger.log_settings({'WANDB': 'demo'})
    for step in (1, 2, 3):
        if place == 'add' and step == 2:
            logger.add_images(2, [('a', np.zeros((4, 4, 3), np.uint8))])
        logger.log_metrics(step, loss=step / 4)
    logger.close()
    assert shown.steps == {'_start': [], 'add': [1], 'log': [1, 2],
                           'finish': [1, 2, 3]}[place]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if 'warning' in line] == [
        'warning: Weights & Biases: Connection lost; nothing more is sent '
        'there. The run is not affected']
    assert scalars(read_events('logdir'), 'Curves/loss') == {
        1: 0.25, 2: 0.5, 3: 0.75}


@needs_wandb
def test_a_full_disk_ends_wandb_too():
    logger = Logger('logdir')
    logger.log_settings({'WANDB': 'demo'})
    assert services(os.getpid())
    with full_disk():
        logger.log_metrics(1, loss=0.25)
    with pytest.raises(utils.RunError, match='LOG_DIR=logdir cannot be wr'):
        logger.close()
    assert not services(os.getpid())
