"""A model without weights: built on the meta device from its config, traced there, its work counted op by op.

Meta tensors have shapes and no values, so what a forward asks of values (is this mask all ones?) is answered yes, and
whether a fold is exact is left for the run, which proves each with the weights at hand.
"""

from __future__ import annotations

import collections
import contextlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from calib.errors import InputError, ModelError
from calib.model.blocks import Batch, Call, capture, find_stacks
from calib.model.linears import apply_rewrites, find_rewrites, linears, loop_over_experts
from calib.model.plan import BlockPlan, Plan, settle
from calib.model.sites import find_sites
from calib.model.trace import record, tensors_in
from calib.recipe import Recipe

UNPROVEN = "folds are proposals from shapes alone: each is proven, or dropped, when the weights are at hand"
POINTWISE = {"silu", "gelu", "sigmoid", "tanh", "exp", "erf", "pow", "rsqrt", "sqrt", "cos", "sin", "_softmax"}


@dataclass
class Work:
    """What one forward of one block asks of the machine.

    gemm: flops of matrix products with weights. attention: flops of the products inside attention, causal or not.
    moved: bytes read and written by everything else; pointwise: those of them that pass a transcendental function.
    ops: calls. peak: bytes of tensors alive at once, without inputs and weights.
    """

    gemm: int = 0
    attention: int = 0
    moved: int = 0
    pointwise: int = 0
    ops: int = 0
    peak: int = 0


@dataclass(eq=False)
class Skeleton:
    """A model on the meta device, its unproven plan, and the work of each block on one batch [rows, tokens].

    work: by block name; blocks that are alike share one. hidden: bytes of the hidden state between a stack's blocks for
    one batch in fp32, the largest of the stacks.
    """

    model: nn.Module
    plan: Plan
    rows: int
    tokens: int
    work: dict[str, Work]
    hidden: int

    @property
    def config(self) -> Any:
        return self.model.config


@contextlib.contextmanager
def known_config(name: object) -> Iterator[None]:
    """What transformers' config classes raise for values that no model can have, as ModelError."""
    try:
        yield
    except StrictDataclassError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = lines[-1].partition(": ")[2] or lines[-1]  # the first names the validator
        raise ModelError(f"the config of {name} describes no model ({cause})", "download or save it again") from error


def read_config(source: Any) -> Any:
    """A transformers config from a config, a config.json, a model folder or a hub id. Raises ModelError."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return source
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    try:
        if not file.is_file():
            if path.is_dir():
                raise ModelError(f"{source} has no config.json", "name a folder that holds a saved model, or a config")
            return AutoConfig.from_pretrained(str(source))
        values = json.loads(file.read_text(encoding="utf-8"))
        kind = CONFIG_MAPPING[values["model_type"]]
        with known_config(source):
            return kind.from_dict(values)
    except KeyError as error:
        cause = f"transformers does not know the architecture of {source} (model_type {error})"
        raise ModelError(cause, "update transformers, or check model_type in config.json") from error
    except ModelError:
        raise
    except Exception as error:  # config classes check their fields with errors of many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot read a config from {source} ({first[:160]})", "name a folder or a config.json"
        ) from error


def on_meta(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a config, without memory, every float in ``dtype``, in eval mode. Raises ModelError, InputError."""
    import transformers as hf

    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise InputError(f"the model is quantized already ({method})", "start from the float model")
    named = getattr(hf, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            if named is not None:
                model = named(config)
            else:
                mapping = hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
                auto: Any = hf.AutoModelForCausalLM if type(config) in mapping else hf.AutoModel
                model = auto.from_config(config)
            model.tie_weights()
    except (ValueError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"cannot build a model from this config ({type(error).__name__}: {str(error).splitlines()[0][:160]})",
            "check config.json, or update transformers",
        ) from error
    model = cast(nn.Module, model.to(dtype)).eval()
    return model.requires_grad_(False)


def skeleton(config: Any, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Skeleton:
    """Build, rewrite, trace and count. Blocks of equal modules and shapes are traced once. Raises ModelError."""
    model = on_meta(config, dtype)
    tokens = recipe.seq_len
    batch = _batch(model, recipe.batch_size, tokens)
    blocks: dict[str, BlockPlan] = {}
    work: dict[str, Work] = {}
    hidden = 0
    try:
        with _answering(config), torch.no_grad(), loop_over_experts(model):
            rewrites = find_rewrites(model, _batch(model, 1, 8))
            apply_rewrites(model, rewrites)
            found = linears(model)
            if not found:
                raise ModelError(f"{type(model).__name__} has no linear layers", "calib quantizes nn.Linear and Conv1D")
            stacks = find_stacks(model, batch)
            for stack in stacks:
                inputs = capture(model, stack, [batch])
                state = inputs.hidden[0]
                hidden = max(hidden, state.numel() * 4)
                known: dict[Any, tuple[list[Any], Work]] = {}
                for i, name in enumerate(stack.names):
                    block, call = model.get_submodule(name), inputs.calls[0][i]
                    alike = _signature(block)
                    if alike not in known:
                        with record(block) as trace:
                            call.run(block, state)
                        known[alike] = find_sites(trace, block), _count(block, call, state)
                    sites, work[name] = known[alike]
                    blocks[name] = BlockPlan(name, list(sites))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be traced without weights ({str(error).strip().splitlines()[0][:160]})",
            "name a folder or hub id that holds the weights: then one small batch is run instead",
        ) from error
    plan = Plan({}, stacks, blocks, rewrites, [UNPROVEN])
    settle(model, found, plan, recipe)
    return Skeleton(model, plan, recipe.batch_size, tokens, work, hidden)


def _batch(model: nn.Module, rows: int, tokens: int) -> Batch:
    ids = torch.ones(rows, tokens, dtype=torch.long, device="meta")
    if getattr(model, "main_input_name", "") == "input_features":  # sound: windows of one length, whatever was said
        config: Any = model.config
        mel, length = config.num_mel_bins, 2 * config.max_source_positions
        return {"input_features": torch.ones(rows, mel, length, device="meta"), "decoder_input_ids": ids}
    batch = {"input_ids": ids, "attention_mask": ids.clone()}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids.clone()
    return batch


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that differ in values at most."""
    modules = tuple((path, type(m).__name__) for path, m in block.named_modules())
    return modules, tuple((path, tuple(p.shape)) for path, p in block.named_parameters())


class _Answers(TorchDispatchMode):
    """Meta tensors asked for a value say yes (1); of an equality, no; and every element is nonzero.

    experts: of a mixture, whose masks [choices, rows] choose each expert for its even share of the rows.
    """

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.experts = experts
        self.equalities: collections.deque[Tensor] = collections.deque(maxlen=64)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            yes = id(args[0]) not in {id(t) for t in self.equalities}
            if dtype == torch.bool:
                return yes
            return 1.0 if dtype.is_floating_point else 1
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func is aten.nonzero.default:
            count, dims = args[0].numel(), args[0].dim()
            rows = -(-count // self.experts) if dims > 1 else count
            return torch.empty(rows, dims, dtype=torch.long, device="meta")
        out = func(*args, **(kwargs or {}))
        if func in (aten.eq.Scalar, aten.eq.Tensor):
            self.equalities.append(out)
        return out


@contextlib.contextmanager
def _answering(config: Any) -> Iterator[None]:
    text = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((n for name in names if isinstance(n := getattr(text, name, None), int) and n > 0), 1)
    with torch.device("meta"), _Answers(experts):
        yield


class _Meter(TorchDispatchMode):
    """Counts flops, bytes and live memory of everything that runs inside, into ``work``."""

    def __init__(self) -> None:
        super().__init__()
        self.work, self.live = Work(), 0
        self.holders: dict[int, int] = {}  # storage made inside -> tensors alive that show it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = tensors_in((args, kwargs)), tensors_in(out)
        old = {_storage(t) for t in given}
        for tensor in made:
            self._hold(tensor, _storage(tensor) not in old)
        if any(_storage(t) not in old for t in made) or func._schema.is_mutable:  # no mere view
            self._tally(func.overloadpacket.__name__, given, made)
        return out

    def _tally(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        self.work.ops += 1
        if name in ("mm", "addmm"):
            a, b = given[-2:]
            self.work.gemm += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name in ("bmm", "baddbmm"):
            a, b = given[-2:]
            self.work.attention += 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        else:
            moved = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in [*given, *made])
            self.work.moved += moved
            self.work.pointwise += moved if name.rstrip("_") in POINTWISE or name in POINTWISE else 0

    def _hold(self, tensor: Tensor, fresh: bool) -> None:
        key, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if key in self.holders:
            self.holders[key] += 1
        elif fresh:
            self.holders[key] = 1
            self.live += size
            self.work.peak = max(self.work.peak, self.live)
        else:
            return
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.live -= size


class _Attention(TorchFunctionMode):
    """Attention as one op without its [tokens, tokens] scores, which the kernels that run it never hold."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False), **(kwargs or {}))
        q, k, v = (given[name] for name in ("query", "key", "value"))
        self.work.attention += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return q.new_empty(*q.shape[:-1], v.shape[-1])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count(block: nn.Module, call: Call, state: Tensor) -> Work:
    """The work of one forward."""
    meter = _Meter()
    with meter, _Attention(meter.work):
        call.run(block, state)
    return meter.work
