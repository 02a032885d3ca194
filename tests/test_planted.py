"""Faults that were planted, and that no other test noticed.

    python -m pytest tests/test_planted.py
"""
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dataset
import eval
import heads
import network
import predict
import settings
import train
import utils
from conftest import refused
from converters import layout
from files import add, empty_set, label_path
from lib import checkpoint, run
from lib.images import read_label
from test_predict import read_normalised, write_image
from tools import export
from training import train_here


@pytest.fixture
def short(small, monkeypatch):
    """A run of two steps that says nothing of its start."""
    vars(settings).update(ITER_MAX=2, CROP_SIZE=33, VAL_SPLIT='')
    monkeypatch.setattr(train, 'log_start', lambda *a: None)
    return settings


def stop_at(step, monkeypatch):
    """Have SIGTERM come while a step is computed."""
    def set_learning_rate(optimizer, now, inner=train.set_learning_rate):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(optimizer, now)
    monkeypatch.setattr(train, 'set_learning_rate', set_learning_rate)


# ------------------------------------------------- batches, labels
def test_parts_of_a_step_are_its_batch_in_order():
    """Of each part, the processes read one stretch after the other."""
    vars(settings).update(BATCH_SIZE=12, ITER_MAX=4)
    whole = list(dataset.BatchSampler(30))
    settings.ACCUM = 3
    shares = [list(dataset.BatchSampler(30, 0, rank, 2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [12, 12]
    for step in range(4):
        assert whole[step] == [key for part in range(3) for share in shares
                               for key in share[3 * step + part]]


def test_batches_of_images_to_score(tmp_path):
    """One by one they keep the list's order; two of one size are a pair."""
    root = empty_set(tmp_path / 'set')
    for name, side in zip('abcd', (4, 5, 4, 5)):
        add(root, name, np.ones((side, 6)), split='val')
    data = dataset.Segmentation('val', train=False)
    found = [[names for *_, names in loader] for loader in (
        dataset.val_loader(data),
        dataset.val_loader(data, 0, 1, data.image_sizes(), lambda size: 2))]
    assert found == [[*map(tuple, 'abcd')], [('a', 'c'), ('b', 'd')]]


@pytest.mark.parametrize('ignore, n', ((255, 6), (0, 6), (5, 6), (0, 256)))
def test_a_split_without_labels_scores_nothing(tmp_path, ignore, n):
    root = empty_set(tmp_path / 'set')
    settings.IGNORE_LABEL = ignore
    add(root, 'a', np.ones((4, 6)), split='test')
    label_path(root, 'a').unlink()
    data = dataset.Segmentation('test', train=False, labelled=False)
    pred = torch.arange(24).view(4, 6) % 6
    assert not utils.confusion_matrix(pred, data[0][1], n, ignore).any()


def test_ids_that_no_byte_holds_are_void():
    """And not the class of their last eight bits, or of the last id."""
    ids = [[0, 7, 255, 256, 263, 511, 65535]]
    for kind in (np.uint16, np.int32):
        assert layout.remap_ids(np.array(ids, kind), (7, 255)).tolist() == [
            [255, 0, 1, 255, 255, 255, 255]]


@pytest.mark.parametrize('is_launched', (False, True))
def test_a_batch_is_divided_among_all_processes(small, monkeypatch, capsys,
                                                is_launched):
    """Those that DEVICES asks for, or that torchrun has started."""
    if is_launched:
        for name, value in zip(('RANK', 'LOCAL_RANK', 'WORLD_SIZE'), '003'):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, 'open_data', None)       # comes after
    _, line = refused(train.main, 'DEVICES=-1' if is_launched else
                      'DEVICES=-1,-1,-1', monkeypatch=monkeypatch,
                      capsys=capsys)
    assert 'BATCH_SIZE=2 does not divide into 3 processes' in line


# ------------------------------------------------- a step
def test_void_pixels_are_never_hard():
    """Not even where more are to be kept than have a label: the mean is over
    the two that do in one image, over the only one in the other."""
    vars(settings).update(LOSS='ohem', OHEM_MIN_KEPT=0.5)
    label = torch.full((2, 4, 4), 255)
    label[0, 1, 2:], label[1, 3, 3] = torch.tensor([0, 2]), 1
    logits = torch.zeros(2, 3, 4, 4)
    assert train.segmentation_loss(logits, label).item() == pytest.approx(
        math.log(3))
    hard = train.hard_pixels(torch.zeros(2, 4, 4), label)
    assert torch.equal(hard, label != 255)


def test_the_loss_of_a_step_is_the_mean_of_its_parts(short, monkeypatch):
    """So log.csv has it; and so the gradient is, as its norm shows."""
    vars(settings).update(BATCH_SIZE=4, ACCUM=2, ITER_MAX=1)
    losses = []

    def loss(*arguments, inner=train.segmentation_loss):
        losses.append(inner(*arguments))
        return losses[-1]
    monkeypatch.setattr(train, 'segmentation_loss', loss)
    row = train_here(monkeypatch)[1]
    assert len(losses) == 2 and losses[0] != losses[1]
    assert float(row['loss']) == pytest.approx(sum(losses).item() / 2)


def test_convolutions_of_the_head_are_plain():
    """Those of published weights, which would load into others as well."""
    with torch.device('meta'):
        net = network.EMANet(21, 50)
    convs = [m for name, part in net.named_children() if name != 'extractor'
             for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.kernel_size[0] for m in convs] == [3, 1, 1, 3, 1]
    for m in convs:
        assert m.stride == m.dilation == (1, 1)
        assert m.padding[0] == m.kernel_size[0] // 2


def test_amp_is_bfloat16_on_a_gpu_that_has_it(monkeypatch):
    settings.AMP = 'auto'
    for device, has_bfloat16, want in (
            ('cuda', True, torch.bfloat16), ('cuda', False, None),
            ('cpu', True, None)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                            lambda has=has_bfloat16, **_: has)
        assert train.amp_dtype(torch.device(device)) is want


def test_each_process_drops_other_channels(small, monkeypatch):
    """And all begin with the same weights."""
    nets, drawn = [], []
    for name, value in (('WORLD_SIZE', '2'), ('LOCAL_RANK', '0')):
        monkeypatch.setenv(name, value)
    for rank in '01':
        monkeypatch.setenv('RANK', rank)
        net, *_ = train.build(torch.device('cpu'), is_new=True)
        nets.append(net.state_dict())
        drawn.append(F.dropout2d(torch.ones(1, 256, 1, 1)))
    assert not torch.equal(*drawn)
    assert all(torch.equal(value, nets[1][key])
               for key, value in nets[0].items())


# ------------------------------------------------- stopped and resumed
def test_a_resumed_run_remembers_its_best_score(short, monkeypatch, capsys):
    """A worse one does not replace best.pth."""
    vars(settings).update(VAL_SPLIT='val', ITER_VAL=1)
    monkeypatch.setattr(train, 'validate', lambda nets, data, step, logger: {
        'val_mIoU': {1: 0.6, 2: 0.4}[step]})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(1, patch)
        train_here(patch)
    assert checkpoint.load('models/best.pth')['step'] == 1
    train_here(monkeypatch)
    assert checkpoint.load('models/best.pth')['step'] == 1
    assert checkpoint.load('models/latest.pth')['best'] == 0.6
    assert 'done: step 2' in (out := capsys.readouterr().out)
    assert 'best val mIoU 60.00 %' in out


def test_sigterm_in_the_last_step_loses_nothing(short, monkeypatch, capsys):
    """The run ends as it would have, and there is nothing to resume."""
    stop_at(2, monkeypatch)
    assert list(train_here(monkeypatch)) == [1, 2]
    assert 'done: step 2, models/final.pth' in capsys.readouterr().out
    for name in ('final', 'latest'):
        assert checkpoint.load(f'models/{name}.pth')['step'] == 2


def test_the_random_state_of_a_gpu(monkeypatch):
    """It is restored; where none is used the CPU's is."""
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    cpu, gpu, found = torch.get_rng_state(), torch.ones(16), []
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', found.append)
    assert len(run.random_state()) == 1
    run.set_random_state([cpu, gpu])
    assert not found
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    assert run.random_state()[1] is gpu
    run.set_random_state([cpu])
    run.set_random_state([cpu, gpu])
    assert len(found) == 1 and found[0] is gpu


# ------------------------------------------------- predictions, exports
@torch.no_grad()
def decided_network(image):
    """Save a network that finds every class in an image (1, 3, H, W), other
    ones at another scale or mirrored; return it."""
    torch.manual_seed(0)
    net = heads.build_network().eval()
    net.fc2.weight.mul_(30)
    net.fc2.bias.sub_(net(image).mean((0, 2, 3)))
    torch.save({'net': net.state_dict(), 'settings': settings.as_dict(),
                'step': 1}, 'a.pth')
    return net


@torch.no_grad()
def test_scales_and_flip_reach_a_prediction(small, monkeypatch):
    """The mask is that of both, and not of one alone."""
    image = read_normalised(write_image('p.png'))
    net = decided_network(image)
    want, *others = (
        eval.infer(net, image, scales, flip).argmax(1)[0].numpy()
        for scales, flip in (((0.5, 1.0), True), ((0.5, 1.0), False),
                             ((1.0,), True), ((0.5,), True)))
    for more in ([], ['--probabilities']):
        monkeypatch.setattr(sys, 'argv', [
            'predict.py', 'p.png', 'a.pth', 'EVAL_SCALES=0.5,1.0',
            'EVAL_FLIP=True', *more])
        predict.main()
        mask = read_label('predictions/p.png')
        assert (mask == want).mean() > 0.99
        assert all((mask == other).mean() < 0.9 for other in others)


def test_an_export_that_differs_a_little_is_found(small):
    """In a tenth of the pixels, of the second image alone."""
    def net(image):
        return torch.zeros(1, 3, *image.shape[2:])

    def other(image):
        logits = net(image)
        logits[:, 2, :, :image.shape[3] // 10] += 7.0 * (len(image[0, 0]) > 9)
        return logits
    images = [np.zeros((height, 50, 3), np.uint8) for height in (9, 27)]
    settings.EVAL_SCALES = (1.0,)
    share, difference = export.compare(net, other, images)
    assert share == pytest.approx(1 - 0.1 * 27 / 36) and difference == 7
    assert share < 0.999 <= export.MIN_AGREEMENT
    assert export.compare(net, net, images) == (1, 0)
