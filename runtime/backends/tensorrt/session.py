"""The Session on TensorRT: contexts per profile, the KV pool in device memory, decode steps as CUDA graphs.

    host                         one stream
    RunInputs.put        ->      copy of the small inputs
    (bind, enqueue)      ->      the model, caches written in place; for decode one recorded graph
    copy_rows / copy_top ->      whole rows of logits, or the 64 most likely of each: kilobytes
    synchronize

Needs `tensorrt` or `tensorrt_rtx`, and cuda-python; both are handed in. Knows the tensor names of
export/graph/portable/decoder.py's graph, and nothing of requests or text.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Artifact
from runtime.artifact.plan_files import PROFILES, PlanFile, PlanInfo, Shape
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.cuda.kv_pool import DeviceKv, slot_unit
from runtime.backends.tensorrt.decode_graphs import DecodeGraphs, SlotEnds
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.backends.tensorrt.plan import LoadedPlan, ProfileContext
from runtime.backends.tensorrt.staging import RunInputs, RunOutputs
from runtime.errors import InvalidPlan, InvalidSetting
from runtime.machine.memory import ALONE, MemoryShare, plan_slots
from runtime.machine.sizes import item_bytes
from runtime.session.feeds import TOP_IDS, padded_inputs
from runtime.session.host_rows import HostRows
from runtime.session.session import Batch, KvRows, SessionInfo, TopRows


class _Memory(Protocol):
    def free(self) -> None: ...


T = TypeVar("T", bound=_Memory)


class TrtSession:
    """Implements `runtime.session.session.TopSession`. Make it with `TrtSession.open`."""

    def __init__(
        self,
        loaded: LoadedPlan,
        cuda: Cuda,
        resources: ExitStack,
        *,
        kv: DeviceKv,
        contexts: Mapping[str, ProfileContext],
        graphs: DecodeGraphs,
        inputs: RunInputs,
        outputs: RunOutputs,
        num_top: int,
        info: SessionInfo,
    ) -> None:
        self._loaded, self._cuda, self._resources = loaded, cuda, resources
        self._kv, self._contexts, self._graphs = kv, contexts, graphs
        self._inputs, self._outputs = inputs, outputs
        self._num_top, self._info = num_top, info
        self._slot_len = kv.tail_shape[1]
        self._ends = SlotEnds(info.num_slots, self._slot_len)

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        plan: PlanFile,
        *,
        library: TrtLibrary,
        cuda: Cuda,
        max_batch: int,
        capacity: int,
        kv_memory: int | None = None,
        share: MemoryShare = ALONE,
    ) -> "TrtSession":
        """Load a plan and give it memory; everything a run needs is allocated here.

        library: `tensorrt` or `tensorrt_rtx`, as the plan's target says
        max_batch: most slots; fewer if the plan or the memory has no room for them
        capacity: tokens of a slot
        kv_memory: bytes for the cache, None is 80 % of what is free when the plan is loaded, or this model's share
            of that beside others

        InvalidPlan if the plan cannot be used, InvalidSetting if it was built for shorter slots, DeviceOutOfMemory.
        `cuda` is closed with the session, and if this fails.
        """
        with ExitStack() as stack:
            stack.callback(cuda.close)
            opening = _Opening(stack, artifact, plan, library, cuda)
            return opening.session(cls, max_batch=max_batch, capacity=capacity, kv_memory=kv_memory, share=share)

    @property
    def info(self) -> SessionInfo:
        return self._info

    @property
    def num_top(self) -> int:
        return self._num_top

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch; logits float32 `[R, vocab_size]` in pinned memory, overwritten by the next call."""
        self._enqueue(batch)
        logits = self._outputs.copy_rows(len(batch.logits_idx))
        self._cuda.synchronize()
        return logits

    def run_top(self, batch: Batch) -> TopRows:
        """Run the batch; its rows' most likely tokens in pinned memory, overwritten by the next call."""
        num_rows = self._enqueue(batch)
        top = self._outputs.copy_top(num_rows, len(batch.logits_idx))
        self._cuda.synchronize()
        return top.rows()

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of every layer's K and V; runs that follow see it."""
        self._kv.copy_slot(source, target, num_tokens)
        self._ends.note_copy(target, num_tokens)

    def read_slot(self, slot: int, start: int, stop: int) -> HostRows:
        """Copy those positions of every layer's K and V to the host."""
        return self._kv.read_slot(slot, start, stop)

    def write_slot(self, slot: int, start: int, rows: KvRows) -> None:
        """Copy them to the device, to another place perhaps."""
        assert isinstance(rows, HostRows), "rows of another session"
        self._kv.write_slot(slot, start, rows)
        self._ends.note_copy(slot, start + rows.arrays[0].shape[1])

    def drop_slot(self, slot: int) -> None:
        """Forget what a slot holds; its memory was allocated with the pool and stays."""

    def close(self) -> None:
        """Wait for the device, then release graphs, contexts, memory and the stream. Idempotent."""
        self._contexts = {}
        self._resources.close()

    def _enqueue(self, batch: Batch) -> int:
        """Put a run on the stream; how many rows of logits it gives, those of idle rows included."""
        num_rows, chunk = batch.token_ids.shape
        assert 0 <= batch.first_slot <= self._info.num_slots - num_rows, "slots outside the pool"
        assert int(batch.past_len.max()) + chunk <= self._info.capacity, "a row longer than its slot"
        is_decode = chunk == 1 and batch.first_slot == 0 and len(batch.logits_idx) <= num_rows
        padded = self._ends.padded(batch, self._graphs.bucket_of(num_rows)) if is_decode else None
        self._ends.note_run(batch)
        run = batch if padded is None else padded
        inputs = self._inputs.put(padded_inputs(run))

        def bind(context: ProfileContext) -> None:
            self._bind(context, run, inputs)

        def take_outputs() -> None:
            self._kv.take_outputs(run.first_slot, len(run.past_len))

        if padded is not None:
            self._graphs.run(len(run.past_len), bind, take_outputs)
        else:
            context = self._context_for(run)
            bind(context)
            context.enqueue()
            take_outputs()
        return len(run.logits_idx)

    def _context_for(self, batch: Batch) -> ProfileContext:
        num_rows, chunk = batch.token_ids.shape
        shape = Shape(num_rows, chunk, len(batch.logits_idx), self._slot_len)
        return self._contexts[self._loaded.profile_for(shape)]

    def _bind(self, context: ProfileContext, batch: Batch, inputs: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        for name, (address, shape) in inputs.items():
            context.set_input(name, address, shape)
        cache_shape = (len(batch.past_len), *self._kv.tail_shape)
        for cache in self._kv.addresses(batch.first_slot):
            context.set_input(cache.names.past, cache.past, cache_shape)
            context.set_output(cache.names.present, cache.present)
        for name, address in self._outputs.addresses(len(batch.logits_idx)).items():
            context.set_output(name, address)


class _Opening:
    """Takes memory in the order opposite to which it is given back: contexts die before what they point to."""

    def __init__(self, stack: ExitStack, artifact: Artifact, plan: PlanFile, library: TrtLibrary, cuda: Cuda) -> None:
        assert plan.info is not None
        self._stack, self._cuda, self._artifact = stack, cuda, artifact
        self._info, self._dims = plan.info, artifact.manifest.dims
        self._contract = artifact.manifest.kv_of(plan.info.dialect)
        self._loaded = LoadedPlan(library, plan.path, plan.info)
        stack.callback(self._loaded.close)
        self._names = self._contract.cache_names(self._dims.kv_layers)
        self._is_in_place = self._loaded.is_aliased({name.present: name.past for name in self._names})
        if plan.info.dialect == "trt" and not self._is_in_place:
            raise InvalidPlan(f"{plan.path} does not write its KV cache in place; build the engine again")

    def session(
        self, cls: type[TrtSession], *, max_batch: int, capacity: int, kv_memory: int | None, share: MemoryShare
    ) -> TrtSession:
        info, dims, cuda, loaded = self._info, self._dims, self._cuda, self._loaded
        slot_len = _slot_len(info, capacity, dims.num_kv_heads * dims.head_dim * item_bytes(self._contract.dtype))
        scratch = self._own(cuda.allocate(max(1, loaded.scratch_bytes), "activations"))
        max_batch = min(max_batch, info.max_batch)
        num_logits = max_batch * info.verify_tokens
        max_tokens = max(info.profile(name).rows.high * info.profile(name).tokens.high for name in PROFILES)
        inputs = self._own(
            RunInputs(cuda, max_tokens=max_tokens, max_rows=info.max_batch, max_logits=max(num_logits, info.max_batch))
        )
        num_top = int(loaded.engine.get_tensor_shape(TOP_IDS)[1])
        outputs = self._own(RunOutputs(cuda, max_logits=num_logits, vocab_size=dims.vocab_size, num_top=num_top))
        per_token = dims.kv_bytes_per_token(self._contract.dtype) * (1 if self._is_in_place else 2)
        budget = share.of_device(cuda.free_memory()) if kv_memory is None else kv_memory
        num_slots = plan_slots(max_batch=max_batch, capacity=slot_len, bytes_per_token=per_token, budget=budget)
        kv = self._own(self._kv(num_slots, slot_len))
        graphs = self._own(DecodeGraphs(cuda, num_slots, lambda: loaded.context("decode", cuda, scratch)))
        contexts = {profile: loaded.context(profile, cuda, scratch) for profile in PROFILES}
        self._stack.callback(cuda.synchronize)
        session_info = SessionInfo(
            device=f"{info.target} {info.version} on {cuda.device_name()}",
            num_slots=num_slots,
            capacity=min(capacity, slot_len),
            vocab_size=dims.vocab_size,
            is_ragged=True,
            kv_bytes_per_token=per_token,
            is_cut_exact=False,
            max_scored=info.verify_tokens,
            max_chunk=info.prefill_chunk,
            dialect=info.dialect,
        )
        return cls(
            loaded,
            cuda,
            self._stack.pop_all(),
            kv=kv,
            contexts=contexts,
            graphs=graphs,
            inputs=inputs,
            outputs=outputs,
            num_top=num_top,
            info=session_info,
        )

    def _kv(self, num_slots: int, slot_len: int) -> DeviceKv:
        return DeviceKv(
            self._cuda,
            self._names,
            num_slots=num_slots,
            kv_heads=self._dims.num_kv_heads,
            slot_len=slot_len,
            head_dim=self._dims.head_dim,
            item_bytes=item_bytes(self._contract.dtype),
            in_place=self._is_in_place,
        )

    def _own(self, memory: T) -> T:
        """Free it with the session, or if opening fails."""
        self._stack.callback(memory.free)
        return memory


def _slot_len(info: PlanInfo, capacity: int, token_bytes: int) -> int:
    """Tokens of a slot in the pool: at least `capacity`, what the plan takes, and such that slots are aligned."""
    span, unit = info.profile("decode").capacity, slot_unit(token_bytes)
    if capacity > span.high:
        raise InvalidSetting(
            f"--max-len {capacity:,} is beyond the {span.high:,} tokens of a slot that {info.stem} was built for; "
            "lower it, or build an engine with a larger --max-len"
        )
    length = -(-max(capacity, span.low) // unit) * unit
    if length > span.high:
        raise InvalidPlan(
            f"{info.stem} takes slots of {span.low:,} to {span.high:,} tokens, none of them a multiple of {unit}: "
            "build an engine with such a --max-len"
        )
    return length
