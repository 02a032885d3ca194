"""Bring a data set into the one layout that dataset.py reads.

    python prepare.py toy [--to DIR] [--seed N] [--train N] [--val N]
    python prepare.py voc [--from DIR] [--to DIR] [--sbd-first]

    DIR/JPEGImages/ID.jpg
    DIR/SegmentationClassAug/ID.png             class index, 255 = void
    DIR/ImageSets/Segmentation/SPLIT.txt        an ID a line, sorted
    DIR/classes.txt                             a line a class: name r g b
    DIR/prepared.json                           what was asked for; counts

Archives are downloaded into the folder `downloads` beside DIR, or taken from
--from DIR. A run that was cut off goes on when it is run again; a finished
one is left as it is. H x W pixels.
"""
import argparse
import collections
import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
import zlib

import cv2
import numpy as np
from PIL import Image

import utils

LISTS = os.path.join('ImageSets', 'Segmentation')
VOID = 255

# archives: url, hash, bytes; unpacked: bytes, about; lists: count and first
# digits of the sha256 of the sorted IDs, each with a line feed after it
SOURCES = {
    'voc': {
        'archives': (
            (('http://host.robots.ox.ac.uk/pascal/VOC/voc2012/'
              'VOCtrainval_11-May-2012.tar'),
             'md5:6cd6e144f989b92b3379bac3b3de84fd', 1_999_639_040),
            (('https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/'
              'grouping/semantic_contours/benchmark.tgz'),
             'md5:82b4d87ceb2ed10f6038a1cba92111cb', 1_420_000_000)),
        'unpacked': 1_300_000_000,
        'lists': {'train': (1464, 'aa623bd2c8ce4443a8aaae51c524c0eb'),
                  'val': (1449, 'cdc1326d12f69ce5153aa5da04a4d878'),
                  'trainval': (2913, 'f8dae64f9e08d8b06ef41286dcd4c516'),
                  'trainaug': (10582, 'd1326bd532648d73bc4b1bd275434eba')}},
}
VOC_FILES = {       # what is taken from the archives: kind, name; group 1: ID
    'list': r'VOCdevkit/VOC2012/ImageSets/Segmentation/'
            r'(train|val|trainval)\.txt',
    'image': r'VOCdevkit/VOC2012/JPEGImages/([0-9]{4}_[0-9]{6})\.jpg',
    'label': r'VOCdevkit/VOC2012/SegmentationClass/([0-9]{4}_[0-9]{6})\.png'}
SBD_FILES = {
    'list': r'benchmark_RELEASE/dataset/(train|val)\.txt',
    'label': r'benchmark_RELEASE/dataset/cls/([0-9]{4}_[0-9]{6})\.mat'}

TOY_HUES = (5, 215, 140, 46, 285)            # degrees, of toy's classes 1..5
TOY_CORNERS = {2: (4, 0.707), 3: (3, 0.5), 4: (5, 0.45)}   # and inner radius


# ------------------------------------------------- the one layout
def image_path(root, name):
    """Return where the layout keeps an image."""
    return os.path.join(root, 'JPEGImages', name + '.jpg')


def label_path(root, name):
    """Return where the layout keeps a label."""
    return os.path.join(root, 'SegmentationClassAug', name + '.png')


def class_file(name):
    """Return the path of the class file of a data set."""
    return os.path.join(utils.HERE, 'classes', name + '.txt')


def palette(name):
    """Return the colours of a data set's labels, (256, 3) uint8."""
    with open(class_file(name)) as file:
        own = [line.split()[-3:] for line in file]
    return utils.full_palette(np.array(own, np.uint8))


def is_ready(root, name, options):
    """Say whether root holds this data set already, whole.

    Raises ValueError when it holds anything else.
    """
    path = os.path.join(root, 'prepared.json')
    if not os.path.exists(path):
        if os.path.isfile(root) or (os.path.isdir(root) and
                                    os.listdir(root)):
            raise ValueError(f'{root} holds files that prepare.py did not '
                             f'make; name another folder with --to')
        return False
    with open(path) as file:
        stamp = json.load(file)
    if (stamp['name'], stamp['options']) != (name, options):
        raise ValueError(f'{root} holds {stamp["name"]} {stamp["options"]}, '
                         f'not {name} {options}; name another folder with '
                         f'--to, or remove this one')
    if 'counts' not in stamp or missing(root, stamp['counts']):
        return False
    utils.log(f'{root} is ready: {name}, {stamp["counts"]}')
    return True


def begin(root, name, options):
    """Make the folders of the layout, the class file and the stamp."""
    try:
        for folder in ('JPEGImages', 'SegmentationClassAug', LISTS):
            os.makedirs(os.path.join(root, folder), exist_ok=True)
    except OSError as error:
        raise OSError(f'{root} cannot be made ({error}); name another folder '
                      f'with --to') from None
    shutil.copyfile(class_file(name), os.path.join(root, 'classes.txt'))
    utils.save_json({'name': name, 'options': options},
                    os.path.join(root, 'prepared.json'))


def finish(root, name, options, lists):
    """Write the lists {split: IDs}, and the counts into the stamp.

    Raises RuntimeError when an image or a label of theirs is not there.
    """
    for split, names in lists.items():
        with utils.atomic(os.path.join(root, LISTS, split + '.txt')) as part, \
                open(part, 'w') as file:
            file.writelines(f'{name}\n' for name in sorted(names))
    counts = {split: len(names) for split, names in lists.items()}
    lost = missing(root, counts)
    if lost:
        raise RuntimeError(f'{len(lost)} files of the lists were not made, '
                           f'such as {lost[0]}')
    utils.save_json({'name': name, 'options': options, 'counts': counts},
                    os.path.join(root, 'prepared.json'))
    utils.log(f'{root} is ready: {name}, {counts}')


def missing(root, splits):
    """Return the paths that are not there: lists, and what they name."""
    lists = [os.path.join(root, LISTS, split + '.txt') for split in splits]
    paths, names = set(lists), set()
    for path in filter(os.path.exists, lists):
        with open(path) as file:
            names.update(file.read().split())
    for where in (image_path, label_path):
        paths.update(where(root, name) for name in names)
    return sorted(path for path in paths if not os.path.exists(path))


# ------------------------------------------------- archives
def fetch(name, source, root):
    """Return the paths of a data set's archives, all there and sound.

    source: the folder that holds them; None: they are downloaded. Raises
    FileNotFoundError for a missing one, ValueError for a wrong hash, OSError
    when the disk has too little room for what is still to come.
    """
    beside = os.path.join(os.path.dirname(os.path.abspath(root)), 'downloads')
    paths, to_come = {}, SOURCES[name]['unpacked']
    for url, digest, size in SOURCES[name]['archives']:
        path = os.path.join(source or beside, os.path.basename(url))
        paths[path] = url, digest
        if source and not os.path.isfile(path):
            raise FileNotFoundError(f'{path} is not there; get it from {url},'
                                    f' or leave out --from')
        if not os.path.isfile(path):
            to_come += size - file_bytes(path + '.part')
    check_room(root, to_come)
    for path, (url, digest) in paths.items():
        if not os.path.isfile(path):
            utils.download(url, path, digest)
            continue
        utils.log(f'checking {path}')
        try:
            utils.check_hash(path, digest)
        except ValueError as error:
            raise ValueError(f'{error}; get it anew from {url}') from None
    return list(paths)


def check_room(root, to_come):
    """Raise OSError unless the disk of root has room for to_come bytes, of
    which root may hold some already."""
    to_come -= sum(file_bytes(os.path.join(root, kind))
                   for kind in ('JPEGImages', 'SegmentationClassAug'))
    there = os.path.abspath(root)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    free = shutil.disk_usage(there).free
    if free < to_come:
        raise OSError(f'{there} has {free / 1e9:.2f} GB free, and {root} '
                      f'needs {to_come / 1e9:.2f} GB; make room or name '
                      f'another folder with --to')


def file_bytes(path):
    """Return the size of a file, or of a folder's files; 0 for neither."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path))
    return os.path.getsize(path) if os.path.exists(path) else 0


def members(path, patterns):
    """Yield (kind, ID, bytes) of the files in a tar whose whole name matches
    one of the patterns {kind: pattern}; group 1 is the ID.

    Nothing is written under a name that the archive gives. Raises ValueError
    for a damaged archive and for a link or device under a wanted name.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                for kind, pattern in patterns.items():
                    match = re.fullmatch(r'(?:\./)?' + pattern, member.name)
                    if match and not member.isreg():
                        raise ValueError(f'{path}: {member.name} is no plain '
                                         f'file; this is not the official '
                                         f'archive')
                    if match:
                        data = archive.extractfile(member).read()
                        yield kind, match[1], data
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f'{path} is truncated or damaged ({error}); fetch '
                         f'it again') from None


def convert(work, jobs, desc):
    """Call work(path, *rest) for each job (path, *rest) whose path is not
    there yet, in several processes; work makes the file at path.

    work: a function of a module, as the processes import it. Raises what a
    call raised, ValueError or OSError, as a message for the user.
    """
    running = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(
            min(8, os.cpu_count() or 1), initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for path, *rest in utils.progress(jobs, desc=desc):
            if not os.path.exists(path):
                running.append((path, pool.submit(work, path, *rest)))
            if len(running) > 64:               # what is read ahead
                await_file(*running.popleft())
        for path, future in running:
            await_file(path, future)


def await_file(path, future):
    """Wait for a process to make the file; name it where that failed."""
    try:
        future.result()
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f'{path} cannot be made: {error}') from error


def write_bytes(path, data):
    """Write a file, whole or not at all."""
    with utils.atomic(path) as part, open(part, 'wb') as file:
        file.write(data)


def check_lists(name, lists):
    """Raise ValueError unless the lists {split: IDs} are the official ones."""
    for split, (count, digest) in SOURCES[name]['lists'].items():
        text = ''.join(f'{ID}\n' for ID in sorted(lists[split]))
        found = hashlib.sha256(text.encode()).hexdigest()
        if len(lists[split]) != count or not found.startswith(digest):
            raise ValueError(f'{split} has {len(lists[split])} IDs of sha256 '
                             f'{found}, not {count} of {digest}: the archives '
                             f'are not the official ones')


# ------------------------------------------------- PASCAL VOC 2012 and SBD
def voc(args):
    """Bring VOC 2012 and SBD into the layout: train, val, trainval, trainaug.

    A mask is VOC's own where VOC has one, else SBD's, which has no void
    border; with --sbd-first SBD's goes first, but for val. Differs: the
    widely used SegmentationClassAug has SBD's for some that VOC has too.
    """
    try:
        import scipy.io  # noqa: F401
    except ImportError:
        raise RuntimeError('the labels of SBD are read by scipy, which is '
                           'not there: pip install scipy') from None
    root, options = args.to, {'sbd_first': args.sbd_first}
    if is_ready(root, 'voc', options):
        return
    voc_tar, sbd_tgz = fetch('voc', args.source, root)
    begin(root, 'voc', options)
    lists = {split: set() for split in SOURCES['voc']['lists']}
    for _, split, data in members(voc_tar, {'list': VOC_FILES['list']}):
        lists[split].update(data.decode().split())
    own = lists['val' if args.sbd_first else 'trainval']
    convert(sbd_label, sbd_jobs(sbd_tgz, root, own, lists['trainaug']), 'SBD')
    lists['trainaug'] |= lists['train']
    lists['trainaug'] -= lists['val']
    check_lists('voc', lists)
    convert(write_bytes, voc_jobs(voc_tar, root, lists), 'VOC')
    finish(root, 'voc', options, lists)


def sbd_jobs(archive, root, own, listed):
    """Yield the jobs of sbd_label, and add SBD's lists to the set listed.

    own: the IDs that have VOC's mask instead.
    """
    colours = palette('voc')
    for kind, name, data in members(archive, SBD_FILES):
        if kind == 'list':
            listed.update(data.decode().split())
        elif name not in own:
            yield label_path(root, name), data, colours


def sbd_label(path, data, colours):
    """Write SBD's mask, a .mat file's bytes, as a palette PNG."""
    from scipy.io import loadmat
    mask = loadmat(io.BytesIO(data))['GTcls']['Segmentation'][0, 0]
    utils.save_label(mask, path, colours)


def voc_jobs(archive, root, lists):
    """Yield the jobs of write_bytes: the images of the lists, and VOC's masks
    (convert leaves those alone that SBD has given)."""
    wanted = lists['trainaug'] | lists['val']       # all of train, trainval
    for kind, name, data in members(archive, VOC_FILES):
        if kind == 'image' and name in wanted:
            yield image_path(root, name), data
        if kind == 'label' and name in lists['trainval']:
            yield label_path(root, name), data


# ------------------------------------------------- toy
def toy(args):
    """Generate pictures of five shapes on grey ground.

    A picture depends on its number and the seed alone; val has the first
    numbers, so that a larger --train leaves it as it is.
    """
    options = {key: getattr(args, key) for key in ('seed', 'train', 'val')}
    if min(args.train, args.val) < 1 or args.seed < 0:
        raise ValueError(f'{options}: at least 1 image each, and a seed of 0 '
                         f'or more')
    if is_ready(args.to, 'toy', options):
        return
    begin(args.to, 'toy', options)
    names = [f'toy_{i:04d}' for i in range(args.val + args.train)]
    colours = palette('toy')
    for i, name in enumerate(utils.progress(names, desc='toy')):
        image, label = toy_item(np.random.default_rng((args.seed, i)), i)
        with utils.atomic(image_path(args.to, name)) as part:
            Image.fromarray(image).save(part, 'JPEG', quality=90)
        utils.save_label(label, label_path(args.to, name), colours)
    finish(args.to, 'toy', options,
           {'train': names[args.val:], 'val': names[:args.val]})


def toy_item(rng, number):
    """Draw a picture; its first shape is of class 1 + number % 5.

    Returns image (H, W, 3) uint8 RGB, label (H, W) uint8.
    """
    H, W = rng.integers(96, 161, 2)
    image = toy_ground(rng, H, W)
    label = np.zeros((H, W), np.uint8)
    count = rng.integers(3, 6)
    classes = 1 + (number + np.append(0, rng.integers(0, 5, count - 1))) % 5
    centres = np.empty((0, 2))
    for c in classes:
        size = rng.uniform(14, 35)                     # of half, pixels
        spots = rng.uniform(0.1, 0.9, (4, 2)) * (W, H)
        gaps = np.linalg.norm(spots[:, None] - centres, axis=2)
        spot = spots[gaps.min(1, initial=999).argmax()]   # the freest of four
        centres = np.vstack([centres, spot])
        toy_shape(rng, image, label, c, spot, size)
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def toy_ground(rng, H, W):
    """Return a greyish textured ground, (H, W, 3) float, 0..255."""
    y, x = np.mgrid[:H, :W] / 100
    turn = rng.uniform(0, 2 * np.pi)
    across = x * np.cos(turn) + y * np.sin(turn)
    grey = rng.uniform(95, 185) + rng.uniform(-35, 35) * across
    grey += rng.uniform(0, 9) * np.sin(across * rng.uniform(15, 60))
    for cell in (3, 8, 24):                            # pixels
        grey += rng.uniform(3, 11) * noise(rng, H, W, cell)
    tint = noise(rng, H, W, 40)[..., None] * rng.normal(0, 4, 3)
    return grey[..., None] + tint + rng.normal(0, 6, 3)


def noise(rng, H, W, cell):
    """Return smooth noise of deviation about 1 and grain `cell`, (H, W)."""
    coarse = rng.normal(size=(H // cell + 3, W // cell + 3))
    fine = cv2.resize(coarse, None, fx=cell, fy=cell,
                      interpolation=cv2.INTER_CUBIC)
    return fine[cell:cell + H, cell:cell + W]


def toy_shape(rng, image, label, c, spot, size):
    """Draw a shape of class c over image and label, in place.

    spot: its centre x, y; size: half its width; both in pixels.
    """
    H, W = label.shape
    y, x = np.mgrid[-3:H, -3:W].astype(float)
    depth = -toy_distance(rng, c, x - spot[0], y - spot[1], size)
    shade, depth = depth[:H, :W], depth[3:, 3:]        # a shadow 3 px off
    y, x = y[3:, 3:], x[3:, 3:]
    hue = TOY_HUES[c - 1] + rng.normal(0, 9)
    colour = np.float32([[[hue % 360, rng.uniform(0.5, 0.85), 1]]])
    colour = cv2.cvtColor(colour, cv2.COLOR_HSV2RGB)[0, 0]
    light = rng.uniform(165, 245) - 0.25 * (x + y - spot.sum())
    light += rng.uniform(2, 9) * noise(rng, H, W, 4)
    light -= 45 * np.exp(-depth.clip(0) / 3)           # rounded edges
    ink = (depth + 0.5).clip(0, 1)[..., None]          # (H, W, 1)
    image *= 1 - 0.4 / (1 + np.exp(-shade / 2))[..., None]
    image += ink * (light[..., None] * colour - image)
    label[depth > -1.5] = VOID
    label[depth > 1.5] = c


def toy_distance(rng, c, x, y, size):
    """Return the signed distance in pixels to the edge of a shape of class
    c, turned and stretched at random; negative inside."""
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    x, y = (x * np.cos(turn) - y * np.sin(turn)) * stretch, \
        (x * np.sin(turn) + y * np.cos(turn)) / stretch
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    if c == 1:                                         # disc
        return radius - 0.9 * size
    if c == 5:                                         # ring
        return abs(radius - 0.72 * size) - 0.28 * size
    corners, inner = TOY_CORNERS[c]
    half = np.pi / corners                # fold all onto half of one corner
    angle = abs((angle + half) % (2 * half) - half)
    edge = size * (inner * np.exp(1j * half) - 1)      # from tip inwards
    out = np.exp(1j * angle) * radius - size
    return (out * np.conj(edge)).imag / -abs(edge)


# ------------------------------------------------- command line
def main(argv=None):
    """Prepare the data set that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    names = parser.add_subparsers(metavar='NAME', required=True)
    option = {}                    # {name: the function that adds an option}
    for run in (toy, voc):
        name, about = run.__name__, run.__doc__.split('\n')[0]
        command = names.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        option[name] = command.add_argument
        option[name]('--to', metavar='DIR', default=f'data/{name}',
                     help='the folder to make (default: %(default)s)')
        if name in SOURCES:
            option[name]('--from', metavar='DIR', dest='source',
                         help='the folder of the archives (default: they are '
                              'downloaded)')
    for key, default in (('seed', 0), ('train', 200), ('val', 40)):
        option['toy'](f'--{key}', metavar='N', type=int, default=default,
                      help='default: %(default)s')
    option['voc']('--sbd-first', action='store_true',
                  help='training images that SBD labels get its mask, not '
                       "VOC's: the variant of many papers; val keeps VOC's")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    utils.launch(main)
