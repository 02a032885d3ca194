"""What is recorded of a run: TensorBoard's metrics, images and settings, and
what a browser shows of them, where there is one.

    python -m pytest tests/test_tensorboard.py
"""
import csv
import json
import math
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from tensorboard.plugins.hparams import metadata

import browser
import dataset
import eval
import heads
import network
import settings
import train
import utils
from conftest import REPO, SMALL, run, words
from lib.checkpoint import load
from lib.images import read_classes
from lib.logger import Logger

EM_METRICS = ('bases_moved', 'usage_entropy', 'position_entropy')


def run_train(monkeypatch, *arguments):
    """Run train.py in this process; return the rows of its log.csv."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    train.main()
    with open(os.path.join(settings.LOG_DIR, 'log.csv')) as file:
        return list(csv.DictReader(file))


def read_events(folder):
    """Return what TensorBoard reads in a folder."""
    events = EventAccumulator(str(folder), {'images': 0, 'scalars': 0})
    return events.Reload()


def read_images(events, tag):
    """Return the images (H, W, 3) of a tag."""
    return [cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8),
                         cv2.IMREAD_COLOR)[..., ::-1]
            for event in events.Images(tag)]


def scalars(events, tag):
    """Return {step: value} of a tag."""
    return {event.step: event.value for event in events.Scalars(tag)}


# ------------------------------------------------- metrics
def test_metrics_of_the_unit_by_hand():
    unit = network.EMAU(2, 4)
    one = torch.eye(4)[[0, 0, 0, 0]]            # every position has base 0
    each = torch.eye(4)                         # each has one of its own
    alike = torch.full((4, 4), 0.25)
    for z, usage, position in ((one, 0, 0), (each, 1, 0), (alike, 1, 1)):
        unit.record_entropies(z[None])
        assert unit.metrics['usage_entropy'].item() == pytest.approx(usage)
        assert unit.metrics['position_entropy'].item() == pytest.approx(
            position)
    unit.record_entropies(torch.stack([one, alike]))    # means over images
    assert unit.metrics['usage_entropy'].item() == pytest.approx(0.5)

    unit.mu.copy_(torch.tensor([[[1.0, 0, 2, 0], [0, 1, 0, 2]]]))
    unit.update_bases(torch.tensor([[[0.0, 0, 2, 0], [1, 1, 0, 2]]]))
    moved = [0.1 * math.sqrt(2), 0, 0, 0]       # of its length 1
    assert unit.metrics['bases_moved'].item() == pytest.approx(
        sum(moved) / 4)


@pytest.mark.parametrize('is_scaled', (False, True))
def test_gradient_norm(small, is_scaled):
    """Of all parameters together, without the scaler's factor."""
    net = heads.build_network().train()
    optimizer = torch.optim.SGD(train.param_groups(net), 0.1)
    scaler = torch.amp.GradScaler('cpu', enabled=is_scaled)
    torch.manual_seed(0)
    loss = net(torch.randn(2, 3, 33, 33)).square().mean()
    scaler.scale(loss).backward()
    factor = 65536 if is_scaled else 1
    want = math.sqrt(sum(param.grad.double().square().sum().item()
                         for param in net.parameters()
                         if param.grad is not None)) / factor
    metrics = train.step_metrics(net, loss.detach(), optimizer, scaler)
    assert metrics['grad_norm'].item() == pytest.approx(want, rel=1e-5)
    assert {f'EM/{name}' for name in EM_METRICS} < set(metrics)
    [(step, row)], is_stopping = train.run.read_metrics(
        [(7, ['a', 'b'], 0.5, metrics)], stop=True)
    assert is_stopping and step == 7 and row['lr'] == 0.5
    assert list(row) == [*metrics, 'lr']
    assert row['loss'] == pytest.approx(loss.item(), rel=1e-6)


def test_a_head_without_the_unit_has_no_metrics_of_it(small, monkeypatch):
    vars(settings).update(HEAD='fcn', ITER_MAX=1)
    run_train(monkeypatch)
    tags = read_events('logdir').Tags()
    assert not any('EM/' in tag for tag in tags['scalars'])
    assert {tag.split('/')[0] for tag in tags['images']} == {
        'Val', 'ValConfusion'}


def test_a_log_with_columns_of_another_version_is_continued(tmp_path):
    (tmp_path / 'log.csv').write_text(
        'step,loss,lr,val_mIoU,val_mIoU_average,images_per_s\n'
        '1,2.5,0.5,0.25,,8\n2,2,0.5,,,9\n')
    logger = Logger(str(tmp_path), 1)
    logger.log_metrics(2, loss=1, grad_norm=3)
    logger.close()
    assert (tmp_path / 'log.csv').read_text().split() == [
        ','.join(logger.COLUMNS), '1,2.5,0.5,,0.25,,,,8',
        '2,1,,3,,,,,']


# ------------------------------------------------- a run
def test_tensorboard_has_what_a_run_did(small, monkeypatch):
    """Curves, metrics of the unit, IoU of classes, images, settings."""
    vars(settings).update(ITER_VAL=2, AVERAGE=0.5)
    rows = run_train(monkeypatch)
    events = read_events('logdir')
    tags = events.Tags()
    for name in Logger.COLUMNS[1:]:     # mIoU is in per cent on the board
        group, unit = (('Accuracy', 100) if 'IoU' in name
                       else ('Curves', 1))
        assert scalars(events, f'{group}/{name}') == pytest.approx({
            int(row['step']): unit * float(row[name])
            for row in rows if row[name]})
    for name in EM_METRICS:
        values = scalars(events, f'EM/{name}').values()
        assert len(values) == 4 and all(0 < value < 1 for value in values)

    net, _ = heads.load_network('models/final.pth', 'cpu')
    data = dataset.Segmentation('val', train=False)
    scores = utils.scores(eval.evaluate(net, data))
    names, _ = read_classes(settings.DATA_ROOT, 6)
    for key in utils.PER_CLASS:
        for name, want in zip(names, scores[key], strict=True):
            if want is not None:
                assert scalars(events, f'{key}/{name}')[4] == pytest.approx(
                    100 * want)
    assert 'IoU_average/disc' in tags['scalars']
    assert min(tags['scalars']) == 'Accuracy/val_mIoU'  # first in HParams
    for tag in tags['scalars']:
        metadata_of_tag = events.SummaryMetadata(tag)
        text = metadata_of_tag.summary_description
        assert len(text) > 20, tag
        is_score = any(key in tag for key in utils.PER_CLASS)
        assert ('in per cent' in text) == is_score
        assert metadata_of_tag.display_name == tag + ', %' * is_score

    shown = {f'{kind}/{data.ids[i]}'
             for kind in ('Val', 'ValBases', 'ValQuery')
             for i in (0, 1, 2, 4)}             # 4 of 5, evenly
    assert set(tags['images']) == shown | {'ValConfusion'}
    for tag in tags['images']:
        assert [event.step for event in events.Images(tag)] == [2, 4]
    with open('logdir/settings.json') as file:
        assert json.load(file) == json.loads(json.dumps(settings.as_dict()))
    content = events.PluginTagToContent('hparams')
    hparams = metadata.parse_session_start_info_plugin_data(
        content[metadata.SESSION_START_INFO_TAG]).hparams
    assert set(hparams) == set(settings.as_dict())
    assert hparams['LR'].number_value == 0.009
    assert hparams['SCALES'].string_value == str(settings.SCALES)


def test_recording_does_not_alter_a_run(small, monkeypatch):
    """Weights are those, bit for bit, of a run that shows no images and
    records no metrics but the loss."""
    vars(settings).update(ITER_VAL=2, AVERAGE=0.5, DROPOUT=0.5)
    run_train(monkeypatch)
    vars(settings).update(MODEL_DIR='plain', LOG_DIR='plain')
    monkeypatch.setattr(train, 'validation_images', lambda *a: ())
    monkeypatch.setattr(network.EMAU, 'record_entropies', lambda *a: None)
    monkeypatch.setattr(train, 'step_metrics',
                        lambda net, loss, *a: {'loss': loss})
    run_train(monkeypatch)
    final, plain = load('models/latest.pth'), load('plain/latest.pth')
    for part in ('net', 'average'):
        for key, value in plain[part].items():
            assert torch.equal(value, final[part][key]), key
    assert torch.equal(plain['random'][0][0], final['random'][0][0])


def test_a_resume_takes_images_of_lost_steps_back(tmp_path):
    page = np.zeros((9, 9, 3), np.uint8)
    for start, steps in ((0, (2, 4, 6)), (4, (6,))):
        logger = Logger(str(tmp_path), start)
        for step in steps:
            logger.log_metrics(step, loss=float(start))
            logger.add_images(step, [('Val/a b', page + step)])
        logger.close()
        for path in tmp_path.glob('*tfevents.??*'):  # named by seconds
            path.rename(tmp_path / f'events.out.tfevents.{start}')
    events = read_events(tmp_path)
    assert scalars(events, 'Curves/loss') == {2: 0, 4: 0, 6: 4}
    assert [p[0, 0, 0] for p in read_images(events, 'Val/a_b')] == [2, 4, 6]


# ------------------------------------------------- a browser
@pytest.mark.long
@pytest.mark.skipif(not browser.find_browser(),
                    reason='no playwright or no Chromium')
def test_tensorboard_in_a_browser(toy, tmp_path):
    """Two sibling experiments, trained for 4 steps, as a user sees them."""
    for name, stages in (('EMANet18', 3), ('EMANet18.t1', 1)):
        (tmp_path / name).mkdir()
        shutil.copy(os.path.join(REPO, 'settings.py'), tmp_path / name)
        done = run('train.py', *words({
            **SMALL, 'DATA_ROOT': toy, 'STAGE_NUM': stages}),
            cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
    done = run('tests/browser.py', tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'TensorBoard shows EMANet18, EMANet18.t1' in done.stdout
