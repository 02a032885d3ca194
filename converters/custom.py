"""One's own images and masks: a folder of masks, or JSON in COCO's format."""
import os

import numpy as np
from PIL import Image, ImageOps

import utils
from converters import archives, layout, polygons
from lib import download, images

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
MASKS = ('.png', '.bmp', '.tif', '.tiff', '.gif')   # no lossy compression
ORIENTATION = 0x0112         # the EXIF tag of a rotated image


def convert(args):
    """Convert your own images and masks: train, val.

    IMAGES: a folder of images. MASKS: a folder of masks, each named as its
    image is, of class numbers (palette or grey; 255 is void) or of colours
    that --classes names; or JSON in COCO's format, whose categories become
    classes 1, 2, ... over a background.
    """
    is_json = args.masks.endswith('.json')
    named = images.read_class_file(args.classes) if args.classes else None
    check_options(args, is_json)
    root, options = args.to, record_options(args, named)
    if layout.is_ready(root, 'custom', options):
        return
    read = read_json_masks if is_json else read_mask_folder
    classes, sources, labels = read(args, named)
    if len(labels) < 2:
        raise utils.UserError(f'{args.images} has {len(labels)} images with a '
                              f'mask; a split into train and val needs 2')
    layout.begin(root, 'custom', options, classes)
    write = polygons.write_label if is_json else convert_mask
    layout.run_jobs([
        (write, layout.label_path(root, name), *label, classes[1])
        for name, label in labels.items()] + [
        (convert_image, layout.image_path(root, name), *sources[name])
        for name in labels], 'convert')
    layout.finish(root, 'custom', options,
                  random_split(labels, args.val, args.seed))
    utils.log(f'classes: {", ".join(classes[0])}. To train on them:\n'
              f'python train.py DATA_ROOT={root} TRAIN_SPLIT=train '
              f'N_CLASSES={len(classes[0])}')


def check_options(args, is_json):
    """Raise UserError for options that cannot be, or not together."""
    if not 0 < args.val < 1 or args.seed < 0:
        raise utils.UserError(f'--val {args.val} --seed {args.seed}: a share '
                              f'between 0 and 1, and a seed of 0 or more')
    if is_json and (args.by_colour or args.white or args.suffix):
        raise utils.UserError('--by-colour, --white and --suffix are for a '
                              'folder of masks, not for JSON')


def record_options(args, named):
    """Return the options as prepared.json keeps them."""
    options = {key: getattr(args, key) for key in (
        'by_colour', 'white', 'suffix', 'val', 'seed')}
    options.update({key: os.path.abspath(getattr(args, key))
                    for key in ('images', 'masks')},
                   classes=named and [*named])
    if os.path.isfile(args.masks):
        options['sha256'] = download.file_hash(args.masks)
    return options


def random_split(names, share, seed):
    """Return {'train': IDs, 'val': IDs}, at least one each."""
    order = np.random.default_rng(seed).permutation(sorted(names)).tolist()
    n_val = min(max(1, round(share * len(order))), len(order) - 1)
    return {'train': order[n_val:], 'val': order[:n_val]}


# ------------------------------------------------- JSON in COCO's format
def read_json_masks(args, named):
    """Read JSON in COCO's format; named: the classes of --classes, which give
    its classes colours.

    Returns: classes, {ID: (image's path, size)}, {ID: (size, objects)}.
    """
    utils.import_optional('pycocotools.mask')
    if not os.path.isfile(args.masks):
        raise utils.UserError(f'{args.masks} is not there')
    with open(args.masks, 'rb') as file:
        data = archives.parse_json(file.read(), args.masks)
    categories = read_categories(data, args.masks)
    classes = (['background', *categories.values()],
               images.voc_palette()[:len(categories) + 1].tolist())
    if named and named[0] != classes[0]:
        raise utils.UserError(f'{args.classes} names {", ".join(named[0])}; '
                              f'{args.masks} has {", ".join(classes[0])}')
    found = polygons.read_objects(
        data, {ID: i for i, ID in enumerate(categories, 1)}, args.masks)
    sources, labels = {}, {}
    for file, (size, objects) in found.items():
        path = os.path.join(args.images, file)
        name = os.path.splitext(os.path.basename(file))[0]
        if not os.path.isfile(path):
            raise utils.UserError(f'{path} is not there, but {args.masks} '
                                  f'names it')
        if name in labels:
            raise utils.UserError(f'{args.masks} has two images of the name '
                                  f'{name}; rename one')
        sources[name], labels[name] = (path, size), (size, objects)
    return named or classes, sources, labels


def read_categories(data, path):
    """Return {category id: name}, sorted by id, of JSON in COCO's format."""
    try:
        names = {each['id']: each['name'] for each in data['categories']}
        unknown = {note['category_id'] for note in data['annotations']
                   } - set(names)
    except (KeyError, TypeError) as error:
        raise utils.UserError(f"{path} is not JSON in COCO's format: {error} "
                              f'is not there') from None
    if unknown or not names:
        raise utils.UserError(f'{path} names the categories {sorted(names)}, '
                              f'its objects are of {sorted(unknown)} too')
    return {ID: names[ID] for ID in sorted(names)}


# ------------------------------------------------- a folder of masks
def read_mask_folder(args, named):
    """Find images and their masks, and scan the masks for their values;
    named: the classes of --classes.

    Returns: classes, {ID: (image's path, size)}, {ID: (mask's path, {value:
    class}, whether values are colours)}. Raises UserError where what a value
    means would be a guess.
    """
    pairs = pair_files(args)
    scans = layout.map_in_processes(
        scan_mask, [(mask, args.by_colour) for _, mask in pairs.values()],
        'masks', len(pairs))
    values, sources, coloured = set(), {}, []
    for (name, (path, mask)), (found, size, is_coloured) in zip(
            pairs.items(), scans, strict=True):
        values |= found
        sources[name] = path, size
        coloured += [mask] * is_coloured
    if coloured and len(coloured) < len(pairs):
        raise utils.UserError(f'{coloured[0]} is coloured, others are not; '
                              f'--by-colour reads the colours of all')
    map_values = map_colours if coloured else map_numbers
    classes, table = map_values(values, named, args)
    return classes, sources, {name: (mask, table, bool(coloured))
                              for name, (_, mask) in pairs.items()}


def pair_files(args):
    """Return {ID: (image's path, mask's path)}."""
    sources = list_files(args.images, IMAGES, 'images')
    masks = list_files(args.masks, MASKS, 'masks')
    for name, path in sources.items():
        if name + args.suffix not in masks:
            raise utils.UserError(
                f'{path} has no mask: '
                f'{os.path.join(args.masks, name + args.suffix)}.png is not '
                f'there (--suffix: what masks have after the name)')
    spare = len(masks) - len(sources)
    if spare:
        utils.log(f'{spare} masks have no image: left out')
    return {name: (path, masks[name + args.suffix])
            for name, path in sources.items()}


def list_files(folder, endings, what):
    """Return {name without ending: path} of a folder's files."""
    if not os.path.isdir(folder):
        raise utils.UserError(f'{folder}: no such folder of {what}')
    found = {}
    for file in sorted(os.listdir(folder)):
        name, end = os.path.splitext(file)
        if end.lower() not in endings or file.startswith('.'):
            continue
        if name in found:
            raise utils.UserError(f'{found[name]} and {file} have one name; '
                                  f'rename one')
        found[name] = os.path.join(folder, file)
    if not found:
        raise utils.UserError(f'{folder} has no {what} ({" ".join(endings)})')
    return found


def map_numbers(values, named, args):
    """Return (classes, {value: class}) of masks that hold these numbers."""
    table, shown = {value: value for value in values}, describe_values(values)
    if args.white and values != {0, 255}:
        raise utils.UserError(f'--white is for masks of 0 and 255 alone; '
                              f'these hold {shown}')
    if values <= {0, 255} and 255 in values and not args.white:
        raise utils.UserError(f'the masks of {args.masks} hold 0 and 255 '
                              f'alone: is 255 the object or void? Use --white '
                              f'object or --white void')
    if args.white == 'object':
        table[255] = 1
    used = set(table.values()) - {layout.VOID}
    n = len(named[0]) if named else len(used)
    if not used <= set(range(n)):
        raise utils.UserError(
            f'the masks of {args.masks} hold {shown}, which are not the '
            f'classes 0 to {n - 1}: number them so, or name each in a file '
            f'for --classes' + ('; with --by-colour by its colour'
                                if max(used) > n else ''))
    if n < 2:
        raise utils.UserError(f'the masks of {args.masks} hold {shown}: one '
                              f'class is nothing to learn')
    return named or ([str(i) for i in range(n)],
                     images.voc_palette()[:n].tolist()), table


def map_colours(values, named, args):
    """Return (classes, {packed colour: class}) of coloured masks; the class
    of the name void, if there is one, is void."""
    if not named:
        shown = describe_values({describe_colour(x) for x in values})
        raise utils.UserError(
            f'the masks of {args.masks} are coloured ({shown}): name each '
            f'class in a file, a line "name r g b" each, "void r g b" for '
            f'void, and give it with --classes')
    kept = [i for i, name in enumerate(named[0]) if name != 'void']
    classes = [[column[i] for i in kept] for column in named]
    table = {pack_rgb(np.uint8(colour)).item():
             kept.index(i) if i in kept else layout.VOID
             for i, colour in enumerate(named[1])}
    if len(table) < len(named[1]):
        raise utils.UserError(f'{args.classes} has a colour twice: a mask '
                              f'could not tell these classes apart')
    return classes, table


def describe_values(values):
    """Return the first eight values in words."""
    shown = sorted(values)
    return ', '.join(map(str, shown[:8])) + ', ...' * (len(shown) > 8)


def describe_colour(value):
    """Return a packed colour as "r g b"."""
    return f'{value >> 16} {value >> 8 & 255} {value & 255}'


def pack_rgb(colours):
    """Return colours (..., 3) uint8 as a number each, int32."""
    r, g, b = np.moveaxis(colours.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


# ------------------------------------------------- in several processes
def read_mask(path, by_colour=False):
    """Return (values (H, W), whether they are packed colours) of a mask: of
    a coloured one, or with by_colour of any, they are."""
    try:
        with Image.open(path) as image:
            if image.mode == 'LA':
                image = image.getchannel(0)
            if image.mode in ('RGB', 'RGBA', 'CMYK') or by_colour:
                return pack_rgb(np.array(image.convert('RGB'))), True
            mask = np.array(image)
            mask = mask.astype(np.uint8) if mask.dtype == bool else mask
            if image.tile and image.tile[0][3] in ('L;2', 'L;4'):
                mask //= 85 if image.tile[0][3] == 'L;2' else 17
    except images.UNREADABLE as error:
        raise utils.UserError(f'{path} cannot be read as a mask ({error})'
                              ) from None
    return mask, False


def scan_mask(path, by_colour):
    """Return (set of the values of a mask, its size (H, W), whether the
    values are packed colours)."""
    mask, is_coloured = read_mask(path, by_colour)
    return set(np.unique(mask).tolist()), mask.shape, is_coloured


def convert_mask(path, source, table, by_colour, colours):
    """Write a mask as a label, by {value or packed colour: class}."""
    mask, _ = read_mask(source, by_colour)
    known = np.array(sorted(table))
    place = np.searchsorted(known, mask).clip(max=len(known) - 1)
    wrong = mask[known[place] != mask]
    if wrong.size:
        raise utils.UserError(
            f'{source} has the colour {describe_colour(int(wrong[0]))} in '
            f'{wrong.size} pixels, which --classes does not name')
    label = np.array([table[value] for value in known.tolist()], np.uint8)
    images.save_label(label[place], path, colours)


def convert_image(path, source, size):
    """Write an image, rotated as its mask of size (H, W) is; a JPEG that
    needs no rotation is copied byte for byte."""
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
                layout.save_jpeg(turned, path)
                return
    except images.UNREADABLE as error:
        raise utils.UserError(f'{source} cannot be used ({error})') from None
    with open(source, 'rb') as file:
        layout.write_bytes(path, file.read())
