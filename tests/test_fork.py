"""fork.sh: an experiment's folder is a whole. It has all sources, knows where
it is from, and the tests pass in it whatever its settings.py says.

    python -m pytest tests/test_fork.py
"""
import ast
import csv
import os
import shutil
import subprocess
import sys

import pytest

import project
import settings
import utils
from lib import results
from project import EDITED, SETTINGS, copy_project
from test_scripts import sh, with_our_python, write_files

needs_git = pytest.mark.skipif(not shutil.which('git'), reason='no git')


@pytest.fixture
def folder(tmp_path):
    """A copy of the project that may have siblings."""
    return copy_project(tmp_path / 'EMANet101')


def git(folder, *words):
    return subprocess.run(
        ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words],
        cwd=folder, check=True, capture_output=True, text=True).stdout


def commit_all(folder):
    """Make the folder a repository of one commit; return the commit."""
    git(folder, 'init', '-q')
    git(folder, 'add', '-A')
    git(folder, 'commit', '-q', '-m', 'all')
    return git(folder, 'rev-parse', 'HEAD')[:12]


def fork(folder, name):
    """Fork a folder; return the new one."""
    done = sh('/', folder / 'fork.sh', name)
    assert done.returncode == 0 and not done.stderr
    assert f'../{name} is ready' in done.stdout
    return folder.parent / name


@pytest.fixture
def origin(monkeypatch):
    """Return (parent, commit) that results.csv would have in a folder."""
    def origin(folder):
        monkeypatch.setattr(utils, 'ROOT', str(folder))
        return utils.forked_from().get('parent'), utils.git_hash()
    return origin


# ------------------------------------------------- what is copied
def test_fork_makes_an_experiment(folder):
    weights = ['models/resnet18-f37072fd.pth', 'models/step_best.pth',
               'models/vit.safetensors']
    of_runs = ['models/latest.pth', 'models/step_5.pth', 'models/a.pth.tmp',
               'logdir/log.csv', 'results.csv', 'lib/__pycache__/a.pyc']
    sources = {path.relative_to(folder) for path in folder.rglob('*')
               if path.is_file()}
    write_files(folder, ['data/toy/classes.txt', *weights, *of_runs])
    first = fork(folder, "EMANet101 it's learned")
    for copy in first, fork(first, 'second'):
        assert (copy / 'data').resolve() == (folder / 'data').resolve()
        for name in weights:
            assert os.readlink(copy / name) == str(folder / name)
        assert not any((copy / name).exists() for name in of_runs)
        for name in sources:            # all that a fresh clone has
            assert (copy / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize('name, message', (
    ('EMANet101', 'exists'), ('gone', 'exists'), ('a/b', 'give a name'),
    ('..', 'give a name'), ('', 'give a name'), ('-a', 'give a name'),
    ('a' * 256, 'cannot be made')))
def test_fork_refuses_other_names(folder, name, message):
    (folder.parent / 'gone').symlink_to('nowhere')
    before = sorted(os.listdir(folder.parent))
    done = sh(folder, 'fork.sh', name)
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('fork.sh: ') and message in done.stderr
    assert sorted(os.listdir(folder.parent)) == before


def test_a_fork_that_fails_leaves_nothing(folder, monkeypatch):
    """With a tail, the last program that it runs, which fails."""
    write_files(folder, ['bin/tail', 'forked_from.txt'])
    (folder / 'bin' / 'tail').write_text('#!/bin/sh\nexit 1\n')
    (folder / 'bin' / 'tail').chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')
    assert sh(folder, 'fork.sh', 'other').returncode == 1
    assert os.listdir(folder.parent) == ['EMANet101']


# ------------------------------------------------- where it is from
@needs_git
def test_a_fork_knows_its_commit_and_whether_it_was_edited(folder, origin):
    commit = commit_all(folder)
    first = fork(folder, 'first')
    assert origin(first) == ('EMANet101', commit)
    (first / 'settings.py').write_text('LR = 1\n')
    second = fork(first, 'second')      # keeps the first commit
    assert origin(second) == ('first', commit)
    with open(second / 'lib' / 'images.py', 'a') as file:
        file.write('# edited\n')
    assert origin(second) == ('first', commit + '-edited')
    assert origin(fork(second, 'third')) == ('second', commit + '-edited')
    assert origin(first) == ('EMANet101', commit)
    (first / 'train.py').unlink()
    assert origin(first) == ('EMANet101', commit + '-edited')

    with open(folder / 'train.py', 'a') as file:
        file.write('# edited\n')
    dirty = fork(folder, 'dirty')
    assert origin(dirty) == ('EMANet101', commit + '-dirty')
    commit = commit_all(dirty)          # it is its own repository now
    assert origin(dirty) == ('EMANet101', commit)


@needs_git
def test_a_fork_is_not_of_the_repository_around_it(folder, origin):
    (folder.parent / 'a').write_text('a')
    git(folder.parent, 'init', '-q')
    git(folder.parent, 'add', 'a')
    git(folder.parent, 'commit', '-q', '-m', 'a')
    assert origin(folder) == (None, 'unknown')
    first = fork(folder, 'first')
    assert origin(first) == ('EMANet101', 'unknown')
    commit = commit_all(folder)
    assert origin(folder) == (None, commit)
    assert origin(fork(folder, 'second')) == ('EMANet101', commit)


def test_hashes_are_as_sha256sum_has_them(folder):
    """So that a user sees by it what was edited."""
    first = fork(folder, 'first')
    (first / 'heads.py').write_text('edited')
    done = subprocess.run(
        ['sha256sum', '-c', '--quiet', 'forked_from.txt'], cwd=first,
        text=True, capture_output=True, check=False)
    assert done.returncode == 1 and done.stdout == './heads.py: FAILED\n'
    assert 'tests' not in (first / 'forked_from.txt').read_text()


def test_results_tell_the_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, 'ROOT', str(tmp_path))
    (tmp_path / 'forked_from.txt').write_text(
        '# parent: EMANet, 101\n# commit: abc\n')
    results.append_result({'step': 1}, 'net', {
        'mIoU': 0.5, 'mF1': 0.5, 'classes': {}, 'precision': {}, 'recall': {},
        'F1': {}}, 1.0)
    with open('results.csv', newline='') as file:
        row, = csv.DictReader(file)
    assert row['parent'] == 'EMANet, 101' and row['git'] == 'abc'


# ------------------------------------------------- the tests in a fork
OTHERS = {
    'DATA_ROOT': 'elsewhere', 'TRAIN_SPLIT': 'mine', 'VAL_SPLIT': '',
    'N_CLASSES': 4, 'IGNORE_LABEL': 254, 'MEAN': (0.0, 0.0, 0.0),
    'STD': (1.0, 1.0, 1.0), 'SCALES': (1.0,), 'CROP_SIZE': 97,
    'NUM_WORKERS': 1, 'CACHE': True, 'HEAD': 'fcn', 'N_LAYERS': 50,
    'BACKBONE': 'convnext_atto', 'STEM': 'plain', 'STRIDE': 32,
    'DROPOUT': 0.5, 'BN_MOM': 0.1,
    'PRETRAINED': '', 'EM_CHANNELS': 64, 'EM_BASES': 4, 'STAGE_NUM': 1,
    'STAGE_NUM_EVAL': 5, 'EM_KEEP': 'learned', 'EM_MOM': 0.5,
    'EM_NORM': 'none', 'EM_GRAD': True, 'EM_ZERO_INIT': True, 'BATCH_SIZE': 4,
    'ACCUM': 2, 'ITER_MAX': 70, 'LR': 0.5, 'LR_MOM': 0.5, 'LR_DECAY': 1,
    'POLY_POWER': 0.5, 'OPTIMIZER': 'adamw', 'SCHEDULE': 'cosine',
    'WARMUP': 5, 'BACKBONE_LR': 0.1, 'CLIP_GRAD': 1.0,
    'LABEL_SMOOTHING': 0.1, 'COLOR_JITTER': 0.3, 'WEIGHT_DECAY': 0.0,
    'LOSS': 'ohem',
    'FREEZE': 'bn', 'AVERAGE': 0.5, 'AMP': 'off', 'RECOMPUTE': True,
    'SEED': 1, 'DETERMINISTIC': True, 'ITER_VAL': 7,
    'EVAL_SCALES': (0.5, 1.0), 'EVAL_FLIP': True, 'EVAL_WINDOW': 97,
    'INFERENCE': 'bf16', 'EVAL_BATCH': 3, 'EVAL_CLASSES': (1, 2),
    'DEVICES': [-1, -1], 'ITER_SAVE': 3, 'MODEL_DIR': 'other models',
    'LOG_DIR': 'other logs', 'WANDB': 'mine'}


def test_settings_are_edited_and_all_else_stays(tmp_path):
    path = tmp_path / 'settings.py'
    path.write_bytes("# ä\r\nLR = 1  # ä\r\nA, B = 1, 2\n"
                     "SCALES = (   # ä\n    0.5,\n    1.0)   # SEED = 3\n"
                     "SEED = (1 +\n        1)\nf(LR).SEED = 2\n".encode())
    project.edit_settings(path, {'LR': 0.5, 'SEED': 3, 'SCALES': (1.0,)})
    assert path.read_bytes() == (
        "# ä\r\nLR = 0.5  # ä\r\nA, B = 1, 2\n"
        "SCALES = (1.0,)   # SEED = 3\n"
        "SEED = (3)\nf(LR).SEED = 2\n").encode()


def read_settings(path):
    """Return {name: value} of a settings.py, run."""
    code = 'import settings; print(settings.as_dict())'
    return ast.literal_eval(subprocess.run(
        [sys.executable, '-c', code], cwd=path.parent, check=True, text=True,
        capture_output=True).stdout)


def test_copies_have_the_shipped_settings(folder):
    path = folder / 'settings.py'
    shipped = read_settings(path)
    assert {name: shipped[name] for name in SETTINGS} == SETTINGS
    project.edit_settings(path, OTHERS)
    assert read_settings(path) == {**shipped, **OTHERS}


@pytest.mark.long
def test_the_tests_pass_in_an_edited_fork(folder):
    """Those of settings, and some that train here and by scripts."""
    edited = fork(folder, 'edited')
    project.edit_settings(edited / 'settings.py', OTHERS)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-m', 'not long', *(
            f'tests/test_{name}.py' for name in (
                'settings', 'train', 'results', 'compare_runs', 'fork'))],
        cwd=edited, env=with_our_python(), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert 'skipped' in done.stdout     # what checks the shipped settings


@needs_git
def test_the_tests_have_the_shipped_values():
    """A default that is changed for good is to be changed in
    tests/project.py, too."""
    root = utils.ROOT
    if (utils.forked_from() or not os.path.exists(f'{root}/.git')
            or git(root, 'diff', 'HEAD', '--', 'settings.py')):
        pytest.skip('settings.py was edited')
    assert not EDITED and list(SETTINGS) == list(settings.as_dict())
