"""Run notebooks as Colab does: from top to bottom, each in a folder that has nothing of the repository, with what is installed.

    python tests/run_notebooks.py [PART OF A NAME...]

It needs `ddpm_nb`, `nbclient` and `ipykernel`, and is for environments without the development requirements. A notebook whose first
cell installs an extra gets that extra, after all the others have run without.
"""
import re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

top = Path(__file__).parent.parent


def notebooks():
    "Those of the course, in order; long experiments and tutorials on other machines are left out"
    return [p for p in sorted((top/'nbs').rglob('*.ipynb')) if not {'experiments', 'tutorials', '.ipynb_checkpoints'} & set(p.parts)]


def extra(path):
    "The extra that a notebook's first cell installs, such as `offline`, or ''"
    m = re.search(r'pip install[^\n]*ddpm_nb\[(\w+)\]', '\n'.join(c.source for c in nbformat.read(path, 4).cells[:4] if c.cell_type == 'code'))
    return m[1] if m else ''


def run(path, timeout=600):
    "The seconds it took, and what went wrong or ''"
    nb, start = nbformat.read(path, 4), time.monotonic()
    with tempfile.TemporaryDirectory() as d:
        cwd = Path(d)/'content'
        cwd.mkdir()
        if path.name == 'benchmarks.ipynb': shutil.copytree(top/'benchmarks', Path(d)/'benchmarks') # which its first cell clones
        try: NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': cwd}}).execute()
        except CellExecutionError as e: return time.monotonic() - start, str(e)
    return time.monotonic() - start, ''


if __name__ == '__main__':
    names, failed = sys.argv[1:], []
    todo = sorted((extra(p), p) for p in notebooks() if not names or any(o in str(p.relative_to(top/'nbs')) for o in names))
    for what in sorted({o for o,_ in todo}):
        if what: subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', f'ddpm_nb[{what}]'], check=True)
        for path in [p for o,p in todo if o == what]:
            name = path.relative_to(top/'nbs')
            secs, error = run(path)
            print(f"{'failed' if error else 'passed'} {secs:5.0f} s  {name}{f' [{what}]' if what else ''}", error, sep='\n' if error else '', flush=True)
            if error: failed.append(str(name))
    print(f'{len(todo) - len(failed)} passed, {len(failed)} failed')
    sys.exit(bool(failed or not todo))
