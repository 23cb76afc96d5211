"The experiments, from top to bottom with tiny parameters: what they say at full size comes from the same cells."
from pathlib import Path

import matplotlib, nbformat, pandas as pd, pytest, torch

from ddpm_nb import unet
from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit import scores
from ddpm_nb.kit.files import load_diffusion, save_pretrained
from ddpm_nb.unet import Unet

NBS = Path(__file__).parent.parent/'nbs'/'experiments'
SMALL = dict(unet_dim=8, unet_dim_mults=(1, 2), image_size=16, batch_size=8, time_steps=5, n_samples=4,
             attention='none', device='cpu')


def run(name, **params):
    "The code cells in order in one namespace; `params` take the place of what the cell of parameters says"
    cells = [c.source for c in nbformat.read(NBS/f'{name}.ipynb', 4).cells if c.cell_type == 'code']
    cells, ns = [o for o in cells if 'eval: false' not in o], {}
    assert all(o.startswith('#| notest') for o in cells), 'nbdev_test leaves the experiments out by this flag'
    assert sum('\n# parameters\n' in o for o in cells) == 1
    for src in cells:
        exec(src, ns)
        if '\n# parameters\n' in src:
            assert params.keys() <= ns.keys()
            ns.update(params)
    return ns


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use('Agg')


@pytest.fixture
def colours(monkeypatch):
    "The colours of a grid for features: a table of many scores is made in the same way, and costs less"
    def grid(x): return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)/255
    monkeypatch.setitem(scores.NETWORKS, 'efficientnet-lite0', lambda: scores.Network(grid, 'colours', key=''))


def test_loss_and_score(pics, tmp_path):
    "The run of 7.1 is there already when 7.2 comes, and is not done again; one without scores is"
    params = dict(data_path=pics, folder=tmp_path/'a', every=2, model=SMALL)
    fd = run('72_fd', **params, train_steps=3, fid_samples=8)
    assert list(pd.read_csv('72_fd.csv').step) == [2, 3] and fd['scores'].floor.notna().all()
    was = (tmp_path/'a/model.pt').stat().st_mtime_ns
    ns = run('71_loss', **params, train_steps=3)
    assert (tmp_path/'a/model.pt').stat().st_mtime_ns == was and len(pd.read_csv('71_loss.csv')) == 3
    assert len(ns['grids']) == 2 and [s for s,_ in ns['held']] == [2, 3]
    run('71_loss', **params, train_steps=5) # goes on
    assert len(pd.read_csv('71_loss.csv')) == 5


def test_samples(pics, tmp_path):
    "After ten times the steps, beside the run of 7.1 and photographs"
    small = SMALL | dict(image_size=32)
    run('71_loss', data_path=pics, folder=tmp_path/'a', train_steps=2, every=2, model=small)
    ns = run('73_samples', data_path=pics, folder=tmp_path/'b', short=tmp_path/'a', train_steps=4, every=2, n=8,
             model=small)
    assert list(ns['scores'].images) == [o for k in ('step 2', 'step 4', 'photographs') for o in (k, k)]
    assert list(ns['scores'].against) == ['train', 'val']*3 and ns['floor'].gt(0).all()


def test_weights(pics, tmp_path, colours, monkeypatch):
    "Each candidate is trained once, here a small one; the best of those that fit gets a card with its numbers"
    monkeypatch.setattr(unet, 'Unet', lambda **net: Unet(**net | dict(dim=8, dim_mults=(1,))))
    params = dict(data_path=pics, size=8, batch_size=8, every=1, n=8, steps=2, results=tmp_path/'c', device='cpu')
    ns = run('weights', **params, only=['the assignment', 'without attention'])
    assert list(ns['table'].candidate) == ['the assignment', 'without attention']
    assert ns['table'].steps.tolist() == [2, 2]
    assert {'samples.jpg', 'card.png'} <= {o.name for o in (tmp_path/'c').iterdir()}
    card = (tmp_path/'c'/ns['best'].candidate/'README.md').read_text()
    assert f'{ns["best"].held_out:.4f}' in card and 'cc-by-nc-4.0' in card
    assert load_diffusion(tmp_path/'c'/ns['best'].candidate).num_timesteps == 50
    was = (tmp_path/'c'/'the assignment'/'model.safetensors').read_bytes()
    again = run('weights', **params, only=['the assignment'])
    assert again['table'].FD.tolist() == ns['table'].FD.tolist()
    assert (tmp_path/'c'/'the assignment'/'model.safetensors').read_bytes() == was


@pytest.mark.parametrize('name', ['74_forward', '75_backward'])
def test_strips(name, pics, tmp_path):
    save_pretrained(Diffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=50), tmp_path/'small')
    run(name, data_path=pics, pretrained=tmp_path/'small', n=2, **(dict(n_corr=8) if name == '75_backward' else {}))


def test_ablation(pics, tmp_path, colours):
    "Each line of the table from each seed; and a second time nothing is done again"
    net = dict(dim=8, dim_mults=(1,))
    params = dict(data_path=pics, size=8, batch_size=8, net=net, steps=1, n=8, seeds=(0, 1), results=tmp_path/'runs')
    only = [(k, s) for k in ("the assignment's", 'T=10', 'L2') for s in (0, 1)]
    only += [(k, 0) for k in ('T=200', 'linear schedule', 'no attention')]
    table = run('ablation', **params, only=only)['table']
    assert list(table.seeds) == [2]*7 + [2, 1, 1, 1, 1, 2, 1] and table.FD.notna().all()
    assert table['Δ FD error'].notna().sum() == 8 and table['Δ held_out'].notna().sum() == 2
    assert (table['FD tells'] == '✓').equals(table['Δ FD'].abs() > 2*table['Δ FD error'])
    again = run('ablation', **params, only=only)
    assert again['table'].FD.tolist() == table.FD.tolist() and 'learn' not in again


def test_copies(pics, tmp_path):
    "A model's samples and the held-out pictures, each with its nearest training picture, in pixels and in features"
    torch.manual_seed(0)
    save_pretrained(Diffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=5), tmp_path/'small')
    ns = run('copies', data_path=pics, pretrained=tmp_path/'small', n=8, shown=3, device='cpu')
    assert len(ns['samples']) == len(ns['held']) == 8 and len(ns['train']) == 80
    assert list(ns['table'].distance) == ['pixels']*2 + ['features']*2
    copied = dict(ns['pixels'], held=ns['train'][:5].flatten(1))
    assert ns['nearest'](copied, 'held').values.max() < .02 < ns['table'].least.min() # cdist rounds to a hundredth
