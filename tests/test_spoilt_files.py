"""Are spoilt checkpoints, exported files and images refused in one line, or
read as they were, and never anything in between?

    python -m pytest tests/test_spoilt_files.py

Bits are flipped in small files, one by one, at places of a fixed seed.
"""
import json
import random
import struct
import warnings
import zipfile
import zlib

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import eval
import heads
import settings
from conftest import SMALL, refused
from files import expect_error, jpeg
from lib import checkpoint, images, pretrained
from tools import export
from utils import UserError

STATE = {'net': {'a': torch.arange(12.).view(3, 4), 'b': torch.ones(2)},
         'step': 3, 'settings': {'N_LAYERS': 18}}


def flip(data, bit):
    """Return bytes with one bit flipped."""
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def flips(data, count):
    """Yield copies of bytes with one bit flipped, or 16 bytes zeroed."""
    places = random.Random(0)
    for bit in places.sample(range(8 * len(data)), count):
        yield flip(data, bit)
    for at in places.sample(range(len(data) - 16), count // 4):
        yield data[:at] + bytes(16) + data[at + 16:]


def kind(value):
    """Return a test's name for a value that cannot always be printed."""
    is_name = isinstance(value, str) and value.isidentifier()
    return value if is_name else type(value).__name__


def count_refused(path, read, spoilt, expected):
    """Write each of some spoilt bytes to a path and read it; return how many
    were refused. Fails where other values are read, or more is said."""
    count = 0
    for data in spoilt:
        path.write_bytes(data)
        try:
            assert repr(read(str(path))) == repr(expected)
        except UserError as error:
            assert str(error).startswith(f'{path} ')
            assert '\n' not in str(error)
            count += 1
    return count


# ------------------------------------------------- .pth
def test_a_flipped_bit_of_a_checkpoint_is_never_loaded(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({**STATE, 'c': torch.ones(1000)}, path)
    data, expected = path.read_bytes(), checkpoint.load(path)
    assert count_refused(path, checkpoint.load, flips(data, 30),
                         expected) > 20
    at = data.index(struct.pack('f', 7.))       # of the tensor a
    path.write_bytes(flip(data, 8 * at))
    expect_error(lambda: checkpoint.load(path),
                 f'{path} is damaged: its checksum does not match; ')


def test_a_bit_that_hides_a_record_is_refused(tmp_path):
    """torch would read memory as it was: the record seems to be a folder."""
    path = tmp_path / 'x.pth'
    torch.save(STATE, path)
    data = path.read_bytes()
    at = data.rindex(b'x/data/0') - 46 + 38     # external attributes
    path.write_bytes(flip(data, 8 * at + 4))
    expect_error(lambda: checkpoint.load(path), f'{path} is damaged: ')


def test_files_without_checksums_load_as_before(tmp_path):
    paths = tmp_path / 'old.pth', tmp_path / 'without.pth'
    torch.save(STATE, paths[0], _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(STATE, paths[1])
    torch.serialization.set_crc32_options(True)
    for path in paths:
        assert repr(checkpoint.load(path)) == repr(STATE)


@pytest.mark.parametrize('kind', ['deflated', 'large'])
def test_records_that_would_fill_the_memory_are_not_read(kind, tmp_path,
                                                         monkeypatch):
    """A zip of zeros; a directory that promises a gigabyte."""
    path, again = tmp_path / 'x.pth', tmp_path / 'again.pth'
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, 'w') as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED * (
                kind == 'deflated'))
    assert repr(torch.load(again, weights_only=True)) == repr(STATE)
    if kind == 'large':
        data = bytearray(again.read_bytes())
        at = data.rindex(b'x/data/0') - 46
        data[at + 20:at + 28] = struct.pack('<II', 2 ** 30, 2 ** 30)
        again.write_bytes(data)
    monkeypatch.setattr(torch, 'load', None)
    expect_error(lambda: checkpoint.load(again), f'{again} holds compressed '
                 'records, or larger ones than the file is')


def test_a_damaged_checkpoint_names_the_step_to_go_back_to(tmp_path,
                                                           monkeypatch):
    """The newest that is whole; a file from elsewhere is to be fetched."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'models').mkdir()
    names = 'latest', 'final', 'step_400', 'step_4000', 'step_20000', 'mine'
    for name in names:
        torch.save(STATE, f'models/{name}.pth')

    def spoil(name):
        path = tmp_path / 'models' / f'{name}.pth'
        path.write_bytes(path.read_bytes()[:-9])
    for name in ('latest', 'final', 'step_20000', 'mine'):
        spoil(name)
    for name, ending in (
            ('latest', '; copy models/step_4000.pth over models/latest.pth'),
            ('final', '; name models/step_4000.pth instead'),
            ('step_20000', '; name models/step_4000.pth instead'),
            ('mine', '; copy, export or fetch it again')):
        error = expect_error(
            lambda name=name: checkpoint.load(f'models/{name}.pth'),
            f'models/{name}.pth is truncated')
        assert str(error).endswith(ending)
    spoil('step_400')
    spoil('step_4000')
    for name, ending in (('latest', 'move it away to start anew'),
                         ('final', 'train anew')):
        expect_error(lambda name=name: checkpoint.load(f'models/{name}.pth'),
                     f'models/{name}.pth', f'no step_N.pth that is whole is '
                     f'beside it; {ending}')


def test_damaged_backbone_weights_are_fetched_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'models').mkdir()
    settings.PRETRAINED = 'resnet18-f37072fd'
    torch.save(STATE, f'models/{settings.PRETRAINED}.pth')
    expect_error(pretrained.find_weights, 'models/resnet18-f37072fd.pth',
                 'remove it, and it is fetched again')


# ------------------------------------------------- .safetensors
TEXTS = {name: json.dumps(value) for name, value in {
    'classes': ['a', 'b'], 'colours': [[0, 0, 0], [1, 1, 1]], 'step': 3,
    'settings': {'STAGE_NUM': 3}}.items()}


def write_tensors(path):
    """Write a small .safetensors as tools.export does; return its bytes."""
    net = torch.nn.Linear(3, 2)
    net.register_buffer('count', torch.tensor(7))
    export.write_safetensors(net, TEXTS, str(path))
    return path.read_bytes()


def test_a_flipped_bit_of_safetensors_is_never_loaded(tmp_path):
    path = tmp_path / 'x.safetensors'
    data = write_tensors(path)
    expected = checkpoint.read_checkpoint(str(path))
    assert sorted(expected['net']) == ['bias', 'count', 'weight']
    assert expected['settings'] == {'STAGE_NUM': 3}
    assert count_refused(path, checkpoint.read_checkpoint, flips(data, 120),
                         expected) > 130    # the others hide the digest
    path.write_bytes(data.replace(b'STAGE_NUM\\": 3', b'STAGE_NUM\\": 4'))
    expect_error(lambda: checkpoint.read_checkpoint(str(path)),
                 f'{path} is damaged: its checksum does not match; ')
    path.write_bytes(data[:-1])         # not in the words of safetensors
    error = expect_error(lambda: checkpoint.read_checkpoint(str(path)), path)
    assert 'eader' not in str(error)


# ------------------------------------------------- ONNX
def write_onnx(path, props):
    """Write a network of one operator that takes images (b, 3, h, w)."""
    shapes = {'image': ['b', 3, 'h', 'w'], 'logits': ['b', 3, 'h', 'w']}
    x, y = (onnx.helper.make_tensor_value_info(name, 1, shape)
            for name, shape in shapes.items())
    weight = onnx.helper.make_tensor('k', 1, [1, 3, 1, 1], [1., 2., 3.])
    model = onnx.helper.make_model(onnx.helper.make_graph(
        [onnx.helper.make_node('Mul', ['image', 'k'], ['logits'])], 'g', [x],
        [y], [weight]), ir_version=8,
        opset_imports=[onnx.helper.make_opsetid('', 18)])
    onnx.helper.set_model_props(model, props)
    onnx.save(model, path)
    return path.read_bytes()


def test_a_damaged_onnx_file_is_refused_in_our_words(tmp_path, capfd):
    """When it is opened, or when it runs; here and on stderr."""
    path, settings.N_CLASSES = tmp_path / 'x.onnx', 3
    data, image = write_onnx(path, TEXTS), torch.ones(1, 3, 4, 5)

    def run(path):
        net = checkpoint.OnnxNetwork(path)
        return net(image).shape, list(net.recorded)
    assert run(str(path))[0] == (1, 3, 4, 5)
    refusals = []
    for spoilt in flips(data, 40):
        path.write_bytes(spoilt)
        try:
            run(str(path))              # its weights have no checksum
        except UserError as error:
            refusals.append(str(error).replace(str(path), 'X'))
    assert len(refusals) > 20
    assert {text[:60] for text in refusals} <= {
        'X cannot be run by onnxruntime: it is damaged, or no network of '[
            :60]} | {f'X: "{name}" in its metadata is no JSON; export it '
                     f'again'[:60] for name in TEXTS}
    assert 'nnxruntime' not in capfd.readouterr().err


# ------------------------------------------------- metadata
@pytest.mark.parametrize('text', ['fast', '', '{', '[' * 100_000,
                                  '1' * 10_000, '\x00'], ids=kind)
@pytest.mark.parametrize('name', ['settings', 'step'])
def test_metadata_that_is_no_json_is_one_line(name, text):
    expect_error(lambda: checkpoint.decode_metadata(
        {**TEXTS, name: text}, 'f'), f'f: "{name}" in its metadata is no JSON')


def test_metadata_of_other_programs_does_no_harm():
    """Beside ours, too."""
    assert checkpoint.decode_metadata({'settings': 'fast', 'step': '{'},
                                      'f') == {}
    assert 'author' not in checkpoint.decode_metadata(
        {**TEXTS, 'author': 'somebody'}, 'f')


# ------------------------------------------------- what is recorded
def nested(depth):
    """Return lists in lists, small in memory, endless as text."""
    value = ['a']
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.fixture
def recorded():
    """What a checkpoint of the tests' settings records."""
    vars(settings).update(SMALL)
    return {'net': {}, 'step': 3, 'git': 'abc', 'settings':
            settings.as_dict(), 'classes': list('abcdef'),
            'colours': [[i, i, i] for i in range(6)]}


def expect_refused(state, *parts):
    torch.save(state, 'x.pth')
    before = settings.as_dict()
    error = expect_error(lambda: heads.load_network('x.pth', 'cpu'), 'x.pth',
                         *parts)
    assert len(str(error)) < 400 and settings.as_dict() == before


@pytest.mark.parametrize('name, value', [
    ('STAGE_NUM', 10 ** 9), ('STAGE_NUM', 3.5), ('STAGE_NUM', True),
    ('STAGE_NUM', 10 ** 500), ('N_LAYERS', 19), ('N_LAYERS', None),
    ('N_CLASSES', nested(100)), ('HEAD', 'no\nhead'), ('HEAD', b'ema'),
    ('EM_CHANNELS', torch.ones(3)), ('MEAN', (0.1, 'x', 0.2)),
    ('MEAN', [float('nan')] * 3), ('STD', 7), ('DATA_ROOT', 5),
    ('DATA_ROOT', 'a\0b'), ('LOG_DIR', {}), ('EVAL_CLASSES', (1, 2.5)),
    ('EVAL_CLASSES', nested(100)), ('IGNORE_LABEL', -1)], ids=kind)
def test_a_recorded_setting_that_cannot_be_is_refused(
        name, value, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded['settings'][name] = value
    expect_refused(recorded, name)


@pytest.mark.parametrize('name, value', [
    ('settings', [1]), ('settings', 'x'), ('classes', 'abcdef'),
    ('classes', list('abcde')), ('classes', [*'abcde', 6]),
    ('classes', [*'abcde', 'f\ng']), ('classes', None), ('classes', nested(9)),
    ('colours', [[0, 0, 0]] * 5), ('colours', [[0, 0, 256]] * 6),
    ('colours', [[0, 0]] * 6), ('colours', [7] * 6), ('colours', 7),
    ('colours', [[0, 0, 0.5]] * 6), ('step', 'x'), ('step', -1),
    ('step', 10 ** 500), ('step', torch.ones(2)), ('git', ['a'])], ids=kind)
def test_an_entry_of_another_type_is_refused(name, value, recorded, tmp_path,
                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded[name] = value
    expect_refused(recorded, 'x.pth is spoilt: ')


def test_classes_need_their_colours(recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    del recorded['colours']
    expect_refused(recorded, 'its classes are no 6 names')


def test_a_rule_that_a_record_breaks_names_the_file(recorded, tmp_path,
                                                    monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recorded['settings']['EVAL_CLASSES'] = [1, 9]
    torch.save(recorded, 'x.pth')
    status, line = refused(eval.main, 'x.pth', 'DEVICES=-1',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'x.pth: EVAL_CLASSES=(1, 9): classes ar' in line


SPARSE = torch.eye(3).to_sparse()


@pytest.mark.filterwarnings('ignore:Validating sparse')
@pytest.mark.parametrize('weights', [
    7, [torch.ones(2)], {'a': 7}, {7: torch.ones(2)}, {'a': nested(100)},
    {'a': {'b': torch.ones(2)}}, {'a': SPARSE}, {10 ** 500: torch.ones(1)},
    {'a': torch.ones(2, dtype=torch.complex64)},
    {'a': torch.ones(2, device='meta')},
    {'a': torch.ones(2).to(torch.float8_e5m2)}],
    ids=kind)
@pytest.mark.parametrize('name', ['net', 'average'])
def test_weights_are_tensors_by_name(name, weights, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({**STATE, name: weights}, path)
    expect_error(lambda: checkpoint.read_checkpoint(str(path)),
                 f'{path} is no checkpoint of a network: ')
    net = torch.nn.Linear(1, 1)
    error = expect_error(lambda: checkpoint.load_strict(net, weights, 'f'),
                         'f is no file of weights: it holds ')
    assert len(str(error)) < 200


def test_bases_of_another_shape_are_not_taken_for_an_emanet(tmp_path,
                                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    vars(settings).update(SMALL)
    expect_refused({'net': {'emau.mu': torch.ones(2), 'fc2.weight':
                            torch.tensor(1.)}}, 'does not fit the network')


# ------------------------------------------------- images
def huge_png(path, width, height):
    """Write a PNG whose header promises width x height pixels."""
    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    chunks = ((b'IHDR', head), (b'IDAT', zlib.compress(bytes(9))),
              (b'IEND', b''))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data
        + struct.pack('>I', zlib.crc32(name + data)) for name, data in chunks))


READERS = (images.read_image, images.read_label, images.read_any_image,
           images.image_size, images.upright_size)


@pytest.mark.parametrize('read', READERS)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(read, tmp_path):
    path = tmp_path / 'x.png'
    for width, height in ((2 ** 14, 2 ** 14 + 1), (2 ** 31 - 1, 2 ** 31 - 1)):
        huge_png(path, width, height)
        expect_error(lambda: read(str(path)), f'{path} cannot be read as ',
                     f'it has {width * height:,} pixels, at most 268,435,456 '
                     f'are read')


def test_a_jpeg_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    """OpenCV would take it, and 3 GB."""
    path = tmp_path / 'x.jpg'
    data = jpeg(path)
    at = data.index(b'\xff\xc0') + 5                 # height, width
    path.write_bytes(data[:at] + b'\x80\0\x80\0' + data[at + 4:])
    expect_error(lambda: images.read_image(str(path)), path,
                 'it has 1,073,741,824 pixels, at most 268,435,456')


def test_an_image_below_the_limit_is_read_without_a_warning(tmp_path):
    """Pillow's own limits are lower."""
    path = tmp_path / 'x.png'
    huge_png(path, 2 ** 14, 2 ** 14)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        assert images.image_size(str(path)) == (2 ** 14, 2 ** 14)
    assert not found


def test_what_decoders_raise_is_one_line(tmp_path):
    """Formats whose decoders raise what others do not."""
    path = tmp_path / 'x.png'
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(path, 'DDS')
    data = bytearray(path.read_bytes())
    data[80:84] = bytes(4)              # no pixel format: NotImplementedError
    path.write_bytes(data)
    for read in READERS:
        expect_error(lambda read=read: read(str(path)), path)
