import os, subprocess, sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1') # two workers, two cores

import pytest

from ddpm_nb.faces import write_faces

TINY = '--image_size 16 --batch_size 8 --unet_dim 8 --unet_dim_mults 1,2 --time_steps 5 --n_samples 4 --device cpu'.split()


@pytest.fixture(scope='session')
def pics(tmp_path_factory):
    "A small folder of faces in AFHQ's layout"
    path = tmp_path_factory.mktemp('pics')
    for d in ('cat', 'dog'): write_faces(path, d, n_train=40, n_val=8)
    return path


def command(name, *args, cwd=None, bin=Path(sys.executable).parent, env=None):
    "Run a command of the package as a user would, in a process of its own"
    return subprocess.run([str(Path(bin)/name), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture
def call(tmp_path): return lambda name, *args, **kwargs: command(name, *args, cwd=tmp_path, **kwargs)
