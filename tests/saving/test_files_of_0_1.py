"""Files that version 0.1 wrote load, and compute what they computed then.

tests/data/files_of_0_1 has them; expected.safetensors what that version made of each, replaced also
where sequences start. Weights come from `random.Random`, which is the same everywhere and always.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import polylens
from polylens import DensePolynomial, JointPolynomial, Polynomial
from polylens.errors import InvalidInputError
from polylens.files.format import within

pytestmark = pytest.mark.filterwarnings("ignore:.*was written when the first position:UserWarning")

FILES = Path(__file__).parent.parent / "data" / "files_of_0_1"
EXPECTED = load_file(FILES / "expected.safetensors")
LLAMA = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 24}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "n_positions": 24}
MIXTRAL = {"num_hidden_layers": 1, "num_experts_per_tok": 2, "num_local_experts": 3, **LLAMA}
KINDS = {
    "polynomial": Polynomial,
    "joint_polynomial": JointPolynomial,
    "dense_polynomial": DensePolynomial,
}


def expected(name):
    return within(EXPECTED, f"{name}: ")


def numbers(seed, *shape):
    """Uniform with mean 0 and variance 1."""
    draws, count = random.Random(f"golden {seed}"), torch.Size(shape).numel()
    flat = [(draws.random() - 0.5) * 3.4641016151377544 for _ in range(count)]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def with_weights(model, seed, scale):
    """Every parameter from its own name: vectors called weight are about 1, all else about 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.split(".")[-1] in ("weight", "w")
            values = numbers(f"{seed} {name}", *parameter.shape) * (0.1 if is_norm else scale)
            parameter.copy_(values + 1 if is_norm else values)
    return model.eval()


def hugging_face(kind, **sizes):
    name = {"gpt2": ("GPT2Config", "GPT2LMHeadModel")}.get(kind)
    config, cls = name or (f"{kind.title()}Config", f"{kind.title()}ForCausalLM")
    built = getattr(transformers, config)(
        vocab_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    model = getattr(transformers, cls)._from_config(built, attn_implementation="eager")
    return with_weights(model, f"file {kind}", 0.4)


def classifier():
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.LayerNorm(8)]
    layers += [nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 3)]
    return with_weights(nn.Sequential(*layers), "file classifier", 0.6)


MODELS = {
    "gpt2": lambda: hugging_face("gpt2", **GPT2),
    "llama": lambda: hugging_face("llama", num_hidden_layers=2, **LLAMA),
    "mixtral": lambda: hugging_face("mixtral", **MIXTRAL),
    "classifier": classifier,
    "finished": lambda: hugging_face("llama", num_hidden_layers=3, **LLAMA),
}


def assert_computes(lens, model, name):
    for key, out in expected(name).items():
        degree = key.removeprefix("degree ")
        if key == "tokens" or (degree == key and key != "true"):
            continue
        if key == "true":
            found = outputs(model, expected(name)["tokens"])
        else:
            with lens.replaced(degree=int(degree)):
                found = outputs(model, expected(name)["tokens"])
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)


def outputs(model, tokens):
    with torch.no_grad():
        if isinstance(model, nn.Sequential):
            return model(tokens)
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize(
    "path",
    sorted(p for p in FILES.iterdir() if p.name.split(".")[0] in KINDS),
    ids=lambda path: path.name,
)
def test_polynomials(path, tmp_path):
    cls, then = KINDS[path.name.split(".")[0]], expected(path.name)
    loaded = cls.load(path)
    loaded.save(tmp_path / "again")
    for poly in (loaded, cls.load(tmp_path / "again")):
        exact = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(poly.all_degrees(then["x"]), then["all degrees"], **exact)
        torch.testing.assert_close(poly.r2, then["r2"], **exact)
        if not poly.has_optimum:  # of the layer as a whole nothing true was in the file
            assert poly.ends is not None
            with pytest.raises(InvalidInputError, match="attach"):
                poly.linear()
            continue
        torch.testing.assert_close(poly.linear()[0], then["beta"], **exact)
        gamma = poly.quadratic_form(then["u"]).to_dense()
        torch.testing.assert_close(gamma, then["gamma"], **exact)


@pytest.mark.parametrize(
    "path", [*sorted(FILES.glob("*.lens")), FILES / "finished.checkpoint"], ids=lambda p: p.name
)
def test_lenses(path, tmp_path):
    kind = path.name.split(".")[0]
    if kind == "mixtral" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the weights of Mixtral were called otherwise")
    model = MODELS[kind]()
    with polylens.load(path, model) as lens:
        assert_computes(lens, model, path.name)
        lens.save(tmp_path / "again")
        states = {layer: lens[layer].state_dict() for layer in lens}
    with polylens.load(tmp_path / "again", model) as lens:
        for layer, state in states.items():
            again = lens[layer].state_dict()
            assert state.keys() == again.keys()
            assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_an_interrupted_calibration_is_refused(tmp_path):
    """On the stream that it was on, starts of sequences stayed true."""
    model, path = MODELS["finished"](), tmp_path / "unfinished.checkpoint"
    shutil.copy(FILES / path.name, path)
    method = polylens.Sequential(checkpoint=path)
    tokens = torch.randint(3, 32, (80, 24))
    with pytest.raises(polylens.ArtifactError, match="starts_left_out was None, now it is True"):
        polylens.attach(model, tokens, degree=2, method=method, progress=False)
    assert polylens.attached(model) is None


def test_exported_models():
    then, model = expected("exported"), polylens.load_exported(FILES / "exported")
    torch.testing.assert_close(outputs(model, then["tokens"]), then["logits"], rtol=1e-4, atol=1e-5)
