"""The archive for the VOC test server, and what keeps it from being written.

    python -m pytest tests/test_submit.py
"""
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import eval
import heads
import settings
from conftest import refused, run_tool
from lib.images import image_size, read_image, save_label, voc_palette
from tools import submit


def write_unlabelled(root, sizes):
    """Write a data set whose split `test` has images {id: (W, H)} of smooth
    colours, and no labels."""
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    (lists / 'test.txt').write_text('\n'.join(sizes))
    (root / 'JPEGImages').mkdir()
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize(
            size).save(root / 'JPEGImages' / f'{name}.jpg')


def save_network(path, net):
    torch.save({'net': net.state_dict(), 'step': 1}, path)


# ------------------------------------------------- the archive
def test_the_test_servers_archive(small, tmp_path, monkeypatch):
    """Of a split without labels: names, sizes, palette, classes."""
    root, ids = tmp_path / 'unlabelled', ['2008_000001', '2008_000002',
                                          '2008_000003']
    write_unlabelled(root, {name: (161, 90 + i) for i, name in enumerate(ids)})
    torch.manual_seed(0)
    net = heads.build_network()
    with torch.no_grad():               # so that several classes are there
        net.fc2.bias -= net.eval()(torch.randn(1, 3, 97, 161)).mean((0, 2, 3))
    save_network('a.pth', net)
    os.makedirs(submit.FOLDER)
    with open(submit.mask_path('other'), 'w'):
        pass                                    # of another split
    monkeypatch.setattr(sys, 'argv', [
        'submit.py', 'a.pth', f'DATA_ROOT={root}', 'VAL_SPLIT=test',
        'EVAL_SCALES=0.75,1', 'EVAL_FLIP=True', 'INFERENCE=plain'])
    submit.main()
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
            image = read_image(root / 'JPEGImages' / f'{ids[i]}.jpg')
            x = dataset.normalise(torch.from_numpy(image).permute(
                2, 0, 1)[None], 'cpu')
            with torch.no_grad():
                expected = eval.infer(net, x, (0.75, 1.0), True).argmax(1)[0]
            assert np.array_equal(pred, expected)
            assert len(expected.unique()) > 1
            assert os.path.isfile(member.name)
    assert not os.path.exists('results.csv')


def test_several_processes_make_one_archive(small, tmp_path):
    """The first, which packs, has done its share long before the second."""
    write_unlabelled(tmp_path / 'set', {'little': (33, 33),
                                        'large': (1200, 1200)})
    save_network('a.pth', heads.build_network())
    done = run_tool('submit', 'a.pth', 'DATA_ROOT=set', 'VAL_SPLIT=test',
                    'STRIDE=16', 'NUM_WORKERS=0', 'DEVICES=-1,-1', cwd='.')
    assert done.returncode == 0, done.stderr
    assert 'processes: 2' in done.stdout
    with tarfile.open('results.tgz') as archive:
        assert len(archive.getnames()) == 2


# ------------------------------------------------- bad input
@pytest.fixture
def bad(small, tmp_path, monkeypatch, capsys):
    """A copy of the toy set without labels, and a.pth; the fixture runs the
    tool, which must end in one line with exit status 2 that holds texts."""
    root = tmp_path / 'set'
    shutil.copytree(settings.DATA_ROOT, root)
    shutil.rmtree(root / 'SegmentationClassAug')
    settings.DATA_ROOT = str(root)
    save_network('a.pth', heads.build_network())

    def bad(*arguments, texts):
        status, line = refused(submit.main, 'a.pth', 'STRIDE=16',
                               'NUM_WORKERS=0', *arguments,
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2
        assert all(str(text) in line for text in texts), line
    bad.ids = (root / 'ImageSets/Segmentation/val.txt').read_text().split()
    bad.image = root / 'JPEGImages' / f'{bad.ids[1]}.jpg'
    return bad


def test_images_are_checked_before_the_first_prediction(bad):
    bad.image.write_bytes(b'no image')
    bad(texts=(bad.image, 'cannot be read'))
    bad.image.unlink()
    bad(texts=(bad.image, 'is not there'))
    bad('VAL_SPLIT=test', texts=('test.txt', 'train, val'))
    assert not os.path.exists('results')


@pytest.mark.parametrize('name', ('../evil', '{}/evil', '..\\evil'))
def test_ids_that_leave_their_folder_are_refused(bad, tmp_path, name):
    path = tmp_path / 'set/ImageSets/Segmentation/val.txt'
    path.write_text(f'{bad.ids[0]}\n{name.format(tmp_path)}\n')
    for place in ('set/evil.jpg', 'evil.jpg'):
        shutil.copy(bad.image, tmp_path / place)
    bad(texts=(path, 'has the ID'))
    assert not os.path.exists('results')


def test_ids_in_folders(bad, tmp_path):
    """sub/a is a legal ID; its mask lies in a folder, too."""
    (tmp_path / 'set/JPEGImages/sub').mkdir()
    shutil.copy(bad.image, tmp_path / 'set/JPEGImages/sub/a.jpg')
    (tmp_path / 'set/ImageSets/Segmentation/val.txt').write_text('sub/a\n')
    settings.override(['STRIDE=16', 'NUM_WORKERS=0'])
    submit.submit(heads.build_network())
    with tarfile.open('results.tgz') as archive:
        assert archive.getnames() == [submit.mask_path('sub/a')]


SPOILT = {
    'gone': (os.remove, 'cannot be read (FileNotFoundError)'),
    'truncated': (lambda path: os.truncate(path, 60), 'cannot be read'),
    'small': (lambda path: save_label(np.zeros((9, 7), np.uint8), path,
                                      voc_palette()), 'has 7 x 9 pixels'),
    'grey': (lambda path: Image.new('L', (9, 9)).save(path),
             'does not have the VOC palette'),
    'class': (lambda path: save_label(
        np.full(image_size(path), 6, np.uint8), path, voc_palette()),
        'has the class 6')}


@pytest.mark.parametrize('spoil, message', SPOILT.values(), ids=SPOILT)
def test_an_archive_stays_where_a_new_one_would_not_be_whole(
        bad, monkeypatch, spoil, message):
    with open('results.tgz', 'w') as file:
        file.write('old')

    def save_and_spoil(label, path, colours):
        save_label(label, path, colours)
        if path.endswith(f'{bad.ids[1]}.png'):
            spoil(path)
    monkeypatch.setattr(submit, 'save_label', save_and_spoil)
    bad(texts=(f'{bad.ids[1]}.png {message}', 'was not written'))
    with open('results.tgz') as file:
        assert file.read() == 'old'
    assert not os.path.exists('results.tgz.tmp')


@pytest.mark.parametrize('words, message', (
    (['gone.pth'], 'gone.pth is not there'), ([], 'final.pth is not there'),
    (['N_CLASS=1'], 'the nearest is N_CLASSES')))
def test_bad_words_are_refused(small, monkeypatch, capsys, words, message):
    status, line = refused(submit.main, *words, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and message in line
