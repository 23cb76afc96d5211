"The package on its own: what an import brings along, and an installation with the newest of everything."
import subprocess, sys

import pytest
from conftest import TINY, command


def test_sampling_needs_neither_fastai_nor_matplotlib():
    code = 'import sys, ddpm_nb.sampling, ddpm_nb.kit.files, ddpm_nb.kit.samples; ' \
           'print([m for m in ("fastai", "matplotlib", "IPython", "accelerate", "diffusers") if m in sys.modules])'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == '[]'


@pytest.mark.slow
@pytest.mark.xdist_group('newest')
def test_newest_stack_trains_samples_and_visualizes(newest, pics, tmp_path):
    extras = 'from importlib.util import find_spec; ' \
             'print([m for m in ("nbdev", "accelerate", "wandb", "tensorboard") if find_spec(m)])'
    r = command('python', '-c', extras, bin=newest, cwd=tmp_path)
    assert r.stdout.strip() == '[]'
    train = ['ddpm_train', '--data_path', pics, '--train_steps', 3, '--save_and_sample_every', 2, *TINY]
    for args in (train, ['ddpm_sample', '--n', 3], ['ddpm_visualize', '--data_path', pics, '--n_samples', 2]):
        r = command(*args, bin=newest, cwd=tmp_path)
        assert r.returncode == 0, r.stderr[-3000:]
    assert (tmp_path/'samples/00002.png').exists() and (tmp_path/'results/forward_diffusion.png').exists()
