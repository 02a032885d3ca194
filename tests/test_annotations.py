"""Are outlines of COCO, labelme and YOLO read as they are meant, or refused?

    python -m pytest tests/test_annotations.py

Every label is compared, pixel by pixel, with what was drawn.
"""
import argparse
import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from conversion import (
    SIZE,
    boxes,
    encode,
    load_label,
    polygon,
    rle,
    smooth_image,
)
from converters import annotations, layout, polygons
from files import expect_error
from lib import images

pytest.importorskip('pycocotools')
SHARES = '{:.6f} {:.6f} {:.6f} {:.6f} {:.6f} {:.6f} {:.6f} {:.6f}'


@pytest.fixture
def folder(tmp_path):
    """A folder of 4 images."""
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'notes').mkdir()
    for i in range(4):
        (tmp_path / 'photos' / f'p{i}.jpg').write_bytes(smooth_image(i))
    return tmp_path


@pytest.fixture
def own(folder, monkeypatch):
    """The same, annotations being read in this process, which is faster."""
    monkeypatch.setattr(layout, 'map_in_processes', lambda work, jobs, *_: (
        work(*job) for job in jobs))
    return folder


def read(own, masks='notes', classes=None, photos='photos'):
    """Read annotations; return the names of classes, {ID: label}."""
    args = argparse.Namespace(images=str(own / photos), masks=str(own / masks),
                              classes=classes and str(own / classes))
    named = classes and images.read_class_file(args.classes)
    (names, colours), sources, labels = annotations.read(args, named)
    assert len(names) == len(colours) and sources.keys() == labels.keys()
    for ID, (path, size) in sources.items():
        assert Path(path).is_file() and size == labels[ID][0]
    return names, {ID: polygons.rasterize_polygons(*label)
                   for ID, label in labels.items()}


def refuse(own, *parts, **words):
    """Expect annotations to be refused in one line that holds these parts."""
    return expect_error(lambda: read(own, **words), '', *parts)


def move(own, old, new):
    """Move a file of the folder, into folders that are made."""
    (own / new).parent.mkdir(parents=True, exist_ok=True)
    (own / old).rename(own / new)


# ------------------------------------------------- COCO
def write_coco(own, notes, names=('p0.jpg', 'p1.jpg'), **more):
    """Write JSON of annotations (image, category, segmentation), which may
    be a dict of further keys."""
    data = {'images': [{'id': i, 'file_name': name, 'height': 40, 'width': 60}
                       for i, name in enumerate(names)],
            'categories': [{'id': 7, 'name': 'roof'}, {'id': 3, 'name': 'a'}],
            'annotations': [{'image_id': i, 'category_id': c, 'bbox': [
                1, 1, 9, 9], **(where if isinstance(where, dict) else
                                {'segmentation': where})}
                for i, c, where in notes], **more}
    (own / 'own.json').write_text(json.dumps(data))


BOX = boxes((2, 2, 10, 3, 9))           # category 7 is class 2
ROOF = (0, 7, polygon(2, 10, 3, 9))


@pytest.mark.parametrize('missing', ({}, {'segmentation': []},
                                     {'segmentation': None},
                                     {'segmentation': [[]]},
                                     {'segmentation': [[3, 2, 9, 10]]}))
def test_boxes_without_outlines_are_refused(own, missing, capsys):
    """Their labels would be background alone."""
    write_coco(own, [(0, 7, missing), (1, 3, missing)])
    refuse(own, '2 of 2 annotations in', 'have a box and no outline '
           '(segmentation)', 'export polygons', masks='own.json')
    write_coco(own, [ROOF, (0, 3, missing), (1, 3, missing)])
    _, labels = read(own, 'own.json')
    np.testing.assert_array_equal(labels['p0'], BOX)
    out = capsys.readouterr().out
    assert '2 of 3 annotations in' in out and 'have no outline' in out
    assert '1 image without an outline: background alone' in out
    assert '2 images in' in out and 'without annotation: left out' in out


def test_no_annotations_at_all_are_refused(own):
    write_coco(own, [])
    refuse(own, 'has no outline at all', masks='own.json')


def test_crowds_are_counted(own, capsys):
    mask = boxes((1, 0, 9, 0, 9)) > 0
    write_coco(own, [(0, 3, {'iscrowd': 1, 'segmentation': rle(mask, x)})
                     for x in (True, False)] + [ROOF])
    _, labels = read(own, 'own.json')
    np.testing.assert_array_equal(labels['p0'], boxes(
        (255, 0, 9, 0, 9), (2, 2, 10, 3, 9)))
    assert '2 crowds (iscrowd) in' in capsys.readouterr().out


@pytest.mark.parametrize('name', ('sub/p0.jpg', 'sub\\p0.jpg', 'p0.jpg',
                                  './sub/p0.jpg', 'photos/sub/p0.jpg',
                                  'sub/P0.JPG'))
def test_folders_in_a_file_name(own, name):
    move(own, 'photos/p0.jpg', 'photos/sub/p0.jpg')
    write_coco(own, [ROOF], [name])
    names, labels = read(own, 'own.json')
    assert names == ['background', 'a', 'roof']
    np.testing.assert_array_equal(labels['sub_p0'], BOX)


@pytest.mark.parametrize('name', ('../secret.jpg', 'sub/../../secret.jpg',
                                  '..\\secret.jpg', '{}/secret.jpg',
                                  'C:\\photos\\p0.jpg', 'p0\0.jpg',
                                  'p0\n.jpg', '\ud800.jpg', '', '..',
                                  '\\\\p0.jpg', 400 * 'sub/'))
def test_a_file_name_that_leads_out_of_the_folder(own, name):
    (own / 'secret.jpg').write_bytes(smooth_image())
    write_coco(own, [ROOF], [name.format(own)])
    refuse(own, 'has to lie beneath', masks='own.json')


def test_a_file_that_a_list_cannot_name(own):
    move(own, 'photos/p0.jpg', 'photos/p\n0.jpg')
    write_coco(own, [(1, 7, polygon(2, 10, 3, 9))], ['p1.jpg', 'p2.jpg'])
    read(own, 'own.json')                       # it is not named
    move(own, 'notes', 'unused')
    write_labelme(own, shape('polygon', [[1, 1], [9, 1], [9, 9]]), name='p\n0')
    refuse(own, r"the file name 'p\n0.jpg' cannot stand in a list")


@pytest.mark.parametrize('name', ('', '\ud800', 'a\x1b', 101 * 'a'))
def test_names_that_are_none(own, name):
    """classes.txt would not hold them, or no legend show them."""
    write_coco(own, [ROOF], categories=[{'id': 7, 'name': name}])
    refuse(own, 'has a class without a name of 1 to 100', masks='own.json')


def test_an_image_of_absurd_size_is_refused(own):
    """Its label would take gigabytes."""
    write_coco(own, [ROOF], images=[{'id': 0, 'file_name': 'p0.jpg',
                                     'height': 65535, 'width': 65535}])
    refuse(own, "the image 'p0.jpg' of width 65535", masks='own.json')


def test_images_that_are_not_clear(own):
    write_coco(own, [ROOF], ['sub/gone.jpg'])
    refuse(own, 'gone.jpg is not there, but', masks='own.json')
    for folder in 'ab':
        (own / 'photos' / folder).mkdir()
        (own / 'photos' / folder / 'x.jpg').write_bytes(smooth_image())
    write_coco(own, [ROOF], ['x.jpg'])
    refuse(own, 'there are a/x.jpg and b/x.jpg', masks='own.json')
    write_coco(own, [ROOF], ['p0.jpg', 'p0.jpg'])
    refuse(own, 'has an image twice', masks='own.json')
    (own / 'photos' / 'a_x.jpg').write_bytes(smooth_image())
    write_coco(own, [ROOF], ['a/x.jpg', 'a_x.jpg'])
    refuse(own, 'two images of the name a_x', masks='own.json')
    refuse(own, 'nowhere is no folder of images', masks='own.json',
           photos='nowhere')


def test_classes_in_the_order_of_a_file(own):
    write_coco(own, [ROOF])
    (own / 'c.txt').write_text('background 0 0 0\nroof 9 9 9\nvoid 5 5 5\n'
                               'tree 1 1 1\na 3 3 3\n')
    names, labels = read(own, 'own.json', 'c.txt')
    assert names == ['background', 'roof', 'tree', 'a']
    np.testing.assert_array_equal(labels['p0'], np.minimum(BOX, 1))
    (own / 'c.txt').write_text('background 0 0 0\nroof 9 9 9\n')
    refuse(own, 'has a too', masks='own.json', classes='c.txt')
    (own / 'c.txt').write_text('a 0 0 0\nroof 9 9 9\n')
    refuse(own, 'first class has to be background', masks='own.json',
           classes='c.txt')


def test_background_and_void_as_categories(own):
    write_coco(own, [(0, 5, polygon(4, 8, 3, 9)), (0, 6, polygon(0, 3, 0, 60)),
                     ROOF], categories=[
        {'id': 5, 'name': 'Background'}, {'id': 6, 'name': 'void'},
        {'id': 7, 'name': 'roof'}, {'id': 9, 'name': 'roof'}])
    names, labels = read(own, 'own.json')
    assert names == ['background', 'roof']
    np.testing.assert_array_equal(labels['p0'], boxes(
        (1, 2, 10, 3, 9), (255, 0, 3, 0, 60), (0, 4, 8, 3, 9)))


@pytest.mark.parametrize('more, part', (
    ({'categories': [{'id': i, 'name': f'c{i}'} for i in range(300)]},
     '301 classes with background; a label holds 255'),
    ({'categories': [{'id': 7, 'name': ' '}]}, 'a class without a name'),
    ({'categories': [{'id': 7}]}, "'name' is not there"),
    ({'categories': [{'id': 7, 'name': 'a'}] * 2}, 'two categories of one id'),
    ({'categories': {}}, "'categories' is no list (it has 'images', 'cat"),
    ({'categories': [7]}, 'an entry of another kind'),
    ({'images': [{'id': 0, 'file_name': 'p0.jpg', 'height': '40',
                  'width': None}]}, "of width None and height '40'"),
    ({'images': [{'id': 0, 'file_name': 'p0.jpg', 'height': 10 ** 9,
                  'width': 60}]}, 'of width 60 and height 1000000000'),
    ({'images': []}, 'annotations of the image 0, which is not in its')))
def test_wrong_coco_is_refused(own, more, part):
    write_coco(own, [ROOF], **more)
    refuse(own, part, masks='own.json')


@pytest.mark.parametrize('where, part', (
    ([3, 2, 9, 2, 9, 10], 'not JSON in COCO'),
    ('polygon', 'have a box and no outline'),
    ([['a'] * 6], 'neither polygons nor an RLE'),
    ({'segmentation': {'counts': [3]}}, 'neither polygons nor an RLE'),
    ([[0, 0, 1e9, 0, 1e9, 1e9]], 'a corner far from its image of 60 x 40'),
    ([[0, 0, float('nan'), 0, 1, 1]], 'a corner far from its image')))
def test_wrong_outlines_are_refused(own, where, part):
    write_coco(own, [(0, 7, where)])
    refuse(own, part, masks='own.json')


def test_other_json_is_refused(own):
    path = own / 'own.json'
    path.write_text('[1, 2]')
    refuse(own, 'holds a list, not an object with', masks='own.json')
    path.write_text('{"version": 1, "shapes": []}')
    refuse(own, 'own.json is JSON of labelme; name its folder',
           masks='own.json')
    path.write_text('{"version": 1, "items": []}')
    refuse(own, "'categories' is not there (it has 'version', 'items')",
           masks='own.json')
    path.write_text('{"images":\n [')
    refuse(own, 'is truncated or damaged: no JSON from line 2 on',
           masks='own.json')
    path.write_bytes(b'{"\xff": 3}')
    refuse(own, 'is truncated or damaged: no JSON', masks='own.json')
    refuse(own, 'gone.json is not there', masks='gone.json')


@pytest.mark.parametrize('encoding', ('utf-8-sig', 'utf-16'))
def test_json_of_other_systems(own, encoding):
    write_coco(own, [ROOF])
    path = own / 'own.json'
    path.write_text(path.read_text().replace(', ', ',\r\n'), encoding)
    np.testing.assert_array_equal(read(own, 'own.json')[1]['p0'], BOX)


# ------------------------------------------------- labelme
def shape(kind, points, label='roof', **more):
    return {'label': label, 'points': points, 'shape_type': kind, **more}


def write_labelme(own, *shapes, name='p0', path=None, **more):
    """Write a file of labelme's; path: imagePath."""
    data = {'version': '5.4.1', 'flags': {}, 'shapes': shapes,
            'imagePath': path or f'{name}.jpg', 'imageData': None,
            'imageHeight': 40, 'imageWidth': 60, **more}
    path = own / 'notes' / f'{name}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


RECTANGLE = shape('rectangle', [[9, 10], [3, 2]])


def test_shapes_of_labelme(own, capsys):
    """The last shape lies on top; images without a file are left out."""
    png = encode(boxes((255, 1, 4, 2, 5))[:6, :8], 'PNG')
    write_labelme(
        own, shape('polygon', [[3, 2], [9, 2], [9, 10], [3, 10]], 'a'),
        shape(None, [[0, 2], [5, 2], [5, 4], [0, 4]], 'b'),
        shape('rectangle', [[50, 40], [40, 30]], 'b'),
        shape('rectangle', [[41, 31], [42, 32]], '_background_'),
        shape('rectangle', [[43, 31], [44, 32]], '__ignore__'),
        shape('mask', [[20, 10], [27, 15]], 'c d',
              mask=base64.b64encode(png).decode()),
        shape('point', [[1, 1]]), shape('line', [[1, 1], [3, 3]]),
        shape('line', [[2, 1], [3, 3]]))
    write_labelme(own, name='p1')
    names, labels = read(own)
    assert names == ['background', 'a', 'b', 'c d']
    np.testing.assert_array_equal(labels['p0'], boxes(
        (1, 2, 10, 3, 9), (2, 2, 4, 0, 5), (2, 30, 40, 40, 50),
        (0, 31, 32, 41, 42), (255, 31, 32, 43, 44), (3, 11, 14, 22, 25)))
    assert not labels['p1'].any() and len(labels) == 2
    out = capsys.readouterr().out
    assert '3 shapes without an area left out: 2 line, 1 point' in out
    assert '1 image without an outline' in out
    assert '2 images in' in out and 'without annotation: left out' in out


def test_a_circle_of_labelme(own):
    write_labelme(own, shape('circle', [[30, 20], [36, 28]]))
    label = read(own)[1]['p0']
    y, x = np.mgrid[:40, :60] + .5
    distance = np.hypot(y - 20, x - 30)
    assert label[distance < 9.5].all() and not label[distance > 10.5].any()


@pytest.mark.parametrize('path', ('..\\photos\\p0.jpg', '../photos/p0.jpg',
                                  'C:\\Users\\me\\p0.jpg', '/etc/p0.jpg',
                                  'p0.jpg', 'P0.JPG'))
def test_an_image_of_labelme_is_looked_for_by_name(own, path):
    write_labelme(own, RECTANGLE, path=path)
    _, labels = read(own)
    np.testing.assert_array_equal(labels['p0'], np.minimum(BOX, 1))


def test_labelme_in_folders(own):
    """The image in the folder of its file goes first."""
    for folder in 'ab':
        write_labelme(own, RECTANGLE, name=f'{folder}/x', path='x.jpg')
        (own / 'photos' / folder).mkdir()
        (own / 'photos' / folder / 'x.jpg').write_bytes(smooth_image())
    assert sorted(read(own)[1]) == ['a_x', 'b_x']
    write_labelme(own, RECTANGLE, name='x')
    refuse(own, 'x.json is of the image x.jpg, but there are a/x.jpg and b/x')


def test_labelme_without_a_size(own):
    """Then the image's own, rotated as labelme shows it."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    (own / 'photos' / 'p0.jpg').write_bytes(smooth_image(0, exif=exif))
    write_labelme(own, RECTANGLE, imageHeight=None, imageWidth=None)
    assert read(own)[1]['p0'].shape == SIZE[::-1]


@pytest.mark.parametrize('wrong, part', (
    (shape('polygon', [[1, 2], [3]]), 'shape 1 of 1 cannot be read'),
    (shape('circle', [[1, 2]]), 'shape 1 of 1 cannot be read'),
    (shape('mask', [[1, 2], [3, 4]], mask='a'), 'shape 1 of 1 cannot'),
    (shape('mask', [], mask='a'), 'shape 1 of 1 cannot be read'),
    ({'label': 'a'}, 'shape 1 of 1 cannot be read'),
    (shape('polygon', [[1, 2]] * 3, label=None), 'shape 1 of 1 cannot'),
    (shape('line', [[1, 2], [3, 4]]), 'has no outline at all')))
def test_wrong_shapes_are_refused(own, wrong, part):
    write_labelme(own, wrong)
    refuse(own, part)


def test_wrong_files_of_labelme_are_refused(own):
    write_labelme(own, RECTANGLE, path='gone.jpg')
    refuse(own, 'p0.json is of the image gone.jpg, which is not in')
    write_labelme(own, RECTANGLE, path='p1.jpg')
    write_labelme(own, RECTANGLE, name='p1')
    refuse(own, 'two images of the name p1')
    (own / 'notes' / 'p1.json').unlink()
    (own / 'notes' / 'p0.json').write_text('{"flags": {}}')
    refuse(own, "not JSON of labelme: 'shapes' is not there (it has 'flags')")
    write_coco(own, [ROOF])
    move(own, 'own.json', 'notes/p0.json')
    refuse(own, "p0.json is JSON in COCO's format; name the file itself")


# ------------------------------------------------- YOLO
def write_yolo(own, lines, name='p0'):
    """Write a file of YOLO's, of lines (class, top, bottom, left, right)."""
    text = ''
    for number, top, bottom, left, right in lines:
        text += f'{number} ' + SHARES.format(*np.reshape(polygon(
            top, bottom, left, right), (4, 2)).__truediv__((60, 40)).ravel()
        ) + '\n'
    path = own / 'notes' / f'{name}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_polygons_of_yolo(own, capsys):
    write_yolo(own, [(2, 2, 10, 3, 9), (0, 0, 40, 0, 6)])
    write_yolo(own, [], 'p1')
    write_yolo(own, [(0, 0, 1, 0, 1)], 'another')
    names, labels = read(own)
    assert names == ['background', 'class 0', 'class 1', 'class 2']
    np.testing.assert_array_equal(labels['p0'], boxes(
        (1, 0, 40, 0, 6), (3, 2, 10, 3, 9)))
    assert not labels['p1'].any() and len(labels) == 2
    out = capsys.readouterr().out
    assert '1 .txt of' in out and '2 images in' in out


@pytest.mark.parametrize('text', (
    "names: ['a b', \"c\", d]  # three\nnc: 3\n",
    'nc: 3\nnames: [a b,\n  c, d]\npath: x\n', 'names: {0: a b, 1: c, 2: d}',
    "names:\n- a b\n- 'c'\n- d\n", '# x\nnames:\n  0: a b\n  1: c # no\n  2: '
    'd\n\ntrain: images\n', 'names: {2: d, 0: a b, 1: "c"}\r\n'))
def test_names_of_yolo(own, text):
    write_yolo(own, [(2, 2, 10, 3, 9)], 'train/p0')
    (own / 'data.yaml').write_text(text)
    assert read(own, 'notes/train')[0] == ['background', 'a b', 'c', 'd']


def test_names_of_yolo_in_other_files(own):
    write_yolo(own, [(1, 2, 10, 3, 9)])
    (own / 'c.txt').write_text('background 0 0 0\nb 1 1 1\nvoid 9 9 9\n'
                               'a 2 2 2\n')
    names, labels = read(own, classes='c.txt')
    assert names == ['background', 'b', 'a'] and labels['p0'].max() == 2
    move(own, 'c.txt', 'notes/classes.txt')         # the same file
    assert read(own, classes='notes/classes.txt')[0] == ['background', 'b',
                                                         'a']
    move(own, 'notes/classes.txt', 'c.txt')
    (own / 'notes' / 'classes.txt').write_bytes('a\r\nb\r\n'.encode('utf-16'))
    assert read(own)[0] == ['background', 'a', 'b']
    names, labels = read(own, classes='c.txt')      # found by name
    assert names == ['background', 'b', 'a'] and labels['p0'].max() == 1
    (own / 'notes' / 'classes.txt').write_text('a\n')
    refuse(own, 'p0.txt has class 1, but', 'names 0 to 0')


@pytest.mark.parametrize('text, part', (
    ('0 .5 .5 .2 .2\n0 .1 .1 .2 .1 .2 .2\n', '1 of 2 lines of'),
    ('\n0 .1 .1 .2 .1 .2', 'p0.txt, line 2: not "class x1 y1'),
    ('0 10 10 20 10 20 20', 'p0.txt, line 1: not "class x1'),
    ('-1 .1 .1 .2 .1 .2 .2', 'the class 0 to 254'),
    ('1.5 .1 .1 .2 .1 .2 .2', 'the class 0 to 254'),
    ('1e99 .1 .1 .2 .1 .2 .2', 'the class 0 to 254'),
    ('roof .1 .1 .2 .1 .2 .2', 'p0.txt, line 1'),
    ('0 nan .1 .2 .1 .2 .2', 'p0.txt, line 1'), ('', 'no outline at all')))
def test_wrong_lines_of_yolo_are_refused(own, text, part):
    (own / 'notes' / 'p0.txt').write_text(text)
    refuse(own, part)


def test_wrong_files_of_yolo_are_refused(own):
    (own / 'notes' / 'p0.txt').write_bytes(b'0 \xff')
    refuse(own, 'is neither UTF-8 nor UTF-16 text')
    write_yolo(own, [(0, 2, 10, 3, 9)])
    (own / 'notes' / 'data.yaml').write_text('nc: 2\nnames: [a, b, c]\n')
    refuse(own, 'the names of the classes cannot be read')
    move(own, 'notes/p0.txt', 'notes/q.txt')
    refuse(own, 'no .txt in', 'has the name of an image in')


# ------------------------------------------------- which kind
@pytest.mark.parametrize('files, wanted', (
    (('a.json',), True), (('s/a.txt', 's/b.txt', 'classes.txt'), True),
    (('a.json', 'a.jpg', 'b.jpg'), True), (('a.json', 'a.png'), True),
    (('a.png', 'b.png'), False), (('a.png', 'labelmap.txt'), False),
    (('a.jpg', 'a.png', 'a.json'), False), (('a.jpg', 'classes.txt'), False),
    (('.hidden/a.json', '._a.json'), False), ((), False)))
def test_what_is_a_folder_of_annotations(tmp_path, files, wanted):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert annotations.is_annotations(str(tmp_path)) is wanted


def test_json_is_annotations(tmp_path):
    assert annotations.is_annotations(str(tmp_path / 'a.JSON'))
    assert not annotations.is_annotations(str(tmp_path / 'masks'))


@pytest.mark.parametrize('kind', ('labelme', 'yolo'))
def test_prepare(folder, kind, capsys):
    """The whole way, images beside their annotations."""
    for i in range(4):
        if kind == 'labelme':
            write_labelme(folder, RECTANGLE, name=f'p{i}')
        else:
            write_yolo(folder, [(0, 2, 10, 3, 9)], f'p{i}')
        move(folder, f'photos/p{i}.jpg', f'notes/p{i}.jpg')
    root = str(folder / 'notes' / 'made')
    for _ in 'first', 'again':          # what it has made is no annotation
        prepare.main(['custom', *[str(folder / 'notes')] * 2, '--to', root])
    assert 'is ready: custom, train 3, val 1' in capsys.readouterr().out
    for i in range(4):
        np.testing.assert_array_equal(load_label(root, f'p{i}'),
                                      np.minimum(BOX, 1))
        assert Path(layout.image_path(root, f'p{i}')).read_bytes() == \
            smooth_image(i)
