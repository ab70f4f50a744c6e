"""Where the model lies that a path stands for, and what to give instead where there is none."""

import stat
from pathlib import Path

from models.checkpoints.gguf_parts import first_part, is_other_part
from models.errors import InputError
from models.paths import first_bytes, is_file, names_in, stat_of

_MOST_NAMED = 5
# What `models.checkpoints.orbax` writes beside the parameters.
CONFIG_FILE = "model_config.json"
ADAPTER = "adapter_config.json"
# Files that Orbax, of whichever program and version, writes to the root of a checkpoint.
_ORBAX_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "_sharding")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")


def resolve_model(path: str | Path) -> Path:
    """Return the path at which the model lies that a user's path stands for.

    That is the one snapshot of a hub cache's folder (``models--owner--name``), the first part of a
    split GGUF model whose other part is given, or the path itself.

    Raises:
      InputError: a hub cache's folder with no snapshot or with several; a path that cannot be
        looked at; or as `models.checkpoints.gguf_header.read_gguf_header` does, for another part.
    """
    path = Path(path)
    if is_file(path):
        return first_part(path)
    is_cache = path.name.startswith("models--") or {"blobs", "refs"} & set(names_in(path))
    if not is_cache or not _is_folder(path / "snapshots"):
        return path
    snapshots = [
        name for name in names_in(path / "snapshots") if _is_folder(path / "snapshots" / name)
    ]
    if len(snapshots) == 1:
        return path / "snapshots" / snapshots[0]
    if not snapshots:
        raise InputError(f"{path} is a hub cache without snapshots; download the model again")
    main = first_bytes(path / "refs" / "main", 64).decode("ascii", "replace").strip()
    named = [f"{name} (main)" if name == main else name for name in snapshots]
    raise InputError(
        f"{path} is a hub cache with {len(snapshots)} snapshots; give one of them, "
        f"{path / 'snapshots'}/NAME: {_listed(named)}"
    )


def no_model(folder: Path) -> InputError:
    """For a folder without a model's config: what it is, and what to give instead."""
    names = names_in(folder)
    if ADAPTER in names:
        return adapter(folder)
    if _is_orbax(folder):
        unfinished = ".unfinished-" in folder.name
        what = "what an interrupted conversion left" if unfinished else "of another program"
        return InputError(
            f"{folder} is an Orbax checkpoint {what}: only those that wavejax.convert has written "
            "to their end are read; convert the model from its Hugging Face folder or .gguf file"
        )
    models = [name for name in names if name.endswith(".gguf") and not is_other_part(name)]
    if lost := _lost_link(folder, names):
        hint = lost
    elif models:
        hint = f"; did you mean {_listed([str(folder / name) for name in models])}?"
    elif inside := _models_inside(folder, names):
        hint = f"; did you mean {_listed([str(folder / name) for name in inside])}?"
    elif "params.json" in names:
        hint = (
            ": params.json is of the model's original release; give the release for Hugging Face "
            "(config.json, safetensors)"
        )
    elif weights := _weights(names):
        hint = f" beside {_listed(weights)}; download the whole folder"
    else:
        hint = "; give a Hugging Face folder, a .gguf file or a converted folder"
    return InputError(f"{folder} is not a model folder: it has no config.json{hint}")


def adapter(folder: Path) -> InputError:
    """For a folder that holds an adapter."""
    return InputError(
        f"{folder} holds a LoRA adapter ({ADAPTER}), which is not applied: merge it into its base "
        "model (peft's merge_and_unload) and give the merged folder, or remove that file to use a "
        "model beside it without the adapter"
    )


def weights_hint(folder: Path) -> str:
    """For a folder with config.json and no safetensors: what to do, to be appended to a message."""
    names = names_in(folder)
    if lost := _lost_link(folder, names):
        return lost
    gguf_files = [name for name in names if name.endswith(".gguf") and not is_other_part(name)]
    if gguf_files:
        return f"; did you mean {_listed([str(folder / name) for name in gguf_files])}?"
    others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
    if others:
        suffix = Path(others[0]).suffix
        return (
            f"; its {suffix} files are not read: convert them to safetensors (transformers' "
            "save_pretrained does), or take a revision that has safetensors"
        )
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        return f" beside {_listed(tensors)}; download the whole folder, or rename the file"
    return "; download the whole folder"


def _lost_link(folder: Path, names: list[str]) -> str:
    """Return what to say where a file is a link to nothing.

    A cache of which a part was removed has such files.
    """
    lost = next((name for name in names if stat_of(folder / name) is None), None)
    return f"; {lost} is a link to a file that is not there: download it again" if lost else ""


def _is_folder(path: Path) -> bool:
    found = stat_of(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _is_orbax(folder: Path) -> bool:
    """Whether Orbax's files lie in a folder, or at most two below it, as steps and items do."""
    below = [folder, *_folders(folder)]
    below += [inner for outer in below[1:] for inner in _folders(outer)]
    return any(is_file(place / name) for place in below for name in _ORBAX_FILES)


def _folders(folder: Path) -> list[Path]:
    """Up to a dozen folders in a folder: a checkpoint's steps need not all be looked at."""
    return [folder / name for name in names_in(folder)[:50] if _is_folder(folder / name)][:12]


def _models_inside(folder: Path, names: list[str]) -> list[str]:
    """Names of the folders in `folder` that hold a model, or a hub's cache of one."""
    found = []
    for name in names[:200]:
        inside = folder / name
        if not _is_folder(inside):
            continue
        files = names_in(inside)
        if (
            "config.json" in files
            or CONFIG_FILE in files
            or any(file.endswith(".gguf") for file in files)
            or (name.startswith("models--") and "snapshots" in files)
        ):
            found.append(name)
    return found


def _weights(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".safetensors", *_OTHER_WEIGHTS))]


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
