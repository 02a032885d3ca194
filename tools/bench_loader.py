"""The area `loader` of tools.bench: augmented samples in our way and in
others, beside mere decoding; and the generated photographs that it reads."""
import os

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

import dataset
import settings
from lib.images import read_image, read_label, save_label, voc_palette
from tools.measure import Stopwatch


# ------------------------------------------------- photographs
def write_photographs(root, count=16, side=500):
    """Write generated photographs, of VOC's sizes and about its bytes, with
    labels, and the list val of them; side: the longer one, pixels."""
    for folder in ('JPEGImages', dataset.LABELS, dataset.LISTS):
        os.makedirs(os.path.join(root, folder))
    rng, ids = np.random.default_rng(0), [f'photo_{i:04}'
                                          for i in range(count)]
    for i, name in enumerate(ids):
        size = ((375, 500), (375, 500), (500, 375), (333, 500))[i % 4]
        image, label = generate_photograph(rng, *(
            x * side // 500 for x in size))
        cv2.imwrite(f'{root}/JPEGImages/{name}.jpg', image,
                    [cv2.IMWRITE_JPEG_QUALITY, 92])
        save_label(label, f'{root}/{dataset.LABELS}/{name}.png',
                   voc_palette())
    with open(f'{root}/{dataset.LISTS}/val.txt', 'w') as file:
        file.write('\n'.join(ids))


def generate_photograph(rng, h, w):
    """Return noise of all sizes (h, w, 3) and regions of classes (h, w)."""
    image = sum(cv2.resize(rng.normal(0, side ** -0.54, (
        h * side // 500 + 1, w * side // 500 + 1, 3)), (w, h))
        for side in (4, 16, 64, 250, 500))
    fields = [cv2.resize(rng.normal(size=(6, 8)), (w, h),
                         interpolation=cv2.INTER_CUBIC) for _ in range(5)]
    label = rng.integers(1, 21, 5).astype(np.uint8)
    label[:2] = 0
    label = label[np.argmax(fields, 0)]
    label[cv2.morphologyEx(label, cv2.MORPH_GRADIENT,
                           np.ones((5, 5))) > 0] = 255
    return (128 + 160 * image).clip(0, 255).astype(np.uint8), label


# ------------------------------------------------- loader
class WholeImage(dataset.Segmentation):
    """The plain path: the whole image is scaled and padded, then cropped."""

    def augment(self, image, label, random):
        scale = self.scales[random.integers(len(self.scales))]
        image = cv2.resize(image, None, fx=scale, fy=scale)
        label = cv2.resize(label, image.shape[1::-1],
                           interpolation=cv2.INTER_NEAREST_EXACT)
        h, w = (max(0, self.crop - side) for side in label.shape)
        image = cv2.copyMakeBorder(image, 0, h, 0, w, cv2.BORDER_CONSTANT,
                                   value=self.fill)
        label = cv2.copyMakeBorder(label, 0, h, 0, w, cv2.BORDER_CONSTANT,
                                   value=self.ignore)
        y, x = self.draw_corner(random, label.shape)
        here = np.s_[y:y + self.crop, x:x + self.crop]
        turn = 1 if random.random() < 0.5 else -1
        return (np.ascontiguousarray(image[here][:, ::turn]),
                np.ascontiguousarray(label[here][:, ::turn]))

    def draw_scale(self, key):
        """Return (index, random generator, scale) of a sample."""
        epoch, i = key
        random = np.random.default_rng([self.seed, epoch, i, dataset.AUGMENT])
        return i, random, self.scales[random.integers(len(self.scales))]

    def draw_corner(self, random, size):
        """Return the crop's upper left corner in an image of a size."""
        return (int(random.integers(side - self.crop + 1)) for side in size)


class Torchvision(WholeImage):
    """The same by torchvision's v2 transforms, on uint8."""

    def __getitem__(self, key):
        i, random, scale = self.draw_scale(key)
        image = torchvision.io.read_image(self.path(i, 'JPEGImages', 'jpg'))
        label = torch.from_numpy(self.label(i))[None]
        size = [round(side * scale) for side in label.shape[1:]]
        image = v2.functional.resize(image, size, antialias=False)
        label = v2.functional.resize(
            label, size, v2.InterpolationMode.NEAREST_EXACT)
        pad = [0, 0, *(max(0, self.crop - side) for side in size[::-1])]
        image = v2.functional.pad(image, pad, self.fill)
        label = v2.functional.pad(label, pad, [self.ignore])
        y, x = self.draw_corner(random, label.shape[1:])
        both = [v2.functional.crop(part, y, x, self.crop, self.crop)
                for part in (image, label)]
        if random.random() < 0.5:
            both = [v2.functional.horizontal_flip(part) for part in both]
        return both[0].contiguous(), both[1][0].contiguous(), self.ids[i]


class Pillow(WholeImage):
    """The same as the 2019 code had it: Pillow, then float tensors."""

    def __getitem__(self, key):
        i, random, scale = self.draw_scale(key)
        with Image.open(self.path(i, 'JPEGImages', 'jpg')) as image:
            image = np.array(image.convert('RGB'))
        image = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1)
                     for x in (settings.MEAN, settings.STD))
        image, label = (image - mean) / std, torch.from_numpy(self.label(i))
        size = [round(side * scale) for side in label.shape]
        image = F.interpolate(image[None], size, mode='bilinear',
                              align_corners=True)
        label = F.interpolate(label[None, None].float(), size)
        h, w = (max(0, self.crop - side) for side in size)
        image = F.pad(image, (0, w, 0, h))[0]
        label = F.pad(label, (0, w, 0, h), value=255)[0, 0]
        y, x = self.draw_corner(random, label.shape)
        here = np.s_[..., y:y + self.crop, x:x + self.crop]
        image, label = image[here], label[here]
        if random.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        return image, label.long(), self.ids[i]


LOADERS = {'the 2019 way: Pillow, float tensors': Pillow,
           'plain: OpenCV, the whole image scaled': WholeImage,
           'torchvision v2, uint8': Torchvision,
           'ours: the window of the crop': dataset.Segmentation}


def loader(watch):
    """One augmented sample on one core; loaders of two processes."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    race_samples(watch)
    vars(settings).update(BATCH_SIZE=8, NUM_WORKERS=2, ITER_MAX=24)

    def read_epochs(kind):
        data = kind(settings.VAL_SPLIT, True)
        data.ids = (data.ids * 8)[:64]
        for _ in dataset.train_loader(data):
            pass
    Stopwatch(watch.device, min(watch.rounds, 3)).race(
        'loader: a sample through two processes, their start included',
        {name: lambda kind=kind: read_epochs(kind)
         for name, kind in LOADERS.items()}, per=192)
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def race_samples(watch):
    """Time one sample, in every way and beside mere decoding."""
    data = dataset.Segmentation(settings.VAL_SPLIT, True)
    crop = np.zeros((settings.CROP_SIZE, settings.CROP_SIZE, 4), np.uint8)
    epochs = iter(range(10 ** 9))

    def decode(labels):
        for i in range(len(data)):
            read_image(data.path(i, 'JPEGImages', 'jpg'))
            if labels:
                read_label(data.path(i, dataset.LABELS, 'png'))
            crop.copy()

    def read_samples(data):
        epoch = next(epochs)
        for i in range(len(data)):
            data[epoch, i]
    sets = {name: kind(settings.VAL_SPLIT, True)
            for name, kind in LOADERS.items()}
    watch.race(f'loader: one sample, crop {settings.CROP_SIZE}, one core', {
        'limit: decode JPEG and PNG, one copy': lambda: decode(True),
        'limit: decode JPEG, one copy': lambda: decode(False),
        **{name: lambda each=each: read_samples(each)
           for name, each in sets.items()}}, per=len(data))
