"""Methods as data: a recipe is five independent choices and their constants (design, "Methods as data").

No code of a method lives here; the modules of ``dynat.methods`` carry out what a recipe says.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dynat.config.fields import (
    ByEpoch,
    Count,
    Flag,
    Index,
    Model,
    Name,
    NonNegative,
    Number,
    Positive,
    Unit,
    describe,
)


class Stop(Model):
    """Early stop of the inner loop, per sample (FAT, Zhang et al. 2020; SAT, Sitawarin et al. 2021).

    A sample whose difficulty ``max_{j != label} p_j - p_label`` exceeds the threshold uses up one unit of
    its budget per step and is frozen when none is left. FAT: threshold 0, budget tau; SAT: a rising
    threshold, no budget.
    """

    threshold: tuple[Number, Number] = (0.0, 0.0)  # first and last value of a linear ramp
    ramp_until: Index = 0  # epoch at which the ramp has reached its last value
    budget: Annotated[dict[Index, Index], ByEpoch] = {}  # first epoch -> tau
    noise: NonNegative = 0.0  # standard deviation of the noise added at every step (FAT's omega)


class Inner(Model):
    """Choice 2: how adversarial examples are made during training."""

    loss: Literal["ce", "kl", "ce_dynamic"]  # CE to the truth; KL to the natural prediction; Eq. 7
    start: Literal["uniform", "gaussian"]
    noise: NonNegative = 0.001  # standard deviation of the gaussian start
    epsilon: Unit = 0.031
    step: Unit = 0.007
    steps: Index = 10
    mode: Literal["eval", "train"] = "eval"  # batch-norm mode of the target during the attack
    stop: Stop | None = None


class Objective(Model):
    """Choice 3: the loss of the target, a sum of the terms that are switched on."""

    natural_ce: Flag = False  # CE(f_t(x), y)
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


class Weights(Model):
    """Choice 4: instance weights of the robust terms."""

    rule: Literal["uniform", "gairat", "mail"] = "uniform"
    begin: Index = 0  # first epoch with weights; uniform before (burn-in)
    against: Literal["label", "truth"] = "label"  # what "correct" and the margin are measured against
    shift: Number = -1.0  # GAIRAT's Lambda
    slope: Number = 10.0  # MAIL
    bias: Number = -0.5  # MAIL
    scale: Positive = 3.0  # MAIL


class Perturbation(Model):
    """Choice 5: adversarial weight perturbation (Wu et al. 2020) on an objective of its own."""

    gamma: Positive
    begin: Index = 0  # first epoch with a perturbation
    labels: Literal["truth", "guide"] = "truth"
    objective: Objective


class Smoothing(Model):
    """Label smoothing of the two networks' cross entropies."""

    target: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    guide: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class BatchNorm(Model):
    """Which forwards move the running statistics, in order, once per step (methods.md, section 1).

    ``target``: null for just the forwards that the loss needs; ``natural_after`` runs after the step.
    ``guide``: how often the published code forwards the guide on the natural batch.
    """

    target: list[Literal["natural", "adversarial", "natural_after"]] | None = None
    guide: Count = 1


class Schedule(Model):
    """Optimiser and learning rate, in the method's own epochs (0-indexed)."""

    epochs: Count
    lr: Positive
    first_epoch_lr: Positive | None = None
    drops: Annotated[dict[Index, NonNegative], ByEpoch] = {}  # first epoch -> factor on lr
    weight_decay: NonNegative
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9


class Recipe(Model):
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
    normalise: Flag = False  # with the study's mean and std, inside the network
    per_study: dict[Name, dict[str, Any]] = {}  # setting -> what differs there

    @property
    def needs_guide(self) -> bool:
        """Whether a guide is trained beside the target."""
        return self.labels == "guide" or self.inner.loss == "ce_dynamic" or self.outer.adversarial == "mse"

    @model_validator(mode="after")
    def _makes_sense(self) -> "Recipe":
        for fault in _contradictions(self):
            raise ValueError(fault)
        return self


def _contradictions(recipe: Recipe) -> list[str]:
    """The reasons why a combination of choices makes no sense, most basic first."""
    outer, inner, weights, awp = recipe.outer, recipe.inner, recipe.weights, recipe.awp
    robust = outer.reads_adversarial
    uses_label = outer.uses_label or (weights.rule != "uniform" and weights.against == "label")
    objectives = [outer, awp.objective] if awp else [outer]
    adversary = any(objective.reads_adversarial for objective in objectives)
    checks = {
        "outer: no term is switched on, so the target would learn nothing": not (robust or outer.natural_ce),
        "labels=guide: no term uses a label (choose outer.adversarial=ce or bce)": recipe.labels == "guide"
        and not uses_label,
        "alpha: there is no adversarial term to weight": recipe.alpha != 1 and outer.adversarial == "none",
        "inner.steps: no term uses the adversarial examples; set 0": inner.steps > 0 and not adversary,
        "inner.steps=0: the KL terms would always be 0; set their beta to 0": inner.steps == 0
        and any(objective.beta > 0 for objective in objectives),
        "inner.stop: nothing to stop with inner.steps=0": inner.stop is not None and inner.steps == 0,
        "inner.epsilon: 0 leaves nothing to attack; set inner.steps=0": inner.steps > 0
        and inner.epsilon == 0,
        "inner.step: 0 moves nothing; set inner.steps=0": inner.steps > 0 and inner.step == 0,
        "inner.step: larger than inner.epsilon, every step would only hit the bound": inner.steps > 1
        and inner.step > inner.epsilon,
        f"weights.rule={weights.rule}: there is no robust term to weight": weights.rule != "uniform"
        and not robust,
        "weights.rule=gairat: counts correct attack steps; set inner.steps above 0": weights.rule == "gairat"
        and inner.steps == 0,
        "smoothing.target: no cross entropy of the target to smooth": recipe.smoothing.target > 0
        and outer.adversarial != "ce",
        **_running_statistics(recipe),
        **_without_guide(recipe),
        **_beyond_the_end(recipe),
    }
    for name, objective in zip(("outer", "awp.objective"), objectives, strict=False):
        checks[f"{name}.kl=mart: weights a KL term that is off; set {name}.beta above 0"] = (
            objective.kl == "mart" and objective.beta == 0
        )
    if awp:
        checks["awp.objective: no term is switched on"] = not (
            awp.objective.reads_adversarial or awp.objective.natural_ce
        )
        checks["awp.labels=guide: no term of awp.objective uses a label"] = (
            awp.labels == "guide" and not awp.objective.uses_label
        )
    return [reason for reason, wrong in checks.items() if wrong]


def _running_statistics(recipe: Recipe) -> dict[str, bool]:
    """Forwards that cannot be, and those of the loss that would leave no trace in the statistics."""
    outer, target = recipe.outer, recipe.batch_norm.target
    checks = {
        "batch_norm.target: no term uses adversarial examples to forward": "adversarial" in (target or ())
        and not outer.reads_adversarial
    }
    seen = {name.removesuffix("_after") for name in target or ()}
    for name, needed in (("natural", outer.reads_natural), ("adversarial", outer.reads_adversarial)):
        reason = f"batch_norm.target: outer forwards {name} images, so {name} must be in the list (or null)"
        checks[reason] = needed and target is not None and name not in seen
    return checks


def _without_guide(recipe: Recipe) -> dict[str, bool]:
    """Choices that read a guide, for a recipe that trains none."""
    awp = recipe.awp
    reads = {
        "awp.labels=guide": awp is not None and awp.labels == "guide",
        "awp.objective.adversarial=mse": awp is not None and awp.objective.adversarial == "mse",
        "smoothing.guide": recipe.smoothing.guide > 0,
        "batch_norm.guide": recipe.batch_norm.guide != 1,
    }
    return {
        f"{key}: the recipe has no guide": wrong and not recipe.needs_guide for key, wrong in reads.items()
    }


def _beyond_the_end(recipe: Recipe) -> dict[str, bool]:
    """Epochs that are never reached, so that what they switch on would silently stay off.

    A single epoch, as one tries a recipe out, comes before all of them.
    """
    epochs = recipe.schedule.epochs
    first = {
        "schedule.drops": max(recipe.schedule.drops, default=0),
        "awp.begin": recipe.awp.begin if recipe.awp else 0,
        "weights.begin": recipe.weights.begin if recipe.weights.rule != "uniform" else 0,
        "inner.stop.budget": max(recipe.inner.stop.budget, default=0) if recipe.inner.stop else 0,
        "inner.stop.ramp_until": recipe.inner.stop.ramp_until - 1 if recipe.inner.stop else 0,
    }
    hint = "study.<setting>.train.epochs scales both"
    return {
        f"{key}: epoch {epoch} is never reached with schedule.epochs={epochs}; {hint}": epoch >= epochs > 1
        for key, epoch in first.items()
    }


# --------------------------------------------------------------------- a recipe as a setting runs it


class Train(Model):
    """How a setting trains. A value beside null overrides every recipe; its other numbers scale along."""

    epsilon: Annotated[Number, Field(gt=0, le=1)] | None = None  # step size and noise scale in proportion
    epochs: Count | None = None  # every epoch number of the recipe scales in proportion
    lr: Positive | None = None  # the first epoch's rate scales in proportion
    weight_decay: NonNegative | None = None
    steps: Count | None = None  # of the inner attack; a recipe without one stays without
    batch: Count = 128
    pad: Index = 4
    flip: Flag = True
    mean: list[Number] | None = None
    std: list[Positive] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Flag = False  # the network that an eval-mode inner attack forwards, by torch.compile
    validation_steps: Count = 10  # PGD steps of the robust accuracy that chooses the checkpoint

    @model_validator(mode="after")
    def _pairs(self) -> "Train":
        if (self.mean is None) != (self.std is None) or len(self.mean or []) != len(self.std or []):
            raise ValueError("std: mean and std are given together, one entry per channel")
        return self


def with_overrides(name: str, recipe: Recipe, setting: str) -> Recipe:
    """The recipe with its differences for ``setting`` merged in; ``ValueError`` names a wrong key."""
    changes = recipe.per_study.get(setting, {})
    if "per_study" in changes:
        raise ValueError(f"recipes.{name}.per_study.{setting}.per_study: cannot stand inside itself")
    merged = _merge(recipe.model_dump(exclude={"per_study"}), changes)
    try:
        return Recipe(**merged)
    except ValidationError as error:
        raise ValueError(f"recipes.{name}.per_study.{setting}.{describe(error, Recipe)}") from None


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
    inner, schedule, stop = values["inner"], values["schedule"], values["inner"]["stop"]
    if train.epsilon is not None and 0 < recipe.inner.epsilon != train.epsilon:
        for section in (inner, stop or {}):
            for key in {"step", "noise"} & section.keys():  # share first: a step of epsilon stays epsilon
                section[key] = train.epsilon * (section[key] / recipe.inner.epsilon)
        inner["epsilon"] = train.epsilon
    if train.steps is not None and recipe.inner.steps > 0:
        inner["steps"] = train.steps
    if train.lr is not None:
        if schedule["first_epoch_lr"]:
            schedule["first_epoch_lr"] *= train.lr / schedule["lr"]
        schedule["lr"] = train.lr
    if train.weight_decay is not None:
        schedule["weight_decay"] = train.weight_decay
    if train.epochs is not None:
        _rescale_epochs(values, train.epochs)
    return Recipe(**values)


def _rescale_epochs(values: dict[str, Any], epochs: int) -> None:
    own = values["schedule"]["epochs"]

    def scaled(epoch: int) -> int:
        return max(epoch * epochs // own, min(epoch, 1))  # what is not on at first never is

    def keys(table: dict[int, Any]) -> dict[int, Any]:
        return {scaled(epoch): value for epoch, value in sorted(table.items())}

    drops = {epoch: factor for epoch, factor in keys(values["schedule"]["drops"]).items() if epoch < epochs}
    values["schedule"].update(epochs=epochs, drops=drops)
    values["weights"]["begin"] = scaled(values["weights"]["begin"])
    if values["awp"]:
        values["awp"]["begin"] = scaled(values["awp"]["begin"])
    if stop := values["inner"]["stop"]:
        stop.update(budget=keys(stop["budget"]), ramp_until=scaled(stop["ramp_until"]))
