"""The attention that an EMA unit implies: against its reconstruction; where a
query pixel lies on the grid; predict.py --query.

    python -m pytest tests/test_attention.py
"""
import os

import cv2
import numpy as np
import pytest
import torch

import eval
import heads
import network
import predict
import settings
from conftest import refused
from lib import visualize
from lib.images import read_any_image
from lib.inference import pad_to_grid
from test_predict import run_main, save_network, write_image
from utils import UserError


def unit(norm, keep='moving_avg'):
    """Return an EMA unit in float64 whose bases have different lengths before
    they are normalised."""
    torch.manual_seed(0)
    emau = network.EMAU(16, 5, norm=norm, keep=keep).double().eval()
    with torch.no_grad():
        emau.mu.mul_(torch.arange(1.0, 6))
    return emau


# ------------------------------------------------- implied attention
@pytest.mark.parametrize('stage_num', (1, 3, 7))
@pytest.mark.parametrize('norm', ('l2', 'none'))
def test_it_weights_the_features_as_the_unit_does(norm, stage_num):
    """What enters conv2 is the weighted sum of what left conv1, at every
    position."""
    emau = unit(norm)
    features = torch.randn(1, 16, 6, 7, dtype=torch.float64)
    entered = []
    emau.conv2.register_forward_pre_hook(
        lambda part, args: entered.append(args[0]))
    with torch.no_grad():
        emau(features, stage_num)
    x, z = eval.run_em(emau, features, stage_num)
    assert z.shape == (stage_num, 5, 6, 7)
    x, z = x.flatten(1), z[-1].flatten(1)
    weights = torch.stack([eval.implied_attention(emau, x, z, i)
                           for i in range(42)], 1)      # (n of j, n of i)
    assert (weights > 0).all()
    want = entered[0][0].flatten(1)                     # after ReLU
    assert ((x @ weights).relu() - want).abs().max() < 1e-6
    assert want.abs().max() > 0.1


def test_layer_norm_implies_none():
    x, z = torch.randn(16, 9), torch.rand(5, 9)
    with pytest.raises(UserError, match='^EM_NORM=layer: its .*l2 or none$'):
        eval.implied_attention(unit('layer').float(), x, z, 0)


def test_iterations_matter_and_leave_the_unit_as_it_is():
    emau, features = unit('l2'), torch.randn(1, 16, 6, 7).double()
    maps = [eval.attention_from(emau, *(part[-1] if part.ndim == 4 else part
                                for part in eval.run_em(emau, features, t)),
                                (2, 3)) for t in (1, 3, None)]
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    assert torch.equal(maps[1], maps[2])        # 3 is the unit's
    assert emau.stages == (3, 3)
    for weight in maps:
        assert weight.shape == (6, 7)
        assert weight.sum().item() == pytest.approx(1)


# ------------------------------------------------- query pixels
def test_the_cell_of_a_pixel():
    """Worked out by hand for stride 16: cells on pixels 0, 16, 32, ..., or in
    the middle of patches; of half the size, too."""
    settings.STRIDE, settings.BACKBONE = 16, ''
    whole, half = torch.zeros(1, 3, 50, 70), torch.zeros(1, 3, 25, 35)
    for query, cell, cell_of_half in (
            ((0, 0), [0, 0], [0, 0]), ((7, 9), [1, 0], [0, 0]),
            ((9, 7), [0, 1], [0, 0]), ((69, 49), [3, 4], [1, 2]),
            ((40, 25), [2, 2], [1, 1])):
        assert eval.cell_of(query, (50, 70), whole) == cell
        assert eval.cell_of(query, (50, 70), half) == cell_of_half


def test_the_cell_of_a_pixel_in_patches(monkeypatch):
    settings.STRIDE = 16
    monkeypatch.setattr(eval, 'grid_extra', lambda: 0)
    image = torch.zeros(1, 3, 50, 70)
    for query, cell in (((0, 0), [0, 0]), ((15, 16), [1, 0]),
                        ((16, 15), [0, 1]), ((69, 49), [3, 4])):
        assert eval.cell_of(query, (50, 70), image) == cell


def test_a_query_is_where_its_pixel_is(small):
    """Its map on the pixels is the row of its cell: the middle of a 65 x 81
    image has cell (2, 3)."""
    torch.manual_seed(0)
    net = heads.build_network().eval()
    image = torch.randint(0, 256, (65, 81, 3), dtype=torch.uint8).numpy()
    share, count = eval.query_attention(net, image, 'cpu', (48, 32))
    scaled = eval.whole_image(image, 'cpu')
    assert pad_to_grid(scaled).shape == scaled.shape
    x, z = eval.run_em(net.emau, eval.encode(net, scaled))
    want = eval.attention_from(net.emau, x, z[-1], (2, 3))
    assert share.shape == (65, 81) and count == 5 * 6
    assert torch.allclose(torch.from_numpy(share[::16, ::16]), want)
    other, _ = eval.query_attention(net, image, 'cpu', (32, 48))
    assert abs(other - share).max() > 0


# ------------------------------------------------- pages
def test_the_page_is_bright_where_the_pixel_attends():
    """The pixel is ringed in the image and in the heat map."""
    image, share = np.full((128, 256, 3), 90, np.uint8), np.zeros((128, 256))
    share[:, 200:] = 0.01
    page = visualize.draw_query(image, (40, 100), share, 500).astype(int)
    gap = visualize.GAP
    left, heat = (page[gap:gap + 128, gap + i * (256 + gap):][:, :256]
                  for i in (0, 1))
    assert (left[100, 230] == 90).all()
    assert heat[100, 230].sum() > 3 * heat[100, 150].sum()
    for panel in (left, heat):
        assert panel[100, 47].min() > 180 and panel[93, 40].min() > 180
        assert panel[93, 47].min() < 100        # a ring, no square


@pytest.mark.parametrize('size', ((200, 1), (1, 200), (2000, 9), (1, 1)))
def test_pages_of_very_narrow_and_very_wide_images(size):
    image, share = np.zeros((*size, 3), np.uint8), np.ones(size, np.float32)
    page = visualize.draw_query(image, (0, size[0] - 1), share, 4)
    assert page.dtype == np.uint8 and page.shape[1] > 100


def test_predict_writes_where_a_pixel_attends(small, monkeypatch, capsys):
    """The page of the functions; an image without the pixel is named, and
    stops nothing."""
    net = save_network('a.pth')
    write_image('set/a.png', (50, 70))
    write_image('set/b.png', (40, 30))
    status, text = run_main(predict.main, 'set', 'a.pth', '--query', '60,20',
                            monkeypatch=monkeypatch, capsys=capsys)
    assert status == 1 and '1 of 2 files could not be segmented' in text
    assert ('\n  predictions/b.png: --query 60,20 lies outside the image, '
            '30 x 40 pixels\n') in text
    assert sorted(os.listdir('predictions')) == [
        'a.overlay.jpg', 'a.png', 'a.query.jpg']
    image = read_any_image('set/a.png')
    want = visualize.draw_query(image, (60, 20), *eval.query_attention(
        net, image, 'cpu', (60, 20)))
    page = cv2.imread('predictions/a.query.jpg')[..., ::-1]
    assert page.shape == want.shape
    assert np.abs(page.astype(int) - want).mean() < 3       # it is JPEG


@pytest.mark.parametrize('arguments, line', (
    ('--query 3', '--query 3: name a pixel of the image by its column and'),
    ('--query 3,x', '--query 3,x: name a pixel'),
    ('--query=-3,1', '--query -3,1: name a pixel'),
    ('--query 70,0', 'p.png: --query 70,0 lies outside the image, 70 x 50'),
    ('--query 0,50', 'p.png: --query 0,50 lies outside the image, 70 x 50'),
    ('--query 3,3 EM_NORM=layer', 'EM_NORM=layer: its bases are no weighted'),
    ('--query 3,3 HEAD=no_ema', 'has none (HEAD=no_ema)')))
def test_bad_queries_end_in_a_line(small, arguments, line, monkeypatch,
                                   capsys):
    words = arguments.split()
    for word in words[2:]:
        settings.override([word])
    save_network('a.pth')
    write_image('p.png')
    status, text = refused(predict.main, 'p.png', 'a.pth', *words[:2],
                           capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and line in text
    assert not os.path.exists('predictions/p.png')


def test_an_onnx_file_implies_no_attention(small, monkeypatch, capsys):
    write_image('p.png')
    open('a.onnx', 'w').close()
    _, text = refused(predict.main, 'p.png', 'a.onnx', '--query', '1,1',
                      capsys=capsys, monkeypatch=monkeypatch)
    assert 'a.onnx: an ONNX file does not give the bases' in text
