"""`unclip doctor`: a healthy machine is healthy, and every trouble is named with what mends it, never a traceback."""

import json
import os
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path

import jax
import numpy as np
import pytest

from unclip_jax import cascade, doctor
from unclip_jax.cli import main
from unclip_jax.doctor import accelerators, machine, selftest

SHIPS = doctor.SHIPPED
STAGES = ("CLIP, text", "prior", "AR prior", "decoder", "CLIP, image", "upsampler 256")


@pytest.fixture(scope="module")
def tiny_folder(tiny_cascade_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("doctor") / "cascade"
    return shutil.copytree(tiny_cascade_folder, place, ignore=shutil.ignore_patterns("upsampler_1024*"))


@pytest.fixture(autouse=True)
def tiny_weights_ship(monkeypatch, tiny_folder):
    monkeypatch.setattr(doctor, "SHIPPED", tiny_folder)
    monkeypatch.setattr(accelerators, "accelerators", lambda: {})


def wrong(report):
    """The names of what is wrong, and the one finding of the first."""
    found = [finding for finding in report.findings if finding.state == "wrong"]
    return [finding.name for finding in found], found[0] if found else None


def test_a_healthy_machine_is_healthy(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing is wrong" and SHIPS == cascade.SHIPPED
    assert any(line.startswith(f"ok     jax              {jax.__version__}") for line in lines)
    for stage in STAGES:
        assert any(line.startswith(f"ok     {stage:<16} ") and " s, the first time " in line for line in lines), stage


@pytest.mark.parametrize(
    "error", ["RuntimeError('jaxlib is version 0.4.1')", "ModuleNotFoundError(\"No module named 'jax'\")"]
)
def test_it_starts_where_jax_does_not(error, tmp_path):
    (tmp_path / "jax.py").write_text(f"raise {error}")
    root = Path(doctor.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}

    def unclip(*words):
        command = [sys.executable, "-m", "unclip_jax.cli", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    done = unclip("doctor")
    assert done.returncode == 1 and done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    assert line.startswith("WRONG  import jax       fails: ") and error.split("(")[0] in line
    assert "do: pip install" in done.stdout and "ok     disk" in done.stdout
    done = unclip("vocabulary")
    assert done.returncode == 1 and done.stderr.startswith("unclip: ") and done.stderr.count("\n") == 1


def test_a_stage_that_fails_leaves_the_others(monkeypatch, tiny_folder):
    def fails(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16 bytes")

    monkeypatch.setattr(selftest, "decode", fails)
    found = {finding.name: finding for finding in selftest.stages(tiny_folder)}
    assert tuple(found) == STAGES and [name for name in STAGES if found[name].state == "wrong"] == ["decoder"]
    assert "end other programs" in found["decoder"].remedy


def test_numbers_that_are_not_finite_or_of_another_shape_are_told():
    finding, result = selftest._run("decoder", lambda: np.full((1, 2), np.nan), (1, 2))
    assert finding.state == "wrong" and finding.said == "gives numbers that are not finite" and result is None
    assert "of shape (1, 2), not (1, 3)" in selftest._run("decoder", lambda: np.ones((1, 2)), (1, 3))[0].said


def test_a_damaged_weights_file_is_named(tmp_path, capsys, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "cascade")
    path = folder / "decoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["doctor", "--weights", str(folder), "--no-test", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (finding,) = [finding for finding in report["findings"] if finding["state"] == "wrong"]
    assert not report["healthy"] and finding["figures"] == {"file": str(path)}
    assert f"'{path}' is damaged" in finding["said"] and "fetch the file again" in finding["remedy"]


def test_weights_that_are_not_there_are_one_sentence_each(capsys):
    assert main(["doctor", "--weights", "nowhere"]) == 1
    said = capsys.readouterr()
    assert "there is no folder of weights 'nowhere'" in said.out and "mend the weights first" in said.out
    assert said.err == "" and "2 things are wrong" in said.out


@pytest.mark.parametrize("own", [True, False])
def test_a_cache_that_cannot_be_written_is_named(own, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("UNCLIP_CACHE_DIR", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "folder") if own else None)
    try:
        (finding,) = machine.cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert finding.state == "wrong" and "cannot be written (Not a directory)" in finding.said
    assert finding.remedy.startswith(f"export {'JAX_COMPILATION' if own else 'UNCLIP'}_CACHE_DIR=FOLDER")


def test_versions_that_are_too_old_absent_or_do_not_fit(monkeypatch):
    found = {"jax": "0.5.3", "flax": None, "jaxlib": "0.5.3", "jax-cuda12-plugin": "0.5.1"}
    monkeypatch.setattr(machine, "version_of", lambda package: found.get(package, "99"))
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.10.12")
    told = {finding.name: finding for finding in machine.versions() if finding.state == "wrong"}
    assert list(told) == ["python", "jax", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin"]
    assert told["jax"].said.startswith("0.5.3 is older than 0.6.1")
    assert told["jax"].remedy.startswith("pip install -U 'jax>=0.6.1', then start Python again")
    assert told["flax"].said == "is not installed" and told["python"].remedy.startswith("install Python 3.11")
    for number in (12, 13):
        assert told[f"jax-cuda{number}-plugin"].remedy.startswith(f"pip install -U 'jax[cuda{number}]==0.5.3'")


def test_requirements_are_the_same_from_a_checkout_and_installed(monkeypatch, tmp_path):
    here = machine.requirements()
    assert here["python"] == "3.11" and here["jax"] == "0.6.1" and "optax" not in here
    installed = Message()
    installed["Requires-Python"] = ">=3.11"
    for name, version in here.items():
        installed["Requires-Dist"] = f"{name}>={version}"
    installed["Requires-Dist"] = 'optax>=0.2.7; extra == "train"'
    monkeypatch.setattr(machine.metadata, "metadata", lambda _: installed)
    monkeypatch.setattr(machine.unclip_jax, "__file__", str(tmp_path / "unclip_jax" / "__init__.py"))
    assert machine.requirements() == here


def test_an_accelerator_that_jax_does_not_use_is_named_with_the_command(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 550.54.15'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert accelerators._nvidia() == "Tesla T4, driver 550.54.15"
    monkeypatch.setattr(accelerators, "accelerators", lambda: {"gpu": "Tesla T4", "tpu": "COLAB_TPU_ADDR"})
    processors = jax.local_devices(backend="cpu")  # as on a machine whose jax sees no more
    monkeypatch.setattr(jax, "local_devices", lambda: processors)
    monkeypatch.setattr(accelerators, "version_of", lambda package: {"jaxlib": "0.9"}.get(package))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, gpu, tpu = accelerators.devices()
    assert gpu.state == tpu.state == "wrong" and "has a GPU (Tesla T4), and jax does not use it" in gpu.said
    assert gpu.remedy.startswith(f"pip install -U 'jax[cuda12]=={jax.__version__}', then start Python again")
    assert tpu.remedy.startswith(f"pip install -U 'jax[tpu]=={jax.__version__}'")
    monkeypatch.setattr(accelerators, "version_of", lambda package: "0.9")
    assert "driver" in list(accelerators.devices())[1].remedy
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [finding.state for finding in accelerators.devices()] == ["ok", "note", "note"]


def test_what_jax_raises_instead_of_devices_is_a_finding(monkeypatch):
    def raises():
        raise RuntimeError("Unable to initialize backend 'tpu': The TPU is already in use by process 7")

    monkeypatch.setattr(jax, "local_devices", raises)
    names, finding = wrong(doctor.examine(test=False))
    assert names[0] == "devices" and "already in use" in finding.said and "end the other process" in finding.remedy


def test_a_check_that_raises_leaves_the_others(monkeypatch):
    monkeypatch.setattr(doctor, "disk", lambda: [][0])
    report = doctor.examine(test=False)
    assert wrong(report)[0] == ["disk"] and report.findings[-1].name == "weights"
    assert "could not be examined: IndexError" in str(report)
