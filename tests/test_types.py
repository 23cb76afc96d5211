"mypy, with the settings in `pyproject.toml`. `python tests/test_types.py` says what it finds."
import os, re, subprocess, sys
from pathlib import Path

import pytest

top = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group('types') # checked once


def mypy(*args, cwd=top):
    cmd = [sys.executable, '-m', 'mypy', '--config-file', top/'pyproject.toml', '--cache-dir', top/'.mypy_cache', *args]
    r = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, env=os.environ | dict(MYPYPATH=str(top)))
    assert r.returncode in (0, 1), r.stderr
    return r.stdout


FAULTS = { # in a module, what stands there, what is put in its place, and what mypy says
    'forward': ('in (sched.sqrt_alphas_cumprod,', 'in (sched,', 'Argument 1 to "extract"'),
    'diffusion': ('self.p_sample_loop(self', 'self.p_sample_lop(self', '(?i:not callable)'),
    'sampling': ('ddim_times(len(sched), steps)', 'ddim_times(sched, steps)', 'Argument 1 to "ddim_times"'),
    'kit/checks': ('return int(v)', 'return str(v)', 'return value type .got "str", expected "int"'),
}
USER = '''
from ddpm_nb.diffusion import Diffusion
from ddpm_nb.fid import Features, Network
from ddpm_nb.kit.data import Files, Images
from ddpm_nb.kit.files import config_of, load_diffusion, save_diffusion
from ddpm_nb.sampling import ddim
from ddpm_nb.schedule import make_schedule
from ddpm_nb.unet import Unet

d = Diffusion(Unet(16), image_size=32, timesteps=50)
save_diffusion(d, 'model.pt')
load_diffusion('model.pt').to('cpu').sample(4)
print(d.sample(4, ddim, steps=5).shape, config_of(d)['unet'], make_schedule('cosine', 50).alphas_cumprod.sqrt())
x = Images(Files('photos'), ['a.png'], 32)[0]
f: Features = Network(lambda x: x.mean((2, 3)), 'means')(x)
print(f.root.shape)
'''


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What mypy says of the package, a copy with faults, a right and a wrong program: PyTorch takes most of its time"
    path = tmp_path_factory.mktemp('types')
    for p in (top/'ddpm_nb').rglob('*.py'):
        src, name = p.read_text(), p.relative_to(top/'ddpm_nb').with_suffix('').as_posix()
        if name in FAULTS:
            assert FAULTS[name][0] in src, name
            src = src.replace(*FAULTS[name][:2], 1)
        dest = path/'faulty'/p.relative_to(top/'ddpm_nb')
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.write_text(src)
    wrong = USER.replace("(d, 'model.pt')", '(d)').replace('make_schedule(', 'make_schedule(7, ')
    for k, src in dict(right=USER, wrong=wrong).items(): (path/f'{k}.py').write_text(src)
    out = mypy('-p', 'ddpm_nb', '-p', 'faulty', '-p', 'right', '-p', 'wrong', cwd=path)
    assert int(re.search(r'checked (\d+) source files', out)[1]) > 40, out
    return out


def test_types_fit(found):
    assert not [o for o in found.splitlines()[:-1] if not re.match('(faulty/|wrong.py)', o)], found


def test_types_that_do_not_fit_are_seen(found):
    for name, (*_, says) in FAULTS.items():
        assert re.search(rf'^faulty/{name}.py:\d+: error: .*{says}', found, re.M), found


def test_a_program_that_uses_the_package_is_checked(found):
    for says in ('Missing positional argument "path"', 'Argument 1 to "make_schedule"'):
        assert re.search(rf'^wrong.py:\d+: error: .*{says}', found, re.M), found


if __name__ == '__main__':
    out = mypy('ddpm_nb')
    print(out)
    sys.exit(not out.startswith('Success'))
