"""Segments images, folders and videos.

    python predict.py FILE... [CHECKPOINT] [--to DIR] [KEY=VALUE ...]

CHECKPOINT (.pth, an exported .safetensors or .onnx, or a folder of final.pth
without images) is models/final.pth if not named; DIR is `predictions`.
FILE.jpg becomes

    DIR/FILE.png               a palette mask, the class of each pixel
    DIR/FILE.overlay.jpg       the classes over the image, with a legend
    DIR/FILE.prob.npy          --probabilities: float16 (n, H, W)
    DIR/FILE.attention.jpg     --attention: what the EM bases attend to
    DIR/FILE.em.jpg            --em: that, after each EM iteration
    DIR/FILE.query.jpg         --query X,Y: where that pixel attends

A folder is searched through; its images keep their places in it. A video
becomes DIR/VIDEO.overlay.mp4, its frames DIR/VIDEO/000000.png and so on.
Shapes: b images, n classes, H x W pixels.
"""
if __name__ == '__main__':      # before torch, whose import takes seconds
    from lib import signals
    signals.end_while_starting()

import argparse
import os
import re
import sys

import cv2
import numpy as np
import torch

import dataset
import eval
import heads
import settings
from lib import visualize
from lib.checkpoint import final_in, find_checkpoint, get_classes
from lib.distributed import pick_devices_for, use_device
from lib.images import read_any_image, save_image, save_label, writing
from lib.video import OverlayVideo, count_frames, read_frames
from utils import (
    RunError,
    UserError,
    atomic_write,
    log,
    make_parser,
    plural,
    progress,
    run_main,
)

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.ppm', '.tif', '.tiff',
          '.webp')           # what is taken of a folder, and
VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')
WEIGHTS = ('.pth', '.safetensors', '.onnx')
RESULTS = ('.png', '.overlay.jpg', '.overlay.mp4', '.prob.npy',
           '.attention.jpg', '.em.jpg', '.query.jpg')


# ------------------------------------------------- files
def find_files(file, output):
    """Yield (file, name) of a file, or of a folder's images and videos but
    for hidden ones and the output folder; name: its place in the folder."""
    if not os.path.exists(file):
        raise UserError(f'{file} is not there')
    if not os.path.isdir(file):
        yield file, os.path.basename(file)
    for root, folders, names in os.walk(file):
        folders[:] = sorted(
            name for name in folders if not name.startswith('.')
            and not is_same_file(os.path.join(root, name), output))
        for name in sorted(names):
            if name.lower().endswith(IMAGES + VIDEOS) and name[0] != '.':
                path = os.path.join(root, name)
                yield path, os.path.relpath(path, file)


def is_same_file(path, other):
    """Tell whether two paths lead to one place; neither need exist."""
    return os.path.realpath(path) == os.path.realpath(other)


def output_paths(files, folder):
    """Return {file: path of its results without ending}, folders searched.

    Raises UserError for a file that is not there, two that would be written
    to one, and one that would be written over by a result.
    """
    sources = {}
    for file, place in [pair for each in files
                        for pair in find_files(each, folder)]:
        name = os.path.splitext(place)[0]
        if name in sources and is_same_file(file, sources[name]):
            continue                            # named twice
        if name in sources:
            raise UserError(f'{sources[name]} and {file} would both be '
                            f'written as {name}; rename one')
        sources[name] = file
    results = {os.path.realpath(os.path.join(folder, name + ending))
               for name in sources for ending in RESULTS}
    for file in sources.values():
        if os.path.realpath(file) in results:
            raise UserError(f'{file} would be written over by a result; name '
                            f'another folder by --to')
    if not sources:
        raise UserError(f'{", ".join(files)}: no image '
                        f'({", ".join(IMAGES)}) and no video is in there')
    return {file: os.path.join(folder, name)
            for name, file in sources.items()}


def read_images(paths, errors):
    """Yield (path, image) of {file: path}; add a line to errors for each that
    cannot be read."""
    for file, path in paths.items():
        try:
            image = read_any_image(file)
        except UserError as error:
            errors.append(str(error))
        else:
            yield path, image


def group_by_size(items, device):
    """Yield lists of consecutive items (path, image) of one size; images that
    need a sliding window come alone."""
    batch = []
    for path, image in items:
        if batch and batch[0][1].shape != image.shape:
            yield batch
            batch = []
        batch.append((path, image))
        size = image.shape[:2]
        if len(batch) == eval.eval_batch_size(device, size) or (
                eval.window_size(size, settings.EVAL_SCALES)):
            yield batch
            batch = []
    if batch:
        yield batch


# ------------------------------------------------- results
def parse_bases(text, net):
    """Return the bases that --bases names; raise UserError for others."""
    words = text.split(',') if text else []
    count = eval.ema_unit(net).mu.shape[2]
    if not all(word.isdecimal() and int(word) < count for word in words):
        raise UserError(f'--bases {text}: name some of 0 to {count - 1}, '
                        f'such as --bases 0,{count - 1}')
    return [int(word) for word in words]


def parse_query(text):
    """Return the pixel (x, y) that --query names, or None."""
    if text and not re.fullmatch('[0-9]{1,9},[0-9]{1,9}', text):
        raise UserError(f'--query {text}: name a pixel of the image by its '
                        f'column and row, such as --query 120,80')
    return tuple(map(int, text.split(','))) if text else None


class Predictor:
    """A network, and what to write of its predictions."""

    def __init__(self, path, args):
        self.needs_maps = args.attention or args.em
        if (self.needs_maps or args.query) and path.endswith('.onnx'):
            raise UserError(f'{path}: an ONNX file does not give the bases '
                            f'that --attention, --em and --query draw; name '
                            f'the .pth that it was exported from')
        self.device = use_device(pick_devices_for(path)[0])
        self.net, checkpoint = heads.load_network(path, self.device)
        self.names, self.colours = get_classes(checkpoint)
        self.prepared, self.args = eval.prepare_network(self.net), args
        self.bases = parse_bases(args.bases, self.net) if (
            self.needs_maps) else []
        if args.query:
            eval.check_implied(eval.ema_unit(self.net))

    def predict(self, items, bar, errors, video=None):
        """Write the results of items (path, image); overlays go into the
        video, if there is one. What is too large for the memory gets a line
        in errors, as has an image without the query pixel."""
        for batch in group_by_size(items, self.device):
            paths, images = zip(*batch, strict=True)
            for path in paths:
                with writing(f'{path}.png'):
                    pass                # before the network's long work
            try:
                self.check_query(*images[0].shape[:2])
                preds, probs = self.segment(images)
            except UserError as error:
                errors += [f'{path}.png: {error}' for path in paths]
                if video:
                    return              # all frames are of one size
                continue
            for path, image, pred, prob in zip(paths, images, preds, probs,
                                               strict=True):
                self.write(path, image, pred, prob, video)
                bar.update()

    def check_query(self, height, width):
        """Raise UserError where --query lies outside an image of this size.
        """
        if self.args.query and (self.args.query[0] >= width
                                or self.args.query[1] >= height):
            raise UserError('--query {},{} lies outside the image, {} x {} '
                            'pixels'.format(*self.args.query, width, height))

    @torch.no_grad()
    def segment(self, images):
        """Return the classes (b, H, W) uint8 of images [(H, W, 3) uint8], and
        their probabilities (b, n, H, W), or a None for each."""
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        batch = dataset.normalise(batch, self.device)           # (b, 3, H, W)
        given = (self.prepared, batch, settings.EVAL_SCALES,
                 settings.EVAL_FLIP)
        if not self.args.probabilities:
            return (eval.predict_classes(*given).cpu().numpy(),
                    [None] * len(images))
        prob = eval.infer(*given)                               # (b, n, H, W)
        return (prob.max(1).indices.to(torch.uint8).cpu().numpy(),
                prob.cpu().numpy())

    def write(self, path, image, pred, prob, video):
        """Write an image's mask, probabilities and drawings."""
        pages = self.draw(image, pred, video is not None)
        if video:
            video.add(pages.pop('overlay'))
        with writing(f'{path}.png'):
            save_label(pred, f'{path}.png', self.colours)
            for name, page in pages.items():
                save_image(page, f'{path}.{name}.jpg', quality=92)
        if prob is not None:
            path = f'{path}.prob.npy'
            with (writing(path), atomic_write(path, flush=False) as part,
                  open(part, 'wb') as file):
                np.save(file, prob.astype(np.float16))

    def draw(self, image, pred, is_frame):
        """Return {name: (H', W', 3) uint8} of what is drawn of an image; all
        frames' legends list all classes, and so are of one size."""
        pages = {'overlay': visualize.overlay(
            image, pred, self.names, self.colours, all_classes=is_frame)}
        if self.needs_maps:
            bases, shares, maps, n_bases = eval.attention_maps(
                self.net, image, self.device, self.bases)
        if self.args.attention:
            pages['attention'] = visualize.draw_attention(
                image, bases, shares, maps, n_bases)
        if self.args.em:
            pages['em'] = visualize.draw_em(image, bases, maps, n_bases)
        if self.args.query:
            pages['query'] = visualize.draw_query(
                image, self.args.query, *eval.query_attention(
                    self.net, image, self.device, self.args.query))
        return pages


# ------------------------------------------------- the command
def predict(files, weights, args):
    """Write the results of files. Those that cannot be read are named at the
    end, by a RunError, or by a UserError where nothing at all was written."""
    paths, errors = output_paths(files, args.to), []
    predictor = Predictor(find_checkpoint(weights), args)
    videos = [file for file in paths if file.lower().endswith(VIDEOS)]
    images = {file: to for file, to in paths.items() if file not in videos}
    with progress(total=len(images), desc='predict', unit='image') as bar:
        predictor.predict(read_images(images, errors), bar, errors)
        for file in videos:
            source = cv2.VideoCapture(file)
            bar.total += count_frames(source)
            frames = read_frames(source, file, paths[file], errors)
            with OverlayVideo(f'{paths[file]}.overlay.mp4',
                              source.get(cv2.CAP_PROP_FPS) or 25) as video:
                predictor.predict(frames, bar, errors, video)
    if bar.n:
        log(f'{plural(bar.n, "image")}: masks and overlays are in {args.to}')
    if errors and len(paths) > 1:
        errors = [f'{len(errors)} of {len(paths)} files could not be '
                  f'segmented to their end:', *errors]
    if errors:
        raise (RunError if bar.n else UserError)('\n  '.join(errors))


def is_run(folder):
    """Tell whether a folder has a final.pth, itself or in its models/, and no
    image or video in it."""
    return os.path.isdir(folder) and final_in(folder) and not any(
        name.lower().endswith(IMAGES + VIDEOS) for name in os.listdir(folder))


def split_files(files):
    """Return (images, checkpoint or None) of the files that were named."""
    weights = [file for file in files
               if file.endswith(WEIGHTS) or is_run(file)]
    if len(weights) > 1:
        raise UserError(f'{", ".join(weights)}: name one checkpoint at most')
    return ([file for file in files if file not in weights],
            weights[0] if weights else None)


def check_folder(folder, word):
    """Raise UserError where a file stands in the way of a folder to be made.
    word: the option or file that asks for the folder."""
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if folder and not os.path.isdir(folder):
        raise UserError(f'{word}: {folder} is a file; name another folder')


def parse(words):
    """Return (arguments, checkpoint or None, files to segment)."""
    if any(word.partition('=')[0] == '--export' for word in words):
        raise UserError('--export is a command of its own: '
                        'python -m tools.export FILE.onnx')
    parser = make_parser(__doc__, settings.describe())
    parser.add_argument('files', nargs='*', help=argparse.SUPPRESS)
    parser.add_argument('--to', metavar='DIR', default='predictions')
    for name in ('probabilities', 'attention', 'em'):
        parser.add_argument(f'--{name}', action='store_true')
    parser.add_argument('--bases', metavar='I,J,...', default='',
                        help='draw these, not the most diverse ones')
    parser.add_argument('--query', metavar='X,Y', default='')
    args = parser.parse_intermixed_args(words)
    args.query = parse_query(args.query)
    if '' in [args.to, *args.files]:
        raise UserError("'' is no file and no folder; leave it out")
    files, weights = split_files(args.files)
    if not files:
        raise UserError(f'{weights}: name images to segment as well'
                        if weights else 'name images, folders or videos to '
                        'segment, such as: python predict.py photo.jpg')
    check_folder(args.to, f'--to {args.to}')
    if args.bases and not (args.attention or args.em):
        raise UserError(f'--bases {args.bases}: of what? Add --attention or '
                        f'--em')
    return args, weights, files


def main():
    args, weights, files = parse(settings.override(sys.argv[1:]))
    predict(files, weights, args)


if __name__ == '__main__':
    run_main(main)
