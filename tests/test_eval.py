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
from lib.checkpoint import find_checkpoint
from lib.images import read_image
from training import save_network
from utils import UserError


def run_eval(monkeypatch, *arguments):
    """Run eval.py's main in this process and folder; return eval.json."""
    monkeypatch.setattr(sys, 'argv', ['eval.py', *map(str, arguments)])
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
    assert set(result) == {'mIoU', 'pAcc', 'mAcc', 'fIoU', 'classes',
                           'confusion', 'scored'}
    assert result['scored']['images'] == 5
    assert 'EM_BASES = 8 (net.pth)' in capsys.readouterr().out


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


def test_a_missing_checkpoint_is_an_error_that_lists_what_there_is(small):
    os.makedirs('models')
    open('models/latest.pth', 'w').close()
    with pytest.raises(UserError, match='latest.pth'):
        find_checkpoint(None)


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
