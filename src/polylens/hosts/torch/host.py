"""Any torch module: Hugging Face models, classifiers, custom transformers."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from polylens.checks import Expert, Layer
from polylens.errors import AttachmentError, InvalidInputError, PolylensError, UnsupportedModel
from polylens.hosts.base import (
    TOLERANCE,
    Arrival,
    Emitter,
    Function,
    Host,
    MLPSite,
    Norm,
    Observer,
    openings,
    relative_error,
    without_padding,
    written,
)
from polylens.hosts.batch import (
    DECODER,
    TOKENS,
    UNSCORED,
    Batch,
    Inputs,
    accepted,
    bare,
    batch_of,
    is_pretrained,
    plain,
    require_taken,
    takes,
)
from polylens.hosts.moe import ExpertPassages, ExpertSite, Member, find_experts, in_order, no_norm
from polylens.hosts.norms import Call, norm_behind, norm_giving, norm_read
from polylens.hosts.offloaded import is_dispatched, parameter
from polylens.hosts.passage import Emitting, PolyPoint, Step, Taps, editing, observing, substituting
from polylens.hosts.quiet import quiet
from polylens.hosts.recording import position
from polylens.hosts.torch.copying import Place, clean_copy, place_of, require_apart
from polylens.hosts.torch.dataflow import Block, find_blocks
from polylens.hosts.torch.guessing import Example, guessed_inputs
from polylens.hosts.torch.splice import Splice, around

_SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_beams": 1}


class TorchHost(Host):
    """Any torch module, with torch hooks only.

    Hook points are modules `hook_poly_<name>` under the site's path. In a classifier with
    several hidden layers neighbouring sites share a linear map: the out-projection of one is
    the in-projection of the next.

    Args:
        model: any torch module.
        example_inputs: arguments of one small forward pass: a mapping of keywords, a tuple of
            positional arguments, or one tensor. Guessed where None.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        super().__init__(model, "Hugging Face" if _is_hugging_face(model) else "torch")
        self._examples: Example | None = None
        if isinstance(example_inputs, Mapping):
            self._examples = dict(example_inputs)
        elif example_inputs is not None:
            single = isinstance(example_inputs, Tensor)
            self._examples = (example_inputs,) if single else tuple(example_inputs)
        self._offered: list[Example] = []
        self._from_zero: bool | None = None
        self._blocks: dict[int, Block] = {}
        self._experts: dict[Layer, ExpertSite] = {}
        self._passages = ExpertPassages()

    @property
    def tokenizer(self) -> Any | None:
        own = getattr(self.model, "tokenizer", None)
        return self._stored_tokenizer if own is None else own

    @cached_property
    def _stored_tokenizer(self) -> Any | None:
        """That which lies where the model was loaded from; nothing is downloaded."""
        source = getattr(getattr(self.module, "config", None), "_name_or_path", None)
        if not source or not _is_hugging_face(self.module):
            return None
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
        except Exception:  # whatever is missing there, ids name the tokens as well
            return None
        return found if len(found) <= (self.d_vocab or 0) else None

    @property
    def _has_decoder(self) -> bool:
        """Whether a decoder beside an encoder reads tokens of its own."""
        config = getattr(self.module, "config", None)
        return getattr(config, "is_encoder_decoder", False) and DECODER in accepted(self.module)

    @property
    def d_vocab(self) -> int | None:
        table = self._embedding()
        return None if table is None else table.num_embeddings

    @property
    def n_positions(self) -> int | None:
        """Of learned positions; others may be longer than the model was trained with."""
        text = getattr(getattr(self.module, "config", None), "get_text_config", lambda: None)()
        n = getattr(text, "max_position_embeddings", None)
        sizes = (m.num_embeddings for m in self.module.modules() if _is_embedding(m))
        return n if n in set(sizes) and n != self.d_vocab else None

    def _embedding(self) -> nn.Embedding | None:
        module: Any = self.module
        if not _is_hugging_face(module):
            return None
        try:
            table = module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return table if _is_embedding(table) else None

    @property
    def reads_tokens(self) -> bool:
        if _is_hugging_face(self.module):
            return self.module.main_input_name == "input_ids"
        known = self._examples
        values = known.values() if isinstance(known, dict) else known or ()
        first = next((v for v in values if isinstance(v, Tensor)), None)
        return first is not None and not first.is_floating_point()

    def sites(self) -> tuple[list[MLPSite], dict[Layer, str]]:
        blocks, refused = self._found()
        self._blocks = {block.layer: block for block in blocks}
        if any(block.rounds for block in blocks):
            self.rounding = TOLERANCE[torch.bfloat16]  # which has 8 bits, too
        assert self._examples is not None
        experts, problems = find_experts(self.module, partial(self._example_run, self._examples))
        self._experts = {site.layer: site for site in experts}
        if isinstance(self._examples, dict) and isinstance(self._examples.get(TOKENS), Tensor):
            self._counts_from_zero(self._examples[TOKENS])  # not within somebody's hooks
        sites = sorted([*map(_site, blocks), *experts], key=in_order)
        return sites, _still_refused(refused, experts, problems) | _beside(blocks, problems)

    def offer(self, inputs: Any) -> None:
        if isinstance(inputs, Mapping):
            some = self.given(inputs).rows(slice(0, 2))
            self._offered = [dict(some.kwargs)]
        elif isinstance(inputs, Tensor) and inputs.dim() > 1:
            self._offered = [(inputs[:8],)]

    def _candidates(self) -> Iterator[Example]:
        """Examples to try: guesses that are as whole as what is offered, then that itself."""
        if self._examples is not None:
            yield self._examples
            return
        offered = next((each for each in self._offered if isinstance(each, dict)), {})
        for guess in guessed_inputs(self.module):
            if not offered or (isinstance(guess, dict) and _main_names(offered) <= guess.keys()):
                yield guess
        yield from self._offered

    def _found(self) -> tuple[list[Block], dict[int, str]]:
        problem: Exception | None = None
        for inputs in self._candidates():
            try:
                found = find_blocks(self.module, partial(self._example_run, inputs))
            except _ForwardFailed as failure:
                problem = failure.__cause__  # type: ignore[assignment]
            else:
                self._examples = inputs
                return found
        raise UnsupportedModel(
            f"{type(self.module).__name__} needs inputs that polylens cannot guess"
            f"{'' if problem is None else f' ({type(problem).__name__}: {problem})'}; give "
            "example_inputs=, the arguments of one small forward pass: a mapping, a tuple or a "
            "tensor"
        ) from problem

    def _example_run(self, inputs: Example) -> None:
        try:
            self._call_example(self.module, inputs)
        except Exception as error:
            raise _ForwardFailed from error

    def _call_example(self, module: nn.Module, inputs: Example) -> Any:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        return self._call(module, bare(args, kwargs))

    def _call(self, module: nn.Module, batch: Batch) -> Any:
        floating = (p.dtype for p in module.parameters() if p.is_floating_point())
        batch = batch.to(self.device, next(floating, torch.float32))
        return module(*batch.args, **batch.kwargs)

    def _given(self, inputs: Inputs, attention_mask: Tensor | None) -> Batch:
        args, kwargs = (), dict[str, Any]()
        if isinstance(inputs, Mapping):
            kwargs = plain(inputs)
        elif _is_hugging_face(self.module):
            main = getattr(self.module, "main_input_name", TOKENS)
            kwargs = {main if inputs.is_floating_point() else TOKENS: inputs}
        else:
            args = (inputs,)
        if attention_mask is not None and takes(self.module, "attention_mask"):
            kwargs["attention_mask"] = attention_mask
        kwargs, labels = self._with_decoder_tokens(kwargs)
        unscored = kwargs.get(UNSCORED)
        if UNSCORED not in accepted(self.module):
            kwargs.pop(UNSCORED, None)
        require_taken(self.module, kwargs)
        batch = batch_of(
            args, kwargs, attention_mask=attention_mask, labels=labels, unscored=unscored
        )
        return self._with_positions(batch)

    def _with_decoder_tokens(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Without labels, which say what is scored, and what a decoder reads; and the labels.

        Raises:
            InvalidInputError: neither says what the decoder reads.
        """
        kwargs = dict(kwargs)
        labels = kwargs.pop("labels", None)
        if not self._has_decoder or {DECODER, "decoder_inputs_embeds"} & kwargs.keys():
            return kwargs, labels
        shifted = _shifted(self.module, labels) if isinstance(labels, Tensor) else None
        if shifted is None:
            raise InvalidInputError(
                f"{type(self.module).__name__} is an encoder with a decoder, and "
                f"{', '.join(kwargs) or 'nothing'} alone does not say what the decoder reads; give "
                f"a mapping with {DECODER} too, or with labels (what a tokenizer returns with "
                "text_target=), or attach to model.get_encoder()"
            )
        return {**kwargs, DECODER: shifted}, labels

    def _with_positions(self, batch: Batch) -> Batch:
        """With the positions of sequences padded on the left, where the model counts from 0.

        As `generate` of Hugging Face does. Models that find their positions themselves get the
        same; what counts from elsewhere (RoBERTa) is left to do that, which a small pass shows.
        """
        stream = batch.streams.get(TOKENS)
        ids = batch.kwargs.get(TOKENS)
        if (
            stream is None
            or not isinstance(ids, Tensor)
            or not _is_hugging_face(self.module)
            or not takes(self.module, "position_ids")
            or "position_ids" in batch.kwargs
            or bool(stream.there[:, 0].all())
            or not self._counts_from_zero(ids)
        ):
            return batch
        positions = (stream.there.long().cumsum(-1) - 1).clamp(min=0)
        return replace(batch, kwargs={**batch.kwargs, "position_ids": positions})

    def _counts_from_zero(self, ids: Tensor) -> bool:
        """Whether positions 0, 1, ... are those of tokens [1, pos] for the model itself."""
        if self._from_zero is None:
            self._from_zero = takes(self.module, "position_ids") and self._same_from_zero(ids)
        return self._from_zero

    def _same_from_zero(self, ids: Tensor) -> bool:
        examples = self._examples if isinstance(self._examples, dict) else {}
        known = examples if TOKENS in examples else {TOKENS: ids[:1]}
        ids = known[TOKENS]
        known = {**known, **dict.fromkeys({"use_cache"} & accepted(self.module), False)}
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        with quiet(self.module):
            try:
                own, same = (
                    next(_floats(self._call(self.module, bare((), {**known, **more}))))
                    for more in ({}, {"position_ids": positions})
                )
            except (RuntimeError, ValueError, TypeError, AttributeError, StopIteration):
                return False
        return relative_error(same, own) <= TOLERANCE[own.dtype]

    def stream(self, layer: Layer) -> str:
        """Of the innermost part of a Hugging Face model that the layer is in."""
        inner = self.module
        if not _is_hugging_face(inner):
            return TOKENS
        if isinstance(layer, Expert):
            path = self._expert(layer).stack.path
        else:
            path = self._block(layer).path
        model: Any = self.module
        decoder = model.get_decoder() if self._has_decoder else None
        for module in around(self.module, path):
            if module is decoder:
                return DECODER
            inner = module if _is_hugging_face(module) else inner
        main: Any = inner.main_input_name
        return main if {main, "inputs_embeds"} & accepted(inner) else ""

    def forward(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Any:
        out = self._forward(self.module, self.given(inputs, attention_mask))
        if isinstance(out, Tensor):
            return out
        named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        if named is None and isinstance(out, Mapping):
            return out
        return out[0] if named is None else named

    def logits(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> Tensor:
        """[batch, pos] token ids (or a float tensor, for models of images or features).

        Raises:
            UnsupportedModel: a model without a head, which returns hidden states.
        """
        out = self.forward(inputs, attention_mask)
        if isinstance(out, Mapping):
            raise UnsupportedModel(
                f"{type(self.module).__name__} has no logits, it returns {', '.join(out)}; use "
                "report(..., loss=False), or a model with a head"
            )
        return out

    def run(self, inputs: Inputs | Batch, attention_mask: Tensor | None = None) -> None:
        batch = self.given(inputs, attention_mask)
        self._forward(self._trunk(batch), batch)

    def _forward(self, module: nn.Module, batch: Batch) -> Any:
        if "use_cache" in accepted(module) and _is_hugging_face(module):
            batch = replace(batch, kwargs={"use_cache": False, **batch.kwargs})
        try:
            return self._call(module, batch)
        except (AttributeError, TypeError, ValueError) as error:
            names = [n for n in self._examples or () if isinstance(n, str)]
            missing = [n for n in names if n not in batch.kwargs]
            if isinstance(error, PolylensError) or not missing:
                raise
            raise UnsupportedModel(
                f"{type(module).__name__} does not run on {', '.join(batch.kwargs)} alone "
                f"({error}); give a mapping with {', '.join(missing)} too, or attach to the part "
                "of it that does not read that"
            ) from error

    def _trunk(self, batch: Batch) -> nn.Module:
        """The model without its head, where every block is in it and it takes the same."""
        trunk = getattr(self.module, "base_model", None) if is_pretrained(self.module) else None
        if not isinstance(trunk, nn.Module) or not batch.kwargs.keys() <= accepted(trunk):
            return self.module
        inside = set(trunk.modules())
        return trunk if all(b.owner in inside for b in self._blocks.values()) else self.module

    def sample_tokens(self, n_seq: int, seq_len: int, seed: int) -> Tensor:
        model: Any = self.module
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise UnsupportedModel(
                f"{type(model).__name__} cannot generate text to calibrate on; give tokens="
            )
        if self._has_decoder:
            raise UnsupportedModel(
                f"{type(model).__name__} writes about what its encoder reads; give that, and what "
                f"the decoder reads: a mapping with {DECODER} or labels"
            )
        text = model.config.get_text_config()
        bos, pad = (getattr(text, f"{name}_token_id", None) for name in ("bos", "pad"))
        seq_len = min(seq_len, getattr(text, "max_position_embeddings", None) or seq_len)

        def go_on(start: Tensor, n_new: int) -> Tensor:
            size = {"max_new_tokens": n_new, "min_new_tokens": n_new, "pad_token_id": pad or 0}
            return model.generate(start, attention_mask=torch.ones_like(start), **size, **_SAMPLING)

        with quiet(model, seed):
            starts = openings(n_seq, bos, text.vocab_size, self.device)
            return written(starts, seq_len, go_on, type(model).__name__)

    def observe(self, observers: Mapping[Layer, Observer]) -> AbstractContextManager[None]:
        return observing(self._join, observers)

    def substitute(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        return substituting(self._join, functions)

    def edit(self, functions: Mapping[Layer, Function]) -> AbstractContextManager[None]:
        return editing(self._join, functions)

    def _join(self, layer: Layer, function: Step, first: bool) -> Splice | Member:
        if isinstance(layer, Expert):
            return self._passages.join(self._expert(layer), function, first)
        block = self._block(layer)
        return Splice(self.module, block, self._end(block), function, first)

    def _block(self, layer: int) -> Block:
        if layer not in self._blocks:
            self.sites()
        return self._blocks[layer]

    def _expert(self, layer: Expert) -> ExpertSite:
        if layer not in self._experts:
            self.sites()
        return self._experts[layer]

    def _end(self, block: Block) -> nn.Module:
        """The module whose output a polynomial replaces."""
        return block.out.module

    def install(self, site: MLPSite, emitter: Emitter) -> Callable[[], None]:
        points = {name: PolyPoint(f"hook_poly_{name}") for name in emitter.point_names}
        with ExitStack() as undo:
            expert = isinstance(site, ExpertSite)
            owner = site.add_owner(undo) if expert else self._block(site.layer).owner  # type: ignore
            for point in points.values():
                owner.add_module(point.name, point)
                undo.callback(owner._modules.pop, point.name, None)
            undo.callback(self._join(site.layer, Emitting(emitter, Taps(points)), False).remove)
            self._points[site.layer] = points
            undo.callback(self._points.pop, site.layer, None)
            return undo.pop_all().close

    def copied(self, layers: Iterable[Layer]) -> tuple[nn.Module, dict[Layer, Place]]:
        """A copy of the module without a lens, and where in it these layers' activations are.

        Raises:
            AttachmentError: experts, or what `place_of` and `require_apart` refuse.
        """
        if is_dispatched(self.module):
            raise AttachmentError(
                "a model that accelerate has spread over devices, or offloaded, is not copied for "
                "an export; lens.save(path), load the model in one place (without device_map=), "
                "polylens.load(path, model) and export there"
            )
        if self._passages:
            raise AttachmentError(
                "a model with a lens on its experts cannot be exported; attach with layers= of "
                "the others only, or use lens.replaced()"
            )
        require_apart(self.module, self._blocks.values())
        blocks = {layer: self._block(layer) for layer in layers}  # type: ignore[arg-type]
        places = {n: place_of(self.module, block) for n, block in blocks.items()}
        return clean_copy(self.module), places

    def example_outputs(self, module: nn.Module) -> list[Tensor]:
        """What a module like the host's returns for the example inputs, floats only."""
        assert self._examples is not None
        with quiet(module):
            return list(_floats(self._call_example(module, self._examples)))

    def norm(self, site: MLPSite) -> Norm:
        if isinstance(site, ExpertSite):
            raise no_norm(site)
        layer, read = site.layer, list[Tensor]()
        with self.observe({layer: lambda arrival: read.append(arrival.x.detach().clone())}):
            passed = self._norm_calls()
        return norm_read(site, passed, read[0])

    def norms_behind(self, layers: Iterable[Layer], part: str) -> dict[Layer, Norm]:
        if part != "mlp":
            raise self._nameless()
        outputs: dict[Layer, Tensor] = {}

        def keep(layer: Layer, arrival: Arrival) -> None:
            outputs[layer] = arrival.y.detach().clone()

        # an expert's output is weighted before it goes anywhere
        plain = [layer for layer in layers if not isinstance(layer, Expert)]
        with self.observe({layer: partial(keep, layer) for layer in plain}):
            passed = self._norm_calls()
        found = {layer: norm_behind(passed, y) for layer, y in outputs.items()}
        return {layer: norm for layer, norm in found.items() if norm is not None}

    def final_norm(self) -> Norm:
        (module, before, _), norm = self._final_norm({})
        last = max(self._blocks, default=None)
        if last is None or last in self.norms_behind([last], "mlp"):
            return norm
        paths = (path for path, each in self.module.named_modules() if each is module)
        if position(next(paths, "")) == position(self._blocks[last].path):
            raise UnsupportedModel(
                f"{type(self.module).__name__} has its normalisations in the residual stream, so "
                "that tokens are no directions of what its layers write"
            )
        # what a layer writes must come to this norm as it is
        moved = torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0))
        moved = moved.to(before) * before.std()
        (_, after, _), _ = self._final_norm({last: lambda arrival: arrival.y + moved.to(arrival.y)})
        change = (after - before).reshape(-1, len(moved)).double()
        if torch.cosine_similarity(change, moved.double(), dim=-1).min() < 0.99:
            raise UnsupportedModel(
                f"{type(self.module).__name__}: its head does not read a norm of what its layers "
                "write, so that tokens are no directions of their outputs"
            )
        return norm

    def _final_norm(self, functions: Mapping[Layer, Function]) -> tuple[Call, Norm]:
        """The normalisation in front of the head, and what it read and returned."""
        read: list[Tensor] = []

        def keep(module: nn.Module, args: tuple) -> None:
            read.append(args[0].detach().clone())

        hook = self._head().register_forward_pre_hook(keep)
        try:
            with self.edit(functions):
                passed = self._norm_calls()
        finally:
            hook.remove()
        found = norm_giving(passed, read[-1]) if read else None
        if found is None:
            raise UnsupportedModel(
                f"{type(self.module).__name__}: there is no LayerNorm or RMSNorm in front of the "
                "unembedding"
            )
        return found

    def _norm_calls(self) -> list[Call]:
        """What the normalisations of the model read and return for the example inputs."""
        passed: list[Call] = []

        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                before, after = (without_padding(t).detach().clone() for t in (args[0], out))
                passed.append((module, before, after))

        if self._examples is None:
            self.sites()
        assert self._examples is not None
        with ExitStack() as stack:
            for module in self.module.modules():
                if "norm" in type(module).__name__.lower() or isinstance(module, nn.LayerNorm):
                    stack.callback(module.register_forward_hook(keep).remove)
            stack.enter_context(quiet(self.module))
            self._call_example(self.module, self._examples)
        return passed

    @property
    def embedding(self) -> Tensor:
        table = self._embedding()
        if table is None:
            raise self._nameless()
        return parameter(table, "weight")

    @property
    def unembedding(self) -> Tensor:
        return parameter(self._head(), "weight").T

    def _head(self) -> nn.Linear:
        module: Any = self.module
        head = module.get_output_embeddings() if _is_hugging_face(module) else None
        if not isinstance(head, nn.Linear):
            raise self._nameless()
        return head


class _ForwardFailed(Exception):
    """The example inputs do not fit the model."""


def _is_embedding(module: Any) -> TypeGuard[nn.Embedding]:
    return isinstance(module, nn.Embedding)


def _main_names(inputs: Mapping[str, Any]) -> set[str]:
    """What of these inputs decides through which layers they pass."""
    return {n for n in inputs if n.endswith(("input_ids", "values", "features", "embeds"))}


def _shifted(model: Any, labels: Tensor) -> Tensor | None:
    """What a decoder reads to predict these labels, by the model's own rule if it has one."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    rule = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    config = model.config
    if rule is None or config.pad_token_id is None or config.decoder_start_token_id is None:
        return None
    return rule(labels, config.pad_token_id, config.decoder_start_token_id)


def _is_hugging_face(module: Any) -> bool:
    return hasattr(module, "config") and hasattr(module, "main_input_name")


def _floats(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor) and out.is_floating_point():
        yield out
    elif isinstance(out, Mapping | tuple | list):
        for value in out.values() if isinstance(out, Mapping) else out:
            yield from _floats(value)


def _still_refused(
    refused: dict[int, str], experts: list[ExpertSite], problems: dict[str, str]
) -> dict[Layer, str]:
    """Without the stacks of experts that can be read, and why others cannot."""
    read = {site.stack.path for site in experts}
    still: dict[Layer, str] = {}
    for layer, reason in refused.items():
        if not any(f"{path} (" in reason for path in read):
            better = (p for path, p in problems.items() if f"{path} (" in reason)
            still[layer] = next((f"layer {layer}: {p}" for p in better), reason)
    return still


def _beside(blocks: list[Block], problems: dict[str, str]) -> dict[Layer, str]:
    """Why stacks of experts cannot be read whose shared experts are layers."""
    shared = {block.path.rpartition(".")[0]: block.layer for block in blocks}
    found = {path: shared.get(path.rpartition(".")[0]) for path in problems}
    return {n: f"layer {n}: {problems[path]}" for path, n in found.items() if n is not None}


def _site(block: Block) -> MLPSite:
    tensors = block.tensors()
    return MLPSite(
        layer=block.layer,
        path=block.path,
        kind=block.kind,
        activation=block.activation,
        d_in=tensors["W_in"].shape[0],
        d_mlp=tensors["W_in"].shape[1],
        d_out=tensors["W_out"].shape[1],
        error=block.error,
        dequantised=block.dequantised,
        parameters=block.parameters,
        weights=block.weights,
    )
