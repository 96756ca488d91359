"""A run that is killed anywhere and given again ends in the same bytes as one that nobody has disturbed. Both wings."""

import contextlib
import io
import json

import jax
import pytest
from rich.console import Console

import image_data
import jax_bn.training
import torch_bn.training
from bn_common import run_folder
from bn_common.checkpoints import UnfitError, seal, unseal
from bn_common.config import Config
from bn_common.run_folder import RunFolder

LOOPS = {"jax": jax_bn.training.train, "torch": torch_bn.training.train}
STEPS = 8
TIMES = "start_time", "seconds", "images_per_second"


class Killed(BaseException):
    pass


class KilledRun(RunFolder):
    """Ends after so many steps of this process."""

    steps_left = None

    @contextlib.contextmanager
    def progress(self, *args):
        with super().progress(*args) as advance:

            def step():
                advance()
                if self.steps_left == 0:
                    raise Killed
                if self.steps_left is not None:
                    self.steps_left -= 1

            yield step


def let_go(run):
    with contextlib.suppress(OSError):  # said already
        run.close()


def trained(loop, folder, *, after=None, **options):
    """The run of two epochs of 8 steps on images of 12x12, killed after so many steps; what it has said."""
    sample = image_data.load_sample()
    cut = sample._replace(train_images=sample.train_images[:64, 8:20, 8:20], train_labels=sample.train_labels[:64])
    cut = cut._replace(test_images=sample.test_images[:100, 8:20, 8:20], test_labels=sample.test_labels[:100])
    defaults = {"epochs": 2, "batch_size": 8, "optimizer": "adamw", "lr": 0.001, "out": folder}
    config = Config(**defaults | options).resolved()
    run = KilledRun(config, loop, {"data": "cut"}, Console(file=io.StringIO()))
    run.steps_left = after
    with contextlib.ExitStack() as stack:
        stack.callback(let_go, run)
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # optax relies on it
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if after is None:
            LOOPS[loop](config, cut, run)
        else:
            with pytest.raises(Killed):
                LOOPS[loop](config, cut, run)
    return run.console.file.getvalue()


def left(folder):
    """What a run leaves, beside its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [{name: v for name, v in line.items() if name not in TIMES} for line in lines]
    return (folder / "weights.safetensors").read_bytes(), numbers


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: b"")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_killed_and_given_again(loop, tmp_path):
    """Before the first checkpoint, in the second epoch, and twice in the first and once in the second."""
    trained(loop, tmp_path / "whole")
    whole = left(tmp_path / "whole")
    for after in ((1,), (9,), (6, 1, 6)):
        folder = tmp_path / "-".join(map(str, after))
        for steps in after:
            trained(loop, folder, after=steps, checkpoint_every=3)
        (folder / "checkpoints" / "notes").mkdir(parents=True)  # which nobody stumbles over, and nobody deletes
        said = trained(loop, folder, checkpoint_every=5)
        assert ("continued from step" in said) == (after != (1,))
        assert left(folder) == whole
        assert (folder / "checkpoints" / "notes").is_dir()
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["images_per_second"] == pytest.approx(64 / last["seconds"])


@pytest.mark.parametrize(("loop", "optimizer"), [("jax", "sgd"), ("jax", "momentum"), ("torch", "momentum")])
@pytest.mark.usefixtures("quickly_compiled")
def test_every_optimiser_goes_on(loop, optimizer, tmp_path):
    trained(loop, tmp_path / "whole", optimizer=optimizer)
    trained(loop, tmp_path / "cut", optimizer=optimizer, after=12, checkpoint_every=3)
    trained(loop, tmp_path / "cut", optimizer=optimizer)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_what_is_made_up_is_refused(loop, tmp_path):
    """Sealed anew, with other arrays than are said to be in it, and with what is no checkpoint of the framework's."""
    trained(loop, tmp_path / "run", after=3, checkpoint_every=3)
    path = tmp_path / "run" / "checkpoints" / "3"
    about = unseal(path)
    seal(path, about | {"arrays": dict.fromkeys(about["arrays"], "float32 7")})
    with pytest.raises(
        UnfitError, match=r"^the array \S+ is float32 \S+; allowed: float32 7, as the checkpoint has it$"
    ):
        trained(loop, tmp_path / "run")
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"nothing")
    seal(path, about)
    with pytest.raises(UnfitError, match=r"^.*3 can't be read: .*; allowed: what this program wrote$"):
        trained(loop, tmp_path / "run")
    assert unseal(path) == about


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("quickly_compiled")
def test_a_flipped_byte(loop, tmp_path):
    """The checkpoint is refused with a notice, and the one before taken; where none is left, the run begins anew."""
    trained(loop, tmp_path / "whole")
    trained(loop, tmp_path / "cut", after=14, checkpoint_every=3)
    folder = tmp_path / "cut" / "checkpoints"
    for step in ("12", "9"):
        files = [path for path in (folder / step).rglob("*") if path.is_file() and path.stat().st_size]
        file = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    said = trained(loop, tmp_path / "cut", after=3)
    assert "Notice: checkpoint 12 is damaged" in said
    assert "Notice: checkpoint 9 is damaged" in said
    assert "continued from step 8" in said
    (folder / "8" / "checkpoint.json").unlink()
    said = trained(loop, tmp_path / "cut")
    assert "Notice: no checkpoint is left of this run; it begins anew" in said
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
