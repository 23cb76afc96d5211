"A run in a process of its own, interrupted or killed, and resumed: it leaves what a run leaves that was not."
import os, pty, signal, sys, time

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


def test_a_terminal_that_goes_away(whole, pics, tmp_path):
    "An SSH session that drops takes its terminal with it: the run saves itself all the same"
    args = [str(o) for o in ('--data_path', pics, *ARGS)]
    pid, fd = pty.fork() # the child has a terminal of its own
    if not pid:
        os.chdir(tmp_path)
        start = 'import signal, sys, traceback; signal.signal(signal.SIGHUP, signal.SIG_DFL); ' \
                'sys.excepthook = lambda *e: open("error.txt", "w").write("".join(traceback.format_exception(*e))); ' \
                'from ddpm_nb.train import ddpm_train; ddpm_train()'
        os.execv(sys.executable, [sys.executable, '-c', start, *args])
    os.set_blocking(fd, False)
    while not (tmp_path/'results/sample_1.png').exists() and not os.waitpid(pid, os.WNOHANG)[0]:
        try: os.read(fd, 2**16)
        except BlockingIOError: pass
        time.sleep(.02)
    os.close(fd)
    code, error = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), tmp_path/'error.txt'
    assert code == 128 + signal.SIGHUP, error.exists() and error.read_text()
    r = forked('ddpm_train', '--resume', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert (tmp_path/'results/loss.csv').read_bytes() == (whole/'loss.csv').read_bytes()
