"""Pass: fuse each residual sum with the RMSNorm that reads it into one ``SkipSimplifiedLayerNormalization``.

ONNX Runtime reads the rows once instead of twice.
"""

from __future__ import annotations

from onnx import NodeProto, helper

from fusion_edge.export.lowering.graph_builder import GraphBuilder
from fusion_edge.kernels.operators import MICROSOFT

NORM = "SimplifiedLayerNormalization"


def fuse_residual_norms(builder: GraphBuilder) -> None:
    """Replace each ``Add`` whose sum a norm reads by the fused node, and remove the norm.

    Precondition: nodes are in topological order, and at most one norm reads a sum. Postcondition: nodes are in
    topological order, no norm reads a sum, and sums keep their names. The fused norm's value is named after the norm's
    path.
    """
    assert builder.is_topological()
    sums = {node.output[0]: node for node in builder.nodes if node.op_type == "Add"}
    norms = [node for node in builder.nodes if node.op_type == NORM and node.input[0] in sums]
    assert len({norm.input[0] for norm in norms}) == len(norms)
    renamed = {}
    for norm in norms:
        path = norm.name.removesuffix(f".{NORM}")
        renamed[norm.output[0]] = path
        _fuse(sums[norm.input[0]], norm, path)
    removed = {norm.name for norm in norms}
    builder.nodes = [node for node in builder.nodes if node.name not in removed]
    for node in builder.nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    assert builder.is_topological()


def _fuse(added: NodeProto, norm: NodeProto, path: str) -> None:
    """Turn ``added`` into the fused node: outputs are the norm, mean and variance (left out), and the sum."""
    (epsilon,) = (attribute for attribute in norm.attribute if attribute.name == "epsilon")
    added.op_type, added.domain = f"Skip{NORM}", MICROSOFT
    added.input.append(norm.input[1])
    added.output[:] = [path, "", "", added.output[0]]
    added.attribute.append(helper.make_attribute("epsilon", epsilon.f))
