"""Files for tests: data sets and images written by hand, what a folder holds,
an error that names its file, a full disk.
"""
import contextlib
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import settings
from conftest import SMALL
from utils import UserError


@contextlib.contextmanager
def full_disk(room=0):
    """Within, no file can get longer than `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    """Return {name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expect_error(call, start, *parts, kind=UserError):
    """Expect a call to fail with one line that begins with `start` and holds
    `parts`; return the error."""
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert text.startswith(str(start)) and '\n' not in text
    for part in parts:
        assert part in text
    return error.value


# ------------------------------------------------- data sets
def empty_set(root):
    """Make an empty set; return its folder, which DATA_ROOT names."""
    for folder in ('JPEGImages', 'SegmentationClassAug',
                   'ImageSets/Segmentation'):
        (root / folder).mkdir(parents=True)
    vars(settings).update(SMALL, DATA_ROOT=str(root))
    return root


def image_path(root, name):
    return root / 'JPEGImages' / f'{name}.jpg'


def label_path(root, name):
    return root / 'SegmentationClassAug' / f'{name}.png'


def list_path(root, split):
    return root / 'ImageSets' / 'Segmentation' / f'{split}.txt'


def add(root, name, label, image=None, split='train'):
    """Add a sample to a set; the image is grey where none is given."""
    label = np.asarray(label, np.uint8)
    if image is None:
        image = np.full((*label.shape, 3), 128, np.uint8)
    Image.fromarray(image).save(image_path(root, name), quality=100,
                                subsampling=0)
    Image.fromarray(label).save(label_path(root, name))
    with open(list_path(root, split), 'a') as file:
        file.write(name + '\n')


# ------------------------------------------------- images
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
