"""The attention explorer: what it computes against eval's own; its page in a
browser, where there is one.

    python -m pytest tests/test_explore.py [-m long]
"""
import contextlib
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import browser
import eval
import settings
import utils
from conftest import REPO, refused
from lib import visualize
from lib.checkpoint import load
from test_predict import read_normalised, save_network, write_image
from tools import explore


@pytest.fixture
def checkpoints(small):
    """a.pth, whose T matters; other.pth, at another output stride."""
    net = save_network('a.pth')
    with torch.no_grad():
        net.emau.conv1.weight.mul_(20)
        net.emau.conv2[1].weight.mul_(20)
    torch.save({**load('a.pth'), 'net': net.state_dict()}, 'a.pth')
    vars(small).update(HEAD='no_ema', STRIDE=8)
    save_network('other.pth')
    vars(small).update(HEAD='ema', STRIDE=16)
    return net


def read_image(size=(60, 90), seed=0):
    path = write_image(f'{seed}.png', size, seed)
    return explore.read_upload(path)[1]


# ------------------------------------------------- what is computed
@torch.no_grad()
def test_a_view_is_what_eval_gives_for_that_t(checkpoints):
    net, image = checkpoints, read_image()
    model, x = explore.Model('a.pth'), read_normalised('0.png')
    view, seen = model.encode(image), []
    for stage_num in (1, 3, 6):
        net.emau.stages = stage_num, stage_num
        done = model.run(view, stage_num)
        torch.testing.assert_close(done.prob, eval.infer(net, x)[0])
        torch.testing.assert_close(done.z, eval.attention(net, x)[-1])
        seen.append(model.draw_query(done, (40, 20)))
        want = visualize.draw_query(image, (40, 20), *eval.query_attention(
            net, image, 'cpu', (40, 20)))
        assert np.abs(seen[-1].astype(int) - want).max() < 3
        panels, count = model.draw_bases(done)
        assert len(panels) == count <= 8
        shares = [float(re.search(': (.*)%', text)[1]) for _, text in panels]
        assert shares == sorted(shares, reverse=True)
        i = int(re.search('basis (.*):', panels[0][1])[1])
        _, want_shares, _, _ = eval.attention_maps(net, image, 'cpu', [i])
        assert shares[0] == pytest.approx(100 * want_shares[0], abs=0.06)
    assert (seen[0] != seen[1]).mean() > 0.01
    assert model.net.emau.stages == (3, 3)      # as it was loaded


def test_a_pixels_classes_and_bases(checkpoints):
    model = explore.Model('a.pth')
    view = model.run(model.encode(read_image()), 3)
    probs = model.list_classes(view, (70, 10))
    assert max(probs, key=probs.get) == model.names[
        view.prob[:, 10, 70].argmax()]
    bases = model.list_bases(view, (70, 10))    # cell (1, 4) of stride 16
    assert bases[f'basis {view.z[:, 1, 4].argmax()}'] == (
        pytest.approx(view.z[:, 1, 4].max().item()))
    assert len(probs) == len(bases) == 5


@torch.no_grad()
def test_networks_of_other_settings_do_not_mix(checkpoints):
    """Two sessions at once, of two networks and two T: as one by one."""
    models = [explore.Model(path) for path in ('a.pth', 'other.pth')]
    assert [m.settings['STRIDE'] for m in models] == [16, 8]
    assert settings.STRIDE == 16 and models[1].unit is None
    jobs = [(model, read_image((40, 60), seed), t) for model in models
            for seed, t in ((1, 1), (2, 5))]    # 49 x 65, 41 x 65 padded

    def run(job, to):
        model, image, stage_num = job
        to.append(model.run(model.encode(image), stage_num).prob)
    before, alone = settings.as_dict(), []
    for job in jobs:
        run(job, alone)
    together = [[] for _ in jobs]
    settings.STRIDE = 8
    torch.testing.assert_close(alone[2], eval.infer(
        models[1].net, read_normalised('1.png'))[0])
    settings.STRIDE = 16
    threads = [threading.Thread(target=lambda i=i: [
        run(jobs[i], together[i]) for _ in range(5)]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, found in zip(alone, together, strict=True):
        assert len(found) == 5
        for prob in found:
            torch.testing.assert_close(prob, want)
    assert settings.as_dict() == before


def test_classes_that_are_not_shown_leave_the_image():
    image = np.full((100, 400, 3), 100, np.uint8)
    pred = np.zeros((100, 400), np.uint8)
    pred[:, 200:] = 1
    given = image, pred, ['a', 'b'], [[200, 0, 0], [0, 200, 0]]
    page = visualize.overlay(*given, opacity=0.5)
    assert page[50, 100].tolist() == [150, 50, 50]
    assert page[50, 300].tolist() == [50, 150, 50]
    page = visualize.overlay(*given, opacity=0.5, shown=[1])
    assert page[50, 100].tolist() == [100] * 3
    assert page[50, 300].tolist() == [50, 150, 50]
    assert not (page == [200, 0, 0]).all(2).any()       # nor in the legend
    assert (page == [0, 200, 0]).all(2).any()


def test_large_images_are_scaled_down_and_the_page_says_so():
    image = np.zeros((1000, 300, 3), np.uint8)
    assert explore.scale_down(image).shape == (512, 154, 3)
    assert explore.describe_image('a', image) == (
        'a, 300 x 1000 pixels, scaled down to 154 x 512')
    assert explore.describe_image('a', image[:512]) == 'a, 300 x 512 pixels'


def test_examples_are_of_the_checkpoints_data_or_generated(checkpoints):
    """Five images of val; without them, toy images."""
    examples = explore.load_examples(explore.Model('a.pth'))
    assert [name for name, _ in examples] == [f'toy_{i:04d}'
                                              for i in range(5)]
    torch.save({**load('a.pth'), 'settings': {
        **settings.as_dict(), 'DATA_ROOT': 'gone'}}, 'b.pth')
    settings.DATA_ROOT = 'nowhere'
    assert len(explore.load_examples(explore.Model('b.pth'))) == 8


# ------------------------------------------------- bad input
@pytest.mark.parametrize('arguments, line', (
    ('gone.pth', 'gone.pth is not there'),
    ('a.pth --with gone.pth', 'gone.pth is not there'),
    ('a.pth --port 70000', '--port 70000: it can be 1 to 65535'),
    ('a.pth --port x', '--port'),
    ('a.pth N_LAYER=18', 'N_LAYERS')))
def test_bad_input_ends_in_a_line(checkpoints, arguments, line, monkeypatch,
                                  capsys):
    monkeypatch.setitem(sys.modules, 'gradio', io)      # it is not reached
    status, text = refused(explore.main, *arguments.split(), capsys=capsys,
                           monkeypatch=monkeypatch)
    assert status == 2 and line in text


def test_gradio_is_asked_for_in_a_line(checkpoints, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    status, text = refused(explore.main, 'a.pth', capsys=capsys,
                           monkeypatch=monkeypatch)
    assert status == 2 and 'python -m pip install gradio' in text


@pytest.mark.long
def test_a_port_in_use_is_named(checkpoints, monkeypatch, capsys):
    pytest.importorskip('gradio')
    with socket.socket() as used:
        used.bind(('127.0.0.1', 0))
        used.listen()
        port = used.getsockname()[1]
        status, text = refused(
            explore.main, 'a.pth', '--no-browser', '--port', port,
            capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2 and f'--port {port}: it cannot listen there' in text


def test_an_upload_that_is_no_image_is_named_without_its_folder(tmp_path):
    path = tmp_path / 'notes.txt'
    path.write_text('notes')
    with pytest.raises(utils.UserError,
                       match=r'^notes.txt cannot be read as an image'):
        explore.read_upload(str(path))


# ------------------------------------------------- a browser
@contextlib.contextmanager
def serve(*arguments):
    """Run the tool; give its process and its address once it answers."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, '-m', 'tools.explore', *arguments, '--no-browser',
         '--port', str(port)], env={**os.environ, 'PYTHONPATH': REPO},
        stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith('http'):
                break
        assert f'http://127.0.0.1:{port} shows a.pth, other.pth' in line
        yield process, f'http://127.0.0.1:{port}/'
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def read_shown(page, kind, i=0):
    """Return the i-th image of a kind that the page has loaded, or None."""
    shown = page.locator(f'.{kind} img').nth(i)
    source = shown.get_attribute('src') if shown.count() else None
    if not source:
        return None
    reply = page.request.get(source)
    with Image.open(io.BytesIO(reply.body())) as image:
        assert image.format == 'PNG'
        return np.array(image.convert('RGB'))


def wait_for(page, kind, want, i=0):
    """Fail unless the page shows an image as a function gave it, up to
    rounding, within half a minute."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = read_shown(page, kind, i)
        if found is not None and found.shape == want.shape and (
                np.abs(found.astype(int) - want) > 3).mean() < 1e-3:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f'the page does not show this image of {kind}')


def click_pixel(page, image, x, y):
    """Click the pixel x, y of an image in the first overlay."""
    shown = page.locator('.overlay img').first
    shown.scroll_into_view_if_needed()
    height, width = read_shown(page, 'overlay').shape[:2]
    box = shown.bounding_box()
    scale = min(box['width'] / width, box['height'] / height)
    times = visualize.enlarge(image).shape[1] // image.shape[1]
    left, top = ((box[side] - scale * length) / 2 for side, length in (
        ('width', width), ('height', height)))
    shown.click(position={'x': left + (x + 0.5) * times * scale,
                          'y': top + (y + 0.5) * times * scale})


def remote_addresses(pid):
    """Return the addresses, but for this machine's, of a process's sockets,
    in hexadecimal as Linux lists them."""
    links = [os.readlink(f'/proc/{pid}/fd/{name}')
             for name in os.listdir(f'/proc/{pid}/fd')]
    found = set()
    for table in ('tcp', 'tcp6', 'udp', 'udp6'):
        with open(f'/proc/{pid}/net/{table}') as file:
            for row in map(str.split, list(file)[1:]):
                if f'socket:[{row[9]}]' in links:
                    found |= {row[1].split(':')[0], row[2].split(':')[0]}
    assert '0100007F' in found                      # it listens at 127.0.0.1
    return {address for address in found if address[-2:] != '7F'
            and (set(address) != {'0'})}


@pytest.mark.long
@pytest.mark.skipif(not browser.find_browser()
                    or not importlib.util.find_spec('gradio'),
                    reason='no gradio, no playwright or no Chromium')
def test_the_page_shows_what_the_functions_give(checkpoints):
    """An upload, a click, another T, a class less, a file that is no image;
    a second session meanwhile; nothing leaves the machine."""
    models = [explore.Model(path) for path in ('a.pth', 'other.pth')]
    every, requests = [*range(6)], []
    full = read_image((440, 700), seed=7)
    image = explore.scale_down(full)
    with open('notes.txt', 'w') as file:
        file.write('notes')
    views = [model.run(model.encode(image), 3) for model in models]
    again = models[0].run(models[0].encode(read_image()), 1)
    first = explore.load_examples(models[0])[0][1]
    with (serve('a.pth', '--with', 'other.pth') as (process, address),
          browser.open_page(1280, 900) as page):
        page.on('request', lambda request: requests.append(request.url))
        page.goto(address)
        start = models[0].run(models[0].encode(first), 3)
        wait_for(page, 'overlay', models[0].draw_classes(start, 0.55, every))

        page.set_input_files('input[type=file]', '7.png')
        for i, (model, view) in enumerate(zip(models, views, strict=True)):
            wait_for(page, 'overlay', model.draw_classes(view, 0.55, every), i)
        assert ('7.png, 700 x 440 pixels, scaled down to 512 x 322'
                in page.inner_text('body'))
        second = page.context.browser.new_page()
        second.goto(address)
        wait_for(second, 'overlay', models[0].draw_classes(start, 0.55, every))

        click_pixel(page, image, 400, 100)
        wait_for(page, 'query', models[0].draw_query(views[0], (400, 100)))
        assert page.locator('.query img').count() == 1  # of the EMA unit's
        for found in (models[0].list_classes(views[0], (400, 100)),
                      models[0].list_bases(views[0], (400, 100))):
            best = max(found, key=found.get)
            assert re.search(rf'{best}\s+{100 * found[best]:.0f}%',
                             page.inner_text('body'))

        page.locator('input[type=number]').nth(1).fill('1')
        page.keyboard.press('Tab')
        view = models[0].run(views[0], 1)
        wait_for(page, 'query', models[0].draw_query(view, (400, 100)))
        wait_for(page, 'bases', models[0].draw_bases(view)[0][0][0])
        overlay = models[0].draw_classes(view, 0.55, every)
        wait_for(page, 'overlay', overlay)
        gone = int(view.prob.sum((1, 2)).argmax())
        left = models[0].draw_classes(view, 0.55, [i for i in every
                                                   if i != gone])
        assert (left != overlay).mean() > 0.05
        page.get_by_label(models[0].names[gone], exact=True).first.uncheck()
        wait_for(page, 'overlay', left)

        page.set_input_files('input[type=file]', 'notes.txt')
        page.get_by_text('notes.txt cannot be read as an image').wait_for()
        page.set_input_files('input[type=file]', '0.png')   # it goes on
        wait_for(page, 'query', models[0].draw_query(again, (45, 30)))
        click_pixel(second, first, 20, 30)
        wait_for(second, 'query', models[0].draw_query(start, (20, 30)))
        assert not remote_addresses(process.pid)
    assert len(requests) > 10
    assert not [url for url in requests
                if not url.startswith((address, 'data:', 'blob:'))]
