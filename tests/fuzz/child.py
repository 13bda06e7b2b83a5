"""A process that feeds readers with mutated files and watches itself: python child.py FOLDER COUNT SEED READER...

A line of JSON for each reader. What a reader must not do is noticed by Python's audit events, which cannot be switched
off again: that is why this is a process of its own.
"""

import hashlib
import json
import logging
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

SECONDS, MEBIBYTES = 10.0, 1536
REFUSED = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.", "ftplib.", "pickle.find_class",
)  # fmt: skip
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


class Watch:
    """Notes what a reader does beyond reading. folder: where it may write."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.noted, self.on = str(folder.resolve()), [], False
        sys.addaudithook(self.look)

    def look(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event.startswith(REFUSED) or (self.writes(event, arguments)):
            self.noted.append(f"{event} {arguments!r}"[:300])
            raise RuntimeError(f"a reader does {event}")

    def writes(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            path, _, flags = arguments
            writing = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writing) and isinstance(path, str | bytes) and not self.within(path)
        return event in WRITES and not self.within(arguments[0])

    def within(self, path: str | bytes) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith((self.folder, "/dev/null"))


def peak() -> int:
    """The most memory that this process ever held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def too_slow(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS:g} s")


def run(name: str, folder: Path, count: int, seed: int, watch: Watch) -> dict:
    """Figures of one reader, and the inputs that it did not take as it should, saved beside."""
    import mutate
    from readers import READERS

    from poisonshield.errors import PoisonShieldError

    reader, rng, place = READERS[name], random.Random(f"{seed} {name}"), folder / name
    place.mkdir()
    seeds = reader.seeds(place)
    for sound in seeds:
        reader.feed(sound, place)  # what is sound is taken, and modules that are imported late are there now
    figures = {"reader": name, "inputs": 0, "accepted": 0, "refused": 0, "slowest_s": 0.0, "faults": []}
    for _ in range(count):
        data = mutate.mutate(seeds, reader.shells, rng)
        start, fault = time.perf_counter(), None
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        watch.on = True
        try:
            reader.feed(data, place)
            figures["accepted"] += 1
        except PoisonShieldError:
            figures["refused"] += 1
        except BaseException as err:  # whatever it is, it is what this looks for
            fault = f"{type(err).__module__}.{type(err).__name__}: {err}"[:300]
            place_of = err.__traceback__
            while place_of and place_of.tb_next:
                place_of = place_of.tb_next
            fault += f" ({Path(place_of.tb_frame.f_code.co_filename).name}:{place_of.tb_lineno})" if place_of else ""
        finally:
            watch.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - start
        figures["inputs"] += 1
        figures["slowest_s"] = max(figures["slowest_s"], round(seconds, 3))
        if watch.noted:
            fault = f"does {watch.noted.pop()}"
        elif seconds > SECONDS:
            fault = fault or f"took {seconds:.1f} s"
        if fault:
            kept = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}"
            kept.write_bytes(data)
            figures["faults"].append(f"{fault}  [{kept}]")
    return figures | {"peak_mib": peak()}


def main(folder: Path, count: int, seed: int, names: list[str]) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_slow)
    import torch

    torch.set_num_threads(1)
    import readers  # noqa: F401

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(folder)
    for name in names:
        print(json.dumps(run(name, folder, count, seed, watch)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
