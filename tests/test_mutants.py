"""Change each coefficient of the theory, one at a time: the notebook that states it must notice.

The code cells of a notebook run in order in one namespace. At each exported cell, every mutant of that cell is tried: a copy of the
namespace, the changed cell, and the cells after it, until one of them fails. A mutant that survives to the end of its notebook is
an equation that no check holds.
"""
import ast, copy, json, sys, warnings
from pathlib import Path

import matplotlib
import pytest

NBS = Path(__file__).parent.parent/'nbs'
SWAPS = dict(abar='prev', prev='abar', vs='vt', vt='vs', lo='hi', hi='lo',
    alphas='alphas_cumprod', alphas_cumprod='alphas_cumprod_prev', alphas_cumprod_prev='alphas_cumprod',
    sqrt_alphas='sqrt_alphas_cumprod', sqrt_alphas_cumprod='sqrt_alphas',
    sqrt_one_minus_alphas='sqrt_one_minus_alphas_cumprod', sqrt_one_minus_alphas_cumprod='sqrt_one_minus_alphas',
    sqrt_recip_alphas_cumprod='sqrt_recipm1_alphas_cumprod', sqrt_recipm1_alphas_cumprod='sqrt_recip_alphas_cumprod',
    posterior_mean_coef_xt='posterior_mean_coef_x0', posterior_mean_coef_x0='posterior_mean_coef_xt',
    posterior_variance='posterior_std', posterior_std='posterior_variance')
OPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult}
NOT_MATHS = ('refuse', 'check_', 'register_buffer', 'super', 'isfinite', 'split', 'format', 'to_', 'type')


def mutants(src):
    "Each change of one operator, number, root, sign or coefficient in `src`, as (what, new source)"
    def sites(node):
        "Pairs of a mutating function and a description, for the nodes that are mathematics"
        if isinstance(node, (ast.JoinedStr, ast.AnnAssign)): return
        if isinstance(node, ast.arg): return # annotations
        if isinstance(node, ast.Call):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if name.startswith(NOT_MATHS): return
            if name in ('sqrt', 'log') and isinstance(node.func, ast.Attribute) and not node.args: yield node, f'.{name}() dropped', 'drop'
        if isinstance(node, ast.BinOp) and type(node.op) in OPS: yield node, f'{type(node.op).__name__} to {OPS[type(node.op)].__name__}', 'op'
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub): yield node, 'sign dropped', 'sign'
        if isinstance(node, ast.Constant) and type(node.value) in (int, float): yield node, f'{node.value} to {node.value + 1}', 'const'
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            k = node.id if isinstance(node, ast.Name) else node.attr
            if k in SWAPS: yield node, f'{k} to {SWAPS[k]}', 'name'
        for field, value in ast.iter_fields(node):
            if field in ('annotation', 'returns', 'decorator_list'): continue
            for child in (value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST): yield from sites(child)

    tree = ast.parse(src)
    for i, (_, what, _) in enumerate(list(sites(tree))):
        new = copy.deepcopy(tree)
        node, _, kind = list(sites(new))[i]
        where = node.lineno
        if kind == 'op': node.op = OPS[type(node.op)]()
        elif kind == 'const': node.value += 1
        elif kind == 'name':
            if isinstance(node, ast.Name): node.id = SWAPS[node.id]
            else: node.attr = SWAPS[node.attr]
        else: # replace the node by its inner one
            inner = node.func.value if kind == 'drop' else node.operand
            class Put(ast.NodeTransformer):
                def visit(self, n): return inner if n is node else self.generic_visit(n)
            new = Put().visit(new)
        yield f'{what}: {src.splitlines()[where-1].strip()}', ast.unparse(ast.fix_missing_locations(new))


def code_cells(name):
    cells = json.loads((NBS/f'{name}.ipynb').read_text())['cells']
    srcs = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return [s for s in srcs if 'eval: false' not in s and 'nbdev_export' not in s and 'default_exp' not in s]


def caught(ns, first, rest):
    "The name of the error that `first` or one of `rest` raises in `ns`, or None"
    try:
        for s in (first, *rest): exec(s, ns)
    except Exception as e: return type(e).__name__


# Mutants that change nothing: no check can tell them from the original.
SAME = {
    '02_schedule': {
        'alphas to alphas_cumprod: def __len__(self): return len(self.alphas)',
        'alphas to alphas_cumprod: return self.alphas.device'},
    '05_elbo': {
        '1 to 2: x_T = q_pair(data, sched, T-1, T)', # x_T is the same, whatever it is paired with
        'lo to hi: flip = lo > 0 # work in the tail where differences keep their digits', # in the middle both tails do
        '0 to 1: flip = lo > 0 # work in the tail where differences keep their digits',
        'sqrt_one_minus_alphas to sqrt_one_minus_alphas_cumprod: return sched.posterior_std[1] if len(sched) > 1 else sched.sqrt_one_minus_alphas[0]'},
    'foundations/04_vae': {
        'alphas to alphas_cumprod: a, none = sched.alphas[0], torch.zeros_like(sched.alphas[0])'}, # there is one step only
}


@pytest.fixture
def untraced():
    "Without the tracer of a coverage measurement, which mutants would slow down and mislead"
    trace = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(trace)


@pytest.mark.parametrize('name', ['02_schedule', '03_forward', '04_posterior', '05_elbo', 'foundations/01_convolution', 'foundations/02_sequences', 'foundations/03_inpainting', 'foundations/04_vae'])
def test_every_mutant_is_caught(name, monkeypatch, record_property, untraced):
    monkeypatch.chdir((NBS/name).parent)
    matplotlib.use('Agg')
    warnings.simplefilter('ignore')
    cells, ns, tried, alive = code_cells(name), {'__name__': name}, 0, []
    last = max(i for i,src in enumerate(cells) if '#| export' in src) # what comes after shows and checks
    for i,src in enumerate(cells[:last + 1]):
        layers = name.startswith('foundations') and '(nn.Module)' in src # their sizes are design, not mathematics
        if '#| export' in src and 'def ' in src and not layers:
            for what, new in mutants(src):
                if what in SAME.get(name, ()): continue
                tried += 1
                if caught(dict(ns), new, cells[i+1:]) is None: alive.append(what)
                matplotlib.pyplot.close('all')
        exec(src, ns) # and the original passes
    record_property('mutants', tried)
    print(f'{name}: {tried} mutants, {tried - len(alive)} caught')
    assert tried >= 10 and not alive, '\n'.join(alive)
