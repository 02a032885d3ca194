"""Polygons of YOLO, a .txt for each image: a line "class x1 y1 x2 y2 ..." for
each outline, its corners 0..1 of the image's width and height.
"""
import os
import posixpath
import re

import numpy as np

import utils
from converters import layout
from lib import images

NAMES = 'classes.txt'           # a name a line, class 0 first


def read(args, index, given):
    """Read a folder of YOLO's files, args.masks.

    given: the names of --classes but background and void, or None.
    Returns: [class], by number, and [(image, size, objects)].
    """
    pairs = pair_files(args, index)
    parts = [*layout.map_in_processes(
        parse_file, [(path, os.path.join(args.images, image))
                     for path, image in pairs.items()], 'annotations',
        len(pairs))]
    n_boxes = sum(n for _, _, n, _ in parts)
    if n_boxes:
        raise utils.UserError(
            f'{n_boxes} of {sum(n for *_, n in parts)} lines of {args.masks} '
            f'are boxes ("class x y width height"), which are no outlines; '
            f'export polygons ("class x1 y1 x2 y2 x3 y3 ...")')
    used = {number: path for path, (_, objects, _, _) in zip(pairs, parts)
            for number, _ in objects}
    source, names = find_names(args, given)
    if source:
        utils.log(f'names of the classes: {source}')
    else:
        names = {i: f'class {i}' for i in range(max(used, default=0) + 1)}
    lost = used.keys() - names.keys()
    if lost:
        raise utils.UserError(f'{used[min(lost)]} has class {min(lost)}, but '
                              f'{source} names {min(names)} to {max(names)}')
    return [names[i] for i in sorted(names)], [
        (image, size, [(names[i], where) for i, where in objects])
        for image, (size, objects, _, _) in zip(pairs.values(), parts)]


def pair_files(args, index):
    """Return {path of a .txt: its image}."""
    pairs, spare = {}, 0
    for file in layout.list_files(args.masks, ('.txt',)):
        if posixpath.basename(file) == NAMES:
            continue
        stem, path = file[:-4], os.path.join(args.masks, file)
        image = index.find((stem, posixpath.basename(stem)), path)
        if image is None:
            spare += 1
        else:
            pairs[path] = image
    if not pairs:
        raise utils.UserError(f'no .txt in {args.masks} has the name of an '
                              f'image in {args.images}')
    if spare:
        utils.log(f'{spare} .txt of {args.masks} without an image left out')
    return pairs


def parse_file(path, image):
    """Return (the image's size, [(class, polygons)], number of boxes, number
    of lines) of one file."""
    size, objects, n_boxes, n_lines = images.upright_size(image), [], 0, 0
    for i, line in enumerate(utils.read_text(path).split('\n'), 1):
        words = line.split()
        n_lines += bool(words)
        if len(words) == 5:
            n_boxes += 1
        elif words:
            try:
                number, *corners = map(float, words)
            except ValueError:
                number, corners = -1, []
            if number not in range(layout.VOID) or len(corners) < 6 or (
                    len(corners) % 2
                    or not all(-.01 < x < 1.01 for x in corners)):
                raise utils.UserError(
                    f'{path}, line {i}: not "class x1 y1 x2 y2 x3 y3 ...", '
                    f'the class 0 to 254, the corners 0 to 1')
            corners = np.reshape(corners, (-1, 2)) * size[::-1]
            objects.append((int(number), [corners.ravel().tolist()]))
    return size, objects, n_boxes, n_lines


# ------------------------------------------------- names of the classes
def find_names(args, given):
    """Return (path, {number: name}) of the data.yaml or classes.txt in the
    folder or up to two above it, else of --classes; else (None, {})."""
    folder = os.path.abspath(args.masks)
    for _ in range(3):
        path = os.path.join(folder, 'data.yaml')
        if os.path.isfile(path):
            return path, parse_yaml_names(path)
        path = os.path.join(folder, NAMES)
        if os.path.isfile(path) and path != os.path.abspath(
                args.classes or ''):
            lines = utils.read_text(path).strip().split('\n')
            return path, dict(enumerate(map(str.strip, lines)))
        folder = os.path.dirname(folder)
    return args.classes, dict(enumerate(given or ()))


def parse_yaml_names(path):
    """Return {number: name} of `names` in YOLO's YAML: a list or mapping, in
    brackets or a line each."""
    text = utils.read_text(path)
    found = re.search(r'^names:(.*?)(?=^\w|\Z)', text, re.M | re.S)
    body = re.sub(r'(^|\s)#.*', '', found[1] if found else '').strip()
    in_brackets = body[:1] in ('[', '{')
    plain = r'[^\s,][^,\n]*' if in_brackets else r'\S.*'
    form = rf'''"(.*?)"|'(.*?)'|({plain})'''
    names = {}
    for key, *forms in re.findall(
            rf'\s*(?:(\d{{1,9}})\s*:|-)?[ \t]*(?:{form})',
            body.strip('[]{}')):
        names[int(key) if key else len(names)] = ''.join(forms).strip()
    count = re.search(r'^nc: *(\d{1,9})', text, re.M)
    if not names or count and int(count[1]) != len(names):
        raise utils.UserError(f'{path}: the names of the classes cannot be '
                              f'read; write "names: [a, b, ...]", one for '
                              f'each class')
    return names
