"""The shell scripts and the examples of the docs, run as a user runs them, in
copies of the project.

    python -m pytest tests/test_scripts.py
"""
import glob
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tensorboardX import SummaryWriter

from conftest import REPO, SMALL, run_tool, words
from lib import checkpoint

SCRIPTS = ['.ci/run'] + sorted(
    os.path.relpath(path, REPO) for folder in ('', 'recipes')
    for path in glob.glob(os.path.join(REPO, folder, '*.sh')))
PAGES = ['README.md', 'CONTRIBUTING.md'] + sorted(
    os.path.relpath(path, REPO)
    for path in glob.glob(os.path.join(REPO, 'docs', '*.md')))

FOLDERS = ['classes/', 'converters/', 'docs/', 'lib/', 'lists/', 'models/',
           'recipes/', 'tests/', 'tools/']


def copy_project(to):
    """Copy the project to a folder, as a fresh clone has it."""
    shutil.copytree(REPO, to, ignore=shutil.ignore_patterns(
        '.git', '.venv', 'data', 'demo', 'logdir', '*.pth', 'predictions',
        'compare', 'results', 'results.csv', 'results.tgz', '__pycache__',
        '.pytest_cache', '.ruff_cache'))
    return to


def write_files(folder, names):
    """Write a file of its own name under each name in a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def with_our_python():
    """Return the environment with the Python of these tests active."""
    return {**os.environ, 'VIRTUAL_ENV': sys.prefix,
            'PATH': os.path.dirname(sys.executable) + os.pathsep
            + os.environ['PATH']}


def sh(folder, *arguments):
    """Run a script by sh, in the environment of these tests."""
    return subprocess.run(
        ['sh', *map(str, arguments)], cwd=folder, env=with_our_python(),
        text=True, capture_output=True, timeout=400)


def read_blocks(kind, page):
    """Return the code blocks of a kind on a page, [str]."""
    with open(os.path.join(REPO, page)) as file:
        return re.findall(rf'```{kind}\n(.*?)```', file.read(), re.S)


@pytest.fixture
def folder(tmp_path):
    """A copy of the project that may have siblings."""
    return copy_project(tmp_path / 'EMANet101')


# ------------------------------------------------- all scripts
@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_stop_at_the_first_error(name):
    with open(os.path.join(REPO, name)) as file:
        text = file.read()
    assert text.startswith('#!/bin/sh\n# ')
    if name != 'setup.sh':              # it is sourced
        assert '\nset -eu\ncd "$(dirname "$0")' in text


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck')
def test_scripts_pass_shellcheck():
    done = subprocess.run(['shellcheck', *SCRIPTS], cwd=REPO, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout


def test_demo(folder):
    """All of it but the length of the training."""
    done = sh(folder, 'demo.sh', 'ITER_MAX=2', 'STRIDE=32')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'demo/predictions' in done.stdout
    predicted = os.listdir(folder / 'demo' / 'predictions')
    assert 'toy_0000.overlay.jpg' in predicted and len(predicted) == 16
    with open(folder / 'demo' / 'logdir' / 'eval.json') as file:
        result = json.load(file)
    assert result['scored']['images'] == 40
    assert list(result['classes'])[1] == 'disc'


@pytest.mark.parametrize('arguments, expected', (
    ([], ['not long']),
    (['-k', 'a or b'], ['not long', '-k', 'a or b']),
    (['--long'], ['long']),
    (['--long', '-k', 'a or b'], ['long', '-k', 'a or b'])))
def test_test_sh_lints_then_runs_quick_or_long_tests(arguments, expected,
                                                     tmp_path):
    """With a pytest that prints its arguments."""
    for name in ('test.sh', 'ruff.toml'):
        shutil.copy(os.path.join(REPO, name), tmp_path)
    (tmp_path / 'setup.sh').write_text('echo "$REQUIREMENTS"')
    (tmp_path / 'pytest.py').write_text('import sys\n\nprint(sys.argv[1:])\n')
    done = sh(tmp_path, 'test.sh', *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == 'requirements-dev.txt'
    assert lines[-1] == str(['tests', '-q', '-n', '2', '--dist', 'worksteal',
                             '-m', *expected])
    (tmp_path / 'unused.py').write_text('import os\n')
    done = sh(tmp_path, 'test.sh', *arguments)
    assert done.returncode == 1 and 'F401' in done.stdout
    assert 'worksteal' not in done.stdout


@pytest.mark.parametrize('quick, long, status', ((0, 0, 0), (1, 0, 1),
                                                 (0, 1, 1)))
def test_ci_runs_all_tests_and_fails_where_some_fail(quick, long, status,
                                                     tmp_path, monkeypatch):
    """With stand-ins for what it installs and for test.sh."""
    write_files(tmp_path, ['.ci/run', 'bin/chromium'])
    shutil.copy(os.path.join(REPO, '.ci', 'run'), tmp_path / '.ci')
    (tmp_path / 'bin' / 'chromium').chmod(0o755)
    (tmp_path / 'setup.sh').write_text('')
    (tmp_path / 'pip.py').write_text('raise SystemExit(1)\n')
    (tmp_path / 'test.sh').write_text(
        f'echo "test $*"; [ -n "$*" ] && exit {long}; exit {quick}\n')
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    done = sh(tmp_path, '.ci/run')
    assert done.returncode == status
    assert done.stdout == 'test \ntest --long\n'
    assert 'playwright could not be installed' in done.stderr


# ------------------------------------------------- clean.sh
def test_clean_removes_what_a_run_made_and_nothing_else(folder):
    kept = ['models/resnet18-f37072fd.pth', 'models/step_best.pth',
            'data/toy/classes.txt', 'predictions/a.png', 'logdir/mine.txt',
            'results.csv', 'results.tgz']
    gone = ['models/latest.pth', 'models/best.pth', 'models/final.pth',
            'models/step_20.pth', 'models/latest.pth.tmp',
            'logdir/log.csv', 'logdir/eval.json', 'logdir/confusion.png',
            'logdir/classes.png', 'logdir/settings.json',
            'logdir/events.out.tfevents.1.host']
    sources = {path for path in folder.rglob('*') if path.is_file()}
    write_files(folder, kept + gone)
    for _ in range(2):
        done = sh(folder, 'clean.sh')
        assert done.returncode == 0, done.stderr
        assert all((folder / name).exists() for name in kept)
        assert not any((folder / name).exists() for name in gone)
        assert all(path.exists() for path in sources)


def test_clean_follows_the_settings(folder):
    path = folder / 'settings.py'
    path.write_text(path.read_text().replace("= 'models'", "= 'my models'")
                    .replace("= 'logdir'", "= 'my log'"))
    write_files(folder, ('my models/latest.pth', 'my log/log.csv',
                         'models/latest.pth'))
    assert sh(folder, 'clean.sh').returncode == 0
    assert not (folder / 'my models' / 'latest.pth').exists()
    assert not (folder / 'my log').exists()
    assert (folder / 'models' / 'latest.pth').exists()


# ------------------------------------------------- fork.sh
def test_fork_makes_an_experiment(folder):
    weights = 'models/resnet18-f37072fd.pth'
    of_runs = ['models/latest.pth', 'models/step_5.pth', 'logdir/log.csv',
               'results.csv', 'lib/__pycache__/a.pyc']
    sources = {path.relative_to(folder) for path in folder.rglob('*')
               if path.is_file()}
    write_files(folder, ['data/toy/classes.txt', weights, *of_runs])
    done = sh(folder, 'fork.sh', 'EMANet101.learned')
    assert done.returncode == 0, done.stderr
    fork = folder.parent / 'EMANet101.learned'
    assert (fork / 'data').resolve() == (folder / 'data').resolve()
    assert (fork / weights).read_text() == weights
    assert not any((fork / name).exists() for name in of_runs)
    for name in sources:                # all that a fresh clone has
        assert (fork / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize('name', ('EMANet101', 'a/b', '..', '', '-a'))
def test_fork_refuses_other_names(folder, name):
    done = sh(folder, 'fork.sh', name)
    assert done.returncode == 2 and 'fork.sh' in done.stderr


def test_your_own_head_in_20_lines(folder, toy):
    """The patch of the docs, in a fork, trains and evaluates."""
    patch = read_blocks('diff', 'docs/your_own_head.md')[0]
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
    net = checkpoint.load(str(fork / 'models' / 'final.pth'))['net']
    assert any(key.startswith('emau.') for key in net)
    assert 'emau.mu' not in net


# ------------------------------------------------- tensorboard.sh
@pytest.mark.parametrize('where, runs', (('.', {'EMANet101'}),
                                         ('..', {'EMANet101', 'other'})))
def test_tensorboard_shows_experiments_by_their_folders(folder, where, runs):
    shutil.copytree(folder, folder.parent / 'other')
    (folder.parent / 'site').mkdir()
    (folder.parent / 'site' / 'settings.py').write_text('DEBUG = True')
    for name in ('EMANet101', 'other'):
        with SummaryWriter(str(folder.parent / name / 'logdir')) as board:
            board.add_scalar('loss', 1.0, 1)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        ['sh', 'tensorboard.sh', where, '--port', str(port)], cwd=folder,
        env=with_our_python(), stderr=subprocess.DEVNULL,
        start_new_session=True)
    found = None
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(
                        f'http://localhost:{port}/data/runs') as reply:
                    found = set(json.load(reply))
            except OSError:
                found = None
            if found == runs:
                break
            time.sleep(0.5)
        assert found == runs
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def test_tensorboard_says_when_there_is_nothing(folder):
    done = sh(folder, 'tensorboard.sh')
    assert done.returncode == 2 and 'no log; train first' in done.stderr


# ------------------------------------------------- what the docs name
def test_the_readme_names_every_script():
    with open(os.path.join(REPO, 'README.md')) as file:
        text = file.read()
    scripts = [name for name in os.listdir(REPO)
               if name.endswith(('.py', '.sh'))]
    for name in scripts + FOLDERS:
        assert name in text, name
    assert len([name for name in scripts if name.endswith('.py')]) < 10


@pytest.mark.parametrize('page', PAGES)
def test_the_docs_name_tests_that_exist(page):
    tests = ''
    for path in glob.glob(os.path.join(REPO, 'tests', '*.py')):
        with open(path) as file:
            tests += file.read()
    with open(os.path.join(REPO, page)) as file:
        for name in re.findall(r'`(test_\w+)`', file.read()):
            assert f'def {name}(' in tests, name


def test_the_contributing_guide_names_what_exists():
    with open(os.path.join(REPO, 'CONTRIBUTING.md')) as file:
        text = file.read()
    named = re.findall(r'`((?:\w+\.)+\w+)`', text)
    for name in named:
        if name.endswith(('.py', '.md', '.sh')):
            assert os.path.exists(os.path.join(REPO, name)), name
        else:
            pkgutil.resolve_name(name)
    assert len(named) > 10


# ------------------------------------------------- the longer tools
def test_the_benchmark_prints_its_tables(tmp_path):
    done = run_tool('bench', 'evaluation', '--rounds', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = re.findall(r'^\| ours.*?\| +([\d.]+) +\|', done.stdout, re.M)
    assert len(ours) == 2 and all(float(milliseconds) > 0
                                  for milliseconds in ours)


@pytest.mark.parametrize('tool, arguments, message', (
    ('bench', ['speed'], 'speed: areas are'),
    ('bench', ['--rounds', 0], 'rounds at least 1'),
    ('compare_heads', [], 'name the folder'),
    ('compare_heads', ['--camvid', 'gone'], '--camvid gone: no such folder')))
def test_the_longer_tools_refuse_in_a_line(tool, arguments, message,
                                           tmp_path):
    done = run_tool(tool, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_comparison_that_was_not_run_says_so(tmp_path):
    done = run_tool('compare_heads', '--table', cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r'^\| psa +\| not run +\| not run', done.stdout, re.M)
