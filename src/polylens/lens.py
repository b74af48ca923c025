"""`Lens`: polynomials beside every MLP of a model, readable, switchable and savable."""

import html
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Module

from polylens.calibration.tokens import opened
from polylens.checks import Layer, Layers, check_degree, label, renamed
from polylens.errors import AttachmentError
from polylens.hosts.base import Host
from polylens.hosts.batch import Inputs
from polylens.installed.around import Around
from polylens.installed.installation import Installation
from polylens.polynomials.factored import Polynomial
from polylens.ranks import Ranks, together
from polylens.report.measure import measure
from polylens.report.report import Report
from polylens.saving import export
from polylens.saving import lens_file as artifact

# By id of the model; the installed emitters keep a lens alive as long as its model.
LENSES: "WeakValueDictionary[int, Lens]" = WeakValueDictionary()
# What is no longer an attribute, and what is in its place.
_GONE = {"cache": "logits, cache = lens.run_with_cache(tokens)"}


def attached(model: Any) -> "Lens | None":
    """The lens attached to this model, or None."""
    return LENSES.get(id(model))


class Lens(Installation):
    """The polynomials of a model, attached to it. Made by `attach`.

    `lens.replaced()` lets them flow; the rest says how good they are and carries them elsewhere.

    Attributes:
        layers: attached layers, in order; `lens[layer]` is the layer's Polynomial, and
            `lens[Expert(layer, expert)]` that of an expert. As an argument, the number of a layer
            stands for the experts in it, too.
        sites: the MLPSite of each.
        degree: fitted degree.
        refused: reason for each layer that could not be read.
        inputs_summary: which input model the polynomials were fitted to.
        saved_report: the report that came with a loaded lens; None without one that can be read.
    """

    saved_report: Report | None = None

    def __init__(self, host: Host, *installed: Any) -> None:
        super().__init__(host, *installed)

    def _install(self) -> None:
        super()._install()
        LENSES[id(self.host.model)] = self

    @renamed()
    def report(
        self,
        tokens: Inputs,
        *,
        degree: int | None = None,
        layers: Layers | None = None,
        attention_mask: Tensor | None = None,
        batch_size: int = 8,
        loss: bool = True,
        prefixes: bool = False,
        zero_ablation: bool = False,
        worst: int = 10,
        decode: Callable[[list[int]], str] | None = None,
        progress: bool = True,
        ranks: Ranks | None = None,
    ) -> Report:
        """R2 by layer and degree on held-out tokens, and what replacing each layer costs.

        Always against the true model: an enclosing `replaced` is suspended meanwhile. Give tokens
        of another source than those of `attach` to see what carries over to other text.

        Args:
            tokens: [batch, pos] token ids, floats or a mapping, as in `attach`, best disjoint
                from those. The loss columns are about the token ids (of an encoder with a decoder
                the decoder's), or the `labels` [batch, pos] in a mapping, where -100 is not
                scored; nor are special tokens, where a tokenizer's `special_tokens_mask` is among
                the inputs. Without token ids there are KL and top-1 of a model that returns logits
                [batch, classes], which need no labels, and no losses of others.
            degree: of the replacement whose loss is measured; fitted degree by default.
            layers: which rows; all attached layers by default.
            attention_mask: [batch, pos], 0 at padding.
            batch_size: sequences per forward pass.
            loss: False skips the two forward passes per layer of the loss columns, and with them
                all that is measured while layers are replaced.
            prefixes: also replace the first 2, 3, ... layers together, to see where errors pile
                up: one forward pass for each layer but the first and the last.
            zero_ablation: also put zero in place of each layer's output, beside its mean: one
                forward pass more per layer.
            worst: how many tokens to list that lose most with all layers replaced, with what
                stands out there: one forward pass over their sequences.
            decode: list of token ids -> text; by default the model's tokenizer, else ids.
            progress: show progress bars.
            ranks: `Ranks()`, where each process of torch.distributed gives tokens of its own and
                all get the report on those of rank 0, rank 1, ... one after the other.

        Raises:
            InvalidInputError, AttachmentError, StalePolynomialError: as `replaced`.
            RankError: another rank failed, died, or did not answer in time.
        """
        with together(ranks):
            chosen, degree = self.ready(layers, degree)
            with self.suspended():
                return measure(
                    self,
                    tokens,
                    degree=degree,
                    layers=chosen,
                    attention_mask=attention_mask,
                    batch_size=batch_size,
                    loss=loss,
                    prefixes=prefixes,
                    zero_ablation=zero_ablation,
                    worst=worst,
                    decode=decode,
                    progress=progress,
                    ranks=ranks,
                )

    @renamed()
    def run_with_cache(
        self,
        tokens: Inputs,
        *,
        layers: Layers | None = None,
        names: Iterable[str] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Any, dict[tuple[str, Layer], Tensor]]:
        """One forward pass, and what flowed through the hook points in it.

            logits, cache = lens.run_with_cache(tokens)
            cache["out", 3] + cache["error", 3]  # is the true output of layer 3

        Args:
            tokens: [batch, pos] token ids, floats or a mapping, as in `attach`.
            layers: one, several, or all (default).
            names: one or several of "in", "out", "error", "degree_0", "degree_1", ...; all by
                default.
            attention_mask: [batch, pos], 0 at padding.

        Returns:
            The logits (of a model without logits what it returns), and by name and layer the
            values [batch, pos, d]; of an expert [n, d], for the inputs that it got.

        Raises:
            InvalidInputError: unknown layer or name.
            AttachmentError: the lens is detached.
        """
        self._require_attached()
        tokens, mask = opened(tokens, attention_mask)
        mask = None if mask is None else torch.as_tensor(mask)
        inputs = tokens if isinstance(tokens, dict) else torch.as_tensor(tokens)
        batch = self.host.given(inputs, mask)
        with self.host.reading(self._chosen(layers), names) as values:
            return self.host.forward(batch), values

    def _repr_html_(self) -> str:
        rows = ""
        for site in self.sites.values():
            cells = (label(site.layer), site.kind, site.activation.name, site.d_in, site.d_mlp)
            cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in (*cells, site.path))
            rows += f"<tr>{cells}</tr>"
        titles = ("layer", "kind", "activation", "d_in", "d_mlp", "path")
        head = "".join(f"<th>{title}</th>" for title in titles)
        about = html.escape(repr(self))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<details><summary>{about}</summary>{table}</details>"

    @contextmanager
    def replaced_around(
        self,
        tokens: Inputs,
        *,
        degree: int | None = None,
        layers: Layers | None = None,
        attention_mask: Tensor | None = None,
    ) -> Generator["Lens", None, None]:
        """`replaced`, with the errors that the polynomials make on these inputs added.

        An MLP's output is f(x) + (y_0 - f(x_0)), x_0 and y_0 being those of the true model on
        these inputs: on them the model computes what the true one does, and what an intervention
        changes, it changes through the polynomials alone. So its effect is judged around the true
        output, not around that of the replaced model. Passes read the same inputs, in one batch.

        Args:
            tokens, attention_mask: as in `run_with_cache`.
            degree, layers: as in `replaced`.

        Raises:
            InvalidInputError, StalePolynomialError: as `replaced`; inputs of another shape.
            UnsupportedModel: a layer that is used several times in a pass.

        Cost: one forward pass of the true model; an error [batch, pos, d_out] for each layer.

        >>> import polylens
        >>> model = polylens.demo.load_model()
        >>> tokens = polylens.demo.batches(polylens.demo.texts()[1], 2, 32)
        >>> with polylens.attach(model, tokens, degree=2, progress=False) as lens:
        ...     with lens.replaced_around(tokens):
        ...         around = model(tokens).logits
        ...     bool((around - model(tokens).logits).abs().max() < 1e-3)
        True
        """
        chosen, degree = self.ready(layers, degree)
        inputs, mask = opened(tokens, attention_mask)
        batch = self.host.given(inputs, mask)
        functions = {n: Around(n, self[n].truncate(degree)) for n in chosen}
        with self.suspended(), torch.no_grad():
            with self.host.observe({n: each.record for n, each in functions.items()}):
                self.host.run(batch)
        with self.host.substitute(functions):
            yield self

    def __getattr__(self, name: str) -> Any:
        hint = f"; use {_GONE[name]}" if name in _GONE else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    @renamed()
    def inline(self, layer: Layer, *, degree: int | None = None) -> Module:
        """The layer's polynomial as a module f(x) that travels with a remote trace.

            f = lens.inline(3)
            lens.detach()
            with model.trace(tokens, remote=True):
                mlp.output = f(mlp.input)

        It belongs to no model, has its own copy of the layer's weights, and needs only torch
        where it runs: its code is sent along. For nnsight; also usable on a detached lens.

        Args:
            degree: 0 ... fitted degree (default), by truncation.

        Raises:
            InvalidInputError: unknown layer or degree. AttachmentError: another host.
        """
        degree = self.degree if degree is None else check_degree(degree, self.degree, "attach")
        polynomial = self[layer].truncate(degree)
        if not isinstance(polynomial, Polynomial):
            raise AttachmentError(
                'only polynomials per neuron travel; attach with estimator="samples" or "gaussian" '
                'rather than "joint"'
            )
        return self.host.inline(polynomial)

    @renamed()
    def export(self, *, degree: int | None = None, layers: Layers | None = None) -> Module:
        """A new model in which these MLPs are polynomials, made of ordinary modules.

            model = lens.export(degree=3)
            model.save_pretrained("polynomial-model")
            model = polylens.load_exported("polynomial-model")

        Computes what `replaced` does, without a lens: generates, trains and is saved as the
        model it was copied from. The original stays as it is, attached; nothing is shared.
        For Hugging Face models, also those in nnsight; other
        torch modules have no `save_pretrained`. transformers alone does not load what was
        saved: its weight files are named apart, so that nobody gets the true model instead.

        Args:
            degree, layers: as in `replaced`.

        Raises:
            InvalidInputError, StalePolynomialError: as `replaced`.
            AttachmentError: detached; a TransformerLens host; experts, joint polynomials, and
                layers whose activation is not a module of their own.

        Cost: a copy of the model, and two small forward passes that compare it with `replaced`.
        """
        self._require_attached()
        chosen, degree = self.ready(layers, degree)
        host = self.host
        polynomials = {layer: self[layer].truncate(degree) for layer in chosen}
        copy, places = host.copied(chosen)
        model = export.built(copy, places, polynomials, self.inputs_summary)
        with self.suspended(), self.replaced(degree=degree, layers=chosen):
            expected = host.example_outputs(host.module)
        export.require_equal(host.example_outputs(model), expected)
        return model

    def save(
        self,
        path: str | os.PathLike[str],
        report: Report | None = None,
        *,
        moments: bool = False,
    ) -> None:
        """Write the polynomials to one file, for `polylens.load(path, model)`.

        What replaces each layer, the optima, how good they are, and fingerprints of the weights
        are kept, not the weights: about 16 (degree + 1)^2 bytes for each neuron of a GLU. What a
        loaded lens is asked for has the numbers that it had, or is refused by name. A crash
        leaves the old file or the new one, nothing in between.

        Args:
            moments: also keep mean and covariance of each layer's inputs, 8 d_in^2 bytes for each
                layer, which features in their metric need.
            report: is kept with them, text around its worst tokens included (none with
                `report(worst=0)`), as `saved_report` of the lens that is loaded.

        Raises:
            StalePolynomialError: weights changed since the fit.
            ArtifactError, OSError: the file cannot be written.
        """
        checked = self.verify(self.layers).items()
        entries = [artifact.entry(self.sites[n], self[n], sums, moments) for n, sums in checked]
        artifact.write(path, self.header(report), entries)

    def header(self, report: Report | None = None) -> dict[str, Any]:
        """What `save` keeps beside the polynomials, as JSON."""
        sketch = self.calibrated_on
        return {
            "polylens": version("polylens"),
            "model": self.model_name,
            "inputs": self.inputs_summary,
            "starts_left_out": self.exclude_first,
            "calibrated_on": None if sketch is None else sketch.to_json(),
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
        """Upload what `save` writes and a card, for `polylens.load("hf://user/name", model)`.

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
        from polylens.saving import hub

        report = self.saved_report if report is None else report
        with TemporaryDirectory() as folder:
            path = Path(folder) / hub.FILE
            self.save(path, report)
            return hub.upload(
                path,
                hub.card(self, repo_id, report, base_model),
                repo_id,
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
        LENSES.pop(id(self.host.model), None)
        super().detach()
