"From a folder or a zip to the batches that training sees"
import re, shutil, tracemalloc, warnings, zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.fid import Network
from ddpm_nb.kit import data
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.data import (EXTS, MAX_BYTES, Files, ImageDL, Images, crop, eval_view, hold_out, image_dls, pick_names,
                              splits, train_view)
from ddpm_nb.kit.faces import write_faces
from ddpm_nb.kit.processes import seed_everything
from ddpm_nb.kit.samples import passes
from ddpm_nb.kit.scores import Batches
from ddpm_nb.unet import Unet


def pattern(n=1, size=35):
    "Pictures that tell their number (blue), row (red) and column (green)"
    i = torch.arange(size, dtype=torch.uint8)
    x = torch.empty(n, 3, size, size, dtype=torch.uint8)
    x[:, 0], x[:, 1], x[:, 2] = i[:, None], i, torch.arange(n, dtype=torch.uint8)[:, None, None]
    return x


def pixels(x):
    "Bytes again"
    x = (torch.as_tensor(x).as_subclass(torch.Tensor) + 1)*127.5
    assert (x - x.round()).abs().max() < 1e-3
    return x.round().long()


# Where pictures are

def zipped(path, how=zipfile.ZIP_DEFLATED, **files):
    with zipfile.ZipFile(path, 'w', how) as z:
        for k,v in files.items(): z.writestr(k + '.jpg', v)
    return path


def test_what_is_no_folder_or_zip_is_refused(tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'text.zip').write_text('no zip')
    for o,why in {'none': "'.*none' does not exist. Give a folder or a zip of images",
                  'empty': "no image in '.*empty'. Give a folder or a zip of .jpg, .jpeg, .png",
                  'text.zip': "'.*text.zip' is neither a folder nor a readable zip .*"}.items():
        with pytest.raises(BadInput, match=f'^data_path: {why}'): Files(tmp_path/o)
    for o in (None, 3, '', '\0'):
        with pytest.raises(BadInput, match='data_path must be a path'): Files(o)


def test_zips_that_swell_or_lie_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path/'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z, z.open('a.jpg', 'w') as f:
        for _ in range(MAX_BYTES//2**20 + 1): f.write(bytes(2**20))
    assert (tmp_path/'bomb.zip').stat().st_size < 2**20
    with pytest.raises(ValueError, match='more than 268435456'): Files(tmp_path/'bomb.zip').read('a.jpg')
    with pytest.raises(ValueError, match='a rare compression'):
        Files(zipped(tmp_path/'odd.zip', zipfile.ZIP_LZMA, a=bytes(100))).read('a.jpg')
    f = Files(zipped(tmp_path/'liar.zip', a=bytes(10**7)))
    f.zip.getinfo('a.jpg').file_size = 100 # as a forged directory would have it
    tracemalloc.start()
    with pytest.raises(zipfile.BadZipFile, match='CRC'): f.read('a.jpg')
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_links_are_followed_once(tmp_path):
    (tmp_path/'in').mkdir()
    (tmp_path/'in/a.jpg').write_bytes(b'x')
    (tmp_path/'in/loop').symlink_to(tmp_path)
    (tmp_path/'also').symlink_to(tmp_path/'in')
    (tmp_path/'gone.jpg').symlink_to(tmp_path/'nowhere')
    assert len(Files(tmp_path).names) == 1


def test_names_that_are_there_twice_are_read(tmp_path):
    with warnings.catch_warnings(action='ignore'), zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for o in (b'one', b'two'): z.writestr('a.jpg', o)
    f = Files(tmp_path/'a.zip')
    assert [f.read(o) for o in f.names] == [b'two', b'two']


# Splits

def test_splits():
    names = ['x/train/cat/a.jpg', 'x/train/dog/b.jpg', 'x/test/cat/c.jpg', 'x/val/cat/d.jpg', 'x/e.jpg']
    assert splits(names) == dict(train=dict(cat=names[:1], dog=names[1:2]), val=dict(cat=names[2:4]))
    for train, val in (('train', 'valid'), ('training', 'validation'), ('Train', 'Test')):
        names = [f'x/{train}/cat/a.jpg', f'x/{val}/cat/b.jpg', 'x/c.jpg']
        assert splits(names) == dict(train=dict(cat=names[:1]), val=dict(cat=names[1:2]))
    names = ['red/a.jpg', 'blue/b.jpg', 'c.jpg']
    assert splits(names)['train'] == {'red': names[:1], 'blue': names[1:2], '': names[2:]}


def test_domains_are_picked_and_refused():
    names = [f'{s}/{d}/{i}.jpg' for s in ('train', 'val') for d in ('cat', 'dog') for i in range(3)]
    assert pick_names(names, 'dog') == (names[3:6], names[9:])
    assert pick_names(names, 'all', 2) == (names[:6], names[6:8])
    with pytest.raises(BadInput, match="^data_class must be one of all, cat, dog, but is 'llama'$"):
        pick_names(names, 'llama')
    with pytest.raises(BadInput, match='only one image. Give at least two'): pick_names(['a.jpg'], 'all')


@pytest.mark.parametrize('names', [['a.jpg', 'b.jpg'], ['train/a.jpg', 'train/b.jpg', 'val/c.jpg'],
                                   ['x/train/a.jpg', 'x/train/b.jpg']])
def test_without_folders_of_domains_all_pictures_are_taken(names):
    assert pick_names(names) == pick_names(names, 'all') == pick_names(names, 'dog')
    with pytest.raises(BadInput, match="^data_class must be one of all, dog, but is 'cat'$"):
        pick_names(names + [names[0].replace('a.jpg', 'dog/d.jpg')])


@pytest.mark.parametrize('n,held', [(2, 1), (19, 1), (20, 2), (6000, 512)])
def test_a_tenth_is_held_out_and_always_the_same(n, held):
    names = [f'{i:04}.jpg' for i in range(n)]
    train, val = hold_out(names)
    assert len(val) == held and sorted(train + val) == names
    assert pick_names(names, 'all') == pick_names(names, 'all', 10**9) == (train, val)
    assert n < 20 or val != names[:held]


# Views

def test_training_view_crops_each_picture_at_its_own_place_and_flips_half():
    seed_everything(1)
    x = pixels(train_view(pattern(250), 32))
    assert x.shape == (250, 3, 32, 32)
    top, flip = x[:, 0, 0, 0], x[:, 1, 0, 0] > x[:, 1, 0, -1]
    left = torch.where(flip, x[:, 1, 0, -1], x[:, 1, 0, 0])
    want = crop(pattern(250), 32, top, left, flip)
    assert (x == want).all() and (x[:, 2, 0, 0] == torch.arange(250)).all()
    for o,k in (top, 4), (left, 4), (flip.long(), 2):
        n = torch.bincount(o, minlength=k)
        assert len(n) == k and (n - 250/k).abs().max() < 4*(250/k)**.5, n # each of the 4 places, each side
    assert len(set(zip(top.tolist(), left.tolist(), flip.tolist()))) == 32


def oblong(n=1, h=35, w=71):
    "As `pattern`, of another shape"
    x = torch.empty(n, 3, h, w, dtype=torch.uint8)
    x[:, 0], x[:, 1] = torch.arange(h, dtype=torch.uint8)[:, None], torch.arange(w, dtype=torch.uint8)
    x[:, 2] = torch.arange(n, dtype=torch.uint8)[:, None, None]
    return x


def test_views_of_oblong_pictures_reach_each_row_and_column():
    seed_everything(1)
    x = pixels(train_view(oblong(400), (32, 64)))
    assert x.shape == (400, 3, 32, 64)
    top, flip = x[:, 0, 0, 0], x[:, 1, 0, 0] > x[:, 1, 0, -1]
    left = torch.where(flip, x[:, 1, 0, -1], x[:, 1, 0, 0])
    assert (x == crop(oblong(400), (32, 64), top, left, flip)).all()
    assert len(set(zip(top.tolist(), left.tolist(), flip.tolist()))) == 4*8*2
    assert (pixels(eval_view(oblong(3), (32, 64))) == oblong(3)[..., 1:33, 3:67]).all()
    assert (pixels(eval_view(oblong(3, 71), [64, 32])) == oblong(3, 71)[..., 3:67, 19:51]).all()


def test_crop():
    x = pattern(2, 5)
    got = crop(x, 3, torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([False, True]))
    assert (got[0] == x[0, :, 0:3, 1:4]).all() and (got[1] == x[1, :, 2:5, 0:3].flip(-1)).all()


def test_evaluation_view_is_the_middle_and_nothing_else():
    x = pattern(3)
    for _ in range(2): assert (pixels(eval_view(x, 32)) == x[..., 1:33, 1:33]).all()
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    for view in (eval_view, train_view): assert view(ends, 2).unique().tolist() == [-1, 1]


# Loaders

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "40 pictures to train on and 9 to hold out, that tell their number, row and column"
    path = tmp_path_factory.mktemp('data')
    for split,n in ('train', 40), ('val', 9):
        (path/split/'cat').mkdir(parents=True)
        for i,x in enumerate(pattern(n).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(x).save(path/split/f'cat/{i:02}.png')
    return path


def test_training_sees_each_picture_augmented_and_validation_its_middle(folder):
    seed_everything(0)
    dls = image_dls(folder, batch_size=8, device='cpu')
    a, b = (torch.cat([x for x, in dls.train]) for _ in range(2))
    assert a.shape == (40, 3, 32, 32) and a.is_contiguous(memory_format=torch.channels_last)
    order = [pixels(x)[:, 2, 0, 0].tolist() for x in (a, b)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(40)) and order[0] != order[1]
    back = [pixels(x)[np.argsort(o)] for x,o in zip((a, b), order)]
    assert 20 < (back[0] != back[1]).any((1, 2, 3)).sum() # other crops in the next epoch
    v = torch.cat([x for x, in dls.valid])
    assert (pixels(v) == pattern(9)[..., 1:33, 1:33]).all()


def test_pictures_are_decoded_once_and_left_on_the_loaders(folder, monkeypatch):
    n, decode = [], data.decode
    monkeypatch.setattr(data, 'decode', lambda *a: n.append(1) or decode(*a))
    dls = image_dls(folder, batch_size=8, device='cpu')
    for dl in dls:
        for _ in range(2): list(dl)
    assert len(n) == 49
    assert isinstance(dls.train_ds, Images) and isinstance(dls.valid_ds, Images)
    assert torch.equal(dls.train_ds.x, pattern(40)) and dls.train_ds.names[3] == 'train/cat/03.png'
    assert dls.valid_ds.files is dls.train_ds.files


def test_pictures_beyond_the_limit_are_decoded_at_each_use_and_the_same(folder):
    def batches(**kwargs):
        seed_everything(3)
        return [x for dl in image_dls(folder, batch_size=8, device='cpu', **kwargs) for x, in dl]
    for a,b in zip(batches(), batches(limit=0), strict=True): assert torch.equal(a, b)


def test_an_epoch_of_any_length_and_what_is_left_of_it(folder):
    dl = image_dls(folder, batch_size=8, epoch_size=96, device='cpu').train
    counts = np.bincount(dl.get_idxs(), minlength=40) # two passes, and a part of a third
    assert len(dl) == 12 and counts.sum() == 96 and set(counts) == {2, 3}
    ds = Images(Files(folder), Files(folder).names[:10], 35)
    dl, started = ImageDL(ds, 4), []
    dl.skip, dl.on_start = 1, lambda: started.append(1)
    assert [len(x) for x, in dl] == [4, 2] and started == [1]
    assert [len(x) for x, in dl] == [4, 4, 2] and started == [1]


def test_a_folder_and_its_zip_give_the_same(folder, tmp_path):
    shutil.make_archive(tmp_path/'a', 'zip', folder)
    def first(path):
        seed_everything(0)
        return image_dls(path, batch_size=8, device='cpu').one_batch()[0]
    assert torch.equal(first(folder), first(tmp_path/'a.zip'))


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    "20 pictures of 35×71, of which 2 are held out; grey ones in a folder of their own"
    path = tmp_path_factory.mktemp('wide')
    for k in ('rgb', 'grey'): (path/k).mkdir()
    for i,x in enumerate(oblong(20).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(x).save(path/f'rgb/{i:02}.png')
        Image.fromarray(x[..., 1]).save(path/f'grey/{i:02}.png')
    return path


@pytest.mark.parametrize('size', ['32x64', (32, 64), [32, 64], '32×64'])
@pytest.mark.parametrize('limit', [2**30, 0])
def test_oblong_pictures_and_grey_ones(wide, size, limit):
    kw = dict(image_size=size, batch_size=4, device='cpu', limit=limit)
    dls, grey = image_dls(wide/'rgb', **kw), image_dls(wide/'grey', channels=1, **kw)
    assert dls.one_batch()[0].shape == (4, 3, 32, 64) and grey.one_batch()[0].shape == (4, 1, 32, 64)
    both = [pixels(o.valid.one_batch()[0]) for o in (dls, grey)]
    assert (both[0][:, 0] == oblong()[0, 0, 1:33, 3:67]).all() and (both[1][:, 0] == both[0][:, 1]).all()
    assert grey.train_ds[0][0].shape == (1, 35, 71)


def test_a_square_said_twice_and_colours_made_grey(wide):
    for o in ('32x32', (32, 32), np.int64(32)): assert image_dls(wide/'rgb', o, 4).one_batch()[0].shape[2:] == (32, 32)
    x, = image_dls(wide/'rgb', '32x64', 4, channels=1, device='cpu').valid.one_batch()
    r, g, b = oblong(20)[image_dls(wide/'rgb', '32x64', 4).valid_ds.x[:, 2, 0, 0].long(), :, 1:33, 3:67].unbind(1)
    assert (pixels(x)[:, 0] - (.299*r + .587*g + .114*b)).abs().max() < 1
    shown = image_dls(wide/'grey', 16, 4, channels=1).train.decode((x,))[0]
    assert shown.shape == (2, 3, 32, 64) and 0 <= shown.min() and (shown[:, 0] == shown[:, 2]).all()


@pytest.mark.parametrize('size, says', [
    ((32,), r'\(32,\)'), ((32, 64, 3), r'\(32, 64, 3\)'), ((0, 32), '0'), ('0x32', '0'), ((32, 2.5), '2.5'),
    ((32, True), 'True'), ('32by64', "'32by64'"), ('x64', "'x64'"), ('-32x64', "'-32x64'"), ('99999x1', '99999'),
    ('', "''")])
def test_sizes_that_are_none(wide, size, says):
    with pytest.raises(BadInput, match=f'^image_size must be a whole number.*, but is {says}$'):
        image_dls(wide/'rgb', size, 4)


@pytest.mark.parametrize('channels', [0, 2, 4, True, '1', None, 1.])
def test_channels_are_1_or_3(wide, channels, monkeypatch):
    monkeypatch.setattr(data, 'decode', lambda *a: pytest.fail('it began to decode'))
    with pytest.raises(BadInput, match=f'^channels must be .*, but is {channels!r}$'):
        image_dls(wide/'rgb', 32, 4, channels=channels)


BAD = dict(image_size=[0, 2.5, True, '32'], batch_size=[0, -1, None], n_valid=[0], epoch_size=[0, 'x'],
           data_class=['llama', 3], on_bad=['ask'], device=['abacus'])

@pytest.mark.parametrize('name,value', [(k, v) for k,vs in BAD.items() for v in vs])
def test_image_dls_refuses_at_the_door(folder, name, value, monkeypatch):
    monkeypatch.setattr(data, 'decode', lambda *a: pytest.fail('it began to decode'))
    with pytest.raises(BadInput, match=f'^{name} must be .*, but is {value!r}'): image_dls(folder, **{name: value})


def test_a_batch_of_more_than_there_are_is_refused(folder):
    with pytest.raises(BadInput, match='^batch_size must be at most 40, the number of training images, but is 41$'):
        image_dls(folder, batch_size=41, device='cpu')


def test_unreadable_pictures_are_refused_or_skipped_and_counted(folder, tmp_path, capsys):
    good = (folder/'train/cat/00.png').read_bytes()
    for name,content in {'a.png': good, 'b.png': good[:60], 'c.png': b'', 'd.jpg': b'hello', 'e.png': good}.items():
        (tmp_path/name).write_bytes(content)
    f = Files(tmp_path)
    with pytest.raises(BadInput, match=r'^data_path: 3 of 5 images are unreadable: b.png \('): Images(f, f.names, 35)
    for limit in (2**30, 0):
        x = Images(f, f.names, 35, limit, on_bad='skip')
        assert torch.equal(x[[0, 1]][0].as_subclass(torch.Tensor), pattern(1).expand(2, -1, -1, -1))
    assert Images(f, f.names, 35, on_bad='skip').names == ['a.png', 'e.png']
    assert '3 of 5 images skipped: b.png' in capsys.readouterr().err
    for o in ('a.png', 'e.png'): (tmp_path/o).unlink()
    with pytest.raises(BadInput, match='3 of 3 images are unreadable'):
        Images(Files(tmp_path), ['b.png', 'c.png', 'd.jpg'], 35, on_bad='skip')


def test_names_of_pictures():
    assert all(data.is_image_name(f'a/b{e.upper()}') for e in EXTS)
    assert not any(data.is_image_name(o) for o in ('a.txt', '.a.jpg', '.git/a.jpg', '__MACOSX/a.jpg', 'jpg'))


def test_each_bar_ends_full(pics, tmp_path, capsys):
    files = Files(pics)
    images = Images(files, files.names, 16, progress=True)
    Network(lambda x: x.mean((2, 3)), 'mean').all(Batches(images, 16, 7), 'cpu', progress=True)
    write_faces(tmp_path, 'cat', 70, 3, size=16, progress=True)
    ends = [o.split('\r')[-1] for o in capsys.readouterr().err.split('\n') if '%' in o]
    assert [re.search(r' (\d+/\d+) \[', o)[1] for o in ends] == ['96/96', '14/14', '2/2', '1/1']
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    list(passes(d, 3, size=2)) # a bar for a pass, which goes when it's over
    assert capsys.readouterr().err.split('\r')[-1].strip() == ''
