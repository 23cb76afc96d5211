"A run in a process of its own, interrupted or killed, and resumed: it leaves what a run leaves that was not."
import os, signal, time

import pytest
from conftest import TINY, Fork, forked

ARGS = ['--train_steps', 30, '--save_and_sample_every', 10, *TINY]


@pytest.fixture(scope='module')
def whole(pics, tmp_path_factory):
    path = tmp_path_factory.mktemp('whole')
    r = forked('ddpm_train', '--data_path', pics, *ARGS, cwd=path)
    assert r.returncode == 0, r.stderr
    return path/'results'


@pytest.mark.parametrize('sig, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_and_resumed(whole, pics, tmp_path, sig, code):
    p = Fork('ddpm_train', '--data_path', pics, *ARGS, cwd=tmp_path)
    while not (tmp_path/'results/sample_1.png').exists() and p.process.is_alive(): time.sleep(.02)
    os.kill(p.process.pid, sig)
    r = p.ended()
    assert r.returncode == code, r.stderr
    if sig != signal.SIGKILL:
        assert 'stopped after step' in r.stderr and '--resume' in r.stderr and 'Traceback' not in r.stderr
    r = forked('ddpm_train', '--data_path', pics, *ARGS, '--resume', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for o in ('loss.csv', 'sample_2.png', 'sample_3.png'):
        assert (tmp_path/'results'/o).read_bytes() == (whole/o).read_bytes()
    assert not list((tmp_path/'results').glob('.tmp-*'))
