"""ChannelGraph: what `trace` returns and what makes plans."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels.criteria import Budget, Choice, Criterion
from slimming.channels.graph import explain, writing
from slimming.channels.graph.aligned import Aligned
from slimming.channels.graph.candidates import decided_aligned, decided_together, trainable_gammas
from slimming.channels.graph.deciding import Settling, check_scores, make_choice, unit_macs
from slimming.channels.graph.liveness import Solution
from slimming.channels.graph.remaining import count_cost, count_other_params
from slimming.channels.graph.scores import Given, score_gammas
from slimming.channels.graph.structure import Structure
from slimming.channels.latency import Latency
from slimming.channels.options import PlanOptions
from slimming.channels.penalty import other_norms
from slimming.channels.plan import PruningPlan, describe_network, fingerprint
from slimming.errors import GraphError
from slimming.options import check_options

SELECTING = {"topk", "sort", "argsort", "argmax", "max", "nms", "torchvision::nms", "nonzero", "where"}
SELECTING.add("_local_scalar_dense")  # operators that can select by score


class ChannelGraph(Structure):
    """The channels of a network: what is tied to what, what may go, and the plans for it.

    Attributes:
        model: the network.
        norms: BatchNorms with scales, by name; their gammas are numbered in this order.
        count: number of all gammas.
        unknown: reasons for which something was frozen that is not understood.
        train_reason: why train mode could not be watched; "" if it was.
    """

    def freezing(self, distrusted: list[tuple[Tensor, str]]) -> "ChannelGraph":
        """Return the graph of the same network in which these atoms, with a reason each, must stay as well."""
        return ChannelGraph(self.model, self.recording, distrusted)

    def candidates(self, ties: str, ignore: Iterable[str] = ()) -> Tensor:
        """Return which gammas may be chosen, (all gammas,) bool.

        Apart: every trainable one. Together: those of a class that dies with them. Such a class is not frozen, no BatchNorm
        reads it but one that is decided with it, and once all its gammas are pruned it is zero wherever a convolution or
        linear layer reads it. Aligned: those of a class that can leave every tensor that it lives in; see graph/aligned.py.

        Raises:
            ConfigError: a pattern to ignore that matches no BatchNorm.
        """
        return self._decided(ties, ignore)[1]

    @functools.cached_property
    def aligned(self) -> Aligned:
        """The network as `ties=aligned` sees it."""
        return Aligned(self)

    def _decided(self, ties: str, ignore: Iterable[str]) -> tuple[Structure, Tensor, Tensor]:
        """Return the network as this way of ties sees it, which gammas may be chosen, and the class of every gamma."""
        trainable = trainable_gammas(self, ignore)
        if ties == "aligned":
            return self.aligned, *decided_aligned(self.aligned, trainable)
        if ties == "together":
            return self, *decided_together(self, trainable)
        return self, trainable, torch.arange(self.count)

    def scores(self, score: str | Given, seed: int = 0, batches: Iterable[Any] = ()) -> Tensor:
        """Return a score per gamma, (all gammas,) float64: by name, or the given ones in that order.

        Args:
            score: `gamma`, `lamp`, `reconstruction`, `random` or `weight_l1`, see channels/graph/scores; or
                {layer: scores (C,)}.
            seed: of `random`.
            batches: training images for `reconstruction`: inputs, or (inputs, labels).

        Returns:
            nan where a score says nothing.

        Raises:
            GraphError: a gamma is not finite, or the score does not fit the network or the batches.
            ConfigError: a name that is unknown, or given scores of another shape.
        """
        return score_gammas(self, score, seed, batches)

    def plan(
        self,
        criterion: Criterion,
        *,
        score: str | Given = "gamma",
        seed: int = 0,
        batches: Iterable[Any] = (),
        **options: Any,
    ) -> PruningPlan:
        """Let a criterion choose, find everything that goes with its choice, and restore what the constraints want.

        Args:
            criterion: of slimming.channels.criteria.
            score, seed, batches: what the channels are ranked by; see `scores`.
            options: other fields of PlanOptions, which says what they mean and allow.

        Raises:
            GraphError: nothing can be pruned, or a candidate has no finite score.
            ConfigError: a value out of range, or a pattern to ignore that matches no BatchNorm.
        """
        name = score if isinstance(score, str) else "given"
        chosen = PlanOptions(**options) if name == "given" else PlanOptions(score=name, **options)
        check_options(chosen)
        self._check_prunable()
        view, free, classes = self._decided(chosen.ties, chosen.ignore)
        if not bool(free.any()):
            raise GraphError("no BatchNorm scale can go: " + self._why_not())
        values = check_scores(self, self.scores(score, seed, batches), free)
        choice = make_choice(self, free, classes, values, chosen.reduction)
        if chosen.ties == "aligned":  # what is restored in one layer comes back in all
            values[choice.gammas] = choice.score[choice.unit]
        if chosen.per == "macs":
            choice.score = choice.score / unit_macs(view, choice)
        settling = Settling(view, values, choice, chosen)
        usual = PlanOptions()
        others = {"score": name, "per": chosen.per, "ties": chosen.ties}
        asked = criterion.describe() | {key: value for key, value in others.items() if value != getattr(usual, key)}

        def plan_of(removed: Tensor) -> PruningPlan:
            return self._write_plan(view, settling.outcome(removed), choice, removed, asked)

        if isinstance(criterion, Latency):
            return plan_of(criterion.search(choice, settling, plan_of))
        if isinstance(criterion, Budget):
            return plan_of(criterion.search(choice, lambda removed: self.cost_share(settling.outcome(removed))))
        return plan_of(criterion.choose(choice))

    def _write_plan(
        self, view: Structure, solution: Solution, choice: Choice, removed: Tensor, asked: dict[str, Any]
    ) -> PruningPlan:
        layers = writing.layer_plans(self, solution)
        got = writing.describe_outcome(choice, removed, solution) | self.cost_share(solution)
        got["highest_score"] = float(choice.score[removed].max()) if bool(removed.any()) else None
        return PruningPlan(
            fingerprint=fingerprint(self.model),
            network=describe_network(self.model),
            spec=self.spec,
            keep={n: p.outs for n, p in layers.items() if p.kind == "norm" and len(p.outs) < p.size[1]},
            layers=layers,
            asked=asked,
            got=got,
            train_watched=not self.train_reason,
            train_reason=self.train_reason,
            attributes=writing.attribute_values(self, solution),
            zeroed=writing.zeroed_filters(view, solution),
            compare="layers" if any(r.split(" in ")[0] in SELECTING for r in self.unknown) else "outputs",
        )

    def cost_share(self, solution: Solution) -> dict[str, float]:
        """Return {macs, params}: what remains, as shares of the dense network's."""
        dense, thin = self.dense_cost, self._cost(solution.live, solution.kept)
        return {k: thin[k] / max(1, dense[k]) for k in thin}

    @functools.cached_property
    def dense_cost(self) -> dict[str, int]:
        """{macs, params} of the network as it is; macs of the whole example."""
        return self._cost(None, None)

    @functools.cached_property
    def _other_params(self) -> int:
        return count_other_params(self)

    def _cost(self, live: Tensor | None, kept: Tensor | None) -> dict[str, int]:
        counted = count_cost(self, live, kept)
        return counted | {"params": counted["params"] + self._other_params}

    def _check_prunable(self) -> None:
        if self.norms:
            return
        frozen = [n for n, m in self.model.named_modules() if type(m).__name__.startswith("FrozenBatchNorm")]
        if frozen:
            raise GraphError(
                f"the network's {len(frozen)} FrozenBatchNorm layers ({frozen[0]}, ...) have scales that do not train: "
                "build it with BatchNorm (norm_layer=nn.BatchNorm2d) and train those with the penalty"
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            raise GraphError(
                "no BatchNorm of the network has scales and ran on the example input as a layer of its own"
            )
        instead = other_norms(self.model)
        raise GraphError(
            f"the network has no BatchNorm scales to choose by{instead and f' ({instead})'}: insert nn.BatchNorm2d after its "
            "convolutions (before the activation) and train with the penalty"
        )

    def _why_not(self) -> str:
        if not any(n.trainable for n in self.norms.values()):
            return "all have requires_grad=False; set it to True and train with the penalty"
        reasons = self.unknown[:3] or ["they are tied to inputs, outputs or layers without BatchNorm"]
        return "; ".join(reasons) + "; try ties='apart'"

    def shares(self) -> dict[str, Any]:
        """Return how much of the network a plan can choose from; see explain.shares."""
        return explain.shares(self)

    def describe(self) -> str:
        """Return a table for people: every BatchNorm, what may go, and what was frozen and why."""
        return explain.describe(self)
