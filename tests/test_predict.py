"""Predictions of pictures, folders and videos against eval's own; drawings;
exported networks against PyTorch, and as the README uses them.

    python -m pytest tests/test_predict.py

The exported network has learned for some seconds: from real pictures
(../shared, CamVid) where they are, else from the toy set.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import dataset
import eval
import predict
import settings
import utils
from conftest import REPO, SMALL, refused, run, words
from test_scripts import block


@pytest.fixture
def net(small):
    """A network that tells its classes apart, saved as a.pth."""
    torch.manual_seed(0)
    net = baselines.build_network().eval()
    with torch.no_grad():
        net.fc2.weight.mul_(30)
    names, colours = utils.read_classes(settings.DATA_ROOT, 6)
    torch.save({'net': net.state_dict(), 'settings': settings.as_dict(),
                'classes': names, 'colours': colours, 'step': 1}, 'a.pth')
    return net


@pytest.fixture
def command(monkeypatch, capsys):
    """predict.py in this process: (exit status, its lines on stderr)."""
    def predicted(*arguments):
        monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            utils.launch(predict.main)
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err
    return predicted


def picture(size, seed=0):
    """Return a picture (H, W, 3) uint8 of soft blots."""
    random = np.random.default_rng(seed)
    return cv2.resize(random.integers(0, 256, (6, 6, 3), np.uint8), size[::-1],
                      interpolation=cv2.INTER_CUBIC)


def save(path, size=(50, 70), seed=0):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    Image.fromarray(picture(size, seed)).save(path)
    return path


def normalised(path):
    return dataset.normalise(torch.from_numpy(predict.read_picture(
        path)).permute(2, 0, 1)[None], 'cpu')


# ------------------------------------------------- pictures
def test_pictures_of_every_kind_are_read(tmp_path, monkeypatch):
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
        got = predict.read_picture(f'{name}.png')
        assert got.dtype == np.uint8 and got[0].tolist() == want, name
    assert predict.read_picture('cmyk.jpg').shape == (8, 8, 3)


def test_a_folder_keeps_its_order_and_a_bad_file_stops_nothing(net, command):
    """Nothing hidden, and nothing of the output folder, is seen; a second
    run gives the same."""
    for path in ('set/a.jpg', 'set/b/a.PNG', 'set/b/c/d e.webp'):
        save(path)
    for path in ('set/.e.jpg', 'set/notes.txt'):
        with open(path, 'w'):
            pass
    with open('set/torn.jpg', 'wb') as file:
        file.write(open('set/a.jpg', 'rb').read()[:500])
    for _ in range(2):
        status, told = command('set', 'a.pth', '--to', 'set/out')
        assert status == 1 and 'Traceback' not in told
        assert 'predict.py: 1 of 4 files could not be read' in told
        assert '\n  set/torn.jpg cannot be read as a picture' in told
        made = sorted(os.path.relpath(os.path.join(root, name), 'set/out')
                      for root, _, names in os.walk('set/out')
                      for name in names)
        assert made == ['a.overlay.jpg', 'a.png', 'b/a.overlay.jpg',
                        'b/a.png', 'b/c/d e.overlay.jpg', 'b/c/d e.png']
    mask = Image.open('set/out/b/a.png')
    want = eval.classify(eval.prepared(net), normalised('set/b/a.PNG'))[0]
    assert np.array_equal(mask, want) and len(np.unique(want)) > 1
    assert mask.getpalette()[:18] == np.ravel(utils.read_classes(
        settings.DATA_ROOT, 6)[1]).tolist()


def test_batches_scales_and_flip_are_those_of_eval(net, command, monkeypatch):
    """Four pictures of two sizes: the two of one size are seen at once."""
    for i, size in enumerate([(50, 70), (50, 70), (33, 40), (50, 70)]):
        save(f'set/{i}.png', size, seed=i)
    given, seen = ('EVAL_SCALES=0.5,1.0', 'EVAL_FLIP=True'), []
    inner = eval.classify
    monkeypatch.setattr(eval, 'classify', lambda net, x, *rest: (
        seen.append(len(x)), inner(net, x, *rest))[1])
    assert command('set', 'a.pth', 'EVAL_BATCH=2', *given)[0] == 0
    assert seen == [2, 1, 1]
    for i in range(4):
        prob = eval.infer(net, normalised(f'set/{i}.png'), (0.5, 1.0), True)
        got = dataset.read_label(f'predictions/{i}.png')
        assert (got == prob.argmax(1)[0].numpy()).mean() > 0.999


@pytest.mark.parametrize('window', (0, 33))
def test_probabilities(net, command, window):
    """Those of infer, as float16; through windows too, where two pictures
    are seen one after the other."""
    for name in 'pq':
        save(f'{name}.png', (40, 60), seed=ord(name))
    assert command('p.png', 'q.png', 'a.pth', '--probabilities',
                   f'EVAL_WINDOW={window}', 'EVAL_BATCH=2')[0] == 0
    for name in 'pq':
        got = np.load(f'predictions/{name}.prob.npy')
        assert got.shape == (6, 40, 60) and got.dtype == np.float16
        settings.EVAL_WINDOW = window
        want = eval.infer(net, normalised(f'{name}.png'))[0].detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-3)
        mask = dataset.read_label(f'predictions/{name}.png')
        assert (mask == want.argmax(0)).mean() > 0.999


def test_what_cannot_be_written_is_said(net, command, monkeypatch):
    save('p.png')
    with open('file', 'w'):
        pass
    status, told = command('p.png', 'a.pth', '--to', 'file')
    assert status == 1 and 'predict.py: file/p.png cannot be written' in told
    status, told = command('--export', 'file/net.safetensors', 'a.pth')
    assert status == 1 and 'file/net.safetensors cannot be written' in told
    monkeypatch.setattr(predict.shutil, 'disk_usage', lambda path:
                        shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 1000))
    status, told = command('p.png', 'a.pth', '--probabilities')
    assert status == 1 and 'probabilities take' in told
    assert 'Traceback' not in told


# ------------------------------------------------- videos
def test_a_video(net, command):
    """Frames are pictures; a file cut off, and one that is none, are named
    and stop nothing."""
    writer = cv2.VideoWriter('clip.avi', cv2.VideoWriter.fourcc(*'MJPG'), 7,
                             (81, 60))
    for i in range(5):
        writer.write(picture((60, 81), seed=i))
    writer.release()
    with open('clip.avi', 'rb') as file:
        whole = file.read()
    third = whole.split(b'00dc')[3]     # a mark of frames in an AVI
    for name, data in (('cut.avi', whole[:whole.index(third)]),
                       ('junk.mp4', b'junk')):
        with open(name, 'wb') as file:
            file.write(data)
    status, told = command('clip.avi', 'cut.avi', 'junk.mp4', 'a.pth',
                           'EVAL_BATCH=2')
    assert status == 1 and '2 of 3 files' in told
    assert 'cut.avi ends after 1 of 5 frames' in told
    assert 'junk.mp4 cannot be read as a video' in told
    assert sorted(os.listdir('predictions/clip')) == [
        f'00000{i}.png' for i in range(5)]
    source, film = (cv2.VideoCapture(path) for path in (
        'clip.avi', 'predictions/clip.overlay.mp4'))
    assert film.get(cv2.CAP_PROP_FPS) == 7
    names, colours = utils.read_classes(settings.DATA_ROOT, 6)
    for i in range(5):
        image = cv2.cvtColor(source.read()[1], cv2.COLOR_BGR2RGB)
        mask = dataset.read_label(f'predictions/clip/00000{i}.png')
        want = eval.overlay(image, mask, names, colours, all_classes=True)
        got = cv2.cvtColor(film.read()[1], cv2.COLOR_BGR2RGB)
        assert got.shape[0] % 2 == got.shape[1] % 2 == 0
        got = got[:want.shape[0], :want.shape[1]]
        assert np.abs(got.astype(int) - want).mean() < 8    # it is MPEG
    assert not film.read()[0]


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
    maps = eval.on_pixels(z, x)
    assert maps.shape == (2, 8, 50, 70)
    torch.testing.assert_close(maps[..., ::16, ::16], z[..., :4, :5])


def test_telling_bases_are_used_and_unlike():
    """Two alike, one unlike, one hardly used: worked out by hand."""
    z = torch.tensor([[.5, .5, 0, 0], [.5, .45, 0, 0], [0, 0, .4, .4],
                      [0, .01, 0, .02]])
    assert eval.telling(z)[:2] == [0, 2]
    assert sorted(eval.telling(z)) == [0, 1, 2, 3]


def test_attention_and_em_pages(net, command):
    """The EM page has a row a basis, a column an iteration, and the picture;
    a hot place is bright and a cold one dark."""
    save('p.png', (40, 80))
    assert command('p.png', 'a.pth', '--attention', '--em', '--bases', '5,2',
                   'STAGE_NUM_EVAL=5')[0] == 0
    panel, line, gap = (eval.PANEL, eval.PANEL // 2), 22, 6
    with Image.open('predictions/p.em.jpg') as page:
        assert page.size == (gap + 6 * (panel[0] + gap),
                             gap + 2 * (panel[1] + line))
    with Image.open('predictions/p.attention.jpg') as page:
        assert page.size == (gap + 3 * (panel[0] + gap),
                             gap + panel[1] + line)
    settings.STAGE_NUM_EVAL = 5
    hot = eval.heat(picture((9, 9)), np.eye(9))
    assert hot[3, 3].sum() > 2 * hot[3, 5].sum()


def test_overlays_let_black_classes_through():
    image = np.full((400, 400, 3), 100, np.uint8)
    pred = np.zeros((400, 400), np.uint8)
    pred[:, 100:] = 1
    colours = [[0, 0, 0], [10, 200, 20]]
    for turn in (1, -1):
        page = eval.overlay(image, pred, ['a', 'b'], colours[::turn])
        black, green = page[5, [5, 300][::turn]].astype(int)
        assert black.tolist() == [100, 100, 100]
        assert abs(green - [50, 155, 56]).max() <= 1        # 0.45 and 0.55


# ------------------------------------------------- export
@pytest.fixture(scope='session')
def exported(tmp_path_factory, toy):
    """A folder with final.pth, learned for seconds, net.onnx of it, and the
    set it learned from; made once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    folder = base / 'exported'
    folder.mkdir(exist_ok=True)
    with open(base / 'exported.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'net.onnx').exists():
            export(folder, toy)
    return folder


def export(folder, toy):
    """Train, and export as a user does."""
    shared = os.path.join(os.path.dirname(REPO), 'shared')
    given = {**SMALL, 'DATA_ROOT': toy, 'LR': 0.01, 'BATCH_SIZE': 4,
             'ITER_MAX': 20, 'VAL_SPLIT': '', 'MODEL_DIR': '.'}
    if os.path.isdir(shared):
        given.update(
            DATA_ROOT=f'{shared}/data/camvid', N_CLASSES=11, CROP_SIZE=81,
            SCALES=(0.4, 0.5), PRETRAINED_PARTIAL=True,
            PRETRAINED=f'{shared}/weights/'
            'resnet18_conv1_to_layer3_bn_unfolded.pth')
    done = run('train.py', *words(given), cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / 'set').symlink_to(given['DATA_ROOT'])
    images = sorted((folder / 'set' / 'JPEGImages').iterdir())[:3]
    done = run('predict.py', '--export', 'net.onnx', *images, 'final.pth',
               'EVAL_SCALES=0.5', cwd=folder)
    assert done.returncode == 0, done.stderr
    assert 'of the pixels of 3 pictures the class that PyTorch' in done.stdout


@torch.no_grad()
def test_an_exported_network_agrees_at_any_size(exported):
    """Sizes on and off the grid of 16, one of a pixel's height; a batch."""
    net, checkpoint = eval.load_network(str(exported / 'final.pth'), 'cpu')
    other, recorded = eval.load_network(str(exported / 'net.onnx'), 'cpu')
    for b, *size in ((1, 70, 90), (2, 65, 65), (1, 180, 240), (3, 1, 17)):
        x = torch.from_numpy(np.stack([picture(size, i) for i in range(b)]))
        x = dataset.normalise(x.permute(0, 3, 1, 2), 'cpu')
        want, got = eval.logits(net, x), other(x)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        same = (got.argmax(1) == want.argmax(1)).float().mean()
        assert same >= 0.999
    assert recorded['classes'] == checkpoint['classes']
    assert recorded['colours'] == checkpoint['colours']
    assert tuple(recorded['mean']) == settings.MEAN
    assert recorded['step'] == 20 and recorded['git'] == checkpoint['git']
    assert all(value == checkpoint['settings'][name] for name, value
               in recorded['settings'].items())


def test_an_exported_network_is_scored_and_predicts(exported, command,
                                                    tmp_path, monkeypatch):
    """On real pictures, if there are any: 99.9% of the pixels alike."""
    monkeypatch.chdir(tmp_path)
    root = exported / 'set'
    lists = tmp_path / 'part' / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    for name in ('JPEGImages', 'SegmentationClassAug', 'classes.txt'):
        (tmp_path / 'part' / name).symlink_to(root / name)
    ids = (root / 'ImageSets/Segmentation/val.txt').read_text().split()[:4]
    (lists / 'val.txt').write_text('\n'.join(ids))
    before, found = settings.as_dict(), []
    for file in ('final.pth', 'net.onnx'):
        vars(settings).update(before)
        monkeypatch.setattr(sys, 'argv', [
            'eval.py', str(exported / file), 'DATA_ROOT=part',
            'NUM_WORKERS=0', 'EVAL_SCALES=0.5', 'EVAL_FLIP=True',
            'VAL_SPLIT=val'])
        eval.main()
        with open('logdir/eval.json') as result:
            found.append(json.load(result))
        status, _ = command(root / 'JPEGImages' / f'{ids[0]}.jpg', '--to',
                            file, exported / file, 'EVAL_SCALES=0.5')
        assert status == 0
    one, two = (np.array(result['confusion']) for result in found)
    assert np.abs(one - two).sum() <= 0.002 * one.sum() > 0
    assert abs(found[0]['mIoU'] - found[1]['mIoU']) < 1e-3
    assert (one.sum(0) > 0).sum() > 2
    masks = [dataset.read_label(f'{file}/{ids[0]}.png')
             for file in ('final.pth', 'net.onnx')]
    assert (masks[0] == masks[1]).mean() >= 0.999
    with open('results.csv') as file:
        assert 'net.onnx' in file.read()


def test_the_readmes_lines_for_onnx(exported, tmp_path):
    """They run without torch and give what predict.py gives."""
    shutil.copy(exported / 'net.onnx', tmp_path)
    save(str(tmp_path / 'photo.jpg'), (75, 110))
    code = block('python', '### Export')
    subprocess.run([sys.executable, '-c', code + '\nimport sys\n'
                    'assert "torch" not in sys.modules'], cwd=tmp_path,
                   check=True)
    net, checkpoint = eval.load_network(str(exported / 'final.pth'), 'cpu')
    want = eval.classify(net, normalised(str(tmp_path / 'photo.jpg')))[0]
    with Image.open(tmp_path / 'mask.png') as mask:
        assert (np.array(mask) == want.numpy()).mean() >= 0.999
        colours = np.ravel(checkpoint['colours']).tolist()
        assert mask.getpalette()[:len(colours)] == colours


def test_the_readmes_lines_for_network_py(net, command, tmp_path):
    """In a folder with network.py alone, and bit-equal weights."""
    assert command('--export', 'net.safetensors', 'a.pth')[0] == 0
    save('photo.jpg', (75, 110))
    shutil.copy(os.path.join(REPO, 'network.py'), tmp_path)
    code = block('python', 'And with `network.py`')
    subprocess.run([sys.executable, '-c', code + '\nnp.save("pred", pred)'],
                   cwd=tmp_path, check=True,
                   env={**os.environ, 'PYTHONPATH': ''})
    want = eval.classify(net, normalised('photo.jpg'))[0].numpy()
    assert (np.load('pred.npy') == want).mean() >= 0.999
    loaded, checkpoint = eval.load_network('net.safetensors', 'cpu')
    assert checkpoint['classes'] == utils.load('a.pth')['classes']
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_files_of_others(small, monkeypatch, capsys):
    """Weights without our record load as a published checkpoint does; an
    ONNX file without it is refused."""
    import onnx
    from safetensors.torch import save_file
    net = baselines.build_network()
    save_file(net.state_dict(), 'plain.safetensors', {'format': 'pt'})
    settings.N_CLASSES, settings.EM_BASES = 21, 64
    loaded, checkpoint = eval.load_network('plain.safetensors', 'cpu')
    assert list(checkpoint) == ['net'] and settings.N_CLASSES == 6
    assert torch.equal(loaded.fc2.weight, net.fc2.weight)
    value = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in 'xy']
    model = onnx.helper.make_model(onnx.helper.make_graph([
        onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', value[:1],
        value[1:]), opset_imports=[onnx.helper.make_opsetid('', 18)],
        ir_version=8)
    onnx.helper.set_model_props(model, {'author': 'somebody'})
    onnx.save(model, 'theirs.onnx')
    status, line = refused(predict.main, save('p.png'), 'theirs.onnx',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'theirs.onnx is not of predict.py' in line


def test_an_export_that_disagrees_is_not_written(net, monkeypatch, command):
    """The tracing is left out: a network of noise takes the file's place."""
    class Program:
        class model:
            metadata_props = {}

        def save(self, path, external_data):
            with open(path, 'w'):
                pass
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: Program())
    monkeypatch.setattr(eval, 'Onnx', lambda path: lambda x: torch.randn(
        len(x), 6, *x.shape[2:]))
    status, told = command('--export', 'net.onnx', 'a.pth')
    assert status == 1 and 'net.onnx is not written' in told
    assert not [name for name in os.listdir() if name.startswith('net.onnx')]


# ------------------------------------------------- bad input
def test_bad_input_ends_in_a_line(net, monkeypatch, capsys):
    save('p.png')
    os.mkdir('empty')
    for name in ('wrong.onnx', 'wrong.safetensors'):
        with open(name, 'wb') as file:
            file.write(b'wrong' * 99)
    settings.HEAD = 'fcn'
    torch.save({'net': baselines.build_network().state_dict(),
                'settings': settings.as_dict()}, 'fcn.pth')
    before = settings.as_dict()
    for given, told in (
            ('empty', 'empty: no picture'),
            ('p.png --to .', 'p.png would be written over by its mask'),
            ('p.png --bases 1', '--bases 1: of what?'),
            ('p.png a.pth --em --bases 8', '--bases 8: name some of 0 to 7'),
            ('p.png a.pth --em --bases x', '--bases x: name some of'),
            ('p.png fcn.pth --attention', 'none to look into (HEAD=fcn'),
            ('--export net.pt a.pth', 'ends in .onnx or .safetensors'),
            ('--export net.onnx a.pth --to x', 'leave the other options'),
            ('--export net.onnx gone.pth', 'gone.pth is not there'),
            ('--export net.onnx wrong.onnx', 'is exported already'),
            ('--export net.onnx a.pth INFERENCE=bf16', 'INFERENCE=plain'),
            ('--export net.safetensors a.pth p.png', 'nothing is checked'),
            ('p.png wrong.onnx', 'wrong.onnx cannot be run by onnxruntime'),
            ('p.png wrong.safetensors', 'wrong.safetensors is truncated')):
        status, line = refused(predict.main, *given.split(), capsys=capsys,
                               monkeypatch=monkeypatch)
        assert status == 2 and told in line
        vars(settings).update(before)
        settings._given.clear()
    assert not [name for name in os.listdir() if name.startswith('net.')]


def test_an_onnx_file_is_what_it_is(exported, monkeypatch, capsys, tmp_path):
    """What it was not written with is refused, and so is a missing module."""
    monkeypatch.chdir(tmp_path)
    file, photo = str(exported / 'net.onnx'), save('p.png')
    for words_, told in ((['STRIDE=8'], 'STRIDE=8: '),
                         (['INFERENCE=folded'], 'INFERENCE=plain'),
                         (['--em'], 'an ONNX file')):
        before = settings.as_dict()
        status, line = refused(predict.main, photo, file, *words_,
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and told in line
        vars(settings).update(before)
        settings._given.clear()
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    status, line = refused(predict.main, photo, file, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and 'python -m pip install onnxruntime' in line
