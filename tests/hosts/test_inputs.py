"""What a model is run on reaches it whole, and what of it counts and is scored is what it says."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.hf_models import D_VOCAB, DECODER, ENCODER, VISION, build, from_config
from torch import Tensor, nn

import polylens
from polylens import InvalidInputError, Sequential, UnsupportedModel
from polylens.hosts.batch import IGNORED, Stream, batch_of

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _seeded():
    GENERATOR.manual_seed(3)


def ids(rows: int, pos: int) -> Tensor:
    return torch.randint(3, D_VOCAB, (rows, pos), generator=GENERATOR)


def attach(model, inputs, **options):
    return polylens.attach(model, inputs, progress=False, **{"degree": 2, **options})


def reported(lens, inputs, **options):
    return lens.report(inputs, progress=False, **options)


def counts(report) -> list[int]:
    return [row.n_tokens for row in report]


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("method", [polylens.TrueStream(), Sequential()])
def test_a_decoder_beside_an_encoder_reads_and_is_scored_on_its_own_tokens(method):
    model, mask = build("t5"), torch.ones(16, 12, dtype=torch.long)
    mask[:, 9:] = 0
    inputs = {"input_ids": ids(16, 12), "attention_mask": mask, "decoder_input_ids": ids(16, 7)}
    embedded = []
    hook = model.decoder.embed_tokens.register_forward_hook(lambda m, x, y: embedded.append(x[0]))
    with attach(model, inputs, method=method) as lens:
        assert "112 tokens" in lens.inputs_summary
        shown = {tuple(row) for batch in embedded for row in batch.tolist() if len(row) == 7}
        assert {tuple(row) for row in inputs["decoder_input_ids"].tolist()} <= shown
        report = reported(lens, inputs)
        # encoders have no start that is left out
        assert counts(report) == [16 * 9, 16 * 9, 16 * 6, 16 * 6]
        assert all(row.r2[2] > 0.9 for row in report)
        with torch.no_grad():
            logits = model(**inputs).logits
        expected = cross_entropy(logits[:, :-1], inputs["decoder_input_ids"][:, 1:])
        assert report.base_ce == pytest.approx(expected, abs=1e-5)
        assert {token.token for token in report.worst} <= set(
            inputs["decoder_input_ids"].flatten().tolist()
        )
    hook.remove()


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_labels_are_what_a_decoder_is_scored_on(name):
    model, labels = build(name), ids(16, 7)
    model.config.pad_token_id = 0
    labels[3, 4:] = IGNORED
    inputs = {"input_ids": ids(16, 12), "labels": labels}
    if name == "whisper":
        inputs = {"input_features": torch.randn(16, 8, 32), "labels": labels}
    with attach(model, inputs) as lens:
        report = reported(lens, inputs)
        assert counts(report)[-1] == 16 * 6 - 3
        assert report.n_targets == 16 * 7 - 3
        with torch.no_grad():
            assert report.base_ce == pytest.approx(float(model(**inputs).loss), abs=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_nothing_is_invented_for_a_decoder(name):
    given = torch.randn(4, 8, 32) if name == "whisper" else ids(4, 12)
    with pytest.raises(InvalidInputError, match=r"does not say what the decoder reads.*labels"):
        attach(build(name), given)
    if name != "whisper":
        with attach(build(name).get_encoder(), ids(8, 12)) as lens:
            assert lens.layers == (0, 1)


def test_two_towers_count_their_own():
    mask = torch.ones(16, 5, dtype=torch.long)  # as many as there are patches
    mask[:8, 3:] = 0
    inputs = {
        "pixel_values": torch.randn(16, 3, 16, 16),
        "input_ids": ids(16, 5),
        "attention_mask": mask,
    }
    with attach(build("clip"), inputs) as lens:
        by_path = {lens.sites[row.layer].path: row for row in reported(lens, inputs, loss=False)}
        for path, row in by_path.items():
            assert row.n_tokens == (16 * 5 if "vision" in path else 8 * 4 + 8 * 2)


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**{**DECODER, "vocab_size": 100}),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_id=95,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_images_in_text_and_what_text_alone_does_not_reach():
    tokens = ids(16, 12)
    tokens[:, 1:5] = 95
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(16, 3, 16, 16)}
    for method in (polylens.TrueStream(), Sequential()):
        with attach(llava(), inputs, method=method) as lens:
            assert len(lens) == 4
            report = reported(lens, inputs)
            assert counts(report) == [16 * 5, 16 * 5, 16 * 11, 16 * 11]
    with attach(llava(), ids(16, 12)) as lens:
        assert len(lens) == 2
        assert all("vision_tower" in reason for reason in lens.refused.values())
        assert len(lens.refused) == 2


class Branches(nn.Module):
    """The second block runs for what is called `extra` only."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))  # noqa: E731
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x, extra=None):
        x = x + self.blocks[0](x)
        return x if extra is None else x + self.blocks[1](x + extra)


@pytest.mark.parametrize("method", [polylens.TrueStream(), Sequential()])
def test_layers_that_the_inputs_do_not_reach_are_left_out_by_name(method):
    model, x = Branches().eval(), torch.randn(300, 6)
    both = {"x": x, "extra": x.flip(0)}
    with attach(model, {"x": x}, example_inputs=both, method=method) as lens:
        assert lens.layers == (0,)
        assert "do not pass through it" in lens.refused[1]
    with attach(model, both, method=method) as lens:
        assert lens.layers == (0, 1)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "llama", "roberta_mlm"])
def test_padding_on_the_left_costs_nothing(name):
    changes = {**ENCODER, "pad_token_id": 1}
    model = (
        from_config("RobertaConfig", "RobertaForMaskedLM", changes)
        if name == "roberta_mlm"
        else build(name)
    )
    model.set_attn_implementation("eager")  # padding sees everything
    tokens = ids(6, 12)
    padding = torch.full((6, 5), model.config.pad_token_id or 0)
    padded = torch.cat([padding, tokens], 1)
    mask = torch.cat([0 * padding, torch.ones_like(tokens)], 1)
    with attach(model, tokens) as lens:
        plain, left = reported(lens, tokens), reported(lens, padded, attention_mask=mask)
        assert left.base_ce == pytest.approx(plain.base_ce, abs=1e-5)
        assert left.all_row.delta_ce == pytest.approx(plain.all_row.delta_ce, abs=1e-5)
        state = lens[1].state_dict()
    with attach(model, {"input_ids": padded, "attention_mask": mask}) as lens:
        for key, value in lens[1].state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-4)


def test_a_start_that_is_read_both_ways_counts():
    tokens = ids(16, 12)
    for name, expected in (("bert", 16 * 12), ("gpt2", 16 * 11)):
        with attach(build(name), tokens) as lens:
            assert ("first positions excluded" in lens.inputs_summary) == (name == "gpt2")
            report = reported(lens, tokens, loss=False)
            assert counts(report) == [expected] * 2
            assert ("first position" in str(report)) == (name == "gpt2")


def test_packed_sequences_start_where_positions_do():
    model, tokens = build("llama"), ids(8, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None].expand(8, -1)
    mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)
    mask[7:, :7] = torch.finfo(torch.float32).min
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask[None, None]}
    with attach(model, inputs) as lens:
        report = reported(lens, inputs)
        assert counts(report) == [8 * 10] * 2
        assert report.n_targets == 8 * 10
        with torch.no_grad():
            parts = [model(part).logits[:, :-1] for part in tokens.split([7, 5], 1)]
        wanted = torch.cat([part[:, 1:] for part in tokens.split([7, 5], 1)], 1)
        expected = cross_entropy(torch.cat(parts, 1), wanted)
        assert report.base_ce == pytest.approx(expected, abs=1e-5)


def test_special_tokens_and_labels_decide_what_is_scored():
    model, tokens = build("bert"), ids(6, 12)
    special = torch.zeros_like(tokens)
    special[:, 0] = special[:, -1] = 1
    inputs = {"input_ids": tokens, "token_type_ids": special, "special_tokens_mask": special}
    masked = tokens.clone()
    masked[:, 4] = 2
    labels = torch.where(masked == 2, tokens, IGNORED)
    with attach(model, inputs) as lens, torch.no_grad():
        report = reported(lens, inputs)
        logits = model(tokens, token_type_ids=special).logits
        expected = cross_entropy(logits[:, 1:-1], tokens[:, 1:-1])
        assert (report.base_ce, report.n_targets) == (pytest.approx(expected, abs=1e-5), 60)
        assert counts(report) == [72] * 2
        report = reported(lens, {"input_ids": masked, "labels": labels})
        loss = model(masked, labels=labels).loss
        assert report.base_ce == pytest.approx(float(loss), abs=1e-5)
        assert report.n_targets == 6


def test_a_layer_in_use_twelve_times_counts_all():
    changes = {**ENCODER, "embedding_size": 24, "num_hidden_layers": 12}
    model, tokens = from_config("AlbertConfig", "AlbertForMaskedLM", changes), ids(16, 12)
    seen = []
    with attach(model, tokens) as lens:
        report = reported(lens, tokens, worst=0)
        assert (report[0].n_tokens, report.n_tokens) == (12 * 16 * 12,) * 2
        with lens.host.observe({0: lambda a: seen.append((a.x, a.y))}), torch.no_grad():
            model(tokens)
        x, y = (torch.cat([t.flatten(0, 1) for t in each]) for each in zip(*seen, strict=True))
        residual = (lens[0](x) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert report[0].r2_replacement == pytest.approx(1 - float(residual), abs=1e-5)
    with pytest.raises(UnsupportedModel, match=r"layer 0 is used 12 times.*TrueStream"):
        attach(model, tokens, method=Sequential())


class Embedder(nn.Module):
    """As sentence-transformers: one dictionary in, one out."""

    def __init__(self):
        super().__init__()
        self.inner = build("bert").bert

    def forward(self, features):
        return {"sentence_embedding": self.inner(**features).last_hidden_state.mean(1)}


def test_dictionaries_in_a_dictionary():
    mask = torch.ones(16, 12, dtype=torch.long)
    mask[:, 9:] = 0
    inputs = {"features": {"input_ids": ids(16, 12), "attention_mask": mask}}
    with attach(Embedder().eval(), inputs) as lens:
        assert "144 tokens" in lens.inputs_summary
        assert counts(reported(lens, inputs, loss=False)) == [144] * 2


class Torch(nn.Module):
    """torch's own transformer, which takes the padding out before its layers where it can."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(D_VOCAB, 16), nn.Linear(16, D_VOCAB)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, tokens, src_key_padding_mask=None):
        x = self.encoder(self.embed(tokens), src_key_padding_mask=src_key_padding_mask)
        return self.head(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_transformer_of_torch_without_its_padding():
    torch.manual_seed(0)
    model, padding = Torch().eval(), torch.zeros(16, 12, dtype=torch.bool)
    padding[:, 9:] = True
    inputs = {"tokens": ids(16, 12), "src_key_padding_mask": padding}
    with torch.no_grad():
        true = model(**inputs)
    with attach(model, inputs) as lens:
        assert "144 tokens" in lens.inputs_summary
        report = reported(lens, inputs)
        assert counts(report) == [144] * 2
        expected = cross_entropy(true[:, :9], inputs["tokens"][:, :9])
        assert report.base_ce == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            assert torch.equal(model(**inputs), true)
        with lens.replaced():
            nested = []
            look = model.encoder.layers[0].linear1.register_forward_hook(
                lambda m, x, y: nested.append(y.is_nested)
            )
            padded = model(**inputs)  # with gradients, as it is
            with torch.no_grad():
                packed = model(**inputs)
            look.remove()
            assert nested == [False, True]
            torch.testing.assert_close(padded[~padding], packed[~padding])
            assert not torch.allclose(packed[~padding], true[~padding], atol=1e-3)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, ids, attention_mask=None):
        self.seen = attention_mask
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_mask_reaches_any_module_that_takes_one():
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:, -4:] = 0
    model = Masked().eval()
    with attach(model, ids(4, 12) % 50, attention_mask=mask) as lens:
        assert torch.equal(model.seen.sum(1), mask.sum(1))
        assert "32 tokens" in lens.inputs_summary


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("t5", {"input_ids": ids(4, 9), "decoder_input_ids": ids(3, 9)}, "has 3 rows where.* 4"),
        ("gpt2", {}, "empty mapping"),
        ("gpt2", {"input_ids": [[3, 4, 5], [3]]}, "padding=True|pad them"),
        ("gpt2", {"input_ids": ids(4, 9) + 90}, "input_ids: token ids must go from 0 to 89"),
        ("distilbert", {"input_ids": ids(4, 9), "token_type_ids": ids(4, 9)}, "no token_type_ids"),
        (None, {"ids": ids(4, 9), "extra": ids(4, 9)}, "Masked takes no extra"),
        ("gpt2", {"input_ids": ids(4, 9), "attention_mask": ids(4, 9)}, "must hold 1 at tokens"),
    ],
)
def test_mappings_that_cannot_be_used_say_why(name, inputs, message):
    model = Masked() if name is None else build(name)
    with pytest.raises(InvalidInputError, match=message):
        attach(model, inputs)
    assert polylens.attached(model) is None


def test_a_learned_prompt_in_front_of_the_tokens_is_refused():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build("llama")
            self.prompt = nn.Parameter(torch.randn(1, 4, 24))

        def forward(self, tokens):
            x = self.model.get_input_embeddings()(tokens)
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
            return self.model(inputs_embeds=x).logits

    model, tokens = Prompted().eval(), ids(8, 12)
    with pytest.raises(InvalidInputError, match=r"128 inputs arrive .* 96 positions.*prompt"):
        attach(model, tokens)
    with attach(model, tokens, exclude_first=False) as lens:
        assert counts(reported(lens, tokens, loss=False)) == [128] * 2


def test_streams():
    tokens, mask = ids(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = mask[1, 4:] = 0
    stream = Stream.of(tokens, mask)
    assert stream.starts.nonzero().tolist() == [[0, 2], [1, 0], [2, 0]]
    assert stream.counted(exclude_first=True).sum(1).tolist() == [3, 3, 5]
    assert stream.targets(1).sum(1).tolist() == [3, 3, 5]
    assert stream.targets(0).sum(1).tolist() == [4, 4, 6]
    batch = batch_of((), {"input_ids": tokens, "attention_mask": mask, "scale": torch.tensor(2.0)})
    some = batch.rows(torch.tensor([2, 0]))
    assert len(some) == 2
    assert torch.equal(some.kwargs["input_ids"], tokens[[2, 0]])
    assert torch.equal(some.streams["input_ids"].there, mask[[2, 0]] != 0)
    assert some.kwargs["scale"] == 2


def test_a_layer_that_runs_on_a_chunk_at_a_time():
    changes = {**ENCODER, "chunk_size_feed_forward": 4}
    model = from_config("BertConfig", "BertForMaskedLM", changes)
    tokens = torch.randint(3, D_VOCAB, (16, 24), generator=torch.Generator().manual_seed(3))
    with pytest.raises(InvalidInputError, match="chunk_size_feed_forward"):
        polylens.attach(model, tokens, progress=False)
    found = []
    for each in (model, build("bert")):
        lens = polylens.attach(each, tokens, exclude_first=False, progress=False)
        with lens.replaced(), torch.no_grad():
            found.append(each(tokens).logits)
    torch.testing.assert_close(*found)
