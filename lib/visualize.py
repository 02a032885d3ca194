"""Overlays, legends, heat maps, contact sheets and charts.

All are (H, W, 3) uint8 RGB. h x w feature grid, k bases, T iterations, n
classes; H x W pixels.
"""
import io
import logging
import textwrap
import warnings

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import settings
from lib.images import full_palette

PANEL = 256                  # longer side of a panel, pixels
FONT_SIZE, GAP = 14, 6       # of legends and small captions, pixels
MAX_FONT_SIZE = 24           # of captions; they fit under a panel
BAR = 12                     # height of a colour bar, pixels
RED = 220, 20, 20            # a wrong pixel
OPACITY = 0.55               # of classes over an image


# ------------------------------------------------- parts
def enlarge(x, width=320):
    """Repeat the pixels of a small image or map (H, W, ...) until it is
    nearly `width` pixels wide, or three times as high, so that a legend fits
    below it."""
    times = max(1, min(width // x.shape[1], 3 * width // x.shape[0]))
    return np.repeat(np.repeat(x, times, 0), times, 1)


def fit_panel(x, size=None):
    """Resize an image or map (H, W, ...) to the panel of an image of this
    size, its own by default: PANEL pixels along the longer side."""
    height, width = size or x.shape[:2]
    scale = PANEL / max(height, width)
    panel = [max(1, round(side * scale)) for side in (width, height)]
    return cv2.resize(x, panel, interpolation=cv2.INTER_AREA if max(
        x.shape[:2]) > PANEL else cv2.INTER_LINEAR)


def blend_classes(image, pred, colours, opacity=OPACITY):
    """Blend an image with the classes of pred (H, W) in their colours,
    outlined; black classes, as background is, stay transparent, as does 255,
    void."""
    pred = np.asarray(pred, np.uint8)
    palette = full_palette(colours).astype(np.float32)
    alpha = palette.any(1)[pred] & (pred < len(colours))        # (H, W)
    alpha = opacity * alpha[..., None]                          # (H, W, 1)
    mixed = (1 - alpha) * image + alpha * palette[pred]
    edge = cv2.morphologyEx(pred, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    mixed[edge] = 255
    return mixed.astype(np.uint8)


def heat_map(image, share):
    """Blend a dark, grey image with a map (H, W) of 0..1, from black over red
    to bright yellow."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]   # (H, W, 1)
    level = (255 * np.clip(share, 0, 1)).astype(np.uint8)
    colour = cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[..., ::-1]
    return (0.3 * grey + 0.7 * colour).astype(np.uint8)


def legend(width, names, colours, size=FONT_SIZE):
    """Return a strip of coloured squares with names, `width` pixels wide, or
    wider where a name needs it."""
    font, line, x, y = ImageFont.load_default(size), size + 10, 6, 4
    places = []
    for name in names:
        length = size + 20 + int(font.getlength(name))
        if x + length > width and x > 6:
            x, y = 6, y + line
        places.append((x, y))
        x += length
        width = max(width, x)
    strip = Image.new('RGB', (width, y + line), 'white')
    draw = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(places, names, colours, strict=True):
        draw.rectangle((x, y, x + size, y + size), tuple(colour), 'black')
        draw.text((x + size + 6, y - 1), name, 'black', font)
    return np.asarray(strip)


def stack(*pages):
    """Return pages (H, W, 3) one below the other, white on their right."""
    width = max(page.shape[1] for page in pages)
    return np.vstack([pad_white(page, right=width - page.shape[1])
                      for page in pages])


def pad_white(x, left=0, right=0, bottom=0):
    """Return an image (H, W, 3) with so many white pixels added."""
    return np.pad(x, ((0, bottom), (left, right), (0, 0)),
                  constant_values=255)


def caption_size(panel, columns):
    """Return the font size of captions under a row of panels: readable, if it
    can be, where TensorBoard shows their page 350 pixels wide."""
    return max(FONT_SIZE, min(MAX_FONT_SIZE, columns * panel.shape[1] // 22))


def contact_sheet(panels, captions, columns, size=FONT_SIZE):
    """Return panels of one size, row by row, a caption under each."""
    font, line = ImageFont.load_default(size), size + 8
    height, width = panels[0].shape[:2]
    across = max(width, *(int(font.getlength(text)) for text in captions))
    rows = -(-len(panels) // columns)
    page = Image.new('RGB', (GAP + min(columns, len(panels)) * (across + GAP),
                             GAP + rows * (height + line)), 'white')
    draw = ImageDraw.Draw(page)
    for i, (panel, text) in enumerate(zip(panels, captions, strict=True)):
        x = GAP + i % columns * (across + GAP)
        y = GAP + i // columns * (height + line)
        page.paste(Image.fromarray(panel), (x + (across - width) // 2, y))
        draw.text((x + across / 2, y + height + line / 2 - 1), text, 'black',
                  font, 'mm')
    return np.asarray(page)


def write_note(width, text, size):
    """Return a strip about `width` pixels wide with a text in lines."""
    text = textwrap.fill(text, max(20, int(width / size / 0.47)))
    font = ImageFont.load_default(size)
    box = ImageDraw.Draw(Image.new('RGB', (1, 1))).textbbox((6, 6), text, font)
    strip = Image.new('RGB', (max(width, int(box[2]) + 6), int(box[3]) + 8),
                      'white')
    ImageDraw.Draw(strip).text((6, 6), text, 'black', font)
    return np.asarray(strip)


# ------------------------------------------------- predictions
def overlay(image, pred, names, colours, all_classes=False, opacity=OPACITY,
            shown=None):
    """Return an image blended with a prediction, above a legend.

    Args:
        image: (H, W, 3) uint8 RGB; a small one is enlarged.
        pred: (H, W) class indices.
        names, colours: of the classes, [str], [[r, g, b]].
        all_classes: list all classes in the legend, not those that occur.
        opacity: of the classes, 0..1.
        shown: indices of the classes that are shown; None for all.
    """
    image, pred = enlarge(image), enlarge(np.asarray(pred, np.uint8))
    if shown is not None:
        pred = np.where(np.isin(pred, shown), pred, 255).astype(np.uint8)
    count = np.bincount(pred.ravel(), minlength=len(names))
    present = [i for i in range(len(names)) if all_classes or count[i]]
    return stack(blend_classes(image, pred, colours, opacity),
                 legend(image.shape[1], [names[i] for i in present],
                        [colours[i] for i in present]))


def draw_augmented(rows, names, colours):
    """Draw training samples beside their labels, an image a row, and a legend
    of the label values that occur.

    rows: lists of a data set's items, (image (3, H, W), label (H, W), ID).
    Returns: (H', W', 3) uint8.
    """
    table = full_palette(colours)
    side = min(PANEL, len(rows[0][0][1]))

    def draw_pair(image, label, _):
        return np.hstack([
            cv2.resize(image.permute(1, 2, 0).numpy(), (side, side),
                       interpolation=cv2.INTER_AREA),
            cv2.resize(table[label], (side, side),
                       interpolation=cv2.INTER_NEAREST)])
    page = np.vstack([np.hstack([draw_pair(*item) for item in row])
                      for row in rows])
    values = sorted({value for row in rows for _, label, _ in row
                     for value in label.unique().tolist()})
    return stack(page, legend(
        page.shape[1], [names[i] if i < len(names) else 'void'
                        for i in values], table[values]))


def draw_sample(image, label, pred, names, colours):
    """Return an image and its label above a prediction and the error, above a
    legend.

    label, pred: (H, W) uint8. Wrong pixels are red; the error's caption is
    their share of the pixels that are not void.
    """
    void, palette = settings.IGNORE_LABEL, full_palette(colours)
    counted, wrong = label != void, label != pred
    share = (wrong & counted).sum() / max(1, counted.sum())
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]   # (H, W, 1)
    error = np.repeat(128 + grey // 2, 3, 2)                    # (H, W, 3)
    error[wrong], error[~counted] = RED, palette[void]
    panels = [fit_panel(x)
              for x in (image, palette[label], palette[pred], error)]
    size = caption_size(panels[0], 2)
    page = contact_sheet(panels, ['image', 'label', 'prediction',
                                  f'error: {share:.1%}'], 2, size)
    known = {**dict(enumerate(names)), void: 'void'}
    present = [i for i in np.union1d(label, pred) if i in known]
    return stack(page, legend(page.shape[1], [known[i] for i in present],
                              palette[present].tolist(), size))


# ------------------------------------------------- attention
def colour_bar(width, top, uniform, size):
    """Return a strip (H, width, 3): a colour bar of heat_map from 0 to `top`,
    with a white tick at `uniform`."""
    font, high = ImageFont.load_default(size), f'{top:.2g}'
    left, right = (int(font.getlength(x)) + GAP for x in ('0', high))
    ramp = np.linspace(0, 1, width - left - right)[None].repeat(BAR, 0)
    bar = heat_map(np.full((*ramp.shape, 3), 128, np.uint8), ramp)
    tick = round(uniform / top * (ramp.shape[1] - 1))
    bar[:, max(0, tick - 2):tick + 3] = 0           # its edge
    bar[:, max(0, tick - 1):tick + 2] = 255
    strip = Image.new('RGB', (width, size + 8), 'white')
    strip.paste(Image.fromarray(bar), (left, (strip.height - BAR) // 2))
    draw = ImageDraw.Draw(strip)
    draw.text((0, strip.height / 2), '0', 'black', font, 'lm')
    draw.text((width, strip.height / 2), high, 'black', font, 'rm')
    return np.asarray(strip)


def draw_map(image, z, top, uniform, size):
    """Return a panel: a heat map of z (H, W), bright at `top`, over an image,
    and its colour bar; z None: the image alone."""
    width = max(image.shape[1], 8 * size)
    bar = (np.full((size + 8, width, 3), 255, np.uint8) if z is None
           else colour_bar(width, top, uniform, size))
    more = width - image.shape[1]
    return stack(pad_white(image if z is None else heat_map(image, z / top),
                           more // 2, more - more // 2), bar)


def draw_attention(image, bases, shares, maps, n_bases):
    """Return an image and, over it, what the bases attend to.

    Args:
        image: (H, W, 3) uint8 RGB.
        bases: indices of the bases.
        shares: of the image's positions that each basis stands for, 0..1.
        maps: (T, bases, h, w), h x w as of fit_panel; the last iteration's
            are drawn, each scaled by its maximum.
        n_bases: k, of the network.
    """
    small, uniform = fit_panel(image), 1 / n_bases
    size = caption_size(small, 3)
    panels, captions = [draw_map(small, None, 1, uniform, size)], ['image']
    for i, share, z in zip(bases, shares, maps[-1], strict=True):   # (h, w)
        panels.append(draw_map(small, z, max(z.max(), uniform), uniform, size))
        captions.append(f'basis {i}: {share:.1%}')
    page = contact_sheet(panels, captions, 3, size)
    return stack(page, write_note(
        page.shape[1], f"Colours: responsibility, 0 to the map's maximum."
        f" {explain_tick(n_bases)} Per cent: the basis's share of the image.",
        size))


def draw_em(image, bases, maps, n_bases):
    """Return maps (T, bases, h, w) over an image: a row for each basis, a
    column for each iteration; each row has one scale. n_bases: k."""
    small, uniform, panels, captions = fit_panel(image), 1 / n_bases, [], []
    size = caption_size(small, 1 + len(maps))
    for i, row in zip(bases, maps.swapaxes(0, 1), strict=True):  # (T, h, w)
        top = max(row.max(), uniform)
        panels += [draw_map(small, z, top, uniform, size)
                   for z in (None, *row)]
        captions += [f'basis {i}', *(f'iteration {t + 1}'
                                     for t in range(len(row)))]
    page = contact_sheet(panels, captions, len(maps) + 1, size)
    return stack(page, write_note(
        page.shape[1], f"Colours: responsibility, 0 to the row's maximum."
        f" {explain_tick(n_bases)}", size))


def draw_query(image, query, share, n_cells):
    """Return an image with a query pixel beside a heat map of where it
    attends.

    Args:
        image: (H, W, 3) uint8 RGB.
        query: the pixel (x, y).
        share: (H', W'), of any size: the share of each cell in the pixel's
            attention, drawn from 0 to its maximum.
        n_cells: of the feature grid, over which the shares sum to 1.
    """
    (height, width), small = image.shape[:2], fit_panel(image)
    share, uniform = fit_panel(share, (height, width)), 1 / n_cells
    size = caption_size(small, 2)
    panels = [draw_map(small, z, max(share.max(), uniform), uniform, size)
              for z in (None, share)]
    scale, left = max(small.shape) / max(height, width), (
        panels[0].shape[1] - small.shape[1]) // 2
    x, y = (int((place + 0.5) * scale) for place in query)
    for panel in panels:
        for colour, thickness in ((0, 0, 0), 4), ((255, 255, 255), 2):
            cv2.circle(panel, (left + x, y), 7, colour, thickness, cv2.LINE_AA)
    page = contact_sheet(panels, [f'pixel {query[0]},{query[1]}',
                                  'where it attends'], 2, size)
    return stack(page, write_note(
        page.shape[1], f"Colours: a cell's share of the pixel's attention, 0 "
        f"to the map's maximum. White tick: the uniform value, 1/{n_cells} = "
        f"{uniform:.2g}.", size))


def explain_tick(n_bases):
    """Return what the white tick of a colour bar means."""
    return (f'White tick: the uniform value, 1/{n_bases} = '
            f'{1 / n_bases:.2g}.')


# ------------------------------------------------- charts
def new_chart(width, height):
    """Return matplotlib's (figure, axes); the axes are width x height pixels,
    what stands around them is added by `render`."""
    logging.getLogger('matplotlib').setLevel(logging.ERROR)     # fonts, cache
    from matplotlib.figure import Figure  # 0.3 s, which most commands save

    figure = Figure((width / 72, height / 72), dpi=72)  # a point is a pixel
    return figure, figure.add_axes((0, 0, 1, 1))


def render(figure):
    """Return a figure with all that stands around its axes."""
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')     # characters not in its font
        figure.savefig(file, format='png', bbox_inches='tight',
                       pad_inches=GAP / 72)
        return np.array(Image.open(file).convert('RGB'))


def plot_confusion(confusion, names):
    """Return a chart of a confusion matrix (n, n): rows are labels, columns
    predictions, with percentages of the row where there is room. Long names
    are cut.

    The colours' scale is the square root, so that a few pixels show. A row is
    grey where its class has no pixel.
    """
    counts = np.asarray(confusion, np.float64)
    n, total = len(names), counts.sum(1, keepdims=True)
    names = [name if len(name) < 20 else f'{name[:18]}...' for name in names]
    share = counts / np.maximum(total, 1)                       # (n, n)
    cell = max(12, min(48, 960 // n))                           # pixels
    size = min(cell - 2, max(14, n * cell // 36))   # readable when small
    figure, axes = new_chart(n * cell, n * cell)
    cells = axes.imshow(np.where(total, np.sqrt(share), np.nan),
                        cmap='Blues', vmin=0, vmax=1, aspect='auto')
    cells.set_cmap(cells.cmap.with_extremes(bad='0.88'))
    axes.vlines(np.arange(n) - 0.5, -0.5, n - 0.5, '0.92', linewidth=1)
    axes.hlines(np.arange(n) - 0.5, -0.5, n - 0.5, '0.92', linewidth=1)
    heading = max(14, n * cell // 36)
    axes.set_title("% of the label's pixels, by prediction\n"
                   "white 0, dark blue 100 (square root), grey no label",
                   fontsize=heading, pad=heading)
    axes.set_xlabel('prediction', fontsize=heading, labelpad=heading)
    axes.set_ylabel('label', fontsize=heading, labelpad=heading)
    axes.set_xticks(np.arange(n), names, rotation=90, fontsize=size,
                    parse_math=False)
    axes.set_yticks(np.arange(n), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.xaxis.set(ticks_position='top', label_position='top')
    for y, x in np.argwhere(share >= 0.005) if cell > 26 else ():
        axes.text(x, y, f'{100 * share[y, x]:.0f}', ha='center', va='center',
                  fontsize=min(size, 0.42 * cell),
                  color='white' if share[y, x] > 0.25 else 'black')
    return render(figure)


def plot_curves(curves, x_label, y_label):
    """Return a chart of curves {name: points (n, 2)}; those named 'A, ...'
    are dashed, in the colour of the one before."""
    figure, axes = new_chart(560, 320)
    colour = -1
    for name, points in curves.items():
        colour += ',' not in name
        axes.plot(*np.transpose(points), '--' if ',' in name else '-',
                  color=f'C{max(0, colour)}', label=name)
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.legend(fontsize=12)
    axes.grid(color='0.88')
    return render(figure)


def plot_iou(classes, colours, mean):
    """Return a chart of IoU in per cent: a bar for each class, the mean as a
    line.

    Args:
        classes: {name: IoU 0..1, or None for a class that does not occur}.
        colours: of the classes, [[r, g, b]].
        mean: their mean, 0..1.
    """
    n = len(classes)
    figure, axes = new_chart(480, 20 * n)
    rows = np.arange(n)
    axes.barh(rows, [100 * (iou or 0) for iou in classes.values()], 0.7,
              color=np.array(colours[:n]) / 255, edgecolor='black')
    axes.axvline(100 * mean, color='black', linewidth=2)
    axes.text(100 * mean, -0.6, f'mIoU {100 * mean:.2f} %', ha='center',
              va='bottom', fontsize=12)
    for row, iou in zip(rows, classes.values(), strict=True):
        axes.text(110, row, '-' if iou is None else f'{100 * iou:.2f}',
                  ha='right', va='center', fontsize=12)
    axes.set(xlim=(0, 100), ylim=(n - 0.5, -0.5))
    axes.set_title('IoU of each class, in per cent', fontsize=14, pad=24)
    axes.set_xlabel('IoU, %', fontsize=12)
    axes.set_yticks(rows, classes, fontsize=12, parse_math=False)
    axes.tick_params('y', length=0)
    axes.grid(axis='x', color='0.88')
    axes.set_axisbelow(True)
    return render(figure)
