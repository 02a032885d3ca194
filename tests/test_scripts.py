"""The shell scripts and the examples of the docs, run as a user runs them, in
copies of the project.

    python -m pytest tests/test_scripts.py
"""
import contextlib
import glob
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from tensorboardX import SummaryWriter

from conftest import REPO, SMALL, refused, run_tool, words
from lib import checkpoint, experiments
from project import copy_project
from tools import bench, compare_heads
from tools.measure import Stopwatch

SCRIPTS = ['.ci/run'] + sorted(
    os.path.relpath(path, REPO) for folder in ('', 'recipes')
    for path in glob.glob(os.path.join(REPO, folder, '*.sh')))
PAGES = ['README.md', 'CONTRIBUTING.md'] + sorted(
    os.path.relpath(path, REPO)
    for path in glob.glob(os.path.join(REPO, 'docs', '*.md')))

FOLDERS = ['classes/', 'converters/', 'docs/', 'lib/', 'lists/', 'models/',
           'recipes/', 'tests/', 'tools/']


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
    """All of it but the length of the training and the size of images."""
    done = sh(folder, 'demo.sh', 'ITER_MAX=2', 'STRIDE=32', 'CROP_SIZE=65',
              'EM_CHANNELS=32', 'EVAL_SCALES=0.25')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'demo/predictions' in done.stdout
    predicted = os.listdir(folder / 'demo' / 'predictions')
    assert 'toy_0000.overlay.jpg' in predicted and len(predicted) == 16
    with open(folder / 'demo' / 'logdir' / 'eval.json') as file:
        result = json.load(file)
    assert result['scored']['images'] == 40
    assert list(result['classes'])[1] == 'disc'


@pytest.mark.parametrize('word', ('ITER_MAX', 'fast', '--help', '=1'))
def test_demo_takes_settings_alone(folder, word):
    done = sh(folder, 'demo.sh', 'ITER_MAX=2', word)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == (f'demo.sh: {word}: only KEY=VALUE words are taken '
                           f'here\n')
    assert not (folder / 'data').exists()


@pytest.mark.parametrize('python, others, message, status', (
    ('', {}, 'requirements.txt is not in ', 2),
    ('exit 1', {'requirements.txt': ''}, 'Python 3.10 or later is needed', 2),
    ('case $1 in -m) mkdir .venv; exit 1; esac', {'requirements.txt': ''},
     '.venv cannot be made', 1),
    ('case $1 in -m) mkdir -p .venv/bin; echo "python() { false; }" '
     '> .venv/bin/activate; esac', {'requirements.txt': ''},
     'pip could not install requirements.txt', 1)))
def test_setup_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, python,
                                            others, message, status):
    """With a stand-in for python3. What it leaves does not spoil the next
    try, and a shell that it was read into stays."""
    shutil.copy(os.path.join(REPO, 'setup.sh'), tmp_path)
    for name, text in {'bin/python3': f'#!/bin/sh\n{python}\n',
                       **others}.items():
        write_files(tmp_path, [name])
        (tmp_path / name).write_text(text)
    (tmp_path / 'bin' / 'python3').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:/usr/bin:/bin')
    for name in ('VIRTUAL_ENV', 'CONDA_PREFIX'):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        ['sh', '-c', '. ./setup.sh; echo "status $?"'], cwd=tmp_path,
        text=True, capture_output=True, check=False)
    assert done.stdout.splitlines()[-1] == f'status {status}'
    line, = done.stderr.splitlines()
    assert line.startswith(f'setup.sh: {message}')
    assert message.startswith('pip') or not (tmp_path / '.venv').exists()


@pytest.mark.parametrize('arguments, expected', (
    ([], ['not long']),
    (['-k', 'a or b'], ['not long', '-k', 'a or b']),
    (['--long'], ['long']),
    (['--long', '-k', 'a or b'], ['long', '-k', 'a or b']),
    (['-k', 'a or b', '--long'], ['long', '-k', 'a or b'])))
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
    """With stand-ins for Chromium and for test.sh."""
    write_files(tmp_path, ['.ci/run', 'bin/chromium'])
    shutil.copy(os.path.join(REPO, '.ci', 'run'), tmp_path / '.ci')
    (tmp_path / 'bin' / 'chromium').chmod(0o755)
    (tmp_path / 'test.sh').write_text(
        f'echo "test $*"; [ -n "$*" ] && exit {long}; exit {quick}\n')
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    done = sh(tmp_path, '.ci/run')
    assert done.returncode == status
    assert done.stdout == 'test \ntest --long\n'


# ------------------------------------------------- an example of the docs
@pytest.mark.long
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
    given = words({**SMALL, 'ITER_MAX': 2, 'DATA_ROOT': toy, 'HEAD': 'mine',
                   'CROP_SIZE': 33, 'EVAL_SCALES': 0.5})
    for script, *rest in (['train.py', *given],
                          ['eval.py', f'DATA_ROOT={toy}', 'EVAL_SCALES=0.5']):
        done = subprocess.run([sys.executable, script, *rest], cwd=fork,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    net = checkpoint.load(str(fork / 'models' / 'final.pth'))['net']
    assert any(key.startswith('emau.') for key in net)
    assert 'emau.mu' not in net


# ------------------------------------------------- tensorboard.sh
def write_experiments(around, logs):
    """Write experiments of settings.py that must not be run, and folders with
    events in them."""
    for name, text in logs.items():
        write_files(around, [f'{name}/settings.py'])
        (around / name / 'settings.py').write_text(
            f'open("{around}/was_run", "w")\n{text}\n')


def test_logs_of_other_folders_are_found_without_running_their_code(tmp_path):
    """By LOG_DIR, however it is edited; by settings.json, as a run on other
    words writes it."""
    around, links = tmp_path / 'around', tmp_path / 'links'
    links.mkdir()
    events = 'events.out.tfevents.1.host'
    write_experiments(around, {
        'plain': 'ITER_MAX = 3\nLOG_DIR = "log dir"', 'edited': 'LOG_DIR = (',
        'twice': 'LOG_DIR = "a"', 'absolute': f'LOG_DIR = "{tmp_path}/disk"',
        'fresh': 'LOG_DIR = "logdir"', 'other': 'DEBUG = True',
        'deep': f'X = {"-" * 1000}1'})
    write_files(tmp_path, [f'disk/{events}'])
    write_files(around, [
        f'plain/log dir/{events}', f'edited/logs/{events}',
        'edited/logs/settings.json', f'edited/unlike/{events}',
        f'twice/a/{events}', f'twice/b/deeper/{events}',
        'twice/b/settings.json', 'fresh/logdir/settings.json',
        f'no_experiment/logdir/{events}'])
    experiments.link_logs(str(around), str(links))
    assert not (around / 'was_run').exists()
    assert {str(path.relative_to(links)): path.resolve()
            for path in links.rglob('*') if path.is_symlink()} == {
        'plain': around / 'plain/log dir', 'edited': around / 'edited/logs',
        'twice/a': around / 'twice/a', 'twice/b': around / 'twice/b',
        'absolute': tmp_path / 'disk'}


@pytest.mark.parametrize('place, wanted', (
    ('logs', {'logs': 'logs'}), ('one', {'one': 'one/logdir'}),
    ('one/logdir', {'logdir': 'one/logdir'}), ('none', {})))
def test_a_folder_of_logs_and_one_experiment_are_linked(tmp_path, place,
                                                        wanted):
    links = tmp_path / 'links'
    write_experiments(tmp_path, {'one': 'LOG_DIR = "logdir"',
                                 'none': 'LOG_DIR = "logdir"'})
    write_files(tmp_path, ['logs/a/events.out.tfevents.1', 'links/x',
                           'one/logdir/events.out.tfevents.1'])
    (links / 'x').unlink()
    experiments.link_logs(str(tmp_path / place), str(links))
    assert {path.name: str(path.resolve().relative_to(tmp_path))
            for path in links.iterdir()} == wanted
    assert not (tmp_path / 'was_run').exists()


@pytest.mark.parametrize('where, runs', (('.', {'EMANet101'}),
                                         ('..', {'EMANet101', 'other'})))
def test_tensorboard_shows_experiments_by_their_folders(folder, where, runs):
    shutil.copytree(folder, folder.parent / 'other')
    (folder.parent / 'site').mkdir()
    (folder.parent / 'tmp').mkdir()
    (folder.parent / 'site' / 'settings.py').write_text(
        'DEBUG = True\nopen("was_run", "w")')
    for name in ('EMANet101', 'other'):
        with SummaryWriter(str(folder.parent / name / 'logdir')) as board:
            board.add_scalar('loss', 1.0, 1)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        ['sh', 'tensorboard.sh', where, '--port', str(port)], cwd=folder,
        env={**with_our_python(), 'TMPDIR': str(folder.parent / 'tmp')},
        stderr=subprocess.DEVNULL, start_new_session=True)
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
        process.terminate()             # the shell alone, as `kill` does
        assert process.wait(20) == 128 + signal.SIGTERM
        with pytest.raises(OSError):    # and its server has ended
            for _ in range(40):
                urllib.request.urlopen(f'http://localhost:{port}').close()
                time.sleep(0.5)
        assert not [*(folder.parent / 'tmp').glob('tmp.*')]
        assert not [*folder.parent.rglob('was_run')]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize('where, message', (
    ('', ' holds no log; train first'), ('gone', '/gone: no such folder'),
    ('tests', '/tests holds no log; train first')))
def test_tensorboard_says_when_there_is_nothing(folder, where, message):
    """A folder's name is taken as seen from where the user is."""
    done = sh(folder.parent, folder / 'tensorboard.sh', f'EMANet101/{where}')
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.endswith(message + '\n')
    assert done.stderr.startswith(f'tensorboard.sh: {folder}')
    assert done.stderr.count('\n') == 1


def test_tensorboard_is_needed(folder, monkeypatch):
    (folder / 'tensorboard.py').write_text('raise ImportError')
    done = sh(folder, 'tensorboard.sh')
    assert (done.returncode, done.stdout, done.stderr) == (
        1, '', 'tensorboard.sh: TensorBoard is not installed; run: '
        '. ./setup.sh\n')


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
    """By its module's name, as a user starts a tool."""
    done = run_tool('bench', 'evaluation', '--rounds', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = re.findall(r'^\| ours.*?\| +([\d.]+) +\|', done.stdout, re.M)
    assert len(ours) == 2 and all(float(milliseconds) > 0
                                  for milliseconds in ours)


def test_the_benchmark_trains_from_files(small, capsys):
    """The step alone, in each way, and with the loader; each row beside the
    peak of its own arithmetic."""
    watch = Stopwatch(torch.device('cpu'), 1)
    bench.race_steps(watch, 1e9)
    bench.race_end_to_end(watch, 1e9)
    out = capsys.readouterr().out
    for name in ('plain', 'ours, float32', 'ours, float32 RECOMPUTE',
                 'the step alone', 'files to updated weights'):
        assert re.search(rf'^\| {name} +(\| [\d. ]+){{4}}\| float32 +\| '
                         r'[\d.]+% +\|$', out, re.M), name
    assert 'limit, float32: ' in out and '; AMP=auto, 0 loader' in out


@pytest.mark.parametrize('tool, arguments, message', (
    (bench, ['speed'], 'speed: areas are'),
    (bench, ['--rounds', 0], 'rounds at least 1'),
    (compare_heads, [], 'name the folder'),
    (compare_heads, ['--camvid', 'gone'], '--camvid gone: no such folder')))
def test_the_longer_tools_refuse_in_a_line(tool, arguments, message, tmp_path,
                                           monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = refused(tool.main, *arguments, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and message in line


def test_a_comparison_that_was_not_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['compare_heads.py', '--table'])
    compare_heads.main()
    assert re.search(r'^\| psa +\| not run +\| not run',
                     capsys.readouterr().out, re.M)
