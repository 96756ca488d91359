"""Many runs, a process of one core for each; what has been found is kept in a folder, and not found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from benchmarks.harness import count_cores, to_json
from bn_common.files import write_whole
from image_data import ImageDataset

Job = Any
"""A dataclass that says what to do."""
Found = Any
"""What JSON can hold."""


def in_parallel(
    work: Callable[[Any, ImageDataset], Found], jobs: Sequence[Job], dataset: ImageDataset, folder: Path | None
) -> Iterator[tuple[Job, Found]]:
    """(job, work(job, dataset)) for each job as it ends, on all cores.

    Args:
      work: a function of a module.
      jobs: dataclasses, all different.
      dataset: the same for all.
      folder: where what was found is kept, a file for each job and data set (None: nowhere); made if it is missing.
    """
    left, digest = [], _digest(dataset)
    for job in jobs:
        path = folder and folder / _name(work, job, digest)
        if path and path.is_file():
            yield job, json.loads(path.read_bytes())["found"]
        else:
            left.append(job)
    if not left:
        return
    context = get_context("spawn")
    cores: Queue[int] = context.Queue()
    for core in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(count_cores()):
        cores.put(core)
    with ProcessPoolExecutor(count_cores(), mp_context=context, initializer=_on_one_core, initargs=(cores,)) as pool:
        futures = {pool.submit(partial(work, job), dataset): job for job in left}
        try:
            for future in as_completed(futures):
                job, found = futures[future], future.result()
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_whole(
                        folder / _name(work, job, digest), to_json({"job": dataclasses.asdict(job), "found": found})
                    )
                yield job, found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _digest(dataset: ImageDataset) -> str:
    parts = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def _name(work: Callable[..., Any], job: Job, digest: str) -> str:
    said = json.dumps([work.__name__, dataclasses.asdict(job), digest], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16] + ".json"


def _on_one_core(cores: Queue[int]) -> None:
    """Before JAX and PyTorch look how many cores there are."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
