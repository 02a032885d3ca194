"""Runs that stop and resume, bit for bit; what they log and save meanwhile.

    python -m pytest tests/test_resume.py
"""
import glob
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import settings
import train
import utils
from conftest import REPO, SMALL, refused, words
from lib import checkpoint
from training import assert_equal_runs, pretend_gpu, run_state, train_here
from utils import RunError, UserError


# ------------------------------------------------- what is logged
@pytest.mark.parametrize('kind, lengths', (('cpu', 23 * [1]),
                                           ('gpu', [10, 5, 5, 3])))
def test_the_log_has_every_step_in_full_precision(small, monkeypatch,
                                                  kind, lengths):
    """Read every step on a CPU; every 10 on a GPU, and before a save (at 15)
    and the end (23)."""
    vars(settings).update(ITER_MAX=23, ITER_SAVE=150, VAL_SPLIT='',
                          CROP_SIZE=33, LR_DECAY=1)
    losses, read = [], []
    monkeypatch.setattr(train, 'log_start', lambda *a: None)

    def loss(*arguments, inner=train.segmentation_loss):
        losses.append(inner(*arguments))
        return losses[-1]

    def read_metrics(pending, stop, inner=train.run.read_metrics):
        read.append(len(pending))
        return inner(pending, stop)
    monkeypatch.setattr(train, 'segmentation_loss', loss)
    monkeypatch.setattr(train.run, 'read_metrics', read_metrics)
    if kind == 'gpu':
        pretend_gpu(monkeypatch)
    rows = train_here(monkeypatch)
    assert read == lengths and list(rows) == list(range(1, 24))
    for step, row in rows.items():
        value = torch.tensor(float(row['loss']))
        assert torch.equal(value, losses[step - 1].detach())    # every bit
        assert float(row['lr']) == pytest.approx(
            9e-3 * (1 - step / 23) ** 0.9, rel=1e-8)
        assert float(row['grad_norm']) > 0 < float(row['images_per_s'])
    assert len({row['loss'] for row in rows.values()}) > 20


def test_a_run_that_diverges_stops(small, monkeypatch):
    """The images are named and no checkpoint holds the spoilt weights."""
    vars(settings).update(LR=1e6, ITER_SAVE=10)
    with pytest.raises(RunError, match=r'step \d, images toy_\d+, toy_|'
                                       r'diverged: at step \d the net has'):
        train_here(monkeypatch)
    for value in checkpoint.load('models/latest.pth')['net'].values():
        assert value.isfinite().all()


@pytest.mark.parametrize('kind, spoilt, found', (
    ('cpu', 2, 2), ('gpu', 2, 3), ('gpu', 3, 3)))
def test_a_loss_is_read_before_a_save(small, monkeypatch, kind,
                                      spoilt, found):
    """One that is not finite is found at once on a CPU; on a GPU where step 3
    saves, before it does."""
    vars(settings).update(ITER_MAX=6, ITER_SAVE=30)     # saves every 3 steps
    if kind == 'gpu':
        pretend_gpu(monkeypatch)
    losses = []
    monkeypatch.setattr(train, 'log_start', lambda *a: None)

    def spoil(logits, label, weight, loss=train.segmentation_loss):
        losses.append(loss(logits, label, weight) * (
            math.nan if len(losses) + 1 == spoilt else 1))
        return losses[-1]
    monkeypatch.setattr(train, 'segmentation_loss', spoil)
    with pytest.raises(RunError, match=f'is nan at step {spoilt}, images'):
        train_here(monkeypatch)
    assert len(losses) == found
    assert not os.path.exists('models/latest.pth')


# ------------------------------------------------- stopped and resumed
@pytest.mark.parametrize('kind, stop, stopped, workers', (
    ('cpu', 4, 4, (2, 0)),
    pytest.param('gpu', 4, 6, (0, 2), marks=pytest.mark.long)))
def test_a_stopped_run_resumes_bit_for_bit(small, monkeypatch, kind,
                                           stop, stopped, workers):
    """4 or 6 steps, then the rest of 8, equal 8 in one go: 12 images in
    batches of 2 end an epoch at step 6; dropout is on. A stop request is
    honoured when metrics are read: at every step of a CPU; of a GPU where
    the next validation is."""
    vars(settings).update(ITER_MAX=8, DROPOUT=0.5, ITER_VAL=3, ITER_SAVE=150,
                          MODEL_DIR='whole', LOG_DIR='whole')
    monkeypatch.setattr(train, 'validation_images', lambda *a: ())
    if kind == 'gpu':
        pretend_gpu(monkeypatch)
    whole = train_here(monkeypatch)

    def stopping(optimizer, step, inner=train.set_learning_rate):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(optimizer, step)
    vars(settings).update(MODEL_DIR='parts', LOG_DIR='parts',
                          NUM_WORKERS=workers[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, 'set_learning_rate', stopping)
        train_here(monkeypatch)
    assert end.value.code == utils.STOPPED == 75
    assert checkpoint.load('parts/latest.pth')['step'] == stopped
    settings.NUM_WORKERS = workers[1]
    with open('parts/log.csv', 'a') as file:        # as a crash may leave it
        file.write(f'{stopped + 1},9.9,9.9,,,9.9\n')
    parts = train_here(monkeypatch)

    want = run_state('whole/latest.pth')
    assert want['step'] == 8
    assert_equal_runs('parts/latest.pth', want)
    for step in range(1, 9):
        for name in ('loss', 'lr', 'val_mIoU'):
            assert whole[step][name] == parts[step][name]
    assert [step for step, row in whole.items() if row['val_mIoU']] == [
        3, 6, 8]


def test_files_of_a_run(small, monkeypatch):
    vars(settings).update(ITER_SAVE=2, ITER_VAL=2)
    monkeypatch.setattr(train, 'validation_images', lambda *a: ())
    train_here(monkeypatch)
    assert sorted(os.listdir('models')) == [
        '.lock', 'best.pth', 'final.pth', 'latest.pth', 'step_2.pth',
        'step_4.pth']
    final = checkpoint.load('models/final.pth')
    assert final['settings'] == settings.as_dict() and final['step'] == 4
    assert final['classes'][1] == 'disc' and len(final['colours']) == 6
    assert 'optimizer' not in final
    assert checkpoint.load('models/step_2.pth')['step'] == 2
    assert any(name.startswith('events') for name in os.listdir('logdir'))


def test_a_rewound_run_resumes_from_an_older_checkpoint(small, monkeypatch):
    vars(settings).update(ITER_SAVE=2, VAL_SPLIT='')
    train_here(monkeypatch)
    want = run_state('models/latest.pth')
    os.replace('models/step_2.pth', 'models/latest.pth')
    train_here(monkeypatch)
    assert_equal_runs('models/latest.pth', want)


def test_a_changed_setting_stops_a_resume(small, monkeypatch):
    vars(settings).update(ITER_MAX=1, VAL_SPLIT='')
    train_here(monkeypatch)
    vars(settings).update(LR=0.5, NUM_WORKERS=1)
    with pytest.raises(UserError, match=r'\(LR 0.009 -> 0.5\)'):
        train_here(monkeypatch)


def test_a_latest_pth_that_no_run_wrote_is_refused(small, monkeypatch,
                                                   capsys):
    """In a line, before the labels are read where that can be."""
    vars(settings).update(ITER_MAX=1, VAL_SPLIT='')
    train_here(monkeypatch)
    state = checkpoint.load('models/latest.pth')
    os.remove('models/final.pth')
    empty = {'state': {}, 'param_groups': []}
    for change, part in (
            ({'step': 9}, 'is of step 9, beyond ITER_MAX=1'),
            ({'step': 'x'}, 'is no run to resume: its step cannot be read'),
            ({'settings': 5, 'random': None}, 'settings, random cannot be re'),
            ({'random': [[5]]}, 'cannot be resumed: its'),
            ({'optimizer': empty}, 'its optimizer is not as train.py writes'),
            (5, 'its step, best, settings, versions')):
        checkpoint.save({**state, **change} if isinstance(change, dict)
                        else change, 'models/latest.pth')
        status, line = refused(train.main, monkeypatch=monkeypatch,
                               capsys=capsys)
        assert status == 2 and part in line and 'models/latest.pth' in line


def test_another_length_is_refused_with_the_command_that_helps(small,
                                                              monkeypatch):
    """The learning rate of every step would be another; how often a run is
    validated and saved alters nothing."""
    vars(settings).update(ITER_MAX=2, VAL_SPLIT='')
    train_here(monkeypatch)
    os.remove('models/final.pth')
    vars(settings).update(ITER_VAL=5, ITER_SAVE=7)
    train_here(monkeypatch)
    vars(settings).update(ITER_MAX=4)
    with pytest.raises(UserError, match=(
            r'\(ITER_MAX 2 -> 4\); put them back, or move models/latest.pth '
            r'away .* learning rate .*: python \S*train.py STEM=plain '
            r'ITER_MAX=4 INIT_FROM=models/latest.pth MODEL_DIR=models.2 '
            r'LOG_DIR=logdir.2$')):
        train_here(monkeypatch, 'STEM=plain')
    words = 'ITER_MAX=4 INIT_FROM=models/latest.pth MODEL_DIR=m2 LOG_DIR=l2'
    assert list(train_here(monkeypatch, *words.split())) == [1, 2, 3, 4]


def test_a_finished_run_says_so_and_ends(small, monkeypatch, capsys):
    """Without another event file, and before the labels are read."""
    vars(settings).update(ITER_MAX=1, VAL_SPLIT='')
    train_here(monkeypatch)
    written = {name: os.path.getmtime(name)
               for folder in ('models', 'logdir')
               for name in glob.glob(f'{folder}/*')}
    monkeypatch.setattr(train, 'open_data', None)
    train_here(monkeypatch, 'ITER_MAX=1')
    assert ('finished at step 1: models/final.pth; to train on from its '
            'weights: python') in capsys.readouterr().out
    assert written == {name: os.path.getmtime(name)
                       for folder in ('models', 'logdir')
                       for name in glob.glob(f'{folder}/*')}


def test_weights_that_are_not_finite_are_never_saved(small, monkeypatch):
    """Of the last step, whose loss does not show it."""
    vars(settings).update(ITER_MAX=2, ITER_SAVE=10)

    def spoil(net, inner=train.set_train_mode):
        inner(net)
        net.extractor[0].weight.register_hook(lambda grad: grad * math.inf)
    monkeypatch.setattr(train, 'set_train_mode', spoil)
    monkeypatch.setattr(train, 'validate', None)        # comes after
    with pytest.raises(RunError, match=(
            r'^the run has diverged: at step 1 the net has numbers that are '
            r'not finite \(extractor.0.weight\); nothing was saved')):
        train_here(monkeypatch)
    assert os.listdir('models') == ['.lock']


def test_a_run_of_yesterday_is_not_resumed(small, monkeypatch, capsys):
    """Its settings and SGD's groups have other names; a line says so."""
    vars(settings).update(ITER_MAX=1, VAL_SPLIT='')
    train_here(monkeypatch)
    state = checkpoint.load('models/latest.pth')
    recorded = state['settings']
    recorded.update(CLASS_WEIGHTS='', OHEM_LEAST=recorded.pop(
        'OHEM_MIN_KEPT'))
    del recorded['BALANCE_CLASSES']
    for group in state['optimizer']['param_groups']:
        group['times'] = group.pop('lr_factor')
    checkpoint.save(state, 'models/latest.pth')
    status, line = refused(train.main, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2
    for part in ('models/latest.pth', '(OHEM_LEAST)', 'finish the run with '
                 'that version', 'INIT_FROM'):
        assert part in line
    assert checkpoint.load('models/latest.pth')['step'] == 1


def test_ctrl_c_finishes_the_step_and_says_how_to_resume(toy, tmp_path):
    """To the whole process group, as a terminal sends it."""
    given = words({**SMALL, 'DATA_ROOT': toy, 'ITER_MAX': 5000,
                   'NUM_WORKERS': 1})
    process = subprocess.Popen(
        [sys.executable, os.path.join(REPO, 'train.py'), *given],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    log = tmp_path / 'logdir' / 'log.csv'
    for _ in range(600):
        if log.exists() and log.read_text().count('\n') > 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == utils.STOPPED, err
    assert 'Traceback' not in err and 'to resume: python ' in out
    steps = log.read_text().strip().splitlines()[-1].split(',')[0]
    path = str(tmp_path / 'models' / 'latest.pth')
    assert checkpoint.load(path)['step'] == int(steps)
