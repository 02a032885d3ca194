"""The archives for the test servers of VOC and Cityscapes, and what keeps them
from being written.

    python -m pytest tests/test_submit.py
"""
import os
import shutil
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import eval
import heads
import settings
from conftest import refused, run_tool
from converters import layout
from lib import images
from lib.images import image_size, read_image, save_label, voc_palette
from tools import submit


def write_unlabelled(root, sizes):
    """Write a data set whose split `test` has images {id: (W, H)} of smooth
    colours, and no labels."""
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    (lists / 'test.txt').write_text('\n'.join(sizes))
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        path = root / 'JPEGImages' / f'{name}.jpg'
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize(
            size).save(path)


def save_network(path, net):
    torch.save({'net': net.state_dict(), 'step': 1}, path)


# ------------------------------------------------- the archive
def test_the_test_servers_archive(small, tmp_path, monkeypatch):
    """Of a split without labels: names, sizes, palette, classes."""
    settings.N_CLASSES = 21
    root, ids = tmp_path / 'unlabelled', ['2008_000001', '2008_000002',
                                          '2008_000003']
    write_unlabelled(root, {name: (161, 90 + i) for i, name in enumerate(ids)})
    torch.manual_seed(0)
    net = heads.build_network()
    with torch.no_grad():               # so that several classes are there
        net.fc2.bias -= net.eval()(torch.randn(1, 3, 97, 161)).mean((0, 2, 3))
    save_network('a.pth', net)
    os.makedirs(submit.VOC.folder)
    with open(submit.mask_path('other', submit.VOC), 'w'):
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


@pytest.mark.long
def test_several_processes_make_one_archive(small, tmp_path):
    """The first, which packs, has done its share long before the second."""
    write_unlabelled(tmp_path / 'set', {'little': (33, 33),
                                        'large': (1200, 1200)})
    settings.N_CLASSES = 21
    save_network('a.pth', heads.build_network())
    done = run_tool('submit', 'a.pth', 'DATA_ROOT=set', 'VAL_SPLIT=test',
                    'STRIDE=16', 'NUM_WORKERS=0', 'DEVICES=-1,-1', cwd='.')
    assert done.returncode == 0, done.stderr
    assert 'processes: 2' in done.stdout
    with tarfile.open('results.tgz') as archive:
        assert len(archive.getnames()) == 2


# ------------------------------------------------- Cityscapes
CITY = 'berlin_000000_000019', 'bielefeld_000000_000321'
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31,
             32, 33]                            # road to bicycle


@pytest.fixture
def city(small, tmp_path):
    """A split `test` of two images with Cityscapes' names and classes, and
    a.pth; the first in a folder of its city, the second of full size."""
    root, ids = tmp_path / 'city', [f'berlin/{CITY[0]}', CITY[1]]
    write_unlabelled(root, dict(zip(ids, ((70, 40), (2048, 1024)))))
    shutil.copy(images.class_file('cityscapes'), root / 'classes.txt')
    vars(settings).update(DATA_ROOT=str(root), N_CLASSES=19)
    save_network('a.pth', heads.build_network())
    return root


def test_cityscapes_archive(city, monkeypatch, capsys):
    """Of grey label ids at full size, by names that the official evaluation
    looks for: city_sequence_frame*.png in any folder."""
    def predictions(net, data):         # each class in turn, padded
        for name, size in zip(data.ids, data.image_sizes(), strict=True):
            pred = np.indices((size[0] + 9, size[1] + 3)).sum(0) % 19
            yield torch.from_numpy(np.uint8(pred))[None], None, [name]
    monkeypatch.setattr(eval, 'predictions', predictions)
    monkeypatch.setattr(sys, 'argv', ['submit.py', 'a.pth', 'VAL_SPLIT=test'])
    submit.main()
    printed = capsys.readouterr().out
    assert ('warning: 1 image of another size than the Cityscapes server '
            'expects, 2048 x 1024, such as berlin/berlin_000000_000019, 70 x '
            '40') in printed
    assert 'in results/Cityscapes, and in results.zip for the City' in printed
    with zipfile.ZipFile('results.zip') as archive:
        assert archive.namelist() == [f'berlin/{CITY[0]}_pred_labelIds.png',
                                      f'{CITY[1]}_pred_labelIds.png']
        for name, size in zip(archive.namelist(), ((70, 40), (2048, 1024))):
            with Image.open(archive.open(name)) as mask:
                assert (mask.format, mask.mode, mask.size) == ('PNG', 'L',
                                                               size)
                found = np.array(mask)
            assert found[0, :19].tolist() == LABEL_IDS
            assert found[-1, 0] == LABEL_IDS[(size[1] - 1) % 19]
    assert not os.path.exists('results.tgz')


def test_cityscapes_from_a_network(city, monkeypatch):
    """By the names in the checkpoint, where DATA_ROOT has none."""
    os.remove(city / 'classes.txt')
    names, colours = images.read_class_file(images.class_file('cityscapes'))
    net = heads.build_network()
    (city / 'ImageSets/Segmentation/test.txt').write_text(
        f'berlin/{CITY[0]}\n')
    torch.save({'net': net.state_dict(), 'step': 1, 'classes': names,
                'colours': colours, 'settings': settings.as_dict()}, 'b.pth')
    monkeypatch.setattr(sys, 'argv', ['submit.py', 'b.pth', 'VAL_SPLIT=test',
                                      'INFERENCE=plain'])
    submit.main()
    image = read_image(city / f'JPEGImages/berlin/{CITY[0]}.jpg')
    x = dataset.normalise(torch.from_numpy(image).permute(2, 0, 1)[None],
                          'cpu')
    pred = eval.predict_classes(net.eval(), x)[0].numpy()
    with zipfile.ZipFile('results.zip') as archive, Image.open(
            archive.open(f'berlin/{CITY[0]}_pred_labelIds.png')) as mask:
        found = np.array(mask)
    assert np.array_equal(layout.remap_ids(found, LABEL_IDS), pred)


def test_names_that_cityscapes_does_not_know_are_refused(city, monkeypatch,
                                                         capsys):
    (city / 'ImageSets/Segmentation/test.txt').write_text('photo_1\n')
    Image.new('RGB', (9, 9)).save(city / 'JPEGImages/photo_1.jpg')
    status, line = refused(submit.main, 'a.pth', 'VAL_SPLIT=test',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and "test.txt has the ID 'photo_1', which the" in line
    assert not os.path.exists('results')


def test_masks_of_cityscapes_are_read_again(tmp_path):
    """Values that are no label id, and a palette, are faults."""
    path, size = str(tmp_path / 'a.png'), (9, 7)
    submit.save_mask(np.full(size, 13), path, submit.CITYSCAPES)
    assert submit.find_fault(path, size, submit.CITYSCAPES) == ''
    assert submit.find_fault(path, size, submit.VOC).startswith('does not ha')
    images.save_image(np.full(size, 13, np.uint8), path)    # fence
    assert submit.find_fault(path, size, submit.CITYSCAPES) == ''
    images.save_image(np.full(size, 14, np.uint8), path)    # guard rail
    assert submit.find_fault(path, size, submit.CITYSCAPES) == (
        'has the value 14, no class of Cityscapes')
    submit.save_mask(np.full(size, 13), path, submit.VOC)
    assert submit.find_fault(path, size, submit.CITYSCAPES) == (
        'is not grey, of 8 bits')


@pytest.mark.parametrize('n', (6, 19))
def test_classes_of_no_test_server_are_refused(small, toy, tmp_path,
                                               monkeypatch, capsys, n):
    """The toy set's, and 19 without names."""
    settings.N_CLASSES, settings.DATA_ROOT = n, str(tmp_path / 'set')
    shutil.copytree(toy, settings.DATA_ROOT)
    if n == 19:
        os.remove(tmp_path / 'set/classes.txt')
    save_network('a.pth', heads.build_network())
    status, line = refused(submit.main, 'a.pth', 'STRIDE=16',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2
    shown = 'background, disc, square' if n == 6 else '0, 1, 2'
    assert f'set has {n} classes ({shown}, ...), not those of a test' in line
    assert not os.path.exists('results')


# ------------------------------------------------- bad input
@pytest.fixture
def bad(small, tmp_path, monkeypatch, capsys):
    """A copy of the toy set without labels and class names, and a.pth, of 21
    classes; the fixture runs the tool, which must end in one line with exit
    status 2 that holds texts."""
    root = tmp_path / 'set'
    shutil.copytree(settings.DATA_ROOT, root)
    shutil.rmtree(root / 'SegmentationClassAug')
    os.remove(root / 'classes.txt')
    settings.DATA_ROOT, settings.N_CLASSES = str(root), 21
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
    data = dataset.Segmentation('val', False, labelled=False)
    submit.submit(heads.build_network(), data, submit.VOC)
    with tarfile.open('results.tgz') as archive:
        assert archive.getnames() == [submit.mask_path('sub/a', submit.VOC)]


SPOILT = {
    'gone': (os.remove, 'cannot be read (FileNotFoundError)'),
    'truncated': (lambda path: os.truncate(path, 60), 'cannot be read'),
    'small': (lambda path: save_label(np.zeros((9, 7), np.uint8), path,
                                      voc_palette()), 'has 7 x 9 pixels'),
    'grey': (lambda path: Image.new('L', (9, 9)).save(path),
             'does not have the VOC palette'),
    'class': (lambda path: save_label(
        np.full(image_size(path), 21, np.uint8), path, voc_palette()),
        'has the value 21')}


@pytest.mark.parametrize('spoil, message', SPOILT.values(), ids=SPOILT)
def test_an_archive_stays_where_a_new_one_would_not_be_whole(
        bad, monkeypatch, spoil, message):
    with open('results.tgz', 'w') as file:
        file.write('old')

    def save_and_spoil(label, path, colours):
        save_label(label, path, colours)
        if path.endswith(f'{bad.ids[1]}.png'):
            spoil(path)
    monkeypatch.setattr(images, 'save_label', save_and_spoil)
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
