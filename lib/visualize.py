"""Overlays, legends, heat maps, contact sheets and charts.

All are (H, W, 3) uint8 RGB. h x w feature grid, k bases, T iterations, n
classes; H x W pixels.
"""
import io
import warnings

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import settings
from lib.images import full_palette

PANEL = 256                  # longer side of a panel, pixels
FONT_SIZE, GAP = 14, 6       # of captions and legends, pixels
RED = 220, 20, 20            # a wrong pixel


# ------------------------------------------------- parts
def enlarge(x, width=320):
    """Repeat the pixels of a small image or map (H, W, ...) until it is
    nearly `width` pixels wide, so that a legend fits beside it."""
    times = max(1, width // x.shape[1])
    return np.repeat(np.repeat(x, times, 0), times, 1)


def fit_panel(x, size=None):
    """Resize an image or map (H, W, ...) to the panel of an image of this
    size, its own by default: PANEL pixels along the longer side."""
    height, width = size or x.shape[:2]
    scale = PANEL / max(height, width)
    panel = [max(1, round(side * scale)) for side in (width, height)]
    return cv2.resize(x, panel, interpolation=cv2.INTER_AREA if max(
        x.shape[:2]) > PANEL else cv2.INTER_LINEAR)


def blend_classes(image, pred, colours):
    """Blend an image with the classes of pred (H, W) in their colours,
    outlined; black classes, as background is, stay transparent."""
    pred = np.asarray(pred, np.uint8)
    palette = full_palette(colours).astype(np.float32)
    alpha = 0.55 * palette.any(1)[pred][..., None]              # (H, W, 1)
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


def legend(width, names, colours):
    """Return a strip `width` pixels wide of coloured squares with names."""
    font, line, x, y = ImageFont.load_default(FONT_SIZE), 24, 6, 4
    places = []
    for name in names:
        length = 34 + int(font.getlength(name))
        if x + length > width and x > 6:
            x, y = 6, y + line
        places.append((x, y))
        x += length
    strip = Image.new('RGB', (width, y + line), 'white')
    draw = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(places, names, colours, strict=True):
        draw.rectangle((x, y, x + 14, y + 14), tuple(colour), 'black')
        draw.text((x + 20, y - 1), name, 'black', font)
    return np.asarray(strip)


def contact_sheet(panels, captions, columns):
    """Return panels of one size, row by row, a caption under each."""
    font, line = ImageFont.load_default(FONT_SIZE), 22
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


# ------------------------------------------------- predictions
def overlay(image, pred, names, colours, all_classes=False):
    """Return an image blended with a prediction, above a legend.

    Args:
        image: (H, W, 3) uint8 RGB; a small one is enlarged.
        pred: (H, W) class indices.
        names, colours: of the classes, [str], [[r, g, b]].
        all_classes: list all classes in the legend, not those that occur.
    """
    image, pred = enlarge(image), enlarge(np.asarray(pred, np.uint8))
    count = np.bincount(pred.ravel(), minlength=len(names))
    present = [i for i in range(len(names)) if all_classes or count[i]]
    return np.vstack([blend_classes(image, pred, colours),
                      legend(image.shape[1], [names[i] for i in present],
                             [colours[i] for i in present])])


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
    return np.vstack([page, legend(
        page.shape[1], [names[i] if i < len(names) else 'void'
                        for i in values], table[values])])


def draw_sample(image, label, pred, names, colours):
    """Return an image, its label, a prediction and the error side by side,
    above a legend.

    label, pred: (H, W) uint8. Wrong pixels are red; the error's caption is
    their share of the pixels that are not void.
    """
    void, palette = settings.IGNORE_LABEL, full_palette(colours)
    counted, wrong = label != void, label != pred
    share = (wrong & counted).sum() / max(1, counted.sum())
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]   # (H, W, 1)
    error = np.repeat(128 + grey // 2, 3, 2)                    # (H, W, 3)
    error[wrong], error[~counted] = RED, palette[void]
    page = contact_sheet(
        [fit_panel(x) for x in (image, palette[label], palette[pred], error)],
        ['image', 'label', 'prediction', f'error: {share:.1%}'], 4)
    known = {**dict(enumerate(names)), void: 'void'}
    present = [i for i in np.union1d(label, pred) if i in known]
    return np.vstack([page, legend(page.shape[1], [known[i] for i in present],
                                   palette[present].tolist())])


# ------------------------------------------------- attention
def draw_attention(image, bases, shares, maps):
    """Return an image and, over it, what the bases attend to.

    Args:
        image: (H, W, 3) uint8 RGB.
        bases: indices of the bases.
        shares: of the image's positions that each basis stands for, 0..1.
        maps: (T, bases, h, w), h x w as of fit_panel; the last iteration's
            are drawn, each scaled by its maximum.
    """
    panels, captions = [fit_panel(image)], ['image']
    for i, share, z in zip(bases, shares, maps[-1], strict=True):   # (h, w)
        panels.append(heat_map(panels[0], z / z.max()))
        captions.append(f'basis {i}: {share:.1%}, up to {z.max():.2f}')
    return contact_sheet(panels, captions, 3)


def draw_em(image, bases, maps):
    """Return maps (T, bases, h, w) over an image: a row for each basis, a
    column for each iteration; each row has one scale."""
    small, panels, captions = fit_panel(image), [], []
    for i, row in zip(bases, maps.swapaxes(0, 1), strict=True):  # (T, h, w)
        panels += [small, *(heat_map(small, z / row.max()) for z in row)]
        captions += [f'basis {i}, up to {row.max():.2f}',
                     *(f'iteration {t + 1}' for t in range(len(row)))]
    return contact_sheet(panels, captions, len(maps) + 1)


# ------------------------------------------------- charts
def new_chart(width, height):
    """Return matplotlib's (figure, axes); the axes are width x height pixels,
    what stands around them is added by `render`."""
    from matplotlib.figure import Figure  # 0.3 s, which most commands save

    figure = Figure((width / 72, height / 72), dpi=72)  # a point is a pixel
    return figure, figure.add_axes((0, 0, 1, 1))


def render(figure):
    """Return a figure with all that stands around its axes."""
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # not in matplotlib's font
        figure.savefig(file, format='png', bbox_inches='tight',
                       pad_inches=GAP / 72)
        return np.array(Image.open(file).convert('RGB'))


def plot_confusion(confusion, names):
    """Return a chart of a confusion matrix (n, n): rows are labels, columns
    predictions, with percentages of the row where there is room.

    The colours' scale is the square root, so that a few pixels show. A row is
    grey where its class has no pixel.
    """
    counts = np.asarray(confusion, np.float64)
    n, total = len(names), counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)                       # (n, n)
    cell = max(12, min(48, 960 // n))                           # pixels
    size = min(14, cell - 2)
    figure, axes = new_chart(n * cell, n * cell)
    cells = axes.imshow(np.where(total, np.sqrt(share), np.nan),
                        cmap='Blues', vmin=0, vmax=1, aspect='auto')
    cells.set_cmap(cells.cmap.with_extremes(bad='0.88'))
    axes.vlines(np.arange(n) - 0.5, -0.5, n - 0.5, '0.92', linewidth=1)
    axes.hlines(np.arange(n) - 0.5, -0.5, n - 0.5, '0.92', linewidth=1)
    axes.set_xlabel('prediction', fontsize=14)
    axes.set_ylabel('label', fontsize=14)
    axes.set_xticks(np.arange(n), names, rotation=90, fontsize=size,
                    parse_math=False)
    axes.set_yticks(np.arange(n), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.xaxis.set(ticks_position='top', label_position='top')
    for y, x in np.argwhere(share >= 0.005) if cell > 26 else ():
        axes.text(x, y, f'{100 * share[y, x]:.0f}',
                  ha='center', va='center', fontsize=size,
                  color='white' if share[y, x] > 0.25 else 'black')
    return render(figure)


def plot_iou(classes, colours, mean):
    """Return a chart of IoU: a bar for each class, the mean as a line.

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
    axes.text(100 * mean, -0.6, f'mIoU {100 * mean:.2f}', ha='center',
              va='bottom', fontsize=12)
    for row, iou in zip(rows, classes.values(), strict=True):
        axes.text(110, row, '-' if iou is None else f'{100 * iou:.2f}',
                  ha='right', va='center', fontsize=12)
    axes.set(xlim=(0, 100), ylim=(n - 0.5, -0.5))
    axes.set_xlabel('IoU, %', fontsize=12)
    axes.set_yticks(rows, classes, fontsize=12, parse_math=False)
    axes.tick_params('y', length=0)
    axes.grid(axis='x', color='0.88')
    axes.set_axisbelow(True)
    return render(figure)
