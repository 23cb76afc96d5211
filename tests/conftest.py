import multiprocessing, os, subprocess, sys, tempfile, venv
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('OMP_NUM_THREADS', '1') # two workers, two cores

import pytest

from ddpm_nb.kit.faces import write_faces

server = multiprocessing.get_context('forkserver') # its processes are forks of one that has only imported
server.set_forkserver_preload(['ddpm_nb.train', 'pytest'])
TINY = '--image_size 16 --batch_size 8 --unet_dim 8 --unet_dim_mults 1,2 --time_steps 5 --n_samples 4'.split()
TINY += ['--device', 'cpu']


@pytest.fixture(scope='session')
def pics(tmp_path_factory):
    "A small folder of faces in AFHQ's layout"
    path = tmp_path_factory.mktemp('pics')
    for d in ('cat', 'dog'): write_faces(path, d, n_train=40, n_val=8)
    return path


@pytest.fixture(scope='session')
def newest(tmp_path_factory):
    "The `bin` of a virtual environment that holds the package, no extras, and the newest of what it needs"
    path = tmp_path_factory.mktemp('newest')/'venv'
    venv.create(path, with_pip=True)
    bin = path/('Scripts' if os.name == 'nt' else 'bin')
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    install = [bin/'python', '-m', 'pip', 'install', '-q', str(Path(__file__).parent.parent)]
    r = subprocess.run(install, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    return bin


def command(name, *args, cwd=None, bin=Path(sys.executable).parent, env=None):
    "Run a command of the package as a user would, in a process of its own"
    args = [str(Path(bin)/name), *map(str, args)]
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


def work(name, args, cwd, env, files, first):
    from ddpm_nb import train # here it costs nothing
    for i, f in enumerate(files, 1): os.dup2(os.open(f, os.O_WRONLY), i)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, tempfile.tempdir = [name, *args], None
    first()
    getattr(train, name)()


class Fork:
    "A command of the package in a process of its own, which begins where all is imported"
    def __init__(self, name, *args, cwd, env=os.environ, first=list): # it calls `first` before all else
        self.files = [tempfile.NamedTemporaryFile('r', encoding='utf-8') for _ in range(2)]
        todo = name, [*map(str, args)], cwd, dict(env), [f.name for f in self.files], first
        self.process = server.Process(target=work, args=todo)
        self.process.start()

    def ended(self):
        "What `command` returns, once it ends"
        self.process.join(300)
        assert self.process.exitcode is not None, 'it goes on and on'
        out, err = (f.read() for f in self.files)
        return SimpleNamespace(returncode=self.process.exitcode, stdout=out, stderr=err)


def forked(*args, **kwargs): return Fork(*args, **kwargs).ended()


def ranks(n, port):
    "What a launcher writes into the environment of each of `n` processes"
    both = dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [both | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]


@pytest.fixture
def call(tmp_path): return lambda name, *args, **kwargs: command(name, *args, cwd=tmp_path, **kwargs)


@pytest.fixture
def fork(tmp_path): return lambda name, *args, **kwargs: forked(name, *args, cwd=tmp_path, **kwargs)
