"""Are the official archives of COCO, Cityscapes, PASCAL Context and COCO-Stuff
read right?

    python -m pytest tests/test_converters.py

The tests write small archives of the exact official structure and compare
every mask, pixel by pixel, with what they drew. Nothing is downloaded.
"""
import io
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
import utils
from conftest import refused
from conversion import (
    SIZE,
    boxes,
    check,
    encode,
    encode_mat,
    expect,
    polygon,
    rle,
    smooth_image,
    split_ids,
    write_tar,
    write_zip,
)
from converters import (
    archives,
    cityscapes,
    cocostuff,
    context,
    layout,
    polygons,
)
from lib import images


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The one line with which prepare.py refuses words, exit status 2."""
    def run(*words):
        status, line = refused(lambda: prepare.main([*words]),
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2
        return line
    return run


# ------------------------------------------------- COCO
@pytest.fixture
def coco(tmp_path, monkeypatch):
    """COCO's three archives: polygons, RLEs, crowds; what they show."""
    pytest.importorskip('pycocotools')
    ring = boxes((1, 2, 38, 10, 55), (0, 15, 25, 30, 40)) > 0
    notes = {       # category 5: class 1; 18: class 12; 1: 15; 50: no class
        1: [(5, 0, polygon(0, 30, 0, 40)), (18, 0, polygon(10, 40, 20, 60))],
        2: [(1, 0, rle(ring, compressed=True)),
            (50, 0, polygon(0, 40, 0, 60))],
        3: [(1, 1, rle(boxes((1, 0, 40, 0, 60)) > 0, compressed=False)),
            (18, 0, [*polygon(0, 40, 0, 20), *polygon(0, 40, 30, 45),
                     [1, 1, 9, 9]])],
        4: [(5, 0, polygon(0, 25, 0, 40))],         # 1,000 pixels: too few
        5: [(50, 0, polygon(0, 40, 0, 60))], 6: []}
    masks = {1: boxes((12, 10, 40, 20, 60), (1, 0, 30, 0, 40)),
             2: np.where(ring, 15, 0),
             3: boxes((255, 0, 40, 0, 60), (12, 0, 40, 0, 20),
                      (12, 0, 40, 30, 45))}
    annotations = {}
    for split, numbers in (('train', (1, 2, 4, 5, 6)), ('val', (3,))):
        write_zip(tmp_path / f'{split}2017.zip', {
            f'{split}2017/': b'', **{
                f'{split}2017/{i:012}.jpg': smooth_image(i)
                for i in numbers}})
        annotations[f'annotations/instances_{split}2017.json'] = json.dumps({
            'images': [{'id': i, 'file_name': f'{i:012}.jpg', 'height': 40,
                        'width': 60} for i in numbers],
            'annotations': [{'image_id': i, 'category_id': c, 'iscrowd': crowd,
                             'segmentation': where}
                            for i in numbers for c, crowd, where in notes[i]],
            'categories': [{'id': 1, 'name': 'person'}]})
        annotations[f'annotations/captions_{split}2017.json'] = '{}'
    write_zip(tmp_path / 'annotations_trainval2017.zip', annotations)
    words = expect('coco', tmp_path, monkeypatch, train=5, val=1)
    return words, {f'{i:012}': mask for i, mask in masks.items()}


def test_coco(coco, tmp_path, capsys):
    words, masks = coco
    prepare.main(words)
    check(tmp_path / 'made', masks, 'voc')
    assert split_ids(tmp_path / 'made', 'train') == sorted(masks)[:2]
    assert split_ids(tmp_path / 'made', 'val') == sorted(masks)[2:]
    path = layout.image_path(tmp_path / 'made', f'{1:012}')
    assert Path(path).read_bytes() == smooth_image(1)
    os.remove(path)
    prepare.main(words)                                 # resumed
    assert Path(path).read_bytes() == smooth_image(1)
    capsys.readouterr()
    prepare.main(words)
    assert 'is ready' in capsys.readouterr().out


@pytest.mark.parametrize('broken', ('train2017.zip',
                                    'annotations_trainval2017.zip'))
def test_a_truncated_zip_is_refused(coco, tmp_path, refusal, broken):
    os.truncate(tmp_path / broken, 400)
    assert f'{broken} is truncated' in refusal(*coco[0])


def test_a_damaged_member_is_refused(coco, tmp_path, refusal):
    """A zip's own checksum tells."""
    path = tmp_path / 'train2017.zip'
    data = bytearray(path.read_bytes())
    data[data.index(smooth_image(2)[200:230])] ^= 1
    path.write_bytes(data)
    assert f'{path} is truncated or damaged' in refusal(*coco[0])


def test_too_few_images_are_no_official_archive(coco, tmp_path, monkeypatch):
    expect('coco', tmp_path, monkeypatch, train=118_287, val=1)
    with pytest.raises(utils.UserError, match=(
            'train has 5 images, not 118,287: annotations_trainval2017.zip, '
            'tr')):
        prepare.main(coco[0])
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('text, part', (
    ('{"images": 3', 'is truncated or damaged'),
    ('{"images": [{"id": 3, "height": 4, "width": 6}], "annotations": []}',
     "'file_name' is not"),
    ('{"images": [], "info": 3}', "'annotations' is not there (it has 'imag"),
    ('[{"images": []}]', 'it holds a list, not an object with images and'),
    (None, 'has no instances_train2017.json')))
def test_wrong_json_is_refused(coco, tmp_path, refusal, text, part):
    write_zip(tmp_path / 'annotations_trainval2017.zip', {
        f'annotations/instances_{split}2017.json': text
        for split in ('train', 'val')} if text else {'README': ''})
    assert part in refusal(*coco[0])


def test_annotations_without_outlines_are_refused(coco, tmp_path, refusal):
    """Of VOC's classes; those of others do not count."""
    write_zip(tmp_path / 'annotations_trainval2017.zip', {
        f'annotations/instances_{split}2017.json': json.dumps({
            'images': [{'id': i, 'file_name': f'{i:012}.jpg', 'height': 40,
                        'width': 60} for i in (1, 2)],
            'annotations': [{'image_id': 1, 'category_id': c,
                             'bbox': [0, 0, 40, 30], **where}
                            for c, where in (
                                (5, {}), (1, {'segmentation': []}),
                                (50, {'segmentation': polygon(0, 9, 0, 9)}))]})
        for split in ('train', 'val')})
    line = refusal(*coco[0])
    assert '2 of 2 annotations in annotations/instances_train2017' in line
    assert 'have a box and no outline' in line


def test_a_wrong_segmentation_is_refused():
    pytest.importorskip('pycocotools')
    with pytest.raises(utils.UserError,
                       match=r'\[5, 6\], its image of \[40, 60\]'):
        polygons.decode_segmentation({'size': [5, 6], 'counts': [30]}, SIZE)
    with pytest.raises(utils.UserError, match='an x without a y'):
        polygons.decode_segmentation([[1, 2, 3, 4, 5, 6, 7]], SIZE)


def test_an_rle_that_ends_too_early_is_refused(monkeypatch):
    """pycocotools leaves the rest as the memory was."""
    mask = pytest.importorskip('pycocotools.mask')
    compressed = rle(boxes((1, 0, 9, 0, 9)) > 0, compressed=True)
    for found, rest in ((compressed, np.ones), ({'size': SIZE, 'counts': [30]},
                                                np.zeros)):
        monkeypatch.setattr(mask, 'decode', lambda _, x=rest: x(SIZE, 'u1'))
        with pytest.raises(utils.UserError, match='neither polygons nor an R'):
            polygons.decode_segmentation(found, SIZE)


def test_pycocotools_is_asked_for(coco, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools.mask', None)
    with pytest.raises(utils.UserError, match='pip install pycocotools'):
        prepare.main(coco[0])


# ------------------------------------------------- Cityscapes
def test_cityscapes(tmp_path, monkeypatch):
    official = dict(zip(cityscapes.IDS, range(19), strict=True))
    random = np.random.default_rng(0)
    members, labels, masks, splits = {}, {}, {}, {}
    for split, city, number in (('train', 'aachen', 19), ('train', 'ulm', 3),
                                ('val', 'lindau', 0), ('test', 'bonn', 7)):
        name = f'{city}_{number:06}_000019'
        raw = random.integers(0, 34, SIZE, np.uint8)
        if split == 'test':
            raw = raw % 4
        members[f'leftImg8bit/{split}/{city}/{name}_leftImg8bit.png'] = \
            smooth_image(number, 'PNG')
        folder = f'gtFine/{split}/{city}/{name}_gtFine_'
        labels[f'{folder}labelIds.png'] = encode(raw, 'PNG')
        labels[f'{folder}instanceIds.png'] = b'no image'
        labels[f'{folder}color.png'] = b'no image'
        masks[name] = np.vectorize(lambda x: official.get(x, 255))(raw)
        splits.setdefault(split, []).append(name)
    write_zip(tmp_path / 'leftImg8bit_trainvaltest.zip', members)
    write_zip(tmp_path / 'gtFine_trainvaltest.zip', labels)
    prepare.main(expect('cityscapes', tmp_path, monkeypatch, train=2, val=1,
                        test=1))
    root = tmp_path / 'made'
    check(root, masks, 'cityscapes')
    for split, names in splits.items():
        assert split_ids(root, split) == names
    found = images.read_image(layout.image_path(root, 'aachen_000019_000019'))
    drawn = np.array(Image.open(io.BytesIO(smooth_image(19, 'PNG'))))
    assert np.abs(found.astype(int) - drawn).max() < 12     # JPEG, 4:4:4
    assert (masks['bonn_000007_000019'] == 255).all()


def with_side(data, side):
    """Return a PNG whose header states another width and height."""
    head = b'IHDR' + struct.pack('>II', side, side) + data[24:29]
    return data[:12] + head + struct.pack('>I', zlib.crc32(head)) + data[33:]


@pytest.mark.parametrize('data', (
    b'no image', smooth_image(0, 'PNG')[:200], b'\x89PNG\r\n\x1a\n' + bytes(9),
    with_side(smooth_image(0, 'PNG'), 40_000)))
def test_images_of_an_archive_that_cannot_be_read_are_named(tmp_path, data):
    path = tmp_path / 'a.zip'
    write_zip(path, {'a.png': data})
    for write, *rest in ((cityscapes.write_image,),
                         (archives.write_label, (0, 7), [[0, 0, 0]])):
        with pytest.raises(utils.UserError, match=f'^{path}: a.png cannot'):
            write(tmp_path / 'b', str(path), 'a.png', *rest)
    assert not (tmp_path / 'b').exists()


def test_cityscapes_says_what_to_get(tmp_path, refusal):
    line = refusal('cityscapes', '--to', str(tmp_path / 'd/city'))
    assert f'{tmp_path}/d/downloads/leftImg8bit_trainvaltest.zip' in line
    assert 'https://www.cityscapes-dataset.com/downloads/' in line
    assert not (tmp_path / 'd').exists()


def test_classes_of_cityscapes():
    names, colours = images.read_class_file(images.class_file('cityscapes'))
    assert len(names) == 19 and names[13] == 'car'
    assert colours[0] == [128, 64, 128] and colours[18] == [119, 11, 32]


# ------------------------------------------------- PASCAL Context
@pytest.mark.parametrize('key', ('segmentation', 'RLE'))
def test_context(tmp_path, monkeypatch, key):
    pytest.importorskip('pycocotools')
    names = ['2008_000002', '2008_000003', '2010_000001']
    masks = {       # ids 2: class 1; 458: 59; 284: 37; 7 is none of the 59
        names[0]: [(2, boxes((1, 0, 20, 0, 60))),
                   (458, boxes((1, 20, 40, 0, 30)))],
        names[1]: [(0, boxes((1, 0, 40, 0, 60)))],
        names[2]: [(284, boxes((1, 3, 9, 5, 11))), (7, boxes((1, 0, 2, 0, 2)))]
    }
    drawn = {names[0]: boxes((1, 0, 20, 0, 60), (59, 20, 40, 0, 30)),
             names[1]: boxes(), names[2]: boxes((37, 3, 9, 5, 11))}
    write_tar(tmp_path / 'VOCtrainval_03-May-2010.tar', {
        f'VOCdevkit/VOC2010/JPEGImages/{name}.jpg': smooth_image(i)
        for i, name in enumerate([*names, '2007_000001'])})
    (tmp_path / 'trainval_merged.json').write_text(json.dumps({
        'images': [{'image_id': i, 'phase': ('train', 'val')[i == 1],
                    'height': 40, 'width': 60, 'file_name': f'{name}.jpg'}
                   for i, name in enumerate(names)],
        'annos_segmentation': [
            {'image_id': names.index(name), 'category_id': c,
             key: rle(mask > 0, compressed=True)}
            for name, parts in masks.items() for c, mask in parts]}))
    words = expect('context', tmp_path, monkeypatch, train=2, val=1)
    prepare.main(words)
    check(tmp_path / 'made', drawn, 'context')
    assert split_ids(tmp_path / 'made', 'val') == [names[1]]
    assert sorted(os.listdir(tmp_path / 'made' / 'JPEGImages')) == [
        f'{name}.jpg' for name in names]
    text = (tmp_path / 'trainval_merged.json').read_text()
    (tmp_path / 'trainval_merged.json').write_text(
        text.replace(names[1], '../../evil'))
    words[-1] = str(tmp_path / 'again')
    with pytest.raises(utils.UserError, match="has the ID '../../evil'"):
        prepare.main(words)
    (tmp_path / 'trainval_merged.json').write_text('{"images": []}')
    with pytest.raises(utils.UserError,
                       match="is not the JSON of Context: 'annos"):
        prepare.main(words)


def test_ids_of_context():
    """The 60 classes are the ids in the alphabet's order."""
    names, _ = images.read_class_file(images.class_file('context'))
    assert len(names) == 60 and names[1:] == sorted(names[1:])
    table = dict(zip(context.IDS, names, strict=True))
    assert (table[2], table[284], table[424]) == ('aeroplane', 'person',
                                                  'truck')


# ------------------------------------------------- COCO-Stuff
@pytest.mark.parametrize('folder', ('', 'cocostuff-10k-v1.1/'))
def test_cocostuff(tmp_path, monkeypatch, folder):
    random = np.random.default_rng(0)
    names = [f'COCO_train2014_{i:012}' for i in (77, 8, 9)]
    members, masks = {f'{folder}README.md': b'', f'{folder}images/': b''}, {}
    for name in [*names, f'COCO_train2014_{5:012}']:
        raw = random.choice([0, *cocostuff.IDS], SIZE).astype(np.uint16)
        members[f'{folder}annotations/{name}.mat'] = encode_mat(
            S=raw, names=np.zeros(3), captions='a')
        members[f'{folder}images/{name}.jpg'] = smooth_image(3)
        if name in names:
            masks[name] = np.vectorize(
                lambda x: cocostuff.IDS.index(x) if x else 255)(raw)
    members[f'{folder}imageLists/train.txt'] = '\n'.join(names[:2]) + '\n'
    members[f'{folder}imageLists/test.txt'] = names[2]
    write_zip(tmp_path / 'cocostuff-10k-v1.1.zip', members)
    words = expect('cocostuff', tmp_path, monkeypatch, train=2, test=1)
    prepare.main(words)
    check(tmp_path / 'made', masks, 'cocostuff')
    assert split_ids(tmp_path / 'made', 'train') == sorted(names[:2])
    for text, part in ((b'\xe9', 'is neither UTF-8'),
                       (b'../../evil', "has the ID '../../evil'")):
        write_zip(tmp_path / 'cocostuff-10k-v1.1.zip', {
            **members, f'{folder}imageLists/test.txt': text})
        with pytest.raises(utils.UserError, match=f'test.txt {part}'):
            prepare.main([*words[:-1], str(tmp_path / 'again')])


@pytest.mark.parametrize('data, part', (
    (b'x' * 200, '.mat: no .mat file that can be read'),
    (None, '.mat: the .mat file has no field S, but T, captions')))
def test_a_wrong_mat_is_refused(tmp_path, data, part):
    data = data or encode_mat(T=np.zeros((2, 2)), captions='a')
    write_zip(tmp_path / 'a.zip', {'1.mat': data})
    with pytest.raises(utils.UserError, match=re.escape(part)) as error:
        cocostuff.write_label(tmp_path / 'b.png', str(tmp_path / 'a.zip'),
                              '1.mat', [])
    assert f'{tmp_path}/a.zip: 1.mat: ' in str(error.value)


def test_ids_of_cocostuff():
    names, colours = images.read_class_file(images.class_file('cocostuff'))
    assert len(names) == 171
    assert len({tuple(colour) for colour in colours}) == 171
    table = dict(zip(cocostuff.IDS, names, strict=True))
    assert (table[1], table[90], table[92], table[182]) == (
        'person', 'toothbrush', 'banner', 'wood')
