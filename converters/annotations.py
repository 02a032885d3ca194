"""One's own annotations: outlines as COCO JSON, labelme JSON or YOLO polygons.

    FILE.json         COCO: images, annotations, categories
    FOLDER/**/*.json  labelme: a file for each image
    FOLDER/**/*.txt   YOLO: a file for each image, a line for each outline,
                      "class x1 y1 x2 y2 ...", 0..1 of the width and height

Class 0 is background, which no outline covers. Then come, without --classes,
COCO's categories by id, labelme's labels by the alphabet, YOLO's classes by
number; with --classes, that file's classes. A label named void or __ignore__
is void. Where outlines overlap, the first of COCO and YOLO wins, the last of
labelme, as it is drawn on top there.
"""
import collections
import os
import posixpath

import utils
from converters import archives, labelme, layout, polygons, yolo
from lib import images

BACKGROUND = ('background', '_background_')
VOID = ('void', '__ignore__')


def is_annotations(path):
    """Tell whether a path is annotations rather than a folder of masks: a
    .json file, or a folder with .json or .txt files and no masks.

    Images may lie beside their annotations, each the only one of its name.
    """
    if not os.path.isdir(path):
        return path.lower().endswith('.json')
    notes, others = ([os.path.splitext(file)[0] for file
                      in layout.list_files(path, endings)]
                     for endings in (('.json', '.txt'), layout.IMAGES))
    if not others:
        return bool(notes)
    return not {*notes}.isdisjoint(others) and len({*others}) == len(others)


def read(args, named):
    """Read the annotations args.masks of the images beneath args.images.

    named: (names, colours) of --classes, or None.
    Returns: (names, colours), {ID: (image's path, size (H, W))}, {ID: (size,
    objects)}, an object being (class, segmentation). The ID of a/b.jpg
    beneath args.images is a_b. Raises UserError.
    """
    utils.import_optional('pycocotools.mask')
    index = ImageIndex(args.images)
    if not os.path.isdir(args.masks):
        names, found = read_coco(args, index)
    elif layout.list_files(args.masks, ('.json',)):
        names, found = labelme.read(args, index)
    else:
        names, found = yolo.read(args, index, named and [
            name for name in named[0]
            if name.lower() not in (*BACKGROUND, *VOID)])
    if not any(objects for *_, objects in found):
        raise utils.UserError(f'{args.masks} has no outline at all: every '
                              f'label would be background alone')
    classes, table = number_classes(names, named, args)
    sources, labels = {}, {}
    for file, size, objects in found:
        ID = layout.name_image(file, args.images)
        if ID in labels:
            raise utils.UserError(f'{args.masks} has two images of the name '
                                  f'{ID}; rename one')
        sources[ID] = os.path.join(args.images, file), size
        labels[ID] = size, [(table.get(name, name), where)
                            for name, where in objects]
    count_images(args, index, found)
    return classes, sources, labels


def number_classes(names, named, args):
    """Return the classes (names, colours), and {category: class}."""
    known = {name: layout.VOID if name.lower() in VOID else 0
             for name in names if name.lower() in (*VOID, *BACKGROUND)}
    wanted = [*dict.fromkeys(name for name in names if name not in known)]
    odd = [name for name in wanted if not images.is_class_name(name)]
    if odd or not wanted:
        raise utils.UserError(f'{args.masks} has ' + (
            f'a class without a name of 1 to 100 printable characters: '
            f'{odd[0][:60]!r}' if odd else 'no class but background'))
    if not named:
        names = ['background', *wanted]
        colours = images.voc_palette()[:len(names)].tolist()
    else:
        rows = [row for row in zip(*named) if row[0].lower() not in VOID]
        names, colours = map(list, zip(*rows))
        lost = [name for name in wanted if name not in names]
        if lost or names[0].lower() not in BACKGROUND:
            raise utils.UserError(
                f'{args.classes} names {", ".join(names)}: ' + (
                    f'{args.masks} has {", ".join(lost)} too' if lost else
                    'the first class has to be background, which is what no '
                    'outline covers'))
    if len(names) > layout.VOID:
        raise utils.UserError(f'{args.masks} has {len(names)} classes with '
                              f'background; a label holds {layout.VOID}')
    return (names, colours), known | {name: names.index(name)
                                      for name in wanted}


def count_images(args, index, found):
    """Log how many images have no annotation file, or no outline."""
    spare = len(index.files) - len(found)
    if spare:
        utils.log(f'{utils.plural(spare, "image")} in {args.images} without '
                  f'annotation: left out')
    empty = sum(not objects for *_, objects in found)
    if empty:
        utils.log(f'{utils.plural(empty, "image")} without an outline: '
                  f'background alone')


class ImageIndex:
    """The images beneath a folder, to be found by path or by name."""

    def __init__(self, folder):
        self.files = layout.list_files(folder, layout.IMAGES)
        if not self.files:
            raise utils.UserError(f'{folder} is no folder of images '
                                  f'({" ".join(layout.IMAGES)})')
        self._by_key = collections.defaultdict(set)     # in lower case
        for file in self.files:
            for path in (file, os.path.splitext(file)[0]):
                self._by_key[path.lower()].add(file)
                self._by_key[posixpath.basename(path).lower()].add(file)

    def find(self, names, path):
        """Return the image that has the first possible of these names, paths
        with or without the ending, or None.

        path: the annotation, for the error where several images have it.
        """
        for name in names:
            found = self._by_key.get(name.lower(), ())
            found = sorted(file for file in found if name in (
                file, os.path.splitext(file)[0])) or sorted(found)
            if len(found) > 1:
                raise utils.UserError(f'{path} is of the image {name}, but '
                                      f'there are {" and ".join(found[:2])}; '
                                      f'rename one')
            if found:
                return found[0]
        return None


# ------------------------------------------------- COCO
def read_coco(args, index):
    """Return [category], [(image, size, objects)] of JSON in COCO's format."""
    if not os.path.isfile(args.masks):
        raise utils.UserError(f'{args.masks} is not there')
    with open(args.masks, 'rb') as file:
        data = archives.parse_json(file.read(), args.masks)
    if isinstance(data, dict) and 'shapes' in data:
        raise utils.UserError(f'{args.masks} is JSON of labelme; name its '
                              f'folder, not the file itself')
    categories = polygons.read_categories(data, args.masks)
    found = []
    for name, item in polygons.read_objects(data, categories,
                                            args.masks).items():
        file = index.find(coco_names(name, args), args.masks)
        if file is None:
            raise utils.UserError(f'{os.path.join(args.images, name)} is not '
                                  f'there, but {args.masks} names it')
        found.append((file, *item))
    return [*categories.values()], found


def coco_names(name, args):
    """Return the names by which to look for a file_name beneath IMAGES: as
    it is, and without folders that IMAGES itself ends with."""
    path = posixpath.normpath(name.replace('\\', '/'))
    if not images.is_id(path):
        raise utils.UserError(f'{args.masks} names the image '
                              f'{name[:60]!r}; a file_name has to lie '
                              f'beneath {args.images}')
    parts = path.split('/')
    ends = os.path.abspath(args.images).split(os.sep)
    return ['/'.join(parts[i:]) for i in range(len(parts))
            if not i or parts[:i] == ends[-i:]]
