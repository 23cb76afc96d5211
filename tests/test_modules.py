"The checks of a notebook hold for the module that it makes too, with nothing else of the notebook at hand"
import importlib, warnings

import matplotlib, pytest
from test_mutants import NBS, code_cells


@pytest.mark.parametrize('name', ['05_elbo', 'foundations/01_convolution', 'foundations/02_sequences', 'foundations/04_vae'])
def test_checks_hold_for_the_module(name, monkeypatch):
    monkeypatch.chdir((NBS/name).parent)
    matplotlib.use('Agg')
    warnings.simplefilter('ignore')
    folder, _, stem = name.rpartition('/')
    module = importlib.import_module('.'.join(['ddpm_nb', *folder.split('/')[:bool(folder)], stem.split('_', 1)[1]]))
    ns = {'__name__': name}
    for src in code_cells(name):
        exec(src, ns)
        if '#| export' in src: ns.update({k: getattr(module, k) for k in module.__all__ if k in ns})
    assert all(ns[k] is getattr(module, k) for k in module.__all__)
    matplotlib.pyplot.close('all')
