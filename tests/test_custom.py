"""Are one's own images and masks read as they are meant, or refused?

    python -m pytest tests/test_custom.py
"""
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset
import prepare
import settings
from conftest import refused
from conversion import (
    SIZE,
    boxes,
    load_label,
    palette,
    polygon,
    rle,
    smooth_image,
    split_ids,
)
from converters import custom, layout
from lib import images


@pytest.fixture
def own(tmp_path):
    """A folder of 6 images, and an empty one for their masks."""
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'masks').mkdir()
    for i in range(6):
        (tmp_path / 'photos' / f'p {i}.jpg').write_bytes(smooth_image(i))
    return tmp_path


def convert(folder, *words, masks='masks'):
    prepare.main(['custom', str(folder / 'photos'), str(folder / masks),
                  '--to', str(folder / 'made'), *words])
    return folder / 'made'


@pytest.fixture
def refusal(own, monkeypatch, capsys):
    """The one line with which a conversion is refused, exit status 2; the set
    is not finished."""
    def run(*words, masks='masks'):
        status, line = refused(lambda: convert(own, *words, masks=masks),
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2
        stamp = Path(words[words.index('--to') + 1] if '--to' in words else
                     own / 'made', 'prepared.json')
        assert not stamp.exists() or 'counts' not in stamp.read_text()
        return line
    return run


def draw(i, values=(0, 1, 2)):
    """Return the mask of image i."""
    return np.array(values)[np.random.default_rng(i).integers(
        0, len(values), SIZE)].astype(np.uint8)


def save_masks(folder, values=(0, 1, 2), suffix='', mode='L'):
    """Write the six masks."""
    for i in range(6):
        image = Image.fromarray(draw(i, values))
        if mode == 'P':
            image.putpalette(images.voc_palette().tobytes())
        image.save(folder / 'masks' / f'p {i}{suffix}.png')


# ------------------------------------------------- numbers
@pytest.mark.parametrize('mode', ('L', 'P'))
def test_masks_of_numbers(own, mode, capsys):
    save_masks(own, (0, 1, 2, 255), mode=mode)
    root = convert(own, '--val', '0.34')
    for i in range(6):
        np.testing.assert_array_equal(load_label(root, f'p {i}'),
                                      draw(i, (0, 1, 2, 255)))
        assert Path(layout.image_path(root, f'p {i}')).read_bytes() == \
            smooth_image(i)
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
    root = convert(own, '--suffix', '_mask', '--classes', str(names))
    assert (root / 'classes.txt').read_text() == names.read_text() + '\n'
    assert palette(root, 'p 0')[1] == [200, 0, 0]


def test_0_and_255_alone_are_asked_about(own, refusal):
    save_masks(own, (0, 255))
    line = refusal()
    assert '--white object' in line and '--white void' in line
    assert 'nothing to learn' in refusal('--white', 'void')
    root = convert(own, '--white', 'object')
    np.testing.assert_array_equal(load_label(root, 'p 1'), draw(1, (0, 1)))
    assert (root / 'classes.txt').read_text() == '0 0 0 0\n1 128 0 0\n'
    save_masks(own, (0, 1, 255))
    assert '--white is for' in refusal('--white', 'object', '--to',
                                       str(own / 'b'))


def test_a_set_made_under_the_old_name_is_recognised(own, capsys):
    save_masks(own)
    stamp = convert(own) / 'prepared.json'
    text = stamp.read_text()
    assert text.count('"custom"') == 1
    stamp.write_text(text.replace('"custom"', '"masks"'))
    capsys.readouterr()
    convert(own)
    assert 'is ready: custom' in capsys.readouterr().out


# ------------------------------------------------- colours
def test_masks_of_colours(own, refusal):
    colours = np.uint8([[10, 20, 30], [200, 0, 0], [1, 1, 1]])
    for i in range(6):
        Image.fromarray(colours[draw(i)]).save(own / 'masks' / f'p {i}.png')
    line = refusal()
    assert '200 0 0' in line and '--classes' in line
    names = own / 'names.txt'
    classes = ['--classes', str(names)]
    names.write_text('void 1 1 1\nground 10 20 30\n')
    line = refusal(*classes)
    assert 'the colour 200 0 0 in' in line and 'p 0.png' in line
    names.write_text('void 1 1 1\nground 10 20 30\nroof 200 0 0\n')
    assert 'or remove this one' in refusal(*classes)
    convert(own, *classes, '--to', str(own / 'new'))
    root = own / 'new'
    for i in range(6):
        np.testing.assert_array_equal(load_label(root, f'p {i}'),
                                      np.array([0, 1, 255])[draw(i)])
    assert (root / 'classes.txt').read_text() == (
        'ground 10 20 30\nroof 200 0 0\n')


def test_grey_masks_by_colour(own, refusal):
    save_masks(own, (0, 128, 254))
    line = refusal()
    assert 'hold 0, 128, 254' in line and '--by-colour' in line
    names = own / 'names.txt'
    names.write_text('a 0 0 0\nb 128 128 128\nc 254 254 254\n')
    root = convert(own, '--classes', str(names), '--by-colour')
    np.testing.assert_array_equal(load_label(root, 'p 3'), draw(3))


# ------------------------------------------------- JSON in COCO's format
def test_polygons(own, refusal):
    pytest.importorskip('pycocotools')
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
    root = convert(own, masks='own.json')
    assert (root / 'classes.txt').read_text() == (
        'background 0 0 0\na b 128 0 0\nroof 0 128 0\n')
    assert len(split_ids(root, 'train') + split_ids(root, 'val')) == 5
    np.testing.assert_array_equal(load_label(root, 'p 0'),
                                  boxes((2, 2, 10, 3, 9)))
    np.testing.assert_array_equal(load_label(root, 'p 1'), boxes(
        (255, 5, 9, 5, 9), (1, 6, 20, 3, 9)))
    assert not load_label(root, 'p 2').any()
    data['images'][0]['file_name'] = 'gone.jpg'
    path.write_text(json.dumps(data))
    new = ['--to', str(own / 'new')]
    assert 'gone.jpg is not there' in refusal(*new, masks='own.json')
    data['annotations'][0]['category_id'] = 8
    path.write_text(json.dumps(data))
    assert 'are of [8] too' in refusal(*new, masks='own.json')


# ------------------------------------------------- what is refused
def spoil(own, what):
    """Spoil the sixth image's files; return what the message names."""
    image, mask = own / 'photos' / 'p 5.jpg', own / 'masks' / 'p 5.png'
    if what == 'no mask':
        mask.unlink()
        return 'p 5.jpg has no mask'
    if what == 'size':
        Image.fromarray(draw(5)[:30]).save(mask)
        return f'{image} cannot be used (60 x 40 pixels, its mask 60 x 30)'
    if what == 'truncated mask':
        os.truncate(mask, 60)
        return f'{mask} cannot be read as a mask'
    if what == 'truncated image':
        os.truncate(image, 500)
        return f'{image} cannot be used'
    if what == 'two':
        (own / 'photos' / 'p 5.png').write_bytes(b'')
        return 'p 5.jpg and p 5.png have one name'
    Image.fromarray(np.uint8([[1, 2, 3]])).convert('RGB').save(mask)
    return 'p 5.png is coloured, others are not'


@pytest.mark.parametrize('what', ('no mask', 'size', 'truncated mask', 'two',
                                  'truncated image', 'coloured'))
def test_what_cannot_be_used_is_named(own, refusal, what):
    save_masks(own)
    assert spoil(own, what) in refusal()
    if what == 'size':                          # mended, it is resumed
        Image.fromarray(draw(9)).save(own / 'masks' / 'p 5.png')
        np.testing.assert_array_equal(load_label(convert(own), 'p 5'),
                                      draw(9))


@pytest.mark.parametrize('words, masks, part', (
    (('--val', '1.5'), 'masks', 'a share between'),
    ((), 'gone', 'no such folder'),
    ((), 'photos', 'has no masks'),
    (('--white', 'void'), 'own.json', 'are for a folder'),
    ((), 'own.json', "'categories' is not there"),
    (('--classes', 'gone.txt'), 'masks', 'gone.txt is not there')))
def test_options_that_cannot_be_are_refused(own, refusal, words, masks, part):
    save_masks(own)
    (own / 'own.json').write_text('{}')
    assert part in refusal(*words, masks=masks)


def test_rotated_and_other_images(own):
    """An image is rotated as its mask is, and becomes a JPEG."""
    save_masks(own)
    exif = Image.Exif()
    exif[custom.ORIENTATION] = 6                # shown rotated to the right
    photos = own / 'photos'
    (photos / 'p 0.jpg').write_bytes(smooth_image(0, exif=exif))
    Image.fromarray(draw(0).T.copy()).save(own / 'masks' / 'p 0.png')
    (photos / 'p 1.jpg').write_bytes(smooth_image(1, exif=exif))  # as stored
    (photos / 'p 2.jpg').unlink()
    Image.open(io.BytesIO(smooth_image(2))).convert('RGBA').save(
        photos / 'p 2.png')
    root = convert(own)
    upright = images.read_image(layout.image_path(root, 'p 0'))
    stored = np.array(Image.open(io.BytesIO(smooth_image(0))))
    assert upright.shape == (60, 40, 3)
    assert np.abs(np.rot90(stored, -1).astype(int) - upright).max() < 12
    for i in (1, 2):
        found = images.read_image(layout.image_path(root, f'p {i}'))
        wanted = np.array(Image.open(io.BytesIO(smooth_image(i))))
        assert np.abs(wanted.astype(int) - found).max() < 12
