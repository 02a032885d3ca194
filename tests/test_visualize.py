"""Overlays, legends, samples and charts, pixel by pixel.

    python -m pytest tests/test_visualize.py
"""
import logging
import sys
import warnings

import numpy as np
import pytest

from lib import visualize

DARKEST, NO_PIXELS = (8, 48, 107), (224, 224, 224)  # cells of plot_confusion
RED = [200, 10, 10]
SHOWN = 350                 # pixels that TensorBoard shows a page wide


def is_colour(page, colour):
    """Return where a page (H, W, 3) has a colour, (H, W) bool."""
    return (page == colour).all(2)


def bounding_box(mask):
    """Return (top, left, bottom, right) of a mask's pixels."""
    rows, columns = np.nonzero(mask)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


# ------------------------------------------------- overlays
def test_overlay_shows_colours_and_a_legend():
    image = np.full((40, 400, 3), 100, np.uint8)
    pred = np.zeros((40, 400), np.uint8)
    pred[:, 200:] = 1
    names, colours = ['ground', 'cat', 'dog'], [[0] * 3, [200, 0, 0],
                                                [0, 0, 200]]
    page = visualize.overlay(image, pred, names, colours)
    assert page.shape[1] == 400 and page.shape[0] > 40
    assert (page[20, 50] == 100).all()
    assert page[20, 300, 0] > 140 > 60 > page[20, 300, 2]
    legend = page[40:].reshape(-1, 3).tolist()
    assert [200, 0, 0] in legend and [0, 0, 200] not in legend


@pytest.mark.parametrize('turn', (1, -1))
def test_overlay_is_transparent_where_a_class_is_black(turn):
    image = np.full((400, 400, 3), 100, np.uint8)
    pred = np.zeros((400, 400), np.uint8)
    pred[:, 100:] = 1
    colours = [[0, 0, 0], [10, 200, 20]]
    page = visualize.overlay(image, pred, ['a', 'b'], colours[::turn])
    black, green = page[5, [5, 300][::turn]].astype(int)
    assert black.tolist() == [100, 100, 100]
    assert abs(green - [50, 155, 56]).max() <= 1            # 0.45 and 0.55


def test_legend_wraps_at_its_width():
    names, colours = [f'a long name {i}' for i in range(9)], [[0, 0, 9]] * 9
    strip = visualize.legend(200, names, colours)
    assert strip.shape[1] == 200 and (strip[:, -1] == 255).all()
    assert strip.shape[0] > 150
    assert is_colour(strip, [0, 0, 9]).sum() == 9 * 13 ** 2


def test_legend_is_as_wide_as_its_longest_name():
    strip = visualize.legend(50, ['a', 'a name of some thirty letters'],
                             [[0, 0, 9]] * 2)
    assert strip.shape[1] > 150 and (strip[:, -1] == 255).all()
    page = visualize.overlay(np.zeros((9, 9, 3), np.uint8), np.eye(9),
                             ['a', 40 * 'long '], [[0, 0, 9], RED])
    assert page.shape[1] > 350


def test_sample_is_drawn_in_the_classes_colours():
    """Image, label, prediction and error of halves: left void, right wrong
    below."""
    image = np.full((256, 256, 3), 100, np.uint8)
    label, pred = np.zeros((2, 256, 256), np.uint8)
    label[:, :128], label[:128, 128:], pred[:, 128:] = 255, 1, 1
    red, blue = [200, 0, 0], [0, 0, 200]
    page = visualize.draw_sample(image, label, pred, ['ground', 'cat', 'dog'],
                                 [red, blue, [0, 99, 0]])
    step, void = (page.shape[1] - 6) // 2, [224, 224, 192]
    line = visualize.caption_size(image, 2) + 8

    def at(panel, row, column):
        return page[6 + panel // 2 * (256 + line) + row,
                    6 + panel % 2 * step + column].tolist()
    assert at(0, 50, 50) == at(0, 200, 200) == [100] * 3
    assert [at(1, 50, 50), at(1, 50, 200), at(1, 200, 200)] == [
        void, blue, red]
    assert [at(2, 50, 50), at(2, 50, 200), at(2, 200, 200)] == [
        red, blue, blue]
    assert [at(3, 50, 50), at(3, 50, 200), at(3, 200, 200)] == [
        void, [178] * 3, [220, 20, 20]]
    legend = page[6 + 2 * (256 + line):].reshape(-1, 3).tolist()
    assert red in legend and blue in legend and void in legend
    assert [0, 99, 0] not in legend             # no dog


# ------------------------------------------------- attention
def test_heat_map_is_bright_where_attention_is():
    image = np.full((9, 9, 3), 100, np.uint8)
    page = visualize.heat_map(image, np.eye(9)).astype(int)
    assert page[3, 3].sum() > 2 * page[3, 5].sum()


def test_colour_bar_runs_from_0_to_its_top_with_a_tick_at_the_uniform_value():
    """Its colours are those of a heat map; the tick is at a quarter."""
    bar = visualize.colour_bar(400, 0.4, 0.1, 20)
    row = bar[len(bar) // 2].astype(int)
    left = int(visualize.ImageFont.load_default(20).getlength('0')) + 6
    right = np.flatnonzero(np.ptp(row, 1) > 60)[-1] + 1     # of its colours
    tick = left + np.flatnonzero((row[left:right] == 255).all(1))
    assert len(tick) == 3
    assert abs(tick[1] - (left + (right - left) / 4)) <= 1
    grey = np.full((1, 2, 3), 128, np.uint8)
    low, high = visualize.heat_map(grey, np.array([[0, 1]]))[0]
    assert (row[left + 1] == low).all() and (row[right - 1] == high).all()
    assert (visualize.colour_bar(400, 0.4, 0.4, 20) != bar).any()


@pytest.mark.parametrize('weight', (0.0, 0.004))
def test_map_below_the_uniform_value_is_dark(weight):
    """A basis that nothing belongs to does not look as one that attends."""
    image = np.zeros((256, 256, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')          # 0 / 0
        page = visualize.draw_attention(
            image, [3], [weight], np.full((1, 1, 256, 256), weight), 64)
    panel = page[6:262, page.shape[1] // 2 + 20:][:, :200]
    assert panel.max() < 120


def test_captions_are_readable_at_the_size_that_tensorboard_shows():
    for shape in ((375, 500), (500, 375), (97, 97)):
        image, label = np.zeros((*shape, 3), np.uint8), np.zeros(shape,
                                                                 np.uint8)
        small = visualize.fit_panel(image)
        maps = np.ones((1, 8, *small.shape[:2]))
        for columns, page in (
                (2, visualize.draw_sample(image, label, label, ['a'], [RED])),
                (3, visualize.draw_attention(image, range(8), [0.1] * 8, maps,
                                             64))):
            size = visualize.caption_size(small, columns)
            assert size * SHOWN / page.shape[1] > 9


@pytest.mark.parametrize('size', ((200, 1), (1, 200), (2000, 9), (1, 1)))
@pytest.mark.parametrize('n', (2, 150))
def test_pages_of_very_narrow_and_very_wide_images(size, n):
    names = [f'{i}: a class with quite a long name' for i in range(n)]
    colours = np.random.default_rng(0).integers(1, 255, (n, 3)).tolist()
    image, label = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    maps = np.ones((2, 3, *visualize.fit_panel(image).shape[:2])) / 2
    for page in (
            visualize.overlay(image, label, names, colours, all_classes=True),
            visualize.draw_sample(image, label, label, names, colours),
            visualize.draw_attention(image, [0, 1, 2], [0.1] * 3, maps, 8),
            visualize.draw_em(image, [0, 1, 2], maps, 8)):
        assert page.dtype == np.uint8 and page.shape[2] == 3
        assert page.shape[1] > 100 and max(page.shape) < 65500   # JPEG's most


def test_em_page_has_a_row_per_basis_and_a_column_per_iteration():
    """Each row has one scale: its maximum is as bright everywhere."""
    image = np.zeros((128, 256, 3), np.uint8)
    maps = np.zeros((3, 2, 128, 256))           # (T, bases, h, w)
    maps[:, 0], maps[2, 1, :, 128:] = [[[0.1]], [[0.2]], [[0.4]]], 0.05
    page = visualize.draw_em(image, [5, 2], maps, 64)
    size = visualize.caption_size(image, 4)
    width, height, gap, line = 256, 128, 6, 2 * (size + 8)  # bar, caption
    assert page.shape[1] == gap + 4 * (width + gap)
    assert page.shape[0] > gap + 2 * (height + line) + size  # and a note

    def at(row, column, x):
        return int(page[gap + row * (height + line) + 50,
                        gap + column * (width + gap) + x].sum())
    assert at(0, 0, 50) == 0                    # the image
    assert at(0, 1, 50) < at(0, 2, 50) < at(0, 3, 50)
    assert at(1, 1, 50) == at(1, 3, 50) < at(1, 3, 200) == at(0, 3, 50)


# ------------------------------------------------- charts
@pytest.mark.parametrize('n, cell', ((2, 48), (21, 45), (60, 16), (171, 12)))
def test_confusion_matrix_of_any_number_of_classes(n, cell):
    """All pixels are of class 0 and taken for 1: one dark cell, the other
    rows grey; percentages where there is room."""
    counts = np.zeros((n, n), np.int64)
    counts[0, 1] = 9
    page = visualize.plot_confusion(counts, [f'class {i}' for i in range(n)])
    assert page.dtype == np.uint8 and page.shape[2] == 3
    top, left, bottom, right = bounding_box(is_colour(page, DARKEST))
    assert abs(bottom - top - cell) <= 3 and abs(right - left - cell) <= 3
    grey = is_colour(page, NO_PIXELS)           # in letters' edges, too
    rows, columns = (np.flatnonzero(grey.sum(axis) > 0.4 * n * cell)
                     for axis in (1, 0))
    assert abs(rows[0] - bottom) <= 3           # from the second row on,
    assert abs(rows[-1] - rows[0] - (n - 1) * cell) <= 3    # to the last
    assert abs(columns[-1] - columns[0] - n * cell) <= 3
    assert abs(left - columns[0] - cell) <= 3   # the second column
    inside = page[top + 3:bottom - 3, left + 3:right - 3]
    assert (inside > 250).any() == (cell > 26)  # '100', in white


def test_confusion_matrix_is_lighter_where_fewer_pixels_are():
    """The scale is the square root: a hundredth is a tenth of the way."""
    page = visualize.plot_confusion([[99, 1], [0, 1]], ['', ''])
    top, left, _, _ = bounding_box(is_colour(page, DARKEST))     # (1, 1)
    levels = [int(page[top - 48 + 5, left - 48 + 5].sum()),     # 0.99
              int(page[top - 48 + 5, left + 5].sum()),          # 0.01
              int(page[top + 5, left - 48 + 5].sum())]          # 0
    assert levels[0] < levels[1] < levels[2]
    assert (levels[2] - levels[1]) / (levels[2] - levels[0]) > 0.05


@pytest.mark.parametrize('n', (2, 21, 171))
def test_iou_is_a_bar_and_the_mean_a_line(n):
    names = [f'class {i}' for i in range(n)]
    iou = dict(zip(names, [1.0, None, *[0.0] * (n - 2)], strict=True))
    page = visualize.plot_iou(iou, [RED] * n, 0.5)
    red = is_colour(page, RED)
    top, left, bottom, right = bounding_box(red)
    assert 10 <= bottom - top <= 16 and 470 <= right - left <= 480
    middle = page[top:bottom, (left + right) // 2 - 1:][:, :3]
    assert (middle.max(2) < 30).any(1).all()    # the line, over the bar
    below = page[bottom + 10, left + 10:right - 10].max(1)
    assert (below < 30).sum() in (1, 2, 3)      # the line alone: no bar


def test_class_without_iou_is_a_dash_beside_the_axes():
    page = [visualize.plot_iou({'a': 1.0, 'b': iou}, [RED] * 2, 1.0)
            for iou in (None, 0.0)]
    assert page[0].shape == page[1].shape
    left = bounding_box(is_colour(page[0], RED))[3]
    differs = bounding_box((page[0] != page[1]).any(2))
    assert differs[1] > left                    # '-' for '0.00'
    ink = [(p[differs[0]:differs[2], differs[1]:] < 128).sum() for p in page]
    assert 0 < ink[0] < ink[1] / 4


def test_averaged_curves_are_dashed_in_their_colour(monkeypatch):
    rise, flat = np.array([(1, 2.0), (5, 3.0)]), np.array([(1, 4.0), (5, 4.0)])
    curves = {'a': rise, 'a, average': flat, 'b': rise + (0, 1)}
    assert min(visualize.plot_curves(curves, 'step', '%').shape[:2]) > 300
    monkeypatch.setattr(visualize, 'render', lambda figure: figure)
    axes = visualize.plot_curves(curves, 'step', 'mIoU, %').axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('step', 'mIoU, %')
    assert [text.get_text() for text in axes.get_legend().texts] == [*curves]
    a, average, b = axes.lines
    for line, points in zip(axes.lines, curves.values(), strict=True):
        assert np.array_equal(line.get_xydata(), points)
    assert a.get_color() == average.get_color() != b.get_color()
    assert [line.get_linestyle() for line in axes.lines] == ['-', '--', '-']


def test_charts_are_titled_with_their_unit(monkeypatch):
    monkeypatch.setattr(visualize, 'render', lambda figure: figure)
    confusion = visualize.plot_confusion(np.eye(2), ['a', 'b'])
    assert "% of the label's pixels" in confusion.axes[0].get_title()
    iou = visualize.plot_iou({'a': 0.5}, [RED], 0.5)
    assert 'IoU of each class, in per cent' in iou.axes[0].get_title()
    assert any(text.get_text() == 'mIoU 50.00 %' for text in iou.axes[0].texts)


def test_charts_write_no_text_of_the_library(capfd, caplog, recwarn):
    """Of names that its font lacks, of its cache."""
    for name in ('\u732b', '\u05d7\u05ea\u05d5\u05dc', '$x_$', '_cat'):
        assert visualize.plot_iou({name: 0.5}, [RED], 0.5).any()
        assert visualize.plot_confusion([[1]], [name]).any()
    logging.getLogger('matplotlib.font_manager').warning('fonts')
    assert not recwarn.list and not caplog.records
    assert capfd.readouterr() == ('', '')


def test_charts_are_drawn_without_a_display(monkeypatch):
    """pyplot, which would choose a window system, is not imported."""
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
    monkeypatch.delenv('DISPLAY', raising=False)
    assert visualize.plot_confusion(np.eye(2), ['a', 'b']).any()
    assert visualize.plot_iou({'a': 0.5}, [RED], 0.5).any()


def test_maps_of_a_scaled_image_fit_the_images_panel():
    """Their sides are rounded twice, the panel's once: by the image."""
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 700, (300, 2)).tolist():
        panel = visualize.fit_panel(np.zeros((height, width, 3), np.uint8))
        for scale in (0.3, 0.5, 0.75, 1.5):
            scaled = [max(1, round(side * scale)) for side in (height, width)]
            z = visualize.fit_panel(np.ones(scaled, np.float32),
                                    (height, width))
            assert visualize.heat_map(panel, z).shape == panel.shape
