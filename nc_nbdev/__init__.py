"""A literate laboratory for neural collapse: measures, apparatus and studies, written as notebooks

Modules:

- `nc_nbdev.geometry.duality`: At collapse the rows of the last layer point along the centred class means. Three measures of the distance between the two, and one of the bias that is left.
- `nc_nbdev.geometry.etf`: `simplex_etf` returns K unit vectors as far from one another as K vectors can be: the shape that class means take when a network collapses.
- `nc_nbdev.geometry.generalization`: Collapse on the train set is one thing, collapse on fresh data another, and there are two ways to mean the second. Four variances tell them apart.
- `nc_nbdev.geometry.means`: Equal norms, equal angles, and angles as wide as $K$ vectors allow: four numbers that are 0 exactly when the class means are a simplex equiangular tight frame, and what replaces them when no simplex fits.
- `nc_nbdev.geometry.measures`: One call gives every measure of collapse there is for what you have: features, statistics, a classifier. What cannot be had is `None`, and says why.
- `nc_nbdev.geometry.nearest_centre`: At collapse the network answers with the class whose train mean is nearest. How often do the two rules differ, and how good is the simple one?
- `nc_nbdev.geometry.ood`: Features of images from no class at all: their mean becomes orthogonal to every class mean.
- `nc_nbdev.geometry.statistics`: `ClassStatistics` reads features once, batch by batch, and keeps what every measure of collapse needs: a count, a mean and a spread for each class.
- `nc_nbdev.geometry.variability`: Four numbers for one question: how small is the spread of features around their class means, compared with the distance between the means?
- `nc_nbdev.lab.claims`: A claim is data: what was measured, the bar it is held to, the control that must fail, and a verdict that is computed.
- `nc_nbdev.lab.data`: Data sets as byte tensors, every change of them a pure function of a seed, and batches whose order depends on nothing but the seed and the epoch.
- `nc_nbdev.lab.figures`: Curves over training, seeds as bands, the terminal phase shaded: every figure of a study is drawn from the tidy history.
- `nc_nbdev.lab.models`: The networks of the neural collapse literature, adapted to small images, and the layers of each that are worth measuring.
- `nc_nbdev.lab.probes`: How well can classes that a network was not trained on be read off its features? A linear probe whose convergence is proved, and five other ways to ask.
- `nc_nbdev.lab.recorder`: One callback for any fastai `Learner`: collapse of every tapped layer, on train and test, as training goes on.
- `nc_nbdev.lab.runs`: A run is trained once: asking for it again reads it, and one that was cut off goes on where it stopped.
- `nc_nbdev.lab.settings`: One dataclass says what a training run is, one file says at what scale the studies run.
- `nc_nbdev.lab.taps`: Take the features of any layers of any network while it runs, and measure their collapse in one pass over the data.
- `nc_nbdev.lab.training`: A configuration becomes data, a model and a fastai `Learner`.
- `nc_nbdev.paper.cascade`: Layer by layer: the deeper, the more collapsed; the earlier layers follow, later and less.
- `nc_nbdev.paper.random_labels`: With random labels there is nothing to learn, and the train features collapse all the same.
- `nc_nbdev.paper.tetrahedron`: Four classes, three dimensions: collapse as something one can turn with the mouse.
- `nc_nbdev.paper.train_vs_test`: On the train set features run into their class means; on test data they stop on the way.
- `nc_nbdev.paper.training_longer`: A network trained on pairs of classes knows the classes in the middle of training, and forgets them while its features collapse.
- `nc_nbdev.paper.which_layer`: Early in training the last layer knows the fine classes best; at the end a layer before it does.
- `nc_nbdev.rooms`: The rooms, their modules, and who imports whom, drawn from the source.
- `nc_nbdev.studies`: Every study, one command, one scoreboard.
- `nc_nbdev.theory.deep_unconstrained`: More layers on top of free features: every layer collapses, the soft threshold becomes a jump, zero becomes a trap, and with ReLU collapse stops being unique and then optimal.
- `nc_nbdev.theory.local_elasticity`: If a step on one sample moves its own class more than the others, classes separate and collapse; if not, they never do, however long one trains. The condition is one inequality, and both its sides can be measured in a network.
- `nc_nbdev.theory.many_classes`: When no simplex fits, collapse maximises another quantity, the one-vs-rest margin. Its largest value is known up to twice as many classes as dimensions, and cross-entropy reaches it as the temperature goes to zero.
- `nc_nbdev.theory.minority_collapse`: When some classes have few samples their classifiers do not only lean towards each other: beyond a finite imbalance they become one and the same vector, at a ratio that one line of algebra predicts.
- `nc_nbdev.theory.modelling_principles`: Why does collapse happen? Nine answers, what each assumes, what each predicts of NC1 to NC4, and the one thing that none of them predicts: what happens on fresh data.
- `nc_nbdev.theory.normalised`: Put every feature and every classifier row on a sphere: no regulariser is left to tune, the minimiser is the simplex at every temperature, and gradient descent on the sphere finds it from every start.
- `nc_nbdev.theory.perturbation`: Real features cannot go wherever the loss wants them: they are held near what the layers below deliver. A model with this one constraint says how much of the collapse is left.
- `nc_nbdev.theory.transfer_bound`: If classes are small compared with their distance, a few examples suffice to tell them apart: a bound with its best constant. Whether classes *unseen* in training are small is another question, and on digits they are not.
- `nc_nbdev.theory.unconstrained_ce`: If a network could place its features anywhere, weight decay and cross-entropy would place them on a simplex: the minimiser, its size and the way there, in closed form.
- `nc_nbdev.theory.unconstrained_mse`: With squared error everything can be solved: which singular values survive weight decay, what the bias decides, and how collapse proceeds in time."""

__version__ = "0.1.0"

import warnings

# fastai calls torch.jit.script when it is imported, which PyTorch now warns of; nobody here can act on it.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# The names most people need, imported when first used: `import nc_nbdev` alone loads neither torch nor fastai.
_exports = {
    "ClassStatistics": "geometry.statistics",
    "CollapseMeasures": "geometry.measures",
    "measure_collapse": "geometry.measures",
    "measure_features": "geometry.measures",
    "test_collapse": "geometry.generalization",
    "measure": "lab.report",
    "CollapseRecorder": "lab.recorder",
    "reproduce": "reproduce",
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
