"""The site, checked without Quarto: nbdev processes the notebooks, pandoc reads the pages, each check finds its fault.

    python tests/test_site.py FOLDER

writes the pages there as HTML, to be looked at.
"""
import ast, base64, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pypandoc, pytest, yaml

from pages import cells, module, pages as listed, sidebar, top

ini = ConfigParser(delimiters=['='])
ini.read(top/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
ref = r'(?<![\w@\\])@(?P<ref>(?:eq|fig|tbl|sec)-[\w-]*\w)'
fenced = r'^(?P<fence>```+).*?^(?P=fence) *$|`[^`\n]+`'
label = r'\{#((?:eq|fig|tbl|sec)-[\w-]+)[^}]*\}'
PLAIN = '--syntax-highlighting=none', # the colours of code take pandoc most of its time; no check looks at them
LIMIT = 1_370_000 # bytes of a page with its pictures; colours, at most 125,000 more, make it less than 1.5 MB
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
    def __init__(self, name, nb, look=PLAIN):
        self.name, self.meta, self.files, self.labels = name, {}, {}, []
        self.text = '\n\n'.join(o for c in nb['cells'] for o in self.cell(c))
        prose = re.sub(fenced, '', self.text, flags=re.M | re.S)
        self.labels += re.findall(label, prose)
        self.refs = [m['ref'] for m in re.finditer(ref, prose)]
        kinds = [[o for o in dict.fromkeys(self.labels) if o.startswith(k)] for k in ('eq', 'fig')]
        num = {o: str(i) for os in kinds for i,o in enumerate(os, 1)}
        def equation(m): return f'[$${m[1]}\\qquad({num[m[2]]})$$]{{#{m[2]}}}'
        def refer(m):
            kind = 'Eq.' if (m['ref'] or '').startswith('eq') else 'Figure'
            return f"[{kind} {num[m['ref']]}](#{m['ref']})" if m['ref'] in num else m[0]
        text = re.sub(r'\$\$((?:(?!\$\$).)+)\$\$ *' + label, equation, self.text, flags=re.S)
        text = re.sub(fenced + '|' + ref, refer, text, flags=re.M | re.S)
        cmd = [pypandoc.get_pandoc_path(), *'-f markdown-implicit_figures -t html --mathml --wrap=none'.split(), *look]
        r = subprocess.run(cmd, input=text, capture_output=True, text=True, check=True)
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
            block, fold = f'````python\n{code}\n````', opts.get('code-fold')
            shut = f"<details{' open' * (fold == 'show')}><summary>Code</summary>\n\n{block}\n\n</details>"
            yield shut if 'code-fold' in opts else block
        pics = 0
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if o['output_type'] == 'stream': yield f"````{{.output}}\n{''.join(o['text'])}\n````"
            elif 'image/png' in data:
                file = f"{Path(self.name).stem}-{c['id']}-{(pics := pics + 1)}.png"
                self.files[file] = base64.b64decode(''.join(data['image/png']))
                name = opts.get('label', 'pic-' + c['id']) + '-' * (pics - 1)
                img = f'<img src="{file}" alt="{escape(str(opts.get("fig-alt", "")))}">'
                yield f"::: {{.figure #{name}}}\n{img}\n\n{opts.get('fig-cap', '')}\n:::"
            elif 'text/markdown' in data: yield ''.join(data['text/markdown'])
            elif 'text/latex' in data: yield ''.join(data['text/latex'])
            elif 'text/html' in data:
                yield f"````{{=html}}\n<div class=\"cell-output-display\">{''.join(data['text/html'])}</div>\n````"
            elif 'text/plain' in data: yield f"````{{.output}}\n{''.join(data['text/plain'])}\n````"
        if pics and 'label' in opts: self.labels.append(opts['label'])


def local(page, link):
    "The path within the site, and the anchor, that a link leads to"
    path, _, anchor = unquote(link).partition('#')
    return os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page, anchor


def broken(pages, files, p):
    "Links of page `p` that lead nowhere"
    homes = cfg['git_url'], f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}"
    own = rf"(?:{'|'.join(homes)})/(?:blob|raw|tree)/{cfg['branch']}/([^#?]+)"
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


def missing(page, files):
    "Pictures that a page shows and nobody has"
    own = [s for s,_ in page.read.pics if not s.startswith('https:') and s not in page.files]
    return [s for s in own if local(page.name, s)[0] not in files]


def weight(page): return len(page.html.encode()) + sum(len(o)*4//3 for o in page.files.values())


def badges(page): return [o for o in page.read.links if o.startswith('https://colab.research.google.com/github/')]


CHECKS = { # each takes a page, all pages, and the names of all files
    'label without an end': lambda p, pages, files: [o for o in p.refs if o not in p.labels],
    'label given twice': lambda p, pages, files: twice(p.labels) + twice(p.ids),
    'broken link': lambda p, pages, files: list(broken(pages, files, p)),
    'missing picture': lambda p, pages, files: missing(p, files),
    'picture without words': lambda p, pages, files: [s for s,alt in p.read.pics if not alt.strip()],
    'unbalanced div': lambda p, pages, files: lines(''.join(p.read.words), ':::') + lines(p.warnings, 'Div', 'div'),
    'mathematics': lambda p, pages, files: lines(p.warnings, 'TeX') + lines(''.join(p.read.words), '$$', '{#'),
    'too big': lambda p, pages, files: [n for n in [weight(p)] if n > LIMIT],
    'no title or description': lambda p, pages, files: [k for k in ('title', 'description') if not p.meta.get(k)],
    'no way into Colab': lambda p, pages, files: [] if badges(p) else [p.name],
}


def complaints(pages, files):
    "What is wrong with the pages, by check and page"
    found = {(check, p.name): f(p, pages, files) for check,f in CHECKS.items() for p in pages.values()}
    return {k: v for k,v in found.items() if v}


def astray(config, names):
    "Notebooks that the sidebar leaves out, names twice, or invents"
    side = tree(config['website']['sidebar']['contents'])
    bar = [o for o in tree(config['website']['navbar']) if o not in names and not o.startswith('https:')]
    return sorted(set(names) ^ set(side)) + twice(side) + bar


def process(src):
    "Copy what git knows of the site to `src`, and have nbdev process it there"
    ls = 'git ls-files -z -co --exclude-standard nbs ddpm_nb _quarto.yml settings.ini'.split()
    names = subprocess.check_output(ls, cwd=top, text=True)
    for o in filter(None, names.split('\0')):
        if (top/o).exists():
            (src/o).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(top/o, src/o)
    env = os.environ | dict(PYTHONPATH=str(src), MPLBACKEND='agg')
    proc = [sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)']
    r = subprocess.run(proc, cwd=src, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return src/'_proc'


def load(proc, **kwargs):
    "All pages by name, and the names of all other files"
    files = [p.relative_to(proc).as_posix() for p in sorted(proc.rglob('*')) if p.is_file()]
    return {o: Page(o, json.loads((proc/o).read_text()), **kwargs) for o in files if o.endswith('.ipynb')}, files


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
        name = re.escape(anchor.split('.')[-1])
        assert re.search(rf'^(?:async )?(?:def|class) {name}\b', nb, re.M | re.I), (page, anchor)


@pytest.fixture(scope='module')
def api():
    "The names of the API page's cells, and what the last one shows"
    with pytest.MonkeyPatch.context() as m:
        m.chdir(top/'nbs')
        return said()


def said():
    *first, last = [o for o in cells('api.ipynb') if 'eval: false' not in o]
    *lines, value = last.split('\n')
    ns = {}
    for src in [*first, '\n'.join(lines)]: exec(src, ns)
    return ns, eval(value, ns).data


def test_api_page_is_what_the_package_says(api):
    ns, text = api
    last = json.loads((top/'nbs'/'api.ipynb').read_text())['cells'][-1]
    assert text == ''.join(last['outputs'][0]['data']['text/markdown']), 'run nbs/api.ipynb again'
    public = {n for m in ns['mods'] for n in m.__all__}
    assert public == {n for m in ns['mods'] for n,_ in ns['names'](m) if '.' not in n}
    silent = [n for m in ns['mods'] for n,o in ns['names'](m) if not ns['line'](o, '').strip()]
    assert silent == [], 'without a docstring'


def test_api_page_goes_through_the_modules_in_the_order_of_the_sidebar(api):
    found = [o.removeprefix('ddpm_nb.') for o in re.findall(r'^## (\S+)$', api[1], re.M)]
    modules = [m for o in listed() if (m := module(o))]
    assert len(found) > 20 and found == [m for m in modules if m in found]
    assert {m.__name__ for m in api[0]['mods']} == {f'ddpm_nb.{m}' for m in modules}


def imported(name):
    "The modules of the package that the module `name` imports"
    tree = ast.parse((top/'ddpm_nb'/f"{name.replace('.', '/')}.py").read_text())
    base = ['ddpm_nb', *name.split('.')]
    froms = [o for o in ast.walk(tree) if isinstance(o, ast.ImportFrom)]
    full = ['.'.join([*base[:-o.level], o.module]) if o.level else o.module for o in froms]
    return {o.removeprefix('ddpm_nb.') for o in full if o.startswith('ddpm_nb.')}


def below(name):
    "The modules that must be there before `name` is"
    found, todo = set(), {name}
    while todo:
        found |= (new := imported(todo.pop()) - found)
        todo |= new
    return found


def test_chapters_come_in_the_order_of_their_numbers():
    course = sidebar()['Course']
    assert course == sorted(course) and course[0] == '00_tour.ipynb' and course[-1] == '11_train.ipynb'
    assert [o[:2] for o in course] == [f'{i:02}' for i in range(len(course))]
    for o in course + sidebar()['Foundations'] + sidebar()['Kit']: # a module is called as its page
        folder, name = os.path.split(o)
        name = re.sub(r'^\d\d_', '', name.removesuffix('.ipynb'))
        assert module(o) in ('.'.join(filter(None, [folder, name])), ''), o


def test_a_chapter_needs_only_chapters_before_it_and_the_kit_from_nine_on():
    course = sidebar()['Course']
    chapters = [re.sub(r'^\d\d_|\.ipynb$', '', o) for o in course]
    for i,o in enumerate(course):
        used = below(module(o)) if module(o) else set()
        assert {m for m in used if '.' not in m} <= set(chapters[:i]), o
        assert i >= 9 or not [m for m in used if '.' in m], o
        seen = re.findall(r'^ *(?:from|import) ddpm_nb\.(\w+)', '\n'.join(cells(o)), re.M) # also where it only shows
        assert set(seen) <= {'kit', *chapters[:i]}, o


def test_a_page_of_the_kit_needs_only_the_pages_before_it():
    kit = [module(o) for o in sidebar()['Kit']]
    for i,m in enumerate(kit): assert {o for o in imported(m) if o.startswith('kit.')} <= set(kit[:i]), m


def notebook(*cells, title='A'):
    "A page like those that nbdev makes, from Markdown, or from source and outputs"
    def cell(i, o):
        if isinstance(o, str): return dict(cell_type='markdown', source=[o])
        return dict(cell_type='code', id=str(i), source=[o[0]], outputs=o[1])
    head = dict(cell_type='raw', source=[f'---\ntitle: {title}\ndescription: B\n---\n'])
    return dict(cells=[head, *(cell(i, o) for i,o in enumerate((badge, *cells)))])


colab = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/main/nbs/01_schedule.ipynb"
badge = f'[![Open in Colab](https://x/y.svg)]({colab})'
good = '## Here\n\n$$\na^2\n$$ {#eq-a}\n\nBy @eq-a, [there](b.ipynb#far-away) or [here](#here).\n\n' \
       '::: {.callout-note}\nNote.\n:::\n\n![A cat](cat.png)'
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
    nbs = {'a.ipynb': notebook(good, *cells, **kwargs), 'b.ipynb': notebook('## Far away')}
    return complaints({k: Page(k, v) for k,v in nbs.items()}, ['a.ipynb', 'b.ipynb', 'cat.png'])


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
    for p in load(proc, look=())[0].values():
        title, dest = p.meta['title'], (proc/p.name).with_suffix('.html')
        head = '<!doctype html><html lang="en"><meta charset="utf-8">' \
               f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        styles = [os.path.relpath(proc/o, dest.parent) for o in ('theme.css', 'styles.css') if (proc/o).exists()]
        css = ''.join(f'<link rel="stylesheet" href="{o}">' for o in styles)
        main = f'<h1>{title}</h1><p class="lead">{p.meta["description"]}</p>{p.html}'
        dest.write_text(f'{head}{css}<main>{main}</main>')
        for k,v in p.files.items(): (dest.parent/k).write_bytes(v)
        print(dest)
