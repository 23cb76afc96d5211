"The package on its own: what an import brings along, and an installation with the newest of everything."
import os, re, subprocess, sys, venv
from pathlib import Path

import pytest
from conftest import TINY, command

top = Path(__file__).parent.parent


def test_sampling_needs_neither_fastai_nor_matplotlib():
    code = 'import sys, ddpm_nb.diffusion, ddpm_nb.sampling; print([m for m in ("fastai", "matplotlib", "IPython") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_modules_import_only_from_the_floors_below():
    order = [p.stem.split('_', 1)[1] for p in sorted((top/'nbs').glob('[0-9]*.ipynb'))]
    assert order[0] == 'core' and order[-1] == 'train'
    for i,m in enumerate(order):
        used = re.findall(r'^from ddpm_nb\.(\w+) import', (top/'ddpm_nb'/f'{m}.py').read_text(), re.M)
        used += re.findall(r'^from \.(\w+) import', (top/'ddpm_nb'/f'{m}.py').read_text(), re.M)
        assert used or m == 'core'
        assert [o for o in used if o not in order[:i]] == [], m


@pytest.fixture(scope='module')
def newest(tmp_path_factory):
    "The `bin` of a virtual environment that holds the package, no extras, and the newest of what it needs"
    path = tmp_path_factory.mktemp('newest')/'venv'
    venv.create(path, with_pip=True)
    bin = path/('Scripts' if os.name == 'nt' else 'bin')
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    r = subprocess.run([bin/'python', '-m', 'pip', 'install', '-q', str(top)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    return bin


def test_newest_stack_trains_samples_and_visualizes(newest, pics, tmp_path):
    r = command('python', '-c', 'import importlib.util as u; print([m for m in ("nbdev", "wandb", "tensorboard") if u.find_spec(m)])', bin=newest, cwd=tmp_path)
    assert r.stdout.strip() == '[]'
    for args in (['ddpm_train', '--data_path', pics, '--train_steps', 3, '--save_and_sample_every', 2, *TINY],
                 ['ddpm_sample', '--n', 3], ['ddpm_visualize', '--data_path', pics, '--n_samples', 2]):
        r = command(*args, bin=newest, cwd=tmp_path)
        assert r.returncode == 0, r.stderr[-3000:]
    assert (tmp_path/'samples/00002.png').exists() and (tmp_path/'results/forward_diffusion.png').exists()
