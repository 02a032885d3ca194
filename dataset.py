"""Reads a data set in the VOC layout: samples, augmentation, loaders.

    python dataset.py [KEY=VALUE ...]

Writes augmented training samples beside their labels, LOG_DIR/samples.png, and
prints each class's share of the pixels. The layout of DATA_ROOT:

    JPEGImages/ID.jpg, SegmentationClassAug/ID.png (class indices),
    ImageSets/Segmentation/SPLIT.txt, classes.txt (name r g b, a line each)

Images and labels stay uint8 until they are on the device. A sample depends on
SEED, the epoch and its index alone, so neither the number of workers nor a
resume changes it. Of a scaled image only the window that the crop shows is
computed, bit for bit as in the whole.
"""
import functools
import os
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import settings
import utils
from lib import images
from lib.backbones import complete_settings
from lib.distributed import (
    count_workers,
    inherit_socket_folder,
    share_socket_folder,
)
from lib.scaling import scaled_image, scaled_label, scaled_side
from lib.visualize import draw_augmented
from utils import UserError

LISTS = os.path.join('ImageSets', 'Segmentation')
LABELS = 'SegmentationClassAug'
ORDER, AUGMENT = 1, 2        # what a random generator is for


# ------------------------------------------------- lists
def read_ids(root, split):
    """Return the ids of a split, in the list's order.

    Where trainaug has no list (the official VOC tree with SegmentationClassAug
    put beside it) it is every label but those of val. Raises UserError, also
    for an id that would lead out of the folders of images and labels.
    """
    if not os.path.isdir(root):
        raise UserError(f'DATA_ROOT={root}: no such folder; make the data '
                        f'set with prepare.py, or set DATA_ROOT')
    folder = os.path.join(root, LISTS)
    path = os.path.join(folder, f'{split}.txt')
    if os.path.exists(path):
        ids = images.read_ids(path)
    elif split == 'trainaug' and os.path.isdir(os.path.join(root, LABELS)):
        val = set(read_ids(root, 'val'))
        ids = sorted(name[:-4] for name in os.listdir(
            os.path.join(root, LABELS)) if name.endswith('.png'))
        ids = images.check_ids([name for name in ids if name not in val],
                               os.path.join(root, LABELS))
    else:
        found = sorted(name[:-4] for name in os.listdir(folder)
                       if name.endswith('.txt')) if os.path.isdir(
                           folder) else []
        raise UserError(f'{path} is not there; the splits of this data set '
                        f'are: {", ".join(found) or "none"}')
    if not ids:
        raise UserError(f'{path} is empty: a split needs at least one id')
    twice, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f'{path} has {twice} twice; remove one')
    return ids


# ------------------------------------------------- samples
def jitter_colours(image, strength, random):
    """Return an image (H, W, 3) uint8 whose brightness, contrast, saturation
    and hue are changed at random, in this order.

    strength: factors are drawn from 1 -+ strength, the shift of the hue from
        -+ strength / 4, of a turn of 1.
    """
    bright, contrast, saturation = random.uniform(1 - strength, 1 + strength,
                                                  3)
    shift = round(180 * random.uniform(-strength, strength) / 4)
    image = cv2.convertScaleAbs(image, alpha=bright)
    mean = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()
    image = cv2.addWeighted(image, contrast, image, 0, (1 - contrast) * mean)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
                        cv2.COLOR_GRAY2RGB)
    image = cv2.addWeighted(image, saturation, grey, 1 - saturation, 0)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)        # its hue is 0..179
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + shift) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class Segmentation(Dataset):
    """One split; items are (image uint8 (3, H, W), label uint8 (H, W), ID).

    data[i] is sample i of epoch 0, data[epoch, i] of that epoch.

    Args:
        split: the name of a list in ImageSets/Segmentation.
        train: items are augmented crops.
        labelled: there are labels; those of a split without any, as a test
            set's, are void.
    Raises: UserError that names the first missing file.
    """

    def __init__(self, split, train, labelled=True):
        s = settings
        self.root, self.split, self.train = s.DATA_ROOT, split, train
        self.labelled = labelled
        self.n_classes, self.ignore = s.N_CLASSES, s.IGNORE_LABEL
        self.crop, self.scales, self.seed = s.CROP_SIZE, s.SCALES, s.SEED
        self.fill = [round(255 * x) for x in s.MEAN]
        self.jitter = s.COLOR_JITTER
        self.memory = None      # or (pixels of all items, starts, sizes)
        self.counts = None      # or the pixels of each label value
        self.ids = read_ids(self.root, split)
        folders = ('JPEGImages', 'jpg'), (LABELS, 'png')
        for folder, extension in folders[:1 + labelled]:
            for i in range(len(self.ids)):
                path = self.path(i, folder, extension)
                if not os.path.isfile(path):
                    raise UserError(f'{path} is not there, but {split}.txt '
                                    f'has its id')

    def path(self, i, folder, extension):
        return os.path.join(self.root, folder, f'{self.ids[i]}.{extension}')

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
        image = images.read_image(self.path(i, 'JPEGImages', 'jpg'))
        if not self.labelled:
            return image, np.full(image.shape[:2], self.ignore, np.uint8)
        label = self.label(i)
        if image.shape[:2] != label.shape:
            raise self._sizes_differ(i, image.shape[:2], label.shape)
        return image, label

    def label(self, i):
        """Return label i, (H, W); UserError names a value that is none."""
        path = self.path(i, LABELS, 'png')
        label = images.read_label(path)
        wrong = label[(label >= self.n_classes) & (label != self.ignore)]
        if wrong.size:
            raise UserError(
                f'{path} has the label value {wrong.max()}; there are '
                f'0 to {self.n_classes - 1} (N_CLASSES={self.n_classes}) and '
                f'{self.ignore} for void (IGNORE_LABEL)')
        return label

    def _sizes_differ(self, i, image, label):
        return UserError(
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
        if self.jitter:
            image = jitter_colours(image, self.jitter, random)
        if down or any(sides):
            image = cv2.copyMakeBorder(image, 0, down, *sides,
                                       cv2.BORDER_CONSTANT, value=self.fill)
            label = cv2.copyMakeBorder(label, 0, down, *sides,
                                       cv2.BORDER_CONSTANT, value=self.ignore)
        return image, label

    def scan_labels(self, progress=iter):
        """Read every label and every image's size; return the number of
        pixels of each label value, (256,) int64.

        progress: a bar to iterate with. Raises UserError for the first fault,
        and where the labels to train on hold one class alone, as masks of 0
        and 255 do.
        """
        def count(i):
            label = self.label(i)
            size = images.image_size(self.path(i, 'JPEGImages', 'jpg'))
            if size != label.shape:
                raise self._sizes_differ(i, size, label.shape)
            return np.bincount(label.ravel(), minlength=256)
        total = np.zeros(256, np.int64)
        for counts in progress(_in_threads(count, len(self))):
            total += counts
        self.counts = total
        found = np.flatnonzero(self.class_pixels()).tolist()
        is_white = total[255] and self.ignore == 255 and found in ([], [0])
        if is_white or self.train and len(found) < 2:
            raise UserError(
                f'the labels of {self.split} hold '
                f'{"class " + str(found[0]) if found else "void"} alone: '
                f'there is nothing to learn. ' + (
                    'The others are 255, void (IGNORE_LABEL): if 255 is the '
                    'object, write it as 1' if is_white else
                    'Look at how they were made'))
        return total

    def class_pixels(self):
        """Return the number of pixels of each class, (n_classes,) int64;
        reads the labels unless scan_labels() has."""
        counts = self.scan_labels() if self.counts is None else self.counts
        return np.where(np.arange(256) == self.ignore, 0, counts)[
            :self.n_classes]

    def image_sizes(self):
        """Return [(H, W)] of all images, read from their headers."""
        return list(_in_threads(lambda i: images.image_size(
            self.path(i, 'JPEGImages', 'jpg')), len(self)))

    def cache_in_memory(self, progress=iter):
        """Decode all items into memory, to be read from there. Raises
        UserError where this machine has not enough."""
        sizes = self.image_sizes()
        starts = np.cumsum([0] + [4 * h * w for h, w in sizes]).tolist()
        there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        if starts[-1] > there:
            raise UserError(f'CACHE=True: the images of {self.split} take '
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


class BatchSampler(Sampler):
    """Lists of the keys (epoch, index) that one process reads, from the step
    after `start` on: ACCUM lists a step.

    Every epoch is shuffled anew by SEED; an incomplete batch at its end is
    dropped. A step's batch depends on the step alone; its parts, one after
    the other, are split evenly over the processes.

    Args:
        size: the number of samples.
        start: the step of the checkpoint that is resumed.
        rank, world: this process, and how many there are.
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
    start + 1 to ITER_MAX, ACCUM batches a step; progress: of CACHE.
    """
    if settings.CACHE:
        data.cache_in_memory(progress)
    return _loader(data, BatchSampler(len(data), start, rank, world))


def val_loader(data, rank=0, world=1, sizes=None, batch_size=None):
    """Return a loader of whole images, every world-th of the list, in its
    order, one at a time.

    Args:
        sizes: [(H, W)] of what may be in a batch together.
        batch_size: with sizes, how many images of a size are.
    """
    mine, by_size = range(rank, len(data), world), {}
    if not sizes:
        return _loader(data, [[i] for i in mine])
    for i in mine:
        by_size.setdefault(sizes[i], []).append(i)
    return _loader(data, [same[i:i + batch_size(size)]
                          for size, same in by_size.items()
                          for i in range(0, len(same), batch_size(size))])


def _loader(data, batch_sampler):
    """Return a loader that leaves the global random state alone."""
    workers = count_workers()
    if workers:
        share_socket_folder()
    shares_cache = (settings.CACHE and workers          # its pages,
                    and sys.platform == 'linux')        # by a fork
    return DataLoader(data, batch_sampler=batch_sampler,
                      num_workers=workers,
                      pin_memory=torch.cuda.is_initialized(),
                      worker_init_fn=_start_worker, collate_fn=_collate,
                      multiprocessing_context='fork' if shares_cache else None,
                      generator=torch.Generator())


def _collate(samples):
    """Return (image (b, 3, H, W), label (b, H, W), IDs) of samples, padded to
    one size, labels by void; the image lies in memory as decoders return it,
    channels last."""
    image, label, names = zip(*samples)
    image = [each.permute(1, 2, 0) for each in image]
    if len({each.shape for each in label}) > 1:
        height, width = (max(sides) for sides in zip(*(
            each.shape for each in label)))
        sides = [(0, width - each.shape[1], 0, height - each.shape[0])
                 for each in label]
        image = [F.pad(each, (0, 0, *pad)) for each, pad in zip(image, sides)]
        label = [F.pad(each, pad, value=settings.IGNORE_LABEL)
                 for each, pad in zip(label, sides)]
    image = default_collate(image)
    return image.permute(0, 3, 1, 2), default_collate(label), names


def retain_freed_memory():
    """Have glibc reuse the memory of freed images: it does so for blocks up to
    the size of the largest that was freed, 32 MB at most. Asking the system
    for it each time costs a third of a sample's time."""
    np.empty(31 << 20, np.uint8)


def _start_worker(worker):
    cv2.setNumThreads(0)                            # workers are the threads
    retain_freed_memory()
    inherit_socket_folder()
    for number in (signal.SIGINT, signal.SIGTERM):  # are for the main
        signal.signal(number, signal.SIG_IGN)       # process, which ends us


def to_device(loader, device):
    """Yield a loader's (image, label, IDs) on the device; copies of pinned
    memory to a GPU do not wait."""
    is_gpu = device.type == 'cuda'
    for image, label, names in loader:
        yield (image.to(device, non_blocking=is_gpu),
               label.to(device, non_blocking=is_gpu), names)


@functools.cache                        # a copy to a GPU waits for it
def _to_device(values, device, dtype):
    """Return the values of three channels as a tensor (3, 1, 1)."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def normalise(image, device):
    """Return images uint8 (b, 3, H, W) as floats (torch's default, float32)
    on the device, mean taken off and divided by std."""
    dtype = torch.get_default_dtype()
    mean, std = (_to_device(tuple(x), device, dtype)
                 for x in (settings.MEAN, settings.STD))
    return (image.to(device, dtype) / 255 - mean) / std


# ------------------------------------------------- a look at it
def main():
    parser = utils.make_parser(__doc__, settings.describe())
    settings.override_all(parser.parse_known_args()[1])
    settings.validate()
    complete_settings()
    data = Segmentation(settings.TRAIN_SPLIT, train=True)
    names, colours = images.read_classes(data.root, data.n_classes)
    data.scan_labels(lambda results: utils.progress(
        results, total=len(data), desc='check', leave=False))
    rows = [[data[epoch, i] for epoch in range(3)]
            for i in range(min(4, len(data)))]
    path = os.path.join(settings.LOG_DIR, 'samples.png')
    with images.writing(path):
        images.save_image(draw_augmented(rows, names, colours), path)
    counts = data.class_pixels()
    width = max(20, *map(len, names))
    print(f'{"class":{width}} pixels, %')
    for name, count in zip(names, counts):
        print(f'{name:{width}} {100 * count / counts.sum():9.2f}')
    print(f'{utils.plural(len(data), "image")}; samples of three epochs are '
          f'in {path}')


if __name__ == '__main__':
    utils.run_main(main)
