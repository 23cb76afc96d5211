"""Runs tests against changed modules: `python mutate.py < jobs.json` writes a line of JSON for each job.

A job is {name: dotted module, source: its changed source, guards: ['test_file:test_name', ...]}, or the same with the
path of a notebook for the module. The libraries are loaded once; each job runs in a fork, where the changed source
takes the place of the original, until a guard fails.
"""
import importlib, importlib.util, itertools, json, os, sys, tempfile, warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1' # small networks, and forks
HERE = Path(__file__).parent


class Changed(SourceFileLoader):
    "Loads a module from `source`"
    def __init__(self, name, path, source): super().__init__(name, path); self.source = source
    def get_code(self, name): return compile(self.source, self.path, 'exec')


class Finder:
    "Finds the changed module before Python finds the other"
    def __init__(self, name, source): self.name, self.source = name, source
    def find_spec(self, name, path=None, target=None):
        if name != self.name: return None
        file = str(HERE.parent.joinpath(*name.split('.')).with_suffix('.py'))
        return importlib.util.spec_from_file_location(name, file, loader=Changed(name, file, self.source))


def cases(f):
    "The keyword arguments that `pytest.mark.parametrize` calls for"
    marks = [m.args[:2] for m in getattr(f, 'pytestmark', ()) if m.name == 'parametrize']
    def named(names, values):
        names = [o.strip() for o in names.split(',')]
        return [dict(zip(names, v if len(names) > 1 else [v])) for v in values]
    for o in itertools.product(*(named(*m) for m in marks)): yield {k: v for d in o for k, v in d.items()}


def call(f):
    "Run a test with every set of its arguments; of fixtures it may ask for `tmp_path` and `monkeypatch`"
    import pytest
    wanted = f.__code__.co_varnames[:f.__code__.co_argcount]
    for kwargs in cases(f):
        with tempfile.TemporaryDirectory() as d, pytest.MonkeyPatch.context() as m:
            fixtures = dict(tmp_path=Path(d), monkeypatch=m)
            f(**kwargs, **{k: v for k, v in fixtures.items() if k in wanted})


def forget():
    "Drop the package and its tests from the modules that are loaded"
    for k in list(sys.modules):
        if k.split('.')[0] == 'ddpm_nb' or k.startswith('test_') or k == 'make': del sys.modules[k]


def run(job):
    "The guard that failed and its error, or None"
    sys.meta_path.insert(0, Finder(job['name'], job['source']))
    try:
        with tempfile.TemporaryDirectory() as d:
            for o in job['guards']:
                file, name = o.split(':')
                module = importlib.import_module(file)
                if job['name'].endswith('.ipynb'):
                    module.NBS = Path(d)
                    (module.NBS/job['name']).parent.mkdir(parents=True, exist_ok=True)
                    (module.NBS/job['name']).write_text(job['source'])
                call(getattr(module, name))
    except BaseException as e: return f'{o}: {type(e).__name__}: {str(e)[:200]}'


def main(jobs):
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    warnings.simplefilter('ignore')
    for o in {g.split(':')[0] for job in jobs for g in job['guards']}: importlib.import_module(o)
    forget()
    out = os.dup(1)
    for job in jobs:
        pid = os.fork()
        if not pid:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            os.write(out, (json.dumps(run(job)) + '\n').encode())
            os._exit(0)
        if os.waitpid(pid, 0)[1]: os.write(out, (json.dumps('the process: died: ') + '\n').encode())


if __name__ == '__main__': main(json.load(sys.stdin))
