"""Labels from COCO's polygons and run lengths (RLE)."""
import numpy as np

import utils
from converters.layout import VOID
from lib import images


def read_objects(data, classes, path):
    """Group the objects of JSON in COCO's format by image.

    Args:
        data: what the JSON holds.
        classes: {category id: class}; objects of others are left out.
        path: its path, for the error.
    Returns: {image's file: (size (H, W), objects)}, an object being (class,
    segmentation); a crowd's class is void.
    """
    try:
        found = {image['id']: (image['file_name'], (
            image['height'], image['width']), []) for image in data['images']}
        for note in data['annotations']:
            if note['category_id'] in classes:
                c = VOID if note.get('iscrowd') else \
                    classes[note['category_id']]
                found[note['image_id']][2].append((c, note['segmentation']))
    except (KeyError, TypeError) as error:
        raise utils.UserError(f"{path} is not JSON in COCO's format: {error} "
                              f'is not there') from None
    return {file: (size, objects) for file, size, objects in found.values()}


def decode_segmentation(segmentation, size):
    """Return where an object is on an image of size (H, W), (H, W) bool.

    segmentation: polygons, or an RLE whose counts may be compressed. Raises
    UserError for one that does not fit.
    """
    mask = utils.import_optional('pycocotools.mask')
    if not isinstance(segmentation, dict):
        polygons = [corners for corners in segmentation if len(corners) > 5]
        if any(len(corners) % 2 for corners in polygons):
            raise utils.UserError('a polygon has an x without a y')
        if not polygons:                        # fewer than three corners
            return np.zeros(size, bool)
        rle = mask.merge(mask.frPyObjects(polygons, *size))
    elif list(segmentation['size']) != list(size):
        raise utils.UserError(f'an RLE is of size {segmentation["size"]}, its '
                              f'image of {list(size)}')
    elif isinstance(segmentation['counts'], list):
        rle = mask.frPyObjects(segmentation, *size)
    else:
        rle = segmentation
    return mask.decode(rle).astype(bool)


def rasterize_polygons(size, objects):
    """Return the label (H, W) uint8 of the objects of read_objects().

    Where objects overlap the first wins; void gives way to all.
    """
    label = np.zeros(size, np.uint8)
    for c, segmentation in sorted(objects, key=lambda x: x[0] == VOID):
        label[(label == 0) & decode_segmentation(segmentation, size)] = c
    return label


def write_label(path, size, objects, colours, more_than=-1):
    """Write the label of an image of size (H, W), if it has more than so many
    pixels of classes."""
    label = rasterize_polygons(size, objects)
    if np.count_nonzero((label > 0) & (label < VOID)) > more_than:
        images.save_label(label, path, colours)
