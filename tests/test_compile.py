"A compiled network: the same training to rounding, and a resume to the last bit"
import csv, os, shutil

import pytest
from conftest import TINY
from ddpm_nb.kit.files import read_checkpoint


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
def test_train_compiled_and_resume(fork, pics, tmp_path):
    env = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path/'cache'))
    def train(folder, steps, *more):
        args = ['--train_steps', steps, '--save_and_sample_every', 2, '--precision', 'fp32', *TINY]
        args += ['--unet_dim_mults', 1, '--attention', 'none', *more]
        r = fork('ddpm_train', '--data_path', pics, '--save_folder', folder, *args, env=env)
        assert r.returncode == 0, r.stderr
        return [float(o['loss']) for o in csv.DictReader((tmp_path/folder/'loss.csv').open())]
    plain, whole = train('plain', 4), train('whole', 4, '--compile')
    assert len(whole) == 4 and whole == pytest.approx(plain, abs=1e-4)
    train('part', 2, '--compile')
    assert train('part', 4, '--compile', '--resume') == whole
    a, b = (read_checkpoint(tmp_path/o/'model.pt') for o in ('whole', 'part'))
    for k in ('model', 'ema'): assert all(a[k][n].equal(b[k][n]) for n in a[k])


def test_no_compiler_is_one_line(fork, pics, tmp_path):
    env = os.environ | dict(CXX=str(tmp_path/'no-compiler'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path/'cache'))
    r = fork('ddpm_train', '--data_path', pics, '--train_steps', 1, '--compile', *TINY, env=env)
    assert r.returncode == 2 and 'Traceback' not in r.stderr, r.stderr
    assert r.stderr.splitlines()[-1].startswith('ddpm_train: compile needs a C++ compiler')
