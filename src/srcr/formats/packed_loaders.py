"""Which libraries load a compressed-tensors checkpoint, known from what it holds."""

from srcr.formats.checkpoint import Contents
from srcr.records.run import Loader

#: Bits of a word of packed codes.
WORD_BITS = 32
#: Widths for which vLLM takes zero-points; symmetric ones it takes from 2 to 8.
VLLM_ZERO_POINT_BITS = (4, 8)


def notes(contents: Contents) -> list[str]:
    """Which engines do not load the contents, and what they would load instead."""
    result = []
    if split := contents.split_groups():
        result.append(
            f"vLLM fuses {split[0].label} and serves them with the same bits, group size and symmetry only; "
            f"here they differ, as in {len(split)} groups in all: transformers loads that, vLLM does not"
        )
    tables = contents.embeddings()
    if not stacks_in_transformers(contents):
        result.append(
            "transformers stacks experts, and loads packed ones only where all have the same bits and group "
            "size and all other linears have the same, symmetric everywhere: srcr.load opens this "
            "checkpoint, transformers does not. It does in --format dense"
        )
    elif loader(contents) == "srcr":
        remedy = (
            f"left alone with --ignore {tables[0]}"
            if tables != [tables[0]]
            else "in --format dense"
        )
        result.append(
            f"{tables[0]} is packed, which transformers loads only where everything has the same bits, group "
            f"size and symmetry: srcr.load opens this checkpoint, transformers does not. It does where the "
            f"embedding has the linears' bits and group size, or is {remedy}"
        )
    dense = sorted({s.num_bits for s in contents.schemes.values() if WORD_BITS % s.num_bits})
    if dense:
        widths = " and ".join(map(str, dense))
        result.append(
            f"codes of {widths} bits are packed as compressed-tensors does since 0.18: older versions read "
            "other weights without a word (docs/loading.md), so use 2, 4 or 8 bits for them"
        )
    if tables and contents.topology.tied:
        result.append(
            f"{tables[0]} is the output head too, packed once: vLLM does not load that yet"
        )
    return result


def loader(contents: Contents) -> Loader:
    """Whether "transformers" loads a checkpoint of these contents as it stands, or "srcr" only.

    Transformers initialises embeddings while it loads them, and ties weights, not codes: a packed embedding
    must be dequantized as it is read, for which transformers takes one scheme for everything.
    """
    packed = contents.topology.embedding in contents.schemes
    several = packed and len(set(contents.schemes.values())) > 1
    return "transformers" if stacks_in_transformers(contents) and not several else "srcr"


def stacks_in_transformers(contents: Contents) -> bool:
    """Whether transformers stacks the experts, if there are any: for them it takes one scheme, around 0, and
    one for everything else."""
    topology, schemes = contents.topology, contents.schemes
    if not topology.experts:
        return True
    routed = {schemes.get(name) for name in topology.linears() if topology.routed(name)}
    shared = {scheme for name, scheme in schemes.items() if not topology.routed(name)}
    symmetric = all(scheme.symmetric for scheme in schemes.values())
    return len(routed) == 1 and len(shared) <= 1 and symmetric


def served_by_vllm(contents: Contents) -> bool:
    """Whether vLLM serves the contents: fused linears have one scheme, zero-points the widths that it knows,
    embeddings none, a packed embedding is not the output head too, and there are no experts, with which it
    was not run."""
    embeddings = [contents.schemes[name] for name in contents.embeddings()]
    return (
        not contents.split_groups()
        and not contents.topology.experts
        and all(
            s.symmetric or s.num_bits in VLLM_ZERO_POINT_BITS for s in contents.schemes.values()
        )
        and all(scheme.symmetric for scheme in embeddings)
        and not (embeddings and contents.topology.tied)
    )
