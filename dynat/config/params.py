"""params.yaml as typed, validated data: every knob, every cross-check, no torch.

Every stage calls :func:`load` before anything else. A fault is one line that names the key as the user
would type it after ``dvc exp run -S``.
"""

from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from dynat.config import yaml_files
from dynat.config.attack import Attack, AutoAttack
from dynat.config.fields import (
    Count,
    Index,
    KeyedError,
    NonNegative,
    Section,
    check_known,
    describe,
)
from dynat.config.network import Checkpoint, Hash, Network, Urls
from dynat.config.recipe import Recipe
from dynat.config.train import Train, rescale
from dynat.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
GUIDE = "guide"  # before the hyphen of a method: its target becomes a frozen guide


class DataSpec(Section):
    """Where the images come from and how they are split; stage prepare says whether it has as many."""

    source: Literal["digits", "cifar10", "cifar100", "image_folder"]
    # name of a file (or folder), looked for in DYNAT_DATA_MIRROR first
    archive: Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")] | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    # of the archive; of a folder download.folder_hash; an image_folder must have it
    sha256: Hash | None = None
    mirrors: Urls = []
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


def recipe_of(method: str) -> str:
    """The recipe of a method: itself, ``trades`` of ``guide-trades``, ``rslad`` of ``rslad-<guide>``."""
    first, _, second = method.partition("-")
    return second if first == GUIDE else first


class Params(Section):
    """The whole of params.yaml."""

    settings: Annotated[list[Name], Field(min_length=1)]
    baselines: list[Name]
    variants: list[Name]
    distilled: list[Name] = []
    guides: list[Name] = []
    seeds: Annotated[list[Index], Field(min_length=1)]
    alpha: NonNegative | None = None
    checkpoints: dict[Name, Name] = {}  # weights of ``checkpoint``, attacked in a setting
    guide_checkpoints: list[Name] = []
    launch: str = "python"
    save_minutes: NonNegative = 10.0  # of work that a kill may cost a training; 0: its last step
    study: Annotated[dict[Name, Study], Field(min_length=1)]
    recipes: Annotated[dict[Name, Recipe], Field(min_length=1)]
    checkpoint: dict[Name, Checkpoint] = {}

    @model_validator(mode="after")
    def _every_setting_runs_every_recipe(self) -> "Params":
        for key, names in (("recipes", self.recipes.keys()), ("checkpoint", self.checkpoint.keys())):
            if GUIDE in names:
                reason = "is what frozen guides are named by; choose another name"
                raise KeyedError(f"{key}.{GUIDE}", reason)
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
        for key, selected, known in (
            ("settings", self.settings, self.study),
            ("baselines", self.baselines, self.recipes),
            ("variants", [*self.baselines, *self.variants], self.recipes),
            ("distilled", self.distilled, self.recipes),
            ("guides", self.guides, self.recipes),
            ("guide_checkpoints", self.guide_checkpoints, self.checkpoint),
        ):
            for name in selected:
                check_known(key, name, known)
                if selected.count(name) > 1:
                    raise KeyedError(key, f"{name!r} is selected twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise KeyedError("seeds", "one is selected twice")
        for name, setting in self.checkpoints.items():
            check_known("checkpoints", name, self.checkpoint)
            check_known(f"checkpoints.{name}", setting, self.study)
            if setting not in self.settings:
                reason = f"must have {setting!r}, which checkpoints.{name} is attacked in"
                raise KeyedError("settings", reason)
        if same := min({*self.checkpoint} & {*self.recipes}, default=None):
            raise KeyedError(f"checkpoint.{same}", "is the name of a recipe too; choose another one")
        self._check_guide_checkpoints()
        if self.distilled and not (self.guides or self.guide_checkpoints):
            reason = "name the recipe whose target guides those of distilled, such as -S 'guides=[trades]'"
            raise KeyedError("guides", f"{reason}, or weights in guide_checkpoints")
        if not self.trained and not self.checkpoints:
            raise KeyedError("baselines", "must name a method, since variants and checkpoints are empty too")
        for key in ("baselines", "variants", "distilled", "guides"):
            for name, setting in product(getattr(self, key), self.settings):
                self._check_guide(key, name, self.recipe(setting, name))
        return self

    def _check_guide_checkpoints(self) -> None:
        """Raise :class:`KeyedError` unless all of them are imported in the one setting that is selected."""
        for name in self.guide_checkpoints:
            if name not in self.checkpoints:
                reason = f"must import {name!r} of guide_checkpoints: -S '+checkpoints.{name}=<setting>'"
                raise KeyedError("checkpoints", reason)
            setting = self.checkpoints[name]
            for other, its in self.checkpoints.items():
                if its != setting:
                    reason = f"is not {setting}, as {name!r} of guide_checkpoints; leave one of them out"
                    raise KeyedError(f"checkpoints.{other}", reason)
            if self.distilled and self.settings != [setting]:
                reason = f"must be [{setting}] alone, where {name!r} of guide_checkpoints is imported"
                raise KeyedError("settings", reason)

    def _check_guide(self, key: str, name: str, recipe: Recipe) -> None:
        """Raise :class:`KeyedError` for a recipe in a list of methods that have another kind of guide."""
        if recipe.frozen_guide and key == "guides":
            raise KeyedError(key, f"{name!r} has a frozen guide itself; choose one without")
        if recipe.frozen_guide and key != "distilled":
            raise KeyedError(key, f"{name!r} has a frozen guide; select it in distilled")
        if not recipe.frozen_guide and key == "distilled":
            raise KeyedError(key, f"{name!r} has no frozen guide; select it in baselines or variants")
        if not recipe.trains_guide and key == "variants":
            raise KeyedError(key, f"{name!r} trains no guide; select it in baselines")

    @property
    def trained(self) -> list[str]:
        """All that is trained to be attacked; a distilled method is named after its guide's recipe too."""
        pairs = product(self.distilled, [*self.guides, *self.guide_checkpoints])
        return [*self.baselines, *self.variants, *(f"{name}-{guide}" for name, guide in pairs)]

    @property
    def frozen_guides(self) -> list[str]:
        """What is trained for :attr:`trained` beside them."""
        return [f"{GUIDE}-{name}" for name in self.guides]

    def guide_run(self, method: str, seed: int) -> tuple[str, int] | None:
        """Method and seed of the weights that are the frozen guide of ``method``, if it has one.

        ``guide-trades`` and the same seed for ``rslad-trades``; a name of ``checkpoint`` has the seed 0.
        """
        first, _, guide = method.partition("-")
        if first == GUIDE or not guide:
            return None
        return (guide, 0) if guide in self.checkpoint else (f"{GUIDE}-{guide}", seed)

    def methods(self, setting: str) -> list[str]:
        """The selected rows of ``setting``, in their order: what is trained here, then what is not."""
        return [*self.trained, *(name for name, its in self.checkpoints.items() if its == setting)]

    @property
    def runs(self) -> list[tuple[str, str, int]]:
        """Setting, method and training seed of everything selected, in their order; 0 of a checkpoint."""
        return [
            (setting, method, seed)
            for setting in self.settings
            for method in self.methods(setting)
            for seed in ([0] if method in self.checkpoint else self.seeds)
        ]

    @property
    def published_weights(self) -> dict[str, str]:
        """Selected checkpoint -> the row of the paper, such as "table1/TRADES", whose weights it is."""
        rows = {name: self.checkpoint[name].row for name in self.checkpoints}
        return {name: row for name, row in rows.items() if row}

    def study_of(self, setting: str, method: str) -> Study:
        """The study as ``method`` runs it: what becomes a frozen guide is the guide's network."""
        study = self.study[setting]
        guide = method.startswith(f"{GUIDE}-")
        return study.model_copy(update={"target": study.guide}) if guide else study

    def recipe(self, setting: str, method: str) -> Recipe:
        """The recipe of ``method`` as ``setting`` runs it.

        Its differences for the setting are merged in, then ``alpha`` for a method of ``variants``, then the
        setting's epsilon, epochs, lr, weight decay and steps, with all that depends on them in proportion.
        """
        recipe = self.recipes[recipe_of(method)].in_setting(setting)
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
