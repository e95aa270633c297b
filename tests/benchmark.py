"""How fast the project is: against a textbook loop, and against what the machine could do at best.

    python -m tests.benchmark              everything, some 20 minutes on 2 cores
    python -m tests.benchmark --quick      the same with next to nothing to do, to see that it works

Prints tables and writes figures/benchmark.json and figures/benchmark.png. Contenders take turns, so
that a noisy machine hits all alike; numbers are medians over turns. Pictures are random, words are
the built-in sample: nothing needs to be downloaded.

textbook loops | measuring | question 2 | question 3 | the whole report | figure | main
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import hw2_q2
import hw2_q3
import utils
from data.sample import choose_pronunciations

TRAIN, VAL, TEST = 12_635, 1_404, 3_000  # pictures, as in the photographs
EPOCHS, BATCH = 40, 8
STEPS = -(-TRAIN // BATCH)

# ----------------------------------------------------------------------------------------------
# textbook loops: the two models and trainings as a good student's script has them


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
    """The networks of question 2; their weights bear the names of hw2_q2.CNN's."""

    def __init__(self, batch_norm):
        super().__init__()
        sizes = (3, 32), (32, 64), (64, 128)
        self.convs = nn.Sequential(*(TextbookBlock(*size, batch_norm) for size in sizes))
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


def textbook_epoch(model, optimizer, loader):
    """One pass over batches of pictures and labels; the mean loss."""
    losses = []
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


class TextbookAttention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.key = nn.Linear(size, size, bias=False)
        self.query = nn.Linear(size, size)
        self.score = nn.Linear(size, 1, bias=False)
        self.combine = nn.Linear(2 * size, size)

    def forward(self, state, values, mask):
        scores = self.score(torch.tanh(self.key(values) + self.query(state))).squeeze(2)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
        context = weights.unsqueeze(1) @ values
        return torch.tanh(self.combine(torch.cat((context, state), 2)))


class TextbookEncoder(nn.Module):
    def __init__(self, symbols, size, dropout):
        super().__init__()
        self.embedding = nn.Embedding(symbols, size, padding_idx=hw2_q3.PAD)
        self.lstm = nn.LSTM(size, size // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sources, lengths):
        x = self.dropout(self.embedding(sources))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, (h, c) = self.lstm(packed)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        h, c = torch.cat((h[0], h[1]), 1), torch.cat((c[0], c[1]), 1)
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
            x = self.dropout(self.embedding(characters[:, step : step + 1]))
            x, state = self.lstm(x, state)
            logits.append(self.output(self.dropout(self.attention(x, values, mask))))
        return torch.cat(logits, 1), state


class TextbookSpeller(nn.Module):
    """The model of question 3 with attention; its weights bear the names of hw2_q3.Seq2Seq's."""

    def __init__(self, phonemes, characters, size=128, dropout=0.3):
        super().__init__()
        self.encoder = TextbookEncoder(phonemes, size, dropout)
        self.decoder = TextbookDecoder(characters, size, dropout)

    def forward(self, sources, lengths, characters):
        values, state = self.encoder(sources, lengths)
        return self.decoder(characters, state, values, sources != hw2_q3.PAD)[0]


def textbook_spelling_epoch(model, optimizer, loader):
    """One pass over batches of (phonemes, lengths, characters); the mean loss."""
    losses = []
    model.train()
    for sources, lengths, targets in loader:
        optimizer.zero_grad()
        logits = model(sources, lengths, targets[:, :-1])
        true = targets[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), true, ignore_index=hw2_q3.PAD)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def textbook_spell(model, source, p=None, max_len=hw2_q3.MAX_LEN):
    """The spelling of phonemes (S,): the numbers of its characters. Greedy, or from the nucleus."""
    model.eval()
    sources = source.unsqueeze(0)
    values, state = model.encoder(sources, torch.tensor([len(source)]))
    last, spelled = hw2_q3.START, []
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
        spelled.append(last)
    return spelled


# ----------------------------------------------------------------------------------------------
# measuring


def seconds(function, *args):
    """How long function(*args) takes."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def take_turns(contenders, turns):
    """{name: median seconds} of {name: function}, called in turn after one call each to warm up."""
    for function in contenders.values():
        function()
    times = {name: [] for name in contenders}
    for _ in range(turns):
        for name, function in contenders.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def on_threads(threads, function):
    """`function` on so many threads."""

    def run():
        torch.set_num_threads(threads)
        function()

    return run


def repeat(count, function):
    """`function` so many times."""

    def run():
        for _ in range(count):
            function()

    return run


class Workers:
    """A function that `n` processes do at once, one thread each: so many steps of question 2's
    variant ('steps'), or an epoch of question 3's training on so many words ('spelling')."""

    def __init__(self, n, kind, count):
        command = [sys.executable, "-c", "from tests import benchmark; benchmark.work()", kind]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command.append(str(count))
        self.processes = [subprocess.Popen(command, cwd=utils.ROOT, **pipes) for _ in range(n)]
        self._wait()  # until all are ready

    def _wait(self):
        for process in self.processes:
            if not process.stdout.readline():
                raise RuntimeError("a worker has ended")

    def __enter__(self):
        return self

    def __call__(self):
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        self._wait()

    def __exit__(self, *exception):
        for process in self.processes:
            process.communicate()  # closes its input, which ends it


def work():
    """What a process of Workers does: a line when it is ready, and one each time it has done its
    work, for each line that it reads."""
    kind, count = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    if kind == "steps":
        run = our_steps([], count)
    else:
        speller, _, words = make_spellers(count, epochs=0)
        run = our_spelling_epoch(speller, words["train"])
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        run()
        print("done", flush=True)


# ----------------------------------------------------------------------------------------------
# question 2: a step, against a textbook's and against the machine's limit


def make_pictures(count):
    """Random pictures (N, 3, 48, 48) and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 6, (count,), generator=generator)


def our_steps(argv, count):
    """A function that trains our network of these options for `count` steps."""
    options = hw2_q2.parse_options(argv)
    torch.manual_seed(0)
    model = hw2_q2.build_model(options).train()
    totals = torch.zeros(3)
    step = hw2_q2.make_step(model, hw2_q2.make_optimizer(model, options), totals)
    images, labels = make_pictures(count * BATCH)
    images = images.contiguous(memory_format=torch.channels_last)
    return lambda: hw2_q2.train_epoch(step, totals, images, labels, [BATCH] * count)


def textbook_steps(batch_norm, count):
    """A function that trains the textbook network for `count` steps."""
    torch.manual_seed(0)
    model = TextbookCNN(batch_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = make_pictures(count * BATCH)
    data = TensorDataset(images.float() / 255, labels)
    return lambda: textbook_epoch(model, optimizer, DataLoader(data, BATCH, shuffle=True))


def convolutions():
    """A function that computes the three convolutions and their gradients, alone."""
    layers = []
    for c_in, c_out, side in ((3, 32, 48), (32, 64, 24), (64, 128, 12)):
        layout = {"memory_format": torch.channels_last}
        x = torch.randn(BATCH, c_in, side, side).to(**layout)
        weight, bias = torch.randn(c_out, c_in, 3, 3).to(**layout), torch.zeros(c_out)
        dy = torch.randn(BATCH, c_out, side, side).to(**layout)
        layers.append((x, weight, bias, dy))

    def run():
        for x, weight, bias, dy in layers:
            F.conv2d(x, weight, bias, padding=1)
            wanted = [x.shape[1] > 3, True, True]  # pictures need no gradient
            geometry = [len(bias)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1
            torch.ops.aten.convolution_backward(dy, x, weight, *geometry, wanted)

    return run


PRODUCT = 1024  # rows and columns of a matrix product large enough to run at the best rate
COPIED = 1024, 4608  # numbers copied, as many as the plain network's fc1 has


def machine_limits():
    """What the machine does at best, on one thread: {name: function}."""
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    memory = torch.randn(COPIED)
    return {
        "convolutions": on_threads(1, repeat(10, convolutions())),
        "product": on_threads(1, lambda: a @ b),
        "copy": on_threads(1, repeat(10, memory.clone)),
    }


def limit_of_step(machine, batch_norm):
    """The least seconds a step can take on one thread: the convolutions as measured; each linear
    layer's three products at the best rate, or its weights' four ways through memory (read for the
    output, for the inputs' gradient and to be updated, and written), whichever takes longer."""
    total = machine["convolutions_s"]
    for n_in, n_out in ((128 if batch_norm else 4608, 1024), (1024, 512), (512, 6)):
        products = 3 * 2 * BATCH * n_in * n_out / machine["product_flop_per_s"]
        memory = 4 * 4 * n_in * n_out / machine["copy_bytes_per_s"]
        total += max(products, memory)
    return total


NETWORKS = {"plain": ["-no_batch_norm"], "batch norm + pooling": []}
HALF = ["-precision", "bfloat16"]


def measure_steps(turns, count, cores):
    """The machine's rates, and for each network seconds a step: limit, ours, textbook."""
    contenders = {("machine", name): function for name, function in machine_limits().items()}
    for name, argv in NETWORKS.items():
        ours, textbook = our_steps(argv, count), textbook_steps(not argv, count)
        contenders[name, "ours, 1 thread"] = on_threads(1, ours)
        contenders[name, "ours, bfloat16, 1 thread"] = on_threads(1, our_steps(argv + HALF, count))
        contenders[name, f"ours, {cores} threads"] = on_threads(cores, ours)
        contenders[name, "textbook, 1 thread"] = on_threads(1, textbook)
        contenders[name, f"textbook, {cores} threads"] = on_threads(cores, textbook)
    medians = take_turns(contenders, turns)
    machine = {
        "convolutions_s": medians["machine", "convolutions"] / 10,
        "product_flop_per_s": 2 * PRODUCT**3 / medians["machine", "product"],
        "copy_bytes_per_s": 2 * 4 * math.prod(COPIED) * 10 / medians["machine", "copy"],
    }
    steps = {}
    for name, argv in NETWORKS.items():
        times = {who: median / count for (what, who), median in medians.items() if what == name}
        steps[name] = {"limit, 1 thread": limit_of_step(machine, not argv)} | times
    return machine, steps


# ----------------------------------------------------------------------------------------------
# question 3: an epoch and the decoding of 1,000 words


def make_spellers(limit, epochs=3):
    """Our speller with attention, a little trained, and the textbook's of the same weights; the
    training and test words as tensors."""
    splits = {split: pairs[:limit] for split, pairs in choose_pronunciations().splits.items()}
    phonemes = hw2_q3.Vocabulary.of(sound for sound, _ in splits["train"])
    characters = hw2_q3.Vocabulary.of(word for _, word in splits["train"])
    torch.manual_seed(0)
    options = {"hidden_size": 128, "dropout": 0.3, "use_attn": True}
    speller = hw2_q3.Speller(
        hw2_q3.build_model(options, phonemes, characters), phonemes, characters
    )
    words = {split: speller.tensors(pairs) for split, pairs in splits.items()}
    for _ in range(epochs):
        our_spelling_epoch(speller, words["train"])()
    textbook = TextbookSpeller(len(phonemes), len(characters))
    textbook.load_state_dict(speller.model.state_dict())
    return speller, textbook, words


def our_spelling_epoch(speller, words):
    """A function that trains our model for one epoch."""
    optimizer = torch.optim.Adam(speller.model.parameters(), lr=0.003, fused=True)
    totals = torch.zeros(3)
    step = hw2_q3.make_step(speller.model, optimizer, totals)

    def run():
        speller.model.train()
        hw2_q3.train_epoch(step, totals, words, 64)

    return run


def textbook_spelling(model, words):
    """A function that trains the textbook's model for one epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    rows = zip(words.sources, words.lengths, words.targets, words.target_lengths)
    pairs = [(source[:n], target[:m]) for source, n, target, m in rows]

    def collate(batch):
        sources, targets = zip(*batch)
        lengths = torch.tensor([len(source) for source in sources])
        return pad_sequence(sources, True), lengths, pad_sequence(targets, True)

    def run():
        loader = DataLoader(pairs, 64, shuffle=True, collate_fn=collate)
        textbook_spelling_epoch(model, optimizer, loader)

    return run


def bare_lstms(speller, words):
    """A function that computes only the two LSTMs and their gradients over an epoch's batches."""
    model = speller.model

    def run():
        for rows in torch.randperm(len(words.lengths)).split(64):
            lengths, end = words.lengths[rows], words.target_lengths[rows].max() - 1
            x = torch.randn(len(rows), lengths.max(), 128, requires_grad=True)
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y = torch.randn(len(rows), end, 128, requires_grad=True)
            outputs = model.encoder.lstm(packed)[0].data.sum() + model.decoder.lstm(y)[0].sum()
            outputs.backward()

    return run


def measure_spelling(turns, limit, cores):
    """Seconds of a training epoch and of decoding the test words, ours and the textbook's."""
    speller, textbook, words = make_spellers(limit)
    test = words["test"]
    sources = [source[:length] for source, length in zip(test.sources, test.lengths)]

    def textbook_decode(p=None, copies=1):
        return [textbook_spell(textbook, source, p) for source in sources for _ in range(copies)]

    ours = hw2_q3.only_spellings(speller.greedy(test))
    same = [[speller.target.decode(spelled)] for spelled in textbook_decode()] == ours
    decoding = {
        ("greedy", "ours"): lambda: speller.greedy(test),
        ("greedy", "textbook"): textbook_decode,
        ("nucleus, 3 samples", "ours"): lambda: speller.sample(test, 0.8, 3, 0),
        ("nucleus, 3 samples", "textbook"): lambda: textbook_decode(0.8, 3),
        ("beam of 5", "ours"): lambda: speller.beam(test, 5),
    }
    many = {key: on_threads(cores, function) for key, function in decoding.items()}
    epoch = our_spelling_epoch(speller, words["train"])
    slow = textbook_spelling(textbook, words["train"])
    bare = bare_lstms(speller, words["train"])
    with Workers(cores, "spelling", limit) as side_by_side:
        many |= {
            ("training epoch", "ours, 1 thread"): on_threads(1, epoch),
            ("training epoch", f"ours, {cores} threads"): on_threads(cores, epoch),
            ("training epoch", f"ours, {cores} at once"): side_by_side,
            ("training epoch", "textbook"): on_threads(cores, slow),
            ("training epoch", "bare LSTMs, 1 thread"): on_threads(1, bare),
        }
        medians = take_turns(many, turns)
    results = {}
    for (what, who), median in medians.items():
        results.setdefault(what, {})[who] = median
    results["training epoch"][f"ours, {cores} at once"] /= cores  # for one of them
    return {"same_spellings": same, "words": len(sources), "seconds": results}


def measure_scaling(turns, limit):
    """Seconds on one thread against pictures trained on, words spelled, and beam size."""
    torch.set_num_threads(1)
    speller, _, words = make_spellers(limit)
    pairs = choose_pronunciations().splits["train"]
    counts = [limit * eighths // 8 for eighths in (1, 2, 4, 8, 16, 32)]
    some = {count: speller.tensors(pairs[:count]) for count in counts}
    contenders = {("pictures", n * BATCH): our_steps([], n) for n in (25, 50, 100, 200)}
    for count in counts:
        contenders["words", count] = lambda words=some[count]: speller.greedy(words)
    for size in (1, 2, 5, 10, 20):
        contenders["beam size", size] = lambda size=size: speller.beam(words["test"], size)
    results = {}
    for (what, size), median in take_turns(contenders, turns).items():
        results.setdefault(what, {})[str(size)] = median
    return results


# ----------------------------------------------------------------------------------------------
# the whole report, its runs side by side


def write_pictures(path, share):
    """An .npz file of random pictures, as many as the photographs are, or a share of them."""
    arrays = {}
    for split, count in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        images, labels = make_pictures(max(64, int(count * share)))
        arrays[f"{split}_images"] = images.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = labels.numpy()
    np.savez(path, **arrays)


def train_runs(lines, epochs, share, jobs):
    """What the trainings of these command lines measured, `jobs` at once, on random pictures."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pictures.npz"
        write_pictures(data, share)
        tasks = []
        for line in lines:
            places = f"-epochs {epochs} -threads 1 -data_path {data} -output_dir {folder}"
            words = f"{line} {places}".split()
            run = hw2_q2.make_run(hw2_q2.parse_options(words), utils.load_landscapes(data))
            tasks.append(utils.Task(run, (str(utils.ROOT / "hw2_q2.py"), *words), epochs))
        options = argparse.Namespace(jobs=jobs, scheduler=None, restart=False, device="cpu")
        records = utils.run_many(tasks, hw2_q2.summary, options)
    return [record["measured"] for record in records]


OURS, OURS_HALF = "ours, side by side", "ours, bfloat16, side by side"
TEXTBOOK = "textbook, one by one"


def measure_grid(turns, cores, share, count):
    """The report's four networks, one seed: seconds a training epoch of each, side by side, from
    the second of two, and of the whole grid; the textbook's, timed before and after."""
    textbook = {name: textbook_steps(not argv, count) for name, argv in NETWORKS.items()}
    contenders = {name: on_threads(cores, function) for name, function in textbook.items()}
    lines = [f"-no_batch_norm -learning_rate {rate}" for rate in (0.1, 0.01, 0.001)]
    lines.append("-learning_rate 0.01")
    half = [" ".join([line, *HALF]) for line in lines]
    before = take_turns(contenders, turns)
    results = {}
    for who, own in ((OURS, lines), (OURS_HALF, half)):
        measured = train_runs(own, 2, share, cores)
        epochs = [m["seconds"][1] / share for m in measured]
        results[who] = {"epoch_s": epochs, "grid_s": sum(epochs) * EPOCHS / cores}
    after = take_turns(contenders, turns)
    plain, norm = ((before[name] + after[name]) / 2 / count * STEPS for name in NETWORKS)
    epochs = [plain, plain, plain, norm]
    return results | {TEXTBOOK: {"epoch_s": epochs, "grid_s": sum(epochs) * EPOCHS}}


def measure_memory(share):
    """{network: MiB that a run takes at most}; 0 where the system does not tell."""
    measured = train_runs([" ".join(argv) for argv in NETWORKS.values()], 1, share, 1)
    return {name: m["peak_memory_mib"] or 0 for name, m in zip(NETWORKS, measured)}


def measure_runs_at_once(count, most):
    """{n: steps a second, all together} of n trainings at once, one thread each."""
    rates = {}
    for n in range(1, most + 1):
        with Workers(n, "steps", count) as side_by_side:
            rates[str(n)] = n * count / seconds(side_by_side)
    return rates


# ----------------------------------------------------------------------------------------------
# tables and figure


def ratios(results):
    """The ratios that the project promises something about: {name: (ratio, promised, sense)}."""
    steps, grid, spelling = results["steps"], results["grid"], results["spelling"]["seconds"]
    epoch, cores = spelling["training epoch"], results["machine"]["cores"]
    found = {
        f"{name}: step / limit": (s["ours, 1 thread"] / s["limit, 1 thread"], 1.7, "at most")
        for name, s in steps.items()
    }
    for who, name in ((OURS, "ours"), (OURS_HALF, "ours, bfloat16")):
        ratio = grid[TEXTBOOK]["grid_s"] / grid[who]["grid_s"]
        found[f"question 2's grid: textbook / {name}"] = ratio, 3, "at least"
    ratio = epoch["textbook"] / epoch[f"ours, {cores} at once"]
    found["question 3, training: textbook / ours, side by side"] = ratio, 3, "at least"
    for what, promised in (("greedy", 25), ("nucleus, 3 samples", 30)):
        ratio = spelling[what]["textbook"] / spelling[what]["ours"]
        found[f"question 3, {what}: textbook / ours"] = ratio, promised, "at least"
    found["memory of a run (MiB)"] = max(results["memory"].values()), 1024, "at most"
    return found


def print_tables(results):
    """Print all results."""
    print("\nQuestion 2, milliseconds a step of 8 pictures")
    for name, row in results["steps"].items():
        for who, value in row.items():
            print(f"  {name:22}{who:28}{1e3 * value:9.2f}")
    print("\nQuestion 2, the report's grid (4 runs of 40 epochs, one seed), minutes")
    for who in (OURS, OURS_HALF, TEXTBOOK):
        print(f"  {who:50}{results['grid'][who]['grid_s'] / 60:9.1f}")
    print(f"\nQuestion 3, seconds ({results['spelling']['words']:,} words decoded)")
    for what, row in results["spelling"]["seconds"].items():
        for who, value in row.items():
            print(f"  {what:22}{who:28}{value:9.3f}")
    print("\nScaling, one thread, seconds")
    for what, row in results["scaling"].items():
        values = "  ".join(f"{size}: {value:.3f}" for size, value in row.items())
        print(f"  {what:22}{values}")
    rates = "  ".join(f"{n}: {rate:.0f}" for n, rate in results["runs_at_once"].items())
    print(f"  {'steps a second at once':24}{rates}")
    print("\nRatios")
    for name, (ratio, promised, sense) in ratios(results).items():
        print(f"  {name:60}{ratio:8.2f}   ({sense} {promised})")


def readme_table(results):
    """The lines of the README's table."""
    steps, spelling = results["steps"], results["spelling"]["seconds"]
    cores, grid = results["machine"]["cores"], results["grid"]
    textbook, epoch = grid[TEXTBOOK]["grid_s"], spelling["training epoch"]
    rows = [
        (
            f"question 2, a step of 8 pictures, {name}",
            f"{1e3 * row['ours, 1 thread']:.1f} ms on one thread, "
            f"{1e3 * row['ours, bfloat16, 1 thread']:.1f} in bfloat16",
            f"{1e3 * row[f'textbook, {cores} threads']:.1f} ms on {cores}",
            f"limit: {1e3 * row['limit, 1 thread']:.1f} ms",
        )
        for name, row in steps.items()
    ]
    for who, name in ((OURS, "40 epochs"), (OURS_HALF, "40 epochs, bfloat16")):
        took = grid[who]["grid_s"]
        rows.append(
            (
                f"question 2, four runs of {name}",
                f"{took / 60:.0f} minutes, {cores} at once",
                f"{textbook / 60:.0f} minutes",
                f"{textbook / took:.3g} times as fast",
            )
        )
    side_by_side = epoch[f"ours, {cores} at once"], epoch["textbook"]
    pairs = {f"a training epoch, {cores} runs at once": side_by_side}
    for what in ("greedy", "nucleus, 3 samples"):
        name = f"spelling {results['spelling']['words']:,} words, {what}"
        pairs[name] = spelling[what]["ours"], spelling[what]["textbook"]
    for name, (fast, slow) in pairs.items():
        times = f"{slow / fast:.3g} times as fast"
        rows.append((f"question 3, {name}", f"{fast:.2f} s", f"{slow:.1f} s", times))
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(path, results):
    """Draw a step's time against the limit, and how times grow."""
    fig, grid = utils.figure(7.0, 5.2, 2, 2)
    cores = results["machine"]["cores"]
    shown = (
        "limit, 1 thread",
        "ours, 1 thread",
        "ours, bfloat16, 1 thread",
        f"ours, {cores} threads",
        f"textbook, {cores} threads",
    )
    colors = "0.6", utils.BLUE, utils.SKY, utils.GREEN, utils.VERMILION
    for place, row in enumerate(results["steps"].values()):
        values = [1e3 * row[who] for who in shown]
        places = [place + 0.16 * i for i in range(len(shown))]
        bars = grid[0, 0].bar(places, values, 0.15, color=colors)
        grid[0, 0].bar_label(bars, fmt="%.1f", fontsize=6.5)
    grid[0, 0].legend(bars, shown, fontsize=6.5)
    grid[0, 0].set_xticks([0.32, 1.32], results["steps"])
    grid[0, 0].set(title="Question 2: a step of 8 pictures", ylabel="Time (ms)")
    grid[0, 0].margins(y=0.6)
    for axes, what in zip(grid.flat[1:], ("pictures", "words", "beam size")):
        sizes = [int(size) for size in results["scaling"][what]]
        axes.plot(sizes, results["scaling"][what].values(), "o-", markersize=4, color=utils.BLUE)
        axes.set(xlabel=what.capitalize(), ylabel="Time (s)", xlim=(0, None), ylim=(0, None))
    titles = "Question 2: part of an epoch", "Question 3: greedy", "Question 3: beam search"
    for axes, title in zip(grid.flat[1:], titles):
        axes.set_title(f"{title}, 1 thread")
    utils.save_figure(path, fig)


# ----------------------------------------------------------------------------------------------
# main


def main(argv=None):
    """Measure everything, print it, write it down."""
    parser = utils.Parser(description=__doc__.rpartition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="only see whether everything works")
    folder = "where benchmark.json and benchmark.png go"
    parser.add_argument("--output", type=Path, default=utils.ROOT / "figures", help=folder)
    options = parser.parse_args(argv)
    quick, cores = options.quick, len(utils.cores())
    turns, count, limit, share = (1, 4, 20, 0.01) if quick else (5, 100, 10_000, 1)
    machine, steps = measure_steps(turns, count, cores)
    results = {
        "command": "python -m tests.benchmark" + quick * " --quick",
        "machine": utils.measured(torch.device("cpu"), []) | machine,
        "steps": steps,
        "spelling": measure_spelling(turns, limit, cores),
        "scaling": measure_scaling(turns, min(limit, 1000)),
        "runs_at_once": measure_runs_at_once(count, 1 if quick else cores + 2),
        "grid": measure_grid(turns, cores, share, count),
        "memory": measure_memory(share),
    }
    print_tables(results)
    utils.save_record(options.output / "benchmark.json", results)
    draw(options.output / "benchmark.png", results)


if __name__ == "__main__":
    utils.run_script(main)
