"""Commands in environments that lack something: metadata, a platform; and as installed scripts."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    everything = os.environ | QUICK | environment
    return subprocess.run(command, env=everything, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["generate", "convert"])
@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_a_platform_that_is_not_there_is_one_line(
    tiny: Path, tmp_path: Path, module: str, platform: str
) -> None:
    if platform == "cuda":
        import jax

        if jax.default_backend() == "gpu":
            pytest.skip("here it is there")
    arguments = {
        "generate": ("--model", tiny, "--raw", "--prompt", "x"),
        "convert": (tiny, tmp_path / "new"),
    }
    done = run("-m", f"wavejax.{module}", *arguments[module], JAX_PLATFORMS=platform)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: JAX_PLATFORMS is {platform}, ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(25)
def test_an_environment_without_metadata(tiny: Path, tmp_path: Path) -> None:
    """As if packages had been copied, and not installed: nobody knows a version."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "def none(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.Distribution.from_name = staticmethod(none)\n"
        "metadata.Distribution.discover = staticmethod(lambda **_: iter(()))\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = run("-c", "import importlib.metadata as m; m.version('jax')", **paths)
    assert "PackageNotFoundError" in done.stderr
    done = run("-c", "import wavejax; print(wavejax.Sampler().greedy)", **paths)
    assert done.stdout == "True\n", done.stderr
    new = tmp_path / "new"
    done = run("-m", "wavejax.convert", tiny, new, **paths)
    assert done.returncode == 0, done.stderr
    prompt = ("--raw", "--prompt", "x", "--max-new-tokens", 1, "--attention", "full")
    done = run("-m", "wavejax.generate", "--model", new, *prompt, **paths)
    assert done.returncode == 0, done.stderr


def test_installed_scripts_end_as_modules_do() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, where in project["scripts"].items():
        module, function = where.split(":")
        # As pip writes it.
        script = f"import sys; from {module} import {function}; sys.exit({function}())"
        done = run("-c", f"import sys; sys.argv = [{name!r}, '--magic']; {script}")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: No such option")
        interrupt = "import os, signal, click; click.Command.make_context = "
        interrupt += "lambda *_: os.kill(os.getpid(), signal.SIGINT)"
        done = run("-c", f"{interrupt}; {script}")
        assert (done.returncode, done.stderr.split()) == (130, ["interrupted"])


def test_public_names_are_all_there() -> None:
    import wavejax

    assert set(wavejax.__all__) <= set(dir(wavejax))
    for name in wavejax.__all__:
        found = getattr(wavejax, name)
        assert found.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = wavejax.Nothing  # type: ignore[attr-defined]
