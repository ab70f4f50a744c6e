"""`python -m wavejax.doctor`: one verdict a line, no traceback, and a status."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import pallas_kernels as ops
from wavejax import doctor
from wavejax.cli import doctor_command

ROOT = Path(__file__).parents[3]
SUBJECTS = [
    *("versions", "plugins", "device", "memory", "pinned memory", "kernels", "smoke test"),
    "verdict",
]


def lines_of(text):
    """The findings that were printed, as tuples of verdict, subject and text."""
    found = []
    for line in text.splitlines():
        verdict, rest = line[:5].strip(), line[6:]
        subject, _, said = rest.partition(":")
        assert verdict in ("ok", "note", "fail"), line
        assert said.strip(), line
        found.append((verdict, subject, said.strip()))
    return found


def run(**environment):
    """The command as a process of its own: its status, and what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "wavejax.doctor"],
        env=kept | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, lines_of(done.stdout)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with a plugin of JAX that raises, several lines long, as it is started."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "broken_cuda.py").write_text(
        "def initialize():\n    raise RuntimeError('no libcuda\\nwas found')\n"
    )
    metadata = folder / "broken_cuda-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_cuda\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[jax_plugins]\nbroken_cuda = broken_cuda\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")
def test_on_a_cpu(capsys):
    assert doctor.main([]) == 0
    found = lines_of(capsys.readouterr().out)
    assert [subject for _, subject, _ in found] == SUBJECTS
    said = {subject: text for _, subject, text in found}
    assert f"jax {jax.__version__}" in said["versions"]
    assert "(cpu)" in said["device"]
    assert said["kernels"] == "none for all ops: there are no kernels for cpu"
    assert said["pinned memory"] == "not needed: there is one memory"
    assert "wave attention is full attention but for" in said["smoke test"]
    assert said["verdict"] == "wavejax can be used here, on cpu"


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert doctor.main([]) == 0
    said = {subject: text for _, subject, text in lines_of(capsys.readouterr().out)}
    assert "(gpu)" in said["device"]
    assert "GB/s to the device" in said["pinned memory"]
    assert "score_clusters" in said["kernels"]


def test_a_broken_plugin_is_a_line(broken):
    status, found = run(**broken)
    assert status == 1
    assert ("ok", "plugins", "broken_cuda") in [(v, s, t.split(", ")[0]) for v, s, t in found]
    [text] = [text for verdict, _, text in found if verdict == "fail"]
    assert "broken_cuda" in text
    assert text.endswith("RuntimeError: no libcuda was found")
    # The rest is there all the same: a CPU is.
    assert [subject for verdict, subject, _ in found if verdict == "ok"][-1] == "verdict"


def test_a_broken_plugin_of_a_platform_that_is_not_asked_for(broken):
    status, found = run(JAX_PLATFORMS="cpu", **broken)
    assert status == 0
    assert next(text for verdict, _, text in found if verdict == "note").endswith("was found")
    [device] = [text for _, subject, text in found if subject == "device"]
    assert device.endswith("JAX_PLATFORMS is cpu, others are not looked for")


def test_a_platform_that_is_not_there():
    status, found = run(JAX_PLATFORMS="abacus")
    assert status == 1
    failed = [(subject, text) for verdict, subject, text in found if verdict == "fail"]
    assert [subject for subject, _ in failed] == ["device", "verdict"]
    assert failed[0][1].startswith("JAX_PLATFORMS is abacus, which cannot be used here")
    assert failed[1][1] == "wavejax cannot be used here"


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "step, said",
    [
        (lambda: 0.5, "wave attention is full attention but for 5e-01 of it"),
        (lambda: float("nan"), "wave attention is full attention but for nan of it"),
        (lambda: raise_(ValueError("one\n\ntwo")), "ValueError: one two"),
        (lambda: raise_(MemoryError()), "MemoryError: no reason given"),
    ],
)
def test_a_smoke_test_that_fails(step, said, monkeypatch, capsys):
    monkeypatch.setattr(doctor_command, "_error_of_a_step", step)
    assert doctor.main([]) == 1
    found = lines_of(capsys.readouterr().out)
    failed = [(subject, text) for verdict, subject, text in found if verdict == "fail"]
    assert [subject for subject, _ in failed] == ["smoke test", "verdict"]
    assert failed[0][1].startswith(said)


def test_kernels_that_were_not_taken_are_told_with_the_reason(monkeypatch, capsys):
    choices = ops.Explanation(
        [
            ops.Choice("score_clusters", "triton", "gpu", "the kernel supports this case"),
            ops.Choice("append_rows", "xla", "gpu", "plain JAX serves this case best"),
        ]
    )
    monkeypatch.setattr(doctor_command, "_error_of_a_step", lambda: 0.0)
    monkeypatch.setattr(ops, "explain", lambda: choices)
    assert doctor.main([]) == 0
    found = lines_of(capsys.readouterr().out)
    assert [line for line in found if line[1] == "kernels"] == [
        ("ok", "kernels", "for score_clusters"),
        ("note", "kernels", "none for append_rows: plain JAX serves this case best"),
    ]


def test_a_gpu_that_jax_does_not_use_is_said(monkeypatch, tmp_path, capsys):
    if jax.default_backend() != "cpu" or jax.config.values["jax_platforms"]:
        pytest.skip("of a process that looks for a GPU and finds none")
    monkeypatch.setattr(doctor_command, "GPU_FILES", {str(tmp_path): "NVIDIA"})
    monkeypatch.setattr(doctor_command, "_error_of_a_step", lambda: 0.0)
    assert doctor.main([]) == 0
    [device] = [line for line in lines_of(capsys.readouterr().out) if line[1] == "device"]
    assert device[0] == "note"
    assert "there is a GPU of NVIDIA, which JAX does not use" in device[2]


def test_what_pinned_memory_gives_is_measured():
    device = jax.devices()[0]
    assert 1e6 < doctor_command.pinned_rate(device, 2**22) < 1e13
