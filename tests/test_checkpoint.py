"""Do checkpoints survive crashes, run no code, and fit or say why not?

    python -m pytest tests/test_checkpoint.py

Backbone weights (lib/pretrained.py) are tested here too.
"""
import functools
import hashlib
import http.server
import io
import math
import os
import pickle
import threading

import numpy as np
import pytest
import torch
import torchvision

import heads
import network
import settings
from conftest import SMALL
from files import contents, expect_error
from lib import checkpoint, pretrained, run
from lib.checkpoint import load, save
from lib.pretrained import DEFAULTS, KNOWN, load_backbone, load_pretrained
from utils import RunError, UserError


# ------------------------------------------------- saving
def test_save_and_load(tmp_path):
    path = str(tmp_path / 'new' / 'x.pth')
    state = {'net': torch.arange(6.).view(2, 3), 'step': 3, 'names': ['a'],
             'scales': (0.5, 1.0), 'flip': True, 'best': None}
    save(state, path)
    loaded = load(path)
    assert torch.equal(loaded.pop('net'), state.pop('net'))
    assert repr(loaded) == repr(state)


def test_versions_can_be_saved(tmp_path):
    save(run.versions(), str(tmp_path / 'x.pth'))
    loaded = load(tmp_path / 'x.pth')
    assert loaded == run.versions()
    assert loaded['torch'] == torch.__version__


def test_random_state_is_restored(tmp_path):
    save(run.random_state(), str(tmp_path / 'x.pth'))
    drawn = torch.rand(3)
    run.set_random_state(load(tmp_path / 'x.pth'))
    assert torch.equal(torch.rand(3), drawn)


def test_save_on_a_full_disk_keeps_the_old(tmp_path, monkeypatch):
    def full(state, path):
        with open(path, 'w') as file:
            file.write('half')
        raise RuntimeError('[enforce fail at inline_container.cc:603] . '
                           'unexpected pos 64 vs 0\nframe #0: ...')
    path = tmp_path / 'x.pth'
    path.write_text('old')
    monkeypatch.setattr(torch, 'save', full)
    error = expect_error(
        lambda: save({}, str(path)),
        f'{path} cannot be written: is the disk full? ', 'MODEL_DIR',
        kind=RunError)
    assert 'frame' not in str(error)
    assert contents(tmp_path) == {'x.pth': b'old'}


def test_save_leaves_a_lost_loader_process_to_others(tmp_path, monkeypatch):
    """torch raises it wherever the program happens to be."""
    def lost(state, path):
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal')
    monkeypatch.setattr(torch, 'save', lost)
    with pytest.raises(RuntimeError, match='^DataLoader worker'):
        save({}, str(tmp_path / 'x.pth'))


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / 'file').touch()
    folder = str(tmp_path / 'file' / 'models')       # in a file: root, too
    expect_error(lambda: save({}, f'{folder}/x.pth'),
                 f'{folder}/x.pth cannot be written: ', kind=RunError)
    expect_error(lambda: checkpoint.check_writable('MODEL_DIR', folder),
                 f'MODEL_DIR={folder}: nothing can', kind=RunError)
    checkpoint.check_writable('MODEL_DIR', str(tmp_path / 'new' / 'one'))
    assert not (tmp_path / 'new').exists()      # only tried


# ------------------------------------------------- loading
def saved(value, **options):
    data = io.BytesIO()
    torch.save(value, data, **options)
    return data.getvalue()


old_format = functools.partial(saved, _use_new_zipfile_serialization=False)
WEIGHTS = {'net': torch.ones(100, 100)}


@pytest.mark.parametrize('data', [
    saved(WEIGHTS)[:20000], saved(WEIGHTS)[:100], old_format(WEIGHTS)[:20000],
    old_format(WEIGHTS)[:100], b'', bytes(100), b'hello',
    b'<html>404 not found</html>', np.random.default_rng(0).bytes(1000)],
    ids=['zip', 'zip start', 'old', 'old start', 'empty', 'zeros', 'text',
         'html', 'random'])
@pytest.mark.parametrize('read, ending', [
    (load, '.pth'), (checkpoint.read_checkpoint, '.safetensors')])
def test_a_corrupt_file_is_refused(read, ending, data, tmp_path):
    path = tmp_path / f'x{ending}'
    path.write_bytes(data)
    expect_error(lambda: read(str(path)),
                 f'{path} is truncated or no file of weights')


def test_load_names_a_missing_file(tmp_path):
    for path in (tmp_path / 'x.pth', tmp_path):
        expect_error(lambda path=path: load(str(path)),
                     f'{path} is not there')


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize('pack', [saved, old_format,
                                  lambda x: pickle.dumps(x, 2)],
                         ids=['zip', 'old', 'pickle'])
def test_load_runs_no_code(pack, tmp_path):
    path, marker = tmp_path / 'x.pth', tmp_path / 'marker'
    path.write_bytes(pack({'net': Hostile(marker)}))
    expect_error(lambda: load(str(path)),
                 f'{path} holds more than tensors and plain values')
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))      # it would have
    assert marker.exists()


@pytest.mark.parametrize('value', [
    np.float64(1), np.ones(3), torch.__version__, torch.nn.Linear(2, 2)],
    ids=['scalar', 'array', 'version', 'module'])
def test_load_refuses_more_than_plain_values(value, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'net': {}, 'value': value}, path)
    expect_error(lambda: load(str(path)), f'{path} holds more than tensors')


@pytest.mark.parametrize('state', [
    {'conv1.weight': torch.zeros(1)}, [1, 2], {'net': torch.zeros(1)}])
def test_a_file_without_a_network_is_no_checkpoint(state, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(state, path)
    expect_error(lambda: checkpoint.read_checkpoint(str(path)),
                 f'{path} is no checkpoint of a network', '"net"',
                 'PRETRAINED')


def test_a_missing_checkpoint_lists_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_error(lambda: checkpoint.find_checkpoint(None),
                 'models/final.pth is not there, nor any other checkpoint')
    os.mkdir('models')
    for name in ('latest.pth', 'best.pth', 'notes.txt'):
        (tmp_path / 'models' / name).touch()
    expect_error(lambda: checkpoint.find_checkpoint(None),
                 'models/final.pth is not there', 'models/best.pth')
    expect_error(lambda: checkpoint.find_checkpoint('a.pth'),
                 'a.pth is not there, nor any other checkpoint')
    (tmp_path / 'models' / 'final.pth').touch()
    assert checkpoint.find_checkpoint(None) == 'models/final.pth'
    assert checkpoint.find_checkpoint('models/best.pth') == 'models/best.pth'


# ------------------------------------------------- metadata
def test_metadata_round_trip(small):
    """Tuples stay tuples, as the settings have them."""
    given = {'classes': ['a', 'b'], 'colours': [[0, 0, 0], [1, 2, 3]],
             'step': 7, 'git': 'abc'}
    texts = checkpoint.encode_metadata(given)
    assert all(isinstance(text, str) for text in texts.values())
    found = checkpoint.decode_metadata(texts, 'f')
    assert {name: found[name] for name in given} == given
    assert found['settings'] == settings.network_settings()
    assert type(found['settings']['MEAN']) is tuple
    assert tuple(found['mean']) == settings.MEAN
    assert tuple(found['std']) == settings.STD


def test_metadata_of_a_published_checkpoint_is_that_of_the_data_set(small):
    found = checkpoint.decode_metadata(
        checkpoint.encode_metadata({}), 'f')
    assert found['classes'][0] == 'background' and found['step'] is None
    assert len(found['classes']) == len(found['colours']) == 6


def test_metadata_of_others_is_left_alone():
    texts = {'format': 'pt', 'step': 'x', 'settings': 'fast'}
    assert checkpoint.decode_metadata(texts, 'f') == {}


def test_a_safetensors_file_is_read_with_its_metadata(small, tmp_path):
    torch_files = pytest.importorskip('safetensors.torch')
    path, net = str(tmp_path / 'x.safetensors'), {'a': torch.rand(3)}
    torch_files.save_file(net, path, checkpoint.encode_metadata({'step': 7}))
    found = checkpoint.read_checkpoint(path)
    assert torch.equal(found['net']['a'], net['a']) and found['step'] == 7
    torch_files.save_file(net, path)
    assert checkpoint.read_checkpoint(path).keys() == {'net'}


# ------------------------------------------------- weights into a network
@pytest.fixture
def tiny():
    """An EMANet of random weights, by the tests' settings."""
    vars(settings).update(SMALL)
    return heads.build_network()


def test_load_strict_names_every_key(tiny):
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    checkpoint.load_strict(heads.build_network(), state, 'f')
    del state['emau.mu']
    state['more'] = state['fc2.bias']
    state['fc2.bias'] = torch.zeros(7)
    expect_error(lambda: checkpoint.load_strict(tiny, state, 'f'),
                 'f does not fit the network: it lacks emau.mu; it has, '
                 'unknown to the network, more; it has other shapes, '
                 'fc2.bias (7,) for (6,)', 'N_LAYERS, STEM, HEAD')


def test_load_strict_does_without_the_counters_of_batch_norm(tiny):
    state = {key: value for key, value in tiny.state_dict().items()
             if not key.endswith('num_batches_tracked')}
    net = heads.build_network()
    checkpoint.load_strict(net, state, 'f')
    assert torch.equal(net.fc2.weight, tiny.fc2.weight)


def test_a_long_list_of_keys_is_cut_short(tiny):
    error = expect_error(lambda: checkpoint.load_strict(tiny, {}, 'f'),
                         'f does not fit the network: it lacks extractor')
    assert len(str(error)) < 250 and 'extractor (' in str(error)
    assert ' and 2 more. ' in str(error)


@pytest.mark.parametrize('keys, text', (
    (['fc2.bias', 'fc2.weight'], 'fc2.bias, fc2.weight'),
    ([f'layer4.{i}.conv.weight' for i in range(5)] + ['fc.bias'],
     'layer4 (5 tensors), fc (1 tensor)'),
    ([f'{i}.{i}.weight' for i in range(9)],
     '0 (1 tensor), 1 (1 tensor), 2 (1 tensor), 3 (1 tensor) and 5 more')))
def test_keys_in_words(keys, text):
    assert checkpoint.summarize_keys(keys) == text


@pytest.mark.parametrize('value', (math.nan, -math.inf))
def test_weights_that_are_not_finite_are_refused(tiny, value):
    state = {key: x.clone() for key, x in tiny.state_dict().items()}
    state['emau.mu'][0, 3, 2] = value
    for copy in (checkpoint.load_strict, checkpoint.load_matching):
        expect_error(lambda copy=copy: copy(tiny, state, 'f'), 'f holds '
                     'numbers that are not finite (emau.mu)', 'diverged')


def test_load_matching_says_what_is_left_out_and_random(tiny):
    state = dict(tiny.state_dict())
    state['fc2.weight'] = torch.zeros(9, 256, 1, 1)
    state['head.weight'] = state.pop('emau.mu')
    net = heads.build_network()
    assert checkpoint.load_matching(net, state, 'f') == (
        ['fc2.weight', 'head.weight'], ['emau.mu', 'fc2.weight'])
    assert torch.equal(net.fc0.conv.weight, tiny.fc0.conv.weight)
    del state['extractor.0.weight']
    expect_error(lambda: checkpoint.load_matching(net, state, 'f'),
                 'f does not fit the network: it lacks extractor.0.weight')


# ------------------------------------------------- backbone weights
def torchvision_keys(resnet):
    """Return a ResNet's weights under torchvision's names."""
    names = ['conv1', 'bn1', '', '', 'layer1', 'layer2', 'layer3', 'layer4']
    return {names[int(key[0])] + key[1:]: value
            for key, value in resnet.state_dict().items()}


def deep_weights():
    """Weights as the recipe's files have them: torchvision's names, a deep
    stem, the ImageNet classifier, no BN counters."""
    state = {key: value for key, value in torchvision_keys(
        network.ResNet(50, 32)).items()
        if not key.endswith('num_batches_tracked')}
    return {**state, 'fc.weight': torch.zeros(1000, 2048),
            'fc.bias': torch.zeros(1000)}


def test_deep_stem_weights_load():
    state = deep_weights()
    net = network.ResNet(50, 8)
    assert load_backbone(net, state, 'file') == []
    assert torch.equal(net[0][6].weight, state['conv1.6.weight'])
    assert torch.equal(net[7][2].bn3.running_var,
                       state['layer4.2.bn3.running_var'])


def test_weights_of_another_network_are_refused_by_key():
    state = deep_weights()
    error = expect_error(lambda: load_backbone(
        network.ResNet(50, stem='plain'), state, 'f'), 'f', 'lacks conv1.wei')
    assert 'conv1 (11 tensors)' in str(error)
    expect_error(lambda: load_backbone(network.ResNet(101), state, 'f'), 'f',
                 'lacks layer3 (')
    state['layer1.0.conv1.weight'] = torch.zeros(64, 64, 1, 1)
    expect_error(lambda: load_backbone(network.ResNet(50), state, 'f'), 'f',
                 'has other shapes, layer1.0.conv1.weight (64, 64, 1, 1) for '
                 '(64, 128, 1, 1)')


def test_a_partial_file_loads_only_when_it_is_meant(shared):
    path = os.path.join(shared, 'weights',
                        'resnet18_conv1_to_layer3_bn_unfolded.pth')
    state = torch.load(path, weights_only=True)
    net = network.ResNet(18, stem='plain')
    before = net[4][0].conv1.weight.clone()
    expect_error(lambda: load_backbone(net, state, path), path,
                 'lacks layer4.0 (')
    assert torch.equal(net[4][0].conv1.weight, before)
    missing = load_backbone(net, state, path, is_partial=True)
    assert missing and all(key.startswith('layer4.') for key in missing)
    assert torch.equal(net[4][0].conv1.weight, state['layer1.0.conv1.weight'])


@pytest.mark.parametrize('state, message', [
    ({}, 'lacks'), ({'net': {}, 'step': 1}, 'holds net, step'),
    ([1], 'holds a list')])
def test_a_partial_file_of_another_network_is_refused(state, message):
    expect_error(lambda: load_backbone(network.ResNet(18), state, 'f',
                                       is_partial=True), 'f', message)


def test_known_weights_are_named_by_their_hash():
    for name, (folder, digest) in KNOWN.items():
        assert folder.startswith('https://') and folder.endswith('/')
        assert digest.partition(':')[2].startswith(name.split('-')[-1])
    assert set(DEFAULTS.values()) <= set(KNOWN)
    urls = {weights.url for n in (18, 34, 50, 101, 152) for weights
            in torchvision.models.get_model_weights(f'resnet{n}')}
    assert urls <= {f'{folder}{name}.pth'
                    for name, (folder, _) in KNOWN.items()}


@pytest.mark.parametrize('stem, n_layers, name', [
    ('deep', 101, 'resnet101-2a57e44d'), ('plain', 18, 'resnet18-f37072fd')])
def test_default_weights_follow_the_network(stem, n_layers, name, small,
                                            monkeypatch):
    calls = []
    monkeypatch.setattr(pretrained, 'download', lambda *a: calls.append(a))
    vars(settings).update(PRETRAINED='auto', STEM=stem, N_LAYERS=n_layers)
    assert pretrained.find_weights() == f'models/{name}.pth'
    (url, path, digest), = calls
    assert url.endswith(f'/{name}.pth') and path.endswith(url[-20:])
    assert digest.split(':')[1].startswith(name.split('-')[1])


def test_unknown_weights_are_refused_by_name(small):
    vars(settings).update(PRETRAINED='auto', STEM='deep', N_LAYERS=18)
    with pytest.raises(UserError, match='N_LAYERS=18 with STEM=deep'):
        pretrained.find_weights()
    settings.PRETRAINED = 'resnet18-f3707'
    with pytest.raises(UserError, match='nearest known is resnet18-f37072fd'):
        pretrained.find_weights()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the folder 'served'; the server's `paths` are those requested.
    """

    def __init__(self, *a):
        super().__init__(*a, directory='served')

    def log_message(self, *a):
        self.server.paths.append(self.path)


def test_known_weights_are_fetched_checked_and_reused(small, monkeypatch):
    """From a server on localhost: the file is taken once, and not again."""
    weights = network.ResNet(18, stem='plain')
    save(torchvision_keys(weights), 'served/mine-0.pth')
    server = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open('served/mine-0.pth', 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    url = f'http://localhost:{server.server_port}/'
    monkeypatch.setenv('no_proxy', 'localhost')
    monkeypatch.setitem(KNOWN, 'mine-0', (url, f'sha256:{digest}'))
    settings.PRETRAINED = 'mine-0'
    for _ in range(2):
        net = heads.build_network()
        load_pretrained(net)
        assert torch.equal(net.extractor[7][1].conv2.weight,
                           weights[7][1].conv2.weight)
    assert server.paths == ['/mine-0.pth']
    with open('models/mine-0.pth', 'ab') as file:
        file.write(b'more')
    with pytest.raises(UserError, match='models/mine-0.pth has the sha256'):
        load_pretrained(net)
    server.shutdown()
    os.remove('models/mine-0.pth')
    server.server_close()
    with pytest.raises(RunError, match='put it at models/mine-0.pth'):
        load_pretrained(net)
