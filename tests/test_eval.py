"""Inference and scoring against plain loops; checkpoints of every origin;
what is kept of a result.

    python -m pytest tests/test_eval.py
"""
import csv
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode

import baselines
import dataset
import eval
import network
import predict
import settings
import utils
from conftest import SMALL, run, words


class Toy(torch.nn.Module):
    """A net with a field of view, in float64, for exact comparisons."""

    def __init__(self, n=5):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, n, 5, stride=4, padding=2)
        self.double()

    def forward(self, image):
        return F.interpolate(self.conv(image), image.shape[-2:],
                             mode='bilinear', align_corners=True)


def image(*size):
    torch.manual_seed(1)
    return torch.randn(*size, dtype=torch.float64)


# ------------------------------------------------- inference
@pytest.mark.parametrize('scales', ((1.0,), (0.5, 1.0, 1.75)))
@pytest.mark.parametrize('flip', (False, True))
@torch.no_grad()
def test_infer_agrees_with_a_plain_loop(scales, flip):
    settings.STRIDE = 4
    net, x = Toy(), image(2, 3, 30, 41)
    probs = []
    for scale in scales:
        h, w = round(30 * scale), round(41 * scale)
        y = F.interpolate(x, (h, w), mode='bilinear', align_corners=False)
        for turn in (False, True)[:1 + flip]:
            z = y.flip(3) if turn else y
            full = torch.zeros(2, 3, h + -(h - 1) % 4, w + -(w - 1) % 4,
                               dtype=torch.float64)
            full[..., :h, :w] = z
            p = net(full)[..., :h, :w].softmax(1)
            p = p.flip(3) if turn else p
            probs.append(F.interpolate(p, (30, 41), mode='bilinear',
                                       align_corners=False))
    want = torch.stack(probs).mean(0)
    torch.testing.assert_close(eval.infer(net, x, scales, flip), want,
                               atol=1e-5, rtol=1e-5)
    found = eval.classify(net, x, scales, flip)
    assert found.dtype == torch.uint8 and torch.equal(
        found.long(), want.argmax(1))


@torch.no_grad()
def test_infer_properties():
    settings.STRIDE = 4
    net, x = Toy(), image(2, 3, 33, 41)
    prob = eval.infer(net, x, (1.0, 1.5), True)
    torch.testing.assert_close(prob.sum(1), torch.ones_like(prob[:, 0]))
    torch.testing.assert_close(
        eval.infer(net, x.flip(3), (1.0, 1.5), True), prob.flip(3))


@pytest.mark.parametrize('size, padded', (((33, 49), (33, 49)),
                                          ((34, 40), (49, 49)),
                                          ((1, 16), (1, 17))))
def test_images_are_padded_to_the_grid(size, padded):
    settings.STRIDE = 16
    seen = []

    def net(x):
        seen.append(x)
        return x
    x = image(1, 3, *size)
    assert torch.equal(eval.logits(net, x), x)
    assert seen[0].shape[-2:] == padded
    assert seen[0].count_nonzero() == x.count_nonzero() == x.numel()


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_likeliest_is_the_first_maximum(dtype):
    """Few values, so that many are equal; 150 classes, 2 and 1 row."""
    torch.manual_seed(0)
    for shape in ((2, 21, 30, 40), (1, 150, 9, 9), (3, 2, 1, 7)):
        score = torch.randint(-3, 4, shape).to(dtype)
        want = score.numpy().argmax(1)
        assert np.array_equal(eval.likeliest(score.clone()), want)
    smooth = torch.randn(1, 21, 65, 65)
    got = eval.likeliest(network.upsample(smooth, (513, 513)))
    assert torch.equal(got.long(), F.interpolate(
        smooth, (513, 513), mode='bilinear',
        align_corners=True).max(1).indices)     # no pixel different


@torch.no_grad()
def test_the_fast_ways_agree_with_the_plain_one(small):
    """On random weights, made decided; a trained net's argmax agrees on
    more, see test_it_learns."""
    torch.manual_seed(0)
    net = baselines.build_network().eval()
    x = torch.randn(1, 3, 65, 81)
    plain = eval.prepared(net)(x)
    assert torch.equal(plain, net(x))
    settings.INFERENCE = 'folded'
    folded = eval.prepared(net)(x)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)
    assert not torch.equal(folded, plain)
    settings.INFERENCE = 'bf16'
    rough = eval.prepared(net)(x)
    assert rough.dtype == torch.float32
    error = (rough - plain).abs().max() / plain.std()
    assert 1e-4 < error < 0.3
    assert net.fc2.weight.dtype == torch.float32


# ------------------------------------------------- windows
def places(length, side):
    """Where windows begin: as few as share a third, evenly."""
    count = 2
    while (length - side) / (count - 1) > 2 * side // 3:
        count += 1
    return [0] if length <= side else [
        int(i * (length - side) / (count - 1)) for i in range(count)]


@torch.no_grad()
def plain_windows(net, x, scales, flip, side):
    """infer through windows: whole scaled images, whole sums."""
    height, width = x.shape[-2:]
    probs = []
    for scale in scales:
        h, w = round(height * scale), round(width * scale)
        y = F.interpolate(x, (h, w), mode='bilinear', align_corners=False)
        total, count = 0, 0
        for turned in (False, True)[:1 + flip]:
            part = torch.zeros(len(x), 5, h, w, dtype=x.dtype)
            seen = torch.zeros(h, w, dtype=x.dtype)
            z = y.flip(3) if turned else y
            for top in places(h, side):
                for left in places(w, side):
                    here = (..., slice(top, top + side),
                            slice(left, left + side))
                    part[here] += eval.logits(net, z[here]).softmax(1)
                    seen[here] += 1
            assert seen.min() > 0
            total = total + (part.flip(3) if turned else part)
            count = count + (seen.flip(1) if turned else seen)
        probs.append(F.interpolate(total / count, (height, width),
                                   mode='bilinear', align_corners=False))
    return torch.stack(probs).mean(0)


@pytest.mark.parametrize('scales', ((1.0,), (0.25, 1.0, 1.75, 3.5)))
@pytest.mark.parametrize('flip', (False, True))
@pytest.mark.parametrize('size', ((40, 58), (90, 22), (7, 70)))
@torch.no_grad()
def test_windows_agree_with_a_plain_loop(scales, flip, size, monkeypatch):
    vars(settings).update(STRIDE=4, EVAL_WINDOW=20)         # 21, on the grid
    net, x = Toy(), image(2, 3, *size)
    want = plain_windows(net, x, scales, flip, 21)
    got = eval.infer(net, x, scales, flip)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    assert torch.equal(eval.classify(net, x, scales, flip).long(),
                       want.argmax(1))
    monkeypatch.setattr(eval, 'SUMS', 1)        # in columns of 21 and in
    monkeypatch.setattr(eval, 'BAND', 9)        # thinner bands
    torch.testing.assert_close(eval.infer(net, x, scales, flip), want,
                               atol=1e-9, rtol=1e-9)
    settings.EVAL_WINDOW = 0
    whole = eval.infer(net, x, scales, flip)
    assert (whole - want).abs().max() > 1e-3    # seen otherwise indeed


@torch.no_grad()
def test_windows_of_a_flipped_image_give_the_flipped_result():
    """82 - 21 does not divide by 5: windows do not lie as in a mirror."""
    vars(settings).update(STRIDE=4, EVAL_WINDOW=21)
    net, x = Toy(), image(1, 3, 40, 82)
    assert any(82 - 21 - a not in places(82, 21) for a in places(82, 21))
    for scales in ((1.0,), (0.5, 1.5)):
        torch.testing.assert_close(
            eval.infer(net, x.flip(3), scales, True),
            eval.infer(net, x, scales, True).flip(3))


@torch.no_grad()
def test_an_image_of_one_window_is_seen_whole():
    """At every scale, and bit for bit."""
    net, x = Toy(), image(2, 3, 30, 41)
    settings.STRIDE = 4
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
            found = eval.starts(length, side)
            assert found[0] == 0
            assert found[-1] + side == length or found == [0] >= [
                length - side]
            steps = {b - a for a, b in zip(found, found[1:])}
            assert not steps or max(steps) - min(steps) <= 1
            assert all(3 * (side - step) >= side for step in steps)
            assert len(found) < 3 or (length - side) / (
                len(found) - 2) > 2 * side // 3     # one less would not do


class Largest(TorchFunctionMode):
    """Notes how many elements the largest result of floats has."""

    most = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if torch.is_tensor(result) and result.is_floating_point():
            self.most = max(self.most, result.numel())
        return result


def test_memory_does_not_grow_with_the_image(monkeypatch):
    """Nothing is higher than a window and what it shares with the next, and
    nothing that the net is given larger than one; a very wide image goes in
    columns. (The scores of all would be 6 x 1200 x 180.)"""
    vars(settings).update(STRIDE=4, EVAL_WINDOW=33, N_CLASSES=5)
    monkeypatch.setattr(eval, 'BAND', 8)
    monkeypatch.setattr(eval, 'SUMS', 5 * 33 * 120 * 2)     # 120 columns
    toy, seen = Toy(), set()

    def net(x):
        seen.add(tuple(x.shape))
        return toy(x)
    for size in ((2, 200, 120), (1, 800, 120), (1, 60, 900)):
        x = image(size[0], 3, *size[1:])
        with Largest() as largest, torch.no_grad():
            pred = eval.classify(net, x, (0.5, 1.5), True)
        assert pred.shape == size
        assert largest.most < 6 * (33 + 15) * 182, size
    assert seen == {(1, 3, 33, 33)}


def test_only_huge_images_are_windowed_unasked(monkeypatch, capsys):
    assert settings.EVAL_WINDOW == 0
    for size, scales in (((1024, 2048), (0.5, 1.0, 2.0)), ((2448, 3264),
                         (1.0,)), ((513, 513), (1.75,))):
        assert eval.window_side(size, scales) == 0
    assert capsys.readouterr().out == ''
    eval._say.cache_clear()
    for size, scales in (((4000, 6000), (1.0,)), ((2448, 3264), (1.5, 1.0))):
        assert eval.window_side(size, scales) == 513
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and '513 x 513; EVAL_WINDOW' in said
    settings.EVAL_WINDOW = 900
    assert eval.window_side((4000, 6000), (1.0,)) == 905
    assert eval.window_side((905, 400), (1.75,)) == 0
    for settings.EVAL_WINDOW in (1, 2, 9):
        assert eval.window_side((905, 400), (1.0,)) == 9


def test_a_large_picture_is_predicted_through_windows(small, tmp_path,
                                                      monkeypatch):
    """By predict.py; the windows' places and the net are the test's."""
    settings.EVAL_WINDOW = 65
    torch.manual_seed(0)
    net = baselines.build_network()
    with torch.no_grad():
        net.fc2.weight.mul_(30)
    torch.save({'net': net.state_dict(), 'step': 1}, 'a.pth')
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    Image.fromarray(pixels).resize((260, 150)).save('large.png')
    monkeypatch.setattr(sys, 'argv', ['predict.py', 'large.png', 'a.pth'])
    predict.main()
    with Image.open('predictions/large.png') as mask:
        assert mask.mode == 'P' and mask.size == (260, 150)
        got = np.array(mask)
    x = dataset.normalise(torch.from_numpy(predict.read_picture(
        'large.png')).permute(2, 0, 1)[None], 'cpu')
    total = torch.zeros(6, 150, 260)
    for top in places(150, 65):
        for left in places(260, 65):
            here = (..., slice(top, top + 65), slice(left, left + 65))
            with torch.no_grad():
                total[here] += net.eval()(x[here].contiguous())[0].softmax(0)
    # a row of windows is 65 high everywhere, so sums compare as means do
    count = torch.zeros(150, 260)
    for top in places(150, 65):
        for left in places(260, 65):
            count[top:top + 65, left:left + 65] += 1
    want = (total / count).argmax(0).numpy()
    assert len(np.unique(want)) > 1 and (got == want).mean() > 0.999


# ------------------------------------------------- scoring
def plain_confusion(net, root, split, n, stride):
    """The confusion matrix by Pillow, float tensors, an image at a time."""
    confusion = np.zeros((n, n), np.int64)
    with open(f'{root}/ImageSets/Segmentation/{split}.txt') as file:
        ids = file.read().split()
    mean = torch.tensor(settings.MEAN).view(3, 1, 1)
    std = torch.tensor(settings.STD).view(3, 1, 1)
    for name in ids:
        picture = Image.open(f'{root}/JPEGImages/{name}.jpg').convert('RGB')
        x = torch.tensor(np.array(picture)).permute(2, 0, 1).float() / 255
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
    torch.manual_seed(0)
    net = baselines.build_network()
    data = dataset.Segmentation('val', train=False)
    got = eval.evaluate(net.train(), dataset.val_loader(data))
    assert not net.training
    want = plain_confusion(net, data.root, 'val', 6, 16)
    np.testing.assert_array_equal(got, want)
    settings.EVAL_BATCH = 3
    np.testing.assert_allclose(eval.measure(net, data), want, atol=2)
    assert want.trace() < want.sum() and (want.sum(0) > 0).sum() > 1


@pytest.mark.parametrize('stride, count', ((16, 3), (8, 1)))
def test_a_published_checkpoint_scores_on_photographs(shared, tmp_path,
                                                      stride, count):
    """{'net', 'step'} of an EMANet-50, 21 classes, nothing recorded; on some
    of the sixteen images (IMAGES=16 in the environment: on all)."""
    torch.manual_seed(0)
    net = network.EMANet(21, 50, stride)
    with torch.no_grad():
        net.fc2.weight.mul_(30)         # so that many classes are predicted
    torch.save({'net': net.state_dict(), 'step': 30000},
               tmp_path / 'published.pth')
    count = int(os.environ.get('IMAGES', count))
    root = a_part_of(os.path.join(shared, 'data', 'voc_fixture'),
                     tmp_path / 'part', count)
    done = run('eval.py', 'published.pth', f'DATA_ROOT={root}',
               f'STRIDE={stride}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'logdir' / 'eval.json') as file:
        result = json.load(file)
    want = plain_confusion(net.eval(), root, 'val', 21, stride)
    np.testing.assert_array_equal(result['confusion'], want)
    assert (want.sum(0) > 0).sum() > 3
    assert result['scored']['step'] == 30000
    assert 'N_LAYERS = 50 (published.pth)' in done.stdout


def a_part_of(root, to, count):
    """Make a set of the first few validation images of another."""
    lists = to / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    for folder in ('JPEGImages', 'SegmentationClassAug'):
        (to / folder).symlink_to(os.path.join(root, folder))
    with open(os.path.join(root, 'ImageSets/Segmentation/val.txt')) as file:
        ids = file.read().split()[:count]
    (lists / 'val.txt').write_text('\n'.join(ids) + '\n')
    return str(to)


def test_the_result_on_file(small, tmp_path):
    """eval.json by hand from its own confusion matrix."""
    net = baselines.build_network()
    torch.save({'net': net.state_dict(), 'step': 7}, tmp_path / 'net.pth')
    done = run('eval.py', 'net.pth', f'DATA_ROOT={settings.DATA_ROOT}',
               *words({k: v for k, v in SMALL.items() if k in (
                   'STRIDE', 'NUM_WORKERS')}), 'EVAL_CLASSES=1,2',
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'logdir' / 'eval.json') as file:
        result = json.load(file)
    counts = np.array(result['confusion'])
    iou = [counts[i, i] / (counts[i].sum() + counts[:, i].sum()
                           - counts[i, i]) for i in (1, 2)]
    assert result['mIoU'] == pytest.approx(np.mean(iou))
    assert result['classes']['disc'] == pytest.approx(iou[0])
    assert set(result) == {'mIoU', 'pAcc', 'mAcc', 'fIoU', 'classes',
                           'confusion', 'scored'}
    assert result['scored']['images'] == 5
    assert 'EM_BASES = 8 (net.pth)' in done.stdout


# ------------------------------------------------- results kept
def evaluate_here(monkeypatch, *arguments):
    """Run eval.py's main in this process and folder."""
    monkeypatch.setattr(sys, 'argv', ['eval.py', *arguments])
    eval.main()


def lines():
    with open('results.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_results_are_kept(small, tmp_path, monkeypatch):
    """Twice, with two sets of weights; every column is read back."""
    folder = tmp_path / 'EMANet18, mine'
    folder.mkdir()
    monkeypatch.chdir(folder)
    net = baselines.build_network()
    average = {k: v.flip(0) for k, v in net.state_dict().items()}
    torch.save({'net': net.state_dict(), 'average': average, 'step': 7,
                'classes': ['back ground', 'a, b', 'c: d', 'e', 'f', 'g'],
                'colours': [[9 * i] * 3 for i in range(6)]}, 'a.pth')
    evaluate_here(monkeypatch, 'a.pth', 'EVAL_SCALES=0.5,1', 'EVAL_FLIP=True')
    first, second = lines()
    assert tuple(first) == eval.COLUMNS
    with open('a.pth', 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    with open('logdir/eval.json') as file:
        result = json.load(file)
    known = {'experiment': 'EMANet18, mine', 'checkpoint': 'a.pth',
             'sha256': digest[:12], 'weights': 'net', 'step': '7',
             'split': 'val', 'images': '5', 'scales': '0.5 1.0',
             'flip': 'True', 'window': '0', 'mean_over': '',
             'git': utils.git_hash(), 'stride': '16'}
    assert {name: first[name] for name in known} == known
    assert float(first['mIoU']) == pytest.approx(result['mIoU'], abs=1e-6)
    assert 0 < float(first['seconds']) < 60
    pairs = [pair.rsplit(': ', 1) for pair in first['IoU'].split('; ')]
    assert [name for name, _ in pairs] == list(result['classes'])
    for (_, text), iou in zip(pairs, result['classes'].values()):
        assert text == '-' if iou is None else float(text) == pytest.approx(
            iou, abs=1e-4)
    assert second['weights'] == 'average'
    assert float(second['mIoU']) == pytest.approx(
        result['average']['mIoU'], abs=1e-6)
    assert second['mIoU'] != first['mIoU']

    with open('results.csv', 'rb+') as file:    # an editor left no newline
        file.seek(-1, 2)
        file.truncate()
    evaluate_here(monkeypatch, 'a.pth', 'EVAL_SCALES=1', 'EVAL_FLIP=False')
    assert [row['scales'] for row in lines()] == 2 * ['0.5 1.0'] + 2 * ['1.0']
    for name in ('confusion', 'classes'):
        with Image.open(f'logdir/{name}.png') as page:
            assert page.format == 'PNG' and min(page.size) > 150
            page.load()


def keep_some(number):
    result = {'mIoU': 0.5, 'classes': {f'class {i}': 0.25 for i in range(99)}}
    for i in range(20):
        eval.keep_result({'step': 100 * number + i}, 'net', result, 1.0)


def test_runs_that_end_at_once_tear_no_lines(small, monkeypatch):
    monkeypatch.setattr(utils, 'git_hash', lambda: 'abc')
    with multiprocessing.get_context('fork').Pool(6) as pool:
        pool.map(keep_some, range(6), 1)
    assert sorted(int(row['step']) for row in lines()) == sorted(
        100 * n + i for n in range(6) for i in range(20))
    assert len({row['IoU'] for row in lines()}) == 1

    size, writer = os.path.getsize('results.csv'), threading.Thread(
        target=keep_some, args=[6])
    with open('results.csv', 'a') as file:      # another run has its turn
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        assert os.path.getsize('results.csv') == size
    writer.join(30)
    assert len(lines()) == 140


# ------------------------------------------------- submission
def test_the_test_servers_archive(small, toy, tmp_path, monkeypatch):
    """Of a split without labels: names, sizes, palette, classes."""
    root = tmp_path / 'unlabelled'
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    ids = ['2008_000001', '2008_000002', '2008_000003']
    (lists / 'test.txt').write_text('\n'.join(ids))
    (root / 'JPEGImages').mkdir()
    random = np.random.default_rng(0)
    for i, name in enumerate(ids):
        Image.fromarray(random.integers(0, 255, (5, 7, 3), np.uint8)).resize(
            (161, 90 + i)).save(root / 'JPEGImages' / f'{name}.jpg')
    torch.manual_seed(0)
    net = baselines.build_network()
    with torch.no_grad():               # so that several classes are there
        net.fc2.bias -= net.eval()(torch.randn(1, 3, 97, 161)).mean((0, 2, 3))
    torch.save({'net': net.state_dict(), 'step': 1}, 'a.pth')
    os.makedirs(eval.SUBMISSION)
    with open(os.path.join(eval.SUBMISSION, 'other.png'), 'w'):
        pass                                    # of another split
    evaluate_here(monkeypatch, '--submit', 'a.pth', f'DATA_ROOT={root}',
                  'VAL_SPLIT=test', 'EVAL_SCALES=0.75,1', 'EVAL_FLIP=True')
    with tarfile.open('results.tgz') as archive:
        assert archive.getnames() == [
            f'results/VOC2012/Segmentation/comp6_test_cls/{name}.png'
            for name in ids]
        assert {(m.uname, m.uid, m.isfile()) for m in archive} == {
            ('', 0, True)}
        for i, member in enumerate(archive):
            with Image.open(archive.extractfile(member)) as mask:
                assert mask.mode == 'P' and mask.size == (161, 90 + i)
                assert mask.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
                pred = np.array(mask)
            picture = dataset.read_image(root / 'JPEGImages' /
                                         f'{ids[i]}.jpg')
            x = dataset.normalise(torch.from_numpy(picture).permute(
                2, 0, 1)[None], 'cpu')
            with torch.no_grad():
                want = eval.infer(net, x, (0.75, 1.0), True).argmax(1)[0]
            assert np.array_equal(pred, want) and len(want.unique()) > 1
            assert os.path.isfile(member.name)
    assert not os.path.exists('results.csv')


# ------------------------------------------------- checkpoints
def save(small, tmp_path, **more):
    torch.manual_seed(3)
    net = baselines.build_network()
    torch.save({'net': net.state_dict(), 'step': 1, **more},
               tmp_path / 'a.pth')
    return net.eval()


def test_recorded_settings_rebuild_the_network(small, tmp_path):
    """A net that its weights alone do not tell: T, norm, stride, mean."""
    vars(settings).update(STAGE_NUM=5, EM_NORM='none', STRIDE=8,
                          MEAN=(0.1, 0.2, 0.3))
    net = save(small, tmp_path, settings=settings.as_dict())
    vars(settings).update(STAGE_NUM=3, EM_NORM='l2', STRIDE=16, N_LAYERS=101,
                          MEAN=(0.5, 0.5, 0.5), LR=0.5)
    settings.override(['STAGE_NUM=4'])
    again, _ = eval.load_network(str(tmp_path / 'a.pth'), 'cpu')
    assert again.emau.stages == (4, 4)          # the command line is first
    assert settings.MEAN == (0.1, 0.2, 0.3) and settings.LR == 0.5
    again.emau.stages = 5, 5
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


@pytest.mark.parametrize('state, told', (
    ({'conv1.weight': torch.zeros(1)}, 'PRETRAINED'), ([1, 2], '"net"'),
    ({'net': {'fc2.weight': torch.zeros(1)}, 'step': 1}, 'lacks')))
def test_what_is_no_checkpoint_is_refused(small, tmp_path, state, told):
    torch.save(state, tmp_path / 'b.pth')
    with pytest.raises(ValueError, match=told):
        eval.load_network(str(tmp_path / 'b.pth'), 'cpu')


def test_a_missing_checkpoint_is_an_error_that_lists_what_there_is(small):
    os.makedirs('models')
    open('models/latest.pth', 'w').close()
    with pytest.raises(FileNotFoundError, match='latest.pth'):
        eval.find_checkpoint(None)


# ------------------------------------------------- drawing
def test_overlay_shows_colours_and_a_legend():
    picture = np.full((40, 400, 3), 100, np.uint8)
    pred = np.zeros((40, 400), np.uint8)
    pred[:, 200:] = 1
    names, colours = ['ground', 'cat', 'dog'], [[0] * 3, [200, 0, 0],
                                                [0, 0, 200]]
    drawn = eval.overlay(picture, pred, names, colours)
    assert drawn.shape[1] == 400 and drawn.shape[0] > 40
    assert (drawn[20, 50] == 100).all()
    assert drawn[20, 300, 0] > 140 > 60 > drawn[20, 300, 2]
    key = drawn[40:].reshape(-1, 3).tolist()
    assert [200, 0, 0] in key and [0, 0, 200] not in key


@pytest.mark.parametrize('n', (2, 21, 60, 171))
def test_confusion_and_classes_are_drawn(n):
    """Of any number of classes; a cell and a bar are where they belong."""
    names = [f'class {i}' for i in range(n)]
    colours = [[200, 10, 10]] * n
    counts = np.zeros((n, n), np.int64)
    counts[0, 1] = 9                            # the only pixels
    page = np.asarray(eval.draw_confusion(counts, names))
    cell = max(12, min(48, 960 // n))
    edge = page.shape[0] - 12 - n * cell
    assert page.shape[0] == page.shape[1] and edge > 100

    def at(row, column):
        return page[edge + row * cell + 3, edge + column * cell + 3].tolist()
    assert at(0, 1) == [30, 80, 150] and at(0, 0) == [255] * 3
    assert at(1, 0) == at(1, 1) == [225] * 3    # no pixel of class 1
    iou = dict(zip(names, [1.0, None, *[0.0] * (n - 2)]))
    bars = np.asarray(eval.draw_classes(iou, colours, 0.5))
    red = (bars == colours[0]).all(2).sum(1)    # pixels a row
    assert 400 < red[28:48].max() < 500 and red[48:].max() <= 1


def test_a_legend_wraps_instead_of_running_out():
    names, colours = [f'a long name {i}' for i in range(9)], [[0, 0, 9]] * 9
    strip = eval.legend(200, names, colours)
    assert strip.shape[1] == 200 and (strip[:, -1] == 255).all()
    assert strip.shape[0] > 150
