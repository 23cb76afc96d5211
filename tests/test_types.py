"""mypy, with the settings in `pyproject.toml`. `python tests/test_types.py` says what it finds.

A checker does not see the methods that `@patch` gives to a class. It is handed a copy in which they stand in their class.
Who imports the package gets the names of these methods from annotations in the class.
"""
import ast, re, subprocess, sys, tempfile
from pathlib import Path

import pytest

top = Path(__file__).parent.parent


def patched(tree):
    "Pairs of a class of this module and a function that `@patch` adds to it"
    classes = {o.name: o for o in tree.body if isinstance(o, ast.ClassDef)}
    return [(classes[f.args.args[0].annotation.id], f) for f in tree.body if isinstance(f, ast.FunctionDef)
            and any(ast.unparse(o).startswith('patch') for o in f.decorator_list)]


def declared(cls): return {o.target.id: o for o in cls.body if isinstance(o, ast.AnnAssign) and o.value is None}


def in_classes(src):
    "The module `src` with its patched methods in their classes, and no annotations in their place"
    tree = ast.parse(src)
    for cls, f in patched(tree):
        how = ast.unparse(f.decorator_list[0])
        kind = 'property' if 'as_prop=True' in how else 'classmethod' if 'cls_method=True' in how else ''
        f.decorator_list, f.args.args[0].annotation = [ast.Name(kind)] if kind else [], None
        tree.body.remove(f)
        cls.body = [o for o in cls.body if o is not declared(cls).get(f.name)] + [f]
    return ast.unparse(ast.fix_missing_locations(tree))


def mypy(*args, cwd):
    cmd = [sys.executable, '-m', 'mypy', '--config-file', top/'pyproject.toml', '--cache-dir', top/'.mypy_cache', *args]
    r = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True)
    assert r.returncode in (0, 1), r.stderr
    return r.stdout


def check(folder, **faults):
    "mypy's word on a copy of the package in `folder`, in which pieces of modules are replaced"
    for p in (top/'ddpm_nb').rglob('*.py'):
        if p.name == '_modidx.py': continue
        src = p.read_text()
        for old, new in faults.pop(p.stem, []):
            assert old in src, old
            src = src.replace(old, new, 1)
        dst = Path(folder)/p.relative_to(top)
        dst.parent.mkdir(parents=True, exist_ok=True)
        dst.write_text(in_classes(src))
    assert not faults
    return mypy('ddpm_nb', cwd=folder)


def test_types_fit(tmp_path):
    out = check(tmp_path)
    assert out.startswith('Success'), out


def test_types_that_do_not_fit_are_seen(tmp_path):
    out = check(tmp_path,
        forward=[('sched.sqrt_alphas_cumprod', 'sched.sqrt_alpha_cumprod')], # a misspelt buffer
        diffusion=[('self.denoise(x, t)', 'self.denoise(x)'), ('self.p_sample_loop(self', 'self.p_sample_lop(self')], # of methods that @patch adds
        core=[('return int(v)', 'return str(v)')],
        sampling=[("pick_sampler(sampler, steps, eta), use_bf16", "pick_sampler(steps, sampler, eta), use_bf16")])
    for o in ('Argument 1 to "extract"', 'Missing positional argument "t"', '(?i)not callable', 'return value type .got "str", expected "int"', 'Argument 1 to "pick_sampler"'):
        assert re.search(o, out), (o, out)


USER = '''
from ddpm_nb.data import Files, Images
from ddpm_nb.diffusion import Diffusion, load_diffusion
from ddpm_nb.fid import Features, Network
from ddpm_nb.sampling import sample_images
from ddpm_nb.schedule import make_schedule
from ddpm_nb.unet import Unet

d = Diffusion(Unet(16), image_size=32, timesteps=50)
d.save('model.pt')
load_diffusion('model.pt').to('cpu').sample(4)
Diffusion.from_pretrained(device='cpu').sample(4)
print(sample_images(d, 4, sampler='ddim', steps=5).shape, d.config['unet'], make_schedule('cosine', 50).alphas_cumprod.sqrt())
x = Images(Files('photos'), ['a.png'], 32)[0]
f: Features = Network(lambda x: x.mean((2, 3)), 'means')(x)
print(f.root.shape)
'''


def test_a_program_that_uses_the_package_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv('MYPYPATH', str(top))
    (tmp_path/'right.py').write_text(USER)
    out = mypy('right.py', '--follow-imports', 'silent', cwd=tmp_path)
    assert out.startswith('Success'), out
    (tmp_path/'wrong.py').write_text(USER.replace("load_diffusion('model.pt')", 'load_diffusion()').replace('make_schedule(', 'make_schedule(7, '))
    out = mypy('wrong.py', '--follow-imports', 'silent', cwd=tmp_path)
    assert 'Missing positional argument "path"' in out and 'Argument 1 to "make_schedule"' in out, out


@pytest.mark.parametrize('name', ['data', 'diffusion', 'fid'])
def test_methods_that_come_later_are_announced_in_their_class(name):
    pairs = patched(ast.parse((top/'ddpm_nb'/f'{name}.py').read_text()))
    assert len(pairs) >= 3
    assert [(c.name, f.name) for c,f in pairs if f.name not in declared(c) and f.name != 'forward'] == []


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d: out = check(d)
    print(out)
    sys.exit(not out.startswith('Success'))
