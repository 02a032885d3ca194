"""Exports a network to ONNX, or its weights to safetensors.

    python -m tools.export FILE.onnx [IMAGE...] [CHECKPOINT] [KEY=VALUE ...]
    python -m tools.export FILE.safetensors [CHECKPOINT] [KEY=VALUE ...]

CHECKPOINT is models/final.pth if not named. The ONNX file is checked against
PyTorch on the images, at the first of EVAL_SCALES, or on two generated ones.
Class names, colours, mean, std, the settings of the network and its data, step
and commit travel in the file's metadata, as JSON; beside them in safetensors a
sha256, which is checked whenever the file is read here.

Shapes: b images, n classes, H x W pixels.
"""
import argparse
import os
import sys
import tempfile

import cv2
import numpy as np
import torch
from torch.onnx.errors import OnnxExporterError

import dataset
import eval
import heads
import settings
import utils
from lib.backbones import describe_setting, grid_extra
from lib.checkpoint import OnnxNetwork, encode_metadata, find_checkpoint
from lib.images import read_any_image, writing
from lib.integrity import DIGEST, digest
from predict import check_folder, split_files
from utils import RunError, UserError, first_line, log

FORMATS = ('.onnx', '.safetensors')
MIN_AGREEMENT = 0.999        # share of pixels that an ONNX file has to get
#                              the class that PyTorch gives them


class PaddedNetwork(torch.nn.Module):
    """A network that pads its image (b, 3, H, W) by itself, and so takes any
    size."""

    def __init__(self, net):
        super().__init__()
        self.net, self.extra = net, grid_extra()

    def forward(self, image):
        return eval.predict_logits(self.net, image, self.extra)


def write_safetensors(net, metadata, path):
    """Write a network's weights with texts {name: JSON}, and a digest of
    both."""
    state = {key: value.contiguous()
             for key, value in net.state_dict().items()}
    write_bytes(utils.import_optional('safetensors.torch').save(
        state, {**metadata, DIGEST: digest(state, metadata)}), path)
    log(f'{path}: the weights, and {", ".join(metadata)}')


@torch.no_grad()
def write_onnx(net, metadata, path, images):
    """Write a network with texts {name: JSON}: image (b, 3, H, W) float32,
    normalised, of any size, to logits (b, n, H, W).

    Raises RunError, and writes nothing, unless onnxruntime finds in images
    [(H, W, 3) uint8] what PyTorch does.
    """
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        utils.import_optional(module)
    log(f'{path}: the network is traced, which takes up to a minute, '
        f'for window attention several')
    try:
        program = torch.onnx.export(
            PaddedNetwork(net).eval(), (torch.zeros(2, 3, 70, 90),),
            dynamo=True, verbose=False, input_names=['image'],
            output_names=['logits'],
            dynamic_shapes={'image': {0: 'batch', 2: 'height', 3: 'width'}})
    except OnnxExporterError as error:
        cause = first_line(error.__cause__ or error)
        raise RunError(f'{path}: {describe_setting()} cannot be exported for '
                       f'images of any size ({cause[:200]})') from None
    program.model.metadata_props.update(metadata)
    with tempfile.TemporaryDirectory() as folder:
        part = os.path.join(folder, 'net.onnx')
        with writing(part):
            program.save(part, external_data=False)
        try:
            share, difference = compare(net, OnnxNetwork(part), images)
        except UserError:
            raise RunError(f'{path} is not written: onnxruntime cannot run '
                           f'what {describe_setting()} becomes for images of '
                           f'any size') from None
        if share < MIN_AGREEMENT:
            raise RunError(f'{path} is not written: onnxruntime agrees with '
                           f'PyTorch on only {share:.2%} of the pixels')
        with open(part, 'rb') as file:
            write_bytes(file.read(), path)
    log(f'{path}: onnxruntime gives {share:.3%} of the pixels of '
        f'{utils.plural(len(images), "image")} the class that PyTorch gives '
        f'them; logits differ by at most {difference:.1g}')


def write_bytes(data, path):
    """Write a file, whole or not at all, and the folder that it is in."""
    with (writing(path), utils.atomic_write(path) as part,
          open(part, 'wb') as file):
        file.write(data)


def compare(net, other, images):
    """Return (share of pixels with the same class, greatest difference of
    logits) of two networks on images [(H, W, 3) uint8]."""
    same = count = difference = 0
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
        x = eval.resize(dataset.normalise(x, 'cpu'), eval.scaled_size(
            image.shape[:2], settings.EVAL_SCALES[0]))
        a, b = eval.predict_logits(net, x), other(x)        # (1, n, H, W)
        same += int((a.argmax(1) == b.argmax(1)).sum())
        count += a[0, 0].numel()
        difference = max(difference, float((a - b).abs().max()))
    return same / count, difference


def generate_images():
    """Return images to check an export with: soft blobs of two sizes."""
    random = np.random.default_rng(0)
    return [cv2.resize(random.integers(0, 256, (8, 8, 3), np.uint8), size,
                       interpolation=cv2.INTER_CUBIC)
            for size in ((150, 101), (64, 97))]


def export(path, weights, files):
    """Export a checkpoint to a path; files: images to check it with."""
    images = [read_any_image(file) for file in files] or generate_images()
    net, checkpoint = heads.load_network(weights, torch.device('cpu'))
    metadata = encode_metadata(checkpoint)
    if path.endswith('.onnx'):
        write_onnx(net, metadata, path, images)
    else:
        write_safetensors(net, metadata, path)


def check_arguments(path, weights, files):
    """Raise UserError for what cannot be exported as it was asked."""
    if not path.endswith(FORMATS):
        raise UserError(f'{path}: name a file that ends in '
                        f'{" or ".join(FORMATS)}')
    if weights.endswith('.onnx'):
        raise UserError(f'{weights} is exported already; name a .pth')
    if path.endswith('.safetensors') and files:
        raise UserError(f'{files[0]}: weights alone are exported, and '
                        f'nothing is checked on images')
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; name a file in it')
    check_folder(os.path.dirname(path), path)
    inference = settings.given().get('INFERENCE', 'plain')
    if inference != 'plain':        # the default, 'folded', is for eval.py
        raise UserError(f'INFERENCE={inference}: the network is exported as '
                        f'it is; INFERENCE=plain')


def main():
    parser = utils.make_parser(__doc__, settings.describe())
    parser.add_argument('path', metavar='FILE', help=argparse.SUPPRESS)
    parser.add_argument('files', nargs='*', metavar='IMAGE',
                        help=argparse.SUPPRESS)
    args = parser.parse_args(settings.override(sys.argv[1:]))
    files, weights = split_files(args.files)
    weights = find_checkpoint(weights)
    check_arguments(args.path, weights, files)
    export(args.path, weights, files)


if __name__ == '__main__':
    utils.run_main(main)
