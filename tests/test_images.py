"Image files as they come: every mode and format, and files that are none."
import io

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.data import Files, Images, UNREADABLE, decode, image_dls, to_rgb

rng = np.random.RandomState(0)
RGB = Image.fromarray(rng.randint(0, 256, (40, 40, 3), dtype=np.uint8))
GOOD = {
    'grey.png': RGB.convert('L'), 'one_bit.png': RGB.convert('1'), 'palette.png': RGB.convert('P'),
    'rgba.png': RGB.convert('RGBA'), 'grey_alpha.png': RGB.convert('LA'), 'cmyk.jpg': RGB.convert('CMYK'),
    'cmyk.tif': RGB.convert('CMYK'), 'float.tif': Image.fromarray(rng.rand(40, 40).astype(np.float32)*255),
    'deep.png': Image.fromarray(rng.randint(0, 65536, (40, 40)).astype(np.uint16)), 'wide.png': RGB.resize((90, 20)),
    'tall.jpg': RGB.resize((5, 200)), 'pixel.png': RGB.resize((1, 1)), 'web.webp': RGB, 'windows.bmp': RGB,
    'UPPER.JPG': RGB,
}


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    path = tmp_path_factory.mktemp('odd')
    for name,im in GOOD.items(): im.save(path/name)
    RGB.save(path/'moving.gif', save_all=True, append_images=[RGB.rotate(90), RGB.rotate(180)])
    RGB.convert('P').save(path/'clear.png', transparency=0)
    return path


def test_every_mode_and_size_becomes_rgb(odd):
    f = Files(odd)
    assert len(f.names) == len(GOOD) + 2
    x = Images(f, f.names, 35).x
    assert x.shape == (len(f.names), 3, 35, 35)
    flat = [n for n,o in zip(f.names, x) if o.float().std() < 5 and n not in ('pixel.png', 'float.tif')]
    assert flat == []


def test_they_train(odd):
    dls = image_dls(odd, data_class='all', batch_size=4, device='cpu')
    assert dls.one_batch()[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize('content', [b'', b'no image', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'\xff\xd8\xff\xe0' + b'\0'*50])
def test_no_image(odd, tmp_path, content):
    for i in range(3): (tmp_path/f'{i}.jpg').write_bytes((odd/'UPPER.JPG').read_bytes())
    (tmp_path/'x.jpg').write_bytes(content)
    with pytest.raises(BadInput, match=r'1 of 4 images are unreadable: x\.jpg .*\. Mend them, or choose on_bad skip'):
        Images(Files(tmp_path), Files(tmp_path).names, 35)


@pytest.mark.parametrize('name', ['grey.png', 'UPPER.JPG', 'web.webp', 'moving.gif', 'cmyk.tif'])
def test_truncated_anywhere_is_never_a_crash(odd, name):
    data = (odd/name).read_bytes()
    for n in np.linspace(1, len(data) - 1, 30).astype(int):
        try: x = decode(data[:n], 35)
        except (OSError, ValueError, SyntaxError, EOFError): continue
        assert x.shape == (3, 35, 35)


def test_camera_turn_is_followed(tmp_path):
    im = Image.new('RGB', (40, 40), 'black')
    im.paste('white', (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x112] = 3
    im.save(tmp_path/'a.png', exif=exif)
    x = decode((tmp_path/'a.png').read_bytes(), 35)
    assert x[:, 2].mean() < 50 and x[:, -3].mean() > 200


@pytest.mark.parametrize('mode', '1 L P RGB RGBA CMYK YCbCr LAB HSV LA I F'.split())
def test_every_mode_of_pillow(mode): assert to_rgb(Image.new(mode, (4, 4))).mode == 'RGB'


def test_every_mode_and_size_becomes_grey_and_oblong(odd):
    f = Files(odd)
    x, rgb = (Images(f, f.names, (20, 30), channels=c).x.float() for c in (1, 3))
    assert x.shape == (len(f.names), 1, 20, 30)
    assert (x[:, 0] - (rgb*Tensor([.299, .587, .114]).view(3, 1, 1)).sum(1)).abs().max() < 1
    deep = decode((odd/'deep.png').read_bytes(), 40, 1) # not black
    assert np.abs(deep[0] - np.asarray(Image.open(odd/'deep.png'))/257).max() <= 1
    assert (decode(png(RGB.convert('L')), 40, 1)[0] == np.asarray(RGB.convert('L'))).all()


def test_a_large_oblong_jpeg_that_the_camera_turned():
    x = Image.fromarray(rng.randint(0, 256, (4, 8, 3), dtype=np.uint8)).resize((2000, 1000), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x112] = 6 # to be turned by 90° to the right
    x.save(f := io.BytesIO(), 'jpeg', quality=95, exif=exif)
    want = np.asarray(x.rotate(-90, expand=True).resize((50, 100), Image.Resampling.BILINEAR), float)
    got = decode(f.getvalue(), (100, 50))
    assert got.shape == (3, 100, 50) and np.abs(got.transpose(1, 2, 0) - want).mean() < 3


def png(im, kind='png'):
    im.save(b := io.BytesIO(), kind)
    return b.getvalue()


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_small_file_of_a_huge_picture_and_another_program_s_format():
    huge = png(Image.new('1', (10_000, 9_000)))
    assert len(huge) < 20_000
    with pytest.raises(ValueError, match='10000×9000 pixels, more than 89478485'): decode(huge, 35)
    with pytest.raises(UNREADABLE): decode(png(Image.new('1', (20_000, 20_000))), 35)
    with pytest.raises(Image.UnidentifiedImageError): decode(png(Image.new('RGB', (8, 8)), 'eps'), 35)


def test_the_longer_ends_are_cut_and_nothing_is_squeezed():
    x = np.zeros((30, 90, 3), np.uint8)
    x[:, 30:60] = 255
    assert (decode(png(Image.fromarray(x)), 30) == 255).all()
    assert (decode(png(Image.fromarray(x.transpose(1, 0, 2))), 30) == 255).all()


def test_shrinking_averages():
    board = np.indices((140, 140)).sum(0) % 2*255
    x = decode(png(Image.fromarray(board.astype(np.uint8))), 35).astype(int)
    assert abs(x[:, 2:-2, 2:-2] - 127.5).max() < 10


def grey(x): return Image.fromarray(np.asarray(x))


@pytest.mark.parametrize('deep, top', [
    (rng.rand(8, 8).astype(np.float32), 1), (rng.rand(8, 8).astype(np.float32)*255, 255),
    (rng.randint(0, 256, (8, 8)).astype(np.int32), 255), (rng.randint(0, 1024, (8, 8)).astype(np.uint16), 1023),
    (rng.randint(0, 4096, (8, 8)).astype(np.uint16), 4095), (rng.randint(0, 16384, (8, 8)).astype(np.int32), 16383),
    (rng.randint(0, 65536, (8, 8)).astype(np.int32), 65535), (rng.rand(8, 8).astype(np.float32)*65535, 65535)])
@pytest.mark.parametrize('ext', ['tiff', 'png'])
def test_deep_pictures_keep_their_brightness(deep, top, ext):
    if ext == 'png' and deep.dtype != np.uint16: pytest.skip('no such PNG')
    deep[0, 0] = top
    f = io.BytesIO()
    grey(deep).save(f, ext)
    got = decode(f.getvalue(), 8).astype(float)
    assert np.abs(got - deep*(255/top)).max() <= 1


@pytest.mark.parametrize('values', [[-1., 1.], [0., 1e9], [np.nan, 1.], [0., np.inf]])
def test_values_that_are_no_picture_are_refused(values):
    f = io.BytesIO()
    grey(np.tile(np.float32(values), (8, 4))).save(f, 'tiff')
    with pytest.raises(UNREADABLE, match='values from'): decode(f.getvalue(), 8)


def test_a_large_jpeg_looks_the_same_unpacked_small():
    x = np.asarray(RGB.resize((3000, 2000), Image.Resampling.BICUBIC))
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(x).save(jpeg, 'jpeg', quality=95); Image.fromarray(x).save(png, 'png')
    assert np.abs(decode(jpeg.getvalue(), 35).astype(float) - decode(png.getvalue(), 35)).mean() < 3


@pytest.mark.parametrize('ext', ['avif', 'heic'])
def test_pictures_of_phones(tmp_path, ext):
    if ext == 'heic': pytest.importorskip('pillow_heif')
    smooth = RGB.resize((4, 4)).resize((40, 40), Image.Resampling.BICUBIC)
    smooth.save(tmp_path/f'a.{ext}', quality=95)
    smooth.save(tmp_path/'a.png')
    a, b = Images(Files(tmp_path), [f'a.{ext}', 'a.png'], 35).x.float()
    assert (a - b).abs().mean() < 5 < b.std()


def test_what_is_left_out_is_said(tmp_path, capsys):
    for i in range(20): RGB.save(tmp_path/f'{i}.png')
    for o in ('b.jp2', 'c.jp2', 'd.CR2', 'notes.txt', '.e.jp2'): (tmp_path/o).write_bytes(b'x')
    image_dls(tmp_path, batch_size=4, device='cpu', progress=True)
    assert '20 images: 18 to train on, 2 held out; 2 .jp2, 1 .cr2 left out\n' in capsys.readouterr().out
    alone = tmp_path/'alone'
    alone.mkdir()
    (alone/'a.jxl').write_bytes(b'x')
    with pytest.raises(BadInput, match=r"no image in '.*alone'; 1 \.jxl left out\. Give a folder"): Files(alone)
