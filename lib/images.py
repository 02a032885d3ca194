"""Reads and writes images, labels, class files and palettes.

Images are (H, W, 3) uint8 RGB, labels (H, W) uint8 class indices.
"""
import contextlib
import io
import os
import re
import struct
import warnings
from collections import Counter

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import ROOT, RunError, UserError, atomic_write, read_text

UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError,
              LookupError, struct.error, cv2.error,
              Image.DecompressionBombError)     # what decoders raise

MAX_PIXELS = 2 ** 28            # of an image, by its header: as RGB, 0.8 GB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2    # Pillow warns above it, and
warnings.simplefilter('ignore', Image.DecompressionBombWarning)
#                               refuses what has more than twice as many

ORIENTATION = 0x0112            # the EXIF tag of a rotated image
# what no name holds: control characters, and halves of characters (surrogates)
CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')


def _unreadable(path, kind, error):
    reason = _reason(error)
    return UserError(f'{path} cannot be read as {kind} ({reason}); replace it '
                     f'or take its id from the list')


def _reason(error):
    """Return in words why a decoder has failed."""
    if isinstance(error, UnidentifiedImageError):   # Pillow's text is the path
        return 'no known format'
    if isinstance(error, Image.DecompressionBombError):
        count = int(re.search(r'\d+', str(error))[0])
        return f'it has {count:,} pixels, at most {MAX_PIXELS:,} are read'
    if isinstance(error, cv2.error):                # several lines
        return 'no JPEG'
    return ' '.join(str(error).split()) or type(error).__name__


# ------------------------------------------------- reading
def read_image(path):
    """Return an image of a data set, rows as they are stored: EXIF's
    orientation is not applied, as labels do not have it.

    Raises UserError. OpenCV fills up a truncated JPEG with grey and says
    nothing, so a file without its end is left to Pillow to judge.
    """
    try:
        data = np.fromfile(path, np.uint8)
        has_end = data[-512:].tobytes().rstrip(b'\0').endswith(b'\xff\xd9')
        with Image.open(io.BytesIO(data)) as image:     # its header alone
            if not has_end or image.format not in ('JPEG', 'MPO'):
                return np.array(image.convert('RGB'))
        image = cv2.imdecode(
            data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise OSError('no JPEG')
    except UNREADABLE as error:
        raise _unreadable(path, 'an image', error) from None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label(path):
    """Return a PNG's class indices, palette or grey alike.

    Raises UserError for what is no PNG and for coloured masks.
    """
    try:
        with open(path, 'rb') as file:
            data = file.read()
        with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
            mode, label = image.mode, np.array(image)
    except UNREADABLE as error:
        raise _unreadable(path, 'a PNG', error) from None
    if mode not in ('P', 'L', '1'):
        raise UserError(f'{path} is a PNG of mode {mode}; a label holds class '
                        f'indices, 8-bit palette or grey')
    label = label.astype(np.uint8)
    depth, kind = data[24], data[25]        # grey of 2 or 4 bits: Pillow
    if kind == 0 and depth in (2, 4):       # stretches it to 0..255
        label //= 255 // (2 ** depth - 1)
    return label


def image_size(path):
    """Return (H, W) of an image, read from its header. Raises UserError."""
    try:
        with Image.open(path) as image:
            return image.size[::-1]
    except UNREADABLE as error:
        raise _unreadable(path, 'an image', error) from None


def upright_size(path):
    """Return (H, W) of an image as EXIF's orientation shows it. Raises
    UserError."""
    try:
        with Image.open(path) as image:
            is_turned = image.getexif().get(ORIENTATION, 1) > 4
            return image.size if is_turned else image.size[::-1]
    except UNREADABLE as error:
        raise _unreadable(path, 'an image', error) from None


def read_any_image(path):
    """Return any image that Pillow reads: turned upright, 16 bits made 8, on
    white where it is transparent. Raises UserError."""
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb_pixels(image)
    except UNREADABLE as error:
        raise UserError(f'{path} cannot be read as an image '
                        f'({_reason(error)})') from None


def _rgb_pixels(image):
    """Return a Pillow image as (H, W, 3); converted by strips of rows, since
    Pillow's own copies of a large one would take 1 GB each."""
    if image.mode.startswith('I'):
        grey = np.asarray(image)
        grey = grey // 257 if grey.max() > 255 else grey
        image = Image.fromarray(np.uint8(grey.clip(0, 255)))
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        pixels[top:bottom] = _to_rgb(image.crop((0, top, width, bottom)))
    return pixels


def _to_rgb(image):
    """Return a Pillow image in RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert('RGB')
    image = image.convert('RGBA')
    white = Image.new('RGB', image.size, 'white')
    white.paste(image, mask=image)
    return white


# ------------------------------------------------- writing
@contextlib.contextmanager
def writing(path):
    """Make the folder of a path; raise RunError that names the path where
    what is done meanwhile cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield
    except OSError as error:
        raise RunError(f'{path} cannot be written ({error}); make room, or '
                       f'name another place') from None


def save_image(image, path, **options):
    """Write an image, whole or not at all, as a JPEG or PNG by the path's
    ending; options: Pillow's."""
    kind = {'.jpg': 'JPEG', '.png': 'PNG'}[os.path.splitext(path)[1]]
    with atomic_write(path, flush=False) as part:
        Image.fromarray(image).save(part, kind, **options)


def save_label(label, path, colours):
    """Write a label as a palette PNG; colours [[r, g, b]]."""
    image = Image.fromarray(label)          # mode L, then read as indices
    image.putpalette(full_palette(colours).tobytes())
    with atomic_write(path, flush=False) as part:   # the default level takes
        image.save(part, 'PNG', compress_level=4)   # twice the time


# ------------------------------------------------- IDs
def is_id(name):
    """Tell whether a name is one of an image within a folder, `a` or `sub/a`,
    wherever it is read; only then may a path be made of it."""
    return (isinstance(name, str) and len(name) < 1000
            and not CONTROL.search(name)
            and '\\' not in name and name[1:3] != ':/'         # of Windows
            and {'', '.', '..'}.isdisjoint(name.split('/')))


def check_ids(names, path):
    """Return the IDs that a file names; raise UserError for the first that is
    none, such as one that leads out of the folder of images."""
    for name in names:
        if not is_id(name):
            raise UserError(f'{path} has the ID {str(name)[:60]!r}; an ID is '
                            f'the path of an image within its folder, without '
                            f'ending, such as a or sub/a')
    return names


def read_ids(path):
    """Return the IDs of a list, a line each, in its order. Raises UserError.
    """
    lines = map(str.strip, read_text(path).split('\n'))
    return check_ids([line for line in lines if line], path)


# ------------------------------------------------- classes and colours
def class_file(name):
    """Return the path of a data set's class file, classes/NAME.txt."""
    return os.path.join(ROOT, 'classes', f'{name}.txt')


def read_classes(root, n_classes):
    """Return a data set's class names and colours, [str], [[r, g, b]].

    From root/classes.txt; without one, numbers and VOC's colours. Raises
    UserError where n_classes contradicts it.
    """
    path = os.path.join(root, 'classes.txt')
    if not os.path.lexists(path):
        return ([str(i) for i in range(n_classes)],
                voc_palette()[:n_classes].tolist())
    names, colours = read_class_file(path)
    if len(names) != n_classes:
        raise UserError(f'N_CLASSES={n_classes}, but {path} names '
                        f'{len(names)} classes; set N_CLASSES={len(names)}')
    return names, colours


def is_class_name(name):
    """Tell whether a legend can show a name."""
    return 0 < len(name) <= 100 and not CONTROL.search(name)


def read_class_file(path):
    """Return names and colours of a file of lines "name r g b", [str],
    [[r, g, b]]; a name may hold spaces. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f'{path} is not there')
    rows = [line.split() for line in read_text(path).split('\n')
            if line.strip()]
    names = [' '.join(row[:-3]) for row in rows]
    for name, row in zip(names, rows):
        if not is_class_name(name) or not all(
                re.fullmatch(r'\d{1,3}', x) and int(x) < 256
                for x in row[-3:]):
            raise UserError(f'{path}: the line {" ".join(row)[:60]!r} is not '
                            f'"name r g b", a name of at most 100 characters '
                            f'and colours of 0 to 255')
    for name, count in Counter(names).items():
        if count > 1 and name != 'void':
            raise UserError(f'{path} names the class {name} twice; rename '
                            f'one')
    if not names:
        raise UserError(f'{path} names no class; a class is a line "name r g '
                        f'b"')
    return names, [[int(x) for x in row[-3:]] for row in rows]


def voc_palette():
    """Return VOC's colours of the classes, (256, 3) uint8.

    Bit j of a colour's channel i is bit 3 * (7 - j) + i of the class."""
    classes = np.arange(256)
    palette = np.zeros((256, 3), np.int64)
    for channel in range(3):
        for bit in range(8):
            is_on = classes >> 3 * bit + channel & 1
            palette[:, channel] |= is_on << 7 - bit
    return palette.astype(np.uint8)


def full_palette(colours):
    """Return (256, 3) uint8: the classes' colours, then VOC's; void, 255, is
    VOC's cream."""
    palette = voc_palette()
    palette[:len(colours)] = colours
    return palette
