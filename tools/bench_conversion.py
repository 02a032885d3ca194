"""The area `conversion` of tools.bench: prepare.py in several processes beside
a plain loop, on small archives of the official structure."""
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import dataset
import prepare
import settings
from converters import cocostuff, layout
from utils import import_optional

CITY_ID, STUFF_ID = 'aachen_{:06}_000019', 'COCO_train2014_{:012}'


# ------------------------------------------------- archives
def encode(image, kind):
    """Return the bytes of an image, Pillow's or an array."""
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(buffer, kind)
    return buffer.getvalue()


def write_zip(path, members):
    """Write a zip of members {name: bytes or text}."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def smooth_mask(height, width, values):
    """Return a mask (H, W) uint8 of smooth regions of these values."""
    coarse = np.random.default_rng(0).random((9, 12), np.float32)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.array(values, np.uint8)[
        (fine.clip(0, 0.999) * len(values)).astype(int)]


def write_cityscapes(folder, image, jpeg):
    """Write 60 images of 2048 x 1024, with noise as cameras have."""
    wide = np.array(image.resize((2048, 1024)))
    wide += np.random.default_rng(0).integers(0, 8, wide.shape, np.uint8)
    for kind, png, name in (
            ('leftImg8bit', encode(wide, 'PNG'), 'leftImg8bit'),
            ('gtFine', encode(smooth_mask(1024, 2048, range(34)), 'PNG'),
             'gtFine_labelIds')):
        write_zip(folder / f'{kind}_trainvaltest.zip', {
            f'{kind}/train/aachen/{CITY_ID.format(i)}_{name}.png': png
            for i in range(60)})


def write_coco(folder, image, jpeg):
    """Write 800 images with 20 polygons each."""
    corners = [[x, y, x + 150, y + 9, x + 90, y + 120, x + 5, y + 80]
               for x in range(5, 300, 60) for y in range(5, 200, 50)]
    write_zip(folder / 'train2017.zip', {
        f'train2017/{i:012}.jpg': jpeg for i in range(800)})
    write_zip(folder / 'val2017.zip', {})
    notes = json.dumps({
        'images': [{'id': i, 'file_name': f'{i:012}.jpg',
                    'height': image.height, 'width': image.width}
                   for i in range(800)],
        'annotations': [{'image_id': i, 'category_id': 1 + j % 9,
                         'iscrowd': 0, 'segmentation': [polygon]}
                        for i in range(800)
                        for j, polygon in enumerate(corners)]})
    write_zip(folder / 'annotations_trainval2017.zip', {
        f'annotations/instances_{split}2017.json': notes
        for split in ('train', 'val')})


def write_cocostuff(folder, image, jpeg):
    """Write 600 images with masks as .mat files."""
    buffer = io.BytesIO()
    import_optional('scipy.io').savemat(buffer, {'S': smooth_mask(
        image.height, image.width, cocostuff.IDS)})
    ids = [STUFF_ID.format(i) for i in range(600)]
    write_zip(folder / 'cocostuff-10k-v1.1.zip', {
        'imageLists/train.txt': '\n'.join(ids), 'imageLists/test.txt': '',
        **{f'images/{name}.jpg': jpeg for name in ids},
        **{f'annotations/{name}.mat': buffer.getvalue() for name in ids}})


def write_custom(folder, image, jpeg):
    """Write 500 images, and a folder of masks."""
    mask = smooth_mask(image.height, image.width, range(21))
    for kind, data, ending in (('images', jpeg, 'jpg'),
                               ('masks', encode(mask, 'PNG'), 'png')):
        (folder / kind).mkdir()
        for i in range(500):
            (folder / kind / f'{i}.{ending}').write_bytes(data)


# ------------------------------------------------- timing
def plain_loop(work, jobs, *_):
    """Stand in for layout.map_in_processes, in this process."""
    return (work(*job) for job in jobs)


def race_converter(watch, folder, name, files):
    """Time a converter on the archives in a folder, in both ways."""
    words = ['custom', str(folder / 'images'), str(folder / 'masks')]
    if name != 'custom':
        words = [name, '--from', str(folder)]
        source = prepare.CONVERTERS[name].SOURCE
        source.update(unpacked=0, counts={}, archives=[
            (url, '', 0) for url, *_ in source['archives']])
    several = layout.map_in_processes

    def convert(run):
        layout.map_in_processes = run
        to = tempfile.mkdtemp(dir=folder)           # removed untimed
        prepare.main([*words, '--to', to])
    watch.race(f'prepare.py {name}, {files} files; per file', {
        'a plain loop': lambda: convert(plain_loop),
        f'in processes, {os.cpu_count()} cores': lambda: convert(several)},
        per=files)
    layout.map_in_processes = several


def conversion(watch):
    """prepare.py in several processes, beside itself in one."""
    path = Path(dataset.Segmentation(settings.VAL_SPLIT, False).path(
        0, 'JPEGImages', 'jpg'))
    with Image.open(path) as image, tempfile.TemporaryDirectory() as folder:
        for name, write, files in (('cityscapes', write_cityscapes, 120),
                                   ('coco', write_coco, 1600),
                                   ('cocostuff', write_cocostuff, 1200),
                                   ('custom', write_custom, 1000)):
            write(Path(folder), image.convert('RGB'), path.read_bytes())
            race_converter(watch, Path(folder), name, files)
