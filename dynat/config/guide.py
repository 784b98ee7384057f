"""The guide's soft labels in a loss, and which guide a recipe needs (docs/methods.md, section 17)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from dynat.config.fields import KeyedError, NonNegative, Positive, Section

if TYPE_CHECKING:
    from dynat.config.recipe import Recipe


class SoftLabels(Section):
    """Terms of choice 3 that read the guide's whole output: ``temperature``² KL(guide‖target).

    The guide gets no gradient from them.
    Weights are of a sum over classes and a mean over the batch; a mean over both, as ARD, RSLAD and AdaAD
    publish it, is one K-th of that for K classes (docs/methods.md, section 17).
    """

    adversarial: NonNegative = 0.0  # weight of the term at the target's x'
    natural: NonNegative = 0.0  # weight of the term at the target's x
    at: Literal["natural", "adversarial"] = "natural"  # where the guide is read for the term at x'
    temperature: Positive = 1.0  # of both softmaxes
    gradient: NonNegative = 0.0  # IGDM's weight in the last epoch, of KL between f(x') - f(2x - x') of both

    @property
    def reads_adversarial(self) -> bool:
        """Whether a term is on that reads the target's logits on the adversarial examples."""
        return self.adversarial > 0 or self.gradient > 0

    @property
    def reads_guide(self) -> bool:
        """Whether a term is on."""
        return self.natural > 0 or self.reads_adversarial

    @property
    def reads_guide_at_adversarial(self) -> bool:
        """Whether a term is on that reads the guide's logits on the adversarial examples."""
        return self.gradient > 0 or (self.adversarial > 0 and self.at == "adversarial")


def guide_demands(recipe: "Recipe") -> Iterator[tuple[object, object, KeyedError]]:
    """What choices need of the guide: whether one was made, whether its need is met, the refusal if not."""
    awp, inner, guide = recipe.awp, recipe.inner, recipe.needs_guide
    none, moving = "there is no guide", "reads the guide on x', which needs guide=frozen"
    objectives = {"outer": recipe.outer} | ({"awp.objective": awp.objective} if awp else {})
    for key, terms in objectives.items():
        yield terms.adversarial == "mse", guide, KeyedError(f"{key}.adversarial=mse", none)
        yield terms.reads_guide, guide, KeyedError(f"{key}.soft", none)
        read = terms.soft.reads_guide_at_adversarial
        yield read, recipe.frozen_guide, KeyedError(f"{key}.soft", moving)
        gradient = f"{key}.soft.gradient"
        yield terms.soft.gradient, inner.steps, KeyedError(gradient, "needs inner.steps above 0")
        yield terms.soft.gradient, key == "outer", KeyedError(gradient, "is a term of outer alone")
    if awp and awp.labels == "guide":
        yield True, awp.objective.uses_label, KeyedError("awp.labels=guide", "no term of awp uses a label")
        yield True, guide, KeyedError("awp.labels=guide", none)
    yield recipe.guide == "frozen", guide, KeyedError("guide=frozen", "no choice reads a guide")
    attacked = inner.loss in ("kl_guide_moving", "kl_guide_linear")
    yield attacked, recipe.frozen_guide, KeyedError(f"inner.loss={inner.loss}", moving)
    rule = KeyedError(f"weights.rule={recipe.weights.rule}", moving)
    yield recipe.weights.by_guide, recipe.frozen_guide, rule
    trained = recipe.trains_guide
    yield recipe.smoothing.guide, trained, KeyedError("smoothing.guide", f"{none} that is trained")
    yield recipe.batch_norm.guide != 1, trained, KeyedError("batch_norm.guide", f"{none} that is trained")
