"""Write golden.npz: what the package must compute, from an implementation of its own.

Written from the assignment, the interfaces of its starter code and the papers, in NumPy, SciPy and plain PyTorch;
ddpm_nb is never imported. Run it once (`python tests/golden/make.py`): other numbers mean that the package does another
thing.
"""
import math
from pathlib import Path
from zlib import crc32

import numpy as np, torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

FILE = Path(__file__).with_name('golden.npz')

# --- The U-Net, as a function of its weights by name

NETS = { # name: arguments of Unet
    'small': dict(dim=16, dim_mults=(1, 2), channels=3),
    'deep': dict(dim=8, init_dim=16, out_dim=6, dim_mults=(1, 2, 3), channels=1, resnet_block_groups=4,
                 attention='none')}
HEADS, DIM_HEAD = 4, 32


def sizes(c): return [c.get('init_dim') or c['dim'], *(c['dim']*m for m in c['dim_mults'])]


def layers(c):
    "Each layer's name and a function that makes it, in the order in which random weights are drawn"
    d, dim, g, lin = sizes(c), c['dim'], c.get('resnet_block_groups', 8), c.get('attention', 'all') == 'all'
    def res(p, i, o):
        yield f'{p}.time.1', lambda: nn.Linear(4*dim, 2*o)
        for k, n in (('block1', i), ('block2', o)):
            yield f'{p}.{k}.conv', lambda n=n: nn.Conv2d(n, o, 3)
            yield f'{p}.{k}.norm', lambda: nn.GroupNorm(g, o)
        if i != o: yield f'{p}.skip', lambda: nn.Conv2d(i, o, 1)
    def attn(p, n, norms):
        for k in norms: yield f'{p}.{k}', lambda: nn.ParameterDict(dict(gain=torch.ones(n)))
        yield f'{p}.qkv', lambda: nn.Linear(n, 3*HEADS*DIM_HEAD, bias=False)
        yield f'{p}.out', lambda: nn.Linear(HEADS*DIM_HEAD, n)
    def level(p, i, o, width, k):
        yield from res(f'{p}.block1', i, width)
        yield from res(f'{p}.block2', i, width)
        if lin: yield from attn(f'{p}.attn', width, ('norm', 'out_norm'))
        yield f'{p}.resize', lambda: nn.Conv2d(width, o, k)
    n = len(d) - 1
    yield 'stem', lambda: nn.Conv2d(c['channels'], d[0], 7)
    yield 'time.0', lambda: nn.Linear(dim, 4*dim)
    yield 'time.2', lambda: nn.Linear(4*dim, 4*dim)
    for i in range(n): yield from level(f'downs.{i}', d[i], d[i+1], d[i], 3 if i == n - 1 else 4)
    yield from res('mid1', d[-1], d[-1])
    yield from attn('mid_attn', d[-1], ('norm',))
    yield from res('mid2', d[-1], d[-1])
    for j, i in enumerate(reversed(range(n))): yield from level(f'ups.{j}', d[i+1] + d[i], d[i], d[i+1], 3)
    yield from res('final', 2*d[0], dim)
    yield 'out', lambda: nn.Conv2d(dim, c.get('out_dim') or c['channels'], 1)


def drawn(c, seed=0):
    "The weights as PyTorch draws them"
    torch.manual_seed(seed)
    return {f'{name}.{k}': v.detach().double() for name, make in layers(c) for k, v in make().state_dict().items()}


def weights(shapes):
    "For each name a tensor that depends on name and shape alone, of a size that keeps every part of the network busy"
    res = {}
    for k, s in shapes.items():
        z = np.random.RandomState(crc32(k.encode())).standard_normal(tuple(s))
        gain = k.endswith('gain') or 'norm.weight' in k
        res[k] = torch.tensor(1 + .3*z if gain else z/math.sqrt(np.prod(s[1:])) if len(s) > 1 else .3*z)
    return res


def unet(w, c, x, t):
    "Fig. 2: the guess of the noise in `x` at times `t`"
    d, dim, g, n = sizes(c), c['dim'], c.get('resnet_block_groups', 8), len(c['dim_mults'])
    def conv(p, x, **kwargs): return F.conv2d(x, w[f'{p}.weight'], w[f'{p}.bias'], **kwargs)
    def linear(p, x): return F.linear(x, w[f'{p}.weight'], w.get(f'{p}.bias'))
    def block(p, x, pair=None):
        k = w[f'{p}.conv.weight'] # standardised weights (Qiao et al., 2019)
        k = (k - k.mean((1, 2, 3), keepdim=True))/(k.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = F.conv2d(x, k, w[f'{p}.conv.bias'], padding=1)
        x = F.group_norm(x, g, w[f'{p}.norm.weight'], w[f'{p}.norm.bias'])
        if pair is not None: x = x*(1 + pair[0][..., None, None]) + pair[1][..., None, None]
        return F.silu(x)
    def res(p, x):
        y = block(f'{p}.block2', block(f'{p}.block1', x, linear(f'{p}.time.1', F.silu(emb)).chunk(2, 1)))
        return y + (conv(f'{p}.skip', x) if f'{p}.skip.weight' in w else x)
    def norm(p, x): # of each pixel over its channels
        m, v = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - m)/(v + 1e-5).sqrt()*w[f'{p}.gain'][:, None, None]
    def heads(p, x): # three of shape (b, heads, n, d)
        y = linear(f'{p}.qkv', x.flatten(2).transpose(1, 2))
        return [o.unflatten(2, (HEADS, DIM_HEAD)).transpose(1, 2) for o in y.chunk(3, 2)]
    def merge(p, o, x): return linear(f'{p}.out', o.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
    def linear_attention(p, x): # Shen et al., 2018
        if f'{p}.qkv.weight' not in w: return x
        q, k, v = heads(p, norm(f'{p}.norm', x))
        context = k.softmax(2).transpose(2, 3)@v
        return x + norm(f'{p}.out_norm', merge(p, q.softmax(3)/math.sqrt(DIM_HEAD)@context, x))
    def attention(p, x):
        q, k, v = heads(p, norm(f'{p}.norm', x))
        return x + merge(p, (q@k.transpose(2, 3)/math.sqrt(DIM_HEAD)).softmax(3)@v, x)
    freqs = 10000.**-(torch.arange(dim//2, dtype=x.dtype)/(dim//2 - 1))
    emb = t[:, None]*freqs
    emb = linear('time.2', F.gelu(linear('time.0', torch.cat((emb.sin(), emb.cos()), 1))))
    stem = x = conv('stem', x, padding=3)
    skips = []
    for i in range(n):
        x = res(f'downs.{i}.block1', x)
        skips.append(x)
        x = linear_attention(f'downs.{i}.attn', res(f'downs.{i}.block2', x))
        skips.append(x)
        x = conv(f'downs.{i}.resize', x, padding=1, stride=1 if i == n - 1 else 2)
    x = res('mid2', attention('mid_attn', res('mid1', x)))
    for j in range(n):
        x = res(f'ups.{j}.block1', torch.cat((x, skips.pop()), 1))
        x = linear_attention(f'ups.{j}.attn', res(f'ups.{j}.block2', torch.cat((x, skips.pop()), 1)))
        if j < n - 1: x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) # nearest
        x = conv(f'ups.{j}.resize', x, padding=1)
    return conv('out', res('final', torch.cat((x, stem), 1)))


def make_unet(r):
    for name, c in NETS.items():
        x = torch.tensor(r.standard_normal((3, c['channels'], 8, 12)).astype('f'))
        t = torch.tensor([0, 7, 49])
        w = drawn(c)
        yield f'{name}/x', x
        yield f'{name}/t', t
        yield f'{name}/seed0', unet(w, c, x.double(), t)
        yield f'{name}/y', unet(weights({k: v.shape for k, v in w.items()}), c, x.double(), t)


def make_step(r):
    "One step of Algorithm 1 with weights by name"
    c, T = NETS['small'], 50
    w = {k: v.requires_grad_() for k, v in weights({k: v.shape for k, v in drawn(c).items()}).items()}
    x_0, noise = (torch.tensor(r.standard_normal((4, 3, 8, 8)).astype('f')) for _ in range(2))
    x_0, t = x_0.clamp(-1, 1), torch.tensor([0, 3, 30, 49])
    ab = torch.tensor(np.cumprod(cosine(T)))[t][:, None, None, None]
    loss = (unet(w, c, ab.sqrt()*x_0 + (1 - ab).sqrt()*noise, t) - noise).abs().mean()
    loss.backward()
    names, grads = sorted(w), {k: v.grad for k, v in w.items()}
    yield 'step/x_0', x_0
    yield 'step/t', t
    yield 'step/noise', noise
    yield 'step/loss', loss.detach()
    yield 'step/grads', torch.stack([grads[k].norm() for k in names])
    yield 'step/grad_sums', torch.stack([grads[k].sum() for k in names]) # which show their signs


# --- Schedules and chains, in float64

def cosine(T, s=.008):
    f = np.cos((np.arange(T + 1)/T + s)/(1 + s)*np.pi/2)**2
    return np.clip(f[1:]/f[:-1], .001, 1)


def linear(T, lo=1e-4, hi=.02): return np.clip(1 - 1000/T*np.linspace(lo, hi, T), .001, None)


def sigmoid(T, start=-3, end=3):
    v = 1/(1 + np.exp(-(start + np.arange(T + 1)/T*(end - start))))
    ab = (v[-1] - v)/(v[-1] - v[0])
    return np.clip(ab[1:]/ab[:-1], .001, 1)


def fake(x, t, tanh=np.tanh, cos=np.cos):
    "A guess of the noise that depends on all it is told, for NumPy and PyTorch"
    return .6*tanh(x) + .3*cos(t)


def oracle(ab, x, mean=.2, std=.4):
    "The best guess of the noise if the images are Gaussian"
    return (1 - ab)**.5*(x - ab**.5*mean)/(ab*std**2 + 1 - ab)


def guess(a, x, t, eps, clamp):
    ab = np.cumprod(a)[t]
    x_0 = (x - np.sqrt(1 - ab)*eps)/np.sqrt(ab)
    return x_0.clip(-1, 1) if clamp else x_0


def posterior(a, x, x_0, t):
    "Eq. 18: mean and variance"
    ab, prev = np.cumprod(a)[t], 1. if t == 0 else np.cumprod(a)[t-1]
    mean = np.sqrt(a[t])*(1 - prev)/(1 - ab)*x + np.sqrt(prev)*(1 - a[t])/(1 - ab)*x_0
    return mean, (1 - prev)/(1 - ab)*(1 - a[t])


def ancestral(eps, a, x, zs, clamp=True, start=None):
    "Algorithm 2: for each step the images and the guess of x_0"
    for t, z in zip(range(len(a) - 1 if start is None else start, -1, -1), zs):
        x_0 = guess(a, x, t, eps(x, t), clamp)
        x, var = posterior(a, x, x_0, t)
        if t > 0: x = x + np.sqrt(var)*z
        yield x, x_0


def ddim(eps, a, x, zs, clamp=True, steps=None, eta=0.):
    "Eq. 12 of Song et al., 2020; the noise is the one that leads from the (clamped) guess to x"
    T, abar = len(a), np.cumprod(a)
    times = [round(o) for o in np.linspace(T - 1, 0, steps or T)]
    for t, s, z in zip(times, [*times[1:], None], zs):
        ab, to = abar[t], 1. if s is None else abar[s]
        x_0 = guess(a, x, t, eps(x, t), clamp)
        e = (x - np.sqrt(ab)*x_0)/np.sqrt(1 - ab)
        sigma = eta*np.sqrt((1 - to)/(1 - ab))*np.sqrt(1 - ab/to)
        x = np.sqrt(to)*x_0 + np.sqrt(np.maximum(1 - to - sigma**2, 0))*e + sigma*z
        yield x, x_0


CHAINS = { # name: sampler, its arguments, number of steps T
    **{f'ancestral {n} clamp={c}': (ancestral, dict(clamp=c), 8) for n in ('fake', 'oracle') for c in (True, False)},
    'ancestral fake from 4': (ancestral, dict(start=4), 8),
    **{f'ddim {n} eta={e} steps={s} clamp={c}': (ddim, dict(eta=e, steps=s, clamp=c), 8)
       for n, c in (('fake', True), ('oracle', False)) for e in (0., .5, 1.) for s in (8, 5, 3)},
    'ddim fake eta=1.0 steps=2': (ddim, dict(eta=1., steps=2), 8),
    'ddim fake eta=0.0 steps=1': (ddim, dict(steps=1), 8),
    'ddim fake clamp=False': (ddim, dict(clamp=False), 8)}


def make_chains(r):
    for name, f in (('cosine', cosine), ('linear', linear), ('sigmoid', sigmoid)): yield f'alphas/{name}', f(50)
    x, zs, a = r.standard_normal((3, 2, 4, 4)), r.standard_normal((8, 3, 2, 4, 4)), cosine(8)
    abar = np.cumprod(a)
    yield 'chains/x', x
    yield 'chains/zs', zs
    for name, (f, kwargs, T) in CHAINS.items():
        eps = fake if 'fake' in name else lambda x, t: oracle(abar[t], x)
        xs, x_0s = zip(*f(eps, a, x, zs, **kwargs))
        yield f'chains/{name}/x', np.stack(xs)[:, :1]
        yield f'chains/{name}/x_0', np.stack(x_0s)[:, :1]
        yield f'chains/{name}/last', xs[-1]


# --- The bound

def make_bound(r):
    from scipy.stats import norm
    T, a = 6, cosine(6)
    abar = np.cumprod(a)
    x_0 = r.randint(0, 256, (3, 2, 3, 3))
    x_0[0, 0, 0], x_0[0, 0, 1] = 0, 255
    x_0 = x_0/127.5 - 1
    zs, off = r.standard_normal((T, *x_0.shape)), .05*r.standard_normal(x_0.shape)
    yield 'bound/x_0', x_0
    yield 'bound/zs', zs
    yield 'bound/off', off # of the guess from the image
    for clamp in (True, False):
        terms, width = [], np.sqrt(posterior(a, x_0, x_0, 1)[1])
        for t in range(T):
            x_t = np.sqrt(abar[t])*x_0 + np.sqrt(1 - abar[t])*zs[t]
            g = (x_0 + off).clip(-1, 1) if clamp else x_0 + off
            mean, var = posterior(a, x_t, g, t)
            if t: terms.append(((posterior(a, x_t, x_0, t)[0] - mean)**2/(2*var)).sum((1, 2, 3)))
            else:
                hi = np.where(x_0 > .999, 1, norm.cdf(x_0 + 1/255, mean, width))
                lo = np.where(x_0 < -.999, 0, norm.cdf(x_0 - 1/255, mean, width))
                terms.append(-np.log(hi - lo).sum((1, 2, 3)))
                yield f'bound/real/{clamp}', -norm.logpdf(x_0, mean, width).sum((1, 2, 3))
        kl = (abar[-1]*x_0**2 + (1 - abar[-1]) - 1 - np.log(1 - abar[-1]))/2 # of q(x_T | x_0) from the prior
        terms = np.stack([*terms, kl.sum((1, 2, 3))], 1)
        yield f'bound/terms/{clamp}', terms
        yield f'bound/bits/{clamp}', terms.sum(1)/math.log(2)/x_0[0].size


# --- Scores, by brute force

def frechet(a, b):
    from scipy.linalg import sqrtm
    ca, cb = (np.cov(o, rowvar=False) for o in (a, b))
    return ((a.mean(0) - b.mean(0))**2).sum() + np.trace(ca + cb - 2*sqrtm(ca@cb).real)


def mmd(a, b):
    "Unbiased, with the cubic kernel"
    k = lambda x, y: (x@y/len(x) + 1)**3
    m, n = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(m) for j in range(m) if i != j)/(m*(m-1))
    bb = sum(k(b[i], b[j]) for i in range(n) for j in range(n) if i != j)/(n*(n-1))
    return aa + bb - 2*sum(k(x, y) for x in a for y in b)/(m*n)


def without_one(a, b):
    "KID without each row of `a`, and without each row of `b`"
    return (np.array([mmd(np.delete(a, i, 0), b) for i in range(len(a))]),
            np.array([mmd(a, np.delete(b, i, 0)) for i in range(len(b))]))


def kid_error(a, b):
    "Of the jackknife over both sets"
    return math.sqrt(sum((len(o) - 1)/len(o)*((o - np.mean(o))**2).sum() for o in without_one(a, b)))


def prdc(a, b, k=3, dense=5):
    dist = lambda x, y: math.sqrt(((x - y)**2).sum())
    ball = lambda xs, k: [sorted(dist(x, y) for y in xs)[k] for x in xs] # number 0 is itself
    ra, rb, rd = ball(a, k), ball(b, k), ball(b, dense)
    return dict(precision=np.mean([any(dist(x, y) <= r for y, r in zip(b, rb)) for x in a]),
                recall=np.mean([any(dist(x, y) <= r for x, r in zip(a, ra)) for y in b]),
                density=sum(dist(x, y) <= r for x in a for y, r in zip(b, rd))/(dense*len(a)),
                coverage=np.mean([any(dist(x, y) <= r for x in a) for y, r in zip(b, rd)]))


def make_scores(r):
    a, b = (r.standard_normal((25, 4)) + [.5, 0, 0, 0]).astype('f'), r.standard_normal((41, 4)).astype('f')
    x, y = a.astype('d'), b.astype('d')
    yield 'scores/a', a
    yield 'scores/b', b
    yield 'scores/value', frechet(x, y)
    yield 'scores/few', frechet(x[:3], y)
    yield 'scores/kid', mmd(x, y)
    yield 'scores/kid_se', kid_error(x, y)
    for k, v in zip('ab', without_one(x, y)): yield f'scores/kid_without/{k}', v
    for k, v in prdc(x, y).items(): yield f'scores/{k}', v
    perm = lambda g, n: torch.randperm(n, generator=g).numpy()
    for n in (8, 20):
        g = torch.Generator().manual_seed(0)
        ps = [perm(g, len(b)) for _ in range(3)]
        yield f'scores/floor/{n}', np.mean([frechet(y[p[:n]], y[p[n:]]) for p in ps])
    for k, m in (('', 25), ('/few', 12)):
        g, ns = torch.Generator().manual_seed(0), np.linspace(m//5, m, 10).astype(int)
        yield f'scores/infinity{k}', np.polyfit(1/ns, [frechet(x[:m][perm(g, m)[:n]], y) for n in ns], 1)[1]


# --- A photograph made small, by a triangle as wide as the shrinking

def shrink(im, size):
    "Antialiased bilinear shrinking of the middle square of an image (h, w, 3)"
    s = min(im.shape[:2])
    def weights_of(n): # of n rows or columns, for each of the result; the triangle reaches beyond the square
        k = 1 - abs(np.arange(n) + .5 - (n - s)/2 - (np.arange(size) + .5)[:, None]*s/size)*size/s
        return k.clip(0)/k.clip(0).sum(1, keepdims=True)
    return np.einsum('is,jt,stc->ijc', *map(weights_of, im.shape[:2]), im)


def enlarge(im, size):
    "clean-fid's: Pillow's bicubic resizing of each channel in floating point, of an image (h, w, 3)"
    grow = lambda x: Image.fromarray(x.astype('f')).resize((size, size), Image.Resampling.BICUBIC)
    return np.stack([grow(im[..., i]) for i in range(3)], -1).clip(0, 255)


def make_pictures(r):
    x = r.uniform(0, 1, (6, 5, 5, 3)).astype('f')
    yield 'pictures/unit', x.transpose(0, 3, 1, 2)
    large = [enlarge(np.floor(o*255 + .5), 299) for o in x]
    # some pixels of what a PNG's bytes become
    yield 'pictures/large', np.stack(large)[:, ::23, ::23].transpose(0, 3, 1, 2)
    for name, (h, w) in dict(wide=(40, 72), tall=(72, 40)).items():
        im = r.randint(0, 256, (h, w, 3)).astype(np.uint8)
        yield f'pictures/{name}', im
        yield f'pictures/{name}/small', shrink(im, 17)


# --- Foundations: a Transformer of the course, and its painter

def transformer(w, ids, heads, causal):
    "A block that normalises before each part (Xiong et al., 2020), logits for each place"
    def linear(p, x): return F.linear(x, w[f'{p}weight'], w[f'{p}bias'])
    def norm(p, x): return F.layer_norm(x, x.shape[-1:], w[f'{p}.weight'], w[f'{p}.bias'])
    x = w['words.weight'][ids] + w['places.weight'][:ids.shape[1]]
    y = linear('block.self_attn.in_proj_', norm('block.norm1', x))
    q, k, v = (o.unflatten(2, (heads, -1)).transpose(1, 2) for o in y.chunk(3, 2))
    scores = q@k.transpose(2, 3)/math.sqrt(q.shape[-1])
    if causal: scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -math.inf)
    x = x + linear('block.self_attn.out_proj.', (scores.softmax(3)@v).transpose(1, 2).flatten(2))
    x = x + linear('block.linear2.', F.relu(linear('block.linear1.', norm('block.norm2', x))))
    return linear('head.', x)


def transformer_shapes(n_in, n_out, length, dim=16):
    square, line = (dim, dim), (dim,)
    block = {'self_attn.in_proj_weight': (3*dim, dim), 'self_attn.in_proj_bias': (3*dim,),
             'self_attn.out_proj.weight': square, 'self_attn.out_proj.bias': line,
             'linear1.weight': square, 'linear1.bias': line, 'linear2.weight': square, 'linear2.bias': line,
             **{f'norm{i}.{k}': line for i in (1, 2) for k in ('weight', 'bias')}}
    return {'words.weight': (n_in, dim), 'places.weight': (length, dim), **{f'block.{k}': v for k, v in block.items()},
            'head.weight': (n_out, dim), 'head.bias': (n_out,)}


def painter(w, x, m):
    "Two levels with a skip; it sees the image and the mask"
    def conv(p, x, **kwargs): return F.conv2d(x, w[f'{p}.weight'], w[f'{p}.bias'], padding=1, **kwargs)
    def grow(x): return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    a = F.silu(conv('down.0', F.pixel_unshuffle(torch.cat((x, m), 1), 2)))
    y = F.silu(conv('mid.0.0', a, stride=2))
    y = grow(F.silu(conv('mid.2.0', F.silu(conv('mid.1.0', y)))))
    y = grow(F.silu(conv('up.0.0', torch.cat((y, a), 1))))
    return conv('up.3', F.silu(conv('up.2.0', y))).sigmoid()


def painter_shapes(channels, dim):
    sizes = {'down.0': (dim, 4*(channels + 1)),
             'mid.0.0': (2*dim, dim), 'mid.1.0': (2*dim, 2*dim), 'mid.2.0': (2*dim, 2*dim),
             'up.0.0': (dim, 3*dim), 'up.2.0': (dim//2, dim), 'up.3': (channels, dim//2)}
    return {f'{k}.{n}': (*s, 3, 3) if n == 'weight' else s[:1] for k, s in sizes.items() for n in ('weight', 'bias')}


def make_foundations(r):
    ids = torch.tensor(r.randint(0, 5, (4, 6)))
    yield 'foundations/ids', ids
    for causal in (True, False):
        w = weights(transformer_shapes(6 if causal else 5, 5, 6))
        yield f'foundations/transformer/{causal}', transformer(w, ids, 2, causal)
    x, m = (torch.tensor(o.astype('f')) for o in (r.uniform(0, 1, (2, 1, 8, 8)), r.randint(0, 2, (2, 1, 8, 8))))
    yield 'foundations/x', x
    yield 'foundations/m', m
    yield 'foundations/painted', painter(weights(painter_shapes(1, 8)), x.double(), m.double())


if __name__ == '__main__':
    parts = (make_unet, make_step, make_chains, make_bound, make_scores, make_pictures, make_foundations)
    res = {k: np.asarray(v) for i, f in enumerate(parts) for k, v in f(np.random.RandomState(i))}
    np.savez_compressed(FILE, **res)
    print(f'{len(res)} arrays, {FILE.stat().st_size} bytes')
