"""How a setting trains every recipe: on its own scale, or all under one regime."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dynat.config.fields import Count, Index, NonNegative, Number, Positive, Radius, Section
from dynat.config.recipe import Recipe, Steps


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
    modern: bool = False  # every recipe under one regime, MODERN; the numbers above still override it


# One schedule, averaging and smoothing for every recipe (docs/methods.md, section 18, has the sources).
MODERN: dict[str, Any] = {
    "epochs": 100,
    "schedule": {"shape": "cosine", "lr": 0.1, "weight_decay": 5e-4, "drops": {}, "first_epoch_lr": None},
    "ema": {"tau": 0.995, "begin": 3},  # after 0.025 of the epochs
    "smoothing": 0.1,  # of whatever cross entropy the target has
}


def modern(recipe: Recipe) -> Recipe:
    """The recipe under :data:`MODERN`, its own epochs in proportion."""
    values = rescale(recipe, Train(epochs=MODERN["epochs"])).model_dump()
    values["schedule"] |= MODERN["schedule"]
    values["ema"] = MODERN["ema"]
    if recipe.outer.adversarial == "ce" or recipe.outer.natural_ce:
        values["smoothing"]["target"] = MODERN["smoothing"]
    return Recipe(**values)


def rescale(recipe: Recipe, train: Train) -> Recipe:
    """Bring a recipe's own scale to the setting's, every dependent number in proportion."""
    recipe = modern(recipe) if train.modern else recipe
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
        for section in (schedule, stop, values["weights"], values["awp"] or {}, values["ema"] or {}):
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
