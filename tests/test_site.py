"""The site, checked without Quarto: nbdev processes the notebooks, pandoc reads the pages, and each check is shown to find a fault.

    python tests/test_site.py FOLDER

writes the pages there as HTML, to be looked at.
"""
import base64, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pypandoc, pytest, yaml

top = Path(__file__).parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(top/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
ref = r'(?<![\w@\\])@(?P<ref>(?:eq|fig|tbl|sec)-[\w-]*\w)'
fenced = r'^(?P<fence>```+).*?^(?P=fence) *$|`[^`\n]+`'
label = r'\{#((?:eq|fig|tbl|sec)-[\w-]+)[^}]*\}'
LIMIT = 1_500_000 # bytes of a page with its pictures
pytestmark = pytest.mark.xdist_group('site') # processed once


class Reader(HTMLParser):
    "The ids, links, pictures and words of a page; words in code do not count"
    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.pics, self.words, self.code = [], [], [], [], 0
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if 'id' in d: self.ids.append(d['id'])
        if tag == 'a' and 'href' in d: self.links.append(d['href'])
        if tag == 'img': self.pics.append((d.get('src', ''), d.get('alt') or ''))
        self.code += tag in ('pre', 'code', 'style')
    def handle_endtag(self, tag): self.code -= tag in ('pre', 'code', 'style')
    def handle_data(self, data):
        if not self.code: self.words.append(data)


class Page:
    "A processed notebook `nb`: its Markdown as Quarto sees it, and what pandoc makes of it"
    def __init__(self, name, nb):
        self.name, self.meta, self.files, self.labels = name, {}, {}, []
        self.text = '\n\n'.join(o for c in nb['cells'] for o in self.cell(c))
        prose = re.sub(fenced, '', self.text, flags=re.M | re.S)
        self.labels += re.findall(label, prose)
        self.refs = [m['ref'] for m in re.finditer(ref, prose)]
        num = {o: str(i) for kind in ('eq', 'fig') for i,o in enumerate((o for o in dict.fromkeys(self.labels) if o.startswith(kind)), 1)}
        text = re.sub(r'\$\$((?:(?!\$\$).)+)\$\$ *' + label, lambda m: f'[$${m[1]}\\qquad({num[m[2]]})$$]{{#{m[2]}}}', self.text, flags=re.S)
        text = re.sub(fenced + '|' + ref, lambda m: f"[{'Eq.' if m['ref'].startswith('eq') else 'Figure'} {num[m['ref']]}](#{m['ref']})" if m['ref'] in num else m[0], text, flags=re.M | re.S)
        r = subprocess.run([pypandoc.get_pandoc_path(), '-f', 'markdown-implicit_figures', '-t', 'html', '--mathml', '--wrap=none'],
                           input=text, capture_output=True, text=True, check=True)
        self.html, self.warnings = r.stdout, r.stderr
        self.read = Reader(self.html)
        self.ids = self.read.ids

    def cell(self, c):
        src = ''.join(c['source'])
        if c['cell_type'] == 'raw': self.meta = yaml.safe_load(src.strip().strip('-'))
        if c['cell_type'] == 'markdown': yield src
        if c['cell_type'] != 'code': return
        opts = dict(re.findall(r'^#\| *([\w-]+): *(.*?) *$', src, re.M))
        opts = {k: yaml.safe_load(v) for k,v in opts.items()}
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M)
        if opts.get('echo', True) and code.strip():
            block = f'````python\n{code}\n````'
            yield f"<details{' open' * (opts['code-fold'] == 'show')}><summary>Code</summary>\n\n{block}\n\n</details>" if 'code-fold' in opts else block
        pics = 0
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if o['output_type'] == 'stream': yield f"````{{.output}}\n{''.join(o['text'])}\n````"
            elif 'image/png' in data:
                self.files[f := f"{Path(self.name).stem}-{c['id']}-{(pics := pics + 1)}.png"] = base64.b64decode(''.join(data['image/png']))
                yield f"::: {{.figure #{opts.get('label', 'pic-' + c['id']) + '-' * (pics - 1)}}}\n<img src=\"{f}\" alt=\"{escape(str(opts.get('fig-alt', '')))}\">\n\n{opts.get('fig-cap', '')}\n:::"
            elif 'text/markdown' in data: yield ''.join(data['text/markdown'])
            elif 'text/latex' in data: yield ''.join(data['text/latex'])
            elif 'text/html' in data: yield f"````{{=html}}\n<div class=\"cell-output-display\">{''.join(data['text/html'])}</div>\n````"
            elif 'text/plain' in data: yield f"````{{.output}}\n{''.join(data['text/plain'])}\n````"
        if pics and 'label' in opts: self.labels.append(opts['label'])


def local(page, link):
    "The path within the site, and the anchor, that a link leads to"
    path, _, anchor = unquote(link).partition('#')
    return os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page, anchor


def broken(pages, files, p):
    "Links of page `p` that lead nowhere"
    own = rf"(?:{cfg['git_url'] % dict(user=cfg['user'], repo=cfg['repo'])}|https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']})/(?:blob|raw|tree)/{cfg['branch']}/([^#?]+)"
    for o in p.read.links:
        if m := re.match(own, o):
            if not (top/m[1]).exists(): yield o
        elif not re.match(r'\w+:', o):
            path, anchor = local(p.name, o)
            if not (anchor in pages[path].ids or not anchor if path in pages else path in files and not anchor): yield o


def tree(o):
    "All pages that a sidebar or a navbar names"
    if isinstance(o, str): return [o]
    if isinstance(o, list): return [p for q in o for p in tree(q)]
    return [p for k in ('href', 'file', 'contents', 'left', 'right') for p in tree(o.get(k, []))]


def lines(text, *parts): return [l for l in text.split('\n') if any(o in l for o in parts)]


def twice(xs): return sorted({o for o in xs if xs.count(o) > 1})


CHECKS = {
    'label without an end': lambda p, pages, files: [o for o in p.refs if o not in p.labels],
    'label given twice': lambda p, pages, files: twice(p.labels) + twice(p.ids),
    'broken link': lambda p, pages, files: list(broken(pages, files, p)),
    'missing picture': lambda p, pages, files: [s for s,_ in p.read.pics if not s.startswith('https:') and s not in p.files and local(p.name, s)[0] not in files],
    'picture without words': lambda p, pages, files: [s for s,alt in p.read.pics if not alt.strip()],
    'unbalanced div': lambda p, pages, files: lines(''.join(p.read.words), ':::') + lines(p.warnings, 'Div', 'div'),
    'mathematics': lambda p, pages, files: lines(p.warnings, 'TeX') + lines(''.join(p.read.words), '$$', '{#'),
    'too big': lambda p, pages, files: [n for n in [len(p.html.encode()) + sum(len(o)*4//3 for o in p.files.values())] if n > LIMIT],
    'no title or description': lambda p, pages, files: [k for k in ('title', 'description') if not p.meta.get(k)],
    'no way into Colab': lambda p, pages, files: [] if any(o.startswith('https://colab.research.google.com/github/') for o in p.read.links) else [p.name],
}


def complaints(pages, files):
    "What is wrong with the pages, by check and page"
    found = {(check, p.name): f(p, pages, files) for check,f in CHECKS.items() for p in pages.values()}
    return {k: v for k,v in found.items() if v}


def astray(config, names):
    "Notebooks that the sidebar leaves out, names twice, or invents"
    side = tree(config['website']['sidebar']['contents'])
    return sorted(set(names) ^ set(side)) + twice(side) + [o for o in tree(config['website']['navbar']) if o not in names and not o.startswith('https:')]


def process(src):
    "Copy what git knows of the site to `src`, and have nbdev process it there"
    names = subprocess.check_output(['git', 'ls-files', '-z', '-co', '--exclude-standard', 'nbs', 'ddpm_nb', '_quarto.yml', 'settings.ini'], cwd=top, text=True)
    for o in filter(None, names.split('\0')):
        if (top/o).exists():
            (src/o).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(top/o, src/o)
    env = os.environ | dict(PYTHONPATH=str(src), MPLBACKEND='agg')
    r = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'], cwd=src, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return src/'_proc'


def load(proc):
    "All pages by name, and the names of all other files"
    files = [p.relative_to(proc).as_posix() for p in sorted(proc.rglob('*')) if p.is_file()]
    return {o: Page(o, json.loads((proc/o).read_text())) for o in files if o.endswith('.ipynb')}, files


@pytest.fixture(scope='module')
def site(tmp_path_factory): return load(process(tmp_path_factory.mktemp('site')))


@pytest.fixture(scope='module')
def config(): return yaml.safe_load((top/'_quarto.yml').read_text())


def test_pages_have_no_faults(site): assert complaints(*site) == {}


def test_every_notebook_is_in_the_sidebar(site, config): assert astray(config, list(site[0])) == []


def test_pictures_of_the_site_are_there(site, config):
    web = config['website']
    assert {web['favicon'], web['image'], config['format']['html']['css']} <= set(site[1])
    assert config['format']['html']['html-math-method'] == 'mathml' # no script from elsewhere


def test_functions_are_shown_with_their_source(site):
    "Each name of the API page has a heading on its page; what comes after it is its signature"
    text = site[0]['api.ipynb'].text
    links = re.findall(r'\]\(([\w/]+\.ipynb)#([\w.]+)\) \|', text)
    assert len(links) > 200
    for page,anchor in links:
        nb = site[0][page].text
        assert re.search(rf'^### {re.escape(anchor)}$', nb, re.M | re.I), (page, anchor)
        assert re.search(rf'^(?:async )?(?:def|class) {re.escape(anchor.split(".")[-1])}\b', nb, re.M | re.I), (page, anchor)


def test_api_page_is_what_the_package_says():
    nb = json.loads((top/'nbs'/'api.ipynb').read_text())
    *cells, last = [c for c in nb['cells'] if c['cell_type'] == 'code' and 'eval: false' not in ''.join(c['source'])]
    *lines, value = ''.join(last['source']).split('\n')
    ns = {}
    for src in [*(''.join(c['source']) for c in cells), '\n'.join(lines)]: exec(src, ns)
    assert eval(value, ns).data == ''.join(last['outputs'][0]['data']['text/markdown']), 'run nbs/api.ipynb again'
    public = {n for m in ns['mods'] for n in m.__all__}
    assert public == {n for m in ns['mods'] for n,_ in ns['names'](m) if '.' not in n}
    assert [n for m in ns['mods'] for n,o in ns['names'](m) if not ns['line'](o, '').strip()] == [], 'without a docstring'


def notebook(*cells, title='A'):
    "A page like those that nbdev makes, from Markdown, or from source and outputs"
    def cell(i, o): return dict(cell_type='markdown', source=[o]) if isinstance(o, str) else dict(cell_type='code', id=str(i), source=[o[0]], outputs=o[1])
    head = dict(cell_type='raw', source=[f'---\ntitle: {title}\ndescription: B\n---\n'])
    return dict(cells=[head, *(cell(i, o) for i,o in enumerate((badge, *cells)))])


badge = f"[![Open in Colab](https://x/y.svg)](https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/main/nbs/00_core.ipynb)"
good = '## Here\n\n$$\na^2\n$$ {#eq-a}\n\nBy @eq-a, [there](b.ipynb#far-away) or [here](#here).\n\n::: {.callout-note}\nNote.\n:::\n\n![A cat](cat.png)'
png = [dict(output_type='display_data', data={'image/png': [base64.b64encode(b'x').decode()]})]
shown = '#| label: fig-a\n#| fig-cap: "C"\n#| fig-alt: "A cat"\nshow()'
FAULTS = [
    ('label without an end', ('By @eq-b.',)),
    ('label without an end', ('By @fig-b.', (shown, png))),
    ('label given twice', ('$$\nb\n$$ {#eq-a}',)),
    ('label given twice', ((shown, png), (shown, png))),
    ('broken link', ('[x](c.ipynb)',)),
    ('broken link', ('[x](b.ipynb#near)',)),
    ('broken link', ('[x](#there)',)),
    ('broken link', (f"[x](https://github.com/{cfg['user']}/{cfg['repo']}/blob/main/nbs/no.ipynb)",)),
    ('missing picture', ('![A dog](dog.png)',)),
    ('picture without words', ('![](cat.png)',)),
    ('picture without words', (('#| label: fig-b\nshow()', png),)),
    ('unbalanced div', ('::: {.callout-note}\nNote.',)),
    ('unbalanced div', ('Note.\n\n:::',)),
    ('mathematics', (r'$\frac{a}{$',)),
    ('mathematics', (r'$\nonsense{a}$',)),
    ('mathematics', ('$$\na\n',)),
    ('mathematics', ('$$\na\n$$\n{#eq-b}',)),
    ('too big', ('a'*LIMIT,)),
]


def small(*cells, **kwargs):
    pages = {'a.ipynb': Page('a.ipynb', notebook(good, *cells, **kwargs)), 'b.ipynb': Page('b.ipynb', notebook('## Far away'))}
    return complaints(pages, ['a.ipynb', 'b.ipynb', 'cat.png'])


def test_a_page_without_faults_has_none(): assert small((shown, png)) == {}


@pytest.mark.parametrize('check,cells', FAULTS)
def test_each_check_finds_its_fault(check, cells): assert {k for k,_ in small(*cells)} == {check}


def test_a_page_needs_a_title_and_a_way_into_colab(monkeypatch):
    assert {k for k,_ in small(title='')} == {'no title or description'}
    monkeypatch.setitem(globals(), 'badge', '')
    assert {k for k,_ in small()} == {'no way into Colab'}


def test_a_notebook_left_out_is_found(config, site):
    names = list(site[0])
    assert astray(config, names + ['new.ipynb']) == ['new.ipynb']
    assert 'map.ipynb' in astray(config, [o for o in names if o != 'map.ipynb'])


if __name__ == '__main__':
    out = Path(sys.argv[1]).resolve()
    proc = process(out)
    for p in load(proc)[0].values():
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{p.meta["title"]}</title>'
        css = ''.join(f'<link rel="stylesheet" href="{os.path.relpath(proc/o, (proc/p.name).parent)}">' for o in ('theme.css', 'styles.css') if (proc/o).exists())
        dest = (proc/p.name).with_suffix('.html')
        dest.write_text(f'{head}{css}<main><h1>{p.meta["title"]}</h1><p class="lead">{p.meta["description"]}</p>{p.html}</main>')
        for k,v in p.files.items(): (dest.parent/k).write_bytes(v)
        print(dest)
