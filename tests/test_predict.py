"""Predictions of images, folders and videos against eval's own; attention
maps against a plain loop; what is refused.

    python -m pytest tests/test_predict.py
"""
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import eval
import heads
import network
import predict
import settings
import utils
from conftest import refused
from lib import inference, visualize
from lib.images import read_any_image, read_classes, read_label
from lib.video import OverlayVideo


def save_network(path):
    """Save a network that tells its classes apart; return it."""
    torch.manual_seed(0)
    net = heads.build_network().eval()
    with torch.no_grad():
        net.fc2.weight.mul_(30)
    names, colours = read_classes(settings.DATA_ROOT, 6)
    torch.save({'net': net.state_dict(), 'settings': settings.as_dict(),
                'classes': names, 'colours': colours, 'step': 1}, path)
    return net


def run_main(main, *arguments, monkeypatch, capsys):
    """Run a script's main in this process; return (exit status, its lines on
    stderr)."""
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, arguments)])
    capsys.readouterr()
    status = 0
    try:
        utils.run_main(main)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def generate_image(size, seed=0):
    """Return an image (H, W, 3) uint8 of soft blobs."""
    random = np.random.default_rng(seed)
    return cv2.resize(random.integers(0, 256, (6, 6, 3), np.uint8), size[::-1],
                      interpolation=cv2.INTER_CUBIC)


def write_image(path, size=(50, 70), seed=0):
    """Write an image of soft blobs; return the path."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    Image.fromarray(generate_image(size, seed)).save(path)
    return path


def read_normalised(path):
    """Return a file's image as a network takes it, (1, 3, H, W)."""
    return dataset.normalise(torch.from_numpy(
        read_any_image(path)).permute(2, 0, 1)[None], 'cpu')


@pytest.fixture
def net(small):
    return save_network('a.pth')


@pytest.fixture
def command(monkeypatch, capsys):
    """predict.py in this process: (exit status, its lines on stderr)."""
    def command(*arguments):
        return run_main(predict.main, *arguments, monkeypatch=monkeypatch,
                        capsys=capsys)
    return command


# ------------------------------------------------- images
def test_images_of_every_kind_are_read(tmp_path, monkeypatch):
    """Values worked out by hand: transparent is white, 16 bits become 8."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.uint8([[[200, 100, 0, 0], [200, 100, 0, 255]]])).save(
        'rgba.png')
    Image.fromarray(np.uint16([[0, 257 * 100, 65535]])).save('deep.png')
    Image.fromarray(np.uint8([[0, 7, 255]])).save('grey.png')
    Image.new('LA', (3, 1), (50, 0)).save('la.png')
    Image.new('CMYK', (8, 8)).save('cmyk.jpg')
    for name, want in (('rgba', [[255] * 3, [200, 100, 0]]),
                       ('deep', [[0] * 3, [100] * 3, [255] * 3]),
                       ('grey', [[0] * 3, [7] * 3, [255] * 3]),
                       ('la', [[255] * 3] * 3)):
        image = read_any_image(f'{name}.png')
        assert image.dtype == np.uint8 and image[0].tolist() == want, name
    assert read_any_image('cmyk.jpg').shape == (8, 8, 3)


def test_a_folder_keeps_its_places_and_a_bad_file_stops_nothing(net, command):
    """Nothing hidden, and nothing of the output folder, is taken; a second
    run gives the same."""
    for path in ('set/a.jpg', 'set/b/a.PNG', 'set/b/c/d e.webp'):
        write_image(path)
    for path in ('set/.e.jpg', 'set/notes.txt'):
        with open(path, 'w'):
            pass
    with open('set/a.jpg', 'rb') as whole, open('set/torn.jpg', 'wb') as torn:
        torn.write(whole.read()[:500])
    for _ in range(2):
        status, text = command('set', 'a.pth', '--to', 'set/out')
        assert status == 1 and 'Traceback' not in text
        assert 'script.py: 1 of 4 files could not be segmented' in text
        assert '\n  set/torn.jpg cannot be read as an image' in text
        written = sorted(os.path.relpath(os.path.join(root, name), 'set/out')
                         for root, _, names in os.walk('set/out')
                         for name in names)
        assert written == ['a.overlay.jpg', 'a.png', 'b/a.overlay.jpg',
                           'b/a.png', 'b/c/d e.overlay.jpg', 'b/c/d e.png']
    mask = Image.open('set/out/b/a.png')
    want = eval.predict_classes(eval.prepare_network(net),
                                read_normalised('set/b/a.PNG'))[0]
    assert np.array_equal(mask, want) and len(np.unique(want)) > 1
    assert mask.getpalette()[:18] == np.ravel(read_classes(
        settings.DATA_ROOT, 6)[1]).tolist()


def test_batches_scales_and_flip_are_those_of_eval(net, command, monkeypatch):
    """Four images of two sizes: the two of one size are predicted at once."""
    for i, size in enumerate([(50, 70), (50, 70), (33, 40), (50, 70)]):
        write_image(f'set/{i}.png', size, seed=i)
    batches, inner = [], eval.predict_classes
    monkeypatch.setattr(eval, 'predict_classes', lambda net, x, *rest: (
        batches.append(len(x)), inner(net, x, *rest))[1])
    assert command('set', 'a.pth', 'EVAL_BATCH=2', 'EVAL_SCALES=0.5,1.0',
                   'EVAL_FLIP=True')[0] == 0
    assert batches == [2, 1, 1]
    for i in range(4):
        prob = eval.infer(net, read_normalised(f'set/{i}.png'), (0.5, 1.0),
                          True)
        mask = read_label(f'predictions/{i}.png')
        assert (mask == prob.argmax(1)[0].numpy()).mean() > 0.999


@pytest.mark.parametrize('window', (0, 33))
@torch.no_grad()
def test_probabilities(net, command, window):
    """Those of infer, as float16; of a sliding window too, where two images
    are predicted one after the other."""
    for name in 'pq':
        write_image(f'{name}.png', (40, 60), seed=ord(name))
    assert command('p.png', 'q.png', 'a.pth', '--probabilities',
                   f'EVAL_WINDOW={window}', 'EVAL_BATCH=2')[0] == 0
    for name in 'pq':
        prob = np.load(f'predictions/{name}.prob.npy')
        assert prob.shape == (6, 40, 60) and prob.dtype == np.float16
        settings.EVAL_WINDOW = window
        want = eval.infer(net, read_normalised(f'{name}.png'))[0].numpy()
        np.testing.assert_allclose(prob, want, atol=1e-3)
        mask = read_label(f'predictions/{name}.png')
        assert (mask == want.argmax(0)).mean() > 0.999


def test_what_cannot_be_written_is_named(net, command, monkeypatch):
    """No folder can be made there; a full disk."""
    write_image('p.png')
    status, text = command('p.png', 'a.pth', '--to', '/proc/no')
    assert status == 1 and '/proc/no/p.png cannot be written' in text
    with monkeypatch.context() as patch:
        patch.setattr(np, 'save', lambda file, _: os.write(os.open(
            '/dev/full', os.O_WRONLY), b'0'))
        status, text = command('p.png', 'a.pth', '--probabilities')
    assert status == 1 and 'p.prob.npy cannot be written' in text
    assert 'make room' in text and 'Traceback' not in text
    assert sorted(os.listdir('predictions')) == ['p.overlay.jpg', 'p.png']


def test_links_are_replaced_not_followed(net, command):
    """Of each result, and of what is written beside it; a folder that is a
    link is the user's choice."""
    write_image('p.png')
    write_video('clip.avi', 2)
    os.makedirs('elsewhere/clip')
    os.symlink('elsewhere', 'predictions')
    names = [f'p.{end}' for end in ('png', 'overlay.jpg', 'attention.jpg',
                                    'em.jpg', 'prob.npy')] + [
        'clip/000001.png', 'clip.overlay.mp4']
    with open('mine', 'w') as file:
        file.write('mine')
    for name in [*names, *(f'{name}.tmp' for name in names),
                 'clip.overlay.mp4.tmp.mp4']:
        os.symlink(os.path.abspath('mine'), f'elsewhere/{name}')
    status, text = command('p.png', 'clip.avi', 'a.pth', '--attention',
                           '--em', '--probabilities')
    assert (status, 'cannot' in text) == (0, False)
    with open('mine') as file:
        assert file.read() == 'mine'
    for name in names:
        assert not os.path.islink(f'predictions/{name}'), name
    assert not [name for name in os.listdir('elsewhere') if
                name.endswith('.tmp.mp4')]
    assert cv2.VideoCapture('predictions/clip.overlay.mp4').read()[0]


def test_a_video_that_is_cut_off_leaves_the_old_one(net, command, monkeypatch):
    write_video('clip.avi', 3)
    os.mkdir('predictions')
    with open('predictions/clip.overlay.mp4', 'w') as file:
        file.write('old')
    inner = OverlayVideo.add

    def add(video, page):
        inner(video, page)
        raise KeyboardInterrupt
    monkeypatch.setattr(OverlayVideo, 'add', add)
    assert command('clip.avi', 'a.pth')[0] != 0
    with open('predictions/clip.overlay.mp4') as file:
        assert file.read() == 'old'
    assert sorted(os.listdir('predictions')) == ['clip', 'clip.overlay.mp4']


def test_an_image_too_large_for_the_memory_stops_nothing(net, command,
                                                         monkeypatch):
    for name, size in (('a', (40, 40)), ('b', (80, 80)), ('c', (40, 40))):
        write_image(f'set/{name}.png', size)
    monkeypatch.setattr(inference, 'available_memory', lambda: 300_000)
    status, text = command('set', 'a.pth', '--probabilities')
    assert status == 1 and '1 of 3 files could not be segmented' in text
    assert '\n  predictions/b.png: images of 80 x 80 pixels in 6' in text
    assert {'a.png', 'c.png'} < set(os.listdir('predictions'))
    assert 'b.png' not in os.listdir('predictions')


# ------------------------------------------------- videos
def write_video(path, count):
    """Write a video of 81 x 60 pixels, 7 frames a second."""
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*'MJPG'), 7,
                             (81, 60))
    for i in range(count):
        writer.write(generate_image((60, 81), seed=i))
    writer.release()


def test_a_video(net, command):
    """Frames are images; a file cut off, and one that is none, are named and
    stop nothing."""
    write_video('clip.avi', 5)
    with open('clip.avi', 'rb') as file:
        whole = file.read()
    third = whole.split(b'00dc')[3]     # a mark of frames in an AVI
    for name, data in (('cut.avi', whole[:whole.index(third)]),
                       ('junk.mp4', b'junk')):
        with open(name, 'wb') as file:
            file.write(data)
    status, text = command('clip.avi', 'cut.avi', 'junk.mp4', 'a.pth',
                           'EVAL_BATCH=2')
    assert status == 1 and '2 of 3 files' in text
    assert 'cut.avi ends after 1 of 5 frames' in text
    assert 'junk.mp4 cannot be read as a video' in text
    assert sorted(os.listdir('predictions/clip')) == [
        f'00000{i}.png' for i in range(5)]
    source, video = (cv2.VideoCapture(path) for path in (
        'clip.avi', 'predictions/clip.overlay.mp4'))
    assert video.get(cv2.CAP_PROP_FPS) == 7
    names, colours = read_classes(settings.DATA_ROOT, 6)
    for i in range(5):
        image = cv2.cvtColor(source.read()[1], cv2.COLOR_BGR2RGB)
        mask = read_label(f'predictions/clip/00000{i}.png')
        want = visualize.overlay(image, mask, names, colours,
                                 all_classes=True)
        page = cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB)
        assert page.shape[0] % 2 == page.shape[1] % 2 == 0
        page = page[:want.shape[0], :want.shape[1]]
        assert np.abs(page.astype(int) - want).mean() < 8   # it is MPEG
    assert not video.read()[0]


# ------------------------------------------------- attention
@torch.no_grad()
def test_attention_is_that_of_a_plain_loop(net):
    vars(settings).update(STAGE_NUM_EVAL=2)
    net.emau.stages = 3, 2
    x = torch.randn(1, 3, 50, 70)
    z = eval.attention(net, x)
    assert z.shape == (2, 8, 5, 6)      # 65 x 81 pixels at stride 16
    torch.testing.assert_close(z.sum(1), torch.ones(2, 5, 6))
    full = torch.zeros(1, 3, 65, 81)
    full[..., :50, :70] = x
    flat = net.emau.conv1(net.fc0(net.extractor(full)))[0].flatten(1)
    mu = net.emau.mu[0]
    for t in range(2):
        want = (flat.t() @ mu).softmax(1)                   # (n, k)
        mu = flat @ (want / (1e-6 + want.sum(0)))
        mu = mu / (1e-6 + mu.norm(dim=0))
        torch.testing.assert_close(z[t].flatten(1).t(), want)
        for i in range(8):
            on_pixels = eval.map_on_pixels(z[t, i], x)
            assert on_pixels.shape == (50, 70)
            np.testing.assert_allclose(on_pixels[::16, ::16],
                                       z[t, i, :4, :5], rtol=1e-5)


def test_diverse_bases_are_used_and_unlike():
    """Two alike, one unlike, one hardly used: worked out by hand."""
    z = torch.tensor([[.5, .5, 0, 0], [.5, .45, 0, 0], [0, 0, .4, .4],
                      [0, .01, 0, .02]])
    assert eval.select_diverse_bases(z)[:2] == [0, 2]
    assert sorted(eval.select_diverse_bases(z)) == [0, 1, 2, 3]


def test_maps_at_another_scale_lie_on_the_image(net, command):
    """375 and 188 rows, the image at a half, round to other panels."""
    write_image('p.png', (375, 500))
    assert command('p.png', 'a.pth', '--attention', '--em',
                   'EVAL_SCALES=0.5,1')[0] == 0


def test_attention_and_em_pages(net, command):
    """The EM page has a row a basis, a column an iteration, and the image."""
    write_image('p.png', (40, 80))
    assert command('p.png', 'a.pth', '--attention', '--em', '--bases', '5,2',
                   'STAGE_NUM_EVAL=5')[0] == 0
    panel, gap = (visualize.PANEL, visualize.PANEL // 2), visualize.GAP
    for name, columns, rows in (('em', 6, 2), ('attention', 3, 1)):
        with Image.open(f'predictions/p.{name}.jpg') as page:
            assert page.width == gap + columns * (panel[0] + gap)
            assert rows * panel[1] < page.height < (rows + 2) * panel[1]


def test_a_folder_of_a_run_is_a_checkpoint(net, command):
    """Its models/ will do; with images in it, it is a folder of images. What
    is named twice is taken once."""
    os.makedirs('run/models')
    os.replace('a.pth', 'run/models/final.pth')
    for path in ('set/p.png', 'other/p.png'):
        write_image(path)
    for folder in ('run', 'run/models/'):
        assert command('set', 'set/p.png', 'set', folder)[0] == 0
    shutil.copy('run/models/final.pth', 'other')
    status, text = command('set', 'other', 'run')
    assert status == 2 and 'set/p.png and other/p.png would both' in text


# ------------------------------------------------- bad input
@pytest.mark.parametrize('arguments, line', (
    ('', 'name images, folders or videos to segment'),
    ('empty', 'empty: no image'),
    ('text.jpg a.pth', 'text.jpg cannot be read as an image (no known '
     'format)'),
    ('text.jpg text.jpg a.pth', 'text.jpg cannot be read as an image'),
    ('none/*.png a.pth', 'none/*.png is not there'),
    ('p.png --to text.jpg', '--to text.jpg: text.jpg is a file'),
    ('p.png --to text.jpg/a/b', '--to text.jpg/a/b: text.jpg is a file'),
    ('p.png gone.onnx --em', 'gone.onnx is not there'),
    ('p.png wrong.onnx --em', 'wrong.onnx: an ONNX file does not give the'),
    ('gone.png', 'gone.png is not there'),
    ('p.png p.jpg', 'p.png and p.jpg would both be written as p'),
    ('p.png --to .', 'p.png would be written over by a result'),
    ('q.jpg q.overlay.jpg --to .', 'q.overlay.jpg would be written over by'),
    ('p.png a.pth b.pth', 'a.pth, b.pth: name one checkpoint at most'),
    ('a.pth', 'a.pth: name images'),
    ('p.png gone.pth', 'gone.pth is not there'),
    ('p.png --bases 1', '--bases 1: of what?'),
    ('p.png a.pth --em --bases 8', '--bases 8: name some of 0 to 7'),
    ('p.png a.pth --em --bases x', '--bases x: name some of'),
    ('p.png fcn.pth --attention', 'has none (HEAD=fcn'),
    ('p.png a.pth EVAL_SCALES=0', 'EVAL_SCALES='),
    ('--export net.onnx a.pth', 'python -m tools.export'),
    ('p.png --export=net.onnx', 'python -m tools.export'),
    ('p.png wrong.onnx', 'wrong.onnx cannot be run by onnxruntime'),
    ('p.png wrong.safetensors', 'wrong.safetensors is truncated')))
def test_bad_input_ends_in_a_line(net, arguments, line, monkeypatch, capsys):
    for path in ('p.png', 'p.jpg', 'q.jpg', 'q.overlay.jpg'):
        write_image(path)
    os.mkdir('empty')
    for name in ('wrong.onnx', 'wrong.safetensors', 'text.jpg'):
        with open(name, 'wb') as file:
            file.write(b'wrong' * 99)
    torch.save({'net': heads.Segmenter(
        network.ResNet(18, 16, 'plain'), heads.classifier(512, 6, 0.1)
        ).state_dict(), 'settings': {**settings.as_dict(), 'HEAD': 'fcn'}},
        'fcn.pth')
    status, text = refused(predict.main, *arguments.split(), capsys=capsys,
                           monkeypatch=monkeypatch)
    assert status == 2 and line in text
    assert not os.path.exists('predictions')
