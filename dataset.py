"""Reads a set in the VOC layout: samples, augmentation, loaders.

    DATA_ROOT/JPEGImages/ID.jpg, SegmentationClassAug/ID.png (class indices),
    ImageSets/Segmentation/SPLIT.txt, classes.txt (name r g b, a line each)

Images and labels stay uint8 until they are on the device. What a sample looks
like depends on SEED, the epoch and the sample alone, so neither the number of
workers nor a resume changes it. Of a scaled image only the window that the
crop shows is made, bit for bit as in the whole. `python dataset.py
[KEY=VALUE ...]` draws augmented samples beside their labels.
"""
import functools
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import settings

LISTS = os.path.join('ImageSets', 'Segmentation')
LABELS = 'SegmentationClassAug'
ORDER, AUGMENT = 1, 2        # what a random generator is for
UNREADABLE = (OSError, ValueError, SyntaxError, cv2.error,
              Image.DecompressionBombError)


class BadSample(ValueError):
    """A file of the set cannot be used.

    Its text is one line, also where a worker process handed the error over
    with its traceback.
    """

    def __str__(self):
        last = super().__str__().strip().splitlines()[-1]
        return last.removeprefix('dataset.BadSample: ')


def _unreadable(path, kind, error):
    reason = ' '.join(str(error).split()) or type(error).__name__
    return BadSample(f'{path} cannot be read as a {kind} ({reason}); replace '
                     f'it or take its id from the list')


# ------------------------------------------------- files
def read_image(path):
    """Return a picture as (H, W, 3) uint8, RGB, rows as they are stored.

    Raises BadSample. OpenCV fills up a truncated JPEG with grey and says
    nothing, so a file without its end is left to Pillow to judge.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if not data[-512:].tobytes().rstrip(b'\0').endswith(b'\xff\xd9'):
            with Image.open(path) as image:
                return np.array(image.convert('RGB'))
        image = cv2.imdecode(
            data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise OSError('no JPEG')
    except UNREADABLE as error:
        raise _unreadable(path, 'picture', error) from None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label(path):
    """Return a PNG's class indices, (H, W) uint8, palette or grey alike.

    Raises BadSample for what is no PNG and for coloured masks.
    """
    try:
        with open(path, 'rb') as file:
            data = file.read()
        with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
            mode, label = image.mode, np.array(image)
    except UNREADABLE as error:
        raise _unreadable(path, 'PNG', error) from None
    if mode not in ('P', 'L', '1'):
        raise BadSample(f'{path} is a PNG of mode {mode}; a label holds class '
                        f'indices, 8-bit palette or grey')
    label = label.astype(np.uint8)
    depth, kind = data[24], data[25]        # grey of 2 or 4 bits: Pillow
    if kind == 0 and depth in (2, 4):       # stretches it to 0..255
        label //= 255 // (2 ** depth - 1)
    return label


def image_size(path):
    """Return (H, W) of a picture, read from its header. Raises BadSample."""
    try:
        with Image.open(path) as image:
            return image.size[::-1]
    except UNREADABLE as error:
        raise _unreadable(path, 'picture', error) from None


def read_ids(root, split):
    """Return the ids of a split, in the list's order.

    Where trainaug has no list (the official VOC tree with SegmentationClassAug
    put beside it) it is every label but those of val. Raises
    FileNotFoundError or ValueError that says what to do.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f'DATA_ROOT={root}: no such folder; make the '
                                f'set with prepare.py, or set DATA_ROOT')
    folder = os.path.join(root, LISTS)
    path = os.path.join(folder, f'{split}.txt')
    if os.path.isfile(path):
        with open(path) as file:
            ids = [line.strip() for line in file if line.strip()]
    elif split == 'trainaug' and os.path.isdir(os.path.join(root, LABELS)):
        val = set(read_ids(root, 'val'))
        ids = sorted(name[:-4] for name in os.listdir(
            os.path.join(root, LABELS)) if name.endswith('.png'))
        ids = [name for name in ids if name not in val]
    else:
        found = sorted(name[:-4] for name in os.listdir(folder)
                       if name.endswith('.txt')) if os.path.isdir(
                           folder) else []
        raise FileNotFoundError(f'{path} is not there; the splits of this '
                                f'set are: {", ".join(found) or "none"}')
    if not ids:
        raise ValueError(f'{path} is empty: a split needs at least one id')
    return ids


# ------------------------------------------------- scaling
@functools.cache
def _ratio(scale):
    """Return a scale as the fraction that it is meant to be: 0.4 is 2/5."""
    return Fraction(str(scale))


def scaled_side(side, scale):
    """Return the pixels of a side that is scaled: side * scale rounded, half
    a pixel downwards."""
    p, q = _ratio(scale).as_integer_ratio()
    return max(1, (2 * side * p + q - 1) // (2 * q))


def scaled_image(image, scale, rows, columns):
    """Return the window rows x columns (ranges) of an image (H, W, 3) that is
    scaled bilinearly: pixel i shows the place (i + 0.5) / scale - 0.5.

    Bit-equal to scaling the whole, whatever OpenCV and processor: where
    scale is p / q, the grid repeats every q pixels, so a window that begins
    at a multiple of q is weighted as the whole is; and INTER_LINEAR_EXACT,
    unlike INTER_LINEAR, keeps its weights free of rounding that grows with
    the coordinate.
    """
    if scale == 1:
        return image[rows.start:rows.stop, columns.start:columns.stop]
    period, source, inside = _ratio(scale).denominator, [], []
    for span, side in zip((rows, columns), image.shape):
        first, last = ((i + 0.5) / scale - 0.5 for i in (span[0], span[-1]))
        first = max(0, int(first)) // period * period
        skipped = round(first * scale)
        source.append(slice(first, min(side, int(last) + 3)))
        inside.append(slice(span.start - skipped, span.stop - skipped))
    window = cv2.resize(image[tuple(source)], None, fx=scale, fy=scale,
                        interpolation=cv2.INTER_LINEAR_EXACT)
    return window[tuple(inside)]


def scaled_label(label, scale, rows, columns):
    """Return the same window of a label (H, W): each pixel has the value of
    the source pixel that its centre lies in."""
    if scale == 1:
        return label[rows.start:rows.stop, columns.start:columns.stop]
    y, x = (np.minimum(((np.asarray(span) + 0.5) / scale).astype(np.intp),
                       side - 1) for span, side in zip((rows, columns),
                                                       label.shape))
    return label[y][:, x]


# ------------------------------------------------- samples
class Segmentation(Dataset):
    """One split; items are (image uint8 (3, H, W), label uint8 (H, W), ID).

    train: whether items are augmented crops. data[i] is sample i as epoch 0
    has it, data[epoch, i] as that epoch does. labelled: whether there are
    labels; those of a split without any, as a test set's, are void. Raises
    for a split that is not whole (FileNotFoundError names the first missing
    file).
    """

    def __init__(self, split, train, labelled=True):
        s = settings
        self.root, self.split, self.train = s.DATA_ROOT, split, train
        self.labelled = labelled
        self.n_classes, self.ignore = s.N_CLASSES, s.IGNORE_LABEL
        self.crop, self.scales, self.seed = s.CROP_SIZE, s.SCALES, s.SEED
        self.fill = [round(255 * x) for x in s.MEAN]
        self.memory = None      # or (pixels of all items, starts, sizes)
        self.counts = None      # or the pixels of each label value
        self.ids = read_ids(self.root, split)
        folders = ('JPEGImages', 'jpg'), (LABELS, 'png')
        for folder, end in folders[:1 + labelled]:
            for i in range(len(self.ids)):
                path = self.path(i, folder, end)
                if not os.path.isfile(path):
                    raise FileNotFoundError(
                        f'{path} is not there, but {split}.txt has its id')

    def path(self, i, folder, end):
        return os.path.join(self.root, folder, f'{self.ids[i]}.{end}')

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image, label = self.read(i)                 # (H, W, 3), (H, W)
        if self.train:
            random = np.random.default_rng([self.seed, epoch, i, AUGMENT])
            image, label = self.augment(image, label, random)
        return (torch.from_numpy(image).permute(2, 0, 1),
                torch.from_numpy(label), self.ids[i])

    def read(self, i):
        """Return image i, (H, W, 3), and its label, (H, W), both uint8."""
        if self.memory:
            pixels, starts, sizes = self.memory
            both, (h, w) = pixels[starts[i]:starts[i + 1]], sizes[i]
            return (both[:3 * h * w].reshape(h, w, 3),
                    both[3 * h * w:].reshape(h, w))
        image = read_image(self.path(i, 'JPEGImages', 'jpg'))
        if not self.labelled:
            return image, np.full(image.shape[:2], 255, np.uint8)
        label = self.label(i)
        if image.shape[:2] != label.shape:
            raise self.sizes_differ(i, image.shape[:2], label.shape)
        return image, label

    def label(self, i):
        """Return label i, (H, W); BadSample names a value that is none."""
        path = self.path(i, LABELS, 'png')
        label = read_label(path)
        wrong = label[(label >= self.n_classes) & (label != self.ignore)]
        if wrong.size:
            raise BadSample(
                f'{path} has the label value {wrong.max()}; there are '
                f'0 to {self.n_classes - 1} (N_CLASSES={self.n_classes}) and '
                f'{self.ignore} for void (IGNORE_LABEL)')
        return label

    def sizes_differ(self, i, image, label):
        return BadSample(
            f'{self.path(i, "JPEGImages", "jpg")} has {image[1]} x {image[0]} '
            f'pixels, its label {label[1]} x {label[0]}; make them equal')

    def augment(self, image, label, random):
        """Return a scaled, padded, cropped, perhaps flipped (crop, crop)
        pair of image (H, W, 3) and label (H, W).

        Source: the 2019 recipe. Differs: pixels lie on the half-pixel grid,
        where the 2019 code aligned corners for the image; the padding,
        being uint8, is the mean colour to within half a grey level.
        """
        scale = self.scales[random.integers(len(self.scales))]
        scale = max(scale, 1 / min(label.shape))        # at least one pixel
        sides = [scaled_side(side, scale) for side in label.shape]
        y, x = (int(random.integers(max(0, side - self.crop) + 1))
                for side in sides)
        rows, columns = (range(start, min(side, start + self.crop))
                         for start, side in zip((y, x), sides))
        image = scaled_image(image, scale, rows, columns)
        label = scaled_label(label, scale, rows, columns)
        down, sides = self.crop - len(rows), [0, self.crop - len(columns)]
        if random.random() < 0.5:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
            sides.reverse()
        if down or any(sides):
            image = cv2.copyMakeBorder(image, 0, down, *sides,
                                       cv2.BORDER_CONSTANT, value=self.fill)
            label = cv2.copyMakeBorder(label, 0, down, *sides,
                                       cv2.BORDER_CONSTANT, value=self.ignore)
        return image, label

    def check(self, progress=iter):
        """Read every label and every picture's size; return the number of
        pixels of each label value, (256,) int64.

        progress: a bar to go through the results with. Raises BadSample for
        the first fault, ValueError where no label holds a class beside the
        background, which 0 and 255 for object would look like.
        """
        def count(i):
            label = self.label(i)
            size = image_size(self.path(i, 'JPEGImages', 'jpg'))
            if size != label.shape:
                raise self.sizes_differ(i, size, label.shape)
            return np.bincount(label.ravel(), minlength=256)
        total = np.zeros(256, np.int64)
        for counts in progress(_in_threads(count, len(self))):
            total += counts
        if not total[1:255].any() and total[255] and self.ignore == 255:
            raise ValueError(
                f'the labels of {self.split} hold 0 and 255 alone, and 255 is '
                f'void (IGNORE_LABEL): write the object as 1, or there is '
                f'nothing to learn')
        self.counts = total
        return total

    def pixels(self):
        """Return the number of pixels of each class, (n_classes,) int64;
        reads the labels unless check() has."""
        counts = self.check() if self.counts is None else self.counts
        return np.where(np.arange(256) == self.ignore, 0, counts)[
            :self.n_classes]

    def sizes(self):
        """Return [(H, W)] of all pictures, read from their headers."""
        return list(_in_threads(lambda i: image_size(
            self.path(i, 'JPEGImages', 'jpg')), len(self)))

    def keep(self, progress=iter):
        """Decode all items into memory, to be read from there. Raises
        ValueError where this machine has not enough."""
        sizes = self.sizes()
        starts = np.cumsum([0] + [4 * h * w for h, w in sizes]).tolist()
        there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        if starts[-1] > there:
            raise ValueError(f'CACHE=True: the images of {self.split} take '
                             f'{starts[-1] / 1e9:.1f} GB of memory, this '
                             f'machine has {there / 1e9:.1f}; set CACHE=False')
        pixels = np.empty(starts[-1], np.uint8)

        def fill(i):
            image, label = self.read(i)
            middle = starts[i + 1] - label.size
            pixels[starts[i]:middle] = image.ravel()
            pixels[middle:starts[i + 1]] = label.ravel()
        for _ in progress(_in_threads(fill, len(self))):
            pass
        self.memory = pixels, starts, sizes


def _in_threads(do, count):
    """Yield do(0) to do(count - 1), in turn; threads work ahead."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(do, range(count))


class Batches(Sampler):
    """The keys (epoch, sample) of what one process reads, from the step after
    `start` on: ACCUM lists a step, in turn.

    Every epoch is shuffled anew by SEED; what does not fill a batch at its
    end is dropped. A step's batch depends on the step alone; its parts, one
    after the other, are split evenly over the processes.
    """

    def __init__(self, size, start=0, rank=0, world=1):
        s = settings
        self.size, self.start, self.stop = size, start, s.ITER_MAX
        self.batch, self.accum, self.seed = s.BATCH_SIZE, s.ACCUM, s.SEED
        self.rank, self.share = rank, s.BATCH_SIZE // (s.ACCUM * world)
        self.per_epoch = size // s.BATCH_SIZE

    def __len__(self):
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != shuffled:
                shuffled = epoch
                random = np.random.default_rng([self.seed, epoch, 0, ORDER])
                order = random.permutation(self.size).tolist()
            for part in range(self.accum):
                first = (place * self.batch + self.rank * self.share
                         + part * self.batch // self.accum)
                yield [(epoch, i) for i in order[first:first + self.share]]


# ------------------------------------------------- loaders
def train_loader(data, start=0, rank=0, world=1, progress=iter):
    """Return a loader of what process `rank` of `world` reads in the steps
    start + 1 to ITER_MAX, ACCUM batches a step; progress: of CACHE."""
    if len(data) < settings.BATCH_SIZE:
        raise ValueError(f'BATCH_SIZE={settings.BATCH_SIZE}, but '
                         f'{data.split} has {len(data)} images; make the '
                         f'batch smaller')
    if settings.CACHE:
        data.keep(progress)
    return _loader(data, batch_sampler=Batches(len(data), start, rank, world))


def val_loader(data, rank=0, world=1, batch=1):
    """Return a loader of whole images, every world-th of the list, up to
    `batch` images of one size at a time."""
    mine, by_size = range(rank, len(data), world), {}
    if batch == 1:
        return _loader(data, batch_sampler=[[i] for i in mine])
    sizes = data.sizes()
    for i in mine:
        by_size.setdefault(sizes[i], []).append(i)
    return _loader(data, batch_sampler=[
        same[i:i + batch] for same in by_size.values()
        for i in range(0, len(same), batch)])


def _loader(data, **words):
    """Return a loader that leaves the global random state alone."""
    shared = (settings.CACHE and settings.NUM_WORKERS       # pages, with the
              and sys.platform == 'linux')                  # main process
    return DataLoader(data, num_workers=settings.NUM_WORKERS,
                      pin_memory=torch.cuda.is_available(),
                      worker_init_fn=_start_worker, collate_fn=_collate,
                      multiprocessing_context='fork' if shared else None,
                      generator=torch.Generator(), **words)


def _collate(samples):
    """Return (image (b, 3, H, W), label (b, H, W), IDs) of some samples;
    the image lies in memory as decoders give it and convolutions like it,
    channels last."""
    images, labels, names = zip(*samples)
    images = default_collate([image.permute(1, 2, 0) for image in images])
    return images.permute(0, 3, 1, 2), default_collate(labels), names


def keep_memory():
    """Have glibc keep the memory of freed images for the next: it does so
    for blocks up to the size of the largest that was freed, 32 MB at most.
    Asking the system for it each time costs a third of a sample's time."""
    np.empty(31 << 20, np.uint8)


def _start_worker(worker):
    cv2.setNumThreads(0)                            # workers are the threads
    keep_memory()
    for number in (signal.SIGINT, signal.SIGTERM):  # are for the main
        signal.signal(number, signal.SIG_IGN)       # process, which ends us


def to_device(loader, device):
    """Yield a loader's (image, label, IDs) on the device. To a GPU, each is
    copied while the one before is computed with."""
    if device.type != 'cuda':
        for image, label, names in loader:
            yield image.to(device), label.to(device), names
        return
    side, coming = torch.cuda.Stream(device), None
    for image, label, names in loader:
        with torch.cuda.stream(side):
            batch = (image.to(device, non_blocking=True),
                     label.to(device, non_blocking=True))
            copied = side.record_event()
        if coming:
            yield _arrived(*coming)
        coming = batch, copied, names
    if coming:
        yield _arrived(*coming)


def _arrived(batch, copied, names):
    """Return what the current stream may use once it was copied."""
    now = torch.cuda.current_stream()
    now.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(now)       # freed no earlier than it is used
    return *batch, names


def normalise(image, device):
    """Return images uint8 (b, 3, H, W) as floats (torch's default, float32)
    on the device, mean taken off and divided by std."""
    image = image.to(device, torch.get_default_dtype(), non_blocking=True)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1)
                 for x in (settings.MEAN, settings.STD))
    return (image / 255 - mean) / std


def sheet(data, colours, rows=4, epochs=3, most=256):
    """Return augmented samples beside their labels, (H', W', 3) uint8, a row
    a picture, and the classes that occur; cells of `most` pixels at most."""
    table, seen = np.array(colours, np.uint8), set()
    side = min(data.crop, most)

    def cell(x, interpolation):
        return cv2.resize(x, (side, side), interpolation=interpolation)

    def pair(epoch, i):
        image, label, _ = data[epoch, i]
        seen.update(np.unique(label).tolist())
        return np.hstack([
            cell(image.permute(1, 2, 0).numpy(), cv2.INTER_AREA),
            cell(table[label], cv2.INTER_NEAREST)])
    return np.vstack([np.hstack([pair(epoch, i) for epoch in range(epochs)])
                      for i in range(min(rows, len(data)))]), sorted(seen)


def main():
    import eval
    import utils
    settings.take(sys.argv[1:])
    data = Segmentation(settings.TRAIN_SPLIT, train=True)
    names, colours = utils.read_classes(data.root, data.n_classes)
    data.check(lambda results: utils.progress(results, total=len(data),
                                              desc='check', leave=False))
    table = utils.full_palette(colours)
    pictures, seen = sheet(data, table)
    path = os.path.join(settings.LOG_DIR, 'samples.png')
    os.makedirs(settings.LOG_DIR, exist_ok=True)
    Image.fromarray(np.vstack([pictures, eval.legend(
        pictures.shape[1], [names[i] if i < len(names) else 'void'
                            for i in seen], table[seen])])).save(path)
    counts = data.pixels()
    for name, count in zip(names, counts):
        print(f'{name:20} {100 * count / counts.sum():6.2f}%')
    print(f'{len(data)} images; samples of three epochs are in {path}')


if __name__ == '__main__':
    import utils
    utils.launch(main)
