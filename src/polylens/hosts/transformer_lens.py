"""HookedTransformer (TransformerLens 3.9) and TransformerBridge (3.9 and 4)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polylens.activations import Activation, activation
from polylens.errors import AttachmentError, PolylensError, UnsupportedModel
from polylens.hosts.base import Emitter, MLPSite, Norm, Weights
from polylens.hosts.junction import Function, Junction, Wiring
from polylens.weights import GLUWeights, MLPWeights

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}
_ROLES = ("W_in", "W_out", "W_gate", "b_gate", "b_in", "b_out")
_ACTIVATIONS = ("act", "act_fn", "activation_fn", "activation", "gelu_impl")


class TransformerLensHost:
    """Implements `hosts.base.Host` for both of TransformerLens' model classes."""

    def __init__(self, model: Any) -> None:
        self.model = self.module = model
        self.is_bridge = hasattr(model, "_hook_registry")
        self.name = "TransformerBridge" if self.is_bridge else "HookedTransformer"
        self._wirings: dict[int, Wiring] = {}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self._forward(tokens, attention_mask, "logits")

    def run(self, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        self._forward(tokens, attention_mask, None)

    def _forward(self, tokens: Tensor, mask: Tensor | None, return_type: str | None) -> Any:
        extra = {} if mask is None else {"attention_mask": mask.to(self.device)}
        return self.model(tokens.to(self.device), return_type=return_type, **extra)

    def sample_tokens(self, n_seq: int, seq_len: int, seed: int) -> Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            seq_len = min(seq_len, getattr(self.model.cfg, "n_ctx", None) or seq_len)
            start = self._first_token(n_seq)
            try:
                if not self.is_bridge:
                    return self._continue(start, seq_len)
                return self.model.generate(
                    start,
                    max_new_tokens=seq_len - 1,
                    stop_at_eos=False,
                    do_sample=True,
                    temperature=1.0,
                    prepend_bos=False,
                    return_type="tokens",
                    verbose=False,
                )
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                raise UnsupportedModel(
                    f"{self.name} could not generate text to calibrate on ({error}); give tokens="
                ) from error

    def _continue(self, tokens: Tensor, seq_len: int) -> Tensor:
        # HookedTransformer.generate (3.9) shifts positions twice when it uses its cache
        from transformer_lens import HookedTransformerKeyValueCache  # type: ignore

        cache = HookedTransformerKeyValueCache.init_cache(self.model.cfg, self.device, len(tokens))
        while tokens.shape[1] < seq_len:
            logits = self.model(tokens[:, -1:], past_kv_cache=cache)[:, -1]
            new = torch.multinomial(logits.float().softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    def _first_token(self, n_seq: int) -> Tensor:
        bos = getattr(getattr(self.model, "tokenizer", None), "bos_token_id", None)
        if bos is None:
            return torch.randint(self.model.cfg.d_vocab, (n_seq, 1)).to(self.device)
        return torch.full((n_seq, 1), bos, device=self.device)

    def sites(self) -> tuple[list[MLPSite], dict[int, str]]:
        candidates: dict[int, list[Wiring]] = {}
        refused: dict[int, str] = {}
        for layer, block in enumerate(self.model.blocks):
            mlp = getattr(block, "mlp", None)
            if mlp is None:
                refused[layer] = f"layer {layer}: block has no MLP"
            else:
                candidates[layer] = self._candidate_wirings(block, mlp)
        captured = self._capture(candidates)
        sites = []
        for layer, wirings in candidates.items():
            path = f"blocks.{layer}.mlp"
            try:
                site, wiring = self._verified(layer, path, wirings, captured[layer])
            except PolylensError as error:
                refused[layer] = f"layer {layer} ({path}): {error}"
            else:
                sites.append(site)
                self._wirings[layer] = wiring
        return sites, refused

    def _candidate_wirings(self, block: Any, mlp: Any) -> list[Wiring]:
        if not self.is_bridge:
            return [Wiring(block, mlp, None, mlp, block, "mlp")]
        found = []
        if getattr(mlp, "name", None) is not None:
            found.append(Wiring(block, mlp, mlp.hook_in, mlp.hook_out, mlp, "hook_out"))
        first: Any = getattr(mlp, "in", None)
        last: Any = getattr(mlp, "out", None)
        if hasattr(first, "hook_in") and hasattr(last, "hook_out"):
            # containerless MLPs, and containers that add the residual inside
            found.append(Wiring(block, first, first.hook_in, last.hook_out, last, "hook_out"))
        return found

    def _capture(self, candidates: dict[int, list[Wiring]]) -> dict[int, list[Any]]:
        """(x, y) at every candidate wiring, from one tiny forward pass."""
        captured: dict[int, list[Any]] = {
            layer: [None] * len(wirings) for layer, wirings in candidates.items()
        }

        def keep(layer: int, i: int, x: Tensor, y: Tensor) -> None:
            captured[layer][i] = (x.detach().clone(), y.detach().clone())

        if any(p.is_meta for p in self.model.parameters()):
            raise UnsupportedModel("the model's weights are on the meta device; load them first")
        d_vocab = self.model.cfg.d_vocab
        tokens = (torch.arange(16).reshape(2, 8) * 37 + 11) % d_vocab
        training = {m: m.training for m in self.model.modules()}
        with ExitStack() as stack:
            for layer, wirings in candidates.items():
                for i, wiring in enumerate(wirings):
                    junction = Junction(wiring, partial(keep, layer, i), first=True)
                    stack.callback(junction.remove)
            for module in training:
                module.training = False
            try:
                with torch.no_grad():
                    self.run(tokens)
            finally:
                for module, flag in training.items():
                    module.training = flag
        return captured

    def _verified(
        self, layer: int, path: str, wirings: list[Wiring], captured: list[Any]
    ) -> tuple[MLPSite, Wiring]:
        mlp = self.model.blocks[layer].mlp
        reader = Reader(mlp, self._activation(mlp), gated_bias_after=not self.is_bridge)
        weights = reader.weights()
        best, chosen = float("inf"), None
        for wiring, pair in zip(wirings, captured, strict=True):
            if pair is None or pair[0].shape[-1] != weights.d_in:
                continue
            error = _relative_error(weights, *pair)
            if error < best:
                best, chosen = error, wiring
        if chosen is None:
            raise UnsupportedModel("no hook point carries its input and output")
        tolerance = TOLERANCE.get(weights.dtype, 1e-4)
        if not best <= tolerance:
            raise UnsupportedModel(
                f"not the normal form {type(weights).__name__} with {reader.act.name}: recomputed "
                f"outputs differ by {best:.2g} of the largest (tolerance {tolerance:.0e})"
            )
        site = MLPSite(
            layer=layer,
            path=path,
            kind="glu" if isinstance(weights, GLUWeights) else "mlp",
            activation=reader.act,
            d_in=weights.d_in,
            d_mlp=weights.d_mlp,
            d_out=weights.d_out,
            error=best,
            tensors=reader.tensors,
            weights=reader.weights,
        )
        return site, chosen

    def _activation(self, mlp: Any) -> Activation:
        original = getattr(mlp, "original_component", None)
        places = [mlp, original, getattr(original, "intermediate", None)]
        for place in places:
            for name in (*_ACTIVATIONS, "intermediate_act_fn"):
                candidate: Any = getattr(place, name, None)
                if callable(candidate):
                    return activation(candidate)
        return activation(str(self.model.cfg.act_fn))

    @contextmanager
    def observe(self, observers: Mapping[int, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
        with self._junctions(observers):
            yield

    @contextmanager
    def substitute(
        self, functions: Mapping[int, Callable[[Tensor, Tensor], Tensor]]
    ) -> Iterator[None]:
        with self._junctions(functions):
            yield

    @contextmanager
    def _junctions(self, functions: Mapping[int, Function]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, function in functions.items():
                junction = Junction(self._wiring(layer), function, first=True)
                stack.callback(junction.remove)
            yield

    def _wiring(self, layer: int) -> Wiring:
        if layer not in self._wirings:
            self.sites()
        return self._wirings[layer]

    def install(self, site: MLPSite, emitter: Emitter) -> Callable[[], None]:
        mlp = self.model.blocks[site.layer].mlp
        names = {name: f"hook_poly_{name}" for name in emitter.point_names}
        present = [name for name in mlp._modules if name.startswith("hook_poly_")]
        if present:
            raise AttachmentError(
                f"layer {site.layer} ({site.path}) has {present[0]} already: this model, or the "
                "one it was copied from, has a lens; detach that one first"
            )
        from transformer_lens.hook_points import HookPoint

        points: dict[str, nn.Module] = {name: HookPoint() for name in names}
        undo = ExitStack()
        try:
            for name, point in points.items():
                self._add_point(mlp, site.path, names[name], point, undo)
            junction = Junction(self._wiring(site.layer), _Installed(emitter, _Taps(points)))
            undo.callback(junction.remove)
        except BaseException:
            undo.close()
            raise
        return undo.close

    def _add_point(
        self, mlp: nn.Module, path: str, name: str, point: nn.Module, undo: ExitStack
    ) -> None:
        full = f"{path}.{name}"
        point.name = full  # type: ignore[assignment]
        mlp.add_module(name, point)
        undo.callback(mlp._modules.pop, name, None)
        if self.is_bridge:
            registries = [self.model._hook_registry]
        else:
            registries = [self.model.mod_dict, self.model.hook_dict]
        for registry in registries:
            registry[full] = point
        undo.callback(self._forget, full)

    def _forget(self, full: str) -> None:
        # looked up anew: weight processing and setup() make new dictionaries
        if self.is_bridge:
            self.model._hook_registry.pop(full, None)
            self.model._block_alias_cache = None
        else:
            self.model.mod_dict.pop(full, None)
            self.model.hook_dict.pop(full, None)

    def norm(self, site: MLPSite) -> Norm:
        block = self.model.blocks[site.layer]
        modules = {n: m for n in ("ln2", "ln1") if (m := getattr(block, n, None)) is not None}
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        inputs: list[Tensor] = []

        def keep(name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
            seen[name] = (args[0].detach().double(), out.detach().double())

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(partial(keep, name)).remove)
            stack.enter_context(
                self.observe({site.layer: lambda x, y: inputs.append(x.detach().double())})
            )
            with torch.no_grad():
                self.run((torch.arange(16).reshape(2, 8) * 37 + 11) % self.model.cfg.d_vocab)
        for name, (before, after) in seen.items():
            if after.shape == inputs[0].shape and torch.allclose(after, inputs[0], atol=1e-5):
                norm = _matching_norm(modules[name], before, after)
                if norm is not None:
                    return norm
        raise UnsupportedModel(
            f"layer {site.layer} ({site.path}) does not read the output of a LayerNorm or RMSNorm, "
            "so inputs='norm' says nothing about it; give tokens="
        )


class Reader:
    """Reads an MLP component's weights by role; a bound method of it survives deepcopy.

    gated_bias_after: HookedTransformer adds a gated MLP's b_in after the product, which is
    b_in @ W_out in the output.
    """

    def __init__(self, mlp: nn.Module, act: Activation, gated_bias_after: bool) -> None:
        self.mlp = mlp
        self.act = act
        self.gated_bias_after = gated_bias_after

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for role in _ROLES:
            tensor = getattr(self.mlp, role, None)
            if isinstance(tensor, Tensor):
                found[role] = tensor.detach()
        return found

    def weights(self) -> Weights:
        tensors = self.tensors()
        if not {"W_in", "W_out"} <= tensors.keys():
            raise UnsupportedModel(
                f"{type(self.mlp).__name__} has no matrices W_in and W_out (mixture of experts, "
                "or a quantised or custom MLP)"
            )
        if "W_gate" not in tensors:
            tensors.pop("b_gate", None)
            return MLPWeights(act=self.act, **tensors)
        if self.gated_bias_after and "b_in" in tensors:
            W_out, b_in = tensors["W_out"], tensors.pop("b_in")
            if b_in.any():
                b_out = tensors.get("b_out", torch.zeros_like(W_out[0])).double()
                tensors["b_out"] = (b_out + b_in.double() @ W_out.double()).to(W_out.dtype)
        return GLUWeights(act=self.act, **tensors)


class _Taps:
    """hosts.base.Tap over HookPoints."""

    def __init__(self, points: dict[str, nn.Module]) -> None:
        self.points = points

    def wants(self, name: str) -> bool:
        point = self.points[name]
        return bool(
            point._forward_hooks
            or point._forward_pre_hooks
            or point._backward_hooks
            or point._backward_pre_hooks
        )

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.points[name](value)


class _Installed:
    def __init__(self, emitter: Emitter, taps: _Taps) -> None:
        self.emitter, self.taps = emitter, taps

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        out = self.emitter(x, y, self.taps)
        return None if out is y else out


def _relative_error(weights: Weights, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        difference = (weights(x.to(weights.dtype)).double() - y.double()).abs().max()
        return float(difference / y.double().abs().max().clamp(min=1e-30))


def _matching_norm(module: nn.Module, before: Tensor, after: Tensor) -> Norm | None:
    """The normalisation that takes `before` to `after`, by what it computes."""
    original = getattr(module, "original_component", None) or module
    weight = next(
        (w for n in ("weight", "w") if (w := getattr(original, n, None)) is not None), None
    )
    bias = next((b for n in ("bias", "b") if (b := getattr(original, n, None)) is not None), None)
    weights = [None] if weight is None else [None, weight.detach(), 1 + weight.detach()]
    for centred in (True, False):
        plain = before - before.mean(-1, keepdim=True) if centred else before
        plain = plain / plain.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        for w in weights:
            b = bias.detach() if isinstance(bias, Tensor) and w is not None else None
            out = plain if w is None else plain * w.double()
            out = out if b is None else out + b.double()
            if (out - after).norm() <= 2e-2 * after.norm():
                return Norm(centred, w, b)
    return None
