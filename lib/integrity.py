"""Is a file of weights whole? What is checked before a file is loaded, and
what to do about one that is damaged.
"""
import glob
import hashlib
import json
import os
import re
import zipfile

import torch

DIGEST = 'tensors_sha256'       # its name in the metadata of a .safetensors
FOLDER = 0x10                   # in a record's attributes: torch then reads
#                                 none of its bytes, and memory as it was
OF_A_RUN = re.compile(r'(latest|best|final|step_\d+)\.pth')
WEIGHTS = {torch.float64, torch.float32, torch.float16, torch.bfloat16,
           torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
           torch.bool}          # the dtypes that weights and counters can have


def find_damage(path):
    """Return in words what is wrong with a file that torch.save wrote; ''
    where nothing is, or nothing can be told.

    It is a zip: the records' sizes are compared with the file's, and their
    contents with their CRC-32. Files of before torch 1.6 have no checksum.
    """
    try:
        with open(path, 'rb') as file:
            if file.read(4) != b'PK\3\4':
                return ''
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if sum(x.file_size for x in records) > os.path.getsize(path) or [
                    x for x in records if x.compress_type or
                    x.file_size != x.compress_size]:
                return ('holds compressed records, or larger ones than the '
                        'file is, and is not loaded: torch.save writes none')
            if any(x.external_attr & FOLDER for x in records) or (
                    # all are 0 where torch was told to compute none
                    any(x.CRC for x in records) and archive.testzip()):
                return 'is damaged: its checksum does not match'
    except Exception:       # a damaged header raises one of a dozen errors
        return 'is truncated or no file of weights'
    return ''


def remedy(path):
    """Return in words what to do about a damaged file: the newest step_N.pth
    beside a run's checkpoint to go back to, where one is whole."""
    folder, name = os.path.split(path)
    if not OF_A_RUN.fullmatch(name):
        return 'copy, export or fetch it again'
    steps = {int(digits): other for other in glob.glob(
        os.path.join(glob.escape(folder), 'step_*.pth')) for digits in
        re.findall(r'step_(\d+)\.pth$', other) if other != path}
    none = 'no step_N.pth that is whole is beside it'
    whole = next((other for _, other in sorted(steps.items(), reverse=True)
                  if not find_damage(other)), None)
    if name == 'latest.pth':
        return (f'copy {whole} over {path}' if whole else
                f'{none}; move it away to start anew')
    return f'name {whole} instead' if whole else f'{none}; train anew'


def digest(net, texts):
    """Return the sha256 of tensors {name: tensor} and of the metadata {name:
    text} beside them, but for DIGEST itself."""
    others = sorted(item for item in texts.items() if item[0] != DIGEST)
    total = hashlib.sha256(json.dumps(others).encode())
    for key, value in sorted(net.items()):
        total.update(f'{key} {value.dtype} {tuple(value.shape)}'.encode())
        total.update(value.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def is_weights(state):
    """Tell whether a value is a dict of tensors by name, as state_dict()
    returns it: dense ones, of numbers that can be copied into a network."""
    return isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor)
        and value.layout == torch.strided and value.dtype in WEIGHTS
        and not value.is_meta and not value.is_nested
        for key, value in state.items())
