"""Statistics against work counted by hand."""

import json

import pytest
import torch

from psa_integrations.stats import AttentionStats, LayerStats, StatsRecorder


def test_means_are_over_calls() -> None:
    recorder = StatsRecorder()
    recorder.dense(("transformer", 0, 0))
    recorder.sparse(("transformer", 0, 0), torch.tensor([[0.25, 0.75]]))
    recorder.sparse(("transformer", 0, 0), torch.tensor([[0.0, 0.5]]))
    recorder.sparse(("transformer", 1, 0), torch.tensor([[0.5, 0.5]]))
    recorder.dense(("transformer", 1, 1))
    stats = recorder.read()
    assert stats.layers == (
        LayerStats("transformer", 0, 0, (1 + 0.5 + 0.25) / 3, 3, 1),
        LayerStats("transformer", 1, 0, 0.5, 1, 0),
        LayerStats("transformer", 1, 1, 1.0, 1, 1),
    )
    assert stats.calls == 5
    assert stats.density == pytest.approx((1 + 0.5 + 0.25 + 0.5 + 1) / 5)
    assert stats.sparsity == pytest.approx(1 - stats.density)
    assert stats.density_per_step() == {0: pytest.approx(1.75 / 3), 1: pytest.approx(0.75)}
    assert stats.density_per_layer() == {0: pytest.approx(2.25 / 4), 1: 1.0}
    assert stats.dense_steps() == []
    assert stats.dense_layers() == [1]


def test_dense_steps_are_those_with_no_sparse_call() -> None:
    recorder = StatsRecorder()
    for step in (0, 1, 2):
        recorder.dense(("transformer", step, 0))
        recorder.dense(("transformer_2", step, 0))
    recorder.sparse(("transformer", 1, 1), torch.tensor([[0.5]]))
    assert recorder.read().dense_steps() == [0, 2]
    assert recorder.read().dense_steps("transformer_2") == [0, 1, 2]


def test_transformers_are_kept_apart() -> None:
    recorder = StatsRecorder()
    recorder.sparse(("transformer", 0, 0), torch.tensor([[0.5]]))
    recorder.sparse(("transformer_2", 1, 0), torch.tensor([[0.25]]))
    stats = recorder.read()
    assert stats.density_per_step("transformer") == {0: 0.5}
    assert stats.density_per_step("transformer_2") == {1: 0.25}
    assert stats.density == 0.375


def test_a_transformer_that_is_not_there_is_named() -> None:
    recorder = StatsRecorder(("transformer", "transformer_2"))
    assert recorder.read().density_per_step("transformer_2") == {}
    recorder.dense(("transformer", 0, 0))
    stats = recorder.read()
    assert stats.density_per_step("transformer_2") == {}
    for read in (stats.density_per_step, stats.density_per_layer, stats.dense_steps, stats.dense_layers):
        with pytest.raises(ValueError, match="transformer must be one of 'transformer', 'transformer_2', got 'transfo"):
            read("transfomer")


def test_nothing_executed() -> None:
    stats = StatsRecorder().read()
    assert stats == AttentionStats(())
    assert (stats.calls, stats.density, stats.dense_steps()) == (0, 1.0, [])


def test_reset_forgets() -> None:
    recorder = StatsRecorder()
    recorder.sparse(("transformer", 0, 0), torch.tensor([[0.5]]))
    recorder.dense(("transformer", 1, 0))
    recorder.reset()
    assert recorder.read().layers == ()


def test_plain_values_survive_json() -> None:
    recorder = StatsRecorder()
    recorder.sparse(("transformer", None, 0), torch.tensor([[0.5]]))
    values = json.loads(json.dumps(recorder.read().to_dict()))
    assert values == {
        "density": 0.5,
        "sparsity": 0.5,
        "calls": 1,
        "layers": [
            {
                "transformer": "transformer",
                "step": None,
                "layer": 0,
                "density": 0.5,
                "calls": 1,
                "dense_calls": 0,
            }
        ],
    }
