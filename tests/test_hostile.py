"""Files and arguments from strangers, made up by hypothesis: refused in one line, or taken, and nothing in between.

More cases than the default: `CASES=5 pytest tests/test_hostile.py` makes five times as many.
"""
import copy, io, math, os, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from ddpm_nb import train
from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.commands import ints
from ddpm_nb.kit.data import UNREADABLE, decode, image_dls
from ddpm_nb.kit.faces import write_faces
from ddpm_nb.kit.files import config_of, load_diffusion, read_checkpoint, save_diffusion, save_pretrained
from ddpm_nb.kit.processes import seed_everything
from ddpm_nb.unet import Unet

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

def cases(n):
    return settings(max_examples=n*int(os.environ.get('CASES', 1)), deadline=5000, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))

def one_line(e):
    assert isinstance(e, BadInput) and '\n' not in str(e) and len(str(e)) < 2000
    return str(e)

def left(path): return sorted(p.relative_to(path).as_posix() for p in path.rglob('*'))

# Bytes that were once a good file: some changed, some cut off, some put in

change = st.tuples(st.sampled_from(['set', 'cut', 'put', 'end']), st.floats(0, 1, exclude_max=True),
                   st.binary(min_size=1, max_size=12))
changes = st.lists(change, min_size=1, max_size=6)

def changed(data, todo):
    data = bytearray(data)
    for how, where, new in todo:
        i = int(where*len(data))
        if how == 'set': data[i:i+len(new)] = new
        elif how == 'cut': del data[i:i+len(new)]
        elif how == 'put': data[i:i] = new
        else: del data[i:]
    return bytes(data)

# Images

def images():
    im, res = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 20, 3), dtype=np.uint8)), {}
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(24, 20)*137)
    for o in 'png RGB, jpeg RGB, gif P, bmp L, tiff CMYK, webp RGB, png I;16'.split(', '):
        (kind, mode), b = o.split(), io.BytesIO()
        (deep if mode == 'I;16' else im.convert(mode)).save(b, kind)
        res[kind + mode] = b.getvalue()
    return res
GOOD = images()

@cases(700)
@given(st.sampled_from(sorted(GOOD)), changes)
def test_images(kind, todo):
    try: x = decode(changed(GOOD[kind], todo), 35)
    except UNREADABLE: return
    assert x.shape == (3, 35, 35) and x.dtype == np.uint8

# Zips

NAMES = ['a.jpg', '/a.jpg', '../a.jpg', 'train/cat/../../../a.jpg', 'C:\\a.jpg', '..\\a.jpg', 'train//cat/a.jpg',
         './a.jpg', 'a.jpg/', 'con.jpg', '~/a.jpg', '\u202ea.jpg', '.a.jpg']
names = st.one_of(st.sampled_from(NAMES), st.text(max_size=12).map(lambda s: s + '.png'))

def make_zip(entries):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z:
        for n, data, link in entries:
            i = zipfile.ZipInfo(n or 'x')
            i.external_attr = (0o120777 if link else 0o100644) << 16
            z.writestr(i, data)
    return b.getvalue()

contents = st.one_of(st.sampled_from(list(GOOD.values())), st.binary(max_size=40))
entries = st.lists(st.tuples(names, contents, st.booleans()), max_size=6)

@cases(300)
@given(entries, st.one_of(st.just([]), changes))
def test_zips(tmp_path_factory, es, todo):
    root = tmp_path_factory.mktemp('zip')
    (root/'in').mkdir()
    try: data = changed(make_zip(es), todo) if todo else make_zip(es)
    except (ValueError, UnicodeEncodeError): return # a name that no zip can hold
    (root/'in/a.zip').write_bytes(data)
    try: image_dls(root/'in/a.zip', 16, 2, 'all', device='cpu')[0]
    except BadInput as e: one_line(e)
    assert left(root) == ['in', 'in/a.zip']

# Checkpoints

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    seed_everything(0)
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    path = tmp_path_factory.mktemp('model')/'model.pt'
    save_diffusion(d, path, 3, d)
    return d, path

@cases(400)
@given(changes)
def test_checkpoints_of_changed_bytes(model, todo):
    d, path = model
    bad = path.with_name('bad.pt')
    bad.write_bytes(changed(path.read_bytes(), todo))
    try: assert config_of(load_diffusion(bad, 'cpu')) == config_of(d)
    except BadInput as e: assert one_line(e).startswith(str(bad))

@pytest.fixture(scope='module')
def whole(model): return read_checkpoint(model[1])

def copied(o):
    "Dictionaries in dictionaries, all of them new; the tensors in them are only replaced"
    if not isinstance(o, dict): return o
    new = copy.copy(o)
    new.update({k: copied(v) for k,v in o.items()})
    return new

values = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5), st.just([]),
                   st.just({}), *map(st.just, (torch.zeros(3), torch.full((2,), math.nan), torch.tensor(10**12))))

@cases(400)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), values), min_size=1, max_size=3))
def test_checkpoints_of_changed_content(model, whole, todo):
    path, ckpt = model[1], copied(whole)
    for i, drop, v in todo: # one of the places in the nested dictionaries is dropped or gets another value
        spots, at = [], [ckpt]
        while at:
            o = at.pop()
            spots += [(o, k) for k in o]
            at += [v for v in o.values() if isinstance(v, dict)]
        if not spots: break
        o, k = spots[i % len(spots)]
        if drop: del o[k]
        else: o[k] = v
    bad = path.with_name('bad2.pt')
    torch.save(ckpt, bad)
    try: new = load_diffusion(bad, 'cpu')
    except BadInput as e: one_line(e)
    else: assert all(v.isfinite().all() for v in new.state_dict().values())

@cases(300)
@given(st.sampled_from(['config.json', 'model.safetensors']), changes)
def test_pretrained_of_changed_bytes(model, name, todo):
    d, path = model
    folder = path.with_name('pretrained')
    if not folder.exists(): save_pretrained(d, folder)
    whole = (folder/name).read_bytes()
    (folder/name).write_bytes(changed(whole, todo))
    try: new = load_diffusion(folder, 'cpu')
    except BadInput as e: one_line(e)
    else: assert all(v.isfinite().all() for v in new.state_dict().values())
    finally: (folder/name).write_bytes(whole)

class Evil:
    def __reduce__(self): return os.system, ('touch evil',)

@pytest.mark.parametrize('where', ['all', 'step', 'config', 'model'])
def test_no_code_of_a_checkpoint_runs(model, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil() if where == 'all' else dict(read_checkpoint(model[1])) | {where: Evil()}, 'bad.pt')
    for f in (load_diffusion, lambda p: train.train_diffusion(5, load_path=p, data_path=tmp_path, device='cpu')):
        with pytest.raises(BadInput, match='no checkpoint'): f('bad.pt')
    assert left(tmp_path) == ['bad.pt']

def test_a_packed_checkpoint_is_refused_unread(model, tmp_path):
    with zipfile.ZipFile(model[1]) as a, zipfile.ZipFile(tmp_path/'bomb.pt', 'w', zipfile.ZIP_DEFLATED) as b:
        for i in a.infolist(): b.writestr(i.filename, bytes(2**24) if i.filename.endswith('/data/0') else a.read(i))
    with pytest.raises(BadInput, match='it holds more than its size'): read_checkpoint(tmp_path/'bomb.pt')

# Arguments

anything = st.one_of(st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=6),
                     st.lists(st.integers(-1, 99), max_size=3))
ARGS = """train_steps save_and_sample_every save_folder data_path load_path resume unet_dim_mults image_size batch_size
    data_class time_steps unet_dim attention learning_rate dataloader_workers seed n_samples fid_samples precision
    on_bad keep_checkpoints nonfinite logger device""".split()

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp('args')
    write_faces(path/'pics', 'cat', n_train=8, n_val=2)
    return path

@cases(400)
@given(st.dictionaries(st.sampled_from(ARGS), anything, min_size=1, max_size=3))
def test_arguments(small, args):
    "Refused in one line with nothing written, or taken to the point where training would begin"
    good = dict(train_steps=2, save_folder=small/'run', data_path=small/'pics', unet_dim=8, unet_dim_mults=(1, 2),
                image_size=8, batch_size=4, time_steps=3, device='cpu')
    if isinstance(args.get('save_folder'), str):
        args['save_folder'] = small/'runs'/args['save_folder'].replace('\0', '').replace('..', '')
    try: mults = ints(args.get('unet_dim_mults', 1))
    except (BadInput, TypeError): mults = ()
    sizes = [args.get(k) for k in ('unet_dim', 'image_size', 'time_steps')] + [8*m for m in mults if isinstance(m, int)]
    big = any(isinstance(v, (int, float)) and v > 64 for v in sizes)
    if big: return # such a network may well be wanted, and takes its time and memory
    before = left(small)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(small)
        m.setattr(train, 'run', lambda c, dls, model, folder, *rest: 'ready')
        m.setattr('ddpm_nb.kit.faces.builtin_faces', lambda *args: small/'pics') # their painting takes seconds
        try: assert train.train_diffusion(**(good | args)) == 'ready'
        except BadInput as e:
            assert any(k in one_line(e) for k in (*args, 'dim', 'init_dim', 'model.pt', 'timesteps'))
            assert left(small) == before
        finally:
            assert {p.name for p in small.iterdir()} <= {'pics', 'run', 'runs'}
