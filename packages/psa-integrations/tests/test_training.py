"""Training through sparse attention: LoRA, gradient checkpointing, autocast."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from psa_config import Preset
from psa_integrations import PyramidAttention, UnsupportedError, apply_pyramid_sparse_attention
from psa_integrations.diffusers.compiled import count_dense
from psa_masks import VideoGrid

Call = dict[str, torch.Tensor]
LORA = {"r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def gradients(transformer: Any, calls: list[Call]) -> dict[str, torch.Tensor]:
    """Of all parameters, for a loss over several forwards that end before the backward pass begins."""
    transformer.zero_grad()
    outputs = [transformer(**call, return_dict=False)[0] for call in calls]
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def in_double(call: Call) -> Call:
    return {name: x.double() if x.is_floating_point() else x for name, x in call.items()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Of float64, up to float32's rounding: sums in another order are far below it, which is no part of the promise."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.dtype == torch.float64
        error = (found[name] - gradient).abs().max()
        assert error <= torch.finfo(torch.float32).eps * gradient.abs().max(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_computed_anew_as_they_were(
    reentrant: bool, build_transformer: Callable[..., Any], wan_call: Call, sparse: Preset
) -> None:
    """Of two forwards of different sizes, with tokens in another order, the last over before any gradient."""
    torch.manual_seed(0)
    transformer = build_transformer("wan").train().double()
    call = in_double(wan_call)
    call["hidden_states"].requires_grad_()  # reentrant checkpoints pass gradients on, and make none
    small = call | {"hidden_states": call["hidden_states"][..., :8]}
    calls = [call, small]
    dense = gradients(transformer, calls)
    with apply_pyramid_sparse_attention(transformer, sparse) as handle:
        expected = gradients(transformer, calls)
        stats = handle.stats()
        handle.reset_stats()
        transformer.enable_gradient_checkpointing(
            lambda block, *args: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=reentrant)
        )
        chosen = transformer._gradient_checkpointing_func
        found = gradients(transformer, calls)
        assert handle.stats() == stats
        assert transformer._gradient_checkpointing_func is chosen
    # What the blocks share, as the text, gets their gradients in another order where checkpoints are reentrant.
    assert_same_gradients(found, expected)
    changed = [name for name in expected if "attn1.to_v" in name]
    assert changed
    for name in changed:
        assert (dense[name] - expected[name]).abs().max() > 1e-3 * dense[name].abs().max()


def test_a_checkpoint_chosen_after_a_failed_forward_stays(
    build_transformer: Callable[..., Any], wan_call: Call, sparse: Preset
) -> None:
    transformer = build_transformer("wan").train()
    transformer.enable_gradient_checkpointing()
    with apply_pyramid_sparse_attention(transformer, sparse):
        with pytest.raises(TypeError):
            transformer(**wan_call | {"encoder_hidden_states": None})
        chosen = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
        transformer.enable_gradient_checkpointing(chosen)
    assert transformer._gradient_checkpointing_func is chosen


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_not_computed_anew_after_removal(
    reentrant: bool, build_transformer: Callable[..., Any], wan_call: Call, sparse: Preset
) -> None:
    transformer = build_transformer("wan").train()
    wan_call["hidden_states"].requires_grad_()
    transformer.enable_gradient_checkpointing(
        lambda block, *args: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=reentrant)
    )
    with apply_pyramid_sparse_attention(transformer, sparse):
        output = transformer(**wan_call, return_dict=False)[0]
    with pytest.raises(RuntimeError, match=r"call backward\(\) before remove\(\)"):
        output.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_other_checkpoints_go_around_the_whole_transformer_not_around_blocks(
    reentrant: bool, build_transformer: Callable[..., Any], wan_call: Call, sparse: Preset
) -> None:
    torch.manual_seed(0)
    transformer = build_transformer("wan").train().double()
    call = in_double(wan_call)
    call["hidden_states"].requires_grad_()
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    with apply_pyramid_sparse_attention(transformer, sparse) as handle:
        expected = gradients(transformer, [call])
        assert handle.stats().calls == 2
        transformer.zero_grad()
        rest = {name: x for name, x in call.items() if name != "hidden_states"}
        checkpoint(
            lambda x: transformer(x, **rest, return_dict=False)[0], call["hidden_states"]
        ).square().mean().backward()
        assert_same_gradients({name: p.grad for name, p in transformer.named_parameters()}, expected)
        assert handle.stats().calls == 2 * 2
        block = transformer.blocks[1]
        block.forward = partial(checkpoint, block.forward)
        with pytest.raises(UnsupportedError, match=r"layer 1 of transformer is computed anew.*enable_gradient_check"):
            gradients(transformer, [call])


def test_what_inference_mode_made_is_good_for_training(
    build_transformer: Callable[..., Any], wan_call: Call, sparse: Preset
) -> None:
    transformer = build_transformer("wan").train()
    with torch.inference_mode():
        handle = apply_pyramid_sparse_attention(transformer, sparse)
        transformer(**wan_call)
    with handle:
        transformer(**wan_call, return_dict=False)[0].sum().backward()
        assert transformer.blocks[0].attn1.to_q.weight.grad is not None
        # As compiled blocks do in a dense layer.
        torch.compile(count_dense, backend="aot_eager", fullgraph=True)(transformer.blocks[0].attn1.processor.ticket)
        assert handle.stats().calls == 2 * 2 + 1


@pytest.mark.parametrize("autocast", [False, True])
def test_ten_lora_steps_lower_the_loss(
    autocast: bool, build_transformer: Callable[..., Any], wan_call: Call, sparse: Preset
) -> None:
    """A flow towards a fixed clip, with checkpoints; the weights below the adapters stay."""
    torch.manual_seed(0)
    transformer = build_transformer("wan").train().requires_grad_(False)
    transformer.add_adapter(LoraConfig(**LORA))
    transformer.enable_gradient_checkpointing()
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    frozen = {name: p.clone() for name, p in transformer.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    target = torch.randn(wan_call["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    losses = []
    with apply_pyramid_sparse_attention(transformer, sparse) as handle:
        for _ in range(10):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                flow = transformer(**wan_call, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(flow.float(), target)
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        stats = handle.stats()
        assert stats.calls == 10 * 2
        assert stats.density < 0.6
    assert max(losses[-3:]) < min(losses[:3])
    for name, p in transformer.named_parameters():
        assert p.requires_grad or torch.equal(p, frozen[name])


def test_checkpointed_cogvideox_blocks_too(build_transformer: Callable[..., Any], sparse: Preset) -> None:
    torch.manual_seed(0)
    transformer = build_transformer("cogvideox").train().double()
    generator = torch.Generator().manual_seed(2)
    angles = torch.rand(3 * 8 * 12, 8, generator=generator).repeat_interleave(2, dim=1)
    call = {
        "hidden_states": torch.randn(1, 3, 4, 16, 24, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "timestep": torch.tensor([500]),
    }
    call = in_double(call) | {"image_rotary_emb": (angles.cos().double(), angles.sin().double())}
    with apply_pyramid_sparse_attention(transformer, sparse):
        expected = gradients(transformer, [call])
        transformer.enable_gradient_checkpointing()
        found = gradients(transformer, [call])
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("method", "whole", "checkpoints"),
    [("Gilbert", True, True), ("Semantic", False, False), ("Hybrid", False, True), ("KdTree", True, False)],
)
def test_compiled_transformers_have_the_gradients_of_eager_ones(
    method: str,
    whole: bool,
    checkpoints: bool,
    build_transformer: Callable[..., Any],
    wan_call: Call,
    make_preset: Callable[..., Preset],
) -> None:
    """Of a dense step and a sparse one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    transformer = build_transformer("wan").train().double()
    call = in_double(wan_call)
    options = {"rearrange_method": method, "num_clusters": 9, "dense_layers": (0,) if whole else ()}
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, **options)
    with apply_pyramid_sparse_attention(transformer, preset) as handle:

        def two_steps() -> list[dict[str, torch.Tensor]]:
            handle.reset_stats()
            found = []
            for step in range(2):
                with handle.at_step(step, 2):
                    found.append(gradients(transformer, [call]))
            return found

        expected = two_steps()
        stats = handle.stats()
        if checkpoints:
            transformer.enable_gradient_checkpointing()
        compile_it = transformer.compile if whole else transformer.compile_repeated_blocks
        compile_it(fullgraph=True, backend="aot_eager")
        found = two_steps()
        assert handle.stats() == stats
    torch._dynamo.reset()
    for step in range(2):
        assert_same_gradients(found[step], expected[step])
    dense, sparse = (step["blocks.1.attn1.to_v.weight"] for step in expected)
    assert (dense - sparse).abs().max() > 1e-3 * dense.abs().max()


def test_compiled_training_under_context_parallelism_is_refused(
    build_transformer: Callable[..., Any], wan_call: Call, make_preset: Callable[..., Preset]
) -> None:
    transformer = build_transformer("wan").train()
    # As enable_parallelism leaves it, without the processes that it needs: the refusal comes before they meet.
    mesh = SimpleNamespace(get_group=lambda: None)
    config = SimpleNamespace(ring_degree=1, ulysses_degree=2, ulysses_anything=False, _ulysses_mesh=mesh)
    transformer._parallel_config = SimpleNamespace(context_parallel_config=config)
    refusal = "transformer is compiled under context parallelism, which passes no gradients on: train it uncompiled"
    with apply_pyramid_sparse_attention(transformer, make_preset((1.0,) * 4, use_rearrange=False)):
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=refusal):
            transformer(**wan_call)
    torch._dynamo.reset()


def test_the_module_passes_gradients(sparse: Preset) -> None:
    grid = VideoGrid(frames=2, height=8, width=8)
    module = PyramidAttention(sparse, grid)
    qkv = [x.requires_grad_() for x in torch.randn(3, 1, 2, grid.seq_len, 16, generator=torch.Generator())]
    module(*qkv).square().sum().backward()
    assert all((x.grad != 0).any() for x in qkv)
