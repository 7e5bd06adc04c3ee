"""The store of measured masks: exact, shared between processes, refused where it does not belong."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_scoring import means_of, model_of, prompts_of, some_mask, text_of

from secateur.errors import NumericalError, StoreError
from secateur.evaluation import Evaluator
from secateur.evaluation.store import REMEDY, Store, is_usable
from secateur.units import Mask

MODEL = "fingerprint"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "measured.sqlite"


@given(arrays(np.float64, st.integers(0, 5), elements=st.floats(allow_nan=False)))
def test_arrays_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("store") / "measured.sqlite"
    with Store(path, MODEL) as store:
        store.put("select", b"mask", {"y": value, "kl": np.float64(0.1)})
    with Store(path, MODEL) as store:
        found = store.get("select", b"mask")
        assert found["y"].tobytes() == value.tobytes()
        assert found["y"].dtype == value.dtype
        assert float(found["kl"]) == 0.1
        assert len(store) == 1


def test_parts_and_masks_are_kept_apart_and_the_first_figure_stays(path: Path) -> None:
    with Store(path, MODEL) as store:
        store.put("select", b"a", {"y": np.ones(2)})
        store.put("select", b"a", {"y": np.zeros(2), "nll": np.zeros(1)})
        assert store.get("select", b"a")["y"].tolist() == [1, 1]
        assert set(store.get("select", b"a")) == {"y", "nll"}
        assert store.get("test", b"a") == store.get("select", b"b") == {}


def test_what_is_put_is_there_for_others_at_once(path: Path) -> None:
    with Store(path, MODEL) as one, Store(path, MODEL) as other:
        one.put("fit", b"a", {"y": np.ones(1)})
        assert other.get("fit", b"a")["y"] == 1
        other.put("fit", b"b", {"y": np.zeros(1)})
        assert one.get("fit", b"b")["y"] == 0


def _write(path: Path, worker: int, count: int) -> None:
    with Store(path, MODEL) as store:
        for number in range(count):
            store.put("fit", bytes([worker, number]), {"y": np.array([worker, number])})


def test_processes_share_a_store_that_none_of_them_has_made(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, worker, 20)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with Store(path, MODEL) as store:
        assert len(store) == 60
        assert store.get("fit", bytes([2, 19]))["y"].tolist() == [2, 19]


def refusal(path: Path, model: str = MODEL) -> str:
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        Store(path, model, wait=0.1)
    assert not is_usable(path, model)
    assert path.read_bytes() == before, "a refused store is left as it was"
    assert REMEDY in str(caught.value)
    return str(caught.value)


def test_the_store_of_another_model_is_refused(path: Path) -> None:
    Store(path, MODEL).close()
    assert "belongs to another model" in refusal(path, "other")


def test_another_schema_is_refused(path: Path) -> None:
    Store(path, MODEL).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE about SET value = '99' WHERE name = 'schema'")
    connection.close()
    assert "schema version 99" in refusal(path)


def test_another_database_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    assert "not a store" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be looked at" * 9, b"SQLite format 3\0" + b"x" * 600]
)
def test_a_damaged_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "is damaged" in refusal(path)


@pytest.mark.parametrize("spoilt", ["page", "figure"])
def test_a_store_with_one_damaged_part_opens_and_is_found_out(spoilt: str, path: Path) -> None:
    with Store(path, MODEL) as store:
        for number in range(200):
            store.put("fit", bytes([number]), {"y": np.arange(60.0)})
    assert is_usable(path, MODEL)
    if spoilt == "page":
        content = bytearray(path.read_bytes())
        content[-4096:] = b"x" * 4096
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE measured SET value = x'00' WHERE mask = x'64'")
        connection.close()
    with Store(path, MODEL):
        assert not is_usable(path, MODEL)


def test_no_store_is_as_good_as_one(path: Path) -> None:
    assert is_usable(path, MODEL)
    assert not path.exists()


def test_a_locked_store_is_said(path: Path) -> None:
    Store(path, MODEL).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with Store(path, MODEL, wait=0.05) as store, pytest.raises(StoreError, match="locked by another process"):
        store.put("fit", b"a", {"y": np.ones(1)})
    holder.execute("ROLLBACK")
    with Store(path, MODEL) as store:
        store.put("fit", b"a", {"y": np.ones(1)})
        assert len(store) == 1
    holder.close()


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "none" / "measured.sqlite", MODEL)


def test_a_full_disk_is_said_and_loses_nothing(path: Path) -> None:
    with Store(path, MODEL) as store:
        store.put("fit", b"a", {"y": np.ones(1)})
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="is full"):
            store.put("fit", b"b", {"y": np.zeros(100_000)})
        assert len(store) == 1


def stored(store: Store, **changes: Any) -> Evaluator:
    told = {"text": text_of(), "batch_size": 5, "divergence": True, **changes}
    return Evaluator(model_of(), prompts_of(), store=store, **told)


def figures(evaluator: Evaluator, mask: Mask | None) -> tuple[Any, ...]:
    measured = evaluator.evaluate(mask, utility=True)
    assert measured.nll is not None
    kl = 0.0 if mask is None else evaluator.kl_divergence(mask)
    return measured.table.y.tolist(), measured.nll.tolist(), kl


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_what_another_run_has_measured_costs_nothing(path: Path, order: tuple[int, ...]) -> None:
    model = model_of()
    masks = [None, some_mask(model), some_mask(model, means_of())]
    plain = Evaluator(model, prompts_of(), text_of(), 5, divergence=True)
    with Store(path, model.fingerprint) as store:
        first = stored(store)
        found = {number: figures(first, masks[number]) for number in order}
        before, again = model.usage.copy(), stored(store)
        assert {number: figures(again, masks[number]) for number in order} == found
        assert model.usage.since(before).forward == 0
    assert {number: figures(plain, masks[number]) for number in order} == found


def test_other_data_and_settings_are_other_parts(path: Path) -> None:
    with Store(path, model_of().fingerprint) as store:
        parts = [
            stored(store),
            stored(store, batch_size=3),
            stored(store, text=None),
            stored(store, text=text_of().first(2)),
        ]
        parts.append(Evaluator(model_of(), prompts_of().of_scenarios([0]), text_of(), 5, store=store))
        assert len({part.part for part in parts}) == len(parts)
        model_of().matmul_precision = "medium"
        try:
            assert stored(store).part != parts[0].part
        finally:
            model_of().matmul_precision = "highest"


def test_a_new_mask_is_compared_with_an_unpruned_model_that_only_the_store_remembers(path: Path) -> None:
    model, mask = model_of(), some_mask(model_of())
    with Store(path, model.fingerprint) as store:
        figures(stored(store), None)
        kl = stored(store).kl_divergence(mask)
    assert kl == Evaluator(model, prompts_of(), text_of(), 5, divergence=True).kl_divergence(mask) > 0


def test_a_mask_without_finite_answers_is_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = model_of(), some_mask(model_of())
    read = Evaluator._read

    def not_finite(self: Evaluator, mask: Any, *rest: Any) -> None:
        if mask is not None:
            raise NumericalError("not finite")
        read(self, mask, *rest)

    monkeypatch.setattr(Evaluator, "_read", not_finite)
    with Store(path, model.fingerprint) as store:
        with pytest.raises(NumericalError, match="not finite"):
            stored(store).evaluate(mask, utility=True)
        assert {"y", "finite"} == set(store.get(stored(store).part, mask.key))
    monkeypatch.undo()
    with Store(path, model.fingerprint) as store:
        resumed, before = stored(store), model.usage.copy()
        done: list[int] = []
        assert list(resumed.evaluate_each([mask, mask], done.append, utility=True)) == [None, None]
        assert sum(done) == 2 * resumed.work(utility=True)
        assert np.isfinite(resumed.evaluate(mask).table.y).all(), "the answers to prompts are known and finite"
        assert model.usage.since(before).forward == 0


def test_the_unpruned_model_is_asked_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the message says what to do."""
    model = model_of()
    with monkeypatch.context() as patch, Store(path, model.fingerprint) as store:
        patch.setattr("secateur.evaluation.evaluator.measure_y", lambda *_: (_ for _ in ()).throw(NumericalError("x")))
        with pytest.raises(NumericalError):
            stored(store).evaluate()
        assert len(store) == 0
