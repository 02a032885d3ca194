"""Bring a data set into the one layout that dataset.py reads.

    python prepare.py toy [--to DIR] [--seed N] [--train N] [--val N]
    python prepare.py voc [--from DIR] [--to DIR] [--sbd-first]
    python prepare.py coco | cityscapes | context | cocostuff
                      [--from DIR] [--to DIR]
    python prepare.py masks IMAGES MASKS [--to DIR] [--classes FILE] ...

    DIR/JPEGImages/ID.jpg
    DIR/SegmentationClassAug/ID.png             class index, 255 = void
    DIR/ImageSets/Segmentation/SPLIT.txt        an ID a line, sorted
    DIR/classes.txt                             a line a class: name r g b
    DIR/prepared.json                           what was asked for; counts

Archives are downloaded into the folder `downloads` beside DIR, or taken from
--from DIR, and read as they are, in several processes. A run that was cut off
goes on when it is run again; a finished one is left as it is. H x W pixels.
"""
import argparse
import collections
import concurrent.futures
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
import zipfile
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps

import utils

LISTS = os.path.join('ImageSets', 'Segmentation')
VOID = 255
CLASSES = {'coco': 'voc'}    # whose class file is another set's
VOC_ID = '[0-9]{4}_[0-9]{6}'

# archives: url, hash ('': none is on record; the count of what is in it, and
# a zip's own check sums, tell), bytes, about; login: where a name and password
# are asked for; unpacked: bytes, about; lists: count and first digits of the
# sha256 of the sorted IDs, each with a line feed after it; counts: of images
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
    'coco': {
        'archives': (
            ('http://images.cocodataset.org/annotations/'
             'annotations_trainval2017.zip', '', 253_000_000),
            ('http://images.cocodataset.org/zips/train2017.zip', '',
             19_340_000_000),
            ('http://images.cocodataset.org/zips/val2017.zip', '',
             816_000_000)),
        'unpacked': 17_000_000_000,
        'counts': {'train': 118_287, 'val': 5000}},
    'cityscapes': {
        'login': 'https://www.cityscapes-dataset.com/downloads/',
        'archives': (('leftImg8bit_trainvaltest.zip', '', 11_600_000_000),
                     ('gtFine_trainvaltest.zip', '', 253_000_000)),
        'unpacked': 4_000_000_000,
        'counts': {'train': 2975, 'val': 500, 'test': 1525}},
    'context': {
        'archives': (
            ('http://host.robots.ox.ac.uk/pascal/VOC/voc2010/'
             'VOCtrainval_03-May-2010.tar',
             'sha1:bf9985e9f2b064752bf6bd654d89f017c76c395a', 1_360_000_000),
            ('https://codalabuser.blob.core.windows.net/public/'
             'trainval_merged.json',
             'sha1:169325d9f7e9047537fedca7b04de4dddf10b881', 600_000_000)),
        'unpacked': 1_100_000_000,
        'counts': {'train': 4998, 'val': 5105}},
    'cocostuff': {
        'archives': (
            ('http://calvin.inf.ed.ac.uk/wp-content/uploads/data/'
             'cocostuffdataset/cocostuff-10k-v1.1.zip', '', 2_100_000_000),),
        'unpacked': 1_900_000_000,
        'counts': {'train': 9000, 'test': 1000}},
}
VOC_FILES = {       # what is taken from the archives: kind, name; group 1: ID
    'list': r'VOCdevkit/VOC2012/ImageSets/Segmentation/'
            r'(train|val|trainval)\.txt',
    'image': r'VOCdevkit/VOC2012/JPEGImages/([0-9]{4}_[0-9]{6})\.jpg',
    'label': r'VOCdevkit/VOC2012/SegmentationClass/([0-9]{4}_[0-9]{6})\.png'}
SBD_FILES = {
    'list': r'benchmark_RELEASE/dataset/(train|val)\.txt',
    'label': r'benchmark_RELEASE/dataset/cls/([0-9]{4}_[0-9]{6})\.mat'}
COCO_FILES = {
    'annotations': r'annotations/instances_(train|val)2017\.json',
    'train': r'train2017/([0-9]{12})\.jpg',
    'val': r'val2017/([0-9]{12})\.jpg'}
CITY_FILES = {
    'image': r'leftImg8bit/(?:train|val|test)/[a-z-]+/'
             r'([a-z-]+_[0-9]{6}_[0-9]{6})_leftImg8bit\.png',
    'label': r'gtFine/(train|val|test)/[a-z-]+/'
             r'([a-z-]+_[0-9]{6}_[0-9]{6})_gtFine_labelIds\.png'}
CONTEXT_FILES = {'image': r'VOCdevkit/VOC2010/JPEGImages/'
                          r'([0-9]{4}_[0-9]{6})\.jpg'}
STUFF_FILES = {
    'list': r'(?:[\w.-]+/)?imageLists/(train|test)\.txt',
    'image': r'(?:[\w.-]+/)?images/(COCO_train2014_[0-9]{12})\.jpg',
    'label': r'(?:[\w.-]+/)?annotations/(COCO_train2014_[0-9]{12})\.mat'}
# the ids that become class 0, 1, 2, ...
COCO_IDS = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20,
            63, 7, 72)
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31,
            32, 33)
CONTEXT_IDS = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80,
    85, 98, 104, 105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232,
    258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366,
    368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458)
STUFF_IDS = tuple(sorted({*range(1, 183)} - {12, 26, 29, 30, 45, 66, 68, 69,
                                             71, 83, 91}))
COCO_LEAST = 1000            # an image with fewer pixels of classes is left
PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
MASKS = ('.png', '.bmp', '.tif', '.tiff', '.gif')   # no class is blurred
ORIENTATION = 0x0112         # the EXIF tag of a turned picture

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
    utils.log(f'{root} is ready: {name}, {stamp["counts"]}; remove it to make '
              f'it anew')
    return True


def begin(root, name, options, classes=None):
    """Make the folders of the layout, the class file (of the data set, or
    classes, (names, colours)) and the stamp."""
    try:
        for folder in ('JPEGImages', 'SegmentationClassAug', LISTS):
            os.makedirs(os.path.join(root, folder), exist_ok=True)
    except OSError as error:
        raise OSError(f'{root} cannot be made ({error}); name another folder '
                      f'with --to') from None
    path = os.path.join(root, 'classes.txt')
    if classes:
        with utils.atomic(path) as part, open(part, 'w') as file:
            file.writelines(f'{name} {r} {g} {b}\n'
                            for name, (r, g, b) in zip(*classes))
    else:
        shutil.copyfile(class_file(CLASSES.get(name, name)), path)
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
    os.sync()               # files were not made to wait for the disk
    utils.save_json({'name': name, 'options': options, 'counts': counts},
                    os.path.join(root, 'prepared.json'))
    utils.log(f'{root} is ready: {name}, {counts}')


def missing(root, splits):
    """Return the paths that are not there, or empty, as a power cut leaves
    them: lists, and what they name."""
    lists = [os.path.join(root, LISTS, split + '.txt') for split in splits]
    lost, names = [path for path in lists if not os.path.exists(path)], set()
    for path in filter(os.path.exists, lists):
        with open(path) as file:
            names.update(file.read().splitlines())
    return sorted(lost + [where(root, name) for name in names
                          for where in (image_path, label_path)
                          if not file_bytes(where(root, name))])


# ------------------------------------------------- archives
def fetch(name, source, root):
    """Return the paths of a data set's archives, all there and sound.

    source: the folder that holds them; None: they are downloaded. Raises
    FileNotFoundError for a missing one, ValueError for a wrong hash, OSError
    when the disk has too little room for what is still to come.
    """
    beside = os.path.join(os.path.dirname(os.path.abspath(root)), 'downloads')
    paths, to_come = {}, SOURCES[name]['unpacked']
    login = SOURCES[name].get('login')
    for url, digest, size in SOURCES[name]['archives']:
        path = os.path.join(source or beside, os.path.basename(url))
        paths[path] = url, digest
        if login and not os.path.isfile(path):
            raise FileNotFoundError(f'{path} is not there; it wants a log-in:'
                                    f' fetch {url} from {login}, and put it '
                                    f'there or name its folder with --from')
        if source and not os.path.isfile(path):
            raise FileNotFoundError(f'{path} is not there; get it from {url},'
                                    f' or leave out --from')
        if not os.path.isfile(path):
            to_come += size - file_bytes(path + '.part')
    check_room(root, to_come)
    for path, (url, digest) in paths.items():
        if not os.path.isfile(path):
            utils.download(url, path, digest)
        elif digest:
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
        raise _damaged(path, error) from None


def zipped(path, patterns):
    """Return [(kind, ID, ..., name)] of the members of a zip whose whole name
    matches one of the patterns {kind: pattern}; its groups are the IDs.

    Raises ValueError for a damaged archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, error) from None
    return [(kind, *match.groups(), name) for name in names
            for kind, pattern in patterns.items()
            if (match := re.fullmatch(pattern, name))]


def member(path, name):
    """Return the bytes of a zip's member. Raises ValueError."""
    try:
        return _opened(path, os.getpid(), os.stat(path).st_mtime_ns).read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None


@functools.cache
def _opened(path, pid, written):
    """Return a zip, open for the rest of the process of this number: its
    directory, of 100,000 members, is read once, and no file is shared.
    written: when it was; a new file of that path is opened anew."""
    return zipfile.ZipFile(path)


def _damaged(path, error):
    return ValueError(f'{path} is truncated or damaged ({error}); fetch it '
                      f'again')


def read_json(data, path):
    """Return what a JSON file holds; ValueError names its path."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise _damaged(path, error) from None


def in_processes(work, jobs, desc, total=None, done=None):
    """Yield what work(*job) returns for each of the (total) jobs, in turn, in
    several processes; those of which done(job) is true are passed over.

    work: a function of a module, as the processes import it. Raises what a
    call raised, ValueError or OSError, as a message for the user.
    """
    at_once = min(16, (total or 0) // 100 + 1)      # given to a process
    running, given = collections.deque(), []
    with concurrent.futures.ProcessPoolExecutor(
            min(8, os.cpu_count() or 1), initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for job in utils.progress(jobs, desc=desc, total=total):
            if not (done and done(job)):
                given.append(job)
            if len(given) == at_once:
                running.append(pool.submit(do_all, work, given))
                given = []
            if len(running) * at_once > 64:         # what is read ahead
                yield from result(running.popleft())
        running.append(pool.submit(do_all, work, given))
        for future in running:
            yield from result(future)


def do_all(work, jobs):
    """Return what work(*job) returns for each job."""
    return [work(*job) for job in jobs]


def result(future):
    """Return what a process has found; raise its error as ours."""
    try:
        return future.result()
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(str(error)) from error


def convert(jobs, desc):
    """Call work(path, *rest) for each job (work, path, *rest) whose path is
    not there yet, in several processes; work makes the file at path, or none.
    Where rest begins with a path, one older than that file is made anew.
    Raises as in_processes does; the message names the path.
    """
    for _ in in_processes(make, jobs, desc,
                          len(jobs) if isinstance(jobs, list) else None,
                          lambda job: is_made(*job[1:3])):
        pass


def is_made(path, source):
    """Say whether a file is there, whole, and not older than its source."""
    return file_bytes(path) and not (
        isinstance(source, str)
        and os.path.getmtime(source) > os.path.getmtime(path))


def make(work, path, *rest):
    """Call work(path, *rest); name the path where that fails."""
    try:
        work(path, *rest)
    except (ValueError, OSError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f'{path} cannot be made: {error}') from None


def write_bytes(path, data):
    """Write a file, whole or not at all."""
    with utils.atomic(path, flush=False) as part, open(part, 'wb') as file:
        file.write(data)


def copy(path, archive, name):
    """Write a zip's member as it is."""
    write_bytes(path, member(archive, name))


def numbered(mask, ids):
    """Return a mask (H, W) of ids as classes: ids[i] is i, others void."""
    table = np.full(257, VOID, np.uint8)
    table[list(ids)] = range(len(ids))
    return table[np.minimum(mask, np.int32(256))]


def check_counts(name, lists):
    """Raise ValueError unless the lists {split: IDs} are as long as the
    official ones."""
    for split, count in SOURCES[name]['counts'].items():
        if len(lists[split]) != count:
            archives = ', '.join(os.path.basename(url) for url, *_
                                 in SOURCES[name]['archives'])
            raise ValueError(f'{split} has {len(lists[split])} images, not '
                             f'{count}: {archives} are not the official, '
                             f'whole archives')


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
    utils.needed('scipy.io')
    root, options = args.to, {'sbd_first': args.sbd_first}
    if is_ready(root, 'voc', options):
        return
    voc_tar, sbd_tgz = fetch('voc', args.source, root)
    begin(root, 'voc', options)
    lists = {split: set() for split in SOURCES['voc']['lists']}
    for _, split, data in members(voc_tar, {'list': VOC_FILES['list']}):
        lists[split].update(data.decode().split())
    own = lists['val' if args.sbd_first else 'trainval']
    convert(sbd_jobs(sbd_tgz, root, own, lists['trainaug']), 'SBD')
    lists['trainaug'] |= lists['train']
    lists['trainaug'] -= lists['val']
    check_lists('voc', lists)
    convert(voc_jobs(voc_tar, root, lists), 'VOC')
    finish(root, 'voc', options, lists)


def sbd_jobs(archive, root, own, listed):
    """Yield the jobs of SBD's labels, and add its lists to the set listed.

    own: the IDs that have VOC's mask instead.
    """
    colours = palette('voc')
    for kind, name, data in members(archive, SBD_FILES):
        if kind == 'list':
            listed.update(data.decode().split())
        elif name not in own:
            yield sbd_label, label_path(root, name), data, colours


def sbd_label(path, data, colours):
    """Write SBD's mask, a .mat file's bytes, as a palette PNG."""
    from scipy.io import loadmat
    mask = loadmat(io.BytesIO(data))['GTcls']['Segmentation'][0, 0]
    utils.save_label(mask, path, colours)


def voc_jobs(archive, root, lists):
    """Yield the jobs of the lists' images, and of VOC's masks (convert leaves
    those alone that SBD has given)."""
    wanted = lists['trainaug'] | lists['val']       # all of train, trainval
    for kind, name, data in members(archive, VOC_FILES):
        if kind == 'image' and name in wanted:
            yield write_bytes, image_path(root, name), data
        if kind == 'label' and name in lists['trainval']:
            yield write_bytes, label_path(root, name), data


# ------------------------------------------------- COCO's polygons and RLE
def objects(data, classes, path):
    """Return {picture's file: (size (H, W), parts)} of JSON in COCO's format;
    parts: (class, segmentation) each, a crowd's class void.

    classes: {category id: class}; objects of others are left out.
    """
    try:
        images = {image['id']: (image['file_name'], (
            image['height'], image['width']), []) for image in data['images']}
        for note in data['annotations']:
            if note['category_id'] in classes:
                value = (VOID if note.get('iscrowd') else
                         classes[note['category_id']])
                images[note['image_id']][2].append((value,
                                                    note['segmentation']))
    except (KeyError, TypeError) as error:
        raise ValueError(f'{path} is no JSON in the format of COCO: '
                         f'{error} is not there') from None
    return {file: (size, parts) for file, size, parts in images.values()}


def decode(segmentation, size):
    """Return where an object is on an image of size (H, W), (H, W) bool, of
    its polygons or RLE, whose counts may be packed. Raises ValueError."""
    from pycocotools import mask
    if not isinstance(segmentation, dict):
        polygons = [corners for corners in segmentation if len(corners) > 5]
        if any(len(corners) % 2 for corners in polygons):
            raise ValueError('a polygon has an x without a y')
        if not polygons:                        # fewer than three corners
            return np.zeros(size, bool)
        packed = mask.merge(mask.frPyObjects(polygons, *size))
    elif list(segmentation['size']) != list(size):
        raise ValueError(f'an RLE is of size {segmentation["size"]}, its '
                         f'image of {list(size)}')
    elif isinstance(segmentation['counts'], list):
        packed = mask.frPyObjects(segmentation, *size)
    else:
        packed = segmentation
    return mask.decode(packed).astype(bool)


def paint(path, size, parts, colours, least=-1):
    """Write the label of an image of size (H, W) from the parts of objects():
    where they overlap the first wins, and void gives way to all. With `least`
    pixels of classes or fewer nothing is written."""
    label = np.zeros(size, np.uint8)
    for value, segmentation in sorted(parts, key=lambda x: x[0] == VOID):
        label[(label == 0) & decode(segmentation, size)] = value
    if np.count_nonzero((label > 0) & (label < VOID)) > least:
        utils.save_label(label, path, colours)


def coco(args):
    """Bring COCO 2017 into the layout, in VOC's 21 classes: train, val.

    Images with more than 1,000 pixels of these classes. Where objects overlap
    the first of the file wins; a crowd is void where no object is.
    """
    utils.needed('pycocotools.mask')
    root, lists = args.to, {}
    if is_ready(root, 'coco', {}):
        return
    notes, *archives = fetch('coco', args.source, root)
    pictures = [dict(found[1:] for found in zipped(path, {split: COCO_FILES[
        split]})) for split, path in zip(('train', 'val'), archives)]
    check_counts('coco', dict(zip(('train', 'val'), pictures)))
    begin(root, 'coco', {})
    classes = {ID: i for i, ID in enumerate(COCO_IDS) if i}
    colours = palette('voc')
    files = {split: name for _, split, name in zipped(
        notes, {'json': COCO_FILES['annotations']})}
    for split, archive, there in zip(('train', 'val'), archives, pictures):
        if split not in files:
            raise ValueError(f'{notes} has no instances_{split}2017.json: it '
                             f'is not the official archive')
        found = objects(read_json(member(notes, files[split]), notes),
                        classes, files[split])
        found = {file[:-4]: parts for file, parts in found.items()
                 if file[:-4] in there and parts[1]}
        convert([(paint, label_path(root, name), *parts, colours, COCO_LEAST)
                 for name, parts in found.items()], f'{split}, labels')
        lists[split] = [name for name in found
                        if os.path.exists(label_path(root, name))]
        convert([(copy, image_path(root, name), archive, there[name])
                 for name in lists[split]], f'{split}, images')
    finish(root, 'coco', {}, lists)


# ------------------------------------------------- PASCAL Context
def context(args):
    """Bring PASCAL Context into the layout, 59 classes and background: train,
    val. What is none of the 59, or not labelled, is background."""
    utils.needed('pycocotools.mask')
    root, lists = args.to, {'train': [], 'val': []}
    if is_ready(root, 'context', {}):
        return
    archive, notes = fetch('context', args.source, root)
    with open(notes, 'rb') as file:
        data = read_json(file.read(), notes)
    try:                                        # into COCO's names
        for image in data['images']:
            image['id'] = image['image_id']
            lists[image['phase']].append(image['file_name'][:-4])
        for note in data['annos_segmentation']:
            note['segmentation'] = note.get('segmentation') or note['RLE']
        data['annotations'] = data['annos_segmentation']
    except (KeyError, TypeError) as error:
        raise ValueError(f'{notes} is not the JSON of Context: {error} is '
                         f'not there') from None
    check_counts('context', lists)
    begin(root, 'context', {})
    classes = {ID: i for i, ID in enumerate(CONTEXT_IDS) if i}
    colours = palette('context')
    convert([(paint, label_path(root, file[:-4]), *parts, colours)
             for file, parts in objects(data, classes, notes).items()
             if re.fullmatch(VOC_ID + r'\.jpg', file)], 'labels')
    wanted = {*lists['train'], *lists['val']}
    convert(((write_bytes, image_path(root, name), data) for _, name, data
             in members(archive, CONTEXT_FILES) if name in wanted), 'images')
    finish(root, 'context', {}, lists)


# ------------------------------------------------- COCO-Stuff, Cityscapes
def cocostuff(args):
    """Bring COCO-Stuff 10k v1.1 into the layout, 171 classes: train, test.
    Unlabelled pixels are void."""
    utils.needed('scipy.io')
    root = args.to
    if is_ready(root, 'cocostuff', {}):
        return
    archive, = fetch('cocostuff', args.source, root)
    found = zipped(archive, STUFF_FILES)
    lists = {'train': [], 'test': []}
    for kind, split, name in found:
        if kind == 'list':
            lists[split] = member(archive, name).decode().split()
    check_counts('cocostuff', lists)
    begin(root, 'cocostuff', {})
    wanted, colours = {*lists['train'], *lists['test']}, palette('cocostuff')
    convert([(copy, image_path(root, ID), archive, name) if kind == 'image'
             else (stuff_label, label_path(root, ID), archive, name, colours)
             for kind, ID, name in found if ID in wanted], 'convert')
    finish(root, 'cocostuff', {}, lists)


def stuff_label(path, archive, name, colours):
    """Write COCO-Stuff's mask, the field S of a .mat file."""
    from scipy.io import loadmat
    mask = loadmat(io.BytesIO(member(archive, name)))['S']
    utils.save_label(numbered(mask, STUFF_IDS), path, colours)


def cityscapes(args):
    """Bring Cityscapes into the layout, 19 classes: train, val, test.

    The pictures, PNGs, become JPEGs of quality 95 with whole chroma. The
    labels of test are void, as they are kept by the test server.
    """
    root, lists = args.to, {'train': [], 'val': [], 'test': []}
    if is_ready(root, 'cityscapes', {}):
        return
    pictures, masks = fetch('cityscapes', args.source, root)
    labels = zipped(masks, {'label': CITY_FILES['label']})
    for _, split, ID, _ in labels:
        lists[split].append(ID)
    check_counts('cityscapes', lists)
    begin(root, 'cityscapes', {})
    colours = palette('cityscapes')
    convert([(city_image, image_path(root, ID), pictures, name)
             for _, ID, name in zipped(pictures, {
                 'image': CITY_FILES['image']})]
            + [(city_label, label_path(root, ID), masks, name, colours)
               for _, _, ID, name in labels], 'convert')
    finish(root, 'cityscapes', {}, lists)


def city_image(path, archive, name):
    """Write a picture of Cityscapes as a JPEG."""
    with Image.open(io.BytesIO(member(archive, name))) as image:
        save_jpeg(image, path)


def city_label(path, archive, name, colours):
    """Write a mask of Cityscapes, a PNG of label ids."""
    with Image.open(io.BytesIO(member(archive, name))) as image:
        utils.save_label(numbered(np.array(image), CITY_IDS), path, colours)


def save_jpeg(image, path):
    """Write a picture, whole or not at all, as a JPEG of quality 95."""
    with utils.atomic(path, flush=False) as part:
        image.convert('RGB').save(part, 'JPEG', quality=95, subsampling=0)


# ------------------------------------------------- one's own
def masks(args):
    """Bring your own pictures and masks into the layout: train, val.

    IMAGES: a folder of pictures. MASKS: a folder of masks, each named as its
    picture is, of class numbers (palette or grey; 255 is void) or of colours
    that --classes names; or JSON in COCO's format, whose categories become
    classes 1, 2, ... over a background.
    """
    root, json_file = args.to, args.masks.endswith('.json')
    named = utils.read_class_file(args.classes) if args.classes else None
    options = {key: getattr(args, key) for key in (
        'by_colour', 'white', 'suffix', 'val', 'seed')}
    options.update({key: os.path.abspath(getattr(args, key))
                    for key in ('images', 'masks')},
                   classes=named and [*named])
    if json_file and os.path.isfile(args.masks):
        options['sha256'] = utils.file_hash(args.masks)
    if not 0 < args.val < 1 or args.seed < 0:
        raise ValueError(f'--val {args.val} --seed {args.seed}: a share '
                         f'between 0 and 1, and a seed of 0 or more')
    if json_file and (args.by_colour or args.white or args.suffix):
        raise ValueError('--by-colour, --white and --suffix are for a folder '
                         'of masks, not for JSON')
    if is_ready(root, 'masks', options):
        return
    own = from_json if json_file else from_folder
    classes, pictures, labels = own(args, named)
    if len(labels) < 2:
        raise ValueError(f'{args.images} has {len(labels)} pictures with a '
                         f'mask; a split into train and val needs 2')
    begin(root, 'masks', options, classes)
    write = paint if json_file else own_label
    convert([(write, label_path(root, name), *label, classes[1])
             for name, label in labels.items()]
            + [(own_picture, image_path(root, name), *pictures[name])
               for name in labels], 'convert')
    names = np.random.default_rng(args.seed).permutation(sorted(labels))
    val = min(max(1, round(args.val * len(names))), len(names) - 1)
    finish(root, 'masks', options, {'train': names[val:].tolist(),
                                    'val': names[:val].tolist()})
    utils.log(f'classes: {", ".join(classes[0])}. To train on them:\n'
              f'python train.py DATA_ROOT={root} TRAIN_SPLIT=train '
              f'N_CLASSES={len(classes[0])}')


def files(folder, endings, what):
    """Return {name without ending: path} of a folder's files."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f'{folder}: no such folder of {what}')
    found = {}
    for file in sorted(os.listdir(folder)):
        name, end = os.path.splitext(file)
        if end.lower() not in endings or file.startswith('.'):
            continue
        if name in found:
            raise ValueError(f'{found[name]} and {file} have one name; '
                             f'rename one')
        found[name] = os.path.join(folder, file)
    if not found:
        raise ValueError(f'{folder} has no {what} ({" ".join(endings)})')
    return found


def from_json(args, named):
    """Return (classes, {ID: (picture, size)}, {ID: (size, parts)}) of JSON in
    COCO's format; named: --classes, which gives its classes colours."""
    utils.needed('pycocotools.mask')
    if not os.path.isfile(args.masks):
        raise FileNotFoundError(f'{args.masks} is not there')
    with open(args.masks, 'rb') as file:
        data = read_json(file.read(), args.masks)
    try:
        names = {each['id']: each['name'] for each in data['categories']}
        strange = {note['category_id'] for note in data['annotations']
                   } - set(names)
    except (KeyError, TypeError) as error:
        raise ValueError(f'{args.masks} is no JSON in the format of COCO: '
                         f'{error} is not there') from None
    if strange or not names:
        raise ValueError(f'{args.masks} names the categories '
                         f'{sorted(names)}, its objects are of '
                         f'{sorted(strange)} too')
    order = sorted(names)
    classes = (['background', *(names[ID] for ID in order)],
               utils.voc_palette()[:len(order) + 1].tolist())
    if named and named[0] != classes[0]:
        raise ValueError(f'{args.classes} names {", ".join(named[0])}; '
                         f'{args.masks} has {", ".join(classes[0])}')
    pictures, labels = {}, {}
    for file, (size, parts) in objects(data, {
            ID: i + 1 for i, ID in enumerate(order)}, args.masks).items():
        path = os.path.join(args.images, file)
        name = os.path.splitext(os.path.basename(file))[0]
        if not os.path.isfile(path):
            raise FileNotFoundError(f'{path} is not there, but {args.masks} '
                                    f'speaks of it')
        if name in labels:
            raise ValueError(f'{args.masks} has two pictures of the name '
                             f'{name}; rename one')
        pictures[name], labels[name] = (path, size), (size, parts)
    return named or classes, pictures, labels


def from_folder(args, named):
    """Return (classes, {ID: (picture, size)}, {ID: (mask, table, whether by
    colour)}) of a folder of masks; named: the classes of --classes.

    Raises ValueError where what a value means would be a guess.
    """
    pictures = files(args.images, PICTURES, 'pictures')
    there = files(args.masks, MASKS, 'masks')
    for name, path in pictures.items():
        if name + args.suffix not in there:
            raise FileNotFoundError(
                f'{path} has no mask: '
                f'{os.path.join(args.masks, name + args.suffix)}.png is not '
                f'there (--suffix: what masks have after the name)')
    spare = len(there) - len(pictures)
    if spare:
        utils.log(f'{spare} masks have no picture: left out')
    paths = [there[name + args.suffix] for name in pictures]
    looks = list(in_processes(look, [(path, args.by_colour)
                                     for path in paths], 'masks',
                              len(paths)))
    coloured = [path for path, (_, _, kind) in zip(paths, looks) if kind]
    if coloured and len(coloured) < len(paths):
        raise ValueError(f'{coloured[0]} is coloured, others are not; '
                         f'--by-colour looks at the colours of all')
    values = set().union(*(found for found, _, _ in looks))
    if coloured:
        classes, table = by_colour(values, named, args)
    else:
        classes, table = by_number(values, named, args)
    pictures = {name: (path, size) for (name, path), (_, size, _)
                in zip(pictures.items(), looks)}
    return classes, pictures, {
        name: (path, table, bool(coloured))
        for name, path in zip(pictures, paths)}


def by_number(values, named, args):
    """Return (classes, {value: class}) of masks that hold these numbers."""
    table = {value: value for value in values}
    if args.white and values != {0, 255}:
        raise ValueError(f'--white is for masks of 0 and 255 alone; these '
                         f'hold {some(values)}')
    if values <= {0, 255} and 255 in values and not args.white:
        raise ValueError(f'the masks of {args.masks} hold 0 and 255 alone: '
                         f'is 255 the object or void? Say --white object or '
                         f'--white void')
    if args.white == 'object':
        table[255] = 1
    used = set(table.values()) - {VOID}
    n = len(named[0]) if named else len(used)
    if not used <= set(range(n)):
        raise ValueError(
            f'the masks of {args.masks} hold {some(values)}, which are not '
            f'the classes 0 to {n - 1}: number them so, or name each in '
            f'a file for --classes' + (
                '; with --by-colour by its colour' if max(used) > n else ''))
    if n < 2:
        raise ValueError(f'the masks of {args.masks} hold {some(values)}: '
                         f'one class is nothing to learn')
    return named or ([str(i) for i in range(n)],
                     utils.voc_palette()[:n].tolist()), table


def by_colour(values, named, args):
    """Return (classes, {colour: class}) of coloured masks; the class of the
    name void, if there is one, is void."""
    if not named:
        colours = some({f'{x >> 16} {x >> 8 & 255} {x & 255}'
                        for x in values})
        raise ValueError(f'the masks of {args.masks} are coloured ({colours}'
                         f'): name each class in a file, a line "name r g b" '
                         f'each, "void r g b" for void, and give it with '
                         f'--classes')
    kept = [i for i, name in enumerate(named[0]) if name != 'void']
    classes = [[part[i] for i in kept] for part in named]
    table = {packed(np.uint8(colour)).item():
             kept.index(i) if i in kept else VOID
             for i, colour in enumerate(named[1])}
    if len(table) < len(named[1]):
        raise ValueError(f'{args.classes} has a colour twice: a mask could '
                         f'not tell these classes apart')
    return classes, table


def some(values):
    """Return some values in words."""
    shown = sorted(values)
    return ', '.join(map(str, shown[:8])) + ', ...' * (len(shown) > 8)


def packed(colours):
    """Return colours (..., 3) uint8 as a number each."""
    r, g, b = np.moveaxis(colours.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


def read_mask(path, colour=False):
    """Return (numbers (H, W), whether they are packed colours) of a mask; a
    coloured mask's, or with colour any mask's, are. Raises ValueError."""
    try:
        with Image.open(path) as image:
            if image.mode == 'LA':
                image = image.getchannel(0)
            if image.mode in ('RGB', 'RGBA', 'CMYK') or colour:
                return packed(np.array(image.convert('RGB'))), True
            mask = np.array(image)
            mask = mask.astype(np.uint8) if mask.dtype == bool else mask
            if image.tile and image.tile[0][3] in ('L;2', 'L;4'):
                mask //= 85 if image.tile[0][3] == 'L;2' else 17
    except (OSError, ValueError, SyntaxError,
            Image.DecompressionBombError) as error:
        raise ValueError(f'{path} cannot be read as a mask ({error})'
                         ) from None
    return mask, False


def look(path, colour):
    """Return (values that a mask holds, its size (H, W), whether those are
    packed colours)."""
    mask, coloured = read_mask(path, colour)
    return set(np.unique(mask).tolist()), mask.shape, coloured


def own_label(path, source, table, colour, colours):
    """Write a mask as a label, by {value or packed colour: class}."""
    mask, _ = read_mask(source, colour)
    known = np.array(sorted(table))
    place = np.searchsorted(known, mask).clip(max=len(known) - 1)
    wrong = mask[known[place] != mask]
    if wrong.size:
        value = int(wrong[0])
        raise ValueError(f'{source} has the colour {value >> 16} '
                         f'{value >> 8 & 255} {value & 255} in '
                         f'{wrong.size} pixels, which --classes does not name')
    label = np.array([table[value] for value in known.tolist()], np.uint8)
    utils.save_label(label[place], path, colours)


def own_picture(path, source, size):
    """Write a picture, turned as its mask of size (H, W) is: a JPEG that
    needs no turning as it is."""
    try:
        with Image.open(source) as image:
            image.load()
            upright = image.getexif().get(ORIENTATION, 1) == 1
            turned = image if upright else ImageOps.exif_transpose(image)
            if size not in (image.size[::-1], turned.size[::-1]):
                raise ValueError(f'{image.size[0]} x {image.size[1]} pixels, '
                                 f'its mask {size[1]} x {size[0]}')
            if turned.size[::-1] != size:
                turned = image
            if image.mode[0] == 'I' or image.mode == 'F':
                raise ValueError('more than 8 bits a pixel; save it with 8')
            if turned is not image or image.format != 'JPEG' or (
                    image.mode not in ('RGB', 'L')):
                save_jpeg(turned, path)
                return
    except (OSError, ValueError, SyntaxError,
            Image.DecompressionBombError) as error:
        raise ValueError(f'{source} cannot be used ({error})') from None
    with open(source, 'rb') as file:
        write_bytes(path, file.read())


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
    for run in (toy, voc, coco, cityscapes, context, cocostuff, masks):
        name, about = run.__name__, run.__doc__.split('\n')[0]
        command = names.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        option[name] = command.add_argument
        option[name]('--to', metavar='DIR', default=f'data/{name}',
                     help='the folder to make (default: %(default)s)')
        if name in SOURCES:
            option[name]('--from', metavar='DIR', dest='source',
                         help='the folder of the archives (default: '
                              'downloads, beside the folder to make; what '
                              'is not there is downloaded)')
    for key, default in (('seed', 0), ('train', 200), ('val', 40)):
        option['toy'](f'--{key}', metavar='N', type=int, default=default,
                      help='default: %(default)s')
    option['voc']('--sbd-first', action='store_true',
                  help='training images that SBD labels get its mask, not '
                       "VOC's: the variant of many papers; val keeps VOC's")
    add = option['masks']
    add('images', metavar='IMAGES', help='a folder of pictures')
    add('masks', metavar='MASKS', help="a folder of masks, or COCO's JSON")
    add('--classes', metavar='FILE',
        help='a line a class, "name r g b", in the order of their numbers')
    add('--by-colour', action='store_true',
        help='palette and grey masks, too, by the colours of --classes')
    add('--white', choices=('object', 'void'),
        help='what 255 is in masks of 0 and 255 alone')
    add('--suffix', default='', help='of masks: with _mask, a.jpg has '
        'a_mask.png')
    add('--val', metavar='SHARE', type=float, default=0.2,
        help='the share of val (default: %(default)s)')
    add('--seed', metavar='N', type=int, default=0,
        help='of the split (default: %(default)s)')
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    utils.launch(main)
