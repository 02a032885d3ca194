"""Which mask is whose: pairs the images of a folder with their masks.

A mask has its image's path and name, and perhaps a suffix (a.jpg, a_mask.png);
case, ending and, where that leaves no doubt, folder may differ. Images and
masks may lie in one folder.
"""
import collections
import os
import posixpath

import utils
from converters import layout

MASKS = ('.png', '.bmp', '.tif', '.tiff', '.gif')   # no lossy compression
LOSSY = ('.jpg', '.jpeg', '.webp')
SUFFIXES = ('', '_mask', '-mask', '_masks', '_label', '-label', '_labels',
            '_seg', '_gt')          # that are tried where --suffix names none


def pair_files(args):
    """Return {ID: (image's path, mask's path)}; the ID of a/b.jpg is a_b.

    Raises UserError that names images without a mask, and what is not clear.
    """
    suffix, sources, masks, lossy = max(
        ((suffix, *list_candidates(args, suffix))
         for suffix in ([args.suffix] if args.suffix else SUFFIXES)),
        key=lambda found: len(match(*found[1:3], found[0])))
    found = match(sources, masks, suffix)
    if suffix != args.suffix:
        utils.log(f'masks have {suffix} after the name of their image')
    names = name_images(sources, args.images)
    check_complete(found, sources, match(sources, lossy, suffix), suffix, args)
    check_unique(found, args.masks)
    if len(masks) > len(found):
        spare = utils.plural(len(masks) - len(found), 'mask')
        utils.log(f'{spare} without an image: left out')
    return {name: (os.path.join(args.images, file),
                   os.path.join(args.masks, found[file][0]))
            for name, file in names.items()}


# ------------------------------------------------- finding
def get_stem(file):
    return os.path.splitext(file)[0]


def list_files(folder, endings, what, args):
    """Return the paths within a folder of its files with one of the endings;
    of --to, and of IMAGES or MASKS inside the other, it lists none."""
    if not os.path.isdir(folder):
        raise utils.UserError(f'{folder}: no such folder of {what}')
    inner = tuple(f'{os.path.relpath(other, folder)}/'.replace(os.sep, '/')
                  for other in (args.images, args.masks, args.to))
    return [file for file in layout.list_files(folder, endings)
            if not file.startswith(inner)]


def list_candidates(args, suffix):
    """Return [image], [mask], [lossy file that is named as a mask], as paths
    within their folders.

    Where these are one folder, masks are the files that end with the suffix,
    or without one the lossless files.
    """
    sources = list_files(args.images, layout.IMAGES, 'images', args)
    masks = list_files(args.masks, (*MASKS, *LOSSY), 'masks', args)
    for files, folder, what, endings in (
            (sources, args.images, 'images', layout.IMAGES),
            (masks, args.masks, 'masks', MASKS)):
        if not files:
            raise utils.UserError(f'{folder} has no {what} '
                                  f'({" ".join(endings)})')
    if os.path.samefile(args.images, args.masks):
        masks = [file for file in masks if (
            get_stem(file).lower().endswith(suffix.lower()) if suffix else
            file.lower().endswith(MASKS))]
        sources = sorted({*sources} - {*masks})
    return (sources, [file for file in masks if file.lower().endswith(MASKS)],
            [file for file in masks if file.lower().endswith(LOSSY)])


def match(sources, masks, suffix):
    """Return {image: [mask]} of the masks with an image's path and name; else
    in another case; else with its name, in whatever folder."""
    found, spare = {}, masks
    for key in (str, str.lower, lambda stem: posixpath.basename(stem).lower()):
        by_key = collections.defaultdict(list)
        for mask in spare:
            by_key[key(get_stem(mask))].append(mask)
        for file in sources:
            fits = by_key.get(key(get_stem(file) + suffix))
            if fits and file not in found:
                found[file] = fits
        used = {mask for fits in found.values() for mask in fits}
        spare = [mask for mask in masks if mask not in used]
    return found


# ------------------------------------------------- what is not clear
def name_images(sources, folder):
    """Return {ID: image}; raise UserError where two have one, or where a list
    cannot hold it."""
    names = {}
    for file in sources:
        name = layout.name_image(file, folder)
        if name in names:
            raise utils.UserError(f'{folder}: {names[name]} and {file} have '
                                  f'one name, {name}; rename one, or move '
                                  f'it away if it is no photograph')
        names[name] = file
    return names


def check_complete(found, sources, lossy, suffix, args):
    """Raise UserError for images that have no mask, or a lossy one."""
    lacking = [file for file in sources if file not in found]
    for file in filter(lossy.get, lacking):
        kind = 'WebP' if lossy[file][0].lower().endswith('p') else 'JPEG'
        raise utils.UserError(
            f'{os.path.join(args.masks, lossy[file][0])}: {kind} changes the '
            f'class numbers of a mask when it compresses; export masks as PNG '
            f'(the order is IMAGES MASKS)')
    if lacking:
        raise utils.UserError(
            f'{len(lacking)} of {utils.plural(len(sources), "image")} in '
            f'{args.images} ha{"s" if len(lacking) == 1 else "ve"} no mask: '
            f'{name_three(lacking)}. Add '
            f'{os.path.join(args.masks, get_stem(lacking[0]))}{suffix}.png, '
            f'or move the image away (--suffix: what masks have after the '
            f'name)')


def check_unique(found, folder):
    """Raise UserError for an image of several masks, a mask of several
    images."""
    owners = {}
    for file, fits in found.items():
        if len(fits) > 1:
            raise utils.UserError(
                f'{folder}: {fits[0]} and {fits[1]} are both named as the '
                f'mask of {file}; move one away, or name the folder of one')
        other = owners.setdefault(fits[0], file)
        if other != file:
            raise utils.UserError(
                f'{folder}: {fits[0]} is named as the mask of {other} and of '
                f'{file}; put masks into folders as their images are')


def name_three(files):
    """Return the first three of some files, and the number of the rest."""
    return ', '.join(files[:3]) + f' and {len(files) - 3:,} more' * (
        len(files) > 3)
