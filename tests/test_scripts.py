"""The shell scripts and the README's examples, run as a user runs them, in
copies of this folder.

    python -m pytest tests/test_scripts.py
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

import utils
from conftest import REPO, SMALL, run, words


@pytest.fixture
def folder(tmp_path):
    """A copy of this folder as a fresh clone has it, with a neighbour's
    room around it."""
    to = tmp_path / 'EMANet101'
    shutil.copytree(REPO, to, ignore=shutil.ignore_patterns(
        '.git', '.venv', 'data', 'demo', 'logdir', '*.pth', 'predictions',
        '__pycache__', '.pytest_cache'))
    return to


def sh(folder, *arguments, **options):
    """Run a script by sh, in the environment of these tests."""
    env = {**os.environ, 'VIRTUAL_ENV': sys.prefix,
           'PATH': os.path.dirname(sys.executable) + os.pathsep
           + os.environ['PATH']}
    return subprocess.run(['sh', *map(str, arguments)], cwd=folder, env=env,
                          text=True, capture_output=True, timeout=400,
                          **options)


def block(kind, after):
    """Return the README's first block of a kind after a heading."""
    with open(os.path.join(REPO, 'README.md')) as file:
        text = file.read().partition(after)[2]
    return re.search(rf'```{kind}\n(.*?)```', text, re.S)[1]


def test_the_demo_in_short(folder):
    """All of it but the training's length."""
    done = sh(folder, 'demo.sh', 'ITER_MAX=2', 'STRIDE=32')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'demo/predictions' in done.stdout
    drawn = os.listdir(folder / 'demo' / 'predictions')
    assert 'toy_0000.overlay.jpg' in drawn and len(drawn) == 16
    with open(folder / 'demo' / 'logdir' / 'eval.json') as file:
        result = json.load(file)
    assert result['scored']['images'] == 40
    assert list(result['classes'])[1] == 'disc'


def test_clean_removes_what_a_run_made_and_nothing_else(folder):
    kept = ['models/resnet18-f37072fd.pth', 'models/step_best.pth',
            'data/toy/classes.txt', 'predictions/a.png', 'logdir/mine.txt',
            'results.csv', 'results.tgz']
    gone = ['models/latest.pth', 'models/best.pth', 'models/final.pth',
            'models/step_20.pth', 'models/latest.pth.tmp',
            'logdir/log.csv', 'logdir/eval.json', 'logdir/confusion.png',
            'logdir/classes.png', 'logdir/settings.json',
            'logdir/events.out.tfevents.1.host']
    for name in kept + gone:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('x')
    for _ in range(2):
        done = sh(folder, 'clean.sh')
        assert done.returncode == 0, done.stderr
        assert all((folder / name).exists() for name in kept)
        assert not any((folder / name).exists() for name in gone)


def test_clean_follows_the_settings(folder):
    path = folder / 'settings.py'
    path.write_text(path.read_text().replace("= 'models'", "= 'my models'")
                    .replace("= 'logdir'", "= 'my log'"))
    for name in ('my models/latest.pth', 'my log/log.csv',
                 'models/latest.pth'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('x')
    assert sh(folder, 'clean.sh').returncode == 0
    assert not (folder / 'my models' / 'latest.pth').exists()
    assert not (folder / 'my log').exists()
    assert (folder / 'models' / 'latest.pth').exists()


def test_fork_makes_an_experiment(folder):
    for name in ('data/toy/classes.txt', 'models/resnet18-f37072fd.pth',
                 'models/latest.pth', 'models/step_5.pth', 'logdir/log.csv',
                 'results.csv'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    done = sh(folder, 'fork.sh', 'EMANet101.learned')
    assert done.returncode == 0, done.stderr
    fork = folder.parent / 'EMANet101.learned'
    assert (fork / 'data').resolve() == (folder / 'data').resolve()
    assert (fork / 'models/resnet18-f37072fd.pth').read_text()
    assert not (fork / 'models/latest.pth').exists()
    assert not (fork / 'models/step_5.pth').exists()
    assert not (fork / 'logdir').exists()
    assert not (fork / 'results.csv').exists()
    for name in os.listdir(folder):
        if name.endswith(('.py', '.sh', '.md', '.txt')):
            assert (fork / name).read_bytes() == (folder / name).read_bytes()
    assert (fork / 'classes').is_dir() and (fork / 'tests').is_dir()
    for name in ('EMANet101.learned', 'a/b', '..', ''):
        done = sh(folder, 'fork.sh', name)
        assert done.returncode == 2 and 'fork.sh' in done.stderr


def test_your_own_head_in_20_lines(folder, toy):
    """The README's patch, in a fork, trains and scores."""
    patch = block('diff', '## Your own head in 20 lines')
    added = [line for line in patch.splitlines()
             if line.startswith('+') and not line.startswith('+++')]
    assert len(added) <= 20
    assert sh(folder, 'fork.sh', 'mine').returncode == 0
    fork = folder.parent / 'mine'
    subprocess.run(['git', 'apply', '-'], input=patch, text=True, cwd=fork,
                   check=True)
    given = words({**SMALL, 'ITER_MAX': 2, 'DATA_ROOT': toy, 'HEAD': 'mine'})
    for script, *rest in (['train.py', *given],
                          ['eval.py', f'DATA_ROOT={toy}']):
        done = subprocess.run([sys.executable, script, *rest], cwd=fork,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    net = utils.load(str(fork / 'models' / 'final.pth'))['net']
    assert any(key.startswith('emau.') for key in net)
    assert 'emau.mu' not in net


@pytest.mark.parametrize('where, runs', (('.', {'EMANet101'}),
                                         ('..', {'EMANet101', 'other'})))
def test_tensorboard_shows_experiments_by_their_folders(folder, where, runs):
    from tensorboardX import SummaryWriter
    shutil.copytree(folder, folder.parent / 'other')
    (folder.parent / 'site').mkdir()
    (folder.parent / 'site' / 'settings.py').write_text('DEBUG = True')
    for name in ('EMANet101', 'other'):
        with SummaryWriter(str(folder.parent / name / 'logdir')) as board:
            board.add_scalar('loss', 1.0, 1)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'PATH': os.path.dirname(sys.executable) + os.pathsep
           + os.environ['PATH']}
    process = subprocess.Popen(
        ['sh', 'tensorboard.sh', where, '--port', str(port)], cwd=folder,
        env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(
                        f'http://localhost:{port}/data/runs') as reply:
                    found = set(json.load(reply))
                if found == runs:
                    break
            except OSError:
                found = None
            time.sleep(0.5)
        assert found == runs
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def test_tensorboard_says_when_there_is_nothing(folder):
    done = sh(folder, 'tensorboard.sh')
    assert done.returncode == 2 and 'no log; train first' in done.stderr


def test_the_readme_speaks_of_every_script(folder):
    with open(os.path.join(REPO, 'README.md')) as file:
        text = file.read()
    for name in os.listdir(folder):
        if name.endswith(('.py', '.sh')) or name in ('classes', 'tests'):
            assert name in text, name
    assert len([n for n in os.listdir(folder) if n.endswith('.py')]) < 10
    tests = ''.join(path.read_text() for path in (folder / 'tests').iterdir()
                    if path.suffix == '.py')
    for name in re.findall(r'`(test_\w+)`', text):
        assert f'def {name}(' in tests, name


# ------------------------------------------------- the longer scripts
def test_the_benchmark_prints_its_tables(tmp_path):
    done = run('tests/bench.py', 'evaluation', '--rounds', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'pixels that differ: 0' in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    ours = [line for line in lines if line[:1] == ['ours']]
    assert len(ours) == 2 and all(float(line[1]) > 0 for line in ours)


@pytest.mark.parametrize('words, told', (
    (['bench.py', 'speed'], 'speed: areas are'),
    (['bench.py', '--rounds', 0], 'rounds at least 1'),
    (['compare.py'], 'name the folder'),
    (['compare.py', '--camvid', 'gone'], '--camvid gone: no such folder')))
def test_the_longer_scripts_refuse_in_a_line(words, told, tmp_path):
    done = run(f'tests/{words[0]}', *words[1:], cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_comparison_that_was_not_run_says_so(tmp_path):
    done = run('tests/compare.py', '--table', cwd=tmp_path)
    assert done.returncode == 0 and '| psa | not run | not run' in done.stdout
