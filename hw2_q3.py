"""Question 3: a character-level sequence-to-sequence model that spells words from their sound.

    python hw2_q3.py --use_attn --nucleus          train with attention, test, sample as well
    python hw2_q3.py                               the same without attention, greedy
    python hw2_q3.py test --use_attn --beam_size 5 test the trained model, with beam search
    python hw2_q3.py spell "h ə l oʊ" "w ɝ l d"    spell your own IPA
    python hw2_q3.py --use_attn --direction g2p    the other way: pronounce what is written

options | symbols and batches | model | decoding | scores | training | testing | figures | report |
spelling | main
"""

import argparse
import contextlib
import itertools
import math
import os
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from rapidfuzz.distance import Levenshtein
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from tqdm import tqdm

import utils
from utils import UserError

QUESTION, RECIPE = "q3", 2  # the latter raised when a change alters the results of a run
DATA_DIR = utils.ROOT / "data"

# ----------------------------------------------------------------------------------------------
# options

# The options that can change a training's result; its name and its record hold these.
RUN_OPTIONS = ("use_attn", "lr", "dropout", "n_epochs", "batch_size", "hidden_size", "seed")
# Those that came later, each with what was done before it; in a run's name and record only where
# it says something else, so that the runs made before keep their names.
LATER_OPTIONS = {
    "direction": "p2g", "layers": 1, "input_feeding": False, "schedule": "constant",
    "label_smoothing": 0.0, "clip": None, "ensemble": False, "embedding_scale": 1.0,
}  # fmt: skip
# Those about where and how a run is made, which its name leaves out.
PLACES = "device", "threads", "output_dir", "data_dir", "restart", "jobs", "scheduler"
RECIPES = {  # what --recipe says where the command line does not
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


def parse_options(argv=None):
    """The command line as a namespace. Ends with one line and status 2 if it is wrong."""
    parser = make_parser()
    return _settle(parser, utils.parse_with_recipe(parser, RECIPES, argv))


def make_parser():
    """The parser of the command line, its defaults those of the report's recipe."""
    parser = utils.Parser(description=__doc__.rpartition("\n\n")[0])
    modes = "only train, only test what was trained, or spell IPA (default: train, then test)"
    parser.add_argument("mode", nargs="?", choices=("train", "test", "spell"), help=modes)
    ipa = "for spell: phonemes, separated by spaces within one argument"
    parser.add_argument("ipa", nargs="*", metavar="IPA", help=ipa)

    training = parser.add_argument_group("training")
    _add_training_options(training.add_argument)
    utils.add_recipe_options(training, "--", RECIPES)
    _add_decoding_options(parser.add_argument_group("decoding").add_argument)
    utils.add_machine_options(parser, "--")
    utils.add_report_options(parser, "--")
    return parser


def _add_training_options(add):
    whole, real = utils.number(int, 1, 10**6), utils.number(float, 0, 10**3, low_open=True)
    share = utils.number(float, 0, 1, high_open=True)
    add("--n_epochs", type=whole, default=20, help="passes over the training words")
    add("--batch_size", type=whole, default=64, help="words a step")
    several = {"nargs": "+", "action": utils.OneOrMore}
    rate = "Adam's step size; several: a run for each, side by side"
    add("--lr", type=real, default=0.003, help=rate, **several)
    add("--dropout", type=share, default=0.3, help="share of the units dropped")
    size = "width of embeddings and LSTMs, even"
    add("--hidden_size", type=utils.number(int, 2, 8192), default=128, help=size)
    add("--layers", type=utils.number(int, 1, 8), default=1, help="LSTMs one upon another")
    add("--use_attn", action="store_true", help="Bahdanau attention over the phonemes")
    feeding = "the decoder also reads what attention made of its last step; slower"
    add("--input_feeding", action="store_true", help=feeding)
    add("--clip", type=real, help="greatest norm of a step's gradient; without it any")
    small = "standard deviation of the embeddings, and of the tied output layer, at the start"
    add("--embedding_scale", type=real, default=1.0, help=small)
    direction = "spell what is heard (p2g), or pronounce what is written (g2p)"
    add("--direction", choices=("p2g", "g2p"), default="p2g", help=direction)
    where = "folder of train.tsv, valid.tsv, test.tsv (default: data/, or else a built-in sample); "
    where += "for spell: of the words that the model has learned"
    add("--data_dir", type=Path, metavar="DIR", help=where)
    name = "the checkpoint's file (default: made of the options; for spell: the best one)"
    add("--checkpoint_name", type=Path, metavar="FILE", help=name)


def _add_decoding_options(add):
    nucleus = "also sample from the nucleus (top-p); for spell: instead of greedy spelling"
    add("--nucleus", action="store_true", help=nucleus)
    p = utils.number(float, 0, 1, low_open=True)
    add("--topp", type=p, help="the nucleus's probability, implies --nucleus (default: 0.8)")
    add("--k", type=utils.number(int, 1, 100), default=3, help="candidates a word; the k of WER@k")
    beam = "also search with a beam of this size; for spell: instead of the others"
    add("--beam_size", type=utils.number(int, 1, 100), metavar="N", help=beam)
    together = "test, or spell with, the models of several seeds together; without a mode, first "
    together += "train those that are missing"
    add("--ensemble", action="store_true", help=together)
    add("--max_len", type=utils.number(int, 1, 1000), default=MAX_LEN, help="longest spelling")
    file = "for spell: a file with IPA on each line, or - for standard input"
    add("--input", metavar="FILE", help=file)


def _settle(parser, options):
    """Derive what one option says about another; refuse what contradicts itself."""
    utils.check_report_options(parser, options, "--", PLACES)
    options.nucleus = options.nucleus or options.topp is not None
    options.topp = 0.8 if options.topp is None else options.topp
    if options.hidden_size % 2:
        parser.error("--hidden_size must be even: the encoder has two directions of half of it")
    if options.input_feeding and not options.use_attn:
        parser.error("--input_feeding feeds what attention makes: it needs --use_attn")
    if options.mode != "spell" and (options.ipa or options.input):
        parser.error("IPA and --input go with spell: python hw2_q3.py spell ...")
    several = [name for name in ("lr", "seed") if isinstance(getattr(options, name), list)]
    if options.ensemble and (several != ["seed"] or options.mode == "train"):
        parser.error("--ensemble is for testing or spelling with several seeds: --seed 42 1 2")
    if several and options.checkpoint_name:
        parser.error(f"--checkpoint_name is one run's file: give one --{several[0]}")
    if several and options.mode and not options.ensemble:
        parser.error(f"several values of --{several[0]} are for training and testing in one")
    if options.ipa and options.input:
        parser.error("give IPA either as arguments or by --input")
    del options.recipe  # all that it said is in the other options now
    return options


def run_options(options):
    """Those of a namespace that can change a training's result, as a dictionary."""
    return utils.chosen_options(options, RUN_OPTIONS, LATER_OPTIONS)


def command(options):
    """The command line, without paths and machine, that repeats the run with these options."""
    return " ".join(["python hw2_q3.py", *make_parser().arguments(options)])


# ----------------------------------------------------------------------------------------------
# symbols and batches

SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNK, START, END = range(len(SPECIAL))  # no decoder ever emits those before END


class Vocabulary:
    """The symbols of one side, numbered from 0; the first are the special ones, which no text has:
    what looks like one there is another symbol. spaced: whether its texts have spaces between the
    symbols, as those of phonemes have."""

    def __init__(self, symbols, spaced=False):
        self.symbols, self.spaced = list(symbols), spaced
        known = list(enumerate(self.symbols))[len(SPECIAL) :]
        self.numbers = {symbol: number for number, symbol in known}

    @classmethod
    def of(cls, sequences, spaced=False):
        """The vocabulary of all symbols in `sequences`: of symbols, or texts."""
        split = cls((), spaced).split
        found = (split(s) if isinstance(s, str) else s for s in sequences)
        return cls([*SPECIAL, *sorted({symbol for one in found for symbol in one})], spaced)

    def __len__(self):
        return len(self.symbols)

    def split(self, text):
        """The symbols of a text."""
        return text.split() if self.spaced else list(text)

    def join(self, symbols):
        """The text of these symbols."""
        return (" " if self.spaced else "").join(symbols)

    def encode(self, sequence):
        """The numbers of the symbols; UNK for one that is not there."""
        return [self.numbers.get(symbol, UNK) for symbol in sequence]

    def decode(self, numbers):
        """The text of the symbols up to the first END or padding."""
        ends = (i for i, number in enumerate(numbers) if number in (END, PAD))
        return self.join(self.symbols[number] for number in numbers[: next(ends, None)])


def make_vocabularies(direction, sources, targets):
    """The vocabularies of what is read and what is written, of all symbols in these sequences."""
    spaced = direction == "p2g"  # what is read is phonemes
    return Vocabulary.of(sources, spaced), Vocabulary.of(targets, not spaced)


def facing(data, options):
    """The words as --direction wants them: as they are, or as pairs (letters, phonemes as text)."""
    if options.direction == "p2g":
        return data
    splits = {
        split: [(tuple(word), " ".join(sound)) for sound, word in pairs]
        for split, pairs in data.splits.items()
    }
    return utils.Pronunciations(splits, data.name)


class Words(NamedTuple):
    """Words as tensors, padded with PAD.

    sources: int64 (N, S), what is read; lengths: int64 (N,), on the CPU, how many symbols
    targets: int64 (N, T), START, what is to be written, END; target_lengths: (N,), on the CPU, T
    without PAD
    spellings: N strings, what is to be written as text
    """

    sources: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    target_lengths: torch.Tensor
    spellings: list


def to_tensors(pairs, source, target, device="cpu"):
    """Pairs (phonemes, spelling) as `Words`, by the vocabularies of what is read and written."""
    sources = [torch.tensor(source.encode(sound)) for sound, _ in pairs]
    targets = [torch.tensor([START, *target.encode(target.split(word)), END]) for _, word in pairs]
    return Words(
        pad_sequence(sources, batch_first=True, padding_value=PAD).to(device),
        torch.tensor([len(source) for source in sources]),
        pad_sequence(targets, batch_first=True, padding_value=PAD).to(device),
        torch.tensor([len(target) for target in targets]),
        [word for _, word in pairs],
    )


# ----------------------------------------------------------------------------------------------
# model


class Memory(NamedTuple):
    """What the encoder leaves for attention to look at.

    values: (B, S, H), the encoder's outputs; keys: (B, S, H), their projections, made once
    mask: bool (B, S), true where there is a phoneme
    """

    values: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor


class BahdanauAttention(nn.Module):
    """Additive attention, Bahdanau et al. 2015, section 3.1 and appendix A.1.2: the score of
    position i is v . tanh(W_h h_i + W_s s).

    Here s is the state that has read the current character, and the context joins it after the
    LSTM, tanh(W [context; s]) (Luong et al. 2015, section 3.1), so that all steps of a known target
    are computed at once. Only pairs of a state and a phoneme of its own word are computed: in a
    batch of mixed lengths they are a quarter to a third of a padded (B, T, S).
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)  # W_h
        self.query = nn.Linear(hidden_size, hidden_size)  # W_s
        self.score = nn.Linear(hidden_size, 1, bias=False)  # v
        self.combine = nn.Linear(2 * hidden_size, hidden_size)  # W

    def forward(self, states, words, memory):
        """states (R, H), each of the word at `words` (R,) of the memory -> states with context
        (R, H) and attention weights (R, S)."""
        mask = memory.mask[words]  # (R, S)
        rows, places = mask.nonzero(as_tuple=True)  # (P,), the pairs, row by row
        places = words[rows] * mask.shape[1] + places  # (P,), into the memory's B * S
        queries = F.embedding(rows, self.query(states))  # (P, H)
        keys = F.embedding(places, memory.keys.flatten(0, 1))  # (P, H)
        scores = self.score(torch.tanh(keys + queries)).squeeze(1)  # (P,)
        scores = torch.full_like(mask, -torch.inf, dtype=scores.dtype).masked_scatter(mask, scores)
        weights = scores.softmax(1)  # (R, S), exactly 0 where masked
        context = F.embedding_bag(  # (R, H), the weighted sum of each row's values
            places,
            memory.values.flatten(0, 1),
            offsets=mask.sum(1).cumsum(0) - mask.sum(1),
            per_sample_weights=weights.masked_select(mask),
            mode="sum",
        )
        return torch.tanh(self.combine(torch.cat((context, states), 1))), weights


def make_lstm(inputs, hidden_size, layers, dropout, **more):
    """An LSTM of some layers, with dropout between them."""
    between = dropout if layers > 1 else 0.0
    return nn.LSTM(inputs, hidden_size, layers, batch_first=True, dropout=between, **more)


class Encoder(nn.Module):
    """Bidirectional LSTM of some layers: phonemes (B, S), padded, and their numbers (B,), on the
    CPU, -> outputs (B, S, H) and final states 2 x (layers, B, H)."""

    def __init__(self, symbols, hidden_size, dropout, layers=1):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden_size, padding_idx=PAD)
        self.lstm = make_lstm(hidden_size, hidden_size // 2, layers, dropout, bidirectional=True)
        self.dropout = utils.Dropout(dropout)

    def forward(self, sources, lengths):
        x = self.dropout(self.embedding(sources))  # (B, S, H)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.lstm(packed)  # 2 x (layers * 2, B, H / 2)
        whole = {"batch_first": True, "total_length": sources.shape[1]}
        outputs, _ = pad_packed_sequence(outputs, **whole)  # (B, S, H)
        state = (part.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) for part in state)
        state = tuple(state)  # 2 x (layers, B, H)
        return self.dropout(outputs), state


class Decoder(nn.Module):
    """LSTM over the characters, with attention if wanted; its output layer is tied to its
    embedding (Press and Wolf 2017, section 2).

    input_feeding: the LSTM also reads what attention made of its last state (Luong et al. 2015,
    section 3.3), so that it knows where it has looked, but has to go step by step.
    """

    def __init__(self, symbols, hidden_size, dropout, use_attn, layers=1, input_feeding=False):
        super().__init__()
        self.input_feeding = input_feeding
        self.embedding = nn.Embedding(symbols, hidden_size, padding_idx=PAD)
        if input_feeding:
            widths = [2 * hidden_size] + [hidden_size] * (layers - 1)
            self.cells = nn.ModuleList(nn.LSTMCell(width, hidden_size) for width in widths)
        else:
            self.lstm = make_lstm(hidden_size, hidden_size, layers, dropout)
        self.attention = BahdanauAttention(hidden_size) if use_attn else None
        self.dropout = utils.Dropout(dropout)
        self.output = nn.Linear(hidden_size, symbols)
        self.output.weight = self.embedding.weight

    def forward(self, characters, state, memory, steps, words):
        """Characters so far (B, T), state as Seq2Seq.encode's -> logits (R, V) of the next ones at
        the R true places of `steps` (B, T), row by row, the state after the last character, and
        the attention weights (R, S), None without attention.

        words: int64 (B,), which word of the memory each row spells.
        """
        x = self.dropout(self.embedding(characters))  # (B, T, H)
        if self.input_feeding:
            x, state, weights = self._step_by_step(x, state, memory, steps, words)
            return self.output(x), state, weights
        x, state = self.lstm(x, state)
        places = steps.flatten().nonzero()[:, 0]  # (R,), into B * T
        x = F.embedding(places, x.flatten(0, 1))  # (R, H)
        weights = None
        if self.attention is not None:
            x, weights = self.attention(x, words[places // steps.shape[1]], memory)
        return self.output(self.dropout(x)), state, weights

    def _step_by_step(self, embedded, state, memory, steps, words):
        """The same for embedded characters (B, T, H) and a state with what is fed: states with
        context (R, H), the state of the rows that have a last step, and the weights (R, S).

        Rows that are over are dropped; a row's true steps come first.
        """
        hidden, cell, fed = state
        layers, fed = list(zip(hidden, cell)), fed[0]  # layers x 2 x (B, H); (B, H)
        rows = torch.arange(len(words), device=words.device)
        outputs, weights, places = [], [], []
        for step, x in enumerate(embedded.unbind(1)):  # (B, H)
            going = steps[rows, step].nonzero()[:, 0]
            if len(going) < len(rows):
                rows, fed = rows[going], fed.index_select(0, going)
                layers = [tuple(part.index_select(0, going) for part in own) for own in layers]
            x = torch.cat((x.index_select(0, rows), fed), 1)  # (rows, 2H)
            for i, lstm in enumerate(self.cells):
                layers[i] = lstm(self.dropout(x) if i else x, layers[i])
                x = layers[i][0]
            x, looked = self.attention(x, words[rows], memory)
            fed = self.dropout(x)
            outputs.append(fed)
            weights.append(looked)
            places.append(rows * steps.shape[1] + step)
        order = torch.cat(places).argsort()  # row by row
        outputs, weights = (F.embedding(order, torch.cat(part)) for part in (outputs, weights))
        hidden, cell = map(torch.stack, zip(*layers))
        return outputs, (hidden, cell, fed.unsqueeze(0)), weights


class Seq2Seq(nn.Module):
    """Encoder and decoder, the decoder started from the encoder's final states."""

    def __init__(
        self, read, written, hidden_size=128, dropout=0.3, use_attn=False, layers=1,
        input_feeding=False,
    ):  # fmt: skip
        """read, written: how many symbols there are to read and to write."""
        super().__init__()
        self.encoder = Encoder(read, hidden_size, dropout, layers)
        self.decoder = Decoder(written, hidden_size, dropout, use_attn, layers, input_feeding)

    def encode(self, sources, lengths):
        """Phonemes (B, S), lengths (B,) on the CPU -> Memory, None without attention, and state:
        hidden and cell (layers, B, H), with input feeding also what is fed first (1, B, H)."""
        outputs, state = self.encoder(sources, lengths)
        if self.decoder.attention is None:
            return None, state
        if self.decoder.input_feeding:
            state = *state, torch.zeros_like(state[0][:1])
        return Memory(outputs, self.decoder.attention.key(outputs), sources != PAD), state

    def forward(self, sources, lengths, targets):
        """The same and targets (B, T), padded: START, characters, END -> logits (R, V) of every
        character after a START, word by word, and the attention weights (R, S)."""
        memory, state = self.encode(sources, lengths)
        words = torch.arange(len(sources), device=sources.device)
        steps = targets[:, 1:] != PAD
        logits, _, weights = self.decoder(targets[:, :-1], state, memory, steps, words)
        return logits, weights

    def next_log_probs(self, last, state, memory, words):
        """One step of rows that spell `words` (R,), numbers into the memory: last characters (R,)
        -> log-probabilities (R, V) of the next and the new state."""
        every = torch.ones_like(last, dtype=torch.bool).unsqueeze(1)  # (R, 1)
        logits, state, _ = self.decoder(last.unsqueeze(1), state, memory, every, words)
        logits[:, :END] = -torch.inf
        return logits.log_softmax(1), state


class Ensemble(nn.Module):
    """Models with the same symbols that spell together: each next character by the mean of their
    probabilities (Sutskever et al. 2014, section 3.6)."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def encode(self, sources, lengths):
        """As Seq2Seq.encode: a tuple of memories, and the states one after the other."""
        memories, states = zip(*(model.encode(sources, lengths) for model in self.models))
        self.parts = list(map(len, states))  # of the state, each model's
        return memories, sum(states, ())

    def next_log_probs(self, last, state, memory, words):
        """As Seq2Seq.next_log_probs."""
        found, rest = [], iter(state)
        for model, own, count in zip(self.models, memory, self.parts):
            part = tuple(itertools.islice(rest, count))
            found.append(model.next_log_probs(last, part, own, words))
        log_probs, states = zip(*found)
        return torch.stack(log_probs).logsumexp(0) - math.log(len(found)), sum(states, ())


def build_model(options, source, target):
    """The model that the options (a dictionary) describe, for the two vocabularies."""
    options = LATER_OPTIONS | options
    names = ("hidden_size", "dropout", "use_attn", "layers", "input_feeding")
    model = Seq2Seq(len(source), len(target), **{name: options[name] for name in names})
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            part.embedding.weight.mul_(options["embedding_scale"])
    return model


# ----------------------------------------------------------------------------------------------
# decoding

ROWS = 1024  # spelled at once: few enough that words of like length stay among themselves
MAX_LEN = 50  # characters


@torch.inference_mode()
def generate(model, sources, lengths, choose, copies=1, max_len=MAX_LEN):
    """Spell every word `copies` times, choosing each character by choose(log_probs (R, V)) -> (R,).

    Returns characters (N, copies, max_len), END and then PAD behind each spelling, and the
    spellings' log-probabilities (N, copies). Finished rows are dropped.
    """
    memory, state = model.encode(sources, lengths)
    words = torch.arange(len(sources), device=sources.device).repeat_interleave(copies)
    state = tuple(part[:, words] for part in state)
    characters = torch.full((len(words), max_len), PAD, device=sources.device)
    scores = torch.zeros(len(words), device=sources.device)
    rows = torch.arange(len(words), device=sources.device)  # the unfinished ones
    last = torch.full_like(rows, START)
    for position in range(max_len):
        log_probs, state = model.next_log_probs(last, state, memory, words[rows])
        last = choose(log_probs)
        characters[rows, position] = last
        scores[rows] += log_probs.gather(1, last.unsqueeze(1))[:, 0]
        going = last != END
        rows, last, state = rows[going], last[going], tuple(part[:, going] for part in state)
        if len(rows) == 0:
            break
    return characters.view(-1, copies, max_len), scores.view(-1, copies)


def argmax(log_probs):
    """The most probable character of each row."""
    return log_probs.argmax(1)


def nucleus(log_probs, p):
    """Log-probabilities (R, V) -> probabilities (R, V) of the nucleus: the fewest most probable
    tokens whose probabilities sum to at least p, the others 0 (Holtzman et al. 2020, section 3.1).
    """
    probs = log_probs.softmax(1)
    if p < 1:
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered  # the sum of the more probable ones
        kept = before < p
        kept[:, 0] = True  # also where p is too small for a float32
        probs = probs.scatter(1, order, ordered.where(kept, 0))
    return probs / probs.sum(1, keepdim=True)


def sampler(p, seed, device):
    """A function that samples from the nucleus, the same numbers for the same seed.

    By one uniform number a row, against its cumulated probabilities (torch.multinomial draws one
    for each token).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def choose(log_probs):
        cumulated = nucleus(log_probs, p).cumsum(1)  # (R, V)
        point = torch.rand(len(log_probs), 1, generator=generator, device=device)
        return (cumulated <= point * cumulated[:, -1:]).sum(1)  # the first that is beyond it

    return choose


@torch.inference_mode()
def beam_search(model, sources, lengths, beam_size, max_len=MAX_LEN):
    """The `beam_size` most probable spellings that a beam of this size finds, best first.

    Returns characters (N, beam_size, max_len), END and then PAD behind each spelling, and their
    log-probabilities (N, beam_size), -inf where there are fewer. A finished spelling keeps its
    place in the beam while it is among the best, but costs no more computation.
    """
    memory, state = model.encode(sources, lengths)
    device, count = sources.device, len(sources)
    characters = torch.full((count, beam_size, max_len), PAD, device=device)
    scores = torch.full((count, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0  # at first the beam holds one spelling, the empty one
    row_of = torch.full((count, beam_size), -1, device=device)  # -1: finished or not there
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
        going = (token != PAD) & (token != END) & (scores > -torch.inf)
        rows = row_of.gather(1, parent)[going]
        if len(rows) == 0:
            break
        row_of = torch.full_like(row_of, -1)
        row_of[going] = torch.arange(len(rows), device=device)
        words, last = going.nonzero()[:, 0], token[going]
        state = tuple(part[:, rows] for part in state)
    return characters, scores


class Speller(NamedTuple):
    """A model and the vocabularies of what it reads and writes. Each way of spelling `Words` gives
    for each word a list of candidates (spelling, log-probability)."""

    model: Seq2Seq | Ensemble
    source: Vocabulary
    target: Vocabulary

    def tensors(self, pairs):
        """Pairs (phonemes, spelling) as `Words`, on the model's device."""
        device = next(self.model.parameters()).device
        return to_tensors(pairs, self.source, self.target, device)

    def greedy(self, words, max_len=MAX_LEN):
        """One candidate: the most probable character, again and again."""
        return self._spell(words, 1, lambda *w: generate(self.model, *w, argmax, 1, max_len))

    def sample(self, words, p, k, seed, max_len=MAX_LEN):
        """k samples from the nucleus, in the order they were drawn."""
        choose = sampler(p, seed, words.sources.device)
        return self._spell(words, k, lambda *w: generate(self.model, *w, choose, k, max_len))

    def beam(self, words, beam_size, max_len=MAX_LEN):
        """The `beam_size` best that a beam of this size finds, best first."""
        return self._spell(
            words, beam_size, lambda *w: beam_search(self.model, *w, beam_size, max_len)
        )

    def _spell(self, words, copies, decode):
        """Words of like length go together, at most ROWS spellings at once."""
        self.model.eval()
        order = words.lengths.argsort(stable=True)
        spelled = [None] * len(order)
        for rows in order.split(max(1, ROWS // copies)):
            lengths = words.lengths[rows]
            sources = words.sources[rows.to(words.sources.device), : lengths.max()]
            for row, *found in zip(rows.tolist(), *(t.tolist() for t in decode(sources, lengths))):
                candidates = ((self.target.decode(n), score) for n, score in zip(*found))
                spelled[row] = [c for c in candidates if c[1] > -math.inf]
        return spelled


def only_spellings(candidates):
    """Candidates without their log-probabilities."""
    return [[spelling for spelling, _ in found] for found in candidates]


# ----------------------------------------------------------------------------------------------
# scores


def distances(predicted, true, split=list):
    """The Levenshtein distance of each pair of texts, counted in the symbols that `split` gives."""
    pairs = zip(predicted, true, strict=True)
    return [Levenshtein.distance(split(a), split(b)) for a, b in pairs]


def cer(predicted, true, split=list):
    """Character error rate: summed Levenshtein distances over summed lengths of the true words; of
    phonemes, where `split` gives these, the phoneme error rate."""
    return sum(distances(predicted, true, split)) / sum(len(split(word)) for word in true)


def wer(predicted, true):
    """Word error rate: the share of words not spelled exactly."""
    return wer_at_k([[word] for word in predicted], true, 1)


def wer_at_k(candidates, true, k):
    """The share of words that none of their first k candidates spells exactly."""
    wrong = sum(word not in found[:k] for found, word in zip(candidates, true, strict=True))
    return wrong / len(true)


def score_candidates(candidates, true, k=1, split=list):
    """CER and WER of the first candidates, and WER@k; word by word the first one's Levenshtein
    distance, and the rank, from 1, of the first right candidate, 0 where there is none."""
    first = [found[0] for found in candidates]
    scores = {"cer": cer(first, true, split), "wer": wer(first, true)}
    scores[f"wer@{k}"] = wer_at_k(candidates, true, k)
    scores["distances"] = distances(first, true, split)
    ranks = (found.index(word) + 1 if word in found else 0 for found, word in zip(candidates, true))
    return scores | {"ranks": list(ranks)}


# ----------------------------------------------------------------------------------------------
# training


def make_step(model, optimizer, totals, smoothing=0.0, clip=None):
    """A function that trains on one batch and adds (summed loss, characters, 1 if the loss is
    finite) to `totals`, on the device: reading a number back would make it wait.

    smoothing: the share of a label that goes to all letters alike (Szegedy et al. 2016, section 7);
    clip: the greatest norm of the gradient (Pascanu et al. 2013, section 3.2).
    """

    def step(sources, lengths, targets):
        logits, _ = model(sources, lengths, targets)  # (R, V)
        true = targets[:, 1:]
        first = END if smoothing else 0  # the symbols before are never written
        true = true[true != PAD] - first
        loss = F.cross_entropy(logits[:, first:], true, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        loss = loss.detach()
        count = loss.new_tensor(len(logits))
        totals.add_(torch.stack((loss * count, count, loss.isfinite())))

    return step


def train_epoch(step, totals, words, batch_size):
    """One pass over `words` in random order. Returns its mean loss a character (nats). Raises
    utils.Diverged.

    Batches mix words of all lengths: batches of one length each need no packing, but learn worse.
    """
    totals.zero_()
    batches = torch.randperm(len(words.lengths)).split(batch_size)
    for batch, rows in enumerate(tqdm(batches, unit="batch", leave=False, disable=None), 1):
        lengths, target_end = words.lengths[rows], words.target_lengths[rows].max()
        rows = rows.to(words.sources.device)
        step(words.sources[rows, : lengths.max()], lengths, words.targets[rows, :target_end])
        utils.check_totals(totals, batch, len(batches))
    loss, count, _ = totals.tolist()
    return loss / count


def fit(run, speller, optimizer, words, options):
    """Train epoch by epoch, going on after the last finished one; a checkpoint after each, with
    the weights of the lowest validation CER beside the last ones.

    Returns history {column: [a value an epoch]}, seconds [a value an epoch], and the batch of the
    next epoch in which the loss was no finite number, or None; the checkpoint of the epoch before
    stays.
    """
    model = speller.model
    saved = utils.continue_run(run, model, optimizer, options.restart)
    history, seconds, best = saved["history"], saved["seconds"], saved.get("best")
    if seconds:
        print(f"Going on after epoch {len(seconds)}")
    rate = rate_name(run.config["options"])
    symbols = {"source": speller.source.symbols, "target": speller.target.symbols}
    totals = torch.zeros(3, device=words["train"].sources.device)
    step = make_step(model, optimizer, totals, options.label_smoothing, options.clip)
    batches = math.ceil(len(words["train"].lengths) / options.batch_size)
    if options.schedule == "one_cycle":
        begun, steps = len(seconds) * batches, options.n_epochs * batches
        step = utils.one_cycle(step, optimizer, options.lr, begun, steps)
    for epoch in range(len(seconds) + 1, options.n_epochs + 1):
        started = time.perf_counter()
        utils.seed_everything(options.seed, epoch)
        model.train()
        try:
            loss = train_epoch(step, totals, words["train"], options.batch_size)
        except utils.Diverged as diverged:
            return history, seconds, diverged.batch
        if not all(weights.isfinite().all() for weights in model.parameters()):
            return history, seconds, batches  # the last step ruined them
        spelled = only_spellings(speller.greedy(words["val"]))
        valid = score_candidates(spelled, words["val"].spellings, 1, speller.target.split)
        row = {"train_loss": loss, "val_cer": valid["cer"], "val_wer": valid["wer"]}
        if best is None or row["val_cer"] < min(history["val_cer"]):
            best = {name: weights.clone() for name, weights in model.state_dict().items()}
        for column, value in row.items():
            history.setdefault(column, []).append(value)
        seconds.append(time.perf_counter() - started)
        scores = f"Training loss: {loss:.4f}  Validation {rate}: {row['val_cer']:.4f}"
        scores += f"  Validation WER: {row['val_wer']:.4f}  ({seconds[-1]:.1f} s)"
        print(f"Epoch {epoch:2}/{options.n_epochs}  {scores}", flush=True)
        utils.save_run(run, model, optimizer, history, seconds, best=best, symbols=symbols)
    return history, seconds, None


def train(run, data, device, options):
    """Train one model and write its record, as yet without test scores."""
    source, target = make_vocabularies(options.direction, *zip(*data.splits["train"]))
    utils.seed_everything(options.seed)
    model = build_model(run.config["options"], source, target).to(device)
    speller = Speller(model, source, target)
    words = {split: speller.tensors(data.splits[split]) for split in ("train", "val")}
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=fused)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"Run {run.name}\nTrainable parameters: {parameters:,}", flush=True)
    history, seconds, stopped = fit(run, speller, optimizer, words, options)
    record = {
        "command": command(run.config["options"]),
        "config": run.config,
        "parameters": parameters,
        "history": history,
        "measured": utils.measured(device, seconds),
    }
    if stopped:
        utils.stop_diverged(run, record, len(seconds) + 1, stopped)
    record["best_epoch"] = history["val_cer"].index(min(history["val_cer"])) + 1
    utils.save_record(run.record, record)
    draw_validation(run.figures / "validation-cer.png", record)


def summary(record):
    """What a record says, in one line."""
    if "diverged_in_epoch" in record:
        return f"diverged in epoch {record['diverged_in_epoch']}"
    if "final" not in record:
        return "trained, not tested"
    greedy, nucleus = record["final"]["greedy"], record["final"]["nucleus"]
    k = nucleus["k"]
    at_k = f"nucleus Test WER@{k}: {nucleus[f'wer@{k}']:.4f}"
    rate = rate_name(record["config"]["options"])
    return f"Test {rate}: {greedy['cer']:.4f}, Test WER: {greedy['wer']:.4f}, {at_k}"


def data_name(folder):
    """What the words in a folder are called: those of a folder in data/ bear its name."""
    place = Path(os.path.abspath(folder))
    inside = place.exists() and DATA_DIR.exists() and place.parent.samefile(DATA_DIR)
    return place.name if inside and place.name != "sample" else "pronunciations"


def load_data(options):
    """The words in --data_dir, or in its default place, or else the built-in sample."""
    folder = options.data_dir or DATA_DIR
    if options.data_dir or (folder / "train.tsv").exists():
        splits = utils.load_pronunciations(folder).splits
        return utils.Pronunciations(splits, data_name(folder))
    print(
        "No train.tsv found: training on the built-in SAMPLE, words of the CMU dictionary.\n"
        "  To get Wiktionary's: python -m data.prepare_pronunciations --language eng_latn_us_broad"
    )
    from data.sample import choose_pronunciations

    return choose_pronunciations()


def audit(data):
    """Lines that say how many words there are, which stand on two sides, which symbols are new."""
    names = {"train": "training", "val": "validation", "test": "test"}
    sizes = [f"{len(data.splits[split]):,} {name}" for split, name in names.items()]
    known = {word for _, word in data.splits["train"]}
    both = {split: sum(word in known for _, word in data.splits[split]) for split in names}
    yield f"Words: {', '.join(sizes)}"
    yield f"Spellings seen in training: {both['val']} of validation, {both['test']} of test"
    held_out = data.splits["val"] + data.splits["test"]
    new = []
    for side, kind in enumerate(("phonemes", "characters")):
        known = {symbol for pair in data.splits["train"] for symbol in pair[side]}
        found = sorted({symbol for pair in held_out for symbol in pair[side]} - known)
        new.append(f"{len(found)} {kind}" + (f" ({' '.join(found)})" if found else ""))
    yield f"Symbols not seen in training, read as unknown: {', '.join(new)}"


def is_turned(options):
    """Whether the options (a dictionary) say that words are pronounced, not spelled."""
    return options.get("direction") == "g2p"


def rate_name(options):
    """What the error rate of the symbols is called."""
    return "PER" if is_turned(options) else "CER"


def make_run(options, data):
    """The utils.Run of these options on these data."""
    config = utils.run_config(QUESTION, RECIPE, run_options(options), data)
    turned = "g2p-" if options.direction == "g2p" else ""
    what = f"q3-{turned}{'attn' if options.use_attn else 'plain'}-lr{options.lr:g}"
    seeds = "ensemble" if options.ensemble else f"seed{options.seed}"
    title = f"{what}-{seeds}-{data.name}"
    return utils.Run(title, config, options.output_dir, checkpoint_file(options))


def members(options):
    """The options of each run that an ensemble combines, or of each of several runs."""
    single = argparse.Namespace(**vars(options) | {"ensemble": False})
    return utils.each(single, "lr", "seed")


def checkpoint_file(options):
    """The file that --checkpoint_name means: a path, or a name in checkpoints/; or None."""
    name = options.checkpoint_name
    in_folder = name is not None and name.parent == Path()
    return options.output_dir / "checkpoints" / name if in_folder else name


# ----------------------------------------------------------------------------------------------
# testing

MOST = 10  # candidates of the WER@k curves
EXAMPLES = 10  # words that are printed with several spellings
SHOWN = 4  # words of the attention figure


def load_speller(path, device):
    """The Speller of a checkpoint's lowest validation CER, and the checkpoint's contents. Raises
    UserError if it is not of question 3."""
    saved = utils.load_checkpoint(path, device)
    with utils.refusing_misfits(f"{path}: not a model of question 3"):
        options, symbols = LATER_OPTIONS | saved["config"]["options"], saved["symbols"]
        spaced = options["direction"] == "p2g"
        source = Vocabulary(symbols["source"], spaced)
        target = Vocabulary(symbols["target"], not spaced)
        utils.check_command(parse_options, command(saved["config"]["options"]))
        model = build_model(options, source, target).to(device)
        model.load_state_dict(saved["best"])
        min(saved["history"]["val_cer"])
        "".join(source.symbols + target.symbols)
    return Speller(model.eval(), source, target), saved


def sampling_seed(options):
    """The seed of nucleus sampling: the run's, or an ensemble's first."""
    return options.seed[0] if options.ensemble else options.seed


def is_whole(saved, run):
    """Whether a checkpoint's contents are those of the run, trained to its end."""
    done = len(saved["seconds"])
    return saved["config"] == run.config and done == run.config["options"]["n_epochs"]


def whole_record(run):
    """The record of a run whose checkpoint is there and whole, be it tested or not, or None."""
    try:
        saved = utils.load_checkpoint(run.checkpoint, mmap=True)
    except UserError:
        return None
    return utils.read_or_set_aside(run.record) if is_whole(saved, run) else None


def load_ensemble(options, data, device):
    """The Speller of the runs that --ensemble combines, trained on these data."""
    spellers = []
    for run in (make_run(own, data) for own in members(options)):
        speller, saved = load_speller(run.checkpoint, device)
        if not is_whole(saved, run):
            raise UserError(f"{run.checkpoint}: is not trained to its end; go on with its training")
        spellers.append(speller)
    return spellers[0]._replace(model=Ensemble([speller.model for speller in spellers]).eval())


def test_ensemble(data, device, options):
    """Score the models of several seeds together on the test words; print and record it."""
    run, speller = make_run(options, data), load_ensemble(options, data, device)
    final = score(speller, facing(data, options).splits["test"], options)
    print_scores(final, options, " (built-in sample)" if data.name == "sample" else "")
    record = {
        "command": command(run.config["options"]),
        "config": run.config,
        "parameters": sum(p.numel() for p in speller.model.parameters()),
        "history": {},
        "measured": utils.measured(device, []),
        "final": final,
    }
    if keeps_its_scores(utils.read_or_set_aside(run.record), record):
        return
    utils.save_record(run.record, record)
    print(f"Record: {run.record}")


def keeps_its_scores(before, record):
    """Whether a record as it was has the scores that the report compares, and the new one has not:
    then it stays, and a line says so."""
    keeps = is_spelled_alike(before) and not is_spelled_alike(record)
    if keeps:
        print("The record keeps the scores that --report compares: of other decoding options")
    return keeps


def test(run, data, device, options):
    """Score the run's best checkpoint on the test words, print the report's lines, complete the
    record and draw the figures."""
    speller, saved = load_speller(run.checkpoint, device)
    if is_turned(saved["config"]["options"]) != is_turned(vars(options)):
        raise UserError(f"{run.checkpoint}: is of the other --direction")
    before = utils.load_record(run.record) if is_whole(saved, run) else None
    final = score(speller, data.splits["test"], options)
    final["attention"] = attention_examples(speller, data.splits["test"][:SHOWN], options.max_len)
    print_scores(final, options, " (built-in sample)" if data.name == "sample" else "")
    if before is None:
        print("The checkpoint is unfinished or of another run: no record and no figures written")
        return
    record = before | {"final": final}
    if keeps_its_scores(before, record):
        return
    draw_wer_at_k(run.figures / "wer-at-k.png", record)
    if final["attention"]:
        utils.save_figure(run.figures / "attention.png", plot_attention(record))
    utils.save_record(run.record, record)  # behind them: a run with a whole record is complete
    utils.finish_run(run)
    print(f"Figures: {run.figures}\nRecord: {run.record}\nCheckpoint: {run.checkpoint}")


def score(speller, pairs, options):
    """All test scores: greedy; nucleus sampling; beam search. With them, for the report, each
    word's length, distances and the rank of its first right candidate, and the usual mistakes."""
    words = speller.tensors(pairs)
    true, max_len, size = words.spellings, options.max_len, options.beam_size or 5
    seed, split = sampling_seed(options), speller.target.split
    greedy = only_spellings(speller.greedy(words, max_len))
    most = max(options.k, MOST)
    samples = only_spellings(speller.sample(words, options.topp, most, seed, max_len))
    found = {n: speller.beam(words, n, max_len) for n in {size, MOST}}
    beams = {n: only_spellings(candidates) for n, candidates in found.items()}
    at = min(size, options.k)
    best = [[[w, round(score, 3)] for w, score in own[:at]] for own in found[size][:EXAMPLES]]
    return {
        "lengths": [len(split(word)) for word in true],
        "max_len": max_len,
        "greedy": score_candidates(greedy, true, 1, split),
        "nucleus": {"p": options.topp, "k": options.k}
        | score_candidates(samples, true, options.k, split),
        "beam": {"size": size, "examples": list(map(list, zip(true, best)))}
        | score_candidates(beams[size], true, at, split),
        "curves": {
            name: [wer_at_k(candidates, true, k) for k in range(1, MOST + 1)]
            for name, candidates in (("nucleus", samples), ("beam", beams[MOST]))
        },
        "mistakes": mistakes([split(found[0]) for found in greedy], list(map(split, true))),
        "examples": [
            [word, list(dict.fromkeys(drawn[: options.k]))]
            for word, drawn in zip(true[:EXAMPLES], samples)
        ],
    }


def mistakes(predicted, true, most=20):
    """The most frequent single edits [true symbol, written symbol, count] in words, sequences of
    symbols, '' for one that is missing or too many, and how many edits of each kind there are."""
    kinds, edits = Counter(), Counter()
    for written, word in zip(predicted, true, strict=True):
        for kind, i, j in Levenshtein.editops(word, written):
            kinds[kind] += 1
            edits["" if kind == "insert" else word[i], "" if kind == "delete" else written[j]] += 1
    common = sorted(edits.items(), key=lambda item: (-item[1], item[0]))[:most]
    return {"kinds": dict(sorted(kinds.items())), "common": [[a, b, n] for (a, b), n in common]}


def print_scores(final, options, mark=""):
    """Print the scores in the report's words."""

    rate = rate_name(vars(options))

    def line(scores):
        print(f"Test {rate}: {scores['cer']:.4f}, Test WER: {scores['wer']:.4f}{mark}")

    line(final["greedy"])
    if options.nucleus:
        nucleus, k = final["nucleus"], options.k
        print(f"Nucleus sampling, p = {nucleus['p']:g}, the first of {k} samples:")
        line(nucleus)
        print(f"Printing first {EXAMPLES} examples with multiple predictions:")
        for word, spellings in final["examples"]:
            print(f"({word!r}, {{{', '.join(map(repr, spellings))}}})")
        print(f"Test WER@{k}: {nucleus[f'wer@{k}']:.4f}{mark}")
    if options.beam_size:
        beam, k = final["beam"], min(options.k, options.beam_size)
        print(f"Beam search, size {beam['size']}, the best:")
        line(beam)
        print(f"Printing first {EXAMPLES} examples with their {k} best and log-probabilities:")
        for word, found in beam["examples"]:
            print(f"({word!r}, {{{', '.join(f'{s!r}: {score:.3f}' for s, score in found)}}})")
        print(f"Test WER@{k}: {beam[f'wer@{k}']:.4f}{mark}")


@torch.inference_mode()
def attention_examples(speller, pairs, max_len=MAX_LEN):
    """For each pair the greedy spelling and where the model looked: a list of {phonemes, letters,
    weights (letters x phonemes)}; empty without attention."""
    model, examples = speller.model, []
    for sound, _ in pairs if model.decoder.attention else []:
        [[(spelling, _)]] = speller.greedy(speller.tensors([(sound, "")]), max_len)
        word = speller.tensors([(sound, spelling)])
        weights = model(word.sources, word.lengths, word.targets)[1]  # (letters, phonemes)
        rows = [[round(weight, 4) for weight in row] for row in weights.tolist()]
        letters = [*speller.target.split(spelling), "end"]
        examples.append({"phonemes": list(sound), "letters": letters, "weights": rows})
    return examples


# ----------------------------------------------------------------------------------------------
# figures


def run_title(config):
    """What a figure says above itself about the run."""
    sample = "\n(built-in sample)" if config["data"]["name"] == "sample" else ""
    attention = "Bahdanau attention" if config["options"]["use_attn"] else "no attention"
    what = "pronouncing" if is_turned(config["options"]) else "spelling"
    return f"{what}, {attention}{sample}"


def draw_validation(path, record):
    """Draw the validation CER of every epoch."""
    title, rate = run_title(record["config"]), rate_name(record["config"]["options"])
    utils.plot_curve(path, title, f"Validation {rate}", record["history"]["val_cer"])


def draw_wer_at_k(path, record):
    """Draw WER@k against k, of nucleus sampling and of beam search."""
    fig = draw_candidates([record])
    fig.axes[0].set_title(run_title(record["config"]))
    utils.save_figure(path, fig)


def plot_attention(record):
    """Where the model looks (phonemes across) for each letter it writes (letters down); above it
    what it writes and, where that is another, the right word."""
    examples, options = record["final"]["attention"], record["config"]["options"]
    fig, grid = utils.figure(5.0, 5.2, 2, math.ceil(len(examples) / 2), squeeze=False)
    words = (word for word, _ in record["final"]["examples"])
    for axes, example, word in zip(grid.flat, examples, words):
        axes.grid(False)
        image = axes.imshow(example["weights"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        plain = {"parse_math": False}  # a dollar sign is a symbol like any other
        axes.set_xticks(range(len(example["phonemes"])), example["phonemes"], **plain)
        axes.set_yticks(range(len(example["letters"])), example["letters"], **plain)
        written = (" " if is_turned(options) else "").join(example["letters"][:-1])
        axes.set_title(written if written == word else f"{written} ({word})", **plain)
    sides = ["Phonemes", "Letters"]
    if is_turned(options):
        sides.reverse()
    fig.supxlabel(f"{sides[0]} read", fontsize=9)
    fig.supylabel(f"{sides[1]} written", fontsize=9)
    fig.suptitle(run_title(record["config"]), fontsize=9)
    fig.colorbar(image, ax=grid, label="Attention weight", shrink=0.7)
    return fig


# ----------------------------------------------------------------------------------------------
# report

PLAIN, ATTENTION = "no attention", "attention"
BEST, TOGETHER = "best recipe", "best recipe, five models together"
ALL, ALL_TOGETHER = "all of WikiPron", "all of WikiPron, three models together"
STEPS = {  # from the report's model with attention to the best recipe, each with those before
    "+ one cycle, 30 epochs": "--schedule one_cycle --n_epochs 30",
    "+ smoothed labels": "--label_smoothing 0.1",
    "+ small embeddings": "--embedding_scale 0.1",
    "+ input feeding": "--input_feeding",
    "+ 256 wide": "--hidden_size 256",
    "+ two layers": "--layers 2",
}
LANGUAGES = {"UK English": "uk", "Portuguese": "portuguese"}
EQUAL, PRONOUNCED = "attention, trained better", "pronounced (g2p)"
SMALL = "--use_attn --embedding_scale 0.1 --input_feeding --dropout 0.2 --schedule one_cycle"
LONG = "--recipe best --dropout 0.2 --n_epochs 20"
SYSTEMS = (
    utils.System(PLAIN, ""),
    utils.System(ATTENTION, "--use_attn"),
    utils.System(EQUAL, SMALL, 3, "beyond"),
    *(
        utils.System(name, " ".join(["--use_attn", *list(STEPS.values())[: i + 1]]), 3, "beyond")
        for i, name in enumerate(STEPS)
    ),
    utils.System(BEST, "--recipe best", 5, "beyond"),
    utils.System(TOGETHER, "--recipe best --ensemble --seed 42 1 2 3 4", group="beyond"),
    utils.System(ALL, LONG, 3, "beyond", "us-all"),
    utils.System(ALL_TOGETHER, f"{LONG} --ensemble --seed 42 1 2", 3, "beyond", "us-all"),
    utils.System(PRONOUNCED, "--recipe best --direction g2p", 2, "beyond"),
    *(
        utils.System(name, "--recipe best", 2, "beyond", folder)
        for name, folder in LANGUAGES.items()
    ),
)
LOOKS = {  # of a system's lines
    PLAIN: {"color": utils.BLUE, "linestyle": "--"},
    ATTENTION: {"color": utils.VERMILION},
    EQUAL: {"color": utils.PURPLE},
    BEST: {"color": utils.BLUE},
    TOGETHER: {"color": utils.SKY},
    ALL: {"color": utils.GREEN},
    ALL_TOGETHER: {"color": utils.ORANGE},
}
LADDER = ATTENTION, EQUAL, BEST, TOGETHER, ALL, ALL_TOGETHER
MEMBERS = {TOGETHER: BEST, ALL_TOGETHER: ALL}
# The original report's rows: (system, way of spelling) -> test CER, WER, WER@3.
REPORTED = {
    (PLAIN, "greedy"): (0.4354, 0.9040, None),
    (ATTENTION, "greedy"): (0.2677, 0.8090, None),
    (ATTENTION, "nucleus"): (0.3139, 0.8550, 0.7550),
    (ATTENTION, "beam"): (None, None, None),
}
REPORTED_EXAMPLES = {
    "remainder": "remainder, remender",
    "misperception": "mesperception, misperception",
    "crudités": "cruditai, croudite, cruditay",
    "slogger": "slogger, slogar",
    "Jingchuan": "gingoen, ginglwan, jinguan",
    "scare": "scaur, skeer, skear",
    "glossal": "glossal, gloسل, glosal",
    "touchedness": "tutudenis, tutuddice, tutuddecis",
    "alkaloses": "alcoloses, alcoholoses, alcolosies",
    "companions": "companuns, companions",
}


def trial_scores(record):
    """What a trial is judged by: the lowest error rate, greedy, of validation."""
    epoch, history = record["best_epoch"] - 1, record["history"]
    return {
        f"validation {rate_name(record['config']['options'])}": f"{history['val_cer'][epoch]:.4f}",
        "WER": f"{history['val_wer'][epoch]:.4f}",
        "in epoch": epoch + 1,
        "minutes": f"{utils.minutes(record):.1f}",
    }


def report_parts(records):
    """The fields of this question's part of the report: figures, text, or None where no run is.

    records: {label: list of run records}, empty where a system was not trained.
    """
    scored = {label: spelled_alike(runs) for label, runs in records.items()}
    first = scored[ATTENTION][:1]
    return {
        "cer": draw_cer(scored, [PLAIN]),
        "table plain": error_table(scored, [(PLAIN, "greedy")]),
        "cer-attention": draw_cer(scored, [PLAIN, ATTENTION]),
        "table attention": error_table(scored, [(PLAIN, "greedy"), (ATTENTION, "greedy")]),
        "attention": plot_attention(first[0]) if first else None,
        "table nucleus": error_table(scored, [key for key in REPORTED if key[0] == ATTENTION]),
        "wer-at-k": draw_candidates(scored[ATTENTION], REPORTED[ATTENTION, "nucleus"][1:]),
        "table examples": example_table(first),
        "examples right": count_right_examples(scored[ATTENTION]),
        "lengths": draw_lengths({label: scored[label] for label in (PLAIN, ATTENTION)}),
        "table kinds": kind_table({label: scored[label] for label in (PLAIN, ATTENTION)}),
        "table mistakes": mistake_table(scored[ATTENTION]),
        "ladder": draw_ladder(scored),
        "table ladder": results_table(scored, LADDER),
        "table steps": steps_table(scored),
        "table others": results_table(scored, (PRONOUNCED, *LANGUAGES)),
        "machines": utils.machines(r for runs in records.values() for r in runs),
    }


def spelled_alike(runs):
    """Those of the records that the report compares; a line names each tested in another way."""
    for run in runs:
        if "final" in run and not is_spelled_alike(run):
            line = "left out, tested by other decoding options; give it 'test' to score it again"
            print(f"{run['command']}: {line}", file=sys.stderr)
    return list(filter(is_spelled_alike, runs))


def is_spelled_alike(record):
    """Whether a run was tested, and by the decoding options that the report's tables are about."""
    final = record.get("final")
    return bool(final) and (
        (final["nucleus"]["p"], final["nucleus"]["k"]) == (0.8, 3)
        and final["beam"]["size"] == 5
        and final.get("max_len", MAX_LEN) == MAX_LEN  # the first records do not say it
    )


def error(final, way, measure, rows=slice(None)):
    """A test score ('cer', 'wer' or 'wer@3') over some words' rows of a way of spelling."""
    if measure == "cer":
        distances, lengths = np.array(final[way]["distances"]), np.array(final["lengths"])
        return distances[rows].sum() / lengths[rows].sum()
    ranks = np.array(final[way]["ranks"])[rows]
    return 1 - ((ranks >= 1) & (ranks <= (1 if measure == "wer" else 3))).mean()


def draw_errors(way, measure):
    """A function (run, random) -> the score of as many words, drawn with replacement."""

    def draw(run, random):
        count = len(run["final"]["lengths"])
        return error(run["final"], way, measure, random.integers(count, size=count))

    return draw


def error_table(scored, keys):
    """The report's error rates beside ours, and whether they could be those of one of our runs."""
    rows = []
    for label, way in keys:
        runs = scored[label]
        for measure, reported in zip(("cer", "wer", "wer@3"), REPORTED[label, way]):
            if not runs or (measure == "wer@3" and way == "greedy"):
                continue
            low, high = utils.interval(draw_errors(way, measure), runs)
            rows.append(
                [
                    f"{label}, {way_name(runs[0], way)}",
                    measure.upper(),
                    "–" if reported is None else f"{reported:.4f}",
                    utils.mean_sd([error(run["final"], way, measure) for run in runs]),
                    len(runs),
                    f"{low:.3f} to {high:.3f}",
                    "–" if reported is None else ("yes" if low <= reported <= high else "no"),
                ]
            )
    head = "system", "measure", "report", "here", "runs", "95 % of single runs", "report inside?"
    return utils.markdown_table(head, rows, text=2)


def way_name(run, way):
    """How a record's words were spelled."""
    final = run["final"]
    return {
        "greedy": "greedy",
        "nucleus": f"nucleus, p = {final['nucleus']['p']:g}",
        "beam": f"beam of {final['beam']['size']}",
    }[way]


def example_table(runs):
    """The report's ten words: its spellings and ours, the right ones in bold."""

    def bold(word, spellings):
        return ", ".join(f"**{s}**" if s == word else s for s in spellings)

    rows = [
        [word, bold(word, REPORTED_EXAMPLES.get(word, "–").split(", ")), bold(word, spellings)]
        for run in runs
        for word, spellings in run["final"]["examples"]
    ]
    return utils.markdown_table(["word", "report", "here"], rows, text=3)


def count_right_examples(runs):
    """A sentence on how many of the ten words are among the samples, here and in the report."""
    if not runs:
        return None
    ours = [sum(word in found for word, found in run["final"]["examples"]) for run in runs]
    reported = sum(word in text.split(", ") for word, text in REPORTED_EXAMPLES.items())
    seeds = ", ".join(str(run["config"]["options"]["seed"]) for run in runs)
    return (
        f"The report's samples spell {reported} of the ten words rightly, ours "
        f"{', '.join(map(str, ours))} (seeds {seeds})."
    )


def kind_table(scored):
    """Edits of each kind, greedy, in the test words, mean over runs."""
    kinds = {"replace": "another letter", "delete": "a letter missing", "insert": "one too many"}
    rows = []
    for label, runs in scored.items():
        if runs:
            counts = [run["final"]["mistakes"]["kinds"] for run in runs]
            means = (np.mean([count.get(kind, 0) for count in counts]) for kind in kinds)
            rows.append([label, *(f"{mean:.0f}" for mean in means)])
    return utils.markdown_table(["system", *kinds.values()], rows)


def mistake_table(runs, most=12):
    """The most frequent single edits, greedy, mean over runs; one that is not among a run's twenty
    counts as none there."""
    counts = Counter()
    for run in runs:
        for true, written, count in run["final"]["mistakes"]["common"]:
            counts[true, written] += count / len(runs)
    rows = [
        [a or "(nothing)", b or "(nothing)", f"{n:.0f}"] for (a, b), n in counts.most_common(most)
    ]
    return utils.markdown_table(["should be", "written", "times"], rows, text=2)


def draw_cer(records, labels):
    """Validation CER of every epoch, or None without runs."""
    labels = [label for label in labels if records[label]]
    if not labels:
        return None
    fig, axes = utils.figure()
    for label in labels:
        runs = [record["history"]["val_cer"] for record in records[label]]
        utils.plot_bands(axes, runs, utils.with_seeds(label, runs), **LOOKS[label])
    axes.set(xlabel="Epoch", ylabel="Validation CER", ylim=(0, None))
    axes.legend()
    return fig


def draw_candidates(runs, reported=()):
    """WER@k against k, of nucleus sampling and of beam search, with our greedy spelling and the
    report's WER and WER@3 if they are given, or None without runs."""
    if not runs:
        return None
    fig, axes = utils.figure()
    names = {"nucleus": way_name(runs[0], "nucleus"), "beam": f"beam of {MOST}"}
    looks = {"color": utils.VERMILION}, {"color": utils.BLUE, "linestyle": "--"}
    for (way, name), look in zip(names.items(), looks):
        curves = [run["final"]["curves"][way] for run in runs]
        utils.plot_bands(axes, curves, utils.with_seeds(name, runs), ".", **look)
    greedy = np.mean([run["final"]["greedy"]["wer"] for run in runs])
    axes.axhline(greedy, color="0.5", linestyle=":", label="greedy")
    if reported:
        axes.plot([1, 3], reported, "x", color="black", label="nucleus, the report")
    axes.set_xticks(range(1, MOST + 1))
    axes.set(xlabel="k candidates a word", ylabel="Test WER@k")
    utils.legend_above(fig, axes)
    return fig


def draw_lengths(scored, shortest=3, longest=14):
    """CER and WER, greedy, of test words by their length, those shorter or longer with the shortest
    and longest, and how many words there are; or None without runs."""
    labels = [label for label in scored if scored[label]]
    if not labels:
        return None
    fig, panels = utils.figure(5.0, 5.6, 3, 1, sharex=True, height_ratios=(2, 2, 1))
    steps = range(shortest, longest + 1)
    for label in labels:
        curves = {"cer": [], "wer": []}
        for run in scored[label]:
            clipped = np.clip(run["final"]["lengths"], shortest, longest)
            groups = [np.flatnonzero(clipped == n) for n in steps]
            for measure, runs in curves.items():
                finals = (
                    error(run["final"], "greedy", measure, g) if len(g) else np.nan for g in groups
                )
                runs.append(list(finals))
        for axes, (measure, runs) in zip(panels, curves.items()):
            look = LOOKS[label] | {"first": shortest}
            utils.plot_bands(axes, runs, utils.with_seeds(label, runs), ".", **look)
            axes.set(ylabel=f"Test {measure.upper()}")
    panels[2].bar(steps, list(map(len, groups)), color="0.7")
    panels[2].set(ylabel="Test words")
    panels[2].set(xlabel=f"Letters a word ({shortest}: or fewer, {longest}: or more)")
    utils.legend_above(fig, panels[0])
    return fig


def minutes(scored, label):
    """How long the runs of a system took, each; an ensemble's is the time of its members."""
    if label not in MEMBERS:
        return list(map(utils.minutes, scored[label]))
    took = {run["config"]["options"]["seed"]: utils.minutes(run) for run in scored[MEMBERS[label]]}
    seeds = (run["config"]["options"]["seed"] for run in scored[label])
    return [sum(took.get(seed, math.nan) for seed in own) for own in seeds]


RESULTS = ("greedy", "cer"), ("greedy", "wer"), ("beam", "cer"), ("beam", "wer"), ("beam", "wer@3")
RESULT_COLUMNS = tuple(f"{way}, {measure.upper()}" for way, measure in RESULTS)


def results(runs):
    """What RESULT_COLUMNS say of a system's runs."""
    return [
        utils.mean_sd([error(run["final"], way, measure) for run in runs])
        for way, measure in RESULTS
    ]


def results_table(scored, labels):
    """Test error rates of these systems; of pronounced words CER is the phonemes' rate."""
    rows = []
    for label in labels:
        if runs := scored[label]:
            size, took = f"{runs[0]['parameters']:,}", np.mean(minutes(scored, label))
            took = "–" if math.isnan(took) else f"{took:.1f}"  # members may be missing
            rows.append([label, size, took, *results(runs), len(runs)])
    head = "system", "parameters", "minutes", *RESULT_COLUMNS, "runs"
    return utils.markdown_table(head, rows)


def steps_table(scored):
    """What each step from the report's model to the best recipe gains, by validation CER."""
    rows, before = [], None
    for label in (ATTENTION, *STEPS, BEST):
        valid = [min(run["history"]["val_cer"]) for run in scored[label]]
        if runs := scored[label]:
            change = "" if before is None else utils.gain(valid, before)
            took = f"{np.mean(minutes(scored, label)):.1f}"
            row = label, took, utils.mean_sd(valid), change, *results(runs), len(runs)
            rows.append(row)
        before = valid
    head = "system", "minutes", "validation CER", "change", *RESULT_COLUMNS, "runs"
    return utils.markdown_table(head, rows)


def draw_ladder(scored):
    """Test CER and WER of the beam's first spelling against training time, a mark a run, and the
    original report's; None without runs beyond the report's."""
    shown = [label for label in LADDER if scored[label]]
    if not set(shown) - {ATTENTION}:
        return None
    fig, panels = utils.figure(5.0, 6.0, 2, 1, sharex=True)
    for axes, measure, reported in zip(panels, ("cer", "wer"), REPORTED[ATTENTION, "greedy"]):
        points = {
            label: (
                minutes(scored, label),
                [error(run["final"], "beam", measure) for run in scored[label]],
            )
            for label in shown
        }
        utils.plot_against_time(axes, points, LOOKS, MEMBERS)
        axes.axhline(reported, color="0.4", linestyle="--", label="the report, greedy")
        axes.set(ylabel=f"Test {measure.upper()}, beam of 5", xscale="log")
    ticks = panels[1].xaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter("")
    panels[1].set(xlabel="Training time (minutes)")
    utils.legend_above(fig, panels[0])
    return fig


# ----------------------------------------------------------------------------------------------
# spelling


def segment(text, phonemes):
    """IPA text as phonemes: at its spaces, or, if it has none, the longest known ones in turn."""
    text = unicodedata.normalize("NFC", text).strip()
    if len(text.split()) != 1:
        return text.split()
    longest = max(map(len, phonemes.symbols[len(SPECIAL) :]))
    found = []
    while text:
        sizes = range(min(longest, len(text)), 0, -1)
        size = next((n for n in sizes if text[:n] in phonemes.numbers), 1)
        found.append(text[:size])
        text = text[size:]
    return found


def choose_speller(options, device):
    """The Speller of --checkpoint_name, or else the best one of --data_dir's words, without it of
    any words, though of the usual ones where there is one; and what to say of it."""
    if options.data_dir and (options.data_dir / "train.tsv").exists():
        key, meant = "fingerprint", utils.load_pronunciations(options.data_dir).fingerprint
    else:
        key, meant = "name", data_name(options.data_dir or DATA_DIR)

    def is_of_them(saved):
        return saved["config"]["data"][key] == meant

    path = checkpoint_file(options) or utils.best_checkpoint(
        options.output_dir / "checkpoints",
        "q3",
        lambda saved: (is_of_them(saved), -min(saved["history"]["val_cer"])),
        lambda saved: (
            is_turned(saved["config"]["options"]) == is_turned(vars(options))
            and (is_of_them(saved) or not options.data_dir)
        ),
    )
    speller, saved = load_speller(path, device)
    name = utils.printable(saved["config"]["data"]["name"])
    known = {"sample": "the built-in SAMPLE", "pronunciations": "your words"}
    known = known.get(name, f"the words in data/{name}")
    cer = min(saved["history"]["val_cer"])
    rate = rate_name(saved["config"]["options"])
    return speller, f"{path} (trained on {known}, validation {rate} {cer:.4f})"


def spell(options, device):
    """Spell the IPA of the arguments, of --input, of standard input, or typed at a prompt."""
    if options.ensemble:
        with contextlib.redirect_stdout(sys.stderr):  # the answers alone go to the output
            data = load_data(options)
        speller, note = load_ensemble(options, data, device), "the ensemble"
    else:
        speller, note = choose_speller(options, device)
    asked = not (options.ipa or options.input) and sys.stdin.isatty()
    parts = iter([] if asked else [options.ipa] if options.ipa else read_lines(options.input))
    first = next(parts, [""])  # a file that cannot be read says so here, before anything else
    print(f"Model: {note}", file=sys.stderr)
    for part, lines in enumerate(itertools.chain([first], parts)):
        spell_lines(lines, speller, options, part)
    while asked:
        asked = ask()
        spell_lines([asked], speller, options)


def ask():
    """A line typed at the prompt; empty at its end."""
    try:
        return input("IPA, or letters with --direction g2p (nothing to end)> ")
    except EOFError:
        return ""


def read_lines(name, most=1000):
    """The lines of a file, or of standard input if `name` is - or None, in lists of at most `most`,
    so that a long file needs no more memory than a short one."""
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin
            if name not in ("-", None):
                file = stack.enter_context(open(name, encoding="utf-8-sig"))
            while lines := list(itertools.islice(file, most)):
                yield lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read ({utils.one_line(error)})")


def spell_lines(lines, speller, options, part=0):
    """Print IPA, TAB, spelling, TAB, log-probability: a line for each candidate, the most probable
    first. From written words, IPA comes second. part: which of several parts of a text this is;
    each samples with other numbers."""
    source = speller.source

    def read(line):
        line = unicodedata.normalize("NFC", line).strip()
        return segment(line, source) if source.spaced else source.split(line)

    if max(len(line.strip()) for line in lines) > utils.MOST_SYMBOLS:
        raise UserError(f"a word of more than {utils.MOST_SYMBOLS:,} characters")
    pairs = [(tuple(read(line)), "") for line in lines if line.strip()]
    if not pairs:
        return
    unknown = sorted({s for sound, _ in pairs for s in sound} - set(source.numbers))
    if unknown:
        kind = "phonemes" if source.spaced else "letters"
        print(f"Unknown {kind}: {' '.join(unknown)}", file=sys.stderr)
    words, max_len = speller.tensors(pairs), options.max_len
    if options.beam_size:
        found = speller.beam(words, options.beam_size, max_len)
    elif options.nucleus:
        seed = sampling_seed(options) + part
        found = speller.sample(words, options.topp, options.k, seed, max_len)
    else:
        found = speller.greedy(words, max_len)
    for (sound, _), candidates in zip(pairs, found):
        merged = dict(candidates)  # a spelling drawn twice, once
        for spelling, log_prob in sorted(merged.items(), key=lambda item: -item[1]):
            print(f"{source.join(sound)}\t{spelling}\t{log_prob:.3f}", flush=True)


# ----------------------------------------------------------------------------------------------
# main


def main(argv=None):
    """Do what the command line asks for."""
    options = parse_options(argv)
    if options.report:
        utils.write_report(sys.modules[__name__], options)
        return
    if not options.mode and len(several := members(options)) > 1:
        done = whole_record if options.ensemble else utils.finished_record
        utils.train_many(sys.modules[__name__], several, done=done)
        if not options.ensemble:
            return
    device = utils.prepare_device(options.device, options.threads)
    if options.mode == "spell":
        spell(options, device)
        return
    data = load_data(options)
    if options.ensemble:
        test_ensemble(data, device, options)
        return
    print("\n".join(audit(data)))
    run, data = make_run(options, data), facing(data, options)
    if options.mode == "test" and not run.checkpoint.exists():  # before a lock is left beside it
        raise UserError(f"{run.checkpoint}: no such checkpoint; train the model first")
    with utils.only_here(run):
        if options.mode == "test":
            test(run, data, device, options)
            return
        train(run, data, device, options)
        if options.mode != "train":
            test(run, data, device, options)


if __name__ == "__main__":
    utils.run_script(main)
