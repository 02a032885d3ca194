"""What the settings build, each head against a plain evaluation of what it
is, what weights tell of themselves.

    python -m pytest tests/test_heads.py [-m long]
"""
import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dataset
import eval
import heads
import network
import settings
import train
from lib.checkpoint import load, load_strict
from lib.folding import fold_batch_norm

TINY = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'CROP_SIZE': 65,
        'EM_CHANNELS': 16, 'EM_BASES': 4, 'N_CLASSES': 5}
BASELINES = [head for head in heads.HEADS if head != 'ema']


def build_tiny(head, **changes):
    """Return a small double-precision network whose batch norms are far from
    the identity."""
    vars(settings).update(TINY, HEAD=head, **changes)
    torch.manual_seed(0)
    net = heads.build_network().double()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for value in (m.running_mean, m.running_var, m.weight, m.bias):
                torch.nn.init.uniform_(value, 0.5, 1.5)
    return net


# ------------------------------------------------- what settings build
@pytest.mark.parametrize('stride, stem, layers', (
    (8, 'plain', 18),
    pytest.param(16, 'deep', 50, marks=pytest.mark.long),
    pytest.param(32, 'plain', 34, marks=pytest.mark.long)))
@pytest.mark.parametrize('head', heads.HEADS)
def test_every_head_has_the_same_face(head, stride, stem, layers):
    """On crops, and on images smaller and larger than they, of one position
    too."""
    vars(settings).update(HEAD=head, STEM=stem, N_LAYERS=layers,
                          STRIDE=stride, CROP_SIZE=97)
    with torch.device('meta'):
        net = heads.build_network().eval()
        for size in ((97, 97), (33, 161), (1, 65)):
            assert net(torch.zeros(2, 3, *size)).shape == (2, 21, *size)
    assert isinstance(net.extractor, network.ResNet)


@pytest.mark.parametrize('head', BASELINES)
def test_settings_reach_every_head(head):
    with torch.device('meta'):
        net = build_tiny(head, DROPOUT=0.3, BN_MOM=0.2)
    dropout = [m.p for m in net.modules()
               if 'Dropout' in type(m).__name__ and m.p]
    assert dropout == [0.3]
    assert {m.momentum for m in net.modules()
            if isinstance(m, torch.nn.BatchNorm2d)} == {0.2}


def test_settings_reach_the_unit():
    vars(settings).update(
        N_LAYERS=18, EM_CHANNELS=32, EM_BASES=4, STAGE_NUM=2,
        STAGE_NUM_EVAL=5, EM_KEEP='learned', EM_NORM='layer', EM_GRAD=True,
        EM_MOM=0.8, BN_MOM=0.1, DROPOUT=0.3)
    net = heads.build_network()
    unit = net.emau
    assert unit.mu.shape == (1, 32, 4) and unit.mu.requires_grad
    assert unit.stages == (2, 5) and unit.norm == 'layer' and unit.grad
    assert unit.momentum == 0.8 and net.fc1[1].p == 0.3
    assert unit.conv2[1].momentum == net.extractor[1].momentum == 0.1


def test_a_unit_of_zero_init_starts_as_the_identity():
    """All other weights are those of the same seed without it; it learns."""
    nets = []
    for settings.EM_ZERO_INIT in (False, True):
        vars(settings).update(TINY)
        torch.manual_seed(0)
        nets.append(heads.build_network())
    plain, zero = (net.state_dict() for net in nets)
    assert [key for key in plain if not plain[key].equal(zero[key])] == [
        'emau.conv2.1.weight']
    unit, x = nets[1].emau, torch.rand(2, settings.EM_CHANNELS, 5, 5)
    assert unit(x).equal(x) and not nets[0].emau(x).allclose(x)
    unit(x).square().sum().backward()
    assert unit.conv2[1].weight.grad.abs().min() > 0


@pytest.mark.parametrize('changes', (
    {}, {'EM_BASES': 5, 'EM_KEEP': 'learned'}), ids=str)
def test_no_ema_is_emanet_without_its_unit(changes, small):
    """A run of the same seed starts from the same weights, then draws the
    same numbers; in training the two differ by the unit alone."""
    vars(settings).update(AVERAGE=0.99, **changes)
    states, draws, nets = [], [], []
    for settings.HEAD in ('ema', 'no_ema'):
        net, optimizer, *_ = train.build(torch.device('cpu'), is_new=True)
        states.append({key: value.clone()
                       for key, value in net.state_dict().items()})
        draws.append(torch.rand(1))
        nets.append(net.train())
        assert sum(len(group['params']) for group in optimizer.param_groups
                   ) == sum(p.requires_grad for p in net.parameters())
    ema, no_ema = states
    assert [*no_ema] == [key for key in ema if not key.startswith('emau.')]
    assert all(torch.equal(ema[key], value) for key, value in no_ema.items())
    assert draws[0] == draws[1] and not network.ema_units(nets[1])

    x = torch.randn(2, 3, 65, 65)
    nets[0].emau = torch.nn.Identity()
    torch.manual_seed(1)
    expected = nets[0](x)
    torch.manual_seed(1)
    assert torch.equal(nets[1](x), expected)


def test_every_head_reads_the_same_images(small):
    """In the same order, cropped and flipped alike, by SEED alone."""
    read = []
    for settings.HEAD in ('ema', 'no_ema', 'nonlocal'):
        train.build(torch.device('cpu'), is_new=True)
        batches = dataset.train_loader(
            dataset.Segmentation('train', train=True), 0, 0, 1)
        read.append(list(itertools.islice(batches, 4)))
    for other in read[1:]:
        for (image, label, ids), (image2, label2, ids2) in zip(
                read[0], other, strict=True):
            assert ids == ids2 and torch.equal(image, image2)
            assert torch.equal(label, label2)
    assert len({tuple(ids) for _, _, ids in read[0]}) > 1


@pytest.mark.parametrize('name, value', (
    ('HEAD', 'emma'), ('N_CLASSES', 1), ('N_LAYERS', 51), ('STRIDE', 4)))
def test_what_no_network_has_is_refused(name, value):
    vars(settings).update({'N_LAYERS': 18, name: value})
    with pytest.raises(settings.SettingError, match=f'{name}={value}'):
        settings.validate()


@pytest.mark.parametrize('n_layers', network.BLOCKS)
def test_weights_tell_their_settings(n_layers):
    with torch.device('meta'):
        net = network.EMANet(7, n_layers, stem='plain', c=256, k=32)
    assert heads.detect_settings(net.state_dict()) == {
        'HEAD': 'ema', 'N_LAYERS': n_layers, 'STEM': 'plain', 'N_CLASSES': 7,
        'EM_CHANNELS': 256, 'EM_BASES': 32}
    assert heads.detect_settings({'conv1.weight': 0}) == {}


# ------------------------------------------------- each head
@pytest.mark.parametrize('head', heads.HEADS)
def test_every_head_folds_and_its_state_is_all_of_it(head):
    net = build_tiny(head)
    x = torch.randn(2, 3, 49, 65, dtype=torch.float64)
    folded = fold_batch_norm(net)
    assert not [m for m in folded.modules()
                if isinstance(m, torch.nn.BatchNorm2d)]
    other = heads.build_network().double().eval()
    with torch.no_grad():
        expected = net.eval()(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(folded(x), expected)
        assert not torch.equal(other(x), expected)
        load_strict(other, net.state_dict(), 'file')
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize('head', BASELINES)
def test_every_head_learns_in_all_its_parts(head):
    net = build_tiny(head).train()
    x = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.ne(0).any()
               for p in net.parameters())


# ------------------------------------------------- PSA
def plain_psa(mask, x, side, is_distribute):
    """The defining sums, position by position: mask ((2 side - 1)^2, h, w),
    x (c, h, w), numpy; returns (c, h, w)."""
    c, h, w = x.shape
    mask = mask.reshape(2 * side - 1, 2 * side - 1, h, w)
    z = np.zeros_like(x)
    positions = [(r, q) for r in range(h) for q in range(w)]
    for r, q in positions:
        weight = []
        for r2, q2 in positions:
            if is_distribute:   # (r2, q2) says what it gives to (r, q)
                weight.append(mask[r - r2 + side - 1, q - q2 + side - 1,
                                   r2, q2])
            else:               # (r, q) says what it takes from (r2, q2)
                weight.append(mask[r2 - r + side - 1, q2 - q + side - 1,
                                   r, q])
        weight = np.exp(weight) / np.exp(weight).sum()
        for (r2, q2), share in zip(positions, weight, strict=True):
            z[:, r, q] += share * x[:, r2, q2]
    return z


@pytest.mark.parametrize('size, grid', (
    ((5, 5), (3, 3)), ((3, 5), (2, 3)), ((5, 2), (3, 1)),
    ((13, 9), (3, 3)), ((2, 11), (1, 3))))
def test_psa_agrees_with_its_defining_sums(size, grid):
    """Masks of a 5 x 5 crop's grid, halved to 3 x 3; smaller grids and
    larger ones as well."""
    psa = build_tiny('psa', STRIDE=16).fc[0].eval()
    assert psa.collect.side == 3 and psa.collect.mask[1].out_channels == 25
    x = torch.randn(2, 512, *size, dtype=torch.float64)
    gathered = []
    for branch in (psa.collect, psa.distribute):
        torch.nn.init.normal_(branch.mask[1].weight, 0, 0.3)
        y = F.interpolate(branch.reduce(x), grid, mode='bilinear',
                          align_corners=True)
        if size == (5, 5):
            assert y.allclose(branch.reduce(x)[..., ::2, ::2])
        mask = branch.mask(y)
        assert mask.std() > 1
        expected = torch.tensor(np.stack([plain_psa(
            m.detach().numpy(), one.detach().numpy(), 3,
            branch is psa.distribute)
            for m, one in zip(mask, y, strict=True)]))
        torch.testing.assert_close(branch(x), expected)
        gathered.append(expected)
    context = F.interpolate(psa.project(torch.cat(gathered, 1)), size,
                            mode='bilinear', align_corners=True)
    torch.testing.assert_close(psa(x), x + context)


def test_masks_are_sized_by_the_recorded_crop(small, monkeypatch):
    """A run that is resumed, and scored where settings.py has another crop;
    its end is bit for bit that of the run in one go."""
    vars(settings).update(HEAD='psa', ITER_MAX=2, ITER_SAVE=1, VAL_SPLIT='',
                          CROP_SIZE=49)
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    train.main()
    whole = load('models/final.pth')['net']
    os.replace('models/step_1.pth', 'models/latest.pth')
    os.remove('models/final.pth')
    train.main()
    net = load('models/final.pth')['net']
    assert all(torch.equal(net[key], whole[key]) for key in whole)
    assert net['fc.0.collect.mask.1.weight'].shape[0] == 9      # (2 * 2 - 1)^2

    vars(settings).update(HEAD='ema', CROP_SIZE=513)
    monkeypatch.setattr(sys, 'argv', ['eval.py', 'VAL_SPLIT=val'])
    eval.main()
    with open('logdir/eval.json') as file:
        assert 0 < json.load(file)['mIoU'] < 1


# ------------------------------------------------- the others
def test_nonlocal_agrees_with_a_plain_softmax():
    torch.manual_seed(0)
    unit = heads.NonLocal(6).double().eval()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    assert torch.equal(unit(x), x)              # as drawn: the identity
    for value in (unit.out[1].weight, unit.out[1].running_var):
        torch.nn.init.uniform_(value, 0.5, 1.5)
    for conv in (unit.query, unit.key):
        conv.weight.data *= 3
    for one, got in zip(x, unit(x[:]), strict=True):
        q, k, v = (conv(one[None])[0].flatten(1).detach().numpy()
                   for conv in (unit.query, unit.key, unit.value))  # (c/2, n)
        y = np.zeros_like(v)
        for i in range(12):
            weight = [math.exp(q[:, i] @ k[:, j]) for j in range(12)]
            y[:, i] = sum(w * v[:, j] for j, w in enumerate(weight)
                          ) / sum(weight)
        expected = one + unit.out(torch.tensor(y).view(1, 3, 3, 4))[0]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('stride, rates', ((8, (12, 24, 36)),
                                           (16, (6, 12, 18)), (32, (3, 6, 9))))
def test_rates_of_the_pyramid(stride, rates):
    with torch.device('meta'):
        for head in ('deeplabv3', 'deeplabv3plus'):
            net = build_tiny(head, STRIDE=stride)
            pyramid = net.aspp if head == 'deeplabv3plus' else net.fc[0]
            assert [conv[0].dilation[0] for conv in
                    list(pyramid.convs)[1:4]] == list(rates)


@pytest.mark.parametrize('head, is_refused', (
    ('deeplabv3', True), ('deeplabv3plus', True), ('psa', False)))
def test_the_pyramid_needs_two_images_a_part(small, head, is_refused):
    vars(settings).update(HEAD=head, BATCH_SIZE=4, ACCUM=2)
    settings.validate(for_training=True)
    settings.ACCUM = 4
    if not is_refused:
        settings.validate(for_training=True)
        return
    settings.validate()         # evaluation goes one by one
    with pytest.raises(settings.SettingError,
                       match='BATCH_SIZE=4 and ACCUM=4'):
        settings.validate(for_training=True)


def test_low_features_are_those_of_layer1():
    """Blocks that are computed again give them, and their gradients, too."""
    gradients, calls = [], []
    for again in (False, True):
        net = build_tiny('deeplabv3plus', DROPOUT=0.0).train()
        net.extractor.recompute = again
        net.extractor[5][0].register_forward_pre_hook(
            lambda *_, again=again: calls.append(again))
        x = torch.ones(2, 3, 65, 65, dtype=torch.float64).cumsum(3)
        low, top = net.extractor(x, low=True)
        assert low.shape == (2, 64, 17, 17) and top.shape == (2, 512, 5, 5)
        calls.clear()
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
        assert len(calls) == 1 + again
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    assert torch.equal(low, torch.nn.Sequential(*list(net.extractor)[:5])(x))
