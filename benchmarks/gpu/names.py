"""Where the library is asked: `names.CEKD` is the class of that name, in whatever module it lives.

A name or argument that was once another stands below with its forms, the present one first."""
import inspect,pkgutil
from functools import lru_cache
from importlib import import_module

package = 'cekd_fastai'
names = dict(GradCheckpoint=('GradCheckpoint','CheckpointTrunk'))
arguments = dict(w_cross=('w_cross','alpha'), w_clean=('w_clean','beta'), cache_targets=('cache_targets','online'), w_hard=('w_hard','hard'))

@lru_cache
def modules():
    "All modules of the library but the command line, which needs more than a step does"
    root = import_module(package)
    found = [o.name for o in pkgutil.walk_packages(root.__path__, f'{package}.') if not o.name.rpartition('.')[2].startswith('_')]
    return [import_module(o) for o in found if o.rpartition('.')[2] not in ('cli','train','recipes')]

@lru_cache
def find(name):
    "What the library calls `name`, by its present or by a former name"
    forms = names.get(name, (name,))
    for form in forms:
        for m in modules():
            o = vars(m).get(form)
            if o is not None and getattr(o, '__module__', m.__name__).startswith(package): return o
    raise AttributeError(f"`{package}` has no {' or '.join(map(repr, forms))}: add its present name to `names` in {__file__}.")

def __getattr__(name):
    if name.startswith('__'): raise AttributeError(name)
    return find(name)

def call(f, *args, **kwargs):
    "`f(*args, **kwargs)`, with the arguments by the names that `f` gives them"
    f = find(f) if isinstance(f, str) else f
    params = inspect.signature(f).parameters
    present = lambda k: next((o for o in arguments.get(k, ()) if o in params), k)
    return f(*args, **{present(k):v for k,v in kwargs.items()})
