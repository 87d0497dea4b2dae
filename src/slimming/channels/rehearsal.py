"""Sizes that may be written into forward: a rehearsal shows whether they follow the channels that they count."""

from slimming.channels.criteria import GlobalRatio
from slimming.channels.graph import ChannelGraph
from slimming.channels.graph.explain import kind_of
from slimming.channels.proof import prove_sizes
from slimming.channels.surgery import prune
from slimming.errors import GraphError


def settle_doubts(graph: ChannelGraph) -> ChannelGraph:
    """Return the graph with those doubtful sizes frozen that do not follow the channels.

    If a rehearsal of all doubts together fails, they are tried one kind after the other.
    """
    tape = graph.tape
    doubts = [*tape.doubtful, *((resize.atoms, resize.reason) for resize in tape.resizes)]
    if not doubts or _rehearse(graph):
        return graph
    trusted: list[str] = []

    def freeze_others(kinds: list[str]) -> ChannelGraph:
        return graph.freezing([(atoms, reason) for atoms, reason in doubts if kind_of(reason) not in kinds])

    for kind in dict.fromkeys(kind_of(reason) for _, reason in doubts):
        if _rehearse(freeze_others([*trusted, kind])):
            trusted.append(kind)
    return freeze_others(trusted)


def _rehearse(graph: ChannelGraph) -> bool:
    """Return whether a random half of all gammas can go, decided each way, and the proof holds."""
    for ties in ("apart", "together", "aligned"):
        try:
            plan = graph.plan(GlobalRatio(0.5), ties=ties, score="random")
            prove_sizes(graph.model, prune(graph.model, plan, verify=False), plan)
        except GraphError:  # nothing to prune: no doubt to settle
            continue
        except Exception:
            return False
    return True
