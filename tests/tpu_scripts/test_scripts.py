import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
FAKE = Path(__file__).with_name("fake_cloud.py")
CAPACITY = '"code": 8,\n  "message": "There is no more capacity in the zone \\"us-east5-a\\""'
QUOTA = '"code": 8, "message": "Quota limit \'TPUV5sPod\' has been exceeded. Limit: 0 in zone us-east5-a."'

UNTIL_DELETED = "[[ -e $FAKE/deleted ]] || exec sleep 60"

# Makes an environment whose `unclip` notes its arguments and ends as the file `ends` beside the worker's home says.
UV = r"""#!/usr/bin/env bash
case $1-$2 in
  venv-*)
    bin=${*: -1}/bin
    mkdir -p "$bin"
    printf '#!/bin/sh\necho Python 3.12.1\n' >"$bin/python"
    cat >"$bin/unclip" <<'END'
#!/usr/bin/env bash
printf '%s\0' "$PWD" "$@" >>"$HOME/trained"
echo >>"$HOME/launches"
echo training
. "$FAKE/ends"
END
    chmod +x "$bin"/*
    ;;
  pip-install) [[ $* == *--constraints* ]] && cp "$HOME/unclip-versions.txt" "$HOME/pinned" ;;
  pip-freeze) echo jax==0.7.0 ;;
esac
"""


class Cloud:
    """A project of the fake cloud; the scripts run against it with short pauses."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self.bin, self.repository = folder, folder / "bin", repository
        self.bin.mkdir(parents=True)
        for name in ("gcloud", "xpk", "kubectl"):
            (self.bin / name).write_text(f"#!{sys.executable} -SE\n{FAKE.read_text()}")
        (self.bin / "uv").write_text(UV)
        for path in self.bin.iterdir():
            path.chmod(0o755)
        (folder / "calls").touch()
        self.world()
        self.ends("exit 0")

    def world(self, **what: object) -> None:
        (self.folder / "world.json").write_text(json.dumps({"states": [["READY"]]} | what))

    def ends(self, code: str) -> None:
        (self.folder / "ends").write_text(code)

    def run(self, script: str, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
        quick = {"POLL": 0.02, "BACKOFF": 0.01, "SETTLE": 0.1, "GRACE": 2, "STATE_DIR": self.folder / "state"}
        place = {"ZONE": "us-east5-a", "ACCELERATOR": "v5p-16", "FAKE": self.folder, "HOME": self.folder}
        environment = {name: str(value) for name, value in (quick | place | settings).items()}
        environment["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        command = ["bash", str(self.repository / "tpu_scripts" / script), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self, action: str = "") -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for line in lines if action in (call := json.loads(line)) or not action]

    def home(self, worker: int = 0, name: str = "pod") -> Path:
        return self.folder / "home" / name / str(worker)

    def launches(self, worker: int = 0) -> int:
        path = self.home(worker) / "launches"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A small repository with these scripts, since ours takes a second to pack."""
    root = tmp_path_factory.mktemp("repository") / "a clone"  # with a space, as people's folders have
    shutil.copytree(SCRIPTS, root / "tpu_scripts")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "scripts"]):
        subprocess.run([*git, *command], check=True)
    return root


@pytest.fixture
def cloud(tmp_path, repository):
    yield (cloud := Cloud(tmp_path / "a cloud", repository))
    for pid in cloud.folder.glob("home/*/*/unclip/run/pid"):
        if not pid.with_name("exit").exists():
            with suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def printed(output: str) -> list[list[str]]:
    """The cloud's commands that a dry run printed."""
    return [words for line in output.splitlines() if (words := shlex.split(line))[0] in ("gcloud", "xpk", "kubectl")]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    scripts = sorted(path.name for path in SCRIPTS.glob("*.sh"))
    assert len(scripts) == 9
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["create", "setup", "launch", "logs", "watch", "delete", "gke"])
def test_help_and_wrong_usage(cloud, script):
    shown = cloud.run(f"{script}.sh", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"{script}.sh ") and "Settings: " in shown.stdout
    action = ["status"] if script == "gke" else []
    for wrong in ([], ["Pod"], ["pod", "--nonsense"], ["pod", "pod2"]):
        done = cloud.run(f"{script}.sh", *action, *wrong)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert cloud.run(f"{script}.sh", *action, "pod", ZONE="").returncode == 2
    assert cloud.calls() == []


STEPS = [
    ("create.sh", {}),
    ("create.sh", {"CAPACITY": "spot", "QUEUED": "yes", "PROJECT": "p", "CREATE_FLAGS": "--network=n --labels=a=b"}),
    ("create.sh", {"SLICES": 2}),
    ("setup.sh", {"BUCKET": "", "SSH_FLAGS": "--internal-ip"}),
    ("setup.sh", {"SLICES": 2}),
    ("launch.sh", {}),
    ("logs.sh", {"FOLLOW": "no", "WORKER": "all"}),
    ("delete.sh", {}),
    ("gke.sh create-cluster", {"CAPACITY": "spot"}),
    ("gke.sh launch", {"CLUSTER": "c", "SLICES": 2}),
    ("gke.sh wait", {"CLUSTER": "c"}),
    ("gke.sh logs", {"CLUSTER": "c"}),
    ("gke.sh delete", {"CLUSTER": "c"}),
]


def test_a_dry_run_calls_nothing_and_prints_what_is_run(cloud):
    command = ["--", "unclip", "train", "--name", "a b"]
    cloud.run("create.sh", "pod")
    cloud.run("setup.sh", "pod")
    for step, settings in STEPS:
        script, *action = step.split()
        if script == "create.sh":
            (cloud.folder / "pod.states").unlink(missing_ok=True)
        words = [*action, "pod", *(command if "launch" in step else [])]
        before = len(cloud.calls())
        dry = cloud.run(script, *action, "pod", "--dry-run", *words[len(action) + 1 :], **settings)
        assert dry.returncode == 0, dry.stderr
        assert len(cloud.calls()) == before
        real = cloud.run(script, *words, **settings)
        assert real.returncode == 0, real.stderr
        assert sorted(printed(dry.stdout)) == sorted(cloud.calls()[before:]) != [], step


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5e-16", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_the_runtime_fits_the_generation(cloud, accelerator, runtime):
    call = printed(cloud.run("create.sh", "pod", "--dry-run", ACCELERATOR=accelerator).stdout)[1]
    assert f"--version={runtime}" in call
    assert f"--accelerator-type={accelerator.replace('v5e', 'v5litepod')}" in call


@pytest.mark.parametrize("accelerator", ["", "v5p", "h100-8", "tpu7x-64"])
def test_an_unknown_accelerator_is_refused(cloud, accelerator):
    done = cloud.run("create.sh", "pod", ACCELERATOR=accelerator)
    assert done.returncode == 2 and "ACCELERATOR" in done.stderr or "GKE" in done.stderr


def test_create_waits_until_ready(cloud):
    cloud.world(states=[["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]], delay=0.01)
    done = cloud.run("create.sh", "pod", QUEUED="yes")
    assert done.returncode == 0 and len(cloud.calls("describe")) == 5 and len(cloud.calls("create")) == 1
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        "pod is WAITING_FOR_RESOURCES, waiting",
        "pod is PROVISIONING, waiting",
        "pod is ready",
    ]
    assert cloud.run("create.sh", "pod", QUEUED="yes").returncode == 0 and len(cloud.calls("create")) == 1


def test_create_stops_waiting_and_leaves_the_request(cloud):
    cloud.world(states=[["WAITING_FOR_RESOURCES"]])
    done = cloud.run("create.sh", "pod", QUEUED="yes", WAIT_LIMIT=0)
    assert done.returncode == 3 and "still WAITING_FOR_RESOURCES" in done.stderr and cloud.calls("delete") == []


@pytest.mark.parametrize(
    ("message", "times", "code", "tries"),
    [
        (CAPACITY, 2, 0, 3),
        ("ERROR: HTTPError 503: Service Unavailable", 1, 0, 2),
        ("ERROR: code: 429, rateLimitExceeded", 9, 3, 3),
        (QUOTA, 9, 1, 1),
        ("ERROR: PERMISSION_DENIED", 9, 1, 1),
    ],
)
def test_what_passes_is_tried_again(cloud, message, times, code, tries):
    cloud.world(fail=[["create", times, message]])
    done = cloud.run("create.sh", "pod", ATTEMPTS=3)
    assert done.returncode == code, done.stderr
    assert len(cloud.calls("create")) == tries
    assert done.stderr.count("the next one follows in") == min(times, tries - 1)


def test_setup_ships_one_commit_and_keeps_its_versions(cloud):
    assert cloud.run("setup.sh", "pod").returncode == 0
    asked = ["git", "-C", str(cloud.repository), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    for worker in (0, 1):
        assert (cloud.home(worker) / "unclip" / commit / "tpu_scripts" / "worker.sh").exists()
        assert (cloud.home(worker) / "pinned").read_text() == ""
    assert cloud.run("setup.sh", "pod").returncode == 0
    assert (cloud.home(1) / "pinned").read_text() == "jax==0.7.0\n"


def test_a_bucket_is_mounted_so_that_folders_of_checkpoints_can_be_renamed(cloud):
    (cloud.bin / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (cloud.bin / "gcsfuse").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$HOME/mounted"\n')
    for name in ("sudo", "gcsfuse"):
        (cloud.bin / name).chmod(0o755)
    mount = cloud.folder / "mount"
    done = cloud.run("setup.sh", "pod", BUCKET="gs://bucket/a folder", MOUNT=mount)
    assert done.returncode == 0 and mount.is_dir(), done.stderr
    flags = (cloud.home(1) / "mounted").read_text().splitlines()
    assert flags[-2:] == ["bucket", str(mount)] and flags[flags.index("--only-dir") + 1] == "a folder"
    assert any(flag.startswith("--rename-dir-limit=") and int(flag.split("=")[1]) > 10_000 for flag in flags)


def test_workers_that_differ_are_named(cloud):
    (cloud.bin / "uv").write_text(UV.replace("jax==0.7.0", "jax==0.7.${HOME: -1}"))
    done = cloud.run("setup.sh", "pod")
    assert done.returncode == 1
    assert "worker 1 of pod (>) differs from worker 0 of pod (<): < jax==0.7.0 > jax==0.7.1" in done.stderr


def test_arguments_reach_the_worker_as_they_are(cloud):
    cloud.run("setup.sh", "pod")
    arguments = ['a cat\'s "red" hat', "$HOME `id` \\ !", "", "two\nlines", "~/x", "é*?[a]", "--a=b  c", "-n"]
    done = cloud.run("launch.sh", "pod", "--", "unclip", *arguments)
    assert done.returncode == 0, done.stderr
    for worker in (0, 1):
        folder, *received, end = (cloud.home(worker) / "trained").read_text().split("\0")
        assert received == arguments and end == "" and Path(folder).parent == cloud.home(worker) / "unclip"


def test_one_failing_worker_is_named(cloud):
    cloud.run("setup.sh", "pod", SLICES=2)
    cloud.world(**{"break": ["pod-1/0", "launch"]})
    done = cloud.run("launch.sh", "pod", "--", "unclip", SLICES=2)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("launch: ")] == [
        "launch: worker 0 of pod-1 failed: the disk is full"
    ]


def test_a_command_that_dies_at_once_is_reported_with_its_last_words(cloud):
    cloud.run("setup.sh", "pod")
    cloud.ends('[[ $HOME != */1 ]] || { echo "no TPU found"; exit 4; }')
    done = cloud.run("launch.sh", "pod", "--", "unclip")
    assert done.returncode == 1 and "worker 1 of pod: exit 4, no TPU found" in done.stderr
    assert "worker 0" not in done.stderr


def test_launch_needs_setup_and_does_not_disturb_what_runs(cloud):
    cloud.run("create.sh", "pod")
    assert cloud.run("launch.sh", "pod", "--", "unclip").returncode == 1
    cloud.run("setup.sh", "pod")
    cloud.ends("trap 'echo saved; exit 0' TERM; for _ in {1..600}; do sleep 0.05; done")
    assert cloud.run("launch.sh", "pod", "--", "unclip", "1").returncode == 0
    refused = cloud.run("launch.sh", "pod", "--", "unclip", "2")
    assert refused.returncode == 1 and "a command runs here already" in refused.stderr and cloud.launches() == 1
    watched = cloud.run("watch.sh", "pod", "--", "unclip", "2")
    assert watched.returncode == 1 and "something else runs on pod" in watched.stderr and cloud.launches() == 1
    cloud.ends("exit 0")
    assert cloud.run("launch.sh", "pod", "--", "unclip", "2", REPLACE="yes").returncode == 0
    log = cloud.run("logs.sh", "pod", FOLLOW="no").stdout
    assert log.count("training") == 2 and log.index("saved") < log.index("'2'")


def test_watch_replaces_a_preempted_slice_and_launches_once_more(cloud):
    cloud.world(states=[["CREATING", "READY", "READY", "PREEMPTED"], ["CREATING", "READY"]])
    cloud.ends(UNTIL_DELETED)
    done = cloud.run("watch.sh", "pod", "--", "unclip", "train", CAPACITY="spot")
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 1
    assert all("--spot" in call for call in cloud.calls("create"))
    assert [cloud.launches(worker) for worker in (0, 1)] == [1, 1]  # on disks that are new
    launched = [call for call in cloud.calls("ssh") if "worker.sh launch" in " ".join(call)]
    assert len(launched) == 2 and launched[0] == launched[1]
    assert (cloud.home() / "pinned").read_text() == "jax==0.7.0\n"
    again = cloud.run("watch.sh", "pod", "--", "unclip", "train", CAPACITY="spot")
    assert again.returncode == 0 and cloud.launches() == 1


def test_watch_waits_out_a_lack_of_capacity(cloud):
    cloud.world(fail=[["create", 3, CAPACITY]])
    done = cloud.run("watch.sh", "pod", "--", "unclip", ATTEMPTS=2)
    assert done.returncode == 0 and len(cloud.calls("create")) == 4 and cloud.launches() == 1


def test_watch_gives_up_on_a_training_that_fails_by_itself(cloud):
    cloud.run("create.sh", "pod")
    cloud.ends('echo "loss is nan"; exit 5')
    done = cloud.run("watch.sh", "pod", "--", "unclip", MAX_RESTARTS=1)
    assert done.returncode == 1 and cloud.launches() == 2 and cloud.calls("delete") == []
    assert "worker 0 of pod: exit 5, loss is nan" in done.stderr


def test_watch_dry_run_prints_every_command_of_a_preempted_run(cloud):
    dry = cloud.run("watch.sh", "pod", "--dry-run", "--", "unclip", "train")
    assert dry.returncode == 0 and cloud.calls() == []
    cloud.world(states=[["READY", "READY", "PREEMPTED"], ["READY"]])
    cloud.ends(UNTIL_DELETED)
    assert cloud.run("watch.sh", "pod", "--", "unclip", "train").returncode == 0
    assert {tuple(call) for call in cloud.calls()} == {tuple(call) for call in printed(dry.stdout)}


def test_delete_deletes_only_what_is_named_and_there(cloud):
    cloud.run("create.sh", "pod")
    assert cloud.run("delete.sh").returncode == 2
    missing = cloud.run("delete.sh", "pod2")
    assert missing.returncode == 1 and "no tpu-vm called pod2" in missing.stderr and cloud.calls("delete") == []
    assert cloud.run("delete.sh", "pod").returncode == 0
    assert [call[5] for call in cloud.calls("delete")] == ["pod"]


def test_gke_says_how_a_run_ended(cloud):
    for code, answer in ((124, 3), (125, 1)):
        cloud.world(fail=[["list", 1, "", code]])
        assert cloud.run("gke.sh", "wait", "run", CLUSTER="c").returncode == answer
    launched = printed(cloud.run("gke.sh", "launch", "run", "--dry-run", "--", "unclip", "a b", CLUSTER="c").stdout)
    assert launched[-1][-1].endswith("&& exec unclip 'a b'")
