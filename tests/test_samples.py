"A model and a sampler by their names, and folders of samples: what is refused."
import csv, os, shutil
import pytest, torch
from PIL import Image
from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit import samples
from ddpm_nb.kit.files import only_run, png_text, save_diffusion, save_pretrained, save_png
from ddpm_nb.kit.samples import *
from ddpm_nb.kit.scores import are_images, load_samples
from ddpm_nb.unet import Unet


@pytest.mark.parametrize('args, says', [
    (('heun',), "sampler must be ancestral or ddim, but is 'heun'"),
    (('ddim', 0), 'steps must be a whole number of at least 1'),
    (('ddim', 6, 0., 5), 'steps must be a whole number from 1 to 5, but is 6'), (('ddim', 2, 1.1), 'eta must be'),
    (('ancestral', 2), 'steps must not be given with sampler ancestral, which takes all of them: choose sampler ddim')])
def test_samplers(args, says):
    with pytest.raises(BadInput, match=says): pick_sampler(*args)


def save(folder, sizes):
    folder.mkdir()
    for name, size in sizes.items(): Image.new('RGB', size).save(folder/name)
    return folder


def test_folders_of_samples(tmp_path):
    many = save(tmp_path/'many', {'0.png': (16, 16), '1.png': (20, 20)})
    says = 'of one size, but 0.png is of 16×16 pixels and 1.png of 20×20'
    with pytest.raises(BadInput, match=says): load_samples(many)
    (many/'1.png').write_bytes(b'no')
    with pytest.raises(BadInput, match="samples: 1.png can't be read .UnidentifiedImageError"): load_samples(many)
    wide = save(tmp_path/'wide', {'0.png': (16, 20)})
    assert load_samples(wide).shape == (1, 3, 20, 16)
    one = save(tmp_path/'one', {'0.png': (16, 16)})
    zipped = shutil.make_archive(tmp_path/'one', 'zip', one)
    assert are_images(zipped) and load_samples(zipped).shape == (1, 3, 16, 16)
    with pytest.raises(BadInput, match='samples must be a path'): are_images(3)


def test_a_model_is_a_file_a_runs_folder_or_a_folder_for_others(tmp_path, monkeypatch, capsys):
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    (tmp_path/'results').mkdir()
    save_diffusion(d, tmp_path/'results/model.pt')
    save_pretrained(d, tmp_path/'given')
    monkeypatch.chdir(tmp_path)
    for path in (None, 'results', 'results/model.pt', 'given'):
        assert load_model(path, 'cpu').num_timesteps == 3 and not are_images(path)
    assert capsys.readouterr().out == ''
    assert load_model('pretrained', 'cpu').num_timesteps == 50
    shutil.rmtree('results')
    assert load_model(device='cpu').num_timesteps == 50
    assert 'CC BY-NC 4.0' in capsys.readouterr().out
    with pytest.raises(BadInput, match='none.pt is not there'): load_model('none.pt', 'cpu')


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(BadInput, match="save_folder: '.*file' can't be written .File exists.. Choose a folder"):
        with written_to(tmp_path/'file'): pass


def test_passes_are_new_images(tmp_path):
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    x = list(passes(d, 5, size=2))
    assert [len(o) for o in x] == [2, 2, 1] and len(set(o.mean().item() for o in torch.cat(x))) == 5
    assert torch.cat(x).min() >= 0 and torch.cat(x).max() <= 1


# One folder, one drawing

@pytest.fixture
def draw(tmp_path, monkeypatch):
    "Draw into ./s from one of two tiny models, 'a' of three channels and 'b' of one"
    monkeypatch.chdir(tmp_path)
    for name, channels in (('a', 3), ('b', 1)):
        torch.manual_seed(channels)
        d = Diffusion(Unet(8, dim_mults=(1,), channels=channels), image_size=8, channels=channels, timesteps=3)
        save_diffusion(d, f'{name}.pt')
    return lambda n=3, model='a', to='s', **kwargs: sample_diffusion(f'{model}.pt', n, to, device='cpu', **kwargs)


def names(path): return sorted(o.name for o in path.iterdir() if not o.name.startswith('.'))
def rows(path): return list(csv.DictReader((path/'samples.csv').open(encoding='utf-8')))


def test_a_folder_says_what_drew_it(draw, tmp_path):
    draw(), draw(2, 'b', 't', sampler='ddim', steps=2, eta=.5, seed=7)
    assert names(tmp_path/'s') == ['00000.png', '00001.png', '00002.png', 'samples.csv']
    a, b = rows(tmp_path/'s'), rows(tmp_path/'t')
    assert [r['image'] for r in a] == names(tmp_path/'s')[:3]
    assert a[0] == a[0] | dict(model='a.pt', sampler='ancestral', steps='3', eta='', seed='2024')
    assert b[1] == b[1] | dict(model='b.pt', sampler='ddim', steps='2', eta='0.5', seed='7')
    assert a[0]['weights'] != b[0]['weights'] and len(a[0]['weights']) == 12
    for f in ('t.png', 't/00001.png'): # the pictures say the same
        assert png_text(tmp_path/f) == {k: v for k,v in b[0].items() if k != 'image'} | dict(Software='ddpm_nb')
    assert Image.open(tmp_path/'t/00001.png').mode == 'L' and Image.open(tmp_path/'s/00001.png').mode == 'RGB'
    shutil.copy('a.pt', 'same.pt')
    assert rows(draw(1, 'same', 'u'))[0]['weights'] == a[0]['weights']


def test_the_earlier_drawing_moves_aside(draw, tmp_path, capsys):
    draw(), draw(2, 'b'), draw(1)
    assert 's holds an earlier drawing, which is now in s.2' in capsys.readouterr().out
    assert [len(rows(tmp_path/o)) for o in ('s', 's.1', 's.2')] == [1, 3, 2]
    assert [png_text(tmp_path/f'{o}.png')['model'] for o in ('s', 's.1', 's.2')] == ['a.pt', 'a.pt', 'b.pt']
    (tmp_path/'s.3.png').touch() # a number is free if the folder's and the grid's are
    shutil.rmtree('s') # only the grid is left
    draw(1)
    assert names(tmp_path) == ['a.pt', 'b.pt', 's', 's.1', 's.1.png', 's.2', 's.2.png', 's.3.png', 's.4.png', 's.png']


def test_an_interrupted_drawing_is_known_and_not_scored(draw, tmp_path, monkeypatch):
    done = []
    def stop(f, *args, **kwargs):
        done.append(f)
        if len(done) == 4: f.write_bytes(b'half'); raise KeyboardInterrupt
        save_png(f, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(samples, 'save_png', stop)
        with pytest.raises(KeyboardInterrupt): draw(5)
    assert names(tmp_path/'s') == ['00000.png', '00001.png', 'samples.csv'] # the first of the four was the grid
    says = 's.* and its samples.csv differ in 3 images, such as 00002.png. Draw them again, or'
    with pytest.raises(BadInput, match=says): load_samples('s')
    with pytest.raises(BadInput, match=says): load_samples(shutil.make_archive('s', 'zip', 's'))
    (tmp_path/'s/.tmp-00002.png').touch() # a kill leaves it
    draw(2)
    assert load_samples('s').shape[0] == 2 and names(tmp_path/'s.1') == ['00000.png', '00001.png', 'samples.csv']
    shutil.copy('s/00000.png', 's/mine.png') # one more makes it a mix, too
    with pytest.raises(BadInput, match='differ in 1 images, such as mine.png'): load_samples('s')
    (tmp_path/'s/samples.csv').unlink()
    assert len(load_samples('s')) == 3


@pytest.mark.parametrize('f', ['s/00000.png', 's/note.txt', 's/samples.csv', 's/deep/x', 's.png', 's.png/x'])
@pytest.mark.parametrize('drawn', [False, True])
def test_what_we_did_not_write_stays(draw, tmp_path, f, drawn, monkeypatch):
    if drawn: draw(2)
    if drawn and f == 's/00000.png': return # it's ours by its name
    if drawn and f.startswith('s.png'): (tmp_path/'s.png').unlink()
    (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path/f).write_text('image\n00000.png\n')
    was = {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()}
    monkeypatch.setattr(samples, 'passes', None) # nothing is drawn
    with pytest.raises(BadInput, match="no samples.csv says that '.*s.* is ours. Choose another folder"): draw()
    assert {o: o.read_bytes() for o in tmp_path.rglob('*') if o.is_file()} == was
    assert 's.1' not in names(tmp_path)


def test_a_grid_of_a_run_is_no_grid_of_ours(draw, tmp_path):
    save_png(tmp_path/'s.png', torch.rand(4, 3, 8, 8))
    with pytest.raises(BadInput, match="s.png' is ours"): draw()


def test_folders_that_we_use(draw, tmp_path, monkeypatch):
    (tmp_path/'s').mkdir()
    (tmp_path/'s/.DS_Store').touch()
    assert len(rows(draw(2))) == 2
    with only_run(tmp_path/'s'), pytest.raises(BadInput, match="a run is under way in 's'"): draw()
    assert names(tmp_path/'s') == ['00000.png', '00001.png', 'samples.csv']
    monkeypatch.chdir(tmp_path/'s')
    with pytest.raises(BadInput, match="your current folder, '.', holds a drawing. Choose"): draw(1, '../a', '.')
    with pytest.raises(BadInput, match="says that '/.*is ours"): draw(1, '../a', '/')


def test_a_name_that_is_no_text(draw, tmp_path):
    if os.name != 'posix': pytest.skip('names are text here')
    os.rename('a.pt', 'modèle \udcff,\n.pt')
    r, = rows(draw(1, 'modèle \udcff,\n'))
    assert r['model'] == 'modèle ?,\n.pt' == png_text(tmp_path/'s/00000.png')['model']
