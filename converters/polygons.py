"""Labels from COCO's polygons and run lengths (RLE)."""
import collections

import numpy as np

import utils
from converters import archives
from converters.layout import VOID
from lib import images

FORMAT = "JSON in COCO's format"
MAX_SIDE = 2 ** 16              # of a JPEG


def read_categories(data, path):
    """Return {category id: name}, sorted by id, of JSON in COCO's format."""
    archives.check_json(data, ('categories', 'images', 'annotations'), path,
                        FORMAT)
    try:
        names = {each['id']: ' '.join(each['name'].split())
                 for each in data['categories']}
        unknown = {note['category_id'] for note in data['annotations']
                   } - names.keys()
        names = {ID: names[ID] for ID in sorted(names)}
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(path, error) from None
    if unknown or not names:
        raise utils.UserError(f'{path} names the categories {[*names]}, its '
                              f'annotations are of {sorted(unknown)} too')
    if len(names) < len(data['categories']):
        raise utils.UserError(f'{path} has two categories of one id; number '
                              f'them anew')
    return names


def read_objects(data, classes, path):
    """Group the objects of JSON in COCO's format by image, and log how many
    are crowds or have no outline.

    Args:
        data: what the JSON holds.
        classes: {category id: class}; objects of others are left out.
        path: its path, for the error.
    Returns: {image's file: (size (H, W), objects)}, an object being (class,
    segmentation); a crowd is void, and comes last. Raises UserError where no
    annotation has an outline.
    """
    archives.check_json(data, ('images', 'annotations'), path, FORMAT)
    found, crowds, n_boxes = {}, collections.defaultdict(list), 0
    try:
        for image in data['images']:
            size = image['height'], image['width']
            found[image['id']] = check_image(image, size, path), size, []
        notes = [note for note in data['annotations']
                 if note['category_id'] in classes]
        for note in notes:
            where, image = note.get('segmentation'), note['image_id']
            if image not in found:
                raise utils.UserError(f'{path} has annotations of the image '
                                      f'{image}, which is not in its images')
            if not has_outline(where):
                n_boxes += 1
            elif note.get('iscrowd'):
                crowds[image].append((VOID, where))
            else:
                found[image][2].append((classes[note['category_id']], where))
    except (KeyError, TypeError) as error:
        raise _malformed(path, error) from None
    count_notes(len(notes), n_boxes, sum(map(len, crowds.values())), path)
    files = {file: (size, objects + crowds[ID])
             for ID, (file, size, objects) in found.items()}
    if len(files) < len(data['images']):
        raise utils.UserError(f'{path} has an image twice, by its id or its '
                              f'file_name; leave one')
    return files


def _malformed(path, error):
    what = f'{error} is not there' if isinstance(error, KeyError) else (
        'an entry of another kind')
    return utils.UserError(f'{path} is not {FORMAT}: {what}')


def check_image(image, size, path):
    """Return the file_name of an image of COCO's; raise UserError where it or
    the size is none."""
    if not isinstance(image['file_name'], str) or not is_size(size):
        raise utils.UserError(
            f'{path} has the image {str(image["file_name"])[:60]!r} of width '
            f'{repr(size[1])[:20]} and height {repr(size[0])[:20]}')
    return image['file_name']


def is_size(size):
    """Tell whether (H, W) can be the size of an image."""
    return all(type(n) is int and 0 < n < MAX_SIDE for n in size) and (
        size[0] * size[1] <= images.MAX_PIXELS)


def has_outline(segmentation):
    """Tell whether there is an RLE, or a polygon of three corners or more."""
    return bool(segmentation) and (isinstance(segmentation, dict) or any(
        len(corners) > 5 for corners in segmentation))


def count_notes(n_all, n_boxes, n_crowds, path):
    """Log how many annotations have no outline or are crowds; raise UserError
    where none has an outline."""
    if n_boxes and n_boxes == n_all:
        raise utils.UserError(
            f'{n_boxes} of {n_all} annotations in {path} have a box and no '
            f'outline (segmentation), so every label would be background '
            f'alone; export polygons or masks (RLE)')
    if n_boxes:
        utils.log(f'{n_boxes} of {n_all} annotations in {path} have no '
                  f'outline (segmentation): left out, so background')
    if n_crowds:
        utils.log(f'{utils.plural(n_crowds, "crowd")} (iscrowd) in {path}: '
                  f'void')


def decode_segmentation(segmentation, size):
    """Return where an object is on an image of size (H, W), (H, W) bool.

    segmentation: polygons, or an RLE whose counts may be compressed. Raises
    UserError for one that does not fit.
    """
    mask = utils.import_optional('pycocotools.mask')
    try:
        if isinstance(segmentation, dict):
            if list(segmentation['size']) != list(size):
                raise utils.UserError(f'an RLE is of size '
                                      f'{segmentation["size"]}, its image of '
                                      f'{list(size)}')
            rle = segmentation
            if isinstance(rle['counts'], list):
                if sum(rle['counts']) != size[0] * size[1]:
                    raise ValueError
                rle = mask.frPyObjects(rle, *size)
        else:
            polygons = [check_polygon(corners, size)
                        for corners in segmentation if len(corners) > 5]
            if not polygons:                    # fewer than three corners
                return np.zeros(size, bool)
            rle = mask.merge(mask.frPyObjects(polygons, *size))
        where = mask.decode(rle).astype(bool)
        if np.count_nonzero(where) != mask.area(rle):   # counts too short:
            raise ValueError                # the rest is not initialised
        return where
    except (KeyError, TypeError, ValueError, OverflowError):
        raise utils.UserError('a segmentation is neither polygons nor an RLE'
                              ) from None


def check_polygon(corners, size):
    """Return a polygon's corners, x, y, x, y, ...; raise UserError where they
    are none, or so far from the image that they are no pixels."""
    if len(corners) % 2:
        raise utils.UserError('a polygon has an x without a y')
    if not np.abs(np.asarray(corners, float)).max() < 10 * max(size):
        raise utils.UserError(f'a polygon has a corner far from its image of '
                              f'{size[1]} x {size[0]} pixels')
    return corners


def rasterize_polygons(size, objects):
    """Return the label (H, W) uint8 of the objects of read_objects(); where
    they overlap the first wins."""
    label, is_free = np.zeros(size, np.uint8), np.ones(size, bool)
    for c, segmentation in objects:
        mask = decode_segmentation(segmentation, size)
        label[is_free & mask] = c
        is_free &= ~mask
    return label


def write_label(path, size, objects, colours, more_than=-1):
    """Write the label of an image of size (H, W), if it has more than so many
    pixels of classes."""
    label = rasterize_polygons(size, objects)
    if np.count_nonzero((label > 0) & (label < VOID)) > more_than:
        images.save_label(label, path, colours)
