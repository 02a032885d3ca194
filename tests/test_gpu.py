"""Do the checks of tools/gpu_check.py hold on this machine's GPU, at a small
size? Skipped without one.

    python -m pytest tests/test_gpu.py
"""
import subprocess
import sys

import pytest

from conftest import N_GPUS, REPO, WITH_GPUS


@pytest.mark.skipif(not N_GPUS, reason='no GPU')
@pytest.mark.parametrize('section', (
    'float32', 'low_precision', 'overflow', 'sync', 'devices', 'deterministic',
    'train', 'evaluation',
    pytest.param('compiled_float32', marks=pytest.mark.long)))
def test_a_section_holds(section, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'tools.gpu_check', section, '--out',
         str(tmp_path), '--steps', '5', 'N_LAYERS=18', 'STEM=plain',
         'CROP_SIZE=129', 'BATCH_SIZE=4', 'NUM_WORKERS=1'], cwd=REPO,
        env=WITH_GPUS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
