"""The channel graph of a network: what is tied to what, and what must stay when some gammas go."""

from slimming.channels.graph.channel_graph import ChannelGraph
from slimming.channels.graph.structure import Norm, Recording

__all__ = ["ChannelGraph", "Norm", "Recording"]
