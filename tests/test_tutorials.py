"The Colab and Kaggle notebooks from top to bottom, as scripts, where only the package is installed"
import ast, io, json, os, re, zipfile
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import command
from ddpm_nb.kit.plots import read_losses
from ddpm_nb.kit.scores import NETWORKS
from ddpm_nb.train import train_diffusion
from test_afhq import jpeg, make_zip, server

pytestmark = pytest.mark.xdist_group('newest') # installed once
folder = Path(__file__).parent.parent/'nbs'/'tutorials'
TINY = '''
from ddpm_nb.fid import Network
quick, first_steps, train_steps, save_and_sample_every, fid_samples = True, 2, 5, 2, 8
network = Network(lambda x: x.mean((2, 3))/255, 'mean colour', key='')
settings.update(time_steps=5, unet_dim=8, unet_dim_mults=(1, 2), image_size=16, batch_size=8)
'''
URL = '''
import functools, ddpm_nb.train
ddpm_nb.train.get_data = functools.partial(ddpm_nb.train.get_data, url={!r})
'''


def cells(name):
    "The code of a notebook's cells, but for the installation"
    nb = json.loads((folder/f'{name}.ipynb').read_text())
    return [s for c in nb['cells'] if c['cell_type'] == 'code' and '#| eval: false' not in (s := ''.join(c['source']))]


def shown(cell):
    "A cell that says what kind of thing its last expression is"
    tree = ast.parse(cell)
    if isinstance(last := tree.body[-1], ast.Expr):
        tree.body[-1] = ast.parse(f'print("shown:", type({ast.unparse(last.value)}).__name__)').body[0]
    return ast.unparse(tree)


@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')


@pytest.fixture
def tutorial(newest, tmp_path, cache):
    "Run a notebook in `tmp_path`, in which /content and /kaggle lie too; what was printed"
    def run(name, url='', path='', **params):
        src = [URL.format(url)]
        for c in cells(name):
            src.append(shown(c))
            if c.startswith('# Parameters'): src += [TINY, *(f'{k} = {v!r}' for k,v in params.items())]
        text = re.sub('/(content|kaggle)/', rf'{tmp_path}/\1/', '\n'.join(src))
        work = tmp_path/'work'
        work.mkdir(exist_ok=True)
        (work/'tutorial.py').write_text(text)
        env = os.environ | dict(PYTHONPATH=str(path), XDG_CACHE_HOME=str(cache), MPLBACKEND='agg', no_proxy='*')
        env['CUDA_VISIBLE_DEVICES'] = ''
        r = command('python', 'tutorial.py', cwd=work, bin=newest, env=env)
        assert r.returncode == 0, r.stderr[-3000:]
        return r.stdout + r.stderr
    return run


def check(out, results, n=8):
    "All is there: pictures shown, losses of each step, scores of the first part, samples"
    png, strip = ['PngImageFile'], ['Picture']
    assert re.findall('shown: (.*)', out) == ['device', 'Picture', *png*3, *strip*2, 'Score']
    assert [r[0] for r in read_losses(results/'loss.csv')] == [1, 2, 3, 4, 5]
    pictures = 'loss', 'fid', 'sample_1', 'sample_3', 'forward_diffusion', 'backward_diffusion'
    assert {f'{o}.png' for o in pictures} <= {p.name for p in results.iterdir()}
    assert len(list((results/'samples').glob('*.png'))) == n
    assert not list(results.parent.glob('results.*')) # no run was begun anew


def afhq(): return make_zip([(f'train/cat/more_{i}.jpg', jpeg(i)) for i in range(40)])


@pytest.mark.slow
def test_colab_afhq_on_drive_goes_on_after_a_cut_off(tutorial, server, tmp_path):
    server.data = afhq()
    colab = tmp_path/'modules'/'google'/'colab'
    colab.mkdir(parents=True)
    for p in (colab.parent, colab): (p/'__init__.py').touch()
    (colab/'drive.py').write_text('from pathlib import Path\ndef mount(p):\n'
                                  '    Path(p, "MyDrive").mkdir(parents=True, exist_ok=True); print("mounted", p)')
    kw = dict(url=server.url, path=colab.parents[1], data='afhq', save_folder='/content/drive/MyDrive/results')
    results = tmp_path/'content'/'drive'/'MyDrive'/'results'
    assert f'mounted {tmp_path}/content/drive' in tutorial('colab', **kw, train_steps=3)
    before = (results/'loss.csv').read_text().splitlines()
    model = results/'model.pt' # the last checkpoint is damaged, as by a copy that broke off
    model.write_bytes(model.read_bytes()[:-100])
    out = tutorial('colab', **kw)
    check(out, results)
    assert 'going on from' in out and 'steps done' in out and len(server.seen) == 1
    assert (results/'loss.csv').read_text().splitlines()[:3] == before[:3] # what was done is not done again
    assert 'steps done' not in tutorial('colab', **kw)


@pytest.mark.slow
def test_colab_faces(tutorial, tmp_path):
    out = tutorial('colab')
    check(out, tmp_path/'work'/'results')
    assert 'mounted' not in out


@pytest.mark.slow
def test_colab_uploaded_zip(tutorial, tmp_path):
    (tmp_path/'work').mkdir()
    with zipfile.ZipFile(tmp_path/'work'/'photos.zip', 'w') as z:
        for i in range(40): z.writestr(f'{i}.jpg', jpeg(i))
    out = tutorial('colab', data='photos.zip', **{'settings["data_class"]': 'all'})
    check(out, tmp_path/'work'/'results')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['zip', 'folder'])
def test_kaggle_attached(tutorial, tmp_path, kind):
    kaggle = tmp_path/'kaggle'
    for p in ('working', 'input/a_notes', 'input/cats'): (kaggle/p).mkdir(parents=True)
    with zipfile.ZipFile(kaggle/'input'/'a_notes'/'a.zip', 'w') as z: # not what is looked for
        z.writestr('notes.txt', 'no image')
    found = kaggle/'input'/'cats'/('afhq.zip' if kind == 'zip' else '')
    if kind == 'zip': found.write_bytes(afhq())
    else: zipfile.ZipFile(io.BytesIO(afhq())).extractall(found)
    results = kaggle/'working'/'results'
    check(tutorial('kaggle'), results)
    assert json.loads((results/'config.json').read_text())['data_path'] == str(found)
    if kind == 'zip': assert 'steps done' not in tutorial('kaggle')


@pytest.mark.slow
def test_kaggle_afhq(tutorial, server, tmp_path):
    server.data = afhq()
    check(tutorial('kaggle', url=server.url, data='afhq'), tmp_path/'work'/'results')
    assert (tmp_path/'kaggle'/'temp'/'afhq.zip').is_file()


@pytest.mark.slow
def test_kaggle_nothing_attached(tutorial, tmp_path, cache):
    check(tutorial('kaggle'), tmp_path/'work'/'results')
    assert str(cache) in json.loads((tmp_path/'work'/'results'/'config.json').read_text())['data_path']


@pytest.mark.parametrize('name', ['colab', 'kaggle'])
def test_parameters_are_the_assignments(name):
    def params(device):
        res = dict(best_device=lambda: SimpleNamespace(type=device), Path=Path)
        exec(next(c for c in cells(name) if c.startswith('# Parameters')), res)
        return SimpleNamespace(**res)
    p = params('cuda')
    assert not p.quick and (p.first_steps, p.train_steps, p.save_and_sample_every) == (1000, 10_000, 100)
    assert p.fid and p.fid_samples == 512
    assert p.settings == dict(data_class='cat', time_steps=50, unet_dim=16, image_size=32, batch_size=32,
                              learning_rate=1e-3)
    assert all(signature(train_diffusion).parameters[k].default == v for k,v in p.settings.items())
    assert p.network in NETWORKS and params('cpu').quick


@pytest.mark.parametrize('name', ['colab', 'kaggle'])
def test_nbdev_leaves_them_to_these_tests(name, monkeypatch):
    from nbdev.test import test_nb
    monkeypatch.setenv('IN_TEST', '1') # test_nb sets it, and leaves it set
    assert test_nb(folder/f'{name}.ipynb') == (True, 0)
    assert (folder/f'{name}.ipynb').stat().st_size < 600_000
