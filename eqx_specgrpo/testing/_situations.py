"""Targets and drafts of every kind over a tiny vocabulary, as trees of unrelated distributions."""

import functools as ft

import equinox as eqx
import numpy as np

from ..sampling import AbstractSampling, GreedySampling, Sampling, TruncatedSampling

# At depth d: [cases, vocab, ..., vocab], the logits of a token given d tokens before it.
Tree = list[np.ndarray]

VOCAB = {1: 5, 2: 4, 3: 3}


class Situations(eqx.Module):
    """A batch of cases.

    **Arguments:**

    - `names`: what each case is, target first.
    - `target`, `draft`: logits, `-inf` where a token has no probability.
    """

    names: tuple[str, ...]
    target: Tree
    draft: Tree


@ft.cache
def situations(length: int) -> Situations:
    """The cases for chains of `length` drafted tokens, 1 to 3."""
    rng, vocab = np.random.default_rng(length), VOCAB[length]

    def tree(scale: float) -> Tree:
        return random_tree(rng, vocab, length + 1, scale)

    diffuse, sharp = tree(0.7), tree(6.0)
    slightly_off = [logits + 1e-4 * rng.standard_normal(logits.shape).astype(np.float32) for logits in diffuse]
    some, others = list(range(vocab // 2)), list(range(vocab // 2, vocab))
    top_k, top_p, greedy = Sampling(0.8, top_k=2), Sampling(1.3, top_p=0.7), GreedySampling()
    min_p, bounded = Sampling(1.3, min_p=0.5), TruncatedSampling(1.3, max_support=2, top_p=0.9)
    pairs = {
        "diffuse target, diffuse draft": (diffuse, tree(0.7)),
        "sharp target, diffuse draft": (sharp, diffuse),
        "diffuse target, sharp draft": (diffuse, sharp),
        "sharp target, sharp draft": (sharp, tree(6.0)),
        "top-k target, whole draft": (transform(diffuse, top_k), tree(1.0)),
        "top-p target, whole draft": (transform(diffuse, top_p), tree(1.0)),
        "whole target, top-k draft": (tree(1.0), transform(tree(1.0), top_k)),
        "top-k target, top-k draft": (transform(diffuse, top_k), transform(tree(1.0), top_k)),
        "top-p target, top-p draft": (transform(diffuse, top_p), transform(tree(1.0), top_p)),
        "top-p target, greedy draft": (transform(diffuse, top_p), transform(tree(1.0), greedy)),
        "min-p target, whole draft": (transform(diffuse, min_p), tree(1.0)),
        "bounded nucleus of both": (transform(diffuse, bounded), transform(tree(1.0), bounded)),
        "greedy target, whole draft": (transform(diffuse, greedy), tree(1.0)),
        "equal target and draft": (diffuse, diffuse),
        "equal target and draft, with zeros": (transform(diffuse, top_k), transform(diffuse, top_k)),
        "nearly equal target and draft": (diffuse, slightly_off),
        "disjoint supports": (only(diffuse, some), only(diffuse, others)),
    }
    target, draft = (
        [np.concatenate(x) for x in zip(*trees, strict=True)] for trees in zip(*pairs.values(), strict=True)
    )
    return Situations(tuple(pairs), target, draft)


def random_tree(rng: np.random.Generator, vocab: int, depth: int, scale: float) -> Tree:
    """One case with normal logits."""
    return [scale * rng.standard_normal((1, *[vocab] * (d + 1))).astype(np.float32) for d in range(depth)]


def transform(tree: Tree, sampling: AbstractSampling) -> Tree:
    """What a sampling transform makes of every distribution."""
    flat = np.concatenate([logits.reshape(-1, logits.shape[-1]) for logits in tree])
    # One shape for many trees, so that little is compiled.
    flat = np.asarray(_logits(sampling, np.pad(flat, ((0, -len(flat) % 512), (0, 0)))))
    sizes = [logits.size // logits.shape[-1] for logits in tree]
    parts = np.split(flat[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [part.reshape(logits.shape) for part, logits in zip(parts, tree, strict=True)]


@eqx.filter_jit
def _logits(sampling, logits):
    return sampling.distribution(logits).dense(logits.shape[-1]).logits


def only(tree: Tree, tokens: list[int]) -> Tree:
    """No probability for any token but these."""
    allowed = np.isin(np.arange(tree[0].shape[-1]), tokens)
    return [np.where(allowed, logits, -np.inf).astype(np.float32) for logits in tree]


def softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    logits = logits.astype(np.float64)
    unnormalized = np.exp(logits - logits.max(-1, keepdims=True))
    return unnormalized / unnormalized.sum(-1, keepdims=True)


def joint_law(tree: Tree, depth: int) -> np.ndarray:
    """The law of `depth` tokens, `[cases, vocab, ..., vocab]`."""
    law = np.ones(len(tree[0]))
    for logits in tree[:depth]:
        law = law[..., None] * softmax(logits)
    return law
