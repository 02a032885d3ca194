"""Are the pixels the right ones, and is every fault of a set named?

    python -m pytest tests/test_dataset.py

Sets of a few images are written by the tests, with values known by hand; toy
is used where any set will do, real VOC labels where ../shared is there.
Reading files is tested in test_images.py, batches in test_loader.py.
"""
import itertools
import math
import os
import shutil
import time
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import settings
from conftest import SMALL, refused, run, words
from files import (
    add,
    empty_set,
    expect_error,
    image_path,
    label_path,
    list_path,
)
from utils import UserError

FILL = (124, 116, 104)       # 255 * (0.485, 0.456, 0.406), rounded by hand


@pytest.fixture
def root(tmp_path):
    """An empty set; DATA_ROOT names it."""
    return empty_set(tmp_path / 'set')


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the toy set, to be damaged; DATA_ROOT names it."""
    shutil.copytree(toy, tmp_path / 'set')
    vars(settings).update(SMALL, DATA_ROOT=str(tmp_path / 'set'))
    return tmp_path / 'set'


# ------------------------------------------------- lists
def test_read_ids_keeps_the_order(root):
    list_path(root, 'train').write_text('b\n\n a \nsub/c')
    assert dataset.read_ids(str(root), 'train') == ['b', 'a', 'sub/c']


def test_read_ids_names_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=(
            f'^DATA_ROOT={tmp_path}/x: no such folder; .*prepare.py')):
        dataset.read_ids(f'{tmp_path}/x', 'train')


def test_read_ids_names_the_splits_there_are(root):
    with pytest.raises(UserError, match='test.txt .* are: none$'):
        dataset.read_ids(str(root), 'test')
    for split in 'vtabz':
        list_path(root, split).write_text('a\n')
    with pytest.raises(UserError,
                       match='test.txt is not there; .* a, b, t, v, z$'):
        dataset.read_ids(str(root), 'test')
    shutil.rmtree(root / 'ImageSets')
    with pytest.raises(UserError, match='test.txt .* are: none$'):
        dataset.read_ids(str(root), 'test')


@pytest.mark.parametrize('text', (
    '\ufeffa\nb\n'.encode(), b'a\r\nb\r\n', b'a\rb',
    'a\nb'.encode('utf-16')))
def test_read_ids_of_other_systems(root, text):
    list_path(root, 'train').write_bytes(text)
    assert dataset.read_ids(str(root), 'train') == ['a', 'b']


@pytest.mark.parametrize('text', (
    'äöü'.encode('latin-1'), 'a\nb\n'.encode('utf-16-le'), b'a\0b\n'))
def test_read_ids_refuses_what_is_no_text(root, text):
    list_path(root, 'train').write_bytes(text)
    expect_error(lambda: dataset.read_ids(str(root), 'train'),
                 list_path(root, 'train'), 'is neither UTF-8 nor UTF-16 text')


def test_read_ids_refuses_what_is_no_list(root):
    """A folder, a pipe that nobody writes to, a file of 2 GB."""
    path = list_path(root, 'train')
    for make, remove in ((path.mkdir, path.rmdir),
                         (lambda: os.mkfifo(path), path.unlink)):
        make()
        expect_error(lambda: dataset.read_ids(str(root), 'train'), path,
                     'is a folder or a device')
        remove()
    path.touch()
    os.truncate(path, 2 ** 31)          # it takes no room
    expect_error(lambda: dataset.read_ids(str(root), 'train'), path,
                 'has 2,147,483,648 bytes')


@pytest.mark.parametrize('name', (
    '../evil', 'a/../../evil', '/tmp/evil', 'a//b', './a', 'a/', '.', '..',
    '..\\evil', 'C:/evil', 'a\x1bb', 'a\u2028b', 300 * 'a/b/'))
def test_read_ids_refuses_ids_that_leave_their_folder(root, name):
    list_path(root, 'train').write_text(f'a\n{name}\n')
    error = expect_error(lambda: dataset.read_ids(str(root), 'train'),
                         list_path(root, 'train'), 'has the ID',
                         repr(name[:60]))
    assert len(str(error)) < 1000
    with pytest.raises(UserError, match='has the ID'):
        dataset.Segmentation('train', train=False)


def test_read_ids_refuses_files_whose_names_are_no_ids(root):
    add(root, 'a', [[0]], split='val')
    label_path(root, 'b\\c').touch()
    expect_error(lambda: dataset.read_ids(str(root), 'trainaug'),
                 root / 'SegmentationClassAug', r"has the ID 'b\\c'")


def test_read_ids_names_ids_that_are_twice_at_once(root):
    """Of a long list, too."""
    list_path(root, 'train').write_text('a\nb\nc\nb\n')
    with pytest.raises(UserError, match='train.txt has b twice; remove one'):
        dataset.read_ids(str(root), 'train')
    list_path(root, 'train').write_text(
        ''.join(f'{i}\n' for i in range(60_000)) + '59999\n')
    started = time.process_time()
    with pytest.raises(UserError, match='has 59999 twice'):
        dataset.read_ids(str(root), 'train')
    assert time.process_time() - started < 5


def test_read_ids_refuses_an_empty_list(root):
    list_path(root, 'train').write_text('\n \n')
    with pytest.raises(UserError, match='train.txt is empty'):
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
    with pytest.raises(UserError, match=(
            f'^{path(root, "b")} is not there, but train.txt')):
        dataset.Segmentation('train', train=False)


def test_a_label_value_outside_the_classes_is_named(root):
    add(root, 'a', [[0, 5, 255]])
    add(root, 'b', [[0, 6, 255]])                    # N_CLASSES is 6
    data = dataset.Segmentation('train', train=True)
    data[0]
    for call in (lambda: data[1], data.scan_labels):
        expect_error(call, label_path(root, 'b'), 'the label value 6;',
                     '0 to 5 ', 'N_CLASSES=6', '255')


def test_another_ignore_label_holds(root):
    settings.IGNORE_LABEL = 9
    add(root, 'a', [[0, 1, 9]])
    add(root, 'b', [[0, 1, 255]])
    data = dataset.Segmentation('train', train=True)
    assert set(data[0][1].unique().tolist()) == {0, 1, 9}
    expect_error(lambda: data[1], label_path(root, 'b'),
                 'the label value 255;')


def test_sizes_that_differ_are_named(root):
    add(root, 'a', np.ones((4, 6)), np.zeros((6, 4, 3), np.uint8))
    data = dataset.Segmentation('train', train=True)
    for call in (lambda: data[0], data.scan_labels):
        expect_error(call, image_path(root, 'a'),
                     '4 x 6 pixels, its label 6 x 4;')


def test_scan_labels_counts_pixels(root):
    add(root, 'a', [[0, 5, 255]])
    add(root, 'b', [[0, 0, 2]])
    counts = dataset.Segmentation('train', train=True).scan_labels()
    assert {i: counts[i] for i in counts.nonzero()[0]} == {
        0: 3, 2: 1, 5: 1, 255: 1}


@pytest.mark.parametrize('ignore, expected', [
    (255, [3, 0, 1, 0, 0, 1]), (5, [3, 0, 1, 0, 0, 0])])
@pytest.mark.parametrize('is_scanned', [False, True])
def test_class_pixels_leave_void_out(is_scanned, ignore, expected, root):
    settings.IGNORE_LABEL = ignore
    add(root, 'a', [[0, 5, ignore]])
    add(root, 'b', [[0, 0, 2]])
    data = dataset.Segmentation('train', train=True)
    if is_scanned:
        data.scan_labels()
    assert data.class_pixels().tolist() == expected


def test_a_split_without_labels_is_void(root):
    add(root, 'a', np.ones((4, 6)), split='test')
    label_path(root, 'a').unlink()
    data = dataset.Segmentation('test', train=False, labelled=False)
    assert data[0][0].shape == (3, 4, 6) and data.image_sizes() == [(4, 6)]
    assert data[0][1].tolist() == [[255] * 6] * 4


@pytest.mark.parametrize('data', [b'', b'\xff\xd8\xff'])
def test_scan_labels_names_a_corrupt_file(data, copy):
    data_set = dataset.Segmentation('train', train=True)
    for path in (image_path, label_path):
        corrupt = path(copy, data_set.ids[3])
        whole = corrupt.read_bytes()
        corrupt.write_bytes(data)
        expect_error(data_set.scan_labels, corrupt)
        corrupt.write_bytes(whole)
    data_set.scan_labels()


def test_scan_labels_refuses_masks_of_0_and_255(root):
    add(root, 'a', [[0, 255, 255]])
    add(root, 'b', [[0, 0, 255]])
    data = dataset.Segmentation('train', train=True)
    with pytest.raises(UserError, match='hold class 0 alone: .*write it as 1'):
        data.scan_labels()
    add(root, 'c', [[0, 1, 255]])                    # one object is enough
    dataset.Segmentation('train', train=True).scan_labels()


@pytest.mark.parametrize('values, only', (
    ([0, 0], 'class 0'), ([1, 1], 'class 1'), ([1, 255], 'class 1'),
    ([255, 255], 'void')))
def test_scan_labels_refuses_to_train_on_one_class(root, values, only):
    """As of a JSON without outlines; a split to score may hold one class."""
    add(root, 'a', [values])
    data = dataset.Segmentation('train', train=True)
    with pytest.raises(UserError, match=f'train hold {only} alone: there is '
                                        f'nothing to learn'):
        data.scan_labels()
    if values != [255, 255]:
        dataset.Segmentation('train', train=False).scan_labels()


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


def test_equal_images_are_augmented_differently(root):
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


def test_an_image_of_one_pixel_takes_any_scale(root):
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


# ------------------------------------------------- as a user runs it
def test_script_draws_samples(toy, tmp_path):
    done = run('dataset.py', *words({**SMALL, 'DATA_ROOT': toy,
                                     'LOG_DIR': 'out/log'}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / 'out' / 'log' / 'samples.png')
    assert image.size[0] == 3 * 2 * 65             # 3 epochs
    assert image.size[1] > 4 * 65                  # 4 samples, a legend
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:7]] == [
        'class', 'background', 'disc', 'square', 'triangle', 'star', 'ring']
    shares = [float(line.split()[1]) for line in lines[1:7]]
    assert abs(sum(shares) - 100) < 0.1 and lines[7].startswith('12 images')


def test_script_refuses_a_bad_label(small, copy, monkeypatch, capsys):
    corrupt = label_path(copy, 'toy_0007')
    corrupt.write_bytes(corrupt.read_bytes()[:100])
    status, line = refused(dataset.main, f'DATA_ROOT={copy}',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and line.startswith(
        f'script.py: {corrupt} cannot be read')


def test_script_refuses_words_it_does_not_know(small, monkeypatch, capsys):
    status, line = refused(dataset.main, 'train', monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and 'train' in line
