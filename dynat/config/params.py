"""params.yaml as typed, validated data: every knob, every cross-check, no torch.

Every stage calls :func:`load` before anything else. A fault is one line that names the key as the user
would type it after ``dvc exp run -S``.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from dynat.config import yaml_files
from dynat.config.fields import (
    Count,
    Index,
    KeyedError,
    NonNegative,
    Radius,
    Section,
    check_known,
    describe,
    radius,
)
from dynat.config.recipe import Precision, Recipe, Train, rescale
from dynat.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
Layers = Annotated[Count, Field(le=1000)]
OPTIONS = {
    "resnet": {"blocks", "strides", "width"},
    "preact_resnet": {"blocks", "strides", "width"},
    "wrn": {"depth", "widen", "sub_block1"},
    "cnn": {"width", "depth", "stem_stride"},
}


class DataSpec(Section):
    """Where the images come from and how they are split; stage prepare says whether it has as many."""

    source: Literal["digits", "cifar10", "cifar100", "image_folder"]
    # name of a file (or folder), looked for in DYNAT_DATA_MIRROR first
    archive: Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")] | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    # of the archive; of a folder download.folder_hash; an image_folder must have it
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    mirrors: list[Annotated[str, Field(pattern=r"^https?://\S+$")]] = []  # base URLs, in order
    classes: Annotated[Count, Field(ge=2)]
    train: Count | None = None  # first n training images; null: all
    test: Count | None = None  # first n test images (digits: the size of the test split); null: all
    validation: Index = 0  # images held out of the training set, for choosing the checkpoint
    split_seed: Index = 0

    @model_validator(mode="after")
    def _fits_the_source(self) -> "DataSpec":
        embedded = self.source == "digits"
        if embedded != (self.archive is None):
            raise KeyedError("archive", "the digits need none, any other source needs the name of one")
        if embedded and self.test is None:
            raise KeyedError("test", "the digits have no test set of their own; give its size")
        if self.source.startswith("cifar") and not (self.md5 or self.sha256):
            raise KeyedError("md5", "give the archive's md5 or sha256, or it could not be verified")
        return self


class Extent(NamedTuple):
    """What prepared data will be."""

    shape: tuple[int, int, int]  # of an image: channels, height, width
    train: int  # images to train on
    test: int  # images


class Network(Section):
    """A network of ``dynat.networks.architectures.build``; options of another family are refused."""

    name: Literal["resnet", "preact_resnet", "wrn", "cnn"]
    blocks: list[Layers] | None = None
    strides: list[Count] | None = None
    width: Count | None = None
    depth: Layers | None = None
    widen: Count | None = None
    sub_block1: bool | None = None
    stem_stride: Count | None = None

    @model_validator(mode="after")
    def _own_options(self) -> "Network":
        given, known = self.model_dump(exclude={"name"}, exclude_none=True), OPTIONS[self.name]
        if other := min(given.keys() - known, default=None):
            raise KeyedError(other, f"name={self.name} takes only {', '.join(sorted(known))}")
        return self


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


class Machine(Section):
    """Where a setting computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[Count, Field(le=1024)] | None = None  # null: as many as the machine offers
    instructions: Literal["avx2"] | None = None  # pin the CPU's instruction set: same bits on any x86-64


class Study(Section):
    """One setting: data, both networks, training and evaluation."""

    data: DataSpec
    target: Network
    guide: Network
    train: Train = Train()
    attack: Attack
    autoattack: AutoAttack
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _fits_together(self) -> "Study":
        mean, std = self.train.mean, self.train.std
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
            raise KeyedError("train.std", "give mean and std together, each with one number per channel")
        for kind in ("attack", "autoattack") if self.data.test else ():
            self.check_test_images(kind, self.data.test or 0)
        if self.train.engine != "eager" and self.machine.instructions:
            reason = f"{self.train.engine} cannot keep bits; set machine.instructions=null with it"
            raise KeyedError("train.engine", reason)
        return self

    def check_test_images(self, kind: str, available: int) -> None:
        """Raise :class:`KeyedError` if ``kind``, attack or autoattack, wants more images than there are."""
        asked = {"attack.n": self.attack.n or 0}
        if kind == "autoattack":
            asked = {"autoattack.n": max(self.autoattack.n)}
            for place, run in enumerate(self.autoattack.runs):
                asked[f"autoattack.runs.{place}.n"] = max(run.n)
        for key, n in asked.items():
            if n > available:
                raise KeyedError(key, f"{n} is more than the {available} test images that there are")


class Params(Section):
    """The whole of params.yaml."""

    settings: Annotated[list[Name], Field(min_length=1)]
    baselines: list[Name]
    variants: list[Name]
    seeds: Annotated[list[Index], Field(min_length=1)]
    alpha: NonNegative | None = None
    launch: str = "python"
    save_minutes: NonNegative = 10.0  # of work that a kill may cost a training; 0: its last step
    study: Annotated[dict[Name, Study], Field(min_length=1)]
    recipes: Annotated[dict[Name, Recipe], Field(min_length=1)]

    @model_validator(mode="after")
    def _every_setting_runs_every_recipe(self) -> "Params":
        for name, recipe in self.recipes.items():
            for setting in recipe.per_study:
                check_known(f"recipes.{name}.per_study", setting, self.study)
            for setting in self.study:
                try:
                    self.recipe(setting, name)
                except ValidationError as error:
                    key, reason = describe(error)
                    section = f"{name}.per_study.{setting}" if setting in recipe.per_study else name
                    raise KeyedError(f"recipes.{section}.{key}", f"{reason}, for study.{setting}") from None
        return self

    @model_validator(mode="after")
    def _selection(self) -> "Params":
        methods = [*self.baselines, *self.variants]
        for key, selected, known in (
            ("settings", self.settings, self.study),
            ("baselines", self.baselines, self.recipes),
            ("variants", methods, self.recipes),
        ):
            for name in selected:
                check_known(key, name, known)
                if selected.count(name) > 1:
                    raise KeyedError(key, f"{name!r} is selected twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise KeyedError("seeds", "one is selected twice")
        if not methods:
            raise KeyedError("baselines", "must name a method, since variants is empty too")
        for name in self.variants:
            if not all(self.recipe(setting, name).needs_guide for setting in self.settings):
                raise KeyedError("variants", f"{name!r} trains no guide; select it in baselines")
        return self

    def recipe(self, setting: str, method: str) -> Recipe:
        """The recipe of ``method`` as ``setting`` runs it.

        Its differences for the setting are merged in, then ``alpha`` for a method of ``variants``, then the
        setting's epsilon, epochs, lr, weight decay and steps, with all that depends on them in proportion.
        """
        recipe = self.recipes[method].in_setting(setting)
        if self.alpha is not None and method in self.variants:
            recipe = Recipe(**recipe.model_dump() | {"alpha": self.alpha})
        return rescale(recipe, self.study[setting].train)


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate ``path``; raises :class:`UserError`, one line, for whatever is wrong with it."""
    try:
        values = yaml_files.parse(path.read_text(encoding="utf-8"), anchors=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the top of the repository") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse(values, str(path))


def parse(values: object, source: str = "params.yaml") -> Params:
    """Validate the content of a params file; raises :class:`UserError`, one line."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + ": ".join(filter(None, describe(error)))) from None
