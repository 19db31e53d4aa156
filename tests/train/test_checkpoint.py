import contextlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, build
from crossover.train import checkpoint
from crossover.train.checkpoint import CheckpointError, newest, read_state, restore, save, verify
from crossover.train.config import OptimConfig
from crossover.train.optim import adamw, set_learning_rate


def trained(arch: str = "lstm", steps: int = 2) -> tuple[LanguageModel, torch.optim.AdamW]:
    """A small model after a few updates."""
    options: dict[str, Any] = {"attention_every": 2, "attention_offset": 1} if arch == "jamba" else {}
    model = build(arch, d_model=32, n_layers=2, vocab_size=16, **options)
    optimizer = adamw(model, OptimConfig())
    set_learning_rate(optimizer, 1e-2)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: LanguageModel, optimizer: torch.optim.AdamW) -> float:
    tokens = torch.randint(16, (2, 9))
    loss, aux = model.loss(tokens[:, :-1], tokens[:, 1:])
    (loss + aux).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def saved(root: Path, *steps: int) -> Path:
    """Publishes a checkpoint at each of `steps` and returns the last one."""
    model, optimizer = trained()
    paths = [save(root, number, model=model, optimizer=optimizer, state={"note": number}) for number in steps]
    return paths[-1]


def files_below(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("arch", ["transformer", "mamba", "jamba", "lstm"])
def test_a_restored_run_goes_on_bit_for_bit(arch: str, tmp_path: Path) -> None:
    model, optimizer = trained(arch)
    path = save(tmp_path, 2, model=model, optimizer=optimizer, state={})
    expected = [step(model, optimizer) for _ in range(3)]

    torch.manual_seed(99)
    fresh, fresh_optimizer = trained(arch, steps=0)
    restore(path, model=fresh, optimizer=fresh_optimizer)
    set_learning_rate(fresh_optimizer, 1e-2)
    assert [step(fresh, fresh_optimizer) for _ in range(3)] == expected
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_restored_tensors_are_aligned(tmp_path: Path) -> None:
    model, optimizer = trained("jamba")
    restore(save(tmp_path, 2, model=model, optimizer=optimizer, state={}), model=model, optimizer=optimizer)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert {t.data_ptr() % 64 for t in [*model.parameters(), *moments]} == {0}


def test_a_checkpoint_alone_rebuilds_its_model(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 2, model=model, optimizer=optimizer, state={})
    again = LanguageModel.from_pretrained(path)
    tokens = torch.randint(16, (1, 5))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.quick
def test_the_state_comes_back_with_the_step(tmp_path: Path) -> None:
    state = read_state(saved(tmp_path, 7))
    assert (state["step"], state["note"]) == (7, 7)


@pytest.mark.quick
def test_the_newest_are_kept(tmp_path: Path) -> None:
    last = saved(tmp_path, 5, 10, 15)
    assert files_below(tmp_path) == ["step-00000010", "step-00000015"]
    assert newest(tmp_path) == last


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    saved(tmp_path, 99_999_999, 100_000_000)
    assert newest(tmp_path) == tmp_path / "step-100000000"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None


@pytest.mark.quick
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"])
def test_a_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    verify(path)
    flip_a_byte(path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        verify(path)


def test_truncated_missing_and_unlisted_files_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes instead of \d+"):
        verify(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        verify(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        verify(path)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    flip_a_byte(saved(tmp_path, 5, 10) / "model.safetensors")
    with pytest.warns(RuntimeWarning, match=r"is damaged.*continuing from the older step-00000005"):
        assert newest(tmp_path) == tmp_path / "step-00000005"
    assert (tmp_path / "step-00000010.damaged").is_dir()
    assert newest(tmp_path) == tmp_path / "step-00000005"  # and without a further warning


def test_a_run_never_starts_again_silently(tmp_path: Path) -> None:
    flip_a_byte(saved(tmp_path, 5) / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove the run directory"):
        newest(tmp_path)


def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    model, optimizer = trained()
    with largest_file(4096), pytest.raises(OSError, match=r"cannot write the checkpoint .*step-00000010: .*too large"):
        save(tmp_path, 10, model=model, optimizer=optimizer, state={})
    assert files_below(tmp_path) == ["step-00000005"]
    verify(tmp_path / "step-00000005")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Fails writes beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    leftover = tmp_path / "step-00000010.tmp-1"
    leftover.mkdir()
    (leftover / "manifest.json").write_text(json.dumps({"files": {}}))
    assert newest(tmp_path) == tmp_path / "step-00000005"
    saved(tmp_path, 15)
    assert not leftover.exists()


def test_a_checkpoint_is_complete_before_its_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, seen = os.rename, []

    def watch(source: Path, target: Path) -> None:
        verify(source)
        seen.append(target.name)
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", watch)
    saved(tmp_path, 5)
    assert seen == ["step-00000005"]


def test_a_checkpoint_is_on_the_disk_before_its_name_appears(tmp_path: Path, renamed: list[str]) -> None:
    saved(tmp_path, 5)
    assert renamed[-1] == "step-00000005"


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    other = build("mamba", d_model=32, n_layers=1, vocab_size=16)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: the tensors are not those of the model: .* missing"
    ):
        restore(path, model=other, optimizer=adamw(other, OptimConfig()))


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_has_the_mode_of_any_new_one(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = saved(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {oct(0o666 & ~umask)}


def test_damaged_checkpoints_of_one_step_are_all_kept_aside(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for _ in range(3):
        flip_a_byte(saved(tmp_path, 2) / "model.safetensors")
        with pytest.warns(RuntimeWarning, match="continuing from the older step-00000001"):
            newest(tmp_path)
    aside = [f"step-00000002.damaged{suffix}" for suffix in ("", "-2", "-3")]
    assert files_below(tmp_path) == ["step-00000001", *aside]
