"""Fills the API page with the public names when `mkdocs` builds the site."""

import importlib
import types
from pathlib import Path
from typing import Any

NAMES = "<!-- public names of {} -->"
PACKAGES = ("wavejax", "pallas_kernels")


def public_names(package: types.ModuleType) -> list[str]:
    """What a package exports: its `__all__`, or else the names that are no modules, sorted."""
    if hasattr(package, "__all__"):
        return list(package.__all__)
    values = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    return sorted(name for name, value in values.items() if not isinstance(value, types.ModuleType))


def on_config(config: Any) -> Any:
    """Leaves out of the navigation what is not there."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts a reference of every public name where the API page asks for it."""
    for name in PACKAGES:
        marker = NAMES.format(name)
        if marker in markdown:
            package = importlib.import_module(name)
            listed = "\n\n".join(_reference(package, each) for each in public_names(package))
            markdown = markdown.replace(marker, listed)
    return markdown


def _reference(package: types.ModuleType, name: str) -> str:
    """A name's reference, from where it is defined: an op has the name of its folder."""
    value, path = getattr(package, name), f"{package.__name__}.{name}"
    if hasattr(value, "__qualname__"):
        path = f"{value.__module__}.{value.__qualname__}"
    heading = f"{package.__name__}.{name}"
    return f"::: {path}\n    options:\n      heading: {heading}\n      toc_label: {name}"


def _existing(nav: list[Any], folder: Path) -> list[Any]:
    kept = []
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            kept.append({title: _existing(target, folder)})
        elif (folder / target).is_file():
            kept.append(entry)
    return kept
