"""Methods as data: a recipe is five independent choices and their constants (docs/methods.md).

No code of a method lives here; the modules of ``dynat.methods`` carry out what a recipe says.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
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
from dynat.config.guide import SoftLabels, guide_demands

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

    # CE to the truth; KL to the natural prediction; Eq. 7; KL to a guide's soft label: of x, of the moving x'
    # with the gradient through both networks, or of x with the true class to first order (SAAD)
    loss: Literal["ce", "kl", "ce_dynamic", "kl_guide", "kl_guide_moving", "kl_guide_linear"]
    start: Literal["uniform", "gaussian"]
    noise: NonNegative = 0.001  # standard deviation of the gaussian start
    clamp: bool = True  # the uniform start to [0,1]; the gaussian one never is
    epsilon: Radius = 0.031
    step: Radius = 0.007
    steps: Steps = 10
    mode: Literal["eval", "train"] = "eval"  # batch-norm mode of the target during the attack
    loss_check: bool = True  # in train mode one more forward, of the last iterate (Rice et al.)
    stop: Stop | None = None


class Objective(Section):
    """Choice 3: the loss of the target, a sum of the terms that are switched on."""

    natural_ce: bool | NonNegative = False  # CE(f_t(x), y); a number is its weight
    adversarial: Literal["none", "ce", "bce", "mse"] = "ce"  # at x': CE, MART's boosted CE, MSE to the guide
    beta: NonNegative = 0.0  # weight of KL(p_nat || p_adv)
    kl: Literal["plain", "mart"] = "plain"  # mart: each sample weighted by 1 - p_nat[label]
    soft: SoftLabels = SoftLabels()

    @property
    def reads_natural(self) -> bool:
        """Whether a term is on that reads the target's logits on natural images."""
        return self.natural_ce > 0 or self.beta > 0 or self.soft.natural > 0

    @property
    def reads_adversarial(self) -> bool:
        """Whether a term is on that reads the adversarial examples."""
        return self.adversarial != "none" or self.beta > 0 or self.soft.reads_adversarial

    @property
    def reads(self) -> dict[str, bool]:
        """Whether a term reads the target's logits on x, x' and 2x - x', by the names of ``batch_norm``."""
        mirrored = self.soft.gradient > 0
        return {"mirrored": mirrored, "natural": self.reads_natural, "adversarial": self.reads_adversarial}

    @property
    def reads_guide(self) -> bool:
        """Whether a term is on that reads the guide's logits."""
        return self.adversarial == "mse" or self.soft.reads_guide

    @property
    def uses_label(self) -> bool:
        """Whether a term is on that reads the label of choice 1 (the natural CE reads the truth)."""
        return self.adversarial in ("ce", "bce") or (self.beta > 0 and self.kl == "mart")


class Weights(Section):
    """Choice 4: instance weights of the robust terms."""

    rule: Literal["uniform", "gairat", "mail", "iad", "saad"] = "uniform"
    begin: Index = 0  # first epoch with weights; uniform before (burn-in)
    against: Literal["label", "truth"] = "label"  # what "correct" and the margin are measured against
    shift: Number = -1.0  # GAIRAT's Lambda
    slope: Number = 10.0  # MAIL
    bias: Number = -0.5  # MAIL
    scale: Positive = 3.0  # MAIL, SAAD
    power: Positive = 0.1  # IAD: A = p_guide(label | x')^power, and 1 - A for the KL of beta
    terms: Literal["all", "kl"] = "all"  # which robust terms are weighted: all, or the KL of beta alone

    @property
    def by_guide(self) -> bool:
        """Whether they are a function of the guide's logits on the adversarial examples."""
        return self.rule in ("iad", "saad")


class Perturbation(Section):
    """Choice 5: adversarial weight perturbation (Wu et al. 2020) on an objective of its own."""

    gamma: Positive
    begin: Index = 0  # first epoch with a perturbation
    labels: Literal["truth", "guide"] = "truth"
    objective: Objective


class Smoothing(Section):
    """Label smoothing of the two networks' cross entropies, those of the attack and of awp apart."""

    target: BelowOne = 0.0
    guide: BelowOne = 0.0


class BatchNorm(Section):
    """Which forwards move the running statistics, in order, once per step (docs/methods.md, section 1).

    ``target``: null for just the forwards that the loss needs; ``mirrored`` is 2x - x', which IGDM's term
    reads, ``natural_after`` runs after the step.
    ``guide``: how often the published code forwards the guide on the natural batch.
    """

    target: list[Literal["natural", "adversarial", "mirrored", "natural_after"]] | None = None
    guide: Annotated[Count, Field(le=1000)] = 1


class Average(Section):
    """An exponential moving average of the target's weights (docs/methods.md, section 18)."""

    tau: BelowOne  # the share that stays in a step, in the end; less in the first steps
    begin: Index = 0  # first epoch


class Schedule(Section):
    """Optimiser and learning rate, in the method's own epochs (0-indexed).

    ``shape``: by ``drops``, or one of three that change with every step and have no drops (docs/methods.md,
    section 18).
    """

    shape: Literal["steps", "linear", "cosine", "cyclic"] = "steps"
    epochs: Count
    lr: Positive
    first_epoch_lr: Positive | None = None
    drops: dict[Index, NonNegative] = {}  # first epoch -> factor on lr
    weight_decay: NonNegative
    momentum: BelowOne = 0.9


class Recipe(Section):
    """A method: five independent choices and their constants."""

    labels: Literal["truth", "guide"] = "truth"  # choice 1
    # trained beside the target, or in eval mode the target of a recipe of params.yaml's guides
    guide: Literal["trained", "frozen"] = "trained"
    inner: Inner
    outer: Objective
    alpha: NonNegative = 1.0  # Eq. 6: weight of the target's adversarial loss
    weights: Weights = Weights()
    awp: Perturbation | None = None
    smoothing: Smoothing = Smoothing()
    batch_norm: BatchNorm = BatchNorm()
    schedule: Schedule
    ema: Average | None = None
    padding: Literal["zero", "reflect"] = "zero"
    rotation: Annotated[Number, Field(ge=0, le=180)] = 0.0  # degrees
    normalise: bool = False  # with the study's mean and std, inside the network
    per_study: dict[str, dict[str, Any]] = {}  # setting -> what differs there

    @property
    def needs_guide(self) -> bool:
        """Whether there is a guide, trained or frozen."""
        attacked = self.inner.loss not in ("ce", "kl")
        return self.labels == "guide" or attacked or self.outer.reads_guide or self.weights.by_guide

    @property
    def trains_guide(self) -> bool:
        """Whether a guide is trained beside the target."""
        return self.needs_guide and self.guide == "trained"

    @property
    def frozen_guide(self) -> bool:
        """Whether the guide is another training's target."""
        return self.needs_guide and self.guide == "frozen"

    @property
    def reads_guide_at_adversarial(self) -> bool:
        """Whether the guide is forwarded on the adversarial examples, which only a frozen one is."""
        objectives = [self.outer, *([self.awp.objective] if self.awp else [])]
        return self.weights.by_guide or any(each.soft.reads_guide_at_adversarial for each in objectives)

    def in_setting(self, setting: str) -> "Recipe":
        """The recipe with its differences for ``setting`` merged in."""
        return Recipe(**_merge(self.model_dump(exclude={"per_study"}), self.per_study.get(setting, {})))

    @model_validator(mode="after")
    def _makes_sense(self) -> "Recipe":
        for chosen, met, refusal in chain(_demands(self), guide_demands(self)):
            if chosen and not met:
                raise refusal
        return self


def _demands(recipe: Recipe) -> Iterator[tuple[object, object, KeyedError]]:
    """What a choice needs: whether the choice was made, whether the need is met, and the refusal if not."""
    outer, awp, inner, weights = recipe.outer, recipe.awp, recipe.inner, recipe.weights
    weighted, adversarial = weights.rule != "uniform", outer.adversarial
    objectives = {"outer": outer} | ({"awp.objective": awp.objective} if awp else {})
    for key, terms in objectives.items():
        yield True, terms.reads_natural or terms.reads_adversarial, KeyedError(key, "no term is switched on")
        yield terms.kl == "mart", terms.beta, KeyedError(f"{key}.kl=mart", f"needs {key}.beta above 0")
        yield terms.beta, inner.steps, KeyedError("inner.steps=0", f"makes the KL of {key}.beta always 0")
    used = outer.uses_label or (weighted and weights.against == "label")
    yield recipe.labels == "guide", used, KeyedError("labels=guide", "no term uses a label; change outer")
    attacked = any(terms.reads_adversarial for terms in objectives.values())
    yield inner.steps, attacked, KeyedError("inner.steps", "no term uses the adversarial examples; set 0")
    yield weighted, outer.reads_adversarial, KeyedError("weights.rule", "there is no robust term to weight")
    yield weights.rule == "gairat", inner.steps, KeyedError("weights.rule", "gairat counts inner.steps")
    yield weights.terms == "kl", outer.beta, KeyedError("weights.terms=kl", "needs outer.beta above 0")
    scaled = adversarial != "none" or outer.soft.adversarial
    yield recipe.alpha != 1, scaled, KeyedError("alpha", "there is no adversarial term")
    norm, ce = recipe.batch_norm, adversarial == "ce" or outer.natural_ce
    yield recipe.smoothing.target, ce, KeyedError("smoothing.target", "no cross entropy to smooth")
    if norm.target is not None:
        listed = {name.removesuffix("_after") for name in norm.target}
        for name, read in outer.reads.items():
            yield read, name in listed, KeyedError("batch_norm.target", f"list {name}, which outer forwards")
    for key, value in (("drops", recipe.schedule.drops), ("first_epoch_lr", recipe.schedule.first_epoch_lr)):
        own = KeyedError(f"schedule.{key}", f"not used by shape={recipe.schedule.shape}; remove it")
        yield recipe.schedule.shape != "steps", not value, own
    stop, epochs = inner.stop or Stop(), recipe.schedule.epochs
    first = {
        "schedule.drops": max(recipe.schedule.drops, default=0),
        "awp.begin": awp.begin if awp else 0,
        "ema.begin": recipe.ema.begin if recipe.ema else 0,
        "weights.begin": weights.begin if weighted else 0,
        "inner.stop.budget": max(stop.budget, default=0),
        "inner.stop.ramp_until": stop.ramp_until - 1,
    }
    for key, epoch in first.items():  # a single epoch, as one tries a recipe out, comes before all of them
        yield epochs > 1, epoch < epochs, KeyedError(key, f"never reached with schedule.epochs={epochs}")


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key not in ("drops", "budget"):
            value = _merge(old, value)
        merged[key] = value
    return merged
