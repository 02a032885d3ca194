"""Archives of data sets: fetching them, room on the disk, members, checks.

A data set's SOURCE says where it comes from:

    archives    (url, hash, bytes) each; hash '' where none is on record: the
                number of images, and a zip's own checksums, tell; bytes, about
    unpacked    bytes of the converted set, about
    login       page that asks for a name and password, where one does
    counts      {split: number of images}
    lists       {split: (number of IDs, first digits of the sha256 of the
                sorted IDs, a line feed after each)}
"""
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

import utils
from converters import layout
from lib import download, images


# ------------------------------------------------- fetching
def fetch(source, folder, root):
    """Return the paths of a data set's archives, all there and checked.

    Args:
        source: the data set's SOURCE.
        folder: the folder that holds them; None: downloads, beside root.
        root: the folder of the converted set.
    Raises: UserError for a missing one or a wrong hash; RunError when the
    disk has too little room for what is still to come.
    """
    beside = os.path.join(os.path.dirname(os.path.abspath(root)), 'downloads')
    paths = {url: os.path.join(folder or beside, os.path.basename(url))
             for url, _, _ in source['archives']}
    to_come = source['unpacked']
    for url, _, size in source['archives']:
        path = paths[url]
        if os.path.isfile(path):
            continue
        if 'login' in source:
            raise utils.UserError(f'{path} is not there; it needs a login: '
                                  f'get {url} from {source["login"]}, and put '
                                  f'it there or name its folder with --from')
        if folder:
            raise utils.UserError(f'{path} is not there; get it from {url}, '
                                  f'or leave out --from')
        to_come += size - layout.file_bytes(path + '.part')
    check_room(root, to_come)
    for url, expected, _ in source['archives']:
        if not os.path.isfile(paths[url]):
            download.download(url, paths[url], expected)
        elif expected:
            utils.log(f'checking {paths[url]}')
            try:
                download.check_hash(paths[url], expected)
            except utils.UserError as error:
                raise utils.UserError(f'{error}; get it anew from {url}'
                                      ) from None
    return list(paths.values())


def check_room(root, to_come):
    """Raise RunError unless the disk of root has room for to_come bytes, of
    which root may hold some already."""
    to_come -= sum(layout.file_bytes(os.path.join(root, kind))
                   for kind in ('JPEGImages', 'SegmentationClassAug'))
    there = os.path.abspath(root)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    free = shutil.disk_usage(there).free
    if free < to_come:
        raise utils.RunError(f'{there} has {free / 1e9:.2f} GB free, and '
                             f'{root} needs {to_come / 1e9:.2f} GB; make room '
                             f'or name another folder with --to')


# ------------------------------------------------- members
def tar_members(path, patterns):
    """Yield (kind, ID, bytes) of the files in a tar whose whole name matches
    one of the patterns {kind: pattern}; group 1 is the ID.

    Nothing is written under a name that the archive gives. Raises UserError
    for a damaged archive and for a link or device under a wanted name.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                for kind, pattern in patterns.items():
                    match = re.fullmatch(r'(?:\./)?' + pattern, member.name)
                    if match and not member.isreg():
                        raise utils.UserError(
                            f'{path}: {member.name} is no plain file; this '
                            f'is not the official archive')
                    if match:
                        data = archive.extractfile(member).read()
                        yield kind, match[1], data
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None


def zip_members(path, patterns):
    """Return [(kind, ID, ..., name)] of the members of a zip whose whole name
    matches one of the patterns {kind: pattern}; its groups are the IDs.

    Raises UserError for a damaged archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, error) from None
    return [(kind, *match.groups(), name) for name in names
            for kind, pattern in patterns.items()
            if (match := re.fullmatch(pattern, name))]


def read_member(path, name):
    """Return the bytes of a zip's member; raise UserError if damaged."""
    try:
        archive = _open_zip(path, os.getpid(), os.stat(path).st_mtime_ns)
        return archive.read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None


@functools.cache
def _open_zip(path, pid, mtime):
    """Return a zip that stays open: its directory, of 100,000 members, is
    read once by each process (pid), and anew when the file is (mtime)."""
    return zipfile.ZipFile(path)


def copy_member(path, archive, name):
    """Write a zip's member to path as it is."""
    layout.write_bytes(path, read_member(archive, name))


def _damaged(path, error):
    return utils.UserError(f'{path} is truncated or damaged ({error}); fetch '
                           f'it again')


# ------------------------------------------------- contents
def parse_json(data, path):
    """Return what JSON bytes hold, in UTF-8 or UTF-16; UserError names the
    path."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        where = getattr(error, 'lineno', 0)
        raise utils.UserError(f'{path} is truncated or damaged: no JSON'
                              + f' from line {where} on' * bool(where)
                              ) from None


def check_json(data, keys, path, kind):
    """Raise UserError unless JSON is an object with a list at each key.

    kind: what the file should be, in words.
    """
    if not isinstance(data, dict):
        raise utils.UserError(f'{path} is not {kind}: it holds a '
                              f'{type(data).__name__}, not an object with '
                              f'{" and ".join(keys)}')
    for key in keys:
        if not isinstance(data.get(key), list):
            raise utils.UserError(
                f'{path} is not {kind}: {key!r} is '
                f'{"no list" if key in data else "not there"} (it has '
                f'{", ".join(map(repr, [*data][:8])) or "nothing"})')


def parse_ids(data, path):
    """Return the IDs of a list's bytes; UserError names the path."""
    return images.check_ids(utils.decode_text(data, path).split(), path)


def open_image(path, name):
    """Return a zip's image, decoded, of Pillow's; UserError for no image."""
    try:
        image = Image.open(io.BytesIO(read_member(path, name)))
        image.load()
    except images.UNREADABLE as error:
        raise utils.UserError(f'{path}: {name} cannot be read as an image '
                              f'({type(error).__name__})') from None
    return image


def write_label(path, archive, name, ids, colours):
    """Write a zip's mask, an image of ids: ids[i] becomes class i, what is
    none of them void."""
    mask = np.array(open_image(archive, name))
    images.save_label(layout.remap_ids(mask, ids), path, colours)


def parse_mat(data, field):
    """Return a field, an array, of a .mat file's bytes. Raises UserError."""
    read = utils.import_optional('scipy.io').loadmat
    try:
        fields = read(io.BytesIO(data))
    except Exception:           # scipy's reader raises any, by the byte
        raise utils.UserError('no .mat file that can be read') from None
    if field not in fields:
        shown = ', '.join(name for name in fields if name[0] != '_')
        raise utils.UserError(f'the .mat file has no field {field}, but '
                              f'{shown or "nothing"}')
    return fields[field]


def check_counts(source, lists):
    """Raise UserError unless the lists {split: IDs} are as long as the
    official ones."""
    for split, count in source['counts'].items():
        if len(lists[split]) != count:
            archives = ', '.join(os.path.basename(url) for url, *_
                                 in source['archives'])
            n_images = utils.plural(len(lists[split]), 'image')
            raise utils.UserError(f'{split} has {n_images}, not {count:,}: '
                                  f'{archives} are not the official, complete '
                                  f'archives')


def check_lists(source, lists):
    """Raise UserError unless the lists {split: IDs} are the official ones."""
    for split, (count, digest) in source['lists'].items():
        text = ''.join(f'{ID}\n' for ID in sorted(lists[split]))
        found = hashlib.sha256(text.encode()).hexdigest()
        if len(lists[split]) != count or not found.startswith(digest):
            n_names = utils.plural(len(lists[split]), 'ID')
            raise utils.UserError(f'{split} has {n_names} of sha256 {found}, '
                                  f'not {count:,} of {digest}: the archives '
                                  f'are not the official ones')
