"""A real SLURM of two nodes, n1 and n2, on this one machine: for the tests, and by hand to try a template.

  python tests/slurm/cluster.py      as root; prints how to reach it, and takes it down at Ctrl-C

It needs Debian's packages slurm-wlm and munge, or their like, and installs nothing. All its files lie in a temporary
folder, but for one line of /etc/hosts while it runs, where n1 and n2 do not resolve. Its daemons have a minute to
answer each other: slow cores take longer than SLURM's own ten seconds at times, and it then requeues a sound job.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
HOSTS = Path("/etc/hosts")
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)} # two-node SLURM of sslcells' tests\n"

CONF = """\
ClusterName=sslcells
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SlurmdParameters=config_overrides
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MessageTimeout=60
TCPTimeout=60
BatchStartTimeout=120
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    if os.geteuid() != 0:
        return "a SLURM of its own needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"no {', '.join(absent)} here (Debian: apt-get install slurm-wlm munge)" if absent else ""


class Cluster:
    """The daemons from `with` to its end, and the few commands that a test gives."""

    def __enter__(self) -> "Cluster":
        # Not pytest's folder: munge wants one that everyone may enter, below folders that only root may write.
        self.folder = Path(tempfile.mkdtemp(prefix="sslcells-slurm-"))
        self.folder.chmod(0o755)
        self.env = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if len(self._daemons) > 1:
            self.call("scancel", "--user=root", check=False)
            wait_for(lambda: not self.call("squeue", "--noheader", check=False), 30, "the last job's end", strict=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if HOSTS_LINE in (hosts := HOSTS.read_text()):
            HOSTS.write_text(hosts.replace(HOSTS_LINE, ""))
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, check: bool = True, **env: str) -> str:
        """What a command prints on either stream."""
        done = subprocess.run(
            command, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}")
        return done.stdout.strip()

    def job(self, number: int | str) -> dict[str, str]:
        """What SLURM says of a job, or of an array's task 7_0: JobState, ExitCode, Restarts, …"""
        words = self.call("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: int | str, state: str, seconds: float, log: Path, restarts: int = 0) -> dict[str, str]:
        """What SLURM says of a job when it is in a state; fails with the end of its log where it ends in another."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

        def there() -> bool:
            job = self.job(number)
            return job["JobState"] in ended or (job["JobState"] == state and int(job["Restarts"]) >= restarts)

        wait_for(there, seconds, f"job {number} to be {state}; see {log}")
        job = self.job(number)
        assert job["JobState"] == state, f"{job}\n{log.read_text()[-4000:]}"
        return job

    def again(self, number: int | str, log: Path, restarts: int = 1) -> None:
        """Wait until a job is back in the queue, and spare it SLURM's own pause of two minutes there."""
        self.wait(number, "PENDING", 600, log, restarts)
        time.sleep(10)  # until the last start's messages are through, SLURM takes the new one for it
        self.call("scontrol", "update", f"jobid={number}", "StartTime=now")

    def steps(self, number: int) -> int:
        """How many steps of a job were started on n1, its batch script not counted."""
        log = (self.folder / "slurmd-n1.log").read_text()
        return sum(f"launch task StepId={number}." in line for line in log.splitlines())

    def _start(self) -> None:
        if any(subprocess.run(["getent", "hosts", n], stdout=subprocess.DEVNULL).returncode for n in NODES):
            HOSTS.write_text(HOSTS.read_text() + HOSTS_LINE)
        ports, host = free_ports(3), socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, host=host, ports=ports))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        files = [f"--{n}{'' if n == 'socket' else '-file'}={self.folder}/munge.{ext}" for n, ext in names.items()]
        self._daemon("munged", "--foreground", *files)
        wait_for((self.folder / "munge.socket").exists, 60, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        wait_for(lambda: {*self.call(*idle, check=False).split()} == {*NODES}, 180, f"both nodes; see {self.folder}")

    def _daemon(self, *command: str) -> None:
        name = command[0] if command[0] != "slurmd" else f"slurmd-{command[-1]}"
        with (self.folder / f"{name}.log").open("wb") as log:
            # A session of its own, so that Ctrl-C in the terminal ends the cluster in order.
            self._daemons.append(
                subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
            )


def wait_for(true: Callable[[], object], seconds: float, what: str, strict: bool = True) -> None:
    """Return as soon as it is true."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            if strict:
                raise TimeoutError(f"{seconds:.0f} s were not enough for {what}")
            return
        time.sleep(0.3)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    for ending in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` would have the first ignored
        signal.signal(ending, signal.default_int_handler)
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
        print("then: sinfo; sbatch --nodes=2 slurm/simclr.sh ...; Ctrl-C here ends it", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending")
