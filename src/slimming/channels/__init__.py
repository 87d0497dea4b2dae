"""The core: it finds out which channels can go, and makes the network without them. It needs torch alone.

`trace` runs a network on an example input and returns its `ChannelGraph`; `ChannelGraph.plan` lets a criterion choose and
returns a `PruningPlan`; `prune` makes the smaller network and `mask` the network of the same size that it must equal.

Words that all files here use:

atom: an int that stands for one channel of one activation; activations that share a channel share its atom.
tape: what one run writes down: atoms, ties, zeros, and the uses of layers.
use: one call of a layer with weights; it reads atoms and writes atoms.
tie: two atoms that must stay or go together. A component is a class of atoms connected by ties.
slot: the atom that a BatchNorm writes for one of its channels. A BatchNorm writes new atoms, so that pruning one of its
    channels forces nothing on its input, and ties join slots rather than gammas.
zero: an atom whose channel is 0 everywhere once certain gammas and betas are 0; nothing needs to read it.
live: a component that something needs. What is neither live nor chosen is dead, and is removed as well.
constraint: what a plan must keep whatever the criterion says, `min_channels` for example; constraints restore channels.
plan: the plain data that say which channels of every layer stay.
"""
