"""Fills the API page with the public names when `mkdocs` builds the site."""

import importlib
import types
from pathlib import Path
from typing import Any

NAMES = "<!-- public names of {} -->"
PACKAGES = ("wavejax", "pallas_kernels")


def public_names(package: types.ModuleType) -> list[str]:
    """Return what a package exports.

    That is its `__all__`, or else the names that are no modules, sorted.
    """
    if hasattr(package, "__all__"):
        return list(package.__all__)
    values = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    return sorted(name for name, value in values.items() if not isinstance(value, types.ModuleType))


def on_config(config: Any) -> Any:
    """Leaves out of the navigation what is not there."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a reference of every public name where the API page asks for it."""
    for name in PACKAGES:
        marker = NAMES.format(name)
        if marker in markdown:
            package = importlib.import_module(name)
            named = {each: _path(package, each) for each in public_names(package)}
            # A name that has a section of its own is not repeated.
            new = {each: path for each, path in named.items() if f"::: {path}\n" not in markdown}
            listed = "\n\n".join(
                f"::: {path}\n    options:\n      heading: {name}.{each}\n      toc_label: {each}"
                for each, path in new.items()
            )
            markdown = markdown.replace(marker, listed)
    return markdown


def _path(package: types.ModuleType, name: str) -> str:
    """Where a name is defined: in its package an op has the name of its folder."""
    value = getattr(package, name)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{package.__name__}.{name}"


def _existing(nav: list[Any], folder: Path) -> list[Any]:
    kept = []
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            kept.append({title: _existing(target, folder)})
        elif (folder / target).is_file():
            kept.append(entry)
    return kept
