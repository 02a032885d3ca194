"""Scoring against a plain loop; checkpoints of every origin; the command.

    python -m pytest tests/test_eval.py
"""
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dataset
import eval
import heads
import network
import predict
import settings
from conftest import refused
from lib.checkpoint import find_checkpoint, load
from lib.images import read_classes, read_image
from lib.recorded import adopt_data, report_folder
from training import save_network
from utils import UserError


def run_eval(monkeypatch, *arguments):
    """Run eval.py's main in this process and folder; return eval.json."""
    monkeypatch.setattr(sys, 'argv', ['eval.py', *map(str, arguments),
                                      'LOG_DIR=logdir'])
    eval.main()
    with open('logdir/eval.json') as file:
        return json.load(file)


# ------------------------------------------------- scoring
def plain_confusion(net, root, split, n, stride):
    """The confusion matrix by Pillow, float tensors, an image at a time."""
    confusion = np.zeros((n, n), np.int64)
    with open(f'{root}/ImageSets/Segmentation/{split}.txt') as file:
        ids = file.read().split()
    mean = torch.tensor(settings.MEAN).view(3, 1, 1)
    std = torch.tensor(settings.STD).view(3, 1, 1)
    for name in ids:
        image = Image.open(f'{root}/JPEGImages/{name}.jpg').convert('RGB')
        x = torch.tensor(np.array(image)).permute(2, 0, 1).float() / 255
        x = ((x - mean) / std)[None]
        label = np.array(Image.open(f'{root}/SegmentationClassAug/'
                                    f'{name}.png'))
        h, w = label.shape
        down, right = ((stride - (s - 1) % stride) % stride for s in (h, w))
        x = F.pad(x, (0, right, 0, down), value=0.0)
        full = np.full((h + down, w + right), 255)
        full[:h, :w] = label
        with torch.no_grad():
            pred = net(x)[0].argmax(0).numpy()
        for i in range(n):
            for j in range(n):
                confusion[i, j] += ((full == i) & (pred == j)).sum()
    return confusion


def test_evaluate_equals_a_plain_loop(small):
    settings.INFERENCE = 'plain'
    torch.manual_seed(0)
    net = heads.build_network()
    data = dataset.Segmentation('val', train=False)
    got = eval.evaluate(net.train(), data)
    assert not net.training and got.dtype == torch.int64
    want = plain_confusion(net, data.root, 'val', 6, 16)
    np.testing.assert_array_equal(got, want)
    settings.EVAL_BATCH = 3
    np.testing.assert_allclose(eval.evaluate(net, data), want, atol=2)
    settings.INFERENCE = 'folded'
    np.testing.assert_allclose(eval.evaluate(net, data), want, atol=3)
    assert want.trace() < want.sum() and (want.sum(0) > 0).sum() > 1


@pytest.mark.parametrize('stride, count', ((16, 2), (8, 1)))
def test_a_published_checkpoint_scores_on_photographs(
        shared, tmp_path, monkeypatch, capsys, stride, count):
    """{'net', 'step'} of an EMANet-50, 21 classes, nothing recorded; on some
    of the sixteen images (IMAGES=16 in the environment: on all)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = network.EMANet(21, 50, stride)
    with torch.no_grad():
        net.fc2.weight.mul_(30)         # so that many classes are predicted
    save_network('published.pth', net)
    count = int(os.environ.get('IMAGES', count))
    root = first_images(os.path.join(shared, 'data', 'voc_fixture'),
                        tmp_path / 'part', count)
    result = run_eval(monkeypatch, 'published.pth', f'DATA_ROOT={root}',
                      f'STRIDE={stride}', 'INFERENCE=plain', 'NUM_WORKERS=0')
    want = plain_confusion(net, root, 'val', 21, stride)
    np.testing.assert_array_equal(result['confusion'], want)
    assert (want.sum(0) > 0).sum() > 3
    assert result['scored']['step'] == 1
    assert 'N_LAYERS = 50 (published.pth)' in capsys.readouterr().out


def first_images(root, to, count):
    """Make a set of the first few validation images of another."""
    lists = to / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    for folder in ('JPEGImages', 'SegmentationClassAug'):
        (to / folder).symlink_to(os.path.join(root, folder))
    with open(os.path.join(root, 'ImageSets/Segmentation/val.txt')) as file:
        ids = file.read().split()[:count]
    (lists / 'val.txt').write_text('\n'.join(ids) + '\n')
    return str(to)


def test_the_result_on_file(small, monkeypatch, capsys):
    """eval.json by hand from its own confusion matrix."""
    save_network('net.pth')
    settings.EM_BASES = 64
    result = run_eval(monkeypatch, 'net.pth', 'EVAL_CLASSES=1,2')
    counts = np.array(result['confusion'])
    iou = [counts[i, i] / (counts[i].sum() + counts[:, i].sum()
                           - counts[i, i]) for i in (1, 2)]
    assert result['mIoU'] == pytest.approx(np.mean(iou))
    assert result['classes']['disc'] == pytest.approx(iou[0])
    assert set(result) == {'mIoU', 'pAcc', 'mAcc', 'fIoU', 'mF1', 'classes',
                           'precision', 'recall', 'F1', 'confusion', 'scored',
                           'loss'}
    hit, label, pred = counts[1, 1], counts[1].sum(), counts[:, 1].sum()
    disc = [iou[0], hit / pred, hit / label, 2 * hit / (label + pred)]
    assert [result[name]['disc'] for name in ('classes', 'precision', 'recall',
                                              'F1')] == pytest.approx(disc)
    assert result['scored']['images'] == 5
    assert result['scored']['unit'] == '0..1'
    lines = capsys.readouterr().out.splitlines()
    assert 'EM_BASES = 8 (net.pth)' in lines
    start = [line.split() for line in lines].index(
        ['class,', '%', 'IoU', 'precision', 'recall', 'F1'])
    table = lines[start:]
    assert table[2].split() == ['disc', *(f'{100 * x:.2f}' for x in disc)]
    assert table[7].startswith(f'mIoU {100 * result["mIoU"]:.2f} %  mAcc ')


# ------------------------------------------------- checkpoints
def test_recorded_settings_rebuild_the_network(small):
    """A net that its weights alone do not tell: T, norm, stride, mean."""
    vars(settings).update(STAGE_NUM=5, EM_NORM='none', STRIDE=8,
                          MEAN=(0.1, 0.2, 0.3))
    net = save_network(settings=settings.as_dict())
    vars(settings).update(STAGE_NUM=3, EM_NORM='l2', STRIDE=16, N_LAYERS=101,
                          MEAN=(0.5, 0.5, 0.5), LR=0.5)
    settings.override(['STAGE_NUM=4'])
    again, _ = heads.load_network('a.pth', 'cpu')
    assert again.emau.stages == (4, 4)          # the command line is first
    assert settings.MEAN == (0.1, 0.2, 0.3) and settings.LR == 0.5
    again.emau.stages = 5, 5
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_a_checkpoint_of_yesterday_is_scored_and_predicts(small, toy,
                                                          monkeypatch):
    """Its settings have names that are no more, and lack new ones."""
    settings.EM_CHANNELS = 24
    recorded = {**settings.as_dict(), 'CLASS_WEIGHTS': '',
                'OHEM_LEAST': 0.0625}
    del recorded['BALANCE_CLASSES'], recorded['OHEM_MIN_KEPT']
    save_network(settings=recorded)
    now = save_network('now.pth', settings=settings.as_dict())
    settings.EM_CHANNELS = 512
    results = [run_eval(monkeypatch, path)['confusion']
               for path in ('a.pth', 'now.pth')]
    assert results[0] == results[1]
    assert settings.EM_CHANNELS == 24 and settings.CLASS_WEIGHTS == ()
    assert not hasattr(settings, 'OHEM_LEAST')
    image = os.path.join(toy, 'JPEGImages', 'toy_0000.jpg')
    monkeypatch.setattr(sys, 'argv', ['predict.py', image, 'a.pth'])
    predict.main()
    x = dataset.normalise(torch.from_numpy(read_image(image)).permute(
        2, 0, 1)[None], 'cpu')
    with torch.no_grad():
        want = eval.predict_logits(now, x)[0].argmax(0)
    with Image.open('predictions/toy_0000.png') as mask:
        assert (np.array(mask) == want.numpy()).mean() > 0.999


@pytest.mark.parametrize('state, told', (
    ({'conv1.weight': torch.zeros(1)}, 'PRETRAINED'), ([1, 2], '"net"'),
    ({'net': {'fc2.weight': torch.zeros(1)}, 'step': 1}, 'lacks')))
def test_what_is_no_checkpoint_is_refused(small, state, told):
    torch.save(state, 'b.pth')
    with pytest.raises(UserError, match=told):
        heads.load_network('b.pth', 'cpu')


def test_a_folder_with_final_pth_is_a_checkpoint(small):
    os.makedirs('run/models')
    for path in ('final.pth', 'run/models/final.pth'):
        open(path, 'w').close()
    assert find_checkpoint('.') == 'final.pth'
    for folder in ('run', 'run/', './run/models'):
        assert find_checkpoint(folder) == 'run/models/final.pth'


def test_a_missing_checkpoint_names_the_newest_there_are(small):
    with pytest.raises(UserError, match='^models/final.pth is not there, nor '
                                        'any other'):
        find_checkpoint(None)
    os.makedirs('run/models')
    for i in range(9):
        open(f'run/models/{i}.pth', 'w').close()
        os.utime(f'run/models/{i}.pth', (i, i))
    for chosen, told in (('run', 'run/final.pth'),
                         ('run/models/a.pth', 'run/models/a.pth')):
        with pytest.raises(UserError, match=(
                f'^{told} is not there; .*: run/models/8.pth, '
                f'run/models/7.pth, run/models/6.pth$')):
            find_checkpoint(chosen)


# ------------------------------------------------- what a checkpoint brings
@pytest.fixture
def other(small):
    """models/final.pth of the toy set; settings.py is of another one."""
    os.mkdir('models')
    names, colours = read_classes(settings.DATA_ROOT, 6)
    save_network('models/final.pth', settings={
        **settings.as_dict(), 'EVAL_CLASSES': (1, 2), 'VAL_SPLIT': 'train'},
        classes=names, colours=colours)
    vars(settings).update(N_CLASSES=30, EVAL_CLASSES=(29,), DATA_ROOT='gone',
                          N_LAYERS=101, VAL_SPLIT='val')


def test_a_checkpoint_brings_its_data(other, toy, monkeypatch, capsys):
    settings.IGNORE_LABEL = 0
    result = run_eval(monkeypatch, 'models')
    assert result['scored'].items() >= {
        'data': toy, 'split': 'train', 'images': 12, 'mean_over': [1, 2],
        'checkpoint': 'models/final.pth'}.items()
    printed = capsys.readouterr().out
    for line in (f'DATA_ROOT = {toy!r}', "VAL_SPLIT = 'train'",
                 'EVAL_CLASSES = (1, 2)', 'IGNORE_LABEL = 255'):
        assert f'{line} (models/final.pth)\n' in printed


def test_the_command_line_names_other_data(other, toy, monkeypatch, tmp_path):
    """The split then is of settings.py; that of the same folder is not."""
    root = first_images(toy, tmp_path / 'part', 2)
    result = run_eval(monkeypatch, f'DATA_ROOT={root}', 'EVAL_CLASSES=3')
    assert result['scored'].items() >= {
        'data': root, 'split': 'val', 'images': 2, 'mean_over': [3]}.items()
    (tmp_path / 'link').symlink_to(toy)
    settings.override(['DATA_ROOT=link'])
    adopt_data(load('models/final.pth'), 'models/final.pth')
    assert settings.VAL_SPLIT == 'train' and settings.DATA_ROOT == 'link'


def test_recorded_data_that_is_not_here(other, toy, monkeypatch, capsys):
    checkpoint = load('models/final.pth')
    checkpoint['settings']['DATA_ROOT'] = '/nowhere'
    torch.save(checkpoint, 'models/final.pth')
    settings.DATA_ROOT = toy
    result = run_eval(monkeypatch)
    assert result['scored']['data'] == toy
    assert result['scored']['split'] == 'val'
    assert ('models/final.pth was trained on /nowhere, which is not here: '
            f'DATA_ROOT = {toy!r} (settings.py)\n') in capsys.readouterr().out


@pytest.mark.parametrize('words, told', (
    (['DATA_ROOT=seven'], 'models/final.pth was trained on 6 classes '
     '(background, disc, square, ...); seven has 7: name the data set'),
    (['N_CLASSES=21'], 'N_CLASSES=21: models/final.pth was trained on 6 '
     'classes (background, disc, square, ...), '),
    (['VAL_SPLIT='], 'such as VAL_SPLIT=val'),
    (['LOG_DIR=seven/classes.txt'], 'nothing can be written there')))
def test_what_cannot_be_scored_leaves_nothing(other, toy, monkeypatch, capsys,
                                              tmp_path, words, told):
    """And nothing is predicted."""
    monkeypatch.setattr(eval, 'measure', None)
    first_images(toy, tmp_path / 'seven', 2)
    with open(os.path.join(toy, 'classes.txt')) as file:
        (tmp_path / 'seven' / 'classes.txt').write_text(
            file.read() + 'more 1 2 3\n')
    status, line = refused(eval.main, *words, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 1 + ('LOG_DIR' not in words[0]) and told in line
    assert 'set N_CLASSES' not in line
    assert sorted(os.listdir()) == ['models', 'seven']


def test_other_class_names_are_warned_of(other, toy, monkeypatch, capsys,
                                         tmp_path):
    root = first_images(toy, tmp_path / 'part', 2)
    with open(os.path.join(toy, 'classes.txt')) as file:
        (tmp_path / 'part' / 'classes.txt').write_text(
            file.read().replace('disc', 'dish'))
    run_eval(monkeypatch, f'DATA_ROOT={root}', 'EVAL_CLASSES=()')
    assert (f'warning: models/final.pth has other class names than {root}: '
            'disc is dish\n') in capsys.readouterr().out


def test_a_published_checkpoint_needs_no_data_to_predict(small, toy,
                                                         monkeypatch, capsys):
    """Classes of another number than the network's do not name its own."""
    settings.N_CLASSES = 5
    save_network()
    settings.N_CLASSES = 21
    image = os.path.join(toy, 'JPEGImages', 'toy_0000.jpg')
    monkeypatch.setattr(sys, 'argv', ['predict.py', image, 'a.pth'])
    predict.main()
    assert 'the 5 classes of this network; they are numbered' in (
        capsys.readouterr().out)
    status, line = refused(eval.main, 'a.pth', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and f'a.pth was trained on 5 classes; {toy} has 6' in (
        line)


# ------------------------------------------------- where results go
def test_results_of_another_run_replace_none(small, monkeypatch, capsys):
    """Each case: where the checkpoint is, what it recorded, words; where the
    report is."""
    vars(settings).update(MODEL_DIR='models', LOG_DIR='logdir')
    run = {'MODEL_DIR': 'x/models', 'LOG_DIR': 'x/log'}
    os.makedirs('x/log')
    os.makedirs('other')        # a folder that a checkpoint may name
    with open('x/log/settings.json', 'w') as file:
        json.dump(run, file)
    for path, recorded, folder in (
            ('models/best.pth', {}, 'logdir'),
            ('x/models/final.pth', run, 'x/log'),
            ('x/models/final.pth', {**run, 'LOG_DIR': 'y'},
             'logdir/eval/x-models-final'),
            ('x/models/final.pth', {**run, 'LOG_DIR': 'other'},
             'logdir/eval/x-models-final'),
            ('y/models/final.pth', {**run, 'MODEL_DIR': 'y/models'},
             'logdir/eval/y-models-final'),
            ('models/final.pth', {**run, 'LOG_DIR': 'y'}, 'logdir'),
            ('../t1/models/final.pth', {'MODEL_DIR': 'models', 'LOG_DIR': '.'},
             'logdir/eval/t1-models-final'),
            ('net.onnx', {}, 'logdir/eval/net.onnx')):
        assert report_folder({'settings': recorded}, path) == folder
    assert report_folder({}, 'a.pth') == 'logdir/eval/a'
    save_network('a.pth')
    monkeypatch.setattr(sys, 'argv', ['eval.py', 'a.pth'])
    eval.main()
    assert os.listdir('logdir') == ['eval']
    assert os.path.isfile('logdir/eval/a/eval.json')
    assert 'are in logdir/eval/a, ' in capsys.readouterr().out
    settings.override(['LOG_DIR=mine'])
    assert report_folder({'settings': run}, 'x/models/final.pth') == 'mine'


# ------------------------------------------------- moved options
@pytest.mark.parametrize('words, command', (
    (['--submit'], 'python -m tools.submit'),
    (['a.pth', '--submit', 'VAL_SPLIT=test'], 'python -m tools.submit'),
    (['--compare', 'runs'], 'python -m tools.compare_runs DIR'),
    (['--compare=runs'], 'python -m tools.compare_runs DIR')))
def test_an_option_that_has_moved_names_the_new_command(
        small, monkeypatch, capsys, words, command):
    status, line = refused(eval.main, *words, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and line.endswith(f': this is now {command}')


@pytest.mark.parametrize('words', ([], ['EVAL_FLIP=True', 'EVAL_SCALES=0.5,1'],
                                   ['EVAL_WINDOW=33']))
def test_the_loss_is_the_mean_of_the_labelled_pixels(small, monkeypatch,
                                                     words):
    """By hand, from infer's probabilities, void left out."""
    net = save_network('net.pth')
    loss = run_eval(monkeypatch, 'net.pth', *words)['loss']
    run, total, count = eval.prepare_network(net), 0.0, 0
    data = dataset.Segmentation('val', train=False)
    for i in range(len(data)):
        image, label = data.read(i)
        x = dataset.normalise(torch.from_numpy(image).permute(2, 0, 1)[None],
                              'cpu')
        prob = eval.infer(run, x, settings.EVAL_SCALES, settings.EVAL_FLIP)[0]
        label = torch.from_numpy(label).long()
        own = prob.gather(0, label[None].clamp(max=5))[0][label != 255]
        total, count = total - own.log().sum().item(), count + own.numel()
    assert loss == pytest.approx(total / count, rel=1e-4)
