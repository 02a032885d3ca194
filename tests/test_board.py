"""What is seen of a run: TensorBoard's figures and pictures.

    python -m pytest tests/test_board.py
"""
import csv
import json
import math
import os
import sys

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator)
from tensorboard.plugins.hparams import metadata

import baselines
import dataset
import eval
import network
import settings
import train
import utils


def go(monkeypatch, *arguments):
    """Run train.py in this process; return the rows of its log.csv."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    train.main()
    with open(os.path.join(settings.LOG_DIR, 'log.csv')) as file:
        return list(csv.DictReader(file))


def board(folder):
    """Return what TensorBoard reads in a folder."""
    events = EventAccumulator(str(folder), {'images': 0, 'scalars': 0})
    return events.Reload()


def pictures(events, tag):
    """Return the pictures (H, W, 3) of a tag."""
    return [cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8),
                         cv2.IMREAD_COLOR)[..., ::-1]
            for event in events.Images(tag)]


# ------------------------------------------------- figures
def test_figures_of_the_unit_by_hand():
    unit = network.EMAU(2, 4)
    one = torch.eye(4)[[0, 0, 0, 0]]            # every position has base 0
    each = torch.eye(4)                         # each has one of its own
    alike = torch.full((4, 4), 0.25)
    for z, use, position in ((one, 0, 0), (each, 1, 0), (alike, 1, 1)):
        unit.watch(z[None])
        assert unit.figures['entropy_of_use'].item() == pytest.approx(use)
        assert unit.figures['entropy_of_position'].item() == pytest.approx(
            position)
    unit.watch(torch.stack([one, alike]))       # means over images
    assert unit.figures['entropy_of_use'].item() == pytest.approx(0.5)

    unit.mu.copy_(torch.tensor([[[1.0, 0, 2, 0], [0, 1, 0, 2]]]))
    unit.move(torch.tensor([[[0.0, 0, 2, 0], [1, 1, 0, 2]]]))
    moved = [0.1 * math.sqrt(2), 0, 0, 0]       # of its length 1
    assert unit.figures['bases_moved'].item() == pytest.approx(
        sum(moved) / 4)


@pytest.mark.parametrize('scaled', (False, True))
def test_the_gradients_norm(small, scaled):
    """Of all parameters together, without the scaler's factor."""
    net = baselines.build_network().train()
    optimizer = torch.optim.SGD(train.param_groups(net), 0.1)
    scaler = torch.amp.GradScaler('cpu', enabled=scaled)
    torch.manual_seed(0)
    loss = net(torch.randn(2, 3, 33, 33)).square().mean()
    scaler.scale(loss).backward()
    factor = 65536 if scaled else 1
    want = math.sqrt(sum(param.grad.double().square().sum().item()
                         for param in net.parameters()
                         if param.grad is not None)) / factor
    found = train.watch(net, loss.detach(), optimizer, scaler)
    assert found['grad_norm'].item() == pytest.approx(want, rel=1e-5)
    assert {'EM/bases_moved', 'EM/entropy_of_use'} < set(found)
    told, stop = utils.Told(found, True).read()
    assert stop and list(told) == list(found)
    assert told['loss'] == pytest.approx(loss.item(), rel=1e-6)


def test_a_head_without_the_unit_has_no_such_figures(small, monkeypatch):
    vars(settings).update(HEAD='fcn', ITER_MAX=1)
    go(monkeypatch)
    tags = board('logdir').Tags()
    assert not any('EM/' in tag for tag in tags['scalars'])
    assert {tag.split('/')[0] for tag in tags['images']} == {
        'Val', 'Val_confusion'}


def test_a_log_of_another_versions_columns_goes_on(tmp_path):
    (tmp_path / 'log.csv').write_text(
        'step,loss,lr,val_mIoU,val_mIoU_average,images_per_s\n'
        '1,2.5,0.5,0.25,,8\n2,2,0.5,,,9\n')
    log = utils.Log(str(tmp_path), 1)
    log.write(2, loss=1, grad_norm=3)
    log.close()
    assert (tmp_path / 'log.csv').read_text().split() == [
        ','.join(log.COLUMNS), '1,2.5,0.5,,0.25,,8', '2,1,,3,,,']


# ------------------------------------------------- a run
def test_what_tensorboard_is_told_of_a_run(small, monkeypatch):
    """And that telling it changes nothing: weights are those, bit for bit,
    of a run that draws no pictures and watches nothing."""
    vars(settings).update(ITER_VAL=2, AVERAGE=0.5, DROPOUT=0.5)
    rows = go(monkeypatch)
    events = board('logdir')
    tags = events.Tags()
    for name in utils.Log.COLUMNS[1:]:
        told = {e.step: e.value for e in events.Scalars(f'Curves/{name}')}
        assert told == pytest.approx({
            int(row['step']): float(row[name]) for row in rows if row[name]})
    for name in ('bases_moved', 'entropy_of_use', 'entropy_of_position'):
        values = [event.value for event in events.Scalars(f'EM/{name}')]
        assert len(values) == 4 and all(0 < value < 1 for value in values)

    net, _ = eval.load_network('models/final.pth', 'cpu')
    data = dataset.Segmentation('val', train=False)
    iou = utils.scores(eval.measure(net, data))['IoU']
    names, colours = utils.read_classes(settings.DATA_ROOT, 6)
    for name, want in zip(names, iou):
        assert events.Scalars(f'IoU/{name}')[-1].value == pytest.approx(want)
    assert 'IoU_average/disc' in tags['scalars']

    drawn = {f'{kind}/{data.ids[i]}' for kind in ('Val', 'Val_bases')
             for i in (0, 1, 2, 4)}             # 4 of 5, evenly
    assert set(tags['images']) == drawn | {'Val_confusion'}
    for tag in tags['images']:
        assert [event.step for event in events.Images(tag)] == [2, 4]
    with open('logdir/settings.json') as file:
        assert json.load(file) == json.loads(json.dumps(settings.as_dict()))
    content = events.PluginTagToContent('hparams')
    told = metadata.parse_session_start_info_plugin_data(
        content[metadata.SESSION_START_INFO_TAG]).hparams
    assert set(told) == set(settings.as_dict())
    assert told['LR'].number_value == 0.009
    assert told['SCALES'].string_value == str(settings.SCALES)

    final = utils.load('models/latest.pth')
    vars(settings).update(MODEL_DIR='plain', LOG_DIR='plain')
    monkeypatch.setattr(eval, 'drawings', lambda *a: ())
    monkeypatch.setattr(network.EMAU, 'watch', lambda *a: None)
    monkeypatch.setattr(train, 'watch', lambda net, loss, *a: {'loss': loss})
    go(monkeypatch)
    plain = utils.load('plain/latest.pth')
    for part in ('net', 'average'):
        for key, value in plain[part].items():
            assert torch.equal(value, final[part][key]), key
    assert torch.equal(plain['random'][0][0], final['random'][0][0])


def test_a_resume_takes_pictures_of_lost_steps_back(tmp_path):
    page = np.zeros((9, 9, 3), np.uint8)
    for start, steps in ((0, (2, 4, 6)), (4, (6,))):
        log = utils.Log(str(tmp_path), start)
        for step in steps:
            log.write(step, loss=float(start))
            log.pictures(step, [('Val/a b', page + step)])
        log.close()
        for path in tmp_path.glob('*tfevents.??*'):  # named by seconds
            path.rename(tmp_path / f'events.out.tfevents.{start}')
    events = board(tmp_path)
    assert [e.value for e in events.Scalars('Curves/loss')] == [0, 0, 4]
    assert [p[0, 0, 0] for p in pictures(events, 'Val/a_b')] == [2, 4, 6]


def test_a_sample_is_drawn_in_the_classes_colours():
    """Image, label, prediction and error of halves: left void, right wrong
    below."""
    image = np.full((256, 256, 3), 100, np.uint8)
    label, pred = np.zeros((2, 256, 256), np.uint8)
    label[:, :128], label[:128, 128:], pred[:, 128:] = 255, 1, 1
    red, blue = [200, 0, 0], [0, 0, 200]
    page = eval.draw_sample(image, label, pred, ['ground', 'cat', 'dog'],
                            [red, blue, [0, 99, 0]])
    step, void = (page.shape[1] - 6) // 4, [224, 224, 192]

    def at(panel, row, column):
        return page[6 + row, 6 + panel * step + column].tolist()
    assert at(0, 50, 50) == at(0, 200, 200) == [100] * 3
    assert [at(1, 50, 50), at(1, 50, 200), at(1, 200, 200)] == [
        void, blue, red]
    assert [at(2, 50, 50), at(2, 50, 200), at(2, 200, 200)] == [
        red, blue, blue]
    assert [at(3, 50, 50), at(3, 50, 200), at(3, 200, 200)] == [
        void, [178] * 3, [220, 20, 20]]
    key = page[290:].reshape(-1, 3).tolist()
    assert red in key and blue in key and void in key
    assert [0, 99, 0] not in key                # no dog
