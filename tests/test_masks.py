"""Is each image paired with its mask, and are masks of any kind read as they
are meant, or refused?

    python -m pytest tests/test_masks.py
"""
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import utils
from conversion import SIZE, smooth_image
from converters import layout, masks, pairs
from lib import images

MASK = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
NAMED = (['ground', 'roof'], [[0, 0, 0], [200, 0, 0]])


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch):
    monkeypatch.setattr(layout, 'map_in_processes', lambda work, jobs, *_: [
        work(*job) for job in jobs])


@pytest.fixture
def args(tmp_path):
    """The options of `prepare.py custom`, as they are by themselves."""
    return types.SimpleNamespace(
        images=str(tmp_path / 'photos'), masks=str(tmp_path / 'masks'),
        to=str(tmp_path / 'photos' / 'made'), by_colour=False, white=None,
        suffix='', classes=None)


def touch(args, sources, files):
    """Make empty files in IMAGES and in MASKS."""
    for folder, names in ((args.images, sources), (args.masks, files)):
        for name in names.split():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def pair(args, sources, files):
    """Return {ID: (image, mask)} as paths within their folders."""
    touch(args, sources, files)
    return {name: (path[len(args.images) + 1:], mask[len(args.masks) + 1:])
            for name, (path, mask) in pairs.pair_files(args).items()}


# ------------------------------------------------- which mask is whose
def test_nested_folders_endings_and_case(args, capsys):
    assert pair(args, 'a.jpg IMG_1.JPG x/a.jpeg x/y/b.tif c.png '
                '.hidden/d.jpg made/JPEGImages/e.jpg',
                'a.png img_1.PNG x/a.bmp b.gif c.png old.png older.png') == {
        'IMG_1': ('IMG_1.JPG', 'img_1.PNG'), 'a': ('a.jpg', 'a.png'),
        'c': ('c.png', 'c.png'), 'x_a': ('x/a.jpeg', 'x/a.bmp'),
        'x_y_b': ('x/y/b.tif', 'b.gif')}
    assert '2 masks without an image: left out' in capsys.readouterr().out


def test_names_that_differ_in_case_alone(args):
    assert pair(args, 'a.jpg A.jpg', 'A.png a.png') == {
        'a': ('a.jpg', 'a.png'), 'A': ('A.jpg', 'A.png')}
    assert pair(args, 'a.jpg A.jpg x/B.jpg y/b.jpg',
                'A.png a.png x/b.png y/B.png')['x_B'] == (
        'x/B.jpg', 'x/b.png')


@pytest.mark.parametrize('files, suffix', (
    ('a.jpg a.png b.JPG b.png', ''),
    ('a.jpg a_mask.png b.JPG b_mask.png', '_mask'),
    ('a.png a-label.png b.png B-label.PNG', '-label'),
    ('a.png a_xy.png b.png b_xy.png', '_xy'),
    ('images/a.jpg masks/a.png images/b.jpg masks/b.png', '')))
def test_images_and_masks_in_one_folder(args, files, suffix):
    args.masks = args.images
    args.suffix = suffix if suffix == '_xy' else ''
    first, second, third, fourth = files.split()
    found = pair(args, files, '')
    assert [*found.values()] == [(first, second), (third, fourth)]


def test_masks_inside_the_folder_of_images(args, capsys):
    args.masks = f'{args.images}/labels'
    assert pair(args, 'a.png b.png labels/a_mask.png labels/b_mask.png',
                '') == {'a': ('a.png', 'a_mask.png'),
                        'b': ('b.png', 'b_mask.png')}
    assert 'masks have _mask after the name' in capsys.readouterr().out


@pytest.mark.parametrize('sources, files, part', (
    ('a.jpg b.jpg c.jpg d.jpg e.jpg', 'a.png',
     '4 of 5 images in PHOTOS have no mask: b.jpg, c.jpg, d.jpg and 1 more. '
     'Add MASKS/b.png, or move'),
    ('a.jpg b/a.jpg', 'a.png', '1 of 2 images in PHOTOS has no mask: b/a'),
    ('a.jpg b.jpg', 'a.jpg b.jpeg',
     'MASKS/a.jpg: JPEG changes the class numbers'),
    ('a.jpg b.jpg', 'a.png b.webp', 'MASKS/b.webp: WebP changes'),
    ('a.jpg', 'a.png a.bmp', 'a.bmp and a.png are both named as the mask of '
     'a.jpg'),
    ('a.jpg', 'class/a.png object/a.png', 'name the folder of one'),
    ('x/a.jpg y/a.jpg', 'a.png', 'the mask of x/a.jpg and of y/a.jpg'),
    ('a.jpg a.png', 'a.png', 'a.jpg and a.png have one name, a; rename one'),
    ('a\udce4.jpg', 'a\udce4.png', "the file name 'a\\udce4.jpg' cannot"),
    ('x/a.jpg x_a.jpg', 'a.png', 'x/a.jpg and x_a.jpg have one name, x_a'),
    ('a.jpg', 'notes.txt', 'MASKS has no masks (.png'),
    ('notes.txt', 'a.png', 'PHOTOS has no images (.jpg')))
def test_what_is_not_clear_is_refused(args, sources, files, part):
    touch(args, sources, files)
    with pytest.raises(utils.UserError) as error:
        pairs.pair_files(args)
    assert part in str(error.value).replace(args.masks, 'MASKS').replace(
        args.images, 'PHOTOS')


# ------------------------------------------------- how masks are stored
def as_palette(mask, **options):
    image = Image.fromarray(mask)
    image.putpalette(images.voc_palette().tobytes())
    return image, options


def rgba(mask, alpha):
    return Image.fromarray(np.dstack([mask, mask, mask, np.full_like(
        mask, alpha)])), {}


STORED = {
    'grey': lambda m: (Image.fromarray(m), {}),
    'palette': as_palette,
    'palette, transparent': lambda m: as_palette(m, transparency=0),
    'palette, alpha': lambda m: as_palette(m, transparency=bytes([0, 9])),
    'palette, 2 bits': lambda m: as_palette(m, bits=2),
    'grey, alpha': lambda m: (Image.fromarray(m).convert('LA'), {}),
    'grey, 16 bits': lambda m: (Image.fromarray(m.astype(np.uint16)), {}),
    'RGB': lambda m: (Image.fromarray(m).convert('RGB'), {}),
    'RGBA': lambda m: rgba(m, 255),
    'RGBA, transparent': lambda m: rgba(m, 7)}


def prepare(args, *stored, values=MASK):
    """Write images and masks that are stored in these ways; return what
    masks.read() finds, each label made."""
    Path(args.images).mkdir(exist_ok=True)
    Path(args.masks).mkdir(exist_ok=True)
    for i, kind in enumerate(stored):
        Path(args.images, f'{i}.jpg').write_bytes(smooth_image(i))
        image, options = STORED[kind](values)
        image.save(Path(args.masks, f'{i}.png'), **options)
    classes, _, labels = masks.read(args, masks.read_classes(args))
    made = []
    for label in labels.values():
        path = f'{args.masks}/made'
        masks.convert_mask(path, *label, classes[1])
        made.append(images.read_label(path))
        Path(path).unlink()
    return classes, made


@pytest.mark.parametrize('kind', STORED)
def test_masks_of_numbers_however_stored(args, kind, capsys):
    classes, made = prepare(args, kind, 'grey')
    assert classes[0] == ['0', '1', '2']
    for label in made:
        np.testing.assert_array_equal(label, MASK)
    said = 'transparent pixels count by their colour' in (
        capsys.readouterr().out)
    assert said == (kind == 'RGBA, transparent')


def test_masks_of_one_bit(args):
    STORED['1 bit'] = lambda m: (Image.fromarray(m > 0), {})
    classes, made = prepare(args, '1 bit')
    np.testing.assert_array_equal(made[0], MASK > 0)
    assert classes[0] == ['0', '1']


@pytest.mark.parametrize('kind', ('grey', 'palette, alpha', 'RGBA',
                                  'grey, alpha', 'grey, 16 bits'))
def test_any_mask_by_colour(args, kind, tmp_path):
    args.by_colour, args.classes = True, str(tmp_path / 'names.txt')
    colours = images.voc_palette() if 'palette' in kind else (
        np.arange(256)[:, None] + [0, 0, 0])
    Path(args.classes).write_text('\n'.join(
        f'{name} {r} {g} {b}' for name, (r, g, b) in
        zip(('two', 'void', 'none'), colours[[2, 1, 0]].tolist())))
    classes, made = prepare(args, kind)
    assert classes[0] == ['two', 'none']
    np.testing.assert_array_equal(made[0], np.array([1, 255, 0])[MASK])


@pytest.mark.parametrize('array, mode, part', (
    (MASK.astype(np.uint16) * 300, None, 'has the value 600; the class'),
    (MASK.astype(np.float32), None, 'more than 8 bits a channel')))
def test_masks_of_more_bits_are_refused(tmp_path, array, mode, part):
    path = tmp_path / 'a.tif'
    Image.fromarray(array).save(path)
    with pytest.raises(utils.UserError, match=f'a.tif has.*{part}|{part}'):
        masks.read_mask(str(path))


def test_colours_of_16_bits_are_refused(tmp_path):
    """Pillow would read the upper half of each: 1 would become 0."""
    path = tmp_path / 'a.png'
    cv2.imwrite(str(path), np.dstack([MASK.astype(np.uint16)] * 3))
    with pytest.raises(utils.UserError, match='more than 8 bits a channel'):
        masks.read_mask(str(path))


def test_a_jpeg_by_content_is_refused(tmp_path):
    (tmp_path / 'a.png').write_bytes(smooth_image())
    with pytest.raises(utils.UserError, match='a.png is a JPEG by its cont'):
        masks.read_mask(str(tmp_path / 'a.png'))


# ------------------------------------------------- what values mean
@pytest.mark.parametrize('value', (2, 128, 255))
@pytest.mark.parametrize('kind', ('grey', 'RGB', 'palette'))
def test_0_and_one_other_value_are_asked_about(args, kind, value):
    values = np.uint8([0, value, value])[MASK]
    with pytest.raises(utils.UserError, match=f'hold 0, {value} alone: is '
                                              f'{value} the object or void'):
        prepare(args, kind, values=values)
    args.white = 'object'
    classes, made = prepare(args, kind, values=values)
    np.testing.assert_array_equal(made[0], MASK > 0)
    assert classes[0] == ['0', '1']
    args.white = 'void'
    with pytest.raises(utils.UserError, match='nothing to learn'):
        prepare(args, kind, values=values)


@pytest.mark.parametrize('values, named, white, part', (
    ({0, 1, 3}, None, None, 'not the classes 0 to 2'),
    ({0, 5}, NAMED, None, 'is 5 the object or void'),
    ({0}, None, None, 'hold 0: one class'),
    ({255}, None, None, 'hold 255: one class'),
    ({0, 1, 9}, None, 'object', '--white object is for masks of 0 and one')))
def test_numbers_that_are_no_classes(args, values, named, white, part):
    args.white = white
    with pytest.raises(utils.UserError, match=part):
        masks.map_numbers(values, named, args)


def test_a_class_named_void_is_void_by_number_too(args):
    classes, table = masks.map_numbers(
        {0, 1, 2, 255}, (['a', 'Void', 'b'], [[1] * 3, [2] * 3, [3] * 3]),
        args)
    assert classes == (['a', 'b'], [[1] * 3, [3] * 3])
    assert table == {0: 0, 1: 255, 2: 1, 255: 255}


def test_grey_rgb_is_read_by_its_colours_where_they_are_named(args, tmp_path):
    args.classes = str(tmp_path / 'names.txt')
    Path(args.classes).write_text('white 255 255 255\nblack 0 0 0\n')
    values = np.uint8([0, 255, 255])[MASK]
    _, made = prepare(args, 'RGB', values=values)
    np.testing.assert_array_equal(made[0], MASK == 0)


# ------------------------------------------------- CVAT's labelmap.txt
@pytest.mark.parametrize('place', ('masks', '.'))
def test_the_labelmap_of_cvat_is_found(args, tmp_path, place, capsys):
    Path(args.masks).mkdir()
    (tmp_path / place / 'labelmap.txt').write_bytes(
        b'\xef\xbb\xbf# label:color_rgb:parts:actions\r\na car:250,50,83::\r\n'
        b'background:0,0,0::\r\nvoid:9,9,9::\r\n')
    STORED['CVAT'] = lambda m: (Image.fromarray(np.uint8(
        [[0, 0, 0], [250, 50, 83], [9, 9, 9]])[m]), {})
    classes, made = prepare(args, 'CVAT')
    assert classes == (['background', 'a car'], [[0, 0, 0], [250, 50, 83]])
    np.testing.assert_array_equal(made[0], np.uint8([0, 1, 255])[MASK])
    assert 'labelmap.txt' in capsys.readouterr().out


@pytest.mark.parametrize('text, part', (
    ('# label:color_rgb:parts:actions\n', 'names no class'),
    ('car:1,2,3::\nroof 1 2 3', "the line 'roof 1 2 3' is not"),
    ('car:1,2,300::\n', "the line 'car:1,2,300::' is not"),
    ('# label\ncar:1,2,' + 5000 * '3' + '::\n', "the line 'car:1,2,3333")))
def test_a_labelmap_that_cannot_be(args, tmp_path, text, part):
    args.classes = str(tmp_path / 'labelmap.txt')
    Path(args.classes).write_text(text)
    with pytest.raises(utils.UserError, match=part):
        masks.read_classes(args)


def test_more_classes_than_a_label_holds_are_refused():
    """Class 255 would be void."""
    names = [*map(str, range(255)), 'void']
    (kept, _), place = masks.split_void((names, names))
    assert len(kept) == 255 and place == [*range(256)]
    names = [*map(str, range(256)), 'void']
    with pytest.raises(utils.UserError, match='256 classes are named'):
        masks.split_void((names, names))
