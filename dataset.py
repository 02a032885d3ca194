"""Reads a set in the VOC layout: samples, augmentation, loaders.

    DATA_ROOT/JPEGImages/ID.jpg, SegmentationClassAug/ID.png (class indices),
    ImageSets/Segmentation/SPLIT.txt, classes.txt (name r g b, a line each)

Images and labels stay uint8 until they are on the device. What a sample looks
like depends on SEED, the epoch and the sample alone, so neither the number of
workers nor a resume changes it. `python dataset.py [KEY=VALUE ...]` draws
augmented samples beside their labels.
"""
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

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
                return np.asarray(image.convert('RGB'))
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


# ------------------------------------------------- samples
class Segmentation(Dataset):
    """One split; items are (image uint8 (3, H, W), label uint8 (H, W), ID).

    train: whether items are augmented crops. data[i] is sample i as epoch 0
    has it, data[epoch, i] as that epoch does. Raises for a split that is not
    whole (FileNotFoundError names the first missing file).
    """

    def __init__(self, split, train):
        s = settings
        self.root, self.split, self.train = s.DATA_ROOT, split, train
        self.n_classes, self.ignore = s.N_CLASSES, s.IGNORE_LABEL
        self.crop, self.scales, self.seed = s.CROP_SIZE, s.SCALES, s.SEED
        self.fill = [round(255 * x) for x in s.MEAN]
        self.ids = read_ids(self.root, split)
        for folder, end in (('JPEGImages', 'jpg'), (LABELS, 'png')):
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
        image = read_image(self.path(i, 'JPEGImages', 'jpg'))   # (H, W, 3)
        label = self.label(i)                                   # (H, W)
        if image.shape[:2] != label.shape:
            raise self.sizes_differ(i, image.shape[:2], label.shape)
        if self.train:
            random = np.random.default_rng([self.seed, epoch, i, AUGMENT])
            image, label = self.augment(image, label, random)
        image = np.ascontiguousarray(image.transpose(2, 0, 1))  # (3, H, W)
        return (torch.from_numpy(image),
                torch.from_numpy(np.ascontiguousarray(label)), self.ids[i])

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

        Source: the 2019 recipe. Differs: pixels lie on OpenCV's half-pixel
        grid, where the 2019 code aligned corners for the image; the padding,
        being uint8, is the mean colour to within half a grey level.
        """
        scale = self.scales[random.integers(len(self.scales))]
        if scale != 1:
            size = [max(1, round(side * scale)) for side in label.shape[::-1]]
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            label = cv2.resize(label, size,
                               interpolation=cv2.INTER_NEAREST_EXACT)
        down = max(self.crop - image.shape[0], 0)
        right = max(self.crop - image.shape[1], 0)
        if down or right:
            image = cv2.copyMakeBorder(image, 0, down, 0, right,
                                       cv2.BORDER_CONSTANT, value=self.fill)
            label = cv2.copyMakeBorder(label, 0, down, 0, right,
                                       cv2.BORDER_CONSTANT, value=self.ignore)
        y, x = (random.integers(size - self.crop + 1) for size in label.shape)
        window = np.s_[y:y + self.crop, x:x + self.crop]
        image, label = image[window], label[window]
        if random.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
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
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for counts in progress(pool.map(count, range(len(self)))):
                total += counts
        if not total[1:255].any() and total[255] and self.ignore == 255:
            raise ValueError(
                f'the labels of {self.split} hold 0 and 255 alone, and 255 is '
                f'void (IGNORE_LABEL): write the object as 1, or there is '
                f'nothing to learn')
        return total


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
def train_loader(data, start=0, rank=0, world=1):
    """Return a loader of what process `rank` of `world` reads in the steps
    start + 1 to ITER_MAX, ACCUM batches a step."""
    if len(data) < settings.BATCH_SIZE:
        raise ValueError(f'BATCH_SIZE={settings.BATCH_SIZE}, but '
                         f'{data.split} has {len(data)} images; make the '
                         f'batch smaller')
    return _loader(data, batch_sampler=Batches(len(data), start, rank, world))


def val_loader(data, rank=0, world=1):
    """Return a loader of single whole images: every world-th of the list."""
    return _loader(data, batch_size=1, sampler=range(rank, len(data), world))


def _loader(data, **words):
    """Return a loader that leaves the global random state alone."""
    return DataLoader(data, num_workers=settings.NUM_WORKERS,
                      pin_memory=torch.cuda.is_available(),
                      worker_init_fn=_start_worker,
                      generator=torch.Generator(), **words)


def _start_worker(worker):
    cv2.setNumThreads(0)                            # workers are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the main
    signal.signal(signal.SIGTERM, signal.SIG_DFL)   # process, SIGTERM for us


def normalise(image, device):
    """Return images uint8 (b, 3, H, W) as floats (torch's default, float32)
    on the device, mean taken off and divided by std."""
    image = image.to(device, torch.get_default_dtype(), non_blocking=True)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1)
                 for x in (settings.MEAN, settings.STD))
    return (image / 255 - mean) / std


def main():
    import utils
    settings.take(sys.argv[1:])
    data = Segmentation(settings.TRAIN_SPLIT, train=True)
    names, colours = utils.read_classes(data.root, data.n_classes)
    counts = data.check()
    table = utils.full_palette(colours)
    rows = [np.hstack([np.hstack([image.permute(1, 2, 0), table[label]])
                       for image, label, _ in (data[epoch, i]
                                               for epoch in range(3))])
            for i in range(min(4, len(data)))]
    path = os.path.join(settings.LOG_DIR, 'samples.png')
    os.makedirs(settings.LOG_DIR, exist_ok=True)
    Image.fromarray(np.vstack(rows)).save(path)
    for name, count in zip(names, counts):
        print(f'{name:20} {100 * count / counts[:data.n_classes].sum():6.2f}%')
    print(f'{len(data)} images; samples of three epochs are in {path}')


if __name__ == '__main__':
    import utils
    utils.launch(main)
