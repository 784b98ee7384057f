"""The attacks of an evaluation, as params.yaml names them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dynat.config.fields import Count, Index, KeyedError, Radius, Section, radius
from dynat.config.recipe import Precision


class Attack(Section):
    """The attacks of an evaluation (docs/methods.md 3.4)."""

    epsilon: Radius
    step: Radius
    pgd: Annotated[list[Count], Field(min_length=1)]  # PGD-k for each k
    cw_steps: Count = 20
    apgd_steps: Count = 100
    n: Count | None = None  # first n test images; null: all
    batch: Count = 200
    seed: Index = 0
    # of crafting, every success verified in fp32; auto: tf32 on CUDA, else fp32
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"


class AutoAttackRun(Section):
    """A radius, and the first k test images for each k in n."""

    epsilon: Radius
    n: Annotated[list[Count], Field(min_length=1)]


class AutoAttack(Section):
    """AutoAttack standard; accuracies are reported on the first k test images for each k in n."""

    epsilon: Radius
    n: Annotated[list[Count], Field(min_length=1)]
    runs: list[AutoAttackRun] = []  # more of them, each a column of its own
    batch: Count = 200  # also the size of a resumable chunk
    seed: Index = 0
    workers: Annotated[Count, Field(le=256)] = 1  # processes on a CPU; no verdict depends on it
    # of APGD's first try, every success verified in fp32 and who survives it attacked again in fp32
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _radii_look_different(self) -> "AutoAttack":
        printed = {radius(self.epsilon): self.epsilon}
        for run in self.runs:
            if (before := printed.setdefault(radius(run.epsilon), run.epsilon)) != run.epsilon:
                text = f"{before!r} and {run.epsilon!r} are both printed as {radius(before)}"
                raise KeyedError("runs", f"{text}; leave one out")
        return self

    @property
    def by_radius(self) -> dict[str, AutoAttackRun]:
        """All runs, the sizes of equal radii together, by what follows a name in the metrics.

        That is nothing for the first radius, " at 8-255" for another one.
        """
        found = {"": AutoAttackRun(epsilon=self.epsilon, n=list(dict.fromkeys(self.n)))}
        for run in self.runs:
            key = "" if run.epsilon == self.epsilon else f" at {radius(run.epsilon).replace('/', '-')}"
            before = found[key].n if key in found else []
            found[key] = AutoAttackRun(epsilon=run.epsilon, n=list(dict.fromkeys([*before, *run.n])))
        return found
