"mypy, with the settings in `pyproject.toml`. `python tests/test_types.py` says what it finds."
import re, subprocess, sys
from pathlib import Path

top = Path(__file__).parent.parent


def mypy(*args, cwd):
    cmd = [sys.executable, '-m', 'mypy', '--config-file', top/'pyproject.toml', '--cache-dir', top/'.mypy_cache', *args]
    r = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True)
    assert r.returncode in (0, 1), r.stderr
    return r.stdout


def test_types_fit():
    out = mypy('ddpm_nb', cwd=top)
    assert out.startswith('Success'), out


FAULTS = { # in a module, what stands there, what is put in its place, and what mypy says
    'forward': ('in (sched.sqrt_alphas_cumprod,', 'in (sched,', 'Argument 1 to "extract"'),
    'diffusion': ('self.p_sample_loop(self', 'self.p_sample_lop(self', '(?i)not callable'),
    'sampling': ('ddim_times(len(sched), steps)', 'ddim_times(sched, steps)', 'Argument 1 to "ddim_times"'),
    'kit/checks': ('return int(v)', 'return str(v)', 'return value type .got "str", expected "int"'),
}


def test_types_that_do_not_fit_are_seen(tmp_path):
    for p in (top/'ddpm_nb').rglob('*.py'):
        src, name = p.read_text(), p.relative_to(top/'ddpm_nb').with_suffix('').as_posix()
        if name in FAULTS:
            assert FAULTS[name][0] in src, name
            src = src.replace(*FAULTS[name][:2], 1)
        dest = tmp_path/p.relative_to(top)
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.write_text(src)
    out = mypy('ddpm_nb', cwd=tmp_path)
    for *_, says in FAULTS.values(): assert re.search(says, out), (says, out)


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


def test_a_program_that_uses_the_package_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv('MYPYPATH', str(top))
    (tmp_path/'right.py').write_text(USER)
    out = mypy('right.py', '--follow-imports', 'silent', cwd=tmp_path)
    assert out.startswith('Success'), out
    wrong = USER.replace("(d, 'model.pt')", '(d)').replace('make_schedule(', 'make_schedule(7, ')
    (tmp_path/'wrong.py').write_text(wrong)
    out = mypy('wrong.py', '--follow-imports', 'silent', cwd=tmp_path)
    assert 'Missing positional argument "path"' in out and 'Argument 1 to "make_schedule"' in out, out


if __name__ == '__main__':
    out = mypy('ddpm_nb', cwd=top)
    print(out)
    sys.exit(not out.startswith('Success'))
