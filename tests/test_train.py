"The entry points: what they refuse before anything is written, and runs that go on, longer, from damage, or elsewhere."
import inspect, json, shutil
import pytest, torch
from fastai.callback.core import Callback
from ddpm_nb import train
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.files import CannotWrite, load_diffusion, read_checkpoint
from ddpm_nb.kit.plots import read_losses
from ddpm_nb.kit.runs import older, only_run
from ddpm_nb.kit.scores import load_samples
from ddpm_nb.train import *

SMALL = dict(unet_dim=8, unet_dim_mults=(1, 2), image_size=16, batch_size=8, time_steps=5, n_samples=4, device='cpu')


@pytest.fixture(scope='module')
def ran(pics, tmp_path_factory):
    "Runs of nine and of fourteen steps, and their parameters"
    root = tmp_path_factory.mktemp('ran')
    kw = SMALL | dict(data_path=pics)
    for n in (9, 14): train_diffusion(n, 3, save_folder=root/str(n), **kw)
    return root, kw


@pytest.fixture
def again(ran, tmp_path):
    "The parameters of a copy of the run of nine steps"
    shutil.copytree(ran[0]/'9', tmp_path/'run')
    return ran[1] | dict(save_folder=tmp_path/'run')


def same(a, b, *files):
    "Are these two runs the same, but for how held-out losses are spread over the rows?"
    c, d = (read_checkpoint(o/'model.pt') for o in (a, b))
    assert c['step'] == d['step']
    assert all(torch.equal(c[k][n], d[k][n]) for k in ('model', 'ema') for n in d[k])
    assert [r[:2] for r in read_losses(a/'loss.csv')] == [r[:2] for r in read_losses(b/'loss.csv')]
    for o in files: assert (a/o).read_bytes() == (b/o).read_bytes()


@pytest.mark.parametrize('kw, says', [
    (dict(train_steps=0), 'train_steps must be a whole number of at least 1, but is 0'),
    (dict(save_and_sample_every=-1), 'save_and_sample_every must be'),
    (dict(learning_rate=0), 'learning_rate must be a number above 0'),
    (dict(time_steps=0), 'time_steps must be'), (dict(unet_dim=12), 'dim must be a multiple of 8'),
    (dict(image_size=15), 'image_size must be a multiple of 2, but is 15'),
    (dict(attention='some'), 'attention must be one of all, none'),
    (dict(data_class='cow'), "data_class must be .*, but is 'cow'"), (dict(data_path='none'), "data_path: .*none"),
    (dict(save_folder=''), 'save_folder must be a path'),
    (dict(load_path='none.pt'), 'none.pt is not there. Give a checkpoint'),
    (dict(precision='fp64'), "precision must be auto, fp32, bf16 or fp16, but is 'fp64'"),
    (dict(n_samples=0), 'n_samples must be'),
    (dict(nonfinite='hope'), "nonfinite must be stop or skip, but is 'hope'"),
    (dict(on_bad='hope'), 'on_bad must be error or skip'),
    (dict(keep_checkpoints=0), 'keep_checkpoints must be'),
    (dict(logger='paper'), "logger must be none, tensorboard or wandb"),
    (dict(fid=True, network='vgg'), 'network must be inception or efficientnet-lite0'), (dict(seed=-1), 'seed must be'),
    (dict(fid=True, fid_samples=5), 'fid_samples must be a whole number of at least 6'),
    (dict(batch_size=41), 'batch_size must be at most 40'),
    (dict(dataloader_workers=-1), 'dataloader_workers must be'),
    (dict(unet_dim_mults='1;2'), 'unet_dim_mults must be whole numbers'),
    (dict(device='abacus'), 'device must be'), (dict(resume=True), 'model.pt is not there')])
def test_refusals_of_training(pics, tmp_path, monkeypatch, kw, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=says): train_diffusion(**(dict(train_steps=2, data_path=pics) | SMALL | kw))
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_going_on(again):
    path = again['save_folder']/'model.pt'
    def left(): return sorted(o.name for o in path.parent.iterdir() if o.name != '.lock')
    before = left()
    for kw, says in ((dict(resume=True), 'train_steps must be more than 9, the steps of the model, but is 9'),
                     (dict(resume=True, batch_size=4), 'batch_size must be 8, as in the run that you resume, but is 4'),
                     (dict(load_path=path), 'train_steps must be more than 9'),
                     (dict(load_path=path, time_steps=6), 'of timesteps 5, but must be one of timesteps 6')):
        with pytest.raises(BadInput, match=says): train_diffusion(9, 3, **(again | kw))
    with only_run(again['save_folder']), pytest.raises(BadInput, match='a run is under way'):
        train_diffusion(12, 3, resume=True, **again)
    assert left() == before


def test_a_longer_run_than_was_planned(ran, again):
    for n in (10, 14): train_diffusion(n, 3, resume=True, **again)
    same(again['save_folder'], ran[0]/'14', 'sample_5.png')


def test_a_damaged_checkpoint_and_a_lost_one(ran, again, capsys):
    path = again['save_folder']/'model.pt'
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)
    assert [o.name for o in older(path)] == ['model_6.pt']
    train_diffusion(14, 3, resume=True, **again)
    assert 'going on from' in capsys.readouterr().err
    same(path.parent, ran[0]/'14', 'sample_5.png')
    assert [read_checkpoint(o)['step'] for o in (path, *older(path))] == [14, 12]
    path.unlink()
    train_diffusion(14, 3, resume=True, **again)
    same(path.parent, ran[0]/'14', 'sample_5.png')


def test_a_folder_that_vanishes(ran, tmp_path, monkeypatch):
    "The state is saved elsewhere, and put in place it goes on to what the run would have been"
    class Vanish(Callback):
        def after_step(self):
            if self.learn.ddpm.steps == 5: shutil.rmtree(self.learn.checkpoint.path.parent)
    kw = ran[1] | dict(save_folder=tmp_path/'gone')
    with monkeypatch.context() as m:
        m.setattr(train, 'logger_cbs', lambda *args: [Vanish()])
        with pytest.raises(CannotWrite, match=r'Step 6 is saved as (\S+model\.pt)') as e: train_diffusion(9, 3, **kw)
    spare = e.value.line.split(' is saved as ')[1].split(';')[0]
    (tmp_path/'gone').mkdir()
    shutil.copy(ran[0]/'9/config.json', tmp_path/'gone')
    shutil.move(spare, tmp_path/'gone/model.pt')
    train_diffusion(9, 3, resume=True, **kw)
    same(tmp_path/'gone', ran[0]/'9', 'loss.csv', 'sample_3.png')


def test_a_run_begins_with_a_model(ran, tmp_path):
    learn = train_diffusion(11, 3, load_path=ran[0]/'9/model.pt', save_folder=tmp_path/'new', **ran[1])
    assert learn.ddpm.steps == 11 and [r[0] for r in read_losses(tmp_path/'new/loss.csv')] == list(range(1, 12))
    assert json.loads((tmp_path/'new/config.json').read_text())['load_path'] == str(ran[0]/'9/model.pt')


def test_visualize_takes_the_parameters_of_training(ran, tmp_path):
    a, b = (inspect.signature(f).parameters for f in (train_diffusion, visualize_diffusion))
    assert set(a) == set(b) and all(b[k].default == v.default for k,v in a.items() if k != 'n_samples')
    kw = dict(load_path=ran[0]/'9', data_path=ran[1]['data_path'], n_samples=2, device='cpu')
    figs = visualize_diffusion(save_folder=tmp_path/'a', train_steps=3, unet_dim=8, logger='wandb', **kw)
    assert len(figs) == 2 and len(list((tmp_path/'a').glob('*_diffusion.png'))) == 2
    with pytest.raises(TypeError, match='visualize_diffusion has no parameter n_sample'):
        visualize_diffusion(n_sample=3, **kw)
    with pytest.raises(BadInput, match='none/model.pt is not there'): visualize_diffusion(save_folder=tmp_path/'none')


@pytest.mark.parametrize('kw, says', [(dict(n=0), 'n must be'),
    (dict(sampler='ddim', steps=6), 'steps must be a whole number from 1 to 5'),
    (dict(steps=3), 'choose sampler ddim'), (dict(sampler='heun'), 'sampler must be'), (dict(seed=-1), 'seed must be'),
    (dict(load_path='none.pt'), 'none.pt is not there')])
def test_refusals_of_sampling(ran, tmp_path, monkeypatch, kw, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=says): sample_diffusion(**(dict(load_path=ran[0]/'9', device='cpu') | kw))
    assert list(tmp_path.iterdir()) == []


def test_samples_are_those_of_the_seed_and_the_average(ran, tmp_path):
    for i,seed in enumerate((3, 3, 4)): sample_diffusion(ran[0]/'9', 5, tmp_path/str(i), seed=seed, device='cpu')
    a, b, c = (load_samples(tmp_path/str(i)) for i in range(3))
    assert torch.equal(a, b) and not torch.equal(a, c)
    d = load_diffusion(ran[0]/'9/model.pt', 'cpu')
    torch.manual_seed(3)
    assert (d.sample(5)*255 - a).abs().mean() < 2 # a CPU may sample in bfloat16


@pytest.mark.parametrize('kw, says', [(dict(n=5), 'n must be a whole number of at least 6'),
    (dict(samples='none.pt'), 'none.pt is not there'),
    (dict(view='side'), 'view must be'), (dict(network='vgg'), 'network must be'),
    (dict(steps=2), 'choose sampler ddim')])
def test_refusals_of_scoring(ran, kw, says):
    with pytest.raises(BadInput, match=says): score_samples(**(dict(samples=ran[0]/'9', device='cpu') | kw))


def test_data():
    with pytest.raises(BadInput, match="what must be afhq or faces, but is 'moon'"): get_data('moon')
