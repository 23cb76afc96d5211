"The AFHQ download against a hostile server on 127.0.0.1, and hostile zips"
import io, re, socket, stat, struct, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import pytest
from PIL import Image
from ddpm_nb.kit import afhq
from ddpm_nb.kit.afhq import download, get_afhq
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.data import EXTS, image_dls

FAST = dict(timeout=.8, retries=2, pause=.01)

@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv('no_proxy', '*')

def jpeg(seed=0):
    b = io.BytesIO()
    Image.effect_noise((24, 24), 40+seed).convert('RGB').save(b, 'JPEG')
    return b.getvalue()

def make_zip(extra=(), val='test', top='', deflate=True):
    "A little AFHQ, with `extra` entries `(name or ZipInfo, bytes)` added"
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w', zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as z:
        for s in ('train', val):
            for c in ('cat', 'dog', 'wild'):
                for k in range(2): z.writestr(f'{top}{s}/{c}/{c}_{k}.jpg', jpeg(k))
        for n,d in extra: z.writestr(n, d)
    return b.getvalue()

GOOD = make_zip()

class Handler(BaseHTTPRequestHandler):
    "Serves `server.data` in the manner of `server.mode`, and writes down each Range header in `server.seen`"
    def log_message(self, *a): pass

    def send(self, code, body, length=None, **h):
        self.send_response(code)
        if length != 'none': self.send_header('Content-Length', len(body) if length is None else length)
        for k,v in h.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_GET(self):
        s,rng = self.server,self.headers.get('Range')
        k = len(s.seen)
        s.seen.append(rng)
        s.ifrange.append(self.headers.get('If-Range'))
        try: getattr(self, s.mode)(s.data, int(rng[6:-1]) if rng else 0, k)
        except OSError: pass

    def part(self, d, a, **h):
        if a >= len(d): return self.send(416, b'', Content_Range=f'bytes */{len(d)}')
        if not a: return self.send(200, d, **h)
        self.send(206, d[a:], Content_Range=f'bytes {a}-{len(d)-1}/{len(d)}', **h)

    def good(self, d, a, k): self.part(d, a, ETag='"one"')
    def breaks(self, d, a, k):
        self.send(200, d[:1000], len(d), ETag='"one"') if not k else self.part(d, a, ETag='"one"')
    def always_breaks(self, d, a, k):
        self.send(206 if a else 200, d[a:a+100], len(d)-a, Content_Range=f'bytes {a}-{len(d)-1}/{len(d)}')
    def no_range(self, d, a, k): self.send(200, d[:1000] if not k else d, len(d))
    def says_too_much(self, d, a, k):
        self.send(200, d, len(d)+500) if not a else self.send(416, b'', Content_Range=f'bytes */{len(d)}')
    def says_too_little(self, d, a, k): self.send(200, d, len(d)-500)
    def endless(self, d, a, k): # chunked: no length, never ends
        self.protocol_version = 'HTTP/1.1'
        self.send(200, b'', 'none', Transfer_Encoding='chunked')
        while True: self.wfile.write(b'%x\r\n' % len(d) + d + b'\r\n')
    def endless_rest(self, d, a, k): # a part, whose length is a lie
        if not a: return self.send(200, d[:1000], len(d))
        self.protocol_version = 'HTTP/1.1'
        self.send(206, b'', 'none', Transfer_Encoding='chunked', Content_Range=f'bytes {a}-{len(d)-1}/{len(d)}')
        while True: self.wfile.write(b'%x\r\n' % len(d) + d + b'\r\n')
    def absurd(self, d, a, k): self.send(200, d, '9'*5000)
    def silent_length(self, d, a, k): self.send(200, d, 'none')
    def contradicts(self, d, a, k):
        self.send(200, d[:1000], len(d)) if not a else self.send(206, d[a:], Content_Range=f'bytes {a}-9/5')
    def wrong_place(self, d, a, k):
        self.send(200, d[:1000], len(d)) if not k else self.part(d, a//2 if k == 1 else 0)
    def changes(self, d, a, k): # the second version is sent from its start, for If-Range fails
        if not k: self.send(200, d[:1000], len(d), ETag='"one"')
        else: self.part(self.server.data2, 0 if self.headers.get('If-Range') != '"two"' else a, ETag='"two"')
    def changes_rudely(self, d, a, k): # If-Range ignored
        if not k: self.send(200, d[:1000], len(d), ETag='"one"')
        else: self.part(self.server.data2, a, ETag='"two"')
    def weak(self, d, a, k):
        h = dict(ETag='W/"one"', Last_Modified='Wed, 01 Jan 2020 00:00:00 GMT')
        self.send(200, d[:1000], len(d), **h) if not k else self.part(d, a, **h)
    def html(self, d, a, k): self.send(200, b'<!doctype html><title>Link disabled</title>', Content_Type='text/html')
    def e404(self, d, a, k): self.send(404, b'no')
    def e500(self, d, a, k): self.send(500, b'no')
    def e500_once(self, d, a, k): self.send(500, b'no') if not k else self.part(d, a)
    def stalls(self, d, a, k):
        self.send(200, d[:1000], len(d))
        self.server.stop.wait(5)
    def stalls_once(self, d, a, k): self.stalls(d, a, k) if not k else self.part(d, a)
    def drops(self, d, a, k): self.connection.shutdown(socket.SHUT_RDWR)
    def moved(self, d, a, k): self.send(302, b'', Location='/x') if self.path=='/afhq.zip' else self.part(d, a)
    def moved_to_file(self, d, a, k): self.send(302, b'', Location='file:///etc/passwd')

@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.daemon_threads,s.block_on_close = True,False
    s.mode,s.data,s.data2,s.seen,s.ifrange,s.stop = 'good',GOOD,make_zip(deflate=False),[],[],threading.Event()
    s.url = f'http://127.0.0.1:{s.server_address[1]}/afhq.zip'
    threading.Thread(target=s.serve_forever, kwargs={'poll_interval':.02}, daemon=True).start()
    yield s
    s.stop.set()
    s.shutdown()
    s.server_close()

@pytest.fixture
def home(tmp_path):
    "A folder to work in, with a guard that nothing is written outside of it"
    d = tmp_path/'in'/'home'
    d.mkdir(parents=True)
    yield d
    assert [p.name for p in tmp_path.iterdir()] == ['in'] and [p.name for p in (tmp_path/'in').iterdir()] == ['home']
    assert not Path('/evil.jpg').exists()

def names(d): return sorted(p.name for p in d.iterdir())

def refused(f, *args, says='', cls=BadInput, **kw):
    with pytest.raises(cls) as e: f(*args, **kw)
    m = str(e.value)
    assert m and '\n' not in m and '\r' not in m and len(m) < 600
    assert says in m, m
    assert re.search(r'\. [A-Z]| must ', m), m # says what to do
    return m

# The download

def get(server, home, mode, **kw):
    server.mode = mode
    return download(server.url, home/'a.zip', **{**FAST, **kw})

@pytest.mark.parametrize('mode', 'good breaks no_range weak e500_once stalls_once moved wrong_place'.split())
def test_download_arrives(server, home, mode):
    assert get(server, home, mode).read_bytes() == GOOD
    assert names(home) == ['a.zip']

def test_resume_asks_only_for_the_rest(server, home):
    get(server, home, 'breaks')
    assert server.seen == [None, 'bytes=1000-'] and server.ifrange == [None, '"one"']

def test_weak_etag_is_not_sent(server, home):
    get(server, home, 'weak')
    assert server.ifrange == [None, 'Wed, 01 Jan 2020 00:00:00 GMT']

def test_resume_in_a_later_session(server, home):
    m = refused(get, server, home, 'breaks', retries=0, says='1000 bytes kept')
    assert 'Run the same again' in m and names(home) == ['a.zip.part', 'a.zip.part.json']
    assert get(server, home, 'breaks').read_bytes() == GOOD
    assert server.seen == [None, 'bytes=1000-']

def test_all_there_but_the_name(server, home): # killed between the last byte and the renaming: 416
    refused(get, server, home, 'breaks', retries=0)
    (home/'a.zip.part').write_bytes(GOOD)
    assert get(server, home, 'good').read_bytes() == GOOD and server.seen[-1] == f'bytes={len(GOOD)}-'

def test_too_much_there(server, home): # 416 with another size: start over
    refused(get, server, home, 'breaks', retries=0)
    (home/'a.zip.part').write_bytes(GOOD + b'junk')
    assert get(server, home, 'good').read_bytes() == GOOD and server.seen[-1] is None

@pytest.mark.parametrize('junk', [None, 'junk', '', '5', '[1]'])
def test_part_without_its_note_starts_over(server, home, junk):
    (home/'a.zip.part').write_bytes(b'x'*50)
    if junk is not None: (home/'a.zip.part.json').write_text(junk)
    assert get(server, home, 'good').read_bytes() == GOOD and server.seen == [None]

@pytest.mark.parametrize('mode', ['changes', 'changes_rudely'])
def test_changed_file_is_fetched_anew(server, home, mode):
    assert get(server, home, mode).read_bytes() == server.data2

def test_tries_are_bounded_and_keep_what_came(server, home):
    refused(get, server, home, 'always_breaks', says='300 bytes kept')
    assert server.seen == [None, 'bytes=100-', 'bytes=200-']

@pytest.mark.parametrize('mode,says,tries', [
    ('e500','500',3), ('e404','404',1), ('html','web page',1), ('drops','kept',3), ('stalls','1000 bytes kept',3),
    ('silent_length','not say the size',1), ('absurd','not say the size',1),
    ('contradicts','contradicts',2), ('moved_to_file','302',1), ('says_too_little','not a whole zip',1)])
def test_download_refused(server, home, mode, says, tries):
    refused(get, server, home, mode, says=says)
    assert not (home/'a.zip').exists() and len(server.seen) == tries

def test_says_too_much(server, home): # never ends up under its name
    refused(get, server, home, 'says_too_much', says='Run the same again')
    assert not (home/'a.zip').exists()

def test_endless_is_refused(server, home):
    refused(get, server, home, 'endless', says='not say the size')
    assert names(home) == []

def test_an_endless_rest_stops_at_the_size(server, home):
    refused(get, server, home, 'endless_rest', says=f'{len(GOOD)} bytes announced')
    assert names(home) == ['a.zip.part', 'a.zip.part.json'] and (home/'a.zip.part').stat().st_size <= len(GOOD)

def test_html_leaves_the_part(server, home):
    refused(get, server, home, 'breaks', retries=0)
    refused(get, server, home, 'html', says='web page')
    assert (home/'a.zip.part').stat().st_size == 1000

@pytest.mark.parametrize('url', [
    'file:///etc/passwd', 'ftp://x/y', 'x', '', 'http://a b', 'http://\n', 'http://é', 'http://..',
    'http://127.0.0.1:x/'])
def test_odd_addresses(home, url):
    refused(download, url, home/'a.zip', retries=0, pause=0)
    assert names(home) == []

def test_nobody_there(home): refused(download, 'http://127.0.0.1:1/a', home/'a.zip', **FAST, says='3 tries')

def test_full_disk_before(server, home, monkeypatch):
    monkeypatch.setattr(afhq.shutil, 'disk_usage', lambda p: SimpleNamespace(free=10))
    refused(get, server, home, 'good', says='Make room')
    assert names(home) == []

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_full_disk_meanwhile(server, home):
    (home/'a.zip.part').symlink_to('/dev/full')
    refused(get, server, home, 'good', says='No space left')
    assert len(server.seen) == 1

def test_progress(server, home, capsys):
    get(server, home, 'good')
    err = capsys.readouterr().err
    assert 'download: 100%' in err and 'B/s' in err
    get(server, home, 'good', progress=False)
    assert capsys.readouterr().err == ''

# Zips, which are read and never unpacked

def put(home, data):
    (home/'a.zip').write_bytes(data)
    return home/'a.zip'

def info(name, mode=None, **kw):
    i = zipfile.ZipInfo(name)
    i.compress_type = zipfile.ZIP_DEFLATED
    if mode: i.create_system,i.external_attr = 3,mode << 16
    for k,v in kw.items(): setattr(i, k, v)
    return i

def raw(name): # a name that ZipInfo would tidy up on some systems
    i = info('x')
    i.filename = name
    return i

EVIL = {'dotdot':'../evil.jpg', 'deep':'train/../../evil.jpg', 'absolute':'/evil.jpg', 'drive':'C:evil.jpg',
    'drive2':'c:/evil.jpg', 'backslash':'..\\evil.jpg', 'backslash2':'train\\cat\\e.jpg', 'unc':'//host/e.jpg',
    'not_image':'../evil.sh', 'folder':'../evil/'}
ODD = {'reserved':'train/con.jpg', 'reserved2':'aux/a.jpg', 'colon':'train/a:b.jpg', 'newline':'train/a\nb.jpg',
    'dot_end':'train./a.jpg',
    'double':'train//a.jpg', 'dot':'train/./a.jpg', 'case':'train/cat/CAT_0.jpg', 'case_folder':'Train/cat/x.jpg',
    'file_as_folder':'train/cat/cat_0.jpg/x.jpg', 'folder_as_file.jpg':'a.jpg/x.jpg'}

def zips():
    for k,n in (EVIL|ODD).items():
        yield k, make_zip([(raw(n), jpeg())] + ([('a.jpg', b'')] if 'folder_as' in k else []))
    yield 'nfc', make_zip([('e\u0301.jpg', b''), ('\u00e9.jpg', b'')])
    yield 'symlink', make_zip([(info('train/cat/l.jpg', stat.S_IFLNK|0o777), '/etc/passwd')])
    yield 'symlink_folder', make_zip([(info('evil', stat.S_IFLNK|0o777), '/tmp'), ('evil/x.jpg', jpeg())])
    yield 'fifo', make_zip([(info('train/cat/l.jpg', stat.S_IFIFO|0o777), '')])
    yield 'bomb', make_zip([('train/cat/bomb.jpg', bytes(3_000_000))])
    yield 'encrypted', flip(GOOD, flags=1)
    yield 'bzip2', make_zip([(info('train/cat/b.jpg', compress_type=zipfile.ZIP_BZIP2), jpeg())])
    with pytest.warns(UserWarning): yield 'duplicate', make_zip([('train/cat/cat_0.jpg', jpeg(3))])

def entry(d): return d.index(b'PK\1\2') # the first entry of the central directory

def flip(d, flags=None, size=None, crc=None):
    "`d` with the first entry's flags, size or crc replaced"
    d,c = bytearray(d),entry(d)
    if flags is not None: struct.pack_into('<H', d, c+8, flags)
    if crc is not None: struct.pack_into('<L', d, c+16, crc)
    if size is not None: struct.pack_into('<L', d, c+24, size)
    return bytes(d)

def load(path): return image_dls(path, 16, 2, 'all', device='cpu')

@pytest.mark.parametrize('name,data', [pytest.param(n, d, id=n) for n,d in zips()])
def test_hostile_zip_writes_nothing(home, name, data):
    p = put(home, data)
    try: dls = load(p)
    except BadInput as e: assert '\n' not in str(e) and str(e).startswith('data_path: ')
    else: assert all(len(b[0]) for b in dls[0])
    assert names(home) == ['a.zip']

@pytest.mark.parametrize('name', 'symlink fifo bomb encrypted bzip2'.split())
def test_entries_that_are_no_image_are_named(home, name):
    refused(load, put(home, dict(zips())[name]), says='unreadable: ')

def damaged():
    d = bytearray(GOOD)
    d[60] ^= 255
    yield 'data', bytes(d)
    yield 'crc', flip(GOOD, crc=1)
    yield 'size_less', flip(GOOD, size=10)
    yield 'size_more', flip(GOOD, size=4000)
    yield 'truncated', GOOD[:-300]
    yield 'half', GOOD[:len(GOOD)//2]
    yield 'front_missing', GOOD[1000:]
    yield 'empty', b''
    yield 'text', b'hello'*100
    yield 'local_header', b'PK\3\4' + bytes(26) + GOOD[30:]
    yield 'offset', GOOD[:-6] + b'\xff\xff\xff\x7f' + GOOD[-2:]

@pytest.mark.parametrize('name,data', [pytest.param(n, d, id=n) for n,d in damaged()])
def test_damaged_zip_is_refused(home, name, data):
    refused(load, put(home, data), says='readable')
    assert names(home) == ['a.zip']

def test_any_flipped_byte_is_refused_or_harmless(home):
    for k in range(0, len(GOOD), 83):
        d = bytearray(GOOD)
        d[k] ^= 0x55
        try: load(put(home, bytes(d)))
        except BadInput as e: assert '\n' not in str(e)
        assert names(home) == ['a.zip']

def test_mac_and_other_files_are_skipped(home):
    z = make_zip([('__MACOSX/train/cat/._cat_0.jpg', b'x'), ('.DS_Store', b'x'), ('train/._a.jpg', b'x'),
                  ('README.txt', b'x'), ('train/Icon\r', b''), ('empty/', b'')])
    dls = load(put(home, z))
    assert len(dls.train_ds) == 6 and len(dls.valid_ds) == 6

def test_a_zip_without_images(home):
    with zipfile.ZipFile(home/'text.zip', 'w') as z: z.writestr('a.txt', 'no picture')
    refused(load, home/'text.zip', says='no image')

def test_every_ending_is_read(home):
    with zipfile.ZipFile(home/'a.zip', 'w') as z:
        for e in EXTS: z.writestr(f'train/cat/a{e}', jpeg())
        z.writestr('val/cat/b.jpg', jpeg())
    assert load(home/'a.zip').train_ds.names == [f'train/cat/a{e}' for e in sorted(EXTS)]

def test_no_zip(home): refused(load, home/'none.zip', says='does not exist')

# AFHQ

@pytest.mark.parametrize('top,val', [('', 'test'), ('', 'val'), ('afhq/', 'val'), ('afhq_v2/', 'test')])
def test_get_afhq(server, home, capsys, top, val):
    server.data = make_zip(top=top, val=val)
    dest = get_afhq(home/'afhq.zip', server.url, **FAST)
    assert dest == home/'afhq.zip' and dest.read_bytes() == server.data and names(home) == ['afhq.zip']
    out = capsys.readouterr().out
    assert 'CC BY-NC 4.0' in out and 'NAVER' in out
    assert get_afhq(dest, server.url) == dest and len(server.seen) == 1
    assert 'already' in capsys.readouterr().out
    dls = load(dest)
    assert len(dls.train_ds) == len(dls.valid_ds) == 6

def test_get_afhq_of_a_name_without_ending(server, home):
    assert get_afhq(home/'afhq', server.url, **FAST) == home/'afhq.zip' and names(home) == ['afhq.zip']

def test_get_afhq_makes_the_folder(server, home):
    assert get_afhq(home/'data'/'afhq.zip', server.url, **FAST).is_file()

def test_get_afhq_after_a_broken_session(server, home):
    server.mode = 'breaks'
    refused(get_afhq, home/'afhq.zip', server.url, **FAST|{'retries':0}, says='go on from there')
    assert get_afhq(home/'afhq.zip', server.url, **FAST).read_bytes() == GOOD
    assert server.seen == [None, 'bytes=1000-'] and names(home) == ['afhq.zip']

def test_get_afhq_of_a_damaged_zip(server, home):
    (home/'afhq.zip').write_bytes(GOOD[:-300])
    refused(get_afhq, home/'afhq.zip', server.url, **FAST, says='nor a readable zip')
    assert server.seen == [] and (home/'afhq.zip').read_bytes() == GOOD[:-300] # it may be somebody's

def test_get_afhq_other_folders(server, home):
    server.data = make_zip(val='other')
    refused(get_afhq, home/'afhq.zip', server.url, **FAST, says='not AFHQ')

def test_constants():
    assert afhq.AFHQ_URL.startswith('https://www.dropbox.com/') and afhq.AFHQ_URL.endswith('afhq_v2.zip?dl=1')
