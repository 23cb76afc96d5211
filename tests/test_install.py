"The package on its own: what an import brings along, and an installation with the newest of everything."
import os, subprocess, sys, venv
from pathlib import Path

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


@pytest.mark.slow
@pytest.mark.xdist_group('newest')
def test_newest_stack_logs_and_takes_fastais_calls(newest, pics, tmp_path):
    "In an environment of its own on top of the newest stack, since it installs the extras"
    venv.create(tmp_path/'venv', with_pip=True)
    base, own = (next(o.rglob('site-packages')) for o in (newest.parent, tmp_path/'venv'))
    (own/'base.pth').write_text(str(base))
    env = {k: v for k,v in os.environ.items() if not k.startswith(('WANDB', 'PYTHONPATH'))} | dict(HOME=str(tmp_path))
    def python(*args):
        r = command('python', *args, bin=tmp_path/'venv'/newest.name, cwd=tmp_path, env=env)
        assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    python('-m', 'pip', 'install', '-q', 'tensorboard', 'wandb', 'pytest')
    train = ['-c', 'from ddpm_nb.train import ddpm_train; ddpm_train()', '--data_path', pics]
    for o in ('tensorboard', 'wandb'):
        for more in (['--train_steps', 2], ['--train_steps', 4, '--resume']):
            python(*train, *TINY, '--save_and_sample_every', 2, '--logger', o, '--save_folder', o, *more)
    assert len(list((tmp_path/'wandb/wandb').glob('offline-run-*/*.wandb'))) == 2
    tests = Path(__file__).parent
    python('-m', 'pytest', '-q', '-c', os.devnull, '--rootdir', tests, tests/'test_fastai.py', tests/'test_loggers.py')
