"The experiments, from top to bottom with tiny parameters: what they say at full size comes from the same cells."
from pathlib import Path

import matplotlib, nbformat, pandas as pd, pytest

from ddpm_nb.diffusion import Diffusion
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


def test_samples_and_weights(pics, tmp_path):
    small = SMALL | dict(image_size=32)
    ns = run('73_samples', data_path=pics, folder=tmp_path/'b', train_steps=4, every=2, n=8, model=small)
    assert list(ns['scores'].step) == [2, 2, 4, 4] and list(ns['scores'].against) == ['train', 'val']*2
    d = load_diffusion(tmp_path/'b/pretrained')
    assert d.num_timesteps == 5 and f'{ns["held_out"]:.4f}' in (tmp_path/'b/pretrained/README.md').read_text()


@pytest.mark.parametrize('name', ['74_forward', '75_backward'])
def test_strips(name, pics, tmp_path):
    save_pretrained(Diffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=50), tmp_path/'small')
    run(name, data_path=pics, pretrained=tmp_path/'small', n=2, **(dict(n_corr=8) if name == '75_backward' else {}))


def test_ablation(pics, tmp_path):
    "Each line of the table; and a second time nothing is done again"
    net = dict(dim=8, dim_mults=(1, 2), attention='none')
    params = dict(data_path=pics, size=16, batch_size=8, net=net, steps=1, n=8, results=tmp_path/'runs'/'table.csv')
    table = run('ablation', **params)['table']
    assert len(table) == 16 and table.FD.notna().all()
    assert set(table.schedule) == {'cosine', 'linear', 'sigmoid'} and set(table['T']) == {10, 50, 200, 1000}
    again = run('ablation', **params)
    assert again['table'].FD.tolist() == table.FD.tolist() and 'images' not in again and 'learn' not in again
