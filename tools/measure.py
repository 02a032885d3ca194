"""What the long scripts share: timing in turns, the machine's peaks, Markdown
tables, starting a script of the project."""
import os
import subprocess
import sys
import time

import numpy as np
import torch

from utils import ROOT


# ------------------------------------------------- tables
def markdown_table(head, rows):
    """Return a Markdown table of strings, its columns aligned."""
    rows = [[cell.replace('|', r'\|') for cell in row] for row in rows]
    widths = [max(3, *map(len, column))
              for column in zip(head, *rows, strict=True)]
    lines = [head, ['-' * width for width in widths], *rows]
    return '\n'.join('| ' + ' | '.join(
        cell.ljust(width) for cell, width in zip(line, widths, strict=True)
    ) + ' |' for line in lines)


# ------------------------------------------------- scripts
def start_script(name, *words, **options):
    """Start a script of the project; options as subprocess.Popen has them."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, name), *words],
                            **options)


def finish_script(process, status=0):
    """Wait for a script that must end with this status; return its output.
    """
    out, error = process.communicate()
    assert process.returncode == status, error
    return out


# ------------------------------------------------- time
def has_bfloat16(device):
    """Tell whether the device computes in bfloat16 natively."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open('/proc/cpuinfo') as file:
            text = file.read()
    except OSError:
        return False
    return 'avx512_bf16' in text or 'amx_bf16' in text


class Stopwatch:
    """Time functions on a device.

    Args:
        device: whose work is waited for.
        rounds: how often each function of a race runs, once warm.
    """

    def __init__(self, device, rounds):
        self.device, self.rounds, self.peaks = device, rounds, {}

    def time(self, run):
        """Return the seconds of one run, the device's work included."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def race(self, title, runners, unit='ms', per=1, flop=None):
        """Time functions in turn, round after round, and print a table.

        Args:
            title: the line above the table.
            runners: {name: function}; the first is the reference.
            unit: 's' or 'ms'.
            per: items that one run handles.
            flop: FLOP that one item needs, for a column of the speed.
        Returns: {name: median seconds per item}.
        """
        for run in runners.values():
            run()                               # warm
        seconds = {name: [] for name in runners}
        for _ in range(self.rounds):
            for name, run in runners.items():
                seconds[name].append(self.time(run) / per)
        factor = {'s': 1, 'ms': 1e3}[unit]
        first = np.array(next(iter(seconds.values())))
        rows = []
        for name, taken in seconds.items():
            low, mid, high = factor * np.percentile(taken, (25, 50, 75))
            rows.append([name, f'{mid:.2f}', f'{low:.2f} .. {high:.2f}',
                         f'{np.median(first / taken):.2f}'])
            if flop:
                rows[-1].append(f'{flop / (mid / factor) / 1e9:.0f}')
        print(f'\n{title}\n')
        print(markdown_table(
            ['', unit, 'quartiles', 'speedup'] + ['GFLOP/s'] * bool(flop),
            rows), flush=True)
        return {name: float(np.median(taken))
                for name, taken in seconds.items()}

    def peak(self, dtype):
        """Return the FLOP/s of a large convolution (3x3, 512 channels) and of
        a large matrix product."""
        if dtype not in self.peaks:
            c, side = 512, 65 if self.device.type == 'cpu' else 129
            x = torch.randn(1, c, side, side, device=self.device).to(
                dtype, memory_format=torch.channels_last)
            conv = torch.nn.Conv2d(c, c, 3, 1, 1, bias=False).to(
                self.device, dtype, memory_format=torch.channels_last)
            repeats = 1 if self.device.type == 'cpu' else 20
            square = torch.randn(4096, 4096, device=self.device, dtype=dtype)

            def convolve():
                for _ in range(repeats):
                    conv(x)
            with torch.no_grad():
                seconds = [(self.time(convolve) / repeats,
                            self.time(lambda: square @ square))
                           for _ in range(6)][1:]
            conv_s, square_s = np.min(seconds, 0)
            self.peaks[dtype] = (2 * 9 * c * c * side * side / conv_s,
                                 2 * 4096 ** 3 / square_s)
            print('\npeak, {}: convolution {:.0f} GFLOP/s, matrix product '
                  '{:.0f}'.format(str(dtype)[6:], *(
                      speed / 1e9 for speed in self.peaks[dtype])))
        return self.peaks[dtype]
