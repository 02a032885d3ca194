"""Recipes beyond the paper's: optimizers, schedules, clipping, smoothing,
colours. By hand, and resumed bit for bit.

    python -m pytest tests/test_optimizer.py
"""
import math
import os

import numpy as np
import pytest
import torch

import dataset
import heads
import settings
import train
from conftest import refused
from lib import optimizer
from training import train_here


# ------------------------------------------------- groups, learning rate
def test_the_backbone_has_a_learning_rate_of_its_own(small):
    """Each parameter is in one group; with AdamW biases have no factor."""
    net = heads.build_network()
    own = {id(p) for p in net.extractor.parameters()}
    settings.BACKBONE_LR = 0.1
    for settings.OPTIMIZER, bias in (('sgd', 2), ('adamw', 1)):
        built = optimizer.build_optimizer(
            optimizer.param_groups(net))
        groups, seen = built.param_groups, []
        assert optimizer.set_learning_rate(built, 1) == settings.LR
        for group in groups:
            seen += group['params']
            is_own = {id(p) in own for p in group['params']}
            is_bias = {p.ndim == 1 and group is groups[2]
                       for p in group['params']}
            assert len(is_own) == 1
            factor = (0.1 if is_own.pop() else 1)
            assert group['lr'] in (pytest.approx(factor * settings.LR),
                                   pytest.approx(bias * factor * settings.LR))
            assert is_bias == {group is groups[2]}
            assert bool(group['weight_decay']) == all(
                p.ndim > 1 for p in group['params'])
        wanted = [p for p in net.parameters() if p.requires_grad]
        assert len(seen) == len(wanted) and {*map(id, seen)} == {
            *map(id, wanted)}


def test_cosine_and_warm_up_by_hand():
    vars(settings).update(SCHEDULE='cosine', LR=2.0, ITER_MAX=100, WARMUP=10)
    rates = [optimizer.learning_rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(1 + math.cos(math.pi * 9 / 100))
    assert rates[50] == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[99] < 0.001
    settings.SCHEDULE = 'poly'
    vars(settings).update(LR_DECAY=1, POLY_POWER=1)
    assert optimizer.learning_rate(5) == pytest.approx(2 * 0.95 * 0.5)
    assert optimizer.learning_rate(20) == pytest.approx(2 * 0.8)


def test_adamw_by_hand(small):
    """The first step moves each weight by the learning rate, and decays
    those of convolutions."""
    vars(settings).update(OPTIMIZER='adamw', LR=0.01, WEIGHT_DECAY=0.5)
    net = heads.build_network()
    built = optimizer.build_optimizer(optimizer.param_groups(net))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)
    built.step()
    for name, decay in (('fc2.weight', 0.5), ('fc2.bias', 0.0),
                        ('fc0.bn.weight', 0.0)):
        want = before[name] * (1 - 0.01 * decay) - 0.01
        torch.testing.assert_close(net.get_parameter(name), want)


# ------------------------------------------------- gradients, labels
def test_the_gradient_is_clipped_to_its_norm(small):
    """What is recorded is the norm before."""
    net, built, scaler, _ = train.build(torch.device('cpu'), is_new=True)
    params = [p for p in net.parameters() if p.requires_grad]
    for settings.CLIP_GRAD, factor in ((0.0, 1), (1e6, 1), (0.5, None)):
        for p in params:
            p.grad = torch.full_like(p, 0.25)
        norm = 0.25 * math.sqrt(sum(p.numel() for p in params))
        metrics = train.step_metrics(net, torch.zeros(()), built, scaler)
        assert metrics['grad_norm'].item() == pytest.approx(norm, rel=1e-4)
        got = torch.nn.utils.get_total_norm(p.grad for p in params).item()
        assert got == pytest.approx(factor * norm if factor else 0.5, rel=1e-3)


def test_label_smoothing_by_hand():
    logits = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    label = torch.full((1, 1, 1), 2, dtype=torch.uint8)
    log_p = logits.flatten().log_softmax(0)
    settings.LABEL_SMOOTHING = 0.3
    assert train.segmentation_loss(logits, label).item() == pytest.approx(
        -(0.7 * log_p[2] + 0.3 * log_p.mean()).item())


# ------------------------------------------------- colours
def test_jitter_is_torchvisions_to_rounding():
    from torchvision.transforms.v2 import functional as operators

    class Random:
        """Draws what it is told to."""
        def __init__(self, *values):
            self.values = list(values)

        def uniform(self, low, high, count=None):
            return (self.values.pop(0) if count is None else
                    [self.values.pop(0) for _ in range(count)])
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3)
    noise = np.random.default_rng(0).integers(-20, 20, smooth.shape)
    image = np.uint8(np.clip(smooth + noise, 0, 255))
    x = torch.from_numpy(image).permute(2, 0, 1)
    for given, want in (
            ((0.7, 1, 1, 0), operators.adjust_brightness(x, 0.7)),
            ((1, 1.4, 1, 0), operators.adjust_contrast(x, 1.4)),
            ((1, 1, 0.5, 0), operators.adjust_saturation(x, 0.5)),
            ((1, 1, 1, 0.4), operators.adjust_hue(x, 0.1))):
        got = dataset.jitter_colours(image, 0.5, Random(*given))
        difference = np.abs(got.astype(int) - want.permute(1, 2, 0).numpy())
        assert difference.mean() < 1.5 and np.quantile(difference, 0.99) <= 6


def test_jitter_alters_images_alone_and_depends_on_the_seed(small):
    plain = dataset.Segmentation('train', train=True)
    settings.COLOR_JITTER = 0.5
    data = dataset.Segmentation('train', train=True)
    again = dataset.Segmentation('train', train=True)
    for key in ((0, 1), (1, 1), (0, 2)):
        image, label, _ = data[key]
        assert torch.equal(label, plain[key][1])
        assert not torch.equal(image, plain[key][0])
        assert torch.equal(image, again[key][0])
    assert not torch.equal(data[0, 1][0], data[1, 1][0])
    val = dataset.Segmentation('val', train=False)
    assert torch.equal(val[0][0], torch.from_numpy(val.read(0)[0]).permute(
        2, 0, 1))


# ------------------------------------------------- runs
@pytest.mark.parametrize('changes', (
    {'OPTIMIZER': 'adamw', 'LR': 1e-3, 'BACKBONE_LR': 0.1},
    {'SCHEDULE': 'cosine', 'WARMUP': 3, 'CLIP_GRAD': 0.5,
     'LABEL_SMOOTHING': 0.1, 'COLOR_JITTER': 0.4}), ids=str)
def test_a_stopped_run_resumes_bit_for_bit(small, monkeypatch, changes):
    vars(settings).update(VAL_SPLIT='', ITER_SAVE=2, CROP_SIZE=33, **changes)
    train_here(monkeypatch)
    want = torch.load('models/latest.pth', weights_only=True)
    os.replace('models/step_2.pth', 'models/latest.pth')
    os.remove('models/final.pth')
    train_here(monkeypatch)
    got = torch.load('models/latest.pth', weights_only=True)
    for part in ('net', 'optimizer'):
        torch.testing.assert_close(got[part], want[part], rtol=0, atol=0)


@pytest.mark.parametrize('word, parts', (
    ('OPTIMIZER=adam', "'sgd', 'adamw'"), ('SCHEDULE=step', "'poly'"),
    ('WARMUP=4', 'WARMUP=4: it ends before ITER_MAX=4'),
    ('CLIP_GRAD=-1', '0 to 1,000,000'), ('COLOR_JITTER=2', '0 to 1'),
    ('LABEL_SMOOTHING=1', '0 to 0.99'), ('BACKBONE_LR=-1', '0 to 100')))
def test_bad_input(small, word, parts, monkeypatch, capsys):
    status, line = refused(train.main, word, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and parts in line
