"""A literate laboratory for neural collapse: measures, apparatus and studies, written as notebooks

Modules:

- `nc_nbdev.lab.claims`: A claim is data: what was measured, the bar it is held to, the control that must fail, and a verdict that is computed.
- `nc_nbdev.lab.data`: Data sets as byte tensors, every change of them a pure function of a seed, and batches whose order depends on nothing but the seed and the epoch.
- `nc_nbdev.lab.models`: The networks of the neural collapse literature, adapted to small images, and the layers of each that are worth measuring.
- `nc_nbdev.lab.settings`: One dataclass says what a training run is, one file says at what scale the studies run.
- `nc_nbdev.lab.training`: A configuration becomes data, a model and a fastai `Learner`."""

__version__ = "0.1.0"

# The names most people need, imported when first used: `import nc_nbdev` alone loads neither torch nor fastai.
_exports = {
    "ClassStatistics": "geometry.statistics",
    "CollapseMeasures": "geometry.measures",
    "measure_collapse": "geometry.measures",
    "measure_features": "geometry.measures",
    "test_collapse": "geometry.generalization",
    "measure": "lab.taps",
    "CollapseRecorder": "lab.recorder",
    "reproduce": "studies",
}
__all__ = list(_exports)


def __getattr__(name):
    from importlib import import_module

    if name not in _exports: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_exports[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_exports])
