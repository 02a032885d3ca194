"""A folder of masks: reads what it holds, and makes class numbers of it.

Masks hold class numbers (palette, grey, or RGB that is grey in truth) or
colours, which a class file or CVAT's labelmap.txt names. What a value means is
never guessed: where it is not clear, UserError asks.
"""
import os
import re

import numpy as np
from PIL import Image

import utils
from converters import layout, pairs
from lib import images

LABELMAP = re.compile(                  # a line of CVAT's
    r'(.{1,100}?):(\d{1,3}),(\d{1,3}),(\d{1,3}):.*')
GREY = 0x010101                     # a packed colour of R = G = B is n * GREY


def read(args, named):
    """Find images and their masks, and scan the masks for their values.

    named: the classes (names, colours) of read_classes(), or None.
    Returns: classes, {ID: (image's path, size (H, W))}, {ID: (mask's path,
    {value: class}, whether values are colours)}. Raises UserError where what
    a value means would be a guess.
    """
    files = pairs.pair_files(args)
    masks = {name: mask for name, (_, mask) in files.items()}
    found = dict(zip(files, layout.map_in_processes(
        scan_mask, [(mask, args.by_colour) for mask in masks.values()],
        'masks', len(masks)), strict=True))
    report_alpha([masks[name] for name in masks if found[name][3]])
    is_coloured = are_coloured(masks, found, named, args)
    values = {name: {value & 255 for value in values}
              if kind == 'grey' and not is_coloured else values
              for name, (values, _, kind, _) in found.items()}
    every = set().union(*values.values())
    classes, table = (map_colours if is_coloured else map_numbers)(
        every, named, args)
    unknown = every - set(table)
    if unknown:
        spoilt = [masks[name] for name in masks if values[name] & unknown]
        raise utils.UserError(
            f'the colours {describe_colours(unknown)} in '
            f'{pairs.name_three(spoilt)} are not named in {args.classes}: add '
            f'a line for each, "void r g b" for void')
    return (classes,
            {name: (path, found[name][1])
             for name, (path, _) in files.items()},
            {name: (mask, {value: table[value] for value in values[name]},
                    is_coloured) for name, mask in masks.items()})


def report_alpha(masks):
    """Log which masks have transparent pixels."""
    if masks:
        utils.log(f'{pairs.name_three(masks)}: transparent pixels count by '
                  f'their colour; alpha is ignored')


# ------------------------------------------------- classes
def read_classes(args):
    """Return the classes (names, colours) of --classes, or of a labelmap.txt
    in MASKS or beside it; None where there is neither.

    The colours of a labelmap.txt are those of the masks: args.by_colour is
    set with it.
    """
    if not args.classes:
        there = [path for path in (
            os.path.join(args.masks, name, 'labelmap.txt')
            for name in ('', os.pardir)) if os.path.isfile(path)]
        if not there:
            return None
        args.classes = os.path.normpath(there[0])
        utils.log(f'names and colours of the classes: {args.classes}')
    text = utils.read_text(args.classes)
    if not text.startswith('# label') and not LABELMAP.match(text):
        return images.read_class_file(args.classes)
    args.by_colour = True
    return parse_labelmap(text, args.classes)


def parse_labelmap(text, path):
    """Return names, colours of CVAT's labelmap.txt, background first."""
    rows = []
    for line in map(str.strip, text.split('\n')):
        if not line or line.startswith('#'):
            continue
        parts = LABELMAP.fullmatch(line)
        colour = [int(x) for x in parts.groups()[1:]] if parts else [256]
        if max(colour) > 255:
            raise utils.UserError(f'{path}: the line {line[:60]!r} is not '
                                  f'"name:r,g,b:parts:actions"')
        rows.append((parts[1], colour))
    if not rows:
        raise utils.UserError(f'{path} names no class')
    rows.sort(key=lambda row: row[0].lower() != 'background')
    return [name for name, _ in rows], [colour for _, colour in rows]


def split_void(named):
    """Return classes (names, colours) without void, and the class of each row,
    VOID for void."""
    kept = [i for i, name in enumerate(named[0]) if name.lower() != 'void']
    if len(kept) > layout.VOID:
        raise utils.UserError(f'{len(kept)} classes are named; a label holds '
                              f'at most {layout.VOID}, and void')
    classes = tuple([column[i] for i in kept] for column in named)
    return classes, [kept.index(i) if i in kept else layout.VOID
                     for i in range(len(named[0]))]


# ------------------------------------------------- what values mean
def are_coloured(masks, found, named, args):
    """Tell whether the values of masks are colours; UserError where those of
    some are and those of others are not."""
    by_kind = {found[name][2]: mask for name, mask in masks.items()}
    coloured = by_kind.get('colours')
    if coloured and 'numbers' in by_kind:
        raise utils.UserError(f'{coloured} is coloured, {by_kind["numbers"]} '
                              f'is not; --by-colour reads the colours of all')
    if coloured and args.white:
        raise utils.UserError(
            f'--white {args.white} is for masks of two numbers; {coloured} is '
            f'read by its colours, which --classes names')
    if by_kind.keys() == {'grey'} and named and not args.white:
        known = set(pack_rgb(np.uint8(named[1])).tolist())  # RGB, yet grey
        return all(values <= known for values, *_ in found.values())
    return bool(coloured)


def map_numbers(values, named, args):
    """Return (classes, {value: class}) of masks that hold these numbers."""
    shown = f'the masks of {args.masks} hold {describe(values)}'
    one = max(values) if len(values) == 2 and 0 in values else 0
    if args.white and not one:
        raise utils.UserError(f'--white {args.white} is for masks of 0 and '
                              f'one other value; {shown}')
    if not args.white and one and (
            one == layout.VOID or one >= len(named[0] if named else '01')):
        raise utils.UserError(f'{shown} alone: is {one} the object or void? '
                              f'Use --white object or --white void')
    table = {value: value for value in values}
    if args.white:
        table[one] = 1 if args.white == 'object' else layout.VOID
    used = set(table.values()) - {layout.VOID}
    n = len(named[0]) if named else max(2, len(used))
    if not used <= set(range(n)):
        raise utils.UserError(
            f'{shown}, which are not the classes 0 to {n - 1}: number them '
            f'so, or name each in a file for --classes'
            + '; with --by-colour by its colour' * (max(used) > n))
    if len(used) < 2:
        raise utils.UserError(f'{shown}: one class is nothing to learn')
    classes, place = split_void(named or (
        [str(i) for i in range(n)], images.voc_palette()[:n].tolist()))
    return classes, {value: layout.VOID if c == layout.VOID else place[c]
                     for value, c in table.items()}


def map_colours(values, named, args):
    """Return (classes, {packed colour: class}) of coloured masks."""
    if not named:
        raise utils.UserError(
            f'the masks of {args.masks} are coloured '
            f'({describe_colours(values)}): name each class in a file, a line '
            f'"name r g b" each, "void r g b" for void, and give it with '
            f'--classes')
    classes, place = split_void(named)
    table = dict(zip(pack_rgb(np.uint8(named[1])).tolist(), place))
    if len(table) < len(place):
        raise utils.UserError(f'{args.classes} has a colour twice: a mask '
                              f'could not tell these classes apart')
    return classes, table


def describe(values):
    """Return the first eight values in words."""
    shown = sorted(values)
    return ', '.join(map(str, shown[:8])) + ', ...' * (len(shown) > 8)


def describe_colours(values):
    """Return the first eight packed colours in words, "r g b" each."""
    return describe(f'{value >> 16} {value >> 8 & 255} {value & 255}'
                    for value in values)


def pack_rgb(colours):
    """Return colours (..., 3) uint8 as a number each, int32."""
    r, g, b = np.moveaxis(colours.astype(np.int32), -1, 0)
    return r << 16 | g << 8 | b


# ------------------------------------------------- in several processes
def read_mask(path, by_colour=False):
    """Return (values (H, W), kind, whether pixels are transparent) of a mask.

    kind: 'numbers'; 'colours', packed, of a coloured mask, or with by_colour
    of any; 'grey', packed, of RGB where all are R = G = B.
    """
    try:
        with Image.open(path) as image:
            raw = check_format(image, path)
            has_alpha = 'A' in image.getbands() and \
                image.getchannel('A').getextrema()[0] < 255
            if image.mode == 'LA':
                image = image.getchannel('L')
            if image.mode[0] == 'I':
                image = to_8_bits(image, path)
            image.info.pop('transparency', None)    # of a palette
            if by_colour or len(image.getbands()) > 1:
                mask = pack_rgb(np.array(image.convert('RGB')))
                is_grey = not by_colour and not (mask % GREY).any()
                return mask, 'grey' if is_grey else 'colours', has_alpha
            mask = np.array(image)
            mask = mask.astype(np.uint8) if mask.dtype == bool else mask
            if raw in ('L;2', 'L;4'):       # Pillow stretches it to 0..255
                mask //= 85 if raw == 'L;2' else 17
    except images.UNREADABLE:
        raise utils.UserError(f'{path} cannot be read as a mask: it is '
                              f'damaged, or of no known format') from None
    return mask, 'numbers', has_alpha


def check_format(image, path):
    """Return how a mask is stored, in Pillow's terms; raise UserError where
    the file, or reading it, changes its values."""
    if image.format in ('JPEG', 'MPO', 'WEBP'):
        raise utils.UserError(
            f'{path} is a {image.format} by its content, which changes the '
            f'class numbers of a mask when it compresses; export it as PNG')
    raw = str(image.tile[0][3]) if image.tile else ''
    if image.mode == 'F' or ';16' in raw and image.mode[0] != 'I':
        raise utils.UserError(f'{path} has more than 8 bits a channel; save '
                              f'it with 8')
    return raw


def to_8_bits(image, path):
    """Return an image of more bits as one of 8; UserError for other values.
    """
    values = np.array(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        wrong = low if low < 0 else high
        raise utils.UserError(f'{path} has the value {wrong}; the class '
                              f'numbers of a mask are 0 to 255')
    return Image.fromarray(values.astype(np.uint8))


def scan_mask(path, by_colour):
    """Return (set of the values of a mask, its size (H, W), its kind, whether
    pixels are transparent), as read_mask() has them."""
    mask, kind, has_alpha = read_mask(path, by_colour)
    return set(np.unique(mask).tolist()), mask.shape, kind, has_alpha


def convert_mask(path, source, table, is_coloured, colours):
    """Write a mask as a label, by {value or packed colour: class}."""
    mask, kind, _ = read_mask(source, is_coloured)
    mask = mask & 255 if kind == 'grey' else mask
    known = np.array(sorted(table))
    place = np.searchsorted(known, mask).clip(max=len(known) - 1)
    if (known[place] != mask).any():
        raise utils.UserError(f'{source} was changed meanwhile; run the '
                              f'command again')
    label = np.array([table[value] for value in known.tolist()], np.uint8)
    images.save_label(label[place], path, colours)
