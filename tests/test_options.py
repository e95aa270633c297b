"""The command lines of all programs: help, runs that have one name, what is refused."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import hw2_q2
import hw2_q3
import utils
from data import prepare_landscapes, prepare_pronunciations
from tests.conftest import SCRIPTS, both_questions


def preset(question):
    script = SCRIPTS[question]
    return " ".join(utils.to_argv(script.DASH, script.PRESETS["best"]))


# ----------------------------------------------------------------------------------------------
# help and names


@both_questions
def test_help_has_commands_and_every_option_with_its_default(question, capsys):
    script = SCRIPTS[question]
    with pytest.raises(SystemExit, match="0"):
        script.main(["-h"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {script.__name__}.py")
    assert f"\n    python {script.__name__}.py" in text
    entries = re.split(r"^  (?=-)", text, flags=re.M)
    entries = {entry.split()[0].strip(","): " ".join(entry.split()) for entry in entries}
    for name, value in vars(script.parse_args([])).items():
        name = {"batch_norm": "no_batch_norm"}.get(name, name)
        if name not in ("mode", "ipa"):  # of no dash
            entry = entries[script.DASH + name]
            has_default = type(value) in (str, int, float)
            assert not has_default or re.search(rf"\(default: .*{value}", entry), name
    assert preset(question) in entries[f"{script.DASH}recipe"]


RUNS = {  # on each line the command lines of one run
    "q2": f"""
 | -learning_rate 1e-2 -epochs 40 -batch_size 8 -optimizer sgd -momentum 0 -l2_decay 0 -seed 42 42 \
 | -dropout 0.1 -head gap -pool max -last_batch merge -augment -tta -recipe assignment \
 | -threads 3 -jobs 2 -device cpu -restart -data_path x.npz -output_dir .
-learning_rate 0.1 -seed 3
-head flatten
-no_batch_norm | -no_batch_norm -head flatten -last_batch keep
-no_batch_norm -head gap
-no_batch_norm -last_batch merge
-no_batch_norm -head gap -last_batch merge
-last_batch keep
-pool stride | -no_maxpool
-kernel_size 48 | -kernel_size 48 -pool none
-convs 2 -kernel_size 5
-optimizer adam -l2_decay 0.0005
-scramble_pixels | -pixels scrambled
-precision bfloat16
-augment flip crop -tta mirror shift | -augment crop flip -tta shift mirror
-recipe best | {preset("q2")}
-recipe best -augment
-recipe best -batch_size 32 | -batch_size 32 -recipe best
-recipe best -momentum 0 -dropout 0.1
-recipe best -model resnet""",
    "q3": f"""
 | --n_epochs 20 --batch_size 64 --lr 3e-3 --dropout 0.3 --hidden_size 128 --layers 1 --seed 42 \
 | --nucleus --topp 0.9 --k 5 --beam_size 5 --max_len 9 --direction p2g --recipe assignment \
 | --threads 3 --jobs 2 --device cpu --restart --data_dir a --output_dir . --checkpoint_name x.pt
--use_attn --lr 0.01 | --lr 0.01 --use_attn
--seed 2
--ensemble --seed 1 2
--layers 2 --clip 1.0 --direction g2p
--recipe best | {preset("q3")}
--recipe best --layers 3 | --layers 3 --recipe best""",
}


def names_of_runs(script, args):
    """The names of the arguments' runs; each run's command makes it again, anywhere."""
    data, names = SimpleNamespace(name="photographs", fingerprint="0" * 12), set()
    if script is hw2_q2:
        configs = utils.expand(args, "learning_rate", "seed")
    else:
        configs = [args] if args.ensemble else hw2_q3.members(args)
    for config in configs:
        run = script.make_run(config, data)
        program, name, *words = shlex.split(run.command)
        assert (program, name) == ("python", f"{script.__name__}.py")
        again = script.make_run(script.parse_args(words), data)
        assert (again.name, again.command) == (run.name, run.command)
        runtime = {f"{script.DASH}{x}" for x in ("recipe", "threads", "restart", "output_dir")}
        assert runtime.isdisjoint(words)
        names.add(run.name)
    return names


@both_questions
def test_each_run_has_one_name_and_its_command_repeats_it(question):
    script, names = SCRIPTS[question], set()
    lines = RUNS[question].strip("\n").splitlines()
    for line in lines:
        same = [script.parse_args(words.split()) for words in line.split("|")]
        [name] = set().union(*(names_of_runs(script, args) for args in same))
        names.add(name)
    assert len(names) == len(lines)


# ----------------------------------------------------------------------------------------------
# refused command lines

BAD_VALUES = {
    "q2": """-epochs 0|-batch_size 0|-learning_rate 0|-learning_rate .1 0|-dropout 1|-momentum 1
-label_smoothing 1|-kernel_size 4|-kernel_size 0|-convs 0|-seed 1 2 x|-threads 0|-jobs 0
-tta mirror mirrors|-predict|-leaning_rate 1|-epochs|train""",
    "q3": """--n_epochs 0|--batch_size 0|--lr 0|--dropout 1|--hidden_size 7|--topp 0|--topp 1.1
--k 0|--beam_size 0|--max_len 0|--jobs 0|--threads 0|--layers 0|--clip 0|--embedding_scale 0
--label_smoothing 1|--use_att|--beam_siz 5|guess""",
}
REFUSED = {
    (question, line): line.split()[0]  # which the message names
    for question, lines in BAD_VALUES.items()
    for line in re.split(r"[|\n]", lines)
}
REFUSED |= {
    ("q2", "-pool avg -no_maxpool"): "-no_maxpool: not allowed with argument -pool",
    ("q2", "-batch_size 1"): "batch norm needs at least -batch_size 2",
    ("q2", "-kernel_size 48 -pool avg"): "drop -pool and -convs",
    ("q2", "-kernel_size 48 -convs 2"): "drop -pool and -convs",
    ("q2", "-model resnet -no_batch_norm"): "-model resnet has a fixed shape",
    ("q2", "-model resnet -convs 2"): "-model resnet has a fixed shape",
    ("q2", "-scramble_pixels -augment flip"): "-pixels scrambled cannot be combined",
    ("q2", "-pixels shuffled -recipe best"): "-pixels shuffled cannot be combined",
    ("q2", "-optimizer adam -momentum 0.9"): "-momentum needs -optimizer sgd",
    ("q2", "-optimizer adam -recipe best"): "with adam, -momentum 0",
    ("q2", "-json"): "need -predict",
    ("q2", "-checkpoint x.pt"): "need -predict",
    ("q2", "-count_params -predict x.jpg"): "either -predict or -count_params",
    ("q2", "-device abacus"): "device 'abacus' cannot be used",
    ("q3", "--input_feeding"): "needs --use_attn",
    ("q3", "train abc"): "need the mode spell",
    ("q3", "--input x"): "need the mode spell",
    ("q3", "spell abc --input x"): "either as arguments or by --input",
    ("q3", "--ensemble"): "several seeds",
    ("q3", "train --ensemble --seed 1 2"): "several seeds",
    ("q3", "--ensemble --seed 1 2 --lr 0.1 0.2"): "several seeds",
    ("q3", "test --seed 1 2"): "drop the mode",
    ("q3", "spell a --lr 0.1 0.2"): "drop the mode",
    ("q3", "--seed 1 2 --checkpoint_name x.pt"): "give one --seed",
    ("q3", "--device abacus"): "device 'abacus' cannot be used",
}


@pytest.mark.parametrize(("command", "reason"), REFUSED.items(), ids=map(" ".join, REFUSED))
def test_bad_options_are_refused_in_one_line(command, reason, commands, tmp_path, fails):
    question, line = command
    argv = [*line.split(), *commands[question][-3:], tmp_path]  # data, folder
    assert reason in fails(SCRIPTS[question].main, argv)
    assert not any(tmp_path.iterdir())


WRONG_VALUES = "-1", "nan", "inf", "1e400", "9" * 30, "0x10", "many", "1 2", " "
OPTIONS = [  # those that take a number or a name
    (script.main, action.option_strings[0])
    for script in SCRIPTS.values()
    for action in script.make_parser()._actions
    if action.option_strings and (action.choices or action.type not in (None, Path))
]
OPTIONS += [(prepare_pronunciations.main, name) for name in ("--train", "--valid", "--test")]
OPTIONS += [(main, "--seed") for main in (prepare_landscapes.main, prepare_pronunciations.main)]


@pytest.mark.parametrize(("main", "name"), OPTIONS)
def test_a_wrong_value_is_refused_by_name_with_the_right_ones(main, name, fails):
    for value in WRONG_VALUES:
        line = fails(main, [name, value])
        assert f"argument {name}: " in line
        assert re.search(r"is not (an integer|a number) in [\[(].+, .+[\])]|choose from", line)


PARSERS = {name: script.parse_args for name, script in SCRIPTS.items()}
PARSERS["landscapes"] = prepare_landscapes.parse_args
PARSERS["pronunciations"] = prepare_pronunciations.parse_args
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
WORDS = [name for s in SCRIPTS.values() for name in s.make_parser()._option_string_actions]
WORDS += ["--archive", "--tsv", "--language", "--train", "--valid", "--keep", "-learning_rat"]
WORDS += ["best", "resnet", "flip", "mirror", "one_cycle", "g2p", "train", "test", "spell", "all"]
WORDS += ["48", "0.5", "-1", "nan", "1e999", "9" * 400, "", "-", "--", "=", "\u202e", "1 2", "-\n"]


@pytest.mark.parametrize("name", PARSERS)
@example(words=["-recipe", "best", "-seed", "1", "2", "-augment"])
@example(words=["--recipe", "best", "--ensemble", "--seed", "1", "2"])
@example(words=["--lexicon", "my words.txt"])
@given(words=st.lists(st.sampled_from(WORDS) | TEXT | st.integers().map(str), max_size=6))
def test_fuzzed_command_lines(name, words):
    """Each is refused in one line, or its runs' commands repeat them."""
    try:
        args = PARSERS[name](words)
    except utils.UserError as error:
        assert str(error)
        assert "\n" not in str(error)
    except SystemExit as stop:  # after the help text
        assert stop.code == 0
    else:
        if name in SCRIPTS:
            names_of_runs(SCRIPTS[name], args)
