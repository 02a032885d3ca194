"""What a training step costs stays what docs/performance.md says: FLOP and
bytes saved for the backward pass within 2%. Operators and traffic, which move
with torch's version, are in its table too, and not compared.

    python -m pytest tests/test_ratchet.py [-m long]

Where a change is meant, print the table anew: python -m tools.complexity
--training.
"""
import os
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import heads
import settings
import train
from conftest import REPO
from lib import cost
from tools import complexity

SECTION = '## Counted on the meta device'
TOLERANCE = 0.02
TINY = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'CROP_SIZE': 65,
        'EM_CHANNELS': 16, 'EM_BASES': 4, 'N_CLASSES': 5, 'BATCH_SIZE': 2}


def read_table():
    """Return {row: {column: number}} of the section in the docs."""
    with open(os.path.join(REPO, 'docs', 'performance.md')) as file:
        section = file.read().partition(SECTION)[2].partition('\n## ')[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in section.splitlines() if line.startswith('|')]
    return {row[0]: dict(zip(head[1:], (
        float(cell.replace(',', '')) for cell in row[1:]), strict=True))
        for row in rows}


# ------------------------------------------------- the ratchet
@pytest.mark.long
@pytest.mark.parametrize('row', complexity.ROWS)
def test_a_step_costs_what_the_docs_say(row):
    recorded, b = read_table()[row], settings.BATCH_SIZE
    for name, amp in (('float32', None), ('bf16', torch.bfloat16)):
        found = complexity.count_training(row, amp)
        assert found['flop'] / b / 1e9 == pytest.approx(
            recorded['GFLOP'], rel=TOLERANCE)
        assert found['saved'] / b / 1e9 == pytest.approx(
            recorded[f'saved, {name}, GB'], rel=TOLERANCE)


def test_the_docs_have_every_row_and_column():
    """Those not compared too, at the paper's settings: bfloat16 takes half
    the bytes."""
    table = read_table()
    assert [*table] == [*complexity.ROWS]
    for row in table.values():
        assert tuple(row) == complexity.TRAINING and all(row.values())
        for what in 'saved', 'traffic':
            share = row[f'{what}, bf16, GB'] / row[f'{what}, float32, GB']
            assert 0.5 < share < 0.55
    assert (settings.BATCH_SIZE, settings.CROP_SIZE) == (16, 513)


def test_the_table_is_printed(monkeypatch, capsys):
    vars(settings).update(TINY)
    monkeypatch.setattr(complexity, 'ROWS', {'PSANet': ({'HEAD': 'psa'}, ())})
    monkeypatch.setattr(sys, 'argv', ['complexity.py', '--training'])
    complexity.main()
    about, _, head, _, row = capsys.readouterr().out.splitlines()
    assert '65 x 65 pixels, a step of 2 images' in about
    assert [cell.strip() for cell in head.strip('| ').split('|')] == [
        'head', *complexity.TRAINING]
    assert row.startswith('| PSANet | ') and row.count('|') == 9


# ------------------------------------------------- what is counted
def test_a_step_by_hand():
    """A convolution, whose image has no gradient, ReLU, sum; bytes."""
    image, weight, y, number = 2 * 3 * 35 * 4, 12 * 4, 2 * 4 * 35 * 4, 4
    found = cost.training_cost(lambda: nn.Conv2d(3, 4, 1, bias=False),
                               lambda logits, label: logits.relu().sum(),
                               (2, 3, 5, 7))
    assert found == {
        'flop': 2 * 2 * (2 * 35 * 12), 'saved': image + y, 'operators': 6,
        'traffic': (image + weight + y) + (y + y) + (y + number)
        + (number + number)             # the gradient of the sum, 1
        + (y + y + y) + (y + image + weight + weight)}


@pytest.mark.parametrize('head', heads.HEADS)
def test_float32_is_counted_as_on_the_meta_device(head):
    vars(settings).update(TINY, HEAD=head)
    shape = (2, 3, 65, 65)
    with torch.device('meta'):
        net = heads.build_network().train()
        image = torch.zeros(shape)
        label = torch.zeros(2, 65, 65, dtype=torch.uint8)

    def forward():
        return train.segmentation_loss(net(image), label)
    with sdpa_kernel(SDPBackend.MATH):
        saved = cost.saved_bytes(net, forward)
        with FlopCounterMode(display=False) as flops:
            forward().backward()
    found = cost.training_cost(heads.build_network, train.segmentation_loss,
                               shape)
    assert (found['flop'], found['saved']) == (flops.get_total_flops(), saved)
