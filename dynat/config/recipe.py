"""Methods as data: a recipe is five independent choices and their constants (docs/methods.md).

No code of a method lives here; the modules of ``dynat.methods`` carry out what a recipe says.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dynat.config.fields import (
    BelowOne,
    ByEpoch,
    Count,
    Flag,
    Index,
    KeyedError,
    Name,
    NonNegative,
    Number,
    Positive,
    Radius,
    Section,
    Unit,
    describe,
)


class Stop(Section):
    """Early stop of the inner loop, per sample (FAT, Zhang et al. 2020; SAT, Sitawarin et al. 2021).

    A sample whose difficulty ``max_{j != label} p_j - p_label`` exceeds the threshold uses up one unit of
    its budget per step and is frozen when none is left. FAT: threshold 0, budget tau; SAT: a rising
    threshold, no budget.
    """

    threshold: tuple[Number, Number] = (0.0, 0.0)  # first and last value of a linear ramp
    ramp_until: Index = 0  # epoch at which the ramp has reached its last value
    budget: Annotated[dict[Index, Index], ByEpoch] = {}  # first epoch -> tau
    noise: NonNegative = 0.0  # standard deviation of the noise added at every step (FAT's omega)


class Inner(Section):
    """Choice 2: how adversarial examples are made during training."""

    loss: Literal["ce", "kl", "ce_dynamic"]  # CE to the truth; KL to the natural prediction; Eq. 7
    start: Literal["uniform", "gaussian"]
    noise: NonNegative = 0.001  # standard deviation of the gaussian start
    epsilon: Unit = 0.031
    step: Unit = 0.007
    steps: Index = 10
    mode: Literal["eval", "train"] = "eval"  # batch-norm mode of the target during the attack
    stop: Stop | None = None


class Objective(Section):
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
    guide: Count = 1


class Schedule(Section):
    """Optimiser and learning rate, in the method's own epochs (0-indexed)."""

    epochs: Count
    lr: Positive
    first_epoch_lr: Positive | None = None
    drops: Annotated[dict[Index, NonNegative], ByEpoch] = {}  # first epoch -> factor on lr
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
    normalise: Flag = False  # with the study's mean and std, inside the network
    per_study: dict[Name, dict[str, Any]] = {}  # setting -> what differs there

    @property
    def needs_guide(self) -> bool:
        """Whether a guide is trained beside the target."""
        return self.labels == "guide" or self.inner.loss == "ce_dynamic" or self.outer.adversarial == "mse"

    @model_validator(mode="after")
    def _makes_sense(self) -> "Recipe":
        objectives = {"outer": self.outer} | ({"awp.objective": self.awp.objective} if self.awp else {})
        _check_terms(self, objectives)
        _check_attack(self, objectives)
        _check_guide_and_statistics(self)
        _check_epochs(self)
        return self


def _check_terms(recipe: Recipe, objectives: Mapping[str, Objective]) -> None:
    """Refuse choices that need a term which is off."""
    outer, awp, weights = recipe.outer, recipe.awp, recipe.weights
    for key, objective in objectives.items():
        if not (objective.reads_adversarial or objective.natural_ce):
            raise KeyedError(key, "no term is switched on, so there is nothing to learn")
        if objective.kl == "mart" and objective.beta == 0:
            raise KeyedError(f"{key}.kl=mart", f"weights a KL term that is off; set {key}.beta above 0")
    weighted = weights.rule != "uniform"
    if recipe.labels == "guide" and not (outer.uses_label or (weighted and weights.against == "label")):
        raise KeyedError("labels=guide", "no term uses a label (choose outer.adversarial=ce or bce)")
    if awp and awp.labels == "guide" and not awp.objective.uses_label:
        raise KeyedError("awp.labels=guide", "no term of awp.objective uses a label")
    if recipe.alpha != 1 and outer.adversarial == "none":
        raise KeyedError("alpha", "there is no adversarial term to weight")
    if weighted and not outer.reads_adversarial:
        raise KeyedError(f"weights.rule={weights.rule}", "there is no robust term to weight")
    if recipe.smoothing.target > 0 and outer.adversarial != "ce":
        raise KeyedError("smoothing.target", "no cross entropy of the target to smooth")


def _check_attack(recipe: Recipe, objectives: Mapping[str, Objective]) -> None:
    """Refuse an inner attack that nothing reads or that cannot move, and choices that need one."""
    inner = recipe.inner
    if inner.steps == 0:
        if any(objective.beta > 0 for objective in objectives.values()):
            raise KeyedError("inner.steps=0", "the KL terms would always be 0; set their beta to 0")
        if inner.stop is not None:
            raise KeyedError("inner.stop", "nothing to stop with inner.steps=0")
        if recipe.weights.rule == "gairat":
            raise KeyedError("weights.rule=gairat", "counts correct attack steps; set inner.steps above 0")
        return
    if not any(objective.reads_adversarial for objective in objectives.values()):
        raise KeyedError("inner.steps", "no term uses the adversarial examples; set 0")
    for key in ("epsilon", "step"):
        if getattr(inner, key) == 0:
            raise KeyedError(f"inner.{key}", "0 leaves nothing to attack; set inner.steps=0")
    if inner.steps > 1 and inner.step > inner.epsilon:
        raise KeyedError("inner.step", "larger than inner.epsilon, every step would only hit the bound")


def _check_guide_and_statistics(recipe: Recipe) -> None:
    """Refuse what reads a guide that is not there, and statistics of forwards that are none of the loss's."""
    outer, awp, norm = recipe.outer, recipe.awp, recipe.batch_norm
    readers = {
        "awp.labels=guide": awp and awp.labels == "guide",
        "awp.objective.adversarial=mse": awp and awp.objective.adversarial == "mse",
        "smoothing.guide": recipe.smoothing.guide > 0,
        "batch_norm.guide": norm.guide != 1,
    }
    for key, reads in readers.items():
        if reads and not recipe.needs_guide:
            raise KeyedError(key, "the recipe has no guide")
    if norm.target is None:
        return
    if "adversarial" in norm.target and not outer.reads_adversarial:
        raise KeyedError("batch_norm.target", "no term uses adversarial examples to forward")
    listed = {name.removesuffix("_after") for name in norm.target}
    for name, read in (("natural", outer.reads_natural), ("adversarial", outer.reads_adversarial)):
        if read and name not in listed:
            raise KeyedError("batch_norm.target", f"outer forwards {name} images; list them, or set null")


def _check_epochs(recipe: Recipe) -> None:
    """Refuse epochs that are never reached, so that what they switch on would silently stay off."""
    epochs, stop = recipe.schedule.epochs, recipe.inner.stop or Stop()
    first = {
        "schedule.drops": max(recipe.schedule.drops, default=0),
        "awp.begin": recipe.awp.begin if recipe.awp else 0,
        "weights.begin": recipe.weights.begin if recipe.weights.rule != "uniform" else 0,
        "inner.stop.budget": max(stop.budget, default=0),
        "inner.stop.ramp_until": stop.ramp_until - 1,
    }
    for key, epoch in first.items():
        if epoch >= epochs > 1:  # a single epoch, as one tries a recipe out, comes before all of them
            raise KeyedError(
                key,
                f"epoch {epoch} is never reached with schedule.epochs={epochs}; "
                f"study.<setting>.train.epochs scales both",
            )


class Train(Section):
    """How a setting trains. A value beside null overrides every recipe; its other numbers scale along."""

    epsilon: Radius | None = None  # step size and noise scale in proportion
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
            raise KeyedError("std", "mean and std are given together, one entry per channel")
        return self


def with_overrides(name: str, recipe: Recipe, setting: str) -> Recipe:
    """The recipe with its differences for ``setting`` merged in; ``ValueError`` names a wrong key."""
    changes = recipe.per_study.get(setting, {})
    if "per_study" in changes:
        raise KeyedError(f"recipes.{name}.per_study.{setting}.per_study", "cannot stand inside itself")
    merged = _merge(recipe.model_dump(exclude={"per_study"}), changes)
    try:
        return Recipe(**merged)
    except ValidationError as error:
        path, reason = describe(error)
        raise KeyedError(f"recipes.{name}.per_study.{setting}.{path}", reason) from None


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
