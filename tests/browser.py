"""Looks at TensorBoard with a real browser: Chromium, driven by playwright.

    python tests/browser.py DIR [--to SHOTS]

DIR is a folder of trained experiments, as for `sh tensorboard.sh DIR`, which
is what is looked at: the page has to show every experiment under its folder's
name, the last loss that its log.csv has, and its first image of val, in its
colours. SHOTS is where screenshots of all that there is to see are kept. Exit
status: 0 all is there, 1 something is not, 2 no playwright or no Chromium.
"""
import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)            # run as a script, from any folder

from tools.compare_runs import find_runs  # noqa: E402
from utils import RunError, UserError, run_main  # noqa: E402

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
OPTIONS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking',
           '--disable-component-update', '--disable-sync', '--no-first-run']
PAGES = {'curves': '#scalars', 'images': '#images', 'settings': '#text',
         'table': '#hparams'}


def find_browser():
    """Return the path of a Chromium that runs and that playwright can drive,
    or None."""
    for path in filter(None, map(shutil.which, NAMES)):
        done = subprocess.run([path, '--version'], capture_output=True,
                              check=False)
        if done.returncode == 0:
            return path if sync_playwright else None
    return None


@contextlib.contextmanager
def open_page(width, height):
    """Give a page of Chromium without a window."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=find_browser(), headless=True, args=OPTIONS)
        yield chromium.new_page(viewport={'width': width, 'height': height})
        chromium.close()


# ------------------------------------------------- TensorBoard
@contextlib.contextmanager
def serve(folder, losses):
    """Run tensorboard.sh on a folder; give its address once it has read the
    last loss of these runs {name: loss}."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    process = subprocess.Popen(
        ['sh', os.path.join(ROOT, 'tensorboard.sh'), folder, '--port',
         str(port)], env={**os.environ, 'PATH': path},
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        address = f'http://localhost:{port}/'
        for _ in range(240):
            served = {name: served_loss(address, name) for name in losses}
            if all(is_near(served[name], losses[name]) for name in losses):
                break
            time.sleep(0.5)
        else:
            raise RunError(f'TensorBoard has the losses {served}, log.csv '
                           f'has {losses}')
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def fetch(url):
    with urllib.request.urlopen(url) as reply:
        return reply.read()


def served_loss(address, name):
    """Return the last loss of a run that TensorBoard has read, or None."""
    query = urllib.parse.urlencode({'run': name, 'tag': 'Curves/loss'})
    try:
        return json.loads(fetch(
            f'{address}data/plugin/scalars/scalars?{query}'))[-1][2]
    except (OSError, IndexError):
        return None


def is_near(a, b):
    """Tell whether a is b, as a page writes it; None is near to nothing."""
    return a is not None and abs(a - b) < 1e-3 * abs(b)


def last_loss(log):
    with open(os.path.join(log, 'log.csv'), newline='') as file:
        return float(list(csv.DictReader(file))[-1]['loss'])


# ------------------------------------------------- what the page shows
def find_faults(page, losses, tag):
    """Return what the page does not show of all runs {name: loss}: names,
    last losses, an image of this tag each."""
    text = page.inner_text('body')
    numbers = [float(x) for x in re.findall(r'\b\d+\.\d+\b', text)]
    faults = [f'no {name}' for name in losses if name not in text.split()]
    faults += [f'no loss of {name}, {loss:.4f}' for name, loss
               in losses.items() if not any(is_near(x, loss)
                                            for x in numbers)]
    loaded = page.evaluate('[...document.images].filter(x => x.naturalWidth '
                           '> 300).length')
    if loaded != len(losses):
        faults.append(f'{loaded} images {tag}')
    return faults


def check_page(page, address, losses, shot):
    """Raise RunError unless the page of the loss and of an image shows those
    of all runs {name: loss}; write what it looks like."""
    tags = json.loads(fetch(f'{address}data/plugin/images/tags'))
    tag = min(tag for tags in tags.values() for tag in tags
              if tag.startswith('Val/'))
    query = urllib.parse.urlencode({'tagFilter': f'Curves/loss|{tag}$'})
    page.goto(f'{address}?{query}#timeseries')
    until = time.monotonic() + 60
    while find_faults(page, losses, tag) and time.monotonic() < until:
        page.wait_for_timeout(500)
    page.screenshot(path=shot)
    faults = find_faults(page, losses, tag)
    if faults:
        raise RunError(f'the page shows {"; ".join(faults)}; there are '
                       f'{len(losses)} experiments')
    with Image.open(shot) as image:
        seen = np.array(image.convert('RGB'))
    for source in page.evaluate('[...document.images].map(x => x.src)'):
        with Image.open(io.BytesIO(fetch(source))) as image:
            colours = common_colours(np.array(image))
        if not all((seen == colour).all(2).sum() > 50 for colour in colours):
            raise RunError(f'{tag} is not in {shot} in its colours')


def common_colours(image, most=3):
    """Return the commonest colours of an image that are no grey."""
    colours, counts = np.unique(image.reshape(-1, 3), axis=0,
                                return_counts=True)
    return colours[np.argsort(-counts * (np.ptp(colours, 1) > 60))[:most]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dir', metavar='DIR')
    parser.add_argument('--to', metavar='SHOTS')
    args = parser.parse_args()
    if not find_browser():
        raise UserError(f'playwright, or any of {", ".join(NAMES)}, is not '
                        f'there: python -m pip install playwright; on Debian '
                        f'apt-get install chromium')
    losses = {name: last_loss(log) for name, (_, log)
              in find_runs(args.dir).items() if log}
    if not losses:
        raise UserError(f'{args.dir} holds no experiment with a log')
    with (tempfile.TemporaryDirectory() as folder,
          serve(os.path.abspath(args.dir), losses) as address,
          open_page(1600, 1000 + 200 * len(losses)) as page):
        folder = args.to or folder
        os.makedirs(folder, exist_ok=True)
        check_page(page, address, losses, f'{folder}/browser.png')
        for name, place in PAGES.items() if args.to else ():
            page.goto(address + place)
            page.wait_for_timeout(10000)    # for people: nothing needs it
            page.screenshot(path=f'{folder}/{name}.png')
    print(f'TensorBoard shows {", ".join(losses)}'
          + (f'; screenshots are in {args.to}' if args.to else ''))


if __name__ == '__main__':
    run_main(main)
