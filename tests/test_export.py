"""Exported networks against PyTorch, scored, and used as docs/export.md shows.

    python -m pytest tests/test_export.py

The exported network has learned for some seconds: from real images (../shared,
CamVid) where they are, else from the toy set.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dataset
import eval
import heads
import predict
import settings
import utils
from conftest import REPO, SMALL, refused, run, run_tool, words
from lib.checkpoint import DATA_SETTINGS, load
from lib.images import read_label
from test_predict import (
    generate_image,
    read_normalised,
    run_main,
    save_network,
    write_image,
)
from test_scripts import read_blocks
from tools import export


@pytest.fixture
def net(small):
    return save_network('a.pth')


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
            train_and_export(folder, toy)
    return folder


def train_and_export(folder, toy):
    """Train, and export as a user does. Balanced, so that even 20 steps from
    random weights predict several classes."""
    shared = os.path.join(os.path.dirname(utils.ROOT), 'shared')
    given = {**SMALL, 'DATA_ROOT': toy, 'LR': 0.01, 'BATCH_SIZE': 4,
             'ITER_MAX': 20, 'VAL_SPLIT': '', 'MODEL_DIR': '.',
             'BALANCE_CLASSES': True}
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
    done = run_tool('export', 'net.onnx', *images, 'final.pth',
                    'EVAL_SCALES=0.5', cwd=folder)
    assert done.returncode == 0, done.stderr
    assert 'of the pixels of 3 images the class that PyTorch' in done.stdout


# ------------------------------------------------- ONNX
@pytest.mark.long
@torch.no_grad()
def test_an_exported_network_agrees_at_any_size(exported):
    """Sizes on and off the grid of 16, one of a pixel's height; a batch."""
    net, checkpoint = heads.load_network(str(exported / 'final.pth'), 'cpu')
    other, recorded = heads.load_network(str(exported / 'net.onnx'), 'cpu')
    for b, *size in ((1, 70, 90), (2, 65, 65), (1, 180, 240), (3, 1, 17)):
        x = torch.from_numpy(np.stack([generate_image(size, i)
                                       for i in range(b)]))
        x = dataset.normalise(x.permute(0, 3, 1, 2), 'cpu')
        want, logits = eval.predict_logits(net, x), other(x)
        torch.testing.assert_close(logits, want, atol=1e-3, rtol=1e-3)
        same = (logits.argmax(1) == want.argmax(1)).float().mean()
        assert same >= 0.999
    assert recorded['classes'] == checkpoint['classes']
    assert recorded['colours'] == checkpoint['colours']
    assert tuple(recorded['mean']) == settings.MEAN
    assert recorded['step'] == 20 and recorded['git'] == checkpoint['git']
    assert all(value == checkpoint['settings'][name] for name, value
               in recorded['settings'].items())


@pytest.mark.long
def test_an_exported_network_is_scored_and_predicts(exported, tmp_path,
                                                    monkeypatch, capsys):
    """On real images, if there are any: 99.9% of the pixels alike."""
    monkeypatch.chdir(tmp_path)
    root = exported / 'set'
    lists = tmp_path / 'part' / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    for name in ('JPEGImages', 'SegmentationClassAug', 'classes.txt'):
        (tmp_path / 'part' / name).symlink_to(root / name)
    ids = (root / 'ImageSets/Segmentation/val.txt').read_text().split()[:4]
    (lists / 'val.txt').write_text('\n'.join(ids))
    before, results = settings.as_dict(), []
    for file in ('final.pth', 'net.onnx'):
        for main, *arguments in (
                (eval.main, 'DATA_ROOT=part', 'NUM_WORKERS=0',
                 'EVAL_FLIP=True', 'VAL_SPLIT=val', 'LOG_DIR=logdir'),
                (predict.main, root / 'JPEGImages' / f'{ids[0]}.jpg', '--to',
                 file)):
            vars(settings).update(before)
            settings._given.clear()
            status, text = run_main(
                main, exported / file, *arguments, 'EVAL_SCALES=0.5',
                monkeypatch=monkeypatch, capsys=capsys)
            assert status == 0, text
        with open('logdir/eval.json') as result:
            results.append(json.load(result))
    one, two = (np.array(result['confusion']) for result in results)
    assert np.abs(one - two).sum() <= 0.002 * one.sum() > 0
    assert abs(results[0]['mIoU'] - results[1]['mIoU']) < 1e-3
    assert (one.sum(0) > 0).sum() > 2           # it predicts several classes
    masks = [read_label(f'{file}/{ids[0]}.png')
             for file in ('final.pth', 'net.onnx')]
    assert (masks[0] == masks[1]).mean() >= 0.999
    with open('results.csv') as file:
        assert 'net.onnx' in file.read()


@pytest.mark.long
def test_the_lines_of_the_docs_for_onnx(exported, tmp_path):
    """They run without torch and give what predict.py gives."""
    shutil.copy(exported / 'net.onnx', tmp_path)
    write_image(str(tmp_path / 'photo.jpg'), (75, 110))
    code, _ = read_blocks('python', 'docs/export.md')
    subprocess.run([sys.executable, '-c', code + '\nimport sys\n'
                    'assert "torch" not in sys.modules'], cwd=tmp_path,
                   check=True)
    net, checkpoint = heads.load_network(str(exported / 'final.pth'), 'cpu')
    want = eval.predict_classes(
        net, read_normalised(str(tmp_path / 'photo.jpg')))[0]
    with Image.open(tmp_path / 'mask.png') as mask:
        assert (np.array(mask) == want.numpy()).mean() >= 0.999
        colours = np.ravel(checkpoint['colours']).tolist()
        assert mask.getpalette()[:len(colours)] == colours


@pytest.mark.long
@pytest.mark.parametrize('word, line', (
    ('STRIDE=8', 'STRIDE=8: '), ('INFERENCE=folded', 'INFERENCE=plain'),
    ('INFERENCE=bf16', 'INFERENCE=plain'), ('--em', 'an ONNX file'),
    ('', 'python -m pip install onnxruntime')))
def test_an_onnx_file_is_what_it_is(exported, word, line, monkeypatch, capsys,
                                    tmp_path):
    """What it was not written with is refused, and so is a missing module."""
    monkeypatch.chdir(tmp_path)
    if not word:
        monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    status, text = refused(
        predict.main, write_image('p.png'), exported / 'net.onnx',
        *word.split(), monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and line in text


def test_an_onnx_file_of_another_program_is_refused(small, monkeypatch,
                                                    capsys):
    value = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in 'xy']
    model = onnx.helper.make_model(onnx.helper.make_graph([
        onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', value[:1],
        value[1:]), opset_imports=[onnx.helper.make_opsetid('', 18)],
        ir_version=8)
    onnx.helper.set_model_props(model, {'author': 'somebody'})
    onnx.save(model, 'theirs.onnx')
    status, line = refused(predict.main, write_image('p.png'), 'theirs.onnx',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'theirs.onnx was not written by' in line


@pytest.mark.parametrize('loaded, line', (
    (lambda path: lambda x: torch.randn(len(x), 6, *x.shape[2:]),
     'agrees with PyTorch on only'),
    (export.OnnxNetwork, 'cannot run what ResNet-18, plain stem becomes')))
def test_an_export_that_disagrees_is_not_written(net, loaded, line,
                                                 monkeypatch, capsys):
    """The tracing is left out: a network of noise, and an empty file, take
    the file's place."""
    class Program:
        class model:
            metadata_props = {}

        def save(self, path, external_data):
            with open(path, 'w'):
                pass
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: Program())
    monkeypatch.setattr(export, 'OnnxNetwork', loaded)
    status, text = refused(export.main, 'new/net.onnx', 'a.pth',
                           capsys=capsys, monkeypatch=monkeypatch)
    assert status == 1 and 'net.onnx is not written' in text and line in text
    assert os.listdir() == ['a.pth']


# ------------------------------------------------- safetensors
@pytest.mark.long
def test_the_lines_of_the_docs_for_network_py(net, tmp_path):
    """In a folder with network.py alone, and bit-equal weights."""
    done = run_tool('export', 'net.safetensors', 'a.pth', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    write_image('photo.jpg', (75, 110))
    shutil.copy(os.path.join(REPO, 'network.py'), tmp_path)
    _, code = read_blocks('python', 'docs/export.md')
    subprocess.run([sys.executable, '-c', code + '\nnp.save("pred", pred)'],
                   cwd=tmp_path, check=True,
                   env={**os.environ, 'PYTHONPATH': ''})
    want = eval.predict_classes(net, read_normalised('photo.jpg'))[0].numpy()
    assert (np.load('pred.npy') == want).mean() >= 0.999
    loaded, checkpoint = heads.load_network('net.safetensors', 'cpu')
    assert checkpoint['classes'] == load('a.pth')['classes']
    for name in DATA_SETTINGS:
        assert checkpoint['settings'][name] == getattr(settings, name)
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_weights_of_others_load_as_a_published_checkpoint(small):
    """safetensors without our record."""
    net = heads.build_network()
    save_file(net.state_dict(), 'plain.safetensors', {'format': 'pt'})
    settings.N_CLASSES, settings.EM_BASES = 21, 64
    loaded, checkpoint = heads.load_network('plain.safetensors', 'cpu')
    assert list(checkpoint) == ['net'] and settings.N_CLASSES == 6
    assert torch.equal(loaded.fc2.weight, net.fc2.weight)


# ------------------------------------------------- bad input
@pytest.mark.parametrize('arguments, status, line', (
    ('net.pt a.pth', 2, 'ends in .onnx or .safetensors'),
    ('net.onnx gone.pth', 2, 'gone.pth is not there'),
    ('net.onnx wrong.onnx', 2, 'is exported already'),
    ('net.onnx a.pth b.pth', 2, 'name one checkpoint at most'),
    ('net.onnx a.pth gone.png', 2, 'gone.png cannot be read'),
    ('net.onnx a.pth INFERENCE=bf16', 2, 'INFERENCE=plain'),
    ('net.onnx a.pth INFERENCE=folded', 2, 'INFERENCE=plain'),
    ('net.safetensors a.pth p.png', 2, 'nothing is checked'),
    ('wrong.onnx/net.safetensors a.pth', 2, 'wrong.onnx is a file'),
    ('new/net.onnx a.pth p.onnx.png', 2, 'p.onnx.png cannot be read'),
    ('/proc/net.safetensors a.pth', 1, 'cannot be written')))
def test_bad_input_ends_in_a_line(net, arguments, status, line, monkeypatch,
                                  capsys):
    write_image('p.png')
    with open('wrong.onnx', 'wb') as file:
        file.write(b'wrong' * 99)
    found = refused(export.main, *arguments.split(), capsys=capsys,
                    monkeypatch=monkeypatch)
    assert found[0] == status and line in found[1]
    assert not [name for name in os.listdir()
                if name.startswith(('net.', 'new'))]
