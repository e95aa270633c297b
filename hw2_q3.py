"""Question 3: a character-level sequence-to-sequence model that spells words from their IPA.

    python hw2_q3.py --use_attn --nucleus          train with attention, test, sample as well
    python hw2_q3.py                               the same without attention, greedy
    python hw2_q3.py test --use_attn --beam_size 5 test the trained model, with beam search
    python hw2_q3.py spell "h ə l oʊ" "w ɝ l d"    spell your own IPA
    python hw2_q3.py --use_attn --direction g2p    the other way: pronounce written words

Test CER / WER, greedy, mean ± standard deviation over 3 seeds: 0.216 ± 0.006 / 0.736 ± 0.013 with
attention, 0.302 ± 0.009 / 0.808 ± 0.015 without; 2 to 5 minutes each on one thread of a CPU.

model | decoding | symbols | scores | training | testing | spelling | figures | options | main
"""

import contextlib
import itertools
import math
import os
import sys
import time
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.optim import Optimizer
from tqdm import tqdm

import utils
from utils import UserError

SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNK, START, END = range(len(SPECIAL))  # no decoder ever emits those before END

# ----------------------------------------------------------------------------------------------
# model


class Memory(NamedTuple):
    """What attention reads of the encoder.

    values: (B, S, H), the encoder's outputs; keys: (B, S, H), their projections, computed once
    mask: bool (B, S), true where there is a phoneme
    """

    values: Tensor
    keys: Tensor
    mask: Tensor


class BahdanauAttention(nn.Module):
    """Additive attention, Bahdanau et al. 2015, section 3.1 and appendix A.1.2: position i has the
    score v . tanh(W_h h_i + W_s s).

    Here s is the decoder's state after the current character, and the context joins it after the
    LSTM, tanh(W [context; s]) (Luong et al. 2015, section 3.1), so all steps of a known target are
    computed at once. Only pairs of a state and a phoneme of its own word are computed: in a batch
    of mixed lengths they are a quarter to a third of a padded (B, T, S).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)  # W_h
        self.query = nn.Linear(hidden_size, hidden_size)  # W_s
        self.score = nn.Linear(hidden_size, 1, bias=False)  # v
        self.combine = nn.Linear(2 * hidden_size, hidden_size)  # W

    def forward(self, states: Tensor, words: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """states (R, H), each of the word at index `words` (R,) of the memory -> attentional
        vectors (R, H) and attention weights (R, S)."""
        mask = memory.mask[words]  # (R, S)
        rows, positions = mask.nonzero(as_tuple=True)  # (P,), the pairs, row by row
        indices = words[rows] * mask.shape[1] + positions  # (P,), into the memory's B * S
        queries = F.embedding(rows, self.query(states))  # (P, H)
        keys = F.embedding(indices, memory.keys.flatten(0, 1))  # (P, H)
        scores = self.score(torch.tanh(keys + queries)).squeeze(1)  # (P,)
        scores = torch.full_like(mask, -torch.inf, dtype=scores.dtype).masked_scatter(mask, scores)
        attn_weights = scores.softmax(1)  # (R, S), exactly 0 where masked
        context = F.embedding_bag(  # (R, H), the weighted sum of each row's values
            indices,
            memory.values.flatten(0, 1),
            offsets=mask.sum(1).cumsum(0) - mask.sum(1),
            per_sample_weights=attn_weights.masked_select(mask),
            mode="sum",
        )
        return torch.tanh(self.combine(torch.cat((context, states), 1))), attn_weights


def make_lstm(inputs: int, hidden_size: int, layers: int, dropout: float, **more) -> nn.LSTM:
    """An LSTM with dropout between its layers."""
    between = dropout if layers > 1 else 0.0
    return nn.LSTM(inputs, hidden_size, layers, batch_first=True, dropout=between, **more)


class Encoder(nn.Module):
    """Bidirectional LSTM: phonemes (B, S), padded, and lengths (B,), on the CPU, -> outputs
    (B, S, H) and final states 2 x (layers, B, H)."""

    def __init__(self, symbols: int, hidden_size: int, dropout: float, layers: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden_size, padding_idx=PAD)
        self.lstm = make_lstm(hidden_size, hidden_size // 2, layers, dropout, bidirectional=True)
        self.dropout = utils.FastDropout(dropout)

    def forward(self, sources: Tensor, lengths: Tensor) -> tuple[Tensor, tuple]:
        x = self.dropout(self.embedding(sources))  # (B, S, H)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.lstm(packed)  # 2 x (layers * 2, B, H / 2)
        whole = {"batch_first": True, "total_length": sources.shape[1]}
        outputs, _ = pad_packed_sequence(outputs, **whole)  # (B, S, H)
        state = (part.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) for part in state)
        return self.dropout(outputs), tuple(state)  # 2 x (layers, B, H)


class Decoder(nn.Module):
    """LSTM over characters, with or without attention; the output layer is tied to the embedding
    (Press and Wolf 2017, section 2).

    input_feeding: the LSTM also receives the previous attentional vector (Luong et al. 2015,
    section 3.3), so it knows where attention has been, but is computed step by step.
    """

    def __init__(
        self, symbols: int, hidden_size: int, dropout: float, use_attn: bool, layers: int = 1,
        input_feeding: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.input_feeding = input_feeding
        self.embedding = nn.Embedding(symbols, hidden_size, padding_idx=PAD)
        if input_feeding:
            widths = [2 * hidden_size] + [hidden_size] * (layers - 1)
            self.cells = nn.ModuleList(nn.LSTMCell(width, hidden_size) for width in widths)
        else:
            self.lstm = make_lstm(hidden_size, hidden_size, layers, dropout)
        self.attention = BahdanauAttention(hidden_size) if use_attn else None
        self.dropout = utils.FastDropout(dropout)
        self.output = nn.Linear(hidden_size, symbols)
        self.output.weight = self.embedding.weight

    def forward(
        self, characters: Tensor, state: tuple, memory: Memory | None, mask: Tensor,
        words: Tensor,
    ) -> tuple[Tensor, tuple, Tensor | None]:  # fmt: skip
        """Characters so far (B, T) and a state as of Seq2Seq.encode -> logits (R, V) of the next
        character at the R true positions of `mask` (B, T), row by row, the state after the last
        character, and the attention weights (R, S), None without attention.

        words: int64 (B,), the index into the memory of the word that each row spells.
        """
        x = self.dropout(self.embedding(characters))  # (B, T, H)
        if self.input_feeding:
            x, state, attn_weights = self._step_by_step(x, state, memory, mask, words)
            return self.output(x), state, attn_weights
        x, state = self.lstm(x, state)
        indices = mask.flatten().nonzero()[:, 0]  # (R,), into B * T
        x, attn_weights = F.embedding(indices, x.flatten(0, 1)), None  # (R, H)
        if self.attention is not None:
            x, attn_weights = self.attention(x, words[indices // mask.shape[1]], memory)
        return self.output(self.dropout(x)), state, attn_weights

    def _step_by_step(self, embedded, state, memory, mask, words):
        """The same for embedded characters (B, T, H): attentional vectors (R, H), the state of the
        rows that have a last step, and the attention weights (R, S).

        Finished rows are dropped; a row's true positions in `mask` come first.
        """
        hidden, cell, input_feed = state
        layers, input_feed = list(zip(hidden, cell)), input_feed[0]  # layers x 2 x (B, H); (B, H)
        batch = torch.arange(len(words), device=words.device)
        outputs, attn_weights, indices = [], [], []
        for step, x in enumerate(embedded.unbind(1)):  # (B, H)
            active = mask[batch, step].nonzero()[:, 0]
            if len(active) < len(batch):
                batch, input_feed = batch[active], input_feed.index_select(0, active)
                layers = [tuple(part.index_select(0, active) for part in pair) for pair in layers]
            x = torch.cat((x.index_select(0, batch), input_feed), 1)  # (active, 2H)
            for i, lstm in enumerate(self.cells):
                layers[i] = lstm(self.dropout(x) if i else x, layers[i])
                x = layers[i][0]
            x, weights = self.attention(x, words[batch], memory)
            input_feed = self.dropout(x)
            outputs.append(input_feed)
            attn_weights.append(weights)
            indices.append(batch * mask.shape[1] + step)
        order = torch.cat(indices).argsort()  # row by row
        outputs, attn_weights = (
            F.embedding(order, torch.cat(part)) for part in (outputs, attn_weights)
        )
        hidden, cell = map(torch.stack, zip(*layers))
        return outputs, (hidden, cell, input_feed.unsqueeze(0)), attn_weights


class Seq2Seq(nn.Module):
    """Encoder and decoder; the decoder starts from the encoder's final states.

    source_size, target_size: numbers of symbols on the two sides.
    """

    def __init__(
        self, source_size: int, target_size: int, hidden_size: int = 128, dropout: float = 0.3,
        use_attn: bool = False, layers: int = 1, input_feeding: bool = False,
    ):  # fmt: skip
        super().__init__()
        decoder = hidden_size, dropout, use_attn, layers, input_feeding
        self.encoder = Encoder(source_size, hidden_size, dropout, layers)
        self.decoder = Decoder(target_size, *decoder)

    def encode(self, sources: Tensor, lengths: Tensor) -> tuple[Memory | None, tuple]:
        """Phonemes (B, S), lengths (B,) on the CPU -> Memory, None without attention, and state:
        hidden and cell (layers, B, H), with input feeding also its first input (1, B, H)."""
        outputs, state = self.encoder(sources, lengths)
        if self.decoder.attention is None:
            return None, state
        if self.decoder.input_feeding:
            state = *state, torch.zeros_like(state[0][:1])
        return Memory(outputs, self.decoder.attention.key(outputs), sources != PAD), state

    def forward(
        self, sources: Tensor, lengths: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same and targets (B, T), padded: START, characters, END -> logits (R, V) of every
        character after a START, word by word, and the attention weights (R, S)."""
        memory, state = self.encode(sources, lengths)
        words = torch.arange(len(sources), device=sources.device)
        mask = targets[:, 1:] != PAD
        logits, _, attn_weights = self.decoder(targets[:, :-1], state, memory, mask, words)
        return logits, attn_weights

    def next_log_probs(
        self, last: Tensor, state: tuple, memory: Memory | None, words: Tensor
    ) -> tuple[Tensor, tuple]:
        """One step of rows that spell `words` (R,), indices into the memory: last characters (R,)
        -> log-probabilities (R, V) of the next ones and the new state."""
        mask = torch.ones_like(last, dtype=torch.bool).unsqueeze(1)  # (R, 1)
        logits, state, _ = self.decoder(last.unsqueeze(1), state, memory, mask, words)
        logits[:, :END] = -torch.inf
        return logits.log_softmax(1), state


class Ensemble(nn.Module):
    """Models with the same symbols that spell together: the next character has the mean of their
    probabilities (Sutskever et al. 2014, section 3.6)."""

    def __init__(self, models: Iterable[Seq2Seq]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def encode(self, sources: Tensor, lengths: Tensor) -> tuple[tuple, tuple]:
        """As Seq2Seq.encode: a tuple of memories, and all states one after the other."""
        memories, states = zip(*(model.encode(sources, lengths) for model in self.models))
        self.state_sizes = list(map(len, states))
        return memories, sum(states, ())

    def next_log_probs(
        self, last: Tensor, state: tuple, memory: tuple, words: Tensor
    ) -> tuple[Tensor, tuple]:
        """As Seq2Seq.next_log_probs."""
        results, rest = [], iter(state)
        for model, model_memory, size in zip(self.models, memory, self.state_sizes):
            model_state = tuple(itertools.islice(rest, size))
            results.append(model.next_log_probs(last, model_state, model_memory, words))
        log_probs, states = zip(*results)
        return torch.stack(log_probs).logsumexp(0) - math.log(len(results)), sum(states, ())


def build_model(args: Namespace, source: "Vocabulary", target: "Vocabulary") -> Seq2Seq:
    """The model that the arguments describe, for the two vocabularies."""
    shape = args.hidden_size, args.dropout, args.use_attn, args.layers, args.input_feeding
    model = Seq2Seq(len(source), len(target), *shape)
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            part.embedding.weight.mul_(args.embedding_scale)
    return model


# ----------------------------------------------------------------------------------------------
# decoding

DECODE_BATCH_SIZE = 1024  # spellings; few enough that words of like length stay together
MAX_LEN = 50  # characters


@torch.inference_mode()
def generate(
    model: Seq2Seq | Ensemble, sources: Tensor, lengths: Tensor,
    choose: Callable[[Tensor], Tensor], copies: int = 1, max_len: int = MAX_LEN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spell every word `copies` times, each character chosen by choose(log_probs (R, V)) -> (R,).

    Returns characters (N, copies, max_len), END and then PAD after each spelling, and the
    spellings' log-probabilities (N, copies). Finished rows are dropped.
    """
    memory, state = model.encode(sources, lengths)
    words = torch.arange(len(sources), device=sources.device).repeat_interleave(copies)
    state = tuple(part[:, words] for part in state)
    characters = torch.full((len(words), max_len), PAD, device=sources.device)
    scores = torch.zeros(len(words), device=sources.device)
    batch = torch.arange(len(words), device=sources.device)  # the unfinished rows
    last = torch.full_like(batch, START)
    for position in range(max_len):
        log_probs, state = model.next_log_probs(last, state, memory, words[batch])
        last = choose(log_probs)
        characters[batch, position] = last
        scores[batch] += log_probs.gather(1, last.unsqueeze(1))[:, 0]
        active = last != END
        batch, last, state = batch[active], last[active], tuple(part[:, active] for part in state)
        if len(batch) == 0:
            break
    return characters.view(-1, copies, max_len), scores.view(-1, copies)


def nucleus(log_probs: Tensor, p: float) -> Tensor:
    """Log-probabilities (R, V) -> probabilities (R, V) of the nucleus: the smallest set of most
    probable tokens whose probabilities sum to at least p, the others 0 (Holtzman et al. 2020,
    section 3.1)."""
    probs = log_probs.softmax(1)
    if p < 1:
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered  # the sum of the more probable ones
        kept = before < p
        kept[:, 0] = True  # also if p is too small for a float32
        probs = probs.scatter(1, order, ordered.where(kept, 0))
    return probs / probs.sum(1, keepdim=True)


def nucleus_sampler(p: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function (log-probabilities (R, V)) -> tokens (R,) sampled from the nucleus.

    One uniform number per row is compared with the cumulated probabilities (torch.multinomial
    draws one per token).
    """

    def choose(log_probs):
        cumulated = nucleus(log_probs, p).cumsum(1)  # (R, V)
        device = generator.device
        point = torch.rand(len(log_probs), 1, generator=generator, device=device)
        return (cumulated <= point * cumulated[:, -1:]).sum(1)  # the first beyond the point

    return choose


@torch.inference_mode()
def beam_search(
    model: Seq2Seq | Ensemble, sources: Tensor, lengths: Tensor, beam_size: int,
    max_len: int = MAX_LEN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `beam_size` most probable spellings that a beam of this size finds, best first.

    Returns characters (N, beam_size, max_len), END and then PAD after each spelling, and their
    log-probabilities (N, beam_size), -inf where there are fewer. A finished spelling keeps its
    place in the beam while it is among the best, without further computation.
    """
    memory, state = model.encode(sources, lengths)
    device, count = sources.device, len(sources)
    characters = torch.full((count, beam_size, max_len), PAD, device=device)
    scores = torch.full((count, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0  # at first the beam holds one spelling, the empty one
    row_of = torch.full((count, beam_size), -1, device=device)  # -1: finished or absent
    row_of[:, 0] = torch.arange(count, device=device)
    last = torch.full((count,), START, device=device)
    words = torch.arange(count, device=device)
    for position in range(max_len):
        log_probs, state = model.next_log_probs(last, state, memory, words)
        size = log_probs.shape[1]
        candidates = torch.full((count, beam_size, size), -torch.inf, device=device)
        candidates[:, :, PAD] = scores.where(row_of < 0, -torch.inf)  # finished: as it is
        live = row_of >= 0
        candidates[live] = scores[live].unsqueeze(1) + log_probs[row_of[live]]
        scores, best = candidates.flatten(1).topk(beam_size, 1)  # (N, beam_size)
        parent, token = best // size, best % size
        characters = characters.gather(1, parent.unsqueeze(2).expand_as(characters))
        characters[:, :, position] = token
        active = (token != PAD) & (token != END) & (scores > -torch.inf)
        rows = row_of.gather(1, parent)[active]
        if len(rows) == 0:
            break
        row_of = torch.full_like(row_of, -1)
        row_of[active] = torch.arange(len(rows), device=device)
        words, last = active.nonzero()[:, 0], token[active]
        state = tuple(part[:, rows] for part in state)
    return characters, scores


class Speller(NamedTuple):
    """A model and the vocabularies of its two sides. Each way of spelling `EncodedPairs` gives for
    each word a list of candidates (spelling, log-probability)."""

    model: Seq2Seq | Ensemble
    source: "Vocabulary"
    target: "Vocabulary"

    def encode(self, pairs: list[tuple]) -> "EncodedPairs":
        """Pairs (phonemes, spelling) as tensors on the model's device."""
        return encode_pairs(pairs, self.source, self.target, next(self.model.parameters()).device)

    def greedy(self, pairs: "EncodedPairs", max_len: int = MAX_LEN) -> list[list[tuple]]:
        """One candidate: the most probable character at each step."""

        def decode(*sources):
            return generate(self.model, *sources, lambda x: x.argmax(1), 1, max_len)

        return self._spell(pairs, 1, decode)

    def sample(
        self, pairs: "EncodedPairs", p: float, k: int, generator: torch.Generator,
        max_len: int = MAX_LEN,
    ) -> list[list[tuple]]:  # fmt: skip
        """k samples from the nucleus, in the order they were drawn."""
        choose = nucleus_sampler(p, generator)
        return self._spell(pairs, k, lambda *s: generate(self.model, *s, choose, k, max_len))

    def beam(self, pairs: "EncodedPairs", beam_size: int, max_len: int = MAX_LEN) -> list[list]:
        """The `beam_size` best that a beam of this size finds, best first."""
        size = beam_size
        return self._spell(pairs, size, lambda *s: beam_search(self.model, *s, size, max_len))

    def _spell(self, pairs, copies, decode):
        """Decode words of like length together, at most DECODE_BATCH_SIZE spellings at once."""
        self.model.eval()
        order = pairs.lengths.argsort(stable=True)
        spelled = [None] * len(order)
        for batch in order.split(max(1, DECODE_BATCH_SIZE // copies)):
            lengths = pairs.lengths[batch]
            sources = pairs.sources[batch.to(pairs.sources.device), : lengths.max()]
            results = (part.tolist() for part in decode(sources, lengths))
            for i, tokens, scores in zip(batch.tolist(), *results):
                candidates = ((self.target.decode(t), score) for t, score in zip(tokens, scores))
                spelled[i] = [c for c in candidates if c[1] > -math.inf]
        return spelled


def spellings(candidates: list[list[tuple]]) -> list[list[str]]:
    """Candidates without their log-probabilities."""
    return [[spelling for spelling, _ in row] for row in candidates]


# ----------------------------------------------------------------------------------------------
# symbols


class Vocabulary:
    """The symbols of one side, indexed from 0, the special ones first: a text has none of these;
    what looks like one there is another symbol.

    A symbol that is not in the training words is read as UNK, whose embedding is never trained: it
    keeps its random initial value. spaced: whether spaces separate the symbols of a text, as they
    do phonemes.
    """

    def __init__(self, symbols: Iterable[str], spaced: bool = False):
        self.symbols, self.spaced = list(symbols), spaced
        self.stoi = {s: i for i, s in enumerate(self.symbols) if i >= len(SPECIAL)}

    @classmethod
    def of(cls, sequences: Iterable[str | tuple], spaced: bool = False) -> "Vocabulary":
        """The vocabulary of all symbols in `sequences`, tuples of symbols or texts."""
        split = cls((), spaced).split
        sequences = (split(s) if isinstance(s, str) else s for s in sequences)
        return cls([*SPECIAL, *sorted({symbol for s in sequences for symbol in s})], spaced)

    def __len__(self):
        return len(self.symbols)

    def split(self, text: str) -> list[str]:
        """The symbols of a text."""
        return text.split() if self.spaced else list(text)

    def join(self, symbols: Iterable[str]) -> str:
        """The text of these symbols."""
        return (" " if self.spaced else "").join(symbols)

    def encode(self, sequence: Iterable[str]) -> list[int]:
        """The indices of the symbols; UNK for an unknown one."""
        return [self.stoi.get(symbol, UNK) for symbol in sequence]

    def decode(self, indices: list[int]) -> str:
        """The text of the symbols up to the first END or padding."""
        ends = (i for i, index in enumerate(indices) if index in (END, PAD))
        return self.join(self.symbols[index] for index in indices[: next(ends, None)])


class EncodedPairs(NamedTuple):
    """Pairs (phonemes, spelling) as tensors, padded with PAD.

    sources: int64 (N, S), phonemes; lengths: int64 (N,), on the CPU, their numbers
    targets: int64 (N, T), START, characters, END; target_lengths: int64 (N,), on the CPU
    spellings: N strings
    """

    sources: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    spellings: list[str]


def encode_pairs(
    pairs: list[tuple], source: Vocabulary, target: Vocabulary, device: torch.device | str = "cpu"
) -> EncodedPairs:
    """Pairs (phonemes, spelling) as `EncodedPairs`, by the vocabularies of the two sides."""
    sources = [torch.tensor(source.encode(phonemes)) for phonemes, _ in pairs]
    targets = [torch.tensor([START, *target.encode(target.split(word)), END]) for _, word in pairs]
    return EncodedPairs(
        pad_sequence(sources, batch_first=True, padding_value=PAD).to(device),
        torch.tensor([len(source) for source in sources]),
        pad_sequence(targets, batch_first=True, padding_value=PAD).to(device),
        torch.tensor([len(target) for target in targets]),
        [word for _, word in pairs],
    )


def is_g2p(args: Namespace) -> bool:
    """Whether words are pronounced (g2p), not spelled (p2g)."""
    return args.direction == "g2p"


def swap_direction(data: utils.Pronunciations) -> utils.Pronunciations:
    """The words as g2p needs them: pairs (letters, phonemes as a text)."""
    splits = {
        split: [(tuple(word), " ".join(phonemes)) for phonemes, word in pairs]
        for split, pairs in data.splits.items()
    }
    return utils.Pronunciations(splits, data.name)


# ----------------------------------------------------------------------------------------------
# scores


def distances(predicted: list[str], true: list[str], split: Callable = list) -> list[int]:
    """The Levenshtein distance of each pair of texts, in the symbols that `split` gives."""
    pairs = zip(predicted, true, strict=True)
    return [Levenshtein.distance(split(a), split(b)) for a, b in pairs]


def cer(predicted: list[str], true: list[str], split: Callable = list) -> float:
    """Character error rate: summed Levenshtein distances / summed lengths of the true words. For
    g2p, whose `split` gives phonemes, the phoneme error rate."""
    return sum(distances(predicted, true, split)) / sum(len(split(word)) for word in true)


def wer(predicted: list[str], true: list[str]) -> float:
    """Word error rate: the share of words not spelled exactly."""
    return wer_at_k([[word] for word in predicted], true, 1)


def wer_at_k(candidates: list[list[str]], true: list[str], k: int) -> float:
    """WER@k: the share of words that none of their first k candidates spells exactly."""
    wrong = sum(word not in row[:k] for row, word in zip(candidates, true, strict=True))
    return wrong / len(true)


def score_candidates(
    candidates: list[list[str]], true: list[str], k: int = 1, split: Callable = list
) -> dict[str, Any]:
    """CER and WER of the first candidates, and WER@k; for each word the first candidate's
    Levenshtein distance and the rank, from 1, of the first correct candidate, 0 without one."""
    first = [row[0] for row in candidates]
    ranks = [row.index(word) + 1 if word in row else 0 for row, word in zip(candidates, true)]
    scores = {"cer": cer(first, true, split), "wer": wer(first, true)}
    scores[f"wer@{k}"] = wer_at_k(candidates, true, k)
    return scores | {"distances": distances(first, true, split), "ranks": ranks}


# ----------------------------------------------------------------------------------------------
# training

TRAINING_VERSION = 2  # raised when a change alters the results of training
DATA_DIR = utils.ROOT / "data"


def train(args: Namespace) -> None:
    """Train one model, resuming if it was interrupted, with a checkpoint per epoch that also keeps
    the weights of the lowest validation CER; test these unless the mode is 'train'; write record
    and figures. Raises UserError."""
    data, device = load_data(args), utils.prepare_device(args.device, args.threads or 1)
    print("\n".join(audit(data)))
    run, data = make_run(args, data), swap_direction(data) if is_g2p(args) else data
    with utils.run_lock(run):
        if args.restart:
            run.checkpoint.unlink(missing_ok=True)
        source, target = make_vocabularies(args, data)
        utils.seed_everything(args.seed)
        model = build_model(args, source, target).to(device)
        speller = Speller(model, source, target)
        pairs = {split: speller.encode(data.splits[split]) for split in ("train", "val")}
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=fused)
        print(f"Run {run.name}\nTrainable parameters: {utils.count_parameters(model):,}")
        saved = utils.resume(run, model, optimizer)
        history, seconds, best = saved["history"], saved["seconds"], saved.get("best")
        if len(seconds) == args.n_epochs:
            print("Training is finished; --restart retrains it")
        symbols = {"source": source.symbols, "target": target.symbols}
        with utils.recording_divergence(run, model, history, seconds):
            for epoch in range(len(seconds) + 1, args.n_epochs + 1):
                started = time.perf_counter()
                row = {"train_loss": train_one_epoch(model, optimizer, pairs["train"], epoch, args)}
                row |= validate(speller, pairs["val"])
                if best is None or row["val_cer"] < min(history["val_cer"]):
                    best = {name: weights.clone() for name, weights in model.state_dict().items()}
                for column, value in row.items():
                    history.setdefault(column, []).append(value)
                seconds.append(time.perf_counter() - started)
                print_epoch(epoch, args, row, seconds[-1])
                more = {"best": best, "symbols": symbols}
                utils.save_checkpoint(run, model, optimizer, history, seconds, **more)
        record = new_record(run, model, history, seconds)
        draw_validation(run.figures / "validation-cer.png", args, record)
        if args.mode != "train":
            record["final"] = test(run.checkpoint, data, device, args)
            draw_attention(run.figures / "attention.png", args, record)
        print(utils.store_record(run, record))  # last: a run with final scores is complete
        print(f"Figures: {run.figures}\nCheckpoint: {run.checkpoint}")


def train_one_epoch(
    model: Seq2Seq, optimizer: Optimizer, pairs: EncodedPairs, epoch: int, args: Namespace
) -> float:
    """Train on all pairs in random order. Returns the mean loss per character (nats). Raises
    utils.Diverged.

    Batches mix words of all lengths: batches of one length need no packing, but learn worse. Label
    smoothing: Szegedy et al. 2016, section 7; gradient clipping: Pascanu et al. 2013, section 3.2.
    """
    utils.seed_everything(args.seed, epoch)
    model.train()
    device = pairs.sources.device
    running_sums = torch.zeros(3, device=device)  # loss, characters, batches of finite loss
    batches = torch.randperm(len(pairs.lengths)).split(args.batch_size)
    for i, indices in enumerate(tqdm(batches, unit="batch", leave=False, disable=None)):
        step, steps = (epoch - 1) * len(batches) + i, args.n_epochs * len(batches)
        rate = utils.learning_rate(args.schedule, args.lr, step, steps)
        utils.set_learning_rate(optimizer, rate)

        lengths, longest = pairs.lengths[indices], pairs.target_lengths[indices].max()
        indices = indices.to(device)
        sources = pairs.sources[indices, : lengths.max()]  # (B, S)
        targets = pairs.targets[indices, :longest]  # (B, T)
        logits, _ = model(sources, lengths, targets)  # (R, V)
        first = END if args.label_smoothing else 0  # smoothed over symbols that can be written
        true = targets[:, 1:]
        true = true[true != PAD] - first  # (R,)
        loss = F.cross_entropy(logits[:, first:], true, label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if args.clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

        loss, count = loss.detach(), loss.new_tensor(len(logits))
        running_sums.add_(torch.stack((loss * count, count, loss.isfinite())))
        utils.check_divergence(running_sums, epoch, i + 1, len(batches))
    if not all(weights.isfinite().all() for weights in model.parameters()):  # by the last step
        raise utils.Diverged(epoch, len(batches))
    loss, count, _ = running_sums.tolist()
    return loss / count


def validate(speller: Speller, pairs: EncodedPairs) -> dict[str, float]:
    """CER and WER of greedy spellings of the validation words."""
    predicted = [row[0] for row in spellings(speller.greedy(pairs))]
    error = cer(predicted, pairs.spellings, speller.target.split)
    return {"val_cer": error, "val_wer": wer(predicted, pairs.spellings)}


def new_record(
    run: utils.Run, model: nn.Module, history: dict[str, list], seconds: list[float]
) -> dict[str, Any]:
    """A run's record, as yet without test scores."""
    best_epoch = history["val_cer"].index(min(history["val_cer"])) + 1
    return utils.new_record(run, model, history, seconds) | {"best_epoch": best_epoch}


def print_epoch(epoch: int, args: Namespace, row: dict[str, float], seconds: float) -> None:
    scores = f"Training loss: {row['train_loss']:.4f}  Validation {rate_name(args)}: "
    scores += f"{row['val_cer']:.4f}  Validation WER: {row['val_wer']:.4f}  ({seconds:.1f} s)"
    print(f"Epoch {epoch:2}/{args.n_epochs}  {scores}", flush=True)


def rate_name(args: Namespace) -> str:
    """The name of the symbols' error rate."""
    return "PER" if is_g2p(args) else "CER"


def summary(record: dict[str, Any]) -> str:
    """A record's result in one line."""
    if "diverged_in_epoch" in record:
        return f"diverged in epoch {record['diverged_in_epoch']}"
    if "final" not in record:
        return "trained, not tested"
    rate, final = "PER" if "direction" in record["arguments"] else "CER", record["final"]
    line = f"Test {rate}: {final['greedy']['cer']:.4f}, Test WER: {final['greedy']['wer']:.4f}"
    for way in [way for way in ("nucleus", "beam") if way in final]:
        [(name, value)] = [(k, v) for k, v in final[way].items() if k.startswith("wer@")]
        line += f", {way} Test {name.upper()}: {value:.4f}"
    return line


def data_name(folder: Path) -> str:
    """The name of the words in a folder: of a folder inside data/ its own."""
    place = Path(os.path.abspath(folder))
    inside = place.exists() and DATA_DIR.exists() and place.parent.samefile(DATA_DIR)
    return place.name if inside and place.name != "sample" else "pronunciations"


def load_data(args: Namespace) -> utils.Pronunciations:
    """The words in --data_dir, or in its default folder, or else the built-in sample."""
    folder = args.data_dir or DATA_DIR
    if args.data_dir or (folder / "train.tsv").exists():
        splits = utils.load_pronunciations(folder).splits
        return utils.Pronunciations(splits, data_name(folder))
    print(
        "No train.tsv found: training on the built-in SAMPLE, words of the CMU dictionary.\n"
        "  To get Wiktionary's: python -m data.prepare_pronunciations --language eng_latn_us_broad"
    )
    from data.sample import choose_pronunciations  # here, for it reads the whole dictionary

    return choose_pronunciations()


def make_vocabularies(args: Namespace, data: utils.Pronunciations) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies of the two sides, of all symbols in the training words."""
    sources, targets = zip(*data.splits["train"])
    spaced = not is_g2p(args)  # the source is phonemes
    return Vocabulary.of(sources, spaced), Vocabulary.of(targets, not spaced)


def audit(data: utils.Pronunciations) -> Iterator[str]:
    """Lines: the numbers of words, those that occur in two splits, the unseen symbols."""
    names = {"train": "training", "val": "validation", "test": "test"}
    sizes = [f"{len(data.splits[split]):,} {name}" for split, name in names.items()]
    seen = {word for _, word in data.splits["train"]}
    both = {split: sum(word in seen for _, word in data.splits[split]) for split in names}
    yield f"Words: {', '.join(sizes)}"
    yield f"Spellings seen in training: {both['val']} of validation, {both['test']} of test"
    held_out = data.splits["val"] + data.splits["test"]
    unseen = []
    for side, kind in enumerate(("phonemes", "characters")):
        seen = {symbol for pair in data.splits["train"] for symbol in pair[side]}
        new = sorted({symbol for pair in held_out for symbol in pair[side]} - seen)
        unseen.append(f"{len(new)} {kind}" + (f" ({' '.join(new)})" if new else ""))
    yield f"Symbols not seen in training, read as unknown: {', '.join(unseen)}"


def overrides(args: Namespace, without: tuple[str, ...]) -> dict[str, Any]:
    """The arguments, but for those called `without`, that differ from the defaults."""
    return utils.overrides(args, parse_args([]), without)


def make_run(args: Namespace, data: utils.Pronunciations) -> utils.Run:
    """The run of these arguments on these data."""
    arguments = overrides(args, RUNTIME_OPTIONS)
    identity = {k: v for k, v in arguments.items() if k not in DECODING_OPTIONS}
    model = f"{'g2p-' if is_g2p(args) else ''}{'attn' if args.use_attn else 'plain'}"
    seeds = "ensemble" if args.ensemble else f"seed{args.seed}"
    title = f"q3-{model}-lr{args.lr:g}-{seeds}-{data.name}"
    command = " ".join(["python hw2_q3.py", *utils.to_argv(DASH, arguments)])
    about = identity, {"name": data.name, "fingerprint": data.fingerprint}, TRAINING_VERSION
    return utils.Run(title, command, *about, args.n_epochs, args.output_dir, checkpoint_file(args))


def checkpoint_file(args: Namespace) -> Path | None:
    """The file of --checkpoint_name: a path, or a name in checkpoints/."""
    name = args.checkpoint_name
    is_bare = name is not None and name.parent == Path()
    return args.output_dir / "checkpoints" / name if is_bare else name


# ----------------------------------------------------------------------------------------------
# testing

N_SAMPLES = 10  # drawn per word, of which the first k count
N_EXAMPLES = 10  # words printed with several spellings
N_ATTENTION = 4  # words of the attention figure


def load_speller(
    path: Path, device: torch.device | str
) -> tuple[Speller, Namespace, dict[str, Any]]:
    """The Speller of a checkpoint's lowest validation CER, its arguments and the checkpoint's
    content. Raises UserError."""
    saved = utils.load_checkpoint(path, device)
    with utils.checkpoint_errors(f"{path}: not a model of question 3"):
        args = parse_args(saved["command"].split()[2:])
        source = Vocabulary(saved["symbols"]["source"], not is_g2p(args))
        target = Vocabulary(saved["symbols"]["target"], is_g2p(args))
        "".join(source.symbols + target.symbols)  # all are strings
        model = build_model(args, source, target).to(device)
        model.load_state_dict(saved["best"])
        lowest_cer(saved)
    return Speller(model.eval(), source, target), args, saved


def lowest_cer(saved: dict[str, Any]) -> float:
    """A checkpoint's lowest validation CER."""
    return float(min(saved["history"]["val_cer"]))


def test(
    checkpoint: Path, data: utils.Pronunciations, device: torch.device, args: Namespace
) -> dict[str, Any]:
    """Score a checkpoint on the test words and print the original's lines. Returns the scores."""
    speller, trained, _ = load_speller(checkpoint, device)
    if is_g2p(trained) != is_g2p(args):
        raise UserError(f"{checkpoint}: was trained with the other --direction")
    final = score(speller, data.splits["test"], args)
    if trained.use_attn:
        final["attention"] = attention_examples(speller, data.splits["test"], args.max_len)
    print_scores(final, args, " (built-in sample)" if data.name == "sample" else "")
    return final


def test_again(args: Namespace) -> None:
    """Score a trained model and complete its record."""
    data, device = load_data(args), utils.prepare_device(args.device, args.threads or 1)
    run, data = make_run(args, data), swap_direction(data) if is_g2p(args) else data
    if not run.checkpoint.exists():
        raise UserError(f"{run.checkpoint}: no such checkpoint; train the model first")
    final = test(run.checkpoint, data, device, args)
    if not utils.is_trained(run):
        print("The checkpoint is unfinished or of another run: its record is not written")
        return
    speller, _, saved = load_speller(run.checkpoint, device)
    record = new_record(run, speller.model, saved["history"], saved["seconds"])
    record["final"] = final
    draw_attention(run.figures / "attention.png", args, record)
    print(utils.store_record(run, record))


def train_ensemble(args: Namespace) -> None:
    """Train the members that are missing, unless the mode is 'test'; score them together."""
    if not args.mode:
        utils.train_side_by_side(sys.modules[__name__], members(args), is_finished)
    data, device = load_data(args), utils.prepare_device(args.device, args.threads or 1)
    run = make_run(args, data)
    speller = load_ensemble(args, data, device)
    pairs = (swap_direction(data) if is_g2p(args) else data).splits["test"]
    record = utils.new_record(run, speller.model, {}, []) | {"final": score(speller, pairs, args)}
    print_scores(record["final"], args, " (built-in sample)" if data.name == "sample" else "")
    print(utils.store_record(run, record))


def members(args: Namespace) -> list[Namespace]:
    """The arguments of each of several runs, or of each member of an ensemble."""
    return utils.expand(Namespace(**vars(args) | {"ensemble": False}), "lr", "seed")


def load_ensemble(args: Namespace, data: utils.Pronunciations, device: torch.device) -> Speller:
    """The Speller of the models that --ensemble combines. Raises UserError."""
    spellers = []
    for run in (make_run(member, data) for member in members(args)):
        if not utils.is_trained(run):
            raise UserError(f"{run.checkpoint}: missing or unfinished; train it first")
        spellers.append(load_speller(run.checkpoint, device)[0])
    return spellers[0]._replace(model=Ensemble([s.model for s in spellers]).eval())


def is_finished(run: utils.Run, args: Namespace) -> dict[str, Any]:
    """The record of a run that is trained and scored as the arguments ask, or {}."""
    record = utils.finished_record(run)
    final = record.get("final", {})
    nucleus, beam = final.get("nucleus", {}), final.get("beam", {})
    same = final.get("max_len") == args.max_len
    same &= not args.nucleus or (nucleus.get("p"), nucleus.get("k")) == (args.topp, args.k)
    same &= not args.beam_size or beam.get("size") == args.beam_size
    return record if same else {}


def score(speller: Speller, pairs: list[tuple], args: Namespace) -> dict[str, Any]:
    """Test scores of greedy spellings, and of nucleus sampling and beam search if asked for."""
    encoded, max_len, k = speller.encode(pairs), args.max_len, args.k
    true, split = encoded.spellings, speller.target.split
    greedy = spellings(speller.greedy(encoded, max_len))
    final = {"max_len": max_len, "greedy": score_candidates(greedy, true, 1, split)}
    if args.nucleus:
        generator = make_generator(args, encoded.sources.device)
        n = max(k, N_SAMPLES)
        samples = spellings(speller.sample(encoded, args.topp, n, generator, max_len))
        final["nucleus"] = {"p": args.topp, "k": k} | score_candidates(samples, true, k, split)
        drawn = zip(true[:N_EXAMPLES], samples)
        final["nucleus"]["examples"] = [[w, list(dict.fromkeys(row[:k]))] for w, row in drawn]
    if args.beam_size:
        beam, k = speller.beam(encoded, args.beam_size, max_len), min(k, args.beam_size)
        final["beam"] = {"size": args.beam_size}
        final["beam"] |= score_candidates(spellings(beam), true, k, split)
        best = [[[s, round(score, 3)] for s, score in row[:k]] for row in beam[:N_EXAMPLES]]
        final["beam"]["examples"] = [[w, row] for w, row in zip(true, best)]
    return final


def make_generator(args: Namespace, device: torch.device) -> torch.Generator:
    """The random numbers of nucleus sampling: seeded as the run, an ensemble's as its first."""
    seed = args.seed[0] if isinstance(args.seed, list) else args.seed
    return torch.Generator(device).manual_seed(seed)


def print_scores(final: dict[str, Any], args: Namespace, mark: str = "") -> None:
    """Print the scores in the original's words."""

    def print_rates(scores):
        print(f"Test {rate_name(args)}: {scores['cer']:.4f}, Test WER: {scores['wer']:.4f}{mark}")

    print_rates(final["greedy"])
    if args.nucleus:
        print(f"Nucleus sampling, p = {args.topp:g}, the first of {args.k} samples:")
        print_rates(final["nucleus"])
        print(f"Printing first {N_EXAMPLES} examples with multiple predictions:")
        for word, row in final["nucleus"]["examples"]:
            print(f"({word!r}, {{{', '.join(map(repr, row))}}})")
        print(f"Test WER@{args.k}: {final['nucleus'][f'wer@{args.k}']:.4f}{mark}")
    if args.beam_size:
        k = min(args.k, args.beam_size)
        print(f"Beam search, size {args.beam_size}, the best:")
        print_rates(final["beam"])
        print(f"Printing first {N_EXAMPLES} examples with their {k} best and log-probabilities:")
        for word, row in final["beam"]["examples"]:
            print(f"({word!r}, {{{', '.join(f'{s!r}: {score:.3f}' for s, score in row)}}})")
        print(f"Test WER@{k}: {final['beam'][f'wer@{k}']:.4f}{mark}")


@torch.inference_mode()
def attention_examples(
    speller: Speller, pairs: list[tuple], max_len: int = MAX_LEN
) -> list[dict[str, Any]]:
    """For the first pairs the greedy spelling and its attention weights: a list of {word, phonemes,
    letters, weights (letters x phonemes)}."""
    examples = []
    for phonemes, true in pairs[:N_ATTENTION]:
        [[(spelling, _)]] = speller.greedy(speller.encode([(phonemes, "")]), max_len)
        word = speller.encode([(phonemes, spelling)])
        weights = speller.model(word.sources, word.lengths, word.targets)[1]
        rows = [[round(weight, 4) for weight in row] for row in weights.tolist()]
        letters = [*speller.target.split(spelling), "end"]
        example = {"word": true, "phonemes": list(phonemes), "letters": letters, "weights": rows}
        examples.append(example)
    return examples


# ----------------------------------------------------------------------------------------------
# spelling


def segment(text: str, vocabulary: Vocabulary) -> list[str]:
    """IPA text as phonemes: split at its spaces, or, without any, by longest match."""
    if len(text.split()) != 1:
        return text.split()
    text, phonemes = text.strip(), []
    longest = max(map(len, vocabulary.stoi), default=1)
    while text:
        sizes = range(min(longest, len(text)), 0, -1)
        size = next((n for n in sizes if text[:n] in vocabulary.stoi), 1)
        phonemes.append(text[:size])
        text = text[size:]
    return phonemes


def choose_speller(args: Namespace, device: torch.device) -> tuple[Speller, str]:
    """The Speller of --checkpoint_name, or else the best one trained on the words of --data_dir, or
    without it, the best one, preferably of the default words; and a description of it."""
    if args.data_dir:
        key, value = "fingerprint", utils.load_pronunciations(args.data_dir).fingerprint
    else:
        key, value = "name", data_name(DATA_DIR)

    def rank(saved):
        fits = saved["data"][key] == value
        is_real = saved["data"]["name"] != "sample"
        if is_g2p(parse_args(saved["command"].split()[2:])) != is_g2p(args):
            return None
        return None if args.data_dir and not fits else (is_real, fits, -lowest_cer(saved))

    folder = args.output_dir / "checkpoints"
    path = checkpoint_file(args) or utils.best_checkpoint(folder, "q3-", rank)
    speller, trained, saved = load_speller(path, device)
    name = utils.printable(saved["data"]["name"])
    known = {"sample": "the built-in SAMPLE", "pronunciations": "your words"}
    words = known.get(name, f"the words in data/{name}")
    error = f"validation {rate_name(trained)} {lowest_cer(saved):.4f}"
    return speller, f"{path} (trained on {words}, {error})"


def spell(args: Namespace) -> None:
    """Spell the IPA of the arguments, of --input, of standard input, or typed at a prompt."""
    device = utils.prepare_device(args.device, args.threads or 1)
    if args.ensemble:
        with contextlib.redirect_stdout(sys.stderr):  # only answers go to standard output
            data = load_data(args)
        speller, description = load_ensemble(args, data, device), "the ensemble"
    else:
        speller, description = choose_speller(args, device)
    if args.ipa:
        batches = iter([args.ipa])
    elif args.input or not sys.stdin.isatty():
        batches = read_lines(args.input)
    else:
        batches = prompt_lines()
    first = next(batches, [])  # an unreadable file ends the command here, before anything else
    print(f"Model: {description}", file=sys.stderr)
    generator = make_generator(args, device)
    for lines in itertools.chain([first], batches):
        spell_lines(lines, speller, args, generator)


def prompt_lines() -> Iterator[list[str]]:
    """Lines typed at a prompt until an empty one, each by itself."""
    yield []  # the prompt follows the model's description
    with contextlib.suppress(EOFError):
        while line := input("IPA, or letters with --direction g2p (empty line to end)> "):
            yield [line]


def read_lines(name: str | None, batch_size: int = 1000) -> Iterator[list[str]]:
    """The lines of a file, or of standard input if `name` is - or None, in lists of at most
    `batch_size`, so memory does not grow with the file. Raises UserError."""
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin
            if name not in ("-", None):
                file = stack.enter_context(open(name, encoding="utf-8-sig"))
            while lines := list(itertools.islice(file, batch_size)):
                yield lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read ({utils.one_line(error)})")


def spell_lines(
    lines: list[str], speller: Speller, args: Namespace, generator: torch.Generator
) -> None:
    """Print IPA, TAB, spelling, TAB, log-probability: a line for each candidate, the most probable
    first. With --direction g2p, written words come first and IPA second."""
    source, words = speller.source, []
    for line in lines:
        text = unicodedata.normalize("NFC", line).strip()
        if len(text) > utils.MAX_SYMBOLS:
            raise UserError(f"a word of more than {utils.MAX_SYMBOLS:,} characters")
        if text:
            words.append(tuple(segment(text, source) if source.spaced else source.split(text)))
    if not words:
        return
    unknown = sorted({symbol for word in words for symbol in word} - source.stoi.keys())
    if unknown:
        kind = "phonemes" if source.spaced else "letters"
        print(f"Unknown {kind}: {' '.join(unknown)}", file=sys.stderr)
    pairs, max_len = speller.encode([(word, "") for word in words]), args.max_len
    if args.beam_size:
        candidates = speller.beam(pairs, args.beam_size, max_len)
    elif args.nucleus:
        candidates = speller.sample(pairs, args.topp, args.k, generator, max_len)
    else:
        candidates = speller.greedy(pairs, max_len)
    for word, row in zip(words, candidates):
        distinct = dict(row)  # a spelling drawn twice is printed once
        for spelling, log_prob in sorted(distinct.items(), key=lambda item: -item[1]):
            print(f"{source.join(word)}\t{spelling}\t{log_prob:.3f}", flush=True)


# ----------------------------------------------------------------------------------------------
# figures


def run_title(args: Namespace, data_name: str) -> str:
    """The title of a run's figures."""
    sample = "\n(built-in sample)" if data_name == "sample" else ""
    attention = "Bahdanau attention" if args.use_attn else "no attention"
    return f"{'pronouncing' if is_g2p(args) else 'spelling'}, {attention}{sample}"


def draw_validation(path: Path, args: Namespace, record: dict[str, Any]) -> None:
    """Draw the validation CER of every epoch."""
    title = run_title(args, record["data"]["name"])
    utils.plot_curve(path, title, f"Validation {rate_name(args)}", record["history"]["val_cer"])


def draw_attention(path: Path, args: Namespace, record: dict[str, Any]) -> None:
    """Draw the attention weights of a record's examples, if it has any."""
    if "attention" in record["final"]:
        utils.save_figure(path, plot_attention(args, record))


def plot_attention(args: Namespace, record: dict[str, Any]) -> Any:
    """A figure of the attention weights over phonemes (across) for each written letter (down);
    titles: what is written and, if it differs, the true word."""
    examples = record["final"]["attention"]
    columns = math.ceil(len(examples) / 2)
    fig, grid = utils.new_figure(5.0, 5.2, 2, columns, squeeze=False)
    for axes, example in zip(grid.flat, examples):
        axes.grid(False)
        image = axes.imshow(example["weights"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        plain = {"parse_math": False}  # a dollar sign is a symbol like any other
        axes.set_xticks(range(len(example["phonemes"])), example["phonemes"], **plain)
        axes.set_yticks(range(len(example["letters"])), example["letters"], **plain)
        written = (" " if is_g2p(args) else "").join(example["letters"][:-1])
        word = example["word"]
        axes.set_title(written if written == word else f"{written} ({word})", **plain)
    sides = ("Letters", "Phonemes") if is_g2p(args) else ("Phonemes", "Letters")
    fig.supxlabel(f"{sides[0]} read", fontsize=9)
    fig.supylabel(f"{sides[1]} written", fontsize=9)
    fig.suptitle(run_title(args, record["data"]["name"]), fontsize=9)
    fig.colorbar(image, ax=grid, label="Attention weight", shrink=0.7)
    return fig


# ----------------------------------------------------------------------------------------------
# options

DASH = "--"
DECODING_OPTIONS = "nucleus", "topp", "k", "beam_size", "max_len"
RUNTIME_OPTIONS = (  # where and how a run is made: they do not change its result
    "device", "threads", "jobs", "scheduler", "restart", "output_dir", "data_dir",
    "mode", "ipa", "input", "checkpoint_name",
)  # fmt: skip
PRESETS = {
    "report": {},
    "best": {
        "use_attn": True,
        "layers": 2,
        "hidden_size": 256,
        "dropout": 0.4,
        "n_epochs": 30,
        "schedule": "one_cycle",
        "label_smoothing": 0.1,
        "clip": 3.0,
        "embedding_scale": 0.1,
        "input_feeding": True,
    },
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line. Raises UserError."""
    args = utils.parse_with_presets(make_parser, PRESETS, argv)
    validate_args(args)
    return args


# fmt: off
def make_parser() -> utils.Parser:
    """The parser of the command line, its defaults those of the original's recipe."""
    parser = utils.Parser("hw2_q3.py", "%(prog)s [train | test | spell IPA ...] [options]",
                          description=__doc__.rpartition("\n\n")[0])
    parser.add_argument("mode", nargs="?", metavar="MODE",
        help="train: only train; test: only test a trained model; spell: spell IPA "
        "(default: train, then test)")
    parser.add_argument("ipa", nargs="*", metavar="IPA",
        help="for spell: phonemes, separated by spaces within one argument")
    group = parser.add_argument_group
    add_training_options(group("training").add_argument)
    add_model_options(group("model").add_argument)
    add_decoding_options(group("decoding").add_argument)
    utils.add_runtime_options(parser, DASH, "one")
    return parser


def add_training_options(add: Callable) -> None:
    count, positive = utils.number(int, 1, 10**6), utils.number(float, 0, 10**3, low_open=True)
    add("--n_epochs", type=count, default=20,
        help="number of training epochs (default: %(default)s)")
    add("--batch_size", type=count, default=64, help="batch size (default: %(default)s)")
    add("--lr", type=positive, default=0.003, nargs="+", action=utils.OneOrMore,
        help="Adam's learning rate; several: one run each, side by side (default: %(default)s)")
    add("--clip", type=positive, metavar="NORM", help="clip the gradient norm (default: off)")
    utils.add_training_options(add, DASH, PRESETS)
    add("--direction", choices=("p2g", "g2p"), default="p2g",
        help="p2g: spell phonemes; g2p: pronounce written words (default: %(default)s)")
    add("--data_dir", type=Path, metavar="DIR",
        help="folder of train.tsv, valid.tsv, test.tsv (default: data/, or else a built-in "
        "sample); for spell: use a model trained on these words")
    add("--checkpoint_name", type=Path, metavar="FILE",
        help="checkpoint file (default: named by the options; for spell: the best one)")


def add_model_options(add: Callable) -> None:
    add("--use_attn", action="store_true", help="Bahdanau attention over the phonemes")
    add("--hidden_size", type=utils.number(int, 2, 8192), default=128,
        help="size of embeddings and LSTMs, even (default: %(default)s)")
    add("--layers", type=utils.number(int, 1, 8), default=1,
        help="number of LSTM layers (default: %(default)s)")
    add("--dropout", type=utils.probability, default=0.3,
        help="dropout probability (default: %(default)s)")
    add("--input_feeding", action="store_true",
        help="the decoder also receives the previous attentional vector; slower")
    add("--embedding_scale", type=utils.number(float, 0, 10**3, low_open=True), default=1.0,
        help="initial standard deviation of the embeddings and of the tied output layer "
        "(default: %(default)s)")
    add("--ensemble", action="store_true",
        help="test, or spell with, the models of several --seed together; without a mode, train "
        "the missing ones first")


def add_decoding_options(add: Callable) -> None:
    add("--nucleus", action="store_true",
        help="nucleus (top-p) sampling besides greedy decoding; for spell: instead of it")
    add("--topp", type=utils.number(float, 0, 1, low_open=True), metavar="P",
        help="probability mass of the nucleus, implies --nucleus (default: 0.8)")
    add("--k", type=utils.number(int, 1, 100), default=3,
        help="candidates per word, the k of WER@k (default: %(default)s)")
    add("--beam_size", type=utils.number(int, 1, 100), metavar="N",
        help="beam search of this size besides; for spell: instead")
    add("--max_len", type=utils.number(int, 1, 1000), default=MAX_LEN,
        help="maximum length of a spelling (default: %(default)s)")
    add("--input", metavar="FILE",
        help="for spell: a file with IPA on each line, or - for standard input")
# fmt: on


def validate_args(args: Namespace) -> None:
    """Set what depends on other arguments. Raises UserError if arguments contradict each other."""
    if args.mode not in (None, "train", "test", "spell"):  # not by argparse: it would not name an
        raise UserError(f"unknown mode {args.mode!r}: train, test or spell")  # unknown option
    args.nucleus = args.nucleus or args.topp is not None
    args.topp = 0.8 if args.topp is None else args.topp
    if args.hidden_size % 2:
        raise UserError("--hidden_size must be even: each direction of the encoder has half of it")
    if args.input_feeding and not args.use_attn:
        raise UserError("--input_feeding needs --use_attn: it feeds the attentional vector")
    if args.mode != "spell" and (args.ipa or args.input):
        raise UserError("IPA and --input need the mode spell: python hw2_q3.py spell ...")
    several = [name for name in ("lr", "seed") if isinstance(getattr(args, name), list)]
    if args.ensemble and (several != ["seed"] or args.mode == "train"):
        raise UserError("--ensemble tests or spells with several seeds: --seed 42 1 2")
    if several and args.checkpoint_name:
        raise UserError(f"--checkpoint_name is the file of one run: give one --{several[0]}")
    if several and args.mode and not args.ensemble:
        raise UserError(
            f"several values of --{several[0]} need training and testing: drop the mode"
        )
    if args.ipa and args.input:
        raise UserError("give IPA either as arguments or by --input")


# ----------------------------------------------------------------------------------------------
# main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.mode == "spell":
        spell(args)
    elif args.ensemble:
        train_ensemble(args)
    elif args.mode == "test":
        test_again(args)
    elif len(configs := members(args)) > 1:
        utils.train_side_by_side(sys.modules[__name__], configs, is_finished)
    else:
        train(args)


if __name__ == "__main__":
    utils.run_script(main)
