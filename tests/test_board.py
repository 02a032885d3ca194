"""What is seen of a run, and of several side by side: TensorBoard's figures
and pictures, eval.py --compare, both in a browser where there is one.

    python -m pytest tests/test_board.py
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
    EventAccumulator)
from tensorboard.plugins.hparams import metadata

import baselines
import browser
import dataset
import eval
import network
import settings
import train
import utils
from conftest import REPO, SMALL, refused, run, words


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


@pytest.fixture
def experiments(small, tmp_path, monkeypatch):
    """A folder of two sibling experiments, trained for 4 steps."""
    around, root = tmp_path / 'around', settings.DATA_ROOT
    before = settings.as_dict()
    for name, changes in (('EMANet18', {}),
                          ('EMANet18.t1', {'STAGE_NUM': 1, 'LR': 0.002})):
        (around / name).mkdir(parents=True)
        shutil.copy(os.path.join(REPO, 'settings.py'), around / name)
        monkeypatch.chdir(around / name)
        vars(settings).update(before)
        go(monkeypatch, *words({'DATA_ROOT': root, 'ITER_VAL': 2, **changes}))
        settings._given.clear()
    return around


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
        'Val', 'ValConfusion'}


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

    drawn = {f'{kind}/{data.ids[i]}' for kind in ('Val', 'ValBases')
             for i in (0, 1, 2, 4)}             # 4 of 5, evenly
    assert set(tags['images']) == drawn | {'ValConfusion'}
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


# ------------------------------------------------- comparison
def compared(capsys, folder):
    """Return {experiment: cells} of the table, and what stands below it."""
    capsys.readouterr()
    eval.compare(str(folder))
    lines = capsys.readouterr().out.splitlines()
    rows, below = {}, [line for line in lines if line[0] != '|']
    for line in lines[2:len(lines) - len(below)]:
        *first, last = [cell.strip() for cell in line.strip('|').split('|')]
        if first[0]:
            name = first[0]
            rows[name] = [*first[1:], last]
        else:                                   # the last column goes on
            rows[name][-1] += f' {last}'
    return rows, ' '.join(below)


def test_experiments_are_compared(experiments, capsys, monkeypatch):
    """As a user does; command lines count, not what settings.py says."""
    monkeypatch.setattr(sys, 'argv', ['eval.py', '--compare', '..'])
    eval.main()
    out = capsys.readouterr().out
    assert '| EMANet18.t1 ' in out and 'LR=0.002 STAGE_NUM=1' in out
    rows, below = compared(capsys, experiments)
    assert list(rows) == sorted(rows, key=lambda name: -float(rows[name][1]))
    for name, row in rows.items():
        with open(experiments / name / 'logdir' / 'log.csv') as file:
            log = list(csv.DictReader(file))
        best = max((float(r['val_mIoU']), -int(r['step'])) for r in log
                   if r['val_mIoU'])
        assert row[:3] == ['4 of 4', f'{100 * best[0]:.2f}', str(-best[1])]
        assert float(row[3]) == pytest.approx(np.median(
            [float(r['images_per_s']) for r in log]), abs=0.06)
    assert rows['EMANet18'][-1] == ''
    assert rows['EMANet18.t1'][-1] == 'LR=0.002 STAGE_NUM=1'
    assert below == 'the others: LR=0.009 STAGE_NUM=3'
    os.remove(experiments / 'EMANet18.t1' / 'logdir' / 'settings.json')
    again, _ = compared(capsys, experiments)    # the checkpoint knows it, too
    assert again == rows


def experiment(folder, lines=(), where='logdir', **changes):
    """Make an experiment's folder by hand."""
    folder.mkdir(exist_ok=True)
    values = {**SMALL, 'LR': 0.01, 'SCALES': (0.5, 1.0), 'LOG_DIR': 'logdir',
              'MODEL_DIR': 'models', **changes}
    (folder / 'settings.py').write_text('"""A text."""\n' + ''.join(
        f'{name} = {value!r}    # a comment\n'
        for name, value in values.items()))
    if lines:
        (folder / where).mkdir(parents=True)
        (folder / where / 'log.csv').write_bytes(b'\n'.join(lines))


HEAD = b'step,loss,lr,grad_norm,val_mIoU,val_mIoU_average,images_per_s'


def test_folders_of_every_state_are_compared(tmp_path, capsys, monkeypatch):
    """Not run, half finished, cut off, garbled, of 2019, of other projects."""
    experiment(tmp_path / 'a', [HEAD, b'1,2.0,0.01,9,,,4', b'2,1,0.01,9,0.25,'
                                b'0.5,6', b'3,1,0.01,9,0.3,0.4,5'])
    experiment(tmp_path / 'b', [HEAD, b'10,nan,0.01,,nan,,inf', b'11,0.\x00',
                                b'\xff\xfe,"', b'1'], LR=0.02)
    experiment(tmp_path / 'c', SCALES=(0.5,), DEVICES=[], NEW='x y')
    experiment(tmp_path / 'd', [HEAD], where='logdir/seed 2')
    (tmp_path / 'e').mkdir()
    (tmp_path / 'e' / 'settings.py').write_text(
        'import os\nos.mkdir("run")\nITER_MAX = 30000\nLOG_DIR = "./logdir"\n'
        'MEAN = torch.Tensor([0.5])\nDEVICES = list(range(4))\n')
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site' / 'settings.py').write_text('DEBUG = True')
    (tmp_path / 'torn').mkdir()
    (tmp_path / 'torn' / 'settings.py').write_text('ITER_MAX = (')
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    rows, below = compared(capsys, '.')
    assert list(rows) == ['a', 'b', 'c', 'd/seed 2', 'e']
    assert rows['a'][:4] == ['3 of 4', '50.00', '2', '5.0']
    assert rows['b'][:4] == ['11 of 4', '-', '-', '-']
    assert rows['c'][0] == rows['e'][0] == 'not run'
    assert rows['d/seed 2'] == ['not run', '-', '-', '-', 'settings unknown']
    assert 'LR=0.02' in rows['b'][-1] and 'LR=' not in rows['a'][-1]
    assert {'SCALES=0.5', 'DEVICES=[]', 'NEW=x', 'y'} <= set(
        rows['c'][-1].split())
    assert {'ITER_MAX=30000', 'SCALES=?', 'DEVICES=list(range(4))'} <= set(
        rows['e'][-1].split())
    assert 'SCALES=0.5,1.0' in below and 'LOG_DIR' not in below
    assert 'a: settings as settings.py has them now' in below
    assert not os.path.exists('run')
    rows, _ = compared(capsys, 'a')             # one alone, no differences
    assert rows['a'][-1] == ''
    rows, _ = compared(capsys, 'd/logdir')      # a folder of logs
    assert list(rows) == ['logdir/seed 2']


def test_a_comparison_that_cannot_be_is_refused(tmp_path, monkeypatch,
                                                capsys):
    for told, *given in (('holds no experiment', '--compare', tmp_path),
                         ('holds no experiment', '--compare', 'gone'),
                         ('goes alone', '--compare', '..', 'LR=0.1'),
                         ('goes alone', '--compare', '..', 'a.pth')):
        status, line = refused(eval.main, *given, monkeypatch=monkeypatch,
                               capsys=capsys)
        assert status == 2 and told in line


def test_a_table_fits_the_terminal(monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    many = ' '.join(f'SETTING_{i}=value' for i in range(9))
    lines = eval.table(('name', 'what differs'), [('a', many), ('b', 'x')])
    lines = lines.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 60
    assert len(lines) > 5 and all(line.count('|') == 3 for line in lines)


# ------------------------------------------------- a browser
@pytest.mark.skipif(not browser.find_browser(), reason='no Chromium')
def test_tensorboard_in_a_browser(experiments):
    done = run('tests/browser.py', experiments, cwd=experiments)
    assert done.returncode == 0, done.stderr
    assert 'TensorBoard shows EMANet18, EMANet18.t1' in done.stdout
