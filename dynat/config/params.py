"""params.yaml as typed, validated data: every knob, every cross-check, no torch.

Every stage calls :func:`load` before anything else. A fault is one line that names the key as the user
would type it after ``dvc exp run -S``.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from dynat.config.fields import (
    Count,
    Flag,
    Index,
    Model,
    Name,
    NonNegative,
    Number,
    Seed,
    Text,
    describe,
    meant,
    shown,
)
from dynat.config.recipe import Recipe, Train, rescale, with_overrides
from dynat.errors import UserError as UserError

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
TRAINING_IMAGES = {"digits": 1797, "cifar10": 50_000, "cifar100": 50_000}  # digits: with the test images
RESNET18 = (2, 2, 2, 2)  # blocks per stage where none are given
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000}


class DataSpec(Model):
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
    def _complete(self) -> "DataSpec":
        if self.archive is not None and (
            "/" in self.archive or "\\" in self.archive or self.archive.startswith(".")
        ):
            raise ValueError("archive: must be a plain file name; say where it lies with DYNAT_DATA_MIRROR")
        if self.source == "digits":
            if self.archive is not None:
                raise ValueError("archive: the digits ship inside scikit-learn and need none")
            if self.test is None:
                raise ValueError("test: the digits have no test set of their own; give its size")
        elif self.archive is None:
            raise ValueError(f"archive: source={self.source} needs the name of an archive")
        if self.source != "image_folder" and self.archive is not None and not (self.md5 or self.sha256):
            raise ValueError("md5: give the archive's md5 or sha256, or it could not be verified")
        if self.source in CLASSES and self.classes != CLASSES[self.source]:
            raise ValueError(f"classes: source={self.source} has {CLASSES[self.source]}")
        if (available := self.training_images) is not None and available < 1:
            key = "validation" if available + self.validation > 0 else "test"
            raise ValueError(f"{key}: {getattr(self, key)} images leave none for training")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width, or None where only the archive can tell."""
        return SHAPES.get(self.source)

    @property
    def training_images(self) -> int | None:
        """Images left for training, or None where only the archive can tell."""
        known = [self.train, TRAINING_IMAGES.get(self.source)]
        if self.source == "digits":
            known[1] = TRAINING_IMAGES["digits"] - (self.test or 0)
        total = min((count for count in known if count is not None), default=None)
        return None if total is None else total - self.validation

    @property
    def test_images(self) -> int | None:
        """Images of the test set, or None where only the archive can tell."""
        known = [count for count in (self.test, TEST_IMAGES.get(self.source)) if count is not None]
        return min(known, default=None)


class Network(Model):
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
        residual = {"blocks", "strides", "width"}
        own = {
            "resnet": residual,
            "preact_resnet": residual,
            "wrn": {"depth", "widen", "sub_block1"},
            "cnn": {"width", "depth", "stem_stride"},
        }[self.name]
        for key in self.options:
            if key not in own:
                raise ValueError(f"{key}: name={self.name} takes only {', '.join(sorted(own))}")
        if len(self.blocks or RESNET18) != len(self.strides or RESNET18):
            raise ValueError("strides: must have one entry per entry of blocks (by default 4)")
        if self.name == "wrn" and ((self.depth or 34) - 4) % 6:
            raise ValueError("depth: a WideResNet's depth is 6k + 4 (34, 28, 16, 10)")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, as ``build`` takes them."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


Radius = Annotated[Number, Field(gt=0, le=1)]  # of an attack on images in [0,1]


class Attack(Model):
    """The attacks of an evaluation (methods.md 3.4)."""

    epsilon: Radius
    step: Radius
    pgd: Annotated[list[Count], Field(min_length=1)]  # PGD-k for each k
    cw_steps: Count = 20
    apgd_steps: Count = 100
    n: Count | None = None  # first n test images; null: all
    batch: Count = 200
    seed: Seed = 0


class AutoAttack(Model):
    """AutoAttack standard; accuracies are reported on the first k test images for each k in n."""

    epsilon: Radius
    n: Annotated[list[Count], Field(min_length=1)]
    batch: Count = 200  # also the size of a resumable chunk
    seed: Seed = 0
    workers: Count = 1  # processes on a CPU; no verdict depends on it
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: crafted in bf16, every success verified in fp32


class Machine(Model):
    """Where a setting computes; an explicit ``device: cpu`` insists on a CPU for hours or days."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None  # null: as many as the machine offers
    instructions: Literal["avx2"] | None = None  # pin the CPU's instruction set: same bits on any x86-64


class Study(Model):
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
        wanted = {
            "train.batch": (self.train.batch, self.data.training_images, "training"),
            "attack.n": (self.attack.n or 0, self.data.test_images, "test"),
            "autoattack.n": (max(self.autoattack.n), self.data.test_images, "test"),
        }
        for key, (count, available, part) in wanted.items():
            if available is not None and count > available:
                raise ValueError(f"{key}: {count} is more than the {available} {part} images")
        if shape := self.data.image_shape:
            channels, *sides = shape
            if self.train.pad >= min(sides):
                raise ValueError(f"train.pad: must be below {min(sides)}, the side of an image")
            if self.train.mean is not None and len(self.train.mean) != channels:
                raise ValueError(f"train.mean: must have {channels} entries, one per channel of an image")
        return self

    @model_validator(mode="after")
    def _compiled_code_is_not_pinned(self) -> "Study":
        pinned = self.machine.instructions
        if self.train.compile and pinned:
            raise ValueError(
                f"train.compile: true cannot keep the bits that machine.instructions={pinned} pins; "
                f"set machine.instructions=null or train.compile=false"
            )
        return self


class Params(Model):
    """The whole of params.yaml."""

    settings: Annotated[list[Name], Field(min_length=1)]
    baselines: list[Name]
    variants: list[Name]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    alpha: NonNegative | None = None
    launch: Text = "python"
    study: dict[Name, Study]
    recipes: dict[Name, Recipe]

    @model_validator(mode="after")
    def _selection(self) -> "Params":
        for key, known in (("settings", self.study), ("baselines", self.recipes), ("variants", self.recipes)):
            chosen = getattr(self, key)
            for name in chosen:
                if name not in known:
                    raise ValueError(f"{key}: unknown {name!r}{meant(name, known)}")
                if chosen.count(name) > 1:
                    raise ValueError(f"{key}: {name!r} stands there twice")
        if not self.baselines and not self.variants:
            raise ValueError("baselines: must name a method, since variants is empty too")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: the same seed stands there twice")
        for name in self.variants:
            if name in self.baselines:
                raise ValueError(f"variants: {name!r} stands in baselines too")
            if not all(with_overrides(name, self.recipes[name], s).needs_guide for s in self.settings):
                raise ValueError(f"variants: {name!r} trains no guide; select it in baselines")
        return self

    @model_validator(mode="after")
    def _every_setting_runs_every_recipe(self) -> "Params":
        for name, recipe in self.recipes.items():
            for setting in recipe.per_study:
                if setting not in self.study:
                    raise ValueError(
                        f"recipes.{name}.per_study.{setting}: unknown{meant(setting, self.study)}"
                    )
            for setting in self.study:
                try:
                    self.recipe(setting, name)
                except ValidationError as error:
                    fault = describe(error, Recipe)
                    raise ValueError(
                        f"recipes.{name}.{fault}, once study.{setting}.train and alpha have changed it"
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


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves numbers as text, and reads booleans as YAML 1.2 (and DVC) does.

    YAML 1.1 reads ``010`` as 8 and ``1e-3`` as a word; the typed fields read both as people mean them.
    Duplicate keys are refused, and so are anchors: ``dvc exp run -S`` on a key that is shared through an
    alias is lost without a word, or changes every recipe that shares it.
    """

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            raise UserError(
                f"line {event.start_mark.line + 1}: write the values out instead of the anchor or alias "
                f"{shown(event.anchor)}, which `dvc exp run -S` does not keep apart"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise UserError(f"line {line}: a key must be a plain word or number")
            if key in seen:
                raise UserError(f"line {line}: {shown(key)} stands there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.endswith((":null", ":bool", ":str", ":seq", ":map"))
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[tT]rue|[fF]alse)$"), list("tTfF"))


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate ``path``; raises :class:`UserError`, one line, for whatever is wrong with it."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the top of the repository") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: {line}{_one_line(error.problem or 'is not YAML')}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(str(error))}") from None
    return parse(values, str(path))


def parse(values: object, source: str = "params.yaml") -> Params:
    """Validate the content of a params file; raises :class:`UserError`, one line."""
    if not isinstance(values, dict):
        raise UserError(f"{source}: must hold keys such as settings, study and recipes")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_one_line(describe(error, Params))}") from None
    except RecursionError:
        raise UserError(f"{source}: is nested too deeply") from None


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
