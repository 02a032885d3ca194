"""The losses by hand, weights to start from, recipes/*.sh as a user runs them
and the docs' commands for one's own images.

    python -m pytest tests/test_recipes.py
"""
import glob
import importlib
import json
import math
import os
import re
import shlex
import shutil
import tarfile

import pytest
import torch

import dataset
import heads
import prepare
import settings
import train
from conftest import REPO, SMALL, refused, words
from lib import checkpoint, images, pretrained
from lib.inference import fit_grid
from lib.pretrained import load_initial_weights
from test_scripts import PAGES, copy_project, read_blocks, sh
from utils import UserError

GENERATOR = torch.Generator().manual_seed(0)
RECIPES = sorted(path for path in glob.glob(os.path.join(
    REPO, 'recipes', '*.sh')) if not path.endswith('slurm.sh'))
# a recipe's own data and classes stay; the network becomes one of seconds
SMOKE = {name: value for name, value in {**SMALL, 'ITER_MAX': 2}.items()
         if name not in ('TRAIN_SPLIT', 'N_CLASSES')}


def read_commands(text):
    """Return the Python commands of a shell script, each split into words.
    """
    lines = [shlex.split(line, comments=True)
             for line in text.replace('\\\n', ' ').splitlines()]
    return [words for words in lines if words[:1] == ['python']]


# ------------------------------------------------- losses
def loss_by_loops(logits, label, weight, ohem):
    """The loss in loops over pixels."""
    losses = []
    for image, marks in zip(logits, label, strict=True):
        costs = []
        for y in range(marks.shape[0]):
            for x in range(marks.shape[1]):
                mark = marks[y, x].item()
                cost = -image[:, y, x].log_softmax(0)[mark].item() if (
                    mark != 255) else 0.0
                costs.append((cost, mark))
        if ohem:
            least = int(settings.OHEM_MIN_KEPT * len(costs))
            hardest = sorted(costs)[::-1][:least]
            bound = min(-math.log(settings.OHEM_THRESHOLD), hardest[-1][0])
            costs = [(cost, mark) for cost, mark in costs
                     if mark != 255 and cost >= bound]
        losses.append(sum(cost * (weight[mark] if mark != 255 else 0)
                          for cost, mark in costs) / max(1, len(costs)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize('ohem', (False, True))
@pytest.mark.parametrize('scale', (0.1, 5.0))
@pytest.mark.parametrize('weight', (None, (0.5, 2.0, 1.0)))
def test_losses_by_hand(ohem, scale, weight):
    """At scale 0.1 all pixels are below the threshold, at 5 few are."""
    vars(settings).update(LOSS='ohem' if ohem else 'cross_entropy',
                          OHEM_MIN_KEPT=0.25, N_CLASSES=3)
    logits = scale * torch.randn(2, 3, 6, 5, generator=GENERATOR)
    label = logits.argmax(1)
    label[:, :1], label[1, 3:] = 1, 255
    given = None if weight is None else torch.tensor(weight)
    found = train.segmentation_loss(logits, label.to(torch.uint8), given)
    assert found.item() == pytest.approx(
        loss_by_loops(logits, label, weight or (1, 1, 1), ohem), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_images():
    """So that ACCUM and several processes do not change it."""
    settings.LOSS = 'ohem'
    logits = torch.randn(4, 3, 9, 9, generator=GENERATOR)
    label = torch.randint(0, 3, (4, 9, 9), generator=GENERATOR)
    label[1] = 255
    each = [train.segmentation_loss(*one).item()
            for one in zip(logits.split(1), label.split(1), strict=True)]
    assert each[1] == 0 and min(each[0], *each[2:]) > 0
    assert train.segmentation_loss(logits, label).item() == pytest.approx(
        sum(each) / 4)


def test_an_easy_pixel_gets_no_gradient():
    vars(settings).update(LOSS='ohem', OHEM_MIN_KEPT=0.01)
    logits = torch.zeros(1, 2, 10, 10)
    logits[:, 0, :5] = 9                        # sure, and right
    logits.requires_grad_()
    train.segmentation_loss(logits, torch.zeros(1, 10, 10)).backward()
    assert logits.grad[:, :, :5].eq(0).all()
    assert logits.grad[:, :, 5:].ne(0).all()


# ------------------------------------------------- class weights
def test_balanced_classes_weigh_by_frequency(small):
    settings.BALANCE_CLASSES = True
    data = dataset.Segmentation('train', True)
    counts = torch.zeros(6)
    for i in range(len(data)):
        label = torch.from_numpy(data.read(i)[1]).long()
        counts += torch.stack([(label == c).sum() for c in range(6)])
    share = counts / counts.sum()
    expected = 1 / torch.log(1.02 + share)
    found = train.class_weights(data, 'cpu')
    torch.testing.assert_close(found, expected / (expected * share).sum())
    assert (found * share).sum().item() == pytest.approx(1)
    assert found[0] < found[1:].min()           # the ground is most of all


@pytest.mark.parametrize('word, weights', (
    ('CLASS_WEIGHTS=()', None),
    ('CLASS_WEIGHTS=1, 2,3,4,5,0.5', [1, 2, 3, 4, 5, 0.5]),
    ('CLASS_WEIGHTS=(1, 2, 3, 4, 5, 0.5)', [1, 2, 3, 4, 5, 0.5])))
def test_class_weights_are_taken_as_given(small, word, weights):
    settings.override_all([word])
    found = train.class_weights(dataset.Segmentation('train', True), 'cpu')
    assert weights == (None if found is None else found.tolist())


@pytest.mark.parametrize('word, message', (
    ('CLASS_WEIGHTS=1,2', 'or 6 numbers that are not all 0'),
    ('CLASS_WEIGHTS=1,2,3,4,5,-6', 'CLASS_WEIGHTS=(1.0, 2.0, 3.0, 4.0, 5.0, '
     '-6.0): it can be 0 to 1,000,000'),
    ('CLASS_WEIGHTS=0,0,0,0,0,0', 'or 6 numbers that are not all 0'),
    ('CLASS_WEIGHTS=some', 'CLASS_WEIGHTS=some'),
    ('CLASS_WEIGHTS=auto', 'BALANCE_CLASSES=True'),
    ('LOSS=dice', "LOSS=dice: it can be 'cross_entropy', 'ohem'"),
    ('OHEM_MIN_KEPT=0', 'OHEM_MIN_KEPT=0.0: it can be 0.0001 to 1'),
    ('OHEM_LEAST=0.1', 'OHEM_LEAST is now OHEM_MIN_KEPT'),
    ('OHEM_THRESHOLD=1.5', 'OHEM_THRESHOLD=1.5'),
    ('INIT_FROM=gone.pth', 'gone.pth is not there'),
    ('VAL_SPLIT=train', '12 images of train are in train too, such as toy_')))
def test_wrong_settings_are_refused(small, word, message, monkeypatch,
                                    capsys):
    status, line = refused(train.main, word, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and message in line


def test_ohem_with_balanced_classes_trains(small, monkeypatch):
    vars(settings).update(LOSS='ohem', BALANCE_CLASSES=True, ITER_MAX=2)
    monkeypatch.setattr('sys.argv', ['train.py'])
    train.main()
    recorded = checkpoint.load('models/final.pth')['settings']
    assert recorded['LOSS'] == 'ohem' and recorded['BALANCE_CLASSES']


# ------------------------------------------------- weights to start from
def save_network(path):
    """Save the network that settings describe; return its state."""
    state = heads.build_network().state_dict()
    checkpoint.save({'net': state, 'step': 7}, path)
    return state


def test_init_from_takes_what_fits(small, capsys):
    """All but the classifier of another number of classes, and says so."""
    settings.N_CLASSES = 4
    state = save_network('four.pth')
    settings.N_CLASSES, settings.INIT_FROM = 6, 'four.pth'
    net = heads.build_network()
    random = net.fc2.weight.clone()
    load_initial_weights(net)
    printed = capsys.readouterr().out
    assert 'not taken from it: fc2.weight, fc2.bias' in printed
    assert 'random: fc2.weight, fc2.bias' in printed
    for key, value in net.state_dict().items():
        if not key.startswith('fc2'):
            assert torch.equal(value, state[key]), key
    assert torch.equal(net.fc2.weight, random)
    settings.N_CLASSES = 4
    load_initial_weights(heads.build_network())
    assert capsys.readouterr().out == 'weights: four.pth\n'


def test_init_from_another_head_takes_the_backbone(small, capsys):
    settings.HEAD = 'fcn'
    save_network('fcn.pth')
    settings.HEAD, settings.INIT_FROM = 'ema', 'fcn.pth'
    load_initial_weights(heads.build_network())
    printed = capsys.readouterr().out
    assert 'random: fc0.conv.weight, ' in printed
    assert 'taken from it: fc.1.weight, fc.1.bias;' in printed


def test_init_from_another_backbone_is_refused(small):
    save_network('18.pth')
    settings.N_LAYERS, settings.INIT_FROM = 34, '18.pth'
    with pytest.raises(UserError, match='18.pth does not fit the network'):
        load_initial_weights(heads.build_network())
    checkpoint.save({'conv1.weight': torch.zeros(1)}, 'backbone.pth')
    settings.INIT_FROM = 'backbone.pth'
    with pytest.raises(UserError, match='has no "net"'):
        load_initial_weights(heads.build_network())


def test_init_from_a_folder(small, capsys):
    os.makedirs('run/models')
    save_network('run/models/final.pth')
    settings.INIT_FROM = 'run'
    load_initial_weights(heads.build_network())
    assert capsys.readouterr().out == 'weights: run/models/final.pth\n'


def test_backbone_weights_are_looked_for_in_models(small, monkeypatch):
    """A known name may end in .pth too; a nearest name is one that is near.
    """
    os.mkdir('models')
    open('models/mine.pth', 'w').close()
    asked = []
    monkeypatch.setattr(pretrained, 'download', lambda *a: asked.append(a[1]))
    for name, path in (('mine.pth', 'models/mine.pth'),
                       ('resnet18-f37072fd.pth',
                        'models/resnet18-f37072fd.pth')):
        settings.PRETRAINED = name
        assert pretrained.find_weights() == path
    assert asked == ['models/resnet18-f37072fd.pth']
    for name, told in (('resnet18.pth', 'the nearest known is resnet18-'),
                       ('nowhere.pth', 'models, nor a known name; docs/')):
        settings.PRETRAINED = name
        with pytest.raises(UserError, match=f'^PRETRAINED={name} .*{told}'):
            pretrained.find_weights()


# ------------------------------------------------- recipes
@pytest.fixture
def project(toy, tmp_path):
    """A copy of the project that has the toy set, without its class names, in
    place of every data set and of every split."""
    folder = copy_project(tmp_path / 'project')
    (folder / 'setup.sh').write_text('')        # these tests have it all
    for name in ('ade20k', 'cityscapes', 'coco', 'cocostuff', 'context',
                 'voc'):
        root = folder / 'data' / name
        shutil.copytree(toy, root)
        (root / 'classes.txt').unlink()
        lists = root / dataset.LISTS
        for split in ('trainaug', 'trainval'):
            shutil.copy(lists / 'train.txt', lists / f'{split}.txt')
        shutil.copy(lists / 'val.txt', lists / 'test.txt')
    return folder


@pytest.mark.parametrize('path', RECIPES, ids=os.path.basename)
def test_recipes_are_valid_settings(path):
    """Each command trains otherwise than settings.py does, on as many classes
    as the data set has."""
    default = settings.as_dict()
    name = os.path.basename(path)[:-3]
    with open(path) as file:
        commands = read_commands(file.read())
    for _, script, *given in commands:
        if script != 'train.py':
            continue
        vars(settings).update(default)
        assert given.pop() == '$@'
        settings.override_all(given)
        settings.validate(for_training=True)
        assert settings.as_dict() != default
        if settings.BACKBONE:
            pytest.importorskip('timm')
        assert fit_grid(settings.CROP_SIZE) == settings.CROP_SIZE
        class_file = images.class_file(name if name in (
            'ade20k', 'cityscapes', 'cocostuff', 'context') else 'voc')
        assert settings.N_CLASSES == len(images.read_class_file(
            class_file)[0])


@pytest.mark.long
@pytest.mark.parametrize('name', ('ade20k', 'cityscapes', 'coco', 'cocostuff',
                                  'context'))
def test_recipes_train_and_evaluate(name, project):
    with open(project / 'recipes' / f'{name}.sh') as file:
        train_command, eval_command = read_commands(file.read())
    done = sh('/', project / 'recipes' / f'{name}.sh', *words(SMOKE))
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'done: step 2, models/final.pth' in done.stdout
    assert eval_command == ['python', 'eval.py', '$@']
    assert re.search(r'5 images of (val|test), step 2', done.stdout)
    with open(project / 'logdir' / 'eval.json') as file:
        assert json.load(file)['scored']['data'] == f'data/{name}'
    recorded = checkpoint.load(project / 'models' / 'final.pth')['settings']
    for word in train_command[2:-1]:
        key, _, value = word.partition('=')
        assert key in SMOKE or str(recorded[key]) == value


@pytest.mark.long
def test_voc_test_trains_three_stages_and_submits(project):
    """COCO, trainaug, trainval: each starts from the last one's weights."""
    done = sh('/', project / 'recipes' / 'voc_test.sh', *words(
        {**SMOKE, 'EVAL_SCALES': 0.5}))
    assert done.returncode == 0, done.stderr[-2000:]
    stages = re.split(r'^done: step 2, models/.*', done.stdout, flags=re.M)
    assert len(stages) == 4             # the submission is the last
    assert 'weights: ' not in stages[0]
    for stage, source in ((1, 'coco'), (2, 'trainaug')):
        start = re.search(r'^weights: .*', stages[stage], re.M)[0]
        assert start == f'weights: models/{source}/final.pth'
    assert 'val mIoU' in stages[1] and 'val mIoU' not in stages[2]
    with tarfile.open(project / 'results.tgz') as tar:
        assert len(tar.getnames()) == 5


# ------------------------------------------------- the docs' commands
def test_ones_own_images_in_three_commands(tmp_path, monkeypatch, capsys):
    """As they stand in the docs; the network becomes one of seconds."""
    monkeypatch.chdir(tmp_path)
    prepare.main(['toy', '--to', 'toy', '--train', '16', '--val', '4'])
    shutil.move('toy/JPEGImages', 'photos')
    shutil.move(f'toy/{dataset.LABELS}', 'masks')
    block = next(block for page in PAGES for block in read_blocks('sh', page)
                 if 'prepare.py custom' in block and 'train.py' in block)
    commands = read_commands(block)
    assert [script for _, script, *_ in commands] == [
        'prepare.py', 'train.py', 'eval.py']
    default = settings.as_dict()
    for _, script, *given in commands:
        vars(settings).update(default)
        settings._given.clear()
        if script == 'train.py':
            given += ['PRETRAINED=', 'ITER_MAX=2', 'CROP_SIZE=65',
                      'NUM_WORKERS=0', 'EM_CHANNELS=32', 'N_CLASSES=6']
        monkeypatch.setattr('sys.argv', [script, *given])
        capsys.readouterr()
        importlib.import_module(script.removesuffix('.py')).main()
    printed = capsys.readouterr().out
    assert re.search(r'mIoU \d+\.\d\d', printed)
    assert '4 images of val' in printed
