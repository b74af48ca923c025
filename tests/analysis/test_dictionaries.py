"""SAE features as writers and directions, with a tiny SAE that is like one of SAELens."""

from types import SimpleNamespace

import pytest
import torch
from tests.models import BRIDGES, hooked

import polylens
from polylens import analysis
from polylens.errors import InvalidInputError

D_MODEL, D_SAE = 24, 40
TOKENS = torch.randint(0, 90, (4, 20), generator=torch.Generator().manual_seed(2))


class TinySAE:
    """relu((x - b_dec) W_enc + b_enc) W_dec + b_dec, scaled as SAELens does."""

    def __init__(self, hook_name, d=D_MODEL, seed=0, metadata=True, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(d, D_SAE, generator=g, dtype=torch.float64)
        self.W_dec = self.W_enc.T / d
        self.b_enc = torch.randn(D_SAE, generator=g, dtype=torch.float64) - 2
        self.b_dec = torch.randn(d, generator=g, dtype=torch.float64)
        self.scale = scale
        place = SimpleNamespace(hook_name=hook_name)
        self.cfg = SimpleNamespace(metadata=place) if metadata else place

    def encode(self, x):
        return ((self.scale * x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, acts):
        return (acts @ self.W_dec + self.b_dec) / self.scale


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_active_features_bias_and_error_sum_to_the_activation(scale):
    sae, x = TinySAE("", scale=scale), torch.randn(D_MODEL, dtype=torch.float64)
    writers, names = analysis.sae_writers(sae, x)
    torch.testing.assert_close(writers.sum(0), x)
    acts = sae.encode(x)
    active = acts.nonzero()[:, 0].tolist()
    assert 0 < len(active) < D_SAE
    assert names == (*(f"SAE {i}" for i in active), "SAE bias", "SAE error")
    torch.testing.assert_close(writers[0], acts[active[0]] * sae.W_dec[active[0]] / scale)
    torch.testing.assert_close(writers[-2], sae.b_dec / scale)


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.1.hook_poly_in"]
)
def test_pairs_of_sae_features_that_interact_through_an_mlp(hook):
    model = hooked(torch.float64)
    hook = hook.replace("hook_poly", "mlp.hook_poly")
    sae = TinySAE(hook, metadata="resid" in hook)
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        _, cache = model.run_with_cache(TOKENS)
        writers, names = analysis.residual_writers(lens, cache, 1, 5, batch=2, sae=sae)
        read = cache["poly_in", 1, "mlp"][2, 5]
        torch.testing.assert_close(writers.sum(0), read)
        acts = sae.encode(cache[hook][2, 5])
        active = [f"SAE {i}" for i in acts.nonzero()[:, 0].tolist()]
        assert list(names[: len(active)]) == active
        assert len(names) == len(set(names)) == len(writers)
        # what a feature writes comes through the norm at its scale here
        written = acts[int(active[0][4:])] * sae.W_dec[int(active[0][4:])]
        if "resid" in hook:
            scale = cache["blocks.1.ln2.hook_scale"][2, 5]
            ln = model.blocks[1].ln2
            written = (written - written.mean()) / scale * ln.w
        torch.testing.assert_close(writers[0], written.detach())
        # rows of a decoder, and several, are directions
        U = torch.randn(2, D_MODEL, dtype=torch.float64)
        found = analysis.interactions(lens[1], writers, list(U), names)
        total = cache["poly_out", 1, "mlp"][2, 5] @ U.T
        assert [f.total for f in found] == pytest.approx(total.tolist(), abs=1e-8)
        one = analysis.interactions(lens[1], writers, U[1], names)
        assert torch.equal(one.pairs, found[1].pairs)
        assert any("SAE" in a and "SAE" in b for a, b, _ in one.top(30))
        features = analysis.eigenfeatures(lens[1], list(U), 2)
        alone = analysis.eigenfeatures(lens[1], U[0], 2)
        torch.testing.assert_close(features[0].values, alone.values)
        # a decoder's row steers, an encoder's column is a direction to read
        steered = analysis.intervene(lens, TOKENS, analysis.Edit(1, sae.W_dec[3], by=4.0))
        assert steered["edit"].kl > 0
        seen = analysis.examples(lens, {1: sae.W_enc[:, :3]}, TOKENS, k=1)[1]
        x = cache["poly_in", 1, "mlp"][:, 1:] @ sae.W_enc[:, :3]
        best = x.flatten(0, 1).max(0).values.tolist()
        assert [row.highest[0].activation for row in seen.rows] == pytest.approx(best, rel=1e-5)


def test_an_sae_on_a_bridge():
    model = BRIDGES["gpt2"]()
    sae = TinySAE("blocks.1.hook_resid_mid")
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        _, cache = model.run_with_cache(TOKENS)
        writers, _ = analysis.residual_writers(lens, cache, 1, 5, sae=sae)
        read = cache["poly_in", 1, "mlp"][0, 5].double()
        torch.testing.assert_close(writers.sum(0), read)


def test_what_is_no_dictionary_of_this_place_is_refused():
    model, x = hooked(torch.float64), torch.randn(D_MODEL, dtype=torch.float64)

    class Squares(TinySAE):
        def decode(self, acts):
            return super().decode(acts) ** 2

    transcoder = TinySAE("")
    transcoder.W_dec, transcoder.b_dec = torch.randn(D_SAE, 7).double(), 0.0
    nowhere = TinySAE("")
    nowhere.cfg = None
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        _, cache = model.run_with_cache(TOKENS)

        def at(hook):
            return analysis.residual_writers(lens, cache, 1, 5, sae=TinySAE(hook))

        calls = {
            r"reads vectors \(16,\), got \(24,\)": lambda: analysis.residual_writers(
                lens, cache, 1, 5, sae=TinySAE("blocks.1.hook_resid_pre", d=16)
            ),
            r"reads vectors \(24,\), got \(2, 24\)": lambda: analysis.sae_writers(
                TinySAE(""), torch.stack([x, x])
            ),
            "must have encode and decode": lambda: analysis.sae_writers(None, x),
            "a sum of features": lambda: analysis.sae_writers(Squares(""), x),
            r"writes vectors \(7,\)": lambda: analysis.sae_writers(transcoder, x),
            "does not say at which": lambda: analysis.residual_writers(
                lens, cache, 1, 5, sae=nowhere
            ),
            "lacks blocks.9": lambda: at("blocks.9.hook_resid_pre"),
            "at blocks.1.hook_resid_post is not": lambda: at("blocks.1.hook_resid_post"),
            "at blocks.0.hook_mlp_out is not": lambda: at("blocks.0.hook_mlp_out"),
            "at blocks.0.attn.hook_z is not": lambda: at("blocks.0.attn.hook_z"),
            "list": lambda: analysis.interactions(lens[1], x[None], torch.ones(2, D_MODEL)),
        }
        for message, call in calls.items():
            with pytest.raises(InvalidInputError, match=message):
                call()


def test_saes_of_saelens():
    sae_lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    cfg = sae_lens.StandardSAEConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        apply_b_dec_to_input=True,
        metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_mid"),
    )
    sae = sae_lens.StandardSAE(cfg)
    model = hooked()
    with polylens.attach(model, TOKENS, degree=2, progress=False) as lens:
        _, cache = model.run_with_cache(TOKENS)
        writers, names = analysis.residual_writers(lens, cache, 1, 5, sae=sae)
        read = cache["poly_in", 1, "mlp"][0, 5].double()
        torch.testing.assert_close(writers.sum(0), read)
        active = sae.encode(cache["blocks.1.hook_resid_mid"][0, 5]).nonzero()[:, 0].tolist()
        assert list(names[: len(active)]) == [f"SAE {i}" for i in active]
