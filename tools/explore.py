"""Shows in the browser what a network predicts and where it attends.

    python -m tools.explore [CHECKPOINT] [--with CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT is models/final.pth if not named; --with shows a second one beside
it, or the same one, for another T. Opens a page on this machine alone, and
runs until Ctrl-C; writes nothing here, and sends nothing anywhere. Every image
of the page has a button that saves it as PNG.

    --port N        7860 if not named
    --host ADDRESS  where to listen; 0.0.0.0 lets others in
    --no-browser    print the address only

Shapes: n classes, c channels, h x w feature grid, T iterations, k bases, H x W
pixels.
"""
import argparse
import collections
import contextlib
import os
import sys
import threading

import cv2
import numpy as np
import torch

import dataset
import eval
import heads
import network
import settings
from converters import toy
from lib import visualize
from lib.checkpoint import find_checkpoint, get_classes
from lib.distributed import pick_devices_for, use_device
from lib.images import read_any_image
from lib.recorded import adopt_data
from utils import UserError, import_optional, log, make_parser, run_main

MAX_SIDE = 512               # of an image, pixels; a larger one is scaled down
MAX_T = 10
EXAMPLES = 8                 # images that the page offers
LISTED, DRAWN = 5, 12        # classes and bases of a pixel; bases of an image
PORT = 7860
BUTTONS = ['download', 'fullscreen']    # not gradio's third, which uploads
HELP = ('Choose or drop an image, then click a pixel of the overlay: its '
        'classes, its bases, and where it attends.')
LOCK = threading.Lock()      # of the settings, which are each network's own

# what is known of an image: x (1, 3, H', W') as the network takes it, its
# features (1, c, h, w), EM's input (c, h, w) and z (k, h, w), both None
# without an EMA unit, and class probabilities (n, H, W)
View = collections.namedtuple('View', 'image x features em_input z prob')


# ------------------------------------------------- a network
class Model:
    """A network, its classes, and the settings it was loaded with."""

    def __init__(self, path):
        before = settings.as_dict()
        device = use_device(pick_devices_for(path)[0])
        self.net, self.checkpoint = heads.load_network(path, device)
        self.names, self.colours = get_classes(self.checkpoint)
        self.path, self.device = path, device
        self.unit = next(iter(network.ema_units(self.net)), None)
        self.settings = settings.as_dict()
        vars(settings).update(before)

    @contextlib.contextmanager
    def active(self):
        """Let the settings be this network's, and alone in that."""
        with LOCK, torch.no_grad():
            before = settings.as_dict()
            vars(settings).update(self.settings)
            try:
                yield
            finally:
                vars(settings).update(before)

    def encode(self, image):
        """Return the View of an image (H, W, 3) before EM and the head."""
        with self.active():
            x = eval.whole_image(image, self.device)
            features = eval.encode(self.net, x) if self.unit else None
            return View(image, x, features, None, None, None)

    def run(self, view, stage_num):
        """Return a View with what T = stage_num gives: the rest of the
        network is run on the features that it has."""
        with self.active():
            em_input = z = None

            def run_head(image):
                return self.net.classify(self.unit(view.features, stage_num),
                                         image.shape[-2:])
            if self.unit:
                em_input, z = eval.run_em(self.unit, view.features, stage_num)
                z = z[-1]
            logits = eval.predict_logits(run_head if self.unit else self.net,
                                         view.x)
            prob = eval.resize(logits.softmax(1), view.image.shape[:2])
            return view._replace(em_input=em_input, z=z, prob=prob[0].cpu())

    # what is drawn of a View
    def draw_classes(self, view, opacity, shown):
        """Return the overlay of the classes shown, indices."""
        pred = eval.best_classes(view.prob[None])[0].numpy()
        return visualize.overlay(view.image, pred, self.names, self.colours,
                                 opacity=opacity, shown=shown)

    def list_classes(self, view, query):
        """Return {name: probability} of a pixel (x, y), the greatest."""
        prob, classes = view.prob[:, query[1], query[0]].topk(
            min(LISTED, len(self.names)))
        return {self.names[i]: p for i, p in zip(classes.tolist(),
                                                 prob.tolist(), strict=True)}

    def list_bases(self, view, query):
        """Return {basis: responsibility} of a pixel (x, y), the greatest."""
        with self.active():
            row, column = eval.cell_of(query, view.image.shape[:2], view.x)
        z, bases = view.z[:, row, column].topk(min(LISTED, len(view.z)))
        return {f'basis {i}': p for i, p in zip(bases.tolist(), z.tolist(),
                                                strict=True)}

    def draw_query(self, view, query):
        """Return the page of where a pixel (x, y) attends."""
        with self.active():
            weight = eval.attention_from(
                self.unit, view.em_input, view.z,
                eval.cell_of(query, view.image.shape[:2], view.x))
            share = eval.map_on_pixels(weight, view.x)
        return visualize.draw_query(view.image, query, share, weight.numel())

    def draw_bases(self, view):
        """Return (panels with captions of the bases that are some cell's
        strongest, most used first; how many there are)."""
        with self.active():
            z = eval.inside_image(view.z, view.x).flatten(1)    # (k, n)
            used, shares = z.argmax(0).unique(), z.mean(1)
            used = used[shares[used].argsort(descending=True)].tolist()
            small, uniform, panels = (visualize.fit_panel(view.image),
                                      1 / len(z), [])
            for i in used[:DRAWN]:
                share = visualize.fit_panel(eval.map_on_pixels(
                    view.z[i], view.x), view.image.shape[:2])
                panels.append((visualize.draw_map(
                    small, share, max(share.max(), uniform), uniform,
                    visualize.FONT_SIZE), f'basis {i}: {shares[i]:.1%}'))
        return panels, len(used)


# ------------------------------------------------- images
def scale_down(image):
    """Return an image (H, W, 3), no side longer than MAX_SIDE."""
    scale = min(1, MAX_SIDE / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def describe_image(name, image):
    """Return in a line which image is shown, and if it is scaled down."""
    (height, width), small = image.shape[:2], scale_down(image)
    line = f'{name}, {width} x {height} pixels'
    if small.shape == image.shape:
        return line
    return f'{line}, scaled down to {small.shape[1]} x {small.shape[0]}'


def load_examples(model):
    """Return [(name, image)] of the data set that a network was trained on;
    where it is not here, of generated ones."""
    with model.active():
        try:
            adopt_data(model.checkpoint, model.path)
            data = dataset.Segmentation(settings.VAL_SPLIT, train=False,
                                        labelled=False)
            chosen = np.linspace(0, len(data) - 1, EXAMPLES).astype(int)
            return [(data.ids[i], data.read(i)[0]) for i in np.unique(chosen)]
        except UserError as error:
            log(f'{error}: the example images are generated')
    return [(f'toy_{i:04d}', toy.generate(np.random.default_rng((0, i)), i)[0])
            for i in range(EXAMPLES)]


def read_upload(path):
    """Return (name, image) of a file; raise UserError that does not name the
    server's folder."""
    name = os.path.basename(path)
    try:
        return name, read_any_image(path)
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from None


# ------------------------------------------------- the page
class Column:
    """What the page shows of one network. Views are the session's: the
    network is shared, and nothing is set on it."""

    def __init__(self, gr, model):
        self.gr, self.model, has_unit = gr, model, bool(model.unit)
        self.view = gr.State()
        png = {'format': 'png', 'type': 'numpy', 'interactive': False,
               'show_label': False, 'buttons': BUTTONS}
        gr.Markdown(f'### {model.path}' + (
            '' if has_unit else ': no EMA unit, its prediction alone'))
        with gr.Row():
            with gr.Column(min_width=340):
                self.overlay = gr.Image(elem_classes='overlay', **png)
                self.stages = gr.Slider(
                    1, MAX_T, model.unit.stages[1] if has_unit else 1, step=1,
                    label='EM iterations T', visible=has_unit)
                with gr.Accordion('Classes', open=len(model.names) <= 21):
                    self.shown = gr.CheckboxGroup(
                        [(name, i) for i, name in enumerate(model.names)],
                        value=[*range(len(model.names))], show_label=False)
            with gr.Column(min_width=340):
                self.query = gr.Image(elem_classes='query', visible=has_unit,
                                      **png)
                with gr.Row():
                    self.probs, self.bases = (gr.Label(
                        label=label, show_heading=False, min_width=190,
                        visible=visible) for label, visible in (
                            ('Classes of the pixel', True),
                            ('Bases of the pixel', has_unit)))
        self.about = gr.Markdown(visible=has_unit)
        self.gallery = gr.Gallery(columns=4, height='auto', visible=has_unit,
                                  elem_classes='bases', **png)
        self.inputs = [self.view, self.stages, self.shown]
        self.of_pixel = [self.probs, self.bases, self.query]
        self.outputs = [self.view, self.overlay, self.about, self.gallery,
                        *self.of_pixel]

    def show(self, view, stage_num, shown, opacity, query):
        """Return the values of `outputs` for another image or T."""
        if view is None:
            return [self.gr.skip()] * len(self.outputs)
        view, about, panels = self.model.run(view, stage_num), '', None
        if self.model.unit:
            panels, count = self.model.draw_bases(view)
            about = (f'{count} of {len(view.z)} bases are in use. The most '
                     f'used, with their share of the image; a click shows one '
                     f'large:')
        return [view, self.draw(view, shown, opacity), about, panels,
                *self.show_pixel(view, query)]

    def draw(self, view, shown, opacity):
        """Return the overlay."""
        return view and self.model.draw_classes(view, opacity, shown)

    def show_pixel(self, view, query):
        """Return the values of `of_pixel`."""
        probs = self.model.list_classes(view, query)
        if not self.model.unit:
            return [probs, None, None]
        try:
            page = self.model.draw_query(view, query)
        except UserError as error:              # EM_NORM=layer
            self.gr.Warning(str(error))
            page = None
        return [probs, self.model.list_bases(view, query), page]


class Page:
    """The page and what it does; `blocks` is gradio's."""

    def __init__(self, models, examples):
        self.gr = gr = import_optional('gradio')
        self.examples = examples
        with gr.Blocks(title='EMANet', analytics_enabled=False) as self.blocks:
            self.point = gr.State()
            gr.Markdown(f'# EMANet: where a pixel attends\n{HELP}')
            with gr.Row():
                file = gr.File(label='Image', height=140, min_width=200)
                thumbs = gr.Gallery(
                    [visualize.fit_panel(image) for _, image in examples],
                    label='Examples', columns=EXAMPLES, height=140, scale=4,
                    allow_preview=False, interactive=False, min_width=480,
                    buttons=[])
            self.status = gr.Markdown()
            self.opacity = gr.Slider(0, 1, visualize.OPACITY, step=0.05,
                                     label='Opacity of the classes')
            with gr.Row():
                self.columns = []
                for model in models:
                    with gr.Column(min_width=360):
                        self.columns.append(Column(gr, model))
            self.add_images(file, thumbs)
            for column in self.columns:
                self.add_controls(column)
            self.add_click()

    def add_images(self, file, thumbs):
        """Have a file, an example, and the page's start show an image."""
        gr, inputs = self.gr, [self.opacity]
        outputs = [self.status, self.point]
        for column in self.columns:
            inputs += [column.stages, column.shown]
            outputs += column.outputs

        def show(name, full, opacity, *given):
            image, values = scale_down(full), []
            query = image.shape[1] // 2, image.shape[0] // 2
            for i, column in enumerate(self.columns):
                values += column.show(column.model.encode(image),
                                      *given[2 * i:2 * i + 2], opacity, query)
            return [describe_image(name, full), query, *values]

        def upload(path, *given):   # None: room for the next file
            try:
                return [None, *show(*read_upload(path), *given)]
            except UserError as error:
                return [None, str(error), *[gr.skip()] * (len(outputs) - 1)]

        def choose(event: gr.SelectData, *given):
            return show(*self.examples[event.index], *given)
        file.upload(upload, [file, *inputs], [file, *outputs])
        thumbs.select(choose, inputs, outputs)
        self.blocks.load(lambda *given: show(*self.examples[0], *given),
                         inputs, outputs)

    def add_controls(self, column):
        """Have T, the opacity and the classes change a column."""
        column.stages.change(
            column.show, [*column.inputs, self.opacity, self.point],
            column.outputs, trigger_mode='always_last',
            show_progress='hidden')
        for control in (self.opacity, column.shown):
            control.change(
                column.draw, [column.view, column.shown, self.opacity],
                column.overlay, trigger_mode='always_last',
                show_progress='hidden')

    def add_click(self):
        """Have a click on any overlay show that pixel in all columns."""
        gr = self.gr

        def click(event: gr.SelectData, *views):
            image = views[0].image              # the page may be enlarged,
            times = visualize.enlarge(image).shape[1] // image.shape[1]
            x, y = (place // times for place in event.index)
            if y >= image.shape[0] or x >= image.shape[1]:
                return [gr.skip()] * len(outputs)       # and has a legend
            return [(x, y), *(value for column, view in zip(
                self.columns, views, strict=True)
                for value in column.show_pixel(view, (x, y)))]
        outputs = [self.point, *(output for column in self.columns
                                 for output in column.of_pixel)]
        for column in self.columns:
            column.overlay.select(click, [each.view for each in self.columns],
                                  outputs, show_progress='hidden')


# ------------------------------------------------- the command
def parse(words):
    """Return the arguments."""
    parser = make_parser(__doc__, settings.describe())
    parser.add_argument('checkpoint', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument('--with', dest='other', metavar='CHECKPOINT')
    parser.add_argument('--port', type=int, default=PORT, metavar='N')
    parser.add_argument('--host', default='127.0.0.1', metavar='ADDRESS')
    parser.add_argument('--no-browser', action='store_true')
    args = parser.parse_args(settings.override(words))
    if not 0 < args.port < 65536:
        raise UserError(f'--port {args.port}: it can be 1 to 65535')
    return args


def main():
    args = parse(sys.argv[1:])
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    gr = import_optional('gradio')
    models = [Model(find_checkpoint(path)) for path in (
        args.checkpoint, *([args.other] if args.other else []))]
    page = Page(models, load_examples(models[0]))
    try:
        page.blocks.launch(
            server_name=args.host, server_port=args.port, share=False,
            inbrowser=not args.no_browser, quiet=True, ssr_mode=False,
            footer_links=[], theme=gr.themes.Default(
                font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            prevent_thread_lock=True)
    except OSError:
        raise UserError(f'--host {args.host} --port {args.port}: it cannot '
                        f'listen there; name another port') from None
    log(f'http://{args.host}:{args.port} shows '
        f'{", ".join(model.path for model in models)}; Ctrl-C ends it')
    page.blocks.block_thread()


if __name__ == '__main__':
    run_main(main)
