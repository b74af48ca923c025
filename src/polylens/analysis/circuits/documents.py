"""A circuit as files: an interactive page, and what attribution-graph front ends read.

Both are made of `Circuit.to_dict()`.
"""

import json
from importlib.resources import files
from typing import Any

# A feature's number in its layer for front ends that know features of the whole model: those at
# different positions are different ones.
PER_POSITION = 1000
SPECIAL = {"mlp": PER_POSITION - 2, "rest": PER_POSITION - 1}


def page(document: dict[str, Any]) -> str:
    """One HTML file that needs nothing else."""
    template = (files("polylens.analysis.circuits") / "page.html").read_text(encoding="utf-8")
    # what closes a script would end it in a string, too
    short = json.dumps(rounded(document), ensure_ascii=False, separators=(",", ":"))
    data = short.replace("</", "<\\/")
    return template.replace("/*DATA*/null", data)


def rounded(value: Any) -> Any:
    """With all numbers to five digits, as many as the page can show."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def attribution_graph(document: dict[str, Any], slug: str, scan: str) -> dict[str, Any]:
    """The JSON that circuit-tracer writes and that its and Neuronpedia's front ends read.

    Features are numbered by position. What is left of an MLP beside its features is a feature of
    theirs, too, and says so; errors are "mlp reconstruction error". Weights are in units of the
    target.

    Both front ends take a logit's probability and token out of its label, `Output "token" (p=0.5)`,
    and do not open a file without.

    Sources: `circuit_tracer.frontend.graph_models` of circuit-tracer, and Neuronpedia's
    graph-schema.json, version 1.0.0.
    """
    ids = {node["name"]: _id(node, document) for node in document["nodes"]}
    nodes = [_node(node, ids[node["name"]], document) for node in document["nodes"]]
    links = [
        {"source": ids[e["source"]], "target": ids[e["target"]], "weight": e["weight"]}
        for e in document["edges"]
    ]
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": document["names"],
        "prompt": "".join(document["names"]),
        "node_threshold": document["kept"]["nodes"],
        "schema_version": 1,
        "info": {
            "description": f"{document['target']}, by polynomials of the MLPs: nothing was trained",
            "generator": {"name": "polylens", "url": "https://github.com/polylens/polylens"},
        },
        "pruning_settings": {
            "node_threshold": document["kept"]["nodes"],
            "edge_threshold": document["kept"]["edges"],
        },
    }
    settings = {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": []}
    return {
        "metadata": metadata,
        "qParams": settings | {"sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }


def _number(node: dict[str, Any]) -> int:
    return node["position"] * PER_POSITION + SPECIAL.get(node["kind"], node["index"])


def _id(node: dict[str, Any], document: dict[str, Any]) -> str:
    at = node["position"]
    if node["kind"] == "token":
        return f"E_{document['tokens'][at]}_{at}"
    if node["kind"] == "target":
        return f"{document['layers'] + 1}_{document['vocabulary_index']}_{at}"
    number = -1 if node["kind"] == "error" else _number(node)
    return f"{node['layer']}_{number}_{at}"


def _node(node: dict[str, Any], node_id: str, document: dict[str, Any]) -> dict[str, Any]:
    kind, at, layer = node["kind"], node["position"], node["layer"]
    own: dict[str, Any] = {
        "node_id": node_id,
        "ctx_idx": at,
        "reverse_ctx_idx": 0,
        "run_idx": 0,
        "token_prob": 0.0,
        "is_target_logit": False,
        "influence": node["influence"],
        "activation": node["activation"],
        "clerp": "",
    }
    if kind == "token":
        token = document["tokens"][at]
        own |= {"feature": at, "layer": "E", "feature_type": "embedding"}
        return own | {"jsNodeId": f"E_{token}-{at}"}
    if kind == "target":
        token = document["vocabulary_index"]
        own |= {"feature": token, "layer": str(document["layers"] + 1), "feature_type": "logit"}
        own |= {"token_prob": document["probability"], "is_target_logit": True}
        label = f'Output "{document["target"]}" (p={document["probability"]:.3f})'
        return own | {"jsNodeId": f"L_{token}-{at}", "clerp": label}
    if kind == "error":
        own |= {"feature": -1, "layer": str(layer), "feature_type": "mlp reconstruction error"}
        return own | {"jsNodeId": f"{layer}_-1-{at}"}
    number = _number(node)
    names = {"rest": "rest of the MLP", "mlp": "the MLP as a whole"}
    raises = ", ".join(name for name, _ in node["raises"][:3])
    own |= {"feature": _paired(layer, number), "layer": str(layer)}
    own |= {"feature_type": "cross layer transcoder", "jsNodeId": f"{layer}_{number}-0"}
    return own | {"clerp": names.get(kind, f"raises {raises}")}


def _paired(x: int, y: int) -> int:
    """Cantor's number of a pair, as circuit-tracer numbers features of all layers."""
    return (x + y) * (x + y + 1) // 2 + y
