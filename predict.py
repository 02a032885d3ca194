"""Segments pictures, folders and videos; exports the network.

    python predict.py FILE... [CHECKPOINT] [--to DIR] [KEY=VALUE ...]
    python predict.py --export NET.onnx [FILE...] [CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT (.pth, or an exported .safetensors or .onnx) is models/final.pth if
not named; DIR is `predictions`. FILE.jpg becomes

    DIR/FILE.png               a palette mask, the class of each pixel
    DIR/FILE.overlay.jpg       the classes over the picture, with a legend
    DIR/FILE.prob.npy          --probabilities: float16 (n, H, W)
    DIR/FILE.attention.jpg     --attention: what the EM bases attend to
    DIR/FILE.em.jpg            --em: that, after each EM iteration

A folder is searched through; its pictures keep their places in it. A video
becomes DIR/VIDEO.overlay.mp4, its frames DIR/VIDEO/000000.png and so on.
--export writes NET.onnx, checked against PyTorch on the FILEs, or the weights
alone as NET.safetensors. Shapes: b pictures, n classes, T iterations, k
bases, H x W pixels.
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import sys

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

import dataset
import eval
import settings
import utils

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.ppm', '.tif', '.tiff',
            '.webp')         # what is taken of a folder, and
VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')
WEIGHTS = ('.pth', '.safetensors', '.onnx')
AGREE = 0.999                # share of pixels that an export has to get right


# ------------------------------------------------- files
def read_picture(path):
    """Return any picture that Pillow reads as (H, W, 3) uint8 RGB, turned
    upright, 16 bits made 8, on white where it is transparent. Raises
    ValueError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):
                grey = np.asarray(image)
                grey = grey // 257 if grey.max() > 255 else grey
                image = Image.fromarray(np.uint8(grey.clip(0, 255)))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                white = Image.new('RGBA', image.size, 'white')
                image = Image.alpha_composite(white, image)
            return np.array(image.convert('RGB'))
    except dataset.UNREADABLE as error:
        raise ValueError(f'{path} cannot be read as a picture ({error})'
                         ) from None


def search(file, folder):
    """Yield (file, name) of a file, or of what a folder holds, but for
    hidden files and the output folder; name: its place in the folder."""
    if not os.path.exists(file):
        raise FileNotFoundError(f'{file} is not there')
    if not os.path.isdir(file):
        yield file, os.path.basename(file)
    for root, folders, names in os.walk(file):
        folders[:] = sorted(
            name for name in folders if not name.startswith('.')
            and not _same(os.path.join(root, name), folder))
        for name in sorted(names):
            if name.lower().endswith(PICTURES + VIDEOS) and name[0] != '.':
                path = os.path.join(root, name)
                yield path, os.path.relpath(path, file)


def _same(path, other):
    return os.path.realpath(path) == os.path.realpath(other)


def outputs(files, folder):
    """Return {file: path without ending}, folders searched through; raise
    ValueError where two files would be written to one, or one over itself,
    FileNotFoundError for a file not there."""
    names = {}
    for file, place in [pair for each in files
                        for pair in search(each, folder)]:
        name = os.path.splitext(place)[0]
        if name in names:
            raise ValueError(f'{names[name]} and {file} would both be '
                             f'written as {name}; rename one')
        if _same(file, os.path.join(folder, f'{name}.png')):
            raise ValueError(f'{file} would be written over by its mask; '
                             f'name another folder by --to')
        names[name] = file
    if not names:
        raise ValueError(f'{", ".join(files)}: no picture ('
                         f'{", ".join(PICTURES)}) and no video is in there')
    return {file: os.path.join(folder, name) for name, file in names.items()}


@contextlib.contextmanager
def writing(path):
    """Make the folder of a path; raise OSError that names the path when what
    is done meanwhile cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield
    except OSError as error:
        raise OSError(f'{path} cannot be written ({error}); make room, or '
                      f'name another place') from None


def pictures(paths, faults):
    """Yield (path, picture) of {file: path}; add a line to the faults for
    each that cannot be read."""
    for file, path in paths.items():
        try:
            image = read_picture(file)
        except ValueError as error:
            faults.append(str(error))
        else:
            yield path, image


def frames(video, file, path, faults):
    """Yield (path, picture) of a video's frames, which are numbered from 0;
    add a line to the faults where there are less than its header tells."""
    told, count = frame_count(video), 0
    while (read := video.read())[0]:
        yield (os.path.join(path, f'{count:06}'),
               cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
        count += 1
    if count < max(1, 0.95 * told):         # headers are not exact
        faults.append(f'{file} cannot be read as a video' if not count else
                      f'{file} ends after {count} of {told} frames')


def frame_count(video):
    """Return how many frames a video's header tells of, 0 if none."""
    return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))


def batches(items, device):
    """Yield lists of items (path, picture) that come one after another, are
    of one size, and are seen at once; huge pictures are seen alone."""
    batch = []
    for path, image in items:
        if batch and batch[0][1].shape != image.shape:
            yield batch
            batch = []
        batch.append((path, image))
        huge = eval.window_side(image.shape[:2], settings.EVAL_SCALES)
        if huge or len(batch) == eval.batch_size(device):
            yield batch
            batch = []
    if batch:
        yield batch


# ------------------------------------------------- results
@torch.no_grad()
def segment(net, images, device, files=()):
    """Return the class of each pixel, (b, H, W) uint8, of pictures (b, H, W,
    3) uint8; scales and flip as EVAL_SCALES and EVAL_FLIP say.

    net: what eval.prepared gives. files: arrays (n, H, W) that take the
    probabilities of each, part by part.
    """
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    batch = dataset.normalise(batch, device)                # (b, 3, H, W)
    given = net, batch, settings.EVAL_SCALES, settings.EVAL_FLIP
    if not files:
        return eval.classify(*given).cpu().numpy()
    pred = np.empty((len(images), *batch.shape[2:]), np.uint8)
    for rows, columns, prob in eval.parts(*given):          # (b, n, h, w)
        for file, one in zip(files, prob.cpu().numpy()):
            file[:, rows, columns] = one
        pred[:, rows, columns] = eval.likeliest(prob).cpu().numpy()
    return pred


@contextlib.contextmanager
def probability_files(paths, size):
    """Give an array (n, H, W) float16 for each path, which lies on the disk,
    not in memory: those of a huge picture take gigabytes."""
    shape = settings.N_CLASSES, *size
    wanted = 2 * math.prod(shape) * len(paths)
    free = shutil.disk_usage(os.path.dirname(paths[0])).free
    if free < wanted:
        raise OSError(f'{paths[0]} cannot be written: probabilities take '
                      f'{wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free')
    with contextlib.ExitStack() as stack:
        with writing(paths[0]):
            files = [np.lib.format.open_memmap(
                stack.enter_context(utils.atomic(path)), 'w+', np.float16,
                shape) for path in paths]
        yield files


class Film:
    """A video of overlays, begun with the first: the legend has all classes,
    so that all are of one size."""

    def __init__(self, path, rate):
        self.path, self.rate, self.writer = path, rate, None

    def add(self, page):
        """Add an overlay (H, W, 3) uint8; codecs want even sides."""
        height, width = page.shape[:2]
        page = cv2.copyMakeBorder(
            cv2.cvtColor(page, cv2.COLOR_RGB2BGR), 0, height % 2, 0,
            width % 2, cv2.BORDER_REPLICATE)
        with writing(self.path):
            if self.writer is None:
                self.writer = cv2.VideoWriter(
                    self.path, cv2.VideoWriter.fourcc(*'mp4v'), self.rate,
                    page.shape[1::-1])
            if not self.writer.isOpened():
                raise OSError('OpenCV has no writer for it')
            self.writer.write(page)

    def close(self):
        if self.writer:
            self.writer.release()


def draw_em(image, bases, maps):
    """Return a page of maps (T, bases, h, w) over a picture: a row for each
    basis, a column for each iteration, each row with one scale."""
    small, panels, captions = eval.fitted(image), [], []
    for i, row in zip(bases, maps.swapaxes(0, 1)):          # (T, h, w)
        panels += [small] + [eval.heat(small, z / row.max()) for z in row]
        captions += [f'basis {i}, up to {row.max():.2f}'] + [
            f'iteration {t + 1}' for t in range(len(row))]
    return eval.grid(panels, captions, len(maps) + 1)


def chosen_bases(net, text):
    """Return the bases that --bases names; raise ValueError for others."""
    words = text.split(',') if text else []
    count = eval.em_unit(net).mu.shape[2]
    if not all(word.isdecimal() and int(word) < count for word in words):
        raise ValueError(f'--bases {text}: name some of 0 to {count - 1}, '
                         f'such as --bases 0,{count - 1}')
    return [int(word) for word in words]


# ------------------------------------------------- pictures in, results out
class Predictor:
    """A network, and what is asked of it."""

    def __init__(self, path, asked):
        self.device = eval.devices_for(path)[0]
        self.net, checkpoint = eval.load_network(path, self.device)
        self.names, self.colours = eval.classes_of(checkpoint)
        self.run, self.asked = eval.prepared(self.net), asked
        if asked.attention or asked.em:
            self.bases = chosen_bases(self.net, asked.bases)

    def see(self, items, bar, film=None):
        """Write the results of items (path, picture); the overlays become
        the film's, if there is one."""
        for batch in batches(items, self.device):
            paths, images = zip(*batch)
            for path in paths:
                with writing(f'{path}.png'):
                    pass                # before the network's long work
            if self.asked.probabilities:
                with probability_files([f'{path}.prob.npy' for path in paths],
                                       images[0].shape[:2]) as files:
                    preds = segment(self.run, images, self.device, files)
            else:
                preds = segment(self.run, images, self.device)
            for path, image, pred in zip(paths, images, preds):
                self.write(path, image, pred, film)
                bar.update()

    def write(self, path, image, pred, film):
        """Write a picture's mask and drawings."""
        pages = {}
        overlay = eval.overlay(image, pred, self.names, self.colours,
                               film is not None)
        if film:
            film.add(overlay)
        else:
            pages['overlay'] = overlay
        if self.asked.attention or self.asked.em:
            bases, shares, maps = eval.look(self.net, image, self.device,
                                            self.bases)
        if self.asked.attention:
            pages['attention'] = eval.draw_attention(image, bases, shares,
                                                     maps)
        if self.asked.em:
            pages['em'] = draw_em(image, bases, maps)
        with writing(f'{path}.png'):
            utils.save_label(pred, f'{path}.png', self.colours)
            for name, page in pages.items():
                Image.fromarray(page).save(f'{path}.{name}.jpg', quality=92)


def predict(files, weights, asked):
    """Write the results of files; raise OSError at the end that names those
    which cannot be read."""
    paths, faults = outputs(files, asked.to), []
    predictor = Predictor(eval.find_checkpoint(weights), asked)
    videos = [file for file in paths if file.lower().endswith(VIDEOS)]
    images = {file: to for file, to in paths.items() if file not in videos}
    with utils.progress(total=len(images), desc='predict',
                        unit='picture') as bar:
        predictor.see(pictures(images, faults), bar)
        for file in videos:
            video = cv2.VideoCapture(file)
            bar.total += frame_count(video)
            film = Film(f'{paths[file]}.overlay.mp4',
                        video.get(cv2.CAP_PROP_FPS) or 25)
            predictor.see(frames(video, file, paths[file], faults), bar, film)
            film.close()
        done = bar.n
    utils.log(f'{done} pictures: masks and overlays are in {asked.to}')
    if faults and len(paths) > 1:
        faults = [f'{len(faults)} of {len(paths)} files could not be read to '
                  f'their end:', *faults]
    if faults:
        raise OSError('\n  '.join(faults))


# ------------------------------------------------- export
class Padded(torch.nn.Module):
    """A network that pads its image (b, 3, H, W) by itself, and so may be
    given any size."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return eval.logits(self.net, image)


def record(checkpoint):
    """Return what travels in an exported file, {name: JSON}; see
    eval.recorded_in."""
    names, colours = eval.classes_of(checkpoint)
    return {name: json.dumps(value) for name, value in {
        'classes': names, 'colours': colours, 'mean': settings.MEAN,
        'std': settings.STD, 'step': checkpoint.get('step'),
        'git': checkpoint.get('git', utils.git_hash()), 'settings': {
            name: getattr(settings, name) for name in settings._NETWORK},
    }.items()}


def write_safetensors(net, texts, path):
    """Write a network's weights, with the texts of `record`."""
    data = utils.needed('safetensors.torch').save(
        {key: value.contiguous() for key, value in net.state_dict().items()},
        texts)
    with (writing(path), utils.atomic(path) as part,
          open(part, 'wb') as file):
        file.write(data)
    utils.log(f'{path}: the weights, and {", ".join(texts)}')


@torch.no_grad()
def write_onnx(net, texts, path, images):
    """Write a network with the texts of `record`: image (b, 3, H, W) float32,
    normalised, of any size, to logits (b, n, H, W).

    Raises RuntimeError, and writes nothing, unless onnxruntime finds in
    images (H, W, 3) uint8 what PyTorch does.
    """
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        utils.needed(module)
    utils.log(f'{path}: the network is traced, for a minute or less')
    sizes = {0: 'batch', 2: 'height', 3: 'width'}
    program = torch.onnx.export(
        Padded(net).eval(), (torch.zeros(2, 3, 70, 90),), dynamo=True,
        verbose=False, input_names=['image'], output_names=['logits'],
        dynamic_shapes={'image': sizes})
    program.model.metadata_props.update(texts)
    with writing(path), utils.atomic(path) as part:
        program.save(part, external_data=False)
        share, far = agreement(net, eval.Onnx(part), images)
        if share < AGREE:
            raise RuntimeError(f'{path} is not written: onnxruntime agrees '
                               f'with PyTorch on {share:.2%} of pixels alone')
    utils.log(f'{path}: onnxruntime gives {share:.3%} of the pixels of '
              f'{len(images)} pictures the class that PyTorch gives them; '
              f'logits differ by {far:.1g} at most')


def agreement(net, other, images):
    """Return (share of pixels with the same class, greatest difference of
    logits) of two networks, on pictures at the first of EVAL_SCALES."""
    same = count = far = 0
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None]
        x = eval.resize(dataset.normalise(x, 'cpu'), eval.scaled_size(
            image.shape[:2], settings.EVAL_SCALES[0]))
        a, b = eval.logits(net, x), other(x)
        same += int((a.argmax(1) == b.argmax(1)).sum())
        count, far = count + a[0, 0].numel(), max(far, float(
            (a - b).abs().max()))
    return same / count, far


def generated():
    """Return pictures to check an export with, soft blots of two sizes."""
    random = np.random.default_rng(0)
    return [cv2.resize(random.integers(0, 256, (8, 8, 3), np.uint8), size,
                       interpolation=cv2.INTER_CUBIC)
            for size in ((150, 101), (64, 97))]


def export(path, checkpoint_path, files):
    """Write a network to a file, the way that its ending says."""
    if checkpoint_path.endswith('.onnx'):
        raise ValueError(f'{checkpoint_path} is exported already; name a '
                         f'.pth')
    if settings.INFERENCE != 'plain':
        raise ValueError(f'INFERENCE={settings.INFERENCE}: the network is '
                         f'exported as it is; INFERENCE=plain')
    images = [read_picture(file) for file in files] or generated()
    net, checkpoint = eval.load_network(checkpoint_path, torch.device('cpu'))
    texts = record(checkpoint)
    if path.endswith('.onnx'):
        write_onnx(net, texts, path, images)
    else:
        write_safetensors(net, texts, path)


# ------------------------------------------------- the command
def parse(words):
    """Return (what is asked, checkpoint or None, files)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.
        RawDescriptionHelpFormatter, usage='predict.py FILE... '
        '[CHECKPOINT] [--to DIR] [KEY=VALUE ...]')
    parser.add_argument('files', nargs='*', help=argparse.SUPPRESS)
    parser.add_argument('--to', metavar='DIR')
    for name in ('probabilities', 'attention', 'em'):
        parser.add_argument(f'--{name}', action='store_true')
    parser.add_argument('--bases', metavar='I,J,...', default='',
                        help=f'draw these, not {eval.SHOWN} telling ones')
    parser.add_argument('--export', metavar='FILE', default='')
    asked = parser.parse_intermixed_args(words)
    weights = [file for file in asked.files if file.endswith(WEIGHTS)]
    files = [file for file in asked.files if file not in weights]
    if len(weights) > 1 or not files and not asked.export:
        raise ValueError(f'{len(files)} pictures and {len(weights)} '
                         f'checkpoints are named; name pictures, and one '
                         f'checkpoint at most')
    if asked.bases and not (asked.attention or asked.em):
        raise ValueError(f'--bases {asked.bases}: of what? Add --attention '
                         f'or --em')
    if asked.export and (asked.to or asked.probabilities or asked.attention
                         or asked.em):
        raise ValueError(f'--export {asked.export}: the network is written, '
                         f'and nothing is predicted; leave the other options')
    asked.to = asked.to or 'predictions'
    if asked.export and not asked.export.endswith(WEIGHTS[1:]):
        raise ValueError(f'--export {asked.export}: it ends in .onnx or '
                         f'.safetensors')
    if asked.export.endswith('.safetensors') and files:
        raise ValueError(f'{files[0]}: weights alone are exported, and '
                         f'nothing is checked on pictures')
    return asked, weights[0] if weights else None, files


def main():
    asked, weights, files = parse(settings.override(sys.argv[1:]))
    eval.check_settings()
    if asked.export:
        export(asked.export, eval.find_checkpoint(weights), files)
    else:
        predict(files, weights, asked)


if __name__ == '__main__':
    utils.launch(main)
