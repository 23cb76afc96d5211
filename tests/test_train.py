"The entry points: what they refuse before anything is written, and runs that go on, longer, from damage, or elsewhere."
import inspect, json, shutil, signal
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from ddpm_nb import train
from ddpm_nb.fid import Network
from ddpm_nb.kit import files
from ddpm_nb.kit.checks import BadInput, Stopped
from ddpm_nb.kit.fast import plain
from ddpm_nb.kit.files import CannotWrite, load_diffusion, read_checkpoint, save_pretrained
from ddpm_nb.kit.plots import Pictures, read_losses
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
    (dict(image_size='16x15'), r'image_size must be a multiple of 2, but is \(16, 15\)'),
    (dict(image_size='wide'), "image_size must be a whole number, or height and width such as 32x64, but is 'wide'"),
    (dict(channels=4), 'channels must be 1 or 3, but is 4'), (dict(channels=0), 'channels must be'),
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


def test_a_run_of_wide_pictures_in_grey(pics, tmp_path):
    size, kept, channels = '16x32', [16, 32], 1
    kw = SMALL | dict(data_path=pics, save_folder=tmp_path, image_size=size, channels=channels)
    for n in (1, 2): learn = train_diffusion(n, 1, resume=n == 2, **kw)
    h, w = kept
    assert learn.ddpm.steps == 2 and learn.images.shape == (4, channels, h, w)
    conf = json.loads((tmp_path/'config.json').read_text())
    assert conf['image_size'] == kept == read_checkpoint(tmp_path/'model.pt')['config']['image_size']
    with pytest.raises(BadInput, match='the run has image_size .16, 32., not 8'):
        train_diffusion(6, 1, resume=True, **(kw | dict(image_size=8)))
    with pytest.raises(BadInput, match='the run has channels'):
        train_diffusion(6, 1, resume=True, **(kw | dict(channels=4 - channels)))
    kw = dict(load_path=tmp_path, data_path=pics, n_samples=2, device='cpu')
    figs = visualize_diffusion(save_folder=tmp_path/'figs', **kw)
    for ax in figs[0].axes: assert ax.images[0].get_array().shape == (h, w, 3)
    net = Network(lambda x: x.mean((2, 3))/255, 'colour', key='')
    s = score_samples(tmp_path, pics, n=6, network=net, device='cpu')
    assert (s.n, s.n_real) == (6, 40)


def test_a_run_from_before_there_were_channels_goes_on(again):
    conf = again['save_folder']/'config.json'
    old = {k: v for k,v in json.loads(conf.read_text()).items() if k != 'channels'}
    conf.write_text(json.dumps(old))
    assert train_diffusion(10, 3, resume=True, **again).ddpm.steps == 10
    conf.write_text(json.dumps(old))
    with pytest.raises(BadInput, match='the run has channels 3, not 1'):
        train_diffusion(12, 3, resume=True, **again, channels=1)


def test_refusals_of_going_on(again):
    path = again['save_folder']/'model.pt'
    def left(): return sorted(o.name for o in path.parent.iterdir() if o.name != '.lock')
    before = left()
    for kw, says in ((dict(resume=True), 'train_steps must be more than 9, the steps of the model, but is 9'),
                     (dict(resume=True, batch_size=4, seed=1), 'the run has batch_size 8, not 4, seed 2024, not 1. '),
                     (dict(load_path=path), 'train_steps must be more than 9'),
                     (dict(load_path=path, time_steps=6), 'the model has time_steps 5, not 6. Leave that out')):
        with pytest.raises(BadInput, match=says): train_diffusion(9, 3, **(again | kw))
    with only_run(again['save_folder']), pytest.raises(BadInput, match='a run is under way'):
        train_diffusion(12, 3, resume=True, **again)
    assert left() == before


def test_a_longer_run_than_was_planned(ran, again):
    for n in (10, 14): train_diffusion(n, 3, resume=True, **again)
    same(again['save_folder'], ran[0]/'14', 'sample_5.png')


def test_resume_alone_knows_the_rest(pics, ran, tmp_path, monkeypatch):
    "Wherever you stand, and wherever the pictures and the run have gone"
    monkeypatch.chdir(pics.parent)
    train_diffusion(9, 3, save_folder=tmp_path/'here', **ran[1] | dict(data_path=pics.name))
    shutil.copytree(tmp_path/'here', tmp_path/'there')
    monkeypatch.chdir(tmp_path)
    train_diffusion(14, resume=True, save_folder='here')
    same(tmp_path/'here', ran[0]/'14', 'sample_5.png')
    shutil.copytree(pics, tmp_path/'moved')
    train_diffusion(14, resume=True, save_folder='there/', data_path='moved')
    same(tmp_path/'there', ran[0]/'14', 'sample_5.png')
    config = json.loads((tmp_path/'there/config.json').read_text())
    assert (config['data_path'], config['batch_size'], config['train_steps']) == (str(tmp_path/'moved'), 8, 14)
    assert not config['resume'] # the same parameters again make a run of their own


def test_what_may_change_may(again):
    "A run goes on in another way; its milestones have numbers that go on"
    train_diffusion(14, 4, resume=True, precision='fp32', device=None, on_bad='skip', n_samples=1, keep_checkpoints=3,
                    logger='tensorboard', dataloader_workers=0, nonfinite='skip', unet_dim_mults='1,2',
                    save_folder=again['save_folder'])
    assert [r[0] for r in read_losses(again['save_folder']/'loss.csv') if r[2]] == [3, 6, 9, 12, 14]
    left = {o.name for o in again['save_folder'].glob('*_*.p*')}
    assert left == {f'sample_{i}.png' for i in range(1, 6)} | {'model_9.pt', 'model_12.pt'}


def stopped(m, at, *args, **kwargs):
    "A run that gets a signal in its step `at`"
    class Stop(Callback):
        def after_step(self): self.learn.checkpoint.stop = {at: signal.SIGTERM}.get(self.learn.ddpm.steps)
    with m.context() as m:
        m.setattr(train, 'logger_cbs', lambda *args: [Stop()])
        with pytest.raises(Stopped, match='--resume --save_folder .*run goes on'): train_diffusion(*args, **kwargs)


@pytest.mark.parametrize('at', [3, 4, 6]) # the last step before a milestone, and the first after it
def test_stopped_around_a_milestone(ran, tmp_path, monkeypatch, at):
    stopped(monkeypatch, at, 9, 3, save_folder=tmp_path/'run', **ran[1])
    train_diffusion(resume=True, save_folder=tmp_path/'run')
    same(tmp_path/'run', ran[0]/'9', 'loss.csv', 'sample_1.png', 'sample_2.png', 'sample_3.png')


def test_other_pictures_are_noticed(pics, ran, again, tmp_path, capsys):
    shutil.copytree(pics, tmp_path/'fewer')
    next((tmp_path/'fewer').rglob('train/cat/*.*')).unlink()
    train_diffusion(10, resume=True, save_folder=again['save_folder'], data_path=tmp_path/'fewer')
    assert 'the run had 40 images to train on, and now there are 39' in capsys.readouterr().err


def test_a_model_of_the_run_in_the_same_folder(ran, again):
    "The earlier run moves aside whole: nothing of it is lost"
    folder = again['save_folder']
    left = {o.name: o.read_bytes() for o in folder.glob('[!.]*')}
    train_diffusion(10, load_path=folder, save_folder=folder, learning_rate=1e-4, data_path=again['data_path'],
                    batch_size=8, n_samples=1, device='cpu')
    assert {o.name: o.read_bytes() for o in folder.with_name('run.1').glob('[!.]*')} == left
    assert [r[0] for r in read_losses(folder/'loss.csv')] == list(range(1, 11))


def test_other_milestones_in_the_middle_of_one(ran, tmp_path, monkeypatch):
    stopped(monkeypatch, 5, 9, 3, save_folder=tmp_path/'run', **ran[1])
    for every, steps in (2, 7), (50, 9): train_diffusion(steps, every, resume=True, save_folder=tmp_path/'run')
    rows, whole = (read_losses(o/'loss.csv') for o in (tmp_path/'run', ran[0]/'9'))
    assert [r[0] for r in rows] == list(range(1, 10)) and [r[0] for r in rows if r[2]] == [3, 6, 7, 9]
    assert [r[1] for r in rows[:6]] == [r[1] for r in whole[:6]] # the epoch that was begun
    assert {o.name for o in (tmp_path/'run').glob('sample*')} == {f'sample_{i}.png' for i in (1, 2, 3)}


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


def test_a_run_begins_with_a_model_wherever_it_is(pics, ran, tmp_path, monkeypatch):
    "The command needs no flags of its architecture"
    d = load_diffusion(ran[0]/'9', 'cpu')
    save_pretrained(d, tmp_path/'cats')
    monkeypatch.setattr(files, 'hf_hub_download', lambda name, file, **kw: {'me/cats': tmp_path/'cats'}[name]/file)
    monkeypatch.chdir(tmp_path)
    kw = dict(data_path=pics, batch_size=8, n_samples=1, device='cpu')
    for path in 'cats', 'cats/model.safetensors', 'me/cats', ran[0]/'9', ran[0]/'9/model.pt':
        steps = 10 if ran[0] in Path(path).parents else 1 # a checkpoint counts its steps
        learn = train_diffusion(steps, load_path=path, save_folder='new', learning_rate=1e-30, **kw)
        assert learn.ddpm.steps == steps and learn.diffusion.num_timesteps == 5
        want = read_checkpoint(ran[0]/'9/model.pt')['model'] if steps == 10 else d.state_dict()
        assert all(o.equal(want[k]) for k,o in plain(learn.diffusion).state_dict().items())
    with pytest.raises(BadInput, match='image_size 16, not 32, time_steps 5, not 50'):
        train_diffusion(load_path='cats', image_size=32, time_steps=50)


def test_the_package_model_becomes_one_of_your_own(pics, tmp_path):
    learn = train_diffusion(1, load_path='pretrained', data_path=pics, save_folder=tmp_path/'own', batch_size=8,
                            n_samples=1, device='cpu')
    assert sum(p.numel() for p in learn.diffusion.model.parameters()) > 2e6 and learn.ddpm.steps == 1
    config = json.loads((tmp_path/'own/config.json').read_text())
    assert (config['unet_dim'], config['unet_dim_mults'], config['attention']) == (32, [1, 2, 4], 'none')
    train_diffusion(2, resume=True, save_folder=tmp_path/'own')
    load_diffusion(tmp_path/'own', 'cpu')


def test_visualize_takes_the_parameters_of_training(ran, tmp_path):
    a, b = (inspect.signature(f).parameters for f in (train_diffusion, visualize_diffusion))
    assert set(a) == set(b) and all(b[k].default == v.default for k,v in a.items() if k != 'n_samples')
    kw = dict(load_path=ran[0]/'9', data_path=ran[1]['data_path'], n_samples=2, device='cpu')
    figs = visualize_diffusion(save_folder=tmp_path/'a', train_steps=3, unet_dim=8, logger='wandb', **kw)
    assert isinstance(figs, Pictures) and len(figs) == 2 and len(list((tmp_path/'a').glob('*_diffusion.png'))) == 2
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
