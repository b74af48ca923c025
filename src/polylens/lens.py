"""`Lens`: polynomials beside every MLP of a model, readable, switchable and savable."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor
from torch.nn import Module

from polylens.checks import check_degree, check_layers, label
from polylens.errors import AttachmentError, InvalidInputError
from polylens.hosts.base import Host, Layer, MLPSite
from polylens.installed.emitter import Fitted, SiteEmitter
from polylens.polynomials.factored import Polynomial
from polylens.report.measure import measure
from polylens.report.report import Report
from polylens.saving import export
from polylens.saving import lens_file as artifact

# By id of the model; the installed emitters keep a lens alive as long as its model.
LENSES: "WeakValueDictionary[int, Lens]" = WeakValueDictionary()


def attached(model: Any) -> "Lens | None":
    """The lens attached to this model, or None."""
    return LENSES.get(id(model))


class Lens:
    """The polynomials of a model, attached to it. Made by `attach`.

    Attributes:
        layers: attached layers, in order; `lens[layer]` is the layer's Polynomial, and
            `lens[layer, expert]` that of an expert. As an argument, the number of a layer
            stands for the experts in it, too.
        sites: the MLPSite of each.
        degree: fitted degree.
        refused: reason for each layer that could not be read.
        inputs_summary: which input model the polynomials were fitted to.
        saved_report: the report that came with a loaded lens; None without one that can be read.
    """

    saved_report: Report | None = None

    def __init__(
        self,
        host: Host,
        sites: dict[Layer, MLPSite],
        polynomials: dict[Layer, Fitted],
        refused: dict[Layer, str],
        inputs_summary: str,
        exclude_first: bool,
    ) -> None:
        self.host = host
        self.sites = sites
        self.refused = refused
        self.inputs_summary = inputs_summary
        self.exclude_first = exclude_first
        self.degree = next(iter(polynomials.values())).degree
        self._emitters = {
            layer: SiteEmitter(sites[layer], polynomials[layer], exclude_first) for layer in sites
        }
        with ExitStack() as undo:
            for layer, site in sites.items():
                undo.callback(host.install(site, self._emitters[layer]))
            self._undo: ExitStack | None = undo.pop_all()
        for emitter in self._emitters.values():
            emitter.owner = self

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self.sites)

    @property
    def model_name(self) -> str:
        config = getattr(self.host.model, "cfg", None)
        return str(getattr(config, "model_name", None) or type(self.host.module).__name__)

    @property
    def is_attached(self) -> bool:
        return self._undo is not None

    def __getitem__(self, layer: Layer) -> Fitted:
        if layer not in self._emitters:
            experts = self._chosen([layer])
            raise InvalidInputError(f"layer {layer} is a mixture of experts; there are {experts}")
        return self._emitters[layer].polynomial

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.sites)

    def __enter__(self) -> "Lens":
        self._require_attached()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_attached:
            self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "detached"
        return (
            f"Lens({self.model_name}, {self.host.name}, {len(self)} layers, degree {self.degree}, "
            f"{self.inputs_summary}, {state})"
        )

    @contextmanager
    def replaced(
        self, layers: Iterable[Layer] | int | None = None, degree: int | None = None
    ) -> Iterator["Lens"]:
        """Within the context, these MLPs' outputs are those of their polynomials.

        Nestable: an inner context adds to or changes the outer one, which comes back on exit,
        also after an exception. With `exclude_first` position 0 of each sequence stays true.
        Without autograd and while nobody listens at or inside a layer, its polynomial reads the
        preactivations that the model computes anyway: a few elementwise operations more than
        the true layer. Otherwise it is evaluated beside the true layer, to the same values.

        Args:
            layers: one, several, or all (default).
            degree: 0 ... fitted degree (default), by truncation.

        Raises:
            InvalidInputError: unknown layer, degree above the fitted one.
            AttachmentError: the lens is detached.
            StalePolynomialError: weights changed since the fit.
        """
        self._require_attached()
        chosen, degree = self._ready(layers, degree)
        with self._flowing(dict.fromkeys(chosen, degree)):
            yield self

    def _ready(
        self, layers: Iterable[Layer] | int | None, degree: int | None
    ) -> tuple[list[Layer], int]:
        """The layers and the degree that were asked for, fitted to the weights there are now."""
        chosen = self._chosen(layers)
        degree = self.degree if degree is None else check_degree(degree, self.degree, "attach")
        for layer in chosen:
            self._emitters[layer].verify()
        return chosen, degree

    @contextmanager
    def _flowing(self, degrees: Mapping[Layer, int | None]) -> Iterator[None]:
        """Within the context, layer's polynomial of this degree (None: the true output) flows."""
        before = {layer: self._emitters[layer].replacing for layer in degrees}
        for layer, degree in degrees.items():
            self._emitters[layer].replacing = degree
        try:
            yield
        finally:
            for layer, degree in before.items():
                self._emitters[layer].replacing = degree

    def report(
        self,
        tokens: Tensor,
        *,
        degree: int | None = None,
        layers: Iterable[Layer] | int | None = None,
        attention_mask: Tensor | None = None,
        batch_size: int = 8,
        loss: bool = True,
        prefixes: bool = False,
        worst: int = 10,
        decode: Callable[[list[int]], str] | None = None,
        progress: bool = True,
    ) -> Report:
        """R2 by layer and degree on held-out tokens, and what replacing each layer costs.

        Always against the true model: an enclosing `replaced` is suspended meanwhile. Give tokens
        of another source than those of `attach` to see what carries over to other text.

        Args:
            tokens: [batch, pos] token ids, best disjoint from those of `attach`; floats
                [batch, ...] for a model that reads those, which has no loss columns.
            degree: of the replacement whose loss is measured; fitted degree by default.
            layers: which rows; all attached layers by default.
            attention_mask: [batch, pos], 0 at padding.
            batch_size: sequences per forward pass.
            loss: False skips the two forward passes per layer of the loss columns, and with them
                all that is measured while layers are replaced.
            prefixes: also replace the first 2, 3, ... layers together, to see where errors pile
                up: one forward pass for each layer but the first and the last.
            worst: how many tokens to list that lose most with all layers replaced, with what
                stands out there: one forward pass over their sequences.
            decode: list of token ids -> text; by default the model's tokenizer, else ids.
            progress: show progress bars.

        Raises:
            InvalidInputError, AttachmentError, StalePolynomialError: as `replaced`.
        """
        self._require_attached()
        chosen = self._chosen(layers)
        for layer in chosen:
            self._emitters[layer].verify()
        with self._flowing(dict.fromkeys(self.layers)):
            return measure(
                self,
                tokens,
                degree=degree,
                layers=chosen,
                attention_mask=attention_mask,
                batch_size=batch_size,
                loss=loss,
                prefixes=prefixes,
                worst=worst,
                decode=decode,
                progress=progress,
            )

    @contextmanager
    def cache(
        self, layers: Iterable[Layer] | int | None = None, names: Iterable[str] | None = None
    ) -> Iterator[dict[tuple[str, Layer], Tensor]]:
        """Within the context, {(name, layer): tensor} of the latest forward pass.

        For torch and nnsight hosts; TransformerLens has `run_with_cache`. Names are those of
        the hook points without `hook_poly_`: "in", "out", "error", "degree_k"; all by default.

        Raises:
            InvalidInputError: unknown layer. AttachmentError: detached, or a TransformerLens host.
        """
        self._require_attached()
        if not hasattr(self.host, "cache"):
            raise AttachmentError(
                f"a {self.host.name} has run_with_cache; read hook_poly_* from its cache"
            )
        with self.host.cache(self._chosen(layers), names) as found:  # type: ignore
            yield found

    def inline(self, layer: Layer, degree: int | None = None) -> Module:
        """The layer's polynomial as a module f(x, y=None) that travels with a remote trace.

            f = lens.inline(3)
            lens.detach()
            with model.trace(tokens, remote=True):
                mlp.output = f(mlp.input)  # or f(mlp.input, mlp.output): position 0 stays true

        It belongs to no model, has its own copy of the layer's weights, and needs only torch
        where it runs: its code is sent along. For nnsight; also usable on a detached lens.

        Args:
            degree: 0 ... fitted degree (default), by truncation.

        Raises:
            InvalidInputError: unknown layer or degree. AttachmentError: another host.
        """
        if not hasattr(self.host, "inline"):
            raise AttachmentError(
                f"a {self.host.name} has no remote traces; use lens[layer], or lens.replaced()"
            )
        degree = self.degree if degree is None else check_degree(degree, self.degree, "attach")
        polynomial = self[layer].truncate(degree)
        if not isinstance(polynomial, Polynomial):
            raise AttachmentError(
                'only polynomials per neuron travel; attach with inputs="samples" or "gaussian" '
                'rather than "joint"'
            )
        return self.host.inline(polynomial)  # type: ignore

    def export(
        self, layers: Iterable[Layer] | int | None = None, degree: int | None = None
    ) -> Module:
        """A new model in which these MLPs are polynomials, made of ordinary modules.

            model = lens.export(degree=3)
            model.save_pretrained("polynomial-model")
            model = polylens.load_exported("polynomial-model")

        Computes what `replaced` does, without a lens: generates, trains and is saved as the
        model it was copied from. The original stays as it is, attached; nothing is shared.
        With `exclude_first` the true activation remains for position 0 of each sequence, by
        the same rule as in `replaced`. For Hugging Face models, also those in nnsight; other
        torch modules have no `save_pretrained`. transformers alone does not load what was
        saved: its weight files are named apart, so that nobody gets the true model instead.

        Args:
            layers, degree: as in `replaced`.

        Raises:
            InvalidInputError, StalePolynomialError: as `replaced`.
            AttachmentError: detached; a TransformerLens host; experts, joint polynomials, and
                layers whose activation is not a module of their own.

        Cost: a copy of the model, and two small forward passes that compare it with `replaced`.
        """
        self._require_attached()
        if not hasattr(self.host, "copied"):
            raise AttachmentError(
                f"a {self.host.name} cannot be exported; attach to the Hugging Face model that it "
                "was made from (lens.save and polylens.load carry the polynomials over)"
            )
        chosen, degree = self._ready(layers, degree)
        host: Any = self.host
        polynomials = {layer: self._emitters[layer].truncated(degree) for layer in chosen}
        copy, places = host.copied(chosen, self.exclude_first)
        model = export.built(copy, places, polynomials, self.exclude_first, self.inputs_summary)
        flowing = {layer: degree if layer in chosen else None for layer in self.layers}
        with self._flowing(flowing):
            expected = host.example_outputs(host.module)
        export.require_equal(host.example_outputs(model), expected)
        return model

    def save(self, path: str | os.PathLike[str], report: Report | None = None) -> None:
        """Write the polynomials to one file, for `polylens.load(path, model)`.

        Coefficients and fingerprints of the weights are kept, not the weights and not the input
        models: about 8 (degree + 1)^2 bytes for each neuron of a GLU. A crash leaves the old
        file or the new one, nothing in between.

        Args:
            report: is kept with them, text around its worst tokens included (none with
                `report(worst=0)`), as `saved_report` of the lens that is loaded.

        Raises:
            StalePolynomialError: weights changed since the fit.
            ArtifactError, OSError: the file cannot be written.
        """
        checked = [(emitter, emitter.verify()) for emitter in self._emitters.values()]
        entries = [artifact.entry(each.site, each.polynomial, sums) for each, sums in checked]
        artifact.write(path, self.header(report), entries)

    def header(self, report: Report | None = None) -> dict[str, Any]:
        """What `save` keeps beside the polynomials, as JSON."""
        return {
            "polylens": version("polylens"),
            "model": self.model_name,
            "inputs": self.inputs_summary,
            "exclude_first": self.exclude_first,
            "refused": {label(layer): reason for layer, reason in self.refused.items()},
            "report": None if report is None else report.to_dict(),
        }

    def push_to_hub(
        self,
        repo_id: str,
        report: Report | None = None,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Polynomials by polylens",
    ) -> str:
        """Upload what `save` writes, and a model card, for `polylens.from_hub(repo_id, model)`.

        The repository is made if there is none; a card by somebody else stays. One commit.

        Args:
            repo_id: "user/name".
            report: uploaded as `save` keeps it, and in the card; `saved_report` by default.
            base_model: on the Hub; where the model was loaded from by default.
            private: whether a new repository is; the account's default if None.
            token: of the Hub; by default the one of `hf auth login`.
            revision: branch, made if there is none; main by default.

        Returns:
            The address of the commit.

        Raises:
            StalePolynomialError: weights changed since the fit; nothing is uploaded.
            OSError: what the Hub refuses, as its own errors.
        """
        from polylens.saving.hub import push

        return push(
            self,
            repo_id,
            report,
            base_model=base_model,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def detach(self) -> None:
        """Take everything off the model; it is exactly as before `attach`.

        Raises:
            AttachmentError: detached already.
        """
        self._require_attached()
        undo, self._undo = self._undo, None
        LENSES.pop(id(self.host.model), None)
        assert undo is not None
        undo.close()

    def _require_attached(self) -> None:
        if not self.is_attached:
            raise AttachmentError("this lens is detached; attach again to use it")

    def _chosen(self, layers: Iterable[Layer] | int | None) -> list[Layer]:
        return check_layers(layers, self.sites, self.refused, " in this lens")
