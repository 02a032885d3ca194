"""Inference against plain loops: scales, flip, sliding windows; its memory.

    python -m pytest tests/test_inference.py
"""
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import dataset
import eval
import heads
import predict
import settings
from conftest import refused
from lib import inference
from lib.images import read_any_image
from training import save_network
from utils import UserError


class Toy(torch.nn.Module):
    """A net with a receptive field, in float64, for exact comparisons."""

    def __init__(self, n=5):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, n, 5, stride=4, padding=2)
        self.double()

    def forward(self, image):
        return F.interpolate(self.conv(image), image.shape[-2:],
                             mode='bilinear', align_corners=True)


@pytest.fixture
def net():
    """The toy net, and the settings that describe it."""
    vars(settings).update(STRIDE=4, N_CLASSES=5)
    return Toy()


def random_image(*size):
    torch.manual_seed(1)
    return torch.randn(*size, dtype=torch.float64)


# ------------------------------------------------- inference
@pytest.mark.parametrize('scales', ((1.0,), (0.5, 1.0, 1.75)))
@pytest.mark.parametrize('flip', (False, True))
@torch.no_grad()
def test_infer_agrees_with_a_plain_loop(net, scales, flip):
    x, probs = random_image(2, 3, 30, 41), []
    for scale in scales:
        h, w = round(30 * scale), round(41 * scale)
        y = F.interpolate(x, (h, w), mode='bilinear', align_corners=False)
        for is_flipped in (False, True)[:1 + flip]:
            z = y.flip(3) if is_flipped else y
            full = torch.zeros(2, 3, h + -(h - 1) % 4, w + -(w - 1) % 4,
                               dtype=torch.float64)
            full[..., :h, :w] = z
            p = net(full)[..., :h, :w].softmax(1)
            p = p.flip(3) if is_flipped else p
            probs.append(F.interpolate(p, (30, 41), mode='bilinear',
                                       align_corners=False))
    want = torch.stack(probs).mean(0)
    torch.testing.assert_close(eval.infer(net, x, scales, flip), want,
                               atol=1e-5, rtol=1e-5)
    pred = eval.predict_classes(net, x, scales, flip)
    assert pred.dtype == torch.uint8
    assert torch.equal(pred.long(), want.argmax(1))


@pytest.mark.parametrize('window', (0, 21))
@torch.no_grad()
def test_probabilities_sum_to_1_and_flip_with_the_image(net, window):
    """82 - 21 does not divide by 5: the windows are not symmetric."""
    settings.EVAL_WINDOW = window
    x = random_image(2, 3, 33, 82)
    for scales in ((1.0,), (0.5, 1.5)):
        prob = eval.infer(net, x, scales, True)
        assert prob.min() > 0
        torch.testing.assert_close(prob.sum(1), torch.ones_like(prob[:, 0]))
        torch.testing.assert_close(eval.infer(net, x.flip(3), scales, True),
                                   prob.flip(3))


@pytest.mark.parametrize('size, padded', (((33, 49), (33, 49)),
                                          ((34, 40), (49, 49)),
                                          ((1, 16), (1, 17))))
def test_images_are_padded_to_the_grid(size, padded):
    settings.STRIDE = 16
    given = []

    def net(x):
        given.append(x)
        return x
    x = random_image(1, 3, *size)
    assert torch.equal(eval.predict_logits(net, x), x)
    assert given[0].shape[-2:] == padded
    assert given[0].count_nonzero() == x.count_nonzero() == x.numel()


def test_a_tie_goes_to_the_first_class():
    """Few values, so that many are equal; 150 classes, 2 and 1 row."""
    torch.manual_seed(0)
    for shape in ((2, 21, 30, 40), (1, 150, 9, 9), (3, 2, 1, 7)):
        score = torch.randint(-3, 4, shape).float()
        got = eval.predict_classes(lambda x, score=score: score,
                                   torch.zeros(shape[0], 3, *shape[2:]))
        assert np.array_equal(got, score.numpy().argmax(1))


@torch.no_grad()
def test_every_inference_agrees_with_the_plain_one(small):
    """On random weights, made decided; a trained net's argmax agrees on
    more, see test_it_learns."""
    torch.manual_seed(0)
    net = heads.build_network().eval()
    x = torch.randn(1, 3, 65, 81)
    assert settings.choices('INFERENCE') == (
        'plain', 'folded', 'bf16', 'compiled')      # see test_compile.py
    plain, folded, rough = (
        eval.prepare_network(net)(x)
        for settings.INFERENCE in settings.choices('INFERENCE')[:3])
    assert torch.equal(plain, net(x))
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)
    assert not torch.equal(folded, plain)
    assert rough.dtype == torch.float32
    error = (rough - plain).abs().max() / plain.std()
    assert 1e-4 < error < 0.3
    assert net.fc2.weight.dtype == torch.float32


# ------------------------------------------------- sliding window
def starts_by_search(length, side):
    """Return where windows begin: the fewest that share a third, evenly."""
    count = 2
    while (length - side) / (count - 1) > 2 * side // 3:
        count += 1
    return [0] if length <= side else [
        int(i * (length - side) / (count - 1)) for i in range(count)]


@torch.no_grad()
def stacked_windows(net, x, side):
    """Return (sum of the probabilities, how many) at each pixel: every window
    padded with zeros to the whole image, and all of them stacked."""
    height, width = x.shape[-2:]
    probs, covers = [], []
    for top in starts_by_search(height, side):
        for left in starts_by_search(width, side):
            part = x[..., top:top + side, left:left + side].contiguous()
            prob = eval.predict_logits(net, part).softmax(1)
            h, w = prob.shape[-2:]
            around = (left, width - left - w, top, height - top - h)
            probs.append(F.pad(prob, around))
            covers.append(F.pad(torch.ones(h, w, dtype=x.dtype), around))
    return sum(probs), sum(covers)


def infer_by_stacks(net, x, scales, flip, side):
    """eval.infer by sliding windows, from stacked_windows."""
    size, probs = x.shape[-2:], []
    for scale in scales:
        y = F.interpolate(x, [round(length * scale) for length in size],
                          mode='bilinear', align_corners=False)
        total, cover = stacked_windows(net, y, side)
        if flip:
            other, over = stacked_windows(net, y.flip(3), side)
            total, cover = total + other.flip(3), cover + over.flip(1)
        assert cover.min() >= 1 + flip
        probs.append(F.interpolate(total / cover, size, mode='bilinear',
                                   align_corners=False))
    return torch.stack(probs).mean(0)


@pytest.mark.parametrize('scales', ((1.0,), (0.25, 1.0, 1.75, 3.5)))
@pytest.mark.parametrize('flip', (False, True))
@pytest.mark.parametrize('size', ((40, 58), (90, 22), (7, 70)))
@torch.no_grad()
def test_windows_agree_with_a_stack_of_them(net, scales, flip, size):
    settings.EVAL_WINDOW = 20                           # 21, on the grid
    x = random_image(2, 3, *size)
    want = infer_by_stacks(net, x, scales, flip, 21)
    torch.testing.assert_close(eval.infer(net, x, scales, flip), want,
                               atol=1e-9, rtol=1e-9)
    assert torch.equal(eval.predict_classes(net, x, scales, flip).long(),
                       want.argmax(1))
    settings.EVAL_WINDOW = 0
    whole = eval.infer(net, x, scales, flip)
    assert (whole - want).abs().max() > 1e-3    # windows do differ


@torch.no_grad()
def test_an_image_of_one_window_is_taken_whole(net):
    """At every scale, and bit for bit."""
    x = random_image(2, 3, 30, 41)
    for scales, flip in (((1.0,), False), ((0.5, 1.0, 1.75), True)):
        settings.EVAL_WINDOW = 0
        whole = eval.infer(net, x, scales, flip)
        for settings.EVAL_WINDOW in (41, 600):
            assert torch.equal(eval.infer(net, x, scales, flip), whole)
        settings.EVAL_WINDOW = 36           # becomes 37: 41 is larger
        assert not torch.equal(eval.infer(net, x, scales, flip), whole)


def test_windows_cover_a_length_evenly():
    for side in (2, 9, 17, 33, 513):
        for length in {1, *range(side - 1, 5 * side, 1 + side // 11), 6001}:
            starts = inference.window_starts(length, side)
            assert starts[0] == 0
            assert starts[-1] + side == length or starts == [0] >= [
                length - side]
            steps = {b - a for a, b in zip(starts, starts[1:])}
            assert not steps or max(steps) - min(steps) <= 1
            assert all(3 * (side - step) >= side for step in steps)
            assert len(starts) < 3 or (length - side) / (
                len(starts) - 2) > 2 * side // 3    # one less would not do


def test_only_huge_images_are_windowed_unasked(monkeypatch, capsys):
    assert settings.EVAL_WINDOW == 0
    for size, scales in (((1024, 2048), (0.5, 1.0, 2.0)), ((2448, 3264),
                         (1.0,)), ((513, 513), (1.75,))):
        assert inference.window_size(size, scales) == 0
    assert capsys.readouterr().out == ''
    inference.log_once.cache_clear()
    for size, scales in (((4000, 6000), (1.0,)), ((2448, 3264), (1.5, 1.0))):
        assert inference.window_size(size, scales) == 513
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and '513 x 513; EVAL_WINDOW' in said
    settings.EVAL_WINDOW = 900
    assert inference.window_size((4000, 6000), (1.0,)) == 905
    assert inference.window_size((905, 400), (1.75,)) == 0
    for settings.EVAL_WINDOW in (1, 2, 9):
        assert inference.window_size((905, 400), (1.0,)) == 9


def drawn_image(path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    Image.fromarray(pixels).resize((260, 150)).save(path)


def photograph(path, shared):
    folder = os.path.join(shared, 'data', 'voc_fixture', 'JPEGImages')
    with Image.open(os.path.join(folder, min(os.listdir(folder)))) as image:
        image.crop((0, 0, 230, 170)).save(path)


@pytest.mark.parametrize('kind', ('drawn', 'photograph'))
def test_a_large_image_is_predicted_in_windows(small, request, monkeypatch,
                                               kind):
    """By predict.py; the windows' places and the net are the test's."""
    settings.EVAL_WINDOW = 65
    if kind == 'drawn':
        drawn_image('large.png')
    else:
        photograph('large.png', request.getfixturevalue('shared'))
    net = heads.build_network()
    with torch.no_grad():
        net.fc2.weight.mul_(30)
    save_network(net=net)
    monkeypatch.setattr(sys, 'argv', ['predict.py', 'large.png', 'a.pth'])
    predict.main()
    image = read_any_image('large.png')
    with Image.open('predictions/large.png') as mask:
        assert mask.mode == 'P' and mask.size == image.shape[1::-1]
        pred = np.array(mask)
    x = dataset.normalise(torch.from_numpy(image).permute(2, 0, 1)[None],
                          'cpu')
    total, cover = stacked_windows(net, x, 65)
    assert cover.max() >= 4
    want = (total / cover).argmax(1)[0].numpy()
    assert len(np.unique(want)) > 1 and (pred == want).mean() > 0.999


@torch.no_grad()
def test_evaluate_at_the_scales_of_the_settings(small):
    vars(settings).update(EVAL_SCALES=(0.5, 1.25), EVAL_FLIP=True,
                          EVAL_WINDOW=81, INFERENCE='plain')
    torch.manual_seed(0)
    net = heads.build_network().eval()
    data = dataset.Segmentation('val', train=False)
    want = np.zeros((6, 6), np.int64)
    for image, label, _ in data:
        x = dataset.normalise(image[None], 'cpu')
        pred = infer_by_stacks(net, x, (0.5, 1.25), True, 81).argmax(1)[0]
        is_class = label != 255
        np.add.at(want, (label[is_class], pred[is_class]), 1)
    assert max(image.shape[1:]) > 81
    np.testing.assert_allclose(eval.evaluate(net, data), want, atol=2)


# ------------------------------------------------- memory
class LiveTensors(TorchFunctionMode):
    """Measures the peak of the bytes of what is made of a tensor."""

    def __init__(self, source):
        super().__init__()
        self.peak, self.sizes = 0, {}
        self.source = source.untyped_storage().data_ptr()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for each in result if isinstance(result, tuple) else [result]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() != self.source:
                    self.sizes[storage.data_ptr()] = (StorageWeakRef(storage),
                                                      storage.nbytes())
        self.peak = max(self.peak, sum(
            size for held, size in self.sizes.values() if not held.expired()))
        return result


@pytest.mark.parametrize('window', (0, 33))
@pytest.mark.parametrize('flip', (False, True))
@pytest.mark.parametrize('scales', ((1.0,), (0.5,), (1.5,), (0.5, 1.0, 1.5),
                                    (1.5, 1.0, 0.5)))
@pytest.mark.parametrize('do', (eval.infer, eval.predict_classes))
@torch.no_grad()
def test_memory_is_estimated_by_what_is_taken(net, monkeypatch, window, flip,
                                              scales, do):
    """Not below what is taken, but for padding and the small maps of the
    feature grid, nor much above it."""
    settings.EVAL_WINDOW = window
    net, x = net.float(), random_image(1, 3, 199, 300).float()
    with LiveTensors(x) as tensors:
        do(net, x, scales, flip)
    free = [0.9 * tensors.peak]
    monkeypatch.setattr(inference, 'available_memory', lambda: free[0])
    with pytest.raises(UserError):
        do(net, x, scales, flip)
    free[0] = 3 * tensors.peak
    do(net, x, scales, flip)


@torch.no_grad()
def test_an_image_that_does_not_fit_is_refused_in_a_line(net, monkeypatch):
    """Before the net is asked for anything."""
    monkeypatch.setattr(inference, 'available_memory', lambda: 2 ** 20)
    settings.N_CLASSES = 150
    with pytest.raises(UserError) as told:
        eval.infer(None, torch.zeros(1, 3, 300, 400), (0.5, 2.0), True)
    text = str(told.value)
    assert '\n' not in text
    for part in ('400 x 300 pixels', '150 classes',
                 'EVAL_SCALES=(0.5, 2.0)', '0.0 GB are free'):
        assert part in text
    monkeypatch.setattr(inference, 'available_memory', lambda: None)
    settings.N_CLASSES = 5              # a system that does not tell
    eval.infer(net, random_image(1, 3, 30, 40))


def test_an_image_that_does_not_fit_ends_a_command(small, toy, monkeypatch,
                                                   capsys):
    save_network()
    monkeypatch.setattr(inference, 'available_memory', lambda: 1000)
    image = os.path.join(toy, 'JPEGImages', 'toy_0000.jpg')
    for main, words in ((eval.main, ['a.pth']),
                        (predict.main, [image, 'a.pth'])):
        status, line = refused(main, *words, monkeypatch=monkeypatch,
                               capsys=capsys)
        assert status == 2 and 'in 6 classes, 1 at once' in line
    assert 'toy_0000' in line


def test_24_megapixels_in_21_classes_need_3_gigabytes(monkeypatch):
    """On a CPU; a GPU tells by itself."""
    shape, cpu = (1, 3, 4000, 6000), torch.device('cpu')
    monkeypatch.setattr(inference, 'available_memory', lambda: 3.1e9)
    inference.check_memory(shape, cpu, (1.0,))
    monkeypatch.setattr(inference, 'available_memory', lambda: 2.9e9)
    with pytest.raises(UserError, match='6000 x 4000 pixels in 21 classes'):
        inference.check_memory(shape, cpu, (1.0,))
    inference.check_memory(shape, torch.device('cuda', 0), (1.0,))
