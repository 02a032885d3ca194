"""What `sh clean.sh` removes, and what it must not.

    python -m pytest tests/test_clean.py
"""
import json
import os
import shutil
import sys

import pytest

from conftest import refused
from lib import run
from project import copy_project
from test_scripts import sh, write_files
from tools import clean

KEPT = ('models/resnet18-f37072fd.pth', 'models/step_best.pth',
        'models/step_2_mine.pth', 'models/my_latest.pth',
        'data/toy/classes.txt', 'predictions/a.png', 'logdir/mine.txt',
        'results.csv', 'results.tgz', 'other/latest.pth')
GONE = ('models/latest.pth', 'models/best.pth', 'models/final.pth',
        'models/step_20.pth', 'models/latest.pth.tmp', 'models/.lock',
        'logdir/log.csv', 'logdir/eval.json', 'logdir/confusion.png',
        'logdir/classes.png', 'logdir/samples.png', 'logdir/settings.json',
        'logdir/events.out.tfevents.1.host', 'logdir/.lock')


def write_run(folder, log='logdir', models='models', names=KEPT + GONE):
    """Write the files of a run, and some that are none of its own."""
    write_files(folder, names)
    write_files(folder, [f'{log}/settings.json'])
    (folder / log / 'settings.json').write_text(json.dumps({
        'MODEL_DIR': models, 'LOG_DIR': log}))


def run_clean(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['clean.py', *arguments])
    clean.main()


def test_clean_removes_what_a_run_made_and_nothing_else(tmp_path):
    """As a user runs it, twice; the sources stay."""
    folder = copy_project(tmp_path / 'EMANet')
    sources = {path for path in folder.rglob('*') if path.is_file()}
    write_run(folder)
    done = sh(folder, 'clean.sh')
    assert done.returncode == 0, done.stderr
    for name in GONE:
        assert f'removed {name}\n' in done.stdout
    assert f'{len(GONE)} files removed' in done.stdout
    assert all((folder / name).exists() for name in KEPT)
    assert not any((folder / name).exists() for name in GONE)
    assert all(path.exists() for path in sources)


def test_clean_removes_what_wandb_wrote_of_these_runs(tmp_path, monkeypatch):
    """No folder of another run, and nothing that a link leads to."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    gone = ['run-20260101_000000-0a', 'offline-run-20260101_000000-1b']
    kept = ['run-20260101_000000-2c', 'run-20260101_000000-0a.b', 'run-0a',
            'elsewhere']
    write_files(tmp_path / 'logdir/wandb', [
        f'{name}/files/a.png' for name in gone + kept])
    (tmp_path / 'logdir/wandb_ids.txt').write_text('0a\n1b\n.*\n')
    for name, to in (('latest-run', gone[0]), ('mine', kept[0]),
                     ('debug.log', f'{gone[1]}/files/a.png'),
                     ('run-20260101_000001-1b', 'elsewhere')):
        os.symlink(to, f'logdir/wandb/{name}')
    run_clean(monkeypatch)
    assert {*os.listdir('logdir/wandb')} == {
        *kept, 'mine', 'run-20260101_000001-1b'}
    assert os.path.exists('logdir/wandb/elsewhere/files/a.png')
    assert not os.path.exists('logdir/wandb_ids.txt')


def test_clean_removes_the_run_that_was_named(tmp_path, monkeypatch, capsys):
    """By the words that train.py was given, and by what that run recorded."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    write_run(tmp_path, 'l2', 'm2', ['m2/latest.pth', 'l2/log.csv'])
    run_clean(monkeypatch, 'LR=0.1', 'MODEL_DIR=m2', 'LOG_DIR=l2')
    assert all(os.path.exists(name) for name in KEPT + GONE)
    assert os.listdir('m2') == [] and not os.path.exists('l2')
    capsys.readouterr()
    run_clean(monkeypatch, 'MODEL_DIR=m2', 'LOG_DIR=l2')
    assert 'nothing was removed' in capsys.readouterr().out


@pytest.mark.parametrize('words, recorded, part', (
    (('MODEL_DIR=m2',), 'models', 'wrote to models; nothing was removed'),
    ((), '', 'an empty name is no folder'),
    ((), None, 'settings.json cannot be read'),
    (('m2',), 'models', 'm2: only KEY=VALUE')))
def test_clean_refuses_what_is_not_clear(tmp_path, monkeypatch, capsys, words,
                                         recorded, part):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, models=recorded)
    status, line = refused(clean.main, *words, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and part in line
    assert all(os.path.exists(name) for name in KEPT + GONE)


@pytest.mark.parametrize('text', (
    '', '[]', 'null', '{"MODEL_DIR": 3, "LOG_DIR": "logdir"}',
    '{"MODEL_DIR": "models"}', 100_000 * '[', '\0'))
def test_clean_refuses_a_record_that_is_none(tmp_path, monkeypatch, capsys,
                                             text):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    (tmp_path / 'logdir' / 'settings.json').write_text(text)
    status, line = refused(clean.main, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'logdir/settings.json' in line
    assert all(os.path.exists(name) for name in KEPT + GONE)


@pytest.mark.parametrize('models', ('{}/others', '..', '../others', '/',
                                    'models/../../others'))
def test_clean_asks_before_it_leaves_the_folder(tmp_path, monkeypatch, capsys,
                                                models):
    """A record can name any folder, as one that somebody gave away does."""
    models = models.format(tmp_path)
    write_files(tmp_path, ['latest.pth', 'others/latest.pth'])
    (tmp_path / 'project').mkdir()
    monkeypatch.chdir(tmp_path / 'project')
    write_run(tmp_path / 'project', models=models)
    status, line = refused(clean.main, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and f'add MODEL_DIR={models}' in line
    assert os.path.exists('../latest.pth')
    assert os.path.exists('../others/latest.pth')
    assert all(os.path.exists(name) for name in KEPT + GONE)
    if 'others' in models:
        run_clean(monkeypatch, f'MODEL_DIR={models}')
        assert not os.path.exists('../others/latest.pth')
        assert os.path.exists('models/latest.pth')
        assert os.path.exists('../latest.pth')


def test_clean_does_not_take_the_record_of_a_copied_log(tmp_path, monkeypatch,
                                                        capsys):
    """It names this folder's MODEL_DIR, of which it was not."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    shutil.copytree('logdir', 'copied')
    status, line = refused(clean.main, 'LOG_DIR=copied',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'a run whose LOG_DIR was logdir' in line
    assert all(os.path.exists(name) for name in KEPT + GONE)


def test_clean_leaves_folders_and_what_links_lead_to(tmp_path, monkeypatch):
    """MODEL_DIR and LOG_DIR may be links, and one folder."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, ['mine.pth', 'disk/final.pth', 'disk/log.csv'])
    os.makedirs('disk/latest.pth/mine')
    os.symlink('../mine.pth', 'disk/best.pth')
    os.symlink('disk', 'run')
    write_run(tmp_path, 'run', './run', ['run/.lock'])
    run_clean(monkeypatch, 'LOG_DIR=run')
    assert sorted(os.listdir('disk')) == ['latest.pth']
    assert os.path.islink('run') and os.path.exists('mine.pth')
    shutil.rmtree('disk/latest.pth')
    write_run(tmp_path, 'run', 'models', ['run/log.csv'])
    run_clean(monkeypatch, 'LOG_DIR=run')       # now it is empty
    assert os.path.islink('run') and os.listdir('disk') == []


def test_clean_names_what_it_cannot_remove_and_can_be_repeated(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    inner = os.remove

    def remove(path):
        if path.endswith('settings.json'):
            raise PermissionError(13, 'Permission denied', path)
        inner(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'remove', remove)
        status, line = refused(clean.main, monkeypatch=monkeypatch,
                               capsys=capsys)
    assert status == 1 and 'logdir/settings.json cannot be removed' in line
    assert [name for name in GONE if os.path.exists(name)] == [
        'logdir/settings.json']
    run_clean(monkeypatch)
    assert all(os.path.exists(name) for name in KEPT)
    assert not any(os.path.exists(name) for name in GONE)


def test_clean_leaves_a_run_at_work_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)

    def lockf(*arguments):
        raise BlockingIOError
    monkeypatch.setattr(run.fcntl, 'lockf', lockf)
    status, line = refused(clean.main, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'another train.py is at work there' in line
    assert all(os.path.exists(name) for name in KEPT + GONE)
