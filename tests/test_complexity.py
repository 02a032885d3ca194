"""What networks cost: by hand, by a recorded count, by the paper's table; and
measured.

    python -m pytest tests/test_complexity.py
"""
import os
import sys

import pytest
import torch

import heads
import settings
from conftest import REPO, words
from lib import cost
from tools import complexity
from utils import RunError

TINY = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'CROP_SIZE': 65,
        'EM_CHANNELS': 16, 'EM_BASES': 4, 'N_CLASSES': 5, 'BATCH_SIZE': 2}
# Table 1 of the paper, copied by hand: MACs (G), memory (M), parameters (M)
PAPER = {'ResNet': ('190.6', '2603.0', '42.6'),
         'DeepLabV3': ('63.4', '66.0', '15.5'),
         'DeepLabV3+': ('84.1', '99.3', '16.3'),
         'PSANet': ('56.3', '59.4', '18.5'),
         'EMANet 256': ('21.1', '12.3', '4.87'),
         'EMANet 512': ('43.1', '22.1', '10.0'),
         'non-local': ('-', '-', '-'), 'no unit': ('-', '-', '-')}


# ------------------------------------------------- counted
def test_activations_by_hand():
    """Convolution, batch norm, ReLU in place; a view is none."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(inplace=True), torch.nn.Flatten())
    assert complexity.complexity(net, (5, 7)) == {
        'macs': 12 * 35, 'activations': 3 * 4 * 35, 'params': 16 + 8}
    assert complexity.complexity is cost.complexity


@pytest.mark.parametrize('device', ('meta', 'cpu'))
def test_attention_is_counted_on_every_device(device):
    """Both products of the n x n map."""
    with torch.device(device):
        unit = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1),
                                   heads.NonLocal(8))
    found = cost.complexity(unit, (6, 5))
    assert found['macs'] == 30 * (3 * 8 + 4 * 8 * 4) + 2 * 30 * 30 * 4


@pytest.mark.parametrize('changes, macs, params', (
    ({}, 237.95, 53.774), ({'HEAD': 'fcn'}, 190.07, 42.667),
    ({'EM_CHANNELS': 256}, 189.89 + 23.49, 42.624 + 5.447)))
def test_costs_by_a_recorded_count(changes, macs, params):
    vars(settings).update(changes)
    with torch.device('meta'):
        found = cost.complexity(heads.build_network())
    assert round(found['macs'] / 1e9, 2) == pytest.approx(macs, abs=0.011)
    assert round(found['params'] / 1e6, 3) == pytest.approx(params, abs=0.0011)


def test_the_table_agrees_with_the_papers(monkeypatch, capsys):
    """MACs and parameters, each within 1% of the paper's by the count that
    gives it; one cell no count gives. The docs have the table as printed."""
    monkeypatch.setattr(sys, 'argv', ['complexity.py'])
    complexity.main()
    out = capsys.readouterr().out
    with open(os.path.join(REPO, 'docs', 'baselines.md')) as file:
        assert out in file.read()
    rows = {name: cells for name, *cells in (
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in out.splitlines()[4:])}
    assert {name: tuple(cells[:3]) for name, cells in rows.items()} == PAPER
    for name, (macs, _, params) in PAPER.items():
        if macs != '-':
            assert float(rows[name][4]) == pytest.approx(float(params),
                                                         rel=0.01)
        if macs != '-' and name != 'DeepLabV3+':
            assert float(rows[name][3]) == pytest.approx(float(macs),
                                                         rel=0.01)
    assert rows['EMANet 512'][4:7] == ['10.008', '48.06', '11.150']
    assert rows['EMANet 256'][4] == '4.873'
    assert (rows['DeepLabV3+'][3], rows['DeepLabV3+'][5]) == ('75.36',
                                                              '85.17')


@pytest.mark.parametrize('arguments, message', (
    (['LAYERS=1'], 'nearest is N_LAYERS'), (['fast'], 'fast: only KEY=VALUE'),
    (['--quick'], '--quick: only KEY=VALUE'), (['N_LAYERS=51'], '51')))
def test_bad_words_are_refused(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, 'argv', ['complexity.py', *arguments])
    with pytest.raises(settings.SettingError, match=message):
        complexity.main()


# ------------------------------------------------- measured
@pytest.mark.long
def test_measured_costs(monkeypatch, capsys):
    """Of one row, in its own process: that of inference and of a step."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(complexity, 'ROWS', {'PSANet': ({'HEAD': 'psa'}, ())})
    given = words(TINY)
    settings.override_all(given)
    complexity.print_measures(given)
    out = capsys.readouterr().out
    assert '65 x 65 pixels' in out and 'a training step of 2 in float' in out
    name, *cells = [cell.strip() for cell
                    in out.splitlines()[-1].strip('|').split('|')]
    seconds, peak, train_seconds, train_peak = map(float, cells)
    assert name == 'PSANet' and 0 < seconds < train_seconds
    assert 0 < peak <= train_peak < 4
    monkeypatch.setattr(sys, 'executable', 'false')
    with pytest.raises(RunError, match='PSANet: measuring ended with'):
        complexity.print_measures(given)
