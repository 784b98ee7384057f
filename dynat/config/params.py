"""params.yaml as typed, validated data: every knob, every cross-check, no torch.

Every stage calls :func:`load` before anything else. A fault is one line that names the key as the user
would type it after ``dvc exp run -S``.
"""

from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from dynat.config import yaml_files
from dynat.config.fields import (
    Count,
    Flag,
    Index,
    KeyedError,
    Name,
    NonNegative,
    Radius,
    Section,
    Seed,
    Text,
    describe,
    similar,
)
from dynat.config.recipe import Recipe, Train, rescale, with_overrides
from dynat.errors import UserError


class Contents(NamedTuple):
    """What a source holds; nothing and infinities where only the archive can tell."""

    classes: int | None = None
    shape: tuple[int, int, int] | None = None  # channels, height, width of an image
    train: float = inf  # images
    test: float = inf


SOURCES = {
    "digits": Contents(10, (1, 8, 8), 1797),  # of which data.test makes the test set
    "cifar10": Contents(10, (3, 32, 32), 50_000, 10_000),
    "cifar100": Contents(100, (3, 32, 32), 50_000, 10_000),
    "image_folder": Contents(),
}
RESIDUAL = {"blocks", "strides", "width"}
OPTIONS = {
    "resnet": RESIDUAL,
    "preact_resnet": RESIDUAL,
    "wrn": {"depth", "widen", "sub_block1"},
    "cnn": {"width", "depth", "stem_stride"},
}


class DataSpec(Section):
    """Where the images come from and how they are split."""

    source: Literal["digits", "cifar10", "cifar100", "image_folder"]
    archive: Text | None = None  # file (or folder) name, looked for in DYNAT_DATA_MIRROR first
    md5: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")] | None = None
    sha256: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")] | None = None
    mirrors: list[Text] = []  # base URLs, in order
    classes: Annotated[Count, Field(ge=2)]
    train: Count | None = None  # first n training images; null: all
    test: Count | None = None  # first n test images (digits: the size of the test split); null: all
    validation: Index = 0  # images held out of the training set, for choosing the checkpoint
    split_seed: Seed = 0

    @model_validator(mode="after")
    def _archive_can_be_verified(self) -> "DataSpec":
        if self.source == "digits":
            if self.archive is not None:
                raise KeyedError("archive", "the digits ship inside scikit-learn and need none")
            return self
        if self.archive is None:
            raise KeyedError("archive", f"source={self.source} needs the name of an archive")
        if self.archive.startswith(".") or {"/", "\\"} & set(self.archive):
            raise KeyedError("archive", "must be a plain file name; DYNAT_DATA_MIRROR says where it lies")
        if self.source != "image_folder" and not (self.md5 or self.sha256):
            raise KeyedError("md5", "give the archive's md5 or sha256, or it could not be verified")
        return self

    @model_validator(mode="after")
    def _fits_the_source(self) -> "DataSpec":
        if self.classes != (self.contents.classes or self.classes):
            raise KeyedError("classes", f"source={self.source} has {self.contents.classes}")
        if self.source == "digits" and self.test is None:
            raise KeyedError("test", "the digits have no test set of their own; give its size")
        if self.training_images < 1:
            key = "validation" if self.training_images + self.validation > 0 else "test"
            raise KeyedError(key, f"{getattr(self, key)} images leave none for training")
        return self

    @property
    def contents(self) -> Contents:
        """What the source holds."""
        return SOURCES[self.source]

    @property
    def training_images(self) -> float:
        """Images left for training at most."""
        kept = (self.test or 0) if self.source == "digits" else 0
        return min(self.train or inf, self.contents.train - kept) - self.validation

    @property
    def test_images(self) -> float:
        """Images of the test set at most."""
        return min(self.test or inf, self.contents.test)


class Network(Section):
    """A network of ``dynat.networks.architectures.build``; options of another family are refused."""

    name: Literal["resnet", "preact_resnet", "wrn", "cnn"]
    blocks: list[Count] | None = None
    strides: list[Count] | None = None
    width: Count | None = None
    depth: Count | None = None
    widen: Count | None = None
    sub_block1: Flag | None = None
    stem_stride: Count | None = None

    @model_validator(mode="after")
    def _own_options(self) -> "Network":
        if other := min(self.options.keys() - OPTIONS[self.name], default=None):
            raise KeyedError(other, f"name={self.name} takes only {', '.join(sorted(OPTIONS[self.name]))}")
        if len(self.blocks or [2, 2, 2, 2]) != len(self.strides or [1, 2, 2, 2]):
            raise KeyedError("strides", "must have one entry per entry of blocks (by default 4)")
        if self.name == "wrn" and self.depth and self.depth % 6 != 4:
            raise KeyedError("depth", "a WideResNet's depth is 6k + 4 (34, 28, 16, 10)")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, as ``build`` takes them."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


class Attack(Section):
    """The attacks of an evaluation (docs/methods.md 3.4)."""

    epsilon: Radius
    step: Radius
    pgd: Annotated[list[Count], Field(min_length=1)]  # PGD-k for each k
    cw_steps: Count = 20
    apgd_steps: Count = 100
    n: Count | None = None  # first n test images; null: all
    batch: Count = 200
    seed: Seed = 0


class AutoAttack(Section):
    """AutoAttack standard; accuracies are reported on the first k test images for each k in n."""

    epsilon: Radius
    n: Annotated[list[Count], Field(min_length=1)]
    batch: Count = 200  # also the size of a resumable chunk
    seed: Seed = 0
    workers: Count = 1  # processes on a CPU; no verdict depends on it
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: crafted in bf16, every success verified in fp32


class Machine(Section):
    """Where a setting computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None  # null: as many as the machine offers
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
    def _fits_the_data(self) -> "Study":
        for key, wanted, available, part in (
            ("train.batch", self.train.batch, self.data.training_images, "training"),
            ("attack.n", self.attack.n or 0, self.data.test_images, "test"),
            ("autoattack.n", max(self.autoattack.n), self.data.test_images, "test"),
        ):
            if wanted > available:
                raise KeyedError(key, f"{wanted} is more than the {available} {part} images")
        if shape := self.data.contents.shape:
            if self.train.pad >= min(shape[1:]):
                raise KeyedError("train.pad", f"must be below {min(shape[1:])}, the side of an image")
            if self.train.mean is not None and len(self.train.mean) != shape[0]:
                raise KeyedError("train.mean", f"must have {shape[0]} entries, one per channel of an image")
        if self.train.compile and (pinned := self.machine.instructions):
            raise KeyedError(
                "train.compile",
                f"true cannot keep the bits that machine.instructions={pinned} pins; "
                f"set machine.instructions=null or train.compile=false",
            )
        return self


class Params(Section):
    """The whole of params.yaml."""

    settings: Annotated[list[Name], Field(min_length=1)]
    baselines: list[Name]
    variants: list[Name]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    alpha: NonNegative | None = None
    launch: Text = "python"
    study: Annotated[dict[Name, Study], Field(min_length=1)]
    recipes: Annotated[dict[Name, Recipe], Field(min_length=1)]

    @model_validator(mode="after")
    def _selection(self) -> "Params":
        for key, known in (("settings", self.study), ("baselines", self.recipes), ("variants", self.recipes)):
            for name in getattr(self, key):
                if name not in known:
                    raise KeyedError(key, f"unknown {name!r}; did you mean {similar(name, known)}?")
        for key in ("settings", "baselines", "variants", "seeds"):
            chosen = getattr(self, key)
            if twice := [each for each in chosen if chosen.count(each) > 1]:
                raise KeyedError(key, f"{twice[0]!r} stands there twice")
        if not self.baselines and not self.variants:
            raise KeyedError("baselines", "must name a method, since variants is empty too")
        for name in self.variants:
            if name in self.baselines:
                raise KeyedError("variants", f"{name!r} stands in baselines too")
            if not all(with_overrides(name, self.recipes[name], s).needs_guide for s in self.settings):
                raise KeyedError("variants", f"{name!r} trains no guide; select it in baselines")
        return self

    @model_validator(mode="after")
    def _every_setting_runs_every_recipe(self) -> "Params":
        for name, recipe in self.recipes.items():
            for other in recipe.per_study.keys() - self.study.keys():
                key, known = f"recipes.{name}.per_study.{other}", similar(other, self.study)
                raise KeyedError(key, f"unknown; did you mean {known}?")
            for setting in self.study:
                try:
                    self.recipe(setting, name)
                except ValidationError as error:
                    key, reason = describe(error)
                    raise KeyedError(
                        f"recipes.{name}.{key}",
                        f"{reason}, once study.{setting}.train and alpha have changed it",
                    ) from None
        return self

    def recipe(self, setting: str, method: str) -> Recipe:
        """The recipe of ``method`` as ``setting`` runs it.

        The recipe's differences for the setting are merged in, then the setting's epsilon, epochs, lr,
        weight decay and steps, with everything that depends on them in proportion, then ``alpha`` for a
        method of ``variants``.
        """
        recipe = with_overrides(method, self.recipes[method], setting)
        values = rescale(recipe, self.study[setting].train).model_dump()
        if self.alpha is not None and method in self.variants:
            values["alpha"] = self.alpha
        return Recipe(**values)


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
