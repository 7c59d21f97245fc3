"""Stands in for gcloud, xpk and kubectl: records its arguments, fails and delays when told to, runs what ssh is given.

Everything lies in the folder FAKE. `calls` holds one JSON list of words per call. `world.json` holds what the test
chose: `workers` per slice, `delay` in seconds, `states` that describe reports one after another once something was
created (the last one stays), `fail` as [word that the call holds, how often, message], `break` as [slice/worker, text
in the command], whose worker then ends with 7. Each worker's home is a folder in which bash runs the command.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE"])


def fail(message: str, code: int = 1) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def option(words: list[str], name: str, default: str = "") -> str:
    return next((word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")), default)


def main() -> None:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(ROOT / "calls", "a") as calls:
            calls.write(json.dumps(words) + "\n")
        world = json.loads((ROOT / "world.json").read_text())
        scheduled = next((entry for entry in world.get("fail", []) if entry[0] in words and entry[1] > 0), None)
        if scheduled:
            scheduled[1] -= 1
            (ROOT / "world.json").write_text(json.dumps(world))
    time.sleep(world.get("delay", 0))
    if scheduled:
        fail(scheduled[2], scheduled[3] if len(scheduled) > 3 else 1)
    if words[0] == "gcloud":
        tpus(words, world)


def tpus(words: list[str], world: dict) -> None:
    action, name = words[4], words[5]
    state = ROOT / f"{name}.states"
    match action:
        case "create":
            if state.exists():
                fail(f"ERROR: ALREADY_EXISTS: {name}")
            rounds = world["states"]
            state.write_text(json.dumps(rounds.pop(0) if len(rounds) > 1 else rounds[0]))
            (ROOT / "world.json").write_text(json.dumps(world))
        case "describe":
            if not state.exists():
                fail(f"ERROR: NOT_FOUND: Resource '{name}' was not found")
            states = json.loads(state.read_text())
            print(states[0])
            state.write_text(json.dumps(states[1:] or states))
        case "delete":
            state.unlink()
            (ROOT / "deleted").touch()
            for pid in ROOT.glob(f"home/{name}/*/unclip/run/pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid.read_text()), signal.SIGKILL)
            shutil.rmtree(ROOT / "home" / name, ignore_errors=True)
        case "scp":
            files, target = [w for w in words[5:] if not w.startswith("--")][:-1], next(w for w in words if ":." in w)
            for home in homes(target.split(":")[0], world):
                for file in files:
                    shutil.copy(file, home)
        case "ssh":
            ssh(name, words, world)


def homes(name: str, world: dict) -> list[Path]:
    found = [ROOT / "home" / name / str(worker) for worker in range(world.get("workers", 2))]
    for home in found:
        home.mkdir(parents=True, exist_ok=True)
    return found


def ssh(name: str, words: list[str], world: dict) -> None:
    command = " ".join(option(words, "command").split(" "))  # as gcloud does it
    where, text = world.get("break", ["", "nothing"])
    codes = []
    for home in homes(name, world):
        if option(words, "worker") not in ("all", home.name):
            continue
        broken = where == f"{name}/{home.name}" and text in command
        given = "echo the disk is full; exit 7" if broken else command
        folder = option(words, "output-directory")
        stream = {"stdout": open(Path(folder) / f"{home.name}.log", "w"), "stderr": subprocess.STDOUT} if folder else {}  # noqa: SIM115
        code = subprocess.run(
            ["bash", "-c", given], cwd=home, env=os.environ | {"HOME": str(home)}, **stream
        ).returncode
        if code:
            print(f"##### Command execution on worker {home.name} failed with exit status {code}.", file=sys.stderr)
        codes.append(code)
    sys.exit(next((code for code in codes if code), 0))


main()
