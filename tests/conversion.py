"""What the tests of the converters share: reading a prepared set, small files
of the official formats."""
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from converters import layout
from lib import images

SIZE = (40, 60)                 # of the images, (H, W)


# ------------------------------------------------- a prepared set
def split_ids(root, split):
    """Return the IDs of a list, in its order."""
    return Path(root, layout.LISTS, f'{split}.txt').read_text().splitlines()


def load_label(root, name):
    """Return a label, which has to be a palette PNG, (H, W) uint8."""
    with Image.open(layout.label_path(root, name)) as image:
        assert (image.format, image.mode) == ('PNG', 'P')
        return np.array(image)


def palette(root, name):
    """Return the first 256 colours of a label, (256, 3) as nested lists."""
    with Image.open(layout.label_path(root, name)) as image:
        return np.reshape(image.getpalette(), (256, 3)).tolist()


def check(root, masks, class_file):
    """Compare all labels of root with masks {ID: (H, W)}, and its palette
    and class file with the data set's."""
    assert sorted(masks) == sorted(path.stem for path in Path(
        root, 'SegmentationClassAug').iterdir())
    for name, mask in masks.items():
        np.testing.assert_array_equal(load_label(root, name), mask, name)
    path = images.class_file(class_file)
    colours = images.full_palette(images.read_class_file(path)[1])
    assert palette(root, name) == colours.tolist()
    assert Path(root, 'classes.txt').read_bytes() == Path(path).read_bytes()


def tree(root):
    """Return {path within root: (bytes, time of writing)} of all files."""
    return {str(path.relative_to(root)):
            (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(Path(root).rglob('*')) if path.is_file()}


def contents(root):
    """Return {path within root: bytes} of all files."""
    return {path: data for path, (data, _) in tree(root).items()}


def expect(name, folder, monkeypatch, **counts):
    """Have a converter expect so many images, and archives of no known hash;
    return the command line."""
    source = prepare.CONVERTERS[name].SOURCE
    monkeypatch.setattr(prepare.CONVERTERS[name], 'SOURCE', {
        **source, 'counts': counts, 'unpacked': 10 ** 6,
        'archives': tuple((url, '', size) for url, _, size
                          in source['archives'])})
    return [name, '--from', str(folder), '--to', str(folder / 'made')]


def interrupt_after(count):
    """Return a stand-in for utils.progress that Ctrl-C ends after so many
    items."""
    def progress(items, **options):
        for number, item in enumerate(items):
            if number == count:
                raise KeyboardInterrupt
            yield item
    return progress


# ------------------------------------------------- files
def encode(image, kind, **options):
    """Return the bytes of an image, an array or Pillow's."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth_image(seed=0, kind='JPEG', **options):
    """Return the bytes of a smooth image of SIZE."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return encode(Image.fromarray(coarse).resize(SIZE[::-1]), kind, **options)


def palette_png(mask):
    """Return the bytes of a mask as VOC has it."""
    image = Image.fromarray(mask)
    image.putpalette(images.voc_palette().tobytes())
    return encode(image, 'PNG')


def encode_mat(**fields):
    """Return the bytes of a .mat file."""
    buffer = io.BytesIO()
    pytest.importorskip('scipy.io').savemat(buffer, fields)
    return buffer.getvalue()


def boxes(*parts):
    """Return a mask of boxes (value, top, bottom, left, right), one on
    another."""
    mask = np.zeros(SIZE, np.uint8)
    for value, top, bottom, left, right in parts:
        mask[top:bottom, left:right] = value
    return mask


def polygon(top, bottom, left, right):
    """Return COCO's polygons of a box."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def rle(mask, compressed):
    """Return COCO's RLE of a mask (H, W) bool, compressed or as a list of
    counts."""
    from pycocotools import mask as coco  # optional
    if compressed:
        found = coco.encode(np.asfortranarray(mask, np.uint8))
        return {**found, 'counts': found['counts'].decode()}
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {'counts': [0, *counts] if flat[0] else counts,
            'size': list(mask.shape)}


def list_text(names):
    """Return the bytes of a list of IDs."""
    return ''.join(f'{name}\n' for name in names).encode()


def write_zip(path, members):
    """Write a zip of {name: bytes or text}."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tar(path, members, mode='w', others=()):
    """Write a tar of {name: bytes}, and of other TarInfo without bytes."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in others:
            archive.addfile(info)
