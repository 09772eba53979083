"""A real Slurm of this machine's, as root: a controller, and nodes that are daemons on ports of one host."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """\
ClusterName=here
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
GresTypes=gpu
KillWait=5
OverTimeLimit=0
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=first Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing():
    """What of Slurm is not installed here, or why it can't run; "" if it can."""
    absent = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"{', '.join(absent)} not installed" if absent else "" if os.getuid() == 0 else "not root"


class SlurmCluster:
    """``with SlurmCluster(FOLDER, nodes=3) as slurm``: SLURM_CONF must be ``slurm.conf`` for its commands. ``gpus``: that each node claims."""

    def __init__(self, folder, nodes=3, cpus=4, gpus=0):
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.names = [f"n{number + 1}" for number in range(nodes)]
        ports = free_ports(nodes + 1)
        claimed = f" Gres=gpu:{gpus}" if gpus else ""
        for number in range(gpus):
            (folder / f"gpu{number}").touch()  # Slurm looks whether they are there
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n" if gpus else "")
        of_nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 State=UNKNOWN{claimed}"
            for name, port in zip(self.names, ports[1:])
        ]
        self.conf.write_text(CONF.format(folder=folder, ports=ports, nodes="\n".join(of_nodes)))
        self.daemons = ExitStack()

    def __enter__(self):
        folder = self.folder
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        with self.daemons as stack:
            self.start(
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid",
                f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed", stack=stack,
            )  # fmt: skip
            until(lambda: (folder / "munge.sock").exists(), "munged")
            self.start("slurmctld", "-D", "-i", "-f", self.conf, stack=stack)
            for name in self.names:
                self.start("slurmd", "-D", "-N", name, "-f", self.conf, stack=stack)
            until(
                lambda: self("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * len(self.names),
                "idle nodes",
            )
            self.daemons = stack.pop_all()
        return self

    def __exit__(self, *_):
        self("scancel", "--full", "--signal=KILL", "--state=RUNNING")
        self.daemons.close()

    def start(self, *words, stack):
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        with (self.folder / f"{words[0]}.out").open("ab") as out:
            process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, "PATH": path, "SLURM_CONF": str(self.conf)},
            )  # fmt: skip
        stack.callback(stop, process)

    def __call__(self, *words):
        """What a command of Slurm's prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment).stdout


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def until(true, what, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
