"""A literate laboratory for neural collapse: measures, apparatus and studies, written as notebooks

Modules:

- `nc_nbdev.geometry.duality`: At collapse the rows of the last layer point along the centred class means. Three measures of the distance between the two, and one of the bias that is left.
- `nc_nbdev.geometry.etf`: `simplex_etf` returns K unit vectors as far from one another as K vectors can be: the shape that class means take when a network collapses.
- `nc_nbdev.geometry.generalization`: Features can collapse on the train set and not on fresh data, and collapse on fresh data has two definitions. Four variances tell them apart.
- `nc_nbdev.geometry.means`: Equal norms, equal angles, and angles as wide as $K$ vectors allow: four numbers that are 0 exactly when the class means are a simplex equiangular tight frame, and what replaces them when no simplex fits.
- `nc_nbdev.geometry.measures`: One call gives every measure of collapse that your features, statistics and classifier allow. A measure that cannot be computed is `None`, with the reason.
- `nc_nbdev.geometry.nearest_centre`: At collapse the network answers with the class whose train mean is nearest. How often do the two rules differ, and how good is the simple one?
- `nc_nbdev.geometry.ood`: Features of images from no class at all: their mean becomes orthogonal to every class mean.
- `nc_nbdev.geometry.regression`: When targets are numbers, features collapse to a few directions. Three measures, from one pass.
- `nc_nbdev.geometry.statistics`: `ClassStatistics` reads features once, batch by batch, and keeps what every measure of collapse needs: a count, a mean and a spread for each class.
- `nc_nbdev.geometry.variability`: Four numbers for one question: how small is the spread of features around their class means, compared with the distance between the means?
- `nc_nbdev.lab.claims`: A claim is stated before it is measured: the quantity, the bar, and the control that must not pass the bar. The verdict is computed.
- `nc_nbdev.lab.features_on_disk`: Features that other software has saved, measured from the command line: `nc-measure features.npz`.
- `nc_nbdev.lab.figures`: Curves over training with seeds as bands and the terminal phase shaded: every figure of a study is drawn from the tidy history.
- `nc_nbdev.lab.history`: All numbers that are measured in training stand in one tidy table. This page has the functions that read it.
- `nc_nbdev.lab.integrations`: Collapse during training in the frameworks people have: a Lightning callback, a Hugging Face callback, and a metric of torchmetrics.
- `nc_nbdev.lab.many_machines`: Runs go to the workers of a cluster. One measure over data that is divided among processes equals the measure in one process.
- `nc_nbdev.lab.probes`: A linear probe that states how features are prepared, chooses its penalty on held-out data and is solved to its optimum; and three other ways to ask.
- `nc_nbdev.lab.recorder`: One callback for any fastai `Learner`: collapse of every tapped layer, on train and test, as training goes on.
- `nc_nbdev.lab.regression`: The same call measures a network that predicts numbers: `nc.measure(model, train_dl, test_dl)`.
- `nc_nbdev.lab.report`: Every measure of collapse for any network and any loader: `measure(model, train_dl, test_dl)`.
- `nc_nbdev.lab.runs`: A run is trained once. When you ask for it again it is read from disk. A run that was cut off goes on where it stopped.
- `nc_nbdev.lab.settings`: One file says at what scale the studies run, with how many seeds, on which device, and where data and runs are kept.
- `nc_nbdev.lab.store`: Every file is written whole or not at all, and its checksum is compared when it is read.
- `nc_nbdev.lab.studies`: A study declares its claims first. One decorator does what all studies need: it reads the settings, computes the verdicts, and keeps the result until the code that the study uses changes.
- `nc_nbdev.lab.taps`: Take the features of any layer of any network while it runs, as vectors.
- `nc_nbdev.neighbours.apparatus`: A recipe of ten lines for anything that has tensors, a network and a loss: trained, measured and kept as image runs are.
- `nc_nbdev.neighbours.convergence`: Where training with weight decay has come to rest, the weights of every layer can be computed from its inputs and gradients. For the last layer of a network that is collapsed to a simplex this is NC3.
- `nc_nbdev.neighbours.feature_collapse`: Words that play the same role in a task get the same vector. When does this happen, and does the network then understand new sentences?
- `nc_nbdev.neighbours.feature_complexity`: Collapse makes samples of a class alike. Do the units of a layer become alike too, so that a wide layer holds few different features?
- `nc_nbdev.neighbours.few_shot`: A network that learns from small tasks, each with other classes, never has a fixed classifier. Do its features collapse?
- `nc_nbdev.neighbours.graphs`: The nodes of a graph are classified by their neighbours. Their features collapse only in part, and exact collapse asks more of a graph than chance gives.
- `nc_nbdev.neighbours.grokking`: A network fits its train set early and generalises much later. Is collapse what changes in between? This page asks for generalisation without collapse, and what a reward for collapse does to it.
- `nc_nbdev.neighbours.label_noise`: A network that memorises wrong labels loses collapse where it was not wrong: on clean test images. How much, and does label smoothing help?
- `nc_nbdev.neighbours.language_models`: Every word of a vocabulary is a class. Are better language models more collapsed, and do the same measures improve where there is nothing to learn?
- `nc_nbdev.neighbours.long_tailed`: When some classes have few samples the class means are no simplex, and small classes are seldom answered. Two regularisers, a fixed head and a loss against it, for anyone's training.
- `nc_nbdev.neighbours.margins`: All train samples are right, and training goes on. The margin grows and test accuracy may grow with it: is that why training longer helps?
- `nc_nbdev.neighbours.plasticity`: A network that is trained on one task after another learns new tasks worse and worse. Does it collapse less, too?
- `nc_nbdev.neighbours.regression`: Networks that predict numbers collapse too: in the last layer, to as many directions as there are numbers. And below it?
- `nc_nbdev.paper.cascade`: Do the layers before the last collapse too, how much, and in what order?
- `nc_nbdev.paper.random_labels`: With random labels there is nothing to learn. Do train features collapse all the same?
- `nc_nbdev.paper.tetrahedron`: Four classes, three dimensions: a picture of collapse that you can turn with the mouse.
- `nc_nbdev.paper.train_vs_test`: On the train set features run into their class means. Do the features of fresh images follow them?
- `nc_nbdev.paper.training_longer`: Coarse test accuracy does not fall late in training. Does it say when to stop, if the features are meant for finer classes?
- `nc_nbdev.paper.which_layer`: When the last layer gets worse for finer classes, do the layers before it get worse too?
- `nc_nbdev.reproduce`: One command runs every study and prints one scoreboard.
- `nc_nbdev.rooms`: The rooms, their modules, and who imports whom, read from the source.
- `nc_nbdev.theory.data_aware`: Put the data back below the features. A two-layer ReLU network can reach the minimum of free features if and only if each class has one direction that is flat on it and not positive on all others. Noise alone has such directions in high dimension, so collapse of the train set says nothing about fresh data.
- `nc_nbdev.theory.deep_unconstrained`: With more layers on top of free features every linear layer is collapsed at the minimum. But the soft threshold becomes a jump, small starts can end at zero, and with ReLU there are other minima, some of them better than collapse.
- `nc_nbdev.theory.free_features`: One model, in which features and weights are free parameters, for all pages of this room: its problem, its minimum by descent, its path, and the tables of both.
- `nc_nbdev.theory.fresh_data`: Three gaps lie between collapse on a train set and features that are good for something else: fresh samples of the same classes, new classes, and another task. Each has a bound or a law, and each is measured.
- `nc_nbdev.theory.local_elasticity`: If a training step on one sample moves its own class more than the other classes, the class means move apart faster than noise spreads. The condition is one inequality, and both of its sides can be measured in a network.
- `nc_nbdev.theory.many_classes`: When no simplex fits, collapse maximises another quantity, the one-vs-rest margin. Its largest value is known up to twice as many classes as dimensions, and cross-entropy reaches it as the temperature goes to zero.
- `nc_nbdev.theory.minority_collapse`: When some classes have few samples, and features are free, the classifiers of these classes do not only lean towards each other. Beyond a finite imbalance they become one and the same vector, at a ratio that one line of algebra predicts.
- `nc_nbdev.theory.normalised`: Put every feature and every classifier row on a sphere. No weight decay is left to choose. The minimum is the simplex at every temperature, and gradient descent on the spheres finds it from every start.
- `nc_nbdev.theory.other_losses`: Cross-entropy, label smoothing, the focal loss, squared error and the supervised contrastive loss have the same minimiser on free features: a collapsed simplex. They differ in its size and in the speed of the way there, and both have a formula.
- `nc_nbdev.theory.perturbation`: Real features cannot go wherever the loss wants them: they stay near what the layers below deliver. A model with this one constraint says how much of the collapse is left.
- `nc_nbdev.theory.transfer_bound`: If classes are small compared with their distance, a few examples suffice to tell them apart: a bound, with the best constant for two classes and known centres. Whether classes that were *not* in training are small is another question. It is measured on digits.
- `nc_nbdev.theory.unconstrained_ce`: If a network could place its features anywhere, weight decay and cross-entropy would place them on a simplex. The minimiser, its size and the way there have closed forms.
- `nc_nbdev.theory.unconstrained_mse`: With squared error everything can be solved: which singular values survive weight decay, what the bias decides, and how collapse proceeds in time.
- `nc_nbdev.vision.data`: A data set is four tensors and the names of the classes. Every change of it is a pure function of a seed.
- `nc_nbdev.vision.loaders`: A loader without workers: the order of the batches depends on nothing but the seed and the epoch.
- `nc_nbdev.vision.models`: The networks of the neural collapse literature for small images, and the layers of each that are worth measuring.
- `nc_nbdev.vision.recipes`: One dataclass says everything that determines a training run on images, and presets say which recipes a scale has.
- `nc_nbdev.vision.sources`: One function gives a data set by its name: made here, from torchvision, or from a folder of image files.
- `nc_nbdev.vision.training`: A recipe becomes data, a model and a fastai `Learner`.
- `nc_nbdev.vision.transfer`: Every question to features, asked of every layer and every snapshot of a run; and three more that need images: pixels, fine-tuning, another data set."""

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
