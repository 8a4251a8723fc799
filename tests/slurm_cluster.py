"""A real SLURM of one node, from Debian's packages, in a folder of its own: munge, slurmctld, slurmd, fake GPUs."""
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CPUS, GPUS = 8, 2  # what SLURM is told the node has
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=86400
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:h100:{gpus}
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes={host} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(RuntimeError):
    """Why there is no SLURM here."""


def install() -> None:
    """Debian's packages, if they are not there. Raises Unavailable."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons are started as root here, and this is another user")
    if all(shutil.which(program, path=path) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable("SLURM is not installed and there is no apt-get to install it with")
    options = ["-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", *options, *PACKAGES]):
        done = subprocess.run(command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True,
                              text=True, timeout=300, check=False)
        if done.returncode:
            raise Unavailable(f"`{' '.join(command)}` failed: {done.stderr.strip()[-200:]}")


class Cluster:
    """The daemons, and what tests ask of them. `stop` ends every job and daemon, by the pid files."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().partition(".")[0]
        own = {name: value for name, value in os.environ.items()
               if not name.startswith(("SLURM_", "SBATCH_", "STT_")) and name != "OMP_NUM_THREADS"}
        self.environment = own | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{own['PATH']}:/usr/sbin:/sbin"}

    def start(self) -> None:
        """Raises Unavailable if the node does not come up."""
        try:
            socket.gethostbyname(self.host)
        except OSError as error:
            raise Unavailable(f"the host name {self.host} does not resolve ({error})") from None
        self._configure()
        self._call("munged", "--force", "--num-threads=2", f"--key-file={self.folder}/munge.key",
                   f"--socket={self.folder}/munge.sock", f"--pid-file={self.folder}/munged.pid",
                   f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed")
        for daemon in ("slurmctld", "slurmd"):
            self._call(daemon, "-f", str(self.folder / "slurm.conf"))
        if not wait_until(lambda: self._call("sinfo", "-h", "-p", "debug", "-o", "%T", check=False) == "idle", 20):
            raise Unavailable(f"the node did not come up: {self._call('sinfo', '-R', check=False)}")

    def stop(self) -> None:
        """Jobs first: a running one outlives slurmd."""
        if (self.folder / "slurmctld.pid").exists():
            for job in set(self._call("squeue", "-h", "-o", "%A", check=False).split()):
                self._call("scancel", job, check=False)
            wait_until(lambda: not self._call("squeue", "-h", check=False), 20)
        for daemon in ("slurmd", "slurmctld", "munged"):
            path = self.folder / f"{daemon}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
                assert wait_until(lambda path=path: not path.exists(), 20), f"{daemon} did not end"

    # ------------------------------------------------------------ jobs

    def submit(self, *arguments: str, at: Path, **variables: str) -> str:
        """The id of the job that `sbatch ARGUMENTS` in the folder `at` makes."""
        return self._call("sbatch", "--parsable", *arguments, at=at, **variables)

    def tasks(self, job: str) -> dict[str, dict[str, str]]:
        """Task number ("" of a plain job) -> what `scontrol show job` says; pending parts of an array are left out."""
        lines = self._call("scontrol", "show", "job", job, "-o").splitlines()
        found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return {fields.get("ArrayTaskId", ""): fields for fields in found}

    def wait(self, *jobs: str, seconds: float = 120) -> None:
        """Until the queue has none of these jobs."""
        ended = wait_until(lambda: not self._call("squeue", "-h", "-j", ",".join(jobs)), seconds)
        assert ended, self._call("squeue", check=False)

    def signal_task(self, job: str, name: str = "USR1") -> None:
        """To the job script alone, as `#SBATCH --signal=B:` does."""
        self._call("scancel", f"--signal={name}", "--batch", job, check=False)

    def control(self, *arguments: str) -> str:
        return self._call("scontrol", *arguments, check=False)

    def cancel(self, job: str) -> None:
        self._call("scancel", job)

    # ------------------------------------------------------------ inside

    def _configure(self) -> None:
        """The files: a munge key of our own, slurm.conf, and twins of /dev/null as GPUs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        port, node_port = free_ports(2)
        (self.folder / "slurm.conf").write_text(CONF.format(
            host=self.host, folder=self.folder, port=port, node_port=node_port, cpus=CPUS, gpus=GPUS))
        lines = []
        for number in range(GPUS):
            self._call("mknod", str(self.folder / f"gpu{number}"), "c", "1", "3")
            lines.append(f"NodeName={self.host} Name=gpu Type=h100 File={self.folder}/gpu{number}\n")
        (self.folder / "gres.conf").write_text("".join(lines))

    def _call(self, *command: str, check: bool = True, at: Path | None = None, **variables: str) -> str:
        done = subprocess.run(command, env=self.environment | variables, cwd=at or self.folder, capture_output=True,
                              text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()


def wait_until(is_true: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time."""
    until = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def states(tasks: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Task -> "COMPLETED 0:0" and the like."""
    return {task: f"{fields['JobState']} {fields['ExitCode']}" for task, fields in tasks.items()}
