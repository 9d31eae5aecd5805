"""One transformer with the integration on it: its hooks, its processors, and the forward under way."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal

from torch import _C, Tensor, nn
from torch.compiler import disable, is_compiling
from torch.utils.hooks import RemovableHandle

from psa_config import Preset
from psa_integrations.attention import attend_by, block_layout, check_device, plan_of, serves_head_dim
from psa_integrations.build import (
    check_clusters,
    content_orders,
    mask_policy,
    orders_by_content,
    sparse_attention_of,
    token_order,
)
from psa_integrations.content_orders import ContentOrders
from psa_integrations.diffusers.adapter import Adapter, Order, Processor
from psa_integrations.diffusers.arguments import ForwardArguments
from psa_integrations.diffusers.caches import has_cache
from psa_integrations.diffusers.checkpoints import AsItWas, BoundCheckpoint
from psa_integrations.diffusers.compiled import (
    OrderInGraph,
    attend,
    clusters,
    count_dense,
    count_sparse,
    plan,
    sizes,
    tickets,
)
from psa_integrations.diffusers.parallel import parallel_problem, ulysses_of
from psa_integrations.diffusers.threads import OneThread
from psa_integrations.recording import LevelRecorder
from psa_integrations.stats import StatsRecorder
from psa_integrations.steps import Step, StepFinder, is_dense_step
from psa_kernels import LevelPlan
from psa_kernels.checks import MAX_HEAD_DIM
from psa_masks import AttentionOrder, MaskPolicy, TokenOrder, VideoGrid

OnUnsupported = Literal["raise", "dense"]

_Call = tuple[tuple[Any, ...], dict[str, Any]] | None
"""Arguments of a forward as its hook gives them back, None to leave them."""

STEP_UNKNOWN = (
    "pyramid sparse attention finds the denoising step outside of the graph: inside a pipeline's cache context or "
    "handle.at_step it is known before"
)


class UnsupportedError(RuntimeError):
    """The model is in a state that sparse attention cannot serve."""


@dataclass(frozen=True)
class SparseForward:
    """How a sparse forward treats its tokens. `order` is over the video tokens alone, once for all layers; `contents`
    makes further ones in each of them.

    Where the whole transformer is compiled, policy and these are looked up by `in_graph`, the grid as operators take
    it.
    """

    grid: VideoGrid
    policy: MaskPolicy | None
    order: Order | None
    contents: ContentOrders | None = None
    in_graph: tuple[int, ...] = ()


class TransformerSite:
    """Puts a preset on one transformer.

    Every forward starts in a hook on the transformer, which finds the step and decides: in a dense step
    nothing is touched, so the model computes exactly what it always did. In a sparse one the grid is read
    from the arguments, and the tokens go through all layers in the preset's order.

    The hooks are PyTorch's own: those of accelerate and diffusers wrap `forward`, and a wrapper added after
    CPU offload is dropped at the end of a run.
    """

    def __init__(
        self,
        name: str,
        transformer: Any,
        adapter: Adapter,
        preset: Preset,
        *,
        finder: StepFinder,
        stats: StatsRecorder,
        on_unsupported: OnUnsupported,
        impl: str | None,
    ) -> None:
        self.name = name
        self.transformer = transformer
        self.preset = preset
        self.level_recorder: LevelRecorder | None = None
        self._adapter = adapter
        self._sparse = sparse_attention_of(preset)
        # How sequences are cut, whatever their grid.
        self._blocks = None if self._sparse is None else mask_policy(self._sparse)
        self._finder = finder
        self._stats = stats
        self._on_unsupported = on_unsupported
        self._impl = impl
        self._arguments = ForwardArguments(type(transformer))
        self._threads = OneThread(name, transformer)
        self._begin_outside = self._begin_eager
        self._order_ticket: Tensor | None = None
        self.active = False
        # Whether the next forward is dense, None where only the call itself will tell.
        self._announced: bool | None = None
        self._forwards: dict[VideoGrid, SparseForward] = {}
        self._processors: list[tuple[Any, Processor]] = []
        self._hooks: list[RemovableHandle] = []
        self._cache_context: Any = None
        # The model's own checkpoint function and what stands in for it in the forward under way.
        self._checkpoint = BoundCheckpoint(transformer, self._keep)
        self._recomputing = False
        # Whether a forward is under way; where the whole transformer is compiled nobody sees its end.
        self._in_forward = False
        # Whether tokens go through some steps in another order than through others.
        self._orders_change = self._sparse is not None and bool(
            self._sparse.use_rearrange and (self._sparse.warmup_steps or self._sparse.cooldown_steps)
        )
        self._has_cache = False
        self._warned = False
        self._warned_of_dense_run = False
        self._step: int | None = None
        self._last: Step | None = None
        self._current: SparseForward | None = None
        self._dense_layers = frozenset[int]() if self._sparse is None else frozenset(self._sparse.dense_layers)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Hooks of a copy would follow the forwards of this transformer, and no handle could take them off.
        if self.active:
            raise RuntimeError(
                f"{self.name} has pyramid sparse attention, which cannot be copied or pickled with it: call remove() "
                "on its handle first, or take the state_dict"
            )
        return super().__reduce_ex__(protocol)

    def check(self) -> None:
        """Refuses, before anything is touched, what the integration cannot work with."""
        where = f"{self.name} ({type(self.transformer).__name__})"
        attentions = self._adapter.attentions(self.transformer)
        for attention in attentions:
            # Left behind by unfuse_qkv_projections, which puts back the processors it once found.
            while isinstance(attention.processor, Processor) and not attention.processor.attention.active:
                attention.processor = attention.processor.original
        if any(isinstance(attention.processor, Processor) for attention in attentions):
            raise RuntimeError(f"{where} already has pyramid sparse attention: call remove() on its handle first")
        if getattr(self.transformer, "_compiled_call_impl", None) is not None:
            raise RuntimeError(f"{where} is compiled: apply pyramid sparse attention first, then compile")
        beyond = sorted(layer for layer in self._dense_layers if layer >= len(attentions))
        if beyond:
            raise ValueError(f"dense_layers must be below the {len(attentions)} layers of {where}, got {beyond}")
        for layer, attention in enumerate(attentions):
            if type(attention.processor) not in self._adapter.processor_classes:
                known = ", ".join(cls.__name__ for cls in self._adapter.processor_classes)
                raise UnsupportedError(
                    f"layer {layer} of {where} must have one of the processors {known}, "
                    f"got {type(attention.processor).__name__}"
                )
            head_dim = attention.inner_dim // attention.heads
            if not serves_head_dim(self._impl, head_dim):
                raise UnsupportedError(
                    f"head_dim must be at most {MAX_HEAD_DIM} unless impl is 'torch' or 'reference', "
                    f"got {head_dim} in layer {layer} of {where}"
                )

    def install(self) -> None:
        """Sets the processors and the hooks."""
        attentions = self._adapter.attentions(self.transformer)
        # One more for the token order, whose gradients keep it: those of the layers count as written to.
        *of_layers, self._order_ticket = tickets(self, len(attentions) + 1)
        for layer, attention in enumerate(attentions):
            processor = self._adapter.processor(attention.processor, self, layer)
            processor.ticket, processor.dense = of_layers[layer], layer in self._dense_layers
            attention.processor = processor
            self._processors.append((attention, processor))
        self._hooks = [
            self.transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.transformer.register_forward_hook(self._end),
            *self._adapter.order_hooks(self.transformer, self._order),
        ]
        self._watch_cache_context()
        self._begin_outside = disable(self._begin_eager, reason=STEP_UNKNOWN)
        self.active = True
        self._finder.listeners.append(self._announce)
        self._announce(None)

    def remove(self) -> None:
        """Takes the hooks off and puts the original processors back."""
        for hook in self._hooks:
            hook.remove()
        for attention, processor in self._processors:
            # Someone else may have set another one since; that one is theirs.
            if attention.processor is processor:
                attention.processor = processor.original
        if self.transformer.__dict__.get("cache_context") is self._cache_context is not None:
            del self.transformer.__dict__["cache_context"]
        if self._announce in self._finder.listeners:
            self._finder.listeners.remove(self._announce)
        self._checkpoint.release()
        self._hooks, self._processors, self._cache_context = [], [], None
        self._forwards.clear()
        self.active = False

    def runs_sparse(self, processor: Processor, hidden_states: Tensor, attention_mask: Tensor | None) -> bool:
        # Compiled blocks trace this once for all layers and steps: what differs between them must not be read here.
        if not self.active:
            return False
        if self._sparse is not None:
            # Here, in a dense step too, and not at the start of the forward: offloading has now moved the input.
            check_device(self._impl, hidden_states)
        if self._current is not None and attention_mask is not None:
            # A dense layer could not follow it either: the mask knows nothing of the token order.
            raise UnsupportedError(
                f"layer {processor.layer} of {self.name} was given an attention mask in a sparse step"
            )
        sparse = self._current is not None and not processor.dense
        if not sparse:
            if is_compiling():
                count_dense(processor.ticket)
            else:
                self.count_dense(processor.layer)
        return sparse

    def count_dense(self, layer: int) -> None:
        """Notes a dense call of a layer.

        Raises:
            UnsupportedError: if it comes in a backward pass and belongs to no forward that has begun.
        """
        if not self._computed_anew():
            self._stats.dense((self.name, self._step, layer))
        elif self._sparse is not None and not self._recomputing and not self._in_forward:
            raise UnsupportedError(
                f"layer {layer} of {self.name} is computed anew for its gradients, and nothing tells of which forward: "
                f"instead of checkpoints around its blocks use {type(self.transformer).__name__}'s "
                "enable_gradient_checkpointing()"
            )

    def count_sparse(self, layer: int, density: Tensor) -> None:
        """Notes a sparse call of a layer and what it executes."""
        if not self._computed_anew():
            self._stats.sparse((self.name, self._step, layer), density)

    def _computed_anew(self) -> bool:
        """Whether the call repeats one: in a checkpoint bound here, or else in the backward pass."""
        return self._recomputing or _C._current_graph_task_id() != -1

    def attend(
        self, processor: Processor, query: Tensor, key: Tensor, value: Tensor, *, kv_lengths: Tensor | None = None
    ) -> Tensor:
        if is_compiling():
            grid = self._current.in_graph if self._current is not None else ()
            if query.requires_grad or key.requires_grad or value.requires_grad:
                return self._attend_with_gradients(processor.ticket, query, key, value, kv_lengths, grid)
            out: Tensor = attend(query, key, value, kv_lengths, processor.ticket, grid)
            return out
        return self.attend_in(processor.layer, query, key, value, kv_lengths)

    def _attend_with_gradients(
        self,
        ticket: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_lengths: Tensor | None,
        grid: tuple[int, ...],
    ) -> Tensor:
        """`attend` where it is traced: what chooses is an operator, what has gradients is seen by the compiler."""
        assert self._sparse is not None
        if ulysses_of(self.transformer) is not None:
            raise UnsupportedError(
                f"{self.name} is compiled under context parallelism, which passes no gradients on: train it uncompiled"
            )
        assert self._blocks is not None
        query, key = query.to(value.dtype), key.to(value.dtype)
        inverse = None
        if orders_by_content(self._sparse):
            of_queries = self._sparse.rearrange_method == "Semantic"
            orders = clusters(query.detach(), key.detach(), ticket, grid, of_queries)
            key, value = _by_head(key, orders[0, 0]), _by_head(value, orders[0, 0])
            if of_queries:
                query, inverse = _by_head(query, orders[1, 0]), orders[1, 1]
        layout = block_layout(self._blocks, query.shape[2], key.shape[2])
        indices, offsets, density = plan(
            query.detach(),
            key.detach(),
            kv_lengths,
            ticket,
            grid,
            layout.num_q_blocks,
            layout.num_kv_blocks,
            layout.num_levels,
        )
        count_sparse(ticket, density)
        chosen = LevelPlan(indices, offsets, layout)
        out = attend_by(chosen, query, key, value, kv_lengths=kv_lengths, impl=self._impl)
        return out if inverse is None else _by_head(out, inverse)

    def attend_in(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_lengths: Tensor | None,
        grid: VideoGrid | None = None,
    ) -> Tensor:
        """Sparse attention of a layer; the grid None is that of the forward under way."""
        forward = self._forward_of(grid)
        attend_to_all = partial(self._attend_to_all, layer, forward, kv_lengths)
        ulysses = ulysses_of(self.transformer)
        return attend_to_all(query, key, value) if ulysses is None else ulysses.attend(query, key, value, attend_to_all)

    def _attend_to_all(
        self, layer: int, forward: SparseForward, kv_lengths: Tensor | None, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        query, key = query.to(value.dtype), key.to(value.dtype)
        orders = None
        if forward.contents is not None:
            orders = forward.contents(query, key, step=self._step, layer=layer, impl=self._impl)
            query, key, value = orders.apply(query, key, value)
        chosen = self._plan(layer, forward, query, key, kv_lengths)
        self.count_sparse(layer, chosen.density())
        out = attend_by(chosen, query, key, value, kv_lengths=kv_lengths, impl=self._impl)
        return out if orders is None else orders.undo(out)

    def content_orders_in(self, layer: int, query: Tensor, key: Tensor, grid: VideoGrid | None) -> AttentionOrder:
        """The orders that a layer makes of its own; the grid None is that of the forward under way."""
        forward = self._forward_of(grid)
        assert forward.contents is not None
        return forward.contents(query, key, step=self._step, layer=layer, impl=self._impl)

    def plan_in(
        self, layer: int, query: Tensor, key: Tensor, kv_lengths: Tensor | None, grid: VideoGrid | None
    ) -> LevelPlan:
        """What a layer is to execute; the grid None is that of the forward under way."""
        return self._plan(layer, self._forward_of(grid), query, key, kv_lengths)

    def _plan(
        self, layer: int, forward: SparseForward, query: Tensor, key: Tensor, kv_lengths: Tensor | None
    ) -> LevelPlan:
        assert forward.policy is not None
        if query.shape[2] != forward.grid.seq_len:
            raise ValueError(
                f"the self-attention of layer {layer} must get the {forward.grid.seq_len} tokens of "
                f"{forward.grid}, which is what the input of the transformer has, got {query.shape[2]}"
            )
        take = None
        # Where each head has blocks of its own, a map would say nothing of the video.
        placed = forward.contents is None or forward.contents.keeps_blocks
        if self.level_recorder is not None and placed:
            assert forward.order is None or isinstance(forward.order, TokenOrder)
            place = (self.name, self._step, layer)
            take = self.level_recorder.taker(place, grid=forward.grid, order=forward.order, policy=forward.policy)
        return plan_of(query, key, forward.policy, kv_lengths=kv_lengths, impl=self._impl, on_levels=take)

    def order_of(self, grid: VideoGrid) -> TokenOrder:
        """The order of the video tokens of `grid`."""
        order = self._forward(grid).order
        assert isinstance(order, TokenOrder)
        return order

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if not is_compiling():
            self._threads.enter()
            return self._begin_eager(module, args, kwargs)
        if self._announced is not None:
            return self._begin_in_graph(module, args, kwargs)
        return self._begin_outside(module, args, kwargs)

    def _begin_eager(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        self._current = None
        self._in_forward = True
        self._checkpoint.bind()
        self._check_processors()
        self._look_for_caches()
        call = self._arguments.by_name(args, kwargs)
        step = self._finder.find(call["timestep"])
        self._step = None if step is None else step.index
        self._follow(step)
        if self._sparse is None:
            return None
        # Before the dense steps: what cannot be served should not cost them first.
        grid = self._grid_served(module, call)
        if grid is None:
            return None
        forward = self._forward(grid)
        if is_dense_step(
            step,
            warmup=self._sparse.warmup_steps,
            cooldown=self._sparse.cooldown_steps,
            scheduler=self._finder.scheduler_name,
        ):
            return None
        self._current = forward
        if self._current.order is not None:
            self._adapter.order_call(call, self._current.order)
        return (), call

    def _follow(self, step: Step | None) -> None:
        """Lets go of what a run has left behind when another one starts, with its dense steps too, and looks at its
        length."""
        last, self._last = self._last, step
        same_run = step is not None and last is not None and step.total == last.total and step.index >= last.index
        if not same_run:
            for forward in self._forwards.values():
                if forward.contents is not None:
                    forward.contents.reset()
        if step is not None and step.total is not None:
            self._say_if_dense_throughout(step.total)

    def _say_if_dense_throughout(self, steps: int) -> None:
        """Warns, once, where the preset leaves no step of a run sparse."""
        if self._sparse is None or self._warned_of_dense_run:
            return
        warmup, cooldown = self._sparse.warmup_steps, self._sparse.cooldown_steps
        if steps > warmup + cooldown:
            return
        self._warned_of_dense_run = True
        warnings.warn(
            f"pyramid sparse attention on {self.name}: no step of this run is sparse: its steps are {steps}, and "
            f"{self.preset.model}/{self.preset.name} has warmup_steps {warmup} and cooldown_steps {cooldown}",
            stacklevel=2,
        )

    def _begin_in_graph(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """`_begin` where the whole transformer is compiled: one graph for dense steps, and one for sparse ones."""
        self._current = None
        self._in_forward = True
        self._check_processors()
        if self._sparse is None:
            return None
        call = dict(zip(self._arguments.names, args, strict=False)) | kwargs
        grid = self._grid_served(module, call)
        if grid is None:
            return None
        check_clusters(self._sparse, grid)
        if self._announced:
            return None
        assert self._order_ticket is not None
        order = OrderInGraph(self._order_ticket, grid) if self._sparse.use_rearrange else None
        self._current = SparseForward(grid, None, order, in_graph=tuple(sizes(grid)))
        if order is not None:
            self._adapter.order_call(call, order)
        return (), call

    def _check_processors(self) -> None:
        for attention, processor in self._processors:
            if attention.processor is not processor:
                raise RuntimeError(
                    f"the attention processors of {self.name} were replaced after pyramid sparse attention "
                    "was applied (fuse_qkv_projections and set_attn_processor do that): remove() the handle, "
                    "make the change, then apply again"
                )

    def _announce(self, step: Step | None) -> None:
        """Settles before a compiled forward whether it is dense."""
        self._announced = None
        if self._sparse is None:
            self._announced = True
        elif not self._sparse.warmup_steps and not self._sparse.cooldown_steps:
            self._announced = False
        elif step is not None and (step.total is not None or not self._sparse.cooldown_steps):
            self._announced = is_dense_step(
                step, warmup=self._sparse.warmup_steps, cooldown=self._sparse.cooldown_steps
            )
        self._step = None if step is None else step.index
        if step is not None:
            self._look_for_caches()
            self._follow(step)

    def _look_for_caches(self) -> None:
        self._has_cache = self._orders_change and has_cache(self.transformer)

    def _order(self) -> Order | None:
        return None if self._current is None else self._current.order

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._current = None
        self._checkpoint.release()
        if not is_compiling():
            self._in_forward = False
            self._threads.leave()

    def _keep(self) -> AsItWas:
        """The forward under way, for a block of it that is computed anew later."""
        current, step = self._current, self._step

        @contextmanager
        def as_it_was(anew: bool) -> Iterator[None]:
            if anew and current is not None and not self.active:
                raise RuntimeError(
                    f"a block of {self.name} is computed anew for its gradients after remove(), and would not be "
                    "as it was: call backward() before remove()"
                )
            before = self._current, self._step, self._recomputing
            self._current, self._step, self._recomputing = current, step, anew
            try:
                yield
            finally:
                self._current, self._step, self._recomputing = before

        return as_it_was

    def _forward_of(self, grid: VideoGrid | None) -> SparseForward:
        forward = self._current if grid is None else self._forward(grid)
        assert forward is not None
        return forward

    def _forward(self, grid: VideoGrid) -> SparseForward:
        assert self._sparse is not None
        if grid not in self._forwards:
            video = replace(grid, text=0)
            self._forwards[grid] = SparseForward(
                grid,
                mask_policy(self._sparse, grid),
                token_order(self._sparse, video, self._adapter.frames_apart(self.transformer)),
                content_orders(self._sparse, grid),
            )
        return self._forwards[grid]

    def _grid_served(self, module: nn.Module, call: dict[str, Any]) -> VideoGrid | None:
        """The tokens of a call that can run sparse, None where it cannot."""
        if not self._serves(module, call):
            return None
        grid = self._adapter.grid(module, call)
        if grid is None:
            self._supported("the call does not say how many frames, rows and columns of tokens it has")
        return grid

    def _serves(self, module: nn.Module, call: dict[str, Any]) -> bool:
        """Whether the call, in the module's present state, can run sparse."""
        assert self._sparse is not None
        if (call.get("attention_kwargs") or {}).get("attention_mask") is not None:
            return self._supported("attention_kwargs holds an attention mask, which sparse blocks cannot follow")
        grid = self._adapter.grid(module, call)
        problem = parallel_problem(
            module,
            heads=self._adapter.attentions(module)[0].heads,
            refusal=self._adapter.no_context_parallel,
            tokens=0 if grid is None else grid.seq_len,
        )
        if problem is not None:
            return self._supported(problem)
        if self._has_cache:
            return self._supported(
                "a diffusers cache would carry tokens from a dense step into a sparse one, in another order"
            )
        return True

    def _supported(self, problem: str) -> bool:
        message = f"pyramid sparse attention on {self.name}: {problem}"
        if self._on_unsupported == "raise":
            raise UnsupportedError(f"{message}; on_unsupported='dense' runs such calls dense")
        if not self._warned:
            warnings.warn(f"{message}; such calls run dense", stacklevel=2)
            self._warned = True
        return False

    def _watch_cache_context(self) -> None:
        original = self.transformer.cache_context
        finder = self._finder

        # Keeps the signature of the method: before diffusers 0.41 it takes the name alone, and callers look.
        @wraps(original)
        @contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            with (
                original(name, **fields),
                finder.context(fields.get("step_index"), fields.get("num_inference_steps")),
            ):
                yield

        self._cache_context = cache_context
        # Through __dict__, as a plain attribute of this instance that shadows the method of its class.
        self.transformer.__dict__["cache_context"] = cache_context


def _by_head(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of `x` [B, H, L, D] in the order of each head, int64 [B, H, L]."""
    return x.take_along_dim(order[..., None], dim=2)
