"""Random jobs that are disturbed: killed, told to stop, shared by drivers, grown, their files damaged. They end in the bytes of one left alone.

``python -m tests.random_troubles FIRST LAST`` makes those of so many seeds, and says which files differ.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.conftest import FAILPOINTS
from tests.faults.forks import Forks
from tests.random_jobs import KINDS, RandomJob

TROUBLED = """
import itertools, types
from pathlib import Path

from latentmill.driver import leases

leases.BEAT_EVERY, leases.MAX_SILENCE = 0.2, 2.0
REACHED, MOMENTS = itertools.count(), json.loads(os.environ["MOMENTS"])


def reach(name):
    what = MOMENTS.get(str(next(REACHED)))
    if what == "raises":
        raise OSError(5, "a failpoint")
    if what:
        os.kill(os.getpid(), signal.Signals[what])


sys.modules["latentmill_failpoints"] = types.SimpleNamespace(reach=reach)


def main(arguments):
    code = latentmill.cli.main(arguments)
    Path(os.environ["REACHED"]).write_text(str(next(REACHED)))
    return code
"""
"""The worst happens at the failpoints of these numbers: the first that a run reaches is 0."""
WORST = ["SIGKILL", "SIGKILL", "SIGINT", "SIGTERM", "SIGUSR1", "raises"]
ENDS = {0, 1, 3, 130, -signal.SIGKILL, -signal.SIGUSR1, -signal.SIGTERM}
PLACES = ["read", "encode", "denoise", "decode", "writing", "data synced", "published", "half_done synced"]
DAMAGED = ["data", "half_done", "leases"]


class TroubledJob:
    """A deterministic job of a seed, and what happens to it."""

    def __init__(self, seed: int, folder: Path, forks: Forks, on_ray: float) -> None:
        """``on_ray``: how likely a life is one on a Ray of its own."""
        self.on_ray, self.folder, self.forks, self.log = on_ray, folder, forks, folder / "log"
        self.draw = draw = random.Random(f"trouble {seed}")
        self.job = RandomJob(seed, folder)
        self.grows = draw.random() < 0.4
        words = [
            "deterministic=true",
            f"rows_per_shard={draw.randint(1, 4)}",
            f"sink={'parquet' if self.job.kind == 'encode' else draw.choice(['parquet', 'webdataset'])}",
        ]
        words += [f"stages.{stage}.batch_size={draw.randint(1, 5)}" for stage in self.job.stages]
        words += [f"prompt_cache={folder / 'cache'}"] if draw.random() < 0.3 else []
        if self.job.kind == "accept" and draw.random() < 0.7:
            words += [f"accept={{attempts: {draw.randint(1, 3)}, rows: {draw.randint(1, 5)}}}"]
            self.grows = False
        self.words, self.reached = [*self.job.words, *words], 0
        self.hidden = self._hide() if self.grows else {}

    def _hide(self) -> dict[Path, bytes]:
        """What the source has not yet when the dataset begins."""
        rows = self.folder / "rows.jsonl"
        if not rows.exists():
            path = self.folder / "pictures" / f"{self.draw.randrange(4)}.png"
            whole = path.read_bytes()
            path.unlink()
            return {path: whole}
        whole = rows.read_bytes()
        rows.write_bytes(b"".join(whole.splitlines(keepends=True)[: self.draw.randint(1, 3)]))
        return {rows: whole}

    def begin(self, output: Path, moments: dict[int, str], *more: str, deaths: str = "") -> int:
        """``deaths``: places at which a worker of Ray is to die, with commas between."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        told = {"MOMENTS": json.dumps(moments), "REACHED": str(self.folder / "reached")}
        told |= {"LATENTMILL_FAILPOINT": f"{deaths}:kill:{place}", "PYTHONPATH": FAILPOINTS}
        if self.job.kind == "encode":
            more += (f"export={{to: [energon, mds], folder: {output}-export}}",)
        return self.forks.begin(["run", *self.words, *more, f"output={output}"], self.log, prepare=TROUBLED, **told)

    def ended(self, *drivers: int, allowed: set[int] = ENDS) -> list[int]:
        codes = [self.forks.end(driver) for driver in drivers]
        said = self.log.read_text()
        assert {*codes} <= allowed and "Traceback" not in said, f"{codes}\n{self.words}\n{said}"
        self.log.rename(self.folder / f"log-{len(list(self.folder.glob('log-*')))}")
        return codes

    def alone(self) -> Path:
        """The dataset that nobody disturbs."""
        output = self.folder / "alone"
        self.ended(self.begin(output, {}), allowed={0, 1})
        if self.grows:
            first = {path: path.read_bytes() if path.exists() else None for path in self.hidden}
            self.grow()
            self.ended(self.begin(output, {}, "--grow"), allowed={0, 1})
            for path, content in first.items():
                path.unlink() if content is None else path.write_bytes(content)
        self.reached = int((self.folder / "reached").read_text())
        return output

    def grow(self) -> None:
        for path, content in self.hidden.items():
            path.write_bytes(content)

    def disturbed(self) -> Path:
        """The same, through some lives with troubles, and one without."""
        output = self.folder / "disturbed"
        for more in [(), ("--grow",)] if self.grows else [()]:
            if more:
                self.grow()
            for _ in range(self.draw.randint(1, 6)):
                self.ended(*(self._begin_disturbed(output, *more) for _ in range(self.draw.choice([1, 1, 1, 2, 3]))))
                if self.draw.random() < 0.5:
                    self._damage(output)
                if (output / "_SUCCESS").exists():
                    break
            if not (output / "plan.json").exists():
                self.ended(self.begin(output, {}), allowed={0, 1})
        self.ended(self.begin(output, {}, *more), allowed={0, 1})
        return output

    def _begin_disturbed(self, output: Path, *more: str) -> int:
        draw = self.draw
        moments = {
            int(draw.random() * draw.randrange(self.reached)): draw.choice(WORST) for _ in range(draw.randint(1, 2))
        }
        if [*moments.values()].count("raises") > 1:  # of one batch it would be its rows' fault
            moments = {}
        more += (f"grace={draw.choice([0, 11, 30])}", *draw.choice([[], ["max_bytes_in_flight=50kB"]]))
        if draw.random() < self.on_ray:
            few = [stage for stage in self.job.stages if self.job.kind != "two passes" and draw.random() < 0.4]
            replicas = [f"stages.{stage}.replicas={draw.randint(1, 3)}" for stage in few]
            sizes = [f"stages.{stage}.num_cpus=0.1" for stage in self.job.stages]
            more += ("cluster=local", f"placement={draw.choice(['auto', 'split', 'fused'])}", *replicas, *sizes)
            deaths = ",".join(draw.sample(PLACES, draw.randint(0, 2)))
            if draw.random() < 0.5:
                moments = {}
            return self.begin(output, moments, *more, deaths=deaths)
        return self.begin(output, moments, *more)

    def _damage(self, output: Path) -> None:
        """Damage a file, if there are any of a kind, as a disk does."""
        kind = self.draw.choice(DAMAGED)
        files = sorted(path for path in output.glob(f"{kind}/*") if path.is_file())
        if not files:
            return
        path = self.draw.choice(files)
        content = path.read_bytes()
        at = self.draw.randrange(len(content) + 1)
        path.unlink()  # a file that has another name, too, is that of a driver
        # Of a Parquet file's end not every byte means something.
        path.write_bytes(content[:at] if kind == "data" else content[:at] + b"?" + content[at + 1 :])
        if kind == "data":
            self.forks.run(["verify", str(output), "--repair"], self.log)
            self.ended()


def kept(output: Path) -> dict[str, bytes]:
    """What a dataset is: shards, side files, tables of errors and of what was filtered, and plans."""
    wanted = [path for folder in ("data", "errors", "filtered", "side") for path in output.glob(f"{folder}/**/*")]
    wanted += [*output.glob("plan*.json"), *output.glob("_SUCCESS")]
    there = {path.relative_to(output).as_posix(): path.read_bytes() for path in wanted if path.is_file()}
    export = output.with_name(f"{output.name}-export")
    exported = {path: path.read_bytes() for path in export.glob("**/*") if path.is_file() and ".tmp" not in path.parts}
    return there | {f"export/{path.relative_to(export).as_posix()}": content for path, content in exported.items()}


def differences(seed: int, folder: Path, forks: Forks, on_ray: float = 0.15) -> list[str]:
    """Files that are others for what happened."""
    job = TroubledJob(seed, folder, forks, on_ray)
    alone, disturbed = kept(job.alone()), kept(job.disturbed())
    assert forks.run(["verify", str(folder / "disturbed")], job.log) == 0, job.log.read_text()
    return sorted(name for name in alone.keys() | disturbed.keys() if alone.get(name) != disturbed.get(name))


if __name__ == "__main__":
    forks = Forks()
    for number in range(*map(int, sys.argv[1:3])):
        place = Path(tempfile.mkdtemp())
        try:
            found = differences(number, place, forks)
        except AssertionError as error:
            found = [str(error)]
        print(number, KINDS[number % len(KINDS)], place if found else "", *found, flush=True)
        if not found:
            shutil.rmtree(place)
    forks.close()
