"""Stage prepare: archive or package -> ``data/<setting>.safetensors``, hashed and pickle-free."""

import argparse
from pathlib import Path

from dynat.config.params import load
from dynat.data.sources import prepare
from dynat.errors import UserError
from dynat.runtime.stage import main


def stage() -> None:
    """Write the setting's data file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting")
    setting = parser.parse_args().setting
    params = load()
    if setting not in params.study:
        raise UserError(f"setting {setting!r} is not in params.yaml's study")
    destination = Path("data", f"{setting}.safetensors")
    summary = prepare(params.study[setting].data, destination, f"study.{setting}.data")
    print(f"{setting}: {summary}")


if __name__ == "__main__":
    main(stage)
