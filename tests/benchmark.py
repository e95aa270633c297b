"""How fast the project is, against textbook code and against the limits of the processor.

    python -m tests.benchmark              everything, about 25 minutes on 2 cores
    python -m tests.benchmark --quick      the same with tiny data, to see that it works

Prints the README's table and writes figures/benchmark.json and figures/benchmark.png. Contenders
take turns, so other load on the machine slows all of them, and their times are medians over turns;
whole runs are trained once. Images are random, words are the built-in sample.

textbook code | measuring | question 2 | question 3 | whole runs | tables and figure | main
"""

import functools
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import hw2_q2
import hw2_q3
import utils
from data.prepare_landscapes import write_npz
from data.sample import choose_pronunciations
from figures import report_q2

# ----------------------------------------------------------------------------------------------
# textbook code: the two models and their training as in a good student's script


class TextbookBlock(nn.Module):
    def __init__(self, in_channels, out_channels, batch_norm):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.pool(F.relu(self.norm(self.conv(x)))))


class TextbookCNN(nn.Module):
    """The two networks of question 2, with the parameter names of hw2_q2.CNN."""

    def __init__(self, batch_norm):
        super().__init__()
        channels = (3, 32), (32, 64), (64, 128)
        self.convs = nn.Sequential(*(TextbookBlock(*pair, batch_norm) for pair in channels))
        self.gap = nn.AdaptiveAvgPool2d(1) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(128 if batch_norm else 128 * 6 * 6, 1024)
        self.norm = nn.BatchNorm1d(1024) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(0.1)
        self.fc2 = nn.Linear(1024, 512)
        self.fc3 = nn.Linear(512, 6)

    def forward(self, x):
        x = self.gap(self.convs(x)).flatten(1)
        x = self.dropout(self.norm(F.relu(self.fc1(x))))
        return F.log_softmax(self.fc3(F.relu(self.fc2(x))), dim=1)

    def loss(self, images, labels):
        return F.nll_loss(self(images), labels)


class TextbookAttention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.key = nn.Linear(size, size, bias=False)
        self.query = nn.Linear(size, size)
        self.score = nn.Linear(size, 1, bias=False)
        self.combine = nn.Linear(2 * size, size)

    def forward(self, state, values, mask):
        scores = self.score(torch.tanh(self.key(values) + self.query(state))).squeeze(2)  # (B, S)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
        context = weights.unsqueeze(1) @ values  # (B, 1, H)
        return torch.tanh(self.combine(torch.cat((context, state), 2)))


class TextbookEncoder(nn.Module):
    def __init__(self, symbols, size, dropout):
        super().__init__()
        self.embedding = nn.Embedding(symbols, size, padding_idx=hw2_q3.PAD)
        self.lstm = nn.LSTM(size, size // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sources, lengths):
        x = self.dropout(self.embedding(sources))  # (B, S, H)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, (h, c) = self.lstm(packed)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True)  # (B, S, H)
        h, c = torch.cat((h[0], h[1]), 1), torch.cat((c[0], c[1]), 1)  # (B, H)
        return self.dropout(outputs), (h.unsqueeze(0), c.unsqueeze(0))


class TextbookDecoder(nn.Module):
    def __init__(self, symbols, size, dropout):
        super().__init__()
        self.embedding = nn.Embedding(symbols, size, padding_idx=hw2_q3.PAD)
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.attention = TextbookAttention(size)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(size, symbols)
        self.output.weight = self.embedding.weight

    def forward(self, characters, state, values, mask):
        logits = []
        for step in range(characters.shape[1]):
            x = self.dropout(self.embedding(characters[:, step : step + 1]))  # (B, 1, H)
            x, state = self.lstm(x, state)
            logits.append(self.output(self.dropout(self.attention(x, values, mask))))
        return torch.cat(logits, 1), state  # (B, T, V)


class TextbookSpeller(nn.Module):
    """The model of question 3 with attention, with the parameter names of hw2_q3.Seq2Seq."""

    def __init__(self, phonemes, characters, size=128, dropout=0.3):
        super().__init__()
        self.encoder = TextbookEncoder(phonemes, size, dropout)
        self.decoder = TextbookDecoder(characters, size, dropout)

    def forward(self, sources, lengths, characters):
        values, state = self.encoder(sources, lengths)
        return self.decoder(characters, state, values, sources != hw2_q3.PAD)[0]  # (B, T, V)

    def loss(self, sources, lengths, targets):
        logits = self(sources, lengths, targets[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=hw2_q3.PAD)


def textbook_epoch(model, optimizer, loader):
    """Train on all batches. Returns the mean loss."""
    losses = []
    model.train()
    for batch in loader:
        optimizer.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def textbook_spell(model, source, p=None, max_len=hw2_q3.MAX_LEN):
    """Spell one word from its phonemes (S,), greedily, or by nucleus sampling if `p` is given.
    Returns the indices of its characters."""
    model.eval()
    sources = source.unsqueeze(0)
    values, state = model.encoder(sources, torch.tensor([len(source)]))
    last, spelling = hw2_q3.START, []
    for _ in range(max_len):
        characters = torch.tensor([[last]])
        logits, state = model.decoder(characters, state, values, sources != hw2_q3.PAD)
        logits[:, :, : hw2_q3.END] = -torch.inf
        probs = logits[0, 0].softmax(0)
        if p is None:
            last = probs.argmax().item()
        else:
            probs, order = probs.sort(descending=True)
            probs[probs.cumsum(0) - probs >= p] = 0
            last = order[torch.multinomial(probs, 1)].item()
        if last == hw2_q3.END:
            break
        spelling.append(last)
    return spelling


# ----------------------------------------------------------------------------------------------
# measuring


def take_turns(contenders, turns):
    """{what: {who: function}} -> {what: {who: median seconds}}. Each function is called once to
    warm up, then `turns` times, in turn with the others."""
    seconds = {what: {who: [] for who in row} for what, row in contenders.items()}
    for _ in range(1 + turns):
        for what, row in contenders.items():
            for who, function in row.items():
                started = time.perf_counter()
                function()
                seconds[what][who].append(time.perf_counter() - started)
    return {
        what: {who: statistics.median(times[1:]) for who, times in row.items()}
        for what, row in seconds.items()
    }


def train_runs(script, lines):
    """Train runs with these options side by side, one thread each. Returns the `measured` of their
    records."""
    configs = [script.parse_args(line) for line in lines]
    utils.train_side_by_side(script, configs)
    runs = (script.make_run(args, script.load_data(args)) for args in configs)
    return [utils.load_record(run.record)["measured"] for run in runs]


def on_threads(threads, function, *args):
    """A function that computes function(*args) on this number of threads."""

    def run():
        torch.set_num_threads(threads)
        return function(*args)

    return run


# ----------------------------------------------------------------------------------------------
# question 2: a training step, against the textbook's and against the limit

SIZES = {"train": 12_635, "val": 1_404, "test": 3_000}  # numbers of photographs
EPOCHS, BATCH_SIZE = 40, 8
NETWORKS = {"plain": ("-no_batch_norm",), "batch norm + pooling": ()}
BFLOAT16 = "-precision", "bfloat16"
REPEATS = 10
SIDE = 1024  # rows and columns of a matrix product, enough to reach the highest rate
COPIED = 1024, 4608  # shape of a copied matrix, that of the plain network's fc1


def make_images(count):
    """Random uint8 images (N, 3, 48, 48) and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 6, (count,), generator=generator)


def our_steps(options, count):
    """A function that trains our network of these options for `count` steps."""
    args = hw2_q2.parse_args(options)
    utils.seed_everything(args.seed)
    model = hw2_q2.build_model(args)
    optimizer = hw2_q2.make_optimizer(model, args)
    images, labels = hw2_q2.to_device(*make_images(count * BATCH_SIZE), "cpu", args)
    data = images, labels, [BATCH_SIZE] * count
    return functools.partial(hw2_q2.train_one_epoch, model, optimizer, *data, 1, args)


def textbook_steps(options, count):
    """A function that trains the textbook's network for `count` steps."""
    torch.manual_seed(0)
    model = TextbookCNN(batch_norm="-no_batch_norm" not in options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = make_images(count * BATCH_SIZE)
    loader = DataLoader(TensorDataset(images.float() / 255, labels), BATCH_SIZE, shuffle=True)
    return functools.partial(textbook_epoch, model, optimizer, loader)


def limiting_work():
    """What limits a step, on one thread: its convolutions with their gradients, a large matrix
    product and a large copy, each REPEATS times."""
    layers = []
    for c_in, c_out, side in ((3, 32, 48), (32, 64, 24), (64, 128, 12)):
        x, dy = (torch.randn(BATCH_SIZE, channels, side, side) for channels in (c_in, c_out))
        layer = nn.Conv2d(c_in, c_out, 3, padding=1)
        layer, x, dy = (part.to(memory_format=torch.channels_last) for part in (layer, x, dy))
        layers.append((layer, x.requires_grad_(c_in > 3), dy))  # images need no gradient
    a, b, matrix = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.randn(COPIED)

    def convolve():
        for layer, x, dy in layers * REPEATS:
            inputs = [part for part in (x, layer.weight, layer.bias) if part.requires_grad]
            torch.autograd.grad(layer(x), inputs, dy)

    return {
        "convolutions": on_threads(1, convolve),
        "product": on_threads(1, lambda: [a @ b for _ in range(REPEATS)]),
        "copy": on_threads(1, lambda: [matrix.clone() for _ in range(REPEATS)]),
    }


def limit_of_step(machine, batch_norm):
    """The minimum seconds per step on one thread: the convolutions as measured, and for each linear
    layer the slower of its three products at the highest rate and its weight's four ways through
    memory (read for the output, for the inputs' gradient and for the update, and written)."""
    total = machine["convolutions_s"]
    for n_in, n_out in ((128 if batch_norm else 4608, 1024), (1024, 512), (512, 6)):
        products = 3 * 2 * BATCH_SIZE * n_in * n_out / machine["product_flop_per_s"]
        memory = 4 * 4 * n_in * n_out / machine["copy_bytes_per_s"]
        total += max(products, memory)
    return total


def measure_steps(turns, count, cores):
    """The machine's rates, and for each network the seconds per step: limit, ours, textbook."""
    contenders = {"machine": limiting_work()}
    for name, options in NETWORKS.items():
        ours, textbook = our_steps(options, count), textbook_steps(options, count)
        contenders[name] = {
            "ours, 1 thread": on_threads(1, ours),
            "ours, bfloat16, 1 thread": on_threads(1, our_steps(options + BFLOAT16, count)),
            f"ours, {cores} threads": on_threads(cores, ours),
            "textbook, 1 thread": on_threads(1, textbook),
            f"textbook, {cores} threads": on_threads(cores, textbook),
        }
    steps = take_turns(contenders, turns)
    once = {name: median / REPEATS for name, median in steps.pop("machine").items()}
    machine = {
        "convolutions_s": once["convolutions"],
        "product_flop_per_s": 2 * SIDE**3 / once["product"],
        "copy_bytes_per_s": 2 * 4 * math.prod(COPIED) / once["copy"],
    }
    for name, row in steps.items():
        limit = {"limit, 1 thread": limit_of_step(machine, batch_norm=name != "plain")}
        steps[name] = limit | {who: seconds / count for who, seconds in row.items()}
    return machine, steps


# ----------------------------------------------------------------------------------------------
# question 3: a training epoch, and the spelling of 1,000 words


def make_spellers(limit, epochs=3):
    """Our speller with attention after some epochs of training, the textbook's with the same
    weights, and at most `limit` words of each split: {split: EncodedPairs}."""
    splits = {split: pairs[:limit] for split, pairs in choose_pronunciations().splits.items()}
    args = hw2_q3.parse_args(["--use_attn"])
    vocabularies = hw2_q3.make_vocabularies(args, utils.Pronunciations(splits))
    utils.seed_everything(args.seed)
    speller = hw2_q3.Speller(hw2_q3.build_model(args, *vocabularies), *vocabularies)
    encoded = {split: speller.encode(pairs) for split, pairs in splits.items()}
    train = our_spelling_epoch(speller, encoded["train"])
    for _ in range(epochs):
        train()
    textbook = TextbookSpeller(*map(len, vocabularies))
    textbook.load_state_dict(speller.model.state_dict())
    return speller, textbook, encoded


def our_spelling_epoch(speller, pairs):
    """A function that trains our model for one epoch."""
    args = hw2_q3.parse_args(["--use_attn"])
    optimizer = torch.optim.Adam(speller.model.parameters(), lr=args.lr, fused=True)
    return functools.partial(hw2_q3.train_one_epoch, speller.model, optimizer, pairs, 1, args)


def textbook_spelling_epoch(model, pairs):
    """A function that trains the textbook's model for one epoch."""
    rows = zip(pairs.sources, pairs.lengths, pairs.targets, pairs.target_lengths)
    words = [(source[:s], target[:t]) for source, s, target, t in rows]

    def collate(batch):
        sources, targets = zip(*batch)
        lengths = torch.tensor([len(source) for source in sources])
        return pad_sequence(sources, True), lengths, pad_sequence(targets, True)

    loader = DataLoader(words, 64, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    return functools.partial(textbook_epoch, model, optimizer, loader)


def run_bare_lstms(model, pairs):
    """Compute only the two LSTMs and their gradients, over an epoch's batches."""
    for rows in torch.randperm(len(pairs.lengths)).split(64):
        lengths, steps = pairs.lengths[rows], pairs.target_lengths[rows].max() - 1
        x = torch.randn(len(rows), lengths.max(), 128, requires_grad=True)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y = torch.randn(len(rows), steps, 128, requires_grad=True)
        outputs = model.encoder.lstm(packed)[0].data.sum() + model.decoder.lstm(y)[0].sum()
        outputs.backward()


def measure_spelling(turns, limit, cores):
    """Whether our greedy spellings of the test words equal the textbook's, and the seconds of
    spelling and of a training epoch."""
    speller, textbook, encoded = make_spellers(limit)
    train, test = encoded["train"], encoded["test"]
    words = [source[:length] for source, length in zip(test.sources, test.lengths)]

    def textbook_spellings(p=None, copies=1):
        return [textbook_spell(textbook, word, p) for word in words for _ in range(copies)]

    ours = [spelling for [spelling] in hw2_q3.spellings(speller.greedy(test))]
    same = ours == [speller.target.decode(indices) for indices in textbook_spellings()]
    generator = torch.Generator().manual_seed(0)
    decoding = {
        "greedy": {
            "ours": on_threads(cores, speller.greedy, test),
            "textbook": on_threads(cores, textbook_spellings),
        },
        "nucleus, 3 samples": {
            "ours": on_threads(cores, speller.sample, test, 0.8, 3, generator),
            "textbook": on_threads(cores, textbook_spellings, 0.8, 3),
        },
        "beam of 5": {"ours": on_threads(cores, speller.beam, test, 5)},
    }
    medians = take_turns(decoding, turns)  # before training changes the weights
    ours = our_spelling_epoch(speller, train)
    training = {
        "ours, 1 thread": on_threads(1, ours),
        f"ours, {cores} threads": on_threads(cores, ours),
        "textbook": on_threads(cores, textbook_spelling_epoch(textbook, train)),
        "bare LSTMs, 1 thread": on_threads(1, run_bare_lstms, speller.model, train),
    }
    medians |= take_turns({"training epoch": training}, turns)
    share = spelling_epoch_side_by_side(turns, limit, cores)
    medians["training epoch"][f"ours, {cores} at once"] = share
    return {"same_spellings": same, "words": len(words), "seconds": medians}


def spelling_epoch_side_by_side(turns, limit, jobs):
    """Seconds per epoch, validation included, of `jobs` runs at once, divided by their number."""
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in zip(("train", "valid", "test"), choose_pronunciations().splits.values()):
            lines = (f"{' '.join(phonemes)}\t{word}\n" for phonemes, word in pairs[:limit])
            Path(folder, f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
        options = f"--use_attn --n_epochs {turns + 1} --jobs {jobs}".split()
        options += "--data_dir", folder, "--output_dir", folder, "--seed"
        measured = train_runs(hw2_q3, [[*options, str(seed)] for seed in range(jobs)])
    return statistics.median(t for run in measured for t in run["seconds"][1:]) / jobs


def measure_scaling(turns, steps, limit):
    """Seconds on one thread by the number of training images, of words, and by beam size."""
    speller, _, encoded = make_spellers(limit)
    pairs = choose_pronunciations().splits["train"]
    subsets = [speller.encode(pairs[: limit * eighths // 8]) for eighths in (1, 2, 4, 8, 16, 32)]
    counts, sizes = (steps // 4, steps // 2, steps, 2 * steps), (1, 2, 5, 10, 20)
    contenders = {
        "pictures": {n * BATCH_SIZE: on_threads(1, our_steps([], n)) for n in counts},
        "words": {len(x.lengths): on_threads(1, speller.greedy, x) for x in subsets},
        "beam size": {n: on_threads(1, speller.beam, encoded["test"], n) for n in sizes},
    }
    return take_turns(contenders, turns)


# ----------------------------------------------------------------------------------------------
# whole runs of question 2

OURS, OURS_BFLOAT16 = "ours, side by side", "ours, bfloat16, side by side"
TEXTBOOK = "textbook, one by one"
GRID = [("-no_batch_norm", "-learning_rate", rate) for rate in ("0.1", "0.01", "0.001")]
GRID.append(("-learning_rate", "0.01"))  # the original's four runs


def make_splits(share):
    """Random images and labels, as many as the photographs or this share of them."""
    return {split: make_images(max(64, int(count * share))) for split, count in SIZES.items()}


def train_on_images(runs, share, jobs):
    """Train runs with these options for two epochs on random images, `jobs` at once. Returns the
    `measured` of their records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        write_npz(path, make_splits(share))
        options = ["-epochs", "2", "-jobs", str(jobs), "-data_path", str(path)]
        return train_runs(hw2_q2, [[*run, *options, "-output_dir", folder] for run in runs])


def measure_grid(steps, cores, share):
    """Seconds per epoch of the original's four runs and of all their epochs, ours side by side,
    from the second epoch, and the textbook's, from its steps; and the peak memory (MiB) of our two
    networks, 0 where the system does not tell."""
    grid, memory = {}, {}
    for who, options in ((OURS, ()), (OURS_BFLOAT16, BFLOAT16)):
        measured = train_on_images([run + options for run in GRID], share, cores)
        epochs = [run["seconds"][1] / share for run in measured]
        grid[who] = {"epoch_s": epochs, "grid_s": sum(epochs) * EPOCHS / cores}
        for name, run in zip(NETWORKS, measured[-2:]):
            memory[name] = max(memory.get(name, 0), run["peak_memory_mib"] or 0)
    count = math.ceil(SIZES["train"] / BATCH_SIZE)
    plain, batch_norm = (count * row[f"textbook, {cores} threads"] for row in steps.values())
    epochs = [plain, plain, plain, batch_norm]
    grid[TEXTBOOK] = {"epoch_s": epochs, "grid_s": sum(epochs) * EPOCHS}
    return grid, memory


def measure_runs_at_once(share, most):
    """{n: steps per second, all together} of n runs at once, validation included."""
    rates = {}
    for n in range(1, most + 1):
        measured = train_on_images([("-seed", str(seed)) for seed in range(n)], share, n)
        steps = SIZES["train"] * share / BATCH_SIZE
        rates[n] = sum(steps / run["seconds"][1] for run in measured)
    return rates


def measure_analysis(share):
    """Seconds, on one thread, of a run's final scores and of the report's analysis, which users'
    runs do without: of the second of two calls, since a call can take a minute."""
    data, work = utils.Landscapes(make_splits(share)), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in NETWORKS.items():
            args = hw2_q2.parse_args([*options, "-output_dir", folder])
            parts = data.splits.items()
            splits = {split: hw2_q2.to_device(*part, "cpu", args) for split, part in parts}
            model, run = hw2_q2.build_model(args), hw2_q2.make_run(args, data)
            optimizer, history = hw2_q2.make_optimizer(model, args), {"val_accuracy": [0.0]}
            utils.save_checkpoint(run, model, optimizer, history, seconds=[0.0])
            work[name] = {
                "score": on_threads(1, hw2_q2.score, model, splits, args.tta),
                "analysis": on_threads(1, report_q2.analyse, args, data, "cpu"),
            }
        return take_turns(work, turns=1)


# ----------------------------------------------------------------------------------------------
# tables and figure


def readme_table(results):
    """The lines of the README's table: task, ours, textbook code, limit or speed-up."""
    cores, rows = results["machine"]["cores"], []
    for name, step in results["steps"].items():
        ms = {who: f"{1e3 * seconds:.1f} ms" for who, seconds in step.items()}
        ours = f"{ms['ours, 1 thread']} on 1 thread, {ms['ours, bfloat16, 1 thread']} in bfloat16"
        textbook = f"{ms[f'textbook, {cores} threads']} on {cores} threads"
        limit = f"limit {ms['limit, 1 thread']}"
        rows.append((f"question 2, training step, {name}", ours, textbook, limit))
    minutes = {who: times["grid_s"] / 60 for who, times in results["grid"].items()}
    task, form = f"question 2, four runs of {EPOCHS} epochs", "{:.0f} minutes"
    for who, mark in ((OURS, ""), (OURS_BFLOAT16, ", bfloat16")):
        rows.append(compare(task + mark, minutes[who], minutes[TEXTBOOK], form))
    seconds, words = results["spelling"]["seconds"], results["spelling"]["words"]
    ours, textbook = (seconds["training epoch"][w] for w in (f"ours, {cores} at once", "textbook"))
    rows.append(compare("question 3, training epoch", ours, textbook))
    for way in ("greedy", "nucleus, 3 samples"):
        task = f"question 3, spelling {words:,} words, {way}"
        rows.append(compare(task, seconds[way]["ours"], seconds[way]["textbook"]))
    return [f"| {' | '.join(row)} |" for row in rows]


def compare(task, ours, textbook, form="{:.2f} s"):
    """A row of the README's table."""
    return task, form.format(ours), form.format(textbook), f"{textbook / ours:.3g} times as fast"


def draw(path, results):
    """Draw a step's time against the limit, and how times grow."""
    cores = results["machine"]["cores"]
    colors = {
        "limit, 1 thread": "0.6",
        "ours, 1 thread": utils.BLUE,
        "ours, bfloat16, 1 thread": utils.SKY,
        f"ours, {cores} threads": utils.GREEN,
        f"textbook, {cores} threads": utils.VERMILION,
    }
    fig, grid = utils.new_figure(7.0, 5.2, 2, 2)
    steps, *others = grid.flat
    for i, (who, color) in enumerate(colors.items()):
        values = [1e3 * row[who] for row in results["steps"].values()]
        bars = steps.bar([i * 0.16, 1 + i * 0.16], values, 0.15, color=color, label=who)
        steps.bar_label(bars, fmt="%.1f", fontsize=6.5)
    steps.legend(fontsize=6.5)
    steps.set_xticks([0.32, 1.32], results["steps"])
    steps.set(title="Question 2: one training step", ylabel="Time (ms)")
    steps.margins(y=0.6)
    panels = {
        "pictures": ("Question 2: training", "Number of images"),
        "words": ("Question 3: greedy decoding", "Number of words"),
        "beam size": ("Question 3: beam search", "Beam size"),
    }
    for axes, (what, (title, label)) in zip(others, panels.items()):
        sizes, seconds = zip(*results["scaling"][what].items())
        axes.plot(list(map(int, sizes)), seconds, "o-", markersize=4, color=utils.BLUE)
        axes.set(title=f"{title}, 1 thread", xlabel=label, ylabel="Time (s)")
        axes.set(xlim=(0, None), ylim=(0, None))
    utils.save_figure(path, fig)


# ----------------------------------------------------------------------------------------------
# main

QUICK = {"turns": 1, "steps": 4, "words": 20, "share": 0.01, "most_runs": 1}
FULL = {"turns": 5, "steps": 100, "words": 10_000, "share": 1, "most_runs": utils.cpu_count() + 2}


def measure(turns, steps, words, share, most_runs):
    """All results. steps, words: how many a function trains on at once; share: of the number of
    photographs; most_runs: the maximum number of runs at once."""
    cores = utils.cpu_count()
    machine, step_times = measure_steps(turns, steps, cores)
    grid, memory = measure_grid(step_times, cores, share)
    return {
        "machine": utils.measured(torch.device("cpu"), []) | machine,
        "steps": step_times,
        "spelling": measure_spelling(turns, words, cores),
        "scaling": measure_scaling(turns, steps, min(words, 1000)),
        "runs_at_once": measure_runs_at_once(share / 10, most_runs),
        "grid": grid,
        "memory": memory,
        "analysis_seconds": measure_analysis(share),
    }


def main(argv=None):
    parser = utils.Parser("python -m tests.benchmark", description=__doc__.rpartition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="use tiny data, to see that it works")
    output = {"type": Path, "metavar": "DIR", "default": utils.ROOT / "figures"}
    parser.add_argument("--output", **output, help="folder of the two files (default: figures/)")
    args = parser.parse_args(argv)
    command = "python -m tests.benchmark" + args.quick * " --quick"
    results = {"command": command} | measure(**(QUICK if args.quick else FULL))
    utils.save_record(args.output / "benchmark.json", results)
    draw(args.output / "benchmark.png", results)
    print("\n".join(readme_table(results)))
    for name, times in results["analysis_seconds"].items():
        print(f"{name}: final scores {times['score']:.1f} s, analysis {times['analysis']:.1f} s")


if __name__ == "__main__":
    utils.run_script(main)
