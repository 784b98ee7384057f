"""Methods as data: a recipe is five independent choices and their constants (docs/methods.md).

No code of a method lives here; the modules of ``dynat.methods`` carry out what a recipe says.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dynat.config.fields import (
    BelowOne,
    Count,
    Index,
    KeyedError,
    NonNegative,
    Number,
    Positive,
    Radius,
    Section,
)

Steps = Annotated[Index, Field(le=1000)]  # of an attack in training; noise for all of them is drawn at once
Precision = Literal["fp32", "tf32", "bf16"]  # of convolutions and linear layers; tf32 of convolutions alone


class Stop(Section):
    """Early stop of the inner loop, per sample (FAT, Zhang et al. 2020; SAT, Sitawarin et al. 2021).

    A sample whose difficulty ``max_{j != label} p_j - p_label`` exceeds the threshold uses up one unit of
    its budget per step and is frozen when none is left. FAT: threshold 0, budget tau; SAT: a rising
    threshold, no budget.
    """

    threshold: tuple[Number, Number] = (0.0, 0.0)  # first and last value of a linear ramp
    ramp_until: Index = 0  # epoch at which the ramp has reached its last value
    budget: dict[Index, Index] = {}  # first epoch -> tau
    noise: NonNegative = 0.0  # standard deviation of the noise added at every step (FAT's omega)


class Inner(Section):
    """Choice 2: how adversarial examples are made during training."""

    loss: Literal["ce", "kl", "ce_dynamic"]  # CE to the truth; KL to the natural prediction; Eq. 7
    start: Literal["uniform", "gaussian"]
    noise: NonNegative = 0.001  # standard deviation of the gaussian start
    epsilon: Radius = 0.031
    step: Radius = 0.007
    steps: Steps = 10
    mode: Literal["eval", "train"] = "eval"  # batch-norm mode of the target during the attack
    stop: Stop | None = None


class Objective(Section):
    """Choice 3: the loss of the target, a sum of the terms that are switched on."""

    natural_ce: bool = False  # CE(f_t(x), y)
    adversarial: Literal["none", "ce", "bce", "mse"] = "ce"  # at x': CE, MART's boosted CE, MSE to the guide
    beta: NonNegative = 0.0  # weight of KL(p_nat || p_adv)
    kl: Literal["plain", "mart"] = "plain"  # mart: each sample weighted by 1 - p_nat[label]

    @property
    def reads_natural(self) -> bool:
        """Whether a term is on that reads the target's logits on natural images."""
        return self.natural_ce or self.beta > 0

    @property
    def reads_adversarial(self) -> bool:
        """Whether a term is on that reads the adversarial examples."""
        return self.adversarial != "none" or self.beta > 0

    @property
    def uses_label(self) -> bool:
        """Whether a term is on that reads the label of choice 1 (the natural CE reads the truth)."""
        return self.adversarial in ("ce", "bce") or (self.beta > 0 and self.kl == "mart")


class Weights(Section):
    """Choice 4: instance weights of the robust terms."""

    rule: Literal["uniform", "gairat", "mail"] = "uniform"
    begin: Index = 0  # first epoch with weights; uniform before (burn-in)
    against: Literal["label", "truth"] = "label"  # what "correct" and the margin are measured against
    shift: Number = -1.0  # GAIRAT's Lambda
    slope: Number = 10.0  # MAIL
    bias: Number = -0.5  # MAIL
    scale: Positive = 3.0  # MAIL


class Perturbation(Section):
    """Choice 5: adversarial weight perturbation (Wu et al. 2020) on an objective of its own."""

    gamma: Positive
    begin: Index = 0  # first epoch with a perturbation
    labels: Literal["truth", "guide"] = "truth"
    objective: Objective


class Smoothing(Section):
    """Label smoothing of the two networks' cross entropies."""

    target: BelowOne = 0.0
    guide: BelowOne = 0.0


class BatchNorm(Section):
    """Which forwards move the running statistics, in order, once per step (docs/methods.md, section 1).

    ``target``: null for just the forwards that the loss needs; ``natural_after`` runs after the step.
    ``guide``: how often the published code forwards the guide on the natural batch.
    """

    target: list[Literal["natural", "adversarial", "natural_after"]] | None = None
    guide: Annotated[Count, Field(le=1000)] = 1


class Schedule(Section):
    """Optimiser and learning rate, in the method's own epochs (0-indexed)."""

    epochs: Count
    lr: Positive
    first_epoch_lr: Positive | None = None
    drops: dict[Index, NonNegative] = {}  # first epoch -> factor on lr
    weight_decay: NonNegative
    momentum: BelowOne = 0.9


class Recipe(Section):
    """A method: five independent choices and their constants."""

    labels: Literal["truth", "guide"] = "truth"  # choice 1
    inner: Inner
    outer: Objective
    alpha: NonNegative = 1.0  # Eq. 6: weight of the target's adversarial loss
    weights: Weights = Weights()
    awp: Perturbation | None = None
    smoothing: Smoothing = Smoothing()
    batch_norm: BatchNorm = BatchNorm()
    schedule: Schedule
    padding: Literal["zero", "reflect"] = "zero"
    rotation: Annotated[Number, Field(ge=0, le=180)] = 0.0  # degrees
    normalise: bool = False  # with the study's mean and std, inside the network
    per_study: dict[str, dict[str, Any]] = {}  # setting -> what differs there

    @property
    def needs_guide(self) -> bool:
        """Whether a guide is trained beside the target."""
        return self.labels == "guide" or self.inner.loss == "ce_dynamic" or self.outer.adversarial == "mse"

    def in_setting(self, setting: str) -> "Recipe":
        """The recipe with its differences for ``setting`` merged in."""
        return Recipe(**_merge(self.model_dump(exclude={"per_study"}), self.per_study.get(setting, {})))

    @model_validator(mode="after")
    def _makes_sense(self) -> "Recipe":
        for chosen, met, refusal in _demands(self):
            if chosen and not met:
                raise refusal
        return self


def _demands(recipe: Recipe) -> Iterator[tuple[object, object, KeyedError]]:
    """What a choice needs: whether the choice was made, whether the need is met, and the refusal if not."""
    outer, awp, inner, weights = recipe.outer, recipe.awp, recipe.inner, recipe.weights
    weighted, guide, adversarial = weights.rule != "uniform", recipe.needs_guide, outer.adversarial
    objectives = {"outer": outer} | ({"awp.objective": awp.objective} if awp else {})
    for key, terms in objectives.items():
        yield True, terms.reads_natural or terms.reads_adversarial, KeyedError(key, "no term is switched on")
        yield terms.kl == "mart", terms.beta, KeyedError(f"{key}.kl=mart", f"needs {key}.beta above 0")
        yield terms.beta, inner.steps, KeyedError("inner.steps=0", f"makes the KL of {key}.beta always 0")
        yield terms.adversarial == "mse", guide, KeyedError(f"{key}.adversarial=mse", "there is no guide")
    used = outer.uses_label or (weighted and weights.against == "label")
    yield recipe.labels == "guide", used, KeyedError("labels=guide", "no term uses a label; change outer")
    if awp and awp.labels == "guide":
        yield True, awp.objective.uses_label, KeyedError("awp.labels=guide", "no term of awp uses a label")
        yield True, guide, KeyedError("awp.labels=guide", "there is no guide")
    attacked = any(terms.reads_adversarial for terms in objectives.values())
    yield inner.steps, attacked, KeyedError("inner.steps", "no term uses the adversarial examples; set 0")
    yield weighted, outer.reads_adversarial, KeyedError("weights.rule", "there is no robust term to weight")
    yield weights.rule == "gairat", inner.steps, KeyedError("weights.rule", "gairat counts inner.steps")
    yield recipe.alpha != 1, adversarial != "none", KeyedError("alpha", "there is no adversarial term")
    norm, ce = recipe.batch_norm, adversarial == "ce"
    yield recipe.smoothing.target, ce, KeyedError("smoothing.target", "no cross entropy to smooth")
    yield recipe.smoothing.guide, guide, KeyedError("smoothing.guide", "there is no guide")
    yield norm.guide != 1, guide, KeyedError("batch_norm.guide", "there is no guide")
    if norm.target is not None:
        listed = {name.removesuffix("_after") for name in norm.target}
        for name, read in {"natural": outer.reads_natural, "adversarial": outer.reads_adversarial}.items():
            yield read, name in listed, KeyedError("batch_norm.target", f"list {name}, which outer forwards")
    stop, epochs = inner.stop or Stop(), recipe.schedule.epochs
    first = {
        "schedule.drops": max(recipe.schedule.drops, default=0),
        "awp.begin": awp.begin if awp else 0,
        "weights.begin": weights.begin if weighted else 0,
        "inner.stop.budget": max(stop.budget, default=0),
        "inner.stop.ramp_until": stop.ramp_until - 1,
    }
    for key, epoch in first.items():  # a single epoch, as one tries a recipe out, comes before all of them
        yield epochs > 1, epoch < epochs, KeyedError(key, f"never reached with schedule.epochs={epochs}")


class Train(Section):
    """How a setting trains. A value beside null overrides every recipe; its other numbers scale along."""

    epsilon: Radius | None = None  # step size and noise scale in proportion
    epochs: Count | None = None  # every epoch number of the recipe scales in proportion
    lr: Positive | None = None  # the first epoch's rate scales in proportion
    weight_decay: NonNegative | None = None
    steps: Annotated[Steps, Field(ge=1)] | None = None  # of the inner attack; without one it stays so
    batch: Count = 128
    pad: Index = 4
    flip: bool = True
    mean: list[Number] | None = None  # one entry per channel, like std
    std: list[Positive] | None = None
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto: tf32 on CUDA, else fp32
    # compiled: what an eval-mode inner attack forwards, by torch.compile; graph: that, and on a single CUDA
    # device a whole step as one CUDA graph
    engine: Literal["eager", "compiled", "graph"] = "eager"
    # first n images of the training and of the test set that are looked at after an epoch; null: all of test
    monitored: Count | None = None
    validation_steps: Count = 10  # PGD steps of the robust accuracy that chooses the checkpoint


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key not in ("drops", "budget"):
            value = _merge(old, value)
        merged[key] = value
    return merged


def rescale(recipe: Recipe, train: Train) -> Recipe:
    """Bring a recipe's own scale to the setting's, every dependent number in proportion."""
    values = recipe.model_dump()
    inner, schedule, stop = values["inner"], values["schedule"], values["inner"]["stop"] or {}
    if train.epsilon and train.epsilon != recipe.inner.epsilon:
        for section in (inner, stop):
            for key in {"step", "noise"} & section.keys():  # share first: a step of epsilon stays epsilon
                section[key] = train.epsilon * (section[key] / recipe.inner.epsilon)
        inner["epsilon"] = train.epsilon
    if train.steps and recipe.inner.steps > 0:
        inner["steps"] = train.steps
    if train.lr:
        if schedule["first_epoch_lr"]:
            schedule["first_epoch_lr"] *= train.lr / schedule["lr"]
        schedule["lr"] = train.lr
    if train.weight_decay is not None:
        schedule["weight_decay"] = train.weight_decay
    if train.epochs:
        for section in (schedule, stop, values["weights"], values["awp"] or {}):
            for key in {"drops", "budget", "begin", "ramp_until"} & section.keys():
                section[key] = _rescaled(section[key], schedule["epochs"], train.epochs)
        schedule["epochs"] = train.epochs
    return Recipe(**values)


def _rescaled(epoch: Any, own: int, epochs: int) -> Any:
    """An epoch of ``own`` as one of ``epochs``, or a table by epoch; what is not on at first never is."""
    if isinstance(epoch, dict):
        table = {_rescaled(first, own, epochs): value for first, value in sorted(epoch.items())}
        return {first: value for first, value in table.items() if first < epochs}
    return max(epoch * epochs // own, min(epoch, 1))
