"""Does prepare.py read the official archives, and one's own masks, truly?

    python -m pytest tests/test_converters.py

The tests write small archives of the exact official structure and compare
every mask, pixel by pixel, with what they drew. Nothing is downloaded.
"""
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import Image

import dataset
import prepare
import settings
import utils

SIZE = (40, 60)                 # of the pictures, (H, W)


def picture(seed=0, size=SIZE, kind='JPEG', **words):
    """The bytes of a smooth picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1])
    buffer = io.BytesIO()
    image.save(buffer, kind, **words)
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, 'PNG')
    return buffer.getvalue()


def boxes(*parts, size=SIZE):
    """A mask of boxes (value, top, bottom, left, right), one on another."""
    mask = np.zeros(size, np.uint8)
    for value, top, bottom, left, right in parts:
        mask[top:bottom, left:right] = value
    return mask


def polygon(top, bottom, left, right):
    """COCO's polygons of a box."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def rle(mask, packed):
    """COCO's RLE of a mask (H, W) bool, packed or as a list of counts."""
    from pycocotools import mask as coco
    if packed:
        found = coco.encode(np.asfortranarray(mask, np.uint8))
        return {**found, 'counts': found['counts'].decode()}
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {'counts': [0, *counts] if flat[0] else counts,
            'size': list(mask.shape)}


def write_zip(path, members):
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tar(path, members):
    with tarfile.open(path, 'w') as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def expect(name, folder, monkeypatch, **counts):
    """Have prepare expect so many images, and archives of no known hash."""
    table = prepare.SOURCES[name]
    monkeypatch.setitem(prepare.SOURCES, name, {
        **table, 'counts': counts, 'unpacked': 10 ** 6,
        'archives': tuple((url, '', size) for url, _, size
                          in table['archives'])})
    return ['--from', str(folder), '--to', str(folder / 'made')]


def label(root, name):
    with Image.open(prepare.label_path(root, name)) as image:
        assert image.mode == 'P'
        return np.array(image)


def ids(root, split):
    return Path(root, prepare.LISTS, f'{split}.txt').read_text().split()


def check(root, masks, colours):
    """Compare all labels of root with masks {ID: (H, W)}, and its palette
    and class file with the data set's."""
    assert sorted(masks) == sorted(os.path.splitext(name)[0] for name
                                   in os.listdir(Path(root, dataset.LABELS)))
    for name, mask in masks.items():
        np.testing.assert_array_equal(label(root, name), mask, name)
    assert Image.open(prepare.label_path(root, name)).getpalette() == \
        prepare.palette(colours).ravel().tolist()
    assert Path(root, 'classes.txt').read_bytes() == \
        Path(prepare.class_file(colours)).read_bytes()


# ------------------------------------------------- COCO
@pytest.fixture
def coco(tmp_path, monkeypatch):
    """COCO's three archives: polygons, RLEs, crowds; what they show."""
    pytest.importorskip('pycocotools')
    ring = boxes((1, 2, 38, 10, 55), (0, 15, 25, 30, 40)) > 0
    notes = {       # category 5: class 1; 18: class 12; 1: 15; 50: no class
        1: [(5, 0, polygon(0, 30, 0, 40)), (18, 0, polygon(10, 40, 20, 60))],
        2: [(1, 0, rle(ring, packed=True)), (50, 0, polygon(0, 40, 0, 60))],
        3: [(1, 1, rle(boxes((1, 0, 40, 0, 60)) > 0, packed=False)),
            (18, 0, [*polygon(0, 40, 0, 20), *polygon(0, 40, 30, 45),
                     [1, 1, 9, 9]])],
        4: [(5, 0, polygon(0, 25, 0, 40))],         # 1,000 pixels: too few
        5: [(50, 0, polygon(0, 40, 0, 60))], 6: []}
    masks = {1: boxes((12, 10, 40, 20, 60), (1, 0, 30, 0, 40)),
             2: np.where(ring, 15, 0),
             3: boxes((255, 0, 40, 0, 60), (12, 0, 40, 0, 20),
                      (12, 0, 40, 30, 45))}
    stuff = {}
    for split, numbers in (('train', (1, 2, 4, 5, 6)), ('val', (3,))):
        write_zip(tmp_path / f'{split}2017.zip', {
            f'{split}2017/': b'', **{f'{split}2017/{i:012}.jpg': picture(i)
                                     for i in numbers}})
        stuff[f'annotations/instances_{split}2017.json'] = json.dumps({
            'images': [{'id': i, 'file_name': f'{i:012}.jpg', 'height': 40,
                        'width': 60} for i in numbers],
            'annotations': [{'image_id': i, 'category_id': c, 'iscrowd': crowd,
                             'segmentation': where}
                            for i in numbers for c, crowd, where in notes[i]],
            'categories': [{'id': 1, 'name': 'person'}]})
        stuff[f'annotations/captions_{split}2017.json'] = '{}'
    write_zip(tmp_path / 'annotations_trainval2017.zip', stuff)
    words = expect('coco', tmp_path, monkeypatch, train=5, val=1)
    return ['coco', *words], {f'{i:012}': mask for i, mask in masks.items()}


def test_coco(coco, tmp_path, capsys):
    words, masks = coco
    prepare.main(words)
    check(tmp_path / 'made', masks, 'voc')
    assert ids(tmp_path / 'made', 'train') == sorted(masks)[:2]
    assert ids(tmp_path / 'made', 'val') == sorted(masks)[2:]
    path = prepare.image_path(tmp_path / 'made', f'{1:012}')
    assert Path(path).read_bytes() == picture(1)
    os.remove(path)
    prepare.main(words)                                 # goes on
    assert Path(path).read_bytes() == picture(1)
    capsys.readouterr()
    prepare.main(words)
    assert 'is ready' in capsys.readouterr().out


@pytest.mark.parametrize('broken, told', (
    ('train2017.zip', 'train2017.zip is truncated'),
    ('annotations_trainval2017.zip', 'annotations_trainval2017.zip is trunc')))
def test_a_truncated_zip_is_refused(coco, tmp_path, monkeypatch, capsys,
                                    broken, told):
    os.truncate(tmp_path / broken, 400)
    status, line = refused(lambda: prepare.main(coco[0]),
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and told in line


def test_a_damaged_member_is_refused(coco, tmp_path, monkeypatch, capsys):
    """A zip's own check sum tells."""
    path = tmp_path / 'train2017.zip'
    data = bytearray(path.read_bytes())
    place = data.index(picture(2)[200:230])
    data[place] ^= 1
    path.write_bytes(data)
    status, line = refused(lambda: prepare.main(coco[0]),
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and f'{path} is truncated or damaged' in line


def test_too_few_pictures_are_no_official_archive(coco, tmp_path, monkeypatch):
    expect('coco', tmp_path, monkeypatch, train=118_287, val=1)
    with pytest.raises(ValueError, match='train has 5 images, not 118287: '
                                         'annotations_trainval2017.zip, tr'):
        prepare.main(coco[0])
    assert not (tmp_path / 'made').exists()


def test_json_that_is_none(coco, tmp_path, monkeypatch, capsys):
    for text, told in (('{"images": 3', 'is truncated or damaged'),
                       ('{"images": [{"id": 3}]}', "'file_name' is not")):
        write_zip(tmp_path / 'annotations_trainval2017.zip', {
            f'annotations/instances_{split}2017.json': text
            for split in ('train', 'val')})
        status, line = refused(lambda: prepare.main(coco[0]),
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and told in line
    write_zip(tmp_path / 'annotations_trainval2017.zip', {'README': ''})
    with pytest.raises(ValueError, match='has no instances_train2017.json'):
        prepare.main(coco[0])


def test_a_wrong_rle_is_refused():
    pytest.importorskip('pycocotools')
    with pytest.raises(ValueError, match=r'\[5, 6\], its image of \[40, 60\]'):
        prepare.decode({'size': [5, 6], 'counts': [30]}, SIZE)
    with pytest.raises(ValueError, match='an x without a y'):
        prepare.decode([[1, 2, 3, 4, 5, 6, 7]], SIZE)


# ------------------------------------------------- Cityscapes
def test_cityscapes(tmp_path, monkeypatch):
    official = dict(zip(prepare.CITY_IDS, range(19)))
    random = np.random.default_rng(0)
    pictures, labels, masks, splits = {}, {}, {}, {}
    for split, city, number in (('train', 'aachen', 19), ('train', 'ulm', 3),
                                ('val', 'lindau', 0), ('test', 'bonn', 7)):
        name = f'{city}_{number:06}_000019'
        raw = random.integers(0, 34, SIZE, np.uint8)
        if split == 'test':
            raw = raw % 4
        pictures[f'leftImg8bit/{split}/{city}/{name}_leftImg8bit.png'] = \
            picture(number, kind='PNG')
        folder = f'gtFine/{split}/{city}/{name}_gtFine_'
        labels[f'{folder}labelIds.png'] = png(raw)
        labels[f'{folder}instanceIds.png'] = b'no picture'
        labels[f'{folder}color.png'] = b'no picture'
        masks[name] = np.vectorize(lambda x: official.get(x, 255))(raw)
        splits.setdefault(split, []).append(name)
    write_zip(tmp_path / 'leftImg8bit_trainvaltest.zip', pictures)
    write_zip(tmp_path / 'gtFine_trainvaltest.zip', labels)
    words = expect('cityscapes', tmp_path, monkeypatch, train=2, val=1, test=1)
    prepare.main(['cityscapes', *words])
    check(tmp_path / 'made', masks, 'cityscapes')
    for split, names in splits.items():
        assert ids(tmp_path / 'made', split) == names
    found = dataset.read_image(prepare.image_path(tmp_path / 'made',
                                                  'aachen_000019_000019'))
    drawn = np.array(Image.open(io.BytesIO(picture(19, kind='PNG'))))
    assert np.abs(found.astype(int) - drawn).max() < 12     # JPEG, 4:4:4
    assert (masks['bonn_000007_000019'] == 255).all()


def test_cityscapes_says_what_to_fetch(tmp_path, monkeypatch, capsys):
    status, line = refused(
        lambda: prepare.main(['cityscapes', '--to', str(tmp_path / 'd/city')]),
        monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2
    assert f'{tmp_path}/d/downloads/leftImg8bit_trainvaltest.zip' in line
    assert 'https://www.cityscapes-dataset.com/downloads/' in line
    assert not (tmp_path / 'd').exists()


# ------------------------------------------------- PASCAL Context
def test_context(tmp_path, monkeypatch):
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
    for key in 'segmentation', 'RLE':
        folder = tmp_path / key
        folder.mkdir()
        write_tar(folder / 'VOCtrainval_03-May-2010.tar', {
            f'VOCdevkit/VOC2010/JPEGImages/{name}.jpg': picture(i)
            for i, name in enumerate([*names, '2007_000001'])})
        (folder / 'trainval_merged.json').write_text(json.dumps({
            'images': [{'image_id': i, 'phase': ('train', 'val')[i == 1],
                        'height': 40, 'width': 60, 'file_name': f'{name}.jpg'}
                       for i, name in enumerate(names)],
            'annos_segmentation': [
                {'image_id': names.index(name), 'category_id': c,
                 key: rle(mask > 0, packed=True)}
                for name, parts in masks.items() for c, mask in parts]}))
        words = expect('context', folder, monkeypatch, train=2, val=1)
        prepare.main(['context', *words])
        check(folder / 'made', drawn, 'context')
        assert ids(folder / 'made', 'val') == [names[1]]
        assert sorted(os.listdir(folder / 'made' / 'JPEGImages')) == [
            f'{name}.jpg' for name in names]
    (folder / 'trainval_merged.json').write_text('{"images": []}')
    words[-1] = str(folder / 'again')
    with pytest.raises(ValueError, match="is not the JSON of Context: 'annos"):
        prepare.main(['context', *words])


def test_context_ids():
    """The 60 classes are the ids in the alphabet's order."""
    names, _ = utils.read_class_file(prepare.class_file('context'))
    assert len(names) == len(prepare.CONTEXT_IDS) == 60
    assert names[1:] == sorted(names[1:])
    table = dict(zip(prepare.CONTEXT_IDS, names))
    assert (table[2], table[284], table[424]) == ('aeroplane', 'person',
                                                  'truck')


# ------------------------------------------------- COCO-Stuff
@pytest.mark.parametrize('folder', ('', 'cocostuff-10k-v1.1/'))
def test_cocostuff(tmp_path, monkeypatch, folder):
    savemat = pytest.importorskip('scipy.io').savemat
    random = np.random.default_rng(0)
    names = [f'COCO_train2014_{i:012}' for i in (77, 8, 9)]
    members, masks = {f'{folder}README.md': b'', f'{folder}images/': b''}, {}
    for name in [*names, f'COCO_train2014_{5:012}']:
        raw = random.choice([0, *prepare.STUFF_IDS], SIZE).astype(np.uint16)
        buffer = io.BytesIO()
        savemat(buffer, {'S': raw, 'names': np.zeros(3), 'captions': 'a'})
        members[f'{folder}annotations/{name}.mat'] = buffer.getvalue()
        members[f'{folder}images/{name}.jpg'] = picture(3)
        if name in names:
            masks[name] = np.vectorize(lambda x: prepare.STUFF_IDS.index(x)
                                       if x else 255)(raw)
    members[f'{folder}imageLists/train.txt'] = '\n'.join(names[:2]) + '\n'
    members[f'{folder}imageLists/test.txt'] = names[2]
    write_zip(tmp_path / 'cocostuff-10k-v1.1.zip', members)
    words = expect('cocostuff', tmp_path, monkeypatch, train=2, test=1)
    prepare.main(['cocostuff', *words])
    check(tmp_path / 'made', masks, 'cocostuff')
    assert ids(tmp_path / 'made', 'train') == sorted(names[:2])


def test_stuff_ids():
    names, colours = utils.read_class_file(prepare.class_file('cocostuff'))
    assert len(names) == len(prepare.STUFF_IDS) == 171
    assert len({tuple(colour) for colour in colours}) == 171
    table = dict(zip(prepare.STUFF_IDS, names))
    assert (table[1], table[90], table[92], table[182]) == (
        'person', 'toothbrush', 'banner', 'wood')


def test_cityscapes_colours():
    names, colours = utils.read_class_file(prepare.class_file('cityscapes'))
    assert len(names) == 19 and names[13] == 'car'
    assert colours[0] == [128, 64, 128] and colours[18] == [119, 11, 32]


# ------------------------------------------------- one's own
@pytest.fixture
def own(tmp_path):
    """A folder of 6 pictures, with one for their masks."""
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'masks').mkdir()
    for i in range(6):
        (tmp_path / 'photos' / f'p {i}.jpg').write_bytes(picture(i))
    return tmp_path


def drawn(i, values=(0, 1, 2)):
    """The mask of picture i."""
    return np.array(values)[np.random.default_rng(i).integers(
        0, len(values), SIZE)].astype(np.uint8)


def prepared(folder, *words, masks='masks'):
    prepare.main(['masks', str(folder / 'photos'), str(folder / masks), '--to',
                  str(folder / 'made'), *words])
    return folder / 'made'


def told(folder, *words, monkeypatch, capsys, masks='masks'):
    status, line = refused(lambda: prepared(folder, *words, masks=masks),
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2
    stamp = Path(words[words.index('--to') + 1] if '--to' in words else
                 folder / 'made', 'prepared.json')
    assert not stamp.exists() or 'counts' not in stamp.read_text()
    return line


def save_masks(folder, values=(0, 1, 2), suffix='', mode='L'):
    for i in range(6):
        image = Image.fromarray(drawn(i, values))
        if mode == 'P':
            image.putpalette(utils.voc_palette().tobytes())
        image.save(folder / 'masks' / f'p {i}{suffix}.png')


@pytest.mark.parametrize('mode', ('L', 'P'))
def test_masks_of_numbers(own, mode, capsys):
    save_masks(own, (0, 1, 2, 255), mode=mode)
    root = prepared(own, '--val', '0.34')
    for i in range(6):
        np.testing.assert_array_equal(label(root, f'p {i}'),
                                      drawn(i, (0, 1, 2, 255)))
        assert Path(prepare.image_path(root, f'p {i}')).read_bytes() == \
            picture(i)
    assert 'N_CLASSES=3' in capsys.readouterr().out
    vars(settings).update(DATA_ROOT=str(root), N_CLASSES=3)
    train, val = (dataset.Segmentation(split, False)
                  for split in ('train', 'val'))
    assert (len(train), len(val)) == (4, 2)
    assert sorted(train.ids + val.ids) == [f'p {i}' for i in range(6)]


def test_masks_with_names_and_a_suffix(own):
    save_masks(own, suffix='_mask')
    names = own / 'names.txt'
    names.write_text('ground 9 8 7\nred roof 200 0 0\ntree 0 99 0\nsky 1 2 3')
    root = prepared(own, '--suffix', '_mask', '--classes', str(names))
    assert (root / 'classes.txt').read_text() == names.read_text() + '\n'
    assert Image.open(prepare.label_path(root, 'p 0')).getpalette()[3:6] == [
        200, 0, 0]


def coloured(own, table):
    for i in range(6):
        Image.fromarray(np.uint8(table)[drawn(i)]).save(
            own / 'masks' / f'p {i}.png')


def test_masks_of_colours(own, monkeypatch, capsys):
    table = [[10, 20, 30], [200, 0, 0], [1, 1, 1]]
    coloured(own, table)
    here = {'monkeypatch': monkeypatch, 'capsys': capsys}
    line = told(own, **here)
    assert '200 0 0' in line and '--classes' in line
    names = own / 'names.txt'
    names.write_text('void 1 1 1\nground 10 20 30\n')
    line = told(own, '--classes', str(names), **here)
    assert 'the colour 200 0 0 in' in line and 'p 0.png' in line
    names.write_text('void 1 1 1\nground 10 20 30\nroof 200 0 0\n')
    assert 'or remove this one' in told(own, '--classes', str(names), **here)
    prepared(own, '--classes', str(names), '--to', str(own / 'new'))
    root = own / 'new'
    for i in range(6):
        np.testing.assert_array_equal(label(root, f'p {i}'),
                                      np.array([0, 1, 255])[drawn(i)])
    assert (root / 'classes.txt').read_text() == (
        'ground 10 20 30\nroof 200 0 0\n')


def test_grey_masks_by_colour(own, monkeypatch, capsys):
    save_masks(own, (0, 128, 254))
    line = told(own, monkeypatch=monkeypatch, capsys=capsys)
    assert 'hold 0, 128, 254' in line and '--by-colour' in line
    names = own / 'names.txt'
    names.write_text('a 0 0 0\nb 128 128 128\nc 254 254 254\n')
    root = prepared(own, '--classes', str(names), '--by-colour')
    np.testing.assert_array_equal(label(root, 'p 3'), drawn(3))


def test_masks_of_0_and_255_are_asked_about(own, monkeypatch, capsys):
    here = {'monkeypatch': monkeypatch, 'capsys': capsys}
    save_masks(own, (0, 255))
    line = told(own, **here)
    assert '--white object' in line and '--white void' in line
    assert 'nothing to learn' in told(own, '--white', 'void', **here)
    root = prepared(own, '--white', 'object')
    np.testing.assert_array_equal(label(root, 'p 1'), drawn(1, (0, 1)))
    assert (root / 'classes.txt').read_text() == '0 0 0 0\n1 128 0 0\n'
    save_masks(own, (0, 1, 255))
    assert '--white is for' in told(own, '--white', 'object', '--to',
                                    str(own / 'b'), **here)


def spoil(own, what):
    """Spoil the sixth picture's files; return what the message names."""
    picture_, mask = own / 'photos' / 'p 5.jpg', own / 'masks' / 'p 5.png'
    if what == 'no mask':
        mask.unlink()
        return 'p 5.jpg has no mask'
    if what == 'size':
        Image.fromarray(drawn(5)[:30]).save(mask)
        return f'{picture_} cannot be used (60 x 40 pixels, its mask 60 x 30)'
    if what == 'truncated mask':
        os.truncate(mask, 60)
        return f'{mask} cannot be read as a mask'
    if what == 'truncated picture':
        os.truncate(picture_, 500)
        return f'{picture_} cannot be used'
    if what == 'two':
        (own / 'photos' / 'p 5.png').write_bytes(b'')
        return 'p 5.jpg and p 5.png have one name'
    Image.fromarray(np.uint8([[1, 2, 3]])).convert('RGB').save(mask)
    return 'p 5.png is coloured, others are not'


@pytest.mark.parametrize('what', ('no mask', 'size', 'truncated mask', 'two',
                                  'truncated picture', 'coloured'))
def test_what_cannot_be_used_is_named(own, what, monkeypatch, capsys):
    save_masks(own)
    part = spoil(own, what)
    assert part in told(own, monkeypatch=monkeypatch, capsys=capsys)
    if what == 'size':                          # mended, it goes on
        Image.fromarray(drawn(9)).save(own / 'masks' / 'p 5.png')
        np.testing.assert_array_equal(label(prepared(own), 'p 5'), drawn(9))


def test_words_that_contradict(own, monkeypatch, capsys):
    here = {'monkeypatch': monkeypatch, 'capsys': capsys}
    save_masks(own)
    assert 'a share between' in told(own, '--val', '1.5', **here)
    assert 'no such folder' in told(own, masks='gone', **here)
    assert 'has no masks' in told(own, masks='photos', **here)
    (own / 'own.json').write_text('{}')
    assert 'are for a folder' in told(own, '--white', 'void',
                                      masks='own.json', **here)
    assert "'categories' is not there" in told(own, masks='own.json', **here)
    assert 'gone.txt is not there' in told(own, '--classes', 'gone.txt',
                                           **here)


def test_turned_and_other_pictures(own):
    """A picture is turned as its mask is, and becomes a JPEG."""
    save_masks(own)
    exif = Image.Exif()
    exif[prepare.ORIENTATION] = 6               # shown turned to the right
    photos = own / 'photos'
    (photos / 'p 0.jpg').write_bytes(picture(0, exif=exif))
    Image.fromarray(drawn(0).T.copy()).save(own / 'masks' / 'p 0.png')
    (photos / 'p 1.jpg').write_bytes(picture(1, exif=exif))   # as stored
    (photos / 'p 2.jpg').unlink()
    Image.open(io.BytesIO(picture(2))).convert('RGBA').save(
        photos / 'p 2.png')
    root = prepared(own)
    upright = dataset.read_image(prepare.image_path(root, 'p 0'))
    stored = np.array(Image.open(io.BytesIO(picture(0))))
    assert upright.shape == (60, 40, 3)
    assert np.abs(np.rot90(stored, -1).astype(int) - upright).max() < 12
    for i in (1, 2):
        found = dataset.read_image(prepare.image_path(root, f'p {i}'))
        wanted = np.array(Image.open(io.BytesIO(picture(i))))
        assert np.abs(wanted.astype(int) - found).max() < 12


def test_polygons_of_ones_own(own, monkeypatch, capsys):
    pytest.importorskip('pycocotools')
    here = {'monkeypatch': monkeypatch, 'capsys': capsys}
    data = {'images': [{'id': i, 'file_name': f'p {i}.jpg', 'height': 40,
                        'width': 60} for i in range(5)],
            'categories': [{'id': 7, 'name': 'roof'},
                           {'id': 3, 'name': 'a b'}],
            'annotations': [
                {'image_id': 0, 'category_id': 7,
                 'segmentation': polygon(2, 10, 3, 9)},
                {'image_id': 1, 'category_id': 3, 'iscrowd': 1,
                 'segmentation': rle(boxes((1, 5, 9, 5, 9)) > 0, True)},
                {'image_id': 1, 'category_id': 3,
                 'segmentation': polygon(6, 20, 3, 9)}]}
    path = own / 'own.json'
    path.write_text(json.dumps(data))
    root = prepared(own, masks='own.json')
    assert (root / 'classes.txt').read_text() == (
        'background 0 0 0\na b 128 0 0\nroof 0 128 0\n')
    np.testing.assert_array_equal(label(root, 'p 0'), boxes((2, 2, 10, 3, 9)))
    np.testing.assert_array_equal(label(root, 'p 1'), boxes(
        (255, 5, 9, 5, 9), (1, 6, 20, 3, 9)))
    assert not label(root, 'p 2').any()
    data['images'][0]['file_name'] = 'gone.jpg'
    path.write_text(json.dumps(data))
    new = ['--to', str(own / 'new')]
    assert 'gone.jpg is not there' in told(own, *new, masks='own.json', **here)
    data['annotations'][0]['category_id'] = 8
    path.write_text(json.dumps(data))
    assert 'are of [8] too' in told(own, *new, masks='own.json', **here)


def test_packages_are_asked_for(own, coco, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools.mask', None)
    with pytest.raises(ValueError, match='pip install pycocotools'):
        prepare.main(coco[0])
