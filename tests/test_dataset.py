"""Are the pixels the right ones, and is every fault of a set named?

    python -m pytest tests/test_dataset.py

Sets of a few pictures are written by the tests, with values known by hand;
toy is used where any set will do, real VOC labels where ../shared is there.
"""
import itertools
import math
import os
import shutil
import signal
import struct
import traceback
import zlib
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import settings
import utils
from conftest import SMALL, refused, run, words

FILL = (124, 116, 104)       # 255 * (0.485, 0.456, 0.406), rounded by hand


# ------------------------------------------------- writing sets
@pytest.fixture
def root(tmp_path):
    """An empty set; DATA_ROOT names it."""
    root = tmp_path / 'set'
    for folder in ('JPEGImages', 'SegmentationClassAug',
                   'ImageSets/Segmentation'):
        (root / folder).mkdir(parents=True)
    vars(settings).update(SMALL, DATA_ROOT=str(root))
    return root


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the toy set, to be spoilt; DATA_ROOT names it."""
    shutil.copytree(toy, tmp_path / 'set')
    vars(settings).update(SMALL, DATA_ROOT=str(tmp_path / 'set'))
    return tmp_path / 'set'


def image_path(root, name):
    return root / 'JPEGImages' / f'{name}.jpg'


def label_path(root, name):
    return root / 'SegmentationClassAug' / f'{name}.png'


def list_path(root, split):
    return root / 'ImageSets' / 'Segmentation' / f'{split}.txt'


def add(root, name, label, image=None, split='train'):
    """Add a sample to a set; the picture is grey where none is given."""
    label = np.asarray(label, np.uint8)
    if image is None:
        image = np.full((*label.shape, 3), 128, np.uint8)
    Image.fromarray(image).save(image_path(root, name), quality=100,
                                subsampling=0)
    Image.fromarray(label).save(label_path(root, name))
    with open(list_path(root, split), 'a') as file:
        file.write(name + '\n')


def png(values, depth, kind):
    """Return a PNG file by hand; kind: 0 grey, 3 palette."""
    def chunk(name, data):
        return (struct.pack('>I', len(data)) + name + data
                + struct.pack('>I', zlib.crc32(name + data)))
    bits = values[..., None] >> np.arange(depth - 1, -1, -1) & 1
    rows = [np.packbits(row).tobytes() for row in bits.reshape(
        len(values), -1)]
    palette = chunk(b'PLTE', bytes(3 * 2 ** depth)) if kind == 3 else b''
    head = struct.pack('>IIBBBBB', *values.shape[::-1], depth, kind, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + palette
            + chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row
                                                    for row in rows)))
            + chunk(b'IEND', b''))


def jpeg(path, size=(40, 30), mode='RGB', **options):
    """Write noise as a JPEG file; return its bytes."""
    shape = size[::-1] + (3,) * (mode == 'RGB')
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(noise).save(path, 'JPEG', **options)
    return path.read_bytes()


def bad(call, path, *parts):
    """The call is refused in one line that begins with the file's name;
    returns the error."""
    with pytest.raises(dataset.BadSample) as error:
        call()
    text = str(error.value)
    assert text.startswith(f'{path} ') and '\n' not in text
    for part in parts:
        assert part in text
    return error.value


# ------------------------------------------------- labels
@pytest.mark.parametrize('depth', [1, 2, 4, 8])
@pytest.mark.parametrize('kind', [0, 3], ids=['grey', 'palette'])
def test_read_label_gives_the_indices(depth, kind, tmp_path):
    values = np.random.default_rng(0).integers(0, 2 ** depth, (6, 5))
    values[0, :2] = 0, 2 ** depth - 1
    (tmp_path / 'x.png').write_bytes(png(values, depth, kind))
    label = dataset.read_label(str(tmp_path / 'x.png'))
    assert label.dtype == np.uint8 and (label == values).all()


def test_read_label_refuses_16_bits(tmp_path):
    path = tmp_path / 'x.png'
    path.write_bytes(png(np.arange(20).reshape(4, 5), 16, 0))
    bad(lambda: dataset.read_label(str(path)), path, 'PNG of mode I')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_read_label_refuses_colours(mode, tmp_path):
    path = tmp_path / 'x.png'
    Image.new(mode, (5, 4)).save(path)
    bad(lambda: dataset.read_label(str(path)), path, f'PNG of mode {mode};')


@pytest.mark.parametrize('kept', [0, 10, 30, 0.5, -100])
def test_read_label_names_a_truncated_file(kept, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40))
    data, path = png(noise, 8, 0), tmp_path / 'x.png'
    path.write_bytes(data[:int(kept * len(data)) if kept == 0.5 else kept])
    bad(lambda: dataset.read_label(str(path)), path, 'cannot be read as a PNG')


def test_read_label_refuses_a_jpeg_called_png(tmp_path):
    path = tmp_path / 'x.png'
    jpeg(path, mode='L')
    bad(lambda: dataset.read_label(str(path)), path, 'cannot be read as a PNG')


def test_read_label_on_real_palettes(shared):
    """The README there says: every class but aeroplane."""
    root = os.path.join(shared, 'data', 'voc_fixture')
    found = set()
    for name in os.listdir(os.path.join(root, 'SegmentationClassAug')):
        found.update(np.unique(dataset.read_label(
            os.path.join(root, 'SegmentationClassAug', name))))
    assert found == {0, 255, *range(2, 21)}


# ------------------------------------------------- pictures
def test_read_image_gives_rgb(tmp_path):
    Image.new('RGB', (5, 4), (200, 90, 10)).save(tmp_path / 'x.jpg')
    image = dataset.read_image(str(tmp_path / 'x.jpg'))
    assert image.shape == (4, 5, 3) and image.dtype == np.uint8
    assert abs(image - np.array([200., 90, 10])).max() <= 3


@pytest.mark.parametrize('progressive', [False, True])
def test_read_image_agrees_with_pillow(progressive, tmp_path):
    path = tmp_path / 'x.jpg'
    jpeg(path, progressive=progressive)
    found = dataset.read_image(str(path)).astype(int)
    slow = np.array(Image.open(path), int)
    assert abs(found - slow).max() <= 2 and abs(found - slow).mean() < 0.1


def test_read_image_makes_grey_three_channels(tmp_path):
    path = tmp_path / 'x.jpg'
    jpeg(path, mode='L')
    image = dataset.read_image(str(path))
    assert image.shape == (30, 40, 3)
    assert (image == np.array(Image.open(path))[..., None]).all()


def test_read_image_leaves_the_orientation(tmp_path):
    """EXIF may say 'turn it'; the label's rows are as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / 'x.jpg'
    jpeg(path)
    plain = dataset.read_image(str(path))
    jpeg(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    assert (dataset.read_image(str(path)) == plain).all()
    assert dataset.image_size(str(path)) == (30, 40)


@pytest.mark.parametrize('extra', [bytes(10), bytes(1000), b'abc' * 300],
                         ids=['zero', 'zeros', 'other'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_read_image_bears_bytes_after_the_end(extra, mode, tmp_path):
    path = tmp_path / 'x.jpg'
    data = jpeg(path, mode=mode)
    plain = dataset.read_image(str(path)).astype(int)
    path.write_bytes(data + extra)
    found = dataset.read_image(str(path))
    assert found.shape == plain.shape and abs(found - plain).max() <= 2


@pytest.mark.parametrize('kept', [0, 2, 100, 0.5, -2])
@pytest.mark.parametrize('progressive', [False, True])
def test_read_image_refuses_a_truncated_jpeg(kept, progressive, tmp_path):
    path = tmp_path / 'x.jpg'
    data = jpeg(path, progressive=progressive)
    path.write_bytes(data[:int(kept * len(data)) if kept == 0.5 else kept])
    bad(lambda: dataset.read_image(str(path)), path,
        'cannot be read as a picture', 'take its id from the list')


@pytest.mark.parametrize('data', [b'<html></html>', b'\xff\xd8\xff\xd9'])
def test_read_image_refuses_what_is_no_picture(data, tmp_path):
    path = tmp_path / 'x.jpg'
    path.write_bytes(data)
    for read in (dataset.read_image, dataset.image_size):
        bad(lambda read=read: read(str(path)), path)


def test_a_picture_of_absurd_size_is_named(tmp_path):
    """A spoilt header: OpenCV's error has two lines, Pillow's is its own."""
    path = tmp_path / 'x.jpg'
    data = jpeg(path)
    at = data.index(b'\xff\xc0') + 5                 # height, width
    path.write_bytes(data[:at] + b'\xff\xdc\xff\xdc' + data[at + 4:])
    for read in (dataset.read_image, dataset.image_size):
        bad(lambda read=read: read(str(path)), path)


# ------------------------------------------------- lists
def test_read_ids_keeps_the_order(root):
    list_path(root, 'train').write_text('b\n\n a \nsub/c')
    assert dataset.read_ids(str(root), 'train') == ['b', 'a', 'sub/c']


def test_read_ids_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=(
            f'^DATA_ROOT={tmp_path}/x: no such folder; .*prepare.py')):
        dataset.read_ids(f'{tmp_path}/x', 'train')


def test_read_ids_names_the_splits_there_are(root):
    with pytest.raises(FileNotFoundError, match='test.txt .* are: none$'):
        dataset.read_ids(str(root), 'test')
    for split in 'vtabz':
        list_path(root, split).write_text('a\n')
    with pytest.raises(FileNotFoundError,
                       match='test.txt is not there; .* a, b, t, v, z$'):
        dataset.read_ids(str(root), 'test')
    shutil.rmtree(root / 'ImageSets')
    with pytest.raises(FileNotFoundError, match='test.txt .* are: none$'):
        dataset.read_ids(str(root), 'test')


def test_read_ids_refuses_an_empty_list(root):
    list_path(root, 'train').write_text('\n \n')
    with pytest.raises(ValueError, match='train.txt is empty'):
        dataset.read_ids(str(root), 'train')


def test_read_ids_derives_trainaug(root):
    for name in 'dbac':
        add(root, name, [[0]], split='val' if name in 'bc' else 'train')
    (root / 'SegmentationClassAug' / 'notes.txt').touch()
    assert dataset.read_ids(str(root), 'trainaug') == ['a', 'd']
    list_path(root, 'trainaug').write_text('d\nb\n')
    assert dataset.read_ids(str(root), 'trainaug') == ['d', 'b']


def test_read_ids_derives_trainaug_of_real_data(shared, tmp_path):
    real = os.path.join(shared, 'data', 'voc_fixture')
    for folder in os.listdir(real):
        os.symlink(os.path.join(real, folder), tmp_path / folder)
    os.remove(tmp_path / 'ImageSets')
    shutil.copytree(os.path.join(real, 'ImageSets'), tmp_path / 'ImageSets')
    os.remove(list_path(tmp_path, 'trainaug'))
    assert dataset.read_ids(str(tmp_path), 'trainaug') == sorted(
        dataset.read_ids(real, 'trainaug'))


# ------------------------------------------------- faults of a set
@pytest.mark.parametrize('path', [image_path, label_path])
def test_a_missing_file_is_named(path, root):
    for name in 'ab':
        add(root, name, [[0, 1]])
    path(root, 'b').unlink()
    with pytest.raises(FileNotFoundError, match=(
            f'^{path(root, "b")} is not there, but train.txt')):
        dataset.Segmentation('train', train=False)


def test_a_label_value_outside_the_classes_is_named(root):
    add(root, 'a', [[0, 5, 255]])
    add(root, 'b', [[0, 6, 255]])                    # N_CLASSES is 6
    data = dataset.Segmentation('train', train=True)
    data[0]
    for call in (lambda: data[1], data.check):
        bad(call, label_path(root, 'b'), 'the label value 6;', '0 to 5 ',
            'N_CLASSES=6', '255')


def test_another_ignore_label_holds(root):
    settings.IGNORE_LABEL = 9
    add(root, 'a', [[0, 1, 9]])
    add(root, 'b', [[0, 1, 255]])
    data = dataset.Segmentation('train', train=True)
    assert set(data[0][1].unique().tolist()) == {0, 1, 9}
    bad(lambda: data[1], label_path(root, 'b'), 'the label value 255;')


def test_sizes_that_differ_are_named(root):
    add(root, 'a', np.ones((4, 6)), np.zeros((6, 4, 3), np.uint8))
    data = dataset.Segmentation('train', train=True)
    for call in (lambda: data[0], data.check):
        bad(call, image_path(root, 'a'), '4 x 6 pixels, its label 6 x 4;')


def test_check_counts_pixels(root):
    add(root, 'a', [[0, 5, 255]])
    add(root, 'b', [[0, 0, 2]])
    counts = dataset.Segmentation('train', train=True).check()
    assert {i: counts[i] for i in counts.nonzero()[0]} == {
        0: 3, 2: 1, 5: 1, 255: 1}


@pytest.mark.parametrize('data', [b'', b'\xff\xd8\xff'])
def test_check_names_a_spoilt_file(data, copy):
    data_set = dataset.Segmentation('train', train=True)
    for path in (image_path, label_path):
        spoilt = path(copy, data_set.ids[3])
        whole = spoilt.read_bytes()
        spoilt.write_bytes(data)
        bad(data_set.check, spoilt)
        spoilt.write_bytes(whole)
    data_set.check()


def test_check_refuses_masks_of_0_and_255(root):
    add(root, 'a', [[0, 255, 255]])
    add(root, 'b', [[0, 0, 255]])
    data = dataset.Segmentation('train', train=True)
    with pytest.raises(ValueError, match='train hold 0 and 255 alone'):
        data.check()
    add(root, 'c', [[0, 1, 255]])                    # one object is enough
    dataset.Segmentation('train', train=True).check()


# ------------------------------------------------- samples
def test_an_item_as_it_is_stored(small):
    data = dataset.Segmentation('val', train=False)
    assert len(data) == 5
    for i in range(5):
        image, label, name = data[i]
        assert name == data.ids[i] == f'toy_{i:04d}'
        assert image.dtype == label.dtype == torch.uint8
        assert image.shape == (3, *label.shape)
        stored = np.array(Image.open(f'{data.root}/JPEGImages/{name}.jpg'))
        assert abs(image.permute(1, 2, 0).numpy() - stored.astype(int)
                   ).max() <= 2
        stored = Image.open(f'{data.root}/SegmentationClassAug/{name}.png')
        assert (label.numpy() == np.array(stored)).all()


def test_an_augmented_item(small):
    data = dataset.Segmentation('train', train=True)
    for key in itertools.product(range(5), range(12)):
        image, label, name = data[key]
        assert name == data.ids[key[1]]
        assert image.shape == (3, 65, 65) and label.shape == (65, 65)
        assert image.dtype == label.dtype == torch.uint8
        assert set(label.unique().tolist()) <= {0, 1, 2, 3, 4, 5, 255}


def test_an_item_follows_from_its_key(small):
    data = dataset.Segmentation('train', train=True)
    again = dataset.Segmentation('train', train=True)
    settings.SEED += 1
    other = dataset.Segmentation('train', train=True)

    def bytes_of(data, key):
        return data[key][0].numpy().tobytes()
    for i in range(12):
        first = bytes_of(data, (0, i))
        assert first == bytes_of(again, i) == bytes_of(data, (0, i))
        assert len({first, bytes_of(data, (1, i)), bytes_of(data, (2, i)),
                    bytes_of(other, (0, i))}) == 4


def test_equal_pictures_are_augmented_differently(root):
    for name in 'abcdefgh':
        add(root, name, np.random.default_rng(0).integers(0, 6, (90, 90)))
    data = dataset.Segmentation('train', train=True)
    assert len({data[i][1].numpy().tobytes() for i in range(8)}) == 8


def test_padding_is_the_mean_colour_at_right_and_bottom(root):
    settings.SCALES = (1.5,)
    add(root, 'a', np.ones((20, 30)), np.full((20, 30, 3), 250, np.uint8))
    image, label, _ = dataset.Segmentation('train', train=True)[2, 0]
    if label[0, 0] == 255:                           # a flipped one
        image, label = image.flip(2), label.flip(1)
    inside = torch.zeros(65, 65, dtype=torch.bool)
    inside[:30, :45] = True                          # 1.5 times 20 x 30
    assert (label[inside] == 1).all() and (label[~inside] == 255).all()
    assert (image[:, inside] >= 249).all()
    assert (image[:, ~inside] == torch.tensor(FILL)[:, None]).all()


def test_padding_is_about_0_when_normalised():
    fill = torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1)
    assert dataset.normalise(fill, 'cpu').abs().max() < 0.5 / 255 / 0.224


@pytest.mark.parametrize('scale', [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize('axis', ['x', 'y'])
def test_scaling_is_on_the_half_pixel_grid(scale, axis, root):
    """Output pixel i shows the place (i + 0.5) / scale - 0.5: the image
    interpolated, the label that of the nearest pixel."""
    settings.SCALES = (scale,)
    add(root, 'a', [[1]])
    data = dataset.Segmentation('train', train=True)
    label = np.tile(np.arange(30, dtype=np.uint8), (30, 1))
    label = label if axis == 'x' else label.T
    image, label = data.augment((7 * label)[..., None].repeat(3, 2), label,
                                np.random.default_rng(0))
    if label[0, 0] == 255:                           # a flipped one
        image, label = image[:, ::-1], label[:, ::-1]
    n = int(np.ceil(30 * scale - 0.5))               # half a pixel is cut off
    line = np.s_[0, :n] if axis == 'x' else np.s_[:n, 0]
    place = ((np.arange(n) + 0.5) / scale - 0.5).clip(0, 29)
    assert (label[:n, :n] < 30).all() and (label != 255).sum() == n * n
    assert abs(image[line][:, 0] - 7 * place).max() <= 1
    assert abs(label[line] - place).max() < 0.51


def plain_augment(data, image, label, random):
    """The recipe with the whole image scaled, padded, then cropped."""
    scale = data.scales[random.integers(len(data.scales))]
    if scale != 1:
        y, x = (np.minimum(((np.arange(round(side * scale + 1)) + 0.5)
                            / scale).astype(int), side - 1)
                for side in label.shape)
        image = cv2.resize(image, None, fx=scale, fy=scale,
                           interpolation=cv2.INTER_LINEAR_EXACT)
        h, w = (math.ceil(side * Fraction(str(scale)) - Fraction(1, 2))
                for side in label.shape)
        image, label = image[:h, :w], label[y[:h, None], x[:w]]
    down, right = (max(0, data.crop - side) for side in label.shape)
    image = np.stack([np.pad(image[..., i], ((0, down), (0, right)),
                             constant_values=FILL[i]) for i in range(3)], 2)
    label = np.pad(label, ((0, down), (0, right)), constant_values=255)
    y, x = (random.integers(side - data.crop + 1) for side in label.shape)
    image, label = (part[y:y + data.crop, x:x + data.crop]
                    for part in (image, label))
    turn = -1 if random.random() < 0.5 else 1
    return image[:, ::turn], label[:, ::turn]


def test_a_window_is_bit_equal_to_the_whole(root):
    """Random sizes, scales and crops, the odd and the large among them."""
    add(root, 'a', [[1]])
    data = dataset.Segmentation('train', train=True)
    draw = np.random.default_rng(7)
    several = settings.SCALES + (1 / 3, 0.4, 0.6, 1.1, 0.123456, 3.0)
    for i in range(300):
        large = i % 20 == 0
        h, w = draw.integers(9, 2100 if large else 300, 2)
        data.scales = tuple(draw.choice(several[:7] if large else several, 2))
        data.crop = int(draw.integers(8, 200))
        image = draw.integers(0, 256, (h, w, 3), np.uint8)
        label = draw.integers(0, 21, (h, w), np.uint8)
        got = data.augment(image, label, np.random.default_rng(i))
        want = plain_augment(data, image, label, np.random.default_rng(i))
        for one, other in zip(got, want):
            np.testing.assert_array_equal(one, other)


def test_a_picture_of_a_pixel_bears_any_scale(root):
    add(root, 'a', [[1]])
    settings.SCALES = (0.1, 0.3)
    image, label, _ = dataset.Segmentation('train', train=True)[0]
    assert image.shape == (3, 65, 65) and (label == 1).sum() == 1


@pytest.mark.parametrize('scale', [0.5, 1.25, 2.0])
def test_image_and_label_stay_aligned(scale, root):
    """Black and white cells of 8 x 8 pixels, which JPEG keeps: a threshold
    on the image must give the label, to within the cells' corners."""
    cells = np.random.default_rng(0).integers(0, 2, (16, 20))
    label = cells.repeat(8, 0).repeat(8, 1)
    add(root, 'a', label, np.uint8(200 * label)[..., None].repeat(3, 2))
    settings.SCALES = (scale,)
    data = dataset.Segmentation('train', train=True)
    for epoch in range(20):
        image, label, _ = data[epoch, 0]
        known = label != 255
        agree = (image[0] > 100) == (label == 1)
        assert known.float().mean() > 0.9
        assert agree[known].float().mean() > 0.98


def test_flip_happens_half_the_time(root):
    settings.SCALES, settings.CROP_SIZE = (1.0,), 9
    add(root, 'a', np.tile(np.arange(9) // 5, (9, 1)))
    data = dataset.Segmentation('train', train=True)
    plain, flipped = data[0][1], data[0][1].flip(1)
    assert not torch.equal(plain, flipped)
    seen = [torch.equal(data[epoch, 0][1], plain) for epoch in range(400)]
    assert 160 < sum(seen) < 240                     # 4 standard deviations
    assert all(torch.equal(data[epoch, 0][1], plain if same else flipped)
               for epoch, same in enumerate(seen))


def test_all_scales_are_drawn_alike(root):
    """A label of 32 x 32 in a crop of 65 shows its scale by its area."""
    settings.SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    add(root, 'a', np.ones((32, 32)))
    data = dataset.Segmentation('train', train=True)
    sides = [int((data[epoch, 0][1] == 1).sum()) ** 0.5 / 32
             for epoch in range(700)]
    for scale in settings.SCALES:
        assert 63 < sides.count(scale) < 137         # 4 standard deviations
    assert set(sides) == set(settings.SCALES)


def test_all_crops_are_drawn(root):
    """A label that holds its row (or column) shows where a crop begins."""
    settings.SCALES, settings.CROP_SIZE, settings.N_CLASSES = (1.0,), 9, 12
    add(root, 'rows', np.tile(np.arange(12)[:, None], (1, 9)))
    add(root, 'columns', np.tile(np.arange(12), (9, 1)))
    data = dataset.Segmentation('train', train=True)
    for i in range(2):
        starts = [int(data[epoch, i][1].min()) for epoch in range(200)]
        assert {n: starts.count(n) > 25 for n in set(starts)} == {
            0: True, 1: True, 2: True, 3: True}


# ------------------------------------------------- batches
def batches(size, start=0, **values):
    vars(settings).update(values)
    return list(dataset.Batches(size, start))


def test_batches_are_permutations():
    keys = batches(12, BATCH_SIZE=4, ITER_MAX=9)
    assert [len(batch) for batch in keys] == [4] * 9
    orders = []
    for epoch in range(3):
        flat = sum(keys[3 * epoch:3 * epoch + 3], [])
        assert {key[0] for key in flat} == {epoch}
        orders.append([key[1] for key in flat])
        assert sorted(orders[-1]) == list(range(12)) != orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_drop_what_does_not_fill_one():
    keys = batches(11, BATCH_SIZE=4, ITER_MAX=7)
    assert [len(batch) for batch in keys] == [4] * 7
    assert [batch[0][0] for batch in keys] == [0, 0, 1, 1, 2, 2, 3]
    for first, second in zip(keys[::2], keys[1::2]):
        assert len(set(first + second)) == 8
    dropped = [set(range(11)) - {i for _, i in keys[2 * epoch]
                                 + keys[2 * epoch + 1]} for epoch in range(3)]
    assert len(set(map(frozenset, dropped))) > 1     # not always the same


def test_batches_from_a_step_are_those_of_the_whole():
    whole = batches(11, BATCH_SIZE=4, ITER_MAX=7)
    for start in range(8):
        assert batches(11, start) == whole[start:]
        assert len(dataset.Batches(11, start)) == 7 - start


def test_batches_follow_from_the_seed():
    first, same, other = (batches(12, BATCH_SIZE=4, ITER_MAX=3, SEED=seed)
                          for seed in (1, 1, 2))
    assert first == same != other


# ------------------------------------------------- loaders
def loaded(workers, start=0):
    settings.NUM_WORKERS = workers
    data = dataset.Segmentation('train', train=True)
    return list(dataset.train_loader(data, start))


def check_equal(batches, others):
    assert len(batches) == len(others) > 0
    for (image, label, names), (image2, label2, names2) in zip(
            batches, others):
        assert torch.equal(image, image2) and torch.equal(label, label2)
        assert list(names) == list(names2)


def test_train_loader_without_and_with_workers(small):
    settings.SEED, settings.ITER_MAX = 5, 8          # 6 batches an epoch
    alone = loaded(0)
    image, label, names = alone[0]
    assert image.shape == (2, 3, 65, 65) and label.shape == (2, 65, 65)
    assert image.dtype == label.dtype == torch.uint8 and len(names) == 2
    assert len({name for batch in alone[:6] for name in batch[2]}) == 12
    check_equal(alone, loaded(2))
    check_equal(alone[5:], loaded(0, start=5))


@pytest.mark.parametrize('workers', [0, 2])
def test_val_loader_keeps_the_order(workers, root):
    settings.NUM_WORKERS = workers
    for i, name in enumerate('bdac'):
        add(root, name, np.full((i + 1, 3), i), split='val')
    data = dataset.Segmentation('val', train=False)
    batches = list(dataset.val_loader(data))
    assert [names for _, _, names in batches] == [
        ('b',), ('d',), ('a',), ('c',)]
    assert [label.shape for _, label, _ in batches] == [
        (1, i + 1, 3) for i in range(4)]


def test_val_loader_puts_images_of_one_size_together(root):
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (6, 4), (5, 5), (4, 6)]
    for i, shape in enumerate(shapes):
        add(root, f'{i}', np.full(shape, i % 5), split='val')
    data = dataset.Segmentation('val', train=False)
    batches = list(dataset.val_loader(data, batch=3))
    assert [names for _, _, names in batches] == [
        ('0', '2', '3'), ('6',), ('1', '4'), ('5',)]
    for image, label, names in batches:
        for one, other, name in zip(image, label, names):
            alone = data[int(name)]
            assert torch.equal(one, alone[0]) and torch.equal(other, alone[1])
    shared = [name for rank in range(2) for batch in dataset.val_loader(
        data, rank, 2, batch=2) for name in batch[2]]
    assert sorted(shared) == list('0123456')


@pytest.mark.parametrize('workers', [0, 2])
def test_a_cached_set_gives_what_its_files_give(workers, small, monkeypatch):
    settings.SEED, settings.ITER_MAX = 5, 8
    want = loaded(0)
    settings.CACHE = True
    data = dataset.Segmentation('train', train=True)
    settings.NUM_WORKERS = workers
    loader = dataset.train_loader(data)
    for name in ('read_image', 'read_label'):       # nothing is decoded again
        monkeypatch.setattr(dataset, name, None)
    check_equal(want, list(loader))


def test_a_cache_larger_than_memory_is_refused(small, monkeypatch):
    settings.CACHE = True
    monkeypatch.setattr(dataset.os, 'sysconf', lambda name: 100)
    with pytest.raises(ValueError, match='CACHE=False'):
        dataset.train_loader(dataset.Segmentation('train', train=True))


@pytest.mark.parametrize('workers', [0, 1])
def test_loaders_leave_the_random_state_alone(workers, small):
    settings.NUM_WORKERS, settings.ITER_MAX = workers, 2
    before, numpys = torch.get_rng_state(), np.random.get_state()
    list(dataset.train_loader(dataset.Segmentation('train', train=True)))
    list(dataset.val_loader(dataset.Segmentation('val', train=False)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys[1]).all()


def test_train_loader_refuses_less_than_a_batch(small):
    data = dataset.Segmentation('train', train=True)
    settings.BATCH_SIZE = 12
    assert len(dataset.train_loader(data)) == 4
    settings.BATCH_SIZE = 13
    with pytest.raises(ValueError, match=(
            'BATCH_SIZE=13, but train has 12 images')):
        dataset.train_loader(data)


@pytest.mark.parametrize('data', [b'', png(np.full((9, 9), 77), 8, 0)],
                         ids=['empty', 'value 77'])
def test_a_workers_error_is_one_line(data, copy, monkeypatch, capsys):
    settings.NUM_WORKERS = 1
    spoilt = label_path(copy, 'toy_0001')
    spoilt.write_bytes(data)
    loader = dataset.val_loader(dataset.Segmentation('val', train=False))
    error = bad(lambda: list(loader), spoilt)
    assert 'in DataLoader worker process' in error.args[0]
    traceback.clear_frames(error.__traceback__)      # ends the worker now

    def main():
        raise error
    status, line = refused(main, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and line == f'script.py: {error}'


class Probe(torch.utils.data.Dataset):
    """The label of its one item says what its process does on signals, and
    how many threads it computes with."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        found = [signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
                 signal.getsignal(signal.SIGTERM) is signal.SIG_IGN,
                 cv2.getNumThreads()]
        return torch.zeros(3, 1, 1), torch.tensor(found), 'probe'


def test_a_worker_leaves_signals_to_the_main_process():
    utils.StopRequest()                              # which workers inherit
    settings.NUM_WORKERS = 1
    (_, found, _), = dataset.val_loader(Probe())
    assert found.tolist() == [[True, True, 1]]


def test_normalise_by_hand():
    settings.MEAN, settings.STD = (0.5, 0.0, 1.0), (0.5, 1.0, 2.0)
    image = torch.tensor([0, 255], dtype=torch.uint8).expand(2, 3, 4, 2)
    found = dataset.normalise(image, torch.device('cpu'))
    assert found.shape == (2, 3, 4, 2) and found.dtype == torch.float32
    assert found[1, :, 3].tolist() == [[-1, 1], [0, 1], [-0.5, 0]]


# ------------------------------------------------- as a user runs it
def test_script_draws_samples(toy, tmp_path):
    done = run('dataset.py', *words({**SMALL, 'DATA_ROOT': toy,
                                     'LOG_DIR': 'out/log'}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / 'out' / 'log' / 'samples.png')
    assert picture.size[0] == 3 * 2 * 65             # 3 epochs
    assert picture.size[1] > 4 * 65                  # 4 samples, a legend
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        'background', 'disc', 'square', 'triangle', 'star', 'ring']
    shares = [float(line.split()[1][:-1]) for line in lines[:6]]
    assert abs(sum(shares) - 100) < 0.1 and lines[6].startswith('12 images')


def test_script_refuses_a_bad_label(copy, tmp_path):
    spoilt = label_path(copy, 'toy_0007')
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    done = run('dataset.py', *words({**SMALL, 'DATA_ROOT': copy}),
               cwd=tmp_path)
    *bar, line = done.stderr.splitlines()
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert line.startswith(f'dataset.py: {spoilt} cannot be read')


def test_script_refuses_words_it_does_not_know(small, monkeypatch, capsys):
    status, line = refused(dataset.main, 'train', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and 'train' in line
