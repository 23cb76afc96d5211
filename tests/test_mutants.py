"""Change the code, one thing at a time: something must notice.

Each coefficient of the theory is changed where its notebook states it. The code cells of a notebook run in order in one
namespace. At each cell that defines something, every mutant of that cell is tried: a copy of the namespace, the changed
cell, and the cells after it, until one of them fails. A mutant that survives to the end of its notebook is an equation
that no check holds.

The network, the algorithms, the learner and the scores are changed on import (mutate.py), and test_golden.py must fail:
for each change that once went unnoticed, and for one in `SHARE` of all changes of an operator, a number or a sign.
`MUTANTS=all` tries them all.
"""
import ast, copy, json, os, subprocess, sys, warnings
from pathlib import Path
from zlib import crc32

import matplotlib
import pytest
import torch

HERE = Path(__file__).parent
NBS = HERE.parent/'nbs'
SHARE = 1 if os.environ.get('MUTANTS') == 'all' else 8
SWAPS = dict(abar='prev', prev='abar', vs='vt', vt='vs', lo='hi', hi='lo',
    alphas='alphas_cumprod', alphas_cumprod='alphas_cumprod_prev', alphas_cumprod_prev='alphas_cumprod',
    sqrt_alphas='sqrt_alphas_cumprod', sqrt_alphas_cumprod='sqrt_alphas',
    sqrt_one_minus_alphas='sqrt_one_minus_alphas_cumprod', sqrt_one_minus_alphas_cumprod='sqrt_one_minus_alphas',
    sqrt_recip_alphas_cumprod='sqrt_recipm1_alphas_cumprod', sqrt_recipm1_alphas_cumprod='sqrt_recip_alphas_cumprod',
    posterior_mean_coef_xt='posterior_mean_coef_x0', posterior_mean_coef_x0='posterior_mean_coef_xt',
    posterior_variance='posterior_std', posterior_std='posterior_variance')
OPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
       ast.MatMult: ast.Mult}
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
            if name in ('sqrt', 'log') and isinstance(node.func, ast.Attribute) and not node.args:
                yield node, f'.{name}() dropped', 'drop'
        if isinstance(node, ast.BinOp) and type(node.op) in OPS:
            yield node, f'{type(node.op).__name__} to {OPS[type(node.op)].__name__}', 'op'
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub): yield node, 'sign dropped', 'sign'
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, f'{node.value} to {node.value + 1}', 'const'
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


# --- Coefficients, in the notebooks that state them

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
    '01_schedule': {
        'alphas to alphas_cumprod: def __len__(self): return len(self.alphas)',
        'alphas to alphas_cumprod: return self.alphas.device'},
    '03_posterior': { # a grid as fine as that, and as wide
        '20001 to 20002: def grid_posterior(s, x0, xt, i, n=20_001):',
        '8 to 9: g = torch.linspace(-8, 8, n, dtype=torch.float64)'},
    '04_elbo': {
        '1 to 2: x_T = q_pair(data, sched, T-1, T)'}, # x_T is the same, whatever it is paired with
    '05_loss': {
        'lo to hi: flip = lo > 0 # work in the tail where differences keep their digits', # in the middle both tails do
        '0 to 1: flip = lo > 0 # work in the tail where differences keep their digits',
        'sqrt_one_minus_alphas to sqrt_one_minus_alphas_cumprod: '
        'return sched.posterior_std[1] if len(sched) > 1 else sched.sqrt_one_minus_alphas[0]'},
    'unet': {
        'sign dropped: return torch.cat((a.sin(), a.cos()), -1)'}, # two dimensions
    'diffusion': {
        'alphas to alphas_cumprod: def device(self): return self.schedule.alphas.device',
        '0.0 to 1.0: x, x_0 = step_back(denoise, sched, x, t, noise_like(x) if i else 0., clamp)', # times a std of zero
        '0.0 to 1.0: z = self.noise_like(x.shape, x.device) if t_index else 0.'},
    'sampling': {
        '1 to 2: for i,s in zip(times, [*times[1:], -1]):', # any negative number
        '0.0 to 1.0: eta:float=0., # How much of it', # `ddim` always says how much
        '0.0 to 1.0: x = ddim_step(sched, x, x_0, i, s, noise_like(x) if eta else 0., eta)'}, # times zero
    'learner': {
        '0 to 1: order = 0', '1 to 2: order = 1', # in the same order still
        '0 to 1: if bar and first: bar.update(0) # fastprogress starts its clock at 0',
        '512 to 513: self.fixed = torch.randn(max(512, int(i[-1]) + 1), *x_0.shape[1:], generator=g)', # just more of it
        '1 to 2: self.fixed = torch.randn(max(512, int(i[-1]) + 1), *x_0.shape[1:], generator=g)',
        '1 to 2: if world() > 1: own.append(ProcessesCallback())', # test_processes.py
        # on a GPU only: test_gpu.py
        "1 to 2: n, graph = check_int('accumulate', accumulate), dls.device.type == 'cuda' and world() == 1",
        'Mult to Div: if graph and n*bs <= dl.n: taken, n = n*bs, 1 # at once: the same gradient',
        '1 to 2: if graph and n*bs <= dl.n: taken, n = n*bs, 1 # at once: the same gradient',
        # matplotlib clamps, too
        '1 to 2: images = [unnormalize_to_zero_to_one(o).clamp(0, 1).cpu() for o in torch.cat((x, x_t, x_0))]'},
    'fid': {
        'sign dropped: '
        "if x.shape[-2:] != (size, size): x = F.interpolate(x, (size, size), mode='bicubic', antialias=True)",
        '2 to 3: ' # images of this size stay as they are
        "if x.shape[-2:] != (size, size): x = F.interpolate(x, (size, size), mode='bicubic', antialias=True)",
        '16 to 17: batch_size:int=16, # Images at a time; a CPU is fastest with a few',
        "16 to 17: return self.batch_size*(16 if torch.device(device).type == 'cuda' else 1)"},
    'foundations/04_vae': { # there is one step only
        'alphas to alphas_cumprod: a, none = sched.alphas[0], torch.zeros_like(sched.alphas[0])'},
}
THEORY = ['01_schedule', '02_forward', '03_posterior', '04_elbo', '05_loss', 'foundations/01_convolution',
          'foundations/02_sequences', 'foundations/03_inpainting', 'foundations/04_vae']


def only_defines(src):
    "Does a cell state functions or classes, and do nothing else?"
    try: body = ast.parse(src).body
    except SyntaxError: return False # a cell that calls the shell
    return bool(body) and all(isinstance(o, (ast.FunctionDef, ast.ClassDef)) for o in body)


@pytest.fixture
def untraced():
    "Without the tracer of a coverage measurement, which mutants would slow down and mislead; and with torch as it was"
    trace, dtype = sys.gettrace(), torch.get_default_dtype()
    sys.settrace(None)
    yield
    sys.settrace(trace)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize('name', THEORY)
def test_every_mutant_is_caught(name, monkeypatch, record_property, untraced):
    monkeypatch.chdir((NBS/name).parent)
    matplotlib.use('Agg')
    warnings.simplefilter('ignore')
    cells, ns, tried, alive = code_cells(name), {'__name__': name}, 0, []
    states = [only_defines(src) for src in cells] # what runs something as well is a check, with its helpers
    for i,src in enumerate(cells[:max(i for i, o in enumerate(states) if o) + 1]):
        layers = name.startswith('foundations') and '(nn.Module)' in src # their sizes are design, not mathematics
        if states[i] and not layers:
            for what, new in mutants(src):
                if what in SAME.get(name, ()): continue
                tried += 1
                if caught(dict(ns), new, cells[i+1:]) is None: alive.append(what)
                matplotlib.pyplot.close('all')
        exec(src, ns) # and the original passes
    record_property('mutants', tried)
    print(f'{name}: {tried} mutants, {tried - len(alive)} caught')
    assert tried >= 10 and not alive, '\n'.join(alive)


# --- Changes that once went unnoticed, and the test that must fail for each

A, D, L, X, U, S, P = 'diffusion', 'kit.data', 'learner', 'sampling', 'unet', 'fid', 'kit.plots'
SURVIVED = { # what: module or notebook, old text, new text, guard
    # Algorithm 1
    'another noise as target': (
        A, ', t).float(), noise)', ', t).float(), self.noise_like(noise.shape))', 'forward_is_algorithm_1'),
    'the time of another image': (
        A, 'self.q_sample(x_0, t, noise), t)', 'self.q_sample(x_0, t, noise), t.flip(0))', 'forward_is_algorithm_1'),
    'one time for a batch': (
        A, '(len(x_0),), device=x_0.device)', '(1,), device=x_0.device).expand(len(x_0))', 'forward_is_algorithm_1'),
    'index 0 is never drawn': (A, 'randint(0,', 'randint(1,', 'forward_is_algorithm_1'),
    'half of the times': (
        A, 'randint(0, self.num_timesteps,', 'randint(0, self.num_timesteps//2,', 'forward_is_algorithm_1'),
    # Its learner
    'index 0 is never drawn in training': (A, 'randint(0,', 'randint(1,', 'a_run_is_algorithm_1'),
    'the decay is a half': (L, 'ema_average, decay=self.decay', 'ema_average, decay=.5', 'average_of_the_weights'),
    'the average at every tenth step': (
        L, 'after_step(self): self.avg', 'after_step(self): self.learn.ddpm.steps % 10 or self.avg',
        'average_of_the_weights'),
    'accumulation counts wrong': (
        L, 'GradientAccumulation(n*bs)', 'GradientAccumulation((n - 1)*bs)',
        'accumulated_batches_make_one_step'),
    'half the contrast': (
        L, 'x_0 = self.x.as_subclass(Tensor)', 'x_0 = self.x.as_subclass(Tensor)/2', 'a_run_is_algorithm_1'),
    'the mean for the guess': (
        L, 'd.denoise(x_t, t))[2]', 'd.denoise(x_t, t))[0]', 'show_results_shows_guesses_of_the_image'),
    'another seed': (
        L, 'torch.manual_seed(seed)', 'torch.manual_seed(seed + 1)', 'a_repeated_sample_starts_from_its_seed'),
    'training goes on with the noise of sampling': (
        L, 'if seed is not None: set_random_states', 'if False: set_random_states',
        'a_repeated_sample_starts_from_its_seed'),
    # The images that training sees
    'divided by 128': (D, 'x.float()/127.5 - 1', 'x.float()/128 - 1', 'training_view'),
    'left in [0, 1]': (D, 'x.float()/127.5 - 1', 'x.float()/255', 'training_view'),
    'one crop place for a batch': (
        D, 'torch.randint(s - o + 1, (b,), device=device)', 'torch.randint(s - o + 1, (1,), device=device).expand(b)',
        'training_view'),
    'never augmented': (D, 'train_view if train else eval_view', 'eval_view', 'training_view'),
    'validation augmented': (D, 'train_view if train else eval_view', 'train_view', 'validation_view'),
    'no room for the crop': (D, 'int(1.12*o)', 'int(o)', 'training_view'),
    'nearest shrinking': (D, 'Resampling.BILINEAR', 'Resampling.NEAREST', 'pictures_are_shrunk'),
    'squeezed to a square': (
        D, 'ImageOps.fit(im, (w, h),', 'im.resize((w, h),', 'pictures_are_shrunk'),
    # Algorithm 2 and DDIM
    'no noise in the last two steps': (A, 'noise_like(x) if i else', 'noise_like(x) if i > 1 else', 'chains'),
    'p_sample does not clamp': (
        A, 'self.schedule, x, t, z)[0]', 'self.schedule, x, t, z, False)[0]', 'one_step_back'),
    'no clamp at the end': (
        A, 'unnormalize_to_zero_to_one(img.clamp(-1, 1))', 'unnormalize_to_zero_to_one(img)',
        'samples_are_the_end_of_the_chain'),
    'ancestral ignores clamp': (A, 'if i else 0., clamp)', 'if i else 0.)', 'chains'),
    'eta for its square': (X, 'eta**2*', 'eta*', 'chains'),
    'a step for a leap': (X, '(1 - a/b)', '(1 - sched.alphas[t])', 'chains'),
    'DDIM never clamps': (X, 'if clamp: x_0 =', 'if False: x_0 =', 'chains'),
    'DDIM stops short of the image': (X, '[*times[1:], -1]', '[*times[1:], 0]', 'chains'),
    'one noise for all images': (A, 'noise_like(x) if i', 'noise_like(x[:1]) if i', 'chains'),
    'one noise for all images of DDIM': (X, 'noise_like(x) if eta', 'noise_like(x[:1]) if eta', 'chains'),
    'bits of other images': (
        'loss', 'bound_terms(denoise, sched, x_0,', 'bound_terms(denoise, sched, x_0.flip(0),', 'bound'),
    'the average is not loaded': (
        'kit.files', "'ema' if ema and 'ema' in ckpt else 'model'", "'model'", 'loading_takes_the_average'),
    'the bound always clamps': ('loss', 'denoise(x_t, t), clamp)', 'denoise(x_t, t))', 'bound'),
    # U-Net
    'skips swapped': (U, 'def forward(self, x, b, a, emb):', 'def forward(self, x, a, b, emb):', 'unet'),
    'the same skip twice': (U, 'torch.cat((x, a), 1)', 'torch.cat((x, b), 1)', 'unet'),
    'a difference as second skip': (U, 'torch.cat((x, a), 1)', 'torch.cat((x, a - b), 1)', 'unet'),
    'time in the second block': (
        U, 'self.block2(self.block1(x, scale, shift))', 'self.block2(self.block1(x), scale, shift)', 'unet'),
    'no skip of the stem': (U, '(x, stem)', '(x, 0*stem)', 'unet'),
    'the stem first': (U, '(x, stem)', '(stem, x)', 'unet'),
    'attention without residual': (
        U, 'return x + rearrange(self.out(y)', 'return rearrange(self.out(y)', 'unet'),
    'attention after both blocks': (
        U, 'self.mid2(self.mid_attn(self.mid1(x, emb)), emb)', 'self.mid_attn(self.mid2(self.mid1(x, emb), emb))',
        'unet'),
    'residual subtracted': (U, 'return x + rearrange(self.out(y)', 'return x - rearrange(self.out(y)', 'unet'),
    'linear residual subtracted': (
        U, 'return x + rearrange(self.out_norm', 'return x - rearrange(self.out_norm', 'unet'),
    'bilinear upsampling': (
        U, 'nn.Upsample(scale_factor=2)', "nn.Upsample(scale_factor=2, mode='bilinear')", 'unet'),
    'SiLU after the stem': (U, 'stem = self.stem(x)', 'stem = F.silu(self.stem(x))', 'unet'),
    'fast residual subtracted': (
        'kit.fast', 'return x + as_image(self.out(o)', 'return x - as_image(self.out(o)', 'unet'),
    'fast gradient without the mean': ('kit.fast', 'addcmul(low[:, None], g,', 'mul(g,', 'training_step'),
    # Scores
    'precision with the balls of density': (S, '(d <= real)', '(d <= dense)', 'scores'),
    'precision and recall swapped': (S, 'precision {self.precision:.2f}', 'precision {self.recall:.2f}', 'report'),
    'the floor of half the reference': (S, 'n, g = min(n, len(b)//2)', 'n, g = len(b)//2', 'scores'),
    "EfficientNet's input": ('kit.scores', '(x - 127)/128', 'x/255', 'efficientnet_sees_images_in_its_scale'),
    'the error of KID': (S, 'kid_se=se', 'kid_se=se/3', 'report'),
    'extrapolated from a half': (S, 'len(a)//5', 'len(a)//2', 'scores'),
    'the cache ignores the network': ('kit.scores', "net.key, 'v1')", "'v1')", 'references_are_kept_by_network'),
    # Pictures
    'new noise at each time': (
        P, 'diffusion.q_sample(x_0, t, noise)', 'diffusion.q_sample(x_0, t)', 'forward_strip_has_one_noise'),
    'last panel before the last step': (
        P, 'seen[max(i - 1, 0)] = x', 'seen.setdefault(max(i - 1, 0), x)', 'backward_strip_shows_its_times'),
    'all steps as if at index 0': (
        P, 'ancestral(diffusion.denoise,', 'ancestral(lambda x, t: diffusion.denoise(x, 0*t),',
        'backward_strip_shows_its_times'),
    'columns in reverse': (
        P, 'zip(axes, xs, times)', 'zip(axes, xs.flip(0), times)', 'strips_are_shown_as_they_are'),
    'half as bright': (
        P, 'unnormalize_to_zero_to_one(xs.clamp(-1, 1))', '.5*unnormalize_to_zero_to_one(xs.clamp(-1, 1))',
        'strips_are_shown_as_they_are'),
    'the floor drawn at the value': (P, "ax.plot(step, low, '--'", "ax.plot(step, value, '--'", 'curves'),
    'a mean over one step more': (P, 'i-window+1', 'i-window', 'curves'),
    # Foundations
    'post-norm': ('foundations/02_sequences', 'norm_first=True', 'norm_first=False', 'transformer'),
    'the painter without the mask': (
        'foundations/03_inpainting', 'unshuffle(torch.cat([x, m], 1)', 'unshuffle(torch.cat([x, 0*m], 1)', 'painter'),
    'the painter without its skip': (
        'foundations/03_inpainting', 'torch.cat([self.mid(a), a], 1)', 'torch.cat([self.mid(a), 0*a], 1)', 'painter'),
}


def text_of(module):
    "The text of a module of the package, or of a notebook, from its name here"
    path = NBS/f'{module}.ipynb' if '/' in module else HERE.parent/'ddpm_nb'/f"{module.replace('.', '/')}.py"
    return path.read_text()


def results(jobs):
    "Run jobs of (module, changed source, guards), and return for each the guard that failed with its error, or None"
    def job(module, source, guards):
        name = f'{module}.ipynb' if '/' in module else f'ddpm_nb.{module}'
        guards = [o if ':' in o else f'golden:{o}' for o in guards]
        return dict(name=name, source=source, guards=['test_{}:test_{}'.format(*o.split(':')) for o in guards])
    jobs = [job(*o) for o in jobs]
    r = subprocess.run([sys.executable, HERE/'mutate.py'], input=json.dumps(jobs), text=True, capture_output=True)
    res = [json.loads(o) for o in r.stdout.splitlines()]
    assert r.returncode == 0 and len(res) == len(jobs), r.stderr[-3000:]
    return res


forks = pytest.mark.skipif(sys.platform != 'linux', reason='each change is tried in a fork')


@forks
def test_what_once_survived_is_caught():
    jobs = []
    for what, (module, old, new, guard) in SURVIVED.items():
        text = text_of(module)
        assert text.count(old) == 1, f'{what}: {text.count(old)} times in {module}: {old}'
        jobs.append((module, text.replace(old, new), [guard]))
    res = dict(zip(SURVIVED, results(jobs)))
    # a change that cannot be imported proves nothing
    alive = {k: v for k, v in res.items() if not v or ' AssertionError' not in v}
    assert not alive, '\n'.join(f'{k}: {v}' for k, v in alive.items())


# --- Operators, numbers and signs of what the theory is used for

GUARDS = {
    'unet': ['unet', 'training_step', 'defaults'],
    'diffusion': ['defaults', 'steps', 'forward_is_algorithm_1', 'one_step_back', 'chains',
                  'samples_are_the_end_of_the_chain', 'sampling_draws_from_its_generator'],
    'sampling': ['steps', 'chains', 'samples_are_the_end_of_the_chain'],
    'learner': ['defaults', 'noise_for_more_held_out_images', 'average_of_the_weights',
                'accumulated_batches_make_one_step', 'training_takes_adam_steps',
                'show_results_shows_guesses_of_the_image', 'a_repeated_sample_starts_from_its_seed',
                'a_run_is_algorithm_1'],
    'fid': ['scores', 'report', 'images_reach_the_network_as_clean_fid_has_them', 'fid:compute_fid', 'fid:features',
            'fid:images', 'fid:the_floor_says_at_how_many']}


@forks
def test_changed_operators_are_caught(record_property):
    every = [(m, w, s) for m in GUARDS for w, s in mutants(text_of(m)) if w not in SAME.get(m, ())]
    tried = [(m, w, s) for m, w, s in every if crc32(w.encode()) % SHARE == 0]
    found = results([(m, s, GUARDS[m]) for m, _, s in tried])
    alive = [f'{m}: {w}' for (m, w, _), v in zip(tried, found) if v is None]
    record_property('mutants', len(tried))
    print(f'{len(tried)} of {len(every)} mutants, {len(tried) - len(alive)} caught')
    assert tried and not alive, '\n'.join(alive)
