"""Measurements of question 3's finished models that only the report needs."""

import itertools
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

import hw2_q3 as script
import utils

N_CANDIDATES = 10  # of the WER@k curves


def analyse(
    args: Namespace, data: utils.Pronunciations, device: torch.device, extra: Iterable[str] = ()
) -> dict[str, Any]:
    """Measure the finished model, or ensemble, of these arguments on the test words: 'lengths', in
    symbols; 'curves', WER@k for k = 1 to 10 of 'nucleus' samples and of a 'beam' of 10; 'mistakes',
    count_edits of the greedy spellings; 'ambiguity' of the beam's first spellings; and what
    `extra` names of EXTRA, on the validation words."""
    if args.ensemble:
        speller = script.load_ensemble(args, data, device)
    else:
        speller, _, _ = script.load_speller(script.make_run(args, data).checkpoint, device)
    pairs = speller.encode(script.directed_pairs(args, data, "test"))
    split = speller.target.split
    true, ks = list(map(split, pairs.spellings)), range(1, N_CANDIDATES + 1)
    greedy = script.spellings(speller.greedy(pairs, args.max_len))
    sampling = N_CANDIDATES, script.make_generator(args, device), args.max_len
    candidates = {
        "nucleus": script.spellings(speller.sample(pairs, args.topp, *sampling)),
        "beam": script.spellings(speller.beam(pairs, N_CANDIDATES, args.max_len)),
    }
    curves = {
        decoding: [script.wer_at_k(rows, pairs.spellings, k) for k in ks]
        for decoding, rows in candidates.items()
    }
    mistakes = count_edits([split(row[0]) for row in greedy], true)
    val = speller.encode(script.directed_pairs(args, data, "val"))
    more = {name: EXTRA[name](speller, args, val) for name in extra if name in EXTRA}
    return more | {
        "lengths": list(map(len, true)),
        "curves": curves,
        "mistakes": mistakes,
        "ambiguity": ambiguity(
            [row[0] for row in candidates["beam"]],
            {name: script.directed_pairs(args, data, name) for name in data.splits},
        ),
    }


def ambiguity(predicted: list[str], splits: dict[str, list[tuple]]) -> dict[str, float]:
    """How many errors are due to pronunciations with several spellings.

    Attested spellings of a pronunciation are all those in `splits`. Returns 'several', the share of
    test pronunciations with more than one; 'wer_any', the WER if any of them counts as correct; and
    'wer_best', the expected WER of a model that knows them all and has to choose one, if each is
    equally probable.
    """
    attested = defaultdict(set)
    for source, target in itertools.chain.from_iterable(splits.values()):
        attested[source].add(target)
    sources = [source for source, _ in splits["test"]]
    counts = np.array([len(attested[source]) for source in sources])
    correct = [word in attested[source] for word, source in zip(predicted, sources, strict=True)]
    return {
        "several": float((counts > 1).mean()),
        "wer_any": 1 - sum(correct) / len(correct),
        "wer_best": float((1 - 1 / counts).mean()),
    }


def count_edits(
    predicted: list[Sequence[str]], true: list[Sequence[str]], most_common: int = 20
) -> dict[str, Any]:
    """The single edits from true to predicted words, sequences of symbols: 'kinds', how many of
    each kind; 'common', the most frequent [true symbol, written symbol, count], '' for the written
    symbol of a deletion and for the true one of an insertion."""
    kinds, edits = Counter(), Counter()
    for written, word in zip(predicted, true, strict=True):
        for kind, i, j in Levenshtein.editops(word, written):
            kinds[kind] += 1
            edits["" if kind == "insert" else word[i], "" if kind == "delete" else written[j]] += 1
    common = sorted(edits.items(), key=lambda item: (-item[1], item[0]))[:most_common]
    return {"kinds": dict(sorted(kinds.items())), "common": [[a, b, n] for (a, b), n in common]}


P_VALUES, TEMPERATURES = (0.6, 0.8, 0.9, 1.0), (0.4, 0.6, 0.8, 1.0)


def sampling_errors(
    speller: script.Speller, args: Namespace, pairs: script.EncodedPairs
) -> dict[str, list[list[float]]]:
    """[temperature, p, CER of the first sample, WER@3] of nucleus sampling with a nucleus of mass p
    from tempered probabilities, for all TEMPERATURES and P_VALUES: 'as trained', and without label
    smoothing, 'unsmoothed'. Each starts with the same random numbers."""
    return {
        name: [
            [temperature, p, *tempered_errors(version, args, pairs, temperature, p)]
            for temperature, p in itertools.product(TEMPERATURES, P_VALUES)
        ]
        for name, version in (("as trained", speller), ("unsmoothed", speller.unsmoothed()))
    }


def tempered_errors(
    speller: script.Speller, args: Namespace, pairs: script.EncodedPairs, temperature: float,
    p: float,
) -> tuple[float, float]:  # fmt: skip
    """CER of the first sample, and WER@3, of probabilities raised to the power 1 / temperature and
    normalised, before the nucleus is chosen."""
    choose = script.nucleus_sampler(p, script.make_generator(args, pairs.sources.device))

    def choose_tempered(log_probs):  # (R, V) -> (R,)
        return choose((log_probs / temperature).log_softmax(1))

    samples = speller.decode(script.generate, pairs, 3, args.max_len, choose_tempered)
    scores = script.score_candidates(script.spellings(samples), pairs.spellings, 3)
    return scores["cer"], scores["wer@3"]


EXTRA = {"sampling": sampling_errors}
