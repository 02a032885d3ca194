"""The losses by hand, weights to begin with, and README's recipes as they
stand there.

    python -m pytest tests/test_recipes.py
"""
import importlib
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from conftest import REPO, SMALL, refused, words
from test_scripts import block

import baselines
import dataset
import prepare
import settings
import train
import utils

DRAWN = torch.Generator().manual_seed(0)


def commands(heading):
    """The commands of the first shell block under a heading of README, split
    into words."""
    lines = block('sh', f'\n{heading}\n').replace('\\\n', ' ')
    return [shlex.split(line, comments=True) for line in lines.splitlines()
            if line.strip() and not line.startswith('#')]


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """A script of README as typed in tmp_path, in this process."""
    before = settings.as_dict()

    def run_it(script, *given):
        vars(settings).update(before)
        settings._given.clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr('sys.argv', [script, *given])
        importlib.import_module(script.removesuffix('.py')).main()
        return capsys.readouterr().out
    return run_it


# ------------------------------------------------- losses
def one_by_one(logits, label, weight, ohem):
    """The loss in loops over pixels."""
    by_image = []
    for each, marks in zip(logits, label):
        costs = []
        for y in range(marks.shape[0]):
            for x in range(marks.shape[1]):
                mark = marks[y, x].item()
                cost = -each[:, y, x].log_softmax(0)[mark].item() if (
                    mark != 255) else 0.0
                costs.append((cost, mark))
        if ohem:
            least = int(settings.OHEM_LEAST * len(costs))
            hardest = sorted(costs)[::-1][:least]
            bound = min(-math.log(settings.OHEM_THRESHOLD), hardest[-1][0])
            costs = [(cost, mark) for cost, mark in costs
                     if mark != 255 and cost >= bound]
        by_image.append(sum(cost * (weight[mark] if mark != 255 else 0)
                            for cost, mark in costs) / max(1, len(costs)))
    return sum(by_image) / len(by_image)


@pytest.mark.parametrize('ohem', (False, True))
@pytest.mark.parametrize('scale', (0.1, 5.0))
@pytest.mark.parametrize('weight', (None, (0.5, 2.0, 1.0)))
def test_losses_by_hand(ohem, scale, weight):
    """At scale 0.1 all pixels are below the threshold, at 5 few are."""
    vars(settings).update(LOSS='ohem' if ohem else 'cross_entropy',
                          OHEM_LEAST=0.25, N_CLASSES=3)
    logits = scale * torch.randn(2, 3, 6, 5, generator=DRAWN)
    label = logits.argmax(1)
    label[:, :1], label[1, 3:] = 1, 255
    given = None if weight is None else torch.tensor(weight)
    found = train.segmentation_loss(logits, label.to(torch.uint8), given)
    assert found.item() == pytest.approx(
        one_by_one(logits, label, weight or (1, 1, 1), ohem), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_images():
    """So that ACCUM and several processes do not change it."""
    settings.LOSS = 'ohem'
    logits = torch.randn(4, 3, 9, 9, generator=DRAWN)
    label = torch.randint(0, 3, (4, 9, 9), generator=DRAWN)
    label[1] = 255
    each = [train.segmentation_loss(*one).item()
            for one in zip(logits.split(1), label.split(1))]
    assert each[1] == 0 and min(each[0], *each[2:]) > 0
    assert train.segmentation_loss(logits, label).item() == pytest.approx(
        sum(each) / 4)


def test_an_easy_pixel_gets_no_gradient():
    vars(settings).update(LOSS='ohem', OHEM_LEAST=0.01)
    logits = torch.zeros(1, 2, 10, 10)
    logits[:, 0, :5] = 9                        # sure, and right
    logits.requires_grad_()
    train.segmentation_loss(logits, torch.zeros(1, 10, 10)).backward()
    assert logits.grad[:, :, :5].eq(0).all()
    assert logits.grad[:, :, 5:].ne(0).all()


def test_class_weights(small, toy):
    settings.CLASS_WEIGHTS = 'auto'
    data = dataset.Segmentation('train', True)
    counts = torch.zeros(6)
    for i in range(len(data)):
        label = torch.from_numpy(data.label(i)).long()
        counts += torch.stack([(label == c).sum() for c in range(6)])
    share = counts / counts.sum()
    want = 1 / torch.log(1.02 + share)
    found = train.class_weights(data, 'cpu')
    torch.testing.assert_close(found, want / (want * share).sum())
    assert (found * share).sum().item() == pytest.approx(1)
    assert found[0] < found[1:].min()           # the ground is most of all
    settings.CLASS_WEIGHTS = ''
    assert train.class_weights(data, 'cpu') is None
    for given in '1, 2,3,4,5,0.5', (1, 2, 3, 4, 5, 0.5):
        settings.CLASS_WEIGHTS = given
        assert train.class_weights(data, 'cpu').tolist() == [1, 2, 3, 4, 5,
                                                             0.5]


@pytest.mark.parametrize('word, told', (
    ('CLASS_WEIGHTS=1,2', 'or 6 numbers of at least 0'),
    ('CLASS_WEIGHTS=1,2,3,4,5,-6', 'or 6 numbers'),
    ('CLASS_WEIGHTS=0,0,0,0,0,0', 'or 6 numbers'),
    ('CLASS_WEIGHTS=some', 'CLASS_WEIGHTS=some'),
    ('LOSS=dice', "LOSS=dice: it can be 'cross_entropy', 'ohem'"),
    ('OHEM_LEAST=0', 'OHEM_LEAST=0.0: above 0'),
    ('OHEM_THRESHOLD=1.5', 'OHEM_THRESHOLD=1.5'),
    ('INIT_FROM=gone.pth', 'INIT_FROM=gone.pth is not there'),
    ('VAL_SPLIT=train', '12 images of train are in train too, such as toy_')))
def test_wrong_settings_are_refused(small, word, told, monkeypatch, capsys):
    status, line = refused(train.main, word, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and told in line


def test_ohem_with_weights_learns(small, monkeypatch):
    """As a run: the weights of the rarer classes are said, loss is finite."""
    vars(settings).update(LOSS='ohem', CLASS_WEIGHTS='auto', ITER_MAX=2)
    monkeypatch.setattr('sys.argv', ['train.py'])
    train.main()
    assert utils.load('models/final.pth')['settings']['LOSS'] == 'ohem'


# ------------------------------------------------- weights to begin with
def test_init_from_takes_what_fits(small, capsys):
    """All but the classifier of another number of classes, and says so."""
    settings.N_CLASSES = 4
    other = baselines.build_network()
    utils.save({'net': other.state_dict(), 'step': 7}, 'four.pth')
    settings.N_CLASSES, settings.INIT_FROM = 6, 'four.pth'
    net = baselines.build_network()
    drawn = net.fc2.weight.clone()
    train.load_start(net)
    told = capsys.readouterr().out
    assert 'not taken from it: fc2.weight, fc2.bias' in told
    assert 'random: fc2.weight, fc2.bias' in told
    state = other.state_dict()
    for key, value in net.state_dict().items():
        if not key.startswith('fc2'):
            assert torch.equal(value, state[key]), key
    assert torch.equal(net.fc2.weight, drawn)
    settings.N_CLASSES = 4
    train.load_start(baselines.build_network())
    assert capsys.readouterr().out == 'weights: four.pth\n'


def test_init_from_another_head_takes_the_backbone(small, capsys):
    settings.HEAD = 'fcn'
    utils.save({'net': baselines.build_network().state_dict()}, 'fcn.pth')
    settings.HEAD, settings.INIT_FROM = 'ema', 'fcn.pth'
    train.load_start(baselines.build_network())
    told = capsys.readouterr().out
    assert 'random: fc0.conv.weight, ' in told
    assert 'taken from it: fc.1.weight, fc.1.bias;' in told


def test_init_from_another_backbone_is_refused(small):
    utils.save({'net': baselines.build_network().state_dict()}, '18.pth')
    settings.N_LAYERS, settings.INIT_FROM = 34, '18.pth'
    with pytest.raises(ValueError, match='18.pth does not fit the network'):
        train.load_start(baselines.build_network())
    utils.save({'conv1.weight': torch.zeros(1)}, 'backbone.pth')
    settings.INIT_FROM = 'backbone.pth'
    with pytest.raises(ValueError, match='has no "net"'):
        train.load_start(baselines.build_network())


# ------------------------------------------------- README's commands
def test_the_three_stages(toy, tmp_path, typed):
    """COCO, trainaug, trainval: each begins with the last one's weights."""
    for name, splits in (('coco', ('train', 'val')),
                         ('voc', ('trainaug', 'trainval', 'val'))):
        root = tmp_path / 'data' / name
        shutil.copytree(toy, root)
        lists = root / prepare.LISTS
        ids = (lists / 'train.txt').read_text()
        for split in splits:
            if split != 'val':
                (lists / f'{split}.txt').write_text(ids)
    stages = commands('### The three stages')
    assert len(stages) == 3
    small = words({name: value for name, value in SMALL.items()
                   if name != 'TRAIN_SPLIT'})
    for python, script, *given in stages:
        assert python == 'python'
        out = typed(script, *given, *small, 'ITER_MAX=2')
        assert ('weights: models/' in out) == (given[0][:4] == 'INIT')
        assert 'random' not in out.partition('weights: ')[2]
        assert 'done: models/' in out
    assert 'val mIoU' not in out                # stage three has no val


def test_ones_own_pictures_in_three_commands(tmp_path, typed):
    prepare.main(['toy', '--to', str(tmp_path / 'toy'), '--train', '16',
                  '--val', '4'])
    for folder, name in (('JPEGImages', 'photos'),
                         (dataset.LABELS, 'masks')):
        shutil.move(tmp_path / 'toy' / folder, tmp_path / name)
    three = commands('### Your own pictures')
    assert [line[1] for line in three] == ['prepare.py', 'train.py',
                                           'eval.py']
    for _, script, *given in three:
        if script == 'train.py':
            given += ['PRETRAINED=', 'ITER_MAX=2', 'CROP_SIZE=65',
                      'NUM_WORKERS=0', 'EM_CHANNELS=32', 'N_CLASSES=6']
        out = typed(script, *given)
    assert re.search(r'mIoU \d+\.\d\d', out)
    assert '4 images of val' in out


@pytest.mark.parametrize('name', ('coco', 'cityscapes', 'context',
                                  'cocostuff'))
def test_a_recipe_is_one_command_and_one_diff(name, tmp_path):
    """README's command and recipes/NAME.diff set the same."""
    with open(os.path.join(REPO, 'README.md')) as file:
        command = re.search(
            rf'`python train.py (DATA_ROOT=data/{name}\b[^`]*)`',
            file.read())[1].split()
    default = settings.as_dict()
    settings.take(command)
    wanted = settings.as_dict()
    assert settings.N_CLASSES == len(utils.read_class_file(
        prepare.class_file(prepare.CLASSES.get(name, name)))[0])
    shutil.copy(os.path.join(REPO, 'settings.py'), tmp_path)
    subprocess.run(['git', 'apply', os.path.join(
        REPO, 'recipes', f'{name}.diff')], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location('changed',
                                                  tmp_path / 'settings.py')
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    assert changed.as_dict() == wanted != default
    assert wanted['CROP_SIZE'] % wanted['STRIDE'] == 1
