"Seven modules are the diffusion of this course: they need torch and einops alone, wherever they are put."
import ast, shutil, subprocess, sys
from pathlib import Path

import pytest

SEVEN = 'schedule', 'forward', 'posterior', 'loss', 'unet', 'diffusion', 'sampling'
package = Path(__file__).parent.parent/'ddpm_nb'


@pytest.mark.parametrize('name', SEVEN)
def test_imports(name):
    "torch, einops, the standard library, and the modules before it"
    nodes = list(ast.walk(ast.parse((package/f'{name}.py').read_text())))
    far = {a.name.split('.')[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    far |= {n.module.split('.')[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    near = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level}
    assert far <= {'torch', 'einops'} | sys.stdlib_module_names
    assert near <= set(SEVEN[:SEVEN.index(name)])


def test_train_and_sample_somewhere_else(tmp_path):
    "Copied into an empty folder, they learn two grey levels and sample them, and load nothing else"
    for o in SEVEN: shutil.copy(package/f'{o}.py', tmp_path/f'{o}.py')
    (tmp_path/'__init__.py').touch()
    folder = tmp_path.name
    code = f'''
import sys
sys.path.insert(0, {str(tmp_path.parent)!r})
import torch
from {folder}.diffusion import Diffusion
from {folder}.sampling import ddim
from {folder}.unet import Unet
from {folder}.loss import bits_per_dim
torch.manual_seed(0)
d = Diffusion(Unet(8, dim_mults=(1,)), image_size=4, timesteps=20)
x_0 = torch.tensor([-.6, .6])[torch.randint(2, (32,))][:, None, None, None].expand(-1, 3, 4, 4)
before = bits_per_dim(d.denoise, d.schedule, x_0).mean()
opt = torch.optim.Adam(d.parameters(), 3e-3)
for _ in range(150):
    loss = d(x_0)
    opt.zero_grad(); loss.backward(); opt.step()
assert loss < .4 and bits_per_dim(d.denoise, d.schedule, x_0).mean() < .8*before, loss
for x in (d.sample(16), d.sample(16, sampler=ddim, steps=10)):
    means = x.mean((1, 2, 3))
    assert x.std((1, 2, 3)).mean() < .15 and means.max() - means.min() > .3, (means, x.std((1, 2, 3)))
ours = 'ddpm_nb', 'fastai', 'fastcore', 'huggingface_hub', 'matplotlib'
print(*(k for k in sys.modules if k.startswith(ours)))
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert not r.stdout.strip()


def test_times_must_be_whole_numbers():
    import torch
    from ddpm_nb.diffusion import Diffusion
    from ddpm_nb.unet import Unet
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=5)
    with pytest.raises(AssertionError, match='t must be int64 time indices, but is float32'):
        d.q_sample(torch.zeros(2, 3, 8, 8), torch.ones(2))
    with pytest.raises(ValueError, match=r'images must be of shape \(3, 8, 8\), but are of \(3, 9, 9\)'):
        d(torch.zeros(2, 3, 9, 9))
    with pytest.raises(AssertionError, match='a noise of its own'):
        d.q_sample(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), torch.zeros(3, 8, 8))
