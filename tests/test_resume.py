"A run in a process of its own, interrupted or killed, and resumed: it leaves what a run leaves that was not."
import signal, subprocess, sys, time
from pathlib import Path

import pytest
from conftest import TINY, command

ARGS = ['--train_steps', 60, '--save_and_sample_every', 20, *TINY]


@pytest.fixture(scope='module')
def whole(pics, tmp_path_factory):
    path = tmp_path_factory.mktemp('whole')
    r = command('ddpm_train', '--data_path', pics, *ARGS, cwd=path)
    assert r.returncode == 0, r.stderr
    return path/'results'


@pytest.mark.parametrize('sig, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_and_resumed(whole, pics, tmp_path, sig, code):
    train = [Path(sys.executable).parent/'ddpm_train', '--data_path', pics, *map(str, ARGS)]
    p = subprocess.Popen(train, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path/'results/sample_1.png').exists() and p.poll() is None: time.sleep(.02)
    p.send_signal(sig)
    said = p.communicate(timeout=120)[1]
    assert p.returncode == code, said
    if sig != signal.SIGKILL: assert 'stopped after step' in said and '--resume' in said and 'Traceback' not in said
    r = command('ddpm_train', '--data_path', pics, *ARGS, '--resume', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for o in ('loss.csv', 'sample_2.png', 'sample_3.png'):
        assert (tmp_path/'results'/o).read_bytes() == (whole/o).read_bytes()
    assert not list((tmp_path/'results').glob('.tmp-*'))
