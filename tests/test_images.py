"""Are images and labels read as they are stored, written whole, and all that
is no image or label refused by name? Class files and palettes too.

    python -m pytest tests/test_images.py

Files are written by the tests, with values known by hand; real VOC labels are
read where ../shared is there.
"""
import os

import numpy as np
import pytest
from PIL import Image

from files import contents, expect_error, jpeg, png
from lib.images import (
    full_palette,
    image_size,
    read_any_image,
    read_classes,
    read_image,
    read_label,
    save_image,
    save_label,
    voc_palette,
)
from utils import UserError


# ------------------------------------------------- labels
@pytest.mark.parametrize('depth', [1, 2, 4, 8])
@pytest.mark.parametrize('kind', [0, 3], ids=['grey', 'palette'])
def test_read_label_gives_the_indices(depth, kind, tmp_path):
    values = np.random.default_rng(0).integers(0, 2 ** depth, (6, 5))
    values[0, :2] = 0, 2 ** depth - 1
    (tmp_path / 'x.png').write_bytes(png(values, depth, kind))
    label = read_label(str(tmp_path / 'x.png'))
    assert label.dtype == np.uint8 and (label == values).all()


def test_read_label_refuses_16_bits(tmp_path):
    path = tmp_path / 'x.png'
    path.write_bytes(png(np.arange(20).reshape(4, 5), 16, 0))
    expect_error(lambda: read_label(str(path)), path, 'PNG of mode I')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_read_label_refuses_colours(mode, tmp_path):
    path = tmp_path / 'x.png'
    Image.new(mode, (5, 4)).save(path)
    expect_error(lambda: read_label(str(path)), path, f'PNG of mode {mode};')


@pytest.mark.parametrize('kept', [0, 10, 30, 0.5, -100])
def test_read_label_names_a_truncated_file(kept, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40))
    data, path = png(noise, 8, 0), tmp_path / 'x.png'
    path.write_bytes(data[:int(kept * len(data)) if kept == 0.5 else kept])
    expect_error(lambda: read_label(str(path)), path,
                 'cannot be read as a PNG')


def test_read_label_refuses_a_jpeg_called_png(tmp_path):
    path = tmp_path / 'x.png'
    jpeg(path, mode='L')
    expect_error(lambda: read_label(str(path)), path,
                 'cannot be read as a PNG')


def test_read_label_on_real_palettes(shared):
    """The README there says: every class but aeroplane."""
    root = os.path.join(shared, 'data', 'voc_fixture')
    found = set()
    for name in os.listdir(os.path.join(root, 'SegmentationClassAug')):
        found.update(np.unique(read_label(
            os.path.join(root, 'SegmentationClassAug', name))))
    assert found == {0, 255, *range(2, 21)}


# ------------------------------------------------- images
def test_read_image_gives_rgb(tmp_path):
    Image.new('RGB', (5, 4), (200, 90, 10)).save(tmp_path / 'x.jpg')
    image = read_image(str(tmp_path / 'x.jpg'))
    assert image.shape == (4, 5, 3) and image.dtype == np.uint8
    assert abs(image - np.array([200., 90, 10])).max() <= 3


@pytest.mark.parametrize('progressive', [False, True])
def test_read_image_agrees_with_pillow(progressive, tmp_path):
    path = tmp_path / 'x.jpg'
    jpeg(path, progressive=progressive)
    found = read_image(str(path)).astype(int)
    slow = np.array(Image.open(path), int)
    assert abs(found - slow).max() <= 2 and abs(found - slow).mean() < 0.1


def test_read_image_makes_grey_three_channels(tmp_path):
    path = tmp_path / 'x.jpg'
    jpeg(path, mode='L')
    image = read_image(str(path))
    assert image.shape == (30, 40, 3)
    assert (image == np.array(Image.open(path))[..., None]).all()


def test_read_image_leaves_the_orientation(tmp_path):
    """EXIF may say 'turn it'; the label's rows are as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / 'x.jpg'
    jpeg(path)
    plain = read_image(str(path))
    jpeg(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    assert (read_image(str(path)) == plain).all()
    assert image_size(str(path)) == (30, 40)


@pytest.mark.parametrize('extra', [bytes(10), bytes(1000), b'abc' * 300],
                         ids=['zero', 'zeros', 'other'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_read_image_accepts_bytes_after_the_end(extra, mode, tmp_path):
    path = tmp_path / 'x.jpg'
    data = jpeg(path, mode=mode)
    plain = read_image(str(path)).astype(int)
    path.write_bytes(data + extra)
    found = read_image(str(path))
    assert found.shape == plain.shape and abs(found - plain).max() <= 2


@pytest.mark.parametrize('kept', [0, 2, 100, 0.5, -2])
@pytest.mark.parametrize('progressive', [False, True])
def test_read_image_refuses_a_truncated_jpeg(kept, progressive, tmp_path):
    path = tmp_path / 'x.jpg'
    data = jpeg(path, progressive=progressive)
    path.write_bytes(data[:int(kept * len(data)) if kept == 0.5 else kept])
    expect_error(lambda: read_image(str(path)), path,
                 'cannot be read as an image', 'take its id from the list')


@pytest.mark.parametrize('data', [b'<html></html>', b'\xff\xd8\xff\xd9'])
def test_read_image_refuses_what_is_no_image(data, tmp_path):
    path = tmp_path / 'x.jpg'
    path.write_bytes(data)
    for read in (read_image, image_size):
        expect_error(lambda read=read: read(str(path)), path)


def test_an_image_of_absurd_size_is_named(tmp_path):
    """A corrupt header: OpenCV's error has two lines, Pillow's is its own."""
    path = tmp_path / 'x.jpg'
    data = jpeg(path)
    at = data.index(b'\xff\xc0') + 5                 # height, width
    path.write_bytes(data[:at] + b'\xff\xdc\xff\xdc' + data[at + 4:])
    for read in (read_image, image_size):
        expect_error(lambda read=read: read(str(path)), path)


# ------------------------------------------------- writing
def test_images_are_written_beside_and_renamed(tmp_path):
    """What links of their names lead to stays as it is."""
    image, names = np.full((8, 8, 3), 200, np.uint8), ('a.jpg', 'a.png')
    for name in names:
        (tmp_path / f'{name}.mine').write_text('mine')
        for link in (name, f'{name}.tmp'):
            (tmp_path / link).symlink_to(f'{name}.mine')
        save_image(image, str(tmp_path / name))
        assert (tmp_path / f'{name}.mine').read_text() == 'mine'
        assert not (tmp_path / name).is_symlink()
        assert np.abs(read_any_image(tmp_path / name) - 200.).max() < 3
    with pytest.raises(TypeError):          # in the midst of it
        save_image(np.zeros((1, 1, 7)), str(tmp_path / 'a.png'))
    assert np.array_equal(read_any_image(tmp_path / 'a.png'), image)
    assert {path.name for path in tmp_path.iterdir()} == {
        *names, *(f'{name}.mine' for name in names)}


@pytest.mark.parametrize('n', [2, 6, 21, 256])
def test_save_label_round_trip(n, tmp_path):
    """Every value comes back, void too, however few the colours."""
    label = np.random.default_rng(0).integers(0, n, (7, 5), np.uint8)
    label[0, :2] = n - 1, 255
    colours = voc_palette()[:n]
    save_label(label, str(tmp_path / 'x.png'), colours)
    image = Image.open(tmp_path / 'x.png')
    assert (image.format, image.mode) == ('PNG', 'P')
    assert (np.array(image) == label).all()
    assert image.getpalette()[:3 * n] == colours.ravel().tolist()
    assert len(contents(tmp_path)) == 1


# ------------------------------------------------- classes and colours
def test_voc_palette():
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0),
             4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128),
             20: (0, 64, 128), 255: (224, 224, 192)}
    for number, colour in known.items():
        assert tuple(palette[number]) == colour
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_full_palette():
    palette = full_palette([[1, 2, 3], [4, 5, 6]])
    assert palette[:3].tolist() == [[1, 2, 3], [4, 5, 6], [0, 128, 0]]
    assert palette.shape == (256, 3)
    assert palette[255].tolist() == [224, 224, 192]


def test_read_classes(tmp_path):
    (tmp_path / 'classes.txt').write_text(
        'background 0 0 0\ntraffic light 250 170 30\n\nlevel 2 1 2 255\n')
    assert read_classes(str(tmp_path), 3) == (
        ['background', 'traffic light', 'level 2'],
        [[0, 0, 0], [250, 170, 30], [1, 2, 255]])


def test_read_classes_without_a_file(tmp_path):
    assert read_classes(str(tmp_path), 3) == (
        ['0', '1', '2'], [[0, 0, 0], [128, 0, 0], [0, 128, 0]])


def test_read_classes_refuses_another_number(tmp_path):
    (tmp_path / 'classes.txt').write_text('a 0 0 0\nb 1 1 1\n')
    with pytest.raises(UserError, match=(
            'N_CLASSES=21, but .*classes.txt names 2 .* set N_CLASSES=2')):
        read_classes(str(tmp_path), 21)


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_read_classes_of_other_systems(tmp_path, encoding):
    """With a byte-order mark, and CRLF."""
    (tmp_path / 'classes.txt').write_bytes(
        'a 0 0 0\r\nb\u00e9 1 1 1\r\n\r\n'.encode(encoding))
    assert read_classes(str(tmp_path), 2) == (
        ['a', 'b\u00e9'], [[0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize('text, part', [
    (b'a 0 0 0\nb\xe9 1 1 1\n', 'classes.txt is neither UTF-8 nor UTF-16'),
    ('a 0 0 0\n'.encode('utf-16-le'), 'is neither UTF-8 nor UTF-16'),
    (b'a\0b 0 0 0\n', 'is neither UTF-8 nor UTF-16'),
    (b'a b 0 0 0\nc 1 1 1\na  b 2 2 2\n', 'names the class a b twice'),
    (b'\n', 'names no class')])
def test_read_classes_refuses_a_file(text, part, tmp_path):
    (tmp_path / 'classes.txt').write_bytes(text)
    with pytest.raises(UserError, match=part):
        read_classes(str(tmp_path), 2)


def test_read_classes_refuses_what_is_no_file(tmp_path):
    path = tmp_path / 'classes.txt'
    path.mkdir()
    with pytest.raises(UserError, match='classes.txt is a folder'):
        read_classes(str(tmp_path), 3)
    path.rmdir()
    path.symlink_to('gone')
    with pytest.raises(UserError, match='classes.txt is not there'):
        read_classes(str(tmp_path), 3)
    path.unlink()
    path.touch()
    os.truncate(path, 2 ** 31)
    with pytest.raises(UserError, match='classes.txt has 2,147,483,648 byte'):
        read_classes(str(tmp_path), 3)


@pytest.mark.parametrize('line', (9 * '1' + ' 1 1', 'b 1 2 ' + 5000 * '1',
                                  101 * 'b' + ' 1 2 3', 10 ** 6 * 'b ',
                                  'b\x1b[31m 1 2 3'))
def test_read_classes_names_a_line_of_any_length_in_short(line, tmp_path):
    (tmp_path / 'classes.txt').write_text(f'a 0 0 0\n{line}\n')
    with pytest.raises(UserError, match='classes.txt: the line') as error:
        read_classes(str(tmp_path), 2)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize('line', ['b', 'b 1 2', '1 2 3', 'b 1 2 256',
                                  'b 1 2 -3', 'b 1 2 x', 'b 0.1 2 3'])
def test_read_classes_names_a_bad_line(line, tmp_path):
    (tmp_path / 'classes.txt').write_text(f'a 0 0 0\n{line}\n')
    with pytest.raises(UserError, match=f"classes.txt: the line '{line}'"):
        read_classes(str(tmp_path), 2)
