"""What a network is and whose weights it may have: sections of params.yaml."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dynat.config.fields import Count, KeyedError, Number, Positive, Section

Layers = Annotated[Count, Field(le=1000)]
Stride = Annotated[Count, Field(le=1000)]  # pixels; of a far larger one no convolution can be made
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256
Urls = list[Annotated[str, Field(pattern=r"^https?://\S+$")]]  # what a file's name is appended to, in order
OPTIONS = {
    "resnet": {"blocks", "strides", "width"},
    "preact_resnet": {"blocks", "strides", "width"},
    "wrn": {"depth", "widen", "sub_block1"},
    "cnn": {"width", "depth", "stem_stride"},
}


class Network(Section):
    """A network of ``dynat.networks.architectures.build``; options of another family are refused."""

    name: Literal["resnet", "preact_resnet", "wrn", "cnn"]
    blocks: list[Layers] | None = None
    strides: list[Stride] | None = None
    width: Count | None = None
    depth: Layers | None = None
    widen: Count | None = None
    sub_block1: bool | None = None
    stem_stride: Stride | None = None

    @model_validator(mode="after")
    def _own_options(self) -> "Network":
        given, known = self.model_dump(exclude={"name"}, exclude_none=True), OPTIONS[self.name]
        if other := min(given.keys() - known, default=None):
            raise KeyedError(other, f"name={self.name} takes only {', '.join(sorted(known))}")
        return self


class Checkpoint(Section):
    """Weights that somebody else trained: where they are, and what they are the weights of."""

    # looked for in DYNAT_DATA_MIRROR first; with ``package`` a path in that installed package
    file: Annotated[str, Field(pattern=r"^[^./\\][^\\]*$")]
    package: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    sha256: Hash | None = None  # must be given; null: ``check`` says it
    mirrors: Urls = []
    origin: Annotated[str, Field(min_length=1, max_length=200)]  # who trained them how; beside every number
    entry: str | None = None  # of the file, which holds the state dict; null: the only one
    network: Network | None = None  # one of ours, or:
    module: Annotated[str, Field(pattern=r"^[\w./-]+\.py:\w+$")] | None = None  # "file.py:Class", run as code
    module_sha256: Hash | None = None  # of that file; must be given
    mean: list[Number] | None = None  # of the images, per channel, taken off inside the network
    std: list[Positive] | None = None  # null: the file's own, or pixels in [0,1] go in as they are
    row: str | None = None  # of the paper, whose weights they are: "table1/TRADES"

    @model_validator(mode="after")
    def _is_of_one_network(self) -> "Checkpoint":
        if (self.network is None) == (self.module is None):
            raise KeyedError("network", "give one of ours, or else a module of your own, file.py:Class")
        if "/" in self.file and self.package is None:
            raise KeyedError("file", "a name without folders, unless it is a path in a package")
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise KeyedError("std", "give mean and std together, each with one number per channel")
        return self

    @property
    def spec(self) -> dict[str, Any]:
        """The network as ``dynat.networks.architectures.build`` takes it, but for classes and channels."""
        code, constants = (
            {"name": self.module, "sha256": self.module_sha256},
            {"mean": self.mean, "std": self.std},
        )
        own = self.network.model_dump(exclude_none=True) if self.network else code
        return own | {key: value for key, value in constants.items() if value is not None}
