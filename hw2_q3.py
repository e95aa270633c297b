"""Question 3: a character-level sequence-to-sequence model that spells words from their IPA.

    python hw2_q3.py --use_attn --nucleus            train with attention, test, also by sampling
    python hw2_q3.py                                 train and test without attention
    python hw2_q3.py test --use_attn --beam_size 5   test the trained model with beam search
    python hw2_q3.py spell "/həˈloʊ/" "W ER1 L D"    spell your own IPA, or ARPAbet
    python hw2_q3.py --use_attn --direction g2p      the other direction: pronounce written words

Test CER / WER on the assignment's words, greedy, mean ± standard deviation over 3 seeds:
0.216 ± 0.006 / 0.736 ± 0.013 with attention, 0.302 ± 0.009 / 0.808 ± 0.015 without; 2 to 5 minutes
each on one thread of a CPU.

model | symbols | decoding | scores | training | testing | spelling | options | main
"""

import contextlib
import itertools
import math
import operator
import os
import re
import shlex
import sys
import time
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
from data import notation, sample
from data.lexicon import Reranker, Weights, fit_reranker, load_lexicon
from utils import Pronunciations, Run, UserError

SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNK, START, END = range(len(SPECIAL))  # decoders never emit those before END

# ----------------------------------------------------------------------------------------------
# model


class Memory(NamedTuple):
    """The encoder's outputs that attention reads."""

    values: Tensor  # (B, S, H), the encoder's outputs
    keys: Tensor  # (B, S, H), their projections, computed once
    mask: Tensor  # bool (B, S), true where there is a phoneme


class BahdanauAttention(nn.Module):
    """Additive attention (Bahdanau et al. 2015, section 3.1 and appendix A.1.2): the score of the
    encoder output h_i for the decoder state s is v . tanh(W_h h_i + W_s s).

    As in Luong et al. 2015, section 3.1, s is the state after the current character, and the
    attentional vector is tanh(W [context; s]). Without input feeding, all steps of a known target
    are therefore computed at once. Padding is left out: in a batch of mixed lengths, only a quarter
    to a half of (B, T, S) is computed.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)  # W_h
        self.query = nn.Linear(hidden_size, hidden_size)  # W_s
        self.score = nn.Linear(hidden_size, 1, bias=False)  # v
        self.combine = nn.Linear(2 * hidden_size, hidden_size)  # W

    def forward(self, states: Tensor, words: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """States (R, H) of the words with indices `words` (R,) in the memory -> attentional vectors
        (R, H) and attention weights (R, S)."""
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


def make_lstm(args: Namespace, size: int, **more) -> nn.LSTM:
    """An LSTM of `size` per direction, with dropout between its layers."""
    dropout = args.dropout if args.layers > 1 else 0.0
    return nn.LSTM(args.hidden_size, size, args.layers, batch_first=True, dropout=dropout, **more)


class Encoder(nn.Module):
    """Bidirectional LSTM: padded phonemes (B, S) and lengths (B,), on the CPU -> outputs (B, S, H)
    and final states 2 x (layers, B, H)."""

    def __init__(self, symbols: int, args: Namespace):
        super().__init__()
        self.embedding = nn.Embedding(symbols, args.hidden_size, padding_idx=PAD)
        self.lstm = make_lstm(args, args.hidden_size // 2, bidirectional=True)
        self.dropout = utils.FastDropout(args.dropout)

    def forward(self, sources: Tensor, lengths: Tensor) -> tuple[Tensor, tuple]:
        x = self.dropout(self.embedding(sources))  # (B, S, H)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.lstm(packed)  # 2 x (layers * 2, B, H / 2)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=sources.shape[1])
        state = (part.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) for part in state)
        return self.dropout(outputs), tuple(state)  # (B, S, H), 2 x (layers, B, H)


class Decoder(nn.Module):
    """LSTM over characters, with or without attention; the output layer is tied to the embedding
    (Press and Wolf 2017, section 2).

    input_feeding: the LSTM also receives the previous attentional vector (Luong et al. 2015,
    section 3.3), so it knows where attention has been, but is computed step by step.
    """

    def __init__(self, symbols: int, args: Namespace):
        super().__init__()
        size = args.hidden_size
        self.input_feeding = args.input_feeding
        self.embedding = nn.Embedding(symbols, size, padding_idx=PAD)
        if args.input_feeding:
            widths = [2 * size] + [size] * (args.layers - 1)
            self.cells = nn.ModuleList(nn.LSTMCell(width, size) for width in widths)
        else:
            self.lstm = make_lstm(args, size)
        self.attention = BahdanauAttention(size) if args.use_attn else None
        self.dropout = utils.FastDropout(args.dropout)
        self.output = nn.Linear(size, symbols)
        self.output.weight = self.embedding.weight

    def forward(
        self, characters: Tensor, state: tuple, memory: Memory | None, mask: Tensor, words: Tensor
    ) -> tuple[Tensor, tuple, Tensor | None]:
        """Characters (B, T) and a state as of Seq2Seq.encode -> logits (R, V) of the next character
        at the R true positions of `mask` (B, T), row by row, the state after the last character,
        and the attention weights (R, S) or None. words (B,): each row's word, an index into the
        memory."""
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
        """Input feeding: embedded characters (B, T, H) -> attentional vectors (R, H), the state of
        the unfinished rows, and the attention weights (R, S). Finished rows are dropped; a row's
        true positions in `mask` come first."""
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
        outputs, attn_weights = (F.embedding(order, torch.cat(x)) for x in (outputs, attn_weights))
        hidden, cell = map(torch.stack, zip(*layers))
        return outputs, (hidden, cell, input_feed.unsqueeze(0)), attn_weights


class Seq2Seq(nn.Module):
    """Encoder and decoder, which starts from the encoder's final states. source_size, target_size:
    numbers of symbols on the two sides."""

    def __init__(self, source_size: int, target_size: int, args: Namespace):
        super().__init__()
        self.encoder = Encoder(source_size, args)
        self.decoder = Decoder(target_size, args)

    def encode(self, sources: Tensor, lengths: Tensor) -> tuple[Memory | None, tuple]:
        """Phonemes (B, S), lengths (B,) on the CPU -> Memory, None without attention, and state:
        hidden and cell (layers, B, H), with input feeding also the first vector fed (1, B, H)."""
        outputs, state = self.encoder(sources, lengths)
        if self.decoder.attention is None:
            return None, state
        if self.decoder.input_feeding:
            state = *state, torch.zeros_like(state[0][:1])
        return Memory(outputs, self.decoder.attention.key(outputs), sources != PAD), state

    def forward(
        self, sources: Tensor, lengths: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Phonemes, lengths and padded targets (B, T): START, characters, END -> logits (R, V) of
        every character after a START, word by word, and the attention weights (R, S)."""
        memory, state = self.encode(sources, lengths)
        words = torch.arange(len(sources), device=sources.device)
        mask = targets[:, 1:] != PAD
        logits, _, attn_weights = self.decoder(targets[:, :-1], state, memory, mask, words)
        return logits, attn_weights

    def next_log_probs(
        self, last: Tensor, state: tuple, memory: Memory | None, words: Tensor
    ) -> tuple[Tensor, tuple]:
        """One step: last characters (R,) of spellings of `words` (R,), indices into the memory ->
        log-probabilities (R, V) of the next characters, and the new state."""
        mask = torch.ones_like(last, dtype=torch.bool).unsqueeze(1)  # (R, 1)
        logits, state, _ = self.decoder(last.unsqueeze(1), state, memory, mask, words)
        logits[:, :END] = -torch.inf
        return logits.log_softmax(1), state


class Ensemble(nn.Module):
    """Models with the same symbols, whose probabilities of the next character are averaged
    (Sutskever et al. 2014, section 3.6)."""

    def __init__(self, models: Iterable[Seq2Seq]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def encode(self, sources: Tensor, lengths: Tensor) -> tuple[tuple, tuple]:
        """As Seq2Seq.encode: a tuple of memories, and the parts of all states in one tuple."""
        memories, states = zip(*(model.encode(sources, lengths) for model in self.models))
        return memories, sum(states, ())

    def next_log_probs(
        self, last: Tensor, state: tuple, memory: tuple, words: Tensor
    ) -> tuple[Tensor, tuple]:
        """As Seq2Seq.next_log_probs."""
        results, rest = [], iter(state)
        for model, model_memory in zip(self.models, memory):
            model_state = tuple(itertools.islice(rest, 2 + model.decoder.input_feeding))
            results.append(model.next_log_probs(last, model_state, model_memory, words))
        log_probs, states = zip(*results)
        return torch.stack(log_probs).logsumexp(0) - math.log(len(results)), sum(states, ())


class Unsmoothed(nn.Module):
    """A model trained with label smoothing e, which teaches it q = (1 - e) p + e / V over the V
    symbols that can be emitted. This one gives p: e / V, which smoothing gives even to absurd
    symbols, is subtracted from each q, and what remains is normalised."""

    def __init__(self, model: Seq2Seq | Ensemble, smoothing: float):
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def encode(self, sources: Tensor, lengths: Tensor) -> tuple:
        """As Seq2Seq.encode."""
        return self.model.encode(sources, lengths)

    def next_log_probs(self, *step: Any) -> tuple[Tensor, tuple]:
        """As Seq2Seq.next_log_probs."""
        log_probs, state = self.model.next_log_probs(*step)
        probs = log_probs.exp() - self.smoothing / (log_probs.shape[1] - END)
        probs = probs.clamp(min=0)
        return (probs / probs.sum(1, keepdim=True)).log(), state


def build_model(args: Namespace, source: "Vocabulary", target: "Vocabulary") -> Seq2Seq:
    """The model that the arguments describe, for the two vocabularies."""
    model = Seq2Seq(len(source), len(target), args)
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            part.embedding.weight.mul_(args.embedding_scale)
    return model


# ----------------------------------------------------------------------------------------------
# symbols


class Vocabulary:
    """The symbols of one side and their indices, the special ones first. No text is encoded as a
    special symbol other than UNK, not even "<pad>".

    A symbol that is not in the training words is read as UNK, whose source embedding is never
    trained: it keeps its random initial value. spaced: spaces separate the symbols of a text, as in
    IPA.
    """

    def __init__(self, symbols: Iterable[str], spaced: bool = False):
        self.symbols, self.spaced = list(symbols), spaced
        self.stoi = {s: i for i, s in enumerate(self.symbols) if i >= len(SPECIAL)}

    @classmethod
    def of(cls, sequences: Iterable[str | tuple], spaced: bool = False) -> "Vocabulary":
        """The vocabulary of all symbols in `sequences`, texts or tuples of symbols."""
        sequences = (s.split() if spaced and isinstance(s, str) else s for s in sequences)
        return cls([*SPECIAL, *sorted(set(itertools.chain.from_iterable(sequences)))], spaced)

    def __len__(self):
        return len(self.symbols)

    def split(self, text: str) -> list[str]:
        """The symbols of a text."""
        return text.split() if self.spaced else list(text)

    def join(self, symbols: Iterable[str]) -> str:
        """The text of these symbols."""
        return (" " if self.spaced else "").join(symbols)

    def encode(self, symbols: Iterable[str]) -> list[int]:
        """The indices of the symbols; UNK for an unknown one."""
        return [self.stoi.get(symbol, UNK) for symbol in symbols]

    def decode(self, indices: list[int]) -> str:
        """The text of the symbols before the first END or PAD."""
        written = itertools.takewhile(lambda index: index not in (END, PAD), indices)
        return self.join(self.symbols[index] for index in written)


class EncodedPairs(NamedTuple):
    """Pairs (source, target), such as phonemes and a spelling, as int64 tensors padded with PAD."""

    sources: Tensor  # (N, S)
    lengths: Tensor  # (N,), of the sources, on the CPU
    targets: Tensor  # (N, T), START, characters, END
    target_lengths: Tensor  # (N,), on the CPU
    spellings: list[str]  # the targets as texts


def encode_pairs(
    pairs: list[tuple], source: Vocabulary, target: Vocabulary, device: torch.device | str = "cpu"
) -> EncodedPairs:
    """Encode pairs (source symbols, target text) by the vocabularies of the two sides."""
    sources = [torch.tensor(source.encode(symbols)) for symbols, _ in pairs]
    targets = [torch.tensor([START, *target.encode(target.split(word)), END]) for _, word in pairs]
    return EncodedPairs(
        pad_sequence(sources, batch_first=True, padding_value=PAD).to(device),
        torch.tensor([len(source) for source in sources]),
        pad_sequence(targets, batch_first=True, padding_value=PAD).to(device),
        torch.tensor([len(target) for target in targets]),
        [word for _, word in pairs],
    )


def is_g2p(args: Namespace) -> bool:
    """Whether the model pronounces words (g2p), and does not spell them (p2g)."""
    return args.direction == "g2p"


def directed_pairs(args: Namespace, data: Pronunciations, split: str) -> list[tuple]:
    """A split's pairs (phonemes, spelling); for g2p, (letters, phonemes joined by spaces)."""
    pairs = data.splits[split]
    return [(tuple(word), " ".join(sounds)) for sounds, word in pairs] if is_g2p(args) else pairs


def make_vocabularies(args: Namespace, data: Pronunciations) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies of the two sides, of all symbols in the training words."""
    sources, targets = zip(*directed_pairs(args, data, "train"))
    return Vocabulary.of(sources, not is_g2p(args)), Vocabulary.of(targets, is_g2p(args))


# ----------------------------------------------------------------------------------------------
# decoding

DECODE_BATCH_SIZE = 1024  # spellings; few enough that words of like length stay together
MAX_LEN = 50  # characters


class Speller(NamedTuple):
    """A model and the vocabularies of its two sides, with the label smoothing that trained it. Each
    way of decoding gives for each word a list of candidates (spelling, log-probability)."""

    model: Seq2Seq | Ensemble | Unsmoothed
    source: Vocabulary
    target: Vocabulary
    smoothing: float = 0.0

    def unsmoothed(self) -> "Speller":
        """This speller with the probabilities before label smoothing."""
        if not self.smoothing:
            return self
        return self._replace(model=Unsmoothed(self.model, self.smoothing), smoothing=0.0)

    def encode(self, pairs: list[tuple]) -> EncodedPairs:
        """Encode pairs (phonemes, spelling) on the model's device."""
        return encode_pairs(pairs, self.source, self.target, next(self.model.parameters()).device)

    def greedy(self, pairs: EncodedPairs, max_len: int = MAX_LEN) -> list[list[tuple]]:
        """One candidate: the most probable character at each step."""
        return self.decode(generate, pairs, 1, max_len, lambda log_probs: log_probs.argmax(1))

    def sample(
        self, pairs: EncodedPairs, p: float, k: int, generator: torch.Generator,
        max_len: int = MAX_LEN,
    ) -> list[list[tuple]]:  # fmt: skip
        """k samples from the nucleus, in the order they were drawn, without label smoothing."""
        return self.unsmoothed().decode(generate, pairs, k, max_len, nucleus_sampler(p, generator))

    def beam(self, pairs: EncodedPairs, beam_size: int, max_len: int = MAX_LEN) -> list[list]:
        """The `beam_size` best that a beam of this size finds, best first."""
        return self.decode(beam_search, pairs, beam_size, max_len)

    def decode(
        self, function: Callable, pairs: EncodedPairs, copies: int, *args: Any
    ) -> list[list[tuple]]:
        """The candidates of function(model, sources, lengths, copies, *args), `generate` or
        `beam_search`, of words of like length together, at most DECODE_BATCH_SIZE at once."""
        self.model.eval()
        order = pairs.lengths.argsort(stable=True)
        candidates = [None] * len(order)
        for batch in order.split(max(1, DECODE_BATCH_SIZE // copies)):
            lengths = pairs.lengths[batch]
            sources = pairs.sources[batch.to(pairs.sources.device), : lengths.max()]
            characters, scores = function(self.model, sources, lengths, copies, *args)
            for i, *rows in zip(batch.tolist(), characters.tolist(), scores.tolist()):
                present = (row for row in zip(*rows) if row[1] > -math.inf)
                candidates[i] = [(self.target.decode(word), score) for word, score in present]
        return candidates


def spellings(candidates: list[list[tuple]]) -> list[list[str]]:
    """Candidates without their log-probabilities."""
    return [[spelling for spelling, _ in row] for row in candidates]


@torch.inference_mode()
def generate(
    model: Seq2Seq | Ensemble, sources: Tensor, lengths: Tensor, copies: int, max_len: int,
    choose: Callable[[Tensor], Tensor],
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
    """A function that samples tokens (R,) from the nucleus of log-probabilities (R, V), with one
    uniform number per row (torch.multinomial draws one per token)."""

    def choose(log_probs):
        cumulated = nucleus(log_probs, p).cumsum(1)  # (R, V)
        point = torch.rand(len(log_probs), 1, generator=generator, device=generator.device)
        return (cumulated <= point * cumulated[:, -1:]).sum(1)  # the first beyond the point

    return choose


@torch.inference_mode()
def beam_search(
    model: Seq2Seq | Ensemble, sources: Tensor, lengths: Tensor, beam_size: int, max_len: int
) -> tuple[Tensor, Tensor]:
    """The `beam_size` most probable spellings that a beam of this size finds, best first.

    Returns characters and log-probabilities as `generate` does, (N, beam_size, max_len) and
    (N, beam_size), -inf where there are fewer. A finished spelling keeps its place in the beam
    while it is among the best, without further computation.
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


# ----------------------------------------------------------------------------------------------
# scores


def distances(predicted: list[str], true: list[str], split: Callable = list) -> list[int]:
    """The Levenshtein distance of each pair of texts, in the symbols that `split` gives."""
    pairs = zip(predicted, true, strict=True)
    return [Levenshtein.distance(split(a), split(b)) for a, b in pairs]


def cer(predicted: list[str], true: list[str], split: Callable = list) -> float:
    """Character error rate: summed Levenshtein distances / summed lengths of the true words. It is
    the phoneme error rate if `split` gives phonemes."""
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
    rates = {"cer": cer(first, true, split), "wer": wer(first, true)}
    rates[f"wer@{k}"] = wer_at_k(candidates, true, k)
    return rates | {"distances": distances(first, true, split), "ranks": ranks}


# ----------------------------------------------------------------------------------------------
# training

TRAINING_VERSION = 2  # raised when a change alters the results of training
DATA_DIR = utils.ROOT / "data"
PRETRAINED = DATA_DIR / "pretrained" / "q3.pt"  # a model of all of WikiPron's US English


def train(args: Namespace, run: Run, data: Pronunciations, device: torch.device) -> None:
    """Train one model, resuming if it was interrupted. The checkpoint also keeps the weights of the
    lowest validation CER; test them unless the mode is 'train'. Raises UserError."""
    print("\n".join(audit(data)))
    with utils.run_lock(run):
        if args.restart:
            utils.discard_checkpoint(run)
        source, target = make_vocabularies(args, data)
        utils.seed_everything(args.seed)
        model = build_model(args, source, target).to(device)
        speller = Speller(model, source, target)
        pairs = {s: speller.encode(directed_pairs(args, data, s)) for s in ("train", "val")}
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=fused)
        print(f"Run {run.name}\nTrainable parameters: {utils.count_parameters(model):,}")
        saved = utils.resume(run, model, optimizer)
        if not saved["seconds"]:
            utils.note_shorter_run(run)
        history, seconds, best = saved["history"], saved["seconds"], saved.get("best")
        if len(seconds) == args.n_epochs:
            print("Training is finished; --restart retrains it")
        symbols, rate = {"source": source.symbols, "target": target.symbols}, rate_name(args)
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
                more = {"best": best, "symbols": symbols}
                utils.save_checkpoint(run, model, optimizer, history, seconds, **more)
                scores = f"Training loss: {row['train_loss']:.4f}  Validation {rate}: "
                scores += f"{row['val_cer']:.4f}  Validation WER: {row['val_wer']:.4f}"
                took = f"({seconds[-1]:.1f} s)"
                print(f"Epoch {epoch:2}/{args.n_epochs}  {scores}  {took}", flush=True)
        path, title = run.figures / "validation-cer.png", figure_title(args, data.name)
        utils.plot_curve(path, title, f"Validation {rate}", history["val_cer"])
        if args.mode == "train":
            print(utils.store_record(run, new_record(run, model, history, seconds)))
        else:
            test(args, run, data, device)
        print(f"Figures: {run.figures}\nCheckpoint: {run.checkpoint}")


def train_one_epoch(
    model: Seq2Seq, optimizer: Optimizer, pairs: EncodedPairs, epoch: int, args: Namespace
) -> float:
    """Train on all pairs in random order. Returns the mean loss per character (nats). Raises
    utils.Diverged.

    Batches mix words of all lengths: words of one length need no packing, but train worse. Label
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
        first = END if args.label_smoothing else 0  # smooth only over symbols that can be emitted
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


def rate_name(args: Namespace) -> str:
    """Character or phoneme error rate."""
    return "PER" if is_g2p(args) else "CER"


def figure_title(args: Namespace, data_name: str) -> str:
    """The title of a run's figures."""
    sample = "\n(built-in sample)" if data_name == "sample" else ""
    attention = "Bahdanau attention" if args.use_attn else "no attention"
    return f"{'pronouncing' if is_g2p(args) else 'spelling'}, {attention}{sample}"


def load_data(args: Namespace) -> Pronunciations:
    """The words in --data_dir, or in its default folder, or else the built-in sample."""
    folder = args.data_dir or DATA_DIR
    if args.data_dir or (folder / "train.tsv").exists():
        data, place = utils.load_pronunciations(folder), Path(os.path.abspath(folder))
        is_named = place.parent.samefile(DATA_DIR) and place.name != "sample"
        is_named &= place.name.isprintable()
        return Pronunciations(data.splits, place.name) if is_named else data
    print(
        "No train.tsv found: training on the built-in SAMPLE, words of the CMU dictionary.\n"
        "  To get Wiktionary's: python -m data.prepare_pronunciations --language eng_latn_us_broad"
    )
    return sample.choose_pronunciations()


def audit(data: Pronunciations) -> Iterator[str]:
    """Yield lines: the number of words per split, of validation and test words that are also
    training words, the unseen symbols."""
    train, val, test = (data.splits[split] for split in utils.SPLITS)
    yield f"Words: {len(train):,} training, {len(val):,} validation, {len(test):,} test"
    words = {word for _, word in train}
    val_count, test_count = (sum(word in words for _, word in pairs) for pairs in (val, test))
    yield f"Spellings seen in training: {val_count} of validation, {test_count} of test"
    unseen = []
    for side, kind in enumerate(("phonemes", "characters")):
        seen = {symbol for pair in train for symbol in pair[side]}
        new = sorted({symbol for pair in val + test for symbol in pair[side]} - seen)
        unseen.append(f"{len(new)} {kind}" + (f" ({' '.join(new)})" if new else ""))
    yield f"Symbols not seen in training, read as unknown: {', '.join(unseen)}"


def overrides(args: Namespace, without: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that differ from the defaults, except those called `without`."""
    return utils.overrides(args, parse_args([]), without)


def make_run(args: Namespace, data: Pronunciations) -> Run:
    """The run of these arguments on these data."""
    arguments = overrides(args, RUNTIME_OPTIONS)
    identity = {k: v for k, v in arguments.items() if k not in DECODING_OPTIONS}
    model = f"{'g2p-' if is_g2p(args) else ''}{'attn' if args.use_attn else 'plain'}"
    seeds = "ensemble" if args.ensemble else f"seed{args.seed}"
    title = f"q3-{model}-lr{args.lr:g}-{seeds}-{data.name}"
    command = shlex.join(["python", "hw2_q3.py", *utils.to_argv(DASH, arguments)])
    about = identity, {"name": data.name, "fingerprint": data.fingerprint}, TRAINING_VERSION
    return Run(title, command, *about, args.n_epochs, args.output_dir, checkpoint_file(args))


def checkpoint_file(args: Namespace) -> Path | None:
    """The file of --checkpoint_name: a path, or a name in checkpoints/."""
    name = args.checkpoint_name
    is_bare = name is not None and name.parent == Path()
    return args.output_dir / "checkpoints" / name if is_bare else name


def new_record(run: Run, model: nn.Module, history: dict, seconds: list[float]) -> dict[str, Any]:
    """A run's record, as yet without test scores; an ensemble has no history."""
    record, errors = utils.new_record(run, model, history, seconds), history.get("val_cer")
    return record | ({"best_epoch": errors.index(min(errors)) + 1} if errors else {})


def summary(record: dict[str, Any]) -> str:
    """A record's result in one line."""
    if "diverged_in_epoch" in record:
        return f"diverged in epoch {record['diverged_in_epoch']}"
    if "final" not in record:
        return "trained, not tested"
    rate, scores = "PER" if "direction" in record["arguments"] else "CER", record["final"]["greedy"]
    return f"Test {rate}: {scores['cer']:.4f}, Test WER: {scores['wer']:.4f}"


# ----------------------------------------------------------------------------------------------
# testing

LEXICON_BEAM = 30  # candidates that a list re-ranks, or --beam_size, if that is more
N_SAMPLES = 10  # samples per word; WER@k counts the first k
N_EXAMPLES = 10  # words printed with several spellings
N_ATTENTION = 4  # words of the attention figure


def test(args: Namespace, run: Run, data: Pronunciations, device: torch.device) -> None:
    """Score a trained model, or with --ensemble several together, on the test words, print the
    original's lines and complete the run's record. Raises UserError."""
    if args.ensemble:
        speller, saved = load_ensemble(args, data, device), {"history": {}, "seconds": []}
    elif run.checkpoint.exists():
        speller, _, saved = load_speller(run.checkpoint, device, args.direction)
    else:
        raise UserError(f"{run.checkpoint}: no such checkpoint; train the model first")
    pairs = directed_pairs(args, data, "test")
    final = score(speller, pairs, args)
    if args.lexicon is not None:
        final["lexicon"] = score_lexicon(speller, data, args)
    print_scores(final, args, data.name)
    if not args.ensemble and not utils.is_trained(run):
        print("The checkpoint is unfinished or of another run: its record is not written")
        return
    record = new_record(run, speller.model, saved["history"], saved["seconds"]) | {"final": final}
    if args.use_attn and not args.ensemble:
        final["attention"] = attention_examples(speller, pairs, args.max_len)
        utils.save_figure(run.figures / "attention.png", plot_attention(args, record))
    print(utils.store_record(run, record))  # last: a run with final scores is complete


def load_speller(
    path: Path, device: torch.device | str, direction: str | None = None
) -> tuple[Speller, Namespace, dict]:
    """The Speller with a checkpoint's best weights, its arguments and the checkpoint's content.
    Raises UserError, also if the model was trained for the other direction."""
    saved = utils.load_checkpoint(path, device)
    with utils.checkpoint_errors(f"{path}: not a model of question 3"):
        args = parse_args(shlex.split(saved["command"])[2:])
        source = Vocabulary(saved["symbols"]["source"], not is_g2p(args))
        target = Vocabulary(saved["symbols"]["target"], is_g2p(args))
        "".join(source.symbols + target.symbols)  # raises TypeError unless all are strings
        model = build_model(args, source, target).to(device)
        model.load_state_dict(saved["best"])
        float(min(saved["history"]["val_cer"]))  # raises unless there are numbers
        utils.require_finite(model)
    if direction not in (None, args.direction):
        raise UserError(f"{path}: was trained with the other --direction")
    return Speller(model.eval(), source, target, args.label_smoothing), args, saved


def load_ensemble(args: Namespace, data: Pronunciations, device: torch.device) -> Speller:
    """The Speller of the models that --ensemble combines. Raises UserError."""
    spellers = []
    for run in (make_run(member, data) for member in members(args)):
        if not utils.is_trained(run):
            raise UserError(f"{run.checkpoint}: missing or unfinished; train it first")
        spellers.append(load_speller(run.checkpoint, device)[0])
    return spellers[0]._replace(model=Ensemble([s.model for s in spellers]).eval())


def members(args: Namespace) -> list[Namespace]:
    """The arguments of each run that the lists of --lr and --seed describe, or of each member of an
    ensemble."""
    return utils.expand(Namespace(**vars(args) | {"ensemble": False}), "lr", "seed")


def finished_record(run: Run, args: Namespace) -> dict[str, Any]:
    """The record of a run that is trained and scored as the arguments ask, or {}."""
    record = utils.finished_record(run)
    final = record.get("final", {})
    nucleus, beam = final.get("nucleus", {}), final.get("beam", {})
    same = final.get("max_len") == args.max_len
    same &= not args.nucleus or (nucleus.get("p"), nucleus.get("k")) == (args.topp, args.k)
    if args.beam_size:
        same &= beam.get("size") == args.beam_size
        same &= f"wer@{min(args.k, args.beam_size)}" in beam
    if args.lexicon is not None:
        lexicon, size = final.get("lexicon", {}), lexicon_beam(args)
        same &= (lexicon.get("name"), lexicon.get("size")) == (args.lexicon, size)
        same &= f"wer@{min(args.k, size)}" in lexicon
    return record if same else {}


def score(speller: Speller, pairs: list[tuple], args: Namespace) -> dict[str, Any]:
    """Test scores of greedy spellings, and of nucleus sampling and beam search if asked for."""
    encoded, max_len, k = speller.encode(pairs), args.max_len, args.k
    true, split = encoded.spellings, speller.target.split
    greedy = spellings(speller.greedy(encoded, max_len))
    final = {"max_len": max_len, "greedy": score_candidates(greedy, true, 1, split)}
    if args.nucleus:
        n, generator = max(k, N_SAMPLES), make_generator(args, encoded.sources.device)
        samples = spellings(speller.sample(encoded, args.topp, n, generator, max_len))
        examples = [[w, list(dict.fromkeys(row[:k]))] for w, row in zip(true, samples)]
        final["nucleus"] = {"p": args.topp, "k": k} | score_candidates(samples, true, k, split)
        final["nucleus"]["examples"] = examples[:N_EXAMPLES]
    if args.beam_size:
        beam, k = speller.beam(encoded, args.beam_size, max_len), min(k, args.beam_size)
        final["beam"] = {"size": args.beam_size} | score_beam(beam, true, k, split)
    return final


def score_beam(
    beam: list[list[tuple[str, float]]], true: list[str], k: int, split: Callable = list
) -> dict[str, Any]:
    """`score_candidates` of words' (spelling, log-probability), and examples of the k best."""
    rows = zip(true[:N_EXAMPLES], beam)
    examples = [[word, [[s, round(x, 3)] for s, x in row[:k]]] for word, row in rows]
    return score_candidates(spellings(beam), true, k, split) | {"examples": examples}


def lexicon_beam(args: Namespace) -> int:
    """The size of the beam that --lexicon re-ranks."""
    return max(LEXICON_BEAM, args.beam_size or 0)


def score_lexicon(speller: Speller, data: Pronunciations, args: Namespace) -> dict[str, Any]:
    """Test scores of a beam's spellings re-ranked by --lexicon, with weights chosen on the
    validation words; 'listed': whether the list has each true word. Raises UserError."""
    lexicon, size = load_lexicon(args.lexicon), lexicon_beam(args)
    val, test = (speller.encode(directed_pairs(args, data, split)) for split in ("val", "test"))
    unsmoothed = speller.unsmoothed()
    val_beam, test_beam = (unsmoothed.beam(pairs, size, args.max_len) for pairs in (val, test))
    reranker = fit_reranker(val_beam, val.spellings, lexicon)
    ranked = [[c[:2] for c in row] for row in reranker.rerank(test_beam)]
    about = {"name": lexicon.name, "source": lexicon.source, "size": size}
    about["weights"] = reranker.weights.to_json()
    about["listed"] = [int(lexicon.log_frequency(word) is not None) for word in test.spellings]
    return about | score_beam(ranked, test.spellings, min(args.k, size))


def make_generator(args: Namespace, device: torch.device) -> torch.Generator:
    """The random numbers of nucleus sampling, seeded as the run; an ensemble's as its first."""
    seed = args.seed[0] if isinstance(args.seed, list) else args.seed
    return torch.Generator(device).manual_seed(seed)


def print_scores(final: dict[str, Any], args: Namespace, data_name: str) -> None:
    """Print the scores in the original's words."""
    mark = " (built-in sample)" if data_name == "sample" else ""

    def print_rates(scores):
        print(f"Test {rate_name(args)}: {scores['cer']:.4f}, Test WER: {scores['wer']:.4f}{mark}")

    def print_candidates(scores, k, what, show):
        print_rates(scores)
        print(f"Printing first {N_EXAMPLES} examples with {what}:")
        for word, row in scores["examples"]:
            print(f"({word!r}, {{{', '.join(map(show, row))}}})")
        print(f"Test WER@{k}: {scores[f'wer@{k}']:.4f}{mark}")

    def print_beam(scores):
        k = min(args.k, scores["size"])
        what = f"their {k} best and log-probabilities"
        print_candidates(scores, k, what, lambda pair: f"{pair[0]!r}: {pair[1]:.3f}")

    print_rates(final["greedy"])
    if args.nucleus:
        print(f"Nucleus sampling, p = {args.topp:g}, the first of {args.k} samples:")
        print_candidates(final["nucleus"], args.k, "multiple predictions", repr)
    if args.beam_size:
        print(f"Beam search, size {args.beam_size}, the best:")
        print_beam(final["beam"])
    if args.lexicon is not None:
        scores = final["lexicon"]
        pairs = scores["weights"].items()
        weights = ", ".join(f"{name} {'none' if x is None else x}" for name, x in pairs)
        print(f"Beam search, size {scores['size']}, re-ranked by {scores['source']}: {weights}")
        listed = scores["listed"]
        print(f"The list has {sum(listed):,} of the {len(listed):,} test words")
        print_beam(scores)


@torch.inference_mode()
def attention_examples(speller: Speller, pairs: list[tuple], max_len: int) -> list[dict[str, Any]]:
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


def plot_attention(args: Namespace, record: dict[str, Any]) -> Any:
    """A figure of the attention weights over phonemes (across) for each written letter (down);
    titles: the written word and, if it differs, the true one."""
    examples = record["final"]["attention"]
    fig, grid = utils.new_figure(5.0, 5.2, 2, math.ceil(len(examples) / 2), squeeze=False)
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
    fig.suptitle(figure_title(args, record["data"]["name"]), fontsize=9)
    fig.colorbar(image, ax=grid, label="Attention weight", shrink=0.7)
    return fig


# ----------------------------------------------------------------------------------------------
# spelling


OMISSION = 8.0  # nats: an optional sound is nearly always written (chosen on validation words)


class Candidate(NamedTuple):
    """A spelling of some words. Candidates of different words are added field by field."""

    readings: tuple[str, ...]  # each word as it was read
    spellings: tuple[str, ...]
    log_prob: float
    score: float  # by which candidates are sorted: the log-probability, or a Reranker's
    unlisted: tuple[str, ...]  # spellings that are not in the word list
    cut_off: int  # the number of words that reached --max_len


def spell(args: Namespace) -> None:
    """Spell the IPA of the arguments, of --input, of standard input, or typed at a prompt."""
    device = utils.prepare_device(args.device, args.threads or 1)
    if args.ensemble:
        with contextlib.redirect_stdout(sys.stderr):  # only answers go to standard output
            data = load_data(args)
        about = {"name": data.name, "fingerprint": data.fingerprint}
        speller, trained, description = load_ensemble(args, data, device), args, "the ensemble"
    else:
        speller, trained, about, description = choose_speller(args, device)
    reranker = choose_reranker(args, trained, about)
    if args.ipa:
        batches = iter([args.ipa])
    elif args.input is not None or not sys.stdin.isatty():
        batches = notation.read_lines("-" if args.input is None else args.input)
    else:
        batches = notation.prompt_lines("word" if is_g2p(args) else "IPA")
    first = next(batches, [])  # an unreadable file ends the command here, before anything else
    print(f"Model: {description}", file=sys.stderr)
    if reranker:
        lexicon = reranker.lexicon
        count = len(lexicon.log_frequencies)
        print(f"Words: {lexicon.source} ({count:,} words) re-ranks the spellings", file=sys.stderr)
    read = notation.make_reader(speller.source.stoi, speller.source.spaced)
    line = " ".join(args.ipa)
    if 1 < len(args.ipa) == len(line.split()) and len(read(line).words) == 1:
        print(utils.printable(f'Read word by word; quote a word: spell "{line}"'), file=sys.stderr)
    answers = answer_lines(itertools.chain([first], batches), read, speller, reranker, args)
    notation.print_answers(answers, args.json)


def choose_speller(
    args: Namespace, device: torch.device
) -> tuple[Speller, Namespace, dict[str, str], str]:
    """The Speller of --checkpoint_name; or the best one trained on the words of --data_dir; or,
    without it, the best one trained on real words, preferably the default ones; or the shipped one.
    Returns also its arguments, its data and a description. Raises UserError."""
    if args.data_dir:
        key, value = "fingerprint", utils.load_pronunciations(args.data_dir).fingerprint
    else:
        key, value = "name", "pronunciations"

    def rank(saved):
        is_same, is_real = saved["data"][key] == value, saved["data"]["name"] != "sample"
        is_other = is_g2p(parse_args(shlex.split(saved["command"])[2:])) != is_g2p(args)
        if is_other or not (is_same if args.data_dir else is_real):
            return None
        return is_same, -float(min(saved["history"]["val_cer"]))

    folder = args.output_dir / "checkpoints"
    shipped = None if args.data_dir or is_g2p(args) else PRETRAINED
    try:
        path = checkpoint_file(args) or utils.best_checkpoint(folder, "q3-", rank, shipped)
    except UserError as error:
        given = overrides(args, ())
        given = {x: given[x] for x in ("direction", "data_dir", "output_dir") if x in given}
        command = shlex.join(["python", "hw2_q3.py", "--use_attn", *utils.to_argv(DASH, given)])
        raise UserError(f"{error} on real words: {command}; or name one: --checkpoint_name FILE")
    speller, trained, saved = load_speller(path, device, args.direction)
    name = utils.printable(saved["data"]["name"])
    names = {"sample": "the built-in SAMPLE", "pronunciations": "your words"}
    words = names.get(name, f"the words in data/{name}")
    error = f"validation {rate_name(trained)} {float(min(saved['history']['val_cer'])):.4f}"
    return speller, trained, saved["data"], f"{path} (trained on {words}, {error})"


def choose_reranker(
    args: Namespace, trained: Namespace, about_data: dict[str, str]
) -> Reranker | None:
    """The list of --lexicon, or the one with which the model was tested, with the weights that were
    chosen then; None with 'none', for sampling, or without a list. Raises UserError."""
    if args.lexicon == "none" or is_g2p(args) or args.nucleus:
        return None
    recorded = recorded_lexicon(args, trained, about_data)
    name = recorded.get("name") if args.lexicon is None else args.lexicon
    if name is None:
        return None
    try:
        lexicon = load_lexicon(name)
    except UserError as error:
        if args.lexicon is not None:
            raise
        print(f"Spelling without a word list: {error}", file=sys.stderr)
        return None
    return Reranker(lexicon, recorded["weights"] if recorded.get("name") == name else Weights())


def recorded_lexicon(
    args: Namespace, trained: Namespace, about_data: dict[str, str]
) -> dict[str, Any]:
    """The name and the weights of the list with which a model was tested, or {}."""
    for folder in dict.fromkeys((args.output_dir, utils.ROOT)):  # a clone has the shipped model's
        config = Namespace(**vars(trained) | {"output_dir": folder})
        path = make_run(config, Namespace(**about_data)).record
        try:
            with utils.user_errors(f"{path}: its word list is not used"):
                if lexicon := utils.load_record(path).get("final", {}).get("lexicon"):
                    weights = Weights.from_json(lexicon["weights"])
                    return {"name": str(lexicon["name"]), "weights": weights}
        except UserError as error:
            print(error, file=sys.stderr)
    return {}


def answer_lines(
    batches: Iterable[list[str]], read: Callable, speller: Speller, reranker: Reranker | None,
    args: Namespace,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The answer to each line, as `describe` gives it; the lines of a batch are decoded together.
    What could not be read is named on standard error."""
    unit, numbers = "argument" if args.ipa else "line", itertools.count(1)
    generator = make_generator(args, next(speller.model.parameters()).device)
    for texts in (list(map(read, lines)) for lines in batches):
        readings = [reading for text in texts for word in text.words for reading in word]
        rows = iter(decode(readings, speller, reranker, args, generator) if readings else [])
        for text, number in zip(texts, numbers):
            if text.note:
                print(utils.printable(f"{unit} {number}: {text.note}"), file=sys.stderr)
            yield describe(text, choose_candidates(text, rows, speller, reranker, args), args)


def decode(
    readings: list[tuple], speller: Speller, reranker: Reranker | None, args: Namespace,
    generator: torch.Generator,
) -> list[list[tuple]]:  # fmt: skip
    """Candidates (spelling, log-probability, score) of words, by the decoding asked for."""
    pairs = speller.encode([(reading, "") for reading in readings])
    if reranker:
        beam = speller.unsmoothed().beam(pairs, lexicon_beam(args), args.max_len)
        return reranker.rerank(beam)
    if args.beam_size:
        rows = speller.beam(pairs, args.beam_size, args.max_len)
    elif args.nucleus:
        rows = speller.sample(pairs, args.topp, args.k, generator, args.max_len)
    else:
        rows = speller.greedy(pairs, args.max_len)
    return [[(spelling, log_prob, log_prob) for spelling, log_prob in row] for row in rows]


def choose_candidates(
    text: notation.Text, rows: Iterator[list[tuple]], speller: Speller, reranker: Reranker | None,
    args: Namespace,
) -> list[Candidate]:  # fmt: skip
    """The best candidates of a text, from the next of `rows`, one for each reading of each word."""

    shown = args.k if args.nucleus else args.beam_size or 1

    def candidate(reading, spelling, log_prob, score):
        is_listed = not reranker or reranker.lexicon.log_frequency(spelling) is not None
        unlisted = () if is_listed or not spelling else (spelling,)
        is_cut = len(speller.target.split(spelling)) == args.max_len  # then it has no END
        read = (speller.source.join(reading),)
        return Candidate(read, (spelling,), log_prob, score, unlisted, is_cut)

    best = [Candidate((), (), 0.0, 0.0, (), 0)]
    for word in text.words:
        candidates = []  # a reading without an optional sound is less probable than the whole one
        for reading, row in zip(word, rows):
            omitted = OMISSION * (len(word[0]) - len(reading))
            candidates += [candidate(reading, *c, c_score - omitted) for *c, c_score in row]
        candidates = best_of(candidates, shown)
        sums = (Candidate(*map(operator.add, a, b)) for a, b in itertools.product(best, candidates))
        best = best_of(sums, shown)
    return best if text.words else []


def best_of(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The `count` best candidates with distinct spellings; those cut off at --max_len come last."""
    distinct = {}
    for candidate in sorted(candidates, key=lambda c: (c.cut_off > 0, -c.score)):
        distinct.setdefault(candidate.spellings, candidate)
    return list(distinct.values())[:count]


def describe(text: notation.Text, candidates: list[Candidate], args: Namespace) -> dict[str, Any]:
    """An answer, {input, phonemes, candidates: [{phonemes, spelling, log_probability}]}, with notes
    if there are any. The first phonemes are the best candidate's. g2p: letters and phonemes."""
    sides, gaps, unit = ("phonemes", "spelling"), (" # ", " "), "characters"
    if is_g2p(args):
        sides, gaps, unit = ("letters", "phonemes"), (" ", " # "), "phonemes"
    rows = []
    for c in candidates:
        row = {s: gap.join(words) for s, gap, words in zip(sides, gaps, (c.readings, c.spellings))}
        row["log_probability"] = round(c.log_prob, 3)
        notes = [f"not listed: {', '.join(c.unlisted)}"] if c.unlisted else []
        notes += [f"cut off at {args.max_len} {unit}"] if c.cut_off else []
        rows.append(row | ({"note": "; ".join(notes)} if notes else {}))
    answer = {"input": text.line, sides[0]: rows[0][sides[0]] if rows else "", "candidates": rows}
    return answer | ({"note": text.note} if text.note else {})


# ----------------------------------------------------------------------------------------------
# options

DASH = "--"
DECODING_OPTIONS = "nucleus", "topp", "k", "beam_size", "lexicon", "max_len"
RUNTIME_OPTIONS = (  # where and how a run is made: they do not identify it
    "mode", "ipa", "input", "json", "device", "threads", "jobs", "scheduler", "restart",
    "data_dir", "output_dir", "checkpoint_name",
)  # fmt: skip
PRESETS = {
    "assignment": {},
    "best": {
        "use_attn": True, "layers": 2, "hidden_size": 256, "dropout": 0.4, "n_epochs": 30,
        "schedule": "one_cycle", "label_smoothing": 0.1, "clip": 3.0, "embedding_scale": 0.1,
        "input_feeding": True,
    },
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line. Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    for word in itertools.takewhile(lambda word: word != "--", argv):
        if "spell" in argv and word != "-h" and re.fullmatch(r"-[^-\d.\s]\S*", word):
            raise UserError(f'no option {word}; IPA that begins with a dash: spell -- "{word}"')
    args = utils.parse_with_presets(make_parser, PRESETS, argv)
    validate_args(args)
    return args


# fmt: off
def make_parser() -> utils.Parser:
    """The parser of the command line; its defaults are the assignment's."""
    parser = utils.Parser("hw2_q3.py", "%(prog)s [train | test | spell IPA ...] [options]",
                          description=__doc__.rpartition("\n\n")[0])
    parser.add_argument("mode", nargs="?", metavar="MODE",
        help="train: only train; test: only test a trained model; spell: spell IPA "
        "(default: train, then test)")
    parser.add_argument("ipa", nargs="*", metavar="IPA",
        help="for spell: IPA or ARPAbet of one or several words, in quotation marks; with "
        "--direction g2p: written words")
    add_training_options(parser.add_argument_group("training").add_argument)
    add_model_options(parser.add_argument_group("model").add_argument)
    add_decoding_options(parser.add_argument_group("decoding").add_argument)
    utils.add_runtime_options(parser, DASH, "one")
    return parser


def add_training_options(add: Callable) -> None:
    """Add the options of data and training."""
    count, positive = utils.number(int, 1, 10**6), utils.number(float, 0, 10**3, low_open=True)
    add("--n_epochs", type=count, default=20, help="number of epochs (default: %(default)s)")
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
        help="checkpoint file; a name without a folder lies in checkpoints/ (default: the run's "
        "name; for spell: the checkpoint in checkpoints/ with the lowest validation CER, those "
        "trained on the default words first, none trained on the sample; else the shipped model)")


def add_model_options(add: Callable) -> None:
    """Add the options that describe the model."""
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
        help="average the predictions of the models of several seeds, --seed 42 1 2; without a "
        "mode, first train those that are missing")


def add_decoding_options(add: Callable) -> None:
    """Add the options of testing and spelling."""
    add("--nucleus", action="store_true",
        help="also test nucleus (top-p) sampling; for spell: sample, without a word list")
    add("--topp", type=utils.number(float, 0, 1, low_open=True), metavar="P",
        help="probability mass of the nucleus, implies --nucleus (default: 0.8)")
    add("--k", type=utils.number(int, 1, 100), default=3,
        help="the k of WER@k; for spell: number of samples of --nucleus, printed without "
        "duplicates (default: %(default)s)")
    add("--beam_size", type=utils.number(int, 1, 100), metavar="N",
        help="also test beam search of this size; for spell: number of candidates (default: 1)")
    add("--lexicon", metavar="LIST",
        help="also test a beam of 30, or of --beam_size if larger, re-ranked by a word list: a "
        "language of the package wordfreq, such as en, or a file with a word on each line, "
        "optionally TAB and a count; for spell: the list in the model's record by default; none "
        "turns it off")
    add("--max_len", type=utils.number(int, 1, 1000), default=MAX_LEN,
        help="maximum length of a spelling (default: %(default)s)")
    add("--input", metavar="FILE",
        help="for spell: a file with IPA on each line, or - for standard input")
    add("--json", action="store_true", help="for spell: print the answers as JSON")
# fmt: on


def validate_args(args: Namespace) -> None:
    """Set what depends on other arguments. Raises UserError if arguments contradict each other."""
    # The mode is checked here: argparse would complain of it before it names an unknown option.
    if args.mode not in (None, "train", "test", "spell"):
        raise UserError(f"unknown mode {args.mode!r}; choose train, test or spell")
    if args.checkpoint_name and args.checkpoint_name.name in ("", ".."):
        raise UserError(f"--checkpoint_name {args.checkpoint_name} is a folder, not a file name")
    args.nucleus = args.nucleus or args.topp is not None
    args.topp = 0.8 if args.topp is None else args.topp
    if args.lexicon == "none" and args.mode != "spell":
        args.lexicon = None
    has_lexicon = args.lexicon not in (None, "none")
    if is_g2p(args) and has_lexicon:
        raise UserError("--lexicon lists written words; --direction g2p writes phonemes")
    if args.mode == "spell" and args.nucleus and (args.beam_size or has_lexicon):
        raise UserError("spell: give either --nucleus, or --beam_size and --lexicon")
    if args.hidden_size % 2:
        raise UserError("--hidden_size must be even: each direction of the encoder has half of it")
    if args.input_feeding and not args.use_attn:
        raise UserError("--input_feeding needs --use_attn: it feeds the attentional vector")
    if args.mode != "spell" and (args.ipa or args.input or args.json):
        raise UserError("IPA, --input and --json need the mode spell: python hw2_q3.py spell ...")
    if args.ipa and args.input:
        raise UserError("give IPA either as arguments or by --input")
    lists = [name for name in ("lr", "seed") if isinstance(getattr(args, name), list)]
    if args.ensemble and (lists != ["seed"] or args.mode == "train"):
        raise UserError("--ensemble tests or spells with several seeds: --seed 42 1 2")
    if lists and args.checkpoint_name:
        raise UserError(f"--checkpoint_name is the file of one run: give one --{lists[0]}")
    if lists and args.mode and not args.ensemble:
        raise UserError(f"several values of --{lists[0]} need training and testing: drop the mode")


# ----------------------------------------------------------------------------------------------
# main


def main(argv: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    args = parse_args(argv)
    if args.mode == "spell":
        spell(args)
        return
    if args.lexicon is not None:
        load_lexicon(args.lexicon)  # a wrong one ends the command before training
    if not args.mode and len(configs := members(args)) > 1:
        utils.train_side_by_side(sys.modules[__name__], configs)
        if not args.ensemble:
            return
    data, device = load_data(args), utils.prepare_device(args.device, args.threads or 1)
    train_or_test = test if args.ensemble or args.mode == "test" else train
    train_or_test(args, make_run(args, data), data, device)


if __name__ == "__main__":
    utils.run_script(main)
