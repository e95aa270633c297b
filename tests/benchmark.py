"""How fast the project is, against textbook code and against the limits of the processor.

    python -m tests.benchmark              everything, about 20 minutes on 2 cores
    python -m tests.benchmark --quick      the same with tiny data, to see that it works
    python -m tests.benchmark --gpu        only question 2's training steps on a GPU: a minute

Prints the table of figures/speed.md and writes figures/benchmark.json and figures/benchmark.png.
Contenders take turns, so other load on the machine slows all of them, and their times are medians
over turns; whole runs are trained once. Images are random, words are the built-in sample.

textbook code | measuring | question 2 | question 3 | whole runs | table and figure | main
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
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import hw2_q2
import hw2_q3
import utils
from data.prepare_landscapes import write_npz
from data.sample import choose_pronunciations

# ----------------------------------------------------------------------------------------------
# textbook code: the two models and their training as in a good student's script


class TextbookCNN(nn.Sequential):
    """Images (B, 3, 48, 48) -> logits (B, 6): the two networks of question 2."""

    def __init__(self, batch_norm, dropout=0.1):
        layers = []
        for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
            layers.append(nn.Conv2d(c_in, c_out, 3, padding=1))
            layers += [nn.BatchNorm2d(c_out)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)]
        layers += [nn.AdaptiveAvgPool2d(1)] if batch_norm else []
        layers += [nn.Flatten(), nn.Linear(128 if batch_norm else 128 * 6 * 6, 1024), nn.ReLU()]
        layers += [nn.BatchNorm1d(1024)] if batch_norm else []
        layers += [nn.Dropout(dropout), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 6)]
        super().__init__(*layers)

    def loss(self, images, labels):
        return F.cross_entropy(self(images), labels)


class TextbookSpeller(hw2_q3.Seq2Seq):
    """The layers of question 3's model; the decoder computes a padded batch step by step."""

    def __init__(self, source_size, target_size, args):
        super().__init__(source_size, target_size, args)
        self.encoder.dropout = self.decoder.dropout = nn.Dropout(args.dropout)

    def decode(self, last, state, values, mask):
        """One step: last characters (B, 1) -> logits (B, 1, V) of the next, and the new state."""
        decoder, attention = self.decoder, self.decoder.attention
        states, state = decoder.lstm(decoder.dropout(decoder.embedding(last)), state)
        keys, queries = attention.key(values), attention.query(states)
        scores = attention.score(torch.tanh(keys + queries)).squeeze(2)  # (B, S)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
        context = weights.unsqueeze(1) @ values  # (B, 1, H)
        x = torch.tanh(attention.combine(torch.cat((context, states), 2)))
        return decoder.output(decoder.dropout(x)), state

    def loss(self, sources, lengths, targets):
        (values, state), logits = self.encoder(sources, lengths), []
        for step in range(targets.shape[1] - 1):
            last = targets[:, step : step + 1]
            step_logits, state = self.decode(last, state, values, sources != hw2_q3.PAD)
            logits.append(step_logits)
        logits, true = torch.cat(logits, 1).flatten(0, 1), targets[:, 1:].flatten()
        return F.cross_entropy(logits, true, ignore_index=hw2_q3.PAD)

    @torch.no_grad()
    def spell(self, source, p=None, max_len=hw2_q3.MAX_LEN):
        """Spell one word from its phonemes (S,), greedily, or by nucleus sampling if `p` is given.
        Returns the indices of its characters."""
        self.eval()
        values, state = self.encoder(source.unsqueeze(0), torch.tensor([len(source)]))
        mask, last, spelling = torch.ones(1, len(source), dtype=torch.bool), hw2_q3.START, []
        for _ in range(max_len):
            logits, state = self.decode(torch.tensor([[last]]), state, values, mask)
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
    return statistics.mean(losses)


# ----------------------------------------------------------------------------------------------
# measuring


def take_turns(contenders, turns):
    """{what: {who: (threads, function, *arguments)}} -> {what: {who: median seconds}}. Each
    function is called once to warm up, then `turns` times, in turn with the others."""
    seconds = {what: {who: [] for who in row} for what, row in contenders.items()}
    for _ in range(1 + turns):
        for what, row in contenders.items():
            for who, (threads, function, *arguments) in row.items():
                torch.set_num_threads(threads)
                started = time.perf_counter()
                function(*arguments)
                seconds[what][who].append(time.perf_counter() - started)
    for row in seconds.values():
        row.update({who: statistics.median(times[1:]) for who, times in row.items()})
    return seconds


def train_runs(script, lines):
    """Train runs with these options side by side, one thread each. Returns the `measured` of their
    records."""
    configs = [script.parse_args(line) for line in lines]
    utils.train_side_by_side(script, configs)
    runs = (script.make_run(args, script.load_data(args)) for args in configs)
    return [utils.load_record(run.record)["measured"] for run in runs]


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


def our_steps(options, count, device="cpu", graphs=False):
    """A function that trains our network of these options for `count` steps."""
    args = hw2_q2.parse_args(options)
    model = hw2_q2.build_model(args).to(device)
    optimizer = hw2_q2.make_optimizer(model, args)
    images, labels = hw2_q2.to_device(*make_images(count * BATCH_SIZE), device, args)
    if graphs:
        hw2_q2.capture_cuda_graphs(model, BATCH_SIZE)
    data = images, labels, [BATCH_SIZE] * count
    return functools.partial(hw2_q2.train_one_epoch, model, optimizer, *data, 1, args)


def textbook_steps(options, count):
    """A function that trains the textbook's network for `count` steps."""
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
        "convolutions": (1, convolve),
        "product": (1, lambda: [a @ b for _ in range(REPEATS)]),
        "copy": (1, lambda: [matrix.clone() for _ in range(REPEATS)]),
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
            "ours, 1 thread": (1, ours),
            "ours, bfloat16, 1 thread": (1, our_steps(options + BFLOAT16, count)),
            f"ours, {cores} threads": (cores, ours),
            f"textbook, {cores} threads": (cores, textbook),
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


def measure_gpu(turns=5, count=300):
    """For each network the seconds per step on a GPU, with and without CUDA graphs."""
    device, ways = utils.prepare_device("cuda", 1), {"CUDA graphs": True, "eager": False}
    contenders = {
        name: {way: (1, our_steps(options, count, device, ways[way])) for way in ways}
        for name, options in NETWORKS.items()
    }
    steps = take_turns(contenders, turns)
    steps = {name: {way: s / count for way, s in row.items()} for name, row in steps.items()}
    return {"machine": utils.measured(device, []), "steps": steps}


# ----------------------------------------------------------------------------------------------
# question 3: a training epoch, and the spelling of 1,000 words

ARGS = hw2_q3.parse_args(["--use_attn"])


def make_speller(limit, epochs=3):
    """Our speller with attention after some epochs of training, a function that trains it for
    another, and at most `limit` words of each split."""
    splits = {split: pairs[:limit] for split, pairs in choose_pronunciations().splits.items()}
    vocabularies = hw2_q3.make_vocabularies(ARGS, utils.Pronunciations(splits))
    utils.seed_everything(ARGS.seed)
    model = hw2_q3.build_model(ARGS, *vocabularies)
    speller = hw2_q3.Speller(model, *vocabularies)
    optimizer = torch.optim.Adam(model.parameters(), lr=ARGS.lr, fused=True)
    data = speller.encode(splits["train"]), 1, ARGS
    train = functools.partial(hw2_q3.train_one_epoch, model, optimizer, *data)
    for _ in range(epochs):
        train()
    return speller, train, splits


def unpad(rows, lengths):
    return [row[:length] for row, length in zip(rows, lengths)]


def textbook_spelling_epoch(model, pairs):
    """A function that trains the textbook's model for one epoch."""

    def collate(batch):
        sources, targets = zip(*batch)
        lengths = torch.tensor([len(source) for source in sources])
        return pad_sequence(sources, True), lengths, pad_sequence(targets, True)

    targets = unpad(pairs.targets, pairs.target_lengths)
    words = list(zip(unpad(pairs.sources, pairs.lengths), targets))
    loader = DataLoader(words, ARGS.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.Adam(model.parameters(), lr=ARGS.lr)
    return functools.partial(textbook_epoch, model, optimizer, loader)


def run_bare_lstms(model, pairs):
    """Compute only the two LSTMs and their gradients, over an epoch's batches."""
    for rows in torch.randperm(len(pairs.lengths)).split(ARGS.batch_size):
        lengths, steps = pairs.lengths[rows], pairs.target_lengths[rows].max() - 1
        x = torch.randn(len(rows), lengths.max(), ARGS.hidden_size, requires_grad=True)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y = torch.randn(len(rows), steps, ARGS.hidden_size, requires_grad=True)
        outputs = model.encoder.lstm(packed)[0].data.sum() + model.decoder.lstm(y)[0].sum()
        outputs.backward()


def measure_spelling(turns, limit, cores):
    """Whether our greedy spellings of the test words equal the textbook's, and the seconds of
    spelling and of a training epoch, on at most `limit` words of a split."""
    speller, ours, splits = make_speller(limit)
    textbook = TextbookSpeller(len(speller.source), len(speller.target), ARGS)
    textbook.load_state_dict(speller.model.state_dict())
    train, test = (speller.encode(splits[split]) for split in ("train", "test"))
    words = unpad(test.sources, test.lengths)

    def spell_one_by_one(p=None, copies=1):
        return [textbook.spell(word, p) for word in words for _ in range(copies)]

    greedy = [spelling for [spelling] in hw2_q3.spellings(speller.greedy(test))]
    same = greedy == [speller.target.decode(indices) for indices in spell_one_by_one()]
    sampling = 0.8, 3  # p, number of samples
    ours_sampling = (*sampling, torch.Generator().manual_seed(0))
    decoding = {
        "greedy": {"ours": (cores, speller.greedy, test), "textbook": (cores, spell_one_by_one)},
        "nucleus, 3 samples": {
            "ours": (cores, speller.sample, test, *ours_sampling),
            "textbook": (cores, spell_one_by_one, *sampling),
        },
    }
    medians = take_turns(decoding, turns)  # before training changes the weights
    training = {
        "ours, 1 thread": (1, ours),
        f"ours, {cores} threads": (cores, ours),
        "textbook": (cores, textbook_spelling_epoch(textbook, train)),
        "bare LSTMs, 1 thread": (1, run_bare_lstms, speller.model, train),
    }
    medians |= take_turns({"training epoch": training}, turns)
    share = spelling_epoch_side_by_side(splits, turns, cores)
    medians["training epoch"][f"ours, {cores} at once"] = share
    return {"same_spellings": same, "words": len(words), "seconds": medians}


def spelling_epoch_side_by_side(splits, turns, jobs):
    """Seconds per epoch, validation included, of `jobs` runs at once, divided by their number."""
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in zip(("train", "valid", "test"), splits.values()):
            lines = (f"{' '.join(phonemes)}\t{word}\n" for phonemes, word in pairs)
            Path(folder, f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
        options = f"--use_attn --n_epochs {turns + 1} --jobs {jobs}".split()
        options += "--data_dir", folder, "--output_dir", folder, "--seed"
        measured = train_runs(hw2_q3, [[*options, str(seed)] for seed in range(jobs)])
    return statistics.median(t for run in measured for t in run["seconds"][1:]) / jobs


def measure_scaling(turns, steps, limit):
    """Seconds on one thread by the number of training images, of words, and by beam size."""
    speller, _, splits = make_speller(limit)
    test, pairs = speller.encode(splits["test"]), choose_pronunciations().splits["train"]
    subsets = [speller.encode(pairs[: limit * eighths // 8]) for eighths in (1, 2, 4, 8, 16, 32)]
    counts, sizes = (steps // 4, steps // 2, steps, 2 * steps), (1, 2, 5, 10, 20)
    contenders = {
        "pictures": {n * BATCH_SIZE: (1, our_steps([], n)) for n in counts},
        "words": {len(x.lengths): (1, speller.greedy, x) for x in subsets},
        "beam size": {n: (1, speller.beam, test, n) for n in sizes},
    }
    return take_turns(contenders, turns)


# ----------------------------------------------------------------------------------------------
# whole runs of question 2

OURS, OURS_BFLOAT16 = "ours, side by side", "ours, bfloat16, side by side"
TEXTBOOK = "textbook, one by one"
GRID = [("-no_batch_norm", "-learning_rate", rate) for rate in ("0.1", "0.01", "0.001")]
GRID.append(("-learning_rate", "0.01"))  # the original's four runs


def measure_grid(steps, cores, share):
    """Seconds per epoch of the original's four runs and of all their epochs, ours side by side,
    from the second epoch, and the textbook's, from its steps; and the peak memory (MiB) of our two
    networks, 0 where the system does not tell. share: of the number of photographs."""
    grid, memory = {}, {}
    for who, options in ((OURS, ()), (OURS_BFLOAT16, BFLOAT16)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npz"
            splits = {split: make_images(max(64, int(n * share))) for split, n in SIZES.items()}
            write_npz(path, splits)
            options = *options, "-epochs", "2", "-jobs", str(cores), "-output_dir", folder
            options = *options, "-data_path", str(path)
            measured = train_runs(hw2_q2, [[*run, *options] for run in GRID])
        epochs = [run["seconds"][1] / share for run in measured]
        grid[who] = {"epoch_s": epochs, "grid_s": sum(epochs) * EPOCHS / cores}
        for name, run in zip(NETWORKS, measured[-2:]):
            memory[name] = max(memory.get(name, 0), run["peak_memory_mib"] or 0)
    count = math.ceil(SIZES["train"] / BATCH_SIZE)
    plain, batch_norm = (count * row[f"textbook, {cores} threads"] for row in steps.values())
    epochs = [plain, plain, plain, batch_norm]
    grid[TEXTBOOK] = {"epoch_s": epochs, "grid_s": sum(epochs) * EPOCHS}
    return grid, memory


# ----------------------------------------------------------------------------------------------
# table and figure


def readme_table(results):
    """The lines of the table: task, ours, textbook code, limit or speed-up."""
    cores, rows = results["machine"]["cores"], []

    def compare(task, ours, textbook, form="{:.2f} s"):
        speed_up = f"{textbook / ours:.3g} times as fast"
        rows.append((task, form.format(ours), form.format(textbook), speed_up))

    for name, step in results["steps"].items():
        ms = {who: f"{1e3 * seconds:.1f} ms" for who, seconds in step.items()}
        ours = f"{ms['ours, 1 thread']} on 1 thread, {ms['ours, bfloat16, 1 thread']} in bfloat16"
        textbook = f"{ms[f'textbook, {cores} threads']} on {cores} threads"
        limit = f"limit {ms['limit, 1 thread']}"
        rows.append((f"question 2, training step, {name}", ours, textbook, limit))
    minutes = {who: times["grid_s"] / 60 for who, times in results["grid"].items()}
    task, form = f"question 2, four runs of {EPOCHS} epochs", "{:.0f} minutes"
    for who, mark in ((OURS, ""), (OURS_BFLOAT16, ", bfloat16")):
        compare(task + mark, minutes[who], minutes[TEXTBOOK], form)
    seconds, words = results["spelling"]["seconds"], results["spelling"]["words"]
    epoch = seconds["training epoch"]
    compare("question 3, training epoch", epoch[f"ours, {cores} at once"], epoch["textbook"])
    for way in ("greedy", "nucleus, 3 samples"):
        compare(f"question 3, spelling {words:,} words, {way}", *seconds[way].values())
    return [f"| {' | '.join(row)} |" for row in rows]


def gpu_sentence(results):
    """What the measurements on a GPU say, as in figures/speed.md."""
    return "; ".join(
        f"{name}: {1e3 * s['CUDA graphs']:.1f} ms with graphs, {1e3 * s['eager']:.1f} ms without"
        for name, s in results["steps"].items()
    )


def draw(path, results):
    """Draw a step's time against the limit, and how times grow."""
    colors = "0.6", utils.BLUE, utils.SKY, utils.GREEN, utils.VERMILION
    fig, grid = utils.new_figure(7.0, 5.2, 2, 2)
    steps, *others = grid.flat
    for i, (who, color) in enumerate(zip(results["steps"]["plain"], colors, strict=True)):
        values = [1e3 * row[who] for row in results["steps"].values()]
        label = who.replace("ours", "this project")
        bars = steps.bar([i * 0.16, 1 + i * 0.16], values, 0.15, color=color, label=label)
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
    for axes, (what, (title, xlabel)) in zip(others, panels.items()):
        sizes, seconds = zip(*results["scaling"][what].items())
        axes.plot(list(map(int, sizes)), seconds, "o-", markersize=4, color=utils.BLUE)
        axes.set(title=f"{title}, 1 thread", xlabel=xlabel, ylabel="Time (s)")
        axes.set(xlim=(0, None), ylim=(0, None))
    utils.save_figure(path, fig)


# ----------------------------------------------------------------------------------------------
# main


def main(argv=None):
    parser = utils.Parser("python -m tests.benchmark", description=__doc__.rpartition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="use tiny data, to see that it works")
    parser.add_argument("--gpu", action="store_true", help="measure only training steps on a GPU")
    output = {"type": Path, "metavar": "DIR", "default": utils.ROOT / "figures"}
    parser.add_argument("--output", **output, help="folder of the two files (default: figures/)")
    args = parser.parse_args(argv)
    if args.gpu:
        results = {"command": "python -m tests.benchmark --gpu"} | measure_gpu()
        utils.save_record(args.output / "benchmark_gpu.json", results)
        print(gpu_sentence(results))
        return
    turns, steps, words, share = (1, 4, 20, 0.01) if args.quick else (5, 100, 10_000, 1)
    cores = utils.cpu_count()
    machine, step_times = measure_steps(turns, steps, cores)
    grid, memory = measure_grid(step_times, cores, share)
    results = {
        "command": "python -m tests.benchmark" + args.quick * " --quick",
        "machine": utils.measured(torch.device("cpu"), []) | machine,
        "steps": step_times,
        "spelling": measure_spelling(turns, words, cores),
        "scaling": measure_scaling(turns, steps, min(words, 1000)),
        "grid": grid,
        "memory": memory,
    }
    utils.save_record(args.output / "benchmark.json", results)
    draw(args.output / "benchmark.png", results)
    print("\n".join(readme_table(results)))


if __name__ == "__main__":
    utils.run_script(main)
