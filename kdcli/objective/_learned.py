"""What an objective of another run learned: RUN_DIR/objectives/TERM.safetensors, read back by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from kdcli.errors import ConfigError
from kdcli.store import paths


def load_learned(parameters: Mapping[str, nn.Parameter], path: str, setting: str) -> None:
    """Fill `parameters` with those of these names in `path`: a run's folder, or one file of its `objectives`.

    Raises ConfigError, naming `setting`, where there is no such file, several would do, or a name or shape differs.
    """
    files = _files(path, setting)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        contents = {file: load_file(file) for file in files}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error}") from error
    fitting = [file for file, tensors in contents.items() if parameters.keys() <= tensors.keys()]
    if len(fitting) > 1:
        names = ", ".join(file.name for file in fitting)
        raise ConfigError(f"{setting}: {path} has several that fit ({names}); name one file in {fitting[0].parent}")
    if not fitting:
        lacking = sorted(parameters.keys() - set().union(*contents.values()))
        known = ", ".join(sorted(set().union(*contents.values()))) or "nothing"
        raise ConfigError(
            f"{setting}: {path} has no {', '.join(lacking or parameters)}; it has {known}; the pairs of layers must be "
            "those it was learned with"
        )
    for name, parameter in parameters.items():
        _fill(parameter, contents[fitting[0]][name], f"{setting}: {fitting[0]}: {name}")


def _files(path: str, setting: str) -> list[Path]:
    place = paths.resolve(path)
    if place.is_file():
        return [place]
    files = sorted((place / "objectives").glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{setting}: {path} is neither a run with objectives/*.safetensors nor such a file; give the folder of a "
            "finished run whose objective learned them"
        )
    return files


def _fill(parameter: nn.Parameter, found: Tensor, where: str) -> None:
    if found.shape != parameter.shape:
        raise ConfigError(f"{where} is {tuple(found.shape)}, but these models need {tuple(parameter.shape)}")
    parameter.data.copy_(found)
