"The painter: one endless series of pictures, the same everywhere, and files that are complete or not there"
import hashlib, os, threading

import pytest
import torch
from PIL import Image

from ddpm_nb.kit import faces as module
from ddpm_nb.kit.checks import BadInput, CannotWrite
from ddpm_nb.kit.faces import DOMAINS, builtin_faces, complete_folder, faces, write_faces


MEANS = dict(cat=[132.2, 141.5, 139.9, 142.4, 103.4, 132.9, 112.5, 145.6],
             dog=[136.6, 105.1, 142.2, 152.9, 135.6, 100.5, 153.6, 107.2],
             wild=[113.0, 108.1, 121.0, 164.4, 136.8, 168.3, 116.3, 136.2])


def files(path): return sorted(p.relative_to(path).as_posix() for p in path.rglob('*'))


def test_a_picture_depends_on_its_domain_seed_and_number_alone():
    some = faces('wild', 12)
    assert torch.equal(faces('wild', 5, start=7, bs=2), some[7:])
    all = [o for s in (2024, 1) for d in DOMAINS for o in faces(d, 4, s)]
    assert len({hashlib.md5(o.numpy().tobytes()).digest() for o in all}) == 24
    assert some.shape == (12, 3, 64, 64) and some.dtype == torch.uint8
    assert faces('cat', 1, size=16).shape == (1, 3, 16, 16)


def test_the_series_is_the_one_of_before():
    "Means written down for version 1 of the default data; a digit's difference may be another platform's"
    for d,want in MEANS.items():
        assert faces(d, 8).float().mean((1, 2, 3)).tolist() == pytest.approx(want, abs=.2)


def test_refusals():
    for f,name,all in (faces, 'domain', 'cat, dog, wild'), (builtin_faces, 'data_class', 'all, cat, dog, wild'):
        for v in ('llama', 3, None):
            with pytest.raises(BadInput, match=f'^{name} must be one of {all}, but is {v!r}$'): f(v, 1)
    with pytest.raises(BadInput, match='n must be a whole number'): faces('cat', 0)


def test_files_are_written_once(tmp_path):
    for _ in range(2): write_faces(tmp_path, 'dog', n_train=70, n_val=3, size=16)
    assert files(tmp_path)[:4] == ['train', 'train/dog', 'train/dog/dog_000000.jpg', 'train/dog/dog_000001.jpg']
    assert len(list(tmp_path.rglob('*.jpg'))) == 73 and (tmp_path/'val/dog/dog_000070.jpg').exists()
    im = Image.open(tmp_path/'val/dog/dog_000072.jpg')
    want = faces('dog', 1, size=16, start=72)[0].float()
    assert (torch.tensor(list(im.tobytes())).view(16, 16, 3).permute(2, 0, 1) - want).abs().mean() < 8


def test_an_interrupted_split_is_not_there(tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'faces', stop)
    with pytest.raises(KeyboardInterrupt): write_faces(tmp_path, 'cat', 3, 1, size=16)
    assert files(tmp_path) == ['train']


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(BadInput, match="file/train/cat can't be written .*Choose a folder that"):
        write_faces(tmp_path/'file', 'cat', 3, 1)


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    def empty(path, d, progress): (path/'val'/d).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(module, 'write_faces', empty)
    for _ in range(2): assert builtin_faces('all') == tmp_path/'ddpm_nb/faces-v1'
    assert capsys.readouterr().out.count('painting') == 3


@pytest.mark.parametrize('env, place', [('XDG_CACHE_HOME', 'file'), ('HOME', 'file'), ('XDG_CACHE_HOME', 'file/in')])
def test_a_cache_that_cannot_be_written_has_a_name(tmp_path, monkeypatch, env, place):
    (tmp_path/'file').write_text('mine')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv(env, str(tmp_path/place))
    says = "train/cat can't be written .Not a directory.. Choose a folder that's there, .* and set XDG_CACHE_HOME to it"
    with pytest.raises(CannotWrite, match=says): builtin_faces('cat')


def test_a_cache_that_cannot_be_entered(tmp_path, monkeypatch):
    def no(self, *args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(module.Path, 'exists', no)
    with pytest.raises(CannotWrite, match='.Permission denied.*set XDG_CACHE_HOME to it'): builtin_faces('cat')


# Folders that are complete or not there

def test_a_folder_is_complete_or_not_there(tmp_path):
    to = tmp_path/'a/b'
    for stop in (KeyboardInterrupt, ValueError):
        with pytest.raises(stop), complete_folder(to) as f:
            (f/'one').write_text('1')
            raise stop
        assert files(tmp_path) == ['a']
    with complete_folder(to) as f:
        (f/'one').write_text('1')
        assert not to.exists()
    assert files(tmp_path) == ['a', 'a/b', 'a/b/one']


def test_an_empty_folder_is_filled_and_what_was_killed_is_cleared(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'.tmp-a').mkdir()
    (tmp_path/'.tmp-a/old').write_text('x')
    with complete_folder(tmp_path/'a') as f: (f/'one').write_text('1')
    assert files(tmp_path) == ['a', 'a/one']


def test_a_full_disk_is_refused_in_one_line(tmp_path):
    with pytest.raises(BadInput, match=r"a can't be written \(No space left on device\)\. Choose") as e:
        with complete_folder(tmp_path/'a'): raise OSError(28, os.strerror(28))
    assert '\n' not in str(e.value) and files(tmp_path) == []


def test_who_is_faster_wins(tmp_path):
    with complete_folder(tmp_path/'a', 1) as f, complete_folder(tmp_path/'a', 2) as g:
        (f/'one').write_text('1')
        (g/'two').write_text('2')
    assert files(tmp_path) == ['a', 'a/two']


def test_threads_of_torch_are_put_back(tmp_path):
    was = torch.get_num_threads()
    write_faces(tmp_path, 'cat', 2, 1, size=16)
    assert torch.get_num_threads() == was and threading.active_count() < 20
