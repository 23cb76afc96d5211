"""The one list of all pages is the sidebar in `_quarto.yml`. `python tests/pages.py` writes what follows from it:
the tables of `nbs/index.ipynb` with a picture of each chapter, the last table of `nbs/map.ipynb`, and `README.md`,
which is the index's prose.
"""
import base64, json, re
from io import BytesIO
from pathlib import Path

import yaml
from PIL import Image, ImageOps

top = Path(__file__).parent.parent
nbs = top/'nbs'


def sidebar():
    "The names of all pages by section, in order; the index is a section of its own, named ''"
    contents = yaml.safe_load((top/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return {'': contents[:1]} | {o['section']: o['contents'] for o in contents[1:]}


def pages(*sections): return [o for k,names in sidebar().items() if not sections or k in sections for o in names]


def read(page): return json.loads((nbs/page).read_text(encoding='utf-8'))


def cells(page, kind='code'): return [''.join(c['source']) for c in read(page)['cells'] if c['cell_type'] == kind]


def prose(page): return '\n\n'.join(cells(page, 'markdown'))


def module(page):
    "The module that a page makes, such as kit.data, or '' where it makes none"
    m = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(cells(page)[:1]), re.M)
    return m[1] if m else ''


def head(page):
    "Title and description of a page"
    return re.search(r'^# (.+)\n+> (.+)', prose(page)).groups()


def link(page):
    "How a table names a page: a chapter by its number and title, others by their title"
    number = re.match(r'(\d\d)_', page)
    return f"[{number[1] + ' ' if number else ''}{head(page)[0]}]({page})"


def picture(page):
    "The last picture of a chapter before its exercises, small, and what it shows"
    res, alt = None, ''
    for c in read(page)['cells']:
        src = ''.join(c['source'])
        if '## Exercises' in src: break
        for o in c.get('outputs', []):
            if png := o.get('data', {}).get('image/png'):
                res, alt = ''.join(png), (re.findall(r'fig-alt: "(.+)"', src) or [''])[0]
    im = Image.open(BytesIO(base64.b64decode(res))).convert('RGB')
    return ImageOps.contain(im, (320, 160), Image.Resampling.LANCZOS), alt


def small(page): return f"images/chapters/{page.removesuffix('.ipynb')}.jpg"


def course():
    "The chapters, each with its picture"
    rows = [f'| {link(o)} | {head(o)[1]} | ![{picture(o)[1]}]({small(o)}) |' for o in pages('Course')]
    return '\n'.join(['| chapter | what it is about | how it ends |', '|---|---|---|', *rows])


def beside():
    "What stands beside the course, a line for each section"
    rows = [f"| {k.lower()} | {', '.join(map(link, v))} |" for k,v in sidebar().items() if k not in ('', 'Course')]
    return '\n'.join(['| section | pages |', '|---|---|', *rows])


def answers():
    "For each page, what the other tables of the map lead to it for"
    found = {}
    for first, links in re.findall(r'^\| ([^|]+?) \|[^|]*\| (.*) \|$', prose('map.ipynb'), re.M):
        for page in dict.fromkeys(re.findall(r'\]\(([\w/]+\.ipynb)', links)): found.setdefault(page, []).append(first)
    rows = [f"| {link(o)} | {'; '.join(found[o])} |" for o in pages() if o in found]
    return '\n'.join(['| page | what it answers |', '|---|---|', *rows])


def made(page):
    "The text of a notebook's file, with its tables as they should be"
    nb, tables = read(page), {'table-course': course, 'table-beside': beside, 'answers': answers}
    for c in nb['cells']:
        if c['id'] in tables: c['source'] = tables[c['id']]().splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def readme():
    "The prose of the index, with links that lead from the top"
    return re.sub(r'\]\((?!https?:|#)', '](nbs/', prose('index.ipynb')) + '\n'


if __name__ == '__main__':
    (nbs/'images/chapters').mkdir(exist_ok=True)
    for o in pages('Course'): picture(o)[0].save(nbs/small(o), quality=90, subsampling=0)
    for o in ('index.ipynb', 'map.ipynb'): (nbs/o).write_text(made(o), encoding='utf-8')
    (top/'README.md').write_text(readme(), encoding='utf-8')
