"""The table of timm's nets, as a user prints it; how its nets are measured.

    python -m pytest tests/test_backbones_tool.py
"""
import pytest
import torch

import heads
import settings
from conftest import REPO, refused, run_tool
from lib import backbones
from lib.cost import complexity
from tools import backbones as tool

timm = pytest.importorskip('timm')
SMALL = 'CROP_SIZE=65', 'EM_CHANNELS=32', 'EM_BASES=4', 'N_CLASSES=5'


def read_table(text):
    """Return {(net, stride): the other cells} of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')]
            for line in lines]
    assert rows[0] == [*tool.COLUMNS] and {*lines[1]} <= {*'|- '}
    return {tuple(row[:2]): row[2:] for row in rows[2:]}


# ------------------------------------------------- the table
@pytest.mark.long
def test_the_table_of_two_nets(tmp_path):
    """One whose cells are patches, and ResNet-18, with which it is compared;
    settings of the command line hold; nothing is written or downloaded."""
    done = run_tool('backbones', 'test_convnext', *SMALL, cwd=tmp_path)
    assert not done.returncode, done.stderr
    assert f'timm {timm.__version__}' in done.stdout
    assert 'threads' in done.stdout and 'commit' in done.stdout
    rows = read_table(done.stdout)
    assert [*rows] == [(net, stride) for net in (
        'ResNet-18, deep stem', 'test_convnext') for stride in (
            '8', '16', '32')]
    settings.override(SMALL)
    settings.N_LAYERS = 18
    for (name, stride), cells in rows.items():
        is_timm = name == 'test_convnext'
        settings.STRIDE, settings.BACKBONE = int(stride), name * is_timm
        side = 64 if is_timm else 65
        with torch.device('meta'):
            cost = complexity(heads.build_network(), (side, side))
        assert cells[:3] == [f'k*{stride}' + '+1' * (not is_timm),
                             f'{cost["params"] / 1e6:.2f}',
                             f'{cost["macs"] / 1e9:.2f}']
        assert cells[5] == ''
        if stride == '16':
            assert float(cells[3]) >= 0 and float(cells[4]) > 0
        else:
            assert cells[3:5] == ['-', '-']
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_is_told(monkeypatch, capsys):
    """Each reason once, with its strides; an error of timm's ends no table.
    """
    monkeypatch.setattr(tool, 'list_nets', lambda pattern: [
        'test_vit', 'dla34', 'test_byobnet', 'coat_tiny'])
    describe = backbones.describe

    def fail(name, stride):
        if name == 'test_byobnet':
            raise KeyError('of timm\nand more')
        return describe(name, stride)
    monkeypatch.setattr(backbones, 'describe', fail)
    monkeypatch.setattr('sys.argv', ['backbones.py', '--no-time', *SMALL])
    tool.main()
    rows = read_table(capsys.readouterr().out)
    assert rows['test_vit', '16'][0] == 'k*16'
    assert rows['test_vit', '8'][5] == 'its patches have 16 pixels'
    assert rows['dla34', '8, 16'][5] == (
        'it cannot be built at that output stride')
    assert 'sides of k * 32 + 1' in rows['dla34', '32'][5]
    assert rows['test_byobnet', '8, 16, 32'] == [
        *'-----', 'KeyError: \'of timm\\nand more\'']
    assert rows['coat_tiny', '8, 16, 32'][5] == (
        'it takes images of one size alone')
    assert all(row[3:5] == ['-', '-'] for row in rows.values())


def test_one_output_stride(monkeypatch, capsys):
    """That of the command line; 14 is of vision transformers alone."""
    monkeypatch.setattr('sys.argv', ['backbones.py', '--no-time', 'STRIDE=14',
                                     'eva02_tiny_patch14_224', *SMALL])
    tool.main()
    rows = read_table(capsys.readouterr().out)
    assert [*rows] == [('ResNet-18, deep stem', '14'),
                       ('eva02_tiny_patch14_224', '14')]
    assert rows['eva02_tiny_patch14_224', '14'][0] == 'k*14'
    assert rows['ResNet-18, deep stem', '14'][5] == 'it has 8, 16 and 32'


@pytest.mark.parametrize('arguments, message', (
    (['convnxt_tiny'], 'the nearest is convnext_tiny'),
    (['###'], "a pattern is written as 'convnext*'"),
    (['test_*', 'vgg*'], 'vgg*: only KEY=VALUE'),
    (['STRIDES=8'], 'the nearest is STRIDE')))
def test_bad_words_are_refused(arguments, message, monkeypatch, capsys):
    status, line = refused(tool.main, *arguments, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and message in line


def test_a_small_net_stands_for_a_family():
    """One with weights and the family's name, at most MAX_PARAMS."""
    for family, name in (('convnext', 'convnext_tiny'), ('resnet', 'resnet'),
                         ('swin_transformer', 'swin_tiny_'),
                         ('vision_transformer', 'vit_tiny_'),
                         ('mobilenetv5', 'mobilenetv5_base')):
        assert tool.pick_net(timm, family).startswith(name)


def test_the_page_has_a_net_of_each_family():
    """And the columns that are printed."""
    with open(f'{REPO}/docs/backbones.md') as file:
        page = file.read().partition('\n## One of each family\n')[2]
    nets = {name for name, _ in read_table(page)}
    families = [{*timm.list_models(module=family)}
                for family in timm.list_modules()]
    missing = [names for names in families if not names & nets]
    assert len(missing) <= 3, missing       # timm may have new ones


# ------------------------------------------------- how nets are measured
@pytest.mark.timeout(120)
@pytest.mark.parametrize('name, stride, extra', (
    ('efficientvim_m1', 32, 1),     # Conv1d with a stride of 1
    ('test_convnext', 32, 0),       # patches, which drop the last pixel
    ('convmixer_768_32', 16, None),         # patches of 7
    ('mobilevitv2_050', 32, None)))         # resizes to an even grid
def test_strides_are_measured(name, stride, extra):
    """Each of these once never ended, the last one passed."""
    about = backbones._measure(name, stride)
    assert about.get('align_corners') == (None if extra is None else
                                          bool(extra))
    assert ('reason' in about) == (extra is None)
