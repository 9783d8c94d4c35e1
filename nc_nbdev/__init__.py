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
