"""Looks at TensorBoard with a real browser, Chromium without a window.

    python tests/browser.py DIR [--to SHOTS]

DIR is a folder of trained experiments, as for `sh tensorboard.sh DIR`, which
is what is looked at: the page has to show every experiment under its folder's
name, the last loss that its log.csv has, and its first picture of val, in its
colours. SHOTS is where screenshots of all that there is to see are kept. Exit
status: 0 all is there, 1 something is not, 2 no Chromium.
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
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
from PIL import Image

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
import eval         # noqa: E402
import utils        # noqa: E402

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
PAGES = {'curves': '#scalars', 'pictures': '#images', 'settings': '#text',
         'table': '#hparams'}


def find_browser():
    """Return the path of a Chromium that runs, or None."""
    for path in filter(None, map(shutil.which, NAMES)):
        done = subprocess.run([path, '--version'], capture_output=True,
                              check=False)
        if done.returncode == 0:
            return path
    return None


def browse(url, *flags):
    """Have Chromium load a page and what its scripts load; return what it
    prints. Its clock stands still while it waits for the server."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [find_browser(), '--headless', '--no-sandbox', '--disable-gpu',
             '--disable-dev-shm-usage', f'--user-data-dir={profile}',
             '--window-size=1600,1400', '--hide-scrollbars',
             '--virtual-time-budget=20000', *flags, url],
            capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError(f'Chromium failed on {url}: {done.stderr[-2000:]}')
    return done.stdout


@contextlib.contextmanager
def tensorboard(folder, names):
    """Run tensorboard.sh on a folder; give its address once it knows the
    runs of these names."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    process = subprocess.Popen(
        ['sh', os.path.join(REPO, 'tensorboard.sh'), folder, '--port',
         str(port)], env={**os.environ, 'PATH': path},
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        address, runs = f'http://localhost:{port}/', None
        for _ in range(240):
            with contextlib.suppress(OSError):
                runs = set(json.loads(fetch(f'{address}data/runs')))
            if runs == names:
                break
            time.sleep(0.5)
        if runs != names:
            raise RuntimeError(f'TensorBoard has the runs {runs}, the folders '
                               f'are {names}')
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def fetch(url):
    with urllib.request.urlopen(url) as reply:
        return reply.read()


def last_loss(log):
    with open(os.path.join(log, 'log.csv'), newline='') as file:
        return float(list(csv.DictReader(file))[-1]['loss'])


def look(address, logs, folder):
    """Raise RuntimeError unless the page of the loss and of a picture shows
    those of all logs {experiment: folder}; keep its screenshot."""
    tags = json.loads(fetch(f'{address}data/plugin/images/tags'))
    first = min(tag for tags in tags.values() for tag in tags
                if tag.startswith('Val/'))
    query = urllib.parse.urlencode({'tagFilter': f'Curves/loss|{first}$'})
    page, shot = f'{address}?{query}#timeseries', f'{folder}/browser.png'
    dom = browse(page, '--dump-dom')
    text = re.sub(r'<[^>]+>', ' ', dom)
    numbers = [float(x) for x in re.findall(r'\b\d+\.\d+\b', text)]
    for name, log in logs.items():
        loss = last_loss(log)
        if name not in text:
            raise RuntimeError(f'the page does not name {name}')
        if not any(abs(x - loss) < 1e-3 * loss for x in numbers):
            raise RuntimeError(f'the page does not show {name}\'s last loss, '
                               f'{loss:.4f}; it shows {numbers}')
    pictures = re.findall(r'<img[^>]* src="(data/plugin[^"]+)"', dom)
    if len(pictures) != len(logs):
        raise RuntimeError(f'the page has {len(pictures)} pictures {first}, '
                           f'there are {len(logs)} experiments')
    browse(page, f'--screenshot={shot}')
    with Image.open(shot) as image:
        seen = np.array(image.convert('RGB'))
    for source in pictures:
        with Image.open(io.BytesIO(fetch(address + source))) as image:
            if not all((seen == colour).all(2).sum() > 50
                       for colour in colours(np.array(image))):
                raise RuntimeError(f'{first} is not in {shot} in its colours')


def colours(picture, most=3):
    """Return the commonest colours of a picture that are no grey."""
    found, counts = np.unique(picture.reshape(-1, 3), axis=0,
                              return_counts=True)
    order = np.argsort(-counts * (np.ptp(found, 1) > 60))
    return found[order[:most]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dir', metavar='DIR')
    parser.add_argument('--to', metavar='SHOTS')
    asked = parser.parse_args()
    if not find_browser():
        raise FileNotFoundError(f'there is no {", ".join(NAMES)}; on Debian: '
                                f'apt-get install chromium')
    logs = {name: log for name, (_, log) in eval.find_runs(asked.dir).items()
            if log}
    if not logs:
        raise FileNotFoundError(f'{asked.dir} holds no experiment with a log')
    with tempfile.TemporaryDirectory() as folder, tensorboard(
            os.path.abspath(asked.dir), set(logs)) as address:
        folder = asked.to or folder
        os.makedirs(folder, exist_ok=True)
        look(address, logs, folder)
        for name, page in PAGES.items() if asked.to else ():
            browse(address + page, f'--screenshot={folder}/{name}.png')
    print(f'TensorBoard shows {", ".join(logs)}'
          + (f'; screenshots are in {asked.to}' if asked.to else ''))


if __name__ == '__main__':
    utils.launch(main)
