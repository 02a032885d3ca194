"""What the settings build, what weights tell of themselves, what it costs.

    python -m pytest tests/test_baselines.py
"""
import re

import pytest
import torch

import baselines
import network
import settings
from conftest import run


@pytest.mark.parametrize('head', baselines.HEADS)
@pytest.mark.parametrize('stem', network.STEMS)
def test_every_head_has_the_same_face(head, stem):
    vars(settings).update(HEAD=head, STEM=stem, N_LAYERS=50, STRIDE=16)
    with torch.device('meta'):
        net = baselines.build_network()
        assert net(torch.zeros(2, 3, 65, 81)).shape == (2, 21, 65, 81)
    assert isinstance(net.extractor, network.ResNet)


def test_settings_reach_the_unit():
    vars(settings).update(
        N_LAYERS=18, EM_CHANNELS=32, EM_BASES=4, STAGE_NUM=2,
        STAGE_NUM_EVAL=5, EM_KEEP='learned', EM_NORM='layer', EM_GRAD=True,
        EM_MOM=0.8, BN_MOM=0.1, DROPOUT=0.3)
    net = baselines.build_network()
    unit = net.emau
    assert unit.mu.shape == (1, 32, 4) and unit.mu.requires_grad
    assert unit.stages == (2, 5) and unit.norm == 'layer' and unit.grad
    assert unit.momentum == 0.8 and net.fc1[1].p == 0.3
    assert unit.conv2[1].momentum == net.extractor[1].momentum == 0.1


@pytest.mark.parametrize('name, value', (
    ('HEAD', 'emma'), ('N_CLASSES', 1), ('N_LAYERS', 51), ('STRIDE', 4)))
def test_what_no_network_has_is_refused(name, value):
    vars(settings).update({'N_LAYERS': 18, name: value})
    with pytest.raises(ValueError, match=str(value)):
        baselines.build_network()


@pytest.mark.parametrize('n_layers', network.BLOCKS)
def test_weights_tell_their_settings(n_layers):
    with torch.device('meta'):
        net = network.EMANet(7, n_layers, stem='plain', c=256, k=32)
    assert baselines.recognise(net.state_dict()) == {
        'HEAD': 'ema', 'N_LAYERS': n_layers, 'STEM': 'plain', 'N_CLASSES': 7,
        'EM_CHANNELS': 256, 'EM_BASES': 32}
    assert baselines.recognise({'conv1.weight': 0}) == {}


@pytest.mark.parametrize('words, macs, params', (
    (dict(), 237.95, 53.774), (dict(HEAD='fcn'), 190.07, 42.667),
    (dict(EM_CHANNELS=256), 189.89 + 23.49, 42.624 + 5.447)))
def test_costs_by_a_recorded_count(words, macs, params):
    vars(settings).update(words)
    with torch.device('meta'):
        cost = baselines.complexity(baselines.build_network())
    assert round(cost['macs'] / 1e9, 2) == pytest.approx(macs, abs=0.011)
    assert round(cost['params'] / 1e6, 3) == pytest.approx(params, abs=0.0011)


def test_the_table_prints(tmp_path):
    done = run('baselines.py', 'N_LAYERS=50', cwd=tmp_path)
    assert re.search(r'ema +157.93G', done.stdout), done.stdout + done.stderr
