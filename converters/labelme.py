"""JSON of labelme, a file for each image: polygons, rectangles, circles and
masks.
"""
import base64
import collections
import io
import os
import posixpath

import numpy as np
from PIL import Image

import utils
from converters import archives, layout, polygons
from lib import images


def read(args, index):
    """Read a folder of labelme's files, args.masks.

    Where outlines overlap the last of the file wins, as labelme draws it on
    top. Returns: [label], sorted, and [(image, size, objects)].
    """
    files = layout.list_files(args.masks, ('.json',))
    parts = layout.map_in_processes(
        parse_file, [(os.path.join(args.masks, file),) for file in files],
        'annotations', len(files))
    found, skipped = [], collections.Counter()
    for file, (image, size, objects, others) in zip(files, parts):
        skipped.update(others)
        path = os.path.join(args.masks, file)
        place = index.find((posixpath.join(posixpath.dirname(file), image),
                            image), path)
        if place is None:
            raise utils.UserError(f'{path} is of the image {image}, which is '
                                  f'not in {args.images}')
        found.append((place, size or images.upright_size(
            os.path.join(args.images, place)), objects))
    if skipped:
        utils.log(f'{utils.plural(skipped.total(), "shape")} without an area '
                  f'left out: ' + ', '.join(f'{n} {kind}' for kind, n
                                            in skipped.most_common()))
    return sorted({name for *_, objects in found for name, _ in objects}
                  ), found


def parse_file(path):
    """Read one file.

    Returns: its image's name without folders, size (H, W) or None, objects,
    the last shape first, and a Counter of the types of shapes without an
    area.
    """
    with open(path, 'rb') as file:
        data = archives.parse_json(file.read(), path)
    if isinstance(data, dict) and 'annotations' in data:
        raise utils.UserError(f"{path} is JSON in COCO's format; name the "
                              f'file itself, not its folder')
    archives.check_json(data, ('shapes',), path, 'JSON of labelme')
    image = str(data.get('imagePath') or '').replace('\\', '/')
    image = posixpath.basename(image) or os.path.splitext(
        os.path.basename(path))[0]
    size = data.get('imageHeight'), data.get('imageWidth')
    if not polygons.is_size(size):
        size = None                     # then the image's own
    objects, skipped = [], collections.Counter()
    for i, shape in enumerate(data['shapes'], 1):
        try:
            name = ' '.join(shape['label'].split())
            kind = shape.get('shape_type') or 'polygon'
            where = outline_shape(shape, kind, size)
            skipped[kind] += where is None
        except (LookupError, TypeError, AttributeError, *images.UNREADABLE):
            n = len(data['shapes'])
            raise utils.UserError(f'{path}: shape {i} of {n} cannot be read; '
                                  f'draw it anew') from None
        if where is not None:
            objects.insert(0, (name, where))
    return image, size, objects, +skipped


def outline_shape(shape, kind, size):
    """Return a shape as COCO's polygons or RLE; None for one without an
    area."""
    points = np.array(shape['points'], float).reshape(-1, 2)
    if kind == 'mask':
        return encode_mask(shape['mask'], points[0], size)
    if kind == 'circle':                # its centre, and a point on its edge
        centre, edge = points
        angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
        points = centre + np.hypot(*(edge - centre)) * np.stack(
            (np.cos(angle), np.sin(angle)), 1)
    elif kind == 'rectangle' and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = np.array(((x1, y1), (x2, y1), (x2, y2), (x1, y2)))
    elif kind not in ('polygon', 'rectangle') or len(points) < 3:
        return None
    return [points.ravel().tolist()]


def encode_mask(data, corner, size):
    """Return the RLE of a mask of labelme's: a PNG in base64, whose upper
    left pixel lies at the corner (x, y) of an image of size (H, W)."""
    x, y = corner.round().astype(int).clip(0)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        part = np.array(image.convert('L')) > 0
    mask = np.zeros(size, np.uint8, order='F')
    area = mask[y:y + part.shape[0], x:x + part.shape[1]]
    area[:] = part[:area.shape[0], :area.shape[1]]
    return utils.import_optional('pycocotools.mask').encode(mask)
