"""A generated data set: five shapes on grey ground, to see a network learn in
minutes."""
import colorsys

import cv2
import numpy as np
from PIL import Image

import utils
from converters import layout
from lib import images

# of the classes 1 to 5: disc, square, triangle, star, ring
HUES = (5, 215, 140, 46, 285)                       # degrees
RADII = ((0.9,) * 60, (1,) * 4, (1,) * 3, (1, 0.45) * 5, (1,) * 60)  # corners
HOLE = 0.44                                         # the ring's inner radius


def convert(args):
    """Generate images of five shapes on grey ground: train, val.

    An image depends on its number and the seed alone; val has the first
    numbers, so that a larger --train leaves it as it is.
    """
    root = args.to
    options = {key: getattr(args, key) for key in ('seed', 'train', 'val')}
    if min(args.train, args.val) < 1 or args.seed < 0:
        raise utils.UserError(f'{options}: at least 1 image each, and a seed '
                              f'of 0 or more')
    if layout.is_ready(root, 'toy', options):
        return
    classes = images.read_class_file(images.class_file('toy'))
    layout.begin(root, 'toy', options, classes)
    names = [f'toy_{i:04d}' for i in range(args.val + args.train)]
    for i, name in enumerate(utils.progress(names, desc='toy')):
        image, label = generate(np.random.default_rng((args.seed, i)), i)
        layout.save_jpeg(Image.fromarray(image),
                         layout.image_path(root, name))
        images.save_label(label, layout.label_path(root, name), classes[1])
    layout.finish(root, 'toy', options,
                  {'train': names[args.val:], 'val': names[:args.val]})


def generate(rng, number):
    """Draw an image; its first shape is of class 1 + number % 5.

    Returns image (H, W, 3) uint8 RGB, label (H, W) uint8.
    """
    H, W = rng.integers(96, 161, 2)
    grey = rng.uniform(95, 185) + 22 * noise(rng, H, W, 80)
    for cell in (3, 8, 24):
        grey += rng.uniform(3, 11) * noise(rng, H, W, cell)
    tint = noise(rng, H, W, 40)[..., None] * rng.normal(0, 4, 3)
    image = grey[..., None] + tint + rng.normal(0, 6, 3)        # (H, W, 3)
    label, centres = np.zeros((H, W), np.uint8), []
    for extra in (0, *rng.integers(0, 5, rng.integers(2, 5))):
        spots = rng.uniform(0.1, 0.9, (4, 2)) * (W, H)
        centres.append(max(spots, key=lambda spot: min(     # the freest
            (np.hypot(*(spot - other)) for other in centres), default=0)))
        draw_shape(rng, image, label, 1 + (number + extra) % 5, centres[-1])
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def noise(rng, H, W, cell):
    """Return smooth noise of deviation about 1 and grain `cell` pixels."""
    coarse = rng.normal(size=(H // cell + 3, W // cell + 3))
    fine = cv2.resize(coarse, None, fx=cell, fy=cell,
                      interpolation=cv2.INTER_CUBIC)
    return fine[cell:cell + H, cell:cell + W]


def draw_shape(rng, image, label, c, centre):
    """Draw a shape of class c around centre (x, y) over image and label, in
    place, with a shadow and rounded edges."""
    H, W = label.shape
    depth = shape_depth(rng, c, centre + 3, H + 3, W + 3)
    shadow, depth = 1 / (1 + np.exp(-depth[:H, :W] / 2)), depth[3:, 3:]
    hue = HUES[c - 1] + rng.normal(0, 9)
    colour = colorsys.hsv_to_rgb(hue / 360 % 1, rng.uniform(0.5, 0.85), 1)
    light = rng.uniform(165, 245) + 12 * noise(rng, H, W, 40)
    light += rng.uniform(2, 9) * noise(rng, H, W, 4)
    light -= 45 * np.exp(-depth.clip(0) / 3)
    ink = (depth + 0.5).clip(0, 1)[..., None]               # (H, W, 1)
    image *= 1 - 0.4 * shadow[..., None]
    image += ink * (light[..., None] * colour - image)
    label[depth > -1.5] = layout.VOID
    label[depth > 1.5] = c


def shape_depth(rng, c, centre, H, W):
    """Return the distance to the edge of a shape of class c, rotated and
    stretched at random, in pixels, (H, W); negative outside."""
    size, stretch = rng.uniform(14, 35), rng.uniform(0.85, 1.18)
    radii = size * np.array(RADII[c - 1])
    angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    x, y = radii * np.cos(angle) * stretch, radii * np.sin(angle) / stretch
    turn = rng.uniform(0, 2 * np.pi)
    corners = np.stack([x * np.cos(turn) - y * np.sin(turn),
                        x * np.sin(turn) + y * np.cos(turn)], 1)
    outlines = [corners, corners * HOLE] if c == 5 else [corners]
    mask = np.zeros((3 * H, 3 * W), np.uint8)           # in thirds of a pixel
    cv2.fillPoly(mask, [np.int32(3 * (centre + x)) + 1 for x in outlines], 1)
    inside, outside = (cv2.distanceTransform(x, cv2.DIST_L2, 5)[1::3, 1::3]
                       for x in (mask, 1 - mask))
    return (inside - outside) / 3
